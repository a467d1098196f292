"""The verifiable instructions of IFEval (arXiv 2311.07911): 25 rules by their published names and options.

A response is hostile text: every pattern here takes time linear in its length. Where the original asks a tokenizer or a
language detector (sentences, words in capitals, language), plain rules of characters stand in, as each says.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.errors import InputError
from grpo_jax.rewards.letters import SCRIPTS, share_in_language

WORD = re.compile(r"\w+")
# A sentence ends at these where whitespace or the end follows.
SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"')\]]*+(?=\s|\Z)|[。！？]")
RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": lambda found, wanted: found < wanted,
    "at least": lambda found, wanted: found >= wanted,
}
CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
Options = Mapping[str, Any]


def follows(rule: Options, response: str) -> bool:
    """Whether a response follows a rule {'rule': name, options}; an empty response follows none."""
    return bool(response.strip()) and RULES[rule["rule"]](response, rule)


def follows_loosely(rule: Options, response: str) -> bool:
    """Whether it does without its first line, its last line or both, and without asterisks, each of them or not."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(follows(rule, text) for kept in cut for text in (kept, kept.replace("*", "")))


def check_rules(rules: Any, where: str) -> None:
    """Raises InputError for rules that are not known or that lack an option."""
    for rule in rules:
        name = rule.get("rule")
        if name not in RULES:
            raise InputError(f"{where}: instruction {name!r} is not one of IFEval's: leave the row out")
        try:
            RULES[name]("a response", rule)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{where}: instruction {name!r} lacks an option or has a bad one ({error!r})") from None


def _compare(found: int, rule: Options, wanted: str, relation: str) -> bool:
    return RELATIONS[rule[relation]](found, int(rule[wanted]))


def _count(keyword: str, text: str, whole: bool = False) -> int:
    border = r"\b" if whole else ""
    return len(re.findall(f"{border}{re.escape(keyword)}{border}", text, re.IGNORECASE))


def _existence(text: str, rule: Options) -> bool:
    return all(_count(keyword, text) for keyword in rule["keywords"])


def _frequency(text: str, rule: Options) -> bool:
    return _compare(_count(rule["keyword"], text), rule, "frequency", "relation")


def _forbidden(text: str, rule: Options) -> bool:
    return not any(_count(word, text, whole=True) for word in rule["forbidden_words"])


def _letters(text: str, rule: Options) -> bool:
    return _compare(text.lower().count(rule["letter"].lower()), rule, "let_frequency", "let_relation")


def _language(text: str, rule: Options) -> bool:
    """By script: languages that share one are not told apart."""
    language = rule["language"].partition("-")[0]
    return language not in SCRIPTS or share_in_language(text, language) > 0.5


def _sentences(text: str, rule: Options) -> bool:
    found = len(SENTENCE_END.findall(text)) + bool(SENTENCE_END.split(text)[-1].strip())
    return _compare(found, rule, "num_sentences", "relation")


def _paragraphs(text: str, rule: Options) -> bool:
    """Divided by three asterisks; an empty one may stand at either end only."""
    parts = [part.strip() for part in text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == int(rule["num_paragraphs"])


def _words(text: str, rule: Options) -> bool:
    return _compare(len(WORD.findall(text)), rule, "num_words", "relation")


def _first_word(text: str, rule: Options) -> bool:
    parts = [part.strip() for part in text.split("\n\n")]
    place = int(rule["nth_paragraph"]) - 1
    if sum(map(bool, parts)) != int(rule["num_paragraphs"]) or not 0 <= place < len(parts) or not parts[place]:
        return False
    word = parts[place].split()[0].lstrip("'\"").lower()
    return re.split(r"[.,?!'\"]", word)[0] == rule["first_word"].lower()


def _placeholders(text: str, rule: Options) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= int(rule["num_placeholders"])


def _postscript(text: str, rule: Options) -> bool:
    letters = [
        re.escape(letter) for letter in rule["postscript_marker"].lower().replace(" ", "").rstrip(".").split(".")
    ]
    return re.search(r"\.\s?".join(letters), text.lower()) is not None


def _bullets(text: str, rule: Options) -> bool:
    return len(re.findall(r"^[ \t]*+(?:\*[^*\n]|-)", text, re.MULTILINE)) == int(rule["num_bullets"])


def _constrained(text: str, rule: Options) -> bool:
    del rule
    return any(choice in text for choice in CHOICES)


def _highlights(text: str, rule: Options) -> bool:
    single = [part for part in re.findall(r"\*([^\n*]*)\*", text) if part.strip()]
    double = [part for part in re.findall(r"\*\*([^\n*]*)\*\*", text) if part.strip()]
    return len(single) + len(double) >= int(rule["num_highlights"])


def _sections(text: str, rule: Options) -> bool:
    found = re.findall(rf"{re.escape(rule['section_spliter'].strip())}\s?\d", text)
    return len(found) >= int(rule["num_sections"])


def _json(text: str, rule: Options) -> bool:
    del rule
    body = text.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        body = body.removeprefix(opening)
    try:
        json.loads(body.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, rule: Options) -> bool:
    del rule
    spans = ((line.find("<<"), line.rfind(">>"), line) for line in text.split("\n"))
    return any(0 <= start < end and line[start:end].strip("<> \t") for start, end, line in spans)


def _two_responses(text: str, rule: Options) -> bool:
    del rule
    parts = [part.strip() for part in text.split("******")]
    return all(parts[1:-1]) and len(found := [part for part in parts if part]) == 2 and found[0] != found[1]


def _repeat(text: str, rule: Options) -> bool:
    return text.strip().lower().startswith(rule["prompt_to_repeat"].strip().lower())


def _end(text: str, rule: Options) -> bool:
    return text.strip().strip('"').lower().endswith(rule["end_phrase"].strip().lower())


def _capital_words(text: str, rule: Options) -> bool:
    """A word is a run of letters, digits, underscores, apostrophes and hyphens, with a letter in it."""
    words = re.findall(r"[\w'’-]+", text)
    return _compare(sum(word.isupper() for word in words), rule, "capital_frequency", "capital_relation")


def _capital(text: str, rule: Options) -> bool:
    del rule
    return text.isupper() and share_in_language(text, "en") > 0.5


def _lowercase(text: str, rule: Options) -> bool:
    del rule
    return text.islower() and share_in_language(text, "en") > 0.5


def _no_comma(text: str, rule: Options) -> bool:
    del rule
    return "," not in text


def _quotation(text: str, rule: Options) -> bool:
    del rule
    text = text.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


RULES: dict[str, Callable[[str, Options], bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capital,
    "change_case:english_lowercase": _lowercase,
    "punctuation:no_comma": _no_comma,
    "startend:quotation": _quotation,
}
