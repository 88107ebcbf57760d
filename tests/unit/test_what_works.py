"""docs/adapters.md's table of what works with what is the tests' own, and each of its cells has one."""

import re
from pathlib import Path

import pytest

from tests.support.what_works import COLUMNS, TABLE, Shown, markdown

ROOT = Path(__file__).parents[2]
CELLS = [(f"{kind}, {column}", shown) for kind, cells in TABLE.items() for column, shown in cells.items()]


@pytest.mark.parametrize(("cell", "shown"), CELLS, ids=[name for name, _ in CELLS])
def test_every_cell_has_its_test(cell: str, shown: Shown) -> None:
    source = (ROOT / shown.file).read_text()
    assert re.search(rf"^def {shown.test}\(", source, re.MULTILINE), f"{shown.file} has no {shown.test}"
    assert shown.row in (ROOT / (shown.row_file or shown.file)).read_text(), f"{shown.row} is gone"
    assert cell.rpartition(", ")[2] in ", ".join(COLUMNS)


def test_the_page_has_the_table() -> None:
    assert markdown() in (ROOT / "docs/adapters.md").read_text(), "put in what tests.support.what_works prints"
