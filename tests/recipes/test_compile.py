"""Compiled for machines that are not there: `plan` by formula, `compile` by the machine's own compiler.

What libtpu compiles is slow here; `pytest -m slow tests/recipes/test_compile.py` runs all of it.
"""

import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
import tiny

from grpo_jax import cli
from grpo_jax.batches import pack_shape
from grpo_jax.chips import CHIPS, GIB, parse_topology
from grpo_jax.errors import InputError
from grpo_jax.hlo import Instruction
from grpo_jax.hlo import Program as Read
from grpo_jax.models.abstract import abstract_params, architecture_of, with_model
from grpo_jax.models.lora import abstract_variables, split_variables
from grpo_jax.models.presets import count, forward_flops, preset
from grpo_jax.parallel import make_mesh
from grpo_jax.recipes import compile as compiling
from grpo_jax.recipes.plan import Sizes, cache_bytes, describe_plan, held, plan, plan_work, suggestions
from grpo_jax.recipes.shapes import abstract_step
from grpo_jax.step import init_state

SHAPE = {
    "base.layers": 1, "base.width": 64, "base.heads": 4, "base.kv_heads": 4, "base.mlp_width": 128,
    "base.vocabulary": 512, "data.max_prompt_length": 16, "data.prompts_per_step": 8, "sampler.group_size": 4,
    "sampler.max_new_tokens": 12, "rewards.names": ("answer_format",), "rewards.weights": (1.0,),
    "base.sft.batch_size": 8, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "objective.beta": 0.01,
}  # fmt: skip


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'grpo-jax[aot]'")


@pytest.fixture(scope="module")
def on_cpu():
    """(step, program's text, memory) of SHAPE, compiled for eight CPU devices."""
    config = tiny.config(**SHAPE)
    step = abstract_step(config, make_mesh(config.mesh), architecture_of(config))
    compiled = step.lower().compile()
    return step, compiled.as_text(), compiled.memory_analysis()


def test_the_abstract_state_is_the_state_of_a_run():
    for options in ({"objective.beta": 0.1}, {"lora.rank": 4, "lora.base_dtype": "int8"}):
        config = tiny.config(**options)
        sizes = architecture_of(tiny.config(**SHAPE))
        mesh = make_mesh(dataclasses.replace(config.mesh, data=1), jax.devices()[:1])
        step = abstract_step(config, mesh, sizes)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(sizes))
        trainable, frozen = split_variables(jax.device_get(params), config.lora, config.seed)
        made = init_state(step.parts, trainable, frozen, bool(config.lora.rank))
        told = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), step.state)
        assert told == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), made)
        assert jax.tree.structure(abstract_variables(params, config.lora)) == jax.tree.structure((trainable, frozen))


def test_a_report_reads_the_program(on_cpu):
    step, text, memory = on_cpu
    config, architecture, topology = step.parts.config, step.parts.module.architecture, parse_topology("v5e:8")
    report = compiling.read_report(step, architecture, topology, memory, text, (1.0, 2.0))
    sizes = Sizes(2, 2, 2)
    assert report.arguments == memory.argument_size_in_bytes
    assert report.arguments == pytest.approx(held(step.state, sizes), rel=0.02)  # prompts and answers besides
    by_formula = plan(config, architecture, topology).memory
    assert by_formula.arguments == pytest.approx(report.arguments, rel=0.02) and by_formula.cache == report.cache
    assert report.unknown_loops == () and report.fits and report.seconds == 2.0
    # The cache by formula is what the decode loop carries: [N, K, E, P] + [N, K, P, E] and the same of rows, float32.
    rows, heads, size = 32 / 4, 4 / 2, 64 / 4
    layer = 2 * 4 * heads * size * (2 * 16 + rows * 12)
    assert report.cache == pytest.approx(layer, rel=0.2)  # places and segments besides
    assert report.collectives and all(runs > 0 and size > 0 for runs, size in report.collectives.values())
    assert report.decode is not None and report.decode.collectives > 0 and report.decode.moved > report.decode.least / 2
    assert report.sampling.flops == pytest.approx(report.work.sampling / 8)
    assert report.sampling.seconds >= report.sampling.memory_seconds > 0
    said = "\n".join(compiling.lines(report, config, architecture, topology))
    assert "fits with 15." in said and "a decode pass:" in said and "roofline of a step" in said
    assert json.loads(json.dumps(compiling.as_json(report)))["fits"] is True


def test_loops_that_end_by_the_data_turn_as_often_as_full_completions_take(on_cpu):
    step, text, _ = on_cpu
    config = step.parts.config
    work = plan_work(config, step.parts.module.architecture, Sizes(2, 2, 2), step.params)
    read, trips = Read(text), compiling.trip_counts(config, work)
    named = {compiling.named(loop): trips(loop) for loop in read.loops() if compiling.named(loop)}
    assert named == {"decode": 11, "packs": 2, "moments": 1} and work.passes == 11
    slotted = tiny.config(**SHAPE | {"sampler.slots": 8})
    work = plan_work(slotted, step.parts.module.architecture, Sizes(2, 2, 2), step.params)
    assert work.passes == 4 * 12  # 32 completions in 8 slots


def test_a_gradient_pass_computes_the_rows_of_its_own_device(on_cpu):
    """Left alone, XLA splits hidden states by width and each device computes a part of all rows."""
    step, text, _ = on_cpu
    shape = pack_shape(step.parts.config, 4)
    tokens = shape.rows * 12 + shape.prompts * 16 if shape.shared else shape.rows * 28
    made = [i for i in in_packs(text) if "/mlp/" in i.op_name and "Decoder" in i.op_name and "logits" not in i.op_name]
    largest = max(math.prod(x.dims) for i in made for x in i.shapes)
    assert largest == max(tokens * 128 / 2, 64 * 128 / 2), (largest, tokens)


def in_packs(text: str) -> list[Instruction]:
    """The instructions of the loops over packs."""
    read = Read(text)
    loops = [loop for loop in read.loops() if compiling.named(loop) == "packs"]
    return [i for loop in loops for _, i, _, _ in read.walk(lambda loop: 1, loop.body)]


def test_a_weight_gathered_in_the_loop_is_seen(on_cpu):
    """The detector itself: a gather of a layer's matrix over fsdp, and a float32 one read, put into the loop."""
    step, text, _ = on_cpu
    whole, part = compiling.weight_shapes(step)
    assert compiling.key((64, 64)) in whole
    assert compiling.key((32, 32)) in part
    loop = next(loop for loop in Read(text).loops() if compiling.named(loop) == "decode")
    header = next(line for line in text.splitlines() if line.startswith(f"%{loop.body} "))
    gather = "  %g = f32[64,64]{1,0} all-gather(%h), channel_id=999, replica_groups=[4,2]<=[8], dimensions={0}"
    broken = text.replace(header, f"{header}\n  %h = f32[32,64]{{1,0}} constant(0)\n{gather}\n")
    work = plan_work(step.parts.config, step.parts.module.architecture, Sizes(2, 2, 2), step.params)
    trips = compiling.trip_counts(step.parts.config, work)
    before, after = (
        compiling.decode_pass(Read(t), trips, step, step.parts.module.architecture) for t in (text, broken)
    )
    assert after.gathered == before.gathered + 64 * 64 * 4
    assert after.collectives == before.collectives + 1


def test_flops_by_formula_are_those_of_the_presets():
    """A forward pass of one model counted two ways: from its parameter tree, and from the fields of its config.json."""
    for name in ("Qwen2.5-0.5B", "Llama-3-8B", "Qwen3-30B-A3B"):
        config = tiny.config(**{"data.max_prompt_length": 1, "sampler.max_new_tokens": 1000, "mesh.data": 1})
        sizes = architecture_of(with_model(config, name))
        work = plan_work(config, sizes, Sizes(1, 1, 1), abstract_params(sizes))
        tokens = config.completions * 999
        assert work.decode == pytest.approx(tokens * forward_flops(count(preset(name).fields), 501), rel=0.01)


def test_models_are_named_without_weights():
    config = tiny.config(**{"model.path": "Qwen/Qwen2.5-0.5B-Instruct"})
    assert architecture_of(config) == architecture_of(with_model(tiny.config(), "qwen2.5-0.5b"))
    assert architecture_of(tiny.config(**{"base.layers": 3})).layers == 3
    with pytest.raises(InputError, match="did you mean"):
        architecture_of(with_model(config, "Qwen2.5-0.6B"))


def test_reward_models_are_refused_by_name():
    config = tiny.config(
        **SHAPE | {"rewards.names": ("helpful",), "rewards.weights": (1.0,), "rewards.helpful.path": "x"}
    )
    with pytest.raises(InputError, match="'helpful', a model whose files would be read"):
        abstract_step(config, make_mesh(config.mesh), architecture_of(config))


def big(**fields):
    """Qwen2.5-7B on eight chips, bfloat16."""
    return tiny.config(
        **{
            "data.max_prompt_length": 256, "data.prompts_per_step": 8, "sampler.group_size": 8,
            "sampler.max_new_tokens": 512, "model.compute_dtype": "bfloat16", "sampler.cache_dtype": "bfloat16",
            "mesh.data": 1, "mesh.fsdp": 8, "objective.beta": 0.01, "rewards.names": ("format",),
            "rewards.weights": (1.0,), **fields,
        }
    )  # fmt: skip


def test_a_plan_adds_up_by_hand():
    config, topology = big(), parse_topology("v5p:8")
    sizes = architecture_of(with_model(config, "Qwen2.5-7B"))
    memory = plan(config, sizes, topology).memory
    total = 7_615_616_512
    assert memory.masters == memory.reference == pytest.approx(4 * total / 8, rel=0.01)
    assert memory.optimizer == pytest.approx(2 * memory.masters, rel=0.01)
    assert memory.sampling_weights == pytest.approx(2 * total / 8, rel=0.01)
    by_token = 28 * 2 * 4 * 128 * 2  # layers, keys and values, heads, head size, bytes
    assert memory.cache == pytest.approx(by_token * (256 + 8 * 512), rel=0.01)  # a prompt and eight rows a device
    assert cache_bytes(config, sizes, Sizes(1, 2, 4)) == pytest.approx(memory.cache, rel=0.01)  # 4 heads over tensor
    assert memory.total == memory.arguments + max(memory.sampling, memory.training)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("objective.beta", 0.0, "reference"),
        ("sampler.cache_dtype", "float32", "cache"),
        ("model.remat", "full", "kept"),
        ("model.logits_chunk", 64, "logits"),
        ("model.compute_dtype", "float32", "sampling_weights"),
        ("optim.moment_dtype", "bfloat16", "optimizer"),
        ("optim.name", "adafactor", "optimizer"),
        ("lora.rank", 8, "gradient"),
        ("mesh.sampling", "replicated", "sampling_weights"),
        ("sampler.slots", 16, "cache"),
    ],
)
def test_each_option_changes_its_part_of_the_plan(field, value, part):
    sizes, topology = architecture_of(with_model(tiny.config(), "Qwen2.5-0.5B")), parse_topology("v5e:8")
    before, after = (plan(big(**given), sizes, topology).memory for given in ({}, {field: value}))
    assert getattr(before, part) != getattr(after, part)


def test_the_three_changes_that_help_most_are_said():
    config, topology = big(**{"model.compute_dtype": "float32"}), parse_topology("v5e:8")
    sizes = architecture_of(with_model(config, "Qwen2.5-7B"))
    said = suggestions(config, sizes, topology)
    assert len(said) == 3 and all("saves" in line and "GiB a device" in line for line in said)
    saved = [float(line.split("saves ")[1].split(" GiB")[0]) for line in said]
    assert saved == sorted(saved, reverse=True) and saved[-1] > 1
    assert "does not fit by" in "\n".join(describe_plan(plan(config, sizes, topology), config, topology))


def test_the_commands(capsys):
    """Exit codes: 0 fits, 1 does not, 2 bad input."""
    given = ["--config", "gsm8k", "--model", "Qwen2.5-0.5B", "--config.mesh.fsdp=8", "--config.mesh.data=1"]
    given += ["--config.model.compute_dtype=bfloat16"]
    assert cli.main(["plan", *given, "--devices", "v5p:8"]) == 0
    said = capsys.readouterr().out
    assert "v5p:2x2x2: 8 chips, 128 completions" in said and "fits with" in said and "roofline:" in said
    assert cli.main(["plan", *given[:2], "--model", "Llama-3-70B", *given[4:], "--devices", "v5e:8"]) == 1
    assert "does not fit by" in capsys.readouterr().out
    assert cli.main(["plan", *given, "--devices", "v5e:4"]) == 2
    assert "is not the 4 devices" in capsys.readouterr().err
    assert cli.main(["plan", "--config", "gsm8k"]) == 2
    assert "add --devices" in capsys.readouterr().err
    assert cli.main(["compile", "--topology", "v7:8"]) == 2
    assert "no such chip 'v7'" in capsys.readouterr().err


REFUSAL = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.

Total hbm usage >= 21.00G:
    reserved        258.00M
    program          16.50G
    arguments         4.00G
"""  # noqa: E501


class Unreadable:
    """A compiled step of operations that this jaxlib does not know, as libtpu 0.0.52 makes for v5p and v6e."""

    def lower(self):
        return self

    compile = lower

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update should have 1 operands\nat ..")


def test_a_program_that_cannot_be_read_names_the_compiler_to_install(monkeypatch, on_cpu):
    config, architecture = on_cpu[0].parts.config, on_cpu[0].parts.module.architecture
    monkeypatch.setattr(compiling, "devices", lambda topology: jax.devices())
    monkeypatch.setattr(compiling, "topology_mesh", lambda mesh, topology, found: make_mesh(mesh, found))
    monkeypatch.setattr(compiling, "abstract_step", lambda *given: Unreadable())
    kept = jax.config.jax_compilation_cache_dir
    try:
        with pytest.raises(InputError, match=r"pip install 'jax\[tpu\]==.*async-update should have 1 operands\)$"):
            compiling.compile_step(config, architecture, parse_topology("v5p:8"))
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)


def test_a_refused_program_says_by_how_much(on_cpu):
    step = on_cpu[0]
    config, architecture, topology = step.parts.config, step.parts.module.architecture, parse_topology("v5e:8")
    report = compiling.refused(step, architecture, topology, REFUSAL, (1.0, 2.0))
    assert not report.fits and (report.arguments, report.total) == (4 * GIB, 20.5 * GIB)
    assert report.capacity == CHIPS["v5e"].memory
    said = "\n".join(compiling.lines(report, config, architecture, topology))
    assert "does not fit by 4.75 GiB: 20.50 of 15.75 GiB" in said and "what would help most" in said
