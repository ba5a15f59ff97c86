"""Every row of docs/errors.md happens as it says: one line with that message, no traceback, that exit code."""

from __future__ import annotations

import re

import pytest
from error_cases import batches, folders, machine, quantized, server, words
from error_cases.table import CASES, Row, read_rows
from programs import REPOSITORY, Bench

from glm4 import errors

PAGE = (REPOSITORY / "docs" / "errors.md").read_text("utf-8")
ROWS = read_rows(PAGE)
LOADED = (batches, folders, words, machine, quantized, server)  # registered their cases


def test_every_row_has_one_case_and_every_case_a_row() -> None:
    assert [row.what for row in ROWS] == list(dict.fromkeys(row.what for row in ROWS))
    assert {row.what for row in ROWS} == set(CASES)
    lines = sum(line.startswith("| ") for line in PAGE.splitlines())
    headings = 2 * len(re.findall(r"(?m)^\| ---", PAGE))
    assert lines == headings + len(exit_codes()) + len(ROWS)  # a row in another form would not be tested


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_row(row: Row, bench: Bench) -> None:
    ran = CASES[row.what](bench)
    assert row.matches(ran.message), ran.message
    assert ran.code == row.code


def exit_codes() -> dict[int, str]:
    """The list of exit codes on the page."""
    return {int(code): meaning for code, meaning in re.findall(r"(?m)^\| (\d+) \| (.+) \|$", PAGE)}


def test_exit_codes_are_those_of_the_program() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Glm4Error)]
    assert set(exit_codes()) == {0, errors.INTERRUPTED, *(kind.exit_code for kind in classes)}
