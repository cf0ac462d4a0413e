"""How stock mergekit comes to know `dam`, in fresh interpreters and every order of imports."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mergekit import merge_methods

import mergekit_dam
from mergekit_dam import plugin

PACKAGE = Path(mergekit_dam.__file__).parent
OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
FIRST = "import json, sys\nout = {}\n"
LAST = "\nprint(json.dumps(out))"

# name -> (program that fills `out`, environment); {broken} is a copy of the package whose
# method cannot be imported.
PROGRAMS: dict[str, tuple[str, dict[str, str]]] = {
    "torch_alone": (
        """
import torch
from statistics import median
from time import perf_counter
from mergekit_dam import plugin
out["loaded"] = sorted({name.partition(".")[0] for name in sys.modules})
out["ours"] = sorted(name for name in sys.modules if name.startswith("mergekit_dam"))
finders = lambda: [f for f in sys.meta_path if type(f).__name__ == "_RegistryFinder"]
plugin.autoload()
plugin.autoload()
out["finders_before"] = len(finders())
first, again = [], []
for times in [first] * 21 + [again] * 21:
    if times is first:
        sys.meta_path[:] = [f for f in sys.meta_path if f not in finders()]
    start = perf_counter()
    plugin.autoload()
    times.append(perf_counter() - start)
out["seconds"] = [median(first), median(again)]
import mergekit.merge_methods as methods
out["name"] = methods.get("dam").spec.name
out["finders_after"] = len(finders())
known = []
for _ in range(21):
    start = perf_counter()
    plugin.autoload()
    known.append(perf_counter() - start)
out["seconds"].append(median(known))
out["count"] = [m.spec.name for m in methods.registered_methods()].count("dam")
out["loader"] = type(methods.registry.__spec__.loader).__name__
""",
        {},
    ),
    "hook_alone": (
        """
import torch
before = set(sys.modules)
from mergekit_dam import plugin
plugin.autoload()
out["new"] = sorted(set(sys.modules) - before)
""",
        OFF,
    ),
    "mergekit_first": (
        """
import mergekit.merge_methods as methods
out["name"] = methods.get("dam").spec.name
import mergekit_dam.plugin
mergekit_dam.plugin.autoload()
out["count"] = [m.spec.name for m in methods.registered_methods()].count("dam")
""",
        {},
    ),
    "package_first": (
        """
import mergekit_dam
out["loaded"] = sorted({name.partition(".")[0] for name in sys.modules})
import torch
import mergekit.merge_methods as methods
out["name"] = methods.get("dam").spec.name
out["count"] = [m.spec.name for m in methods.registered_methods()].count("dam")
""",
        {},
    ),
    "method_first": (
        """
from mergekit_dam.method import dam
import mergekit.merge_methods as methods
out["same"] = methods.get("dam") is dam
out["count"] = [m.spec.name for m in methods.registered_methods()].count("dam")
""",
        {},
    ),
    "switched_off": (
        """
import torch, mergekit.merge_methods as methods
out["before"] = "dam" in {m.spec.name for m in methods.registered_methods()}
import mergekit_dam
out["name"] = methods.get("dam").spec.name
""",
        OFF,
    ),
    "broken": (
        """
import torch
out["ours"] = "mergekit_dam.plugin" in sys.modules
import mergekit.merge_methods as methods
out["names"] = sorted(m.spec.name for m in methods.registered_methods())
from mergekit_dam import plugin
plugin.autoload()
# Once more as if nothing had been imported, with that warning made an error.
for name in [name for name in sys.modules if name.partition(".")[0] == "mergekit"]:
    del sys.modules[name]
import warnings
warnings.filterwarnings("error", "mergekit-dam could not")
plugin.autoload()
try:
    import mergekit.merge_methods
    plugin.autoload()
    out["raised"] = None
except Exception as error:
    out["raised"] = repr(error)
""",
        {"PYTHONPATH": "{broken}"},
    ),
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict, str]]:
    """The output and the stderr of each program; all run at the start, side by side."""
    broken = tmp_path_factory.mktemp("broken")
    shutil.copytree(PACKAGE, broken / "mergekit_dam", ignore=shutil.ignore_patterns("__pycache__"))
    (broken / "mergekit_dam" / "method.py").write_text("raise RuntimeError('broken on purpose')\n")
    # The tests' own switches (see `commands`) must not decide what a program sees.
    inherited = {k: v for k, v in os.environ.items() if k not in (*OFF, "PYTHONWARNINGS")}

    def start(name: str) -> subprocess.CompletedProcess:
        program, extra = PROGRAMS[name]
        return subprocess.run(
            [sys.executable, "-c", FIRST + program + LAST],
            env=inherited | {key: value.format(broken=broken) for key, value in extra.items()},
            cwd=broken.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(PROGRAMS, pool.map(start, PROGRAMS), strict=True))

    def get(name: str) -> tuple[dict[str, Any], str]:
        assert done[name].returncode == 0, done[name].stderr
        return json.loads(done[name].stdout.splitlines()[-1]), done[name].stderr

    return get


def test_importing_torch_alone_imports_nothing_heavy(result) -> None:
    out, _ = result("torch_alone")
    assert out["ours"] == ["mergekit_dam", "mergekit_dam.plugin"]
    assert not {"mergekit", "transformers", "pydantic", "click"} & set(out["loaded"])


def test_mergekit_knows_dam_with_only_torch_imported(result) -> None:
    out, _ = result("torch_alone")
    assert out["name"] == "dam"
    assert out["count"] == 1


def test_autoload_is_idempotent(result) -> None:
    out, _ = result("torch_alone")
    assert out["finders_before"] == 1
    assert out["finders_after"] == 0
    assert out["count"] == 1


def test_autoload_itself_takes_next_to_nothing(result) -> None:
    out, _ = result("torch_alone")
    assert max(out["seconds"]) < 1e-3


def test_the_hook_adds_two_modules_to_what_torch_has_loaded(result) -> None:
    out, _ = result("hook_alone")
    assert out["new"] == ["mergekit_dam", "mergekit_dam.plugin"]


TIMED = """
import contextlib, importlib.util, sys, time, warnings  # which torch has loaded
start = time.perf_counter()
from mergekit_dam.plugin import autoload
autoload()
print(time.perf_counter() - start)
"""


def test_importing_torch_takes_less_than_a_millisecond_more(tmp_path: Path) -> None:
    """All that the entry point costs, in fresh processes with compiled files, as pip leaves them.
    The best of several: other work on the machine can only add to it."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment = kept | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    seconds = [
        float(subprocess.check_output([sys.executable, "-c", TIMED], env=environment, text=True))
        for _ in range(12)
    ]
    assert min(seconds) < 1e-3


def test_the_registry_keeps_its_real_loader(result) -> None:
    out, _ = result("torch_alone")
    assert out["loader"] == "SourceFileLoader"


@pytest.mark.parametrize("order", ["mergekit_first", "package_first"])
def test_mergekit_knows_dam_in_every_order_of_imports(result, order: str) -> None:
    out, _ = result(order)
    assert (out["name"], out["count"]) == ("dam", 1)


def test_importing_the_package_imports_nothing_heavy(result) -> None:
    out, _ = result("package_first")
    assert "mergekit_dam" in out["loaded"]
    assert not {"torch", "mergekit", "transformers", "pydantic"} & set(out["loaded"])


def test_importing_the_method_first_registers_the_same_one(result) -> None:
    out, _ = result("method_first")
    assert out == {"same": True, "count": 1}


def test_with_pytorchs_autoload_off_the_package_registers_itself(result) -> None:
    out, _ = result("switched_off")
    assert out == {"before": False, "name": "dam"}


def test_a_broken_method_only_warns(result) -> None:
    out, stderr = result("broken")
    assert out["ours"] is True  # the hook was there
    assert "linear" in out["names"]
    assert "dam" not in out["names"]
    assert stderr.count("mergekit-dam could not register its merge method") >= 2
    assert "broken on purpose" in stderr


def test_a_broken_method_breaks_nothing_where_warnings_are_errors(result) -> None:
    out, _ = result("broken")
    assert out["raised"] is None


def fail(_: object) -> None:
    raise RuntimeError("broken on purpose")


@pytest.mark.filterwarnings("error")
def test_autoload_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in it would break `import torch`."""
    monkeypatch.setitem(sys.modules, plugin.REGISTRY, object())
    monkeypatch.setattr(plugin, "_register", fail)
    assert plugin.autoload() is None


def test_autoload_warns_of_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, plugin.REGISTRY, object())
    monkeypatch.setattr(plugin, "_register", fail)
    with pytest.warns(UserWarning, match="could not register.*broken on purpose"):
        plugin.autoload()


@pytest.mark.parametrize(
    ("group", "name", "target"),
    [
        ("torch.backends", "mergekit_dam", "mergekit_dam.plugin:autoload"),
        ("mergekit.merge_methods", "dam", "mergekit_dam.method:dam"),
    ],
)
def test_the_entry_points_are_declared(group: str, name: str, target: str) -> None:
    found = importlib.metadata.entry_points(group=group, name=name)
    # An editable install lists its distribution twice where its egg-info is on the path too.
    assert {point.value for point in found} == {target}
    module, _, attribute = target.partition(":")
    loaded = next(iter(found)).load()
    assert loaded is getattr(sys.modules[module], attribute)


def test_mergekit_finds_a_name_and_the_paper_for_its_card() -> None:
    spec = merge_methods.get("dam").spec
    assert "DAM" in spec.pretty_name
    assert spec.reference_url == "https://arxiv.org/abs/2410.08371"
    required, *others = spec.parameters
    assert required.name == "coefficients"
    assert all(parameter.default is None for parameter in others)  # mergekit's own, for the fit
