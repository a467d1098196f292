"""Programs read as text: a stored one whose numbers are known by hand, and programs that the CPU compiler makes."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.hlo import Program, group_size, read_instruction, read_shapes, totals

# As libtpu writes it: tiled layouts, memory space 1, asynchronous pairs, a reduce-scatter as a fusion, a nested loop.
STORED = pathlib.Path(__file__).parent / "hlo" / "decode_loop.txt"


@pytest.fixture(scope="module")
def stored():
    return Program(STORED.read_text())


def test_loops_know_their_trips_or_are_asked_for(stored):
    assert [(loop.body, loop.trips) for loop in stored.loops()] == [("body", None), ("inner_body", 3)]
    assert stored.loops()[0].op_name == "jit(step)/sampling/decode/while"


def test_collectives_run_as_often_as_the_loops_around_them(stored):
    found = {one.kind: one for one in stored.collectives(lambda loop: 10)}
    assert {kind: (one.times, one.bytes, one.devices) for kind, one in found.items()} == {
        "all-gather": (10, 64 * 256 * 2, 8),
        "all-to-all": (30, 32 * 32 * 2, 2),
        "collective-permute": (1, 64 * 128 * 2, 2),
        "reduce-scatter": (1, 64 * 128 * 2, 4),
    }
    assert found["all-to-all"].loops == ("jit(step)/sampling/decode/while", "")
    assert found["all-gather"].sent == 64 * 256 * 2 * 7 / 8 and found["all-gather"].dims == (64, 256)
    assert totals(list(found.values()))["all-gather"] == (10, 10 * 64 * 256 * 2)


def test_a_pass_moves_slices_and_updates_and_not_whole_buffers(stored):
    """The cache's new column, one layer of the stack, the prefetch: memory space 1 and collectives cost nothing."""
    column, layer, prefetch, part = 8 * 1 * 2, 32 * 32 * 2, 32 * 32 * 2, 8 * 32 * 2
    assert stored.traffic("body", lambda loop: 10) == column + layer + prefetch + part


def test_what_is_written_whole_is_told_from_what_is_updated_in_place(stored):
    made = {i.name: stored.made_anew(where, i) for where, i, _, _ in stored.walk(lambda loop: 1, "body")}
    assert made["c.1"] == [] and made["prefetch"] == made["part"] == made["inner"] == []
    assert [shape.dims for shape in made["all-to-all.1"]] == [(32, 32)]


def test_shapes_and_lines_are_read():
    one = read_shapes("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, pred[], s4[3], /*index=3*/f8e4m3fn[2,2]{1,0})")
    assert [(s.dtype, s.dims, s.fast, s.bytes) for s in one] == [
        ("bf16", (8, 128), True, 2048), ("pred", (), False, 1), ("s4", (3,), False, 2), ("f8e4m3fn", (2, 2), False, 4),
    ]  # fmt: skip
    made = read_instruction('  ROOT %x.1 = f32[2]{0} add(%a, %b), metadata={op_name="f/g (h)"}')
    assert (made.name, made.opcode, made.operands, made.op_name, made.root) == (
        "x.1",
        "add",
        ("a", "b"),
        "f/g (h)",
        True,
    )
    assert read_instruction("  // nothing") is None
    with pytest.raises(ValueError, match="ENTRY"):
        Program("HloModule x")


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['a'=8,'b'=2] {'a'}", 8),
        ("replica_groups=mesh['a'=8,'b'=2] {'a','b'}", 16),
        ("source_target_pairs={{0,1}}", 2),
    ],
)
def test_group_sizes(groups, size):
    assert group_size(read_instruction(f"  %x = f32[2] all-reduce(%a), channel_id=1, {groups}, to_apply=%add")) == size


def test_a_program_that_the_cpu_compiler_makes():
    """A scan of five steps with a sum over eight devices in each, and a gather after it."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())

    def program(x, w):
        def step(x, _):
            summed = jax.lax.with_sharding_constraint(w.T @ x, whole)  # contracted over the split axis
            return jax.lax.with_sharding_constraint(jnp.tanh(x + summed[: x.shape[0]]), split), None

        return jax.lax.with_sharding_constraint(jax.lax.scan(step, x, None, length=5)[0], whole)

    given = [jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=split)]
    given.append(jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split))
    read = Program(jax.jit(program).lower(*given).compile().as_text())
    assert [loop.trips for loop in read.loops()] == [5]
    found = totals(read.collectives(lambda loop: pytest.fail("the compiler knows the trips")))
    assert found["all-reduce"] == (5, 5 * 64 * 16 * 4)
    assert found["all-gather"] == (1, 64 * 16 * 4)
