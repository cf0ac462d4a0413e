"""The documentation says what the code does: examples run, names exist, sentences are exact."""

import ast
import functools
import importlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mergekit_dam
from mergekit_dam import coefficients
from mergekit_dam.config import Settings, read_recipe

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mergekit_dam"
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def code_blocks(language: str, pages: list[Path], containing: str = "") -> list:
    """One test parameter for each fenced block, named by page and number."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in pages
        for number, block in enumerate(fence.findall(page.read_text(encoding="utf-8")), 1)
        if containing in block
    ]


@pytest.mark.parametrize("block", code_blocks("yaml", PAGES, containing="merge_method:"))
def test_configs_are_valid(block: str, tmp_path: Path):
    path = tmp_path / "config.yml"
    path.write_text(block, encoding="utf-8")
    assert read_recipe(str(path)).problems == ()


@pytest.mark.parametrize("block", code_blocks("python", list(DOCS.glob("*.md"))))
def test_python_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    header = coefficients.Header(
        package=mergekit_dam.__version__,
        formula="weights",
        granularity="column",
        sources=tuple(coefficients.Source(reference=r, weights=r) for r in ("./math", "./code")),
    )
    coefficients.save(tmp_path / "dam.safetensors", {"head": torch.full((2, 1, 4), 0.5)}, header)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "documentation", "exec"), {"__name__": "documentation"})


def test_config_reference_is_up_to_date(capsys: pytest.CaptureFixture):
    runpy.run_path(str(DOCS / "make_config_reference.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed == (DOCS / "config.md").read_text(encoding="utf-8"), (
        "run `python docs/make_config_reference.py > docs/config.md`"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dotted_names() -> list[str]:
    """Names in backticks such as `formula.combine`, whose first part is a module of ours, a
    library that the page mentions, or `dam` for a key of the YAML."""
    roots = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    roots |= {"torch", "transformers", "datasets", "dam"}
    found = re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)+)`", (DOCS / "method.md").read_text("utf-8"))
    names = {name for name in found if not name.endswith(".py")}
    return sorted(name for name in names if name.partition(".")[0] in roots)


@pytest.mark.parametrize("name", dotted_names())
def test_names_in_method_exist(name: str):
    root, _, rest = name.partition(".")
    if root == "dam":
        assert rest in Settings.model_fields
    elif root in ("torch", "transformers", "datasets"):
        assert resolve(name)
    else:
        assert resolve(f"mergekit_dam.{name}")


def resolve(name: str) -> object:
    """Import as far as there are modules, then get attributes. Raises where there is none."""
    first, *rest = name.split(".")
    value, path = importlib.import_module(first), first
    for part in rest:
        path = f"{path}.{part}"
        try:
            value = importlib.import_module(path)
        except ModuleNotFoundError:
            value = getattr(value, part)
    return value


def test_files_in_method_exist():
    text = (DOCS / "method.md").read_text("utf-8")
    names = [n for n in re.findall(r"`([\w/]+\.py)`", text) if not n.startswith("dam/")]
    assert names
    for name in names:
        assert (PACKAGE / name).exists(), name


def test_every_term_is_in_method():
    text = (DOCS / "method.md").read_text("utf-8")
    for key in Settings.model_fields["objective"].annotation.model_fields:
        assert f"| `{key}` |" in text


def refusals() -> list[str]:
    """The sentences of the tables under «What a reader refuses»."""
    text = (DOCS / "file-format.md").read_text("utf-8")
    section = text.partition("## What a reader refuses")[2].partition("\n## ")[0]
    return re.findall(r"^\| (?!what is wrong)[^|]+ \| (.+) \|$", section, re.MULTILINE)


@pytest.mark.parametrize("sentence", refusals())
def test_refusals_are_the_codes_own(sentence: str):
    assert any(pattern.fullmatch(sentence.rstrip(".")) for pattern in messages()), sentence


@functools.cache
def messages() -> tuple[re.Pattern, ...]:
    """Every text in the code, what is filled in standing for the documentation's capitals."""
    return tuple(
        re.compile(pattern.removesuffix(re.escape(".")))
        for path in PACKAGE.rglob("*.py")
        for pattern in _texts(ast.parse(path.read_text("utf-8")))
        if len(pattern) > 30
    )


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                re.escape(part.value) if isinstance(part, ast.Constant) else "[A-Z]+"
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.escape(node.value)


def test_header_fields_are_in_file_format():
    text = (DOCS / "file-format.md").read_text("utf-8")
    for record in (coefficients.Header, coefficients.Source):
        for field in record.model_fields:
            assert f"| `{field}` |" in text, field
