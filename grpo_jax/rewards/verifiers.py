"""In-graph rewards: pure functions of a completion's bytes, so that scoring never leaves the device.

Tokens of any tokenizer become bytes by a table, and each verifier reads bytes. `texts` states the same rules
on Python strings; the tests hold the two equal. Text is data here: it is compared, never run.

Axes: B completions, T tokens, V vocabulary, W bytes of the longest token, L = T x W bytes, A bytes of the longest
right answer. The rules are written for one completion and mapped over the batch, which keeps gathers and scatters
within their row, hence within their device.
"""

from collections.abc import Callable, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

THINK, THINK_END, ANSWER, ANSWER_END = b"<think>", b"</think>", b"<answer>", b"</answer>"
WHITESPACE = b" \t\n\r\x0b\x0c"
# A longer number counts as none; the bound keeps the work on a window at the end of the text.
NUMBER_LIMIT = 64
# What a minus or a bare decimal point may not follow: "7-5" is a difference, "end.5" the end of a sentence.
GLUE = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.)"
_WINDOW = NUMBER_LIMIT + 8

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
    sizes_of, bytes_of = jnp.asarray(table.lengths), jnp.asarray(table.bytes)

    def one(ids, length):
        steps, width = ids.shape[0], bytes_of.shape[1]
        sizes = sizes_of.at[ids].get(mode="fill", fill_value=0)
        sizes = jnp.where(jnp.arange(steps) < length, sizes, 0)
        ends = jnp.cumsum(sizes)
        place = jnp.arange(width)
        target = jnp.where(place < sizes[:, None], (ends - sizes)[:, None] + place, steps * width)
        pieces = bytes_of.at[ids].get(mode="clip")
        return jnp.zeros(steps * width, jnp.uint8).at[target].set(pieces, mode="drop"), ends[-1]

    # Without the barrier XLA makes the text again in each fusion that reads it (twice the time on a CPU).
    return jax.lax.optimization_barrier(jax.vmap(one)(tokens, lengths))


def answer(text: UInt8[Array, "B L"], n: Int[Array, "B"], columns: Columns) -> Verdict:
    """1 where the text from the last `<answer>` to the first `</answer>` after it, stripped, is the right answer."""

    def one(text, n, right, length):
        del n
        position = jnp.arange(text.shape[0])
        start = _last(_find(text, ANSWER)) + len(ANSWER)
        closes = _find(text, ANSWER_END) & (position >= start)
        solid = ~_among(text, WHITESPACE) & (position >= start) & (position < _first(closes))
        low, high = _first(solid), _last(solid) + 1
        span = text.at[low + jnp.arange(right.shape[0])].get(mode="fill", fill_value=0)
        equal = (span == right) | (jnp.arange(right.shape[0]) >= length)
        opened = start >= len(ANSWER)
        return opened & closes.any() & (high - low == length) & equal.all(), length > 0

    return _verdict(jax.vmap(one)(text, n, columns["answer_bytes"], columns["answer_lengths"]))


def format(text: UInt8[Array, "B L"], n: Int[Array, "B"], columns: Columns) -> Verdict:
    """1 where all is `<think>...</think> <answer>...</answer>`, each tag once, and only whitespace around them."""
    del columns

    def one(text, n):
        marks = [_find(text, tag) for tag in (THINK, THINK_END, ANSWER, ANSWER_END)]
        at = [_first(mark) for mark in marks]
        position = jnp.arange(text.shape[0])
        between = (position >= at[1] + len(THINK_END)) & (position < at[2])
        outside = (position < at[0]) | between | (position >= at[3] + len(ANSWER_END))
        solid = ~_among(text, WHITESPACE) & (position < n)
        ordered = (at[0] < at[1]) & (at[1] < at[2]) & (at[2] < at[3])
        return _each_once(marks) & ordered & ~(solid & outside).any(), jnp.bool_(True)

    return _verdict(jax.vmap(one)(text, n))


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
        found, digits = jax.vmap(_number_at_end)(jnp.stack([_number_window(text), _number_window(right)]))
        return found[0] & (digits[0] == digits[1]).all(), found[1] & (length > 0)

    return _verdict(jax.vmap(one)(text, columns["answer_bytes"], columns["answer_lengths"]))


Verifier = Callable[[UInt8[Array, "B L"], Int[Array, "B"], Columns], Verdict]

REWARDS: dict[str, Verifier] = {
    "answer": answer,
    "format": format,
    "answer_format": answer_format,
    "number": number,
}
# The rewards that read the columns answer_bytes and answer_lengths.
NEED_ANSWER = frozenset({"answer", "number"})


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


def _run(ok: Bool[Array, "K"]) -> Bool[Array, "K"]:
    """True where all from here to the end are true."""
    return jnp.arange(ok.shape[0]) > _last(~ok)


def _number_window(text: UInt8[Array, "L"]) -> UInt8[Array, "K"]:
    """The bytes up to the last digit, zeros before the text; all zeros where there is no digit."""
    at = _last(_among(text, b"0123456789")) - _WINDOW + 1 + jnp.arange(_WINDOW)
    return jnp.where(at >= 0, text.at[jnp.maximum(at, 0)].get(mode="clip"), jnp.uint8(0))


def _number_at_end(window: UInt8[Array, "K"]) -> tuple[Bool[Array, ""], Int[Array, "M"]]:
    """Whether a number ends the window, and that number in a form that equal numbers share.

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
    found = digit[-1] & (_WINDOW - start + minus <= NUMBER_LIMIT)
    return found, jnp.concatenate([digits, sign[None]])
