"""Evaluation sets in the formats that they are published in: small files made here, read from every kind of place."""

import base64
import csv
import gzip
import json
import pickle
import zlib

import pytest

from grpo_jax.data import benchmarks
from grpo_jax.data.benchmarks import BENCHMARKS, read_benchmark, with_instruction
from grpo_jax.errors import InputError
from grpo_jax.rewards.code import read_tests
from grpo_jax.rewards.grading import Grader

PUBLIC = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
PRIVATE = [{"input": "5 6\n", "output": "11\n", "testtype": "stdin"}]
FUNCTIONAL = [{"input": '[1, 2]\n"a"', "output": "[2, 1]", "testtype": "functional"}]


def packed(cases: list[dict]) -> str:
    """As the files hold private tests: base64 of zlib of a pickle of JSON text."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def lcb(number: str, public: list[dict], private: str, starter: str, metadata: dict) -> dict:
    return {
        "question_title": "A",
        "question_content": f"Problem {number}",
        "platform": "atcoder",
        "question_id": number,
        "contest_id": "abc1",
        "contest_date": "2024-08-01T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(public),
        "private_test_cases": private,
        "metadata": json.dumps(metadata),
    }


def gpqa(question: str, right: str) -> dict:
    wrong = {f"Incorrect Answer {i}": f"wrong {i}\n" for i in (1, 2, 3)}
    more = {"Pre-Revision Question": "old", "Subdomain": "Physics (general)", "High-level domain": "Physics"}
    return {**more, "Record ID": f"rec{len(question)}", "Question": question, "Correct Answer": right, **wrong}


KWARGS = {"num_words": None, "relation": None, "num_highlights": None, "end_phrase": None}
ROWS: dict[str, list[dict]] = {
    "aime_2024": [
        {"id": 60, "problem": "Find $x$.", "solution": "So \\boxed{204}.", "answer": "204", "url": "u", "year": "2024"},
        {"id": 61, "problem": "Find $y$.", "solution": "So \\boxed{025}.", "answer": "025", "url": "u", "year": "2024"},
    ],
    "math_500": [
        {
            "problem": "Convert $(0,3)$.",
            "solution": "It is \\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        }
    ],
    "gsm8k": [{"question": "How many?", "answer": "One and <<1+1=2>>2.\n#### 1,002"}],
    "gpqa_diamond": [gpqa('What, and "why"?\nTwo lines', "right one"), gpqa("Which?", "other")],
    "live_code_bench": [
        lcb("abc_a", PUBLIC, packed(PRIVATE), "", {}),
        lcb("3242", FUNCTIONAL, json.dumps(FUNCTIONAL), "class Solution:\n    def f(self, a, b):", {"func_name": "f"}),
    ],
    "human_eval": [
        {
            "task_id": "HumanEval/0",
            "prompt": 'def one(x):\n    """One more."""\n',
            "entry_point": "one",
            "canonical_solution": "    return x + 1\n",
            "test": "def check(candidate):\n    assert candidate(1) == 2\n",
        }
    ],
    "if_eval": [
        {
            "key": 1000,
            "prompt": "Write 300 words without commas.",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [KWARGS, {**KWARGS, "num_words": 300, "relation": "at least"}],
        }
    ],
    "jsonl": [
        {"question": "1+1", "answer": 2, "language": "de"},
        {"prompt": [{"role": "user", "content": "hi"}], "answer": "B", "kind": "choice", "id": "x7"},
        {"problem": "add", "tests": {"inputs": ["1\n"], "outputs": ["2\n"]}},
        {"prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    ],
}
# The file of the published repository, beside a split's parquet file.
PUBLISHED = {
    "math_500": "test.jsonl",
    "gpqa_diamond": "gpqa_diamond.csv",
    "live_code_bench": "test.jsonl",
    "human_eval": "HumanEval.jsonl.gz",
    "if_eval": "ifeval_input_data.jsonl",
    "aime_2024": "data/train-00000-of-00001.parquet",
    "gsm8k": "main/test-00000-of-00001.parquet",
    "jsonl": "test.jsonl",
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", list(ROWS))
def test_published_file_folder_and_jsonl_are_read_alike(tmp_path, name):
    assert set(ROWS) == set(BENCHMARKS)
    plain = read_benchmark(name, write(tmp_path / "plain.jsonl", ROWS[name]))
    file = write(tmp_path / "hub" / PUBLISHED[name], ROWS[name])
    assert read_benchmark(name, file) == plain
    assert read_benchmark(name, str(tmp_path / "hub")) == plain
    if name != "jsonl":  # its rows differ in their columns
        split = BENCHMARKS[name].splits[0]
        write(tmp_path / "parquet" / "data" / f"{split}-00000-of-00001.parquet", ROWS[name])
        assert read_benchmark(name, str(tmp_path / "parquet")) == plain
    assert read_benchmark(name, file, 1) == plain[:1] and len(plain) == len(ROWS[name])


def test_problems_of_each_set(tmp_path):
    read = {name: read_benchmark(name, write(tmp_path / f"{name}.jsonl", rows)) for name, rows in ROWS.items()}
    assert [p["answer"] for p in read["aime_2024"]] == ["204", "025"] and read["aime_2024"][0]["id"] == "60"
    assert read["math_500"][0]["answer"] == "\\left( 3, \\frac{\\pi}{2} \\right)"
    (rule, words) = read["if_eval"][0]["rules"]
    assert rule == {"rule": "punctuation:no_comma"} and words["num_words"] == 300
    assert [p["kind"] for p in read["jsonl"]] == ["math", "choice", "code", "instructions"]
    assert [p["id"] for p in read["jsonl"]] == ["0", "x7", "2", "3"] and read["jsonl"][0]["language"] == "de"
    for problem, right in zip(read["gpqa_diamond"], ("right one", "other"), strict=True):
        lines = problem["prompt"].split("\n")
        assert f"{problem['answer']}) {right}" in lines and sum(line[1:2] == ")" for line in lines) == 4
    program, function = [read_tests(p["tests"], "here") for p in read["live_code_bench"]]
    assert program.programs == ((b"1 2\n", "3\n"), (b"5 6\n", "11\n"))
    assert function.function == "f" and json.loads(function.given)["calls"] == [[[[1, 2], "a"], [2, 1]]] * 2
    assert "def f(self" in read["live_code_bench"][1]["prompt"]
    Grader().check([p for name in ("math_500", "if_eval", "gpqa_diamond") for p in read[name]], "sets")


def test_the_order_of_choices_is_their_own(tmp_path):
    rows = [gpqa(f"question {i}", "right") for i in range(40)]
    letters = [p["answer"] for p in read_benchmark("gpqa_diamond", write(tmp_path / "a.csv", rows))]
    backwards = [p["answer"] for p in read_benchmark("gpqa_diamond", write(tmp_path / "b.csv", rows[::-1]))]
    assert letters == backwards[::-1] and set(letters) == set("ABCD")


def test_instructions_say_how_to_answer():
    problem = {"kind": "math", "prompt": "1+1"}
    assert with_instruction(problem).startswith("1+1\n\n") and "\\boxed{}" in with_instruction(problem)
    messages = [{"role": "user", "content": "hi"}]
    assert with_instruction({"kind": "math", "prompt": messages}) == messages
    assert with_instruction({"kind": "instructions", "prompt": "say"}) == "say"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """One builder of tensorflow-datasets with a config a set, prepared as array_record."""
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.features

    def flat(value):
        """None has no place there: options of instructions are JSON texts."""
        return (
            [item if isinstance(item, str) else json.dumps(item) for item in value]
            if isinstance(value, list)
            else value
        )

    def feature(value):
        return features.Sequence(features.Text()) if isinstance(value, list) else features.Text()

    class SmallSets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ROWS if name != "jsonl"]  # noqa: RUF012

        def _info(self):
            row = ROWS[self.builder_config.name][0]
            return self.dataset_info_from_configs(
                features=features.FeaturesDict({k: feature(v) for k, v in row.items()})
            )

        def _split_generators(self, dl_manager):
            split = BENCHMARKS[self.builder_config.name].splits[-1]
            return {split: self._generate_examples()}

        def _generate_examples(self):
            for number, row in enumerate(ROWS[self.builder_config.name]):
                yield number, {k: flat(v) if isinstance(v, list) else str(v) for k, v in row.items()}

    folder = tmp_path_factory.mktemp("small_sets")
    for name in ROWS:
        if name != "jsonl":
            builder = SmallSets(config=name, data_dir=str(folder), file_format="array_record")
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return folder


@pytest.mark.parametrize("name", [name for name in ROWS if name != "jsonl"])
def test_tfds(prepared, tmp_path, name):
    found = read_benchmark(name, f"tfds:small_sets/{name}:{prepared}")
    plain = read_benchmark(name, write(tmp_path / "plain.jsonl", ROWS[name]))

    def by_prompt(problems):  # array_record files are shuffled; rows without an id are numbered as they come
        return sorted([{k: v for k, v in p.items() if k != "id" or name != "gsm8k"} for p in problems], key=str)

    assert by_prompt(found) == by_prompt(plain)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "jsonl"])
def test_what_is_missing_is_said_with_where_to_get_it(tmp_path, name):
    benchmark = BENCHMARKS[name]
    for place in ("", str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(InputError) as error:
            read_benchmark(name, place)
        said = str(error.value)
        assert f"huggingface.co/datasets/{benchmark.source}" in said and f"--set {name}={name}" in said
        assert "\n" not in said and (not benchmark.files or benchmark.files[0].replace("*", "") in said)
    other = write(tmp_path / "other.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=r"other.jsonl: line 1: no column '.*', as .* has \(text\): fetch"):
        read_benchmark(name, other)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("gsm8", [], "--set gsm8: no such set; there are aime_2024, .*; did you mean gsm8k?"),
        ("gsm8k", [], "has no rows: fetch"),
        ("jsonl", [{"prompt": 5, "answer": "1"}], "line 1: the prompt must be text or a list of messages: '5'"),
        ("jsonl", [{"prompt": "a", "answer": "1", "kind": "essay"}], "kind='essay' is not math, choice or exact"),
        ("if_eval", [{**ROWS["if_eval"][0], "kwargs": [{}]}], "line 1: 2 instructions and 1 of kwargs"),
        ("if_eval", [{**ROWS["if_eval"][0], "kwargs": ["{", "{}"]}], "line 1: kwargs cannot be read"),
        ("live_code_bench", [lcb("a", PUBLIC, "???", "", {})], "line 1: its test cases cannot be read"),
        (
            "live_code_bench",
            [lcb("a", [{"testtype": "functional", "input": "[", "output": "1"}], "[]", "", {})],
            "read",
        ),
    ],
)
def test_bad_sets_are_refused_in_one_line(tmp_path, name, rows, message):
    with pytest.raises(InputError, match=message) as error:
        read_benchmark(name, write(tmp_path / "a.jsonl", rows))
    assert "\n" not in str(error.value)


def test_a_pickle_is_never_run(tmp_path):
    """Packed tests are pickles: one that would call something is refused, and calls nothing."""
    ran = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return open, (str(ran), "w")

    value = base64.b64encode(zlib.compress(pickle.dumps(Attack()))).decode()
    with pytest.raises(InputError, match="a pickle with"):
        read_benchmark("live_code_bench", write(tmp_path / "a.jsonl", [lcb("a", PUBLIC, value, "", {})]))
    assert not ran.exists()
    with pytest.raises(ValueError, match="not one text"):
        benchmarks._pickled_text(pickle.dumps(""[:0])[:2] + b".")
    for protocol in range(1, pickle.HIGHEST_PROTOCOL + 1):
        assert benchmarks._pickled_text(pickle.dumps("a\n'b", protocol)) == "a\n'b"
