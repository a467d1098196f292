"""Evaluation sets for any model: `grpo-jax eval`.

Completions are drawn by the sampler of training, graded as they come, and kept as JSONL: the same command goes on where
it stopped, and asking for more samples or problems draws those alone. Sample s of a problem is a function of the seed,
the problem's number and s, whatever else was asked for.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax import processes
from grpo_jax.config import (
    CodeConfig,
    Config,
    DistributedConfig,
    JudgeConfig,
    MeshConfig,
    ModelConfig,
    ModelJudgeConfig,
    SamplerConfig,
    TextConfig,
    from_dict,
)
from grpo_jax.data.benchmarks import BENCHMARKS, FIELD, benchmark_named, read_benchmark, with_instruction
from grpo_jax.data.mixture import load_all_rows
from grpo_jax.data.prompts import PromptSet, build_prompt_set, make_row_batches
from grpo_jax.errors import InputError
from grpo_jax.metrics import Fetcher, read_jsonl, write_atomic, write_json_atomic
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.loading import LoadedModel, load_model
from grpo_jax.models.runs import find_checkpoint
from grpo_jax.optimizer import make_optimizer, make_schedule
from grpo_jax.parallel import make_mesh, place, scored_rows
from grpo_jax.recipes.benchmark_report import pass_at_k_table, table, write_reports
from grpo_jax.recipes.benchmark_scores import scores_of
from grpo_jax.recipes.evaluate import Evaluator
from grpo_jax.recipes.loop import Stop, open_terminal
from grpo_jax.rewards.grading import Grade, Grader
from grpo_jax.rewards.judging import open_judge
from grpo_jax.rewards.letters import SCRIPTS, language_share
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.rewards.texts import opens_thinking, thought_and_answer_fault
from grpo_jax.rewards.verifiers import byte_table
from grpo_jax.step import StepParts
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, encode_prompt

OWN_ROWS = {"held_out": "eval", "train": "train"}  # names of a run's own rows, and their split
CHUNK = 16  # samples drawn together; a part of what names their noise
NARROWEST = 16  # tokens that prompts are padded to at least
TOLD_EVERY = 30.0  # seconds between lines on the terminal
# What every kept sample depends on: another value needs another folder.
FIXED = (
    *("model", "temperature", "top_p", "max_new_tokens", "template", "system_prompt", "end_tokens", "instruction"),
    *("dtype", "seed"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is evaluated and how; the defaults are those of DeepSeek-R1's tables where they say something.

    Attributes:
      model: whatever `model.path` takes.
      sets: 'NAME=PLACE' each, as `data.benchmarks` reads them; 'held_out' and 'train' are a run's own rows.
      samples: completions a problem (k); 0: the set's own number.
      problems: the first so many problems of each set; 0: all.
      greedy: also one completion a problem at temperature 0.
      temperature: of the samples.
      top_p: of the samples.
      max_new_tokens: tokens of a completion.
      template: as text.template; empty: the run's, else the model's own, else 'plain'.
      system_prompt: before each prompt; empty: the run's, else none.
      end_tokens: tokens that end a completion; empty: the run's, else the model's own.
      instruction: whether prompts say how to answer: yes, no, or auto: with a chat template and no system prompt.
      language: that completions should be in.
      batch_size: completions at once.
      dtype: of weights, activations and cache.
      seed: names the samples.
      mesh: how the model is split over devices.
      distributed: how several processes hear of each other.
      code: of problems that are programs.
      judge: a server that grades problems which no rule can.
      model_judge: a model in this process that does so.
      rescore: grade kept completions anew.
    """

    model: str
    sets: tuple[str, ...] = ()
    samples: int = 0
    problems: int = 0
    greedy: bool = True
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 2048
    template: str = ""
    system_prompt: str = ""
    end_tokens: tuple[str, ...] = ()
    instruction: str = "auto"
    language: str = "en"
    batch_size: int = 64
    dtype: str = "float32"
    seed: int = 0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    code: CodeConfig = dataclasses.field(default_factory=CodeConfig)
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    model_judge: ModelJudgeConfig = dataclasses.field(default_factory=ModelJudgeConfig)
    rescore: bool = False


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """A set that was read: its name, how papers call it, its problems, completions a problem."""

    name: str
    title: str
    problems: list[dict[str, Any]]
    samples: int


def run(settings: Settings, workdir: pathlib.Path, terminal: Terminal | None = None) -> dict[str, Any]:
    """Draws and grades what `workdir` does not hold yet, writes summary.json and reports; returns the summary.

    The summary is {'model', 'settings', 'sets': {name: scores}}. Each set's folder keeps samples.jsonl. Raises
    InputError before anything is sampled, and Stopped between batches when the process is asked to end.
    """
    terminal = terminal or open_terminal()
    settings, run_config = resolved(settings)
    sets = read_sets(settings, run_config)
    grader = open_grader(settings)
    try:
        for each in sets:
            grader.check(each.problems, f"{FIELD} {each.name}")
            check_folder(workdir / each.name, settings)
        model = load_model(settings.model)
        with Stop(None) as stop, terminal:
            drawer = Drawer(settings, model, stop, terminal)
            found = {each.name: _evaluate(each, drawer, grader, workdir / each.name) for each in sets}

            def finish() -> dict[str, Any]:
                summary = {"model": settings.model, "settings": plain(settings), "sets": found}
                write_json_atomic(workdir / "summary.json", summary)
                write_reports(workdir, summary)
                return summary

            summary = processes.on_first(finish)
    finally:
        grader.close()
    for headings, rows in (table(found), pass_at_k_table(found)):
        terminal.table(headings, rows)
    terminal.say(f"{workdir / 'report.html'}, report.md, summary.json; completions in each set's samples.jsonl")
    return summary


def resolved(settings: Settings) -> tuple[Settings, Config | None]:
    """Settings with a run's template and newest checkpoint filled in, and the run's config; raises InputError."""
    _check(settings)
    checkpoint = find_checkpoint(settings.model)
    if checkpoint is None:
        return settings, None
    config = from_dict(checkpoint.config, f"{settings.model}: config.json")
    own = settings.template == ""
    return dataclasses.replace(
        settings,
        model=str(checkpoint.folder),
        template=settings.template or config.text.template,
        system_prompt=settings.system_prompt or (config.text.system_prompt if own else ""),
        end_tokens=settings.end_tokens or config.text.end_tokens,
    ), config


def read_sets(settings: Settings, run_config: Config | None = None) -> list[ProblemSet]:
    """The sets that are asked for, in order; of a run without any, its held-out rows."""
    asked = settings.sets or (("held_out",) if run_config else ())
    if not asked:
        raise InputError(f"{FIELD}: name a set: {', '.join(BENCHMARKS)}, such as {FIELD} gsm8k=test.jsonl")
    found = []
    for item in asked:
        name, _, where = item.partition("=")
        if name in OWN_ROWS:
            made = ProblemSet(name, f"{name} rows", _own_rows(name, settings, run_config), 4)
        else:
            benchmark = benchmark_named(name)
            problems = read_benchmark(name, where, settings.problems)
            label = pathlib.Path(where).stem if name == "jsonl" else name
            made = ProblemSet(label, label if name == "jsonl" else benchmark.title, problems, benchmark.samples)
        if made.name in [each.name for each in found]:
            raise InputError(f"{FIELD} {item}: there is a set {made.name!r} already: name each once")
        found.append(dataclasses.replace(made, samples=settings.samples or made.samples))
    return found


def _own_rows(name: str, settings: Settings, config: Config | None) -> list[dict[str, Any]]:
    if config is None or config.data.source == "memory":
        raise InputError(f"{FIELD} {name}: needs a run whose rows lie on disk as --model: name another set")
    rows = load_all_rows(config.data, OWN_ROWS[name], config.seed)
    rows = [row for row in rows if row.get("tests") or row["answer"] or row.get("judge")][: settings.problems or None]
    problems = []
    for number, row in enumerate(rows):
        own = row.get("kind") if row.get("kind") in ("choice", "exact") else "math"
        kind, column = ("code", "tests") if row.get("tests") else (own, "answer")
        kept = {name: row[name] for name in ("prompt", column, "language") if name in row}
        problems.append({"id": str(number), "kind": "judge" if row.get("judge") else kind, **kept})
    return problems


def open_grader(settings: Settings) -> Grader:
    """What grades completions of these settings; raises InputError for a judge that cannot be used."""
    return Grader(settings.code, judge=open_judge(settings.judge, settings.model_judge))


def _check(settings: Settings) -> None:
    least = {"samples": 0, "problems": 0, "max_new_tokens": 1, "batch_size": 1}
    for name, bound in least.items():
        if getattr(settings, name) < bound:
            raise InputError(f"--{name} {getattr(settings, name)}: must be at least {bound}")
    if settings.temperature < 0 or not 0 < settings.top_p <= 1:
        given = f"--temperature {settings.temperature} --top_p {settings.top_p}"
        raise InputError(f"{given}: must be at least 0, and above 0 up to 1")
    if settings.language not in SCRIPTS:
        raise InputError(f"--language {settings.language}: is not one of {', '.join(sorted(SCRIPTS))}")
    for name, known in (("dtype", ("float32", "bfloat16")), ("instruction", ("auto", "yes", "no"))):
        if getattr(settings, name) not in known:
            raise InputError(f"--{name} {getattr(settings, name)}: is not one of {', '.join(known)}")


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def check_folder(folder: pathlib.Path, settings: Settings) -> None:
    """Raises InputError when a folder keeps samples that were drawn otherwise; process 0 looks."""
    processes.on_first(lambda: _check_folder(folder, settings))


def _check_folder(folder: pathlib.Path, settings: Settings) -> None:
    path = folder / "settings.json"
    if not path.is_file():
        return
    held, asked = json.loads(path.read_text("utf-8")), plain(settings)
    for name in FIXED:
        if held.get(name) != asked[name]:
            raise InputError(
                f"{folder}: holds samples with {name}={held.get(name)!r}, this asks for {asked[name]!r}: name another "
                "--workdir"
            )


def _evaluate(each: ProblemSet, drawer: "Drawer", grader: Grader, folder: pathlib.Path) -> dict[str, Any]:
    """The scores of a set, after what its folder lacks has been drawn."""
    records = drawer.complete(each, grader, folder)

    def scored() -> dict[str, Any]:
        kind = each.problems[0]["kind"]
        scores = {"title": each.title, "kind": kind, **scores_of(each.problems, records, grader.same)}
        write_json_atomic(folder / "summary.json", scores)
        return scores

    return processes.on_first(scored)


class Drawer:
    """Draws completions of problems, grades and keeps them; the model goes to the devices when it is first needed.

    Of several processes each grades the completions of its own devices, and the first one keeps them all.
    """

    def __init__(self, settings: Settings, model: LoadedModel, stop: Stop, terminal: Terminal):
        self.settings, self.model, self.stop, self.terminal = settings, model, stop, terminal
        self.text = text_config(settings, model.tokenizer)
        self.tokenizer = model.tokenizer.with_end_tokens(self.text.end_tokens)
        if not self.tokenizer.end_ids:
            raise InputError("--end_token: the model names no end token: name one")
        chat = self.text.template == "chat" and not self.text.system_prompt
        self.instructed = settings.instruction == "yes" or (settings.instruction == "auto" and chat)

    def complete(self, each: ProblemSet, grader: Grader, folder: pathlib.Path) -> list[dict[str, Any]]:
        """Records of all samples of a set, sorted: those that the folder keeps, and the others drawn now."""
        prompts = self.asked(each.problems)
        digests = [hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()[:16] for ids in prompts.tokens]
        kept = processes.on_first(lambda: self._kept(folder, each, digests, grader))
        have = {key(record) for record in kept}
        opened = [opens_thinking(self.tokenizer.decode(ids.tolist(), skip_special=False)) for ids in prompts.tokens]
        for batch in self._draw_missing(each, prompts, have):
            for record in batch:
                record["prompt"] = digests[record["problem"]]
                record["opened"] = opened[record["problem"]]
            graded = [record for own in processes.exchange(self._graded_here(each, batch, grader)) for record in own]
            kept += sorted(graded, key=_place_of)
            if processes.first():
                with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in sorted(graded, key=_place_of)))
        wanted = range(len(each.problems))
        mine = (r for r in kept if r["problem"] in wanted and (r["sample"] is None or r["sample"] < each.samples))
        return sorted(mine, key=_place_of)

    def _graded_here(self, each: ProblemSet, records: list[dict[str, Any]], grader: Grader) -> list[dict[str, Any]]:
        """The records of this process, graded; an InputError of any process is raised by all."""
        graded, error = [], None
        try:
            graded = self._graded(each, records, grader)
        except InputError as found:
            error = found
        processes.raise_any(error)
        return graded

    def asked(self, problems: Sequence[Mapping[str, Any]]) -> PromptSet:
        """The problems' prompts, instruction included, and their tokens."""
        rows = [{"prompt": with_instruction(p) if self.instructed else p["prompt"]} for p in problems]
        limit = 2**31 - 1  # the longest one decides how wide they are padded
        return build_prompt_set(
            rows, lambda prompt: encode_prompt(prompt, self.text, self.tokenizer), limit, lambda _: {}
        )

    def _kept(
        self, folder: pathlib.Path, each: ProblemSet, digests: Sequence[str], grader: Grader
    ) -> list[dict[str, Any]]:
        """Records that the folder keeps, each once; graded anew on request."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / "settings.json", plain(self.settings))
        path = folder / "samples.jsonl"
        rows = {key(record): record for record in read_jsonl(path)} if path.is_file() else {}
        for record in rows.values():
            number = record["problem"]
            if number < len(digests) and record["prompt"] != digests[number]:
                raise InputError(f"{path}: problem {number} had another prompt: name another --workdir")
        kept = list(rows.values())
        if self.settings.rescore:
            mine = [record for record in kept if record["problem"] < len(each.problems)]
            kept = self._graded(each, mine, grader) + [r for r in kept if r["problem"] >= len(each.problems)]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        if not path.is_file() or text.encode() != path.read_bytes():  # a torn last line, or new grades
            write_atomic(path, text)
        return kept

    def _graded(self, each: ProblemSet, records: list[dict[str, Any]], grader: Grader) -> list[dict[str, Any]]:
        problems = [each.problems[record["problem"]] for record in records]
        texts = [record["completion"] for record in records]
        grades = grader.grade(problems, texts, [record["ended"] for record in records])
        pairs = zip(records, problems, grades, strict=True)
        return [self._record(record, problem, grade) for record, problem, grade in pairs]

    def _record(self, record: dict[str, Any], problem: Mapping[str, Any], grade: Grade) -> dict[str, Any]:
        text = record["completion"]
        fault = thought_and_answer_fault(("<think>" if record["opened"] else "") + text)
        language = problem.get("language", self.settings.language)
        graded = dataclasses.asdict(grade)
        record = {name: value for name, value in record.items() if name != "analysis"}
        if not grade.analysis:  # only a judge gives one
            del graded["analysis"]
        return {
            **record,
            "id": problem["id"],
            "question": question_of(problem["prompt"]),
            **graded,
            "format": float(not fault),
            "language": language_share(text, language if language in SCRIPTS else self.settings.language),
        }

    def _draw_missing(
        self, each: ProblemSet, prompts: PromptSet, have: set[tuple[int, int | None]]
    ) -> Iterator[list[dict[str, Any]]]:
        """Batches of this process' records that are not there yet: samples by chunks, then greedy ones."""
        s, numbers = self.settings, range(len(each.problems))
        jobs: list[tuple[int, int, float, list[int]]] = []  # first sample, how many, temperature, problems
        for first in range(0, each.samples, CHUNK):
            count = min(CHUNK, each.samples - first)
            lacking = [n for n in numbers if any((n, first + i) not in have for i in range(count))]
            jobs.append((first, count, s.temperature, lacking))
        if s.greedy:
            jobs.append((-1, 1, 0.0, [n for n in numbers if (n, None) not in have]))
        jobs = [job for job in jobs if job[3]]
        if not jobs:
            return
        evaluator = self._evaluator(prompts)
        told = Progress(self.terminal, each.name, sum(count * len(lacking) for _, count, _, lacking in jobs))
        for first, count, temperature, lacking in jobs:
            batches = make_row_batches(
                prompts,
                lacking,
                evaluator.problems_at_once(s.batch_size, count),
                evaluator.parts.config.data.max_prompt_length,
            )
            step = max(first, 0) // CHUNK
            between = functools.partial(self.stop.check, f"while evaluating {each.name}; all samples are kept")
            rollouts = evaluator.rollouts(self._ready, batches, count, temperature, s.top_p, step, between)
            for batch in self._records(rollouts, first, count, told):
                yield [record for record in batch if key(record) not in have]

    def _records(
        self, rollouts: Iterator[Any], first: int, count: int, told: "Progress"
    ) -> Iterator[list[dict[str, Any]]]:
        """What was drawn on this process' devices, a list a batch; `seconds` is a share of the batch's time."""
        fetch, mark = Fetcher(), time.perf_counter()
        for batch, _, rollout in rollouts:
            tokens, lengths, ended = fetch((rollout.tokens, rollout.lengths, rollout.ended))
            now = time.perf_counter()
            real = int((batch.weight > 0).sum())
            share, mark = (now - mark) / (real * count), now
            told.add(real * count, int(lengths[: real * count].sum()))
            yield [
                {
                    "problem": int(batch.row[i // count]),
                    "sample": None if first < 0 else first + i % count,
                    "completion": self.tokenizer.decode(tokens[i, : lengths[i]].tolist()),
                    "length": int(lengths[i]),
                    "ended": bool(ended[i]),
                    "seconds": round(share, 6),
                }
                for i in scored_rows(len(lengths), self._mesh).tolist()
                if i < real * count
            ]
            mark = time.perf_counter()  # grading is not sampling

    def _evaluator(self, prompts: PromptSet) -> Evaluator:
        """An evaluator over prompts of this width; its programs are compiled when they are first called."""
        longest = max(len(ids) for ids in prompts.tokens)
        width = max(NARROWEST, 1 << (longest - 1).bit_length())
        config = dataclasses.replace(self._config, data=dataclasses.replace(self._config.data, max_prompt_length=width))
        module = Decoder(self.model.architecture, dtype=jnp.dtype(self.settings.dtype), mesh=self._mesh)
        unused = make_optimizer(config.optim, 1), make_schedule(config.optim, 1)
        scorer = Scorer((), (), byte_table([b""]), None, self._mesh, {})
        parts = StepParts(config, module, *unused, scorer, self._mesh, self.tokenizer.end_ids)
        return Evaluator(parts, prompts, scorer, self.tokenizer)

    @functools.cached_property
    def _config(self) -> Config:
        s, dtype = self.settings, self.settings.dtype
        return dataclasses.replace(
            Config(),
            seed=s.seed,
            model=ModelConfig(path=s.model, compute_dtype=dtype, matmul_precision=_precision(dtype)),
            sampler=SamplerConfig(max_new_tokens=s.max_new_tokens, cache_dtype=dtype),
            mesh=s.mesh,
        )

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return make_mesh(self.settings.mesh, jax.devices())

    @functools.cached_property
    def _ready(self) -> Any:
        """Parameters as sampling wants them, for all sets."""
        self.terminal.say(f"{self.settings.model}: on {self._mesh.size} {jax.devices()[0].device_kind}")
        placed = {"params": place(self.model.params, self._mesh, jnp.dtype(self.settings.dtype))}
        none = PromptSet((), (np.zeros(1, np.int32),), {})
        return self._evaluator(none).ready(placed)


def question_of(prompt: Any) -> str:
    """What a prompt says last, for a reader."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def key(record: Mapping[str, Any]) -> tuple[int, int | None]:
    """(problem, sample) of a record; the sample of a greedy one is None."""
    return record["problem"], record["sample"]


def _place_of(record: Mapping[str, Any]) -> tuple[int, bool, int]:
    return record["problem"], record["sample"] is None, record["sample"] or 0


def text_config(settings: Settings, tokenizer: Tokenizer) -> TextConfig:
    """How prompts are put to the model."""
    template = settings.template or ("chat" if tokenizer.chat_template else "plain")
    return TextConfig(template, settings.system_prompt, tuple(settings.end_tokens))


def _precision(dtype: str) -> str:
    return "highest" if dtype == "float32" else "default"


class Progress:
    """Says every half minute, and at the end, how much is drawn and how fast."""

    def __init__(self, terminal: Terminal, name: str, total: int):
        self._terminal, self._name, self._total = terminal, name, total
        self._start = self._told = time.monotonic()
        self._done = self._tokens = 0

    def add(self, completions: int, tokens: int) -> None:
        """Counts a batch of all processes."""
        self._done += completions
        self._tokens += tokens
        now = time.monotonic()
        if now - self._told > TOLD_EVERY or self._done == self._total:
            speed = self._tokens / max(now - self._start, 1e-9)
            self._terminal.say(f"{self._name}: {self._done} of {self._total} completions, {speed:,.0f} tokens/s")
            self._told = now
