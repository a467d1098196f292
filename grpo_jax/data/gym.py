"""Tasks of the package reasoning-gym, where it is installed: `pip install 'grpo-jax[tasks]'`.

Its scorers are not used: some run text as code (see `grpo-jax` on hostile output). Only generators that keep the
package's plain comparison are taken: their answers are unique, so the rewards of this package compare them as text.
"""

import difflib
import importlib
import zlib
from typing import Any

import numpy as np

from grpo_jax.data import arithmetic
from grpo_jax.errors import InputError

PACKAGE = "reasoning_gym"
MOST_DRAWN = 5_000  # questions that are made of a generator, both sides together
MARK = 3_000_000_000  # sets the hashed pairs of questions apart from those of own tasks
# The package speaks English; this line asks for a chain in another language.
ASKS = {"en": "", "ru": "Думай по-русски. "}


def rows(seed: int, split: str, name: str, count: int) -> list[dict[str, Any]]:
    """At most `count` rows {'prompt', 'answer', 'kind'} of a generator on one side, in its own order.

    Raises InputError when the package is missing, for unknown generators, and for those with a scorer of their own.
    """
    package = _package(name)
    factory, base = (importlib.import_module(f"{PACKAGE}.{part}") for part in ("factory", "dataset"))
    where = f"data.path: 'reasoning_gym:{name}'"
    if name not in factory.DATASETS:
        near = difflib.get_close_matches(name, factory.DATASETS, n=1)
        raise InputError(f"{where} is no generator of the package" + (f"; did you mean {near[0]!r}?" if near else ""))
    plain = base.ProceduralDataset.score_answer
    if factory.DATASETS[name][0].score_answer is not plain:
        known = sorted(each for each, (made, _) in factory.DATASETS.items() if made.score_answer is plain)
        raise InputError(f"{where} has answers that only its own scorer can judge; there are: {', '.join(known)}")
    found: dict[str, dict[str, Any]] = {}
    for item in package.create_dataset(name, seed=seed % 2**31, size=MOST_DRAWN):
        question, answer = item["question"].strip(), str(item["answer"]).strip()
        if answer and held_out(seed, question) == (split == "eval"):
            found.setdefault(question, {"prompt": question, "answer": answer, "kind": "exact"})
        if len(found) == count:
            break
    if not found:
        raise InputError(f"{where} gives the {split} split no row: name another generator")
    return list(found.values())


def held_out(seed: int, text: str) -> bool:
    """Whether a question is held out: by the hash of `arithmetic` on the seed and a checksum of the text."""
    checksum = np.array([zlib.crc32(text.encode())])
    return bool(arithmetic.held_out(seed, checksum, checksum * 0 + MARK)[0])


def bare(prompt: str) -> str:
    """A prompt without what asks for a language."""
    for asks in ASKS.values():
        prompt = prompt.removeprefix(asks)
    return prompt


def _package(name: str) -> Any:
    try:
        return importlib.import_module(PACKAGE)
    except ImportError as error:
        raise InputError(
            f"data.path: 'reasoning_gym:{name}' needs a package that is not here ({error}): "
            "pip install 'grpo-jax[tasks]'"
        ) from None
