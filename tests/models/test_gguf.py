"""The GGUF reader against files written here and a scalar dequantiser."""

import dataclasses
import pathlib
import struct
import tracemalloc

import jax
import numpy as np
import pytest
from gguf_writer import LLAMA, f32, gguf_bytes, hf_weights, llama_tensors, tokenizer_metadata

from grpo_jax.errors import InputError
from grpo_jax.models import weights
from grpo_jax.models.gguf import NAMES, TENSOR_TYPES, architecture_and_params, read_gguf
from grpo_jax.models.huggingface import read_folder, tensor_table


def half(raw: bytes) -> float:
    return struct.unpack("<e", raw)[0]


def q4_k(block: bytes, i: int) -> float:
    """Number i: run i // 32, whose scale and least are six bits each, packed in the 12 bytes after the two halves."""
    run, bits = i // 32, int.from_bytes(block[4:16], "little")

    def six(kind: int) -> int:
        if run < 4:
            return bits >> 8 * (4 * kind + run) & 63
        return (bits >> 8 * (8 + run - 4) + 4 * kind & 15) + 16 * (bits >> 8 * (4 * kind + run - 4) + 6 & 3)

    byte = block[16 + 32 * (run // 2) + i % 32]
    return half(block[:2]) * six(0) * (byte >> 4 if run % 2 else byte & 15) - half(block[2:4]) * six(1)


def q6_k(block: bytes, i: int) -> float:
    """Number i: its low four bits in the first 128 bytes, its high two in the next 64."""
    part, place = divmod(i, 128)
    low = block[64 * part + place % 64] >> (4 if place >= 64 else 0) & 15
    high = block[128 + 32 * part + place % 32] >> 2 * (place // 32) & 3
    (scale,) = struct.unpack("<b", block[192 + i // 16 : 193 + i // 16])
    return half(block[208:]) * scale * (low + 16 * high - 32)


def scalar_dequantise(kind: str, raw: bytes) -> list[float]:
    """Number by number, as ggml's reference functions describe each type."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "Q4_K": 144, "Q6_K": 210}
    out: list[float] = []
    for at in range(0, len(raw), sizes[kind]):
        block = raw[at : at + sizes[kind]]
        if kind == "F32":
            out.append(struct.unpack("<f", block)[0])
        elif kind == "F16":
            out.append(half(block))
        elif kind == "BF16":
            out.append(struct.unpack("<f", b"\0\0" + block)[0])
        elif kind == "Q8_0":
            out += [half(block[:2]) * struct.unpack("<b", block[2 + i : 3 + i])[0] for i in range(32)]
        elif kind == "Q4_0":
            out += [half(block[:2]) * ((block[2 + i % 16] >> (4 if i >= 16 else 0)) % 16 - 8) for i in range(32)]
        elif kind == "Q4_K":
            out += [q4_k(block, i) for i in range(256)]
        elif kind == "Q6_K":
            out += [q6_k(block, i) for i in range(256)]
        else:
            scale, least = half(block[:2]), half(block[2:4])
            out += [scale * ((block[4 + i % 16] >> (4 if i >= 16 else 0)) % 16) + least for i in range(32)]
    return out


def random_raw(kind: str, count: int) -> bytes:
    """Blocks with any bit pattern in the numbers and finite scales."""
    draw = np.random.default_rng(len(kind) + count)
    if kind in ("F32", "F16", "BF16"):
        single = draw.normal(size=count).astype("<f4")
        return {"F32": single, "F16": single.astype("<f2"), "BF16": single.view("<u2")[1::2]}[kind].tobytes()
    if kind == "Q6_K":  # its scale stands last
        return b"".join(draw.bytes(208) + draw.normal(size=1).astype("<f2").tobytes() for _ in range(count // 256))
    if kind == "Q4_K":
        return b"".join(draw.normal(size=2).astype("<f2").tobytes() + draw.bytes(140) for _ in range(count // 256))
    scales, packed = {"Q4_0": (1, 16), "Q4_1": (2, 16), "Q8_0": (1, 32)}[kind]
    blocks = [draw.normal(size=scales).astype("<f2").tobytes() + draw.bytes(packed) for _ in range(count // 32)]
    return b"".join(blocks)


def ggml_sums(values: np.ndarray) -> list[float]:
    """Four weighted sums, which no two numbers can change places in unseen."""
    place = np.arange(values.size)
    return [float(np.sum(values.astype(np.float64) * np.cos(place * k))) for k in (0, 1, 2, 3)]


# For each type four sums of what gguf 0.19.0 makes of `random_raw`; renewed by printing `want` in the test below.
GGML = {
    "F32": [122.640047, -69.496153, -17.486797, -5.452046],
    "F16": [122.630546, -69.473396, -17.510412, -5.456522],
    "BF16": [22.82354, 102.212763, 70.080428, -5.563424],
    "Q8_0": [-6293.768005, -3531.725766, 6495.250017, 5327.051403],
    "Q4_0": [-1.644981, 70.193791, -146.598508, -193.329097],
    "Q4_1": [3531.086418, -393.075596, 440.022548, 158.443209],
    "Q4_K": [279274.080185, -7218.978854, 4315.712534, -8954.640944],
    "Q6_K": [-97884.06134, 164134.68495, -32073.660848, 66664.376337],
}
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [2, 3])
def test_each_tensor_type_against_a_scalar_dequantiser(tmp_path, kind, version):
    shape, raw = (3, 5, 512), random_raw(kind, 7680)
    content, _ = gguf_bytes({"general.alignment": 32}, {"before": f32([1.0]), "t": (kind, shape, raw)}, version)
    (tmp_path / "a.gguf").write_bytes(content)
    tensor = read_gguf(str(tmp_path / "a.gguf")).tensor("t")
    assert tensor.dtype == np.float32 and tensor.shape == shape
    oracle = np.array(scalar_dequantise(kind, raw)).reshape(shape)
    np.testing.assert_allclose(tensor, oracle, rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_type_against_ggml(kind):
    """The reference dequantisers of the project that the format comes from, where its package is installed."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf brings ggml's own dequantisers")
    raw, code = np.frombuffer(random_raw(kind, 7680), np.uint8), getattr(gguf.GGMLQuantizationType, kind)
    want = gguf.quants.dequantize(raw, code).ravel()
    (type_,) = [t for t in TENSOR_TYPES.values() if t.name == kind]
    np.testing.assert_allclose(type_.decode(raw.reshape(-1, type_.bytes)).ravel(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind, digest", GGML.items())
def test_each_tensor_type_against_stored_numbers_of_ggml(kind, digest):
    (type_,) = [t for t in TENSOR_TYPES.values() if t.name == kind]
    values = type_.decode(np.frombuffer(random_raw(kind, 7680), np.uint8).reshape(-1, type_.bytes)).ravel()
    np.testing.assert_allclose(ggml_sums(values), digest, rtol=1e-5, atol=1e-5)


def model_bytes(metadata: dict | None = None, weights: dict | None = None) -> tuple[bytes, int]:
    tensors = llama_tensors(hf_weights() if weights is None else weights)
    return gguf_bytes({**LLAMA, **tokenizer_metadata(), **(metadata or {})}, tensors)


def load(tmp_path, content: bytes):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return architecture_and_params(read_gguf(str(path)))


def test_metadata_of_every_type(tmp_path):
    metadata = {"a": True, "b": 7, "c": 0.5, "d": "é", "e": ["x", ""], "f": [1, -2]}
    content, _ = gguf_bytes(metadata, {"t": f32([1.0])})
    (tmp_path / "a.gguf").write_bytes(content)
    assert read_gguf(str(tmp_path / "a.gguf")).metadata == metadata


@pytest.mark.parametrize("tied", [True, False])
def test_llama_weights_reach_their_places(tmp_path, tied):
    weights = hf_weights(tied=tied)
    architecture, params = load(tmp_path, model_bytes(weights=weights)[0])
    a = architecture
    assert (a.layers, a.width, a.heads, a.kv_heads, a.head_size, a.mlp_width) == (2, 32, 4, 2, 8, 64)
    assert (a.vocabulary, a.rope_theta, a.norm_eps, a.tied) == (265, 50000.0, 1e-5, tied)
    stack = params["stack_0"]
    for i in range(2):
        layer = f"model.layers.{i}."
        np.testing.assert_array_equal(
            stack["attention"]["query"]["kernel"][i], weights[f"{layer}self_attn.q_proj.weight"].T
        )
        np.testing.assert_array_equal(
            stack["attention"]["key"]["kernel"][i], weights[f"{layer}self_attn.k_proj.weight"].T
        )
        np.testing.assert_array_equal(
            stack["attention"]["value"]["kernel"][i], weights[f"{layer}self_attn.v_proj.weight"].T
        )
        np.testing.assert_array_equal(
            stack["attention"]["out"]["kernel"][i], weights[f"{layer}self_attn.o_proj.weight"].T
        )
        np.testing.assert_array_equal(stack["mlp"]["down"]["kernel"][i], weights[f"{layer}mlp.down_proj.weight"].T)
        np.testing.assert_array_equal(stack["mlp_norm"]["scale"][i], weights[f"{layer}post_attention_layernorm.weight"])
    np.testing.assert_array_equal(params["embed"]["embedding"], weights["model.embed_tokens.weight"])
    assert ("head" in params) is not tied
    if not tied:
        np.testing.assert_array_equal(params["head"]["kernel"], weights["lm_head.weight"].T)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_give_what_their_folders_give(tmp_path, family):
    """A file written from the folder that transformers made, its rotary halves left as they are."""
    folder = pathlib.Path(__file__).parent / "parity" / family
    architecture, params = read_folder(str(folder))
    if family == "qwen3":  # the stored model has biases, which this family's files have no names for
        architecture = dataclasses.replace(architecture, qkv_bias=False, out_bias=False)
        for layer in ("query", "key", "value", "out"):
            del params["stack_0"]["attention"][layer]["bias"]
    a, names = architecture, tensor_table(architecture)[0]
    metadata = {
        "general.architecture": family, f"{family}.block_count": a.layers, f"{family}.embedding_length": a.width,
        f"{family}.feed_forward_length": a.mlp_width, f"{family}.attention.head_count": a.heads,
        f"{family}.attention.head_count_kv": a.kv_heads, f"{family}.attention.key_length": a.head_size,
        f"{family}.attention.value_length": a.head_size, f"{family}.rope.freq_base": float(a.rope_theta),
        f"{family}.attention.layer_norm_rms_epsilon": a.norm_eps, f"{family}.context_length": 64,
    }  # fmt: skip
    by_name = dict(weights.disassemble(a, names, params))
    renamed = {}
    for path in weights.top_shapes(a):
        renamed[NAMES[path]] = f32(by_name[names[path]])
    for path in weights.layer_shapes(a):
        for layer in range(a.layers):
            renamed[NAMES[path].format(layer=layer)] = f32(by_name[names[path].format(layer=layer)])
    found, tree = load(tmp_path, gguf_bytes({**metadata, **tokenizer_metadata()}, renamed)[0])
    jax.tree.map(np.testing.assert_array_equal, tree, params)
    assert found.rope_theta == a.rope_theta
    assert dataclasses.replace(found, context=a.context, ropes=a.ropes, stacks=a.stacks) == a  # no YaRN, no windows


def test_truncated_anywhere_is_refused(tmp_path):
    content, header = model_bytes()
    lengths = [*range(0, header, 301), header - 1, header, (header + len(content)) // 2, len(content) - 33]
    for length in lengths:
        with pytest.raises(InputError, match=r"m\.gguf"):
            load(tmp_path, content[:length])


def test_any_damaged_header_byte_is_refused_or_harmless(tmp_path):
    """Every ninth byte before the vocabulary and of the tensor table is set to 0xff: no other exception comes out."""
    content, header = model_bytes()
    refused, places = 0, [*range(0, 700, 9), *range(header - 900, header, 9)]
    for at in places:
        try:
            load(tmp_path, content[:at] + b"\xff" + content[at + 1 :])
        except InputError:
            refused += 1
    assert refused > 0.8 * len(places)


def patched(at: int, code: str, number: int) -> bytes:
    content, _ = model_bytes()
    return content[:at] + struct.pack("<" + code, number) + content[at + struct.calcsize("<" + code) :]


def entry(name: str) -> int:
    """Where the tensor's number of dimensions stands."""
    content, _ = model_bytes()
    return content.index(name.encode()) + len(name)


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda: patched(0, "I", 1), "magic="),
        (lambda: patched(4, "I", 1), "version=1 "),
        (lambda: patched(4, "I", 3 << 24), "version=50331648 "),
        (lambda: patched(8, "Q", 1 << 60), "tensor_count=1152921504606846976 cannot fit"),
        (lambda: patched(16, "Q", 1 << 60), "metadata_kv_count=1152921504606846976 cannot fit"),
        (lambda: patched(24, "Q", 1 << 62), "metadata key 0: length=4611686018427387904"),
        (
            lambda: patched(model_bytes()[0].index(b"tokenizer.ggml.tokens") + 29, "Q", 1 << 40),
            "tokens: length=1099511627776",
        ),
        (lambda: patched(entry("token_embd.weight"), "I", 9), "n_dimensions=9"),
        (lambda: patched(entry("token_embd.weight") + 12, "Q", 1 << 40), "is beyond the file"),
        (lambda: patched(entry("token_embd.weight") + 4, "Q", 0), "is empty"),
        (lambda: patched(entry("token_embd.weight") + 20, "I", 15), "tensor type 15 is not one of F32, F16"),
        (lambda: patched(entry("token_embd.weight") + 24, "Q", 1 << 50), "is beyond the file"),
        (lambda: patched(entry("output_norm.weight") + 16, "Q", 64), "lies inside"),
        (lambda: patched(entry("output_norm.weight") + 16, "Q", 7), "offset=7 is not a multiple"),
    ],
)
def test_corrupt_numbers_are_named_before_anything_is_allocated(tmp_path, content, message):
    raw = content()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            load(tmp_path, raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def without(name: str) -> dict:
    return {k: v for k, v in hf_weights().items() if k != name}


@pytest.mark.parametrize(
    "metadata, weights, message",
    [
        (
            {"general.architecture": "mamba"},
            None,
            "general.architecture='mamba' is not supported: use one of llama, qwen2, qwen3",
        ),
        ({"llama.block_count": 0}, None, "llama.block_count=0"),
        ({"llama.block_count": 3}, None, "tensor blk.2.attn_norm.weight"),
        ({"llama.block_count": 1 << 30}, None, "llama.block_count=1073741824"),
        ({"llama.attention.head_count_kv": 3}, None, "head_count=4 must divide by head_count_kv=3"),
        ({"llama.feed_forward_length": 96}, None, r"shape \[64, 32\], .* \[96, 32\]"),
        ({"llama.vocab_size": 266}, None, "llama.vocab_size=266 must be 265"),
        ({"llama.rope.scaling.type": "yarn"}, None, "llama.rope.scaling.type='yarn' must be 'none'"),
        ({"llama.expert_count": 8}, None, "llama.expert_count=8 must be 0"),
        ({"llama.new_trick": 1}, None, "llama.new_trick=1 is not known"),
        ({"llama.rope.freq_base": float("nan")}, None, "llama.rope.freq_base=nan"),
        ({"general.alignment": 33}, None, "general.alignment=33"),
        ({}, without("model.norm.weight"), "tensor output_norm.weight of shape"),
        ({}, {**hf_weights(), "rope_freqs.weight": np.ones(4)}, "tensor rope_freqs.weight of shape"),
        ({}, {**hf_weights(), "model.norm.weight": np.full(32, np.nan)}, "output_norm.weight holds NaN"),
    ],
)
def test_what_the_decoder_would_not_compute_is_refused(tmp_path, metadata, weights, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, model_bytes(metadata, weights)[0])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_gguf(str(tmp_path / "none.gguf"))
