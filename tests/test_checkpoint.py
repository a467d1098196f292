"""What is restored is what was saved, bit for bit, or another checkpoint and a warning; never garbage."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.checkpoint import Checkpoints
from grpo_jax.errors import InputError


@flax.struct.dataclass
class State:
    params: dict[str, Any]
    reference: Any
    optimizer: Any
    step: jax.Array


def make_state(seed: int = 0) -> State:
    random = np.random.default_rng(seed)
    params = {
        "layers": {"query": jnp.asarray(random.normal(size=(2, 8, 4)), jnp.float32), "empty": jnp.zeros((0, 3))},
        "embedding": jnp.asarray(random.normal(size=(16, 8)), jnp.bfloat16),
    }
    return State(params, None, optax.adam(1e-3).init(params), jnp.int32(seed))


def bits(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def fill(folder: pathlib.Path, steps: tuple[int, ...], keep: int = 9) -> None:
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": step})


def test_round_trip_is_bitwise(tmp_path):
    state = make_state(3)
    state.params["embedding"] = state.params["embedding"].at[0, 0].set(jnp.nan)
    extra = {"config": {"seed": 3}, "position": 17, "best": 0.1 + 0.2, "none": None}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(state)) is None
        assert checkpoints.save(5, state, extra)
        assert checkpoints.restore(state) is not None, "a real state serves as well as an abstract one"
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract(state))
    assert restored is not None
    assert bits(restored[0]) == bits(state)
    assert jax.tree.structure(restored[0]) == jax.tree.structure(state)
    assert restored[1:] == (extra, 5)


def test_arrays_lie_under_their_paths(tmp_path):
    fill(tmp_path, (1,))
    layout = json.loads((tmp_path / "1" / "meta" / "metadata").read_text())["layout"]
    assert layout["params/embedding"] == ["bfloat16", [16, 8]]
    assert layout["params/layers/empty"] == ["float32", [0, 3]]
    assert layout["optimizer/0/mu/layers/query"] == ["float32", [2, 8, 4]]
    assert not [name for name in layout if name.startswith("reference")]


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: -x - 1, tree), donate_argnums=0)
    values = np.arange(2**20, dtype=np.float32)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state = {"x": jnp.asarray(values), "n": jnp.int32(4)}
        template = abstract(state)
        jax.block_until_ready(overwrite(jax.tree.map(jnp.copy, state)))
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        jax.tree.map(lambda x: x.delete(), state)
        restored = checkpoints.restore(template)
    assert restored is not None
    np.testing.assert_array_equal(restored[0]["x"], values)
    assert restored[0]["n"] == 4


def test_keeps_the_newest_and_the_best(tmp_path):
    scores = [0.1, 0.9, 0.3, float("nan"), 0.9, 0.2, None]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, score in enumerate(scores, start=1):
            checkpoints.save(step, make_state(step), {"score": str(score)}, score)
            if step == 3:
                checkpoints.wait()
                assert checkpoints.steps() == [2, 3]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [5, 6, 7], "the newer of two equal scores, and the two newest"
        best = checkpoints.restore_best(abstract(make_state()))
        assert best is not None
        assert (best[1], best[2]) == ({"score": "0.9"}, 5)
        assert bits(best[0]) == bits(make_state(5))
        checkpoints.save(8, make_state(8), {}, 0.5)
        checkpoints.wait()
        assert checkpoints.steps() == [5, 8], "scores of an earlier process count"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "8"]


def test_restore_best_is_none_without_scores(tmp_path):
    fill(tmp_path, (1,))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore_best(abstract(make_state())) is None


def test_a_saved_step_is_replaced_only_by_force(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.save(1, make_state(1), {})
        assert not checkpoints.save(1, make_state(2), {})
        assert bits(checkpoints.restore(make_state())[0]) == bits(make_state(1))  # pyright: ignore[reportOptionalSubscript]
        assert checkpoints.save(1, make_state(2), {}, force=True)
        assert bits(checkpoints.restore(make_state())[0]) == bits(make_state(2))  # pyright: ignore[reportOptionalSubscript]


def truncate(folder: pathlib.Path) -> None:
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-7])


def garble(folder: pathlib.Path) -> None:
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose(folder: pathlib.Path) -> None:
    largest_file(folder).unlink()


def lose_items(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "state")
    shutil.rmtree(folder / "meta")


def garble_manifest(folder: pathlib.Path) -> None:
    (folder / "manifest.json").write_bytes(b"\x00\xff")


def truncate_without_manifest(folder: pathlib.Path) -> None:
    truncate(folder)
    (folder / "manifest.json").unlink()


def meta_without_manifest(folder: pathlib.Path) -> None:
    (folder / "meta" / "metadata").write_text('{"extra": {')
    (folder / "manifest.json").unlink()


def empty(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [truncate, garble, lose, lose_items, garble_manifest, truncate_without_manifest, meta_without_manifest, empty]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, damage):
    fill(tmp_path, (1, 2))
    damage(tmp_path / "2")
    warnings = []
    with Checkpoints(tmp_path, keep=2, warn=warnings.append) as checkpoints:
        restored = checkpoints.restore(abstract(make_state()))
        assert restored is not None
        assert bits(restored[0]) == bits(make_state(1))
        assert restored[1:] == ({"position": 1}, 1)
        assert len(warnings) == 1
        assert f"{tmp_path / '2'} is damaged" in warnings[0]
        assert "step 1 is used" in warnings[0]
        checkpoints.save(2, make_state(2), {"position": 2})
    with Checkpoints(tmp_path, keep=2, warn=warnings.append) as checkpoints:
        again = checkpoints.restore(abstract(make_state()))
    assert again is not None
    assert again[2] == 2
    assert len(warnings) == 1
    assert (tmp_path / "damaged" / "2").is_dir(), "nothing of the user's is deleted"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_all_damaged_is_an_error_each_time(tmp_path, damage):
    fill(tmp_path, (1, 2))
    damage(tmp_path / "1")
    damage(tmp_path / "2")
    for _ in range(2):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            with pytest.raises(InputError, match="every checkpoint is damaged") as error:
                checkpoints.restore(abstract(make_state()))
        assert str(tmp_path) in str(error.value)


def test_without_manifest_a_sound_checkpoint_is_used(tmp_path):
    fill(tmp_path, (1, 2))
    (tmp_path / "2" / "manifest.json").unlink()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract(make_state()))
    assert restored is not None
    assert bits(restored[0]) == bits(make_state(2))


def test_another_model_is_an_error_and_no_damage(tmp_path):
    fill(tmp_path, (1, 2))
    other = make_state()
    other.params["embedding"] = jnp.zeros((16, 9), jnp.bfloat16)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(InputError, match=r"params/embedding is bfloat16\[16, 8\] .* bfloat16\[16, 9\] in this run"):
            checkpoints.restore(other)
        with pytest.raises(InputError, match=r"reference is absent in the checkpoint and float32\[\] in this run"):
            checkpoints.restore(dataclasses.replace(make_state(), reference=jnp.zeros(())))
        assert checkpoints.steps() == [1, 2]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    fill(tmp_path, (1,))
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract(make_state()))
        assert restored is not None
        assert restored[2] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


SAVE_SHARDED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from grpo_jax.checkpoint import Checkpoints
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
w = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
w = jax.device_put(w, NamedSharding(mesh, P("data", "tensor")))
b = jax.device_put(np.arange(6, dtype=np.int32), NamedSharding(mesh, P()))
replace = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    checkpoints.save(1, {"w": w, "b": b}, {"devices": len(jax.devices())})
    jax.block_until_ready(replace({"w": w, "b": b}))
"""


def test_sharded_state_comes_back_on_other_device_counts(tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", SAVE_SHARDED, str(tmp_path)], env=environment, check=True)
    values = {"w": np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32), "b": np.arange(6, dtype=np.int32)}
    for shape in ((2, 2), (1, 2), (1, 1), (4, 2)):
        devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
        mesh = jax.sharding.Mesh(devices, ("data", "tensor"))
        shardings = {
            "w": NamedSharding(mesh, PartitionSpec("data", "tensor")),
            "b": NamedSharding(mesh, PartitionSpec()),
        }
        template = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings[k]) for k, v in values.items()}
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            restored = checkpoints.restore(template)
        assert restored is not None
        assert restored[1:] == ({"devices": 4}, 1)
        for name, value in values.items():
            assert restored[0][name].sharding == shardings[name]
            np.testing.assert_array_equal(restored[0][name], value)


SAVE_FOREVER = """
import sys, jax.numpy as jnp
from grpo_jax.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    for step in range(1, 10_000):
        checkpoints.save(step, {"x": jnp.full(300_000, float(step)), "step": jnp.int32(step)}, {"step": step})
        print(step, flush=True)
"""


def test_killed_while_saving_leaves_a_sound_checkpoint(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    template = {"x": jax.ShapeDtypeStruct((300_000,), jnp.float32, sharding=None)}
    template["step"] = jax.ShapeDtypeStruct((), jnp.int32, sharding=None)
    warnings = []
    for attempt, delay in enumerate((0.0, 0.004)):
        folder = tmp_path / str(attempt)
        command = [sys.executable, "-c", SAVE_FOREVER, str(folder)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while process.stdout.readline() != "4\n":  # save 4 has begun, so save 3 is committed
                pass
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        with Checkpoints(folder, keep=2, warn=warnings.append) as checkpoints:
            restored = checkpoints.restore(template)
            assert restored is not None
            state, extra, step = restored
            checkpoints.save(step + 1, state, extra)  # waits until what the killed save left behind is removed
        assert step >= 3
        assert extra == {"step": step}
        assert int(state["step"]) == step
        np.testing.assert_array_equal(state["x"], np.full(300_000, step, np.float32))
        assert all(p.name.isdigit() for p in folder.iterdir()), "temporaries are gone"
    assert warnings == []
