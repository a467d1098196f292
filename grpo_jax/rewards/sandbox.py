"""Running code that a model wrote: bubblewrap with namespaces of its own, a system call filter and hard limits.

A run sees the interpreter's standard library and the libraries that it loads, read-only, and nothing else of the host:
no network, no /proc, no home, no environment. It is one process, which may start threads but no process, so its
address space bounds its memory; all of it ends with it. What it may not do is written down in `DENIED`, tried out by
`probe` before the first run, and attacked by `tests/rewards/test_escapes.py`.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import glob
import itertools
import json
import os
import pathlib
import platform
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from grpo_jax.errors import InputError

INSTALL = "apt install bubblewrap (dnf, pacman, zypper: the same name)"
HOME, SCRATCH = "/python", "/scratch"  # inside: where the interpreter stands, and where a run may write
COMPILERS = {"c": ("gcc", "-O2", "-x", "c"), "cpp": ("g++", "-O2", "-std=c++17", "-x", "c++")}
# What a compiled program may need of libraries is what these need.
TRIALS = {
    "c": b'#include <math.h>\n#include <stdio.h>\nint main() { double x; scanf("%lf", &x); return sin(x) > 1; }',
    "cpp": b"#include <iostream>\n#include <cmath>\nint main() { double x; std::cin >> x; return std::sin(x) > 1; }",
}
# A compiler starts processes and writes files; neither is run by what it reads.
BUILD_SECONDS, BUILD_MEMORY, BUILD_FILES, BUILD_THREADS, BUILD_OUTPUT = 20.0, 1 << 30, 1 << 26, 16, 1 << 25
# User ids that runs take when root starts them: the limit on threads is counted by user id, and not for root.
FIRST_UID, UIDS = 40_000, 20_000
NAMESPACES = (
    *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL"),
    *("--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox"),
    # A thread's own arena of malloc would reserve 64 MiB of the address space that a run may have.
    *("--setenv", "LD_LIBRARY_PATH", f"{HOME}/so", "--setenv", "MALLOC_ARENA_MAX", "1"),
)
AS_USER = ("--unshare-user", "--uid", "65534", "--gid", "65534")
# Root keeps its user namespace, or it could not reach interpreters below /root; the run then takes a uid of its own.
AS_ROOT = ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
DEVICES = (
    *("--tmpfs", "/dev", "--dev-bind", "/dev/null", "/dev/null"),
    *("--dev-bind", "/dev/urandom", "/dev/urandom", "--remount-ro", "/dev"),
)
ROOTS = {"dev", "inside.py", "lib", "lib64", HOME[1:]}  # all that a probe may see in /
VERDICTS = 1 << 22  # bytes of the verdicts of a run's tests
GRACE = 30.0  # seconds from the end of a run to the end of all that it held open

# System calls that fail inside, by number on (x86_64, aarch64); -1 where there is none. They reach the kernel's larger
# surfaces, make memory that the limit on address space does not see, or reach for other processes.
DENIED = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "personality": (135, 92),
}
FORKS = {"fork": (57, -1), "vfork": (58, -1)}
CLONE, CLONE3 = (56, 220), (435, 435)
CLONE_THREAD, CLONE_NAMESPACES = 0x00010000, 0x7E020080
ARCHITECTURES = {
    "x86_64": (0, 0xC000003E),
    "aarch64": (1, 0xC00000B7),
}  # column of the tables, the kernel's word for it


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one run may use.

    Attributes:
      seconds: CPU time; the clock on the wall may show twice that and a second, for machines under load.
      memory: bytes of address space.
      threads: threads at once.
      files: bytes that may be written below /scratch, its only writable folder; 0: none, and no folder.
      output: bytes of each of stdout and stderr.
    """

    seconds: float
    memory: int
    threads: int
    files: int
    output: int

    @property
    def wall(self) -> float:
        """Seconds on the wall."""
        return 2 * self.seconds + 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
      problem: why it was ended from outside, or its exit code; empty when it ended well.
      output: what it wrote to stdout.
      errors: what it wrote to stderr.
    """

    problem: str
    output: bytes
    errors: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Bubblewrap:
    """Runs programs of this machine's Python, and of its C compilers, each in a bubblewrap of its own.

    Attributes:
      bwrap: the program.
      python: arguments that put the interpreter inside.
      compilers: arguments that put each compiler inside, by language.
      libraries: arguments that put the libraries of compiled programs inside, by language.
    """

    bwrap: str
    python: tuple[str, ...]
    compilers: Mapping[str, tuple[str, ...]]
    libraries: Mapping[str, tuple[str, ...]]
    numbers: "itertools.count[int]" = dataclasses.field(default_factory=lambda: itertools.count(os.getpid()))

    def run(self, program: bytes, stdin: bytes, limits: Limits, language: str = "python") -> Outcome:
        """A program's outcome on an input; `program` is Python source, or what `build` made of another language."""
        role = "program" if language == "python" else "binary"
        seen = (*self.python, *self.libraries.get(language, ()))
        with ended(self._start(role, seen, {"/program": program}, limits, stdin=stdin)) as process:
            assert process.stdout is not None and process.stderr is not None
            caps = {process.stdout: limits.output, process.stderr: limits.output}
            return self._finish(process, *pump(caps, limits.wall))

    def call(self, program: bytes, tests: bytes, limits: Limits) -> tuple[list[str], str]:
        """Tests that call functions of a program: why each one failed ('' for none), and what ended them early.

        Two runs joined by two pipes: the program is in one, the tests with their expected values in the other.
        """
        from_program, to_tests = os.pipe()
        from_tests, to_program = os.pipe()
        with contextlib.ExitStack() as stack:
            try:
                joined: dict[str, Any] = {"stdin": from_tests, "stdout": to_tests, "stderr": subprocess.DEVNULL}
                server = self._start("serve", self.python, {"/program": program}, limits, **joined)
                stack.enter_context(ended(server))
                joined = {"stdin": from_program, "stdout": to_program}
                checker = self._start("check", self.python, {"/tests": tests}, limits, **joined)
                stack.enter_context(ended(checker))
            finally:
                for pipe in (from_program, to_tests, from_tests, to_program):
                    os.close(pipe)
            assert checker.stderr is not None
            done = self._finish(checker, *pump({checker.stderr: VERDICTS}, limits.wall))
        lines = done.errors.split(b"\n")[:-1]  # a kill may have cut the last one
        return [json.loads(line) for line in lines], done.problem

    def build(self, source: bytes, language: str, limits: Limits) -> Outcome:
        """The compiled program as `output`, the compiler's words as `errors`."""
        wide = dataclasses.replace(
            limits,
            seconds=max(limits.seconds, BUILD_SECONDS),
            memory=max(limits.memory, BUILD_MEMORY),
            threads=BUILD_THREADS,
            files=BUILD_FILES,
            output=BUILD_OUTPUT,
        )
        seen = (*self.python, *self.compilers[language])
        given = {"compiler": COMPILERS[language]}
        with ended(self._start("build", seen, {"/program": source}, wide, forks=True, **given)) as process:
            assert process.stdout is not None and process.stderr is not None
            caps = {process.stdout: BUILD_OUTPUT, process.stderr: limits.output}
            return self._finish(process, *pump(caps, wide.wall))

    def probe(self, limits: Limits) -> list[str]:
        """What is not isolated here, each as a phrase; empty when all holds."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with ended(self._start("probe", self.python, {}, limits, port=port)) as process:
                assert process.stdout is not None and process.stderr is not None
                done = self._finish(process, *pump({process.stdout: 1 << 16, process.stderr: 1 << 16}, limits.wall))
        if done.problem:
            words = done.errors.decode(errors="replace").strip().splitlines()
            return [f"a run fails ({done.problem}{': ' + words[-1] if words else ''})"]
        found = json.loads(done.output)
        wanted = {
            "network": found["connect"] == "EPERM",
            "processes": found["fork"] == "EPERM",
            "files": found["write"] == "EROFS" and set(found["root"]) <= ROOTS | {SCRATCH[1:]},
            "memory": found["memory"] == "MemoryError",
            "threads": 0 <= found["threads"] <= limits.threads,
            "privileges": found["uid"] != 0 and found["capabilities"] in ("EPERM", "EINVAL"),
        }
        return [f"{name}: not limited ({found})" for name, holds in wanted.items() if not holds]

    def _start(
        self,
        role: str,
        seen: Sequence[str],
        files: Mapping[str, bytes],
        limits: Limits,
        stdin: bytes | int = b"",
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        forks: bool = False,
        **settings: Any,
    ) -> subprocess.Popen[bytes]:
        root = os.geteuid() == 0
        settings |= {"role": role, "uid": FIRST_UID + next(self.numbers) % UIDS if root else 0}
        settings |= {"cpu_seconds": -int(-limits.seconds // 1), "files": limits.files}
        settings |= {"memory": limits.memory, "threads": limits.threads}
        command = [self.bwrap, *NAMESPACES, *(AS_ROOT if root else AS_USER), *seen, *DEVICES]
        if limits.files:
            command += ["--perms", "1777", "--size", str(limits.files), "--tmpfs", SCRATCH]
            command += ["--setenv", "TMPDIR", SCRATCH]
        descriptors = []
        inside = pathlib.Path(__file__).with_name("inside.py").read_bytes()
        try:
            for path, content in {"/inside.py": inside, **files}.items():
                descriptors.append(in_memory(content))
                command += ["--perms", "0555", "--ro-bind-data", str(descriptors[-1]), path]
            descriptors.append(in_memory(system_call_filter(platform.machine(), forks)))
            command += ["--seccomp", str(descriptors[-1]), "--remount-ro", "/", "--chdir", "/"]
            command += ["--", f"{HOME}/bin/python3", "-I", "-S", "-B", "/inside.py", role, json.dumps(settings)]
            if isinstance(stdin, bytes):
                stdin = in_memory(stdin)
                descriptors.append(stdin)
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env={},  # what bwrap itself holds of the environment could be read from inside
                cwd="/",
                pass_fds=descriptors,
                start_new_session=True,
            )
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _finish(self, process: subprocess.Popen[bytes], read: list[bytes], problem: str) -> Outcome:
        """Ends what still runs, waits until nothing holds its pipes, and tells how it went."""
        if problem:
            process.kill()  # bwrap dies, with it the first process inside, with that one all the others
            streams = [stream for stream in (process.stdout, process.stderr) if stream is not None]
            pump(dict.fromkeys(streams), GRACE)
        code = process.wait(GRACE)
        output, errors = ([b"", *read] if len(read) == 1 else read)[:2]
        if code > 128:  # how bwrap tells of a signal; the limit on CPU time ends a run by SIGKILL
            problem = problem or f"signal {code - 128}"
        return Outcome(problem or (f"exit code {code}" if code else ""), output, errors)


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, which has ended and let go of its pipes when this is left."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def pump(caps: Mapping[IO[bytes], int | None], seconds: float) -> tuple[list[bytes], str]:
    """What each stream gives until all are closed, and why reading ended before that: 'time', 'output' or ''.

    A cap of None throws away what comes.
    """
    held = {stream: bytearray() for stream in caps}
    deadline, problem = time.monotonic() + seconds, ""
    with selectors.DefaultSelector() as selector:
        for stream in caps:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and not problem:
            left = deadline - time.monotonic()
            problem = "" if left > 0 else "time"
            for key, _ in selector.select(left) if left > 0 else ():
                stream: Any = key.fileobj
                piece, cap = os.read(key.fd, 1 << 16), caps[stream]
                if not piece:
                    selector.unregister(stream)
                elif cap is not None:
                    held[stream] += piece
                    if len(held[stream]) > cap:
                        del held[stream][cap:]
                        problem = "output"
    return [bytes(content) for content in held.values()], problem


def in_memory(content: bytes) -> int:
    """A descriptor from which the content can be read, and not changed."""
    descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def system_call_filter(machine: str, forks: bool) -> bytes:
    """The filter as classic BPF: DENIED and new namespaces fail, so do new processes unless `forks` is given.

    seccomp(2) gives the layout: number at 0, architecture at 4, first argument at 16.
    """
    column, architecture = ARCHITECTURES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, refuse, missing = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":  # numbers of the x32 interface
        steps += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]
    for numbers in [*DENIED.values(), *(() if forks else FORKS.values())]:
        if numbers[column] >= 0:
            steps += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    steps += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, missing)]  # its flags lie in memory; libraries then use clone
    steps += [(equal, 0, 5, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, CLONE_NAMESPACES), (give, 0, 0, refuse)]
    steps += [(any_bit, 1, 0, 0 if forks else CLONE_THREAD), (give, 0, 0, allow if forks else refuse)]
    steps += [(give, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


@functools.cache
def bubblewrap(languages: frozenset[str], limits: Limits) -> Bubblewrap:
    """A sandbox for these languages, tried out; raises InputError where it does not isolate, naming what to install."""
    where = "rewards.code.sandbox='bubblewrap'"
    other = "or set it to 'monty' (pip install pydantic-monty)"
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise InputError(f"{where}: bwrap is not installed: {INSTALL}, {other}")
    if platform.machine() not in ARCHITECTURES:
        raise InputError(f"{where}: no filter for {platform.machine()}, only for {', '.join(ARCHITECTURES)}; {other}")
    made = Bubblewrap(bwrap, interpreter(), {}, {})
    problems = made.probe(limits)
    if problems:
        raise InputError(
            f"{where}: it does not isolate here: {'; '.join(problems)}: allow user namespaces (in a container: "
            f"--security-opt seccomp=unconfined --cap-add SYS_ADMIN; Ubuntu: an AppArmor profile for bwrap), {other}"
        )
    for language in sorted(languages - {"python"}):
        made = with_compiler(made, language, limits)
    return made


def with_compiler(sandbox: Bubblewrap, language: str, limits: Limits) -> Bubblewrap:
    """The sandbox with the compiler of one more language; raises InputError where there is none that works."""
    name = COMPILERS[language][0]
    if (found := shutil.which(name)) is None:
        raise InputError(f"rewards.code: tests in {language!r} need {name}: apt install build-essential")
    places = ["/usr/bin", "/usr/include", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/lib", "/lib64"]
    prefix = str(pathlib.Path(found).parent.parent)
    places += [] if prefix in ("/", "/usr") else [prefix]
    parents = [str(parent) for place in places for parent in reversed(pathlib.Path(place).parents[:-1])]
    binds = folders(*dict.fromkeys(parents))
    binds += [word for place in places if os.path.isdir(place) for word in ("--ro-bind", place, place)]
    path = ("--setenv", "PATH", f"{prefix}/bin:/usr/bin")
    made = dataclasses.replace(sandbox, compilers={**sandbox.compilers, language: (*binds, *path)})
    done = made.build(TRIALS[language], language, limits)
    if done.problem:
        raise InputError(
            f"rewards.code: {name} does not work in the sandbox: {done.errors.decode(errors='replace')[-200:]!r}"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "made")
        path.write_bytes(done.output)
        path.chmod(0o700)
        return dataclasses.replace(made, libraries={**sandbox.libraries, language: library_binds(str(path))})


def interpreter() -> tuple[str, ...]:
    """Arguments that put this Python's executable, standard library and shared libraries inside, and no packages."""
    executable = os.path.realpath(sys._base_executable)  # pyright: ignore[reportAttributeAccessIssue]
    library = sysconfig.get_path("stdlib")
    modules = glob.glob(f"{library}/lib-dynload/*.so")
    needed = [module for module in modules if not os.path.basename(module).startswith(("_tkinter", "_test", "nis"))]
    target = f"{HOME}/{sys.platlibdir}/python{sys.version_info[0]}.{sys.version_info[1]}"
    binds = folders(HOME, f"{HOME}/bin", f"{HOME}/so", f"{HOME}/{sys.platlibdir}", target)
    binds += ["--ro-bind", executable, f"{HOME}/bin/python3", "--ro-bind", library, target]
    for name in ("site-packages", "dist-packages"):
        if os.path.isdir(f"{library}/{name}"):
            binds += ["--tmpfs", f"{target}/{name}"]
    return (*binds, *library_binds(executable, needed))


def library_binds(executable: str, modules: Sequence[str] = ()) -> tuple[str, ...]:
    """Arguments that put the shared libraries of these files into one folder, and the loader where it must be.

    The loader itself tells (ld.so(8)): one process for all files, where ldd starts three for each.
    """
    found: dict[str, str] = {}
    ask = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": " ".join(modules)}
    said = subprocess.run([executable], env=ask, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    for line in said.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        path = (rest if arrow else name).partition(" (")[0]
        if path.startswith("/") and path not in modules:
            found.setdefault(f"{HOME}/so/{os.path.basename(name)}" if arrow else path, os.path.realpath(path))
    for folder in {os.path.dirname(path) for path in found.values()}:
        if os.path.isfile(f"{folder}/libgcc_s.so.1"):  # loaded when the first thread ends, so ldd does not tell of it
            found.setdefault(f"{HOME}/so/libgcc_s.so.1", f"{folder}/libgcc_s.so.1")
    loaders = folders(*{os.path.dirname(target) for target in found if not target.startswith(HOME)})
    return (*loaders, *(word for target, path in found.items() for word in ("--ro-bind", path, target)))


def folders(*paths: str) -> list[str]:
    """Arguments that make folders; those that bwrap makes by itself are closed to other users."""
    return [word for path in paths for word in ("--perms", "0755", "--dir", path)]
