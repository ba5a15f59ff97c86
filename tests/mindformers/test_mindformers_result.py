"""The result line and the result file."""

from __future__ import annotations

import ast
import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4.errors import OutputError
from glm4.mindformers.result import answer_line, check_writable, write_results

OLD = "[{'text_generation_text': ['the old answer']}]\n"


def test_answer_line() -> None:
    assert answer_line(["好的，北京"]) == "'text_generation_text': [好的，北京]"
    assert answer_line(["a", "b\nc"]) == "'text_generation_text': [a, b\nc]"


def test_file_is_one_dict_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "text_generation_result.txt"
    write_results(path, [["好的", "it's"], ["x"]])
    assert path.read_text("utf-8").rstrip("\n") == (
        """[{'text_generation_text': ['好的', "it's"]}, {'text_generation_text': ['x']}]"""
    )


@settings(deadline=None)
@given(batches=st.lists(st.lists(st.text(st.characters()), min_size=1), min_size=1))
def test_literal_eval_reads_any_text_back(tmp_path_factory: pytest.TempPathFactory, batches: list[list[str]]) -> None:
    path = tmp_path_factory.mktemp("result") / "r.txt"
    write_results(path, batches)
    read = ast.literal_eval(path.read_text("utf-8"))
    assert [batch["text_generation_text"] for batch in read] == batches


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_results(tmp_path / "r.txt", [["x"]])
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "r.txt").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EIO, "start from another folder"),
    ],
)
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, number: int, advice: str
) -> None:
    path = tmp_path / "r.txt"
    path.write_text(OLD)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError) as caught:
        write_results(path, [["new"]])
    assert str(caught.value) == (
        f"{path} cannot be written: {os.strerror(number)}; {advice}; the file that was there is unchanged"
    )
    assert path.read_text() == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.txt"
    path.write_text(OLD)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_results(path, [["new"]])
    assert path.read_text() == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "r.txt"
    link.symlink_to(tmp_path / "elsewhere" / "r.txt")
    write_results(link, [["x"]])
    assert link.is_symlink()
    assert ast.literal_eval((tmp_path / "elsewhere" / "r.txt").read_text()) == [{"text_generation_text": ["x"]}]


def test_check_writable_leaves_no_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "r.txt")
    assert list(tmp_path.iterdir()) == []


def test_check_writable_finds_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        check_writable(tmp_path / "missing" / "r.txt")
    (tmp_path / "r.txt").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_writable(tmp_path / "r.txt")
