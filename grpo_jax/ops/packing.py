"""Packs: completions laid end to end in rows of a fixed width, group by group, each group's prompt once.

A pack has a static shape: `prompts` prompts of P tokens and `rows` rows of T. How many packs there are follows from the
lengths, so that a batch of short completions costs few of them. D parts (the devices that rows are split over) are
packed apart from each other.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

EMPTY = -1


class Packing(flax.struct.PyTreeNode):
    """Where each completion lies: token t of completion g of group n is cell (pack, row, offset + t).

    `slot` is the place of a group's prompt among those of its pack. Completions without tokens lie nowhere that counts.
    """

    pack: Int[Array, "D N"]
    slot: Int[Array, "D N"]
    row: Int[Array, "D N G"]
    offset: Int[Array, "D N G"]
    count: Int[Array, "D"]


def rows_apart(rows: int, prompts: int, group: int) -> bool:
    """Whether a pack has as many rows as the completions of its prompts, so that each prompt has rows of its own."""
    return rows == prompts * group


def pack_groups(lengths: Int[Array, "D N G"], rows: int, width: int, prompts: int) -> Packing:
    """Whole groups in order, each in the pack of the one before where rows and prompts suffice, else in the next.

    Completions of a group go end to end (next fit). Where rows are enough for it (`rows_apart`) the group in slot s
    begins at row s x G, and no row has two prompts. Raises ValueError where a whole group might not fit a pack.
    """
    group_size = lengths.shape[2]
    if rows < group_size or prompts < 1:
        raise ValueError(f"{rows=} of a pack must hold a group of {group_size}, and {prompts=} at least one")
    has_tokens = jnp.any(lengths > 0, axis=2)

    def place(row: Array, fill: Array, group: Array) -> tuple[Array, Array, Array, Array]:
        placed = []
        for length in group:  # G of them, unrolled
            wraps = fill + length > width
            row, fill = jnp.where(wraps, row + 1, row), jnp.where(wraps, 0, fill)
            placed.append((row, fill))
            fill = fill + length
        at_row, at_offset = (jnp.stack(x) for x in zip(*placed, strict=True))
        return at_row, at_offset, row, fill

    def step(carry: tuple[Array, ...], group: tuple[Array, Array]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        pack, slot, row, fill = carry
        sizes, real = group
        going_on, anew = place(row, fill, sizes), place(jnp.int32(0), jnp.int32(0), sizes)
        fresh = (going_on[2] >= rows) | (slot >= prompts)
        at_row, at_offset, row_after, fill_after = (jnp.where(fresh, a, b) for a, b in zip(anew, going_on, strict=True))
        pack_here, slot_here = pack + fresh, jnp.where(fresh, 0, slot)
        after = (pack_here, slot_here + 1, row_after, fill_after)
        carry = tuple(jnp.where(real, new, old) for new, old in zip(after, carry, strict=True))
        return carry, (pack_here, slot_here, at_row, at_offset)

    def one(sizes: Array, real: Array) -> Packing:
        zero = jnp.int32(0)
        last, (pack, slot, row, offset) = jax.lax.scan(step, (zero, zero, zero, zero), (sizes, real))
        return Packing(pack, slot, row, offset, jnp.where(jnp.any(real), last[0] + 1, 0))

    def one_apart(sizes: Array, real: Array) -> Packing:
        before = jnp.cumsum(real) - real  # groups with tokens before each
        pack, slot = before // prompts, before % prompts
        row, offset, _, _ = jax.vmap(lambda group: place(jnp.int32(0), jnp.int32(0), group))(sizes)
        return Packing(pack, slot, slot[:, None] * group_size + row, offset, -(-jnp.sum(real) // prompts))

    apart = rows_apart(rows, prompts, group_size)
    return jax.vmap(one_apart if apart else one)(lengths.astype(jnp.int32), has_tokens)


class PackIndex(flax.struct.PyTreeNode):
    """One pack of each part: which groups it holds, and the maps between its cells and their tokens.

    `groups` are group numbers (EMPTY: none); `token` tells each cell its place in the pack's own groups x G x T tokens,
    and `cell` each of those its cell.
    """

    groups: Int[Array, "D n"]
    token: Int[Array, "D r T"]
    cell: Int[Array, "D n G T"]


def pack_index(
    packing: Packing, lengths: Int[Array, "D N G"], number: Int[Array, ""] | int, shape: tuple[int, int, int]
) -> PackIndex:
    """The indices of pack `number`; `shape` is its prompts, rows and width. Beyond `count` packs are empty.

    Each cell asks the pack's completions whose it is: compared to a scatter of tokens to cells that is some more
    arithmetic, and nothing that runs one entry after another.
    """
    prompts, rows, width = shape
    real = jnp.any(lengths > 0, axis=2) & (packing.pack == number)
    held = real[:, None] & (packing.slot[:, None] == jnp.arange(prompts)[:, None])  # [D, n, N]
    groups = jnp.where(jnp.any(held, axis=2), jnp.argmax(held, axis=2), EMPTY).astype(jnp.int32)
    row, offset, length = gather_groups((packing.row, packing.offset, lengths), groups)  # [D, n, G]
    length = jnp.where((groups >= 0)[..., None], length, 0)
    place = jnp.arange(width)
    cell = jnp.where(place < length[..., None], (row * width + offset)[..., None] + place, EMPTY)
    parts, count = groups.shape[0], prompts * lengths.shape[2]
    asked = prompts if rows_apart(rows, prompts, lengths.shape[2]) else 1  # a row's completions are of one prompt
    row, offset, length = (x.reshape(parts, asked, 1, 1, -1) for x in (row, offset, length))
    within = place[:, None] - offset  # [D, asked, 1, T, completions]
    own = (row == jnp.arange(rows).reshape(asked, -1, 1, 1)) & (within >= 0) & (within < length)
    first = jnp.arange(count).reshape(asked, 1, 1, -1) * width
    token = jnp.max(jnp.where(own, first + within, EMPTY), axis=-1).reshape(parts, rows, width)
    return PackIndex(groups, token, cell)


def move(x: Array, to: Int[Array, "*out"], back: Int[Array, "*inside"]) -> Array:
    """x's entries at `to` (0 where EMPTY), for maps that are each other's inverse; the gradient is `move` back.

    A gather's own gradient is a scatter, which XLA's CPU backend does one entry after another.
    """

    @jax.custom_vjp
    def gather(x: Array) -> Array:
        return _take(x, to)

    gather.defvjp(lambda x: (_take(x, to), None), lambda _, g: (_take(g, back).reshape(x.shape),))
    return gather(x)


def _take(x: Array, index: Array) -> Array:
    """[D, *out] of x [D, ...], the entries of each part numbered in order."""
    flat = x.reshape(x.shape[0], -1)
    taken = jax.vmap(lambda part, i: part[jnp.maximum(i, 0)])(flat, index)
    return jnp.where(index == EMPTY, jnp.zeros((), x.dtype), taken)


class SharedPrefix(flax.struct.PyTreeNode):
    """Who sees whom in a pack whose columns are n prompts of P tokens, then r rows of T; it stands in for segment ids.

    A prompt's tokens see each other. A token of a row sees those of its own `segment`, and the prompt that `prompt`
    numbers. Both by position too, as everywhere. Segment 0 is padding.

    `apart` says that the rows are the prompts' in turn, r / n each: `rows_apart`.

    Where a pack's columns lie over `chunks` devices, the first of them has the first P / chunks tokens of each prompt
    and the first T / chunks of each row, and so on: `lay` and `cut` go between that order and prompts and rows.
    """

    prompt_segments: Int[Array, "D n P"]
    segments: Int[Array, "D r T"]
    prompt: Int[Array, "D r T"]
    chunks: int = flax.struct.field(pytree_node=False, default=1)
    apart: bool = flax.struct.field(pytree_node=False, default=False)

    def lay(self, prompts: Shaped[Array, "D n P *e"], rows: Shaped[Array, "D r T *e"]) -> Shaped[Array, "D X *e"]:
        """Prompts and rows as the columns of a pack."""
        if self.chunks == 1:
            return jnp.concatenate([x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (prompts, rows)], axis=1)
        parts = [x.reshape(*x.shape[:2], self.chunks, -1, *x.shape[3:]) for x in (prompts, rows)]
        parts = [jnp.moveaxis(x, 2, 1).reshape(x.shape[0], self.chunks, -1, *x.shape[4:]) for x in parts]
        both = jnp.concatenate(parts, axis=2)
        return both.reshape(both.shape[0], -1, *both.shape[3:])

    def cut(self, x: Shaped[Array, "D X *e"]) -> tuple[Shaped[Array, "D n P *e"], Shaped[Array, "D r T *e"]]:
        """The inverse of `lay`."""
        (parts, n, width), (_, r, length) = self.prompt_segments.shape, self.segments.shape
        by_chunk = x.reshape(parts, self.chunks, -1, *x.shape[2:])
        first = n * width // self.chunks

        def whole(x: Array, rows: int, columns: int) -> Array:
            if self.chunks > 1:
                x = jnp.moveaxis(x.reshape(parts, self.chunks, rows, -1, *x.shape[3:]), 1, 2)
            return x.reshape(parts, rows, columns, *by_chunk.shape[3:])

        return whole(by_chunk[:, :, :first], n, width), whole(by_chunk[:, :, first:], r, length)


def real_tokens(segments: SharedPrefix | Int[Array, "R X"]) -> Bool[Array, "R X"]:
    """Where a column holds a token and no padding."""
    if isinstance(segments, SharedPrefix):
        return segments.lay(segments.prompt_segments, segments.segments) != 0
    return segments != 0


def row_columns(segments: SharedPrefix | Int[Array, "R X"]) -> int:
    """Columns of a prompt and a row together, the same in a pack as in a batch of sequences."""
    if isinstance(segments, SharedPrefix):
        return segments.prompt_segments.shape[-1] + segments.segments.shape[-1]
    return segments.shape[1]


class Pack(flax.struct.PyTreeNode):
    """A pack as the decoder takes it, and where its predictions go; R is D, or D x r where rows stand on their own.

    Column q of what `predictions` makes of the hidden states predicts `targets`[q]; `rows` tells each completion token
    its q, and `back` each q its completion token.
    """

    tokens: Int[Array, "R X"]
    positions: Int[Array, "R X"]
    segments: SharedPrefix | Int[Array, "R X"]
    targets: Int[Array, "D Q"]
    rows: Int[Array, "D n G T"]
    back: Int[Array, "D Q"]

    def predictions(self, hidden: Float[Array, "R X W"]) -> Float[Array, "D Q W"]:
        """The hidden states that predict `targets`: with shared prompts, their last ones G times, then the rows'."""
        if not isinstance(self.segments, SharedPrefix):
            return hidden.reshape(*self.targets.shape, hidden.shape[-1])
        prompts, rows = self.segments.cut(hidden)
        last = jnp.repeat(prompts[:, :, -1], self.rows.shape[2], axis=1)
        return jnp.concatenate([last, rows.reshape(rows.shape[0], -1, rows.shape[-1])], axis=1)


def shared_pack(
    prompts: Int[Array, "D n P"],
    prompt_lengths: Int[Array, "D n"],
    tokens: Int[Array, "D n G T"],
    index: PackIndex,
    chunks: int = 1,
) -> Pack:
    """The pack of some groups: each prompt (padded on the left) once, completions end to end; see `SharedPrefix`."""
    parts, n, width = prompts.shape
    _, _, group, length = tokens.shape
    place = jnp.arange(width) - (width - prompt_lengths[..., None])
    cells = index.token.reshape(parts, -1)  # [D, r T]
    completion, t = jnp.where(cells == EMPTY, 0, cells // length), cells % length
    owner = completion // group
    inside = cells != EMPTY
    start = jax.vmap(lambda part, i: part[i])(prompt_lengths, owner)
    segments = SharedPrefix(
        prompt_segments=((place >= 0) & (index.groups >= 0)[..., None]).astype(jnp.int32),
        segments=jnp.where(inside, completion + 1, 0).reshape(index.token.shape),
        prompt=owner.reshape(index.token.shape),
        chunks=chunks,
        apart=rows_apart(index.token.shape[1], n, group),
    )
    following = jnp.concatenate([cells[:, 1:], jnp.full((parts, 1), EMPTY)], axis=1)
    following = jnp.where(following % length > 0, following, EMPTY)  # EMPTY % T is not 0 and stays EMPTY
    firsts = jnp.where(index.cell[..., 0] == EMPTY, EMPTY, jnp.arange(n * group).reshape(n, group) * length)
    back = jnp.concatenate([firsts.reshape(parts, -1), following], axis=1)
    before = jnp.where(index.cell == EMPTY, EMPTY, n * group + index.cell - 1)
    first_column = jnp.broadcast_to(jnp.arange(n * group).reshape(n, group), firsts.shape)
    first_column = jnp.where(firsts == EMPTY, EMPTY, first_column)
    own, places = (jnp.where(inside, x, 0).reshape(index.token.shape) for x in (_take(tokens, cells), start + t))
    return Pack(
        tokens=segments.lay(prompts, own),
        positions=segments.lay(jnp.maximum(place, 0), places),
        segments=segments,
        targets=_take(tokens, back),
        rows=jnp.concatenate([first_column[..., None], before[..., 1:]], axis=-1),
        back=back,
    )


def plain_sequences(
    prompts: Int[Array, "D N P"], prompt_lengths: Int[Array, "D N"], tokens: Int[Array, "D N G T"]
) -> Int[Array, "D N G S"]:
    """Prompt and completion without a gap, padded on the right to S = P + T."""
    width, length = prompts.shape[2], tokens.shape[3]
    before = jnp.broadcast_to(prompts[:, :, None], (*tokens.shape[:3], width))
    both = jnp.concatenate([before, tokens], axis=-1)
    place = width - prompt_lengths[:, :, None, None] + jnp.arange(width + length)
    return jnp.take_along_axis(both, jnp.minimum(place, width + length - 1), axis=-1)


def plain_pack(
    sequences: Int[Array, "D n G S"], prompt_lengths: Int[Array, "D n"], length: int, index: PackIndex
) -> Pack:
    """The pack of some groups whose completions each bring their prompt, end to end in rows of S = P + T."""
    parts, n, group, width = sequences.shape
    cells = index.token.reshape(parts, -1)
    inside = cells != EMPTY
    completion = jnp.where(inside, cells // width, 0)
    starts = jnp.broadcast_to(prompt_lengths[:, :, None], (parts, n, group)).reshape(parts, -1)
    following = jnp.concatenate([cells[:, 1:], jnp.full((parts, 1), EMPTY)], axis=1)
    owner = jnp.where(following == EMPTY, 0, following // width)
    t = following % width - jax.vmap(lambda part, i: part[i])(starts, owner)
    learned = (following != EMPTY) & (following % width > 0) & (t >= 0)
    at = jnp.minimum(prompt_lengths[:, :, None, None] + jnp.arange(length), width - 1)
    cell = jnp.take_along_axis(index.cell, jnp.broadcast_to(at, (parts, n, group, length)), axis=-1)
    own = _take(sequences, cells)
    ahead = jnp.concatenate([own[:, 1:], jnp.zeros((parts, 1), sequences.dtype)], axis=1)
    rows = (-1, width)
    return Pack(
        tokens=own.reshape(rows),
        positions=jnp.where(inside, cells % width, 0).reshape(rows),
        segments=jnp.where(inside, completion + 1, 0).reshape(rows),
        targets=jnp.where(learned, ahead, 0),
        rows=jnp.where(cell == EMPTY, EMPTY, cell - 1),
        back=jnp.where(learned, owner * length + t, EMPTY),
    )


def gather_groups(tree: Any, groups: Int[Array, "D n"]) -> Any:
    """Leaves [D, N, ...] to [D, n, ...]: the groups of a pack, group 0 where EMPTY."""
    return jax.tree.map(lambda x: jax.vmap(lambda part, i: part[jnp.maximum(i, 0)])(x, groups), tree)
