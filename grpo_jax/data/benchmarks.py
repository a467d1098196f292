"""Evaluation sets by name: where their files come from, how their rows become problems.

A problem is a dict with 'id', 'prompt' (text or messages), 'kind' and what its kind is graded by: 'answer' (math,
choice, exact; to a judge a reference), 'tests' (code, as `rewards.code.read_tests` takes them) or 'rules'
(instructions). Nothing is downloaded.
"""

import base64
import csv
import dataclasses
import difflib
import hashlib
import json
import pathlib
import pickletools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grpo_jax.data.sources import Found, jsonl_rows, read_table, split_files, tfds_rows
from grpo_jax.errors import InputError

FIELD = "--set"
LETTERS = "ABCDEFGHIJ"
NO_ANSWER = object()
UNPACKED_LIMIT = 2**30  # bytes that the packed tests of one LiveCodeBench row may come to
INSTRUCTIONS = {
    "math": "Reason step by step and put the final answer in \\boxed{}.",
    "choice": "Reason step by step and put the letter of the right choice in \\boxed{}.",
    "exact": "Reason step by step and put the final answer in <answer></answer>.",
    "code": "Give the whole program in one ```python block.",
    "instructions": "",
    "judge": "",
}
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """An evaluation set.

    Attributes:
      title: how papers call it.
      kind: how it is graded: math, choice, exact, code, instructions or judge; empty: by the columns of each row.
      samples: completions a problem (k) in DeepSeek-R1's tables, or a usual number where it has none.
      source: repository of the dataset on the Hugging Face Hub.
      files: names of its files, as globs, in a folder cloned from there; empty: by split.
      splits: names of the split that is evaluated, the first that there is.
      problem: (columns, where the row stands) -> the problem without its kind.
      tfds: builder of tensorflow-datasets that holds it; empty: none does.
    """

    title: str
    kind: str
    samples: int
    source: str
    files: tuple[str, ...]
    splits: tuple[str, ...]
    problem: Callable[[Row, str], dict[str, Any]]
    tfds: str = ""

    def fetch(self, name: str) -> str:
        """What to do to get it."""
        if not self.source:
            return f"give a file: {FIELD} {name}=FILE.jsonl"
        file = self.files[0].replace("*", "") if self.files else f"the {self.splits[0]} split's parquet file"
        also = f", or {FIELD} {name}=tfds:{self.tfds}" if self.tfds else ""
        return (
            f"fetch {file} of huggingface.co/datasets/{self.source} (hf download --repo-type dataset {self.source} "
            f"--local-dir {name}), then {FIELD} {name}={name}{also}"
        )


def read_benchmark(name: str, place: str, limit: int = 0) -> list[dict[str, Any]]:
    """The problems of a set in order, the first `limit` of them (0: all); raises InputError naming file, row and fix.

    `place` is a file (.jsonl, .jsonl.gz, .parquet, .arrow, .csv), a folder cloned from the Hub or saved by `datasets`,
    or 'tfds:NAME' ('tfds:NAME:DATA_DIR').
    """
    benchmark = benchmark_named(name)
    if not place:
        raise InputError(f"{FIELD} {name}: has no file: {benchmark.fetch(name)}")
    problems: list[dict[str, Any]] = []
    for number, (where, columns) in enumerate(_rows(benchmark, name, place)):
        if limit and number == limit:
            break
        try:
            made = benchmark.problem(columns, where)
        except KeyError as missing:
            have = ", ".join(map(str, columns))
            raise InputError(f"{where}: no column {missing}, as {name} has ({have}): {benchmark.fetch(name)}") from None
        problems.append({"id": str(number), "kind": benchmark.kind, **made})
    if not problems:
        raise InputError(f"{FIELD} {name}={place}: has no rows: {benchmark.fetch(name)}")
    return problems


def prompts_of(sets: Sequence[str]) -> list[Any]:
    """The prompts of all problems of sets 'NAME=PLACE'."""
    pairs = (item.partition("=")[::2] for item in sets)
    return [problem["prompt"] for name, place in pairs for problem in read_benchmark(name, place)]


def benchmark_named(name: str) -> Benchmark:
    """The set of this name; raises InputError naming the nearest one."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, list(BENCHMARKS), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{FIELD} {name}: no such set; there are {', '.join(BENCHMARKS)}{hint}")
    return BENCHMARKS[name]


def with_instruction(problem: Row) -> Any:
    """The prompt that says how to answer, for models that follow instructions."""
    says = INSTRUCTIONS[problem["kind"]]
    prompt = problem["prompt"]
    return f"{prompt}\n\n{says}" if says and isinstance(prompt, str) else prompt


def _rows(benchmark: Benchmark, name: str, place: str) -> Found:
    if place.startswith("tfds:"):
        return tfds_rows(FIELD, place.removeprefix("tfds:"), benchmark.splits, "split")
    path = pathlib.Path(place)
    if not path.exists():
        raise InputError(f"{FIELD} {name}={place}: does not exist: {benchmark.fetch(name)}")
    files = [path] if path.is_file() else _files(benchmark, path)
    if not files:
        raise InputError(f"{FIELD} {name}={place}: holds none of its files: {benchmark.fetch(name)}")
    return (row for file in files for row in _rows_of_file(file))


def _files(benchmark: Benchmark, folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a set in a folder, or in one of the folders in it: by name, else by split."""
    places = [folder, *sorted(child for child in folder.iterdir() if child.is_dir() and child.name[0] != ".")]
    for place in places:
        if found := sorted({file for pattern in benchmark.files for file in place.glob(pattern)}):
            return found
    for place in places:
        for split in benchmark.splits:
            if found := split_files(place, split):
                return found
    return []


def _rows_of_file(file: pathlib.Path) -> Found:
    if file.suffix == ".csv":
        return _csv_rows(file)
    if file.suffix in (".parquet", ".arrow"):
        return ((f"{file}: row {number}", columns) for number, columns in enumerate(read_table(file)))
    return jsonl_rows(file, FIELD)


def _csv_rows(file: pathlib.Path) -> Iterator[tuple[str, dict]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            for number, columns in enumerate(csv.DictReader(lines, strict=True)):
                yield f"{file}: row {number}", {key: value for key, value in columns.items() if key is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{file}: is no CSV in UTF-8 ({error}): fetch it again") from None


def _first(columns: Row, *names: str) -> Any:
    """The first of these columns that holds something; names differ between copies of a set."""
    for name in names:
        if columns.get(name) not in (None, ""):
            return columns[name]
    raise KeyError(names[0])


def _aime(columns: Row, where: str) -> dict[str, Any]:
    del where
    answer = _first(columns, "answer", "Answer", "solution", "Solution")
    number = _first({"id": None, **columns, "none": "-"}, "id", "ID", "none")
    return {"prompt": _first(columns, "problem", "Problem"), "answer": str(answer), "id": str(number)}


def _math_500(columns: Row, where: str) -> dict[str, Any]:
    del where
    return {"prompt": columns["problem"], "answer": columns["answer"], "id": str(columns["unique_id"])}


def _gsm8k(columns: Row, where: str) -> dict[str, Any]:
    del where
    return {"prompt": columns["question"], "answer": columns["answer"]}


def _gpqa(columns: Row, where: str) -> dict[str, Any]:
    """The choices stand in an order that is a function of their texts alone."""
    del where
    question = columns["Question"].strip()
    right = columns["Correct Answer"].strip()
    choices = {right, *(columns[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3))}
    ordered = sorted(choices, key=lambda choice: hashlib.sha256(f"{question}\n{choice}".encode()).digest())
    lines = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, ordered, strict=False)]
    answer = LETTERS[ordered.index(right)]
    return {"prompt": "\n".join([question, "", *lines]), "answer": answer, "id": str(_first(columns, "Record ID"))}


def _human_eval(columns: Row, where: str) -> dict[str, Any]:
    del where
    tests = {name: columns[name] for name in ("prompt", "entry_point", "test")}
    return {"prompt": columns["prompt"], "tests": tests, "id": columns["task_id"]}


def _live_code_bench(columns: Row, where: str) -> dict[str, Any]:
    cases = _cases(columns["public_test_cases"], where) + _cases(columns.get("private_test_cases") or "[]", where)
    starter = columns.get("starter_code") or ""
    try:
        metadata = columns["metadata"]
        name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
        if any(case["testtype"] == "functional" for case in cases):
            inputs = [[json.loads(line) for line in case["input"].split("\n") if line.strip()] for case in cases]
            tests = {"function": name, "inputs": inputs, "outputs": [json.loads(case["output"]) for case in cases]}
        else:
            tests = {"inputs": [case["input"] for case in cases], "outputs": [case["output"] for case in cases]}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: its tests cannot be read ({error}): fetch the file again") from None
    says = f"\n\nComplete this code:\n```python\n{starter}\n```" if starter else ""
    says = says or "\n\nThe program reads standard input and writes standard output."
    return {"prompt": f"{columns['question_content']}{says}", "tests": tests, "id": str(columns["question_id"])}


def _cases(value: str, where: str) -> list[dict[str, str]]:
    """Test cases as JSON, or as base64 of zlib of a pickle that holds the JSON text."""
    try:
        if not value.lstrip().startswith("["):
            unpack = zlib.decompressobj()
            packed = unpack.decompress(base64.b64decode(value, validate=True), UNPACKED_LIMIT)
            value = _pickled_text(packed)
        return json.loads(value)
    except (ValueError, zlib.error, RecursionError) as error:
        raise InputError(f"{where}: its test cases cannot be read ({error}): fetch the file again") from None


def _pickled_text(data: bytes) -> str:
    """The one text in a pickle; whatever else a pickle may hold, code to run among it, is refused."""
    plain = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}
    texts = []
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"):
            texts.append(argument)
        elif operation.name not in plain:
            raise ValueError(f"a pickle with {operation.name}")
    if len(texts) != 1:
        raise ValueError("a pickle that is not one text")
    return texts[0]


def _if_eval(columns: Row, where: str) -> dict[str, Any]:
    names, options = columns["instruction_id_list"], columns["kwargs"]
    if len(names) != len(options):
        raise InputError(f"{where}: {len(names)} instructions and {len(options)} of kwargs: fetch the file again")
    try:  # tensorflow-datasets has no None: its copies hold each row's options as JSON text
        options = [json.loads(given) if isinstance(given, str) else given for given in options]
        rules = [
            {"rule": name, **{key: value for key, value in given.items() if value is not None}}
            for name, given in zip(names, options, strict=True)
        ]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{where}: kwargs cannot be read ({error}): fetch the file again") from None
    return {"prompt": columns["prompt"], "rules": rules, "id": str(columns["key"])}


def _own(columns: Row, where: str) -> dict[str, Any]:
    """A row of any JSONL: graded by what it holds."""
    prompt = _first(columns, "prompt", "question", "problem")
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt):
        raise InputError(f"{where}: the prompt must be text or a list of messages: {str(prompt)[:60]!r}")
    made = {"prompt": prompt, **{name: columns[name] for name in ("language",) if name in columns}}
    if columns.get("id") is not None:
        made["id"] = str(columns["id"])
    if columns.get("tests"):
        return made | {"kind": "code", "tests": columns["tests"]}
    if columns.get("instruction_id_list"):
        return made | {"kind": "instructions", "rules": _if_eval({"key": 0, **columns}, where)["rules"]}
    given = _first({**columns, "none": NO_ANSWER}, "answer", "solution", "target", "none")
    if columns.get("judge") or given is NO_ANSWER:  # a reference answer may be there for the judge to see
        return made | {"kind": "judge"} | ({} if given is NO_ANSWER else {"answer": str(given)})
    answer, kind = str(given), columns.get("kind", "math")
    if kind not in ("math", "choice", "exact"):
        raise InputError(
            f"{where}: kind={kind!r} is not math, choice or exact, for rows with an answer: use one of them"
        )
    return made | {"kind": kind, "answer": answer}


BENCHMARKS: dict[str, Benchmark] = {
    "aime_2024": Benchmark("AIME 2024", "math", 64, "HuggingFaceH4/aime_2024", (), ("train", "test"), _aime),
    "math_500": Benchmark("MATH-500", "math", 16, "HuggingFaceH4/MATH-500", ("test.jsonl",), ("test",), _math_500),
    "gsm8k": Benchmark("GSM8K", "math", 4, "openai/gsm8k", (), ("test",), _gsm8k, "gsm8k"),
    "gpqa_diamond": Benchmark(
        "GPQA Diamond", "choice", 64, "Idavidrein/gpqa", ("gpqa_diamond.csv",), ("train", "test"), _gpqa
    ),
    "live_code_bench": Benchmark(
        "LiveCodeBench",
        "code",
        8,
        "livecodebench/code_generation_lite",
        ("test*.jsonl",),
        ("test",),
        _live_code_bench,
    ),
    "human_eval": Benchmark(
        "HumanEval", "code", 8, "openai/openai_humaneval", ("HumanEval.jsonl*",), ("test",), _human_eval
    ),
    "if_eval": Benchmark(
        "IFEval", "instructions", 1, "google/IFEval", ("ifeval_input_data.jsonl",), ("train", "test"), _if_eval
    ),
    "jsonl": Benchmark("own rows", "", 4, "", (), ("test", "eval", "train"), _own),
}
