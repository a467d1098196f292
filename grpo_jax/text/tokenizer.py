"""A vocabulary with its special ids and its chat template, from any of the files that hold one."""

import dataclasses
import difflib
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sentencepiece
import tokenizers

from grpo_jax.errors import InputError
from grpo_jax.text.backends import BYTE_PIECE, Backend, HuggingFaceBackend, SentencePieceBackend
from grpo_jax.text.files import read, write
from grpo_jax.text.gguf import gguf_backend


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

    def decode_pieces(self, chunks: Iterable[Iterable[int]], skip_special: bool = True) -> Iterator[str]:
        """Texts of ids that come in pieces: joined, they are the text of all ids at once.

        What may be a part of a character yet is held back until the rest has come. Takes time in the square of the
        pieces: made for a person who watches, not for batches.
        """
        ids: list[int] = []
        given = 0
        for chunk in chunks:
            ids += [int(i) for i in chunk]
            sure = len(ids)
            while sure and self._is_byte(ids[sure - 1]):  # a run of bytes is decoded as one
                sure -= 1
            text = self.decode(ids[:sure], skip_special).rstrip("\ufffd")
            if len(text) > given:
                yield text[given:]
                given = len(text)
        if rest := self.decode(ids, skip_special)[given:]:
            yield rest

    def _is_byte(self, i: int) -> bool:
        piece = self.backend.pieces[i] if 0 <= i < self.vocabulary else None
        return piece is not None and BYTE_PIECE.fullmatch(piece) is not None

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
        write(path / self.backend.file_name, self.backend.serialize())
        write(path / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False).encode())
        write(path / "generation_config.json", json.dumps(generation, indent=2).encode())

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
        backend = SentencePieceBackend(read(path), path)
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
            backend = HuggingFaceBackend(tokenizers.Tokenizer.from_str(read(path).decode()))
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
        """The byte-level BPE or SentencePiece tokenizer in a GGUF file's metadata; raises InputError for others."""
        fields = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
        try:
            backend = gguf_backend(fields)
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
        add_bos = fields.get("add_bos_token", fields.get("model") == "llama")  # SentencePiece's do unless they say no
        return cls(backend, ends, pad, bos, eos, bool(add_bos) and bos is not None, template)


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


def _settings(path: str | None) -> dict[str, Any]:
    """A JSON object from a file, nulls left out; empty without a file."""
    if path is None:
        return {}
    try:
        fields = json.loads(read(path))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}): get it again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds {type(fields).__name__}, not an object: get it again")
    return {k: v for k, v in fields.items() if v is not None}
