"""Parameter counts of published models, and what `grpo-jax plan --model` makes of them."""

import math

import jax
import pytest
import tiny

from grpo_jax import cli
from grpo_jax.errors import InputError
from grpo_jax.models import weights
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.models.families import from_fields
from grpo_jax.models.huggingface import tensor_table
from grpo_jax.models.lora import linear_layers
from grpo_jax.models.presets import PRESETS, count, describe, forward_flops, preset

# Parameters that the models' pages on the Hub give (safetensors metadata); DeepSeek's without its prediction module.
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "SmolLM3-3B": 3_075_098_624,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Mistral-7B": 7_248_023_552,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-3-1B": 999_885_952,
    "Phi-3-mini": 3_821_079_552,
    "Phi-4": 14_659_507_200,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "DeepSeek-V3-671B": 671_026_419_200,
    "DeepSeek-R1-671B": 671_026_419_200,
}


def test_every_preset_has_its_published_count():
    assert {name: count(found.fields).total for name, found in PRESETS.items()} == PUBLISHED


@pytest.mark.parametrize("name, active", [("DeepSeek-V3-671B", 37e9), ("Qwen3-30B-A3B", 3.3e9)])
def test_a_token_meets_the_chosen_experts_only(name, active):
    assert count(preset(name).fields).active == pytest.approx(active, rel=0.02)


def test_the_formula_is_that_of_the_decoder():
    """Total, linear layers and FLOPs of a decoder's own parameters, tied and not."""
    for tied in (True, False):
        of = tiny.architecture(layers=3, tied=tied)
        params = jax.eval_shape(lambda of=of: init_params(Decoder(of), jax.random.key(0)))
        fields = {
            "model_type": "llama", "vocab_size": of.vocabulary, "hidden_size": of.width, "num_hidden_layers": 3,
            "num_attention_heads": of.heads, "num_key_value_heads": of.kv_heads, "head_dim": of.head_size,
            "intermediate_size": of.mlp_width, "tie_word_embeddings": tied,
        }  # fmt: skip
        counted, layers = count(fields), linear_layers(params)
        assert counted.total == counted.active == sum(leaf.size for leaf in jax.tree.leaves(params))
        assert counted.adapted == sum(n * (inputs + outputs) for n, inputs, outputs in layers.values())
        matrices = sum(n * inputs * outputs for n, inputs, outputs in layers.values()) + of.vocabulary * of.width
        norms = of.width * (2 * 3 + 1)
        assert forward_flops(counted, 0) == 2 * (matrices + norms)
        scores_and_values = 3 * of.heads * 10 * of.head_size * 2  # layers, heads, tokens seen, products
        assert forward_flops(counted, 10) - forward_flops(counted, 0) == 2 * scores_and_values
        assert counted.cached == 3 * 2 * of.kv_heads * of.head_size


@pytest.mark.parametrize("name", PRESETS)
def test_the_formula_is_that_of_the_files(name):
    """The sum over the tensors that this decoder asks a checkpoint of the family for."""
    found = PRESETS[name]
    architecture = from_fields(name, found.fields)
    table = weights.tensor_shapes(architecture, tensor_table(architecture)[0])
    assert sum(math.prod(shape) for shape in table.values()) == count(found.fields).total
    assert architecture.layers == found.fields["num_hidden_layers"]


def test_plan_prints_the_numbers(capsys):
    assert cli.main(["plan", "--model", "qwen2.5-7b", "--context", "0", "--rank", "8"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == describe("Qwen/Qwen2.5-7B-Instruct", 0, 8)
    total, adapters = 7_615_616_512, 8 * 2_523_136
    table = 152064 * 3584  # the embedding stays in bfloat16
    assert "7,615,616,512 parameters" in said and f"rank 8 ({adapters:,} parameters)" in said
    assert (
        f"float32 {4 * total / 2**30:.2f} GiB, bfloat16 {2 * total / 2**30:.2f} GiB, int8 {(total + table) / 2**30:.2f}"
        in said
    )
    assert (
        f"{16 * total / 2**30:.2f} GiB" in said
        and f"int8 base {(total + table + 16 * adapters) / 2**30:.2f} GiB" in said
    )
    assert "float32 112.0 KiB, bfloat16 56.0 KiB" in said  # 28 layers x 2 x 4 heads of 128
    assert f"{2 * (total - table) / 1e9:.2f}e9 forward" in said


def test_unknown_presets_name_the_nearest(capsys):
    with pytest.raises(InputError, match=r"Qwen2.5-6B: no such preset; did you mean Qwen2.5-\d"):
        preset("Qwen2.5-6B")
    assert cli.main(["plan", "--model", "SmolLM2-135M", "--rank", "-1"]) == 2
    assert "--rank -1: must not be negative" in capsys.readouterr().err


def test_presets_say_where_they_come_from():
    for found in PRESETS.values():
        owner, _, name = found.source.partition("/")
        assert owner and name
