"""What runs inside the sandbox: it limits itself, then runs a program, a function, its tests, a compiler or a probe.

`sandbox` puts this file into the sandbox as text and starts it there. It may import the standard library
only. The program under test has a process, an address space and a sandbox of its own: tests and expected values are
never in it. A function is called through two pipes: one JSON line a call, one a reply.
"""

import builtins
import errno
import json
import os
import resource
import select
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

PROGRAM, TESTS = "/program", "/tests"
LINE = 1 << 24  # bytes of a call or a reply
WHY = 200  # characters of a reason
EXACT = 1 << 53
THREAD_STACK = 1 << 23  # bytes that a thread reserves


def main() -> None:
    """`python3 inside.py ROLE SETTINGS`, settings being JSON: limits, uid and what the role needs."""
    # What a checker says on 1 goes to the program under test, which may end when it likes.
    if unread((2,) if sys.argv[1] == "check" else (1, 2)):
        return
    settings = json.loads(sys.argv[2])
    confine(settings)
    sys.argv = [PROGRAM]
    ROLES[settings["role"]](settings)


def unread(descriptors: tuple[int, ...]) -> bool:
    """Whether nobody reads one of them: the trainer died before bwrap had asked to die with it (--die-with-parent)."""
    polled = select.poll()
    for descriptor in descriptors:
        polled.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in polled.poll(0))


def confine(settings: dict[str, Any]) -> None:
    """Hard limits of this process and all it starts; as root, a uid of its own and no privileges."""
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: settings["cpu_seconds"],
        resource.RLIMIT_FSIZE: settings["files"],
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_STACK: settings["memory"],
        resource.RLIMIT_AS: settings["memory"],
    }
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)  # RLIM_INFINITY is -1
        soft = min(value, THREAD_STACK) if limit == resource.RLIMIT_STACK else value
        resource.setrlimit(limit, (soft, value))
    if settings["uid"]:
        os.setgroups([])
        os.setresgid(*[settings["uid"]] * 3)
        os.setresuid(*[settings["uid"]] * 3)
    # After the change of uid: the limit counts what this uid runs.
    resource.setrlimit(resource.RLIMIT_NPROC, (settings["threads"], settings["threads"]))


def run_as_main() -> dict[str, Any]:
    """Runs the program as `__main__` and returns its namespace."""
    with open(PROGRAM, "rb") as file:
        source = file.read()
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    for name in ("exit", "quit"):  # what `site` adds, which is not there
        setattr(builtins, name, sys.exit)
    exec(compile(source, PROGRAM, "exec"), module.__dict__)
    return module.__dict__


def take_pipes() -> tuple[Any, int]:
    """The pipes on 0 and 1 as (lines to read, descriptor to write); what is printed goes nowhere."""
    reader, writer, nowhere = os.dup(0), os.dup(1), os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1):
        os.dup2(nowhere, standard)
    return os.fdopen(reader, "rb"), writer


def send(writer: int, message: Any) -> None:
    """One JSON line."""
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(writer, line) :]


def encode(value: Any) -> Any:
    """A plain value as JSON that keeps its types; raises TypeError for anything else."""
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < EXACT else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def decode(value: Any) -> Any:
    """The value that `encode` was given; builtin types only, whatever the other side sends."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "int":
        return int(held, 16)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in held}
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(held)
    if kind == "complex":
        return complex(*held)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item) for item in held)


def program(settings: dict[str, Any]) -> None:
    """A Python program, its input on descriptor 0."""
    run_as_main()


def binary(settings: dict[str, Any]) -> None:
    """A compiled program; its stack may take half of its memory, for deep recursion."""
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (min(settings["memory"] // 2, hard), hard))
    os.execv(PROGRAM, [PROGRAM])


def serve(settings: dict[str, Any]) -> None:
    """Answers calls of the program's functions until there are no more."""
    requests, writer = take_pipes()
    try:
        namespace, failure = run_as_main(), ""
    except BaseException as error:
        namespace, failure = {}, type(error).__name__
    for line in requests:
        name, args, kwargs = decode(json.loads(line))
        try:
            if failure:
                raise RuntimeError(failure)
            reply = {"value": encode(find(namespace, name)(*args, **kwargs))}
        except BaseException as error:
            reply = {"error": failure or type(error).__name__}
        send(writer, reply)


def find(namespace: dict[str, Any], name: str) -> Callable[..., Any]:
    """A function of the program, or a method of its class Solution."""
    return namespace[name] if name in namespace else getattr(namespace["Solution"](), name)


def check(settings: dict[str, Any]) -> None:
    """Runs tests that call the function in the other sandbox; a line a test on descriptor 2: why it failed, or ''."""
    replies, writer = take_pipes()
    verdicts = os.dup(2)
    os.dup2(1, 2)
    with open(TESTS, "rb") as file:
        tests = json.load(file)

    def remote(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            send(writer, encode([name, list(args), kwargs]))
            line = replies.readline(LINE)
            if not line.endswith(b"\n"):
                raise RuntimeError("no reply" if len(line) < LINE else "too long a reply")
            reply = json.loads(line)
            if "error" in reply:
                kind: Any = getattr(builtins, str(reply["error"]), None)
                known = isinstance(kind, type) and issubclass(kind, Exception)
                raise kind(f"in {name}") if known else RuntimeError(f"{str(reply['error'])[:WHY]} in {name}")
            return decode(reply["value"])

        return call

    for test in calls(tests, remote) if "calls" in tests else statements(tests, remote):
        try:
            why = test()
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"[:WHY]
        send(verdicts, (why or "")[:WHY])


def calls(tests: dict[str, Any], remote: Callable[[str], Callable[..., Any]]) -> list[Callable[[], str | None]]:
    """Tests of the kind: these arguments give this value."""

    def test(args: Any, expected: Any) -> Callable[[], str | None]:
        def run() -> str | None:
            found = remote(tests["function"])(*args)
            return None if as_json(found) == as_json(expected) else f"{args!r} gave {found!r}, not {expected!r}"

        return run

    return [test(args, expected) for args, expected in tests["calls"]]


def as_json(value: Any) -> Any:
    """The value with tuples as lists: expected values come from JSON, which has no tuples."""
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return {key: as_json(item) for key, item in value.items()} if isinstance(value, dict) else value


def statements(tests: dict[str, Any], remote: Callable[[str], Callable[..., Any]]) -> list[Callable[[], str | None]]:
    """Tests of the kind: this code runs without an exception; `check(candidate)` is called where there is one."""

    def test(code: str) -> Callable[[], str | None]:
        def run() -> str | None:
            namespace: dict[str, Any] = {"__name__": "tests"}
            exec(tests["setup"], namespace)
            candidate = remote(tests["function"])
            namespace.update({tests["function"]: candidate, "candidate": candidate})
            exec(code, namespace)
            if "check" in namespace:
                namespace["check"](candidate)
            return None

        return run

    return [test(code) for code in tests["statements"]]


def build(settings: dict[str, Any]) -> None:
    """Compiles the program and writes what comes out to descriptor 1; the compiler's words to 2."""
    made = "/scratch/made"
    done = subprocess.run([*settings["compiler"], "-o", made, PROGRAM, "-lm"], stdin=subprocess.DEVNULL, stdout=2)
    if done.returncode:
        sys.exit(1)
    with open(made, "rb") as file:
        sys.stdout.buffer.write(file.read())


def probe(settings: dict[str, Any]) -> None:
    """What this place allows, as JSON: the outside checks that it is little."""

    def attempt(what: Callable[[], Any]) -> str:
        try:
            return f"done: {what()}"
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "?")
        except BaseException as error:
            return type(error).__name__

    def start_process() -> int:
        child = os.fork()
        if not child:
            os._exit(0)
        return child

    def start_threads() -> int:
        wait = threading.Event()
        made = []
        try:
            for _ in range(4 * settings["threads"]):
                made.append(threading.Thread(target=wait.wait, daemon=True))
                made[-1].start()
        except RuntimeError:
            return len(made)
        finally:
            wait.set()
        return -1

    found = {
        "uid": os.getuid(),
        "root": sorted(os.listdir("/")),
        "connect": attempt(lambda: socket.socket().connect(("127.0.0.1", settings["port"]))),
        "fork": attempt(start_process),
        "write": attempt(lambda: open("/file", "w")),
        "memory": attempt(lambda: len(bytearray(settings["memory"]))),
        "threads": start_threads(),
        "capabilities": attempt(lambda: os.setuid(0)),
    }
    send(1, found)


ROLES = {"program": program, "binary": binary, "serve": serve, "check": check, "build": build, "probe": probe}

if __name__ == "__main__":
    main()
