import dataclasses
import json
import pathlib
import re
import shutil

import pytest

from grpo_jax.config import DataConfig
from grpo_jax.data import arithmetic, sources
from grpo_jax.errors import InputError

GSM8K = DataConfig(source="jsonl", answer_marker="####")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(config, split="train", seed=0):
    return sources.load_rows(config, split, seed)


@pytest.fixture
def small(repo_root):
    return repo_root / "tests" / "fixtures" / "gsm8k_small.jsonl"


def test_fixture_in_gsm8k_s_format(small):
    config = dataclasses.replace(GSM8K, path=str(small))
    train, held = rows_of(config), rows_of(config, "eval")
    assert [row["answer"] for row in train + held] == (
        ["28", "210", "1250", "28", "21", "-5", "150", "36", "150000", "25", "35", "31"]
    )
    assert len(held) == 1 and train[0]["prompt"] == train[0]["question"]


@pytest.mark.parametrize(("count", "held"), [(2, 1), (9, 1), (20, 2), (39, 3)])
def test_last_tenth_of_a_file_is_held_out(tmp_path, count, held):
    path = write(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": i, "level": i % 3} for i in range(count)])
    config = DataConfig(source="jsonl", path=path)
    train, rest = rows_of(config), rows_of(config, "eval")
    assert [row["prompt"] for row in train + rest] == [f"q{i}" for i in range(count)]
    assert len(rest) == held and rest[-1]["answer"] == str(count - 1) and rest[-1]["level"] == (count - 1) % 3


def test_eval_path_is_held_out_and_leaves_the_file_whole(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "a", "answer": "1"}])
    other = write(tmp_path / "b.jsonl", [{"question": "b", "answer": "2"}])
    config = DataConfig(source="jsonl", path=path, eval_path=other)
    assert [r["prompt"] for r in rows_of(config)] == ["a"] and [r["prompt"] for r in rows_of(config, "eval")] == ["b"]


def test_prompts_may_be_messages_and_columns_are_named_by_config(tmp_path):
    messages = [{"role": "user", "content": "2+2?"}]
    path = write(tmp_path / "a.jsonl", [{"chat": messages, "gold": 4}] * 2)
    (row,) = rows_of(DataConfig(source="jsonl", path=path, prompt_column="chat", answer_column="gold"))
    assert row == {"chat": messages, "gold": 4, "prompt": messages, "answer": "4"}


def test_answer_follows_the_last_mark(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a #### 1\n#### 2,345 \n"}] * 2)
    assert rows_of(dataclasses.replace(GSM8K, path=path))[0]["answer"] == "2345"
    assert rows_of(DataConfig(source="jsonl", path=path))[0]["answer"] == "a #### 1\n#### 2,345"


GOOD = json.dumps({"question": "q", "answer": "1"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.path='FILE' is empty"),
        ("\n\n", "data.path='FILE' is empty"),
        (GOOD, "data.path='FILE' has one row, none is left to hold out: add rows or set data.eval_path"),
        (f"{GOOD}\n{{bad\n", "FILE: line 2 is not JSON"),
        (f"{GOOD}\n\n[1]\n", "FILE: line 3 must be a JSON object of columns, not list"),
        (
            f"{GOOD}\n" + json.dumps({"questions": "q", "answer": "1"}),
            "FILE: line 2: data.prompt_column='question' is not a column; did you mean 'questions'? there are: answer",
        ),
        (
            f"{GOOD}\n" + json.dumps({"question": "q", "anwser": "1"}),
            "FILE: line 2: data.answer_column='answer' is not a column; did you mean 'anwser'?",
        ),
        (f"{GOOD}\n" + json.dumps({"question": "q", "answer": " "}), "FILE: line 2: answer=' ' is a row without"),
        (f"{GOOD}\n" + json.dumps({"question": "q", "answer": None}), "FILE: line 2: answer=None is a row without"),
        (json.dumps({"question": "q", "answer": ["1"]}), "FILE: line 1: answer=['1'] must be text or a number"),
        (json.dumps({"question": "", "answer": "1"}), "FILE: line 1: question='' must be text or a list of messages"),
        (
            json.dumps({"question": [{"role": "user"}], "answer": "1"}),
            "FILE: line 1: question: message {'role': 'user'} must have the texts",
        ),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        rows_of(DataConfig(source="jsonl", path=str(path)))
    assert message.replace("FILE", str(path)) in str(error.value) and "\n" not in str(error.value)


def test_row_without_the_mark_or_with_nothing_behind_it(tmp_path):
    good = {"question": "q", "answer": "#### 1"}
    path = write(tmp_path / "a.jsonl", [good, {"question": "q", "answer": "so 5"}])
    with pytest.raises(InputError, match=r"a.jsonl: line 2: answer has no data.answer_marker='####': 'so 5'"):
        rows_of(dataclasses.replace(GSM8K, path=path))
    path = write(tmp_path / "a.jsonl", [good, {"question": "q", "answer": "so ####"}])
    with pytest.raises(InputError, match=r"line 2: answer='so ####' is a row without an answer"):
        rows_of(dataclasses.replace(GSM8K, path=path))


def test_other_bad_paths():
    with pytest.raises(InputError, match=r"data.path='/no/such.jsonl' is not a file"):
        rows_of(DataConfig(source="jsonl", path="/no/such.jsonl"))
    with pytest.raises(InputError, match=r"data.eval_path='/no/such.jsonl' is not a file"):
        rows_of(DataConfig(source="jsonl", path="x", eval_path="/no/such.jsonl"), "eval")
    with pytest.raises(InputError, match=r"data.path is empty: data.source='jsonl' needs a file"):
        rows_of(DataConfig(source="jsonl"))
    with pytest.raises(InputError, match=r"data.source='memory' takes its rows from grpo_jax.train"):
        rows_of(DataConfig(source="memory"))
    with pytest.raises(InputError, match=r"data.path='/no/folder' is not a folder"):
        rows_of(DataConfig(source="hf", path="/no/folder"))


def test_arithmetic_takes_digits_seed_and_phrasing():
    config = DataConfig(digits=1)
    train, held = rows_of(config, seed=2), rows_of(config, "eval", seed=2)
    assert sorted(row["prompt"] for row in train + held) == sorted(f"{a}+{b}=" for a in range(10) for b in range(10))
    arithmetic.assert_disjoint(train, held)
    assert train != rows_of(config, seed=3)
    words = rows_of(dataclasses.replace(config, path="question"), seed=2)
    assert [row["prompt"] for row in words] == [f"What is {row['a']} + {row['b']}?" for row in train]
    assert max(row["a"] for row in rows_of(DataConfig(digits=3))) > 99


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """GSM8K's own builder, its download replaced by the fixture, prepared as the error message says."""
    tfds = pytest.importorskip("tensorflow_datasets")
    module = pytest.importorskip("tensorflow_datasets.text.gsm8k.gsm8k")
    fixture = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "gsm8k_small.jsonl"
    folder = tmp_path_factory.mktemp("tfds")

    def split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(fixture), "test": self._generate_examples(fixture)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Gsm8k, "_split_generators", split_generators)
        builder = tfds.builder("gsm8k", data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return folder


def test_tfds_without_tensorflow(prepared, small):
    config = dataclasses.replace(GSM8K, source="tfds", path=f"gsm8k:{prepared}")
    expected = {json.loads(line)["question"] for line in small.read_text().splitlines()}
    rows = rows_of(config)
    assert {row["prompt"] for row in rows} == expected
    # The builder has the short answer beside the solution: two ways to it.
    assert all(row["answer"] == row["short_answer"].replace(",", "") for row in rows)
    assert len(rows_of(config, "eval")) == 12
    assert len(rows_of(dataclasses.replace(config, split="train[:5]"))) == 5


def test_tfds_names_split_and_command(prepared, tmp_path):
    config = dataclasses.replace(GSM8K, source="tfds", path=f"gsm8k:{prepared}")
    with pytest.raises(InputError, match=r"data.eval_split='tests' is not a split of gsm8k:.*; did you mean 'test'\?"):
        rows_of(dataclasses.replace(config, eval_split="tests"), "eval")
    with pytest.raises(InputError) as error:
        rows_of(dataclasses.replace(config, path=f"gsm8k:{tmp_path}"))
    assert str(error.value) == (
        f"data.path='gsm8k:{tmp_path}' is not prepared in array_record form in {tmp_path}; run: python -c "
        '"import tensorflow_datasets.text.gsm8k; import tensorflow_datasets as tfds; '
        f"tfds.builder('gsm8k', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()\""
    )
    with pytest.raises(InputError, match=r"data.path='no_such_set:.* is not prepared"):
        rows_of(dataclasses.replace(config, path=f"no_such_set:{tmp_path}"))


def test_command_that_prepares_is_a_program():
    code = re.search(r'python -c "(.*)"$', sources._not_prepared("data.path", "gsm8k:/d", "gsm8k", "/d"))
    assert code
    compile(code[1], "command", "exec")


def save_split(folder, split, rows):
    """What `datasets.Dataset.save_to_disk` leaves: two Arrow streams and their names in state.json."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for i, name in enumerate(names):
        table = pa.Table.from_pylist(rows[i * len(rows) // 2 : (i + 1) * len(rows) // 2])
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split, "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


@pytest.fixture
def rows(small):
    return [json.loads(line) for line in small.read_text().splitlines()]


def test_hugging_face_folder_of_arrow_files(tmp_path, rows):
    save_split(tmp_path / "d" / "train", "train", rows[:8])
    save_split(tmp_path / "d" / "test", "test", rows[8:])
    (tmp_path / "d" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    config = dataclasses.replace(GSM8K, source="hf", path=str(tmp_path / "d"))
    assert [r["prompt"] for r in rows_of(config)] == [r["question"] for r in rows[:8]]
    assert [r["answer"] for r in rows_of(config, "eval")] == ["150000", "25", "35", "31"]
    with pytest.raises(InputError, match=r"data.split='trian' is not a split of data.path=.*; did you mean 'train'\?"):
        rows_of(dataclasses.replace(config, split="trian"))


def test_hugging_face_folder_of_one_split(tmp_path, rows):
    save_split(tmp_path / "one", "train", rows[:8])
    save_split(tmp_path / "other", None, rows[8:])
    config = dataclasses.replace(GSM8K, source="hf", path=str(tmp_path / "one"))
    assert len(rows_of(config)) == 8
    with pytest.raises(InputError, match=r"holds one split only: name a folder of held-out rows in data.eval_path"):
        rows_of(config, "eval")
    assert len(rows_of(dataclasses.replace(config, eval_path=str(tmp_path / "other")), "eval")) == 4
    with pytest.raises(InputError, match=r"data.split='validation' is not a split"):
        rows_of(dataclasses.replace(config, split="validation"))
    state = tmp_path / "one" / "state.json"
    state.write_text(state.read_text().replace('"_indices_data_files": null', '"_indices_data_files": [{}]'))
    with pytest.raises(InputError, match=r"keeps its rows by index"):
        rows_of(config)
    state.write_text("{")
    with pytest.raises(InputError, match=r"state.json is damaged"):
        rows_of(config)


@pytest.mark.parametrize("place", [".", "data"])
def test_hugging_face_folder_cloned_from_the_hub(tmp_path, rows, place):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "gsm8k" / "main"
    (folder / place).mkdir(parents=True, exist_ok=True)
    for name, part in (("train-00000-of-00002", rows[:5]), ("train-00001-of-00002", rows[5:8])):
        parquet.write_table(pa.Table.from_pylist(part), folder / place / f"{name}.parquet")
    write(folder / place / "test.jsonl", rows[8:])
    config = dataclasses.replace(GSM8K, source="hf", path=str(folder))
    assert [r["question"] for r in rows_of(config) + rows_of(config, "eval")] == [r["question"] for r in rows]
    with pytest.raises(InputError, match=r"set data.path to one of its folders main"):
        rows_of(dataclasses.replace(config, path=str(tmp_path / "gsm8k")))
    with pytest.raises(InputError, match=r"train-00000-of-00002.parquet: row 0: data.prompt_column='quest' is not a"):
        rows_of(dataclasses.replace(config, prompt_column="quest"))
    (folder / place / "train-00001-of-00002.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"train-00001-of-00002.parquet cannot be read .*git lfs pull"):
        rows_of(config)


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_all_of_gsm8k_has_numbers_for_answers(shared_dir, tmp_path, split, count):
    source = shared_dir / "data" / "gsm8k" / f"{split}.jsonl"
    if not source.is_file():
        pytest.skip("no GSM8K beside the checkout")
    path = shutil.copy(source, tmp_path / "all.jsonl")
    config = dataclasses.replace(GSM8K, path=str(path), eval_path=str(path))
    rows = rows_of(config)
    assert len(rows) == count
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", row["answer"]) for row in rows)
