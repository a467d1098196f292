"""The parameter tree against the tensors of a checkpoint: names, shapes, assembly.

A format gives one table, `names`: path in the tree -> tensor name, with `{layer}` in the names of
layers and `{expert}` where each expert has a tensor. Checkpoints hold matrices as [out, in], one tensor a layer; the
tree holds kernels as [in, out], stacked over layers (and experts). Several paths may name one tensor, of which each
is the rows that `rows` gives.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from grpo_jax.errors import InputError
from grpo_jax.models.architecture import Architecture, Stack

Shape = tuple[int, ...]
Read = Callable[[str, str], np.ndarray]
Rows = Mapping[str, np.ndarray]
Index = tuple[slice, ...]


def top_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Checkpoint shapes ([out, in]) of what stands outside the layers, by path."""
    a = architecture
    shapes: dict[str, Shape] = {"embed/embedding": (a.vocabulary, a.width), "final_norm/scale": (a.width,)}
    return shapes if a.tied else {**shapes, "head/kernel": (a.vocabulary, a.width)}


def layer_shapes(architecture: Architecture, stack: Stack | None = None) -> dict[str, Shape]:
    """Checkpoint shapes ([out, in], experts first) of one layer of a stack (the first), by path below its stack."""
    a, stack = architecture, stack or architecture.stacks[0]
    shapes: dict[str, Shape] = {"attention_norm/scale": (a.width,), **_attention_shapes(a)}
    if a.post_norms:
        shapes |= {"attention_post_norm/scale": (a.width,)}
    shapes |= {"mlp_norm/scale": (a.width,)}
    if stack.experts and (e := a.experts) is not None:
        shapes |= {"mlp/router/kernel": (e.count, a.width)}
        shapes |= {"mlp/routing_bias": (e.count,)} if e.scoring == "sigmoid" else {}
        shapes |= {f"mlp/experts_{name}/kernel": (e.count, e.width, a.width) for name in ("gate", "up")}
        shapes |= {"mlp/experts_down/kernel": (e.count, a.width, e.width)}
        shapes |= _mlp_shapes(a, "mlp/shared", e.shared_width) if e.shared_width else {}
    else:
        shapes |= _mlp_shapes(a, "mlp", a.mlp_width)
    if a.post_norms:
        shapes |= {"mlp_post_norm/scale": (a.width,)}
    return shapes


def _attention_shapes(a: Architecture) -> dict[str, Shape]:
    query, key = a.heads * a.head_size, a.kv_heads * a.head_size
    sizes = {"query": (query, a.width), "key": (key, a.width), "value": (key, a.width), "out": (a.width, query)}
    norms = {f"{name}_norm": a.head_size for name in ("query", "key")} if a.qk_norm else {}
    if (m := a.latent) is not None:
        sizes = {"query_latent": (m.query_rank, a.width)} if m.query_rank else {}
        sizes |= {
            "query": (query, m.query_rank or a.width),
            "latent": (m.rank + m.rotary, a.width),
            "key_up": (a.heads * m.plain, m.rank),
            "value_up": (a.heads * m.value, m.rank),
            "out": (a.width, a.heads * m.value),
        }
        norms = {"latent_norm": m.rank} | ({"query_latent_norm": m.query_rank} if m.query_rank else {})
    shapes: dict[str, Shape] = {}
    for name, shape in sizes.items():
        shapes[f"attention/{name}/kernel"] = shape
        if a.out_bias if name == "out" else a.qkv_bias:
            shapes[f"attention/{name}/bias"] = shape[:1]
    return shapes | {f"attention/{name}/scale": (size,) for name, size in norms.items()}


def _mlp_shapes(a: Architecture, path: str, width: int) -> dict[str, Shape]:
    sizes = {"gate": (width, a.width), "up": (width, a.width), "down": (a.width, width)}
    shapes: dict[str, Shape] = {}
    for name, shape in sizes.items():
        shapes[f"{path}/{name}/kernel"] = shape
        if a.mlp_bias:
            shapes[f"{path}/{name}/bias"] = shape[:1]
    return shapes


def _places(a: Architecture) -> Iterator[tuple[str, Stack, int]]:
    """(name of the stack, stack, number of its first layer)."""
    first = 0
    for i, stack in enumerate(a.stacks):
        yield f"stack_{i}", stack, first
        first += stack.layers


def tensor_shapes(architecture: Architecture, names: Mapping[str, str]) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this architecture holds, with its shape."""
    shapes: dict[str, Shape] = {}

    def add(name: str, shape: Shape) -> None:
        held = shapes.get(name)
        shapes[name] = shape if held is None else (held[0] + shape[0], *shape[1:])

    for path, shape in top_shapes(architecture).items():
        add(names[path], shape)
    for _, stack, first in _places(architecture):
        for path, shape in layer_shapes(architecture, stack).items():
            for layer in range(first, first + stack.layers):
                for name in tensor_names(names[path], layer, shape):
                    add(name, shape[1:] if "{expert}" in names[path] else shape)
    return shapes


def tensor_names(template: str, layer: int, shape: Shape) -> list[str]:
    """The tensors of a parameter in a layer: one, or one an expert."""
    if "{expert}" not in template:
        return [template.format(layer=layer)]
    return [template.format(layer=layer, expert=expert) for expert in range(shape[0])]


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str) -> None:
    """Raises InputError at the first tensor that is missing, has another shape, or that no parameter takes."""
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"{source}: tensor {name} of shape {list(shape)} is missing: use a complete checkpoint")
        if tuple(found[name]) != shape:
            raise InputError(
                f"{source}: tensor {name} has shape {list(found[name])}, the sizes in the same checkpoint ask for "
                f"{list(shape)}: use weights and sizes that belong together"
            )
    left = [name for name in found if name not in expected]
    if left:
        raise InputError(
            f"{source}: tensor {left[0]} of shape {list(found[left[0]])} belongs to no parameter of this decoder "
            f"({len(left)} such tensors): use a checkpoint whose config describes all of it"
        )


class StoredLeaf:
    """A parameter that still lies in a checkpoint: shape and dtype are known, numbers are read when indexed.

    `leaf[index]`, with a slice for each axis, reads what the slices name, one layer and one tensor at a time, so that
    a host which wants its share of a parameter holds little more than that share. `np.asarray(leaf)` reads all.

    Attributes:
      shape: as in the parameter tree, layers (and experts) first.
      dtype: of the numbers.
    """

    def __init__(self, shape: Shape, lead: Shape, read: Callable[[Shape, Index], np.ndarray], dtype: Any = np.float32):
        """`read(place, index)`: slices of the matrix at a place in the `lead` axes (layers, experts)."""
        self.shape, self.dtype, self._lead, self._read = shape, np.dtype(dtype), lead, read

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Count of numbers."""
        return math.prod(self.shape)

    def __getitem__(self, index: Index) -> np.ndarray:
        ranges = [range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
        out = np.empty([len(r) for r in ranges], self.dtype)
        lead, rest = ranges[: len(self._lead)], tuple(slice(r.start, r.stop) for r in ranges[len(self._lead) :])
        for at in np.ndindex(*(len(r) for r in lead)):
            out[at] = self._read(tuple(r[i] for r, i in zip(lead, at, strict=True)), rest)
        return out

    def derived(self, compute: Callable[[np.ndarray], np.ndarray], dtype: Any) -> "StoredLeaf":
        """Another leaf: `compute` of the columns that are read, all rows of each [..., I, o], gives [..., I or 1, o].

        A result of one row stands for a leaf without the axis of rows.
        """
        rows = self.shape[-2]

        def columns(place: Shape, column: slice) -> np.ndarray:
            return compute(self._read(place, (slice(0, rows), column)))

        if compute(np.zeros((rows, 1), np.float32)).shape[0] == rows:
            return StoredLeaf(self.shape, self._lead, lambda at, index: columns(at, index[1])[index[0]], dtype)
        shape = (*self._lead, self.shape[-1])
        return StoredLeaf(shape, self._lead, lambda at, index: columns(at, index[0])[0], dtype)

    def cast(self, dtype: Any) -> "StoredLeaf":
        """The same numbers in another dtype."""
        return StoredLeaf(self.shape, self._lead, self._read, dtype)

    def check(self) -> None:
        """Reads all of it, a layer at a time; raises InputError where it cannot be read or is not finite."""
        whole = tuple(slice(0, size) for size in self.shape[len(self._lead) :])
        for place in np.ndindex(*self._lead):
            self._read(place, whole)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[tuple(slice(0, size) for size in self.shape)]
        return whole if dtype is None else whole.astype(dtype, copy=False)


ReadPart = Callable[[str, str, Index], np.ndarray]


def stored_tree(architecture: Architecture, names: Mapping[str, str], read: ReadPart, source: str) -> dict[str, Any]:
    """The parameter tree of StoredLeafs; `read(tensor name, path, slices)` gives slices of the path's rows.

    Shapes must have been checked. Reading raises InputError at a tensor with NaN or infinity.
    """

    def part(template: str, path: str, first: int, place: Shape, index: Index) -> np.ndarray:
        layer = first + place[0] if place else 0
        name = template.format(layer=layer, expert=place[1] if len(place) > 1 else 0)
        tensor = read(name, path, index[::-1] if path.endswith("kernel") else index)
        if not np.isfinite(tensor).all():
            raise InputError(f"{source}: tensor {name} holds NaN or infinite values: use an undamaged checkpoint")
        return tensor.T if path.endswith("kernel") else tensor

    def turned(shape: Shape, path: str) -> Shape:
        return (*shape[:-2], *shape[-2:][::-1]) if path.endswith("kernel") else shape

    params: dict[str, Any] = {}
    for path, shape in top_shapes(architecture).items():
        put(params, path, StoredLeaf(turned(shape, path), (), functools.partial(part, names[path], path, 0)))
    for stack_name, stack, first in _places(architecture):
        for path, shape in layer_shapes(architecture, stack).items():
            lead = (stack.layers, shape[0]) if "{expert}" in names[path] else (stack.layers,)
            whole = (stack.layers, *turned(shape, path))
            leaf = StoredLeaf(whole, lead, functools.partial(part, names[path], path, first))
            put(params, f"{stack_name}/{path}", leaf)
    return params


def assemble(architecture: Architecture, names: Mapping[str, str], read: Read, source: str) -> dict[str, Any]:
    """The float32 parameter tree, layers stacked, all of it read.

    Shapes must have been checked: memory is taken here, and `read(tensor name, path)` gives each
    tensor in the checkpoint's [out, in] order. Raises InputError at a tensor with NaN or infinity.
    """

    def whole(name: str, path: str, index: Index) -> np.ndarray:
        return np.asarray(read(name, path)[index], np.float32)

    return materialize(stored_tree(architecture, names, whole, source))


def materialize(tree: Any) -> Any:
    """The tree with every StoredLeaf read."""
    if isinstance(tree, Mapping):
        return {name: materialize(leaf) for name, leaf in tree.items()}
    return np.asarray(tree)


def disassemble(
    architecture: Architecture, names: Mapping[str, str], params: Mapping[str, Any], rows: Rows | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of a checkpoint in [out, in] order, one a layer and expert: `assemble` the other way round.

    They come layer by layer, so that no more than one layer's tensors need be held.
    """
    rows = rows or {}

    def oriented(leaf: np.ndarray, path: str) -> np.ndarray:
        return np.ascontiguousarray(np.swapaxes(leaf, -1, -2) if path.endswith("kernel") else leaf)

    for path in top_shapes(architecture):
        yield names[path], oriented(take(params, path), path)
    for stack_name, stack, first in _places(architecture):
        shapes = layer_shapes(architecture, stack)
        for j in range(stack.layers):
            fused: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
            for path, shape in shapes.items():
                tensor = oriented(_layer(params, f"{stack_name}/{path}", j), path)
                expert = "{expert}" in names[path]
                for name, one in zip(
                    tensor_names(names[path], first + j, shape), tensor if expert else [tensor], strict=True
                ):
                    fused.setdefault(name, []).append((rows.get(path, np.arange(len(one))), one))
            for name, parts in fused.items():
                yield name, _joined(parts)


def _layer(params: Mapping[str, Any], path: str, j: int) -> np.ndarray:
    """Layer j of a stacked leaf."""
    leaf = _node(params, path)
    if isinstance(leaf, StoredLeaf):
        return leaf[(slice(j, j + 1), *(slice(0, size) for size in leaf.shape[1:]))][0]
    return np.asarray(leaf[j])


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """One tensor whose rows are given by (row numbers, rows)."""
    if len(parts) == 1 and np.array_equal(parts[0][0], np.arange(len(parts[0][1]))):
        return parts[0][1]
    out = np.empty((sum(len(one) for _, one in parts), *parts[0][1].shape[1:]), parts[0][1].dtype)
    for numbers, one in parts:
        out[numbers] = one
    return out


def save_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file, complete when it has its name, and readable by whom other new files are.

    safetensors itself leaves a file that nobody but its owner may read, so that a server of another account could not.
    """
    part = path.with_name(f"{path.name}.part")
    part.touch()
    mode = part.stat().st_mode
    safetensors.numpy.save_file(tensors, str(part), metadata={"format": "pt"})
    part.chmod(mode)
    part.replace(path)


def put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Sets the leaf at a path such as 'embed/embedding', making the dicts above it."""
    *above, last = path.split("/")
    for name in above:
        tree = tree.setdefault(name, {})
    tree[last] = leaf


def take(tree: Mapping[str, Any], path: str) -> np.ndarray:
    """The leaf at a path such as 'embed/embedding', as a numpy array."""
    return np.asarray(_node(tree, path))


def _node(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for name in path.split("/"):
        node = node[name]
    return node
