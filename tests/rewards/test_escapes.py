# ruff: noqa: E501
"""Programs that try to get out of the sandbox, to outlive it, or to take more than they may: none succeeds.

Each attempt prints ESCAPED where it has what it wanted. The outside holds what they want: a file, an open socket, a
variable, a process, expected outputs. Bombs run under the sandbox's own hard limits, small ones.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from grpo_jax.errors import InputError
from grpo_jax.rewards.sandbox import Limits, bubblewrap

SECRET = "a-secret-of-the-host"
MEMORY = (192 << 20) + os.getpid()  # stands in the command lines: whose runs they are
LIMITS = Limits(seconds=3.0, memory=MEMORY, threads=8, files=0, output=1 << 14)
SHORT = dataclasses.replace(LIMITS, seconds=0.5)
WRITABLE = dataclasses.replace(LIMITS, files=1 << 20)

SYSTEM_CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
"""


def call(number: int, *arguments: object) -> str:
    """A program whose one system call (x86_64 numbers) must not succeed."""
    written = ", ".join(map(str, arguments))
    return f"{SYSTEM_CALL}\nif call({number}, {written}) >= 0: print('ESCAPED')"


# What takes more than it may, or stays.
BOMBS = {
    "fork bomb": "import os\nwhile True:\n    os.fork()\n    print('ESCAPED')",
    "fork bomb of shells": "import subprocess\nwhile True: subprocess.Popen(['/bin/sh', '-c', 'sleep 9']); print('ESCAPED')",
    "fork bomb that retries": "import os\nwhile True:\n    try:\n        os.fork(); print('ESCAPED')\n    except OSError: pass",
    "vfork by posix_spawn": "import os\nos.posix_spawn('/python/bin/python3', ['p', '-c', '1'], {})\nprint('ESCAPED')",
    "clone without the library": call(56, 17, 0, 0, 0, 0),
    "clone3": call(435, "(ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)", 88),
    "fork by its old number": call(57),
    "vfork by its old number": call(58),
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start()\nprint('ESCAPED')",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(60)\nprint('ESCAPED')",
    "thread bomb": (
        "import threading, time\nn = 0\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    n += 1\n    if n > 20: print('ESCAPED')"
    ),
    "memory flood": "x = bytearray(256 << 20)\nprint('ESCAPED')",
    "memory flood in pieces": "x = []\nfor _ in range(64):\n    x.append(bytearray(4 << 20))\nprint('ESCAPED')",
    "memory flood by mmap": (
        "import mmap\nx = [mmap.mmap(-1, 4 << 20) for _ in range(64)]\nfor m in x: m.write(b'x' * (4 << 20))\nprint('ESCAPED')"
    ),
    "memory flood by memfd": "import os\nfd = os.memfd_create('x')\nprint('ESCAPED')",
    "memory flood by shared memory": call(29, 0, 1 << 20, 0o1600),
    "memory flood by message queues": call(240, "b'/q'", 0o102, 0o600, 0),
    "memory flood in /dev/shm": "open('/dev/shm/x', 'w').write('x')\nprint('ESCAPED')",
    "memory flood in /dev": "open('/dev/x', 'w').write('x')\nprint('ESCAPED')",
    "raised limits": (
        "import resource as r\nfor limit in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_CPU, r.RLIMIT_FSIZE):\n    try:\n"
        "        r.setrlimit(limit, (-1, -1)); print('ESCAPED')\n    except ValueError: pass"
    ),
    "busy loop": "while True: pass",
    "busy threads": "import threading\ndef f():\n    while True: pass\nfor _ in range(4): threading.Thread(target=f).start()",
    "sleep through SIGTERM": (
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(60)"
    ),
    "sleep with all closed": "import os, time\nfor fd in range(64):\n    try: os.close(fd)\n    except OSError: pass\ntime.sleep(60)",
    "stop itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "output flood": "while True: print('x' * 10000)",
    "error flood": "import sys\nwhile True: sys.stderr.write('x' * 10000)",
    "output flood through descriptors": "import os\nwhile True:\n    for fd in (1, 2): os.write(fd, b'x' * 10000)",
}

# What lies outside.
READS = {
    "secret file": "print('ESCAPED' if open('{secret}').read() else '')",
    "password file": "print('ESCAPED' if open('/etc/passwd').read() else '')",
    "the tests' own package": "import os\nprint('ESCAPED' if os.path.exists('{package}') else '')",
    "home": "import os\nprint('ESCAPED' if os.listdir(os.path.expanduser('~')) != os.listdir('/') else '')",
    "climbing up": "print('ESCAPED' if open('../' * 20 + '{secret}').read() else '')",
    "environ of process 1": "print('ESCAPED' if open('/proc/1/environ').read() else '')",
    "root of process 1": "import os\nprint('ESCAPED' if os.listdir('/proc/1/root') else '')",
    "mounting /proc": call(165, "b'proc'", "b'/dev'", "b'proc'", 0, 0),
    "environment": "import os\nif '{value}' in str(os.environ): print('ESCAPED')",
    "inherited descriptors": (
        "import os\nfor fd in range(3, 64):\n    try:\n        os.lseek(fd, 0, 0)\n"
        "        if '{value}' in os.read(fd, 99999).decode(errors='replace'): print('ESCAPED')\n    except OSError: pass"
    ),
    "packages of the host": "import numpy\nprint('ESCAPED')",
    "shell": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    "disk": "import os\nos.mknod('/dev/disk', 0o60600, os.makedev(8, 0))\nprint('ESCAPED')",
    "terminal": "open('/dev/tty', 'w').write('x')\nprint('ESCAPED')",
    "kernel memory": "open('/dev/mem', 'rb').read(1)\nprint('ESCAPED')",
    "file handles": call(304, 3, "b'x' * 64", 0),
}
WRITES = {
    "file in /": "open('/x', 'w').write('x')\nprint('ESCAPED')",
    "file in /scratch": "open('/scratch/x', 'w').write('x')\nprint('ESCAPED')",
    "file in the interpreter": "open('/python/lib/x', 'w').write('x')\nprint('ESCAPED')",
    "the launcher": "open('/inside.py', 'w').write('x')\nprint('ESCAPED')",
    "another input": "import os\nos.lseek(0, 0, 0)\nos.write(0, b'x')\nprint('ESCAPED')",
}
WITH_FILES = {
    "symlink to the secret": "import os\nos.symlink('{secret}', '/scratch/link')\nprint('ESCAPED' if open('/scratch/link').read() else '')",
    "hard link to the launcher": "import os\nos.link('/inside.py', '/scratch/link')\nprint('ESCAPED')",
    "one large file": "open('/scratch/x', 'w').write('x' * (2 << 20))\nprint('ESCAPED')",
    "one sparse file": "import os\nos.truncate(os.open('/scratch/x', os.O_CREAT | os.O_RDWR), 1 << 40)\nprint('ESCAPED')",
    "many files": (
        "for n in range(64):\n    with open(f'/scratch/{n}', 'w') as f: f.write('x' * (1 << 16))\nprint('ESCAPED')"
    ),
    "set-user-id file": (
        "import os, shutil\nshutil.copy('/python/bin/python3', '/scratch/p')\nos.chmod('/scratch/p', 0o6777)\n"
        "os.execv('/scratch/p', ['p', '-c', 'import os; os.setuid(0); print(chr(69) + \"SCAPED\")'])"
    ),
}
NETWORK = {
    "TCP to the host": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint('ESCAPED')",
    "UDP": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))\nprint('ESCAPED')",
    "abstract socket of the host": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{name}')\nprint('ESCAPED')",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint('ESCAPED')",
    "names": "import socket\nsocket.getaddrinfo('example.org', 80)\nprint('ESCAPED')",
    "pair turned into a connection": (
        "import socket\na, b = socket.socketpair()\na.connect('\\0{name}')\nprint('ESCAPED')"
    ),
}
PROCESSES = {
    "kill the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nprint('ESCAPED' if os.getppid() != 1 else '')",
    "kill all": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kill the host's process": "import os, signal\nos.kill({pid}, signal.SIGKILL)\nprint('ESCAPED')",
    "kill by search": (
        "import os, signal\nfor pid in range(1, 5000):\n    if pid != os.getpid():\n        try:\n"
        "            os.kill(pid, signal.SIGKILL)\n            if pid > 1: print('ESCAPED')\n        except OSError: pass"
    ),
    "trace the parent": call(101, 16, 1, 0, 0),
    "read the parent's memory": call(310, 1, 0, 0, 0, 0, 0),
    "become root": "import os\nos.setuid(0)\nprint('ESCAPED')",
    "new user namespace": call(272, 0x10000000),
    "new user namespace by clone": call(56, 0x10000000 | 17, 0, 0, 0, 0),
    "other namespaces": call(308, 0, 0),
    "chroot": "import os\nos.chroot('/python')\nprint('ESCAPED')",
    "keys of the host": call(250, 0, -3, 0),
    "kernel programs": call(321, 0, 0, 0),
    "io_uring": call(425, 1, "ctypes.create_string_buffer(256)"),
    "a faster turn": "import os\nos.nice(-5)\nprint('ESCAPED')",
}
GROUPS = {
    "bombs": (BOMBS, LIMITS),
    "reads": (READS, LIMITS),
    "writes": (WRITES, LIMITS),
    "with files": (WITH_FILES, WRITABLE),
    "network": (NETWORK, LIMITS),
    "processes": (PROCESSES, LIMITS),
}
ATTEMPTS = {name: (code, limits) for group, limits in GROUPS.values() for name, code in group.items()}

# Programs that want the value that a test of `f` expects, or the verdict of a test that they fail.
CHEATS = {
    "equal to all": "class X:\n    __eq__ = lambda *a: True\n    __hash__ = None\ndef f(x): return X()",
    "equal number": "class X(int):\n    __eq__ = lambda *a: True\n    __ne__ = lambda *a: False\ndef f(x): return X(1)",
    "frames": (
        "import sys, re\ndef f(x):\n    frame, held = sys._getframe(), ''\n    while frame:\n"
        "        held += str(frame.f_locals) + str(frame.f_globals)\n        frame = frame.f_back\n"
        "    return int((re.findall(r'9[0-9]{8}', held) or [0])[0])"
    ),
    "all objects": (
        "import gc\ndef f(x):\n    for held in gc.get_objects():\n        if type(held) in (list, tuple, dict):\n"
        "            for item in held.values() if type(held) is dict else held:\n"
        "                if type(item) is int and 9 * 10**8 < item < 10**9: return item\n    return 0"
    ),
    "file of tests": "def f(x):\n    return int(open('/tests').read().split('[[[1], ')[1].split(']')[0])",
    "descriptors": (
        "import os, re\ndef f(x):\n    for fd in range(64):\n        try:\n"
        "            found = re.findall(rb'9[0-9]{8}', os.pread(fd, 99999, 0))\n"
        "            if found: return int(found[0])\n        except OSError: pass\n    return 0"
    ),
    "forged verdicts": "import os\ndef f(x):\n    for fd in range(64):\n        try: os.write(fd, b'\"\"\\n' * 50)\n        except OSError: pass\n    return 0",
    "early exit": "import os\nos._exit(0)\ndef f(x): return 0",
    "exit while called": "import os\ndef f(x): os._exit(0)",
    "raised pass": "def f(x): raise SystemExit(0)",
    "patched json": "import json\njson.dumps = lambda *a: '{\"value\": true}'\ndef f(x): return 0",
    "endless reply": "def f(x): return 'x' * (1 << 25)",
    "deep reply": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "no reply": "import time\ndef f(x): time.sleep(60)",
    "the other process": "import os, signal\ndef f(x):\n    for pid in range(2, 99):\n        if pid != os.getpid():\n            os.kill(pid, 9)\n    return 0",
}
EXPECTED = 918273645


@dataclasses.dataclass
class Host:
    """What attempts want, and what came of them."""

    port: int
    victim: subprocess.Popen
    outcomes: dict
    verdicts: dict
    seconds: float


@pytest.fixture(scope="module")
def sandbox():
    try:
        return bubblewrap(frozenset({"python"}), LIMITS)
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def host(sandbox, tmp_path_factory):
    """All attempts, eight at a time, beside a file, two sockets, a variable and a process of the host."""
    secret = tmp_path_factory.mktemp("host") / "secret"
    secret.write_text(SECRET)
    name = f"grpo-jax-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0{name}")
        unix.listen()
        os.environ["GRPO_JAX_SECRET"] = SECRET
        victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        package = pathlib.Path(__file__).parents[2]
        wanted = {"secret": secret, "value": SECRET, "port": tcp.getsockname()[1], "name": name, "pid": victim.pid}
        wanted["package"] = package

        def attempt(item):
            code, limits = item
            return sandbox.run(filled(code, wanted).encode(), b"some input", limits)

        def cheat(code):
            tests = {"function": "f", "calls": [[[1], EXPECTED]]}
            return sandbox.call(code.encode(), json.dumps(tests).encode(), LIMITS)

        began = time.monotonic()
        try:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                verdicts = pool.map(cheat, CHEATS.values())
                outcomes = dict(zip(ATTEMPTS, pool.map(attempt, ATTEMPTS.values()), strict=True))
                verdicts = dict(zip(CHEATS, verdicts, strict=True))
            tcp.settimeout(0)
            yield Host(tcp, victim, outcomes, verdicts, time.monotonic() - began)
        finally:
            victim.kill()
            victim.wait()
            del os.environ["GRPO_JAX_SECRET"]


def filled(code: str, values: dict[str, object]) -> str:
    for name, value in values.items():
        code = code.replace(f"{{{name}}}", str(value))
    return code


def running() -> list[str]:
    """Command lines of all processes that a sandbox of these tests has started and that have not ended."""
    lines = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if "/inside.py" in line and f'"memory": {MEMORY}' in line]


def test_there_are_many(host):
    assert len(ATTEMPTS) + len(CHEATS) >= 80 and len(ATTEMPTS) == sum(len(group) for group, _ in GROUPS.values())


@pytest.mark.parametrize("name", ATTEMPTS)
def test_an_attempt_fails(host, name):
    done = host.outcomes[name]
    assert b"ESCAPED" not in done.output, done
    assert len(done.output) <= LIMITS.output and len(done.errors) <= LIMITS.output
    assert b"SyntaxError" not in done.errors and b"NameError" not in done.errors, done


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_does_not_pass(host, name):
    reasons, problem = host.verdicts[name]
    assert len(reasons) <= 1 and all(reasons) and (reasons or problem), (reasons, problem)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("busy loop", "signal 9, or time"),
        ("busy threads", "signal 9, or time"),
        ("sleep through SIGTERM", "time"),
        ("sleep with all closed", "time"),
        ("stop itself", "time"),
        ("output flood", "output"),
        ("error flood", "output"),
    ],
)
def test_what_does_not_end_is_ended(host, name, problem):
    assert host.outcomes[name].problem and host.outcomes[name].problem in problem


def test_nothing_is_left_running_and_the_host_is_as_it_was(host):
    assert running() == []
    assert host.victim.poll() is None
    with pytest.raises(BlockingIOError):
        host.port.accept()


def test_the_attempts_would_be_seen(sandbox):
    """The tests can fail: what a program may do is done, and what runs is found."""
    assert sandbox.run(b"print('ESCAPED')", b"", LIMITS).output == b"ESCAPED\n"
    assert sandbox.run(b"import sys; print(sys.stdin.read())", b"an input", LIMITS).output == b"an input\n"
    right = sandbox.call(b"def f(x): return x + 1", b'{"function": "f", "calls": [[[1], 2]]}', LIMITS)
    assert right == ([""], "")
    enough = "x = bytearray(64 << 20)\nopen('/scratch/x', 'w').write('x' * (1 << 19))\nprint('ESCAPED')"
    assert sandbox.run(enough.encode(), b"", WRITABLE).output == b"ESCAPED\n"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(sandbox.run, b"import time; time.sleep(60)", b"", SHORT)
        deadline = time.monotonic() + LIMITS.wall
        while not running() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running() or waiting.done()
        assert waiting.result().problem == "time"
    assert running() == []


def test_a_killed_trainer_leaves_nothing(sandbox):
    """SIGKILL of the process that waits for a run ends the run too."""
    code = (
        "from grpo_jax.rewards.sandbox import *\n"
        f"limits = Limits(60.0, {MEMORY}, 8, 0, 1 << 14)\n"
        "box = bubblewrap(frozenset(), limits)\nprint('ready', flush=True)\n"
        "box.run(b'import time; time.sleep(100)', b'', limits)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    assert trainer.stdout is not None and trainer.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 20
    while not running() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running()
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    while running() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running() == []


def test_a_run_whose_trainer_died_before_it_began_ends_at_once(sandbox):
    """Killed between the start of bwrap and its asking to die with its parent: nobody would end what sleeps."""
    limits = Limits(60.0, MEMORY, 8, 0, 1 << 14)
    read, write = os.pipe()
    os.close(read)
    files = {"/program": b"import time; time.sleep(100)"}
    process = sandbox._start("program", sandbox.python, files, limits, stdout=write, stderr=write)
    os.close(write)
    try:
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
