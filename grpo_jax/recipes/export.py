"""Export: a Hugging Face folder of a model, or of what a run has trained."""

import dataclasses
import pathlib
import shutil
from typing import Any

from grpo_jax.checkpoint import Checkpoints
from grpo_jax.config import Config, from_dict
from grpo_jax.errors import InputError
from grpo_jax.models.families import read_json
from grpo_jax.models.huggingface import MOST_SHARD, write_folder
from grpo_jax.models.loading import LoadedModel, load_model
from grpo_jax.models.weights import put
from grpo_jax.recipes.base import DONE


def export(source: str, folder: str, dtype: str = "", best: bool = False, most_shard: int = MOST_SHARD) -> str:
    """Writes `folder`, which is there whole or not at all, and returns a line that says what is in it.

    `source` is the folder of a run, whose newest (or best) checkpoint is taken, or a model as `model.path` names it.
    Raises InputError where `folder` holds something already, or `source` is neither.
    """
    path = pathlib.Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{folder}: is there already: name a new folder")
    run = pathlib.Path(source)
    if (run / "checkpoints").is_dir():
        model, what = trained_model(run, best)
    elif best:
        raise InputError(f"{source}: is no folder of a run, which alone has a best checkpoint: leave --best out")
    else:
        model, what = load_model(source), source
    making = path.with_name(f"{path.name}.making")
    shutil.rmtree(making, ignore_errors=True)  # a kill may have left half of one
    making.parent.mkdir(parents=True, exist_ok=True)
    write_folder(str(making), model.architecture, model.params, model.tokenizer, dtype, most_shard)
    if path.exists():
        path.rmdir()
    making.rename(path)
    return f"{folder}: {model.architecture.family}, {what}"


def trained_model(run: pathlib.Path, best: bool = False) -> tuple[LoadedModel, str]:
    """The model of a run with the parameters of its newest (or best) checkpoint, and where they come from."""
    config = from_dict(read_json(str(run / "config.json")), str(run / "config.json"))
    model = load_model(starting_path(run, config))
    with Checkpoints(run / "checkpoints", config.checkpoint.keep) as checkpoints:
        found = checkpoints.read_trained(best)
    if found is None:
        kind = "with a held-out score " if best else ""
        raise InputError(f"{run}: has no sound checkpoint {kind}yet: train on")
    arrays, step = found
    if not all(name.startswith("params/") for name in arrays):
        raise InputError(f"{run}: trained adapters, not whole weights: export them as adapters")
    params: dict[str, Any] = {}
    for name, array in arrays.items():
        put(params, name.removeprefix("params/"), array)
    tokenizer = model.tokenizer.with_end_tokens(config.text.end_tokens)
    return dataclasses.replace(model, params=params, tokenizer=tokenizer), f"step {step} of {run}"


def starting_path(run: pathlib.Path, config: Config) -> str:
    """The model that a run started from: what it made last before its first step, or model.path."""
    for made in (run / "cold_start" / "model", run / "base" / DONE):
        if made.is_dir():
            return str(made)
    if not config.model.path:
        raise InputError(f"{run}: its base model is not there: train on")
    return config.model.path
