"""From `rewards.names` to one function of a step: the scores of a rollout by component."""

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float

from grpo_jax import processes
from grpo_jax.config import PromptSetConfig, RewardsConfig
from grpo_jax.errors import InputError
from grpo_jax.ops.masked import masked_select
from grpo_jax.parallel import put_rows, row_sharding, scored_rows, scoring_process
from grpo_jax.rewards import host as host_rewards
from grpo_jax.rewards import judge, languages, mathematics
from grpo_jax.rewards.code import code_reward
from grpo_jax.rewards.host import HostRewards, Progress
from grpo_jax.rewards.letters import SCRIPTS, languages_of
from grpo_jax.rewards.model_judge import ModelJudge
from grpo_jax.rewards.pool import Pool, Pooled
from grpo_jax.rewards.reward_model import MODEL_REWARDS, RewardModel
from grpo_jax.rewards.texts import choice_letter, expected_text, last_number
from grpo_jax.rewards.verifiers import (
    NEED_ANSWER,
    NEED_OPENED,
    NEED_RIGHT,
    REWARDS,
    ByteTable,
    Verifier,
    byte_table,
    completion_bytes,
    prompt_opens,
    verifier,
)
from grpo_jax.sampler.types import Prompts, Rollout, RowRewards, Scores

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
      answers: of every dataset row what rewards read: the right answer's bytes, the language's number, what a judge
        wants; empty when nothing is.
      functions: the in-graph components by name.
      pools: the worker processes of host components.
      models: the components that are models; their variables come with each call.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    table: ByteTable
    host: HostRewards | None
    mesh: Mesh
    answers: Mapping[str, np.ndarray]
    functions: Mapping[str, Verifier] = dataclasses.field(default_factory=dict)
    pools: "RewardPools | None" = None
    models: Mapping[str, RewardModel | ModelJudge] = dataclasses.field(default_factory=dict)

    def columns(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """`Prompts.columns` of the dataset rows with these numbers; widths are those of the whole dataset."""
        return {name: values[np.asarray(rows)] for name, values in self.answers.items()}

    def score(self, prompts: Prompts, rollout: Rollout, variables: Mapping[str, Any] | None = None) -> Scores:
        """Scores of every component, traced inside the step's program; `variables` are those of `models` by name."""
        in_graph = self.score_in_graph(prompts, rollout, variables)
        by_host, rewards = None, rewards_by_row(prompts, rollout)
        if self.host is not None:
            row = prompts.row[rollout.group]
            asked = None if rewards is None else rewards.applies[:, self._host_places]
            given = (row, rollout.tokens, rollout.lengths, rollout.draw, asked)
            by_host = host_rewards.score_in_program(self.host, self.mesh, *given)
        return self._merge(in_graph, by_host, rollout, rewards)

    def score_on_host(
        self,
        prompts: Prompts,
        rollout: Rollout,
        in_graph: Callable[[Prompts, Rollout], InGraph] | None = None,
        fetch: Callable[[Any], Any] = jax.device_get,
    ) -> Scores:
        """The same scores with host rewards called from Python, for staged mode; each process scores its own rows.

        `in_graph` is `score_in_graph` jitted by the caller (None runs it eagerly); `fetch` brings arrays to the host.
        """
        found = (in_graph or self.score_in_graph)(prompts, rollout)
        with jax.transfer_guard("allow"):  # what the host finds goes to the device here, inside a guarded loop
            rewards = rewards_by_row(prompts, rollout)
            if self.host is None:
                return self._merge(found, None, rollout, rewards)
            wanted = (prompts.row, rollout.group, rollout.tokens, rollout.lengths, rollout.weight, rollout.draw)
            (row, group, tokens, lengths, weight, draw), fetched = fetch((wanted, rewards))
            asked = None if fetched is None else fetched.applies[:, self._host_places]
            own = scored_rows(len(weight), self.mesh)
            real = own[weight[own] > 0]  # a judge is not asked about filler
            raw = np.full((len(weight), len(self.host.functions)), host_rewards.NOT_APPLICABLE)
            given = (row[group][real], tokens[real], lengths[real], draw[real])
            raw[real] = self.host.call(*given, None if asked is None else asked[real])
            if processes.several():
                all_raw = multihost_utils.process_allgather(raw)  # [processes, B, C]
                raw = all_raw[scoring_process(len(weight), self.mesh), np.arange(len(weight))]
            placed = put_rows(lambda rows: raw[rows], len(weight), row_sharding(self.mesh))
            return self._merge(found, host_rewards.decoded(placed), rollout, rewards)

    def score_in_graph(self, prompts: Prompts, rollout: Rollout, variables: Mapping[str, Any] | None = None) -> InGraph:
        """(values, valid) of the in-graph components alone, in config order; those that read others come later."""
        names = [name for name in self.names if not self._on_host(name) and name not in self._late]
        if not names:
            empty = jnp.zeros((rollout.tokens.shape[0], 0), jnp.float32)
            return empty, empty
        columns = {name: values[rollout.group] for name, values in prompts.columns.items()}
        columns |= _token_columns(rollout)
        if NEED_OPENED & set(names):
            columns["opened"] = prompt_opens(self.table, prompts.tokens, prompts.lengths)[rollout.group]
        text, n = completion_bytes(self.table, rollout.tokens, rollout.lengths)

        def one(name: str) -> tuple[Array, Array]:
            if name not in self.models:
                return self.functions[name](text, n, columns)
            assert variables is not None, name
            score = functools.partial(self.models[name].score, variables[name], self.table, prompts, rollout)
            if prompts.rewards is None:
                return score()
            # A model that no prompt of the step asks costs nothing.
            asked = jnp.any(prompts.rewards.applies[:, self.names.index(name)] > 0)
            zeros = jnp.zeros(rollout.tokens.shape[0], jnp.float32)
            return jax.lax.cond(asked, score, lambda: (zeros, zeros))

        scores, valids = zip(*map(one, names), strict=True)
        return jnp.stack(scores, axis=1), jnp.stack(valids, axis=1)

    def total(self, scores: Scores) -> Float[Array, "B"]:
        """sum_c weight_c * values_c * valid_c."""
        return (scores.values * scores.valid * self.row_weights(scores)).sum(axis=1)

    def row_weights(self, scores: Scores) -> Float[Array, "C"] | Float[Array, "B C"]:
        """The weights of the components: those of the config, or each row's own."""
        return jnp.asarray(self.weights, jnp.float32) if scores.rewards is None else scores.rewards.weights

    def components(self, scores: Scores, index: int) -> dict[str, float | None]:
        """The fetched scores of one completion by name; None where a component does not apply."""
        pairs = zip(scores.values[index].tolist(), scores.valid[index].tolist(), strict=True)
        return {name: value if valid else None for name, (value, valid) in zip(self.names, pairs, strict=True)}

    def close(self) -> None:
        """Ends the worker processes of host rewards."""
        if self.pools is not None:
            self.pools.close()

    @property
    def _late(self) -> list[str]:
        """Components that read whether the first one says right."""
        return [name for name in self.names if name in NEED_RIGHT and name in self.functions]

    def _on_host(self, name: str) -> bool:
        return self.host is not None and name in self.host.functions

    @property
    def _host_places(self) -> np.ndarray:
        """Where the host's components lie on the axis C."""
        assert self.host is not None
        return np.array([self.names.index(name) for name in self.host.functions], np.int32)

    def _merge(
        self,
        in_graph: InGraph,
        by_host: host_rewards.HostScores | None,
        rollout: Rollout,
        rewards: RowRewards | None = None,
    ) -> Scores:
        """All components in config order; they are made in-graph first, then by the host, then from the first one."""
        made = [name for name in self.names if not self._on_host(name) and name not in self._late]
        parts, failed = [in_graph], jnp.bool_(False)
        if by_host is not None and self.host is not None:
            made += list(self.host.functions)
            parts.append(by_host[:2])
            failed = by_host[2]
        if self._late:
            first = made.index(self.names[0])
            values, valid = (jnp.concatenate([part[i] for part in parts], axis=1)[:, first] for i in (0, 1))
            columns = {**_token_columns(rollout), "right": (values >= 1.0) & (valid > 0)}
            text = jnp.zeros((rollout.tokens.shape[0], 1), jnp.uint8)
            for name in self._late:
                found = self.functions[name](text, jnp.zeros_like(rollout.lengths), columns)
                parts.append((found[0][:, None], found[1][:, None]))
            made += self._late
        order = np.array([made.index(name) for name in self.names])
        values, valid = (jnp.concatenate([part[i] for part in parts], axis=1)[:, order] for i in (0, 1))
        if rewards is not None:
            valid = valid * rewards.applies
            values = masked_select(values, valid)
        return Scores(values=values, valid=valid, failed=failed, rewards=rewards)


def rewards_by_row(prompts: Prompts, rollout: Rollout) -> RowRewards | None:
    """Which rewards each completion has; None: all have those of the config."""
    return None if prompts.rewards is None else jax.tree.map(lambda x: x[rollout.group], prompts.rewards)


def _token_columns(rollout: Rollout) -> dict[str, Array]:
    return {"tokens": rollout.tokens, "token_lengths": rollout.lengths}


@dataclasses.dataclass(frozen=True, eq=False)
class RewardPools:
    """The worker processes that the scorers of a run share; none is started before it is needed.

    Attributes:
      own: those of 'module:function' rewards.
      answers: those that compare answers for the reward 'math'.
    """

    own: Pool
    answers: Pool

    @classmethod
    def of(cls, config: RewardsConfig) -> "RewardPools":
        """The pools of a config."""
        return cls(Pool(config.workers), Pool(config.workers, mathematics.SETUP))

    def close(self) -> None:
        """Ends all processes."""
        self.own.close()
        self.answers.close()


# Host rewards by name: from the config, the pools and the dataset to what is called.
MakeReward = Callable[[RewardsConfig, RewardPools, Sequence[dict[str, Any]]], Callable[..., Any] | Pooled]
HOST_REWARDS: dict[str, MakeReward] = {
    "math": lambda config, pools, rows: mathematics.MathReward(pools.answers, config.math_timeout, config.timeout),
    "language_detected": lambda config, pools, rows: languages.detected_reward(config.language),
    "judge": lambda config, pools, rows: judge.JudgeReward(config.judge),
    "code": lambda config, pools, rows: code_reward(config.code, rows),
}


def build_scorer(
    config: RewardsConfig,
    tokenizer_bytes: Sequence[bytes],
    rows: Sequence[dict[str, Any]],
    decode: Callable[[list[int]], str],
    mesh: Mesh,
    callables: dict[str, Callable[..., Any]] | None = None,
    pools: RewardPools | None = None,
    progress: Progress | None = None,
    models: Mapping[str, RewardModel | ModelJudge] | None = None,
    sets: Sequence[PromptSetConfig] = (),
) -> Scorer:
    """The scorer of a config; raises InputError for unknown names, unreadable functions and rows without an answer.

    `tokenizer_bytes` are the bytes that each token id adds to the text, none for special tokens, which `decode` leaves
    out too. `rows` are the dataset: the prompt under 'prompt', the right answer under 'answer', other columns by their
    names. `callables` are host rewards by name; they take precedence over names that exist otherwise. `pools` are
    shared with other scorers (None: own ones), `progress` tells rewards the step. `models` are the reward models by
    name; without them the scorer can be checked, not used. With `sets` the rows name theirs, and a component sees the
    rows of the sets that have it.
    """
    callables = callables or {}
    unused = [name for name in callables if name not in config.names]
    if unused:
        raise InputError(f"rewards.names={config.names!r} leaves out the reward {unused[0]!r} that was passed: add it")
    pools = pools or RewardPools.of(config)
    functions: dict[str, Callable[..., Any] | Pooled] = {}
    for name in config.names:
        if name in callables:
            functions[name] = callables[name]
        elif name in HOST_REWARDS:
            functions[name] = HOST_REWARDS[name](config, pools, rows_of(name, rows, sets))
        elif name not in REWARDS and name not in MODEL_REWARDS:
            _require_columns(name, load_function(name, tuple(callables)), rows_of(name, rows, sets))
            functions[name] = Pooled(name)
    for name, function in functions.items():
        if not isinstance(function, Pooled):
            _require_columns(name, function, rows_of(name, rows, sets))
    in_graph = [name for name in config.names if name not in functions and name not in MODEL_REWARDS]
    check_in_graph(config, in_graph, sets)
    needing = [name for name in in_graph if name in NEED_ANSWER]
    held = {name: values for model in (models or {}).values() for name, values in model.columns.items()}
    if "language" in in_graph:
        held |= language_column(config, rows)
    host = HostRewards(functions, rows, decode, config.timeout, config.on_error, pools.own, progress)
    return Scorer(
        names=config.names,
        weights=config.weights,
        table=byte_table(tokenizer_bytes),
        host=host if functions else None,
        mesh=mesh,
        answers=(answer_columns(rows, needing, sets) if needing else {}) | held,
        functions={name: in_graph_function(name, config, rows) for name in in_graph},
        pools=pools if functions else None,
        models=models or {},
    )


def in_graph_function(name: str, config: RewardsConfig, rows: Sequence[dict[str, Any]]) -> Verifier:
    """The in-graph reward of this name; `language` reads the target of each row where rows name their own."""
    made: Any = verifier(name, config)
    return functools.partial(made, languages=row_languages(config, rows)) if name == "language" else made


def row_languages(config: RewardsConfig, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The target languages of rows with a column 'language'; empty where all have the config's."""
    found = tuple(sorted(set(languages_of(rows, config.language))))
    return () if found == (config.language,) else found


def language_column(config: RewardsConfig, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Column 'language_number' of all rows, which counts `row_languages`; none where those are empty."""
    found = row_languages(config, rows)
    numbers = [found.index(code) for code in languages_of(rows, config.language)] if found else []
    return {"language_number": np.array(numbers, np.int32)} if found else {}


def has_component(each: PromptSetConfig, name: str) -> bool:
    """Whether a prompt set's completions earn a component."""
    return not each.rewards or name in each.rewards


def rows_of(name: str, rows: Sequence[dict[str, Any]], sets: Sequence[PromptSetConfig]) -> Sequence[dict[str, Any]]:
    """The rows whose completions earn a component."""
    held = {each.name for each in sets if has_component(each, name)}
    return [row for row in rows if row["set"] in held] if sets else rows


def check_in_graph(config: RewardsConfig, names: Sequence[str], sets: Sequence[PromptSetConfig] = ()) -> None:
    """Raises InputError where the options of in-graph components, or their order, do not fit."""
    for number, each in enumerate(sets):
        reading = [name for name in names if name in NEED_RIGHT and has_component(each, name)]
        if reading and not has_component(each, config.names[0]):
            raise InputError(
                f"data.sets[{number}].rewards={each.rewards!r}: {reading[0]!r} reads whether {config.names[0]!r} is "
                "right: add that one"
            )
    if "language" in names and config.language not in SCRIPTS:
        known = ", ".join(sorted(SCRIPTS))
        raise InputError(f"rewards.language={config.language!r} has no known script: use one of {known}")
    if config.names[0] in names and config.names[0] in NEED_RIGHT:
        raise InputError(
            f"rewards.names={config.names!r}: {config.names[0]!r} reads whether the first component is right: "
            "put that one before it"
        )


def load_function(name: str, known: Sequence[str] = ()) -> Callable[..., Any]:
    """The callable that 'module:function' names; raises InputError saying what is wrong, with the nearest name."""
    where = f"rewards.names={name!r}"
    module_name, colon, attribute = name.partition(":")
    if not colon:
        names = [*REWARDS, *HOST_REWARDS, *MODEL_REWARDS, *known]
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


def answer_columns(
    rows: Sequence[dict[str, Any]], needing: Sequence[str], sets: Sequence[PromptSetConfig] = ()
) -> dict[str, np.ndarray]:
    """Column 'answer' of all rows as bytes [rows, A] and lengths [rows]; raises InputError naming a row without one."""
    texts = [expected_text(row.get("answer")) for row in rows]
    needed_by = {each.name: [name for name in needing if has_component(each, name)] for each in sets}
    for index, text in enumerate(texts):
        here = needed_by[rows[index]["set"]] if sets else needing
        if not here:
            continue
        if not text:
            raise InputError(
                f"dataset row {index}: column 'answer' is empty, and the reward {here[0]!r} needs it: give it "
                f"an answer, drop it, or set data.answer_column"
            )
        numeric = [name for name in here if name in ("number", "answer_number")]
        if numeric and last_number(text) is None:
            raise InputError(
                f"dataset row {index}: answer {text[:80]!r} holds no number; the reward {numeric[0]!r} needs one"
            )
        if "choice" in here and choice_letter(text) is None:
            raise InputError(
                f"dataset row {index}: answer {text[:80]!r} is no choice such as 'B' or '(B)'; the reward 'choice' "
                "needs one"
            )
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    table = byte_table(encoded)
    return {"answer_bytes": table.bytes, "answer_lengths": table.lengths}


def _require_columns(name: str, function: Callable[..., Any], rows: Sequence[dict[str, Any]]) -> None:
    if not callable(function):
        raise InputError(f"reward {name!r} is a {type(function).__name__}, not a function")
    if not len(rows):
        return
    given = [*host_rewards.KEYWORDS, *(key for key in rows[0] if key != "prompt")]
    absent = host_rewards.missing(function, given)
    if absent:
        raise InputError(f"reward {name!r} wants the column {absent[0]!r}; the dataset has {', '.join(given)}")


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
