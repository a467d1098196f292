"""The tokenizer in a GGUF file's metadata: byte-level BPE, or SentencePiece."""

import struct
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from grpo_jax.errors import InputError
from grpo_jax.text.backends import Backend, HuggingFaceBackend, SentencePieceBackend

CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # of tokenizer.ggml.token_type, as SentencePiece numbers them


def _byte_level(*before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    """Words with the character before them, digits in runs of `digits`, signs, spaces, as Llama 3 and Qwen2 do."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    cut = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: _words("{1,3}"),
    "qwen2": lambda: _words(""),
    "deepseek-r1-qwen": lambda: _words(""),
}
WHOLE_FIRST = ("llama-bpe",)  # a word that is a piece is that piece, whatever the merges would make of it
NORMALISED = ("qwen2", "deepseek-r1-qwen")  # to Unicode's composed form


def gguf_backend(fields: Mapping[str, Any]) -> Backend:
    """The tokenizer of the fields below `tokenizer.ggml.`; raises InputError naming what is not supported."""
    if fields.get("model") == "llama":
        return SentencePieceBackend(_sentencepiece_model(fields), "tokenizer.ggml.*")
    return HuggingFaceBackend(_bpe(fields))


def _bpe(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    for name, known in (("model", ["gpt2", "llama"]), ("pre", list(PRE_TOKENIZERS))):
        if (value := fields.get(name)) not in known:
            raise InputError(f"tokenizer.ggml.{name}={value!r} is not supported: use one of {', '.join(known)}")
    pieces, kinds = _pieces(fields)
    merges = _strings(fields, "merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [m for m, pair in zip(merges, pairs, strict=True) if len(pair) != 2]:
        raise InputError(f"tokenizer.ggml.merges: {wrong[0]!r} is not two pieces: get the file again")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    whole_first = fields["pre"] in WHOLE_FIRST
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_first)  # type: ignore[arg-type]
    )
    if fields["pre"] in NORMALISED:
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
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


def _sentencepiece_model(fields: Mapping[str, Any]) -> bytes:
    """A SentencePiece model (sentencepiece_model.proto) of the pieces, scores and kinds in the metadata.

    Field numbers: ModelProto pieces 1, trainer_spec 2, normalizer_spec 3; a piece's text 1, score 2, type 3; the
    trainer's model_type 3 (BPE is 2), byte_fallback 35; the normalizer's add_dummy_prefix 3,
    remove_extra_whitespaces 4.
    """
    pieces, kinds = _pieces(fields)
    scores = fields.get("scores")
    if not isinstance(scores, list) or len(scores) != len(pieces):
        found = len(scores) if isinstance(scores, list) else scores
        raise InputError(f"tokenizer.ggml.scores: {found!r} of {len(pieces)} are there: get the file again")
    model = b"".join(
        _message(1, _text(1, piece) + _real(2, score) + _number(3, kind))
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
    )
    prefix = bool(fields.get("add_space_prefix", True))
    return (
        model
        + _message(2, _number(3, 2) + _number(35, BYTE in kinds))
        + _message(3, _text(1, "identity") + _number(3, prefix) + _number(4, False))
    )


def _pieces(fields: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    pieces = _strings(fields, "tokens")
    kinds, different = fields.get("token_type", [1] * len(pieces)), len(set(pieces))
    if different != len(pieces) or not isinstance(kinds, list) or len(kinds) != len(pieces):
        raise InputError(
            f"tokenizer.ggml.tokens has {len(pieces)} entries, {different} of them different, token_type "
            f"{len(kinds) if isinstance(kinds, list) else kinds}: these must be equal: get the file again"
        )
    return pieces, kinds


def _strings(fields: Mapping[str, Any], name: str) -> list[str]:
    value = fields.get(name)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise InputError(f"tokenizer.ggml.{name}={str(value)[:40]!r} must be a list of strings: get the file again")
    return value


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _number(field: int, value: int) -> bytes:
    """Protocol buffers' wire format: a varint."""
    return _varint(field << 3) + _varint(int(value))


def _real(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())
