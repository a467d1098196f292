"""The cold start: a few of the model's own right samples, rewritten into the answer format, learned.

The file of samples (JSONL of chats) is made to be read and edited by a person; it is written once and
then used as it is.
"""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax import processes
from grpo_jax.config import Config, RewardsConfig
from grpo_jax.data.prompts import build_prompt_set
from grpo_jax.errors import InputError
from grpo_jax.metrics import write_atomic
from grpo_jax.models.build import build_decoder
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.loading import LoadedModel
from grpo_jax.optimizer import make_optimizer, make_schedule
from grpo_jax.parallel import whole
from grpo_jax.recipes.evaluate import Evaluator
from grpo_jax.recipes.loop import Stop
from grpo_jax.recipes.sft import fit, read_chats
from grpo_jax.recipes.supervised import about_base, put_variables, save_adapters, save_model
from grpo_jax.rewards.scorer import build_scorer
from grpo_jax.step import StepParts
from grpo_jax.terminal import Terminal
from grpo_jax.text import encode_prompt


def make_cold_start(
    config: Config,
    model: LoadedModel,
    rows: dict[str, list[dict]],
    mesh: Mesh,
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
) -> str:
    """The folder of the model after its cold start, made now or by an earlier start of the same run.

    With `lora.rank` it holds adapters, which GRPO goes on with: a merged base in bfloat16 would round them away.
    """
    folder = workdir / "cold_start"
    finished = folder / "model"
    if processes.on_first(finished.is_dir):
        return str(finished)
    processes.on_first(lambda: folder.mkdir(exist_ok=True))
    sft = config.cold_start.sft
    chats = pathlib.Path(sft.path or folder / "samples.jsonl")
    if not sft.path and not processes.on_first(chats.exists):
        terminal.say("cold start: sampling the model for right answers")
        write_samples(config, model, rows["train"], mesh, chats, stop, terminal)
    examples = read_chats(str(chats), config.text, model.tokenizer, sft.max_length)
    module = build_decoder(config, model.architecture, mesh)
    collections = put_variables(config, model, mesh)
    given = (collections, examples, mesh, folder / "sft", stop, terminal, "cold start", about_base(config, model))
    trained = fit(config, sft, module, *given, save_last=False)  # the model below is what is kept
    variables = whole({**collections[1], **trained})
    if config.lora.rank:
        return save_adapters(finished, config, model, variables)
    return save_model(finished, model, variables["params"])


def write_samples(
    config: Config,
    model: LoadedModel,
    rows: list[dict],
    mesh: Mesh,
    path: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
) -> None:
    """Right samples (their last number is the answer) of the model, one a prompt, as chats in the answer format."""
    cold = config.cold_start
    text = dataclasses.replace(config.text, system_prompt=cold.system_prompt or config.text.system_prompt)
    rewards = RewardsConfig(names=("number",), weights=(1.0,))
    tokenizer = model.tokenizer
    token_bytes = tokenizer.token_bytes() + [b""] * (model.architecture.vocabulary - tokenizer.vocabulary)
    chosen = rows[: cold.prompts]
    scorer = build_scorer(rewards, token_bytes, chosen, tokenizer.decode, mesh)
    prompts = build_prompt_set(
        chosen,
        lambda prompt: encode_prompt(prompt, text, tokenizer),
        config.data.max_prompt_length,
        lambda given: scorer.columns(np.arange(len(given))),
    )
    module = Decoder(
        model.architecture,
        dtype=jnp.dtype(config.model.compute_dtype),
        mesh=mesh,
        sampling=config.mesh.sampling,
    )
    parts = StepParts(
        config, module, make_optimizer(config.optim, 1), make_schedule(config.optim, 1), scorer, mesh, tokenizer.end_ids
    )
    trainable, frozen = put_variables(config, model, mesh)
    evaluator = Evaluator(parts, prompts, scorer, tokenizer)
    group, what = config.sampler.group_size, "while sampling for the cold start"
    records = evaluator.sample({**frozen, **trainable}, len(chosen), group, 1.0, 1.0, 0, lambda: stop.check(what))
    right = [r for r in records if r["right"] and r["ended"]]
    kept: dict[int, dict] = {}
    for record in sorted(right, key=lambda r: r["length"]):
        kept.setdefault(record["problem"], record)
    lines = [chat(record) for record in list(kept.values())[: cold.rows]]
    if not lines:
        raise InputError(
            f"config: cold_start.prompts={cold.prompts}: none of {len(records)} samples was right: raise it, or start "
            "from a stronger model"
        )
    terminal.say(f"cold start: {len(right)} of {len(records)} samples right, {len(lines)} prompts kept in {path}")
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    processes.on_first(lambda: write_atomic(path, content))


def chat(record: dict) -> dict:
    """A right sample as a chat row: what the model said, then its answer in the format to learn."""
    prompt, said = record["prompt"], record["completion"].strip()
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    learned = {"role": "assistant", "content": f"{said}\n<answer>{record['answer']}</answer>"}
    return {"messages": [*asked, learned]}
