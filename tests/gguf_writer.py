"""Writes small GGUF files from the format's description, for tests of the reader."""

import struct

import numpy as np

ALIGNMENT = 32
CODES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "BF16": 30}


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item) -> bytes:
    """A metadata value with its type: bool, int (uint32), float (float32), str, or a list of ints or strings."""
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if item and isinstance(item[0], str):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
    return struct.pack("<IIQ", 9, 5, len(item)) + b"".join(struct.pack("<i", i) for i in item)


def gguf_bytes(metadata: dict, tensors: dict, version: int = 3) -> tuple[bytes, int]:
    """The file and the length of its header; `tensors`: name -> (type name, shape slowest first, raw bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, item in metadata.items():
        out += string(key) + value(item)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        out += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        out += struct.pack("<IQ", CODES[kind], len(data))
        data += raw + bytes(-len(raw) % ALIGNMENT)
    header = len(out)
    return out + bytes(-header % ALIGNMENT) + data, header


def f32(array) -> tuple[str, tuple[int, ...], bytes]:
    array = np.asarray(array, np.float32)
    return "F32", array.shape, array.astype("<f4").tobytes()


def byte_table() -> dict[int, str]:
    """Byte -> character of byte-level BPE, written out from its definition."""
    kept = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xA0, 0xAD) and (b < 0x7F or b > 0xA0)]
    others = iter(range(0x100, 0x200))
    return {b: chr(b) if b in kept else chr(next(others)) for b in range(256)}


SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_metadata(**changes) -> dict:
    """A byte-level tokenizer of three special pieces, a user-defined one, all bytes, and a few merges."""
    table = byte_table()
    merges = ["h e", "l l", "he ll", "Ġ w", "Ċ Ċ"]
    pieces = [*SPECIALS, "<think>", *table.values(), *(m.replace(" ", "") for m in merges)]
    fields = {
        "model": "gpt2", "pre": "smollm", "tokens": pieces, "merges": merges, "bos_token_id": 1, "eos_token_id": 2,
        "padding_token_id": 0, "add_bos_token": False, "token_type": [3, 3, 3, 4] + [1] * (len(pieces) - 4),
    }  # fmt: skip
    fields |= changes
    named = {f"tokenizer.ggml.{name}": item for name, item in fields.items() if item is not None}
    return {**named, "tokenizer.chat_template": CHATML}


LLAMA = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 64, "llama.embedding_length": 32,
    "llama.feed_forward_length": 64, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 50000.0, "llama.rope.dimension_count": 8, "llama.vocab_size": 265,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def hf_weights(seed: int = 0, vocabulary: int = 265, tied: bool = True) -> dict[str, np.ndarray]:
    """Random weights of the model that LLAMA describes, by Hugging Face's names and in its order of rotary halves."""
    draw = np.random.default_rng(seed)
    shapes = {
        "input_layernorm": (32,), "post_attention_layernorm": (32,), "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64),
    }  # fmt: skip
    named = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (vocabulary, 32), "model.norm.weight": (32,)}
    named |= {} if tied else {"lm_head.weight": (vocabulary, 32)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in named.items()}


def llama_tensors(weights: dict[str, np.ndarray]) -> dict:
    """These weights as llama.cpp's converter stores them: its names, rotary pairs side by side in q and k."""
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    tensors = {}
    for name, weight in weights.items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        stored = np.empty_like(weight)
        if heads:
            for head in range(heads):
                for pair in range(4):  # of the 8 numbers of a head, i and i + 4 turn together
                    stored[head * 8 + 2 * pair] = weight[head * 8 + pair]
                    stored[head * 8 + 2 * pair + 1] = weight[head * 8 + 4 + pair]
        for long, short in names.items():
            name = name.replace(long, short)
        tensors[name] = f32(stored if heads else weight)
    return tensors
