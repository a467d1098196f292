"""Each of IFEval's rules on responses that follow it and responses that do not."""

import time

import pytest

from grpo_jax.errors import InputError
from grpo_jax.rewards.instructions import RULES, check_rules, follows, follows_loosely

CASES = {
    "keywords:existence": ({"keywords": ["c++", "Tea"]}, ["tea and C++"], ["tea"]),
    "keywords:frequency": (
        {"keyword": "ab", "frequency": 2, "relation": "at least"},
        ["ab Ab", "abab ab"],
        ["ab", "a b a b"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, ["concatenate"], ["A CAT sat", "cat."]),
    "keywords:letter_frequency": ({"letter": "e", "let_frequency": 2, "let_relation": "less than"}, ["eat"], ["Ee"]),
    "language:response_language": ({"language": "ru"}, ["Привет, мир и everyone"], ["hello everyone"]),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "at least"},
        ["One. Two!", "One? Pi is 3.14 and no end", 'He said "no." Then left.', "一。二。"],
        ["One at 3.14 only.", "one"],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na *** b"],
        ["a", "a *** *** b", "a\n\nb"],
    ),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, ["two words"], ["one two three"]),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Well"},
        ["a\n\n'well, b", "a\n\nWELL!"],
        ["a\n\nSo well", "a\n\nwell\n\nc", "well"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[a] [b c]"], ["[a", "[a] b]"]),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, ["a\nP. P. S more", "p.p.s x"], ["P.S. no"]),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n  - b", "- a\n\n* b"],
        ["* a", "* a\n* b\n- c", "** a\n* b"],
    ),
    "detectable_format:constrained_response": ({}, ["So: My answer is maybe."], ["maybe"]),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and *b c*", "**a** and **b**"],
        ["*a*", "* * and **", "*a\nb* *c*"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1", "Section 1 Section 2"],
    ),
    "detectable_format:json_format": ({}, ['{"a": [1]}', '```json\n{"a": 1}\n```'], ["a", '{"a": 1} done']),
    "detectable_format:title": ({}, ["<<A title>>\ntext"], ["<<>>", "<<a", ">> a <<", "<<\n>>"]),
    "combination:two_responses": ({}, ["a\n******\nb"], ["a", "a ****** a", "a ****** ****** b", "a****** b ****** c"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say A. "}, ["say a. A"], ["A. Say A."]),
    "startend:end_checker": ({"end_phrase": "The End"}, ['a. the end"', "The End "], ["The End."]),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA's ICE-AGE is IT"],
        ["NASA and Ice", "1 2 3"],
    ),
    "change_case:english_capital": ({}, ["ALL LOUD, 3!"], ["ALL but", "ГРОМКО"]),
    "change_case:english_lowercase": ({}, ["all quiet, 3!"], ["all But", "тихо"]),
    "punctuation:no_comma": ({}, ["a b; c"], ["a, b"]),
    "startend:quotation": ({}, ['"a"', ' "a b" '], ['"', 'a"', "'a'"]),
}


@pytest.mark.parametrize("name", list(RULES))
def test_rule(name):
    options, good, bad = CASES[name]
    rule = {"rule": name, **options}
    check_rules([rule], "here")
    assert [follows(rule, text) for text in good] == [True] * len(good)
    assert [follows(rule, text) for text in ["", " \n", *bad]] == [False] * (len(bad) + 2)


def test_loose_forgives_a_first_and_a_last_line_and_asterisks():
    rule = {"rule": "startend:end_checker", "end_phrase": "bye"}
    for text in ("a bye", "a bye\nHope this helps", "a **bye**", "Sure:\na *bye*\nDone"):
        assert follows_loosely(rule, text)
    assert not follows(rule, "a **bye**") and not follows_loosely(rule, "bye bye birdie")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rule": "keywords:many"}, "here: instruction 'keywords:many' is not one of IFEval's: leave the row out"),
        ({"rule": "keywords:existence"}, "here: instruction 'keywords:existence' lacks an option"),
        ({"rule": "length_constraints:number_words", "num_words": 3, "relation": "about"}, "has a bad one"),
    ],
)
def test_bad_rules_are_refused(rule, message):
    with pytest.raises(InputError, match=message):
        check_rules([rule], "here")


def test_hostile_responses_take_linear_time():
    texts = [
        unit * (40_000 // len(unit)) for unit in ("*", "[", "<", " \n", "\n*", ". ", "a", "p.", "A-", "SECTION ", "{")
    ]
    texts += ["<<" * 10_000 + ">" * 10_000, "[" * 40_000 + "]", "." * 40_000 + "a", ".'" * 20_000]
    start = time.process_time()
    for name, (options, _, _) in CASES.items():
        for text in texts:
            follows({"rule": name, **options}, text)
    assert time.process_time() - start < 5
