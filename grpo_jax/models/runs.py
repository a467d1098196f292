"""A run's checkpoints as models: the base that the run started from, with what it has trained.

Takes the folder of a run (its newest checkpoint), its `checkpoints` folder, or one checkpoint in it.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.config import LoraConfig
from grpo_jax.errors import InputError
from grpo_jax.models.lora import ADAPTERS, SCALES, adapter_scales, fingerprint, freeze, merge
from grpo_jax.models.weights import put

TRAINABLE = "trainable/"
POLICY = ("params/", f"{TRAINABLE}params/", f"{TRAINABLE}{ADAPTERS}/")


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run: its folder, the path of the model that the run started from, the run's config."""

    folder: pathlib.Path
    base: str
    config: dict[str, Any]


def find_checkpoint(path: str) -> RunCheckpoint | None:
    """The checkpoint that a path names, None where it is none; raises InputError for a run that has saved nothing."""
    given = pathlib.Path(path)
    checkpoints = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    step = given if (given / "state").is_dir() and (given / "meta").is_dir() else None
    checkpoints = step.parent if step else checkpoints
    if checkpoints.name != "checkpoints" or not (checkpoints.parent / "config.json").is_file():
        return None
    steps = sorted((p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    if not steps:
        raise InputError(f"{checkpoints}: holds no checkpoint yet: let the run save one")
    workdir = checkpoints.parent
    config = json.loads((workdir / "config.json").read_text("utf-8"))
    made = [workdir / "cold_start" / "model", workdir / "base" / "model"]
    base = next((str(folder) for folder in made if folder.is_dir()), config["model"]["path"])
    return RunCheckpoint(step or steps[-1], base, config)


def trained_params(checkpoint: RunCheckpoint, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(float32 parameters, collections of adapters or None) of a checkpoint; `params` are those of its base.

    With adapters the parameters are the base as it was frozen, rounding included: both together are the policy.
    """
    meta = _meta(checkpoint.folder)
    # DPO's states hold `params` alone; PPO's value model is not read.
    names = {name: entry for name, entry in meta["layout"].items() if name.startswith(POLICY)}
    trainable: dict[str, Any] = {}
    for name, array in _arrays(checkpoint.folder, names).items():
        put(trainable, name.removeprefix(TRAINABLE), np.asarray(array, np.float32))
    if ADAPTERS not in trainable:
        return trainable["params"], None
    if meta["extra"]["base"] != fingerprint(params):
        raise InputError(
            f"{checkpoint.folder}: its adapters were trained on other weights than {checkpoint.base} holds: bring them "
            "back"
        )
    lora = LoraConfig(**checkpoint.config["lora"])
    scales = adapter_scales(trainable[ADAPTERS], lora.alpha / lora.rank)
    base = merge(freeze(params, lora.base_dtype), {ADAPTERS: {}, SCALES: {}})
    return base, {ADAPTERS: trainable[ADAPTERS], SCALES: scales}


def _meta(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "meta" / "metadata").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: is no whole checkpoint ({error}): name another step") from None


def _arrays(folder: pathlib.Path, names: dict[str, Any]) -> dict[str, np.ndarray]:
    """The named arrays of a checkpoint on the host; the others stay on disk."""
    wanted = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)) for name, (dtype, shape) in names.items()}
    how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        try:
            return reader.restore(
                folder.absolute() / "state",
                args=ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True),
            )
        except Exception as error:  # whatever a file of garbage makes the readers raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise InputError(f"{folder}: cannot be read ({reason}): name another step") from None
