"""A part of the skeleton whose weights are made at each call and exist no longer than it needs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mergekit_dam.errors import DamError
from mergekit_dam.model.assembly import Assembly
from mergekit_dam.model.skeleton import Skeleton
from mergekit_dam.products import fast_products

# A view (see `views.View`), output tensors, and those of which rows are looked up -> their weights.
Make = Callable[[Any, Sequence[str], Collection[str]], Mapping[str, Tensor]]
Call = Callable[["Block", tuple, dict], Any]  # runs a block with the arguments that it was given


class Block(nn.Module):
    """Stands in a block's place in the skeleton and gives it its weights at each call."""

    def __init__(
        self,
        block: nn.Module,
        path: str,  # its name in the skeleton
        tensors: Mapping[str, str],  # the block's parameters and buffers -> output tensors
        assemblies: Sequence[Assembly],  # of its other parameters
        make: Make,
        call: "Call",
    ):
        super().__init__()
        self.block, self.path, self.tensors = block, path, dict(tensors)
        self._assemblies, self._make, self._call = tuple(assemblies), make, call
        assembled = (name for assembly in assemblies for name in assembly.parameters)
        local = [*tensors, *(name.removeprefix(f"{path}.") for name in assembled)]
        self._places = {name: _place(block, name) for name in local}
        self._tables = [tensors[name] for name in tensors if _is_table(block, name)]

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for attributes, such as attention_type
            return getattr(super().__getattr__("block"), name)

    def names(self) -> list[str]:
        """The output tensors that its weights are made of."""
        assembled = (name for assembly in self._assemblies for name in assembly.names)
        return [*self.tensors.values(), *assembled]

    @property
    def is_assembled(self) -> bool:
        """Whether some of its weights are made of several output tensors."""
        return bool(self._assemblies)

    def owners(self) -> dict[nn.Module, dict[str, tuple[dict, str]]]:
        """The modules that own its weights: of each, their names in the block and their places."""
        result: dict[nn.Module, dict[str, tuple[dict, str]]] = {}
        for name, place in self._places.items():
            module = self.block.get_submodule(name.rpartition(".")[0])
            result.setdefault(module, {})[name] = place
        return result

    def forward(self, *args, **kwargs):
        return self._call(self, args, kwargs)

    def run_each(
        self, calls: Sequence[tuple[tuple, dict]], weights: Mapping[str, Tensor]
    ) -> list[Any]:
        """The block with these weights for several calls."""
        return [self.run_with(weights, *args, **kwargs) for args, kwargs in calls]

    def run_with(self, weights: Mapping[str, Tensor], *args, **kwargs):
        """The block with weights in the places of its own, for one call. (`functional_call` of
        torch looks for every place each time: a twentieth of a short block's time on a GPU.)"""
        before = self._put(weights)
        try:
            with fast_products(next((w.device for w in weights.values()), None)):
                return self.block(*args, **kwargs)
        finally:
            self._put(before)

    def _put(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in their places; returns those that were there."""
        before = {}
        for name, tensor in tensors.items():
            owner, leaf = self._places[name]
            before[name], owner[leaf] = owner[leaf], tensor
        return before

    def weights(self, view: Any, *, whole: bool = True) -> dict[str, Tensor]:
        """The block's parameters and buffers as a view has them, by their names in it; unless they
        are to be whole, tables may be such that only those rows are made that are looked up."""
        direct = self._make(view, list(self.tensors.values()), () if whole else self._tables)
        weights = {local: direct[name] for local, name in self.tensors.items()}
        for assembly in self._assemblies:
            made = assembly(self._make(view, assembly.names, ()))
            weights |= {name.removeprefix(f"{self.path}."): w for name, w in made.items()}
        return weights


def _place(block: nn.Module, name: str) -> tuple[dict, str]:
    """Where a module keeps a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    owner = block.get_submodule(path)
    return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf


def _is_table(block: nn.Module, name: str) -> bool:
    """Whether a parameter is an embedding's."""
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(block.get_submodule(path), nn.Embedding)


def with_made_weights(skeleton: Skeleton, make: Make, call: Call) -> nn.Module:
    """Put a `Block` in the place of every block of the skeleton."""
    missing = set(skeleton.tensors) | {p for a in skeleton.assemblies for p in a.parameters}
    for path, block in list(skeleton.blocks()):
        own = {name for name in missing if name.startswith(f"{path}.")}
        tensors = {
            name.removeprefix(f"{path}."): skeleton.tensors[name]
            for name in own & skeleton.tensors.keys()
        }
        assemblies = [a for a in skeleton.assemblies if own.issuperset(a.parameters)]
        missing -= own
        parent, _, child = path.rpartition(".")
        wrapped = Block(block, path, tensors, assemblies, make, call)
        setattr(skeleton.model.get_submodule(parent), child, wrapped)
    # A parameter without a value would compute with uninitialised memory, silently.
    if missing:
        raise DamError(f"The fit gives no weights to {', '.join(sorted(missing))} of the model.")
    return skeleton.model
