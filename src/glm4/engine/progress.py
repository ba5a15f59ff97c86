"""The progress bar of many answers: how many have ended, tokens a second, time left."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def answer_progress(num_tokens: Callable[[], int], shown: bool = True) -> Progress:
    """A bar on standard error, where that is a terminal and it is to be `shown`.

    `num_tokens()`: tokens generated so far.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{num_tokens() / task.elapsed if task.elapsed else 0:.1f} tokens/s")

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn(elapsed_when_finished=True))
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
