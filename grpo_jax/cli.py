"""The command line: `grpo-jax train --config arithmetic --config.optim.lr=1e-4 --workdir runs/a`."""

import argparse
import ast
import dataclasses
import difflib
import functools
import gc
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from grpo_jax import config as configs
from grpo_jax.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done (or stopped and saved), 1 not fit or not well, 2 bad input."""
    gc.set_threshold(50_000, 20, 100)  # tracing makes many objects and little garbage: a tenth of it went to looking
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        end = arguments.index("--") if "--" in arguments else len(arguments)
        (own, overrides), started = split_arguments(arguments[:end]), arguments[end + 1 :]
        options = parse(own)
        if started and own[0] != "launch":
            raise InputError(f"--: {own[0]} starts no other command: leave it out")
        return options.run(options, started or overrides)
    except InputError as error:
        print(f"grpo-jax: {error}", file=sys.stderr)
        return 2


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and those that start with --config."""
    own, overrides, rest = [], [], list(arguments)
    while rest:
        item = rest.pop(0)
        if item == "--config" or item.startswith(("--config=", "--config.")):
            overrides.append(item)
            if "=" not in item and rest and not rest[0].startswith("--"):
                overrides.append(rest.pop(0))
        else:
            own.append(item)
    return own, overrides


def load_config(overrides: list[str], default: str = "arithmetic") -> tuple[str, configs.Config]:
    """Name and config from `--config NAME` and `--config.field=value`; raises InputError naming the nearest field."""
    given = _joined(overrides)
    path = _config_path(overrides, default)
    known = set(configs.field_names())
    fields, lists = [], {}
    for item in given:
        if not item.startswith("--config."):
            continue
        name, equals, value = item.removeprefix("--config.").partition("=")
        if sections := configs.list_around(name):
            lists[name] = _sections(name, sections, value)
            continue
        fields.append(item)
        if name not in known:
            raise configs.unknown_field("--config", name)
        if not equals:
            raise InputError(f"--config.{name}: has no value; write --config.{name}=VALUE")
    holder: Any = flags.FlagValues()
    given_config = configs.read_config_file(path)
    command = ["grpo-jax", *fields]
    config_flags.DEFINE_config_dict("config", given_config, flag_values=holder, sys_argv=command)
    try:
        holder(command)
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(f"--config: {error}") from error
    for name, value in lists.items():
        section, _, leaf = name.rpartition(".")
        setattr(functools.reduce(getattr, section.split("."), holder.config), leaf, value)
    return path.stem, configs.from_dict(holder.config, str(path))


def _sections(name: str, sections: str, text: str) -> tuple[Any, ...]:
    """A list of sections as the command line gives it: `--config.data.sets="[{'name': 'a', 'path': 'a.jsonl'}]"`."""
    try:
        value = ast.literal_eval(text) if name == sections else None
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, list | tuple):
        raise InputError(
            f"--config.{name}: {sections} is a list of sections: set it in a config file, or give all of it, "
            f"--config.{sections}=\"[{{'name': 'a', 'path': 'a.jsonl'}}]\""
        )
    return tuple(value)


def _joined(overrides: list[str]) -> list[str]:
    """The arguments that start with --config, each with its value behind an equals sign."""
    given: list[str] = []
    for item in overrides:
        if item.startswith("--config"):
            given.append(item)
        else:
            given[-1] += f"={item}"
    return given


def _config_path(overrides: list[str], default: str = "arithmetic") -> pathlib.Path:
    """The file that `--config NAME` names; the last one counts."""
    given = _joined(overrides)
    if "--config" in given:
        raise InputError("--config: has no value; write --config NAME or --config FILE.py")
    names = [item.split("=", 1)[1] for item in given if item.startswith("--config=")]
    return configs.config_file(names[-1] if names else default)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors: one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raises what main prints."""
        raise InputError(f"{message}; see {self.prog} --help")


def parse(own: list[str]) -> argparse.Namespace:
    """Our own arguments, read; raises InputError naming the nearest command or option."""
    top = parser()
    known = commands_of(top)
    for item in own[:1]:
        if not item.startswith("-") and item not in known:
            raise InputError(f"{item}: no such command; there are: {', '.join(known)}{_nearest(item, known)}")
    options, unknown = top.parse_known_args(own)
    if unknown:
        name = unknown[0].partition("=")[0]
        command = next((item for item in own if item in known), "")
        options_of = [flag for action in known[command]._actions for flag in action.option_strings]
        fields = [f"--config.{field}" for field in configs.field_names()]
        near = _nearest(name, [*options_of, "--config", *fields])
        if not name.startswith("-"):
            near = f"; did you mean --config {name}?"
        raise InputError(f"{name}: {command} has no such option{near}; see grpo-jax {command} --help")
    return options


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = Parser(
        prog="grpo-jax", description="GRPO in JAX: a training step is one compiled program.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"grpo-jax {_version()}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    for name, run, text in (
        ("train", run_train, "train by GRPO; the same command again goes on where it stopped"),
        ("sft", functools.partial(run_recipe, "sft"), "fine-tune model.path on a JSONL file of chats (sft.path)"),
        ("dpo", functools.partial(run_recipe, "dpo"), "train model.path on a JSONL file of preferences (dpo.path)"),
        ("sweep", run_sweep, "train the configs of a sweep, all seeds of each in one program"),
        (
            "tasks",
            functools.partial(run_recipe, "tasks"),
            "write the generated tasks of data.path (data.source='tasks') as JSONL files",
        ),
        (
            "base",
            functools.partial(run_recipe, "base"),
            "make the small base model of a config that names none (model.path='')",
        ),
    ):
        made = command(name, run, f"{text}. --config NAME or FILE, --config.field=value")
        made.add_argument("--workdir", help="folder of the run (default: runs/<config name>)")
        made.add_argument("--time_budget", default="", help="end cleanly after this long: 55m, 2h, 300s")
        _add_place(made)
        if name == "sweep":
            made.add_argument("--only", default="", help="names of the configs to train, with commas; the others wait")
        if name == "train":
            made.add_argument(
                "--dry_run", action="store_true", help="print batch arithmetic and parameters, compile nothing"
            )
    made = command(
        "reward-model",
        run_reward_model,
        "train a reward model from model.path on preferences (reward_model.path). --config NAME or FILE, "
        "--config.field=value",
    )
    made.add_argument("action", choices=("train",), help="what to do with it")
    made.add_argument("--workdir", help="folder of the run (default: runs/<config name>_reward_model)")
    made.add_argument("--time_budget", default="", help="end cleanly after this long: 55m, 2h, 300s")
    _add_place(made)
    made = command(
        "launch", run_launch, "start a command as several processes of this machine: launch ... -- train ..."
    )
    made.add_argument("--processes", type=int, required=True, help="processes to start here; with GPUs one for each")
    made.add_argument("--nodes", type=int, default=1, help="machines on which this command is given (default: 1)")
    made.add_argument("--node", type=int, default=0, help="number of this machine, from 0 (default: 0)")
    made.add_argument("--coordinator", default="", help="HOST:PORT of machine 0 (default: a free port here)")
    made.add_argument("--restarts", type=int, default=0, help="times to start all anew after a loss (default: 0)")
    made = command("pipeline", run_pipeline, "run the stages of a recipe, one after another. --config NAME or FILE")
    add_pipeline_options(made)
    made = command("sample", run_sample, "print completions of a model, drawn by the sampler of training")
    made.add_argument("--model", required=True, help="folder, .gguf file, run, checkpoint, Hub id, or smollm2-135m")
    made.add_argument("--prompt", required=True, action="append", help="text of a user's message; may be given again")
    made.add_argument("-n", type=int, default=1, help="completions a prompt (default: 1)")
    made.add_argument("--max_new_tokens", type=int, default=256, help="tokens a completion may have (default: 256)")
    made.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    made.add_argument("--top_k", type=int, default=0, help="draw among the k likeliest tokens (default: all)")
    made.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest of this mass (default: 1)")
    made.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts (default: 0)")
    made.add_argument("--template", default="", help="as text.template (default: the model's own chat template)")
    made.add_argument("--system_prompt", default="", help="system message before each prompt")
    made.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: float32)")
    made = command("eval", run_eval, "score a model, or what a run has trained, on evaluation sets")
    add_eval_options(made)
    made = command("reject", run_reject, "keep right and readable samples of a model as chats that sft learns from")
    add_reject_options(made)
    made = command("mix", run_mix, "put files of chats together in given proportions, such as 3 of reasoning to 1")
    add_mix_options(made)
    made = command(
        "plan",
        run_plan,
        "print by formula what a model costs (--model), or what a config needs of a machine (--config, --devices)",
    )
    made.add_argument("--model", default="", help="name of a preset, such as Qwen2.5-7B, or its Hub id")
    made.add_argument("--context", type=int, default=1024, help="tokens that a token sees (default: 1024)")
    made.add_argument("--rank", type=int, default=16, help="rank of adapters (default: 16)")
    made.add_argument("--devices", default="", help="machine, such as v5e:16, v5p:2x2x2 or h100:8")
    made = command(
        "compile",
        run_compile,
        "compile the step of a config for a machine that need not be there: memory, collectives, roofline time; exit "
        "code 1 when it does not fit. --config NAME or FILE, --config.field=value",
    )
    made.add_argument("--topology", required=True, help="v5e:4x4, v5p:2x2x2, 2*v5e:4x4 (two slices), h100:8")
    made.add_argument("--model", default="", help="a preset's architecture in place of the config's model")
    made.add_argument("--json", action="store_true", help="print one JSON line")
    made.add_argument("--hlo", default="", metavar="FILE", help="write the compiled program's text there")
    made = command("doctor", run_doctor, "check this machine: versions, devices, speed, sampler, caches, sandbox")
    made.add_argument("--expect", default="", help="devices there should be: tpu:8, gpu:1, cpu (default: no CPU alone)")
    made = command("export", run_export, "write a Hugging Face folder of a model, or of what a run has trained")
    made.add_argument("source", help="a run, one of its checkpoints, or a model as model.path names it")
    made.add_argument("folder", help="folder to write")
    made.add_argument("--dtype", default="", choices=["float32", "bfloat16", "float16"], help="default: as it is kept")
    made.add_argument("--max_shard", type=float, default=5.0, help="gigabytes of a file, at most (default 5)")
    made = command("rewards", run_rewards, "try the rewards of a config before a run. --config NAME or FILE")
    made.add_argument("--completions", metavar="FILE.jsonl", help="show what each reward gives to these, and why")
    made.add_argument("--probe", metavar="N", type=int, default=0, help="sample N prompts and show how often they pass")
    made.add_argument("--workdir", help="where --probe makes a model that the run would make (default: nowhere)")
    made = command("report", run_report, "write report.html from what a run has left")
    made.add_argument("workdir", help="folder of the run")
    return top


def commands_of(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, by name."""
    return next(dict(a.choices) for a in top._actions if isinstance(a, argparse._SubParsersAction))


def run_train(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax train`."""
    name, config = _config(options, overrides)
    workdir = pathlib.Path(options.workdir or f"runs/{name}")
    if options.dry_run:
        from grpo_jax.recipes.dry_run import dry_run

        dry_run(config)
        return 0
    _set_up_jax(config, options)
    from grpo_jax.recipes.grpo import run

    return _until_stopped(run, config, workdir)


def run_recipe(recipe: str, options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax sft`, `dpo`, `base` and `tasks`: the `run` of that recipe."""
    name, config = _config(options, overrides)
    _set_up_jax(config, options)
    run = importlib.import_module(f"grpo_jax.recipes.{recipe}").run
    return _until_stopped(run, config, pathlib.Path(options.workdir or f"runs/{name}_{recipe}"))


def run_sweep(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax sweep`."""
    name, config = _config(options, overrides)
    _set_up_jax(config, options)
    from grpo_jax.recipes.sweep import chosen_configs, read_sweep, run

    sweep = read_sweep(_config_path(overrides), config)
    only = tuple(options.only.split(",")) if options.only else ()
    workdir = pathlib.Path(options.workdir or f"runs/{name}")
    return _until_stopped(functools.partial(run, sweep=chosen_configs(sweep, only)), config, workdir)


def _until_stopped(run: Callable[..., Any], config: Any, workdir: pathlib.Path) -> int:
    """Runs a recipe as one of the processes of its job, if there are several, and leaves them as `run` ended."""
    from grpo_jax import processes
    from grpo_jax.recipes.loop import Stopped

    try:
        run(config, workdir)
    except Stopped as stopped:
        if processes.first():
            print(f"{stopped}. Run the same command again to go on.")
    except InputError as error:
        if not processes.several():
            raise
        print(f"grpo-jax: process {processes.number()}: {error}", file=sys.stderr)
        processes.give_up(2)
    except Exception:
        if not processes.several():
            raise
        processes.give_up(1, config.distributed.heartbeat_timeout)
    processes.part()
    return 0


def add_pipeline_options(made: argparse.ArgumentParser) -> None:
    """Options of `pipeline`."""
    add = made.add_argument
    add("--workdir", help="folder of all stages (default: runs/<config name>)")
    add("--from", default="", dest="first", metavar="STAGE", help="the first stage (default: the recipe's)")
    add("--to", default="", dest="last", metavar="STAGE", help="the last stage (default: the recipe's)")
    add("--only", default="", metavar="STAGE", help="this stage alone")
    add("--again", action="store_true", help="make these stages anew; what they had made is moved to `replaced`")
    add("--dry_run", action="store_true", help="check and print each stage's command, run nothing")
    add("--time_budget", default="", help="end cleanly after this long: 55m, 2h, 300s")


def run_pipeline(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax pipeline`."""
    began = time.monotonic()
    budget, options.time_budget = options.time_budget, ""  # of all stages, not of each
    name, config = _config(options, overrides)
    from grpo_jax.pipeline import check_commands, chosen_stages, dry_run, read_pipeline, run

    fields = [item for item in _joined(overrides) if item.startswith("--config.")]
    pipeline = read_pipeline(_config_path(overrides), config, fields)
    chosen = chosen_stages(pipeline, options.first, options.last, options.only)
    workdir = pathlib.Path(options.workdir or f"runs/{name}")
    if options.dry_run:
        dry_run(pipeline, workdir, check_command)
        return 0
    check_commands(pipeline, workdir, check_command)
    until = began + configs.parse_duration(budget, "--time_budget") if budget else math.inf
    run(pipeline, workdir, chosen, options.again, until)
    return 0


def check_command(words: list[str]) -> None:
    """Raises InputError where a command's options or its config cannot be read."""
    own, overrides = split_arguments(words)
    parse(own)
    if overrides:
        load_config(overrides)


LAUNCHED = ("train", "sft", "dpo", "sweep", "reward-model", "eval", "reject")  # what several processes can do as one


def run_launch(options: argparse.Namespace, command: list[str]) -> int:
    """`grpo-jax launch`."""
    from grpo_jax.launcher import launch

    if not command or command[0] not in LAUNCHED:
        raise InputError("launch: what is to be started comes after --: grpo-jax launch --processes 8 -- train ...")
    given = (options.processes, options.nodes, options.node, options.coordinator, options.restarts)
    return launch([sys.executable, "-m", "grpo_jax.cli", *command], *given, dict(os.environ))


def run_reward_model(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax reward-model train`."""
    name, config = _config(options, overrides)
    _set_up_jax(config, options)
    from grpo_jax import processes
    from grpo_jax.recipes.reward_model import run

    def train(config: configs.Config, workdir: pathlib.Path) -> None:
        folder = run(config, workdir)
        if processes.first():
            print(folder)

    return _until_stopped(train, config, pathlib.Path(options.workdir or f"runs/{name}_reward_model"))


def run_sample(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax sample`."""
    if overrides:
        raise InputError(f"{overrides[0]}: sample has options of its own: see grpo-jax sample --help")
    _set_up_jax(configs.Config())
    from grpo_jax.generate import load

    names = ("n", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "template", "system_prompt")
    texts = load(options.model, options.dtype).generate(options.prompt, **{name: vars(options)[name] for name in names})
    for prompt, completions in zip(options.prompt, texts, strict=True):
        for number, text in enumerate(completions, start=1):
            print(f"--- {prompt} ({number} of {options.n})\n{text}")
    return 0


def add_drawing_options(made: argparse.ArgumentParser, temperature: float, top_p: float) -> None:
    """Options that `eval` and `reject` share: the model, the prompts, how completions are drawn and graded."""
    add = made.add_argument
    add("--model", required=True, help="folder, .gguf file, run, checkpoint, Hub id, or smollm2-135m")
    places = "aime_2024, math_500, gsm8k, gpqa_diamond, live_code_bench, human_eval, if_eval or jsonl, and its file, "
    places += "folder or tfds:NAME; held_out, train: a run's own rows; may be given again"
    add("--set", action="append", default=[], metavar="NAME=PLACE", dest="sets", help=places)
    add("--problems", type=int, default=0, help="the first so many of each set (default: all)")
    add("--temperature", type=float, default=temperature, help=f"of the samples (default: {temperature})")
    add("--top_p", type=float, default=top_p, help=f"of the samples (default: {top_p})")
    add("--max_new_tokens", type=int, default=2048, help="tokens a completion may have (default: 2048)")
    add("--template", default="", help="as text.template (default: the run's, or the model's own)")
    add("--system_prompt", default="", help="system message before each prompt (default: the run's)")
    add("--end_token", action="append", default=[], help="a token that ends a completion; may be given again")
    add("--instruction", default="auto", help="prompts say how to answer: yes, no, auto (with a chat template alone)")
    add("--language", default="en", help="that completions should be in, as an ISO 639-1 code (default: en)")
    add("--batch_size", type=int, default=64, help="completions at once (default: 64)")
    add("--dtype", default="float32", help="float32 or bfloat16 (default: float32)")
    add("--seed", type=int, default=0, help="names the samples (default: 0)")
    add("--fsdp", type=int, default=1, help="devices that parameters are split over (default: 1)")
    add("--tensor", type=int, default=1, help="devices that each layer is split over (default: 1)")
    add("--sandbox", default="bubblewrap", choices=("bubblewrap", "monty"), help="where programs run")
    add("--expert", type=int, default=1, help="devices that the experts of routed layers are split over (default: 1)")
    add("--rescore", action="store_true", help="grade the kept completions anew")
    _add_place(made)
    add_judge_options(made)


def add_judge_options(made: argparse.ArgumentParser) -> None:
    """Options of the judge that grades rows where rules do not apply: without an answer, or with a column judge."""
    add = made.add_argument
    add("--judge_url", default="", help="grades rows that rules cannot: API of a server, http://localhost:8000/v1")
    add("--judge_model", default="", help="the model's name on that server")
    add("--judge_key_file", default="", help="file that holds the server's API key")
    add("--judge_cache", default="", help="JSONL file of verdicts, read first and added to")
    add("--judge_timeout", type=float, default=30.0, help="seconds that one request may take (default: 30)")
    add("--judge_folder", default="", help="in place of a server: a model in this process, as --model takes it")
    add("--judge_prompt", default="", help="file with another prompt to the judge: {prompt}, {answer}, {completion}")


def judges_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the options of a judge make of Settings."""
    given = {name: getattr(options, f"judge_{name}") for name in ("url", "model", "key_file", "cache", "timeout")}
    prompts = {"prompt": options.judge_prompt}
    return {
        "judge": configs.JudgeConfig(**given, **(prompts if options.judge_url else {})),
        "model_judge": configs.ModelJudgeConfig(options.judge_folder, **(prompts if options.judge_folder else {})),
    }


def add_eval_options(made: argparse.ArgumentParser) -> None:
    """Options of `eval`."""
    add_drawing_options(made, 0.6, 0.95)
    add = made.add_argument
    add("--workdir", help="folder of samples and report (default: runs/eval_<model>)")
    add("--samples", type=int, default=0, help="completions a problem (default: the set's, as in DeepSeek-R1's paper)")
    add("--no_greedy", action="store_true", help="leave out the greedy completions")


def add_reject_options(made: argparse.ArgumentParser) -> None:
    """Options of `reject`."""
    add_drawing_options(made, 1.0, 1.0)
    add = made.add_argument
    add("--workdir", help="folder of samples and chats.jsonl (default: runs/reject_<model>)")
    add("--samples", type=int, default=8, help="completions a prompt (default: 8)")
    add("--most", type=int, default=4, help="chats kept of a prompt; 0: all (default: 4)")
    add("--format", default="none", help="completions must be: think_answer, answer, none (default)")
    add("--language_share", type=float, default=0.95, help="least share of words in --language (default: 0.95)")
    add("--repetition", type=float, default=0.4, help="most share of repeated n-grams of words (default: 0.4)")
    add("--least_length", type=int, default=0, help="tokens at least (default: 0)")
    add("--most_length", type=int, default=0, help="tokens at most; 0: any (default)")
    add("--paragraph_words", type=int, default=300, help="words of a paragraph at most; 0: any (default: 300)")
    add("--code_blocks", action="store_true", help="fenced code may stay")
    add("--similarity", type=float, default=0.8, help="near duplicates share so many trigrams (default: 0.8)")
    add("--against", action="append", default=[], metavar="NAME=PLACE", help="an evaluation set to decontaminate from")
    add("--ngram", type=int, default=10, help="words that no row may share with it (default: 10)")
    add("--summary", default="", help="write chains as reasoning and summary, by: answer, model, judge (a server)")
    form = "<think>{reasoning}</think>, a line, {summary}"
    add("--chat_form", default="", help=f"of such an answer, or a file with it (default: {form})")
    sentence = "that gives the answer: TEXT with {answer}, or LANGUAGE=TEXT; may be given again"
    add("--sentence", action="append", default=[], help=f"{sentence} (default: <answer>{{answer}}</answer>)")
    add("--summary_model", default="", help="that summarises, as --model takes it")
    add("--summary_prompt", default="", help="file of the question to it: {prompt}, {reasoning}, {answer}")
    add("--summary_tokens", type=int, default=256, help="tokens a model's summary may have (default: 256)")


def add_mix_options(made: argparse.ArgumentParser) -> None:
    """Options of `mix`."""
    add = made.add_argument
    add("--workdir", default="runs/mix", help="folder of chats.jsonl (default: runs/mix)")
    add("--part", action="append", default=[], metavar="NAME=FILE", help="a JSONL file of chats; may be given again")
    add("--weight", action="append", default=[], metavar="NAME=NUMBER", help="its weight (default: 1)")
    thoughts = "of its answers: keep (default), drop, or simple: drop where the prompt is short"
    add("--thoughts", action="append", default=[], metavar="NAME=WHAT", help=f"what stands before </think> {thoughts}")
    add("--simple_words", type=int, default=8, help="words of a short prompt at most (default: 8)")
    add("--rows", type=int, default=0, help="of the mixture (default: as many as there are)")
    add("--used_up", default="shrink", help="a part has too few rows: shrink the mixture (default) or repeat them")
    add("--similarity", type=float, default=0.8, help="near duplicates share so many trigrams (default: 0.8)")
    add("--against", action="append", default=[], metavar="NAME=PLACE", help="an evaluation set to decontaminate from")
    add("--ngram", type=int, default=10, help="words that no row may share with it (default: 10)")
    add("--seed", type=int, default=0, help="names the rows and their order (default: 0)")


def run_eval(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax eval`."""
    from grpo_jax.recipes.benchmark import run

    settings = _settings(options, overrides, "eval", greedy=not options.no_greedy)
    return _until_stopped(run, settings, _default_workdir(options, "eval"))


def run_reject(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax reject`."""
    from grpo_jax.data.filters import FilterConfig
    from grpo_jax.recipes.rejection import Rejection, run
    from grpo_jax.recipes.summaries import SummaryConfig

    settings = _settings(options, overrides, "reject")
    given = vars(options)
    filters = FilterConfig(**{f.name: given[f.name] for f in dataclasses.fields(FilterConfig) if f.name in given})
    summary = SummaryConfig(
        by=options.summary,
        form=options.chat_form or SummaryConfig.form,
        sentences=tuple(options.sentence) or SummaryConfig.sentences,
        model=options.summary_model,
        prompt=options.summary_prompt,
        max_new_tokens=options.summary_tokens,
    )
    kept = Rejection(filters, options.most, options.similarity, tuple(options.against), options.ngram, summary)
    return _until_stopped(
        lambda settings, workdir: run(settings, kept, workdir), settings, _default_workdir(options, "reject")
    )


def run_mix(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax mix`."""
    from grpo_jax.recipes.mixing import Mixture, Part, run

    if overrides:
        raise InputError(f"{overrides[0]}: mix has options of its own: see grpo-jax mix --help")
    files, weights, thoughts = (_by_name(options, name) for name in ("part", "weight", "thoughts"))
    for option, given in (("weight", weights), ("thoughts", thoughts)):
        for name in given:
            if name not in files:
                raise InputError(f"--{option} {name}: there is no --part of that name{_nearest(name, files)}")
    try:
        numbers = {name: float(value) for name, value in weights.items()}
    except ValueError as error:
        raise InputError(f"--weight: {error}: write NAME=NUMBER") from None
    parts = tuple(Part(n, path, numbers.get(n, 1.0), thoughts.get(n, "keep")) for n, path in files.items())
    own = {name: getattr(options, name) for name in ("rows", "used_up", "simple_words", "similarity", "ngram", "seed")}
    run(Mixture(parts, against=tuple(options.against), **own), pathlib.Path(options.workdir))
    return 0


def _by_name(options: argparse.Namespace, option: str) -> dict[str, str]:
    """The values NAME=VALUE of an option that may be given again."""
    pairs = [item.partition("=") for item in getattr(options, option)]
    for name, equals, value in pairs:
        if not (name and equals and value) or [n for n, *_ in pairs].count(name) > 1:
            raise InputError(f"--{option} {name}{equals}{value}: write NAME=VALUE, each name once")
    return {name: value for name, _, value in pairs}


def _settings(options: argparse.Namespace, overrides: list[str], command: str, **more: Any) -> Any:
    if overrides:
        raise InputError(f"{overrides[0]}: {command} has options of its own: see grpo-jax {command} --help")
    _set_up_jax(configs.Config(), options)
    from grpo_jax.recipes.benchmark import Settings

    own = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(options).items() if name in own}
    given |= {"sets": tuple(options.sets), "end_tokens": tuple(options.end_token)}
    given["mesh"] = configs.MeshConfig(fsdp=options.fsdp, tensor=options.tensor, expert=options.expert)
    return Settings(**given, **judges_of(options), code=configs.CodeConfig(sandbox=options.sandbox), **more)


def _default_workdir(options: argparse.Namespace, command: str) -> pathlib.Path:
    return pathlib.Path(options.workdir or f"runs/{command}_{pathlib.Path(options.model).name}")


def run_plan(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax plan`."""
    for name in ("context", "rank"):
        if vars(options)[name] < 0:
            raise InputError(f"--{name} {vars(options)[name]}: must not be negative")
    if not options.devices:
        from grpo_jax.models.presets import describe

        if overrides:
            raise InputError(f"{overrides[0]}: plan reads a config for a machine alone: add --devices v5e:16")
        if not options.model:
            raise InputError("plan: nothing to do: name a --model, or a --config and --devices v5e:16")
        print("\n".join(describe(options.model, options.context, options.rank)))
        return 0
    from grpo_jax.chips import parse_topology
    from grpo_jax.models.abstract import architecture_of, with_model
    from grpo_jax.recipes.mesh import for_topology
    from grpo_jax.recipes.plan import describe_plan, plan

    topology = parse_topology(options.devices)
    _, config = _config(options, overrides)
    config = with_model(config, options.model) if options.model else config
    architecture = architecture_of(config)
    config, said = for_topology(config, architecture, topology)
    found = plan(config, architecture, topology)
    print("\n".join([*said, *describe_plan(found, config, topology)]))
    return 0 if found.memory.total <= topology.chip.memory else 1


def run_compile(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax compile`."""
    from grpo_jax.chips import environment, parse_topology

    topology = parse_topology(options.topology)
    os.environ.update(environment(topology, os.environ))  # before jax is imported
    from grpo_jax.models.abstract import architecture_of, with_model
    from grpo_jax.recipes.compile import as_json, compile_step, lines
    from grpo_jax.recipes.mesh import for_topology

    _, config = _config(options, overrides)
    config = with_model(config, options.model) if options.model else config
    architecture = architecture_of(config)
    config, said = for_topology(config, architecture, topology)
    report, text = compile_step(config, architecture, topology)
    if options.hlo and text:
        pathlib.Path(options.hlo).write_text(text)
    if options.json:
        print(json.dumps(as_json(report)))
    else:
        print("\n".join([*said, *lines(report, config, architecture, topology)]))
    return 0 if report.fits else 1


def run_doctor(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax doctor`."""
    if overrides:
        raise InputError(f"{overrides[0]}: doctor reads no config: leave --config out")
    _set_up_jax(configs.Config())
    from grpo_jax.recipes.doctor import doctor

    return doctor(options.expect)


def run_export(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax export`."""
    if overrides:
        raise InputError(f"{overrides[0]}: export needs no config: leave --config out")
    if not 0 < options.max_shard < 1e6:
        raise InputError(f"--max_shard={options.max_shard} must be above 0 (gigabytes)")
    from grpo_jax.recipes.export import export

    print(export(options.source, options.folder, options.dtype, int(options.max_shard * 1e9)))
    return 0


def run_rewards(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax rewards`."""
    if not options.completions and options.probe <= 0:
        raise InputError("rewards: nothing to do: give --completions FILE.jsonl, or --probe N with N above 0")
    _, config = _config(options, overrides)
    _set_up_jax(config)
    from grpo_jax.recipes.try_rewards import probe, show

    if options.completions:
        show(config, pathlib.Path(options.completions))
    if options.probe:
        probe(config, options.probe, pathlib.Path(options.workdir) if options.workdir else None)
    return 0


def run_report(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax report`."""
    from grpo_jax.report import write_report

    if overrides:
        raise InputError(f"{overrides[0]}: report reads the config that the run has left: leave --config out")
    if not pathlib.Path(options.workdir, "metrics.jsonl").is_file():
        raise InputError(f"{options.workdir}: holds no metrics.jsonl: name the --workdir of a run")
    print(write_report(pathlib.Path(options.workdir)))
    return 0


def _config(options: argparse.Namespace, overrides: list[str]) -> tuple[str, configs.Config]:
    if "time_budget" in options and options.time_budget:
        overrides = [*overrides, f"--config.train.time_budget={options.time_budget}"]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # rewards.names=("my_rewards:length",) finds ./my_rewards.py
    return load_config(overrides)


def _add_place(made: argparse.ArgumentParser) -> None:
    """The options by which one of several processes is told its place; a cluster or the environment tell it as well."""
    made.add_argument("--coordinator", help="several processes: HOST:PORT of process 0 (or JAX_COORDINATOR_ADDRESS)")
    made.add_argument("--num_processes", type=int, help="how many there are (or JAX_NUM_PROCESSES)")
    made.add_argument("--process_id", type=int, help="number of this one, from 0 (or JAX_PROCESS_ID)")


def _set_up_jax(config: configs.Config, options: argparse.Namespace | None = None) -> None:
    from grpo_jax import processes
    from grpo_jax.parallel import set_up_process

    if options is not None:
        place = processes.Place(options.coordinator, options.num_processes, options.process_id)
        processes.join(place, config.distributed, os.environ)
    set_up_process(config)


def _version() -> str:
    try:
        return importlib.metadata.version("grpo-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from its source)"


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
