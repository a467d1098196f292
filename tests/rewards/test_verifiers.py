"""The in-graph rewards against rules written on strings, on generated and on chosen completions."""

import ast
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_jax.rewards
from grpo_jax.rewards.texts import TEXT_REWARDS, answer_span, last_number
from grpo_jax.rewards.verifiers import REWARDS, byte_table, completion_bytes

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
]
TOKEN_BYTES = [*(text.encode() for text in FRAGMENTS), b"\xe6\x95", b"\xff"]
ROWS, LENGTH, ANSWER_WIDTH = 32, 40, 24
ids = st.integers(0, len(TOKEN_BYTES) - 1)
digit_ids = st.sampled_from([i for i, text in enumerate(FRAGMENTS) if text and set(text) <= set("0123456789.,-$) ")])
bodies = st.lists(ids, max_size=6) | st.lists(digit_ids, max_size=8)


def text_of(tokens):
    return b"".join(TOKEN_BYTES[token] for token in tokens).decode(errors="replace")


@st.composite
def completion_and_answer(draw):
    think, think_end, answer, answer_end, space = 1, 2, 3, 4, FRAGMENTS.index(" ")
    body = draw(bodies)
    shaped = [think, *draw(bodies), think_end, *draw(st.sampled_from([[], [space]])), answer, *body, answer_end]
    tokens = draw(st.sampled_from([shaped, shaped[shaped.index(answer) :], shaped, None]))
    if tokens is None:
        tokens = draw(st.lists(ids, max_size=LENGTH))
    tokens = tokens + draw(st.sampled_from([[], [], [0], [space, 0]]) | st.lists(ids, max_size=3))
    right = text_of(body) if draw(st.booleans()) else text_of(draw(bodies))
    if "\ufffd" in right or len(right.encode()) > ANSWER_WIDTH:
        right = draw(st.sampled_from(["", "12", "-1,234.50", "é"]))
    return tokens[:LENGTH], right.strip(" \t\n\r\x0b\x0c")


def answer_columns(rights, width=ANSWER_WIDTH):
    table = np.zeros((len(rights), width), np.uint8)
    for row, right in zip(table, rights, strict=True):
        row[: len(right.encode())] = list(right.encode())
    return {"answer_bytes": table, "answer_lengths": np.array([len(right.encode()) for right in rights], np.int32)}


@functools.cache
def program(token_bytes):
    """Text and verdicts of all rewards; compiled once for each vocabulary."""

    @jax.jit
    def verdicts(tokens, lengths, columns):
        text, n = completion_bytes(byte_table(token_bytes), tokens, lengths)
        return text, n, {name: reward(text, n, columns) for name, reward in REWARDS.items()}

    return lambda *inputs: jax.device_get(verdicts(*inputs))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(completion_and_answer(), min_size=ROWS, max_size=ROWS), st.integers(0, len(TOKEN_BYTES) + 5))
def test_bytes_and_scores_equal_the_text_twins(batch, padding):
    tokens = np.full((ROWS, LENGTH), padding, np.int32)
    for row, (completion, _) in zip(tokens, batch, strict=True):
        row[: len(completion)] = completion
    rights = [right for _, right in batch]
    lengths = np.array([len(completion) for completion, _ in batch], np.int32)
    text, n, verdicts = program(tuple(TOKEN_BYTES))(tokens, lengths, answer_columns(rights))
    for row, size, (completion, _) in zip(text, n, batch, strict=True):
        assert row[:size].tobytes() == b"".join(TOKEN_BYTES[token] for token in completion)
        assert not row[size:].any()
    texts = [text_of(completion) for completion, _ in batch]
    for name, (values, valid) in verdicts.items():
        expected = TEXT_REWARDS[name](prompts=[""] * ROWS, completions=texts, answer=rights)
        got = [float(value) if applies else None for value, applies in zip(values, valid, strict=True)]
        wrong = [(t, r, g, e) for t, r, g, e in zip(texts, rights, got, expected, strict=True) if g != e]
        assert not wrong, (name, wrong[:3])
        assert not values[valid == 0].any()


def score(name, texts, rights):
    """In-graph verdicts of whole strings, each byte a token; the twin must agree."""
    data = [text.encode() for text in texts]
    tokens, lengths = np.zeros((16, 160), np.int32), np.zeros(16, np.int32)
    for i, line in enumerate(data):
        tokens[i, : len(line)], lengths[i] = list(line), len(line)
    columns = answer_columns(rights + [""] * (16 - len(rights)), 80)
    values, valid = program(tuple(bytes([i]) for i in range(256)))(tokens, lengths, columns)[2][name]
    values, valid = values[: len(texts)], valid[: len(texts)]
    got = [float(value) if applies else None for value, applies in zip(values, valid, strict=True)]
    assert got == TEXT_REWARDS[name](prompts=[""] * len(texts), completions=texts, answer=rights)
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
        for reward in TEXT_REWARDS.values():
            assert reward(prompts=[""], completions=[text], answer=["12"]) in ([0.0], [1.0])
    assert answer_span(f"<answer>{million}</answer>") == million
    assert time.perf_counter() - begin < 5


def test_nothing_is_evaluated(tmp_path):
    target = tmp_path / "made"
    payload = f"__import__('pathlib').Path({str(target)!r}).touch()"
    for text in (payload, f"<answer>{payload}</answer>", f"<answer>{{{payload}}}</answer> 1"):
        for name, reward in TEXT_REWARDS.items():
            reward(prompts=[""], completions=[text], answer=[payload + " 1"])
            assert name in REWARDS
    assert not target.exists()
    for path in pathlib.Path(grpo_jax.rewards.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                assert node.id not in ("eval", "exec", "compile", "__import__"), path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {n.split(".")[0] for n in names} & {"sympy", "pickle", "subprocess"}, path


def test_chats_are_scored_by_their_last_assistant_message():
    chat = [
        {"role": "assistant", "content": "<answer>1</answer>"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "<answer>2</answer>"},
    ]
    reward = TEXT_REWARDS["answer"]
    assert reward(prompts=["", "", ""], completions=[chat, chat, []], answer=["2", 1, 2]) == [1.0, 0.0, 0.0]
    assert reward(prompts=["", ""], completions=[chat, "<answer>2</answer>"], answer=[None, 2]) == [None, 1.0]
