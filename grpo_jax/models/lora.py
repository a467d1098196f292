"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen base, and x A B alpha / rank beside its dense layers.

A run with adapters has three collections where one without has {"params": ...}:

    adapters        {"stack_0": {"attention": {"query": {"a": [L, I, r], "b": [L, r, O]}}}}   trained
    params          the base: float32, bfloat16, or int8 kernels with a float32 scale a column   frozen
    adapter_scales  the same layers as adapters, {"scale": [L]}                                  frozen

B starts at zero, so that the policy starts as the base, exactly. There is no dropout: what the sampler draws from
and what the loss differentiates would be two laws.
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from grpo_jax.config import LoraConfig
from grpo_jax.errors import InputError
from grpo_jax.models.weights import StoredLeaf, put, take

ADAPTERS, SCALES = "adapters", "adapter_scales"
INT8_MAX = 127


def linear_layers(params: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Path -> [layers, inputs, outputs] of every dense layer of the stacks, such as 'stack_0/attention/query'.

    A router is none of them: a small change of its product is another expert.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in _leaves(params)}
    dense = {path.removesuffix("/kernel"): shape for path, shape in shapes.items() if path.endswith("/kernel")}
    return {
        path: shape
        for path, shape in dense.items()
        if path.startswith("stack_") and len(shape) == 3 and not path.endswith("/router")
    }


def target_layers(params: Mapping[str, Any], targets: str) -> dict[str, tuple[int, int, int]]:
    """The layers whose path the regular expression `targets` is found in (empty: all); raises InputError for none."""
    layers = linear_layers(params)
    found = {path: shape for path, shape in layers.items() if re.search(targets, path)}
    if not found:
        raise InputError(f"config: lora.targets={targets!r} matches none of {', '.join(layers)}: name one of them")
    return found


def init_adapters(params: Mapping[str, Any], config: LoraConfig, seed: int) -> dict[str, Any]:
    """Fresh adapters: A uniform within 1 / sqrt(inputs), B zero; a function of the seed and each layer's path."""
    adapters: dict[str, Any] = {}
    for path, (layers, inputs, outputs) in target_layers(params, config.targets).items():
        random = np.random.default_rng([seed, zlib.crc32(path.encode())])
        bound = inputs**-0.5
        put(adapters, f"{path}/a", random.uniform(-bound, bound, (layers, inputs, config.rank)).astype(np.float32))
        put(adapters, f"{path}/b", np.zeros((layers, config.rank, outputs), np.float32))
    return adapters


def adapter_scales(adapters: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """What each layer's x A B is multiplied by, alpha / rank."""
    scales: dict[str, Any] = {}
    for path, a, _ in adapter_pairs(adapters):
        put(scales, f"{path}/scale", np.full(a.shape[0], scale, np.float32))
    return scales


def adapter_pairs(adapters: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(path of the layer, A [L, I, r], B [L, r, O])."""
    for path, leaf in _leaves(adapters):
        if path.endswith("/a"):
            layer = path.removesuffix("/a")
            yield layer, np.asarray(leaf), take(adapters, f"{layer}/b")


def split_variables(
    params: Mapping[str, Any], config: LoraConfig, seed: int, given: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) collections of a run: all parameters, or adapters beside a frozen base.

    `given` are collections of adapters to go on with, in place of fresh ones. Raises InputError when they are not
    those that the config asks for.
    """
    if config.rank == 0:
        return {"params": dict(params) if given is None else merge(params, given)}, {}
    fresh = init_adapters(params, config, seed)
    fresh = {ADAPTERS: fresh, SCALES: adapter_scales(fresh, config.alpha / config.rank)}
    chosen = fresh if given is None else _checked(given, fresh)
    frozen = {"params": freeze(params, config.base_dtype), SCALES: chosen[SCALES]}
    return {ADAPTERS: chosen[ADAPTERS]}, frozen


def abstract_variables(params: Mapping[str, Any], config: LoraConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`split_variables` by shapes alone: leaves are jax.ShapeDtypeStruct."""
    if config.rank == 0:
        return {"params": dict(params)}, {}
    adapters: dict[str, Any] = {}
    scales: dict[str, Any] = {}
    for path, (layers, inputs, outputs) in target_layers(params, config.targets).items():
        put(adapters, f"{path}/a", jax.ShapeDtypeStruct((layers, inputs, config.rank), np.float32))
        put(adapters, f"{path}/b", jax.ShapeDtypeStruct((layers, config.rank, outputs), np.float32))
        put(scales, f"{path}/scale", jax.ShapeDtypeStruct((layers,), np.float32))
    rest = np.float32 if config.base_dtype == "float32" else ml_dtypes.bfloat16
    kernels = {*linear_layers(params), "head"} if config.base_dtype == "int8" else set()
    frozen: dict[str, Any] = {}
    for path, leaf in _leaves(params):
        layer, _, name = path.rpartition("/")
        quantised = name == "kernel" and layer in kernels
        put(frozen, path, jax.ShapeDtypeStruct(leaf.shape, np.int8 if quantised else rest))
        if quantised:
            shape = (*leaf.shape[:-2], leaf.shape[-1])
            put(frozen, f"{layer}/kernel_scale", jax.ShapeDtypeStruct(shape, np.float32))
    return {ADAPTERS: adapters}, {"params": frozen, SCALES: scales}


def freeze(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The base at rest: float32, bfloat16, or dense kernels as int8 and the rest in bfloat16.

    Leaves that still lie in a checkpoint stay there: a host reads what it slices out.
    """
    rest = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    kernels = {*linear_layers(params), "head"} if dtype == "int8" else set()
    frozen: dict[str, Any] = {}
    for path, leaf in _leaves(params):
        layer, _, name = path.rpartition("/")
        if name == "kernel" and layer in kernels:
            kernel, scale = quantise_stored(leaf) if isinstance(leaf, StoredLeaf) else quantise(np.asarray(leaf))
            put(frozen, path, kernel)
            put(frozen, f"{layer}/kernel_scale", scale)
        else:
            stored = isinstance(leaf, StoredLeaf)
            put(frozen, path, leaf.cast(rest) if stored else np.asarray(leaf).astype(rest, copy=False))
    return frozen


def quantise_stored(kernel: StoredLeaf) -> tuple[StoredLeaf, StoredLeaf]:
    """`quantise` of a kernel that is still in its file: of what a host slices out, whole columns are read."""
    scale = kernel.derived(lambda columns: quantise(columns)[1][None], np.float32)
    return kernel.derived(lambda columns: quantise(columns)[0], np.int8), scale


def quantise(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [..., I, O], float32 scale [..., O]): each column over its largest magnitude, times 127, rounded."""
    scale = np.abs(kernel).max(axis=-2).astype(np.float32) / INT8_MAX
    scale = np.where(scale == 0, np.float32(1), scale)
    quantised = np.empty(kernel.shape, np.int8)
    for index in np.ndindex(kernel.shape[:-2]):  # a layer at a time: no second float32 copy of the whole stack
        quantised[index] = np.rint(kernel[index] / scale[index])
    return quantised, scale


def merge(params: Mapping[str, Any], collections: Mapping[str, Any]) -> dict[str, Any]:
    """Float32 parameters that compute what base and adapters compute together: W + A B alpha / rank.

    `params` may be float32 or a frozen base. The sum is that of the base which was trained on, rounding included,
    so that the merged model is the policy.
    """
    merged: dict[str, Any] = {}
    for path, leaf in _leaves(params):
        if not path.endswith("/kernel_scale"):
            put(merged, path, np.asarray(leaf).astype(np.float32))
    for path, leaf in _leaves(params):
        if path.endswith("/kernel_scale"):
            kernel = take(merged, path.removesuffix("_scale"))
            kernel *= np.asarray(leaf, np.float32)[..., None, :]
    for path, a, b in adapter_pairs(collections[ADAPTERS]):
        kernel, scale = take(merged, f"{path}/kernel"), take(collections[SCALES], f"{path}/scale")
        for layer in range(len(kernel)):
            kernel[layer] += scale[layer] * (a[layer].astype(np.float32) @ b[layer].astype(np.float32))
    return merged


def fingerprint(params: Mapping[str, Any]) -> int:
    """A checksum over the shapes and the first values of every leaf: tells one base from another, in no time."""
    code = 0
    for path, leaf in _leaves(params):
        first = np.asarray(leaf[(*(slice(0, 1),) * (len(leaf.shape) - 1), slice(0, 64))])
        code = zlib.crc32(first.tobytes(), zlib.crc32(f"{path}{tuple(leaf.shape)}".encode(), code))
    return code


def _checked(given: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters to go on with, when they have the layers, the rank and the scale of the config's own."""
    for name, said in ((ADAPTERS, "lora.targets and lora.rank"), (SCALES, "lora.targets and lora.alpha")):
        wanted, found = dict(_leaves(fresh[name])), dict(_leaves(given[name]))
        for path in [*wanted, *(path for path in found if path not in wanted)]:
            mine, other = (np.shape(tree[path]) if path in tree else None for tree in (wanted, found))
            if mine != other or (name == SCALES and not np.allclose(wanted[path], found[path])):
                raise InputError(
                    f"config: {said} ask for {path} of shape {mine}, the adapters of model.path have {other}: use the "
                    "options that they were trained with"
                )
    return {name: given[name] for name in (ADAPTERS, SCALES)}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf), in the order of the tree."""
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from _leaves(child, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", child
