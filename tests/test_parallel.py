"""Meshes and the table of rules: what lies where, and what is refused."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.config import MeshConfig
from grpo_jax.errors import InputError
from grpo_jax.hlo import Program
from grpo_jax.optimizer import make_optimizer
from grpo_jax.parallel import (
    axes_text,
    check_batch,
    constrain_rows,
    gather_columns,
    make_mesh,
    mesh_text,
    partition_spec,
    path_name,
    replicated,
    row_sharding,
    sampling_layout,
    shardings,
    spread_columns,
)
from grpo_jax.step import sampling_variables


def mesh_of(data=1, fsdp=1, tensor=1, expert=1, sequence=1):
    sizes = (data, fsdp, tensor, expert, sequence)
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


@pytest.mark.parametrize(
    ("sizes", "devices", "want"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 2, 2), 8, (2, 2, 2)),
        ((2, -1, 1), 8, (2, 4, 1)),
        ((1, 1, -1), 4, (1, 1, 4)),
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((2, 2, 1), 4, (2, 2, 1)),
    ],
)
def test_minus_one_takes_what_is_left(sizes, devices, want):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
    assert tuple(mesh.shape) == ("data", "fsdp", "expert", "sequence", "tensor")
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == want and mesh.size == devices
    assert {t.name for t in mesh.axis_types} == {"Auto"}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(devices))


@pytest.mark.parametrize(("sizes", "devices"), [((3, 1, 1), 8), ((-1, 3, 1), 8), ((2, 2, 1), 8), ((-1, 4, 4), 8)])
def test_sizes_that_are_not_the_devices_are_refused(sizes, devices):
    with pytest.raises(InputError, match=rf"mesh\.fsdp={sizes[1]}.* is not the {devices} devices"):
        make_mesh(MeshConfig(*sizes), jax.devices()[:devices])


def test_batches_that_do_not_split_over_the_devices_are_refused():
    mesh = mesh_of(2, 2, 2)
    check_batch(tiny.config(**{"data.prompts_per_step": 4}), mesh)
    with pytest.raises(InputError, match=r"data\.prompts_per_step=6 must divide by the 4 devices"):
        check_batch(tiny.config(**{"data.prompts_per_step": 6}), mesh)
    wide = {"data.prompts_per_step": 8, "data.max_prompt_length": 8}
    check_batch(tiny.config(**wide), mesh_of(1, 2, 1, 2, 2))
    with pytest.raises(InputError, match=r"=4 must divide by the 8 devices of mesh.data x mesh.fsdp x mesh.expert x"):
        check_batch(tiny.config(**{**wide, "data.prompts_per_step": 4}), mesh_of(1, 2, 1, 2, 2))
    with pytest.raises(InputError, match=r"data\.max_prompt_length=7 must divide by mesh.sequence=2"):
        check_batch(tiny.config(), mesh_of(sequence=2))
    plain = {"data.prompts_per_step": 4, "train.share_prefix": False}
    check_batch(tiny.config(**plain, **{"objective.micro_batch_size": 2}), mesh)
    check_batch(tiny.config(**plain, **{"objective.micro_batch_size": 4, "objective.minibatches": 4}), mesh)
    with pytest.raises(
        InputError, match=r"objective\.minibatches=4 must divide the 1 prompts of each of the 4 devices"
    ):
        check_batch(tiny.config(**{"data.prompts_per_step": 4, "objective.minibatches": 4}), mesh)
    with pytest.raises(InputError, match=r"sampler\.slots=6 must divide by the 4 devices"):
        check_batch(tiny.config(**{"data.prompts_per_step": 4, "sampler.slots": 6}), mesh)


LAYER = {  # path -> axes after the layer axis
    "attention/query/kernel": ("fsdp", "tensor"),
    "attention/key/kernel": ("fsdp", "tensor"),
    "attention/value/kernel": ("fsdp", "tensor"),
    "attention/out/kernel": ("tensor", "fsdp"),
    "mlp/gate/kernel": ("fsdp", "tensor"),
    "mlp/up/kernel": ("fsdp", "tensor"),
    "mlp/down/kernel": ("tensor", "fsdp"),
    "attention/query/a": ("fsdp", None),
    "attention/query/b": (None, "tensor"),
    "mlp/down/a": ("tensor", None),
    "mlp/down/b": (None, "fsdp"),
}


def test_rules_by_path():
    of = tiny.architecture(tied=False)
    variables = {"params": tiny.params(of), "adapters": tiny.adapters(of)}
    specs = {
        path_name(path): sharding.spec
        for path, sharding in jax.tree_util.tree_flatten_with_path(shardings(variables, mesh_of(2, 2, 2)))[0]
    }
    assert specs["params/embed/embedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["params/head/kernel"] == PartitionSpec("fsdp", "tensor")
    assert specs["params/final_norm/scale"] == specs["params/stack_0/mlp_norm/scale"] == PartitionSpec()
    for name, axes in LAYER.items():
        collection = "adapters" if name.endswith(("/a", "/b")) else "params"
        assert specs[f"{collection}/stack_0/{name}"] == PartitionSpec(None, *axes), name
    split = [name for name, spec in specs.items() if any(spec)]
    assert sorted(set(specs) - set(split)) == sorted(name for name in specs if name.endswith("scale"))


def test_rules_of_experts_latents_and_biases():
    mesh = mesh_of(1, 2, 2, 2)
    for path, shape, axes in (
        ("stack_1/mlp/router/kernel", (2, 16, 6), ("fsdp", None)),
        ("stack_1/mlp/experts_gate/kernel", (2, 6, 16, 8), ("expert", "fsdp", "tensor")),
        ("stack_1/mlp/experts_gate/kernel", (2, 5, 16, 8), (None, "fsdp", "tensor")),
        ("stack_1/mlp/experts_down/kernel", (2, 6, 8, 16), ("expert", "tensor", "fsdp")),
        ("stack_1/mlp/shared/down/kernel", (2, 8, 16), ("tensor", "fsdp")),
        ("stack_0/attention/latent/kernel", (2, 16, 12), ("fsdp", None)),
        ("stack_0/attention/query_latent/kernel", (2, 16, 8), ("fsdp", None)),
        ("stack_0/attention/key_up/kernel", (2, 8, 16), ("fsdp", "tensor")),
        ("stack_0/attention/query/bias", (2, 16), ("tensor",)),
        ("stack_0/mlp/up/bias", (2, 16), ("tensor",)),
        ("stack_0/attention/out/bias", (2, 16), ()),
        ("stack_1/mlp/routing_bias", (2, 6), ()),
    ):
        want = PartitionSpec(*(None,) * (len(shape) - len(axes)), *axes) if axes else PartitionSpec()
        assert partition_spec(path, shape, mesh) == want, path


def test_moments_lie_where_their_parameters_lie():
    params, mesh = {"params": tiny.params(tiny.architecture())}, mesh_of(1, 4, 2)
    state = jax.eval_shape(make_optimizer(tiny.config().optim, 10).init, params)
    layout = {path_name(p): s for p, s in jax.tree_util.tree_flatten_with_path(shardings(state, mesh))[0]}
    own = {path_name(p): s for p, s in jax.tree_util.tree_flatten_with_path(shardings(params, mesh))[0]}
    for name, sharding in own.items():
        moments = [s for path, s in layout.items() if path.endswith(f"/{name}")]
        assert moments == [sharding, sharding], name


def test_axes_that_do_not_divide_or_are_dropped_are_left_out():
    mesh = mesh_of(1, 4, 2)
    kernel = "stack_0/mlp/gate/kernel"
    assert partition_spec(kernel, (2, 16, 24), mesh) == PartitionSpec(None, "fsdp", "tensor")
    assert partition_spec(kernel, (2, 18, 24), mesh) == PartitionSpec(None, None, "tensor")
    assert partition_spec(kernel, (2, 16, 25), mesh) == PartitionSpec(None, "fsdp", None)
    assert partition_spec(kernel, (16, 24), mesh) == PartitionSpec("fsdp", "tensor")
    assert partition_spec(kernel, (2, 16, 24), mesh, ("fsdp",)) == PartitionSpec(None, None, "tensor")
    assert partition_spec(kernel, (24,), mesh) == PartitionSpec()
    assert partition_spec("something/else", (16, 16), mesh) == PartitionSpec()


def test_what_the_parameter_table_says_of_a_leaf():
    mesh = mesh_of(1, 2, 1, 2)
    assert axes_text("stack_0/mlp/gate/kernel", (2, 16, 24), mesh) == "- x fsdp x -"  # one device along tensor
    assert axes_text("stack_1/mlp/experts_up/kernel", (2, 6, 16, 8), mesh) == "- x expert x fsdp x -"
    assert axes_text("final_norm/scale", (16,), mesh) == "" and mesh_text(mesh) == "fsdp=2 x expert=2"
    assert mesh_text(mesh_of()) == "one device"


def test_columns_go_to_the_devices_of_sequence_and_come_back():
    mesh = mesh_of(2, 1, 1, 1, 4)
    x = np.arange(2 * 6 * 3.0).reshape(2, 6, 3).astype(np.float32)
    spread, back = jax.jit(lambda x: (y := spread_columns(x, mesh), gather_columns(y[..., 0], (2, 6), mesh)))(x)
    assert spread.shape == (8, 2, 3) and spread.sharding.shard_shape(spread.shape) == (1, 2, 3)
    np.testing.assert_array_equal(spread[:3], x[0].reshape(3, 2, 3))
    assert not spread[3].any()  # filled up
    np.testing.assert_array_equal(back, x[..., 0])
    one = mesh_of(2)
    assert spread_columns(x, one) is x and gather_columns(x, (2, 6), one) is x


def test_rows_are_split_over_data_and_fsdp_and_copied_over_tensor():
    mesh = mesh_of(2, 2, 2)
    rows = jax.jit(lambda x: constrain_rows({"x": x + 1}, mesh)["x"])(jnp.arange(8.0))
    shards = {s.device.id: np.asarray(s.data).tolist() for s in rows.addressable_shards}
    assert sorted(map(tuple, shards.values())) == sorted([(1, 2), (3, 4), (5, 6), (7, 8)] * 2)
    assert row_sharding(mesh).shard_shape((8, 3)) == (2, 3) and replicated(mesh).shard_shape((8, 3)) == (8, 3)


def test_weights_of_sampling_travel_rounded_and_layer_by_layer():
    """Gathers of float32 send twice the bytes; whole stacks would stand beside the layers that are cut out of them."""
    fields = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "mesh.sampling": "tensor"}
    config = tiny.config(**fields, **{"model.compute_dtype": "bfloat16"})
    parts = dataclasses.replace(tiny.parts(tiny.config()), config=config, mesh=make_mesh(config.mesh))
    variables = {"params": tiny.params(parts.module.architecture)}
    variables = jax.device_put(variables, shardings(variables, parts.mesh))
    text = jax.jit(functools.partial(sampling_variables, parts)).lower(variables).compile().as_text()
    program = Program(text).computations
    main = next(c for c in program.values() if any(i.opcode == "all-gather" for i in c.values()))
    gathers = [i for i in main.values() if i.opcode == "all-gather"]
    assert len(gathers) == 2 * 7 + 1  # kernels of each layer; the embedding
    assert all(shape.dims[0] == 1 for g in gathers for shape in g.shapes if len(shape.dims) == 3)
    for gather in gathers:  # CPUs gather in float32 what was rounded before
        if gather.shapes[0].dims[0] == parts.module.architecture.vocabulary // 2:
            continue
        made = main[gather.operands[0]]
        inside = [made, *(i for name in made.called() for i in program[name].values())]
        assert any(shape.dtype == "bf16" for i in inside for shape in i.shapes), gather


@pytest.mark.parametrize(
    ("sampling", "spec"),
    [
        ("same", PartitionSpec(None, "fsdp", "tensor")),
        ("tensor", PartitionSpec(None, None, "tensor")),
        ("replicated", PartitionSpec(None, None, None)),
    ],
)
def test_the_layout_of_sampling(sampling, spec):
    mesh = mesh_of(1, 2, 2)
    tree = {"mlp": {"gate": {"kernel": np.ones((2, 16, 24), np.float32)}}}
    tree = jax.device_put(tree, shardings(tree, mesh))
    kernel = jax.jit(lambda t: jax.tree.map(lambda x: x * 1, sampling_layout(t, mesh, sampling)))(tree)["mlp"]["gate"][
        "kernel"
    ]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


MEMORY_OF_CALLS = """
import resource
from grpo_jax.parallel import keep_host_memory
keep_host_memory()
import jax, jax.numpy as jnp

def sorted_twice(x):
    return jnp.sort(jnp.sort(jnp.tile(x, (64, 1)) + jnp.arange(64.0)[:, None], axis=1), axis=0)[3]

shape = jax.ShapeDtypeStruct((1 << 16,), jnp.float32)
program = jax.jit(sorted_twice, donate_argnums=0).lower(shape).compile()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
x = jax.block_until_ready(jnp.arange(float(1 << 16)))
before = peak()
for _ in range(6):
    x = program(x)
jax.block_until_ready(x)
print((peak() - before) / program.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is glibc's")
def test_calls_of_a_program_share_one_block_of_temporaries():
    """Six calls, none waited for; where they overlap they took six blocks."""
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device
    command = [sys.executable, "-c", MEMORY_OF_CALLS]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.6


ARENAS = """
import ctypes, sys, threading
from grpo_jax.parallel import keep_host_memory
keep_host_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
together = threading.Barrier(2)

def take():
    together.wait()
    assert libc.malloc(1 << 16)
    together.wait()

threads = [threading.Thread(target=take) for _ in range(2)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
libc.fopen.restype = ctypes.c_void_p
told = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, told), libc.fclose(told)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is glibc's")
def test_threads_that_take_memory_do_not_share_an_arena(tmp_path):
    """With one for all, two CPU devices waited for its lock for half of a step."""
    run = subprocess.run(
        [sys.executable, "-c", ARENAS, tmp_path / "heaps.xml"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "heaps.xml").read_text().count("<heap nr=") >= 3  # the process's and one a thread
