"""The two tokenizer libraries behind one protocol."""

import functools
import json
import re
from collections.abc import Iterable
from typing import Any, Protocol

import sentencepiece
import tokenizers

from grpo_jax.errors import InputError

SPACE = "\u2581"  # how SentencePiece writes a space
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Backend(Protocol):
    """What a tokenizer library must do for `Tokenizer`."""

    file_name: str
    specials: dict[str, int]  # strings that are control tokens in templates and nothing in user text
    special_pattern: re.Pattern[str] | None  # finds them; group 1 is the string itself
    unknown_id: int | None  # id of what the vocabulary cannot spell
    pieces: list[str | None]  # the piece of every id; None for holes

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of the text; with `special`, special strings become their ids."""
        ...

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Text of the ids."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes that each id adds to a text; b'' for special ids."""
        ...

    def serialize(self) -> bytes:
        """The contents of its file."""
        ...


class SentencePieceBackend:
    """A SentencePiece model. Control pieces are special; user-defined symbols are text."""

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, source: str):
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise InputError(f"{source}: is no SentencePiece model ({error}): get it again") from None
        self.pieces: list[str | None] = [self._processor.id_to_piece(i) for i in range(len(self._processor))]
        self.specials = {p: i for i, p in enumerate(self.pieces) if p and self._processor.is_control(i)}
        self.special_pattern = _alternation(re.escape(p) for p in self.specials)
        self.unknown_id: int | None = self._processor.unk_id()

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of the text; SentencePiece itself never makes control ids out of text."""
        if not special or not self.special_pattern:
            return list(self._processor.encode(text))
        ids: list[int] = []
        for part, marked in split_at(self.special_pattern, text):
            ids += [self.specials[part]] if marked else self._processor.encode(part)
        return ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Text of the ids; unknown and out-of-range ids count as special."""
        text, run = "", []
        for i in [*ids, None]:
            if i is not None and 0 <= i < len(self.pieces) and not self._silent(i):
                run.append(i)
                continue
            text, run = text + self._processor.decode(run), []
            if i is not None and not skip_special and 0 <= i < len(self.pieces):
                text += self.pieces[i] or ""
        return text

    def _silent(self, i: int) -> bool:
        processor = self._processor
        return processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)

    def token_bytes(self) -> list[bytes]:
        """Byte pieces are their byte, U+2581 is a space."""
        return [b"" if self._silent(i) else _sentencepiece_bytes(p or "") for i, p in enumerate(self.pieces)]

    def serialize(self) -> bytes:
        """The model file."""
        return self._model


class HuggingFaceBackend:
    """A tokenizer of the `tokenizers` library. Added tokens marked special are special."""

    file_name = "tokenizer.json"

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        tokenizer.no_truncation()  # a tokenizer.json may bring limits of its own, which cut in silence
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        special = {i: token for i, token in added.items() if token.special}
        self.specials = {token.content: i for i, token in special.items()}
        self.special_pattern = _alternation(
            (r"\s*" if t.lstrip else "") + f"(?P<t{i}>{re.escape(t.content)})" + (r"\s*" if t.rstrip else "")
            for i, t in sorted(special.items(), key=lambda item: -len(item[1].content))
        )
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.pieces: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for piece, i in vocabulary.items():
            self.pieces[i] = piece
        layout = json.loads(tokenizer.to_str())
        if layout["model"].get("dropout"):
            raise InputError(f"tokenizer.json: model.dropout={layout['model']['dropout']} is random: set it null")
        self._decoders = _types(layout["decoder"])
        unknown = layout["model"].get("unk_token")
        spells_all = "ByteLevel" in self._decoders or layout["model"].get("byte_fallback")
        self.unknown_id = None if spells_all or not isinstance(unknown, str) else tokenizer.token_to_id(unknown)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy that reads special strings as text: the switch is a state of the object."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of the text, without what the post-processor would add."""
        return (self._tokenizer if special else self._plain).encode(text, add_special_tokens=False).ids

    def first_added(self) -> int | None:
        """The id that the post-processor puts first."""
        bare, full = self.encode("a", True), self._tokenizer.encode("a", add_special_tokens=True).ids
        return full[0] if len(full) > len(bare) and full[:1] != bare[:1] else None

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Text of the ids; ids beyond the vocabulary give nothing."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self) -> list[bytes]:
        """By the tokenizer's decoder: byte-level, or SentencePiece's spelling."""
        if "ByteLevel" in self._decoders:
            table = _byte_level_table()
            spell = lambda piece: bytes(table[c] for c in piece)  # noqa: E731
        elif self._decoders & {"ByteFallback", "Metaspace", "Replace"}:
            spell = _sentencepiece_bytes
        else:
            raise InputError(f"tokenizer.json: decoder {sorted(self._decoders)} is not supported: use a byte-level one")
        special = set(self.specials.values())
        return [
            b"" if piece is None or i in special else piece.encode() if i in self._added else spell(piece)
            for i, piece in enumerate(self.pieces)
        ]

    def serialize(self) -> bytes:
        """The tokenizer.json."""
        return self._tokenizer.to_str().encode()


def _alternation(patterns: Iterable[str]) -> re.Pattern[str] | None:
    found = sorted(patterns, key=len, reverse=True)
    return re.compile("|".join(found)) if found else None


def split_at(pattern: re.Pattern[str], text: str) -> Iterable[tuple[str, bool]]:
    """Parts of a text in order: (special string, True) and (text between, False); none is empty."""
    at = 0
    for match in pattern.finditer(text):
        if match.start() > at:
            yield text[at : match.start()], False
        yield (match[match.lastgroup] if match.lastgroup else match[0]), True
        at = match.end()
    if at < len(text):
        yield text[at:], False


def _types(node: Any) -> set[str]:
    """All 'type' values in a part of a tokenizer.json."""
    if isinstance(node, list):
        return set().union(*map(_types, node))
    if not isinstance(node, dict):
        return set()
    own = {node["type"]} if isinstance(node.get("type"), str) else set()
    return own | set().union(*map(_types, node.values()))


def _sentencepiece_bytes(piece: str) -> bytes:
    if match := BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE, " ").encode()


def _byte_level_table() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable bytes are themselves, others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
