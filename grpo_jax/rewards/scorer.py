"""From `rewards.names` to one function of a step: the scores of a rollout by component."""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from grpo_jax.config import RewardsConfig
from grpo_jax.errors import InputError
from grpo_jax.rewards import host as host_rewards
from grpo_jax.rewards.code import code_reward
from grpo_jax.rewards.host import HostRewards
from grpo_jax.rewards.texts import expected_text, last_number
from grpo_jax.rewards.verifiers import NEED_ANSWER, REWARDS, ByteTable, byte_table, completion_bytes
from grpo_jax.sampler.types import Prompts, Rollout, Scores

InGraph = tuple[Float[Array, "B C"], Float[Array, "B C"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """The rewards of a run, bound to its tokenizer and its dataset.

    Attributes:
      names: components in config order, which is the order of the axis C.
      weights: their weights.
      table: bytes of each token.
      host: the components that are ordinary Python; None when all are in-graph.
      mesh: the mesh that scoring programs run on.
      answers: answer_bytes and answer_lengths of every dataset row; empty when no component reads them.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    table: ByteTable
    host: HostRewards | None
    mesh: Mesh
    answers: Mapping[str, np.ndarray]

    def columns(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """`Prompts.columns` of the dataset rows with these numbers; widths are those of the whole dataset."""
        return {name: values[np.asarray(rows)] for name, values in self.answers.items()}

    def score(self, prompts: Prompts, rollout: Rollout) -> Scores:
        """Scores of every component, traced inside the step's program."""
        values, valid = self.score_in_graph(prompts, rollout)
        if self.host is None:
            return Scores(values, valid, failed=jnp.bool_(False))
        row = prompts.row[rollout.group]
        host = host_rewards.score_in_program(self.host, self.mesh, row, rollout.tokens, rollout.lengths)
        return self._merge(self.host, (values, valid), host)

    def score_on_host(
        self,
        prompts: Prompts,
        rollout: Rollout,
        in_graph: Callable[[Prompts, Rollout], InGraph] | None = None,
        fetch: Callable[[Any], Any] = jax.device_get,
    ) -> Scores:
        """The same scores with host rewards called from Python, for staged mode.

        `in_graph` is `score_in_graph` jitted by the caller (None runs it eagerly); `fetch` brings arrays to the host.
        """
        values, valid = (in_graph or self.score_in_graph)(prompts, rollout)
        with jax.transfer_guard("allow"):  # what the host finds goes to the device here, inside a guarded loop
            if self.host is None:
                return Scores(values, valid, failed=jnp.bool_(False))
            wanted = (prompts.row, rollout.group, rollout.tokens, rollout.lengths, rollout.weight)
            row, group, tokens, lengths, weight = fetch(wanted)
            real = weight > 0  # a judge is not asked about filler
            raw = np.full((len(weight), len(self.host.functions)), host_rewards.NOT_APPLICABLE)
            raw[real] = self.host.call(row[group][real], tokens[real], lengths[real])
            return self._merge(self.host, (values, valid), host_rewards.decoded(jnp.asarray(raw)))

    def score_in_graph(self, prompts: Prompts, rollout: Rollout) -> InGraph:
        """(values, valid) of the in-graph components alone, in config order."""
        functions = [REWARDS[name] for name in self.names if not self._on_host(name)]
        if not functions:
            empty = jnp.zeros((rollout.tokens.shape[0], 0), jnp.float32)
            return empty, empty
        columns = {name: values[rollout.group] for name, values in prompts.columns.items()}
        text, n = completion_bytes(self.table, rollout.tokens, rollout.lengths)
        scores, valids = zip(*(function(text, n, columns) for function in functions), strict=True)
        return jnp.stack(scores, axis=1), jnp.stack(valids, axis=1)

    def total(self, scores: Scores) -> Float[Array, "B"]:
        """sum_c weight_c * values_c * valid_c."""
        return (scores.values * scores.valid * jnp.asarray(self.weights, jnp.float32)).sum(axis=1)

    def _on_host(self, name: str) -> bool:
        return self.host is not None and name in self.host.functions

    def _merge(self, host: HostRewards, in_graph: InGraph, by_host: host_rewards.HostScores) -> Scores:
        # Components come in-graph first, then host; put them into config order.
        made = [name for name in self.names if not self._on_host(name)] + list(host.functions)
        order = np.array([made.index(name) for name in self.names])
        values, valid, failed = by_host
        return Scores(
            values=jnp.concatenate([in_graph[0], values], axis=1)[:, order],
            valid=jnp.concatenate([in_graph[1], valid], axis=1)[:, order],
            failed=failed,
        )


def build_scorer(
    config: RewardsConfig,
    tokenizer_bytes: Sequence[bytes],
    rows: Sequence[dict[str, Any]],
    decode: Callable[[list[int]], str],
    mesh: Mesh,
    callables: dict[str, Callable[..., Any]] | None = None,
) -> Scorer:
    """The scorer of a config; raises InputError for unknown names, unreadable functions and rows without an answer.

    `tokenizer_bytes` are the bytes that each token id adds to the text, none for special tokens, which `decode` leaves
    out too. `rows` are the dataset: the prompt under 'prompt', the right answer under 'answer', other columns by their
    names. `callables` are host rewards by name; they take precedence over names that exist otherwise.
    """
    callables = callables or {}
    unused = [name for name in callables if name not in config.names]
    if unused:
        raise InputError(f"rewards.names={config.names!r} leaves out the reward {unused[0]!r} that was passed: add it")
    functions = {}
    for name in config.names:
        if name in callables:
            functions[name] = callables[name]
        elif name == "code":
            functions[name] = code_reward(config.code, rows)
        elif name not in REWARDS:
            functions[name] = load_function(name, tuple(callables))
    for name, function in functions.items():
        _require_columns(name, function, rows)
    needing = [name for name in config.names if name in NEED_ANSWER and name not in functions]
    return Scorer(
        names=config.names,
        weights=config.weights,
        table=byte_table(tokenizer_bytes),
        host=HostRewards(functions, rows, decode, config.timeout) if functions else None,
        mesh=mesh,
        answers=answer_columns(rows, needing) if needing else {},
    )


def load_function(name: str, known: Sequence[str] = ()) -> Callable[..., Any]:
    """The callable that 'module:function' names; raises InputError saying what is wrong, with the nearest name."""
    where = f"rewards.names={name!r}"
    module_name, colon, attribute = name.partition(":")
    if not colon:
        names = [*REWARDS, "code", *known]
        raise InputError(f"{where} is not one of {', '.join(names)}, nor 'module:function'{_nearest(name, names)}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"{where}: no module {error.name!r}; put its folder on PYTHONPATH or install it") from error
    except Exception as error:
        raise InputError(f"{where}: importing {module_name!r} raised {type(error).__name__}: {error}") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{where}: module {module_name!r} has no {attribute!r}{_nearest(attribute, dir(module))}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{where}: {attribute!r} is a {type(found).__name__}, not a function")
    return found


def answer_columns(rows: Sequence[dict[str, Any]], needing: Sequence[str]) -> dict[str, np.ndarray]:
    """Column 'answer' of all rows as bytes [rows, A] and lengths [rows]; raises InputError naming a row without one."""
    texts = [expected_text(row.get("answer")) for row in rows]
    for index, text in enumerate(texts):
        if not text:
            raise InputError(
                f"dataset row {index}: column 'answer' is empty, and the reward {needing[0]!r} needs it: give it "
                f"an answer, drop it, or set data.answer_column"
            )
        if "number" in needing and last_number(text) is None:
            raise InputError(
                f"dataset row {index}: answer {text[:80]!r} holds no number; the reward 'number' needs one"
            )
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    table = byte_table(encoded)
    return {"answer_bytes": table.bytes, "answer_lengths": table.lengths}


def _require_columns(name: str, function: Callable[..., Any], rows: Sequence[dict[str, Any]]) -> None:
    if not callable(function):
        raise InputError(f"reward {name!r} is a {type(function).__name__}, not a function")
    if not len(rows):
        return
    given = ["prompts", "completions", "completion_ids", *(key for key in rows[0] if key != "prompt")]
    absent = host_rewards.missing(function, given)
    if absent:
        raise InputError(f"reward {name!r} wants the column {absent[0]!r}; the dataset has {', '.join(given)}")


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
