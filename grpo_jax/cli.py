"""The command line: `grpo-jax train --config arithmetic --config.optim.lr=1e-4 --workdir runs/a`."""

import argparse
import os
import pathlib
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from grpo_jax import config as configs
from grpo_jax.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done (or stopped and saved), 2 bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        own, overrides = split_arguments(arguments)
        options = parser().parse_args(own)
        return options.run(options, overrides)
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
    joined = []
    for item in overrides:
        if item.startswith("--config"):
            joined.append(item)
        else:
            joined[-1] += f"={item}"
    given = dict.fromkeys(joined)
    names = [item.split("=", 1)[1] for item in given if item.startswith("--config=")]
    path = configs.config_file(names[-1] if names else default)
    known = set(configs.field_names())
    fields = [item for item in given if item.startswith("--config.")]
    for item in fields:
        name, equals, _ = item.removeprefix("--config.").partition("=")
        if name not in known:
            raise configs.unknown_field("--config", name)
        if not equals:
            raise InputError(f"--config.{name}: has no value; write --config.{name}=VALUE")
    holder: Any = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", configs.load_config_module(path).get_config(), flag_values=holder)
    try:
        holder(["grpo-jax", *fields])
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(f"--config: {error}") from error
    return path.stem, configs.from_dict(holder.config, str(path))


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="grpo-jax", description="GRPO in JAX: a training step is one compiled program.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    for name, run, text in (
        ("train", run_train, "train by GRPO; the same command again goes on where it stopped"),
        ("sft", run_sft, "fine-tune model.path on a JSONL file of chats (sft.path)"),
    ):
        made = command(name, run, f"{text}. --config NAME or FILE, --config.field=value")
        made.add_argument("--workdir", help="folder of the run (default: runs/<config name>)")
        made.add_argument("--time_budget", default="", help="end cleanly after this long: 55m, 2h, 300s")
        made.add_argument(
            "--dry_run", action="store_true", help="print batch arithmetic and parameters, compile nothing"
        )
    made = command("report", run_report, "write report.html from what a run has left")
    made.add_argument("workdir", help="folder of the run")
    return top


def run_train(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax train`."""
    name, config = _config(options, overrides)
    workdir = pathlib.Path(options.workdir or f"runs/{name}")
    if options.dry_run:
        from grpo_jax.recipes.dry_run import dry_run

        dry_run(config)
        return 0
    _set_up_jax(config)
    from grpo_jax.recipes.grpo import run
    from grpo_jax.recipes.loop import Stopped

    try:
        run(config, workdir)
    except Stopped as stopped:
        print(f"{stopped}. Run the same command again to go on.")
    return 0


def run_sft(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax sft`."""
    name, config = _config(options, overrides)
    _set_up_jax(config)
    from grpo_jax.recipes.loop import Stopped
    from grpo_jax.recipes.sft import run

    try:
        run(config, pathlib.Path(options.workdir or f"runs/{name}_sft"))
    except Stopped as stopped:
        print(f"{stopped}. Run the same command again to go on.")
    return 0


def run_report(options: argparse.Namespace, overrides: list[str]) -> int:
    """`grpo-jax report`."""
    from grpo_jax.report import write_report

    if not pathlib.Path(options.workdir, "metrics.jsonl").is_file():
        raise InputError(f"{options.workdir}: holds no metrics.jsonl: name the --workdir of a run")
    print(write_report(pathlib.Path(options.workdir)))
    return 0


def _config(options: argparse.Namespace, overrides: list[str]) -> tuple[str, configs.Config]:
    if options.time_budget:
        overrides = [*overrides, f"--config.train.time_budget={options.time_budget}"]
    return load_config(overrides)


def _set_up_jax(config: configs.Config) -> None:
    """Process-wide settings of jax: the compilation cache."""
    import jax

    folder = config.log.compilation_cache
    if folder == "auto":
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(root, "grpo_jax", "compiled")
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


if __name__ == "__main__":
    sys.exit(main())
