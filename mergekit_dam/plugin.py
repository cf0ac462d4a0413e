"""How the unmodified mergekit commands come to know the method `dam`.

mergekit 0.1.5 has no plugin discovery. PyTorch (2.5 and later) calls every entry point of
the group `torch.backends` at the end of `import torch`; ours is `autoload`. It watches for
the import of mergekit's method registry and registers `dam` right after it.

This runs in every process that imports torch, so it imports neither mergekit nor anything
else of weight, and it never raises: an exception here would break `import torch`.
Set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to switch it off; `mergekit-dam merge` works without it.
"""

import contextlib
import importlib.util
import sys
import warnings

REGISTRY = "mergekit.merge_methods.registry"
METHOD = "mergekit_dam.method"


def autoload() -> None:
    """Register `dam` now if mergekit's registry is loaded, else when it will be. Idempotent."""
    try:
        registry = sys.modules.get(REGISTRY)
        if registry is not None:
            _register(registry)
        elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _RegistryFinder())
    except Exception as error:
        _warn(error)


def _register(registry) -> None:
    """Add `dam` to mergekit's registry; a second registration would be an error there."""
    if sys.modules.get(METHOD) is not None and not hasattr(sys.modules[METHOD], "dam"):
        return  # it is being imported, has brought mergekit in, and ends with `autoload`
    from mergekit_dam.method import dam

    if dam.spec.name not in {method.spec.name for method in registry.registered_methods()}:
        registry.register(dam)


def _warn(error: Exception) -> None:
    with contextlib.suppress(Warning):  # where warnings are errors, silence is the lesser evil
        message = f"mergekit-dam could not register its merge method: {error!r}"
        warnings.warn(message, stacklevel=3)


class _RegistryFinder:
    """Meta path finder that wraps the loader of one module, mergekit's method registry."""

    def find_spec(self, name, path=None, target=None):
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)  # so that the next line asks the real finders
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader:
    """Loads the registry with its real loader, then registers `dam` in it."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        self._loader.exec_module(module)
        module.__spec__.loader = module.__loader__ = self._loader
        try:
            _register(module)
        except Exception as error:
            _warn(error)
