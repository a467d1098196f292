"""Words and the script that they are written in: what the language rewards count. Nothing here loads jax.

A word is a run of letters of one kind, kinds being the target language's script and all others; in scripts that are
written without spaces each letter is a word. No words are: the tags of the answer format, LaTeX commands (letters after
a backslash), digits, signs, mathematical alphabets, and Greek letters unless the target is Greek.
"""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

# Scripts by language, named as in Unicode's character names.
SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("af ca cs cy da de en es et eu fi fr ga gl hr hu id is it la lt lv ms".split(), ("LATIN",)),
    **dict.fromkeys("mt nl no pl pt ro sk sl sq sv sw tl tr vi".split(), ("LATIN",)),
    **dict.fromkeys("be bg kk ky mk mn ru sr tg uk".split(), ("CYRILLIC",)),
    **dict.fromkeys("ar fa ps ur".split(), ("ARABIC",)),
    **dict.fromkeys("hi mr ne sa".split(), ("DEVANAGARI",)),
    "am": ("ETHIOPIC",),
    "bn": ("BENGALI",),
    "el": ("GREEK",),
    "gu": ("GUJARATI",),
    "he": ("HEBREW",),
    "hy": ("ARMENIAN",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ka": ("GEORGIAN",),
    "km": ("KHMER",),
    "kn": ("KANNADA",),
    "ko": ("HANGUL",),
    "lo": ("LAO",),
    "ml": ("MALAYALAM",),
    "my": ("MYANMAR",),
    "pa": ("GURMUKHI",),
    "si": ("SINHALA",),
    "ta": ("TAMIL",),
    "te": ("TELUGU",),
    "th": ("THAI",),
    "zh": ("CJK",),
}
UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "BOPOMOFO", "YI", "TIBETAN"})
# Words that begin the names of letters and marks which belong to no language.
SYMBOLS = frozenset(
    "MATHEMATICAL MODIFIER COMBINING MICRO FEMININE MASCULINE KELVIN ANGSTROM OHM SCRIPT DOUBLE-STRUCK BLACK-LETTER "
    "TURNED PLANCK EULER ROTATED REVERSED SUPERSCRIPT SUBSCRIPT VARIATION ALEF BET GIMEL DALET VERTICAL".split()
)
ALIASES = {"IDEOGRAPHIC": "CJK", "KATAKANA-HIRAGANA": "KATAKANA"}
# Planes 2 and 3 hold Han characters alone; the table covers the planes below.
ASTRAL = (0x20000, 0x40000)
NONE, TARGET, TARGET_UNSPACED, OTHER, OTHER_UNSPACED = range(5)
BACKSLASH = ord("\\")
ALPHABETS = 0x590  # Latin, Greek, Cyrillic and Armenian end here
_TAGS = re.compile(r"</?(?:think|answer)>")


@dataclasses.dataclass(frozen=True, eq=False)
class LetterClasses:
    """NONE to OTHER_UNSPACED for each character below 0x20000, and for those of planes 2 and 3 alike."""

    table: UInt8[np.ndarray, "characters"]
    beyond: int


def script_of(character: str) -> str | None:
    """The script of a letter or of a mark that belongs to one, by its Unicode name; None for all other characters."""
    category = unicodedata.category(character)
    if category[0] not in "LM":
        return None
    words = unicodedata.name(character, "").split()
    if words and words[0] in ("FULLWIDTH", "HALFWIDTH"):
        words = words[1:]
    if not words or words[0] in SYMBOLS or words[:2] == ["ARABIC", "MATHEMATICAL"]:
        return None
    script = ALIASES.get(words[0], words[0])
    return None if category[0] == "M" and script in UNSPACED else script


@functools.lru_cache(maxsize=16)
def letter_classes(language: str, known: int = ASTRAL[0]) -> LetterClasses:
    """The classes of characters for a target language of SCRIPTS; the table holds those of the first `known`."""
    wanted = SCRIPTS[language]

    def kind(script: str | None) -> int:
        if script is None or (script == "GREEK" and script not in wanted):
            return NONE
        if script in wanted:
            return TARGET_UNSPACED if script in UNSPACED else TARGET
        return OTHER_UNSPACED if script in UNSPACED else OTHER

    table = np.array([kind(script_of(chr(point))) for point in range(known)], np.uint8)
    return LetterClasses(table, kind("CJK"))


def languages_of(rows: Iterable[Mapping[str, Any]], default: str) -> list[str]:
    """The target language of each row: its column 'language' where that is a code of SCRIPTS, else the default."""
    named = (row.get("language") for row in rows)
    return [code if isinstance(code, str) and code in SCRIPTS else default for code in named]


def word_counts(text: str, language: str) -> tuple[int, int]:
    """Words of a text in the script of the language, and words in other scripts."""
    points = np.frombuffer(_TAGS.sub(" ", text).encode("utf-32-le", "surrogatepass"), np.uint32)
    # The whole table takes a second to make.
    classes = letter_classes(language, ALPHABETS if points.max(initial=0) < ALPHABETS else ASTRAL[0])
    kind = np.where(points < ASTRAL[0], classes.table[np.minimum(points, len(classes.table) - 1)], NONE)
    kind = np.where((points >= ASTRAL[0]) & (points < ASTRAL[1]), classes.beyond, kind)
    before, behind = (np.concatenate([np.zeros(1, x.dtype), x[:-1]])[: len(x)] for x in (kind, points))
    starts = (kind != NONE) & ((kind % 2 == 0) | (kind != before)) & (behind != BACKSLASH)
    inside = starts & (kind <= TARGET_UNSPACED)
    return int(inside.sum()), int(starts.sum() - inside.sum())


def share_in_language(text: str, language: str) -> float:
    """Share of the words of a text that are in the script of the language; 1 without any word."""
    share = language_share(text, language)
    return 1.0 if share is None else share


def language_share(text: str, language: str) -> float | None:
    """Share of the words of a text that are in the script of the language; None where it has no words."""
    inside, outside = word_counts(text, language)
    return inside / (inside + outside) if inside + outside else None
