"""Reward functions that tests name as 'reward_functions:NAME', for worker processes."""

import os
import re
import socket
import subprocess
import sys
import time


def measure(prompts, completions, level, log_extra, log_metric, trainer_state, **columns):
    print("what a reward prints does not get in between")
    assert len(prompts) == len(columns["answer"]) == len(columns["completion_ids"]) and trainer_state.max_steps == 0
    log_extra("pid", [os.getpid()] * len(completions))
    log_extra("jax", ["jax" in sys.modules] * len(completions))
    log_metric("level", sum(level) / len(level))
    return [None if x == 3 else float(len(c)) for c, x in zip(completions, level, strict=True)]


async def later(completions):
    return [2.0] * len(completions)


def hangs_at_level_2(completions, level):
    if 2 in level:
        re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter's lock
    return [1.0] * len(completions)


def sleeps_at_level_2(completions, level):
    if 2 in level:
        time.sleep(60)
    return [1.0] * len(completions)


def echo(value):
    return [float(len(value))]


def sleeps(seconds):
    time.sleep(seconds)
    return [seconds]


def ends(code):
    os._exit(code)


def starts_a_child(path):
    child = subprocess.Popen(["sleep", "60"])
    with open(path, "w") as file:
        file.write(str(child.pid))
    time.sleep(60)


def loaded():
    return [float("grpo_jax" in sys.modules), float("jax" in sys.modules), float("numpy" in sys.modules)]


ATTEMPTS = {
    "open('x', 'w')": lambda: open("x", "w"),
    "eval('1')": lambda: [eval("1")],
    "__import__('os').fork()": lambda: [os.fork()],
    "__import__('socket').socket()": lambda: [socket.create_connection(("127.0.0.1", 9))],
}


def attempt(what):
    return ATTEMPTS[what]()
