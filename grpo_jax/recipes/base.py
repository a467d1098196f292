"""The embedded base model: a tokenizer and a small decoder learned in the run from worked sums, or worked tasks."""

import pathlib
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from grpo_jax import processes
from grpo_jax.config import Config
from grpo_jax.data import tasks
from grpo_jax.data.arithmetic import assert_disjoint, worked_sums
from grpo_jax.data.prompts import build_prompt_set
from grpo_jax.data.sources import load_rows
from grpo_jax.errors import InputError
from grpo_jax.models.abstract import base_sizes
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.build import layers_in_a_row
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.models.loading import LoadedModel
from grpo_jax.parallel import make_mesh, whole
from grpo_jax.recipes.loop import Stop, open_stop, open_terminal, open_workdir
from grpo_jax.recipes.sft import Example, fine_tune
from grpo_jax.recipes.supervised import save_model
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, encode_prompt, train_sentencepiece

SYMBOLS = ("<think>", "</think>", "<answer>", "</answer>")
DONE = "model"  # the folder that is there only when the base is finished


def run(config: Config, workdir: pathlib.Path, terminal: Terminal | None = None) -> str:
    """`grpo-jax base`: makes the base of a config that names no model; returns its folder, `workdir/model`.

    Raises InputError for bad input and Stopped when it was asked to end before its time.
    """
    terminal = terminal or open_terminal()
    if config.model.path:
        raise InputError(f"config: model.path={config.model.path!r}: a base is made where it is empty")
    mesh = make_mesh(config.mesh)
    held_out = load_rows(config.data, "eval", config.seed)
    open_workdir(workdir, config)
    with open_stop(config, workdir) as stop, terminal:
        return make_base(config, held_out, mesh, workdir, stop, terminal)


def make_base(
    config: Config, held_out: list[dict], mesh: Mesh, workdir: pathlib.Path, stop: Stop, terminal: Terminal
) -> str:
    """The folder of the base model, made now or by an earlier start of the same run.

    Every part is a function of the config; what is finished is not made again.
    """
    if config.data.source not in WORKED:
        raise InputError(
            f"config: model.path='' makes a base for {' or '.join(WORKED)}, not data.source={config.data.source!r}: "
            "name a model"
        )
    finished = workdir / DONE
    if processes.on_first(finished.is_dir):
        return str(finished)
    pairs = WORKED[config.data.source](config, held_out)
    tokenizer_path = workdir / "tokenizer.model"

    def make_tokenizer() -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        if not tokenizer_path.exists():
            terminal.say(f"training a SentencePiece tokenizer on worked {TEXTS[config.data.source]}")
            train_sentencepiece((p + c for p, c in pairs), config.base.vocabulary, SYMBOLS, str(tokenizer_path))

    processes.on_first(make_tokenizer)
    tokenizer = Tokenizer.from_sentencepiece(str(tokenizer_path))
    architecture = base_architecture(config, tokenizer)
    build_prompt_set(  # raises where held-out prompts break their budget: before anything is compiled
        held_out,
        lambda prompt: encode_prompt(prompt, config.text, tokenizer),
        config.data.max_prompt_length,
        lambda _: {},
    )
    module = Decoder(architecture, unroll=layers_in_a_row(config.model, architecture))
    params = jax.jit(lambda key: init_params(module, key))(jax.random.key(config.seed))
    examples = [_example(tokenizer, prompt, completion) for prompt, completion in pairs]
    longest = max(len(ids) for ids, _ in examples)
    if longest > config.base.sft.max_length:
        raise InputError(
            f"config: base.sft.max_length={config.base.sft.max_length} is below {longest}, the longest row"
        )
    params = fine_tune(config, config.base.sft, module, params, examples, mesh, workdir / "sft", stop, terminal, "base")
    made = LoadedModel(architecture, {}, tokenizer, str(finished))
    return save_model(finished, made, whole(params))


def _worked_sums(config: Config, held_out: list[dict]) -> list[tuple[str, str]]:
    pairs = worked_sums(config.seed, config.base.worked_sums, config.data.digits, config.base.right_share)
    assert_disjoint(pairs, held_out)
    return pairs


def _worked_tasks(config: Config, held_out: list[dict]) -> list[tuple[str, str]]:
    given = config.base
    pairs = tasks.worked_texts(config.seed, given.worked_sums, config.data.path, config.data.digits, given.right_share)
    tasks.assert_disjoint(pairs, held_out)
    return pairs


# What a base learns from, by data.source: pairs (prompt, completion), checked to leave the held-out rows out.
WORKED: dict[str, Callable[[Config, list[dict]], list[tuple[str, str]]]] = {
    "arithmetic": _worked_sums,
    "tasks": _worked_tasks,
}
TEXTS = {"arithmetic": "sums", "tasks": "tasks"}


def base_architecture(config: Config, tokenizer: Tokenizer) -> Architecture:
    """Sizes of the base; the vocabulary is what the tokenizer came out with."""
    return base_sizes(config.base, tokenizer.vocabulary)


def _example(tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
    before = tokenizer.encode(prompt, special=False)
    learned = [*tokenizer.encode(completion, special=False), tokenizer.end_ids[0]]
    return before + learned, [0] * len(before) + [1] * len(learned)
