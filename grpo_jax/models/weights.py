"""The parameter tree against the tensors of a checkpoint: names, shapes, assembly.

A format gives one table, `names`: path in the tree -> tensor name, with `{layer}` in the names of
layers. Checkpoints hold matrices as [out, in], one tensor a layer; the tree holds kernels as
[in, out], stacked over layers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from grpo_jax.errors import InputError
from grpo_jax.models.architecture import Architecture

Shape = tuple[int, ...]
Read = Callable[[str, str], np.ndarray]


def top_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Checkpoint shapes ([out, in]) of what stands outside the layers, by path."""
    a = architecture
    shapes: dict[str, Shape] = {"embed/embedding": (a.vocabulary, a.width), "final_norm/scale": (a.width,)}
    return shapes if a.tied else {**shapes, "head/kernel": (a.vocabulary, a.width)}


def layer_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Checkpoint shapes ([out, in]) of one layer, by path below its stack."""
    a = architecture
    query, key = a.heads * a.head_size, a.kv_heads * a.head_size
    return {
        "attention_norm/scale": (a.width,),
        "attention/query/kernel": (query, a.width),
        "attention/key/kernel": (key, a.width),
        "attention/value/kernel": (key, a.width),
        "attention/out/kernel": (a.width, query),
        "mlp_norm/scale": (a.width,),
        "mlp/gate/kernel": (a.mlp_width, a.width),
        "mlp/up/kernel": (a.mlp_width, a.width),
        "mlp/down/kernel": (a.width, a.mlp_width),
    }


def tensor_shapes(architecture: Architecture, names: Mapping[str, str]) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this architecture holds, with its shape."""
    shapes = {names[path]: shape for path, shape in top_shapes(architecture).items()}
    for layer in range(architecture.layers):
        for path, shape in layer_shapes(architecture).items():
            shapes[names[path].format(layer=layer)] = shape
    return shapes


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
            f"{source}: tensor {left[0]} of shape {list(found[left[0]])} belongs to no parameter of a Llama decoder "
            f"({len(left)} such tensors): use a plain Llama checkpoint"
        )


def assemble(architecture: Architecture, names: Mapping[str, str], read: Read, source: str) -> dict[str, Any]:
    """The float32 parameter tree, layers stacked.

    Shapes must have been checked: memory is taken here, and `read(tensor name, path)` gives each
    tensor in the checkpoint's [out, in] order. Raises InputError at a tensor with NaN or infinity.
    """

    def oriented(name: str, path: str) -> np.ndarray:
        tensor = read(name, path)
        if not np.isfinite(tensor).all():
            raise InputError(f"{source}: tensor {name} holds NaN or infinite values: use an undamaged checkpoint")
        return tensor.T if path.endswith("kernel") else tensor

    params: dict[str, Any] = {}
    for path in top_shapes(architecture):
        put(params, path, np.ascontiguousarray(oriented(names[path], path), dtype=np.float32))
    first = 0
    for i, stack in enumerate(architecture.stacks):
        for path, shape in layer_shapes(architecture).items():
            leaf = np.empty((stack.layers, *(shape[::-1] if path.endswith("kernel") else shape)), np.float32)
            for j in range(stack.layers):
                leaf[j] = oriented(names[path].format(layer=first + j), path)
            put(params, f"stack_{i}/{path}", leaf)
        first += stack.layers
    return params


def disassemble(
    architecture: Architecture, names: Mapping[str, str], params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint in [out, in] order, one a layer: `assemble` the other way round."""

    def oriented(leaf: np.ndarray, path: str) -> np.ndarray:
        return np.ascontiguousarray(leaf.T if path.endswith("kernel") else leaf)

    tensors = {names[path]: oriented(take(params, path), path) for path in top_shapes(architecture)}
    first = 0
    for i, stack in enumerate(architecture.stacks):
        for path in layer_shapes(architecture):
            leaf = take(params, f"stack_{i}/{path}")
            for j in range(stack.layers):
                tensors[names[path].format(layer=first + j)] = oriented(leaf[j], path)
        first += stack.layers
    return tensors


def put(tree: dict[str, Any], path: str, leaf: np.ndarray) -> None:
    """Sets the leaf at a path such as 'embed/embedding', making the dicts above it."""
    *above, last = path.split("/")
    for name in above:
        tree = tree.setdefault(name, {})
    tree[last] = leaf


def take(tree: Mapping[str, Any], path: str) -> np.ndarray:
    """The leaf at a path such as 'embed/embedding', as a numpy array."""
    node: Any = tree
    for name in path.split("/"):
        node = node[name]
    return np.asarray(node)
