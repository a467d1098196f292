"""A SentencePiece tokenizer made in the run."""

import io
import pathlib
from collections.abc import Iterable

import sentencepiece

from grpo_jax.errors import InputError
from grpo_jax.text.files import write


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
    write(pathlib.Path(path), model.getvalue())
