"""Rewards before a run: what they give to completions in a file, and how often the model already passes."""

import collections
import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import Config, MeshConfig, RewardsConfig
from grpo_jax.data.order import row_order
from grpo_jax.errors import InputError
from grpo_jax.metrics import read_jsonl
from grpo_jax.models.loading import load_model
from grpo_jax.parallel import check_batch, make_mesh
from grpo_jax.recipes.evaluate import Evaluator
from grpo_jax.recipes.grpo import check_inputs, initial_state, prepare, read_rows, starting_model
from grpo_jax.recipes.loop import Stop, open_workdir
from grpo_jax.recipes.mesh import with_mesh
from grpo_jax.rewards.letters import languages_of
from grpo_jax.rewards.model_files import load_reward_variables, open_model_judge, open_reward_models, used_models
from grpo_jax.rewards.model_judge import read_verdicts
from grpo_jax.rewards.reward_model import COLLECTION, MODEL_REWARDS
from grpo_jax.rewards.scorer import build_scorer, check_in_graph
from grpo_jax.rewards.texts import TEXT_REWARDS, expected_text, opens_thinking, reason, text_of, text_reward
from grpo_jax.rewards.verifiers import NEED_RIGHT, REWARDS, byte_table, completion_bytes, verifier
from grpo_jax.sampler.types import Prompts, Rollout
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, encode_prompt

Cell = tuple[float | None, str]
"""A score (None: does not apply) and the reason for it."""
BINS = 11  # of the histogram, where groups are larger than ten completions
BAR = 40  # characters of its longest bar
# Shares of groups at which the probe warns.
NOTHING_TO_LEARN, MOSTLY_CUT = 0.1, 0.5


def show(config: Config, path: pathlib.Path, terminal: Terminal | None = None) -> list[dict[str, Cell]]:
    """Prints what each reward gives to each completion of a JSONL file, and why; returns the same by component.

    A row holds a `completion`, as text or chat, and what the rewards read: `prompt` and `answer` (or the columns that
    `config.data` names) and others; samples.jsonl of a run is such a file. Rewards that fail are shown, not raised.
    """
    terminal = terminal or Terminal()
    rows = read_completions(config, path)
    tokenizer = (
        load_model(config.model.path).tokenizer.with_end_tokens(config.text.end_tokens) if config.model.path else None
    )
    if tokenizer is None:
        terminal.say("model.path is empty: lengths are counted in bytes")
    texts = [row.pop("completion") for row in rows]
    ids = [list(text.encode()) if tokenizer is None else tokenizer.encode(text, special=False) for text in texts]
    cells = score_completions(config, rows, texts, ids, [_opened(config, row["prompt"], tokenizer) for row in rows])
    for number, (text, found) in enumerate(zip(texts, cells, strict=True), start=1):
        weighted = [w * (found[name][0] or 0.0) for name, w in _weights(config)]
        terminal.say(
            f"completion {number}: total {sum(weighted):.3f}  {text if len(text) <= 300 else text[:297] + '...'}"
        )
        for (name, weight), (value, why) in zip(_weights(config), found.values(), strict=True):
            score = "does not apply" if value is None else f"{value:.3f} x {weight:g}"
            terminal.say(f"  {name}: {score}" + (f"  {why}" if why else ""))
    for name, _ in _weights(config):
        given = [found[name][0] for found in cells]
        values = [value for value in given if value is not None]
        mean = f"mean {np.mean(values):.3f}" if values else "no mean"
        terminal.say(f"{name}: {mean} of {len(values)} of {len(cells)} completions")
    return cells


def read_completions(config: Config, path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of the file with `prompt`, `answer` and `completion` as text; raises InputError naming file and line."""
    if not path.is_file():
        raise InputError(f"--completions {path}: is not a file")
    rows = []
    for number, row in enumerate(read_jsonl(path), start=1):
        if not isinstance(row.get("completion"), str | list):
            raise InputError(f"{path}: row {number}: 'completion' must be text or a list of messages")
        data = config.data
        answer = expected_text(row.get("answer", row.get(data.answer_column)))
        answer = expected_text(answer.rpartition(data.answer_marker)[2] if data.answer_marker else answer)
        prompt = row.get("prompt", row.get(data.prompt_column, ""))
        rows.append({**row, "prompt": prompt, "answer": answer, "completion": text_of(row["completion"])})
    if not rows:
        raise InputError(f"{path}: holds no completions")
    return rows


def score_completions(
    config: Config, rows: list[dict[str, Any]], texts: list[str], ids: list[list[int]], opened: list[bool]
) -> list[dict[str, Cell]]:
    """Score and reason by component, in config order, of each completion.

    In-graph rewards are told by their text twins, host rewards run as they do in training; reward models and the judge
    read prompt and completion as their own tokenizer makes them, the completion closed by an end token.
    """
    rewards = config.rewards
    on_host = [name for name in rewards.names if name not in (*REWARDS, *MODEL_REWARDS)]
    check_in_graph(rewards, [name for name in rewards.names if name in REWARDS])
    found = _host_cells(rewards, on_host, rows, texts, ids) if on_host else {}
    for name in rewards.names:
        if name in MODEL_REWARDS:
            found[name] = _model_cells(config, name, rows, texts)
    call: dict[str, Any] = {
        "prompts": [row["prompt"] for row in rows],
        "completions": texts,
        "completion_ids": ids,
        "answer": [row["answer"] for row in rows],
        "opened": opened,
        "language": languages_of(rows, rewards.language),
    }
    by_row = [dataclasses.replace(rewards, language=code) for code in call["language"]]
    for name in sorted(set(rewards.names) - set(found), key=lambda name: name in NEED_RIGHT):
        if name in NEED_RIGHT:
            call["right"] = [value is not None and value >= 1.0 for value, _ in found[rewards.names[0]]]
        if name in TEXT_REWARDS:
            values = text_reward(name, rewards, config.sampler.max_new_tokens)(**call)
        else:
            values = _own_in_graph(name, rewards, call)
        about = zip(texts, call["answer"], opened, ids, by_row, strict=True)
        found[name] = [(value, reason(name, *what)) for value, what in zip(values, about, strict=True)]
    return [{name: found[name][i] for name in rewards.names} for i in range(len(texts))]


def _host_cells(
    config: RewardsConfig, names: list[str], rows: list[dict[str, Any]], texts: list[str], ids: list[list[int]]
) -> dict[str, list[Cell]]:
    """Scores of host rewards; the reasons are what failed and what they have logged."""
    chosen = dataclasses.replace(config, names=tuple(names), weights=(1.0,) * len(names), on_error="zero")
    scorer = build_scorer(chosen, [b""], rows, lambda ids: "", make_mesh(MeshConfig()))
    assert scorer.host is not None
    try:
        values, record = scorer.host.score_texts(texts, ids)
    finally:
        scorer.close()
    keys = [(number, tuple(line)) for number, line in enumerate(ids)]
    found: dict[str, list[Cell]] = {}
    for c, name in enumerate(names):
        failed = dict(record.failures.get(name, []))
        own = {column for column, source in record.sources.items() if source == name}
        logged = [{k: v for k, v in record.extra.get(key, {}).items() if k in own} for key in keys]
        why = [failed.get(key) or _logged(extra, name) for key, extra in zip(keys, logged, strict=True)]
        found[name] = [(float(v) if np.isfinite(v) else None, w) for v, w in zip(values[:, c], why, strict=True)]
    return found


def _model_cells(config: Config, name: str, rows: list[dict[str, Any]], texts: list[str]) -> list[Cell]:
    """Scores of a reward model, with what it sees of a completion; those of the judge, with its verdicts."""
    rewards = dataclasses.replace(config.rewards, names=(name,), weights=(1.0,))
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    variables = load_reward_variables(rewards, config.model, mesh)[COLLECTION][name]
    section = used_models(rewards).get(name)
    folder = section.path if section else rewards.model_judge.path
    tokenizer = Tokenizer.from_folder(folder).with_end_tokens(config.text.end_tokens)
    table = byte_table(tokenizer.token_bytes())
    with jax.default_matmul_precision(config.model.matmul_precision):
        if section is None:
            given = (rewards.model_judge, config.model, config.text, tokenizer, rows, mesh)
            judge = open_model_judge(*given)
            prompts, rollout = _as_rollout(config, tokenizer, rows, texts, judge.columns)
            judged = jax.jit(lambda *given: judge.verdicts(given[0], table, *given[1:]))(variables, prompts, rollout)
            values, valid = read_verdicts(*completion_bytes(table, judged.tokens, judged.lengths))
            said = zip(np.asarray(judged.tokens), np.asarray(judged.lengths), strict=True)
            why = [tokenizer.decode(ids[:length].tolist()) for ids, length in said]
        else:
            model = open_reward_models(rewards, config.model, None)[name]
            prompts, rollout = _as_rollout(config, tokenizer, rows, texts, {})
            program = jax.jit(lambda *given: model.score(given[0], table, *given[1:]))
            values, valid = program(variables, prompts, rollout)
            why = [f"{folder} reads " + ("all" if section.sees == "response" else f"what follows {section.marker}")]
            why *= len(rows)
    cells = zip(np.asarray(values).tolist(), np.asarray(valid).tolist(), why, strict=True)
    return [(value if applies else None, reason) for value, applies, reason in cells]


def _as_rollout(
    config: Config,
    tokenizer: Tokenizer,
    rows: list[dict[str, Any]],
    texts: list[str],
    columns: Mapping[str, np.ndarray],
) -> tuple[Prompts, Rollout]:
    """Rows and texts as a step would hold them after sampling, a completion a prompt."""
    before = [encode_prompt(row["prompt"], config.text, tokenizer) if row["prompt"] else [] for row in rows]
    after = [[*tokenizer.encode(text, special=False), *tokenizer.end_ids[:1]] for text in texts]
    (prompts, prompt_lengths), (tokens, lengths) = padded(before, left=True), padded(after, left=False)
    numbers, ones = np.arange(len(rows), dtype=np.int32), np.ones(len(rows), np.float32)
    nothing = np.zeros(tokens.shape, np.float32)
    ended = np.ones(len(rows), bool)
    rest = (nothing, nothing, ended, numbers * 0, nothing, ones, numbers, numbers, prompts, prompt_lengths)
    made: Any = (tokens, lengths, *rest)
    given: Any = (prompts, prompt_lengths, numbers, numbers, ones, dict(columns))
    return Prompts(*given), Rollout(*made)


def padded(rows: list[list[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, width], padded with 0 on the left or on the right, how many each row has)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    table = np.zeros((len(rows), max(int(lengths.max(initial=0)), 1)), np.int32)
    for line, row in zip(table, rows, strict=True):
        if row:
            line[slice(-len(row), None) if left else slice(len(row))] = row
    return table, lengths


def _logged(extra: Mapping[str, Any], name: str) -> str:
    """What a reward has logged about a completion; a column of its own name goes without saying."""
    return "; ".join(str(value) if column == name else f"{column}={value}" for column, value in extra.items())


def _own_in_graph(name: str, config: RewardsConfig, call: Mapping[str, Any]) -> list[float | None]:
    """An in-graph reward that has no text twin, on the bytes of the texts."""
    lines = [text.encode("utf-8", "replace") for text in call["completions"]]
    text, answers = byte_table(lines), byte_table([right.encode("utf-8", "replace") for right in call["answer"]])
    tokens = np.zeros((len(lines), max(map(len, call["completion_ids"]), default=1) or 1), np.int32)
    for row, line in zip(tokens, call["completion_ids"], strict=True):
        row[: len(line)] = line
    columns = {
        "answer_bytes": answers.bytes,
        "answer_lengths": answers.lengths,
        "tokens": tokens,
        "token_lengths": np.array(list(map(len, call["completion_ids"])), np.int32),
        "opened": np.array(call["opened"]),
    }
    columns = {key: jnp.asarray(value) for key, value in columns.items()}
    values, valid = verifier(name, config)(jnp.asarray(text.bytes), jnp.asarray(text.lengths), columns)
    return [float(v) if ok else None for v, ok in zip(np.asarray(values), np.asarray(valid), strict=True)]


def _weights(config: Config) -> list[tuple[str, float]]:
    return list(zip(config.rewards.names, config.rewards.weights, strict=True))


def _opened(config: Config, prompt: Any, tokenizer: Tokenizer | None) -> bool:
    """Whether the prompt, as the model gets it, ends with an open `<think>`."""
    if tokenizer is None or not prompt:
        return opens_thinking(prompt)
    return opens_thinking(tokenizer.decode(encode_prompt(prompt, config.text, tokenizer), skip_special=False))


def probe(
    config: Config, count: int, workdir: pathlib.Path | None = None, terminal: Terminal | None = None
) -> dict[str, Any]:
    """Samples `count` training prompts as the first step would, prints and returns how often they pass.

    A completion passes when its first reward component is at least 1. A model that the run makes itself is made in
    `workdir`, where the run will find it, or in a folder that is removed again.
    """
    terminal = terminal or Terminal()
    config = with_mesh(config, terminal)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    rows = {split: read_rows(config, split, None) for split in ("train", "eval")}
    model = check_inputs(config, rows, mesh)
    if workdir is not None:
        open_workdir(workdir, config)
    with tempfile.TemporaryDirectory() as folder, Stop(None) as stop, terminal:
        place = workdir or pathlib.Path(folder)
        model = starting_model(config, model, rows, mesh, place, stop, terminal)
        count = min(count, len(rows["train"]))
        order = row_order(np.arange(count), len(rows["train"]), config.seed, config.data.shuffle)
        chosen = {**rows, "train": [rows["train"][row] for row in order]}
        parts, prompts, evaluator = prepare(config, model, chosen, mesh)
        try:
            evaluator = Evaluator(parts, prompts, parts.scorer, evaluator.tokenizer)
            state, sampler = initial_state(parts, model), config.sampler
            variables = {**state.frozen, **state.trainable}
            given = (count, sampler.group_size, sampler.temperature, sampler.top_p, 0)
            records = evaluator.graded(evaluator.sample(variables, *given, top_k=sampler.top_k))
        finally:
            parts.scorer.close()
    found = pass_rates(records, dict(_weights(config)))
    tell(found, config, terminal)
    return found


def pass_rates(records: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> dict[str, Any]:
    """Shares of groups that are all wrong, all right, and that differ in their rewards; of completions cut off."""
    groups: dict[int, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for record in records:
        groups[record["problem"]].append(record)
    rates = [float(np.mean([bool(r["right"]) for r in group])) for group in groups.values()]
    totals = [
        {round(sum(weights[n] * (v or 0.0) for n, v in r["rewards"].items()), 6) for r in group}
        for group in groups.values()
    ]
    rewards = {name: float(np.mean([r["rewards"][name] or 0.0 for r in records])) for name in records[0]["rewards"]}
    return {
        "prompts": len(groups),
        "group": len(records) // len(groups),
        "rates": rates,
        "pass_rate": float(np.mean(rates)),
        "all_wrong": float(np.mean([rate == 0.0 for rate in rates])),
        "all_right": float(np.mean([rate == 1.0 for rate in rates])),
        "differ": float(np.mean([len(found) > 1 for found in totals])),
        "truncated": float(np.mean([not r["ended"] for r in records])),
        "rewards": rewards,
    }


def tell(found: Mapping[str, Any], config: Config, terminal: Terminal) -> None:
    """Prints the histogram and the shares, and warns when a run would have nothing to learn from."""
    group = found["group"]
    bins = group + 1 if group < BINS else BINS
    counts = np.bincount([round(rate * (bins - 1)) for rate in found["rates"]], minlength=bins)
    terminal.say(f"pass rate of {found['prompts']} prompts, {group} completions each, by {config.rewards.names[0]!r}:")
    for i, n in enumerate(counts):
        label = f"{i}/{group}" if bins == group + 1 else f"{i / (bins - 1):.0%}"
        terminal.say(f"  {label:>5} {'#' * round(BAR * n / max(counts.max(), 1)):<{BAR}} {n}")
    terminal.say(
        f"passed {found['pass_rate']:.1%}; prompts all wrong {found['all_wrong']:.1%}, all right "
        f"{found['all_right']:.1%}, with rewards that differ {found['differ']:.1%}; completions cut off "
        f"{found['truncated']:.1%}"
    )
    terminal.say("mean rewards: " + ", ".join(f"{name} {value:.3f}" for name, value in found["rewards"].items()))
    if found["differ"] <= NOTHING_TO_LEARN:
        easy = found["all_right"] > found["all_wrong"]
        fix = "take harder prompts" if easy else "take easier prompts, a cold start, a larger sampler.group_size"
        terminal.warn(
            f"there is next to nothing to learn: rewards differ in {found['differ']:.0%} of the groups, and a group "
            f"without a difference has no gradient: {fix}"
        )
    elif found["all_wrong"] == 1.0:
        terminal.warn(f"no completion passes: a run would learn from {', '.join(config.rewards.names[1:])} alone")
    if found["truncated"] >= MOSTLY_CUT:
        terminal.warn(
            f"{found['truncated']:.0%} of the completions are cut off at sampler.max_new_tokens="
            f"{config.sampler.max_new_tokens}: raise it, or check text.end_tokens"
        )
