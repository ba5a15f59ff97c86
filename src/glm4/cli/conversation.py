"""A conversation on the terminal: what one line from the user does to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glm4.api.answer import Answer, AnswerForm
from glm4.cli.common import check_utf8
from glm4.cli.generate import show
from glm4.errors import Glm4Error, OutputError, PromptError
from glm4.options import nearest
from glm4.text.messages import normalise_messages

if TYPE_CHECKING:
    from glm4.cli.toolbox import Toolbox
    from glm4.engine.llm import LLM, Message
    from glm4.options import SamplingParams

_HELP = {
    "/clear": "forget the conversation",
    "/system TEXT": "say what the model should know or be, and start again",
    "/retry": "answer the last question again",
    "/undo": "take the last question and answer back",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "go on with a conversation that was saved",
    "/tools": "what the model may call",
    "/stats": "tokens a second of the last answer",
    "/help": "this list",
    "/exit": "leave (or Ctrl-D)",
}


class Conversation:
    """The messages so far, in OpenAI's shape, and what comes next."""

    def __init__(
        self,
        llm: LLM,
        sampling: SamplingParams,
        system: str | None,
        *,
        hide_thoughts: bool = False,
        toolbox: Toolbox | None = None,
        max_rounds: int = 1,
    ) -> None:
        """`max_rounds`: how often, after one question, the model may call tools and read their results."""
        self.llm, self.hide_thoughts, self.toolbox, self.max_rounds = llm, hide_thoughts, toolbox, max_rounds
        self.tools = toolbox.specs if toolbox else None
        self.form = AnswerForm(llm.thinks, toolbox.names if toolbox else ())
        # One of the control tokens stands between two calls
        self.sampling = replace(sampling, skip_special_tokens=False) if toolbox else sampling
        self.start(system)

    def start(self, system: str | None) -> None:
        """Begin again with this system prompt, or none."""
        self.system = system
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def take(self, text: str) -> bool:
        """Answer a line, or obey it if it is a command; False when it says to leave."""
        if not text.strip():
            return True
        check_utf8(text, "that line")
        if text.startswith("/"):
            return self._obey(*text.split(maxsplit=1))
        self._ask(text)
        return True

    def _ask(self, question: str) -> None:
        """Let the model speak, and call what it asks for, until it asks for nothing more.

        Where that fails, rounds of calls that are whole stay, for what they did is done; nothing else does.
        """
        before = kept = len(self.messages)
        self.messages.append({"role": "user", "content": question})
        try:
            for _ in range(self.max_rounds):
                answer = self._speak()
                self.messages.append(_as_message(answer, len(self.messages)))
                if not answer.calls:
                    return
                self._call_tools(answer)
                kept = len(self.messages)
        except (Glm4Error, KeyboardInterrupt):
            del self.messages[kept:]
            if kept > before:
                click.echo("(the calls so far and their results stay: say something to go on, or /undo)", err=True)
            raise
        click.echo(
            f"(no answer after {self.max_rounds} rounds of calls: say something, or raise --max-rounds)", err=True
        )

    def _speak(self) -> Answer:
        """One answer, or what there is of it when Ctrl-C comes: then without calls."""
        answer = Answer()
        outputs = self.llm.stream(self.messages, self.sampling, self.tools)
        try:
            show(outputs, self.form, answer, hide_thoughts=self.hide_thoughts)
        except KeyboardInterrupt:
            outputs.close()
            click.echo(" (stopped)")
            answer.calls.clear()
        return answer

    def _call_tools(self, answer: Answer) -> None:
        assert self.toolbox is not None  # without one, no answer has calls
        ids = [call["id"] for call in self.messages[-1]["tool_calls"]]
        longest = self.llm.max_model_len // (2 * len(ids))  # the results together leave room for an answer
        for call_id, call in zip(ids, answer.calls, strict=True):
            result = self.toolbox.run(call, longest)
            self.messages.append({"role": "tool", "tool_call_id": call_id, "content": result})

    def _obey(self, name: str, rest: str = "") -> bool:
        match name:
            case "/exit" | "/quit":
                return False
            case "/help":
                for what, meaning in _HELP.items():
                    click.echo(f"  {what:<14} {meaning}")
            case "/clear":
                self.start(self.system)
                click.echo("forgot the conversation" + (", but not the system prompt" if self.system else ""))
            case "/system":
                self.start(rest or None)
                click.echo(f"a new conversation, {'with this' if rest else 'without a'} system prompt")
            case "/undo":
                if question := self._take_back():
                    click.echo(f"took back: {_beginning(question)}")
            case "/retry":
                if question := self._take_back():
                    self._ask(question)
            case "/save":
                self._save(rest)
            case "/load":
                self._load(rest)
            case "/tools":
                for line in self.toolbox.lines() if self.toolbox else ["none: start with --tools FILE.py"]:
                    click.echo(f"  {line}")
            case "/stats":
                click.echo("; ".join(self.llm.last_stats.lines()))
            case _:
                known = [what.split()[0] for what in _HELP]
                click.echo(f"unknown command {name!r}{nearest(name, known)} (begin a question with a space)")
        return True

    def _take_back(self) -> str | None:
        """The last question, which is removed with all that followed; None where there is none."""
        asked = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            click.echo("nothing has been said yet")
            return None
        question: str = normalise_messages(self.messages[asked[-1] :])[0]["content"]
        del self.messages[asked[-1] :]
        return question

    def _save(self, name: str) -> None:
        if not name:
            click.echo("say where: /save FILE")
            return
        text = json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n"
        try:
            Path(name).expanduser().write_text(text, encoding="utf-8")
        except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user that is not known
            reason = error.strerror if isinstance(error, OSError) else error
            raise OutputError(f"{name}: {reason}; choose another file") from error
        click.echo(f"{len(self.messages)} messages written to {name}")

    def _load(self, name: str) -> None:
        if not name:
            click.echo("say which: /load FILE")
            return
        messages = _read_messages(name)
        self.llm.encode_chat(messages, self.tools)  # raises what is wrong with them before anything is forgotten
        first = normalise_messages(messages)[0]
        self.system = first["content"] if first["role"] == "system" else None
        self.messages = messages
        click.echo(f"{len(messages)} messages read from {name}")


def _as_message(answer: Answer, number: int) -> Message:
    """The message that `answer` becomes; `number` makes the ids of its calls unlike all others."""
    message: Message = {"role": "assistant", "content": answer.text}
    if answer.thought:
        message["reasoning_content"] = answer.thought  # no template shows it to the model again
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": f"call_{number}_{at}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for at, call in enumerate(answer.calls)
        ]
    return message


def _read_messages(name: str) -> list[Message]:
    try:
        messages: list[Message] = json.loads(Path(name).expanduser().read_text("utf-8"))
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PromptError(f"{name}: {reason}; name a file that /save wrote") from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{name} is not JSON ({error}); name a file that /save wrote") from error
    return messages


def _beginning(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"
