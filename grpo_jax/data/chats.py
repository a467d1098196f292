"""Files of chats, one a line, that a person reads and edits: written once, never over somebody's changes.

Beside the file stand chats.sha256, the digest of what was written, and summary.json, the options it was made with.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.errors import InputError
from grpo_jax.metrics import read_jsonl, write_atomic, write_json_atomic

CHATS, DIGEST, SUMMARY = "chats.jsonl", "chats.sha256", "summary.json"


def read_chat_file(path: str | pathlib.Path, field: str) -> list[dict[str, Any]]:
    """Rows of {'messages': [...]} or {'prompt', 'completion'} as rows with messages that end with the assistant's.

    Other columns stay. Raises InputError naming field, file, row and fix.
    """
    if not pathlib.Path(path).is_file():
        raise InputError(f"{field}={str(path)!r}: no such file: name a JSONL file of chats")
    rows = [_with_messages(row, f"{path}: row {number}") for number, row in enumerate(read_jsonl(path), start=1)]
    if not rows:
        raise InputError(f"{field}={str(path)!r}: has no rows: name a JSONL file of chats")
    return rows


def _with_messages(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    messages = row.get("messages")
    if messages is None and {"prompt", "completion"} <= row.keys():
        asked = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        messages = [*asked, {"role": "assistant", "content": row["completion"]}]
        row = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
    whole = isinstance(messages, list) and len(messages) > 1 and all(map(_is_message, messages))
    if not isinstance(messages, list) or not whole or messages[-1]["role"] != "assistant":
        raise InputError(
            f"{where} has {sorted(row)}: it must hold 'messages' (role and content, both text; the last the "
            "assistant's), or 'prompt' and 'completion': mend or remove it"
        )
    return {**row, "messages": messages}


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def edited_summary(workdir: pathlib.Path, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary to go on with where somebody has edited the chats of these options; None where nobody has.

    `options` are entries of the summary. Raises InputError where edited chats were made with other ones: to make them
    anew would lose the changes.
    """
    path = workdir / CHATS
    if not (path.is_file() and (workdir / SUMMARY).is_file()) or _as_written(workdir, path.read_bytes()):
        return None
    held = json.loads((workdir / SUMMARY).read_text(encoding="utf-8"))
    given = json.loads(json.dumps(dict(options)))
    other = next((name for name, value in given.items() if held.get(name) != value), None)
    if other is not None:
        raise _edited(path, f"and this asks for other options ({_difference(held.get(other), given[other], other)})")
    rows = read_chat_file(path, "chats")
    return held | {"chats": {**held["chats"], "rows": len(rows), "edited": True}}


def write_chats(workdir: pathlib.Path, rows: Sequence[Mapping[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """Writes chats.jsonl, chats.sha256 and, last, summary.json; returns the summary, with 'chats': file, rows, sha256.

    Raises InputError instead of writing over chats that somebody has edited.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path, content = workdir / CHATS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    there, digest = path.read_bytes() if path.is_file() else None, _digest(content.encode())
    if there not in (None, content.encode()) and not _as_written(workdir, there):
        raise _edited(path, "or written by something else")
    # Both digests until the file is there: a kill between the two writes leaves no file that looks edited.
    write_atomic(workdir / DIGEST, "".join(f"{d}  {CHATS}\n" for d in {digest, _digest(there or b"")}))
    write_atomic(path, content)
    write_atomic(workdir / DIGEST, f"{digest}  {CHATS}\n")
    summary = {**summary, "chats": {"file": CHATS, "rows": len(rows), "sha256": digest, "edited": False}}
    write_json_atomic(workdir / SUMMARY, summary)
    return summary


def _as_written(workdir: pathlib.Path, content: bytes) -> bool:
    known = (workdir / DIGEST).read_text(encoding="utf-8") if (workdir / DIGEST).is_file() else ""
    return _digest(content) in known.split()


def _edited(path: pathlib.Path, why: str) -> InputError:
    return InputError(
        f"{path}: was edited since it was written, {why}: to use it as it is, give it to grpo-jax sft "
        f"(--config.sft.path={path}) or mix; to make it anew, move it away or name another --workdir"
    )


def _difference(held: Any, given: Any, name: str) -> str:
    """The first option that differs, as 'name: held, given'."""
    if isinstance(held, dict) and isinstance(given, dict):
        for key in given:
            if held.get(key) != given[key]:
                return _difference(held.get(key), given[key], f"{name}.{key}")
    return f"{name}: {held!r} then, {given!r} now"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
