"""Filters of sampled completions for supervised stages: each has a name, and what it drops is counted under it.

A row is a dict with 'prompt', 'completion' and, where a filter reads them, 'right' (verified), 'ended', 'length' in
tokens, and perhaps 'language' (its code) and 'opened' (the prompt ends with `<think>`). Pure functions: rows in, rows
and counts out.
"""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt64

from grpo_jax.config import option
from grpo_jax.errors import InputError
from grpo_jax.rewards.letters import SCRIPTS, share_in_language
from grpo_jax.rewards.texts import answer_last_fault, opens_thinking, text_of, thought_and_answer_fault

FORMATS: dict[str, Callable[[str], str]] = {
    "think_answer": thought_and_answer_fault,
    "answer": answer_last_fault,
    "none": lambda text: "",
}
FENCE = "```"
# 32 bands of 4 hashes: a pair of Jaccard 0.8 is missed with a chance of 5e-8, one of 0.7 with 1.5e-4.
BANDS, HASHES_A_BAND = 32, 4
UNITS = re.compile(r"[^\W_]+")  # what n-grams of texts are made of: words and numbers
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """What a completion must be to be kept; a bound of 0 is none."""

    right: bool = option(True, "it was verified to be right")
    ended: bool = option(True, "it ended by itself, not at its length limit")
    format: str = option(
        "none", "<think>..</think> <answer>..</answer>; <answer>..</answer> at its end", tuple(FORMATS)
    )
    language: str = option("en", "ISO 639-1 code; a row's own column 'language' comes first; empty: any")
    language_share: float = option(0.95, "least share of its words in that language's script")
    repetition: float = option(0.4, "most share of its word n-grams that were there before; 1: any")
    repetition_ngram: int = option(8, "words of such an n-gram")
    least_length: int = option(0, "tokens at least")
    most_length: int = option(0, "tokens at most")
    paragraph_words: int = option(300, "words that no paragraph exceeds")
    code_blocks: bool = option(False, "fenced code may stand in it")


@dataclasses.dataclass(frozen=True)
class Filtered:
    """Rows that were kept, in order, and how many each filter dropped by its name (names that dropped none too)."""

    rows: list[dict[str, Any]]
    dropped: dict[str, int]

    @property
    def kept(self) -> int:
        """How many rows are left."""
        return len(self.rows)

    def then(self, step: Callable[[Sequence[Row]], "Filtered"]) -> "Filtered":
        """A further filter on what is left; counts of one name add up."""
        after = step(self.rows)
        names = dict.fromkeys([*self.dropped, *after.dropped])
        return Filtered(after.rows, {n: self.dropped.get(n, 0) + after.dropped.get(n, 0) for n in names})


def filter_completions(rows: Iterable[Row], config: FilterConfig) -> Filtered:
    """The rows that pass all filters; a row that fails several is counted under the first in the order of FILTERS."""
    check_filters(config)
    kept, dropped = [], dict.fromkeys(FILTERS, 0)
    for row in rows:
        reason = next((name for name, passes in FILTERS.items() if not passes(row, config)), None)
        if reason is None:
            kept.append(dict(row))
        else:
            dropped[reason] += 1
    return Filtered(kept, dropped)


def check_filters(config: FilterConfig) -> None:
    """Raises InputError for values that cannot be meant."""
    if config.format not in FORMATS:
        raise InputError(f"filters.format={config.format!r} is not one of {', '.join(FORMATS)}: use one of them")
    if config.language and config.language not in SCRIPTS:
        raise InputError(f"filters.language={config.language!r} has no known script: use one of {', '.join(SCRIPTS)}")
    for name in ("language_share", "repetition"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"filters.{name}={getattr(config, name)} must lie between 0 and 1")
    for name, least in (("repetition_ngram", 1), ("least_length", 0), ("most_length", 0), ("paragraph_words", 0)):
        if getattr(config, name) < least:
            raise InputError(f"filters.{name}={getattr(config, name)} must be at least {least}")


def _right(row: Row, config: FilterConfig) -> bool:
    return not config.right or bool(row["right"])


def _ended(row: Row, config: FilterConfig) -> bool:
    return not config.ended or bool(row["ended"])


def _format(row: Row, config: FilterConfig) -> bool:
    text = text_of(row["completion"])
    opening = (
        "<think>" if config.format == "think_answer" and (row.get("opened") or opens_thinking(row["prompt"])) else ""
    )
    return not FORMATS[config.format](opening + text)


def _one_language(row: Row, config: FilterConfig) -> bool:
    language = row.get("language") if row.get("language") in SCRIPTS else config.language
    return not language or share_in_language(text_of(row["completion"]), language) >= config.language_share


def _no_repetition(row: Row, config: FilterConfig) -> bool:
    return repeated_share(text_of(row["completion"]), config.repetition_ngram) <= config.repetition


def _length(row: Row, config: FilterConfig) -> bool:
    if not (config.least_length or config.most_length):
        return True
    return config.least_length <= row["length"] <= (config.most_length or row["length"])


def _short_paragraphs(row: Row, config: FilterConfig) -> bool:
    bound = config.paragraph_words
    return not bound or longest_paragraph(text_of(row["completion"])) <= bound


def _no_code(row: Row, config: FilterConfig) -> bool:
    return config.code_blocks or FENCE not in text_of(row["completion"])


FILTERS: dict[str, Callable[[Row, FilterConfig], bool]] = {
    "verified correct": _right,
    "ended": _ended,
    "format": _format,
    "one language": _one_language,
    "repetition": _no_repetition,
    "length": _length,
    "long paragraphs": _short_paragraphs,
    "code blocks": _no_code,
}


def words_of(text: str) -> list[str]:
    """Normalised words: compatibility forms composed, case folded, signs left out; Han and kana one by one."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return UNITS.findall(UNSPACED.sub(r" \g<0> ", folded))


def repeated_share(text: str, n: int) -> float:
    """1 - distinct / all of the text's word n-grams; 0 without any."""
    grams = list(ngrams(words_of(text), n))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def longest_paragraph(text: str) -> int:
    """Words of the longest paragraph; paragraphs are divided by empty lines."""
    return max(len(words_of(part)) for part in re.split(r"\n[ \t]*\n", text))


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """All runs of n words."""
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def decontaminate(rows: Iterable[Row], against: Iterable[Any], n: int = 10) -> Filtered:
    """The rows that share no n-gram of words with the texts of evaluation sets ('contaminated': how many did).

    Prompt and completion are looked at. A text of fewer than n words counts where it is the whole prompt. DeepSeek-R1
    (Nature version, supplement) drops by matching 10-grams.
    """
    check_decontamination(n)
    grams: set[tuple[str, ...]] = set()
    short: set[tuple[str, ...]] = set()
    for text in against:
        words = words_of(prompt_text(text))
        grams.update(ngrams(words, n))
        if 0 < len(words) < n:
            short.add(tuple(words))
    kept, dropped = [], 0
    for row in rows:
        asked, said = words_of(prompt_text(row["prompt"])), words_of(text_of(row["completion"]))
        hit = tuple(asked) in short or any(gram in grams for words in (asked, said) for gram in ngrams(words, n))
        dropped += hit
        if not hit:
            kept.append(dict(row))
    return Filtered(kept, {"contaminated": dropped})


def check_decontamination(n: int) -> None:
    """Raises InputError for n-grams of no words."""
    if n < 1:
        raise InputError(f"decontamination: n={n} must be at least 1")


def check_deduplication(least_similarity: float, n: int = 3) -> None:
    """Raises InputError for a similarity that every pair or no pair has."""
    if not 0 < least_similarity <= 1 or n < 1:
        raise InputError(f"deduplication: similarity={least_similarity} must be above 0 up to 1, {n=} at least 1")


def prompt_text(prompt: Any) -> str:
    """A prompt as one text: itself, or what the messages of a chat say."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def deduplicate(rows: Iterable[Row], least_similarity: float = 0.8, n: int = 3) -> Filtered:
    """The rows without those that repeat an earlier one: 'exact duplicates' and 'near duplicates' are counted.

    Exact: prompt and completion have the same normalised words and the same signs in the same places, spacing and case
    apart. Near: the same prompt's words, and the Jaccard similarity of the completions' word n-grams is at least
    `least_similarity` (bands of MinHashes, Broder 1997, find candidates; each is then compared exactly).
    """
    check_deduplication(least_similarity, n)
    dropped = {"exact duplicates": 0, "near duplicates": 0}
    kept: list[dict[str, Any]] = []
    shingles: list[set[tuple[str, ...]]] = []
    exact: set[tuple[str, str]] = set()
    buckets: dict[tuple, list[int]] = {}
    for row in rows:
        asked, said = prompt_text(row["prompt"]), text_of(row["completion"])
        normal = (_squeezed(asked), _squeezed(said))
        if normal in exact:
            dropped["exact duplicates"] += 1
            continue
        exact.add(normal)
        words = words_of(said)
        grams = set(ngrams(words, n)) or {tuple(words)}
        asked_words = tuple(words_of(asked))
        places = [(asked_words, band, *part) for band, part in enumerate(bands(grams))]
        near = {number for place in places for number in buckets.get(place, ())}
        if any(jaccard(grams, shingles[number]) >= least_similarity for number in near):
            dropped["near duplicates"] += 1
            continue
        for place in places:
            buckets.setdefault(place, []).append(len(kept))
        kept.append(dict(row))
        shingles.append(grams)
    return Filtered(kept, dropped)


def _squeezed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def jaccard(a: set, b: set) -> float:
    """|a and b| / |a or b|."""
    return len(a & b) / len(a | b) if a or b else 1.0


def bands(grams: Iterable[tuple[str, ...]]) -> list[tuple[int, ...]]:
    """The MinHash signature of a set of n-grams, cut in BANDS: sets with an equal band are candidates.

    Hash i of a set is the least (a_i h + b_i) mod 2^64 over its members' 64-bit hashes h, by multiply and shift
    (Dietzfelbinger and others, 1997), upper half.
    """
    members = np.array([_hash(gram) for gram in grams], np.uint64)
    factors, offsets = _family()
    values = (members[:, None] * factors + offsets) >> np.uint64(32)
    least = values.min(axis=0).reshape(BANDS, HASHES_A_BAND)
    return [tuple(part) for part in least.tolist()]


def _hash(gram: tuple[str, ...]) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(gram).encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _family() -> tuple[UInt64[np.ndarray, "H"], UInt64[np.ndarray, "H"]]:
    """Odd factors and offsets of the hash functions, the same in every process."""
    words = np.random.Philox(key=np.array([20, 26], np.uint64)).random_raw(2 * BANDS * HASHES_A_BAND)
    return words[::2] | np.uint64(1), words[1::2]
