"""A runner over several ranks: the leader's, which the engine drives, and the loop of those that follow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import torch

from glm4.engine.step import Runner, StepPlan, StepResult
from glm4.errors import EngineError, Glm4Error, LostRankError
from glm4.parallel.control import Follower, Kind, Leader, LeaderGone
from glm4.parallel.ranks import Ranks

T = TypeVar("T")

_TENSOR = 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _encode_tensor(value: Any) -> msgspec.msgpack.Ext:
    """Hidden states and logits that were asked for: their number format, their shape, their bytes."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{type(value).__name__} cannot be sent to another rank")
    contiguous = value.detach().cpu().contiguous()
    raw = contiguous.view(torch.uint8).numpy().tobytes() if value.numel() else b""
    name = str(value.dtype).removeprefix("torch.")
    return msgspec.msgpack.Ext(_TENSOR, msgspec.msgpack.encode((name, list(value.shape), raw)))


def _decode_tensor(code: int, data: memoryview) -> torch.Tensor:
    assert code == _TENSOR
    name, shape, raw = msgspec.msgpack.decode(data, type=tuple[str, list[int], bytes])
    return torch.frombuffer(bytearray(raw), dtype=_DTYPES[name]).view(shape) if raw else torch.empty(shape)


_encode = msgspec.msgpack.Encoder(enc_hook=_encode_tensor).encode
_decode_plan = msgspec.msgpack.Decoder(StepPlan).decode
_decode_result = msgspec.msgpack.Decoder(StepResult, ext_hook=_decode_tensor).decode


class ParallelRunner:
    """The leader's runner: it tells every rank the plan, computes its own share, and has the result."""

    def __init__(self, runner: Runner, ranks: Ranks) -> None:
        """`runner`: this rank's own."""
        assert isinstance(ranks.control, Leader)
        self.num_blocks, self.block_size, self.vocab_size = runner.num_blocks, runner.block_size, runner.vocab_size
        self._runner, self._ranks, self._control = runner, ranks, ranks.control
        self._lost: LostRankError | None = None

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step: see `Runner.execute`. After one that failed the ranks are out of step, and all others fail.

        Raises LostRankError.
        """
        return self.start(plan)()

    @property
    def stages(self) -> int:
        """See `StagedRunner.stages`."""
        return self._ranks.place.degrees.pipeline

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """See `StagedRunner.start`; raises as `execute` does."""
        result = self._together(lambda: self._begin(plan))
        return lambda: self._together(lambda: self._sampled() if result is None else result)

    def _together(self, part: Callable[[], T]) -> T:
        """Do a part of a step; once one has failed, no other is done."""
        if self._lost is not None:
            raise self._lost
        try:
            return part()
        except Exception as error:
            what = (
                str(error) if isinstance(error, Glm4Error) else f"{type(error).__name__}: {error}; load the model again"
            )
            self._lost = LostRankError(what)
            self._ranks.close()
            raise self._lost from error

    def _begin(self, plan: StepPlan) -> StepResult | None:
        """This rank's share of a step: its result, unless that is another rank's."""
        place = self._ranks.place
        samples_here = place.sampler == place.rank
        # Masks are waited for where tokens are picked: beside the forward here, before it is sent elsewhere.
        masks = (
            {} if samples_here else {request_id: plan.grammar_masks[request_id] for request_id in plan.grammar_masks}
        )
        self._control.tell(Kind.PLAN, _encode(replace(plan, grammar_masks=masks)))
        result = self._runner.execute(plan)
        return result if samples_here else None

    def _sampled(self) -> StepResult:
        return _decode_result(self._control.hear_from(self._ranks.place.sampler, Kind.RESULT))


def follow(runner: Runner, ranks: Ranks) -> None:
    """Execute the leader's plans until it hangs up. Raises what ends this rank, and tells the leader."""
    control, place = ranks.control, ranks.place
    assert isinstance(control, Follower)
    try:
        while True:
            kind, payload = control.receive()
            assert kind is Kind.PLAN
            result = runner.execute(_decode_plan(payload))
            if place.sampler == place.rank:
                control.send(Kind.RESULT, _encode(result))
    except LeaderGone:
        return
    except Exception as error:
        known = error if isinstance(error, Glm4Error) else EngineError(f"{type(error).__name__}: {error}")
        ranks.fail(known)
        raise known from error
    finally:
        ranks.close()
