"""The in-graph rewards against rules written on strings, on generated and on chosen completions."""

import ast
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attacks import attacks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grpo_jax.rewards
from grpo_jax.config import RewardsConfig
from grpo_jax.rewards.letters import languages_of, word_counts
from grpo_jax.rewards.scorer import in_graph_function, language_column, row_languages
from grpo_jax.rewards.texts import TEXT_REWARDS, answer_span, last_number, opens_thinking, text_reward
from grpo_jax.rewards.verifiers import REWARDS, byte_table, completion_bytes, language, prompt_opens, verifier

FRAGMENTS = [
    "",  # a special token
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<",
        "<thi",
        "nk>",
        "</",
        "ans",
        "wer>",
        "/",
        ">",
        "<answer",
        "<<",
    ),
    *(" ", "\n", "\t ", "\x0b", "\x0c\r", "\u00a0", "\u2003", "\x00"),
    *"0123456789",
    *(",", ".", "-", ",000", "1,234", "00", ".0", "$", "-0", "−", ")", "a", "is ", "²", "٣", "é", "数", "🙂", "123456"),
    *("B", "b", "(", "[A]", ":", "word", "Жук", "の", "ไทย", "α", "\\", "\\frac", "ａ", "𐐀", "𠀀", "e\u0301", "हिं"),
]
# Pieces of characters too: tokens of a byte-level vocabulary end anywhere.
TOKEN_BYTES = [*(text.encode() for text in FRAGMENTS), *(b"\xe6", b"\x95", b"\xe6\x95", b"\xb0", b"\xff", b"\xf0\x9f")]
ROWS, LENGTH, ANSWER_WIDTH = 32, 40, 24
CONFIG = RewardsConfig(repetition_ngram=2, length_budget=30, overlong_cache=12)
ids = st.integers(0, len(TOKEN_BYTES) - 1)
digit_ids = st.sampled_from([i for i, text in enumerate(FRAGMENTS) if text and set(text) <= set("0123456789.,-$) ")])
letter_ids = st.sampled_from([FRAGMENTS.index(text) for text in ("B", "b", "(", "[A]", ":", ")", ".", "word", " ")])
bodies = st.lists(ids, max_size=6) | st.lists(digit_ids, max_size=8) | st.lists(letter_ids, max_size=3)


def text_of(tokens):
    return b"".join(TOKEN_BYTES[token] for token in tokens).decode(errors="replace")


@st.composite
def completion_and_answer(draw):
    think, think_end, answer, answer_end, space = 1, 2, 3, 4, FRAGMENTS.index(" ")
    body = draw(bodies)
    shaped = [think, *draw(bodies), think_end, *draw(st.sampled_from([[], [space]])), answer, *body, answer_end]
    tokens = draw(st.sampled_from([shaped, shaped[shaped.index(answer) :], shaped, shaped[1:], None]))
    if tokens is None:
        tokens = draw(st.lists(ids, max_size=LENGTH))
    tokens = tokens + draw(st.sampled_from([[], [], [0], [space, 0]]) | st.lists(ids, max_size=3))
    right = text_of(body) if draw(st.booleans()) else text_of(draw(bodies))
    if "\ufffd" in right or len(right.encode()) > ANSWER_WIDTH:
        right = draw(st.sampled_from(["", "12", "-1,234.50", "é", "B", "(b)"]))
    return tokens[:LENGTH], right.strip(" \t\n\r\x0b\x0c"), draw(st.booleans()), draw(st.booleans())


def answer_columns(rights, width=ANSWER_WIDTH):
    table = np.zeros((len(rights), width), np.uint8)
    for row, right in zip(table, rights, strict=True):
        row[: len(right.encode())] = list(right.encode())
    return {"answer_bytes": table, "answer_lengths": np.array([len(right.encode()) for right in rights], np.int32)}


def token_columns(tokens, lengths, opened, right):
    return {"tokens": tokens, "token_lengths": lengths, "opened": np.array(opened), "right": np.array(right)}


@functools.cache
def program(token_bytes):
    """Text and verdicts of all rewards; compiled once for each vocabulary."""

    @jax.jit
    def verdicts(tokens, lengths, columns):
        text, n = completion_bytes(byte_table(token_bytes), tokens, lengths)
        return text, n, {name: verifier(name, CONFIG)(text, n, columns) for name in REWARDS}

    return lambda *inputs: jax.device_get(verdicts(*inputs))


def differ(got, expected):
    return got is None or expected is None or abs(got - expected) > 1e-6 if got != expected else False


# A busy machine draws slowly; that is no fault of the strategy.
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(completion_and_answer(), min_size=ROWS, max_size=ROWS), st.integers(0, len(TOKEN_BYTES) + 5))
def test_bytes_and_scores_equal_the_text_twins(batch, padding):
    tokens = np.full((ROWS, LENGTH), padding, np.int32)
    for row, (completion, *_) in zip(tokens, batch, strict=True):
        row[: len(completion)] = completion
    completions, rights, opened, right = (list(column) for column in zip(*batch, strict=True))
    lengths = np.array([len(completion) for completion in completions], np.int32)
    columns = answer_columns(rights) | token_columns(tokens, lengths, opened, right)
    text, n, verdicts = program(tuple(TOKEN_BYTES))(tokens, lengths, columns)
    for row, size, completion in zip(text, n, completions, strict=True):
        assert row[:size].tobytes() == b"".join(TOKEN_BYTES[token] for token in completion)
        assert not row[size:].any()
    texts = [text_of(completion) for completion in completions]
    inputs = {"prompts": [""] * ROWS, "completions": texts, "answer": rights, "completion_ids": completions}
    for name, (values, valid) in verdicts.items():
        expected = text_reward(name, CONFIG, LENGTH)(**inputs, opened=opened, right=right)
        got = [float(value) if applies else None for value, applies in zip(values, valid, strict=True)]
        wrong = [row for row in zip(texts, rights, opened, right, got, expected, strict=True) if differ(*row[-2:])]
        assert not wrong, (name, wrong[:3])
        assert not values[valid == 0].any()


def score(name, texts, rights, opened=False):
    """In-graph verdicts of whole strings, each byte a token; the twin must agree."""
    data = [text.encode() for text in texts]
    tokens, lengths = np.zeros((16, 160), np.int32), np.zeros(16, np.int32)
    for i, line in enumerate(data):
        tokens[i, : len(line)], lengths[i] = list(line), len(line)
    columns = answer_columns(rights + [""] * (16 - len(rights)), 80)
    columns |= token_columns(tokens, lengths, [opened] * 16, [False] * 16)
    values, valid = program(tuple(bytes([i]) for i in range(256)))(tokens, lengths, columns)[2][name]
    values, valid = values[: len(texts)], valid[: len(texts)]
    got = [float(value) if applies else None for value, applies in zip(values, valid, strict=True)]
    prompts = ["Assistant: <think>\n" if opened else ""] * len(texts)
    assert got == TEXT_REWARDS[name](prompts=prompts, completions=texts, answer=rights)
    return got


def test_answer_is_the_last_span():
    texts = [
        "<answer> 12\n</answer>",
        "<answer>1</answer> or <answer>12</answer>",
        "<answer>12</answer> or <answer>1</answer>",
        "<answer>12</answer> or <answer>",
        "<answer><answer>12</answer></answer>",
        "12</answer>",
        "<answer>12",
        "<answer>012</answer>",
        "<answer>1 2</answer>",
        "<answer></answer>",
        "",
    ]
    assert score("answer", texts, ["12"] * len(texts)) == [1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert score("answer", texts[:2], ["", "12"]) == [None, 1]


def test_format_is_strict():
    right = "<think>a</think> <answer>b</answer>"
    texts = {
        right: 1,
        f" \n{right}\n": 1,
        "<think></think><answer></answer>": 1,
        f"x{right}": 0,
        f"{right}x": 0,
        "<think>a</think>x<answer>b</answer>": 0,
        "<think>a</think> <answer>b": 0,
        "<think>a<answer>b</think></answer>": 0,
        "<think>a<answer>b</answer></think>": 0,
        "<think>a <answer>b</answer> c</think> <answer>b</answer>": 0,
        "<answer>b</answer> <think>a</think>": 0,
        f"{right}{right}": 0,
        "</think><think> <answer>b</answer>": 0,
        "<Think>a</Think> <answer>b</answer>": 0,
        "<think>a</think>\u00a0<answer>b</answer>": 0,
        "": 0,
    }
    assert score("format", list(texts), [""] * len(texts)) == list(texts.values())


def test_format_where_the_prompt_has_opened_the_thinking():
    texts = {
        "a</think> <answer>b</answer>": 1,
        "</think><answer>b</answer>\n": 1,
        "<think>a</think> <answer>b</answer>": 0,
        "<answer>b</answer>": 0,
        "a</think> so <answer>b</answer>": 0,
        "a</think> <answer>b": 0,
        "a</think>b</think> <answer>b</answer>": 0,
        "a <answer>b</answer></think>": 0,
        "": 0,
    }
    assert score("format", list(texts), [""] * len(texts), opened=True) == list(texts.values())


@pytest.mark.parametrize("table", [(b"<think>", b"\n", b"x", b"", b"<thi", b"nk>"), None])
def test_prompts_that_end_with_the_open_tag(table):
    prompts = ["x<think>", "<think>\n", "<think>\n\n\n", "<think>x", "x", "<think>\nx\n", "", "<think", "x<thi<think>"]
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>\n"}]
    assert opens_thinking(chat) and not opens_thinking([]) and not opens_thinking(chat[:1])
    if table is None:
        table = [bytes([i]) for i in range(256)]
        ids = [list(prompt.encode()) for prompt in prompts]
    else:
        ids = [[0], [2, 0, 3, 1, 3], [4, 5, 1], [0, 2], [2], [4, 5, 1, 2, 1], [], [4], [2, 4, 4, 5]]
    tokens = np.zeros((len(ids), 18), np.int32)
    for row, line in zip(tokens, ids, strict=True):
        row[18 - len(line) :] = line
    opens = jax.jit(lambda tokens, lengths: prompt_opens(byte_table(table), tokens, lengths))
    got = opens(tokens, np.array([len(line) for line in ids]))
    want = [True, True, True, False, False, False, False, False, True]
    assert got.tolist() == want == [opens_thinking(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("span", "right", "want"),
    [
        ("12", "12", 1),
        (" 12.0\n", "12", 1),
        ("1,234.50", "1234.5", 1),
        ("-3", "-3", 1),
        (".5", "0.5", 1),
        ("12 apples", "12", 0),
        ("= 12", "12", 0),
        ("12.", "12", 0),
        ("1,23", "123", 0),
        ("--12", "-12", 0),
        ("", "12", 0),
        ("0" * 70, "0", 0),
        ("12", "the 12", 1),
    ],
)
def test_answer_number_is_the_whole_span(span, right, want):
    assert score("answer_number", [f"<answer>{span}</answer>", f"so {span}"], [right, right]) == [want, 0]


def test_choice_letters():
    spans = ["B", "b", "(B)", "[b]", "B.", "B) 12", "B: the second", "{B}", "A", "Bar", "B or C", "", "(", "2", "ß"]
    want = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert score("choice", [f"<answer>{span}</answer>" for span in spans], ["(b)"] * 15) == want
    assert score("choice", ["<answer>B</answer>", "B"], ["12", "B"]) == [None, 0]


def test_words_by_script():
    counts = {
        "Hello world, Привет мир!": (2, 2),
        "我们 think 然后": (1, 4),
        "<think>fine</think> <answer>42</answer>": (1, 0),
        "\\frac{1}{x} + \\alpha α 𝛼 µ": (1, 0),
        "naïve façade": (2, 0),
        "ふ゛ word": (1, 1),
        "12 + 3 = 15 🙂": (0, 0),
    }
    assert {text: word_counts(text, "en") for text in counts} == counts
    assert word_counts("我们 think 然后 かな 𠀀", "zh") == (5, 3) and word_counts("我 かな カー", "ja") == (5, 0)
    assert word_counts("ένα two", "el") == (1, 1) and word_counts("ένα two", "en") == (1, 0)
    assert word_counts("한국어 말 我", "ko") == (2, 1) and word_counts("हिंदी में", "hi") == (2, 0)


@pytest.mark.parametrize("target", ["zh", "ru"])
def test_language_of_other_targets_in_graph(target):
    texts = ["我们 думать then 𠀀", "Привет, мир", "", "只有 <think> 中文 </think>", "α 12", "only words"]
    data = np.zeros((6, 64), np.uint8)
    for row, text in zip(data, texts, strict=True):
        row[: len(text.encode())] = list(text.encode())
    got = jax.jit(functools.partial(language, language=target))(data, np.zeros(6, np.int32), {})[0]
    np.testing.assert_allclose(got, TEXT_REWARDS["language"]([], texts, language=target), atol=1e-6)


def test_language_by_row():
    """Each row has its own target; the same texts earn what their twins say."""
    rows = [{"prompt": "", "answer": "", "language": code} for code in ("ru", "en", "zh", "Python", None, "ru")]
    rows[4].pop("language")
    texts = ["Привет, мир and you", "Привет, мир and you", "我们 think 𠀀", "думать then", "a б", ""]
    config = RewardsConfig(names=("language",), weights=(1.0,), language="ru")
    targets = languages_of(rows, "ru")
    assert targets == ["ru", "en", "zh", "ru", "ru", "ru"]
    columns = language_column(config, rows)
    data = np.zeros((6, 64), np.uint8)
    for row, text in zip(data, texts, strict=True):
        row[: len(text.encode())] = list(text.encode())
    got = jax.jit(in_graph_function("language", config, rows))(data, np.zeros(6, np.int32), columns)[0]
    np.testing.assert_allclose(got, [1 / 2, 1 / 2, 3 / 4, 1 / 2, 1 / 2, 1.0], atol=1e-6)
    np.testing.assert_allclose(got, TEXT_REWARDS["language"]([], texts, language=targets), atol=1e-6)
    alike = [{**row, "language": "ru"} for row in rows]
    assert language_column(config, alike) == {} and row_languages(config, alike) == ()


def test_shaping_by_hand():
    ids = [[], [1, 2, 3], [1, 1, 1, 1], list(range(20)), [1, 2] * 5]
    call = {"prompts": [""] * 5, "completions": [""] * 5, "completion_ids": ids}
    assert TEXT_REWARDS["repetition"](**call, ngram=2) == pytest.approx([0, 0, -2 / 3, 0, -7 / 9])
    assert TEXT_REWARDS["overlong"](**call, budget=20, cache=16) == [0, 0, 0, -1, -6 / 16]
    assert TEXT_REWARDS["overlong"](**call, budget=10) == [0, 0, 0, -1, -1]  # the last fifth, as in the paper
    right = TEXT_REWARDS["cosine"](**call, right=[True] * 5, budget=20, when_right=(1.0, 0.5))
    wrong = TEXT_REWARDS["cosine"](**call, right=[False] * 5, budget=20, when_wrong=(-1.0, -0.5))
    assert right[::3] == [1.0, 0.5] and right[4] == pytest.approx(0.75)
    assert wrong[::3] == [-1.0, -0.5] and wrong[4] == pytest.approx(-0.75)


def test_answer_format_allows_words_before():
    texts = {
        "so 5 + 7 = 12 <answer>12</answer>\n": 1,
        "<answer>12</answer>": 1,
        "<think>x<answer>12</answer>": 1,
        "<answer>12</answer>.": 0,
        "<answer>1</answer> <answer>12</answer>": 0,
        "<answer>12": 0,
        "</answer><answer>": 0,
        "12": 0,
    }
    assert score("answer_format", list(texts), [""] * len(texts)) == list(texts.values())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7 + 5 = 12.", "12"),
        ("costs $1,234,567.50 today", "1234567.5"),
        ("-0.0", "0"),
        ("007", "7"),
        ("is .50", "0.5"),
        ("the end.5", "5"),
        ("...5", "5"),
        ("7-5", "5"),
        ("(1)-5", "5"),
        ("= -5", "-5"),
        ("--5", "-5"),
        ("-.5", "-0.5"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("1234,567", "567"),
        ("1,2345", "2345"),
        ("1.2.3", "2.3"),
        ("2³ and ٣", "2"),
        ("none", None),
        ("9" * 64, "9" * 64),
        ("9" * 65, None),
        ("0" * 70 + "5", None),
        ("-" + "9" * 64, None),
        ("1," + ",".join(["000"] * 15) + " and 1" + ",000" * 15, "1" + "000" * 15),
        ("1" + ",000" * 16, None),
        ("12345" + ",000" * 17, None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number
    if number is not None:
        assert score("number", [text, text, "no"], [number, "3.25", number]) == [1, 0, 0]
    else:
        assert score("number", [text, "7"], ["7", text]) == [0, None]


def test_unknown_ids_and_padding_add_nothing():
    table = byte_table([b"ab", b"", b"c"])
    text, n = jax.jit(functools.partial(completion_bytes, table))(
        jnp.array([[2, 1, 0, 9, 2, 0], [0, 0, 0, 0, 0, 0]]), jnp.array([5, 0])
    )
    assert n.tolist() == [4, 0] and text.shape == (2, 12)
    assert bytes(np.asarray(text[0])) == b"cabc" + b"\0" * 8 and not text[1].any()


def test_no_vocabulary_is_read_as_text():
    table = byte_table([b"", b""])
    text, n = jax.jit(functools.partial(completion_bytes, table))(jnp.array([[0, 1]]), jnp.array([2]))
    assert text.shape == (1, 2) and n.tolist() == [0] and not text.any()


def test_hostile_texts_are_read_in_linear_time():
    begin = time.perf_counter()
    million = "9" * 1_000_000
    for text in (
        f"<answer>{million}</answer>",
        "<answer>" * 125_000 + "</answer>" * 111_000,
        "<think>" * 140_000,
        "</think>" + " " * 1_000_000 + "<answer>",
        "1,234," * 160_000,
        "-." * 500_000 + "1",
    ):
        call = {"prompts": [""], "completions": [text], "answer": ["12"], "completion_ids": [[1]], "right": [True]}
        for name, reward in TEXT_REWARDS.items():
            found = reward(**call, **({"budget": 2} if name in ("cosine", "overlong") else {}))
            assert found in ([0.0], [1.0]) or name in ("choice", "cosine")
    assert answer_span(f"<answer>{million}</answer>") == million
    assert time.perf_counter() - begin < 20


def test_attacks_in_graph_equal_the_twins(tmp_path):
    data = [text.encode("utf-8", "surrogatepass")[:160] for text in attacks(tmp_path / "made")]
    data += [b""] * (-len(data) % 16)
    assert len(data) >= 200
    columns = answer_columns(["12345.678"] * 16, 80)
    for first in range(0, len(data), 16):
        lines = data[first : first + 16]
        tokens, lengths = np.zeros((16, 160), np.int32), np.array([len(line) for line in lines], np.int32)
        for row, line in zip(tokens, lines, strict=True):
            row[: len(line)] = list(line)
        inputs = columns | token_columns(tokens, lengths, [False] * 16, [False] * 16)
        verdicts = program(tuple(bytes([i]) for i in range(256)))(tokens, lengths, inputs)[2]
        texts = [line.decode(errors="replace") for line in lines]
        call = {"prompts": [""] * 16, "completions": texts, "completion_ids": [list(line) for line in lines]}
        for name, (values, valid) in verdicts.items():
            want = text_reward(name, CONFIG, 160)(**call, answer=["12345.678"] * 16, right=[False] * 16)
            got = [float(value) if applies else None for value, applies in zip(values, valid, strict=True)]
            assert not any(map(differ, got, want)), (name, texts)
    assert not (tmp_path / "made").exists()


def test_nothing_is_evaluated(tmp_path):
    target = tmp_path / "made"
    payload = f"__import__('pathlib').Path({str(target)!r}).touch()"
    for text in (payload, f"<answer>{payload}</answer>", f"<answer>{{{payload}}}</answer> 1"):
        call = {"prompts": [""], "completions": [text], "answer": [payload + " 1"], "completion_ids": [[1]]}
        for name in TEXT_REWARDS:
            text_reward(name, CONFIG, 8)(**call, right=[True])
            assert name in REWARDS
    assert not target.exists()
    allowed = {
        "pool.py": {"pickle", "subprocess"},  # hands tasks to its own workers
        "worker.py": {"pickle"},  # reads what the trainer sends
        "mathematics.py": {"sympy"},  # takes sympy's evaluating parser away from its workers
        "sandbox.py": {"subprocess"},  # starts bubblewrap
    }
    for path in pathlib.Path(grpo_jax.rewards.__file__).parent.glob("*.py"):
        if path.name == "inside.py":  # runs in the sandbox alone
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                assert node.id not in ("eval", "exec", "compile", "__import__"), path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {name.split(".")[0] for name in [a.name for a in node.names] + [vars(node).get("module") or ""]}
                assert not names & {"sympy", "pickle", "subprocess"} - allowed.get(path.name, set()), path


def test_chats_are_scored_by_their_last_assistant_message():
    chat = [
        {"role": "assistant", "content": "<answer>1</answer>"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "<answer>2</answer>"},
    ]
    reward = TEXT_REWARDS["answer"]
    assert reward(prompts=["", "", ""], completions=[chat, chat, []], answer=["2", 1, 2]) == [1.0, 0.0, 0.0]
    assert reward(prompts=["", ""], completions=[chat, "<answer>2</answer>"], answer=[None, 2]) == [None, 1.0]
