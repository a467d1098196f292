"""Every option of grpo_jax: typed, documented where it is declared, checked before anything is compiled.

Experiments are Python files with a `get_config()` that returns an `ml_collections.ConfigDict`
(start from `default_config()`); `--config.optim.lr=1e-6` overrides a field. Inside the package only
the frozen dataclasses below travel, and each function takes the section that it uses.
"""

import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from grpo_jax.errors import InputError


def option(default: Any, doc: str, choices: tuple = ()) -> Any:
    """A config field: its default, what it does, and the values it allows."""
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": choices})


REMAT_POLICIES = ("dots_saveable", "dots_with_no_batch_dims_saveable", "offload_dot_with_no_batch_dims")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and in which number formats."""

    path: str = option(
        "",
        "folder (Hugging Face or PEFT), .gguf file, run or checkpoint, Hub id (owner/name, @revision may follow), or "
        "'smollm2-135m'; empty: made in the run by `base`",
    )
    param_dtype: str = option(
        "float32", "dtype of the trained parameters at rest; bfloat16 loses updates at lr 1e-6", ("float32", "bfloat16")
    )
    compute_dtype: str = option(
        "float32", "dtype of activations and products; logits stay float32", ("float32", "bfloat16")
    )
    matmul_precision: str = option(
        "highest", "jax_default_matmul_precision of every program", ("default", "high", "highest")
    )
    attention: str = option(
        "auto",
        "attention of passes over whole sequences whose prompts are not shared: splash (Pallas, TPU), cudnn (NVIDIA, "
        "bfloat16), xla; auto: the kernel of the devices where it can serve",
        ("auto", "xla", "cudnn", "splash"),
    )
    remat: str = option(
        "none",
        "what the backward recomputes: nothing, all of each layer (full), or all that the policy of this name in "
        "jax.checkpoint_policies does not keep; offload_... keeps it in the host's memory",
        ("none", "full", *REMAT_POLICIES),
    )
    unroll: int = option(
        0,
        "layers that follow one another in training's loop over layers: fewer copies, a longer compile; 0: all of a "
        "model of at most 8 layers where nothing is recomputed, else 1",
    )
    logits_chunk: int = option(0, "positions whose logits exist at once in training; 0: all that a micro-batch has")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): the model is frozen, x A B alpha / rank beside its dense layers is trained.

    No dropout: the sampler's law and the loss's would differ.
    """

    rank: int = option(0, "rank of the adapters; 0: none, all parameters are trained")
    alpha: float = option(32.0, "what the adapters add is scaled by alpha / rank")
    targets: str = option(
        "",
        "regular expression on layers such as 'stack_0/attention/query': those with adapters; empty: all linear ones",
    )
    base_dtype: str = option(
        "bfloat16",
        "dtype of the frozen model at rest; int8: its dense kernels with a scale a column, the rest bfloat16",
        ("float32", "bfloat16", "int8"),
    )


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning on prompts and completions; the loss counts assistant tokens only."""

    path: str = option("", "JSONL file of chats ({'messages': [...]}) or {'prompt', 'completion'} rows")
    steps: int = option(100, "optimizer steps")
    epochs: int = option(0, "times that all packs are seen, in place of `steps`; 0: `steps` counts")
    batch_size: int = option(16, "packs a step")
    max_length: int = option(256, "tokens of a pack; examples are packed, one that is longer is an error")
    lr: float = option(1e-5, "peak learning rate (cosine to a tenth, after a warm-up of a twentieth)")


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation on pairs of answers; the reference is the model at the start."""

    path: str = option("", "JSONL file of preferences: {'prompt', 'chosen', 'rejected'}, texts or lists of messages")
    steps: int = option(100, "optimizer steps")
    batch_size: int = option(8, "pairs a step")
    max_length: int = option(512, "tokens of a prompt and an answer; a longer row is an error")
    lr: float = option(1e-6, "peak learning rate (cosine to a tenth, after a warm-up of a twentieth)")
    beta: float = option(0.1, "how much the implicit reward counts; larger keeps closer to the reference")
    loss_type: str = option("sigmoid", "loss of a pair", ("sigmoid", "ipo"))
    label_smoothing: float = option(0.0, "sigmoid: chance that a preference is the wrong way round, below 0.5")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The base model that a run makes itself when `model.path` is empty."""

    layers: int = option(4, "decoder layers")
    width: int = option(128, "width of the residual stream")
    heads: int = option(4, "query heads")
    kv_heads: int = option(2, "key and value heads")
    mlp_width: int = option(512, "width of the gated MLP")
    rope_theta: float = option(100.0, "base of the rotary angles; small, as the texts are short")
    tied: bool = option(True, "the embedding is the output matrix too")
    vocabulary: int = option(96, "upper bound on the pieces of the SentencePiece tokenizer trained in the run")
    worked_sums: int = option(
        6000,
        "rows of mixed quality that tokenizer and base model learn from: worked sums, or texts of data.path (tasks)",
    )
    right_share: float = option(0.42, "share of them that think, are right and well formed")
    sft: SftConfig = option(
        SftConfig(steps=700, batch_size=64, max_length=64, lr=3e-3), "how the base learns; its `path` must stay empty"
    )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """From messages to tokens and back."""

    template: str = option(
        "plain", "'plain' (the prompt alone), 'r1_zero', 'chat' (the model's own), or a .jinja file of messages"
    )
    system_prompt: str = option("", "system message put before each prompt; empty: none")
    end_tokens: tuple[str, ...] = option((), "tokens that end a completion; empty: the model's own")


@dataclasses.dataclass(frozen=True)
class PromptSetConfig:
    """One of several prompt sets that a run draws from, with rewards of its own; `data.sets` is a list of them.

    Set in config files: `c.data.sets = ({"name": ..., "path": ..., "rewards": (...)}, ...)`. What is not named here,
    such as `data.digits`, is that of `data`.
    """

    name: str = option("", "its name, in metrics, in samples and in the column `set` of its rows")
    weight: float = option(1.0, "prompts of it that a step draws, over the sum of the weights of all sets drawn then")
    rewards: tuple[str, ...] = option((), "those of rewards.names that its completions earn; empty: all")
    reward_weights: tuple[float, ...] = option((), "one weight for each of them; empty: those of rewards.weights")
    late: bool = option(False, "it is drawn from rewards.late_from on, not before")
    source: str = option("jsonl", "where its prompts come from", ("arithmetic", "tasks", "jsonl", "tfds", "hf"))
    path: str = option("", "as data.path")
    split: str = option("train", "as data.split")
    eval_path: str = option("", "as data.eval_path")
    eval_split: str = option("test", "as data.eval_split")
    prompt_column: str = option("question", "as data.prompt_column")
    answer_column: str = option("answer", "as data.answer_column")
    answer_marker: str = option("", "as data.answer_marker")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The prompts."""

    source: str = option(
        "arithmetic", "where prompts come from", ("arithmetic", "tasks", "jsonl", "tfds", "hf", "memory")
    )
    path: str = option(
        "",
        "file (jsonl), builder name such as gsm8k (tfds), dataset folder (hf), kinds and languages such as "
        "'sums,countdown:en,ru' (tasks)",
    )
    split: str = option("train", "split that is trained on (tfds, hf)")
    eval_path: str = option("", "file or folder of held-out rows; empty: `path` (tfds, hf) or the last rows (jsonl)")
    eval_split: str = option("test", "split of the held-out rows (tfds, hf)")
    prompt_column: str = option("question", "column with the prompt: text, or a list of messages")
    answer_column: str = option("answer", "column with the right answer; empty: rows have none")
    answer_marker: str = option("", "the answer is what follows this mark in its column ('####' for GSM8K); empty: all")
    max_prompt_length: int = option(16, "tokens a prompt may have, template included; longer ones are an error")
    prompts_per_step: int = option(16, "prompts a step; times sampler.group_size gives completions")
    pool_factor: int = option(
        1,
        "dynamic sampling (DAPO): a step draws this many times its prompts and samples them, prompts_per_step at a "
        "time, until the batch is full of groups that have an advantage; 1: off",
    )
    shuffle: bool = option(True, "a new order every epoch, a function of the seed alone")
    digits: int = option(2, "arithmetic, tasks: the most digits of an operand")
    sets: tuple[PromptSetConfig, ...] = option((), "several prompt sets in place of `source` and `path`; each:")


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """What `grpo-jax tasks` writes as files of `data.path`, for stages that read files."""

    prompts: int = option(2000, "training prompts with answers, and as many general ones, at most")
    held_out: int = option(200, "held-out prompts of each kind, at most; of chats, pairs and points together a tenth")
    chats: int = option(400, "chats with responses to general prompts")
    good_share: float = option(1.0, "share of the chats whose response is good; the others have a flaw")
    pairs: int = option(1500, "pairs of responses to general prompts, the more helpful one chosen")
    points: int = option(1000, "responses to general prompts, labelled harmless or not")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How completions are drawn."""

    group_size: int = option(8, "completions a prompt (G)")
    max_new_tokens: int = option(32, "tokens a completion may have (T)")
    temperature: float = option(1.0, "logits are divided by it, in sampling and in training")
    top_k: int = option(0, "sample among the k likeliest tokens; 0: all")
    top_p: float = option(1.0, "sample among the likeliest tokens that hold this mass")
    min_p: float = option(0.0, "sample among the tokens at least this times as likely as the likeliest; 0: all")
    min_new_tokens: int = option(0, "tokens that a completion has at least, the end token included")
    stop: tuple[str, ...] = option((), "texts that end a completion once it holds one of them")
    slots: int = option(0, "completions that decode at a time, each slot refilled as one ends; 0: all of them")
    cache_dtype: str = option("float32", "dtype of cached keys and values", ("float32", "bfloat16"))
    cache_pieces: int = option(
        0,
        "without slots: loops that decoding is cut into, each with a cache twice as long as the one before, so that "
        "attention reads no more; each compiles on its own; 0: 4 on CPUs from 512 new tokens up, else 1",
    )


@dataclasses.dataclass(frozen=True)
class CodeConfig:
    """The reward `code`: where programs run, what they may use, how tests count."""

    sandbox: str = option(
        "bubblewrap",
        "where programs run: namespaces of their own (Linux, `bwrap`), or pydantic-monty's part of Python",
        ("bubblewrap", "monty"),
    )
    score: str = option("all", "1 only where all tests pass, or the share that does", ("all", "share"))
    seconds: float = option(
        5.0, "CPU seconds of a run (a test of a program, all tests of a function); twice that by the clock"
    )
    memory_mb: int = option(512, "MiB of address space of a run; 64 hold the interpreter")
    threads: int = option(16, "threads of a run; it may not start processes")
    files_mb: int = option(0, "MiB that a run may write below /scratch; 0: nothing")
    output_kb: int = option(256, "KiB that a run may print; more ends it")
    parallel: int = option(0, "completions judged at once; 0: one a core")


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """The reward 'judge': a model behind an OpenAI-compatible server that returns {analysis, correctness} as JSON."""

    url: str = option("", "address of the server's API, such as http://localhost:8000/v1")
    model: str = option("", "the model's name on that server")
    key_file: str = option("", "file that holds the API key; empty: none is sent")
    prompt: str = option("", "file with another prompt, in which {prompt}, {answer}, {completion} are filled in")
    max_tokens: int = option(1024, "tokens of the judge's reply")
    timeout: float = option(30.0, "seconds that one request may take")
    retries: int = option(3, "further requests after one that failed, with growing pauses")
    concurrency: int = option(8, "requests under way at once")
    requests_per_second: float = option(0.0, "requests begun in a second, at most; 0: no limit")
    cache: str = option("", "JSONL file of verdicts, read first and added to; empty: kept in memory")


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """A reward model that scores completions inside the step, as one more forward pass."""

    path: str = option("", "folder that `grpo-jax reward-model train` has made, with the policy's tokenizer")
    sees: str = option("response", "the whole response, or what follows the last marker in it", ("response", "summary"))
    marker: str = option("</think>", "ends the thought; a response without it is seen whole")
    micro_batch_size: int = option(0, "completions in one pass; 0: all")


@dataclasses.dataclass(frozen=True)
class ModelJudgeConfig:
    """A judge inside the step: a generative model that returns {analysis, correctness} as JSON, drawn greedily."""

    path: str = option("", "folder of a model with the policy's tokenizer; it does not learn")
    prompt: str = option("", "file with another prompt, in which {prompt}, {answer}, {completion} are filled in")
    max_new_tokens: int = option(128, "tokens that a verdict may have")


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """What a completion earns: the weighted sum of its components."""

    names: tuple[str, ...] = option(
        ("answer", "format"), "components: in-graph and host rewards by name (see rewards.md), or 'module:function'"
    )
    weights: tuple[float, ...] = option((1.0, 0.2), "one weight a component")
    late_names: tuple[str, ...] = option((), "components that earn nothing before late_from, and are not asked")
    late_from: float = option(
        0.0,
        "steps before the late components and prompt sets begin, or, below 1, their share of train.steps (R1: 1300 of "
        "1700)",
    )
    timeout: float = option(60.0, "seconds that one call of a host reward may take")
    on_error: str = option(
        "raise", "an error or time-out of a host reward ends the run, or scores its completion 0", ("raise", "zero")
    )
    workers: int = option(0, "processes of 'module:function' rewards, and of `math`; 0: one a CPU core, at most 8")
    language: str = option("en", "target of `language` and `language_detected`, as an ISO 639-1 code")
    repetition_ngram: int = option(3, "`repetition`: tokens of an n-gram")
    length_budget: int = option(0, "`overlong`, `cosine`: tokens that are too many; 0: sampler.max_new_tokens")
    overlong_cache: int = option(0, "`overlong`: the last tokens of the budget, which cost; 0: a fifth of it")
    cosine_right: tuple[float, ...] = option((1.0, 0.5), "`cosine` of a right completion: at 0 tokens, at the budget")
    cosine_wrong: tuple[float, ...] = option((-1.0, -0.5), "`cosine` of a wrong completion, likewise")
    math_timeout: float = option(5.0, "`math`: seconds that the comparison of one answer may take; later is wrong")
    judge: JudgeConfig = option(JudgeConfig(), "")
    code: CodeConfig = option(CodeConfig(), "of the reward 'code'")
    helpful: RewardModelConfig = option(RewardModelConfig(sees="summary"), "of the reward 'helpful'")
    harmless: RewardModelConfig = option(RewardModelConfig(), "of the reward 'harmless'")
    model_judge: ModelJudgeConfig = option(ModelJudgeConfig(), "of the reward 'model_judge'")


@dataclasses.dataclass(frozen=True)
class RewardModelTrainingConfig:
    """Training of a reward model from `model.path` on preferences."""

    path: str = option(
        "", "JSONL file of pairs {'prompt', 'chosen', 'rejected'} or points {'prompt', 'completion', 'label'}"
    )
    eval_path: str = option("", "JSONL file of held-out rows; empty: the last tenth of `path`")
    steps: int = option(100, "optimizer steps")
    batch_size: int = option(16, "pairs, or points, a step")
    max_length: int = option(512, "tokens of prompt and completion; a longer row is an error")
    lr: float = option(6e-6, "peak learning rate (cosine to a tenth, after a warm-up of a twentieth)")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Advantages, clipped loss, KL, corrections; defaults and names as TRL has them unless said."""

    loss_type: str = option(
        "dapo",
        "the objective of a token, and how token losses are aggregated",
        ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo", "gmpo"),
    )
    importance_sampling_level: str = option(
        "token",
        "what has a ratio: each token; the sequence (GSPO); or the sequence, with the gradient of each token "
        "(GSPO-token)",
        ("token", "sequence", "sequence_token"),
    )
    epsilon: float = option(0.2, "the ratio is clipped below at 1 - epsilon (gmpo: the log ratio at -epsilon)")
    epsilon_high: float = option(
        0.2, "the ratio is clipped above at 1 + epsilon_high (gmpo: the log ratio at epsilon_high)"
    )
    delta: float = option(0.0, "the ratio is clipped above at delta where the advantage is negative; 0: off")
    cispo_max_ratio: float = option(5.0, "cispo: bound of the ratio (what TRL reads from epsilon_high)")
    sapo_temperature_pos: float = option(1.0, "sapo: sharpness of the gate where the advantage is positive")
    sapo_temperature_neg: float = option(1.05, "sapo: the same where it is not")
    vespo_k_pos: float = option(2.0, "vespo: power of the sequence weight where the advantage is not negative")
    vespo_lambda_pos: float = option(3.0, "vespo: its exponential decay there")
    vespo_k_neg: float = option(3.0, "vespo: power of the sequence weight where the advantage is negative")
    vespo_lambda_neg: float = option(2.0, "vespo: its exponential decay there")
    beta: float = option(0.0, "weight of the KL to the reference; 0: no reference is kept")
    kl_estimator: str = option("k3", "Schulman's estimator of the KL", ("k1", "k2", "k3"))
    kl_gradient: str = option(
        "estimator", "gradient of the KL: the estimator's own, or that of k2 (straight through)", ("estimator", "k2")
    )
    entropy_coef: float = option(0.0, "weight of the entropy bonus, aggregated over tokens as the loss is; 0: off")
    top_entropy_quantile: float = option(
        1.0, "share of the rollout's tokens, those of highest entropy, that the policy term counts; 1: all"
    )
    baseline: str = option(
        "group",
        "what is taken off a reward: the mean of its group, of the group's others (RLOO), of the batch, nothing; or a "
        "value model's prediction by token (PPO, see `ppo`)",
        ("group", "leave_one_out", "batch", "none", "value"),
    )
    scale_rewards: str = option("group", "standard deviation that divides advantages", ("group", "batch", "none"))
    advantage_epsilon: float = option(1e-4, "added to that standard deviation; 0 in the papers' formulas")
    advantage_ddof: int = option(1, "that standard deviation divides by the count less this", (0, 1))
    normalize_advantages: bool = option(
        False, "advantages are brought to mean 0 and deviation 1 over the batch at last (REINFORCE++)"
    )
    multi_objective_aggregation: str = option(
        "sum_then_normalize",
        "several rewards: advantages of their weighted sum, or the weighted sum of their advantages, normalised over "
        "the batch (GDPO)",
        ("sum_then_normalize", "normalize_then_sum"),
    )
    correction: str = option(
        "none",
        "importance weight of the training law over the sampling law, by token or sequence, held in bounds "
        "(truncate) or 0 outside (mask); one more forward pass a step",
        ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    )
    correction_max: float = option(3.0, "upper bound of that weight; 0: none")
    correction_min: float = option(0.0, "lower bound of that weight")
    num_iterations: int = option(1, "epochs over a rollout")
    minibatches: int = option(1, "optimizer updates an epoch")
    micro_batch_size: int = option(
        0,
        "completions of full length in one gradient pass, more where they are shorter; at least a group on each "
        "device, or a completion where prompts are not shared",
    )
    reference_every: int = option(0, "steps after which the reference becomes the policy; 0: never")
    outer_iterations: int = option(
        1, "equal parts of the run (iterative GRPO); at the end of each the reference becomes the policy; 1: never"
    )
    mask_truncated: bool = option(False, "completions that did not end are left out of the loss")


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """PPO's value model and generalized advantages, with objective.baseline=value; names as in TRL's PPOTrainer."""

    critic: str = option(
        "head", "value model: a linear head on the policy's hidden states, or a decoder of its own", ("head", "model")
    )
    gamma: float = option(1.0, "discount of later rewards")
    lam: float = option(1.0, "lambda of generalized advantages; TRL has 0.95, with which PPO loses on long reasoning")
    vf_coef: float = option(0.1, "weight of the value loss")
    cliprange_value: float = option(
        0.2, "a value may move this far from the rollout's before its loss is clipped; 0: off"
    )
    whiten_advantages: bool = option(True, "advantages of a rollout get mean 0 and standard deviation 1")
    kl_in_reward: bool = option(
        False, "objective.beta weighs log pi_old - log pi_ref taken off each token's reward, not a KL in the loss"
    )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """On-policy distillation (GKD, arXiv 2306.13649): the student is brought to a teacher's law on its own samples."""

    teacher: str = option("", "model that teaches, given as model.path is, with the student's tokenizer; empty: none")
    loss: str = option(
        "full",
        "full: the reverse KL of each token's law, over the whole vocabulary; sampled: its estimate by the sampled "
        "token, as an advantage of the objective",
        ("full", "sampled"),
    )
    weight: float = option(
        1.0, "share of the teacher: rewards' advantages count 1 - weight, the reverse KL weight; 1: the teacher alone"
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optax chain: clip, optimizer, decay, schedule."""

    name: str = option("adamw", "optimizer", ("adamw", "adafactor"))
    lr: float = option(1e-6, "peak learning rate")
    schedule: str = option("constant", "shape after the warm-up, over train.steps", ("constant", "linear", "cosine"))
    warmup_steps: int = option(0, "optimizer updates of linear warm-up from 0")
    final_lr_fraction: float = option(0.0, "linear, cosine: the last learning rate over the peak")
    clip_norm: float = option(1.0, "global gradient norm is clipped to it; 0: off")
    weight_decay: float = option(0.0, "decoupled decay")
    decay_mask: str = option("matrices", "what decays: matrices (no norms, no biases) or all", ("matrices", "all"))
    b1: float = option(0.9, "Adam's first decay")
    b2: float = option(0.999, "Adam's second decay")
    eps: float = option(1e-8, "Adam's epsilon")
    moment_dtype: str = option("float32", "dtype of Adam's first moment", ("float32", "bfloat16"))
    routing_bias_rate: float = option(
        0.0, "DeepSeek-V3's routing biases move by this against their experts' load at every update; 0: they stay"
    )


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How the step is run."""

    mode: str = option("fused", "fused: one program; staged: sample, score, update apart", ("fused", "staged"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; at most one may be -1 (all that are left)."""

    data: int = option(-1, "rows are split over it, parameters are copied")
    fsdp: int = option(1, "rows are split over it, and parameters too")
    tensor: int = option(1, "heads and MLP columns are split over it")
    expert: int = option(1, "rows are split over it, and the experts of routed layers; other parameters are copied")
    sequence: int = option(1, "tokens of a gradient pass are split over it, in sampling rows; parameters are copied")
    auto: bool = option(
        False,
        "the run picks the sizes by devices, their memory and the model, and says why; leave the axes alone",
    )
    cpu_devices: int = option(
        1,
        "devices that this machine's processor counts as where there is no accelerator, rows are split over them; "
        "0: one a core, as far as rows divide",
    )
    sampling: str = option(
        "same",
        "layout of the sampling parameters: as trained, not over fsdp, copied",
        ("same", "tensor", "replicated"),
    )
    offload: str = option(
        "none",
        "what lies in the host's memory between its uses: the optimizer's state, the parameters of GRPO's reference",
        ("none", "optimizer", "reference", "both"),
    )


@dataclasses.dataclass(frozen=True)
class ColdStartConfig:
    """Supervised steps before GRPO on the model's own right samples, rewritten into the answer format."""

    enabled: bool = option(False, "make a cold start before GRPO")
    prompts: int = option(64, "training prompts that are sampled for it")
    rows: int = option(48, "right samples that are kept, at most")
    system_prompt: str = option("", "system message while sampling; empty: text.system_prompt")
    sft: SftConfig = option(
        SftConfig(steps=20, batch_size=8, max_length=96, lr=2e-5),
        "how the model learns them; with a `path`, that file is learned and nothing is sampled",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run."""

    steps: int = option(100, "GRPO steps (rollouts)")
    time_budget: str = option("", "stop cleanly after this long ('55m', '2h', '300s'); empty: never")
    halt_when_nonfinite: int = option(10, "stop after so many skipped updates in a row; 0: never")
    share_prefix: bool = option(True, "gradient passes compute a prompt once for its group")
    pack_prompts: int = option(
        0,
        "prompts that a gradient pass on one device takes at most; 0: as many as its full-length completions need, or "
        "four times that where prompts are not shared",
    )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation, before, during and after."""

    every: int = option(20, "steps between evaluations; 0: only before and after")
    problems: int = option(64, "held-out problems")
    samples: int = option(4, "completions a problem (k), at `temperature`")
    final_problems: int = option(256, "problems of the before and after tables")
    majority: int = option(16, "completions a problem for the base's majority vote; 0: none")
    temperature: float = option(1.0, "of the sampled completions; greedy ones are scored beside them")
    top_p: float = option(1.0, "of the sampled completions")
    alarm_drop: float = option(0.1, "warn when pass@1 falls this far below its best")
    reflective_words: tuple[str, ...] = option((), "words that are counted in held-out completions; empty: none")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Orbax checkpoints: asynchronous, atomic, complete."""

    every: int = option(50, "steps between checkpoints; 0: only at the end")
    keep: int = option(2, "newest checkpoints kept (the best one is kept beside them)")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run writes besides metrics.jsonl."""

    tensorboard: bool = option(True, "TensorBoard event files")
    wandb: str = option("off", "Weights & Biases", ("off", "offline", "online"))
    wandb_project: str = option("grpo_jax", "its project")
    samples_every: int = option(10, "steps between completions written to samples.jsonl; 0: never")
    samples: int = option(8, "completions written each time")
    compilation_cache: str = option("auto", "folder of compiled programs; auto: the user's cache folder; empty: off")
    watchdog_minutes: float = option(
        30.0, "minutes without progress after which the stacks of all threads go to stderr and watchdog.txt; 0: never"
    )


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train as one; they find each other by the command line, the environment or the cluster."""

    heartbeat_timeout: int = option(30, "seconds without a sign of life after which a process counts as lost")
    join_timeout: int = option(300, "seconds in which all processes have to come together at the start")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    seed: int = option(0, "everything random is a function of it")
    model: ModelConfig = option(ModelConfig(), "")
    lora: LoraConfig = option(LoraConfig(), "of `train`, `sft`, `dpo` and the cold start")
    base: BaseConfig = option(BaseConfig(), "")
    text: TextConfig = option(TextConfig(), "")
    data: DataConfig = option(DataConfig(), "")
    tasks: TasksConfig = option(TasksConfig(), "")
    sampler: SamplerConfig = option(SamplerConfig(), "")
    rewards: RewardsConfig = option(RewardsConfig(), "")
    objective: ObjectiveConfig = option(ObjectiveConfig(), "")
    ppo: PpoConfig = option(PpoConfig(), "")
    distill: DistillConfig = option(DistillConfig(), "")
    optim: OptimConfig = option(OptimConfig(), "")
    step: StepConfig = option(StepConfig(), "")
    mesh: MeshConfig = option(MeshConfig(), "")
    cold_start: ColdStartConfig = option(ColdStartConfig(), "")
    sft: SftConfig = option(SftConfig(), "of `grpo-jax sft`")
    dpo: DpoConfig = option(DpoConfig(), "of `grpo-jax dpo`")
    reward_model: RewardModelTrainingConfig = option(RewardModelTrainingConfig(), "of `grpo-jax reward-model train`")
    train: TrainConfig = option(TrainConfig(), "")
    eval: EvalConfig = option(EvalConfig(), "")
    checkpoint: CheckpointConfig = option(CheckpointConfig(), "")
    log: LogConfig = option(LogConfig(), "")
    distributed: DistributedConfig = option(DistributedConfig(), "")

    @property
    def completions(self) -> int:
        """B, the completions of one step."""
        return self.data.prompts_per_step * self.sampler.group_size

    @property
    def draws_per_step(self) -> int:
        """Prompts that a step is handed."""
        return self.data.pool_factor * self.data.prompts_per_step

    @property
    def late_step(self) -> int:
        """The step, counted from 0, with which late components and sets begin."""
        late = self.rewards.late_from
        return round(late * self.train.steps) if late < 1 else int(late)


def default_config() -> ml_collections.ConfigDict:
    """All fields at their defaults, as the ConfigDict that an experiment file edits."""
    return to_config_dict(Config())


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A config dataclass as a ConfigDict of the same shape; lists of sections become tuples of dicts."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(dict(to_config_dict(item)) if dataclasses.is_dataclass(item) else item for item in value)
        return to_config_dict(value) if dataclasses.is_dataclass(value) else value

    return ml_collections.ConfigDict({f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)})


def to_json(config: Config) -> str:
    """The config as indented JSON, keys in the order of declaration."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_dict(values: Any, source: str = "config") -> Config:
    """Checked frozen config from nested mappings; raises InputError naming source, field, value and fix."""
    config = _build(Config, values, source, "")
    validate(config, source)
    return config


def _build(cls: type, values: Any, source: str, prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        raise InputError(f"{source}: {prefix[:-1]}={values!r} must be a section of fields: {', '.join(fields)}")
    values = dict(values.items())
    for name in values:
        if name not in fields:
            raise unknown_field(source, prefix + name)
    hints = typing.get_type_hints(cls)
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            made[name] = _build(typing.cast(type, hints[name]), value, source, f"{prefix}{name}.")
        elif (item := section_of_list(hints[name])) is not None:
            if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
                raise InputError(f"{source}: {prefix}{name}={value!r} must be a list of sections")
            made[name] = tuple(_build(item, v, source, f"{prefix}{name}[{i}].") for i, v in enumerate(value))
        else:
            made[name] = _coerce(hints[name], value, f"{source}: {prefix}{name}={value!r}")
            choices = fields[name].metadata["choices"]
            if choices and made[name] not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(f"{source}: {prefix}{name}={value!r} is not one of {', '.join(choices)}{hint}")
    return cls(**made)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise InputError(f"{where} must be a list")
        return tuple(_coerce(typing.get_args(hint)[0], v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise InputError(f"{where} must be {hint.__name__}, not {type(value).__name__}")
    return value


def section_of_list(hint: Any) -> type | None:
    """The section that a field holds a list of; None for fields of other kinds."""
    item = (*typing.get_args(hint), None)[0]
    return typing.cast(type, item) if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(item) else None


def list_around(name: str) -> str:
    """The list of sections that a dotted name is, or lies in; '' for other names."""
    cls: Any = Config
    parts = name.split(".")
    for depth, part in enumerate(parts, start=1):
        hint = typing.get_type_hints(cls).get(part) if dataclasses.is_dataclass(cls) else None
        if section_of_list(hint):
            return ".".join(parts[:depth])
        cls = hint
    return ""


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of all fields, sections left out; of a list of sections, those of each."""
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        section = hint if dataclasses.is_dataclass(hint) else section_of_list(hint)
        names += field_names(typing.cast(type, section), f"{prefix}{name}.") if section else [prefix + name]
    return names


def value_of(config: Any, name: str) -> Any:
    """The value of a field by its dotted name; in a list of sections a tuple, one value each."""
    for part in name.split("."):
        config = tuple(getattr(c, part) for c in config) if isinstance(config, tuple) else getattr(config, part)
    return config


def config_markdown() -> str:
    """The page docs/config.md: every field with its default, its choices and what it does."""
    top = [f for f in dataclasses.fields(Config) if not dataclasses.is_dataclass(f.default)]
    lines = [
        "# Options",
        "",
        "Every field of an experiment, generated from `grpo_jax/config.py`. In a config file write",
        "`c.optim.lr = 1e-4`, on the command line `--config.optim.lr=1e-4`.",
        "",
        *_markdown_table(top),
    ]
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.default):
            lines += _markdown_section(section.name, section.default, section.metadata["doc"])
    return "\n".join(lines) + "\n"


def _markdown_section(name: str, section: Any, doc: str) -> list[str]:
    hints = typing.get_type_hints(type(section))
    lists = {f.name: item for f in dataclasses.fields(section) if (item := section_of_list(hints[f.name]))}
    nested = [f for f in dataclasses.fields(section) if dataclasses.is_dataclass(f.default)]
    plain = [f for f in dataclasses.fields(section) if f not in nested and f.name not in lists]
    about = [inspect.cleandoc(type(section).__doc__ or "")] + ([f"({doc})"] if doc else [])
    lines = ["", f"## {name}", "", " ".join(about), "", *_markdown_table(plain, section, f"{name}.")]
    for f in nested:
        lines += _markdown_section(f"{name}.{f.name}", getattr(section, f.name), f.metadata["doc"])
    for inside, item in lists.items():
        lines += _markdown_section(f"{name}.{inside}", item(), "")
    return lines


def _markdown_table(fields: list[dataclasses.Field], section: Any = None, prefix: str = "") -> list[str]:
    lines = ["| field | default | choices | meaning |", "| --- | --- | --- | --- |"]
    for f in fields:
        default = f.default if section is None else getattr(section, f.name)
        choices = ", ".join(f"`{choice}`" for choice in f.metadata["choices"])
        meaning = f.metadata["doc"].replace("|", "\\|")
        lines.append(f"| `{prefix}{f.name}` | `{default!r}` | {choices} | {meaning} |")
    return lines


# Names that users of TRL bring.
ELSEWHERE = {
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "max_grad_norm": "optim.clip_norm",
    "max_steps": "train.steps",
    "num_generations": "sampler.group_size",
    "max_completion_length": "sampler.max_new_tokens",
    "per_device_train_batch_size": "objective.micro_batch_size",
    "gradient_accumulation_steps": "objective.micro_batch_size",
    "reward_funcs": "rewards.names",
    "reward_weights": "rewards.weights",
    "mask_truncated_completions": "objective.mask_truncated",
    "ref_model_sync_steps": "objective.reference_every",
    "vllm_importance_sampling_mode": "objective.correction",
    "model_name_or_path": "model.path",
}


def unknown_field(source: str, name: str) -> InputError:
    """The error for a field that does not exist, naming the nearest that does."""
    names = field_names()
    sections = {n.rsplit(".", k)[0] for n in names for k in (1, 2) if n.count(".") >= k}
    if name in sections:
        inside = [n for n in names if n.startswith(f"{name}.")]
        return InputError(f"{source}: {name} is a section: set a field of it: {', '.join(inside)}")
    leaf = name.rsplit(".", 1)[-1]
    near = [ELSEWHERE[leaf]] if leaf in ELSEWHERE else []
    near = near or difflib.get_close_matches(name, [*names, *sections], n=1, cutoff=0.5)
    near = near or [n for n in names if n.rsplit(".", 1)[-1] == leaf]
    hint = f"; did you mean {near[0]}?" if near else ""
    return InputError(f"{source}: unknown field {name}{hint}")


def parse_duration(text: str, where: str = "train.time_budget") -> float:
    """Seconds from '300', '300s', '55m' or '2h'."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"{where}={text!r} is not a time such as 300s, 55m or 2h")
    return seconds


def validate(config: Config, source: str = "config") -> None:
    """Checks that need no file and no device; raises InputError."""
    c = config

    def require(ok: bool, field: str, fix: str) -> None:
        if not ok:
            raise InputError(f"{source}: {field}={value_of(c, field)!r} {fix}")

    positive = (
        "data.max_prompt_length data.prompts_per_step sampler.max_new_tokens base.layers base.width base.heads "
        "base.kv_heads base.mlp_width objective.num_iterations objective.minibatches train.steps eval.problems "
        "eval.samples eval.final_problems checkpoint.keep data.digits tasks.prompts tasks.held_out "
        "tasks.chats tasks.pairs tasks.points base.sft.steps base.sft.batch_size "
        "cold_start.sft.steps cold_start.sft.batch_size sft.steps sft.batch_size rewards.timeout base.vocabulary "
        "base.worked_sums base.rope_theta base.sft.max_length cold_start.prompts cold_start.rows "
        "cold_start.sft.max_length sft.max_length optim.eps objective.cispo_max_ratio objective.sapo_temperature_pos "
        "objective.sapo_temperature_neg objective.outer_iterations sampler.group_size data.pool_factor "
        "dpo.steps dpo.batch_size dpo.max_length dpo.beta "
        "rewards.repetition_ngram rewards.math_timeout "
        "rewards.judge.max_tokens rewards.judge.timeout rewards.judge.concurrency "
        "distributed.heartbeat_timeout distributed.join_timeout"
    ).split()
    for name in positive:
        require(value_of(c, name) > 0, name, "must be positive")
    not_negative = (
        "objective.micro_batch_size train.pack_prompts objective.reference_every objective.beta optim.lr "
        "optim.clip_norm "
        "optim.warmup_steps optim.weight_decay sampler.top_k sampler.slots eval.every eval.majority checkpoint.every "
        "log.samples_every log.samples model.logits_chunk objective.advantage_epsilon sampler.temperature "
        "eval.temperature optim.final_lr_fraction base.sft.lr cold_start.sft.lr sft.lr train.halt_when_nonfinite "
        "base.sft.epochs cold_start.sft.epochs sft.epochs "
        "eval.alarm_drop objective.epsilon objective.epsilon_high objective.delta objective.entropy_coef "
        "objective.correction_max objective.correction_min objective.vespo_k_pos "
        "objective.vespo_k_neg objective.vespo_lambda_pos objective.vespo_lambda_neg ppo.vf_coef ppo.cliprange_value "
        "dpo.lr optim.routing_bias_rate rewards.workers rewards.length_budget "
        "rewards.overlong_cache rewards.judge.retries rewards.judge.requests_per_second log.watchdog_minutes "
        "mesh.cpu_devices model.unroll sampler.cache_pieces"
    ).split()
    for name in not_negative:
        require(value_of(c, name) >= 0, name, "must not be negative")
    _validate_objective(c, require)
    require(c.sampler.temperature > 0, "sampler.temperature", "must be above 0: greedy groups are all equal")
    require(0 < c.sampler.top_p <= 1, "sampler.top_p", "must be above 0 and at most 1")
    require(0 <= c.sampler.min_p <= 1, "sampler.min_p", "must be from 0 to 1")
    require(
        0 <= c.sampler.min_new_tokens <= c.sampler.max_new_tokens,
        "sampler.min_new_tokens",
        "must be from 0 to sampler.max_new_tokens",
    )
    require(
        c.sampler.cache_pieces < 2 or c.sampler.slots == 0,
        "sampler.cache_pieces",
        f"needs sampler.slots=0, not {c.sampler.slots}: slots decode in a cache that is a ring",
    )
    require(0 < c.eval.top_p <= 1, "eval.top_p", "must be above 0 and at most 1")
    for name in ("base.right_share", "tasks.good_share", "ppo.gamma", "ppo.lam"):
        require(0 <= value_of(c, name) <= 1, name, "must lie between 0 and 1")
    require(0 <= c.dpo.label_smoothing < 0.5, "dpo.label_smoothing", "must be at least 0 and below 0.5")
    for name in ("optim.b1", "optim.b2"):
        require(0 <= value_of(c, name) < 1, name, "must be at least 0 and below 1")
    for name in ("helpful", "harmless"):
        section, rows = getattr(c.rewards, name), c.completions
        used = name in c.rewards.names
        require(not used or bool(section.path), f"rewards.{name}.path", f"is empty, and rewards.names has {name!r}")
        require(bool(section.marker), f"rewards.{name}.marker", "is empty: name what ends the thought")
        fits = section.micro_batch_size == 0 or section.micro_batch_size > 0 == rows % section.micro_batch_size
        require(fits, f"rewards.{name}.micro_batch_size", f"must be 0 or divide the {rows} completions")
    named = "model_judge" in c.rewards.names
    require(
        not named or bool(c.rewards.model_judge.path),
        "rewards.model_judge.path",
        "is empty, and rewards.names has 'model_judge'",
    )
    for name in (
        "rewards.model_judge.max_new_tokens",
        "reward_model.steps",
        "reward_model.batch_size",
        "reward_model.max_length",
    ):
        require(value_of(c, name) > 0, name, "must be positive")
    require(c.reward_model.lr >= 0, "reward_model.lr", "must not be negative")
    for name in ("rewards.code.seconds", "rewards.code.output_kb"):
        require(value_of(c, name) > 0, name, "must be positive")
    for name in ("rewards.code.files_mb", "rewards.code.parallel"):
        require(value_of(c, name) >= 0, name, "must not be negative")
    require(c.rewards.code.memory_mb >= 64, "rewards.code.memory_mb", "must be at least 64: the interpreter takes it")
    require(2 <= c.rewards.code.threads <= 1000, "rewards.code.threads", "must lie between 2 and 1000")
    require(len(c.rewards.names) > 0, "rewards.names", "is empty: name at least one reward")
    require(
        len(c.rewards.weights) == len(c.rewards.names),
        "rewards.weights",
        f"must hold one weight for each of rewards.names={c.rewards.names!r}",
    )
    require(len(set(c.rewards.names)) == len(c.rewards.names), "rewards.names", "names a reward twice")
    for name in ("rewards.cosine_right", "rewards.cosine_wrong"):
        require(len(value_of(c, name)) == 2, name, "must hold two numbers: without tokens, at the budget")
    budget = c.rewards.length_budget or c.sampler.max_new_tokens
    require(c.rewards.overlong_cache <= budget, "rewards.overlong_cache", f"must not exceed the budget, {budget}")
    for name in ("url", "model"):
        require(
            "judge" not in c.rewards.names or bool(value_of(c.rewards.judge, name)),
            f"rewards.judge.{name}",
            "is empty, and the reward 'judge' needs it",
        )
    require(not c.base.sft.path, "base.sft.path", "must stay empty: the base learns from base.worked_sums")
    require(c.base.width % c.base.heads == 0, "base.width", f"must divide by base.heads={c.base.heads}")
    require(
        (c.base.width // c.base.heads) % 2 == 0, "base.width", f"over base.heads={c.base.heads} must be even (rotary)"
    )
    require(c.base.heads % c.base.kv_heads == 0, "base.heads", f"must divide by base.kv_heads={c.base.kv_heads}")
    require(c.lora.rank >= 0, "lora.rank", "must not be negative")
    require(c.lora.alpha > 0, "lora.alpha", "must be positive")
    try:
        re.compile(c.lora.targets)
    except re.error as error:
        require(False, "lora.targets", f"is no regular expression ({error})")
    if c.train.time_budget:
        parse_duration(c.train.time_budget, f"{source}: train.time_budget")
    sizes = {axis: getattr(c.mesh, axis) for axis in ("data", "fsdp", "tensor", "expert", "sequence")}
    require(list(sizes.values()).count(-1) <= 1, "mesh.data", "and another axis are both -1: at most one may be")
    for axis, size in sizes.items():
        require(size == -1 or size >= 1, f"mesh.{axis}", "must be -1 or at least 1")
        default = getattr(MeshConfig(), axis)
        require(not c.mesh.auto or size == default, f"mesh.{axis}", f"is picked by mesh.auto=True: leave it {default}")
    require(
        c.data.source in ("arithmetic", "memory") or bool(c.data.sets) or bool(c.data.path),
        "data.path",
        f"is empty: data.source={c.data.source!r} needs the file, folder or name to read",
    )
    _validate_sets(c, require, source)
    _validate_distill(c, require)


def _validate_sets(c: Config, require: Callable[[bool, str, str], None], source: str) -> None:
    """Prompt sets and what begins late."""
    known, late = c.rewards.names, c.rewards.late_names
    for name in late:
        require(name in known[1:], "rewards.late_names", f"must be of those after the first of rewards.names={known!r}")
    begins = bool(late) or any(each.late for each in c.data.sets)
    fits = 0 < c.late_step < c.train.steps and (c.rewards.late_from < 1 or c.rewards.late_from % 1 == 0)
    require(
        fits if begins else c.rewards.late_from == 0,
        "rewards.late_from",
        f"must be a number of steps below train.steps={c.train.steps}, or a share of them"
        if begins
        else "has no effect: nothing is in rewards.late_names, and no prompt set is late",
    )
    if not c.data.sets:
        return
    require(not c.data.path, "data.path", "is not read: each of data.sets names its own")
    require(bool(c.model.path), "model.path", "is empty, and data.sets are no sums to make a base from: name a model")
    require(
        not c.cold_start.enabled, "cold_start.enabled", "samples one dataset: make the cold start without data.sets"
    )
    for number, each in enumerate(c.data.sets):
        _validate_set(each, f"{source}: data.sets[{number}]", known)
    names = [each.name for each in c.data.sets]
    require(len(set(names)) == len(names), "data.sets.name", "names two sets alike")
    require(not all(each.late for each in c.data.sets), "data.sets.late", "leaves nothing to draw at the start")
    graded = [each for each in c.data.sets if known[0] in (each.rewards or known) and not each.late]
    require(
        bool(graded), "data.sets.rewards", f"has {known[0]!r}, which says what is right, in no set drawn from the start"
    )


def _validate_distill(c: Config, require: Callable[[bool, str, str], None]) -> None:
    """A teacher in the step."""
    d, plain = c.distill, DistillConfig()
    require(0 < d.weight <= 1, "distill.weight", "must be above 0 and at most 1 (1: the teacher alone)")
    if not d.teacher:
        for name in ("distill.loss", "distill.weight"):
            default = getattr(plain, name.removeprefix("distill."))
            require(value_of(c, name) == default, name, "has no effect without distill.teacher: name a model there")
        return
    require(
        c.objective.baseline != "value",
        "distill.teacher",
        "does not go with objective.baseline='value': rewards by token and a teacher by token are not mixed",
    )
    require(
        d.weight < 1 or c.data.pool_factor == 1,
        "data.pool_factor",
        "selects groups by their rewards, of which none counts at distill.weight=1: set it to 1",
    )


def _validate_set(each: PromptSetConfig, where: str, known: tuple[str, ...]) -> None:
    """One prompt set by itself."""

    def require(ok: bool, name: str, fix: str) -> None:
        if not ok:
            raise InputError(f"{where}.{name}={getattr(each, name)!r} {fix}")

    require(bool(re.fullmatch(r"[\w-]+", each.name)), "name", "must be a word of letters, digits, _ and -")
    require(0 < each.weight < float("inf"), "weight", "must be positive")
    for name in each.rewards:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        require(name in known, "rewards", f"has {name!r}, which is not in rewards.names={known!r}{hint}")
    require(len(set(each.rewards)) == len(each.rewards), "rewards", "names a reward twice")
    require(
        len(each.reward_weights) in (0, len(each.rewards or known)),
        "reward_weights",
        f"must hold one weight for each of {each.rewards or known!r}",
    )
    require(
        each.source in ("arithmetic", "tasks") or bool(each.path), "path", f"is empty: source={each.source!r} needs it"
    )


def _validate_objective(c: Config, require: Callable[[bool, str, str], None]) -> None:
    """What the fields of the objective ask of each other."""
    o = c.objective
    _validate_loss(o, require)
    lone = o.baseline in ("batch", "none")
    require(
        c.data.pool_factor == 1 or o.baseline != "value",
        "data.pool_factor",
        "selects groups by their advantages, which objective.baseline='value' does not have: set it to 1",
    )
    require(
        not c.ppo.kl_in_reward or (o.baseline == "value" and o.beta > 0),
        "ppo.kl_in_reward",
        "needs objective.baseline='value' and objective.beta above 0",
    )
    require(
        c.ppo.critic == "head" or c.lora.rank == 0,
        "ppo.critic",
        f"trains a decoder of its own, and lora.rank={c.lora.rank} freezes decoders: take head",
    )
    taught = bool(c.distill.teacher) and c.distill.weight == 1
    require(
        lone or taught or o.baseline == "value" or c.sampler.group_size >= 2,
        "sampler.group_size",
        "must be at least 2: a group of 1 has no advantage (objective.baseline=batch or none compares otherwise)",
    )
    require(
        not lone or o.scale_rewards != "group",
        "objective.scale_rewards",
        f"needs the group's mean as objective.baseline, not {o.baseline!r}: take batch or none",
    )
    for name in ("objective.reference_every", "objective.outer_iterations"):
        off = value_of(Config(), name)
        require(
            value_of(c, name) == off or o.beta > 0,
            name,
            f"has no effect at objective.beta=0: set beta above 0 or leave it {off}",
        )
    require(
        o.outer_iterations == 1 or (o.reference_every == 0 and c.train.steps % o.outer_iterations == 0),
        "objective.outer_iterations",
        f"must divide train.steps={c.train.steps}, with objective.reference_every=0",
    )
    what = "prompts" if c.train.share_prefix else "completions"
    count = c.data.prompts_per_step if c.train.share_prefix else c.completions
    require(
        count % o.minibatches == 0,
        "objective.minibatches",
        f"must divide the {count} {what} of a step"
        + (", or set train.share_prefix=False: minibatches are then made of completions" * c.train.share_prefix),
    )


def _validate_loss(o: ObjectiveConfig, require: Callable[[bool, str, str], None]) -> None:
    """Which ratio, bound and selection of tokens each loss can use."""
    level = {"luspo": "sequence", "vespo": "token", "gmpo": "token"}.get(o.loss_type, o.importance_sampling_level)
    require(
        o.importance_sampling_level == level,
        "objective.importance_sampling_level",
        f"does not go with objective.loss_type={o.loss_type!r}: take {level}",
    )
    clipped = o.loss_type in ("grpo", "bnpo", "dapo", "dr_grpo", "luspo")
    require(
        o.delta == 0 or (clipped and o.delta >= 1 + o.epsilon_high),
        "objective.delta",
        f"must be at least 1 + objective.epsilon_high={1 + o.epsilon_high:g}"
        if clipped
        else f"has no effect with objective.loss_type={o.loss_type!r}: leave it 0",
    )
    require(0 < o.top_entropy_quantile <= 1, "objective.top_entropy_quantile", "must be above 0 and at most 1 (1: all)")
    by_token = o.importance_sampling_level != "sequence" and o.loss_type != "gmpo"
    require(
        o.top_entropy_quantile == 1 or by_token,
        "objective.top_entropy_quantile",
        "selects tokens, and this objective has one ratio for the whole sequence: leave it 1",
    )
    require(
        o.correction_max == 0 or o.correction_max >= o.correction_min,
        "objective.correction_max",
        f"is below objective.correction_min={o.correction_min!r}",
    )
    require(
        o.loss_type != "vespo" or not o.correction.startswith("sequence"),
        "objective.correction",
        "does not go with objective.loss_type='vespo', which multiplies over the sequence itself: take token_truncate",
    )


def config_file(name: str) -> pathlib.Path:
    """The file of an experiment: a path, or the name of a config that the package carries."""
    path = pathlib.Path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    for folder in config_folders():
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    known = sorted({p.relative_to(f).with_suffix("").as_posix() for f in config_folders() for p in f.glob("**/*.py")})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"--config {name}: no such file and no config of that name (known: {', '.join(known)}){hint}")


def config_folders() -> list[pathlib.Path]:
    """Where named configs live: inside the installed package, or beside it in a checkout."""
    package = pathlib.Path(__file__).parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def read_config_file(path: pathlib.Path) -> ml_collections.ConfigDict:
    """What the `get_config()` of an experiment file returns; raises InputError naming the file and what went wrong."""
    try:
        made = load_config_module(path).get_config()
    except InputError:
        raise
    except Exception as error:  # whatever a user's file raises
        raise InputError(f"{path}: raised {type(error).__name__}: {error}: mend the file") from error
    if not isinstance(made, ml_collections.ConfigDict):
        raise InputError(f"{path}: get_config() returned {type(made).__name__}: return an ml_collections.ConfigDict")
    return made


def load_config_module(path: pathlib.Path) -> types.ModuleType:
    """Runs an experiment file and returns its module."""
    spec = importlib.util.spec_from_file_location(f"grpo_jax_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"{path}: has no get_config(); it must return an ml_collections.ConfigDict")
    return module


def cache_folder() -> pathlib.Path:
    """Where this package keeps what it has fetched or compiled: $XDG_CACHE_HOME/grpo_jax."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(root) / "grpo_jax"
