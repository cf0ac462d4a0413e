"""Installed as a wheel and as an editable checkout, the unmodified mergekit knows `dam`."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import tiny
from mergekit.options import MergeOptions

from mergekit_dam.config import read_recipe
from mergekit_dam.fit import fit

ROOT = Path(__file__).resolve().parents[1]
MERGE = "import sys; from mergekit.scripts.run_yaml import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project's files alone, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "mergekit_dam", folder / "mergekit_dam")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(project: Path) -> Path:
    pip(
        sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", ".", cwd=project
    )
    (path,) = (project / "dist").glob("*.whl")
    return path


def pip(python: str | Path, *arguments: str | Path, cwd: Path | None = None) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(params=["wheel", "editable"])
def python(request, project: Path, wheel: Path, tmp_path: Path) -> Path:
    """The interpreter of a fresh environment with mergekit, and ours installed in one way.

    It sees this environment's packages behind its own, so that torch is not installed again.
    """
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)  # an old setuptools would come with it
    python = folder / "bin" / "python"
    own = next(folder.glob("lib/python*/site-packages"))
    (own / "shared.pth").write_text(sysconfig.get_paths()["purelib"])
    what = [wheel] if request.param == "wheel" else ["-e", project]
    options = ("--no-deps", "--no-build-isolation", "--ignore-installed")
    pip(sys.executable, "--python", python, "install", *options, *what)
    return python


def test_stock_mergekit_merges(python: Path, recipe, tmp_path: Path):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    path = str(recipe(models))
    read = read_recipe(path)
    fit(read, read.coefficients, MergeOptions(quiet=True), device="cpu")
    where = "import mergekit_dam; print(mergekit_dam.__file__)"
    shown = subprocess.run([python, "-c", where], capture_output=True, text=True, cwd=tmp_path)
    assert str(ROOT) not in shown.stdout
    out = tmp_path / "out"
    command = [python, "-c", MERGE, path, str(out), "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    tiny.load(out)


def test_the_wheel_holds_the_package_alone(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"mergekit_dam/fit/stage.py", "mergekit_dam/report/page.html"} <= set(names)
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "mergekit_dam"
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
