"""Every field of the config is flipped here by a test that sees the change, against an oracle or a stated direction.

`FIELD_TESTS` maps each field to the test that flips it; a field without one fails the last test.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import types

import bigram
import flax.linen as nn
import jax
import jax.numpy as jnp
import loss_oracle
import numpy as np
import numpy_gae
import optax
import pytest
import tiny

from grpo_jax import cli, metrics, processes
from grpo_jax.batches import join, make_packs, pack_shape, split, training_batch
from grpo_jax.config import (
    REMAT_POLICIES,
    CodeConfig,
    Config,
    JudgeConfig,
    LogConfig,
    OptimConfig,
    field_names,
    parse_duration,
    value_of,
)
from grpo_jax.data import general
from grpo_jax.data.arithmetic import worked_sums
from grpo_jax.data.mixture import build_mixture, load_all_rows
from grpo_jax.data.prompts import make_batch
from grpo_jax.errors import InputError
from grpo_jax.metrics import CompileCounter, Fetcher, RunWriter
from grpo_jax.models.build import build_decoder, layers_in_a_row
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.heads import save_head
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import LoadedModel, load_model, parameter_table
from grpo_jax.models.value import TEACHER
from grpo_jax.ops.advantages import advantages
from grpo_jax.ops.corrections import correction_weights
from grpo_jax.ops.objectives import denominators, policy_loss
from grpo_jax.ops.preference import dpo_losses
from grpo_jax.optimizer import make_optimizer, make_schedule, move_routing_biases, split_routing_biases
from grpo_jax.parallel import cores_for_rows, make_mesh, row_sharding, shardings
from grpo_jax.recipes import base, cold_start, dpo, grpo, loop, reward_model, sft, supervised, tasks
from grpo_jax.recipes.evaluate import Evaluator
from grpo_jax.recipes.grpo import Recorder, Session, initial_state, prepare, read_rows, sample_rows, with_end_tokens
from grpo_jax.recipes.loop import Stop
from grpo_jax.recipes.mesh import with_mesh
from grpo_jax.rewards import code, judge
from grpo_jax.rewards.reward_model import COLLECTION
from grpo_jax.rewards.sandbox import Limits, Outcome
from grpo_jax.rewards.verifiers import verifier
from grpo_jax.sampler.draw import draw_tokens
from grpo_jax.sampler.stops import stop_table
from grpo_jax.sampler.types import Rollout, Scores
from grpo_jax.step import (
    Metrics,
    Program,
    add_advantages,
    add_gae,
    completion_logps,
    completion_values,
    init_state,
    micro_loss,
    refresh_reference,
    sample_rollout,
    sampling_variables,
    state_layout,
    update,
    with_teacher,
)
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, train_sentencepiece

FIELD_TESTS: dict[str, object] = {}


def flips(*names):
    """Registers a test as the one that flips these fields; several are parameters of the test, called `name`."""

    def register(test):
        for name in names:
            assert name not in FIELD_TESTS, name
            FIELD_TESTS[name] = test
        return pytest.mark.parametrize("name", names)(test) if len(names) > 1 else test

    return register


# What the tests stand on.

ROWS = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 6) for b in range(1, 5)]
TEXTS = [*(r["question"] + r["answer"] for r in ROWS), "think aloud, user asks:\n!"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoadedModel:
    """A tiny model with a tokenizer of its own, read from a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    path = str(folder / "tokenizer.model")
    template = pathlib.Path(grpo.__file__).parents[1] / "templates" / "r1_zero.jinja"
    train_sentencepiece([*TEXTS, template.read_text()], 120, ("<answer>", "</answer>"), path)
    tokenizer = Tokenizer.from_sentencepiece(path)
    architecture = tiny.architecture(vocabulary=tokenizer.vocabulary)
    write_folder(str(folder / "tiny"), architecture, tiny.params(architecture), tokenizer)
    return load_model(str(folder / "tiny"))


@pytest.fixture
def rows_file(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def rows_of(config: Config) -> dict[str, list[dict]]:
    return {split: read_rows(config, split, ROWS) for split in ("train", "eval")}


def prepared(model: LoadedModel, mesh_devices: int = 1, rewards=None, **fields):
    """(parts, prompts, evaluator) of a run on ROWS; nothing is compiled."""
    given = {"rewards.names": ("answer",), "rewards.weights": (1.0,), "data.max_prompt_length": 8}
    config = tiny.config(**{**given, **fields})
    mesh = make_mesh(config.mesh, jax.devices()[:mesh_devices])
    return prepare(config, with_end_tokens(model, config), rows_of(config), mesh, rewards)


def session_of(parts, prompts, evaluator, workdir, **replaced) -> Session:
    terminal = Terminal(out=io.StringIO(), err=io.StringIO())
    return Session(parts, prompts, evaluator, pathlib.Path(workdir), Stop(None), terminal, CompileCounter(), **replaced)


@functools.cache
def traced(**fields) -> str:
    """The fused step's program as a jaxpr; traced, not compiled."""
    config = tiny.config(**fields)
    parts = tiny.parts(config)
    state = abstract_state(parts)
    prompts = tiny.prompts(config)
    program = Program(parts, tiny_layout(parts, state))
    return str(program.fused.trace(state, prompts).jaxpr)


def abstract_state(parts):
    return jax.eval_shape(lambda: init_state(parts, {"params": tiny.params(parts.module.architecture)}))


def tiny_layout(parts, state):
    """The abstract state with the shardings that a real one has."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings(state, parts.mesh)
    )


class Bigram(nn.Module):
    """The smallest thing with the decoder's protocol: a token's embedding is its hidden state."""

    vocabulary: int = 5
    width: int = 3

    def setup(self):
        self.embed = nn.Embed(self.vocabulary, self.width)

    def __call__(self, tokens, positions, segments):
        return self.embed(tokens)

    def logits(self, hidden):
        return self.embed.attend(hidden).astype(jnp.float32)


EMBEDDING = np.random.default_rng(1).normal(0, 1, (5, 3)).astype(np.float32)


def hand_made_rollout(config: Config, advantages_of_rows=(1.0, -1.0, 0.5, -0.5)) -> Rollout:
    """Two groups of two completions of three tokens each, scored, with log-probabilities of the bigram model."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 5, (4, 3)).astype(np.int32)
    prompts = random.integers(0, 5, (2, 2)).astype(np.int32).repeat(2, axis=0)
    before = np.concatenate([prompts[:, 1:], tokens[:, :-1]], axis=1)
    logps = np.take_along_axis(log_softmax(EMBEDDING[before] @ EMBEDDING.T), tokens[..., None], -1)[..., 0]
    ones, floats = np.ones(4, np.float32), np.asarray(advantages_of_rows, np.float32)
    values = np.asarray([[1.0], [0.0], [1.0], [0.0]], np.float32)
    return Rollout(
        tokens=tokens,
        lengths=np.full(4, 3, np.int32),
        logps=logps.astype(np.float32) * 0.9,
        sampled_logps=logps.astype(np.float32),
        ended=np.array([True, False, True, True]),
        started=np.zeros(4, np.int32),
        mask=np.ones((4, 3), np.float32),
        weight=ones,
        draw=np.array([0, 0, 1, 1], np.int32),
        group=np.array([0, 0, 1, 1], np.int32),
        prompt_tokens=prompts,
        prompt_lengths=np.full(4, 2, np.int32),
        scores=Scores(values, np.ones_like(values), np.zeros(4, bool)),
        advantages=floats[:, None] * np.ones((4, 3), np.float32),
    )


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def bigram_parts(**fields):
    config = tiny.config(
        **{"rewards.names": ("odd",), "rewards.weights": (1.0,), "sampler.group_size": 2, "sampler.max_new_tokens": 3},
        **fields,
    )
    return dataclasses.replace(tiny.parts(config, optimizer=optax.sgd(0.1)), module=Bigram())


def packs_of(parts, rollout):
    """The packs of a rollout that is one minibatch, all of it in one."""
    shape = dataclasses.replace(pack_shape(parts.config, 1), rows=4, prompts=2)
    return make_packs(jax.tree.map(lambda x: x[0], split(training_batch(rollout, False), 1, shape)), shape)


def packs_of_config(parts):
    """The same packs in the shape that the config asks for."""
    shape = pack_shape(parts.config, 1)
    pieces = split(training_batch(hand_made_rollout(parts.config), False), 1, shape)
    return make_packs(jax.tree.map(lambda x: x[0], pieces), shape)


def bigram_state(parts):
    return init_state(parts, {"params": {"embed": {"embedding": jnp.asarray(EMBEDDING)}}})


@functools.cache
def updated(**fields):
    """(state, metrics) after one update of the bigram model on the rollout made by hand."""
    parts = bigram_parts(**fields)
    return run_update(parts, hand_made_rollout(parts.config))


def run_update(parts, rollout):
    """(state, metrics) of an update; LLVM optimises nothing, which halves the seconds that compiling it takes."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    state = bigram_state(parts)
    program = jax.jit(functools.partial(update, parts)).lower(state, rollout).compile(compiler_options=options)
    return jax.device_get(program(state, rollout)[:2])


def embedding_of(state, part="trainable"):
    return np.asarray(getattr(state, part)["params"]["embed"]["embedding"])


# The seed.


@flips("seed")
def test_seed(model):
    assert "random_seed" in traced(seed=424242) and "424242" in traced(seed=424242)
    assert "424242" not in traced()
    orders = {}
    for seed in (0, 1):
        parts, prompts, evaluator = prepared(model, seed=seed)
        orders[seed] = np.asarray(session_of(parts, prompts, evaluator, ".").batch(0).row).tolist()
        assert orders[seed] == make_batch(prompts, 0, 2, seed, True, 8).row.tolist()
    assert orders[0] != orders[1]


# model


@flips("model.path")
def test_model_path(model):
    rows = rows_of(tiny.config())
    mesh = make_mesh(tiny.config().mesh, jax.devices()[:1])
    config = tiny.config(**{"rewards.names": ("answer",), "rewards.weights": (1.0,), "data.max_prompt_length": 8})
    assert grpo.check_inputs(config, rows, mesh) is None
    named = dataclasses.replace(config, model=dataclasses.replace(config.model, path=model.source))
    found = grpo.check_inputs(named, rows, mesh)
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found.params, model.params)


@flips("model.param_dtype")
def test_param_dtype(model):
    for dtype in ("float32", "bfloat16"):
        parts, _, _ = prepared(model, **{"model.param_dtype": dtype})
        state = initial_state(parts, model)
        leaf = state.trainable["params"]["embed"]["embedding"]
        assert leaf.dtype == jnp.dtype(dtype)
        want = np.asarray(model.params["embed"]["embedding"]).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(np.asarray(leaf), want)


# lora


def lora_state(model, **fields):
    """The state at step 0 of a run with adapters."""
    parts, _, _ = prepared(model, **{"lora.rank": 2, **fields})
    return initial_state(parts, model)


@flips("lora.rank")
def test_lora_rank(model):
    state = lora_state(model, **{"lora.rank": 0})
    assert set(state.trainable) == {"params"} and not state.frozen
    for rank in (1, 3):
        state = lora_state(model, **{"lora.rank": rank})
        query = state.trainable["adapters"]["stack_0"]["attention"]["query"]
        assert (query["a"].shape, query["b"].shape) == ((2, 16, rank), (2, rank, 16))
        assert set(state.frozen) == {"params", "adapter_scales"}
        assert optax.tree.size(state.opt_state) == 2 * optax.tree.size(state.trainable) + 2, "two moments, two counters"


@flips("lora.alpha")
def test_lora_alpha(model):
    for alpha in (8.0, 3.0):
        scales = lora_state(model, **{"lora.alpha": alpha}).frozen["adapter_scales"]
        assert {float(x) for leaf in jax.tree.leaves(scales) for x in leaf} == {alpha / 2}
    with pytest.raises(InputError, match=r"lora.alpha=0.0 must be positive"):
        tiny.config(**{"lora.alpha": 0.0})


@flips("lora.targets")
def test_lora_targets(model):
    for targets, blocks in (
        ("", {"attention": ["key", "out", "query", "value"], "mlp": ["down", "gate", "up"]}),
        ("attention/(query|value)$", {"attention": ["query", "value"]}),
    ):
        adapters = lora_state(model, **{"lora.targets": targets}).trainable["adapters"]["stack_0"]
        assert {block: sorted(layers) for block, layers in adapters.items()} == blocks
    with pytest.raises(InputError, match=r"lora.targets='conv' matches none of stack_0/attention/query"):
        lora_state(model, **{"lora.targets": "conv"})
    with pytest.raises(InputError, match=r"lora.targets='\(' is no regular expression"):
        tiny.config(**{"lora.targets": "("})


@flips("lora.base_dtype")
def test_lora_base_dtype(model):
    written = model.params["stack_0"]["mlp"]["up"]["kernel"]
    for dtype, error in (("float32", 0.0), ("bfloat16", 2**-8), ("int8", 0.5 / 127)):
        params = lora_state(model, **{"lora.base_dtype": dtype}).frozen["params"]
        kernel = params["stack_0"]["mlp"]["up"]
        assert kernel["kernel"].dtype == jnp.dtype(dtype)
        assert params["embed"]["embedding"].dtype == ("float32" if dtype == "float32" else "bfloat16")
        scale = np.asarray(kernel.get("kernel_scale", np.ones((2, 24))))[:, None]
        gap = np.abs(np.asarray(kernel["kernel"], np.float32) * scale - written)
        assert gap.max() <= error * np.abs(written).max() and (gap.max() > 0) == (error > 0)


@flips("model.compute_dtype")
def test_compute_dtype(model):
    wide, narrow = traced(), traced(**{"model.compute_dtype": "bfloat16"})
    assert "bf16" not in wide
    assert len(re.findall(r":bf16\[[\d,]*\] = dot_general", narrow)) > 10
    parts, _, _ = prepared(model, **{"model.compute_dtype": "bfloat16"})
    assert parts.module.dtype == jnp.bfloat16
    logits = jax.eval_shape(
        lambda: Decoder(tiny.architecture(), dtype=jnp.bfloat16).apply(
            {"params": tiny.params(tiny.architecture())}, jnp.zeros((1, 16), jnp.bfloat16), method="logits"
        )
    )
    assert logits.dtype == jnp.float32


@flips("model.attention")
def test_attention(model):
    own = {"train.share_prefix": False}
    assert prepared(model, **own)[0].module.kernel is None
    with pytest.raises(InputError, match=r"model\.attention='splash' .* which are cpus: take auto"):
        prepared(model, **own, **{"model.attention": "splash"})
    chip = types.SimpleNamespace(platform="tpu")
    chips = types.SimpleNamespace(devices=np.full((1, 1, 1), chip), shape={"tensor": 1, "sequence": 1})
    configs = {name: tiny.config(**own, **{"model.attention": name}) for name in ("auto", "xla")}
    made = {name: build_decoder(config, tiny.architecture(), chips) for name, config in configs.items()}
    assert made["xla"].kernel is None and made["auto"].kernel.name == "splash"
    parts = tiny.parts(tiny.config(**own))
    kernel = dataclasses.replace(made["auto"].kernel, mesh=parts.mesh, interpret=True)
    for given, wanted in ((kernel, True), (None, False)):
        chosen = dataclasses.replace(parts, module=parts.module.clone(kernel=given))
        state = abstract_state(chosen)
        program = Program(chosen, tiny_layout(chosen, state))
        with jax.transfer_guard("disallow"):  # as in a run, whose first step compiles inside the loop
            text = str(program.fused.trace(state, tiny.prompts(chosen.config)).jaxpr)
        assert ("pallas_call" in text) == wanted


@flips("model.matmul_precision")
def test_matmul_precision():
    for name in ("default", "highest"):
        text = traced(**{"model.matmul_precision": name})
        found = set(re.findall(r"Precision\.(\w+)", text))
        assert found == {name.upper(), "HIGHEST"}, found  # the sampler cumulates probabilities at the highest


@flips("model.remat")
def test_remat(model):
    assert "checkpoint[" not in traced() and "remat" not in traced()
    full = traced(**{"model.remat": "full"})
    assert "checkpoint[" in full or "remat" in full
    assert prepared(model, **{"model.remat": "full"})[0].module.remat == "full"
    for name in REMAT_POLICIES:
        assert traced(**{"model.remat": name}) not in (full, traced()), name


@flips("model.unroll")
def test_unroll(model):
    """A model of one layer needs no loop; with remat one stays, or as many layers in a row as the field says."""
    assert "unroll=2\n" not in traced() and "unroll=2\n" in traced(**{"model.unroll": 2})
    full = {"model.remat": "full"}
    for fields, layers in (({}, 8), (full, 1), ({"model.unroll": 3}, 3), (full | {"model.unroll": 3}, 3)):
        assert layers_in_a_row(tiny.config(**fields).model, tiny.architecture(layers=8)) == layers
    assert layers_in_a_row(tiny.config().model, tiny.architecture(layers=9)) == 1
    assert prepared(model, **{"model.unroll": 3})[0].module.unroll == 3


@flips("model.logits_chunk")
def test_logits_chunk():
    wide = re.compile(r"f32\[(1,28|28),24\]")  # logits of a group's first tokens and of 4 x 6 positions
    assert wide.search(traced()) and not wide.search(traced(**{"model.logits_chunk": 8}))


# base


ARCHITECTURE = {
    "base.layers": (3, lambda a: a.layers),
    "base.width": (64, lambda a: a.width),
    "base.heads": (8, lambda a: a.heads),
    "base.kv_heads": (4, lambda a: a.kv_heads),
    "base.mlp_width": (96, lambda a: a.mlp_width),
    "base.rope_theta": (500.0, lambda a: a.ropes[0].theta),
    "base.tied": (False, lambda a: a.tied),
}


@flips(*ARCHITECTURE)
def test_base_sizes(name):
    value, read = ARCHITECTURE[name]
    tokenizer = types.SimpleNamespace(vocabulary=31)
    plain, flipped = (base.base_architecture(c, tokenizer) for c in (tiny.config(), tiny.config(**{name: value})))
    assert read(plain) == value_of(Config(), name) and read(flipped) == value
    changed = {f.name for f in dataclasses.fields(plain) if getattr(plain, f.name) != getattr(flipped, f.name)}
    more = {
        "base.width": {"head_size"},
        "base.heads": {"head_size"},
        "base.layers": {"stacks"},
        "base.rope_theta": {"ropes"},
    }.get(name, set())
    assert changed - more <= {name.removeprefix("base.")}
    assert flipped.head_size == flipped.width // flipped.heads


@dataclasses.dataclass
class Given:
    """What a recipe hands to the loop of supervised training."""

    sft: object
    module: object
    examples: list


def captured_fine_tune(monkeypatch, where) -> list[Given]:
    found: list[Given] = []

    def fine_tune(config, sft, module, params, examples, *_, **__):
        found.append(Given(sft, module, list(examples)))
        return params

    def fit(config, sft, module, collections, *given, **named):
        return fine_tune(config, sft, module, collections[0], *given, **named)

    for name, stand_in in (("fine_tune", fine_tune), ("fit", fit)):
        if hasattr(where, name):
            monkeypatch.setattr(where, name, stand_in)
    saves = supervised if where is sft else where
    monkeypatch.setattr(saves, "save_model", lambda folder, *_: str(folder))
    return found


def made_base(monkeypatch, workdir, **fields) -> tuple[Given, Config]:
    config = tiny.config(**{"base.worked_sums": 40, "base.vocabulary": 60, "data.max_prompt_length": 8, **fields})
    found = captured_fine_tune(monkeypatch, base)
    monkeypatch.setattr(base, "init_params", lambda module, key: {"seed": key})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    held_out = read_rows(config, "eval", None)
    base.make_base(config, held_out, mesh, workdir, Stop(None), Terminal(out=io.StringIO()))
    return found[-1], config


@flips("base.vocabulary")
def test_base_vocabulary(monkeypatch, tmp_path):
    """An upper bound: worked sums need about twenty pieces, one a character, as digits are never merged."""
    given, _ = made_base(monkeypatch, tmp_path / "60", **{"base.vocabulary": 60})
    needed = given.module.architecture.vocabulary
    given, _ = made_base(monkeypatch, tmp_path / "needed", **{"base.vocabulary": needed})
    assert given.module.architecture.vocabulary == needed <= 60
    with pytest.raises(InputError, match=rf"no tokenizer with base.vocabulary={needed - 1} .*raise it"):
        made_base(monkeypatch, tmp_path / "less", **{"base.vocabulary": needed - 1})


@flips("base.worked_sums")
def test_base_worked_sums(monkeypatch, tmp_path):
    for count in (30, 50):
        given, _ = made_base(monkeypatch, tmp_path / str(count), **{"base.worked_sums": count})
        assert len(given.examples) == count


@flips("base.right_share")
def test_base_right_share(monkeypatch, tmp_path):
    right = []
    for share in (0.0, 1.0):
        given, config = made_base(monkeypatch, tmp_path / str(share), **{"base.right_share": share})
        tokenizer = Tokenizer.from_sentencepiece(str(tmp_path / str(share) / "tokenizer.model"))
        texts = [tokenizer.decode(ids) for ids, _ in given.examples]
        assert texts == [p + c for p, c in worked_sums(0, 40, config.data.digits, share)]
        sums = [re.match(r"(\d+)\+(\d+)=<think>.*<answer>(\d+)</answer>$", text) for text in texts]
        right.append(np.mean([m is not None and int(m[1]) + int(m[2]) == int(m[3]) for m in sums]))
    assert right[0] < 0.2 and right[1] == 1.0


@flips("base.sft.path")
def test_base_has_no_file():
    with pytest.raises(InputError, match="base.sft.path='a.jsonl' must stay empty"):
        tiny.config(**{"base.sft.path": "a.jsonl"})


SFT_VALUES = {"steps": 3, "epochs": 2, "batch_size": 5, "max_length": 120, "lr": 0.25}


@flips("base.sft.steps", "base.sft.epochs", "base.sft.batch_size", "base.sft.lr", "base.sft.max_length")
def test_base_learns_by_its_own_section(monkeypatch, tmp_path, name):
    """The section reaches fine_tune, whose use of each field `test_fine_tune` shows."""
    leaf = name.rsplit(".", 1)[-1]
    given, config = made_base(monkeypatch, tmp_path / "a", **{name: SFT_VALUES[leaf]})
    assert given.sft is config.base.sft and getattr(given.sft, leaf) == SFT_VALUES[leaf]
    if leaf == "max_length":
        with pytest.raises(InputError, match="base.sft.max_length=9 is below"):
            made_base(monkeypatch, tmp_path / "b", **{name: 9})


# text


@flips("text.template")
def test_template(model, tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}!{{ m.content }}{% endfor %}")
    texts = {}
    for template in ("plain", "r1_zero", str(tmp_path / "mine.jinja")):
        _, prompts, _ = prepared(model, **{"text.template": template, "data.max_prompt_length": 400})
        texts[template] = model.tokenizer.decode(prompts.tokens[0])
    assert texts["plain"] == "1+1="
    assert texts["r1_zero"].endswith(" User: 1+1=. Assistant:") and "Before answering" in texts["r1_zero"]
    assert texts[str(tmp_path / "mine.jinja")] == "!1+1="


@flips("text.system_prompt")
def test_system_prompt(model):
    _, prompts, _ = prepared(model, **{"text.system_prompt": "think aloud", "data.max_prompt_length": 40})
    assert model.tokenizer.decode(prompts.tokens[0]) == "think aloud\n1+1="


@flips("text.end_tokens")
def test_end_tokens(model):
    plus, newline = (model.tokenizer.encode(c, special=False)[0] for c in "!\n")
    assert prepared(model)[0].end_ids == model.tokenizer.end_ids == (1,)
    assert prepared(model, **{"text.end_tokens": ("!", "\n")})[0].end_ids == (plus, newline)


# data


def data_config(**fields) -> Config:
    return tiny.config(**{f"data.{name}": value for name, value in fields.items()})


@flips("data.source")
def test_source(rows_file):
    sums = read_rows(data_config(), "train", None)
    lines = read_rows(data_config(source="jsonl", path=rows_file), "train", None)
    assert "a" in sums[0] and int(sums[0]["answer"]) == sums[0]["a"] + sums[0]["b"]
    assert [row["prompt"] for row in lines] == [row["question"] for row in ROWS[:18]]


@flips("data.path")
def test_path(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(f'{{"question": "{name}", "answer": "1"}}\n' * 3)
        rows = read_rows(data_config(source="jsonl", path=str(tmp_path / name)), "train", None)
        assert [row["prompt"] for row in rows] == [name] * 2


@pytest.fixture
def splits(tmp_path) -> str:
    """A dataset folder with a file a split, each row saying which split it is of."""
    for name in ("train", "test", "hard"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "{name}", "answer": "1"}}\n')
    return str(tmp_path)


def prompts_of(config: Config, split: str) -> set[str]:
    return {row["prompt"] for row in read_rows(config, split, None)}


@flips("data.split")
def test_split(splits):
    assert prompts_of(data_config(source="hf", path=splits), "train") == {"train"}
    assert prompts_of(data_config(source="hf", path=splits, split="hard"), "train") == {"hard"}
    assert prompts_of(data_config(source="hf", path=splits, split="hard"), "eval") == {"test"}


@flips("data.eval_split")
def test_eval_split(splits):
    assert prompts_of(data_config(source="hf", path=splits, eval_split="hard"), "eval") == {"hard"}
    assert prompts_of(data_config(source="hf", path=splits, eval_split="hard"), "train") == {"train"}


@flips("data.eval_path")
def test_eval_path(rows_file, tmp_path):
    (tmp_path / "held.jsonl").write_text('{"question": "held", "answer": "1"}\n')
    config = data_config(source="jsonl", path=rows_file, eval_path=str(tmp_path / "held.jsonl"))
    assert prompts_of(config, "eval") == {"held"} and len(read_rows(config, "train", None)) == len(ROWS)
    assert len(read_rows(data_config(source="jsonl", path=rows_file), "eval", None)) == len(ROWS) // 10


@flips("data.prompt_column", "data.answer_column")
def test_columns(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "1", "other": "5"}\n' * 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    leaf = name.removeprefix("data.")
    kind = {"prompt_column": "prompt", "answer_column": "answer"}[leaf]
    plain = read_rows(data_config(source="jsonl", path=str(path)), "train", None)[0]
    flipped = read_rows(data_config(source="jsonl", path=str(path), **{leaf: "other"}), "train", None)[0]
    in_python = read_rows(data_config(source="memory", **{leaf: "other"}), "train", rows)
    assert plain[kind] != "5" and flipped[kind] == "5" == in_python[0][kind]


@flips("data.answer_marker")
def test_answer_marker(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "so #### 1,234"}\n' * 2)
    plain = read_rows(data_config(source="jsonl", path=str(path)), "train", None)
    assert plain[0]["answer"] == "so #### 1,234"
    marked = read_rows(data_config(source="jsonl", path=str(path), answer_marker="####"), "train", None)
    assert marked[0]["answer"] == "1234"


def set_config(*sets: dict, **fields) -> Config:
    given = {"data.sets": sets, "model.path": "somewhere", "rewards.names": ("odd", "long"), **fields}
    return tiny.config(**given)


def set_rows(split: str, *sets: dict) -> list[dict]:
    return load_all_rows(set_config(*sets).data, split, 0)


@flips("data.sets.name")
def test_set_name(rows_file):
    assert {row["set"] for row in set_rows("train", {"name": "mine", "path": rows_file})} == {"mine"}


@flips("data.sets.source", "data.sets.path", "data.sets.split", "data.sets.eval_split", "data.sets.eval_path")
def test_set_source(splits, rows_file, name):
    """Each field of a set reads what the field of `data` would."""
    leaf = name.removeprefix("data.sets.")
    plain = {"source": "hf", "path": splits} if leaf in ("split", "eval_split") else {"path": rows_file}
    flipped = {
        "source": {"source": "arithmetic", "path": ""},
        "path": {"path": f"{splits}/test.jsonl", "eval_path": rows_file},
        "split": {"split": "hard"},
        "eval_split": {"eval_split": "hard"},
        "eval_path": {"eval_path": f"{splits}/hard.jsonl"},
    }[leaf]
    split = "eval" if leaf.startswith("eval") else "train"
    found = [[row["prompt"] for row in set_rows(split, {"name": "a", **plain, **more})] for more in ({}, flipped)]
    alone = {f: v for f, v in ({**plain, "source": plain.get("source", "jsonl")} | flipped).items()}
    assert found[1] == [row["prompt"] for row in read_rows(data_config(**alone), split, None)] != found[0]


@flips("data.sets.prompt_column", "data.sets.answer_column", "data.sets.answer_marker")
def test_set_columns(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "so # 1", "other": "# 5"}\n' * 2)
    leaf = name.removeprefix("data.sets.")
    kind, value, want = {
        "prompt_column": ("prompt", "other", "# 5"),
        "answer_column": ("answer", "", ""),
        "answer_marker": ("answer", "#", "1"),
    }[leaf]
    given = {"name": "a", "path": str(path)}
    assert set_rows("train", given)[0][kind] in ("q", "so # 1")
    assert set_rows("train", {**given, leaf: value})[0][kind] == want


@flips("data.sets.weight", "data.sets.rewards", "data.sets.reward_weights", "data.sets.late")
def test_set_share_and_rewards(name):
    """What the second of two sets is drawn and earns, by step 0 and the last."""
    rows = [{"prompt": "1", "set": each} for each in "ab"]
    leaf = name.removeprefix("data.sets.")
    flipped = {"weight": 3.0, "rewards": ("long",), "reward_weights": (2.0, 3.0), "late": True}[leaf]
    made = []
    for more in ({}, {leaf: flipped}):
        sets = ({"name": "a", "path": "x"}, {"name": "b", "path": "x", **more})
        late = {"rewards.late_from": 0.5} if more.get("late") else {}
        mix = build_mixture(set_config(*sets, **late, **{"data.prompts_per_step": 4}), rows)
        drawn = mix.dealt(np.arange(40), 0)[0].reshape(10, 4).sum(1)
        made.append((drawn[0], drawn[9], mix.rewards(np.array([1])).weights[0].tolist()))
    want = {
        "weight": (3, 3, [1.0, 0.5]),
        "rewards": (2, 2, [0.0, 0.5]),
        "reward_weights": (2, 2, [2.0, 3.0]),
        "late": (0, 2, [1.0, 0.5]),
    }
    assert made == [(2, 2, [1.0, 0.5]), want[leaf]]


@flips("rewards.late_names", "rewards.late_from")
def test_late(name):
    """The step at which a component begins; with no name, none waits."""
    given = {"rewards.late_names": ("long",), "rewards.late_from": 0.5}
    begins = {}
    for more in ({}, {"rewards.late_from": 3.0}, {"rewards.late_names": ("odd",), "rewards.names": ("long", "odd")}):
        mix = build_mixture(set_config(**given | more, **{"model.path": ""}), [{"prompt": "1"}])
        draws = np.arange(20)
        begins[tuple(more)] = (mix.rewards(0 * draws, draws).applies == 0).sum(0).tolist()
    assert list(begins.values()) == [[0, 10], [0, 6], [0, 10]]
    assert build_mixture(tiny.config(), [{"prompt": "1"}]) is None


@flips("distill.teacher")
def test_teacher(model):
    for path, there in (("", False), (model.source, True)):
        parts, _, _ = prepared(model, **{"distill.teacher": path})
        assert (parts.teacher is not None) == there
        state = initial_state(parts, model)
        assert (TEACHER in state.frozen) == there
    jax.tree.map(np.testing.assert_array_equal, state.frozen[TEACHER]["params"], model.params)


@flips("distill.loss", "distill.weight")
def test_distillation(name):
    """What advantages become: scaled with the exact divergence, mixed with the log ratio where it is sampled."""
    table = np.random.default_rng(9).normal(0, 1, (5, 3)).astype(np.float32)
    rollout = hand_made_rollout(tiny.config())
    before = np.concatenate([rollout.prompt_tokens[:, 1:], rollout.tokens[:, :-1]], axis=1)
    taught = np.take_along_axis(log_softmax(table[before] @ table.T), rollout.tokens[..., None], -1)[..., 0]
    for loss in ("full", "sampled"):
        for weight in (0.25, 1.0):
            given = {"distill.teacher": "somewhere", "distill.loss": loss, "distill.weight": weight}
            parts = dataclasses.replace(bigram_parts(**given), teacher=Bigram())
            state = bigram_state(parts).replace(frozen={TEACHER: {"params": {"embed": {"embedding": table}}}})
            pieces = split(training_batch(rollout, False), 1, pack_shape(parts.config, 1))
            told, pieces, _ = with_teacher(parts, state, rollout, pieces)
            want = (1 - weight) * rollout.advantages + (loss == "sampled") * weight * (taught - rollout.logps)
            np.testing.assert_allclose(told.advantages, want, atol=1e-5)
            np.testing.assert_allclose(join(pieces.advantages), want, atol=1e-5)


@flips("data.max_prompt_length")
def test_max_prompt_length(model):
    parts, prompts, evaluator = prepared(model, **{"data.max_prompt_length": 11})
    assert session_of(parts, prompts, evaluator, ".").batch(0).tokens.shape == (2, 11)
    with pytest.raises(InputError, match="data.max_prompt_length=3"):
        prepared(model, **{"data.max_prompt_length": 3})


@flips("data.pool_factor")
def test_pool_factor(model):
    """A step is handed that many times its prompts, and the next one those after them."""
    for factor in (1, 3):
        session = session_of(*prepared(model, **{"data.pool_factor": factor}), ".")
        assert np.asarray(session.batch(1).draw).tolist() == list(range(2 * factor, 4 * factor))


@flips("data.prompts_per_step")
def test_prompts_per_step(model):
    parts, prompts, evaluator = prepared(model, **{"data.prompts_per_step": 3})
    session = session_of(parts, prompts, evaluator, ".")
    assert np.asarray(session.batch(2).draw).tolist() == [6, 7, 8] and parts.config.completions == 12


@flips("data.shuffle")
def test_shuffle(model):
    orders = {}
    for shuffle in (False, True):
        parts, prompts, evaluator = prepared(model, **{"data.shuffle": shuffle, "data.prompts_per_step": 18})
        orders[shuffle] = np.asarray(session_of(parts, prompts, evaluator, ".").batch(0).row).tolist()
    assert orders[False] == list(range(18)) == sorted(orders[True]) != orders[True]


@flips("data.digits")
def test_digits():
    for digits in (1, 3):
        rows = read_rows(data_config(digits=digits), "train", None)
        assert 10 ** (digits - 1) <= max(row["a"] for row in rows) < 10**digits
        rows = read_rows(data_config(source="tasks", path="comparison:en", digits=digits), "eval", None)
        assert max(len(row["answer"]) for row in rows) == digits


TASK_FILES = {"prompts": "train", "held_out": "eval_sums", "chats": "chats", "pairs": "helpful", "points": "harmless"}


@flips("tasks.good_share")
def test_good_share():
    """Of 400 chats, how many are preferred as good responses are: their preference is 1, that of a flawed one below."""
    fields = {"data.source": "tasks", "data.path": "sums,general:en,ru", "tasks.chats": 400}
    good = {}
    for share in (1.0, 0.4):
        rows = tasks.made_files(tiny.config(**fields, **{"tasks.good_share": share}))["chats.jsonl"]
        said = [[message["content"] for message in row["messages"]] for row in rows]
        good[share] = sum(general.preference(*texts) == 1.0 for texts in said) / len(said)
    assert good[1.0] == 1.0 and good[0.4] == pytest.approx(0.4, abs=0.08)


@flips(*(f"tasks.{leaf}" for leaf in TASK_FILES))
def test_task_files(name):
    leaf = name.removeprefix("tasks.")
    few = {f"tasks.{other}": 2 for other in TASK_FILES} | {"data.source": "tasks", "data.path": "sums,general:en"}
    plain, flipped = (tasks.made_files(tiny.config(**(few | more))) for more in ({}, {name: 31}))
    grown = {file for file in plain if len(plain[file]) < len(flipped[file])}
    assert len(flipped[f"{TASK_FILES[leaf]}.jsonl"]) == 31
    together = {"prompts": {"general"}, "held_out": {"eval", "eval_general"}}
    held = {"pairs": {"eval_helpful"}, "points": {"eval_harmless"}}
    assert grown == {f"{file}.jsonl" for file in {TASK_FILES[leaf]} | (together | held).get(leaf, set())}


# sampler


@flips("sampler.group_size", "sampler.max_new_tokens")
def test_rollout_shapes(name):
    config = tiny.config(**{name: 3})
    parts = tiny.parts(config)
    prompts = tiny.prompts(config)
    rollout = jax.eval_shape(lambda state: sample_rollout(parts, state, prompts), abstract_state(parts))
    assert rollout.tokens.shape == ((6, 6) if name == "sampler.group_size" else (8, 3))


LOGITS = np.random.default_rng(3).normal(0, 2, (400, 7)).astype(np.float32)


def drawn(**fields):
    config = tiny.config(**fields).sampler
    program = jax.jit(lambda: draw_tokens(LOGITS, jax.random.uniform(jax.random.key(0), (len(LOGITS), 2)), config))
    return [np.asarray(x) for x in program()]


def chosen(logps, tokens):
    return np.take_along_axis(logps, tokens[:, None], 1)[:, 0]


@flips("sampler.temperature")
def test_temperature():
    likeliest = LOGITS.argmax(1)
    shares = {}
    for temperature in (1.0, 0.2, 5.0):
        tokens, logps, _ = drawn(**{"sampler.temperature": temperature})
        np.testing.assert_allclose(logps, chosen(log_softmax(LOGITS / temperature), tokens), atol=1e-5)
        shares[temperature] = (tokens == likeliest).mean()
    assert shares[0.2] > shares[1.0] + 0.1 > shares[5.0] + 0.2
    # The trainer divides by it too.
    parts = bigram_parts(**{"sampler.temperature": 2.0})
    rollout = hand_made_rollout(parts.config)
    variables = {"params": {"embed": {"embedding": jnp.asarray(EMBEDDING)}}}
    program = jax.jit(lambda v: completion_logps(parts, v, packs_of(parts, rollout).pick(0)[0])[0])
    logps = program(variables)
    before = np.concatenate([rollout.prompt_tokens[:, 1:], rollout.tokens[:, :-1]], axis=1)
    want = np.take_along_axis(log_softmax(EMBEDDING[before] @ EMBEDDING.T / 2), rollout.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(logps, want, atol=1e-5)


@flips("sampler.top_k")
def test_top_k():
    rank = (-LOGITS).argsort(1).argsort(1)
    assert chosen(rank, drawn()[0]).max() > 1
    tokens, full, kept = drawn(**{"sampler.top_k": 2})
    assert chosen(rank, tokens).max() == 1
    np.testing.assert_allclose(full, chosen(log_softmax(LOGITS), tokens), atol=1e-5)
    np.testing.assert_allclose(kept, chosen(log_softmax(np.where(rank < 2, LOGITS, -np.inf)), tokens), atol=1e-5)


@flips("sampler.top_p")
def test_top_p():
    p = np.exp(log_softmax(LOGITS))
    likelier = np.stack([[row[row > x].sum() for x in row] for row in p])  # mass of the tokens above each
    assert chosen(likelier, drawn()[0]).max() > 0.6
    tokens, _, kept = drawn(**{"sampler.top_p": 0.5})
    assert chosen(likelier, tokens).max() < 0.5
    np.testing.assert_allclose(kept, chosen(log_softmax(np.where(likelier < 0.5, LOGITS, -np.inf)), tokens), atol=1e-4)


@flips("sampler.min_p")
def test_min_p():
    p = np.exp(log_softmax(LOGITS))
    share = p / p.max(1, keepdims=True)
    assert chosen(share, drawn()[0]).min() < 0.1
    tokens, _, kept = drawn(**{"sampler.min_p": 0.3})
    assert chosen(share, tokens).min() >= 0.3
    np.testing.assert_allclose(kept, chosen(log_softmax(np.where(share >= 0.3, LOGITS, -np.inf)), tokens), atol=1e-4)


@flips("sampler.min_new_tokens", "sampler.stop")
def test_ends_of_completions(name):
    lengths = []
    for fields in ({}, {name: 5 if name == "sampler.min_new_tokens" else ("ab",)}):
        parts = bigram.parts(tiny.config(**fields))
        pieces = [bytes([97 + i % 3]) for i in range(tiny.VOCABULARY)]
        parts = dataclasses.replace(parts, stops=stop_table(parts.config.sampler.stop, pieces), end_ids=(1, 7, 20))
        state = init_state(parts, {"params": bigram.params()})
        rollout = jax.jit(functools.partial(sample_rollout, parts))(state, tiny.prompts(parts.config))
        lengths.append(np.asarray(rollout.lengths))
    if name == "sampler.min_new_tokens":
        assert lengths[0].min() < 5 <= lengths[1].min()
    else:
        assert (lengths[1] <= lengths[0]).all() and lengths[1].sum() < lengths[0].sum()


@flips("sampler.slots")
def test_slots():
    own = "[2,2,6,4]"  # S K T E: keys and values of the completions that decode at a time
    assert own in traced(**{"sampler.slots": 2}) and own not in traced()


@flips("sampler.cache_pieces")
def test_cache_pieces():
    half = "[8,2,4,3]"  # B K E T/2: keys of the completions in the first of two pieces
    assert half in traced(**{"sampler.cache_pieces": 2}) and half not in traced()


@flips("sampler.cache_dtype")
def test_cache_dtype():
    own = "[8,2,6,4]"  # B K T E: the completions' keys and values
    narrow = traced(**{"sampler.cache_dtype": "bfloat16"})
    assert f"f32{own}" in traced() and f"bf16{own}" not in traced()
    assert f"bf16{own} = broadcast_in_dim" in narrow and f"f32{own} = broadcast_in_dim" not in narrow


# rewards


@flips("rewards.names")
def test_reward_names(model):
    one = prepared(model)[0].scorer
    two = prepared(
        model,
        rewards={"length": lambda completions: [float(len(c)) for c in completions]},
        **{"rewards.names": ("length", "format"), "rewards.weights": (1.0, 1.0)},
    )[0].scorer
    assert one.names == ("answer",) and one.host is None
    assert two.names == ("length", "format") and list(two.host.functions) == ["length"]
    ids = model.tokenizer.encode("1+1=2", special=False)
    assert two.host.call(np.array([0]), np.array([ids]), np.array([len(ids)])).tolist() == [[5.0]]


@flips("rewards.weights")
def test_reward_weights(model):
    scores = Scores(jnp.array([[1.0, 1.0], [0.0, 2.0]]), jnp.ones((2, 2)), jnp.bool_(False))
    for weights, want in (((1.0, 0.5), [1.5, 1.0]), ((-2.0, 3.0), [1.0, 6.0])):
        fields = {"rewards.names": ("answer", "format"), "rewards.weights": weights}
        assert prepared(model, **fields)[0].scorer.total(scores).tolist() == want


@flips("rewards.timeout")
def test_reward_timeout(model):
    def slow(completions):
        time.sleep(0.4)
        return [1.0] * len(completions)

    for timeout, fails in ((0.1, True), (20.0, False)):
        fields = {"rewards.names": ("slow",), "rewards.timeout": timeout}
        host = prepared(model, rewards={"slow": slow}, **fields)[0].scorer.host
        host.call(np.array([0]), np.zeros((1, 2), np.int32), np.array([1]))
        error = host.take_error()
        assert (error is not None) == fails and (not fails or "rewards.timeout=0.1" in str(error))


def reward_model_folder(model, tmp_path, name: str, scale: float) -> str:
    """A reward model on the tiny model's decoder whose head is `scale` everywhere."""
    folder = tmp_path / name
    write_folder(str(folder), model.architecture, model.params, model.tokenizer)
    width = model.architecture.width
    save_head(str(folder), {"kernel": np.full((width, 1), scale, np.float32), "bias": np.zeros(1, np.float32)})
    return str(folder)


@flips(
    *(f"rewards.{name}.{leaf}" for name in ("helpful", "harmless") for leaf in ("path", "sees", "marker")),
    "rewards.helpful.micro_batch_size",
    "rewards.harmless.micro_batch_size",
)
def test_reward_models_in_the_step(model, tmp_path, name):
    """The field changes the traced program, or the variables that it is given."""
    _, kind, leaf = name.split(".")
    paths = [reward_model_folder(model, tmp_path, name, scale) for name, scale in (("one", 1.0), ("two", 2.0))]
    default = {"path": paths[0], "sees": "summary", "marker": "1", "micro_batch_size": 0}
    flipped = {"path": paths[1], "sees": "response", "marker": "1+", "micro_batch_size": 4}
    made = []
    for value in (default[leaf], flipped[leaf]):
        fields = {f"rewards.{kind}.{at}": x for at, x in {**default, leaf: value}.items()}
        parts, prompts, _ = prepared(model, **{"rewards.names": (kind,), "rewards.weights": (1.0,), **fields})
        variables = initial_state(parts, model).frozen[COLLECTION]
        given = given_to(parts, prompts, model)
        rollout = jax.eval_shape(lambda s, p, parts=parts: sample_rollout(parts, s, p), *given)
        score = parts.scorer.score_in_graph
        program = jax.make_jaxpr(lambda *arrays, score=score: score(*arrays))(given[1], rollout, variables)
        made.append((str(program), float(variables[kind]["score"]["kernel"][0, 0])))
    assert (made[0][0] == made[1][0]) == (leaf == "path") and (made[0][1] == made[1][1]) == (leaf != "path")
    with pytest.raises(InputError, match=f"rewards.{kind}.path='' is empty, and rewards.names has '{kind}'"):
        tiny.config(**{"rewards.names": (kind,), "rewards.weights": (1.0,)})


def given_to(parts, prompts, model):
    """A state and the prompts of the first step."""
    config = parts.config.data
    batch = make_batch(prompts, 0, config.prompts_per_step, 0, False, config.max_prompt_length)
    return initial_state(parts, model), batch


@flips("rewards.model_judge.path", "rewards.model_judge.prompt", "rewards.model_judge.max_new_tokens")
def test_model_judge(model, tmp_path, name):
    """The field changes the ids around the completion, the sampler, or the variables."""
    (tmp_path / "prompt.txt").write_text("1+{completion}")
    other = tmp_path / "other"
    doubled = jax.tree.map(lambda x: 2 * np.asarray(x), model.params)
    write_folder(str(other), model.architecture, doubled, model.tokenizer)
    default = {"path": model.source, "prompt": "", "max_new_tokens": 3}
    flipped = {"path": str(other), "prompt": str(tmp_path / "prompt.txt"), "max_new_tokens": 5}
    leaf, made = name.rpartition(".")[2], []
    for value in (default[leaf], flipped[leaf]):
        fields = {f"rewards.model_judge.{at}": x for at, x in {**default, leaf: value}.items()}
        given = {"rewards.names": ("model_judge",), "rewards.weights": (1.0,), **fields}
        parts, prompts, _ = prepared(model, **given)
        judge = parts.scorer.models["model_judge"]
        variables = initial_state(parts, model).frozen[COLLECTION]["model_judge"]["params"]
        assert prompts.columns["model_judge"].shape[0] == len(prompts.rows)
        made.append(
            (
                judge.columns["model_judge"].shape,
                judge.sampler.max_new_tokens,
                float(variables["embed"]["embedding"][0, 0]),
            )
        )
    differ = [a != b for a, b in zip(*made, strict=True)]
    assert differ == [leaf == "prompt", leaf == "max_new_tokens", leaf == "path"]
    with pytest.raises(InputError, match="rewards.model_judge.path='' is empty"):
        tiny.config(**{"rewards.names": ("model_judge",), "rewards.weights": (1.0,)})


PREFERENCES = [{"prompt": "1+1=", "chosen": "2", "rejected": str(wrong)} for wrong in (1, 3, 4, 5)]


def reward_model_run(model, monkeypatch, tmp_path, **fields) -> tuple[dict, list[dict]]:
    """(what was fitted, lines of metrics) of a run with the bigram model in the decoder's place."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PREFERENCES))
    default = {"path": str(path), "steps": 2, "batch_size": 2, "max_length": 9, "lr": 0.1}
    given = {f"reward_model.{name}": value for name, value in {**default, **fields}.items()}
    config = tiny.config(**{"model.path": model.source, **given})
    seen: dict = {"shapes": set()}

    class Embedding(nn.Module):
        @nn.compact
        def __call__(self, tokens, positions, segments):
            embedding = self.param("embedding", nn.initializers.ones, (model.architecture.vocabulary, 16))
            return embedding[tokens]

    def fit(config, module, variables, rows, mesh, *rest):
        seen["rows"] = rows
        return reward_fit(config, Embedding(), variables, rows, mesh, *rest)

    def make(rows, count, length):
        seen["shapes"].add((count, length))
        return reward_batch(rows, count, length)

    reward_fit, reward_batch = reward_model.fit, reward_model.make_preference_batch
    table = np.ones((model.architecture.vocabulary, 16), np.float32)
    loaded = dataclasses.replace(model, params={"embedding": table})
    monkeypatch.setattr(supervised, "load_model", lambda path, keep_adapters: loaded)
    monkeypatch.setattr(reward_model, "measure", lambda *given: {"accuracy": float(len(given[3]))})
    monkeypatch.setattr(reward_model, "save_reward_model", lambda folder, model, variables: "saved")
    monkeypatch.setattr(reward_model, "fit", fit)
    monkeypatch.setattr(reward_model, "make_preference_batch", make)
    monkeypatch.setattr(supervised, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    assert reward_model.run(config, tmp_path / "run", Terminal(out=io.StringIO())) == "saved"
    seen["held_out"] = json.loads((tmp_path / "run" / "summary.json").read_text())["held_out"]
    return seen, [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


@flips("reward_model.steps", "reward_model.batch_size", "reward_model.max_length", "reward_model.lr")
def test_reward_model_training(model, monkeypatch, tmp_path, name):
    leaf = name.removeprefix("reward_model.")
    value = {"steps": 4, "batch_size": 3, "max_length": 12, "lr": 0.5}[leaf]
    seen, lines = reward_model_run(model, monkeypatch, tmp_path, **{leaf: value})
    want = {"steps": 2, "batch_size": 2, "max_length": 9, "lr": 0.1, leaf: value}
    assert len(lines) == want["steps"] and seen["shapes"] == {(want["batch_size"], want["max_length"])}
    assert lines[0]["lr"] == pytest.approx(want["lr"])


@flips("reward_model.path", "reward_model.eval_path")
def test_reward_model_files(model, monkeypatch, tmp_path, name):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in PREFERENCES[:2]))
    seen, _ = reward_model_run(model, monkeypatch, tmp_path, **{name.removeprefix("reward_model."): str(other)})
    assert (len(seen["rows"]), seen["held_out"]) == {"reward_model.path": (1, 1), "reward_model.eval_path": (4, 2)}[
        name
    ]
    with pytest.raises(InputError, match=rf"{name}='nowhere': no such file"):
        reward_model_run(model, monkeypatch, tmp_path, **{name.removeprefix("reward_model."): "nowhere"})


def judged(program: str, tests: dict, **fields) -> tuple[float, float]:
    """The score of a program with the option of `rewards.code` at its default, and changed; skips where none runs."""
    scores = []
    for changed in ({}, fields):
        given = {"seconds": 3.0, "memory_mb": 256} | changed
        try:
            scores += code.code_reward(CodeConfig(**given), [{"tests": tests}])(completions=[program], tests=[tests])
        except InputError as error:
            if changed:  # the default works here, so this is no lack of the machine's
                raise
            pytest.skip(str(error))
    return tuple(scores)


ONE = {"inputs": ["3\n"], "outputs": ["3"]}


@flips(
    "rewards.code.score",
    "rewards.code.seconds",
    "rewards.code.memory_mb",
    "rewards.code.threads",
    "rewards.code.files_mb",
    "rewards.code.output_kb",
)
def test_code_limits(name):
    both = {"inputs": ["3\n", "4\n"], "outputs": ["3", "4"]}
    threads = "import threading, time\nfor _ in range(9): threading.Thread(target=time.sleep, args=(1,)).start()\n"
    spin = "import time\nwhile time.process_time() < 1.5: pass\n"
    cases = {
        "score": ("share", "print(3)", both, (0.0, 0.5)),
        "seconds": (1.0, f"{spin}print(3)", ONE, (1.0, 0.0)),
        "memory_mb": (64, "x = bytearray(64 << 20)\nprint(3)", ONE, (1.0, 0.0)),
        "threads": (4, f"{threads}print(3)", ONE, (1.0, 0.0)),
        "files_mb": (1, "open('/scratch/x', 'w').write('x')\nprint(3)", ONE, (0.0, 1.0)),
        "output_kb": (1, "print(3, ' ' * 2000)", ONE, (1.0, 0.0)),
    }
    leaf = name.removeprefix("rewards.code.")
    value, program, tests, wanted = cases[leaf]
    assert judged(program, tests, **{leaf: value}) == wanted


@flips("rewards.code.sandbox")
def test_code_sandbox():
    pytest.importorskip("pydantic_monty", reason="pydantic-monty is not installed")
    # Its part of Python has no such module.
    assert judged("import ctypes\nprint(3)", ONE, sandbox="monty") == (1.0, 0.0)


class Crowd:
    """A place to run programs that counts how many are there at once."""

    def __init__(self):
        self.here, self.most = [], 0

    def run(self, *_):
        self.here.append(1)
        time.sleep(0.05)
        self.most = max(self.most, len(self.here))
        self.here.pop()
        return Outcome("", b"3", b"")


@flips("rewards.code.parallel")
def test_code_parallel():
    for parallel in (1, 2):
        place = Crowd()
        made = code.CodeReward(CodeConfig(parallel=parallel), place, Limits(1.0, 1, 1, 0, 1))
        assert made(completions=["print(3)"] * 4, tests=[ONE] * 4) == [1.0] * 4
        assert place.most == parallel


@flips("rewards.on_error")
def test_reward_on_error(model, tmp_path):
    for on_error, fails, score in (("raise", True, np.nan), ("zero", False, 0.0)):
        fields = {"rewards.names": ("bad",), "rewards.on_error": on_error}
        made = prepared(model, rewards={"bad": lambda completions: 1 / 0}, **fields)
        host = made[0].scorer.host
        values = host.call(np.array([0]), np.zeros((1, 2), np.int32), np.array([1]))
        assert np.array_equal(values, [[score]], equal_nan=True) and (host.take_error() is not None) == fails
        lines = []
        writer = types.SimpleNamespace(step=lambda done, line, to=lines: to.append(line))
        session = recorded(*made, tmp_path, skipped=0, writer=writer)
        assert lines[0]["reward_errors/bad"] == (not fails)
        assert ("raised ZeroDivisionError" in session.terminal._err.getvalue()) == (not fails)


@flips("rewards.workers")
def test_reward_workers(model):
    for workers, want in ((3, 3), (0, min(len(os.sched_getaffinity(0)), 8))):
        fields = {"rewards.names": ("reward_functions:later", "math"), "rewards.weights": (1.0, 1.0)}
        fields["rewards.workers"] = workers
        scorer = prepared(model, **fields)[0].scorer
        assert scorer.host.pool.size == scorer.host.functions["math"].pool.size == want


IN_GRAPH_FIELDS = {  # reward, other value, scores of IN_GRAPH at the default and at the other value
    "rewards.language": ("language", "ru", [1 / 3], [2 / 3]),
    "rewards.repetition_ngram": ("repetition", 1, [-0.5], [-2 / 3]),
    "rewards.length_budget": ("overlong", 3, [0.0], [-1.0]),
    "rewards.overlong_cache": ("overlong", 10, [0.0], [-0.4]),
    "rewards.cosine_right": ("cosine", (3.0, 3.0), [0.8272542], [3.0]),
    "rewards.cosine_wrong": ("cosine", (-2.0, -2.0), [-0.8272542], [-2.0]),
}


@flips(*IN_GRAPH_FIELDS)
def test_in_graph_reward_fields(name):
    reward, value, at_default, at_other = IN_GRAPH_FIELDS[name]
    text = "мир труд word".encode()
    columns = {
        "tokens": jnp.array([[1, 2, 1, 2, 1, 2, 0, 0, 0, 0]]),
        "token_lengths": jnp.array([6 if reward == "repetition" else 4]),
        "right": jnp.array([name != "rewards.cosine_wrong"]),
    }
    if reward == "overlong":
        columns["tokens"] = jnp.zeros((1, 10), jnp.int32)  # a budget of 10, the last fifth of which costs
    padded = jnp.asarray(np.frombuffer(text, np.uint8)[None])
    for fields, want in (({}, at_default), ({name: value}, at_other)):
        config = tiny.config(**{"sampler.max_new_tokens": 10, **fields}).rewards
        scores, valid = jax.jit(verifier(reward, config))(padded, jnp.array([len(text)]), columns)
        np.testing.assert_allclose(scores, want, atol=1e-6)
        assert valid.tolist() == [1.0]


@flips("rewards.math_timeout")
def test_math_timeout(model):
    for seconds in (5.0, 0.5):
        fields = {"rewards.names": ("math",), "rewards.math_timeout": seconds, "rewards.timeout": 9.0}
        reward = prepared(model, **fields)[0].scorer.host.functions["math"]
        limits = []
        reward.pool = types.SimpleNamespace(run=lambda tasks, *given, to=limits: to.append(given) or [{}] * len(tasks))
        assert reward(["<answer>x+1</answer>"], ["1+x"]) == [0.0] and limits == [(seconds, pytest.approx(8.1))]


@flips(*(f"rewards.judge.{field.name}" for field in dataclasses.fields(JudgeConfig)))
def test_judge_fields(monkeypatch, tmp_path, name):
    """Each field changes what is asked, how often, or what is kept; the server is a function here."""
    files = {"key_file": "secret", "prompt": "Right? {completion}", "cache": ""}
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    other = {
        "url": "http://other/v1",
        "model": "second",
        "max_tokens": 7,
        "timeout": 3.0,
        "retries": 0,
        "concurrency": 1,
        "requests_per_second": 2.0,
        **{file: str(tmp_path / file) for file in files},
    }
    field = name.rpartition(".")[2]
    known = {"url": "http://judge/v1", "model": "first", "concurrency": 2}

    def found(**changed):
        requests, waits, inside, most, lock = [], [], [], [], threading.Lock()

        def urlopen(request, timeout):
            with lock:
                requests.append((request.full_url, request.headers, json.loads(request.data), timeout))
                first = len(requests) == 1
                inside.append(1)
                most.append(len(inside))
            time.sleep(0.05)
            with lock:
                inside.pop()
                if first:
                    raise OSError("reset")
            verdict = json.dumps({"analysis": "", "correctness": True})
            return contextlib.closing(io.StringIO(json.dumps({"choices": [{"message": {"content": verdict}}]})))

        monkeypatch.setattr(judge.urllib.request, "urlopen", urlopen)
        settings = tiny.config(**{f"rewards.judge.{k}": v for k, v in {**known, **changed}.items()}).rewards.judge
        reward = judge.JudgeReward(settings, waits.append, lambda: 50.0)
        try:
            reward(prompts=["p"] * 3, completions=["a", "b", "c"])
        except judge.JudgeError:
            waits.append("gave up")
        url, headers, body, timeout = requests[0]
        prompt = body["messages"][0]["content"][:6]
        cached = len((tmp_path / "cache").read_text().splitlines())
        told = {
            "url": url,
            "model": body["model"],
            "key_file": headers.get("Authorization"),
            "prompt": prompt,
            "max_tokens": body["max_tokens"],
            "timeout": timeout,
            "retries": "gave up" in waits,
            "concurrency": max(most) > 1,
            "requests_per_second": 0.5 in waits and 1.0 in waits,
            "cache": cached,
        }
        return told[field]

    want = {
        "url": ("http://judge/v1/chat/completions", "http://other/v1/chat/completions"),
        "model": ("first", "second"),
        "key_file": (None, "Bearer secret"),
        "prompt": ("You ju", "Right?"),
        "max_tokens": (1024, 7),
        "timeout": (30.0, 3.0),
        "retries": (False, True),
        "concurrency": (True, False),
        "requests_per_second": (False, True),
        "cache": (0, 3),
    }
    assert (found(), found(**{field: other[field]})) == want[field]


# objective

NEW = np.log(np.array([[0.5, 0.9, 0.3], [0.4, 0.2, 0.6]], np.float32))
OLD = np.log(np.array([[0.5, 0.5, 0.6], [0.3, 0.5, 0.5]], np.float32))
REF = np.log(np.array([[0.4, 0.8, 0.5], [0.3, 0.3, 0.7]], np.float32))
MASK = np.array([[1, 1, 1], [1, 1, 0]], np.float32)
ADVANTAGE = np.array([1.0, -2.0], np.float32)


def loss_of(**fields) -> float:
    config = tiny.config(**{f"objective.{name}": value for name, value in fields.items()}).objective
    return float(policy_loss(*map(jnp.asarray, (NEW, OLD, REF, ADVANTAGE, MASK)), config)[0])


def loss_by_hand(low=0.2, high=0.2, beta=0.0, kind="dapo") -> float:
    ratio, a = np.exp(NEW - OLD), ADVANTAGE[:, None]
    tokens = -np.minimum(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)
    tokens = (tokens + beta * (np.exp(REF - NEW) - (REF - NEW) - 1)) * MASK
    return {
        "grpo": (tokens.sum(1) / MASK.sum(1)).mean(),
        "bnpo": tokens.sum() / MASK.sum(),
        "dapo": tokens.sum() / MASK.sum(),
        "dr_grpo": tokens.sum() / MASK.size,
    }[kind]


@flips("objective.loss_type")
def test_loss_type():
    losses = {kind: loss_of(loss_type=kind) for kind in ("grpo", "bnpo", "dapo", "dr_grpo")}
    for kind, loss in losses.items():
        assert loss == pytest.approx(loss_by_hand(kind=kind), abs=1e-6)
    assert len({round(loss, 4) for loss in losses.values()}) == 3
    # bnpo and dapo part where a rollout has several minibatches: tokens of this one, or half of all tokens.
    whole = np.concatenate([MASK, np.ones_like(MASK)])
    for kind, want in (("bnpo", MASK.sum()), ("dapo", whole.sum() / 2)):
        config = tiny.config(**{"objective.loss_type": kind}).objective
        assert float(denominators(jnp.asarray(MASK), jnp.asarray(whole), config)) == want


@flips("objective.epsilon")
def test_epsilon():
    for low in (0.2, 0.5, 0.7):
        assert loss_of(epsilon=low) == pytest.approx(loss_by_hand(low=low), abs=1e-6)
    assert loss_of(epsilon=0.2) != pytest.approx(loss_of(epsilon=0.7))


@flips("objective.epsilon_high")
def test_epsilon_high():
    for high in (0.2, 0.5, 1.0):
        assert loss_of(epsilon_high=high) == pytest.approx(loss_by_hand(high=high), abs=1e-6)
    assert loss_of(epsilon_high=0.2) != pytest.approx(loss_of(epsilon_high=1.0))


@flips("objective.beta")
def test_beta():
    assert loss_of(beta=0.3) == pytest.approx(loss_by_hand(beta=0.3), abs=1e-6)
    assert loss_of(beta=0.3) != pytest.approx(loss_of())
    assert abstract_state(tiny.parts(tiny.config())).reference is None
    kept = abstract_state(tiny.parts(tiny.config(**{"objective.beta": 0.3})))
    assert jax.tree.structure(kept.reference) == jax.tree.structure(kept.trainable)


# Other fields of the loss: what is set with them, and two values.
LOSS_FIELDS = {
    "importance_sampling_level": ({"loss_type": "grpo"}, "token", "sequence", "sequence_token"),
    "delta": ({}, 0.0, 1.2, 1.3),
    "cispo_max_ratio": ({"loss_type": "cispo"}, 1.1, 5.0),
    "sapo_temperature_pos": ({"loss_type": "sapo"}, 1.0, 2.0),
    "sapo_temperature_neg": ({"loss_type": "sapo"}, 1.05, 3.0),
    "vespo_k_pos": ({"loss_type": "vespo"}, 2.0, 1.0),
    "vespo_lambda_pos": ({"loss_type": "vespo"}, 3.0, 1.0),
    "vespo_k_neg": ({"loss_type": "vespo"}, 3.0, 1.0),
    "vespo_lambda_neg": ({"loss_type": "vespo"}, 2.0, 1.0),
    "kl_estimator": ({"beta": 0.5}, "k1", "k2", "k3"),
    "kl_gradient": ({"beta": 0.5}, "estimator", "k2"),
    "entropy_coef": ({}, 0.0, 0.2),
    "top_entropy_quantile": ({}, 1.0, 0.4),
}
ENTROPIES = np.array([[0.9, 0.2, 1.4], [0.1, 1.1, 0.0]], np.float32)


@flips(*(f"objective.{name}" for name in LOSS_FIELDS))
def test_fields_of_the_loss(name):
    given, *values = LOSS_FIELDS[name.removeprefix("objective.")]
    advantage = np.array([1.0, 0.5, -1.0], np.float32) * ADVANTAGE[:, None]
    arrays, seen = (NEW, OLD, REF, advantage, MASK), []
    for value in values:
        fields = {"epsilon_high": 0.15, **given, name.removeprefix("objective."): value}
        config = dataclasses.replace(tiny.config().objective, **fields)
        selected = loss_oracle.high_entropy(ENTROPIES, MASK, config.top_entropy_quantile)
        want = loss_oracle.loss_and_gradients(*arrays, config, np.ones(2), 3, entropies=ENTROPIES, selected=selected)
        loss, grad = jax.value_and_grad(
            lambda new, config=config: policy_loss(
                new, *map(jnp.asarray, arrays[1:]), config, entropies=jnp.asarray(ENTROPIES)
            )[0]
        )(jnp.asarray(NEW))
        np.testing.assert_allclose(loss, want[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(grad, want[1], rtol=1e-4, atol=1e-6)
        seen.append((round(float(loss), 5), *np.round(np.ravel(grad), 5).tolist()))
    assert len(set(seen)) == len(values)


@flips("objective.correction", "objective.correction_max", "objective.correction_min")
def test_fields_of_the_correction(name):
    plain = {"correction": "token_truncate", "correction_max": 1.5, "correction_min": 0.2}
    values = {"correction": ["token_mask", "sequence_truncate"], "correction_max": [1.2, 0.0], "correction_min": [0.7]}
    seen = []
    for value in [plain[name.removeprefix("objective.")], *values[name.removeprefix("objective.")]]:
        config = dataclasses.replace(tiny.config().objective, **plain | {name.removeprefix("objective."): value})
        weights, _ = correction_weights(*map(jnp.asarray, (NEW, OLD, MASK)), config)
        np.testing.assert_allclose(weights, loss_oracle.correction_weights(NEW, OLD, MASK, config), rtol=1e-5)
        seen.append(tuple(np.round(np.ravel(weights), 4)))
    assert len(set(seen)) == len(seen)
    assert "correction/weight" not in updated()[1].means


BATCH = np.array([1.0, 0.0, 0.5, 0.2], np.float32)  # two groups of two
GROUPS, MEANS = BATCH.reshape(2, 2), BATCH.reshape(2, 2).mean(1, keepdims=True)
ADVANTAGE_FIELDS = {
    "baseline": {
        "group": GROUPS - MEANS,
        "leave_one_out": GROUPS - GROUPS[:, ::-1],
        "batch": BATCH - BATCH.mean(),
        "none": BATCH,
    },
    "advantage_ddof": {
        ddof: (GROUPS - MEANS) / (GROUPS.std(axis=1, ddof=ddof, keepdims=True) + 1e-4) for ddof in (0, 1)
    },
    "normalize_advantages": {False: GROUPS - MEANS, True: (GROUPS - MEANS) / ((GROUPS - MEANS).std(ddof=1) + 1e-4)},
}


@flips(*(f"objective.{name}" for name in ADVANTAGE_FIELDS))
def test_fields_of_the_advantages(name):
    scaling = {} if name.endswith("ddof") else {"objective.scale_rewards": "none"}
    for value, by_hand in ADVANTAGE_FIELDS[name.removeprefix("objective.")].items():
        config = tiny.config(**scaling, **{name: value}).objective
        np.testing.assert_allclose(advantages(jnp.asarray(BATCH), 2, config), np.ravel(by_hand), rtol=1e-4, atol=1e-7)


@flips("objective.multi_objective_aggregation")
def test_advantages_of_components():
    made = []
    for fields in ({}, {"objective.multi_objective_aggregation": "normalize_then_sum"}):
        parts = bigram_parts(**fields)
        rollout = hand_made_rollout(parts.config)
        scores = rollout.scores.replace(values=np.array([[1.0], [1.0], [1.0], [0.0]], np.float32))
        made.append(np.asarray(add_advantages(parts, rollout, scores).advantages)[:, 0])
    plain = np.array([0, 0, 0.5, -0.5]) / (0.5**0.5 + 1e-4)
    np.testing.assert_allclose(made[0], plain, rtol=1e-4)
    np.testing.assert_allclose(made[1], plain / (plain.std(ddof=1) + 1e-4), rtol=1e-4)


@flips("objective.scale_rewards")
def test_scale_rewards():
    rewards = np.array([1.0, 0.0, 0.5, 0.1], np.float32)
    groups = rewards.reshape(2, 2)
    centred = groups - groups.mean(1, keepdims=True)
    want = {
        "group": centred / (groups.std(1, ddof=1, keepdims=True) + 1e-4),
        "batch": centred / (rewards.std(ddof=1) + 1e-4),
        "none": centred,
    }
    for kind, by_hand in want.items():
        config = tiny.config(**{"objective.scale_rewards": kind}).objective
        np.testing.assert_allclose(advantages(jnp.asarray(rewards), 2, config), by_hand.ravel(), rtol=1e-4)


@flips("objective.advantage_epsilon")
def test_advantage_epsilon():
    for epsilon in (1e-4, 1.0):
        config = tiny.config(**{"objective.advantage_epsilon": epsilon}).objective
        got = advantages(jnp.array([1.0, 0.0]), 2, config)
        np.testing.assert_allclose(got, [0.5 / (0.5**0.5 + epsilon), -0.5 / (0.5**0.5 + epsilon)], rtol=1e-4)


@flips("objective.num_iterations")
def test_num_iterations():
    once, twice = updated(), updated(**{"objective.num_iterations": 2})
    assert (int(once[0].updates), int(twice[0].updates)) == (1, 2)
    moved = [np.abs(embedding_of(state) - EMBEDDING).max() for state, _ in (once, twice)]
    assert moved[1] > moved[0] > 0


@flips("objective.minibatches")
def test_minibatches():
    one, two = updated(), updated(**{"objective.minibatches": 2})
    assert (int(one[0].updates), int(two[0].updates)) == (1, 2)
    assert not np.allclose(embedding_of(one[0]), embedding_of(two[0]))


@flips("objective.micro_batch_size", "train.share_prefix", "train.pack_prompts")
def test_shapes_of_gradient_passes(name):
    """Other passes, same update."""

    def columns(**fields):
        """Positions that the embedding of one gradient pass looks up."""
        pack = jax.eval_shape(lambda: packs_of_config(bigram_parts(**fields)).pick(0)[0])
        return pack.tokens.shape

    fields = {
        "objective.micro_batch_size": {name: 4},
        "train.share_prefix": {name: False},
        "train.pack_prompts": {name: 2},
    }[name]
    want = {
        "objective.micro_batch_size": (1, 2 * 2 + 4 * 3),  # two prompts of 2 tokens, four rows of 3
        "train.share_prefix": (1, 2 + 3),  # one row
        "train.pack_prompts": (1, 2 * 2 + 2 * 3),
    }[name]
    assert columns() == (1, 2 + 2 * 3) and columns(**fields) == want
    plain, other = updated(), updated(**fields)
    assert int(other[0].updates) == 1
    np.testing.assert_allclose(embedding_of(plain[0]), embedding_of(other[0]), atol=1e-6)


@flips("objective.reference_every")
def test_reference_every():
    kept, _ = updated(**{"objective.beta": 0.1})
    np.testing.assert_array_equal(embedding_of(kept, "reference"), EMBEDDING)
    renewed, _ = updated(**{"objective.beta": 0.1, "objective.reference_every": 1})
    np.testing.assert_array_equal(embedding_of(renewed, "reference"), embedding_of(renewed))
    assert not np.array_equal(embedding_of(renewed), EMBEDDING)


@flips("objective.outer_iterations")
def test_outer_iterations():
    for iterations, due in ((1, ()), (2, (4, 8)), (4, (2, 4, 6, 8))):
        parts = bigram_parts(**{"objective.beta": 0.1, "objective.outer_iterations": iterations, "train.steps": 8})
        state = bigram_state(parts)
        state = state.replace(reference=jax.tree.map(lambda x: x + 1, state.trainable))
        for step in range(1, 9):
            renewed = embedding_of(refresh_reference(parts, state.replace(step=jnp.int32(step))), "reference")
            assert np.array_equal(renewed, EMBEDDING) == (step in due)


@flips("objective.mask_truncated")
def test_mask_truncated():
    """Only row 1, which did not end, has an advantage: without it nothing is learned."""
    for masked in (False, True):
        parts = bigram_parts(**{"objective.mask_truncated": masked})
        assert training_batch(hand_made_rollout(parts.config), masked).mask[1].sum() == (0.0 if masked else 3.0)
    state, _ = run_update(parts, hand_made_rollout(parts.config, (0.0, 1.0, 0.0, 0.0)))
    np.testing.assert_array_equal(embedding_of(state), EMBEDDING)


def test_a_value_model_is_a_baseline():
    parts = [tiny.parts(tiny.config(**{"objective.baseline": name})) for name in ("group", "value")]
    assert [sorted(abstract_state(each).trainable) for each in parts] == [["params"], ["params", "value_head"]]


# ppo


@functools.cache
def critic_parts(**fields):
    """(parts, state with a value head that is not 0, pieces of the rollout made by hand)."""
    parts = bigram_parts(**{"objective.baseline": "value", "objective.beta": 0.1, **fields})
    state = bigram_state(bigram_parts())
    head = {"kernel": jnp.array([[0.5], [-1.0], [2.0]]), "bias": jnp.array([0.25])}
    state = state.replace(
        trainable=state.trainable | {"value_head": head}, reference={"params": {"embed": {"embedding": -EMBEDDING}}}
    )
    pieces = split(training_batch(hand_made_rollout(parts.config), False), 1, pack_shape(parts.config, 1))
    return parts, state, pieces.replace(ref_logps=pieces.old_logps * 1.5)


def targets(**fields):
    """(advantages, returns) [4, 3] that `add_gae` makes, and by hand for the same config."""
    parts, state, pieces = critic_parts(**fields)
    rollout, ppo = hand_made_rollout(parts.config), parts.config.ppo
    told, pieces, _ = add_gae(parts, state, rollout, pieces)
    before = np.concatenate([rollout.prompt_tokens[:, 1:], rollout.tokens[:, :-1]], axis=1)
    values = EMBEDDING[before] @ np.array([0.5, -1.0, 2.0]) + 0.25
    penalty = -0.1 * 0.5 * rollout.logps * ppo.kl_in_reward
    rewards = numpy_gae.token_rewards(rollout.scores.values[:, 0], rollout.mask, penalty)
    raw = numpy_gae.gae(rewards, values, rollout.mask, ppo.gamma, ppo.lam)
    white = (raw - raw.mean()) / raw.std(ddof=1) if ppo.whiten_advantages else raw
    return np.asarray(told.advantages), np.asarray(join(pieces.returns)), white, raw + values


PPO_VALUES = {"ppo.gamma": 0.5, "ppo.lam": 0.5, "ppo.whiten_advantages": False, "ppo.kl_in_reward": True}


@flips(*PPO_VALUES)
def test_what_the_policy_is_taught_by_ppo(name):
    plain, flipped = targets(), targets(**{name: PPO_VALUES[name]})
    for got, returns, white, total in (plain, flipped):
        np.testing.assert_allclose(got, white, atol=1e-4)
        np.testing.assert_allclose(returns, total, atol=1e-4)
    assert not np.allclose(plain[0], flipped[0], atol=1e-2)


@flips("ppo.critic")
def test_critic():
    for critic in ("head", "model"):
        parts = tiny.parts(tiny.config(**{"objective.baseline": "value", "ppo.critic": critic}))
        trainable = abstract_state(parts).trainable
        assert ("critic" in trainable) == (critic == "model")
        assert trainable["value_head"]["kernel"].shape == (tiny.architecture().width, 1)


@functools.cache
def numerator(fields: tuple[tuple[str, float], ...]) -> float:
    """The numerator of a micro-batch whose values are half a unit off their old ones."""
    parts, state, pieces = critic_parts(**dict(fields))
    shape = dataclasses.replace(pack_shape(parts.config, 1), rows=4, prompts=2)  # all of it in one pack
    pack, micro = make_packs(jax.tree.map(lambda x: x[0], pieces), shape).pick(0)
    values = completion_values(parts, state.trainable, pack)
    micro = micro.replace(old_values=values + 0.5, returns=values - 1.0)
    return float(jax.jit(lambda trained: micro_loss(trained, parts, state.frozen, pack, micro)[0])(state.trainable))


def value_numerator(**fields):
    """What the value loss adds to the numerator."""
    return numerator(tuple(fields.items())) - numerator((("ppo.vf_coef", 0.0),))


@flips("ppo.vf_coef")
def test_vf_coef():
    """Twelve tokens, each one unit above its return: half of 1 each, and clipped to (0.3 + 1)^2 / 2."""
    assert value_numerator() == pytest.approx(0.1 * 12 * 1.3**2 / 2, rel=1e-4)
    assert value_numerator(**{"ppo.vf_coef": 2.0}) == pytest.approx(2.0 * 12 * 1.3**2 / 2, rel=1e-4)


@flips("ppo.cliprange_value")
def test_cliprange_value():
    assert value_numerator(**{"ppo.cliprange_value": 0.0}) == pytest.approx(0.1 * 12 / 2, rel=1e-4)
    assert value_numerator(**{"ppo.cliprange_value": 0.4}) == pytest.approx(0.1 * 12 * 1.1**2 / 2, rel=1e-4)


# optim

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]]), "scale": jnp.array([2.0, -1.0])}
GRADIENTS = (
    {"kernel": jnp.array([[3.0, -4.0], [0.1, 2.0]]), "scale": jnp.array([0.5, 1.0])},
    {"kernel": jnp.array([[-1.0, 0.5], [2.0, 0.3]]), "scale": jnp.array([0.2, -3.0])},
)


def optim(**fields) -> OptimConfig:
    return tiny.config(**{"optim.lr": 0.1, **{f"optim.{name}": value for name, value in fields.items()}}).optim


def changes(count: int = 1, **fields):
    """What the optimizer adds to PARAMS at update number `count`."""
    optimizer = make_optimizer(optim(**fields), 10)
    state, made = optimizer.init(PARAMS), None
    for gradient in GRADIENTS[:count]:
        made, state = optimizer.update(gradient, state, PARAMS)
    return jax.device_get(made), state


def adam_by_hand(count=1, lr=0.1, clip=1.0, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, decays=("kernel",)):
    gradients = []
    for gradient in jax.device_get(GRADIENTS[:count]):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        gradients.append({k: g * min(1.0, clip / norm) if clip else g for k, g in gradient.items()})
    made = {}
    for name in PARAMS:
        m = v = 0.0
        for gradient in gradients:
            m, v = b1 * m + (1 - b1) * gradient[name], b2 * v + (1 - b2) * gradient[name] ** 2
        step = (m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + eps)
        made[name] = -lr * (step + (decay * np.asarray(PARAMS[name]) if name in decays else 0.0))
    return made


def assert_changes(fields: dict, by_hand: dict, count: int = 1):
    """The optimizer does what the formula says, and that is not what the defaults do."""
    got, _ = changes(count, **fields)
    want, plain = adam_by_hand(count, **by_hand), changes(count)[0]
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-4, atol=1e-7), got, want)
    assert any(not np.allclose(got[k], plain[k], rtol=1e-3) for k in got)


def test_the_oracle_is_the_default_optimizer():
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-4), changes(2)[0], adam_by_hand(2))


@flips("optim.lr")
def test_lr(model):
    assert_changes({"lr": 0.3}, {"lr": 0.3})
    parts = prepared(model, **{"optim.lr": 0.7})[0]
    assert float(parts.schedule(0)) == pytest.approx(0.7)


@flips("optim.name")
def test_optimizer_name():
    _, adam_state = changes()
    other, other_state = changes(name="adafactor")
    names = [{path for path, *_ in tree_names(state)} for state in (adam_state, other_state)]
    assert any("mu" in n for n in names[0]) and not any("mu" in n for n in names[1])
    assert any("v_row" in n for n in names[1]) and not any("v_row" in n for n in names[0])
    second = changes(2)[0], changes(2, name="adafactor")[0]
    assert not np.allclose(second[0]["kernel"], second[1]["kernel"], rtol=1e-2)
    # Adafactor's first step, not factored below 128 rows: g / sqrt(g^2), downhill.
    np.testing.assert_allclose(other["scale"], -0.1 * np.sign(np.asarray(GRADIENTS[0]["scale"])), rtol=1e-3)


def tree_names(state):
    return [(jax.tree_util.keystr(path),) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]


@flips("optim.schedule")
def test_schedule():
    at = np.arange(11)
    for kind, by_hand in (
        ("constant", np.full(11, 0.1)),
        ("linear", 0.1 * (1 - at / 10)),
        ("cosine", 0.05 * (1 + np.cos(np.pi * at / 10))),
    ):
        np.testing.assert_allclose([float(make_schedule(optim(schedule=kind), 10)(i)) for i in at], by_hand, atol=1e-6)


@flips("optim.warmup_steps")
def test_warmup_steps():
    schedule = make_schedule(optim(warmup_steps=4), 10)
    np.testing.assert_allclose([float(schedule(i)) for i in range(6)], [0, 0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-5)


@flips("optim.final_lr_fraction")
def test_final_lr_fraction():
    for kind in ("linear", "cosine"):
        assert float(make_schedule(optim(schedule=kind, final_lr_fraction=0.2), 10)(10)) == pytest.approx(0.02)
        assert float(make_schedule(optim(schedule=kind), 10)(10)) == pytest.approx(0.0, abs=1e-8)


@flips("optim.clip_norm")
def test_clip_norm():
    """Adam's first step does not know the gradient's size unless epsilon is large: 1 here."""
    for clip in (0.0, 0.5, 2.0):
        got, _ = changes(eps=1.0, clip_norm=clip)
        want = adam_by_hand(eps=1.0, clip=clip)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-4), got, want)
    assert np.abs(changes(eps=1.0, clip_norm=0.5)[0]["kernel"]).max() < np.abs(changes(eps=1.0)[0]["kernel"]).max()


@flips("optim.weight_decay")
def test_weight_decay():
    assert_changes({"weight_decay": 0.3}, {"decay": 0.3})
    got, _ = changes(name="adafactor", weight_decay=0.3)
    plain, _ = changes(name="adafactor")
    np.testing.assert_allclose(got["kernel"] - plain["kernel"], -0.1 * 0.3 * np.asarray(PARAMS["kernel"]), rtol=1e-4)


@flips("optim.decay_mask")
def test_decay_mask():
    assert_changes({"weight_decay": 0.3, "decay_mask": "all"}, {"decay": 0.3, "decays": ("kernel", "scale")})


@flips("optim.b1")
def test_b1():
    assert_changes({"b1": 0.5}, {"b1": 0.5}, count=2)


@flips("optim.b2")
def test_b2():
    assert_changes({"b2": 0.5}, {"b2": 0.5}, count=2)


@flips("optim.eps")
def test_eps():
    assert_changes({"eps": 0.5}, {"eps": 0.5})


@flips("optim.routing_bias_rate")
def test_routing_bias_rate(model):
    """A whole step with it is in tests/models/test_routed_step.py."""
    gradient = {"mlp": {"routing_bias": jnp.array([3.0, -2.0, 0.0]), "kernel": jnp.ones(2)}}
    rest, loads = split_routing_biases(gradient)
    assert not rest["mlp"]["routing_bias"].any() and rest["mlp"]["kernel"] is gradient["mlp"]["kernel"]
    decayed = {"mlp": {"routing_bias": jnp.full(3, 9.0), "kernel": jnp.full(2, 0.5)}}
    for rate, want in ((0.0, [0, 0, 0]), (0.25, [-0.25, 0.25, 0])):
        moved = move_routing_biases(decayed, loads, rate)
        np.testing.assert_array_equal(moved["mlp"]["routing_bias"], want)
        assert moved["mlp"]["kernel"] is decayed["mlp"]["kernel"]
        assert prepared(model, **{"optim.routing_bias_rate": rate})[0].module.balance is (rate > 0)


@flips("optim.moment_dtype")
def test_moment_dtype():
    for dtype in ("float32", "bfloat16"):
        _, state = changes(moment_dtype=dtype)
        (adam,) = [s for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")]
        assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype(dtype)}
        assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}


# step


@flips("step.mode")
def test_mode():
    programs = {}
    for mode in ("fused", "staged"):
        parts = tiny.parts(tiny.config(**{"step.mode": mode}))
        programs[mode] = Program(parts, tiny_layout(parts, abstract_state(parts)))
    assert hasattr(programs["fused"], "fused") and not hasattr(programs["fused"], "sample")
    assert hasattr(programs["staged"], "sample") and not hasattr(programs["staged"], "fused")


# mesh


@flips("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.expert", "mesh.sequence")
def test_mesh_axes(name):
    axis = name.removeprefix("mesh.")
    rest = {other: 1 for other in ("data", "fsdp", "tensor", "expert", "sequence")}
    mesh = make_mesh(tiny.config(**{f"mesh.{k}": v for k, v in {**rest, axis: 8}.items()}).mesh)
    assert dict(mesh.shape) == {**rest, axis: 8}
    filled = make_mesh(tiny.config(**{f"mesh.{k}": v for k, v in {**rest, axis: -1}.items()}).mesh)
    assert dict(filled.shape) == {**rest, axis: 8}
    kernel = {"stack_0": {"mlp": {"up": {"kernel": jnp.zeros((2, 16, 24))}}}}
    experts = {"stack_1": {"mlp": {"experts_up": {"kernel": jnp.zeros((2, 8, 16, 24))}}}}
    kernel, experts = (jax.tree.leaves(jax.device_put(x, shardings(x, mesh)))[0] for x in (kernel, experts))
    want = (2, 1, 16, 24) if axis == "expert" else (2, 8, *kernel.addressable_shards[0].data.shape[1:])
    assert experts.addressable_shards[0].data.shape == want
    assert (
        kernel.addressable_shards[0].data.shape
        == {
            "fsdp": (2, 2, 24),
            "tensor": (2, 16, 3),
        }.get(axis, (2, 16, 24))  # copied
    )
    rows = jax.device_put(jnp.zeros((16, 3)), row_sharding(mesh))
    assert rows.addressable_shards[0].data.shape == ((16, 3) if axis == "tensor" else (2, 3))


@flips("mesh.cpu_devices")
def test_mesh_cpu_devices(cli_env):
    """Before jax has its devices; 0 is one a core, as far as the rows of a batch divide."""
    show = (
        "import jax, tiny; from grpo_jax.parallel import split_processor; "
        "split_processor(tiny.config(**{'mesh.cpu_devices': %d, 'mesh.data': -1})); print(jax.device_count())"
    )
    env = cli_env | {"PYTHONPATH": f"{cli_env['PYTHONPATH']}:{pathlib.Path(__file__).parent}"}
    for count in (1, 3):
        run = subprocess.run([sys.executable, "-c", show % count], env=env, capture_output=True, text=True, check=True)
        assert int(run.stdout) == count
    config = tiny.config(**{"mesh.data": -1, "data.prompts_per_step": 12, "base.sft.batch_size": 24})
    assert [cores_for_rows(config, cores) for cores in (1, 2, 5, 6, 11, 64)] == [1, 2, 4, 6, 6, 12]
    assert cores_for_rows(dataclasses.replace(config, mesh=tiny.config().mesh), 6) == 1


@flips("mesh.auto")
def test_mesh_auto():
    """Eight devices of no known memory: rows go over them, and where they do not divide heads do."""
    out, picked = io.StringIO(), {}
    for prompts in (8, 4):
        config = tiny.config(**{"mesh.auto": True, "mesh.data": -1, "data.prompts_per_step": prompts})
        picked[prompts] = dict(make_mesh(with_mesh(config, Terminal(out)).mesh).shape)
    rest = {"fsdp": 1, "expert": 1, "sequence": 1}
    assert picked == {8: {"data": 8, **rest, "tensor": 1}, 4: {"data": 4, **rest, "tensor": 2}}
    assert out.getvalue().count("mesh.auto: ") == 2
    with pytest.raises(InputError, match="mesh.data=1 is picked by mesh.auto=True: leave it -1"):
        tiny.config(**{"mesh.auto": True})


@flips("mesh.offload")
def test_mesh_offload():
    """Where a state lies, by the memory of its leaves."""
    held = {}
    for offload in ("none", "optimizer", "reference", "both"):
        parts = tiny.parts(tiny.config(**{"mesh.offload": offload, "objective.beta": 0.1}))
        layout = state_layout(parts, abstract_state(parts))
        parts_of_state = (layout.trainable, layout.opt_state, layout.reference)
        held[offload] = [sum(s.memory_kind == "pinned_host" for s in jax.tree.leaves(x)) > 0 for x in parts_of_state]
    assert held == {
        "none": [False, False, False],
        "optimizer": [False, True, False],
        "reference": [False, False, True],
        "both": [False, True, True],
    }


@flips("mesh.sampling")
def test_mesh_sampling():
    """Of a layer's mlp/up kernel [16, 24] on fsdp=4 x tensor=2, what one device holds while sampling."""
    held = {}
    for sampling in ("same", "tensor", "replicated"):
        config = tiny.config(**{"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "mesh.sampling": sampling})
        parts = dataclasses.replace(tiny.parts(tiny.config()), config=config, mesh=make_mesh(config.mesh))
        variables = {"params": tiny.params(parts.module.architecture)}
        variables = jax.device_put(variables, shardings(variables, parts.mesh))
        made = jax.jit(functools.partial(sampling_variables, parts))(variables)
        kernel = made["params"]["stack_0_layer_1"]["mlp"]["up"]["kernel"]
        held[sampling] = kernel.addressable_shards[0].data.shape
    assert held == {"same": (4, 12), "tensor": (16, 12), "replicated": (16, 24)}


# cold_start


@flips("cold_start.enabled")
def test_cold_start_enabled(model, monkeypatch, tmp_path):
    monkeypatch.setattr(grpo, "make_cold_start", lambda *_: str(model.source))
    monkeypatch.setattr(grpo, "load_model", lambda path: dataclasses.replace(model, source="cold"))
    for enabled, source in ((False, model.source), (True, "cold")):
        config = tiny.config(**{"cold_start.enabled": enabled})
        started = grpo.starting_model(config, model, {}, None, tmp_path, Stop(None), Terminal(out=io.StringIO()))
        assert started.source == source


def cold_samples(model, monkeypatch, path, **fields):
    """(evaluator, problems) that the cold start samples with, and the chats that it writes; all samples are right."""
    seen = []

    def sample(self, variables, problems, samples, *_, **__):
        seen.append((self, problems))
        return [
            {
                "problem": i,
                "prompt": row["prompt"],
                "answer": row["answer"],
                "completion": f"so {row['answer']}",
                "rewards": {"number": 1.0},
                "right": True,
                "ended": True,
                "length": 3,
            }
            for i, row in enumerate(self.prompts.rows)
            for _ in range(samples)
        ]

    monkeypatch.setattr(Evaluator, "sample", sample)
    config = tiny.config(**{"cold_start.enabled": True, "data.max_prompt_length": 40, **fields})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    arguments = (config, model, rows_of(config)["train"], mesh, path)
    tail = (Stop(None), Terminal(out=io.StringIO()))
    cold_start.write_samples(*arguments, *(tail if "stop" in parameters(cold_start.write_samples) else tail[1:]))
    return *seen[0], [json.loads(line) for line in path.read_text().splitlines()]


def parameters(function) -> tuple[str, ...]:
    return function.__code__.co_varnames[: function.__code__.co_argcount]


@flips("cold_start.prompts")
def test_cold_start_prompts(model, monkeypatch, tmp_path):
    for count in (3, 7):
        evaluator, problems, _ = cold_samples(
            model, monkeypatch, tmp_path / str(count), **{"cold_start.prompts": count}
        )
        assert evaluator.prompts.size == problems == count


@flips("cold_start.rows")
def test_cold_start_rows(model, monkeypatch, tmp_path):
    for count in (2, 5):
        *_, chats = cold_samples(model, monkeypatch, tmp_path / str(count), **{"cold_start.rows": count})
        assert len(chats) == count
        assert chats[0]["messages"][-1]["content"] == "so 2\n<answer>2</answer>"


@flips("cold_start.system_prompt")
def test_cold_start_system_prompt(model, monkeypatch, tmp_path):
    fields = {"text.system_prompt": "user", "cold_start.prompts": 1}
    for given, said in (("", "user"), ("think", "think")):
        fields["cold_start.system_prompt"] = given
        evaluator, *_ = cold_samples(model, monkeypatch, tmp_path / said, **fields)
        assert model.tokenizer.decode(evaluator.prompts.tokens[0]) == f"{said}\n1+1="


def made_cold_start(model, monkeypatch, workdir, **fields) -> tuple[Given, Config, list]:
    config = tiny.config(**{"cold_start.enabled": True, **fields})
    sampled = []

    def write_samples(config, model, rows, mesh, path, *_):
        sampled.append(path)
        path.write_text('{"prompt": "1+1=", "completion": "2"}\n')

    monkeypatch.setattr(cold_start, "write_samples", write_samples)
    found = captured_fine_tune(monkeypatch, cold_start)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    workdir.mkdir(exist_ok=True)
    terminal = Terminal(out=io.StringIO())
    cold_start.make_cold_start(config, model, {"train": []}, mesh, workdir, Stop(None), terminal)
    return found[-1], config, sampled


@flips("cold_start.sft.path")
def test_cold_start_file(model, monkeypatch, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "2+2=", "completion": "4"}\n')
    given, _, sampled = made_cold_start(model, monkeypatch, tmp_path / "a")
    assert len(sampled) == 1 and model.tokenizer.decode(given.examples[0][0]) == "1+1=2"
    fields = {"cold_start.sft.path": str(tmp_path / "mine.jsonl")}
    given, _, sampled = made_cold_start(model, monkeypatch, tmp_path / "b", **fields)
    assert not sampled and model.tokenizer.decode(given.examples[0][0]) == "2+2=4"


@flips(*(f"cold_start.sft.{leaf}" for leaf in SFT_VALUES))
def test_cold_start_learns_by_its_own_section(model, monkeypatch, tmp_path, name):
    """The section reaches fine_tune, whose use of each field `test_fine_tune` shows."""
    leaf = name.rsplit(".", 1)[-1]
    given, config, _ = made_cold_start(model, monkeypatch, tmp_path / "a", **{name: SFT_VALUES[leaf]})
    assert given.sft is config.cold_start.sft and getattr(given.sft, leaf) == SFT_VALUES[leaf]
    if leaf == "max_length":
        with pytest.raises(InputError, match="more than max_length=2"):
            made_cold_start(model, monkeypatch, tmp_path / "b", **{name: 2})


# sft


def sft_run(model, monkeypatch, tmp_path, **fields) -> Given:
    """What `grpo-jax sft` hands to fine_tune."""
    (tmp_path / "chats.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    given = {"model.path": model.source, "sft.path": str(tmp_path / "chats.jsonl"), "mesh.data": -1, **fields}
    found = captured_fine_tune(monkeypatch, sft)
    monkeypatch.setattr(supervised, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    sft.run(tiny.config(**given), tmp_path / "run", Terminal(out=io.StringIO()))
    return found[-1]


@flips("sft.path")
def test_sft_path(model, monkeypatch, tmp_path):
    given = sft_run(model, monkeypatch, tmp_path)
    assert [model.tokenizer.decode(ids) for ids, _ in given.examples] == ["1+1=2"]
    with pytest.raises(InputError, match="sft.path='nowhere': no such file"):
        sft_run(model, monkeypatch, tmp_path, **{"sft.path": "nowhere"})


SFT_DEFAULT = {"steps": 2, "batch_size": 4, "max_length": 6, "lr": 0.1}


def fine_tuned(monkeypatch, workdir, **fields) -> tuple[list[dict], list[tuple[int, int]]]:
    """(lines of metrics, shapes of the batches) of fine_tune with the bigram model."""
    config = tiny.config(**{f"sft.{name}": value for name, value in {**SFT_DEFAULT, **fields}.items()})
    shapes, make = [], sft.make_sft_batch

    def make_sft_batch(*arguments):
        shapes.append(make(*arguments).tokens.shape)
        return make(*arguments)

    monkeypatch.setattr(sft, "make_sft_batch", make_sft_batch)
    params = {"embed": {"embedding": jnp.asarray(EMBEDDING)}}
    examples = [([1, 2, 3, 4], [0, 1, 1, 1]), ([2, 2, 1], [0, 0, 1])]
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    terminal = Terminal(out=io.StringIO())
    sft.fine_tune(config, config.sft, Bigram(), params, examples, mesh, workdir, Stop(None), terminal, "sft")
    monkeypatch.setattr(sft, "make_sft_batch", make)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()], shapes


@flips("sft.steps", "sft.epochs", "sft.batch_size", "sft.max_length", "sft.lr")
def test_fine_tune(model, monkeypatch, tmp_path, name):
    leaf = name.removeprefix("sft.")
    value = {"steps": 4, "epochs": 5, "batch_size": 8, "max_length": 9, "lr": 0.5}[leaf]
    lines, shapes = fine_tuned(monkeypatch, tmp_path / "tuned", **{leaf: value})
    want = {**SFT_DEFAULT, leaf: value}
    if leaf == "epochs":  # two packs five times, four a step
        want["steps"] = 3
    assert len(lines) == want["steps"] and set(shapes) == {(want["batch_size"], want["max_length"])}
    at = np.arange(want["steps"])  # no warm-up: a twentieth of so few steps is none
    by_hand = want["lr"] * (0.1 + 0.9 * (1 + np.cos(np.pi * at / want["steps"])) / 2)
    np.testing.assert_allclose([line["lr"] for line in lines], by_hand, rtol=1e-5)
    (tmp_path / "run").mkdir()
    assert getattr(sft_run(model, monkeypatch, tmp_path, **{name: value}).sft, leaf) == value


# dpo

DPO_DEFAULT = {"steps": 2, "batch_size": 4, "max_length": 6, "lr": 0.1}
DPO_FLIPPED = {"steps": 4, "batch_size": 8, "max_length": 9, "lr": 0.5}


@functools.cache
def preferred(flipped: bool) -> tuple[list[dict], tuple[int, ...]]:
    """(lines of metrics, shape of the batches) of a run with the bigram model, all fields of a run flipped or none."""
    config = tiny.config(**{f"dpo.{k}": v for k, v in (DPO_FLIPPED if flipped else DPO_DEFAULT).items()})
    pairs = [(([1, 2, 3], [0, 1, 1]), ([1, 4], [0, 1])), (([2, 2, 1], [0, 0, 1]), ([2, 2, 3], [0, 0, 1]))]
    params = {"params": {"embed": {"embedding": jnp.asarray(EMBEDDING)}}}
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    shapes, make = [], dpo.make_preference_batch
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "make_preference_batch", lambda *a: shapes.append(make(*a).tokens.shape) or make(*a))
        workdir = pathlib.Path(folder)
        params = jax.device_put(params, shardings(params, mesh))
        terminal = Terminal(out=io.StringIO())
        dpo.prefer(config, Bigram(), (params, {}), pairs, mesh, workdir, Stop(None), terminal, "dpo")
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(set(shapes)) == 1
    return lines, shapes[0]


@flips("dpo.steps", "dpo.batch_size", "dpo.max_length", "dpo.lr")
def test_prefer(name):
    for flipped, want in ((False, DPO_DEFAULT), (True, DPO_FLIPPED)):
        lines, shape = preferred(flipped)
        by_hand = want["lr"] * (0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(want["steps"]) / want["steps"])) / 2)
        found = {
            "dpo.steps": (len(lines), want["steps"]),
            "dpo.batch_size": (shape[:2], (want["batch_size"], 2)),
            "dpo.max_length": (shape[2], want["max_length"]),
            "dpo.lr": ([line["lr"] for line in lines], pytest.approx(by_hand, rel=1e-5)),
        }[name]
        assert found[0] == found[1]


@flips("dpo.path")
def test_dpo_path(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "1+1=", "chosen": "2", "rejected": "3"}) + "\n")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        patch.setattr(dpo, "prefer", lambda config, module, given, pairs, *_: found.append(pairs) or given[0])
        patch.setattr(supervised, "save_trained", lambda folder, *_: str(folder))
        fields = {"model.path": model.source, "dpo.path": str(path)}
        dpo.run(tiny.config(**fields), tmp_path / "run", Terminal(out=io.StringIO()))
        with pytest.raises(InputError, match="dpo.path='nowhere': no such file"):
            dpo.run(tiny.config(**{**fields, "dpo.path": "nowhere"}), tmp_path / "b", Terminal(out=io.StringIO()))
    assert [[model.tokenizer.decode(ids) for ids, _ in pair] for pair in found[0]] == [["1+1=2", "1+1=3"]]


@flips("dpo.beta", "dpo.loss_type", "dpo.label_smoothing")
def test_dpo_loss(name):
    """One pair whose margin over the reference is 2."""
    flipped = {"dpo.beta": 0.5, "dpo.loss_type": "ipo", "dpo.label_smoothing": 0.25}
    for fields in ({}, {name: flipped[name]}):
        config = tiny.config(**fields).dpo
        losses, _ = dpo_losses(*(jnp.array([x]) for x in (-1.0, -4.0, -2.0, -3.0)), config)
        right, wrong = np.log1p(np.exp(-2 * config.beta)), np.log1p(np.exp(2 * config.beta))
        by_hand = (1 - config.label_smoothing) * right + config.label_smoothing * wrong
        by_hand = (2 - 1 / (2 * config.beta)) ** 2 if config.loss_type == "ipo" else by_hand
        assert float(losses[0]) == pytest.approx(by_hand, rel=1e-5)


# train, eval, checkpoint: a session whose step, evaluation and checkpoints are stand-ins


class StandIn:
    """Stands for Program, Checkpoints, RunWriter and Recorder of a session, and notes what is asked of them."""

    def __init__(self, monkeypatch):
        self.recorded, self.saved, self.kept, self.evaluated = [], [], [], []
        stand_in = self

        class FakeProgram:
            def __init__(self, parts, state):
                pass

            def compile(self, state, batch):
                pass

            def __call__(self, state, batch):
                return state, {}, None

        class FakeCheckpoints:
            def __init__(self, folder, keep, warn):
                stand_in.kept.append(keep)

            def restore(self, abstract):
                return None

            def save(self, done, *_):
                stand_in.saved.append(done)

            def wait(self):
                pass

            __enter__ = lambda self: self  # noqa: E731
            __exit__ = lambda self, *_: None  # noqa: E731

        def recorder(*_):
            return lambda done, *rest: stand_in.recorded.append(done)

        def evaluate(session, done, state):
            stand_in.evaluated.append(done)
            return {}

        monkeypatch.setattr(grpo, "Program", FakeProgram)
        monkeypatch.setattr(grpo, "Checkpoints", FakeCheckpoints)
        monkeypatch.setattr(grpo, "RunWriter", lambda *_: contextlib.nullcontext())
        monkeypatch.setattr(grpo, "Recorder", recorder)
        monkeypatch.setattr(Session, "evaluate", evaluate)
        monkeypatch.setattr(Session, "measure_once", lambda *_: {})


def stand_in_run(model, monkeypatch, tmp_path, **fields) -> StandIn:
    given = {"train.steps": 6, "eval.every": 0, "checkpoint.every": 0, **fields}
    noted = StandIn(monkeypatch)
    session_of(*prepared(model, **given), tmp_path).train(model)
    return noted


@flips("train.steps")
def test_steps(model, monkeypatch, tmp_path):
    for steps in (2, 5):
        noted = stand_in_run(model, monkeypatch, tmp_path, **{"train.steps": steps})
        assert noted.recorded == list(range(1, steps + 1)) and noted.saved == [steps]


@flips("eval.every")
def test_eval_every(model, monkeypatch, tmp_path):
    for every, want in ((0, []), (2, [2, 4, 6]), (4, [4])):
        assert stand_in_run(model, monkeypatch, tmp_path, **{"eval.every": every}).evaluated == want


@flips("checkpoint.every")
def test_checkpoint_every(model, monkeypatch, tmp_path):
    for every, want in ((0, [6]), (2, [2, 4, 6]), (4, [4, 6])):
        assert stand_in_run(model, monkeypatch, tmp_path, **{"checkpoint.every": every}).saved == want


@flips("checkpoint.keep")
def test_checkpoint_keep(model, monkeypatch, tmp_path):
    """What Checkpoints does with the number is in its own tests."""
    assert stand_in_run(model, monkeypatch, tmp_path, **{"checkpoint.keep": 5}).kept == [5]


@flips("train.time_budget")
def test_time_budget(model, monkeypatch, tmp_path, rows_file):
    class Seen(Exception):
        pass

    def stop(seconds, watchdog):
        raise Seen(seconds)

    monkeypatch.setattr(loop, "Stop", stop)
    monkeypatch.setattr(grpo, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    for budget, seconds in (("", None), ("2h", 7200.0)):
        fields = {"train.time_budget": budget, "model.path": model.source, "data.max_prompt_length": 8}
        fields |= {
            "data.source": "jsonl",
            "data.path": rows_file,
            "rewards.names": ("answer",),
            "rewards.weights": (1.0,),
        }
        with pytest.raises(Seen) as seen:
            grpo.run(tiny.config(**fields), tmp_path / f"run{budget}", terminal=Terminal(out=io.StringIO()))
        assert seen.value.args == (seconds,)
    assert Stop(None).reason() is None and Stop(3600.0).reason() is None
    short = Stop(parse_duration("0.001s"))
    time.sleep(0.01)
    assert short.reason() == "the time budget"


def recorded(parts, prompts, evaluator, tmp_path, skipped: int, done: int = 1, writer=None) -> Session:
    """Records a step whose update was skipped for the `skipped`th time in a row (0: a good one)."""
    session = session_of(parts, prompts, evaluator, tmp_path)
    means = {"tokens": (4.0, 1.0), "skipped": (float(skipped > 0), 1.0)}
    given = Metrics(means, np.array([float(skipped > 0)]), np.bool_(False), np.int32(skipped))
    program = types.SimpleNamespace(seconds={}, paths=["params/embed/embedding"])
    writer = writer or types.SimpleNamespace(step=lambda *_: None, samples=lambda *_: None)
    rollout = hand_made_rollout(parts.config)
    Recorder(session, writer, program)(done, given, rollout, {}, 1.0)
    return session


@flips("train.halt_when_nonfinite")
def test_halt_when_nonfinite(model, tmp_path):
    for limit, halts in ((0, False), (3, True), (4, False)):
        made = prepared(model, **{"train.halt_when_nonfinite": limit, "log.samples_every": 0})
        context = pytest.raises(InputError, match="3 updates in a row") if halts else contextlib.nullcontext()
        with context:
            recorded(*made, tmp_path, skipped=3)
        assert (tmp_path / "nonfinite" / "step_1.npz").is_file()


def records_of(right: list[float]) -> list[dict]:
    return [
        {
            "problem": i,
            "prompt": "1+1=",
            "answer": "2",
            "completion": "<answer>2</answer>",
            "rewards": {"answer": x},
            "right": x >= 1,
            "length": 3,
            "ended": True,
        }
        for i, x in enumerate(right)
        for _ in range(4)
    ]


def asked(model, monkeypatch, tmp_path, right=(1.0, 0.0), **fields):
    """(session, what it asks of Evaluator.sample): (problems, samples, temperature, top_p) of each call."""
    calls = []

    def sample(self, variables, problems, samples, temperature, top_p, *_, **__):
        calls.append((problems, samples, temperature, top_p))
        return records_of(list(right))

    monkeypatch.setattr(Evaluator, "sample", sample)
    return session_of(*prepared(model, **fields), tmp_path), calls


NO_STATE = types.SimpleNamespace(frozen={}, trainable={})


@flips("eval.problems", "eval.samples", "eval.temperature", "eval.top_p")
def test_evaluation_during_training(model, monkeypatch, tmp_path, name):
    order = ["eval.problems", "eval.samples", "eval.temperature", "eval.top_p"]
    value = dict(zip(order, (9, 7, 0.3, 0.6), strict=True))[name]
    session, calls = asked(model, monkeypatch, tmp_path, **{name: value})
    session.evaluate(1, NO_STATE)
    want = [value_of(Config(), n) for n in order]
    want[order.index(name)] = value
    assert calls == [tuple(want)]


@flips("eval.final_problems")
def test_final_problems(model, monkeypatch, tmp_path):
    session, calls = asked(model, monkeypatch, tmp_path, **{"eval.final_problems": 11})
    session.measure_once("before", NO_STATE, 0)
    assert [call[0] for call in calls] == [11, 11] and calls[1][1:3] == (1, 0.0)  # sampled, then greedy


@flips("eval.majority")
def test_majority(model, monkeypatch, tmp_path):
    for votes, samples in ((0, 4), (32, 32)):
        session, calls = asked(model, monkeypatch, tmp_path, **{"eval.majority": votes})
        found = session.measure_once(f"before{votes}", NO_STATE, 0)
        assert calls[0][1] == samples and ("majority" in found) == (votes > 0)


@flips("eval.reflective_words")
def test_reflective_words(model, monkeypatch, tmp_path):
    for words, count in ((("Wait", "check"), 2.0), ((), None)):
        session, _ = asked(model, monkeypatch, tmp_path, **{"eval.reflective_words": words})
        said = [record | {"completion": "wait, waiting: WAIT!"} for record in records_of([1.0, 0.0])]
        monkeypatch.setattr(Evaluator, "sample", lambda *_, said=said, **__: said)
        assert session.evaluate(1, NO_STATE).get("eval/reflective_words") == count


@flips("eval.alarm_drop")
def test_alarm_drop(model, monkeypatch, tmp_path):
    for drop, warns in ((0.1, True), (0.4, False)):
        session, _ = asked(model, monkeypatch, tmp_path, right=(1.0, 0.0), **{"eval.alarm_drop": drop})
        session.best = 0.75
        session.evaluate(1, NO_STATE)
        assert ("pass@1 fell to 0.500" in session.terminal._err.getvalue()) == warns


# log


@flips("log.tensorboard")
def test_tensorboard(tmp_path):
    for on in (False, True):
        config = tiny.config(**{"log.tensorboard": on}).log
        with RunWriter(tmp_path / str(on), config) as writer:
            writer.step(1, {"a": 1.0})
        assert (tmp_path / str(on) / "tensorboard").is_dir() == on


@flips("log.wandb", "log.wandb_project")
def test_wandb(tmp_path, monkeypatch, name):
    calls = []
    logged = types.SimpleNamespace(log=lambda values, step: calls.append((values, step)), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **given: calls.append(given) or logged, Settings=lambda **given: given)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    value = {"log.wandb": "online", "log.wandb_project": "sums"}[name]
    quiet = {"log.tensorboard": False}
    with RunWriter(tmp_path / "off", tiny.config(**quiet).log) as writer:
        writer.step(1, {"a": 2.0})
    assert not calls
    with RunWriter(tmp_path / "on", tiny.config(**{**quiet, "log.wandb": "offline", name: value}).log) as writer:
        writer.step(1, {"a": 2.0})
    given, log = calls
    want = {"log.wandb": "offline", "log.wandb_project": "grpo_jax", name: value}
    assert (given["mode"], given["project"]) == (want["log.wandb"], want["log.wandb_project"])
    assert log == ({"a": 2.0}, 1)
    assert metrics._open_wandb and LogConfig().wandb == "off"


@flips("log.samples_every")
def test_samples_every(model, tmp_path):
    for every, want in ((0, []), (2, [2, 4]), (3, [3])):
        made, written = prepared(model, **{"log.samples_every": every, "sampler.group_size": 2}), []
        writer = types.SimpleNamespace(step=lambda *_: None, samples=lambda done, rows, to=written: to.append(done))
        for done in range(1, 5):
            recorded(*made, tmp_path, skipped=0, done=done, writer=writer)
        assert written == want


@flips("log.samples")
def test_samples(model, tmp_path):
    for count in (1, 4):
        made, written = prepared(model, **{"log.samples_every": 1, "log.samples": count, "sampler.group_size": 2}), []
        writer = types.SimpleNamespace(step=lambda *_: None, samples=lambda done, rows, to=written: to.extend(rows))
        session = recorded(*made, tmp_path, skipped=0, writer=writer)
        assert len(written) == count
        rollout = Fetcher()(hand_made_rollout(made[0].config))
        assert written == sample_rows(session, rollout, count)
        prompts = {row["prompt"] for row in session.prompts.rows}
        assert all(row["prompt"] in prompts and row["total"] == row["rewards"]["answer"] for row in written)


@flips("log.watchdog_minutes")
def test_watchdog_minutes(tmp_path):
    """Silent for a tenth of a second: told of with a limit below that, not above, and not without one."""
    for minutes, told in ((0.05 / 60, True), (60.0, False), (0.0, False)):
        workdir = tmp_path / str(minutes)
        workdir.mkdir()
        with loop.open_stop(tiny.config(**{"log.watchdog_minutes": minutes}), workdir):
            end = time.monotonic() + (10 if told else 0.1)
            while not (workdir / "watchdog.txt").exists() and time.monotonic() < end:
                time.sleep(0.01)
        assert (workdir / "watchdog.txt").exists() == told


@flips("distributed.heartbeat_timeout", "distributed.join_timeout")
def test_distributed(monkeypatch, name):
    """What jax.distributed is told, and what the error for processes that did not come says."""
    calls = []

    def initialize(*place, **options):
        calls.append(options)
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for seconds in (7, 70):
        config = tiny.config(**{name: seconds}).distributed
        with pytest.raises(InputError, match=f"join_timeout={config.join_timeout} seconds"):
            processes.join(processes.Place("localhost:1", 2, 1), config, {})
    option = {"heartbeat_timeout": "heartbeat_timeout_seconds", "join_timeout": "initialization_timeout"}
    assert [call[option[name.partition(".")[2]]] for call in calls] == [7, 70]


@flips("log.compilation_cache")
def test_compilation_cache(monkeypatch, tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        for given, held, want in (
            ("auto", None, str(tmp_path / "grpo_jax" / "compiled")),
            ("auto", "/named/by/the/environment", "/named/by/the/environment"),
            (str(tmp_path / "mine"), "/named/by/the/environment", str(tmp_path / "mine")),
            ("", "/named/by/the/environment", None),
        ):
            jax.config.update("jax_compilation_cache_dir", held)
            cli._set_up_jax(tiny.config(**{"log.compilation_cache": given}))
            assert jax.config.jax_compilation_cache_dir == want
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# All of them.


def test_every_field_has_a_test():
    assert set(FIELD_TESTS) == set(field_names())
    here = globals()
    assert all(here[test.__name__] is not None for test in FIELD_TESTS.values())


def test_the_tiny_model_is_read_as_it_was_written(model):
    written = tiny.params(model.architecture)
    assert sorted(parameter_table(model.params)) == sorted(parameter_table(written))
    jax.tree.map(np.testing.assert_array_equal, model.params, written)
