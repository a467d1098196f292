"""What libtpu and XLA's GPU compiler make of the step, and the formulas of `plan` against it.

Each compile runs in a process of its own, as `grpo-jax compile` does: jax reads its environment when it is imported.
"""

import importlib.util
import json
import re

import pytest


def options(fields: dict) -> list[str]:
    return [f"--config.{name}={value}" for name, value in fields.items()]


BASE = {
    "data.max_prompt_length": 128, "data.prompts_per_step": 8, "sampler.group_size": 8, "sampler.max_new_tokens": 128,
    "model.compute_dtype": "bfloat16", "sampler.cache_dtype": "bfloat16", "model.matmul_precision": "default",
    "model.remat": "full", "model.logits_chunk": 512, "objective.beta": 0.01, "rewards.names": "('format',)",
    "rewards.weights": "(1.0,)", "mesh.data": 1, "mesh.fsdp": 4, "mesh.sampling": "tensor", "base.layers": 2,
    "base.width": 2048, "base.heads": 16, "base.kv_heads": 4, "base.mlp_width": 8192, "base.vocabulary": 32000,
    "base.sft.batch_size": 8, "train.share_prefix": False, "model.attention": "xla",
}  # fmt: skip

WIDE = {
    "base.layers": 1, "base.width": 8192, "base.heads": 64, "base.kv_heads": 8, "base.mlp_width": 32768,
    "mesh.data": 4, "mesh.fsdp": 1,
}  # fmt: skip
# Of the widths of Qwen2.5-1.5B.
QWEN_1_5B = {
    "base.layers": 2, "base.width": 1536, "base.heads": 12, "base.kv_heads": 2, "base.mlp_width": 8960,
    "base.vocabulary": 151936, "base.tied": True, "base.sft.batch_size": 64,
}  # fmt: skip
SCALE = ["--config", "scale", "--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.model.attention=xla"]

# Ten configs, each far from the others in something that a formula must know: (machine, options).
CONFIGS = {
    "plain": ("v5e:2x2", options(BASE)),
    "1.5B, 2 layers": ("v5e:8", [*SCALE, *options(QWEN_1_5B)]),
    "0.5B": ("h100:8", [*SCALE, "--model", "Qwen2.5-0.5B"]),
    "1.5B": ("v5e:8", [*SCALE, "--model", "Qwen2.5-1.5B"]),
    "plain, 4 layers": ("h100:4", options(BASE | {"base.layers": 4})),
    "tensor": ("h100:4", options(BASE | {"mesh.fsdp": 2, "mesh.tensor": 2})),
    "shared prefixes": ("h100:4", options(BASE | {"train.share_prefix": True})),
    "whole logits": ("h100:4", options(BASE | {"model.logits_chunk": 0, "base.vocabulary": 64000})),
    "no rematerialisation": ("h100:4", options(BASE | {"model.remat": "none"})),
    "wide, copied": ("h100:4", options(BASE | WIDE)),
}


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'grpo-jax[aot]' or 'grpo-jax[aot-cuda12]'")


def report_of(run_cli, topology: str, given: list[str]) -> dict:
    needs("jax_cuda12_plugin" if topology.startswith("h100") else "libtpu")
    run = run_cli("compile", "--json", "--topology", topology, *given, timeout=3000)
    assert run.stdout, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def compiled(run_cli, topology: str, **fields) -> dict:
    return report_of(run_cli, topology, options(BASE | fields))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_is_within_15_percent_of_the_compiler(run_cli, name):
    topology, given = CONFIGS[name]
    report = report_of(run_cli, topology, given)
    said = run_cli("plan", "--devices", topology, *given)
    line = next(line for line in said.stdout.splitlines() if "GiB a device" in line and " of " in line)
    total = float(line.split(": ")[1].split(" of ")[0]) * 2**30
    assert total == pytest.approx(report["total"], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["splash", "xla"])
def test_training_attends_by_splash_attention(run_cli, tmp_path, attention):
    """Three kernels, forward and backward, and no scores or masks of whole rows: over rows and heads on four chips."""
    needs("libtpu")
    fields = {"mesh.fsdp": 2, "mesh.tensor": 2, "base.layers": 2, "base.width": 1024, "model.attention": attention}
    report_of(run_cli, "v5e:2x2", ["--hlo", "program.txt", *options(BASE | fields)])
    program = (tmp_path / "program.txt").read_text()
    kernels = set(re.findall(r"splash_mha_(fwd|dq|dkv)_segmented", program))
    # Prompt and completion are 256 columns; XLA fuses scores with their masks, which alone keep that shape.
    squares = re.findall(r"(?:f32|bf16|pred)\[(?:\d+,)+256,256\]", program)
    assert "tpu_custom_call" in program or attention == "xla"
    assert (kernels == {"fwd", "dq", "dkv"}) == (attention == "splash") == (not squares)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["same", "tensor", "replicated"])
def test_weights_are_never_gathered_in_the_decode_loop(run_cli, sampling):
    fields = {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.sampling": sampling, "base.layers": 2}
    decode = compiled(run_cli, "v5e:2x2", **fields)["decode"]
    assert decode["gathered"] == 0 and decode["wide_weights"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "entries"), [("1.5B, 2 layers", 0), ("1.5B", 1)])
def test_the_decode_loop_of_a_small_model_on_eight_chips(run_cli, name, entries):
    """No weight gathered, no float32 weight; bytes a pass within 1.3 of weights and cache.

    And no cache copied: of the 28 layers' keys and values (56 entries) libtpu copies one.
    """
    report = report_of(run_cli, *CONFIGS[name])
    decode = report["decode"]
    assert decode["gathered"] == decode["wide_weights"] == 0 and decode["copied"] <= entries * report["cache"] / 56
    assert decode["collectives"] == 1  # whether all rows have ended
    assert decode["moved"] < 1.3 * decode["least"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:4", "v5p:4", "v6e:4", "2*v5e:2x2"])
def test_other_chips_and_several_slices_compile(run_cli, topology):
    fields = {"base.layers": 1, "base.width": 512, "base.mlp_width": 1024, "base.heads": 4}
    fields |= {"mesh.data": 2, "mesh.fsdp": -1} if "*" in topology else {}
    report = compiled(run_cli, topology, **fields)
    assert report["fits"] and report["collectives"]


@pytest.mark.slow
def test_gpus_compile_without_one(run_cli):
    fields = {"base.layers": 1, "base.width": 512, "base.mlp_width": 1024, "base.heads": 4, "mesh.fsdp": 8}
    report = compiled(run_cli, "h100:8", **fields)
    assert report["fits"] and report["collectives"]["all-gather"][0] > 0


@pytest.mark.slow
def test_a_model_too_large_is_refused_with_advice(run_cli):
    needs("libtpu")
    run = run_cli("compile", "--topology", "v5e:2x2", *options(BASE | WIDE), timeout=3000)
    assert run.returncode == 1 and "does not fit by" in run.stdout
    assert run.stdout.split("what would help most")[1].count("saves") == 3
