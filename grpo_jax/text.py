"""From messages to tokens and back: tokenizers, chat templates, assistant masks.

What a user typed never becomes a control token: special-token strings in the content of messages
are hidden from the template's tokens and encoded as plain text.
"""

import dataclasses
import datetime
import difflib
import functools
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.sandbox
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from grpo_jax.config import TextConfig
from grpo_jax.errors import InputError

SPACE = "\u2581"  # how SentencePiece writes a space
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
TEMPLATES = pathlib.Path(__file__).parent / "templates"

Message = Mapping[str, Any]
Draw = Callable[[Sequence[Message], bool], str]


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
        for part, marked in _split(self.special_pattern, text):
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


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary, its special ids and its chat template.

    Attributes:
      end_ids: tokens that end a completion; empty when the files name none (see with_end_tokens).
      pad_id: fills rows; masks come from lengths, so it may be an end token too.
      bos_id: beginning of sequence, where there is one.
      eos_id: what templates call eos_token.
      add_bos: whether a text starts with bos_id.
      chat_template: the model's own, in jinja.
    """

    backend: Backend
    end_ids: tuple[int, ...]
    pad_id: int
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False
    chat_template: str | None = None

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return len(self.backend.pieces)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of the text; with special=False, special-token strings stay plain text. Adds no BOS."""
        return self.backend.encode(text, special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of the ids; broken UTF-8 becomes U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special)

    def token_bytes(self) -> list[bytes]:
        """For every id the UTF-8 bytes it adds to a text; b'' for special ids, unknown and holes."""
        return self.backend.token_bytes()

    def id_of(self, piece: str) -> int | None:
        """The id of a piece as the vocabulary spells it."""
        return self._ids.get(piece)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.backend.pieces) if piece is not None}

    def fingerprint(self) -> str:
        """SHA-256 of the serialized vocabulary, in hexadecimal."""
        return hashlib.sha256(self.backend.serialize()).hexdigest()

    def with_end_tokens(self, pieces: tuple[str, ...]) -> "Tokenizer":
        """The same with other end tokens (none: unchanged); raises InputError naming the nearest pieces."""
        ids = []
        for piece in pieces:
            found = self.encode(piece) if self.id_of(piece) is None else [self._ids[piece]]
            if len(found) != 1 or found[0] == self.backend.unknown_id:
                near = difflib.get_close_matches(piece, self.backend.specials, n=3, cutoff=0.4)
                near = near or difflib.get_close_matches(piece, self._ids, n=3)
                hint = f"; nearest are {', '.join(map(repr, near))}" if near else ""
                raise InputError(f"text.end_tokens: {piece!r} is no single token of the tokenizer: name one{hint}")
            ids += found
        return dataclasses.replace(self, end_ids=tuple(dict.fromkeys(ids))) if ids else self

    def save(self, folder: str) -> None:
        """Writes the vocabulary, tokenizer_config.json and generation_config.json, as `from_folder` reads them."""
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        settings: dict[str, Any] = {k: self.backend.pieces[i] for k, i in named.items() if i is not None}
        settings |= {"add_bos_token": self.add_bos, "chat_template": self.chat_template}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        generation = {"bos_token_id": self.bos_id, "eos_token_id": list(self.end_ids), "pad_token_id": self.pad_id}
        _write(path / self.backend.file_name, self.backend.serialize())
        _write(path / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False).encode())
        _write(path / "generation_config.json", json.dumps(generation, indent=2).encode())

    @classmethod
    def from_folder(cls, folder: str) -> "Tokenizer":
        """tokenizer.json or tokenizer.model of a folder, with the configs beside it."""
        path = pathlib.Path(folder)
        configs = (path / "tokenizer_config.json", path / "generation_config.json")
        beside = [str(config) if config.exists() else None for config in configs]
        if (path / "tokenizer.json").exists():
            return cls.from_tokenizer_json(str(path / "tokenizer.json"), *beside)
        if not (path / "tokenizer.model").exists():
            raise InputError(f"{path}: holds neither tokenizer.json nor tokenizer.model: copy it there")
        if (path / "added_tokens.json").exists():
            raise InputError(f"{path / 'added_tokens.json'}: is not read beside tokenizer.model: save a tokenizer.json")
        return cls.from_sentencepiece(str(path / "tokenizer.model"), *beside)

    @classmethod
    def from_sentencepiece(
        cls, path: str, tokenizer_config: str | None = None, generation_config: str | None = None
    ) -> "Tokenizer":
        """A SentencePiece .model; special ids are its own unless the configs say otherwise."""
        backend = SentencePieceBackend(_read(path), path)
        own = sentencepiece.SentencePieceProcessor(model_proto=backend.serialize())
        ids = {"bos_token": own.bos_id(), "eos_token": own.eos_id(), "pad_token": own.pad_id()}
        settings = {name: backend.pieces[i] for name, i in ids.items() if i >= 0} | _settings(tokenizer_config)
        llama = settings.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        add_bos = bool(settings.get("add_bos_token", llama))
        return _with_settings(backend, settings, _settings(generation_config), tokenizer_config or path, add_bos)

    @classmethod
    def from_tokenizer_json(
        cls, path: str, tokenizer_config: str | None = None, generation_config: str | None = None
    ) -> "Tokenizer":
        """A Hugging Face tokenizer.json; end tokens, BOS and chat template come from the configs."""
        try:
            backend = HuggingFaceBackend(tokenizers.Tokenizer.from_str(_read(path).decode()))
        except InputError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path}: is no tokenizer.json ({error}): get it again") from None
        settings, first = _settings(tokenizer_config), backend.first_added()
        if first is not None:
            settings.setdefault("bos_token", backend.pieces[first])
        where = tokenizer_config or path
        return _with_settings(backend, settings, _settings(generation_config), where, first is not None)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "GGUF") -> "Tokenizer":
        """The byte-level BPE tokenizer in a GGUF file's metadata; raises InputError for other kinds."""
        fields = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
        try:
            backend = HuggingFaceBackend(_gguf_bpe(fields))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{source}: tokenizer.ggml.* makes no tokenizer ({error}): get the file again") from None
        count = len(backend.pieces)

        def number(name: str) -> int | None:
            value = fields.get(f"{name}_token_id")
            if value is not None and (not isinstance(value, int) or not 0 <= value < count):
                where = f"{source}: tokenizer.ggml.{name}_token_id={value!r}"
                raise InputError(f"{where} is not below {count}: get the file again")
            return value

        eos, pad, bos = number("eos"), number("padding"), number("bos")
        ends = tuple(dict.fromkeys(i for i in (eos, number("eot")) if i is not None))
        template = _template_text(metadata.get("tokenizer.chat_template"), source)
        pad = pad if pad is not None else ends[0] if ends else 0
        return cls(backend, ends, pad, bos, eos, bool(fields.get("add_bos_token", False)) and bos is not None, template)


def _with_settings(
    backend: Backend, settings: dict[str, Any], generation: dict[str, Any], source: str, add_bos: bool
) -> Tokenizer:
    """A tokenizer by the fields of tokenizer_config.json and generation_config.json."""
    ids = {piece: i for i, piece in enumerate(backend.pieces) if piece is not None}

    def special(name: str) -> int | None:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and (not isinstance(value, str) or value not in ids):
            raise InputError(f"{source}: {name}={value!r} is not in the vocabulary: mend it")
        return None if value is None else ids[value]

    eos, pad, listed = special("eos_token"), special("pad_token"), generation.get("eos_token_id")
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    for i in listed:
        if not isinstance(i, int) or not 0 <= i < len(backend.pieces):
            where = f"{source}: eos_token_id={i!r} of generation_config.json"
            raise InputError(f"{where} is not below {len(backend.pieces)}: mend it")
    ends: tuple[int, ...] = tuple(dict.fromkeys([*([] if eos is None else [eos]), *listed]))
    template = settings.get("chat_template")
    beside = pathlib.Path(source).parent / "chat_template.jinja"
    if template is None and beside.exists():
        template = beside.read_text("utf-8")
    if isinstance(template, list):  # named ones, of which "default" is for chats
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    template = _template_text(template, source)
    bos = special("bos_token")
    pad = pad if pad is not None else ends[0] if ends else 0
    return Tokenizer(backend, ends, pad, bos, eos, add_bos and bos is not None, template)


def _template_text(template: Any, source: str) -> str | None:
    if template is not None and not isinstance(template, str):
        raise InputError(f"{source}: chat_template={str(template)[:40]!r} is not text: mend it")
    return template


def _byte_level(*before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True)),
}
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def _gguf_bpe(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of `tokenizer.ggml.*`."""
    for name, known in (("model", ["gpt2"]), ("pre", list(PRE_TOKENIZERS))):
        if (value := fields.get(name)) not in known:
            raise InputError(f"tokenizer.ggml.{name}={value!r} is not supported: use one of {', '.join(known)}")
    pieces, merges = fields.get("tokens"), fields.get("merges")
    for name, value in (("tokens", pieces), ("merges", merges)):
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise InputError(f"tokenizer.ggml.{name}={str(value)[:40]!r} must be a list of strings: get the file again")
    assert pieces is not None and merges is not None
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    kinds = fields.get("token_type", [1] * len(pieces))
    if len(vocabulary) != len(pieces) or not isinstance(kinds, list) or len(kinds) != len(pieces):
        raise InputError(
            f"tokenizer.ggml.tokens has {len(pieces)} entries, {len(vocabulary)} of them different, token_type "
            f"{len(kinds) if isinstance(kinds, list) else kinds}: these must be equal: get the file again"
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [m for m, pair in zip(merges, pairs, strict=True) if len(pair) != 2]:
        raise InputError(f"tokenizer.ggml.merges: {wrong[0]!r} is not two pieces: get the file again")
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[fields["pre"]]()  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [p for p, k in zip(pieces, kinds, strict=True) if k == kind]
        tokenizer.add_tokens([tokenizers.AddedToken(p, special=special, normalized=False) for p in chosen])
    bos = fields.get("bos_token_id")
    if fields.get("add_bos_token") and isinstance(bos, int) and 0 <= bos < len(pieces):
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=["$bos:0".replace("$bos", pieces[bos]), "$A"], special_tokens=[(pieces[bos], bos)]
        )
    return tokenizer


def render(
    messages: Sequence[Message] | str,
    template_name: str,
    tokenizer: Tokenizer,
    system_prompt: str = "",
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation under a template: 'plain', 'r1_zero', 'chat' or a .jinja file.

    Templates see `messages`, `add_generation_prompt`, the special tokens by transformers' names, and
    `end_token`, the first end token. Raises InputError naming the template.
    """
    return _template(template_name, tokenizer)(_checked(messages, system_prompt), add_generation_prompt)


def encode_prompt(messages: Sequence[Message] | str, config: TextConfig, tokenizer: Tokenizer) -> list[int]:
    """Ids of the prompt that a completion follows; a bare text is one user message."""
    tokenizer = tokenizer.with_end_tokens(config.end_tokens)
    checked = _checked(messages, config.system_prompt)
    if checked[-1]["role"] == "assistant":
        raise InputError("messages: the last one is the assistant's: a prompt must end with the user's")
    checked, hidden = _hide(checked, tokenizer)
    text = _template(config.template, tokenizer)(checked, True)
    return [*_opening(text, config, tokenizer), *_encode(text, hidden, tokenizer)]


def encode_chat(messages: Sequence[Message], config: TextConfig, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation, and 1 on the assistant's tokens and the end token that closes them.

    Where a token would straddle the border between prompt and answer, both are encoded apart, as
    they are when the answer is sampled. Raises InputError when the template closes an answer with
    no end token, or rewrites earlier messages.
    """
    tokenizer = tokenizer.with_end_tokens(config.end_tokens)
    checked, hidden = _hide(_checked(messages, config.system_prompt), tokenizer)
    segments = _segments(checked, _template(config.template, tokenizer), config.template)
    text = "".join(segment for segment, _ in segments)
    opening = _opening(text, config, tokenizer)
    ids, mask = list(opening), [0] * len(opening)
    parts = _encode_segments([segment for segment, _ in segments], hidden, tokenizer)
    for part, (_, assistant) in zip(parts, segments, strict=True):
        ends = [i for i, token in enumerate(part) if token in tokenizer.end_ids]
        if assistant and not ends:
            raise InputError(
                f"text.template={config.template!r} closes the assistant's message with no end token "
                f"({[tokenizer.backend.pieces[i] for i in tokenizer.end_ids]}): mend the template or text.end_tokens"
            )
        length = ends[-1] + 1 if assistant else 0
        ids += part
        mask += [1] * length + [0] * (len(part) - length)
    return ids, mask


def _segments(messages: list[Message], draw: Draw, template: str) -> list[tuple[str, bool]]:
    """The text cut at the borders of the assistant's messages: (text, is the assistant's)."""
    if not any(m["role"] == "assistant" for m in messages) or messages[0]["role"] == "assistant":
        raise InputError("messages: a chat row needs an assistant message after another one: mend the row")
    full, segments, at = draw(messages, False), [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, upto = draw(messages[:i], True), draw(messages[: i + 1], False)
        if not full.startswith(upto) or not upto.startswith(before) or len(before) < at:
            raise InputError(
                f"text.template={template!r} rewrites messages {i - 1} and {i} when others follow: answers cannot be "
                "told apart: use a template that only appends"
            )
        segments += [(full[at : len(before)], False), (full[len(before) : len(upto)], True)]
        at = len(upto)
    return [*segments, (full[at:], False)] if at < len(full) else segments


def _encode_segments(segments: list[str], hidden: dict[str, str], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of each segment: cut from the ids of the whole where the cuts fall between tokens, else apart."""
    whole, parts, at, text = _encode("".join(segments), hidden, tokenizer), [], 0, ""
    for segment in segments:
        text += segment
        prefix = _encode(text, hidden, tokenizer)
        if whole[: len(prefix)] != prefix:
            return [_encode(s, hidden, tokenizer) for s in segments]
        parts.append(prefix[at:])
        at = len(prefix)
    return parts


def _opening(text: str, config: TextConfig, tokenizer: Tokenizer) -> list[int]:
    """BOS where the tokenizer wants it; a model's own template writes it itself."""
    if config.template == "chat" or not tokenizer.add_bos or tokenizer.bos_id is None:
        return []
    piece = tokenizer.backend.pieces[tokenizer.bos_id]
    return [] if piece and text.startswith(piece) else [tokenizer.bos_id]


def _checked(messages: Sequence[Message] | str, system_prompt: str) -> list[Message]:
    """Messages as a list, the system prompt first."""
    rows: list[Message] = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    for i, message in enumerate(rows):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError(f"messages[{i}]={message!r} must hold a 'role' and a 'content', both text: mend the row")
    if not rows:
        raise InputError("messages=[] is empty: mend the row")
    if system_prompt and rows[0]["role"] == "system":
        raise InputError(
            f"text.system_prompt={system_prompt!r}, but the messages start with a system message: leave one of them out"
        )
    return [{"role": "system", "content": system_prompt}, *rows] if system_prompt else rows


def _hide(messages: list[Message], tokenizer: Tokenizer) -> tuple[list[Message], dict[str, str]]:
    """Special-token strings in the messages as private-use characters, and what these stand for."""
    pattern = tokenizer.backend.special_pattern
    texts = list(_strings(messages))
    found = {name for text in texts for name in tokenizer.backend.specials if name in text} if pattern else set()
    if not found:
        return messages, {}
    used = set("".join(texts))
    free = (chr(i) for i in range(0xF0000, 0xFFFFE) if chr(i) not in used)
    marks = dict(zip(sorted(found, key=len, reverse=True), free, strict=False))
    literal = re.compile("|".join(re.escape(name) for name in marks))
    hidden = _mapped(messages, lambda text: literal.sub(lambda match: marks[match[0]], text))
    return hidden, {mark: name for name, mark in marks.items()}


def _strings(node: Any) -> Iterable[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping | list | tuple):
        for child in node.values() if isinstance(node, Mapping) else node:
            yield from _strings(child)


def _mapped(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, str):
        return change(node)
    if isinstance(node, Mapping):
        return {key: _mapped(value, change) for key, value in node.items()}
    return [_mapped(value, change) for value in node] if isinstance(node, list | tuple) else node


def _encode(text: str, hidden: dict[str, str], tokenizer: Tokenizer) -> list[int]:
    """Ids of a rendered text: the template's special tokens as such, hidden ones as the text they were."""
    backend, ids = tokenizer.backend, []
    back = {ord(mark): name for mark, name in hidden.items()}
    if not hidden or backend.special_pattern is None:
        ids = tokenizer.encode(text)
    else:
        for part, marked in _split(backend.special_pattern, text):
            ids += [backend.specials[part]] if marked else tokenizer.encode(part.translate(back), special=False)
    if backend.unknown_id is not None and backend.unknown_id in ids:
        plain = backend.special_pattern.sub("", text) if backend.special_pattern else text
        lost = sorted(c for c in set(plain.translate(back)) if backend.unknown_id in tokenizer.encode(c, special=False))
        raise InputError(f"text {plain[:60]!r}: the tokenizer cannot spell {''.join(lost)!r}: leave it out of the data")
    return ids


def _template(name: str, tokenizer: Tokenizer) -> Draw:
    """The template as a function of messages and add_generation_prompt."""
    if name == "chat":
        source = tokenizer.chat_template
        if not source:
            raise InputError("text.template='chat', but the model has none: use 'plain', 'r1_zero' or a file")
    elif name in ("plain", "r1_zero"):
        source = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    elif name.endswith(".jinja"):
        source = _read(name).decode(errors="replace")
    else:
        raise InputError(f"text.template={name!r} is not plain, r1_zero, chat or a .jinja file: use one of them")
    try:
        template = _compiled(source)
    except jinja2.TemplateError as error:
        raise InputError(f"text.template={name!r} is no jinja template ({error}): mend it") from None
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    special: dict[str, Any] = {k: tokenizer.backend.pieces[i] for k, i in ids.items() if i is not None}
    special["end_token"] = tokenizer.decode(tokenizer.end_ids[:1], skip_special=False)

    def draw(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **special)
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
            raise InputError(f"text.template={name!r} refuses the messages ({error}): mend one of them") from None

    return draw


class _Generation(jinja2.ext.Extension):
    """transformers' {% generation %} block, which marks the assistant's text: its body alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """The template, compiled once for all prompts: Jinja as transformers sets it up, in the sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def train_sentencepiece(sentences: Iterable[str], vocabulary: int, symbols: tuple[str, ...], path: str) -> None:
    """Trains a BPE model whose encoding gives the text back: same sentences, same bytes.

    Ids: pad 0, eos 1, bos 2, unk 3, then `symbols`. `vocabulary` is an upper bound; raises InputError
    when the characters alone need more. The file appears whole or not at all.
    """
    rows, model = list(sentences), io.BytesIO()
    if not any(rows):
        raise InputError(f"{path}: {len(rows)} sentences without text: a tokenizer needs some")
    try:
        sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
            sentence_iterator=iter(rows),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            hard_vocab_limit=False,
            user_defined_symbols=list(symbols),
            character_coverage=1.0,
            split_digits=True,
            byte_fallback=False,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            num_threads=1,
            max_sentence_length=max(10, *(len(row.encode()) + 1 for row in rows)),  # 10 is the least it takes
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        size = f"base.vocabulary={vocabulary}"
        raise InputError(f"{path}: no tokenizer with {size} and {symbols=} ({reason}): raise it") from None
    _write(pathlib.Path(path), model.getvalue())


def _alternation(patterns: Iterable[str]) -> re.Pattern[str] | None:
    found = sorted(patterns, key=len, reverse=True)
    return re.compile("|".join(found)) if found else None


def _split(pattern: re.Pattern[str], text: str) -> Iterable[tuple[str, bool]]:
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


def _settings(path: str | None) -> dict[str, Any]:
    """A JSON object from a file, nulls left out; empty without a file."""
    if path is None:
        return {}
    try:
        fields = json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}): get it again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds {type(fields).__name__}, not an object: get it again")
    return {k: v for k, v in fields.items() if v is not None}


def _read(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from None


def _write(path: pathlib.Path, content: bytes) -> None:
    """A file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
