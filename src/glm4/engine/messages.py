"""What crosses the border between a program and the engine's own process.

Each message is msgpack in a frame: one byte of version, four of length (big-endian), then the message.

    caller                 engine's process
    Load           ──▶
                   ◀──     Loading …, then Ready or LoadFailed
    Add, Abort     ──▶
                   ◀──     Progress, one for each step; Embedding for a prompt that is only read
    GetStats       ──▶
                   ◀──     Stats

A Progress holds what is new in each answer, not the answer so far: its lists are those of the step, and
prompt_token_ids and text are empty, since the caller has them.
"""

from __future__ import annotations

import struct

import msgspec

from glm4.engine.request import RequestOutput
from glm4.errors import EngineError
from glm4.options import EngineOptions, SamplingParams
from glm4.parallel.control import Failure

MESSAGE_VERSION = 3
_HEADER = struct.Struct(">BI")
HEADER_BYTES = _HEADER.size


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Fields are sent by position: a change to any message is a new MESSAGE_VERSION."""


class Load(_Message, frozen=True):
    """The first message: what to build the engine from, and the level of its log."""

    options: EngineOptions
    log_level: int


class Add(_Message, frozen=True):
    """A request; `id` is the caller's."""

    id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams | None
    chat: bool
    priority: int
    choice: int
    after: int | None
    """The caller's id of another request, as `Engine.add` takes its own."""
    embed: bool = False
    """The prompt is only read; the answer is one Embedding."""


class Abort(_Message, frozen=True):
    """End a request at once; one that has ended already is ignored."""

    id: int


class GetStats(_Message, frozen=True):
    """Ask for Stats."""


class Loading(_Message, frozen=True):
    """Tensors loaded, and tensors in all."""

    done: int
    total: int


class Ready(_Message, frozen=True):
    """The model is loaded."""

    max_model_len: int
    sampling_defaults: SamplingParams


class LoadFailed(_Message, frozen=True):
    """The last message of a process that could not load its model."""

    failure: Failure


class Progress(_Message, frozen=True):
    """What one step gave, by the caller's ids: new words, and requests that ended in an error."""

    outputs: list[RequestOutput] = []
    failures: list[tuple[int, Failure]] = []


class Embedding(_Message, frozen=True):
    """The mean of a prompt's last hidden states, by the caller's id."""

    id: int
    values: list[float]


class Stats(_Message, frozen=True):
    """What the engine holds now, and what it has counted since its process started."""

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    prefix_queried_tokens: int
    """Prompt tokens that were looked up in the prefix cache, and …"""
    prefix_hit_tokens: int
    """… those found there."""
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float


FromCaller = Add | Abort | GetStats
FromEngine = Loading | Ready | LoadFailed | Progress | Embedding | Stats

_encoder = msgspec.msgpack.Encoder()
decode_load = msgspec.msgpack.Decoder(Load).decode
decode_from_caller = msgspec.msgpack.Decoder[FromCaller](FromCaller).decode
decode_from_engine = msgspec.msgpack.Decoder[FromEngine](FromEngine).decode


def to_frame(message: _Message) -> bytes:
    """The bytes to send. Raises OverflowError for a number beyond 64 bits."""
    payload = _encoder.encode(message)
    return _HEADER.pack(MESSAGE_VERSION, len(payload)) + payload


def payload_length(header: bytes | bytearray | memoryview) -> int:
    """How many bytes follow a frame's header. Raises EngineError where it is of another version."""
    version, length = _HEADER.unpack_from(header)
    if version != MESSAGE_VERSION:
        raise EngineError(
            f"the engine's process speaks version {version} of its messages and this one {MESSAGE_VERSION}: glm4 was "
            "changed while it ran, start the program again"
        )
    return int(length)
