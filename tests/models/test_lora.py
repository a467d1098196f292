"""Adapters: frozen bases, what is added to them, merging, PEFT's format, a step that trains nothing else."""

import json
import pathlib

import jax
import numpy as np
import numpy_decoder
import optax
import pytest
import safetensors.numpy
import tiny
from gguf_writer import tokenizer_metadata

from grpo_jax.config import LoraConfig
from grpo_jax.errors import InputError
from grpo_jax.metrics import divide
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.huggingface import open_folder, read_folder, write_folder
from grpo_jax.models.lora import adapter_scales, fingerprint, freeze, linear_layers, merge, quantise, split_variables
from grpo_jax.models.peft import read_adapters, write_adapters
from grpo_jax.parallel import place
from grpo_jax.step import Program
from grpo_jax.text import Tokenizer

OF = tiny.architecture(layers=2, tied=False)
BASE = tiny.params(OF)
PLACE = np.arange(5)[None]
TOKENS = np.array([[3, 9, 14, 7, 20]])


def collections(rank: int = 2, alpha: float = 3.0, **adapters) -> dict:
    """Adapters whose B is not zero, and their scales."""
    made = tiny.adapters(OF, rank, **adapters)
    return {"adapters": made, "adapter_scales": adapter_scales(made, alpha / rank)}


@jax.jit
def logits(variables):
    module = Decoder(OF)
    hidden = module.apply(variables, TOKENS, PLACE, PLACE * 0 + 1)
    return module.apply(variables, hidden, method="logits")[0]


def scaled(adapters: dict, scale: float) -> dict:
    """The same adapters with the scale inside B, as the oracle wants them."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x * (scale if path[-1].key == "b" else 1), adapters)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8"])
def test_base_and_adapters_against_float64(base):
    """The decoder on the frozen base, the oracle on W' + A B alpha / r of the same rounded base, and the merged one."""
    frozen, added = freeze(BASE, base), collections(alpha=3.0)
    got = logits({"params": frozen, **added})
    rounded = merge(frozen, {"adapters": {}, "adapter_scales": {}})
    given = (TOKENS[0], PLACE[0], PLACE[0] * 0 + 1)
    want = numpy_decoder.forward(rounded, OF, *given, scaled(added["adapters"], 1.5))
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.abs(want - numpy_decoder.forward(rounded, OF, *given)).max() > 0.5, "the adapters matter"
    merged = merge(frozen, added)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(logits({"params": merged}), want, atol=2e-5)
    gap = np.abs(numpy_decoder.forward(BASE, OF, *given) - numpy_decoder.forward(rounded, OF, *given)).max()
    assert (gap == 0) == (base == "float32") and gap < 0.2


def test_columns_have_their_own_scale():
    kernel = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32) * np.array(
        [1, 10, 0.1, 1, 0], np.float32
    )
    whole, scale = quantise(kernel)
    assert whole.dtype == np.int8 and scale.shape == (2, 5) and np.abs(whole).max(axis=1)[:, :4].min() == 127
    assert (np.abs(whole * scale[:, None] - kernel) <= scale[:, None] / 2 * 1.0001).all()
    assert not whole[..., 4].any() and (scale[:, 4] == 1).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_base_in_its_file_is_frozen_by_what_is_sliced_out(tmp_path, dtype):
    """The same numbers as of a base in memory; half of the columns cost a read of half of the matrix."""
    write_folder(str(tmp_path / "m"), OF, BASE, Tokenizer.from_gguf(tokenizer_metadata()))
    stored, reads = open_folder(str(tmp_path / "m"))[1], []
    lazy, whole = freeze(stored, dtype), freeze(BASE, dtype)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, lazy), whole)
    placed = place(lazy, tiny.mesh(tiny.config(**{"mesh.fsdp": 2, "mesh.tensor": 2})))
    jax.tree.map(np.testing.assert_array_equal, placed, whole)
    kernel = stored["stack_0"]["mlp"]["down"]["kernel"]
    read = kernel._read
    kernel._read = lambda place, index: reads.append(read(place, index).size) or read(place, index)
    _, rows, columns = kernel.shape
    frozen = freeze(stored, dtype)["stack_0"]["mlp"]["down"]["kernel"]
    part = frozen[(slice(0, 1), slice(0, 2), slice(0, columns // 2))]
    assert part.shape == (1, 2, columns // 2) and part.dtype == frozen.dtype
    assert reads == [(rows if dtype == "int8" else 2) * (columns // 2)]


def test_fresh_adapters_add_nothing_and_follow_from_the_seed():
    config = LoraConfig(rank=2, alpha=8.0, base_dtype="float32")
    trainable, frozen = split_variables(BASE, config, seed=1)
    np.testing.assert_array_equal(logits({**frozen, **trainable}), logits({"params": BASE}))
    a = trainable["adapters"]["stack_0"]["mlp"]["down"]["a"]
    assert np.abs(a).max() <= 24**-0.5 and a.std() > 0.5 * 24**-0.5
    again, other = (split_variables(BASE, config, seed)[0]["adapters"] for seed in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, trainable["adapters"], again)
    assert (other["stack_0"]["mlp"]["down"]["a"] != a).any()
    assert (a[0] != trainable["adapters"]["stack_0"]["mlp"]["down"]["a"][1]).any()


def test_linear_layers_are_those_of_the_stacks():
    assert set(linear_layers(BASE)) == {
        *(f"stack_0/attention/{name}" for name in ("query", "key", "value", "out")),
        *(f"stack_0/mlp/{name}" for name in ("gate", "up", "down")),
    }


def test_a_fingerprint_tells_bases_apart():
    other = jax.tree.map(np.copy, BASE)
    other["stack_0"]["mlp"]["up"]["kernel"][0, 0, 0] += 1e-3
    assert fingerprint(BASE) == fingerprint(tiny.params(OF)) != fingerprint(other)


# A step.

FIELDS = {
    "objective.beta": 0.1, "lora.rank": 2, "lora.alpha": 2.0, "lora.base_dtype": "int8", "sampler.max_new_tokens": 4,
}  # fmt: skip


ONE_LAYER = tiny.architecture(layers=1, tied=False)


def steps(count: int, **fields) -> tuple[list, list[dict], list]:
    """States before and after each of `count` steps of plain descent, their metrics and rollouts."""
    parts = tiny.parts(tiny.config(**{**FIELDS, **fields}), ONE_LAYER, optax.sgd(0.5))
    trainable, frozen = split_variables(tiny.params(ONE_LAYER), parts.config.lora, 0)
    state = tiny.state(parts, trainable, frozen, base_is_reference=True)
    program, states, told, rollouts = Program(parts, state), [jax.device_get(state)], [], []
    for number in range(count):
        prompts = tiny.on_mesh(tiny.prompts(parts.config, 2 * number), parts.mesh)
        state, metrics, rollout = program(state, prompts)
        states.append(jax.device_get(state))
        told.append(divide(jax.device_get(metrics.means)))
        rollouts.append(jax.device_get(rollout))
    assert program.traces == 1
    return states, told, rollouts


def test_only_adapters_are_trained_and_the_reference_is_a_copy_when_refreshed():
    states, told, rollouts = steps(3, **{"objective.reference_every": 2})
    for state in states:
        jax.tree.map(np.testing.assert_array_equal, state.frozen, states[0].frozen)
        assert set(state.trainable) == {"adapters"}
    assert states[0].frozen["params"]["stack_0"]["mlp"]["up"]["kernel"].dtype == np.int8
    first, last = (s.trainable["adapters"]["stack_0"]["attention"]["query"] for s in (states[0], states[1]))
    np.testing.assert_array_equal(first["a"], last["a"])  # its gradient has B = 0 as a factor
    assert not first["b"].any() and last["b"].any()
    assert (states[2].trainable["adapters"]["stack_0"]["attention"]["query"]["a"] != first["a"]).any()
    assert all(line["sampler_gap/max"] <= 1e-5 for line in told)
    assert abs(told[0]["kl"]) < 1e-9 < told[1]["kl"], "the policy starts at the base and leaves it"
    jax.tree.map(np.testing.assert_array_equal, states[2].reference, states[2].trainable)
    assert abs(told[2]["kl"]) < 1e-9
    moved = jax.tree.map(lambda a, b: (a != b).any(), states[2].trainable, states[0].trainable)
    assert len(jax.tree.leaves(moved)) == 14 and all(jax.tree.leaves(moved))
    # The sampler draws from base and adapters: here those of two updates.
    adapters = scaled(states[2].trainable["adapters"], FIELDS["lora.alpha"] / FIELDS["lora.rank"])
    base, rollout = merge(states[2].frozen["params"], {"adapters": {}, "adapter_scales": {}}), rollouts[2]
    for b, n in enumerate(rollout.lengths):
        prompt = rollout.prompt_tokens[b, 7 - rollout.prompt_lengths[b] :]
        want = numpy_decoder.completion_logps(base, ONE_LAYER, prompt, rollout.tokens[b, :n], 1.0, adapters)
        np.testing.assert_allclose(rollout.logps[b, :n], want, atol=2e-5)


def test_without_refreshing_the_reference_is_the_base_alone():
    """No copy is kept; with beta = 0 there is no reference at all."""
    for fields, want in (({}, {}), ({"objective.beta": 0.0}, None)):
        parts = tiny.parts(tiny.config(**{**FIELDS, **fields}), OF, optax.sgd(0.5))
        state = tiny.state(parts, *split_variables(BASE, parts.config.lora, 0), base_is_reference=True)
        assert state.reference == want


# PEFT's format.


def test_peft_folders_are_read_as_written(tmp_path):
    for number, (targets, names) in enumerate(((r"", 7), ("attention/(query|out)", 2))):
        given = split_variables(BASE, LoraConfig(rank=3, alpha=6.0, targets=targets), 0)
        adapters = jax.tree.map(lambda x: x + np.float32(0.1), given[0]["adapters"])
        made = {"adapters": adapters, "adapter_scales": given[1]["adapter_scales"]}
        folder = tmp_path / str(number)
        write_adapters(str(folder), OF, made, 6.0, "some/base")
        jax.tree.map(np.testing.assert_array_equal, read_adapters(str(folder), OF), made)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, "some/base")
        assert len(config["target_modules"]) == names
        tensors = safetensors.numpy.load_file(str(folder / "adapter_model.safetensors"))
        key = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
        np.testing.assert_array_equal(tensors[key], adapters["stack_0"]["attention"]["out"]["a"][1].T)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"use_rslora": True}, "use_rslora=True is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern and alpha_pattern give q_proj another alpha / r"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"new_trick": 1}, "new_trick=1 is an unknown field"),
        ({"r": 0}, "r=0 must be a positive number"),
        ({"lora_alpha": None}, "lora_alpha=None must be"),
    ],
)
def test_what_another_peft_would_compute_is_refused(tmp_path, change, message):
    write_adapters(str(tmp_path), OF, collections(), 3.0, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_adapters(str(tmp_path), OF)


def test_adapters_of_another_model_are_refused(tmp_path):
    write_adapters(str(tmp_path), OF, collections(), 3.0, "base")
    wider = tiny.architecture(layers=2, mlp_width=32)
    with pytest.raises(InputError, match=r"stack_0/mlp/gate have shapes \[2, 16\] and \[24, 2\], not .*\[32, 2\]"):
        read_adapters(str(tmp_path), wider)
    with pytest.raises(InputError, match=r"layers.2.self_attn.q_proj.lora_A.weight is missing"):
        read_adapters(str(tmp_path), tiny.architecture(layers=3))
    with pytest.raises(InputError, match=r"layers.1.* belongs to no linear layer"):
        read_adapters(str(tmp_path), tiny.architecture(layers=1))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="is no whole safetensors file"):
        read_adapters(str(tmp_path), OF)


def test_adapters_to_go_on_with_must_be_those_of_the_config():
    given = collections(rank=2, alpha=4.0)
    trainable, frozen = split_variables(BASE, LoraConfig(rank=2, alpha=4.0), 0, given)
    assert trainable["adapters"] is given["adapters"] and frozen["adapter_scales"] is given["adapter_scales"]
    for config, message in (
        (LoraConfig(rank=4, alpha=8.0), r"lora.rank ask for stack_0/attention/query/a of shape \(2, 16, 4\)"),
        (LoraConfig(rank=2, alpha=8.0), r"lora.alpha ask for"),
        (LoraConfig(rank=2, alpha=4.0, targets="mlp"), r"stack_0/attention/query/a of shape None"),
    ):
        with pytest.raises(InputError, match=message):
            split_variables(BASE, config, 0, given)
    merged, nothing = split_variables(BASE, LoraConfig(), 0, given)
    np.testing.assert_allclose(logits(merged), logits({"params": BASE, **given}), atol=2e-5)
    assert nothing == {}


STORED = pathlib.Path(__file__).parent / "peft"


def test_a_folder_of_peft_gives_its_logits():
    """The stored folder was made by peft (tests/models/make_peft.py), its logits by transformers and peft."""
    architecture, params = read_folder(str(STORED / "base"))
    added = read_adapters(str(STORED / "adapter"), architecture)
    stored = np.load(STORED / "logits.npz")
    tokens, place = stored["tokens"], np.arange(stored["tokens"].shape[1])[None]
    module = Decoder(architecture)

    @jax.jit
    def both(variables):
        hidden = module.apply(variables, tokens, place, place * 0 + 1)
        return module.apply(variables, hidden, method="logits")[0]

    np.testing.assert_allclose(both({"params": params, **added}), stored["adapted"], atol=2e-5)
    np.testing.assert_allclose(both({"params": merge(params, added)}), stored["adapted"], atol=2e-5)
    assert np.abs(stored["adapted"] - stored["base"]).max() > 0.1


def test_what_peft_wrote_is_written_again(tmp_path):
    """The same tensors under the same names, and the same value of every field that we write."""
    architecture, _ = read_folder(str(STORED / "base"))
    write_adapters(str(tmp_path), architecture, read_adapters(str(STORED / "adapter"), architecture), 6.0, "base")
    name = "adapter_model.safetensors"
    ours, theirs = (safetensors.numpy.load_file(str(folder / name)) for folder in (tmp_path, STORED / "adapter"))
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 2 * 7
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
    name = "adapter_config.json"
    mine, peft = (json.loads((folder / name).read_text()) for folder in (tmp_path, STORED / "adapter"))
    names = {name.rpartition(".")[2] for name in peft.pop("target_modules")}
    assert sorted(names) == mine.pop("target_modules"), "PEFT takes the last part of a name for all that end with it"
    assert mine.pop("base_model_name_or_path") == "base" and peft.pop("base_model_name_or_path")
    assert mine == {field: peft[field] for field in mine}


@pytest.mark.parametrize("family", ["phi3", "deepseek_v3", "qwen2", "qwen3_moe", "gemma2"])
@pytest.mark.parametrize("targets", ["", "(query|up)$"])
def test_adapters_of_every_family_in_the_names_of_its_files(family, targets, tmp_path):
    """What is added to the tensors of transformers' files, read by our names, is what merging adds.

    Phi-3's files hold query, key and value as one matrix, DeepSeek-V3's rotary features in another order.
    """
    source = STORED.parent / "parity" / family
    architecture, params = read_folder(str(source))
    trainable, frozen = split_variables(params, LoraConfig(rank=2, alpha=3.0, targets=targets), 0)
    random = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), trainable["adapters"])
    added = {"adapters": adapters, "adapter_scales": frozen["adapter_scales"]}
    write_adapters(str(tmp_path / "adapter"), architecture, added, 3.0, "base")
    jax.tree.map(np.testing.assert_array_equal, read_adapters(str(tmp_path / "adapter"), architecture), added)

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    held = safetensors.numpy.load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    tensors = {k: v for file in source.glob("*.safetensors") for k, v in safetensors.numpy.load_file(str(file)).items()}
    for name in [name for name in held if ".lora_A." in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        scale = config["alpha_pattern"].get(module, 3) / config["rank_pattern"].get(module, 2)
        change = scale * held[name.replace("lora_A", "lora_B")] @ held[name]
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].astype(np.float32) + change
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((source / "config.json").read_bytes())
    safetensors.numpy.save_file(tensors, str(tmp_path / "model" / "model.safetensors"))
    _, changed = read_folder(str(tmp_path / "model"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), changed, merge(params, added))
