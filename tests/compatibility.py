"""The tables of docs/compatibility.md, made of the tests that show their lines.

A test says with `shows` which line it stands for; without the test there is no line.
`python tests/compatibility.py` writes the page's tables.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
MODULES = (
    "test_source_kinds", "test_lora", "test_existing_configs", "test_tokenizers", "test_slices",
    "test_teachers", "test_architectures", "test_merge", "test_base", "test_chain",
)  # fmt: skip
HEADS = {
    "sources": ("sources", "how", "test"),
    "refused sources": ("sources", "what the sentence names", "test"),
    "configs": ("was", "`dam.formula`", "`dam.sparsify`", "parameters that keep their meaning"),
    "settings": ("setting of mergekit's", "how", "test"),
    "commands": ("command", "how", "test"),
}


def shows(table: str, what: str, how: str) -> Callable:
    """Marks a test as what shows a line of a table; a test may show several."""

    def mark(test: Callable) -> Callable:
        test.lines = [(table, what, how), *getattr(test, "lines", [])]
        return test

    return mark


def tables() -> dict[str, str]:
    """Name -> table, in Markdown."""
    import architectures
    import test_existing_configs

    modules = [importlib.import_module(name) for name in MODULES]
    result = {"architectures": architectures.table()}
    for name, head in HEADS.items():
        rows = [row for module in modules for row in _rows(module, name)]
        if name == "configs":
            rows = test_existing_configs.table_rows()
        lines = [head, ["---"] * len(head), *rows]
        result[name] = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return result


def _rows(module: ModuleType, table: str) -> Iterator[tuple[str, str, str]]:
    """In the order in which the tests stand in their file."""
    for name, test in vars(module).items():
        if getattr(test, "__module__", None) == module.__name__:
            for of, what, how in getattr(test, "lines", ()):
                if of == table:
                    yield what, how, f"`{module.__name__}.py::{name}`"


def page_with(page: str, made: dict[str, str]) -> str:
    """The page with these tables, each after its mark and up to the next empty line."""
    for name, table in made.items():
        mark = f"<!-- table: {name} -->\n"
        assert page.count(mark) == 1, name
        page = re.sub(re.escape(mark) + r"(\|.*\n)*", lambda _, t=mark + table: t, page)
    return page


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
