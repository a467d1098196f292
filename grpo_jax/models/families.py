"""config.json of Hugging Face folders: fields to `Architecture`, family by family, and back.

Every field is taken by somebody: it sets something, it may only have the value with which this decoder computes the
same, or it says nothing about the computation. What is left over is an error.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.errors import InputError
from grpo_jax.models.architecture import Architecture, Experts, Latent, Stack
from grpo_jax.ops.rope import Rope

MOST_LAYERS = 10_000

# Fields that say nothing about the computation.
IGNORED = frozenset(
    "architectures auto_map aux_loss_alpha bos_token_id cache_implementation chunk_size_feed_forward dtype "
    "eos_token_id ep_size id2label initializer_range is_llama_config label2id output_attentions output_hidden_states "
    "output_router_logits pad_token_id pretraining_tp problem_type return_dict router_aux_loss_coef seq_aux "
    "torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version "
    "use_cache".split()
)
# Fields that may only have the value with which this decoder computes the same.
FIXED: dict[str, Any] = {
    "attention_bias": False,  # where a family has it, it is taken before
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "quantization_config": None,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


class Fields:
    """The fields of a config.json, taken out one by one; raises InputError naming file, field, value and fix."""

    def __init__(self, path: str, values: Mapping[str, Any]):
        self.path, self.values = path, dict(values)

    def bad(self, name: str, value: Any, fix: str) -> InputError:
        """The error for a field."""
        return InputError(f"{self.path}: {name}={repr(value)[:200]} {fix}")

    def pop(self, name: str, default: Any = None) -> Any:
        """The value; the default where it is absent or null."""
        value = self.values.pop(name, None)
        return default if value is None else value

    def number(self, name: str, default: Any = None, kind: type = int, least: float = 0) -> Any:
        """A number above `least`."""
        value = self.pop(name, default)
        allowed = (int, float) if kind is float else int
        if not isinstance(value, allowed) or isinstance(value, bool) or not least < value < 1e30:
            raise self.bad(name, value, "must be a positive number: mend config.json")
        return kind(value)

    def count(self, name: str, default: int = 0) -> int:
        """A number that may be 0; null is 0."""
        return self.number(name, default, least=-1)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.pop(name, default)
        if not isinstance(value, bool):
            raise self.bad(name, value, "must be true or false: mend config.json")
        return value

    def layers(self, name: str, layers: int, allowed: tuple) -> list | None:
        """A list of one of the allowed values a layer; None where it is absent."""
        value = self.pop(name)
        if value is not None and (
            not isinstance(value, list) or len(value) != layers or any(item not in allowed for item in value)
        ):
            raise self.bad(name, value, f"must hold {' or '.join(map(str, allowed))} for each of {layers} layers")
        return value

    def activation(self) -> str:
        """The gated MLP's activation."""
        names = {n: self.values.pop(n) for n in ("hidden_act", "hidden_activation") if self.values.get(n) is not None}
        for name, value in names.items():
            if value not in ACTIVATIONS or value != next(iter(names.values())):
                raise self.bad(name, value, f"is not supported: use a model with one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[next(iter(names.values()))] if names else "silu"

    def finish(self) -> None:
        """Refuses what is left."""
        for name, wanted in FIXED.items():
            if (value := self.pop(name, wanted)) != wanted:
                raise self.bad(name, value, f"is not supported: use a model with {name}={wanted!r}")
        left = [n for n in self.values if n not in IGNORED and not n.startswith("_") and self.values[n] is not None]
        if left:
            fix = "is an unknown field, which may change the computation: remove it if it does not"
            raise self.bad(left[0], self.values[left[0]], fix)


def read_json(path: str) -> dict[str, Any]:
    """A JSON file that holds an object; raises InputError when it is missing or something else."""
    try:
        fields = json.loads(pathlib.Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): give a complete Hugging Face folder") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}): get it again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds {type(fields).__name__}, not an object: get it again")
    return fields


def read_config(path: str) -> Architecture:
    """The architecture in a config.json; unknown fields and fields that would change the computation are errors."""
    return from_fields(path, read_json(path))


def from_fields(path: str, values: Mapping[str, Any]) -> Architecture:
    """The architecture that the fields of a config.json describe."""
    f = Fields(path, values)
    family = f.pop("model_type")
    if family not in FAMILIES:
        raise f.bad("model_type", family, f"is not supported: use one of {', '.join(FAMILIES)}")
    architecture = FAMILIES[family](f)
    f.finish()
    return architecture


def _sizes(f: Fields, family: str, tied: bool = False) -> dict[str, Any]:
    """What all families have."""
    width, heads = f.number("hidden_size"), f.number("num_attention_heads")
    latent = family == "deepseek_v3"
    sizes = dict(
        family=family,
        vocabulary=f.number("vocab_size"),
        width=width,
        heads=heads,
        kv_heads=f.number("num_key_value_heads", heads),
        mlp_width=f.number("intermediate_size"),
        norm_eps=f.number("rms_norm_eps", 1e-6, float),
        tied=f.flag("tie_word_embeddings", tied),
        activation=f.activation(),
        context=f.count("max_position_embeddings"),
    )
    if not latent:
        sizes["head_size"] = f.number("head_dim", width // heads)
        if heads % sizes["kv_heads"] or sizes["head_size"] % 2:
            raise InputError(
                f"{f.path}: num_attention_heads={heads} must divide by num_key_value_heads={sizes['kv_heads']}, and "
                f"head_dim={sizes['head_size']} must be even: mend config.json"
            )
    return sizes


def _layers(f: Fields) -> int:
    layers = f.number("num_hidden_layers")
    if layers > MOST_LAYERS:  # before a list of so many layers is made
        raise f.bad("num_hidden_layers", layers, f"is more than {MOST_LAYERS}: mend config.json")
    return layers


def _llama(f: Fields) -> Architecture:
    sizes, layers = _sizes(f, "llama"), _layers(f)
    bias = f.flag("attention_bias", False)
    return Architecture(
        **sizes,
        stacks=(Stack((0,) * layers),),
        ropes=(_rope(f, sizes),),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=f.flag("mlp_bias", False),
    )


def _mistral(f: Fields) -> Architecture:
    sizes, layers = _sizes(f, "mistral"), _layers(f)
    window = f.count("sliding_window", 0 if "sliding_window" in f.values else 4096)
    return Architecture(**sizes, stacks=(Stack((window,) * layers),), ropes=(_rope(f, sizes),))


def _smollm3(f: Fields) -> Architecture:
    sizes, layers = _sizes(f, "smollm3", tied=True), _layers(f)
    rope, bias = _rope(f, sizes, 2e6), f.flag("attention_bias", False)
    interval = f.number("no_rope_layer_interval", 4)
    turned = f.layers("no_rope_layers", layers, (0, 1)) or [int((i + 1) % interval != 0) for i in range(layers)]
    windows = _windows(f, layers, lambda i: not turned[i])
    return Architecture(
        **sizes,
        stacks=(Stack(windows, tuple(1 - t for t in turned)),),
        ropes=(rope, Rope(kind="none")),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=f.flag("mlp_bias", False),
    )


def _qwen2(f: Fields) -> Architecture:
    sizes, layers = _sizes(f, "qwen2"), _layers(f)
    return Architecture(**sizes, stacks=(Stack(_late_windows(f, layers)),), ropes=(_rope(f, sizes),), qkv_bias=True)


def _qwen3(f: Fields) -> Architecture:
    f.values.setdefault("head_dim", 128)
    sizes, layers = _sizes(f, "qwen3"), _layers(f)
    bias, stacks = f.flag("attention_bias", False), (Stack(_late_windows(f, layers)),)
    return Architecture(**sizes, stacks=stacks, ropes=(_rope(f, sizes),), qk_norm=True, qkv_bias=bias, out_bias=bias)


def _qwen3_moe(f: Fields) -> Architecture:
    sizes, layers = _sizes(f, "qwen3_moe"), _layers(f)
    bias, step = f.flag("attention_bias", False), f.number("decoder_sparse_step", 1)
    f.pop("max_window_layers")  # this family's windows are those of all layers
    window = f.count("sliding_window", 0 if "sliding_window" in f.values else 4096)
    window = window if f.flag("use_sliding_window", False) else 0
    dense = f.pop("mlp_only_layers", [])
    if not isinstance(dense, list) or any(i not in range(layers) for i in dense):
        raise f.bad("mlp_only_layers", dense, f"must hold layers below {layers}: mend config.json")
    count = f.number("num_experts", f.pop("num_local_experts"))
    experts = Experts(
        count=count,
        chosen=_chosen(f, count),
        width=f.number("moe_intermediate_size"),
        normalised=f.flag("norm_topk_prob", False),
    )
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(layers)]
    return Architecture(
        **sizes,
        stacks=_runs([window] * layers, sparse),
        ropes=(_rope(f, sizes),),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        experts=experts if any(sparse) else None,
    )


def _gemma(f: Fields, sizes: dict[str, Any], **more: Any) -> Architecture:
    """What Gemma 2 and 3 share."""
    if sizes["activation"] == "silu":
        raise f.bad("hidden_activation", "silu", "is not supported: use a model with gelu_pytorch_tanh")
    bias = f.flag("attention_bias", False)
    f.pop("sliding_window_size")  # older files: the same number once more
    return Architecture(
        **sizes,
        **more,
        qkv_bias=bias,
        out_bias=bias,
        post_norms=True,
        norm_offset=True,
        embedding_scale=sizes["width"] ** 0.5,
        attention_scale=f.number("query_pre_attn_scalar", 256, float) ** -0.5,
        attention_cap=f.number("attn_logit_softcapping", 0, float, least=-1),
        logit_cap=f.number("final_logit_softcapping", 0, float, least=-1),
    )


def _gemma2(f: Fields) -> Architecture:
    f.values.setdefault("head_dim", 256)  # transformers' defaults, where a file leaves them out
    for name, cap in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        f.values.setdefault(name, cap)
    sizes, layers = _sizes(f, "gemma2", tied=True), _layers(f)
    windows = _windows(f, layers, lambda i: i % 2 == 0, always=True)
    return _gemma(f, sizes, stacks=(Stack(windows),), ropes=(_rope(f, sizes),))


def _gemma3(f: Fields) -> Architecture:
    f.values.setdefault("head_dim", 256)
    sizes, layers = _sizes(f, "gemma3_text", tied=True), _layers(f)
    pattern = f.number("sliding_window_pattern", 6)
    windows = _windows(f, layers, lambda i: (i + 1) % pattern != 0, always=True)
    both = f.values.get("rope_parameters")
    if isinstance(both, dict) and set(both) <= {"full_attention", "sliding_attention"}:
        f.pop("rope_parameters")
        ropes = tuple(
            _rope(Fields(f.path, {"rope_parameters": both.get(name)}), sizes, theta)
            for name, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
        )
    else:
        local = f.number("rope_local_base_freq", 1e4, float)
        ropes = (_rope(f, sizes, 1e6), Rope(local))
    stacks = (Stack(windows, tuple(int(window > 0) for window in windows)),)
    return _gemma(f, sizes, stacks=stacks, ropes=ropes, qk_norm=True)


def _phi3(f: Fields) -> Architecture:
    sizes, layers = _sizes(f, "phi3"), _layers(f)
    windows = (f.count("sliding_window"),) * layers
    return Architecture(**sizes, stacks=(Stack(windows),), ropes=(_rope(f, sizes),))


def _deepseek_v3(f: Fields) -> Architecture:
    sizes, layers = _sizes(f, "deepseek_v3"), _layers(f)
    sizes["kv_heads"] = sizes["heads"]
    f.number("num_nextn_predict_layers", f.pop("num_mtp_layers", 0), least=-1)  # their layers are not read
    latent = Latent(
        rank=f.number("kv_lora_rank"),
        query_rank=f.count("q_lora_rank"),
        plain=f.number("qk_nope_head_dim"),
        rotary=f.number("qk_rope_head_dim"),
        value=f.number("v_head_dim"),
        paired=f.flag("rope_interleave", True),
    )
    for name, wanted in (("head_dim", latent.rotary), ("qk_head_dim", latent.plain + latent.rotary)):
        if (value := f.pop(name, wanted)) != wanted:
            raise f.bad(name, value, f"is not {wanted}, as the other sizes of its heads have it: mend config.json")
    if f.flag("attention_bias", False):
        raise f.bad("attention_bias", True, "is not supported: use a model with attention_bias=False")
    count, dense = f.number("n_routed_experts", f.pop("num_local_experts")), f.count("first_k_dense_replace", 3)
    width, groups = f.number("moe_intermediate_size"), f.number("n_group", 8)
    experts = Experts(
        count=count,
        chosen=_chosen(f, count),
        width=width,
        shared_width=width * f.number("n_shared_experts", 1),
        scoring="sigmoid",
        normalised=f.flag("norm_topk_prob", True),
        scale=f.number("routed_scaling_factor", 2.5, float),
        groups=groups,
        chosen_groups=f.number("topk_group", 4),
    )
    if count % groups or experts.chosen_groups > groups or (groups > 1 and count // groups < 2):
        raise f.bad("n_group", groups, f"must cut n_routed_experts={count} into topk_group or more groups of 2 or more")
    sizes["head_size"] = latent.plain + latent.rotary
    return Architecture(
        **sizes,
        stacks=_runs([0] * layers, [i >= dense for i in range(layers)]),
        ropes=(_rope(f, {**sizes, "head_size": latent.rotary}),),
        experts=experts if dense < layers else None,
        latent=latent,
    )


FAMILIES: dict[str, Callable[[Fields], Architecture]] = {
    "llama": _llama,
    "mistral": _mistral,
    "smollm3": _smollm3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "deepseek_v3": _deepseek_v3,
}


def _chosen(f: Fields, count: int) -> int:
    chosen = f.number("num_experts_per_tok", 8)
    if count > MOST_LAYERS:
        raise f.bad("num_experts", count, f"is more than {MOST_LAYERS}: mend config.json")
    if chosen > count:
        raise f.bad("num_experts_per_tok", chosen, f"is more than the {count} experts: mend config.json")
    return chosen


def _runs(windows: list[int], sparse: list[bool]) -> tuple[Stack, ...]:
    """Stacks of adjacent layers of one kind."""
    stacks: list[Stack] = []
    for window, experts in zip(windows, sparse, strict=True):
        if stacks and stacks[-1].experts == experts:
            stacks[-1] = Stack((*stacks[-1].windows, window), experts=experts)
        else:
            stacks.append(Stack((window,), experts=experts))
    return tuple(stacks)


def _windows(f: Fields, layers: int, narrow: Callable[[int], bool], always: bool = False) -> tuple[int, ...]:
    """Windows by `layer_types`, where these are absent by `narrow`; all 0 unless windows are used (`always`)."""
    used = always or f.flag("use_sliding_window", False)
    window = f.count("sliding_window", 0 if "sliding_window" in f.values else 4096)
    kinds = f.layers("layer_types", layers, ("full_attention", "sliding_attention"))
    by_layer = [kind == "sliding_attention" for kind in kinds] if kinds else [narrow(i) for i in range(layers)]
    return tuple(window if used and is_narrow else 0 for is_narrow in by_layer)


def _late_windows(f: Fields, layers: int) -> tuple[int, ...]:
    """Qwen: layers from `max_window_layers` on have windows, where `use_sliding_window` says so."""
    first = f.count("max_window_layers", 28)
    return _windows(f, layers, lambda i: i >= first)


def _rope(f: Fields, sizes: Mapping[str, Any], default_theta: float = 10_000.0) -> Rope:
    """Takes the rotary fields out: rope_theta and rope_scaling, or rope_parameters as newer files have them."""
    rest: dict[str, Any] = {}
    where = "rope_scaling"
    for name in ("rope_scaling", "rope_parameters"):
        if (value := f.pop(name)) is not None:
            if not isinstance(value, dict):
                raise f.bad(name, value, "must be an object: mend config.json")
            rest |= value
            where = name
    inner = Fields(f.path, rest)
    for field, default in (("rope_theta", default_theta), ("partial_rotary_factor", 1.0)):
        outer = f.pop(field, default)
        inner.values.setdefault(field, outer)
    older = inner.pop("type", "default")
    kind = inner.pop("rope_type", older)
    kind = {"su": "longrope"}.get(kind, kind)  # Phi-3's first name for it
    size = int(sizes["head_size"] * inner.number("partial_rotary_factor", kind=float))
    if kind not in ROPE_KINDS or size % 2 or not 0 < size <= sizes["head_size"]:
        raise f.bad(where, rest, f"is not supported: use a model with rope_type one of {', '.join(ROPE_KINDS)}")
    original = f.pop("original_max_position_embeddings", sizes["context"] or None)
    theta = inner.number("rope_theta", kind=float)
    made = _stretch(inner, kind, original, sizes["context"], size // 2)
    inner.finish()
    return Rope(theta, kind, 0 if size == sizes["head_size"] else size, **made)


def _stretch(f: Fields, kind: str, original: Any, context: int, pairs: int) -> dict[str, Any]:
    """What a kind of rotary embedding has beside its base."""
    if kind == "default":
        f.pop("original_max_position_embeddings")
        return {}
    if kind == "linear":
        return {"factor": f.number("factor", kind=float)}
    made: dict[str, Any] = {"original_length": f.number("original_max_position_embeddings", original)}
    if kind == "longrope":
        for name in ("short", "long"):
            table = f.pop(f"{name}_factor")
            positive = isinstance(table, list) and all(isinstance(x, int | float) and x > 0 for x in table)
            if not positive or len(table) != pairs:
                raise f.bad(f"{name}_factor", table, f"must hold {pairs} positive numbers: mend config.json")
            made[name] = tuple(map(float, table))
        return made | {
            "factor": f.number("factor", (context or made["original_length"]) / made["original_length"], float),
            "attention_factor": f.number("attention_factor", 0.0, float, least=-1),
        }
    made["factor"] = f.number("factor", kind=float)
    if kind == "llama3":
        low, high = f.number("low_freq_factor", kind=float), f.number("high_freq_factor", kind=float)
        if low >= high:
            raise f.bad("low_freq_factor", low, f"must be below high_freq_factor={high}: mend config.json")
        return made | {"low": low, "high": high}
    return made | {
        "low": f.number("beta_slow", 1.0, float),
        "high": f.number("beta_fast", 32.0, float),
        "truncate": f.flag("truncate", True),
        "attention_factor": f.number("attention_factor", 0.0, float, least=-1),
        "mscale": f.number("mscale", 0.0, float, least=-1),
        "mscale_all": f.number("mscale_all_dim", 0.0, float, least=-1),
    }


CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


def to_fields(a: Architecture) -> dict[str, Any]:
    """The config.json of an architecture: `from_fields` the other way round, where its family has the fields."""
    act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[a.activation]
    fields: dict[str, Any] = {
        "architectures": [CLASSES[a.family]],
        "model_type": a.family,
        "vocab_size": a.vocabulary,
        "hidden_size": a.width,
        "intermediate_size": a.mlp_width,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "hidden_act": act,
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tied,
        "attention_dropout": 0.0,
    }
    if a.family not in ("mistral", "qwen2", "phi3"):
        fields["attention_bias"] = a.out_bias
    if a.latent is None:
        fields["head_dim"] = a.head_size
    if a.family in ("llama", "smollm3"):
        fields["mlp_bias"] = a.mlp_bias
    if a.context:
        fields["max_position_embeddings"] = a.context
    return fields | _rope_fields(a) | _window_fields(a) | _gemma_fields(a, act) | _expert_fields(a) | _latent_fields(a)


def _rope_fields(a: Architecture) -> dict[str, Any]:
    rope = a.ropes[0]
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if a.family == "gemma3_text":
        fields["rope_local_base_freq"] = a.ropes[-1].theta
    if rope.size:
        fields["partial_rotary_factor"] = rope.size / a.head_size
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "default":
        return fields
    if rope.kind == "longrope":
        # Exactly these three, and the original length outside: what older releases of transformers accept of Phi-3.
        fields["original_max_position_embeddings"] = rope.original_length
        scaling = {"type": "longrope", "short_factor": list(rope.short), "long_factor": list(rope.long)}
        if rope.factor != a.context / rope.original_length:
            scaling["factor"] = rope.factor
    elif rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
    if rope.kind == "yarn":
        scaling |= {"beta_slow": rope.low, "beta_fast": rope.high}
        scaling |= {} if rope.truncate else {"truncate": False}
    for name, value in (
        ("attention_factor", rope.attention_factor), ("mscale", rope.mscale), ("mscale_all_dim", rope.mscale_all)
    ):  # fmt: skip
        scaling |= {name: value} if value else {}
    return fields | {"rope_scaling": scaling}


def _window_fields(a: Architecture) -> dict[str, Any]:
    windows = [window for stack in a.stacks for window in stack.windows]
    window = max(windows)
    if a.family in ("mistral", "phi3"):
        return {"sliding_window": window or None}
    if a.family in ("llama", "deepseek_v3"):
        return {}
    fields: dict[str, Any] = {"sliding_window": window or None}
    if a.family != "qwen3_moe":
        fields["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    if not a.family.startswith("gemma"):
        fields["use_sliding_window"] = window > 0
    if a.family == "smollm3":
        fields["no_rope_layers"] = [1 - rope for stack in a.stacks for _, rope in stack.places]
    return fields


def _gemma_fields(a: Architecture, act: str) -> dict[str, Any]:
    if not a.family.startswith("gemma"):
        return {}
    scalar = (a.attention_scale or 1.0) ** -2
    return {
        "hidden_activation": act,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": a.attention_cap or None,
        "final_logit_softcapping": a.logit_cap or None,
    }


def _expert_fields(a: Architecture) -> dict[str, Any]:
    e, sparse = a.experts, [stack.experts for stack in a.stacks for _ in stack.windows]
    if e is None:
        return {}
    fields: dict[str, Any] = {
        "num_experts_per_tok": e.chosen,
        "moe_intermediate_size": e.width,
        "norm_topk_prob": e.normalised,
    }
    if a.family == "qwen3_moe":
        dense = [i for i, is_sparse in enumerate(sparse) if not is_sparse]
        return fields | {"num_experts": e.count, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    return fields | {
        "n_routed_experts": e.count,
        "n_shared_experts": e.shared_width // e.width,
        "routed_scaling_factor": e.scale,
        "scoring_func": e.scoring,
        "topk_method": "noaux_tc",
        "n_group": e.groups,
        "topk_group": e.chosen_groups,
        "first_k_dense_replace": sparse.index(True),
        "moe_layer_freq": 1,
    }


def _latent_fields(a: Architecture) -> dict[str, Any]:
    if (m := a.latent) is None:
        return {}
    return {
        "kv_lora_rank": m.rank,
        "q_lora_rank": m.query_rank or None,
        "qk_nope_head_dim": m.plain,
        "qk_rope_head_dim": m.rotary,
        "v_head_dim": m.value,
        "rope_interleave": m.paired,
        "num_nextn_predict_layers": 0,
    }
