"""A GLM-Z1 answer in its two parts: the thought up to `</think>`, and what is meant for the reader after it."""

from __future__ import annotations

from typing import Literal

from glm4.text.detokenizer import held_length

THINK = "<think>"
END_THINK = "</think>"

Kind = Literal["thought", "answer"]


class ThoughtSplitter:
    """Tells thought from answer while the text comes; both tags are ordinary text and may straddle pieces.

    `inside`: the prompt already ended in `<think>`, so the text begins as thought and only `</think>` appears.
    Otherwise a thought is what stands between a leading `<think>` and `</think>`; any later tag is ordinary text,
    for it may come long after the words before it were shown. Newlines that lead the answer are dropped.
    """

    def __init__(self, inside: bool) -> None:
        self._state: Literal["start", "thought", "gap", "answer"] = "thought" if inside else "start"
        self._held = ""

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """The parts that `text` settles, in order; none of them is empty."""
        text, self._held = self._held + text, ""
        parts: list[tuple[Kind, str]] = []
        if self._state == "start":
            text = self._open(text)
        if self._state == "thought":
            thought, end, text = text.partition(END_THINK)
            if end:
                self._state = "gap"
            else:
                kept = len(thought) - held_length(thought, [END_THINK])
                thought, self._held = thought[:kept], thought[kept:]
            parts.append(("thought", thought))
        if self._state == "gap":
            text = text.lstrip("\n")
            self._state = "answer" if text else "gap"
        if self._state == "answer":
            parts.append(("answer", text))
        return [part for part in parts if part[1]]

    def finish(self) -> list[tuple[Kind, str]]:
        """What is still held when the text ends: the beginning of a tag that never became one."""
        held, self._held = self._held, ""
        return [("thought" if self._state == "thought" else "answer", held)] if held else []

    def _open(self, text: str) -> str:
        """Decide, as soon as enough is there, whether the text begins with a thought; what is left of `text`."""
        text = text.lstrip("\n")
        if text.startswith(THINK):
            self._state = "thought"
            return text.removeprefix(THINK)
        if THINK.startswith(text):
            self._held = text
            return ""
        self._state = "answer"
        return text


def split_thought(text: str, inside: bool) -> tuple[str | None, str]:
    """(thought, answer) of a whole text, as ThoughtSplitter tells them apart; thought is None where there is none."""
    splitter = ThoughtSplitter(inside)
    parts = splitter.push(text) + splitter.finish()
    thought = "".join(part for kind, part in parts if kind == "thought")
    answer = "".join(part for kind, part in parts if kind == "answer")
    has_thought = inside or text.lstrip("\n").startswith(THINK)
    return (thought if has_thought else None), answer
