"""Checkpoints: what a run needs to go on, written beside the training and checked before it is trusted.

Orbax writes `<folder>/<step>/` asynchronously and commits it by a rename. Each step holds two items: `state`, the
arrays under the names of their paths in the pytree, and `meta`, JSON with the caller's `extra`, the score and the
arrays' types and shapes. Beside them lies `manifest.json`, size and SHA-256 of every file of the two, part of the
same commit.
"""

import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax import processes
from grpo_jax.errors import InputError
from grpo_jax.metrics import write_json_atomic

MANIFEST = "manifest.json"
ITEMS = ("state", "meta")
DAMAGED = "damaged"


class Checkpoints:
    """The checkpoints of one run: the `keep` newest, and the one with the highest score beside them."""

    def __init__(self, folder: str | os.PathLike[str], keep: int, warn: Callable[[str], None] | None = None) -> None:
        self.folder = pathlib.Path(folder).absolute()
        self._warn = warn or _to_stderr
        self._saving: int | None = None
        self._retention = _NewestAndBest(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention,
            cleanup_tmp_directories=True,  # what a killed save left behind
            lightweight_initialize=True,  # opening must not stumble over a damaged step
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        scores = processes.on_first(lambda: {str(step): _score(self.folder / str(step)) for step in self.steps()})
        self._retention.scores.update({int(step): score for step, score in scores.items()})

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any], score: float | None = None, force: bool = False
    ) -> bool:
        """Starts a save and returns when `state` may be donated; waits for the save before it.

        A step that is already saved is left as it is (False), or replaced when `force`. A score of NaN counts as none.
        """
        self._manager.wait_until_finished()
        if step in self.steps():
            if not force:
                return False
            self._manager.delete(step)
        arrays = _named_leaves(state)
        meta = {"extra": dict(extra), "score": None if score is None or score != score else float(score)}
        meta["layout"] = _layout(arrays)
        self._saving = step
        self._retention.scores[step] = meta["score"]
        # Orbax refuses arrays without elements; the layout alone brings them back. When save returns it holds host
        # copies, on CPU views, for whose sake jax leaves a donated buffer alone.
        content = {name: array for name, array in arrays.items() if array.size}
        items = ocp.args.Composite(state=ocp.args.StandardSave(content), meta=ocp.args.JsonSave(meta))
        return self._manager.save(step, args=items, force=True)

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any], int] | None:
        """(state, extra, step) of the newest sound checkpoint, None when there is none at all.

        `abstract_state` has the state's structure, with ShapeDtypeStructs (or arrays) whose shardings the restored
        arrays get. Damaged checkpoints are named in a warning and moved to `<folder>/damaged`. Raises InputError when
        all are damaged, or when the checkpoint holds other arrays than `abstract_state`.
        """
        return self._first_sound(abstract_state, sorted(self.steps(), reverse=True))

    def restore_best(self, abstract_state: Any) -> tuple[Any, dict[str, Any], int] | None:
        """As `restore`, the sound checkpoint with the highest score (the newest of equals); None when none has one."""
        scores = {step: score for step in self.steps() if (score := self._retention.scores.get(step)) is not None}
        return self._first_sound(abstract_state, sorted(scores, key=lambda step: (scores[step], step), reverse=True))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, the one being saved included, in rising order."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when the last save is committed; raises what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _first_sound(self, abstract_state: Any, order: Sequence[int]) -> tuple[Any, dict[str, Any], int] | None:
        self.wait()
        damage: dict[int, str] = {}
        for step in order:
            found = self._try(step, abstract_state)
            if isinstance(found, str):
                damage[step] = found
                continue
            self._set_aside(damage, step)
            return *found, step
        if damage:
            found = "; ".join(f"{step}: {reason}" for step, reason in damage.items())
            raise InputError(f"{self.folder}: every checkpoint is damaged ({found}): remove the folder to start anew")
        return None

    def _try(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]] | str:
        """A checkpoint's state and extra, or what is wrong with it; the same verdict in all processes."""
        wrong, found = processes.on_first(lambda: _damage(self.folder / str(step))), None
        try:
            if wrong is None:
                found = self._read(step, abstract_state)
        except InputError:
            raise
        except Exception as error:  # whatever a file of garbage makes the readers raise
            wrong = _first_line(error)
        wrong = next((each for each in processes.exchange(wrong) if each is not None), None)
        return found if found is not None and wrong is None else str(wrong)

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=items)["meta"]
        wanted = {name: _struct(leaf) for name, leaf in _named_leaves(abstract_state).items()}
        _compare(meta["layout"], _layout(wanted), f"{self.folder}/{step}")
        present = {name: leaf for name, leaf in wanted.items() if leaf.size}
        items = ocp.args.Composite(state=ocp.args.StandardRestore(present))
        arrays = self._manager.restore(step, args=items)["state"]
        for name in wanted.keys() - present.keys():
            zeros = np.zeros(wanted[name].shape, wanted[name].dtype)
            arrays[name] = jax.make_array_from_callback(
                zeros.shape, wanted[name].sharding, lambda index, x=zeros: x[index]
            )
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in wanted]), meta["extra"]

    def _set_aside(self, damage: Mapping[int, str], used: int) -> None:
        """Makes room for the steps that will be saved again, and says so."""
        for step, reason in damage.items() if processes.first() else ():
            target = self.folder / DAMAGED / str(step)
            while target.exists():
                target = target.with_name(target.name + "_")
            self._warn(
                f"checkpoint {self.folder / str(step)} is damaged ({reason}): moved to {target}, step {used} is used"
            )
            target.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)
        if damage:
            processes.exchange("damaged checkpoints moved")
            self._manager.reload()

    def _seal(self) -> None:
        """Writes the manifest: orbax calls this when all files are complete and before it commits the step."""
        if jax.process_index() != 0:
            return
        candidates = [self.folder / str(self._saving), *self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")]
        folder = next(path for path in candidates if path.is_dir())
        files = sorted(path for item in ITEMS for path in (folder / item).rglob("*") if path.is_file())
        write_json_atomic(folder / MANIFEST, {str(path.relative_to(folder)): _fingerprint(path) for path in files})


class _NewestAndBest:
    """Orbax's preservation protocol; scores are kept here because orbax's own file of them may be damaged too."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.scores: dict[int, float | None] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(info.step for info in checkpoints)
        scored = [(score, step) for step in steps if (score := self.scores.get(step)) is not None]
        kept = set(steps[-self.keep :]) | ({max(scored)[1]} if scored else set())
        return [info.step in kept for info in checkpoints]


def _to_stderr(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, such as 'trainable/layers/attention/query': None is no leaf, dataclass or dict is the same."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError(f"{len(leaves) - len(named)} leaves of the state share their path with another")
    return named


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _layout(arrays: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}


def _compare(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    def kind(entry: Any) -> str:
        return "absent" if entry is None else f"{entry[0]}{entry[1]}"

    differing = [name for name in dict.fromkeys([*wanted, *saved]) if saved.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise InputError(
            f"{where}: {name} is {kind(saved.get(name))} in the checkpoint and {kind(wanted.get(name))} in this "
            f"run{more}: use the config that made it, or another workdir"
        )


def _score(folder: pathlib.Path) -> float | None:
    try:
        return json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged: told about when it is restored


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _damage(folder: pathlib.Path) -> str | None:
    """What is wrong with the files of a checkpoint; None when nothing is."""
    try:
        _verify(folder)
    except Exception as error:
        return _first_line(error)
    return None


def _verify(folder: pathlib.Path) -> None:
    """Raises ValueError naming the first file that is not as it was written; a folder without manifest passes."""
    if not (folder / MANIFEST).is_file():
        return
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, (size, digest) in manifest.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {size}")
        if _fingerprint(path)[1] != digest:
            raise ValueError(f"{name} has other content than was written")


def _fingerprint(path: pathlib.Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
