"""Where the time went."""

from __future__ import annotations

from dataclasses import dataclass

from glm4.engine.step import StepPlan, StepResult


@dataclass(slots=True)
class EngineStats:
    """Tokens and seconds; a step counts as prefill when it computes any prompt token but the last."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def count(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """Add one executed step."""
        if all(step.start > 0 and step.logits_at[:1] == [0] for step in plan.requests):
            self.decode_tokens += sum(len(each.token_ids) for each in result.results.values())
            self.decode_seconds += seconds
        else:
            self.prefill_tokens += sum(len(step.token_ids) for step in plan.requests)
            self.prefill_seconds += seconds

    def __add__(self, other: EngineStats) -> EngineStats:
        """Both together."""
        return EngineStats(
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_seconds + other.prefill_seconds,
            self.decode_tokens + other.decode_tokens,
            self.decode_seconds + other.decode_seconds,
        )

    def lines(self) -> list[str]:
        """One for prefill and one for decode, for people."""
        return [
            f"{phase}: {tokens} tokens in {seconds:.2f} s, {f'{tokens / seconds:.1f}' if seconds else '—'} tokens/s"
            for phase, tokens, seconds in (
                ("prefill", self.prefill_tokens, self.prefill_seconds),
                ("decode", self.decode_tokens, self.decode_seconds),
            )
        ]
