"""Text to token ids and back, from the folder's tokenizer.json: byte-level BPE, as the whole GLM-4 family has it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from glm4.errors import CheckpointError, ConfigError, PromptError
from glm4.files import one_line, read_bytes, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class Tokenizer:
    """The tokenizer of one model folder; safe to share between threads, since nothing changes after loading.

    `added_tokens` maps every token that is matched whole, before BPE, to its id; `special_tokens` those of them that
    are control tokens (`<|user|>`, `[gMASK]` …).
    """

    def __init__(self, backend: Backend, name: str = "tokenizer.json") -> None:
        """`name` is how messages call the file. Raises CheckpointError unless `backend` is a byte-level BPE."""
        from tokenizers import decoders

        if backend.pre_tokenizer is None or not isinstance(backend.decoder, decoders.ByteLevel):
            raise CheckpointError(f"{name} is not a byte-level BPE as GLM-4's is: use the tokenizer.json of the model")
        backend.no_truncation()  # settings some files were saved with: a prompt is never cut or filled up in silence
        backend.no_padding()
        self._backend = backend
        self._pre_tokenizer = backend.pre_tokenizer
        self._name = name
        self._bytes: dict[int, bytes] = {}
        added = sorted(backend.get_added_tokens_decoder().items())
        self.added_tokens = {token.content: id for id, token in added}
        self.special_tokens = {token.content: id for id, token in added if token.special}
        self._special_ids = frozenset(self.special_tokens.values())

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of the model folder `path`, with the tokens that its tokenizer_config.json adds, if there.

        Raises CheckpointError when tokenizer.json is missing, cut short or of another kind, and ConfigError when
        tokenizer_config.json is malformed or contradicts it.
        """
        from tokenizers import Tokenizer as Backend

        file = Path(path) / "tokenizer.json"
        content = read_bytes(file)
        try:
            backend = Backend.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{file} is not a whole tokenizer ({one_line(error)}): download it again") from error
        _add_configured_tokens(backend, file.with_name("tokenizer_config.json"))
        return cls(backend, str(file))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; control tokens in it become their ids, and nothing is added.

        Raises PromptError when `text` is not valid Unicode.
        """
        check_unicode(text)
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids  # lets other threads run

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` in which control tokens are ordinary text, so that none of their ids can appear.

        Raises PromptError when `text` is not valid Unicode, and CheckpointError when the vocabulary itself spells a
        control token as one.
        """
        check_unicode(text)
        model = self._backend.model
        normalizer = self._backend.normalizer
        pieces = self._pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text) if normalizer else text)
        ids = [token.id for piece, _ in pieces for token in model.tokenize(piece)]
        if forged := self._special_ids.intersection(ids):
            token = self._backend.id_to_token(min(forged))
            raise CheckpointError(f"{self._name}: plain text can spell the control token {token!r}; use another file")
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, and ids the tokenizer does not know nothing."""
        return b"".join(self.token_bytes(id, skip_special_tokens) for id in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes that `id` stands for, often only part of a character; none where the tokenizer does not know it."""
        if skip_special_tokens and id in self._special_ids:
            return b""
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = _spelled_bytes(self._backend.id_to_token(id) or "")
        return known

    @cached_property
    def _known_ids(self) -> frozenset[int]:
        return frozenset(self._backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def vocab_size(self) -> int:
        """The highest id that the tokenizer knows, plus one."""
        return max(self._known_ids, default=-1) + 1

    def same_ids(self, other: Tokenizer) -> bool:
        """Both give every token the same id."""
        known, theirs = (each._backend.get_vocab(with_added_tokens=True) for each in (self, other))
        return known == theirs

    def unknown_ids(self, model_vocab_size: int) -> list[int]:
        """Ids below `model_vocab_size` that stand for no token: padding of the model's vocabulary, and holes."""
        return [id for id in range(model_vocab_size) if id not in self._known_ids]


def check_unicode(text: str) -> None:
    """Raise PromptError where `text` holds half of a surrogate pair, which no byte sequence can spell."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text is not valid Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}; remove it, or decode the source as UTF-8"
        ) from error


def _add_configured_tokens(backend: Backend, file: Path) -> None:
    """Add the tokens of tokenizer_config.json's added_tokens_decoder that tokenizer.json lacks or calls ordinary."""
    from tokenizers import AddedToken

    entries = (read_json(file, required=False) or {}).get("added_tokens_decoder") or {}
    present = backend.get_added_tokens_decoder()
    try:
        wanted = {int(id): AddedToken(**entry) for id, entry in entries.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: added_tokens_decoder is malformed ({one_line(error)}): download it") from error
    for id, token in sorted(wanted.items()):
        known = present.get(id)
        if known and known.content == token.content and (known.special or not token.special):
            continue
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([token])
        if backend.token_to_id(token.content) != id:
            raise ConfigError(
                f"{file}: token {token.content!r} has id {id} here and {backend.token_to_id(token.content)} in "
                f"tokenizer.json: take both files from one download"
            )


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


def _spelled_bytes(token: str) -> bytes:
    """The bytes `token` spells; one with any character outside the alphabet is an added token, which is plain text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()
