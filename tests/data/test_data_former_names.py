"""Names that earlier releases had keep working, and their warning says the new one."""

from __future__ import annotations

import importlib

import pytest

from softprompt.data import rows_from_texts

RENAMED = [
    ("softprompt.data", "Written", "RowText"),
    ("softprompt.data", "write_row", "render_row"),
    ("softprompt.data", "write_rows", "render_rows"),
    ("softprompt.evaluation", "Answered", "InputAnswers"),
    ("softprompt.evaluation", "Table", "ReportTable"),
]


@pytest.mark.parametrize(("module", "former", "name"), RENAMED)
def test_a_former_name_is_the_new_one_with_a_warning(module: str, former: str, name: str) -> None:
    package = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{module}.{former} is now {name}"):
        assert getattr(package, former) is getattr(package, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = package.no_such_name


def test_rows_are_still_taken_by_the_former_method() -> None:
    rows = rows_from_texts(["a", "b", "c"])
    with pytest.warns(DeprecationWarning, match="Rows.take is now Rows.select"):
        assert rows.take([2, 0]).records == rows.select([2, 0]).records
