"""Counts are exact, divisions happen once, and a killed run leaves files that can be read and continued."""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from grpo_jax import metrics
from grpo_jax.config import LogConfig
from grpo_jax.errors import InputError

QUIET = LogConfig(tensorboard=False)


def test_fetcher_counts_and_returns_numpy():
    fetch = metrics.Fetcher()
    tree = fetch({"a": jnp.arange(3), "b": (jnp.float32(2.5), None)})
    fetch(jnp.ones(()))
    assert fetch.count == 2
    assert isinstance(tree["a"], np.ndarray)
    assert tree["b"][0] == 2.5
    assert tree["b"][1] is None


def test_merged_parts_divide_to_the_mean_of_the_whole():
    values = np.random.default_rng(0).normal(size=17).astype(np.float32)
    parts = [{"x": (jnp.sum(jnp.asarray(p)), len(p))} for p in np.split(values, [2, 9])]
    whole = metrics.merge(metrics.merge(parts[0], parts[1]), parts[2])
    np.testing.assert_allclose(metrics.divide(jax.device_get(whole))["x"], values.mean(), rtol=1e-6)


def test_merge_keeps_what_one_side_lacks_and_divide_leaves_out_empty_counts():
    merged = metrics.merge({"a": (1.0, 2), "empty": (0.0, 0)}, {"b": (3.0, 4)})
    assert metrics.divide(merged) == {"a": 0.5, "b": 0.75}


def test_merge_works_inside_a_program():
    add = jax.jit(metrics.merge)
    assert metrics.divide(jax.device_get(add({"x": (1.0, 2.0)}, {"x": (5.0, 1.0)}))) == {"x": 2.0}


def test_compile_counter_counts_each_program_once():
    def double(x):
        return x * 2

    program = jax.jit(double)
    row, longer = jnp.ones(3), jnp.ones(4)
    with metrics.CompileCounter() as counter:
        program(row)
        program(row)
        assert (counter.compiles, counter.traces["double"]) == (1, 1)
        program(longer)
        assert counter.programs["jit(double)"] == 2
    compiles, seconds = counter.compiles, counter.seconds
    program(jnp.ones(5))
    assert compiles == 2
    assert seconds > 0
    assert (counter.compiles, counter.seconds) == (compiles, seconds), "it must not listen after it is left"


def test_compile_counter_tells_cache_hits_apart(tmp_path):
    options = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    x = jnp.ones((3, 3))

    def hits() -> tuple[int, int]:
        with metrics.CompileCounter() as counter:
            jax.jit(lambda x: jnp.sin(x) @ x + 0.125)(x)
        return counter.compiles, counter.cache_hits

    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        assert [hits(), hits()] == [(1, 0), (1, 1)]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_metrics_line_is_exact_sorted_and_finite(tmp_path):
    value = float(np.float32(0.1))
    with metrics.RunWriter(tmp_path, QUIET) as writer:
        writer.step(1, {"b": np.float32(0.1), "a": 3, "nan": float("nan"), "inf": np.inf, "array": np.float64(1 / 3)})
        text = (tmp_path / "metrics.jsonl").read_text()
    assert list(json.loads(text)) == ["step", "a", "array", "b", "inf", "nan"]
    assert json.loads(text) == {"step": 1, "a": 3, "array": 1 / 3, "b": value, "inf": None, "nan": None}
    assert "NaN" not in text and "Infinity" not in text


def test_a_line_is_on_disk_when_step_returns(tmp_path):
    with metrics.RunWriter(tmp_path, QUIET) as writer:
        writer.step(1, {"x": 1.0})
        writer.samples(1, [{"completion": "5\u2028six\n"}])
        assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "x": 1.0}]
        assert metrics.read_jsonl(tmp_path / "samples.jsonl") == [{"step": 1, "completion": "5\u2028six\n"}]


def write_steps(folder: pathlib.Path, steps: range, resume_step: int | None) -> None:
    with metrics.RunWriter(folder, QUIET, resume_step) as writer:
        for step in steps:
            writer.step(step, {"x": step / 7})
            writer.samples(step, [{"completion": f"{step}, {row}"} for row in range(2)])


@pytest.mark.parametrize("torn", ["", '{"step": 6, "x": 0.', '{"step": 6, "completion": "é'])
def test_resumed_files_equal_uninterrupted_ones(tmp_path, torn):
    write_steps(tmp_path / "whole", range(1, 9), None)
    write_steps(tmp_path / "killed", range(1, 6), None)
    names = ("metrics.jsonl", "samples.jsonl")
    for name in names:
        with open(tmp_path / "killed" / name, "ab") as file:
            file.write(torn.encode()[:-1])
    write_steps(tmp_path / "killed", range(4, 9), 3)
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(names), "no temporary is left"


def test_a_new_run_starts_with_empty_files(tmp_path):
    write_steps(tmp_path, range(1, 4), None)
    write_steps(tmp_path, range(1, 2), None)
    assert [row["step"] for row in metrics.read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def test_only_the_last_line_may_be_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "x"')
    assert metrics.read_jsonl(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2, "x"\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is not JSON"):
        metrics.read_jsonl(path)
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(InputError, match="line 2 is list"):
        metrics.read_jsonl(path)


def test_tensorboard_holds_the_finite_values(tmp_path):
    from tensorboardX.proto import event_pb2

    with metrics.RunWriter(tmp_path, LogConfig(tensorboard=True)) as writer:
        writer.step(7, {"reward/total": 0.25, "kl": float("nan")})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, seen, at = path.read_bytes(), {}, 0
    while at < len(data):  # records: length (8 bytes), its checksum (4), event, checksum (4)
        size = int.from_bytes(data[at : at + 8], "little")
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])  # pyright: ignore[reportAttributeAccessIssue]
        seen |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        at += size + 16
    assert seen == {"reward/total": (7, 0.25)}


def test_tensorboard_off_writes_no_events(tmp_path):
    write_steps(tmp_path, range(1, 2), None)
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_offline_writes_a_run_without_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is optional: pip install 'grpo-jax[wandb]'")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    config = LogConfig(tensorboard=False, wandb="offline", wandb_project="sums")
    with metrics.RunWriter(tmp_path / "run", config, run_config={"seed": 3}) as writer:
        writer.step(1, {"reward/total": 0.5})
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    # wandb's own process may write the file a moment after its finish() has returned.
    while b"reward/total" not in path.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    content = path.read_bytes()
    assert b"reward/total" in content
    assert b"sums" in content
    assert b"seed" in content


def test_wandb_missing_is_one_line_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"log\.wandb='online'.*pip install 'grpo-jax\[wandb\]'"):
        metrics.RunWriter(tmp_path / "run", LogConfig(wandb="online"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "nothing is written before the error"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    metrics.write_json_atomic(path, {"before": {"pass@1": np.float32(0.5)}, "bad": float("inf"), "ci": (0.1, 0.2)})
    assert json.loads(path.read_text()) == {"before": {"pass@1": 0.5}, "bad": None, "ci": [0.1, 0.2]}
    with pytest.raises(TypeError):
        metrics.write_json_atomic(path, {"x": object()})
    assert json.loads(path.read_text())["before"] == {"pass@1": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
