"""In-graph rewards: pure functions of a completion's bytes, so that scoring never leaves the device.

Tokens of any tokenizer become bytes by a table, and each verifier reads bytes. `texts` states the same rules
on Python strings; the tests hold the two equal. Text is data here: it is compared, never run.

Axes: B completions, T tokens, V vocabulary, W bytes of the longest token, L = T x W bytes, A bytes of the longest
right answer. The rules are written for one completion and mapped over the batch, which keeps gathers and scatters
within their row, hence within their device.

`columns` hold what a reward reads beside the text, a row a completion: answer_bytes and answer_lengths (the right
answer), language_number (of the row's target language), opened (the prompt ends with `<think>`), tokens and
token_lengths (the completion's ids), right (the first component is at least 1).
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards.letters import ASTRAL, BACKSLASH, letter_classes
from grpo_jax.rewards.texts import NUMBER_LIMIT, OPTIONS

THINK, THINK_END, ANSWER, ANSWER_END = b"<think>", b"</think>", b"<answer>", b"</answer>"
WHITESPACE = b" \t\n\r\x0b\x0c"
# What a minus or a bare decimal point may not follow: "7-5" is a difference, "end.5" the end of a sentence.
GLUE = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.)"
_WINDOW = NUMBER_LIMIT + 8
# Tokens at the end of a prompt in which an open tag is looked for: its seven characters and some whitespace.
_TAIL = 16

Columns = Mapping[str, Shaped[Array, "B ..."]]
Verdict = tuple[Float[Array, "B"], Float[Array, "B"]]


class ByteTable(flax.struct.PyTreeNode):
    """The bytes that each token adds to the text; special tokens have length 0."""

    bytes: UInt8[np.ndarray, "V W"]
    lengths: Int[np.ndarray, "V"]


def byte_table(token_bytes: Sequence[bytes]) -> ByteTable:
    """The table of a tokenizer, given the bytes of each id."""
    lengths = np.array([len(piece) for piece in token_bytes], np.int32)
    table = np.zeros((len(token_bytes), max(1, int(lengths.max(initial=0)))), np.uint8)
    for row, piece in zip(table, token_bytes, strict=True):
        row[: len(piece)] = np.frombuffer(piece, np.uint8)
    return ByteTable(table, lengths)


def completion_bytes(
    table: ByteTable, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[UInt8[Array, "B L"], Int[Array, "B"]]:
    """The text of each completion as bytes padded with zeros, and how many there are; unknown ids add nothing."""
    return masked_bytes(table, tokens, jnp.arange(tokens.shape[1]) < jnp.asarray(lengths)[:, None])


def masked_bytes(
    table: ByteTable, tokens: Int[Array, "B T"], present: Bool[Array, "B T"]
) -> tuple[UInt8[Array, "B L"], Int[Array, "B"]]:
    """The text of the tokens that are present, from the left, and how many bytes it has."""
    sizes_of, bytes_of = jnp.asarray(table.lengths), jnp.asarray(table.bytes)

    def one(ids, present):
        steps, width = ids.shape[0], bytes_of.shape[1]
        sizes = sizes_of.at[ids].get(mode="fill", fill_value=0)
        sizes = jnp.where(present, sizes, 0)
        ends = jnp.cumsum(sizes)
        place = jnp.arange(width)
        target = jnp.where(place < sizes[:, None], (ends - sizes)[:, None] + place, steps * width)
        pieces = bytes_of.at[ids].get(mode="clip")
        return jnp.zeros(steps * width, jnp.uint8).at[target].set(pieces, mode="drop"), ends[-1]

    # Without the barrier XLA makes the text again in each fusion that reads it (twice the time on a CPU).
    return jax.lax.optimization_barrier(jax.vmap(one)(tokens, present))


def prompt_opens(table: ByteTable, tokens: Int[Array, "N P"], lengths: Int[Array, "N"]) -> Bool[Array, "N"]:
    """Whether the text of each prompt, padded on the left, ends with `<think>` and perhaps whitespace."""
    tail = min(tokens.shape[1], _TAIL)
    present = jnp.arange(tail) >= tail - jnp.asarray(lengths)[:, None]
    text, n = masked_bytes(table, jnp.asarray(tokens)[:, -tail:], present)

    def one(text, n):
        solid = ~_among(text, WHITESPACE) & (jnp.arange(text.shape[0]) < n)
        return (_find(text, THINK) & (jnp.arange(text.shape[0]) == _last(solid) + 1 - len(THINK))).any()

    return jax.vmap(one)(text, n)


def answer(text: UInt8[Array, "B L"], n: Int[Array, "B"], columns: Columns) -> Verdict:
    """1 where the text from the last `<answer>` to the first `</answer>` after it, stripped, is the right answer."""
    del n

    def one(text, right, length):
        found, low, high = _answer_span(text)
        span = text.at[low + jnp.arange(right.shape[0])].get(mode="fill", fill_value=0)
        equal = (span == right) | (jnp.arange(right.shape[0]) >= length)
        return found & (high - low == length) & equal.all(), length > 0

    return _verdict(jax.vmap(one)(text, columns["answer_bytes"], columns["answer_lengths"]))


def format(text: UInt8[Array, "B L"], n: Int[Array, "B"], columns: Columns) -> Verdict:
    """1 where all is `<think>...</think> <answer>...</answer>`, each tag once, and only whitespace around them.

    Where the prompt already holds the opening tag, the completion goes on after it and must not write it again.
    """

    def one(text, n, opened):
        marks = [_find(text, tag) for tag in (THINK, THINK_END, ANSWER, ANSWER_END)]
        at = [_first(mark) for mark in marks]
        at[0] = jnp.where(opened, -len(THINK), at[0])
        thinks = marks[0].sum() == jnp.where(opened, 0, 1)
        position = jnp.arange(text.shape[0])
        between = (position >= at[1] + len(THINK_END)) & (position < at[2])
        outside = (position < at[0]) | between | (position >= at[3] + len(ANSWER_END))
        solid = ~_among(text, WHITESPACE) & (position < n)
        ordered = (at[0] < at[1]) & (at[1] < at[2]) & (at[2] < at[3])
        return thinks & _each_once(marks[1:]) & ordered & ~(solid & outside).any(), jnp.bool_(True)

    return _verdict(jax.vmap(one)(text, n, columns["opened"]))


def answer_format(text: UInt8[Array, "B L"], n: Int[Array, "B"], columns: Columns) -> Verdict:
    """1 where `<answer>...</answer>` stands once, closed, with only whitespace after it."""
    del columns

    def one(text, n):
        marks = [_find(text, tag) for tag in (ANSWER, ANSWER_END)]
        start, end = _first(marks[0]), _first(marks[1])
        position = jnp.arange(text.shape[0])
        after = (position >= end + len(ANSWER_END)) & (position < n)
        solid = ~_among(text, WHITESPACE) & after
        return _each_once(marks) & (start < end) & ~solid.any(), jnp.bool_(True)

    return _verdict(jax.vmap(one)(text, n))


def number(text: UInt8[Array, "B L"], n: Int[Array, "B"], columns: Columns) -> Verdict:
    """1 where the last number of the text is the last number of the right answer.

    A number is digits with an optional fraction; commas between a group of one to three digits and groups of three
    are skipped; a minus counts unless a letter, digit, point or bracket stands before it. Leading and trailing
    zeros do not matter. The comparison is exact, on digits. Does not apply where the answer holds no number.
    """
    del n

    def one(text, right, length):
        found, digits, _ = jax.vmap(_number_at_end)(jnp.stack([_number_window(text), _number_window(right)]))
        return found[0] & (digits[0] == digits[1]).all(), found[1] & (length > 0)

    return _verdict(jax.vmap(one)(text, columns["answer_bytes"], columns["answer_lengths"]))


def answer_number(text: UInt8[Array, "B L"], n: Int[Array, "B"], columns: Columns) -> Verdict:
    """1 where the answer span is a number and nothing else, equal to the last number of the right answer."""
    del n

    def one(text, right, length):
        opened, low, high = _answer_span(text)
        at = high - _WINDOW + jnp.arange(_WINDOW)
        span = jnp.where(at >= low, text.at[jnp.maximum(at, 0)].get(mode="clip"), jnp.uint8(0))
        found, digits, size = jax.vmap(_number_at_end)(jnp.stack([span, _number_window(right)]))
        whole = opened & found[0] & (size[0] == high - low)
        return whole & (digits[0] == digits[1]).all(), found[1] & (length > 0)

    return _verdict(jax.vmap(one)(text, columns["answer_bytes"], columns["answer_lengths"]))


def choice(text: UInt8[Array, "B L"], n: Int[Array, "B"], columns: Columns) -> Verdict:
    """1 where the answer span names the letter of the right choice: 'B', 'b', '(B)', 'B.', 'B: words'."""
    del n

    def one(text, right, length):
        opened, low, high = _answer_span(text)
        found, letter = _choice_letter(text, low, high)
        valid, wanted = _choice_letter(right, jnp.int32(0), length)
        return opened & found & (letter == wanted), valid

    return _verdict(jax.vmap(one)(text, columns["answer_bytes"], columns["answer_lengths"]))


def language(
    text: UInt8[Array, "B L"],
    n: Int[Array, "B"],
    columns: Columns,
    language: str = "en",
    languages: Sequence[str] = (),
) -> Verdict:
    """Share of words in the script of the target language (DeepSeek-R1, section 2.3.2); 1 without any word.

    The target is `language`, or where `languages` are given, the one of them that the row's column language_number
    counts. What a word is stands in `letters`: tokens become characters, a table gives each its class.
    """
    del n
    tables = [letter_classes(target) for target in languages or (language,)]
    classes = jnp.concatenate([jnp.asarray(each.table) for each in tables])
    beyond = jnp.asarray([each.beyond for each in tables], jnp.uint8)
    numbers = columns["language_number"] if languages else jnp.zeros(text.shape[0], jnp.int32)

    def one(text, number):
        kind = _character_classes(text, classes, number * ASTRAL[0], beyond[number])
        before = _shift(kind, -1)
        first = (text & 0xC0) != 0x80  # the first byte of a character
        starts = (kind > 0) & first & ((kind % 2 == 0) | (kind != before)) & (_shift(text, -1) != BACKSLASH)
        words, inside = starts.sum(), (starts & (kind <= 2)).sum()
        return jnp.where(words > 0, inside / jnp.maximum(words, 1), 1.0)

    share = jax.vmap(one)(text, jnp.asarray(numbers)).astype(jnp.float32)
    return share, jnp.ones_like(share)


def repetition(text: UInt8[Array, "B L"], n: Int[Array, "B"], columns: Columns, ngram: int = 3) -> Verdict:
    """Minus the share of token n-grams that were there before: -(1 - distinct / all) (arXiv 2502.03373)."""
    del text, n
    tokens, lengths = jnp.asarray(columns["tokens"]), jnp.asarray(columns["token_lengths"])
    width = tokens.shape[1]
    if width < ngram:
        return jnp.zeros(lengths.shape, jnp.float32), jnp.ones(lengths.shape, jnp.float32)
    total = jnp.maximum(lengths - ngram + 1, 0)
    places = jnp.arange(width - ngram + 1)
    inside = places < total[:, None]
    # Sorted, equal n-grams are neighbours; what lies beyond the completion comes last.
    keys = (~inside, *(tokens[:, i : i + width - ngram + 1] for i in range(ngram)))
    order = jax.lax.sort(keys, dimension=1, num_keys=ngram + 1)
    fresh = jnp.stack([key[:, 1:] != key[:, :-1] for key in order[1:]]).any(axis=0)
    fresh = jnp.concatenate([jnp.ones_like(fresh[:, :1]), fresh], axis=1) & (places < total[:, None])
    score = jnp.where(total > 0, fresh.sum(axis=1) / jnp.maximum(total, 1) - 1.0, 0.0).astype(jnp.float32)
    return score, jnp.ones_like(score)


def overlong(
    text: UInt8[Array, "B L"], n: Int[Array, "B"], columns: Columns, budget: int = 0, cache: int = 0
) -> Verdict:
    """Soft overlong punishment: 0 up to budget - cache tokens, falling to -1 at the budget (DAPO, 2503.14476, eq. 13).

    A budget of 0 is the completion's axis T; a cache of 0 is a fifth of the budget, as in the paper.
    """
    del text, n
    budget = budget or columns["tokens"].shape[1]
    cache = cache or max(budget // 5, 1)
    score = jnp.clip((budget - cache - columns["token_lengths"]) / cache, -1.0, 0.0).astype(jnp.float32)
    return score, jnp.ones_like(score)


def cosine(
    text: UInt8[Array, "B L"],
    n: Int[Array, "B"],
    columns: Columns,
    budget: int = 0,
    when_right: Sequence[float] = (1.0, 0.5),
    when_wrong: Sequence[float] = (-1.0, -0.5),
) -> Verdict:
    """Cosine of the length, from the first value at no tokens to the second at the budget (arXiv 2502.03373, eq. 1)."""
    del text, n
    share = jnp.minimum(columns["token_lengths"] / (budget or columns["tokens"].shape[1]), 1.0)
    start, end = (jnp.where(columns["right"], *pair) for pair in zip(when_right, when_wrong, strict=True))
    score = (end + 0.5 * (start - end) * (1.0 + jnp.cos(jnp.pi * share))).astype(jnp.float32)
    return score, jnp.ones_like(score)


Verifier = Callable[[UInt8[Array, "B L"], Int[Array, "B"], Columns], Verdict]

REWARDS: dict[str, Verifier] = {
    "answer": answer,
    "format": format,
    "answer_format": answer_format,
    "number": number,
    "answer_number": answer_number,
    "choice": choice,
    "language": language,
    "repetition": repetition,
    "overlong": overlong,
    "cosine": cosine,
}
# The rewards that read the columns answer_bytes and answer_lengths.
NEED_ANSWER = frozenset({"answer", "number", "answer_number", "choice"})
# Those that read the column opened.
NEED_OPENED = frozenset({"format"})
# Those that read the column right: the first component must be there before them.
NEED_RIGHT = frozenset({"cosine"})


def verifier(name: str, config: RewardsConfig) -> Verifier:
    """The in-graph reward of this name with the config's options."""
    return functools.partial(REWARDS[name], **OPTIONS[name](config)) if name in OPTIONS else REWARDS[name]


def _verdict(pair: tuple[Bool[Array, "B"], Bool[Array, "B"]]) -> Verdict:
    right, valid = pair
    return (right & valid).astype(jnp.float32), valid.astype(jnp.float32)


def _among(text: UInt8[Array, "L"], members: bytes) -> Bool[Array, "L"]:
    table = np.zeros(256, bool)
    table[list(members)] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[False], table, [False]]).astype(np.int8)))
    # Byte classes are few ranges: comparisons fuse, a gather from a table of 256 does not.
    return jnp.any(jnp.stack([(text >= a) & (text < b) for a, b in edges.reshape(-1, 2)]), axis=0)


def _shift(x: Shaped[Array, "L"], by: int) -> Shaped[Array, "L"]:
    """x[i + by], zero outside."""
    if abs(by) >= x.shape[0]:
        return jnp.zeros_like(x)
    return jnp.pad(x[by:], (0, by)) if by >= 0 else jnp.pad(x[:by], (-by, 0))


def _find(text: UInt8[Array, "L"], tag: bytes) -> Bool[Array, "L"]:
    """True where the tag, of four bytes or more, starts."""
    # Four bytes are compared at once, as a word made in two doublings: a quarter of the operations to compile.
    pair = text.astype(jnp.uint32) + 256 * _shift(text, 1).astype(jnp.uint32)
    word = pair + 65536 * _shift(pair, 2)
    starts = [*range(0, len(tag) - 4, 4), len(tag) - 4]
    hits = [_shift(word, i) == np.uint32(int.from_bytes(tag[i : i + 4], "little")) for i in starts]
    return jnp.stack(hits).all(axis=0)


def _first(mask: Bool[Array, "L"]) -> Int[Array, ""]:
    """First true position, or the length."""
    return jnp.where(mask, jnp.arange(mask.shape[0]), mask.shape[0]).min()


def _last(mask: Bool[Array, "L"]) -> Int[Array, ""]:
    """Last true position, or -1."""
    return jnp.where(mask, jnp.arange(mask.shape[0]), -1).max()


def _each_once(marks: Sequence[Bool[Array, "L"]]) -> Bool[Array, ""]:
    return jnp.stack([mark.sum() == 1 for mark in marks]).all()


def _answer_span(text: UInt8[Array, "L"]) -> tuple[Bool[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Whether the last `<answer>` is closed, and where what stands between them, stripped, begins and ends."""
    position = jnp.arange(text.shape[0])
    start = _last(_find(text, ANSWER)) + len(ANSWER)
    closes = _find(text, ANSWER_END) & (position >= start)
    solid = ~_among(text, WHITESPACE) & (position >= start) & (position < _first(closes))
    return (start >= len(ANSWER)) & closes.any(), _first(solid), _last(solid) + 1


def _choice_letter(
    text: UInt8[Array, "L"], low: Int[Array, ""], high: Int[Array, ""]
) -> tuple[Bool[Array, ""], Int[Array, ""]]:
    """Whether the span names a choice, and its lower-case letter."""

    def byte(at):
        return jnp.where(at < high, text.at[at].get(mode="fill", fill_value=0), jnp.uint8(0))

    at = low + _among(byte(low)[None], b"([{")[0]
    letter = byte(at) | jnp.uint8(32)  # lower case
    closed = (at + 1 == high) | _among(byte(at + 1)[None], b")].:,}")[0]
    return (letter >= ord("a")) & (letter <= ord("z")) & closed & (at < high), letter


def _character_classes(
    text: UInt8[Array, "L"], table: UInt8[Array, "Z"], start: Int[Array, ""], beyond: UInt8[Array, ""]
) -> UInt8[Array, "L"]:
    """The class of the character that each byte belongs to; 0 in tags and in what is no UTF-8.

    The classes of characters below ASTRAL stand in the table from `start` on.
    """
    b = [_shift(text, i).astype(jnp.int32) for i in range(4)]
    more = [(x & 0xC0) == 0x80 for x in b]
    two = (b[0] >= 0xC2) & (b[0] <= 0xDF) & more[1]
    triple = (b[0] & 0x0F) << 12 | (b[1] & 0x3F) << 6 | (b[2] & 0x3F)
    three = ((b[0] & 0xF0) == 0xE0) & more[1] & more[2] & (triple >= 0x800) & ((triple & 0xF800) != 0xD800)
    quad = (b[0] & 0x07) << 18 | (b[1] & 0x3F) << 12 | (b[2] & 0x3F) << 6 | (b[3] & 0x3F)
    four = ((b[0] & 0xF8) == 0xF0) & more[1] & more[2] & more[3] & (quad >= 0x10000) & (quad <= 0x10FFFF)
    one = b[0] < 0x80
    point = jnp.where(one, b[0], jnp.where(two, (b[0] & 0x1F) << 6 | (b[1] & 0x3F), jnp.where(three, triple, quad)))
    kind = jnp.where(point < ASTRAL[0], table.at[start + point].get(mode="clip"), jnp.uint8(0))
    kind = jnp.where((point >= ASTRAL[0]) & (point < ASTRAL[1]), beyond, kind)
    kind = jnp.where(one | two | three | four, kind, jnp.uint8(0))
    # The other bytes of a character have its class, so that neighbours can be compared byte by byte.
    for by, reaches in ((1, two | three | four), (2, three | four), (3, four)):
        kind = jnp.where(_shift(reaches, -by), _shift(kind, -by), kind)
    marks = [(tag, _find(text, tag)) for tag in (THINK, THINK_END, ANSWER, ANSWER_END)]
    opens = jnp.stack([mark for _, mark in marks]).any(axis=0)
    closes = jnp.stack([_shift(mark, -len(tag)) for tag, mark in marks]).any(axis=0)
    inside = jnp.cumsum(opens.astype(jnp.int32) - closes.astype(jnp.int32)) > 0
    return jnp.where(inside, jnp.uint8(0), kind)


def _run(ok: Bool[Array, "K"]) -> Bool[Array, "K"]:
    """True where all from here to the end are true."""
    return jnp.arange(ok.shape[0]) > _last(~ok)


def _number_window(text: UInt8[Array, "L"]) -> UInt8[Array, "K"]:
    """The bytes up to the last digit, zeros before the text; all zeros where there is no digit."""
    at = _last(_among(text, b"0123456789")) - _WINDOW + 1 + jnp.arange(_WINDOW)
    return jnp.where(at >= 0, text.at[jnp.maximum(at, 0)].get(mode="clip"), jnp.uint8(0))


def _number_at_end(window: UInt8[Array, "K"]) -> tuple[Bool[Array, ""], Int[Array, "M"], Int[Array, ""]]:
    """Whether a number ends the window, that number in a form that equal numbers share, and how many bytes it has.

    The form: digits of the whole part by place from the point leftwards, of the fraction rightwards, the sign;
    zeros fill the rest, so leading and trailing zeros leave no trace.
    """
    index = jnp.arange(_WINDOW)
    digit, loose = _among(window, b"0123456789"), ~_among(window, GLUE)
    before = [_shift(digit, -i) for i in range(5)]
    after = [_shift(digit, i) for i in range(5)]
    joins = (window == ord(",")) & before[1] & ~(before[1] & before[2] & before[3] & before[4])
    joins &= after[1] & after[2] & after[3] & ~after[4]

    tail = _run(digit)
    dot = _first(tail) - 1
    points = (window == ord(".")) & (before[1] | _shift(loose, -1))
    has_fraction = (points & (index == dot)).any()
    whole_end = jnp.where(has_fraction, dot, _WINDOW)
    whole = _run(digit | joins | (index >= whole_end)) & (index < whole_end)
    start = _first(whole | (has_fraction & (index >= dot)))
    minus = ((window == ord("-")) & _shift(loose, -1) & (index == start - 1)).any()

    value = window.astype(jnp.int32) - ord("0")
    whole_place = jnp.where(whole & digit, jnp.cumsum((whole & digit)[::-1])[::-1] - 1, _WINDOW)
    fraction_place = jnp.where(tail & has_fraction, index - dot - 1, _WINDOW)
    empty = jnp.zeros(_WINDOW, jnp.int32)
    digits = jnp.concatenate(
        [empty.at[whole_place].set(value, mode="drop"), empty.at[fraction_place].set(value, mode="drop")]
    )
    sign = (minus & (digits != 0).any()).astype(jnp.int32)
    size = _WINDOW - start + minus
    return digit[-1] & (size <= NUMBER_LIMIT), jnp.concatenate([digits, sign[None]]), size
