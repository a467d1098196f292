"""Times our step beside other trainers' on the same shapes, in alternation, and prints ratios of medians.

    python benchmarks/compare.py --workload small --rounds 3 \\
        --peer trl="VENV/bin/python peer_trl.py" --peer tunix="VENV/bin/python peer_tunix.py"

A peer is any command that takes the shape as `--prompts --group --prompt-len --new-tokens --layers --hidden --heads
--kv-heads --ffn --vocab [--natural-end] --steps --warmup` and ends with a JSON line that has `median_step_s`,
`generated_tokens_per_s` and `peak_rss_mb`, as `step.py` does. Each round runs every contestant once, in a process of
its own, after the machine has been quiet for some seconds; lines go to --out as they come.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

import step

HERE = pathlib.Path(__file__).parent
QUIET_SHARE, QUIET_SECONDS = 0.08, 6.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=step.WORKLOADS, required=True)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait for a quiet machine, at most")
    parser.add_argument("--out", default="compare.jsonl")
    return parser.parse_args()


def shape_flags(workload: str) -> list[str]:
    """The workload as flags that every contestant takes; what only ours knows is left out."""
    flags = []
    for name, value in (step.SHAPE | step.WORKLOADS[workload]).items():
        if name in step.OURS:
            continue
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [] if value is False else [flag, str(value)]
    return flags


def wait_until_quiet(limit: float) -> None:
    """Returns when others have left the machine alone for a while, or after `limit` seconds."""
    deadline = since = time.monotonic()
    deadline += limit
    while time.monotonic() - since < QUIET_SECONDS and time.monotonic() < deadline:
        before = step.machine_busy_s()
        time.sleep(1)
        if (step.machine_busy_s() - before) / (os.cpu_count() or 1) > QUIET_SHARE:
            since = time.monotonic()


def measure(command: list[str]) -> dict:
    """The JSON line that a contestant ends with; exits when there is none."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        sys.exit(f"{shlex.join(command)} ended with {done.returncode} and no JSON line:\n{done.stderr[-2000:]}")


def main() -> None:
    """Rounds of all contestants, then medians and ratios to ours."""
    options = arguments()
    counts = ["--steps", str(options.steps), "--warmup", str(options.warmup)]
    commands = {
        "grpo_jax": [sys.executable, str(HERE / "step.py"), "--workload", options.workload, *counts],
    }
    for given in options.peer:
        name, _, command = given.partition("=")
        commands[name] = [*shlex.split(command), *shape_flags(options.workload), *counts]
    rows: dict[str, list[dict]] = {name: [] for name in commands}
    for number in range(options.rounds):
        for name, command in commands.items():
            wait_until_quiet(options.wait)
            row = measure(command) | {"name": name, "round": number, "workload": options.workload}
            rows[name].append(row)
            with open(options.out, "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(f"round {number} {name:10} {row['median_step_s']:8.3f} s a step", flush=True)
    ours = rows["grpo_jax"]
    for name, held in rows.items():
        seconds = statistics.median(r["median_step_s"] for r in held)
        rate = statistics.median(r["generated_tokens_per_s"] for r in held)
        memory = statistics.median(r["peak_rss_mb"] for r in held)
        faster = statistics.median(a["median_step_s"] / b["median_step_s"] for a, b in zip(held, ours, strict=True))
        print(f"{name:10} {seconds:8.3f} s a step, {rate:9.1f} tokens/s, peak {memory:7.0f} MB; ours is {faster:.2f} x")


if __name__ == "__main__":
    main()
