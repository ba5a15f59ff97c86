"""How a process came to leave, in words."""

from __future__ import annotations

import signal


def exit_in_words(code: int | None) -> str:
    """`code`: as subprocess has it, None for a process that is still there; what stands after its name."""
    if code is None:
        return "hung up and does not leave"
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), as systems do when memory runs out"
    if code < 0:
        return f"was ended by signal {-code} ({signal.strsignal(-code)})"
    return f"left with exit code {code}"
