"""A run's decoder: the network of a config on a mesh, with the attention kernel of its devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.config import Config, ModelConfig
from grpo_jax.errors import InputError
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.decoder import Decoder
from grpo_jax.ops.kernels import Kernel

UNROLLED = 8  # layers of a model that needs no loop over layers: a program of as many compiles in seconds
KERNELS = {"tpu": "splash", "gpu": "cudnn"}  # the kernel of a platform, where it can serve


def build_decoder(config: Config, architecture: Architecture, mesh: Mesh) -> Decoder:
    """The decoder that training applies; raises InputError where `model.attention` names a kernel that cannot serve."""
    return Decoder(
        architecture,
        dtype=jnp.dtype(config.model.compute_dtype),
        remat=config.model.remat,
        unroll=layers_in_a_row(config.model, architecture),
        kernel=choose_kernel(config.model, architecture, mesh),
        mesh=mesh,
        sampling=config.mesh.sampling,
    )


def layers_in_a_row(config: ModelConfig, architecture: Architecture) -> int:
    """What `model.unroll` stands for: layers that training's loop over layers does in one turn."""
    few = architecture.layers <= UNROLLED and config.remat == "none"
    return config.unroll or (architecture.layers if few else 1)


def build_policy(config: Config, architecture: Architecture, mesh: Mesh) -> Decoder:
    """The decoder of a step; a kernel that is named must have passes to serve, or it is an InputError."""
    named = config.model.attention
    if config.train.share_prefix and named in KERNELS.values():
        raise InputError(
            f"config: model.attention={named!r} cannot serve packs with shared prompts: set train.share_prefix=False, "
            "or model.attention='auto'"
        )
    return build_decoder(config, architecture, mesh).clone(balance=config.optim.routing_bias_rate > 0)


def choose_kernel(config: ModelConfig, architecture: Architecture, mesh: Mesh) -> Kernel | None:
    """What `model.attention` stands for on a mesh's devices; None is XLA.

    Raises InputError for a kernel that is named and cannot serve.
    """
    device = mesh.devices.flat[0]
    platform = "gpu" if device.platform == "cuda" else device.platform
    name = kernel_name(config, architecture, platform, mesh.shape, device)
    return Kernel(name, mesh) if name else None


def kernel_name(
    config: ModelConfig, architecture: Architecture, platform: str, axes: Mapping[str, int], device: Any
) -> str:
    """The kernel's name on devices of a platform; '' is XLA. Raises InputError as `choose_kernel` does."""
    named = config.attention in KERNELS.values()
    name = config.attention if named else KERNELS.get(platform, "")
    if config.attention == "xla" or not name:
        return ""
    problem = "" if KERNELS.get(platform) == name else f"is no kernel of the devices, which are {platform}s: take auto"
    problem = problem or hindrance(name, architecture, axes, config.compute_dtype, device)
    if problem and named:
        raise InputError(f"config: model.attention={name!r} {problem}")
    return "" if problem else name


def hindrance(name: str, a: Architecture, axes: Mapping[str, int], dtype: str, device: Any) -> str:
    """What keeps a kernel from serving, and what to do; '' where nothing does."""
    if axes["sequence"] > 1:
        return f"takes rows whole, and mesh.sequence={axes['sequence']} splits them: set 1, or take auto"
    if a.kv_heads % axes["tensor"]:
        return f"needs mesh.tensor={axes['tensor']} to divide the model's {a.kv_heads} key heads: lower it or take auto"
    if name == "splash":
        return ""
    if jax.default_backend() != "gpu":
        return "compiles on machines with the GPU alone, and this one is described: take auto"
    capability = str(device.compute_capability)
    if not capability[:1].isdecimal():  # AMD's are names: gfx942
        return f"runs on NVIDIA's GPUs alone, and this one is {capability}: take auto"
    if dtype == "float32":
        return "takes no model.compute_dtype='float32': set bfloat16, or take auto"
    if a.attention_cap:
        return f"caps no scores, and the model's are capped at {a.attention_cap:g}: take auto"
    size = a.head_size if a.latent is None else max(a.head_size, a.latent.value)
    largest = 256 if float(capability) >= 9 else 128
    if size > largest:
        return f"takes heads up to {largest} features here, and the model's have {size}: take auto"
    return ""
