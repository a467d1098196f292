"""Rows from where they lie: JSONL files, tensorflow-datasets, Hugging Face dataset folders, generated sums and tasks.

Every row is a dict of its original columns, with 'prompt' (text, or a list of messages) and 'answer'
(text) put in their place or beside them.
"""

import difflib
import gzip
import importlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from grpo_jax.config import DataConfig
from grpo_jax.data import arithmetic, tasks
from grpo_jax.errors import InputError

HELD_OUT_SHARE = 0.1  # of a JSONL file without data.eval_path: its last rows, at least one


def load_rows(config: DataConfig, split: str, seed: int) -> list[dict]:
    """All rows of 'train' or 'eval' (held out), each with at least 'prompt' and 'answer'.

    Raises InputError naming file, row, column and fix.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"{split=} must be 'train' or 'eval'")
    if config.source == "memory":
        raise InputError("data.source='memory' takes its rows from grpo_jax.train(config, dataset=...)")
    if config.source == "arithmetic":
        rows = arithmetic.rows(seed, split, config.digits, config.path or "symbols")
        if not rows:
            raise InputError(
                f"data.digits={config.digits} leaves no sum to the {split} split: raise it, or change {seed=}"
            )
        return rows
    if config.source == "tasks":
        return tasks.rows(seed, split, config.path, config.digits)
    field = "data.eval_path" if split == "eval" and config.eval_path else "data.path"
    path = config.eval_path if field == "data.eval_path" else config.path
    if not path:
        raise InputError(f"data.path is empty: data.source={config.source!r} needs {_PATH_MEANS[config.source]}")
    found = _READERS[config.source](config, split, field, path)
    rows = [_row(config, columns, where) for where, columns in found]
    if not rows:
        raise InputError(f"{field}={path!r} is empty: no row in it")
    if config.source == "jsonl" and not config.eval_path:
        return _part(rows, split, path)
    return rows


_PATH_MEANS = {"jsonl": "a file", "tfds": "a builder name such as gsm8k", "hf": "a dataset folder"}
Found = Iterable[tuple[str, dict]]  # (where the row stands: file and line, or row counted from 0; its columns)


def _part(rows: list[dict], split: str, path: str) -> list[dict]:
    if len(rows) < 2:
        raise InputError(f"data.path={path!r} has one row, none is left to hold out: add rows or set data.eval_path")
    held_out = max(1, int(len(rows) * HELD_OUT_SHARE))
    return rows[-held_out:] if split == "eval" else rows[:-held_out]


def _row(config: DataConfig, columns: dict, where: str) -> dict:
    prompt = _column(columns, "data.prompt_column", config.prompt_column, where)
    made = {**columns, "prompt": _check_prompt(prompt, config.prompt_column, where), "answer": ""}
    if config.answer_column:
        answer = _column(columns, "data.answer_column", config.answer_column, where)
        made["answer"] = _answer(answer, config, where)
    return made


def _column(columns: dict, field: str, name: str, where: str) -> Any:
    if name not in columns:
        raise InputError(f"{where}: {field}={name!r} is not a column; {_nearest(name, columns)}")
    return columns[name]


def _nearest(name: str, names: Iterable[str]) -> str:
    names = sorted(map(str, names))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}there are: {', '.join(names) or 'none'}"


def _check_prompt(prompt: Any, column: str, where: str) -> str | list[dict]:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt:
        for message in prompt:
            texts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
            if not all(isinstance(text, str) for text in texts):
                raise InputError(f"{where}: {column}: message {message!r} must have the texts 'role' and 'content'")
        return prompt
    raise InputError(f"{where}: {column}={prompt!r} must be text or a list of messages, and not empty")


def _answer(answer: Any, config: DataConfig, where: str) -> str:
    """The short answer: what follows the last mark, without commas; with no mark set, the column itself."""
    column, mark = config.answer_column, config.answer_marker
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None and not isinstance(answer, str):
        raise InputError(f"{where}: {column}={answer!r} must be text or a number")
    text = (answer or "").strip()
    if text and mark:
        _, found, text = text.rpartition(mark)
        if not found:
            raise InputError(f"{where}: {column} has no data.answer_marker={mark!r}: {answer!r}")
        text = text.replace(",", "").strip()
    if not text:
        raise InputError(f"{where}: {column}={answer!r} is a row without an answer: fill it in or leave the row out")
    return text


def _read_jsonl(config: DataConfig, split: str, field: str, path: str) -> Found:
    del config, split
    return jsonl_rows(pathlib.Path(path), field)


def jsonl_rows(file: pathlib.Path, field: str) -> Found:
    """Rows of a JSONL file, packed by gzip where its name ends so; raises InputError naming the line."""
    if not file.is_file():
        raise InputError(f"{field}={str(file)!r} is not a file")
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}: line {number}"
            try:
                # utf-8-sig: files from Windows tools begin with a byte order mark.
                text = line.decode("utf-8-sig").strip()
                columns = json.loads(text) if text else None
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{where} is not JSON in UTF-8: {error}") from error
            if not text:
                continue
            if not isinstance(columns, dict):
                raise InputError(f"{where} must be a JSON object of columns, not {type(columns).__name__}")
            yield where, columns


def _read_tfds(config: DataConfig, split: str, field: str, path: str) -> Found:
    """Rows of a prepared tensorflow-datasets builder, 'name' or 'name:/data_dir'; nothing is downloaded."""
    wanted, option = (config.eval_split, "data.eval_split") if split == "eval" else (config.split, "data.split")
    return tfds_rows(field, path, (wanted,), option)


def tfds_rows(field: str, path: str, splits: Sequence[str], option: str) -> Found:
    """Rows of the first of `splits` that a prepared builder has; errors name `field` and `option`."""
    name, _, data_dir = path.partition(":")
    tfds = importlib.import_module("tensorflow_datasets")
    try:
        # Without TensorFlow builders are not found by name until their module is imported.
        importlib.import_module(f"tensorflow_datasets.text.{name.partition('/')[0]}")
    except ImportError:
        pass  # another family, or a builder without code here: read from its files
    options = {"data_dir": data_dir} if data_dir else {}
    try:
        builder = tfds.builder(name, **options)
        known = builder.info.splits
    except tfds.core.registered.DatasetNotFoundError as error:
        raise InputError(_not_prepared(field, path, name, data_dir)) from error
    if not known:
        raise InputError(_not_prepared(field, path, name, data_dir))
    wanted = next((split for split in splits if split.partition("[")[0] in known), None)
    if wanted is None:
        raise InputError(f"{option}={splits[0]!r} is not a split of {path}; {_nearest(splits[0], known)}")
    try:
        source = builder.as_data_source(split=wanted)
    except NotImplementedError as error:  # prepared as TFRecord files, which cannot be read without TensorFlow
        raise InputError(_not_prepared(field, path, name, data_dir)) from error
    for number, row in enumerate(source):
        yield f"{path} {wanted}: row {number}", {key: _plain(value) for key, value in row.items()}


def _not_prepared(field: str, path: str, name: str, data_dir: str) -> str:
    family = f"import tensorflow_datasets.text.{name}; " if name == "gsm8k" else ""
    place = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        f"{field}={path!r} is not prepared in array_record form{f' in {data_dir}' if data_dir else ''}; run: "
        f'python -c "{family}import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{place}, file_format='array_record').download_and_prepare()\""
    )


def _plain(value: Any) -> Any:
    """Bytes as text, numpy values as Python's; what JSON would hold."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _read_hf(config: DataConfig, split: str, field: str, path: str) -> Found:
    """Rows of a Hugging Face dataset on disk: a `save_to_disk` folder, or split files as cloned from the Hub."""
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise InputError(f"{field}={path!r} is not a folder")
    wanted, option = (config.eval_split, "data.eval_split") if split == "eval" else (config.split, "data.split")
    if (folder / "state.json").is_file() and split == "eval" and field == "data.path":
        raise InputError(f"data.path={path!r} holds one split only: name a folder of held-out rows in data.eval_path")
    files = split_files(folder, wanted)
    if not files:
        splits = _splits(folder)
        inside = [child.name for child in folder.iterdir() if child.is_dir() and _splits(child)] if not splits else []
        fix = f"set {field} to one of its folders {', '.join(sorted(inside))}" if inside else _nearest(wanted, splits)
        raise InputError(f"{option}={wanted!r} is not a split of {field}={path!r}; {fix}")
    for file in files:
        if file.suffix == ".jsonl":
            yield from jsonl_rows(file, field)
        else:
            for number, columns in enumerate(read_table(file)):
                yield f"{file}: row {number}", columns


def split_files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """The files of a split in order; a folder saved from a single split holds just that one."""
    for saved in (folder, folder / split):
        if (saved / "state.json").is_file():
            try:
                state = json.loads((saved / "state.json").read_text())
                names = [data["filename"] for data in state["_data_files"]]
                own = state.get("_split")
                if state.get("_indices_data_files"):
                    raise InputError(f"{saved} keeps its rows by index: call flatten_indices() and save it again")
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise InputError(f"{saved / 'state.json'} is damaged: save the dataset again") from error
            if saved != folder or own in (None, split):
                return [saved / name for name in names]
            return []
    for place in (folder, folder / "data", folder / split):
        for suffix in ("parquet", "jsonl"):
            names = [f"{split}.{suffix}", f"{split}-*.{suffix}"] if place != folder / split else [f"*.{suffix}"]
            if files := sorted(file for name in names for file in place.glob(name)):
                return files
    return []


def _splits(folder: pathlib.Path) -> set[str]:
    """Names of the splits that a folder holds, for the error message."""
    if (folder / "state.json").is_file():
        return {str(json.loads((folder / "state.json").read_text()).get("_split"))}
    found = {child.parent.name for child in folder.glob("*/state.json")}
    for pattern in ("*.parquet", "*.jsonl", "data/*.parquet", "data/*.jsonl"):
        found |= {file.stem.partition("-")[0] for file in folder.glob(pattern)}
    return found


def read_table(file: pathlib.Path) -> list[dict]:
    """Rows of an Arrow stream (as `save_to_disk` writes) or a Parquet file."""
    pyarrow = importlib.import_module("pyarrow")
    try:
        if file.suffix == ".parquet":
            table = importlib.import_module("pyarrow.parquet").read_table(file)
        else:
            with pyarrow.memory_map(str(file)) as source:
                table = importlib.import_module("pyarrow.ipc").open_stream(source).read_all()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise InputError(f"{file} cannot be read ({error}); cloned from a hub, it may need `git lfs pull`") from error
    return [{str(key): _plain(value) for key, value in row.items()} for row in table.to_pylist()]


_READERS = {"jsonl": _read_jsonl, "tfds": _read_tfds, "hf": _read_hf}
