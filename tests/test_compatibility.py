"""docs/compatibility.md shows what the tests show."""

import compatibility


def test_the_page_has_the_tables_of_the_tests():
    page = compatibility.PAGE.read_text(encoding="utf-8")
    assert compatibility.page_with(page, compatibility.tables()) == page, (
        "run: python tests/compatibility.py"
    )


def test_every_table_has_lines():
    for name, table in compatibility.tables().items():
        assert table.count("\n") > 4, name
