"""Whatever is cut off, edited or full: no record is lost, torn or written twice."""

from __future__ import annotations

import errno
import json
import os
import re
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4.batch.files import BatchInput, BatchOutput, Line, record_id, settings_digest
from glm4.errors import OptionError, OutputError, PromptError

SETTINGS = settings_digest("model")


def write_input(folder: Path, *requests: str) -> BatchInput:
    (folder / "in.jsonl").write_text("\n".join(requests))
    return BatchInput(str(folder / "in.jsonl"))


def record(line: Line, **more: object) -> dict[str, object]:
    return {"id": record_id(line, SETTINGS), "text": "好\n的", "error": None, **more}


def resumed(folder: Path, source: BatchInput, settings: str = SETTINGS) -> BatchOutput:
    output = BatchOutput(str(folder / "out.jsonl"))
    try:
        output.resume(source, source.fingerprints(), settings)
    finally:
        output.close()
    return output


def written(folder: Path, source: BatchInput) -> bytes:
    """The output with a record for every line, the last first."""
    (folder / "out.jsonl").unlink(missing_ok=True)
    output = BatchOutput(str(folder / "out.jsonl"))
    for line in reversed(list(source.lines())):
        output.write(line.number, record(line))
    output.close()
    return (folder / "out.jsonl").read_bytes()


def test_blank_lines_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf{1}\r\n\n  \n{2}\n{1}")
    source = BatchInput(str(tmp_path / "in.jsonl"))
    assert list(source.lines()) == [Line(1, b"{1}"), Line(4, b"{2}"), Line(5, b"{1}")]
    first, *blank, second, third = source.fingerprints()
    assert blank == [0, 0]
    assert first == third != second


@given(st.integers(0, 10_000))
def test_cut_anywhere_the_whole_records_stay(tmp_path_factory: pytest.TempPathFactory, at: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    source = write_input(folder, "{1}", "{2}", "{3}", "{4}")
    whole = written(folder, source)
    cut = whole[: at % (len(whole) + 1)]
    (folder / "out.jsonl").write_bytes(cut)
    output = resumed(folder, source)
    kept = cut[: cut.rfind(b"\n") + 1]
    assert (folder / "out.jsonl").read_bytes() == kept
    assert output.done == set(range(4, 4 - kept.count(b"\n"), -1))


def test_writing_goes_on_behind_a_torn_record(tmp_path: Path) -> None:
    source = write_input(tmp_path, "{1}", "{2}")
    whole = written(tmp_path, source)
    (tmp_path / "out.jsonl").write_bytes(whole[:-5])
    output = BatchOutput(str(tmp_path / "out.jsonl"))
    output.resume(source, source.fingerprints(), SETTINGS)
    [first, _] = source.lines()
    output.write(1, record(first))
    output.close()
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_what_a_power_failure_left_in_the_middle_is_cut_as_well(tmp_path: Path) -> None:
    source = write_input(tmp_path, "{1}", "{2}", "{3}")
    [first, second, third] = written(tmp_path, source).splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(first + bytes(len(second) - 1) + b"\n" + third)
    assert resumed(tmp_path, source).done == {3}
    assert (tmp_path / "out.jsonl").read_bytes() == first


def test_errors_of_earlier_runs_are_counted(tmp_path: Path) -> None:
    source = write_input(tmp_path, "{1}")
    [line] = source.lines()
    output = BatchOutput(str(tmp_path / "out.jsonl"))
    output.write(1, record(line, error={"code": "invalid_request", "message": "no"}))
    output.close()
    assert output.num_errors == resumed(tmp_path, source).num_errors == 1


@pytest.mark.parametrize("edited", [["{1}", "{2 }"], ["{1}"], ["", "{1}", "{2}"]])
def test_an_edited_input_is_noticed(tmp_path: Path, edited: list[str]) -> None:
    whole = written(tmp_path, write_input(tmp_path, "{1}", "{2}"))
    source = write_input(tmp_path, *edited)
    with pytest.raises(PromptError, match=r"in.jsonl:\d has changed since .*out.jsonl was begun: use --restart"):
        resumed(tmp_path, source)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_requests_may_be_added_at_the_end(tmp_path: Path) -> None:
    written(tmp_path, write_input(tmp_path, "{1}", "{2}"))
    assert resumed(tmp_path, write_input(tmp_path, "{1}", "{2}", "{3}")).done == {1, 2}


def test_other_settings_are_noticed(tmp_path: Path) -> None:
    source = write_input(tmp_path, "{1}")
    written(tmp_path, source)
    with pytest.raises(OptionError, match="another model or other options"):
        resumed(tmp_path, source, settings_digest("other"))


@pytest.mark.parametrize("content", ["my thesis\n", "my thesis", '{"id": "mine", "error": null}\n', "[]\n", '{"id": 5'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    source = write_input(tmp_path, "{1}")
    (tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(OutputError, match="something else than records"):
        resumed(tmp_path, source)
    assert (tmp_path / "out.jsonl").read_text() == content


def test_only_one_run_writes_a_file(tmp_path: Path) -> None:
    first = BatchOutput(str(tmp_path / "out.jsonl"))
    with pytest.raises(OutputError, match="is being written by another"):
        BatchOutput(str(tmp_path / "out.jsonl"))
    first.close()
    BatchOutput(str(tmp_path / "out.jsonl")).close()


def test_a_full_disk_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_input(tmp_path, "{1}", "{2}")
    [first, second] = source.lines()
    output = BatchOutput(str(tmp_path / "out.jsonl"))
    output.write(1, record(first))
    whole, write = (tmp_path / "out.jsonl").read_bytes(), os.write
    room = [10]

    def full(fd: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[: room.pop()])

    monkeypatch.setattr(os, "write", full)
    message = "out.jsonl cannot be written: No space left on device; the 1 records in it are whole"
    with pytest.raises(OutputError, match=re.escape(message)):
        output.write(2, record(second))
    output.close()
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_what_json_can_say_and_utf_8_cannot(tmp_path: Path) -> None:
    source = write_input(tmp_path, "{1}")
    [line] = source.lines()
    output = BatchOutput(str(tmp_path / "out.jsonl"))
    output.write(1, record(line, custom_id="a\ud800b"))
    output.close()
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8"))["custom_id"] == "a\ud800b"


def test_places_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Is a directory; choose another file"):
        BatchOutput(str(tmp_path))
    with pytest.raises(OutputError, match="No such file or directory; choose another file"):
        BatchOutput(str(tmp_path / "nowhere" / "out.jsonl"))
    with pytest.raises(PromptError, match="is a folder: name a file"):
        BatchInput(str(tmp_path))
    with pytest.raises(PromptError, match="is not there: name a file"):
        BatchInput(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(PromptError, match="is empty: write one JSON request a line"):
        write_input(tmp_path, "", " ").fingerprints()


def test_fingerprints_are_small(tmp_path: Path) -> None:
    assert isinstance(write_input(tmp_path, "{1}").fingerprints(), array)
