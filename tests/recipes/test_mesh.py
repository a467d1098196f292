"""Sizes that `mesh.auto` picks, by a table of models and machines; nothing is compiled."""

import dataclasses
import io

import jax
import pytest
import tiny

from grpo_jax.chips import GIB, parse_topology
from grpo_jax.errors import InputError
from grpo_jax.models.abstract import architecture_of, with_model
from grpo_jax.parallel import make_mesh, mesh_text
from grpo_jax.recipes.mesh import Machine, factors, for_topology, pick_sizes, with_mesh
from grpo_jax.terminal import Terminal

# A step of 64 prompts x 8 completions of 1,024 tokens, in bfloat16 with float32 masters.
STEP = {
    "data.prompts_per_step": 64, "sampler.group_size": 8, "data.max_prompt_length": 512, "sampler.max_new_tokens": 1024,
    "model.compute_dtype": "bfloat16", "model.remat": "full", "model.logits_chunk": 1024,
    "sampler.cache_dtype": "bfloat16", "rewards.names": ("format",), "rewards.weights": (1.0,), "mesh.data": -1,
    "mesh.auto": True,
}  # fmt: skip


def step(model, **fields):
    """(config, architecture) of a preset by name."""
    config = with_model(tiny.config(**STEP | fields), model)
    return config, architecture_of(config)


@pytest.mark.parametrize(
    ("model", "machine", "want"),
    [
        ("Qwen2.5-0.5B", "v5p:8", "data=8"),
        ("Qwen2.5-0.5B", "h100:8", "data=8"),
        ("Qwen2.5-1.5B", "v5e:8", "data=2 x fsdp=4"),
        ("Qwen2.5-7B", "h100:8", "data=2 x fsdp=4"),
        ("Qwen2.5-7B", "v5p:16", "data=4 x fsdp=4"),
        ("Qwen2.5-7B", "2*v5e:4x8", "data=2 x fsdp=32"),
        ("Qwen3-30B-A3B", "v5p:32", "data=2 x expert=16"),
    ],
)
def test_sizes_by_model_and_machine(model, machine, want):
    config, architecture = step(model)
    placed, said = for_topology(config, architecture, parse_topology(machine))
    picked = {axis: getattr(placed.mesh, axis) for axis in ("data", "fsdp", "expert", "sequence", "tensor")}
    assert " x ".join(f"{k}={v}" for k, v in picked.items() if v > 1) == want, said
    assert not placed.mesh.auto and f"mesh.auto: {want} for {parse_topology(machine).chips} devices" in said[0]
    assert "GiB" in said[0] and "fits in 85%" in said[0]


def test_what_decides():
    architecture = step("Qwen2.5-7B")[1]

    def pick(devices, gib=0, slices=1, **fields):
        return pick_sizes(step("Qwen2.5-7B", **fields)[0], architecture, Machine(devices, gib * GIB, slices))

    assert pick(16).sizes.data == 16 and "memory of a device is not known" in pick(16).reasons[1]
    assert pick(16, 1000).sizes.data == 16
    small = pick(16, 20)
    assert small.sizes.fsdp * small.sizes.tensor == 16 and "data=16 would take" in small.reasons[1]
    nothing = pick(16, 4)
    assert not nothing.fits and "does not fit" in nothing.reasons[-1]
    assert pick(16, 20, 2).sizes.data >= 2  # nothing but rows goes over the network between slices
    # 16 prompts do not split over 32 devices; 28 heads and 4 key heads do over 2.
    few = pick(32, 1000, **{"data.prompts_per_step": 16})
    assert (few.sizes.data, few.sizes.tensor) == (16, 2) and "rows alone do not split" in few.reasons[-1]
    long = {"sampler.max_new_tokens": 32768, "data.prompts_per_step": 16, "sampler.group_size": 2}
    assert pick(16, 120, **long).sizes.sequence > 1  # the activations of one row are what is too large
    with pytest.raises(InputError, match="data.prompts_per_step=64 and sampler.slots=0 do not split over 13 devices"):
        pick(13)


def test_factors():
    assert list(factors(4, 2)) == [(1, 4), (2, 2), (4, 1)]
    assert len(list(factors(8, 5))) == 35


def test_a_run_takes_what_was_picked_and_says_so():
    config = tiny.config(**{"mesh.auto": True, "mesh.data": -1, "data.prompts_per_step": 8})
    out = io.StringIO()
    placed = with_mesh(config, Terminal(out))
    assert mesh_text(make_mesh(placed.mesh)) == f"data={len(jax.devices())}"
    assert out.getvalue().startswith("mesh.auto: data=8 for 8 devices; the memory of a device is not known")
    given = tiny.config()
    assert with_mesh(given, Terminal(out)) is given
    with pytest.raises(InputError, match="mesh.auto=True: this command picks no sizes"):
        make_mesh(dataclasses.replace(config.mesh, auto=True))
