"""Files of chats: written once, never over somebody's changes, whole after a kill."""

import json

import pytest

from grpo_jax.data import chats
from grpo_jax.data.chats import CHATS, edited_summary, read_chat_file, write_chats
from grpo_jax.errors import InputError
from grpo_jax.metrics import read_jsonl


def row(question: str, said: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}]}


ROWS, OTHER = [row("Сколько?", "Пять"), row("How many?", "Five")], [row("Who?", "I")]
MADE, OTHERWISE = {"options": {"most": 2, "deep": {"seed": 1}}}, {"options": {"most": 2, "deep": {"seed": 4}}}


def test_chats_are_readable_and_made_again_where_nobody_edited(tmp_path):
    summary = write_chats(tmp_path, ROWS, dict(MADE))
    assert summary["chats"]["rows"] == 2 and "Пять" in (tmp_path / CHATS).read_text("utf-8")
    assert read_jsonl(tmp_path / CHATS) == ROWS
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert edited_summary(tmp_path, MADE) is None and edited_summary(tmp_path, OTHERWISE) is None
    assert write_chats(tmp_path, OTHER, dict(OTHERWISE))["chats"]["sha256"] != summary["chats"]["sha256"]
    assert read_jsonl(tmp_path / CHATS) == OTHER


def edit(folder):
    path = folder / CHATS
    path.write_text(path.read_text("utf-8").replace("Five", "Five, of course"), "utf-8")
    return path.read_bytes()


def test_edited_chats_are_used_and_never_written_over(tmp_path):
    write_chats(tmp_path, ROWS, MADE | {"kept": 2})
    content = edit(tmp_path)
    found = edited_summary(tmp_path, MADE)
    assert found is not None and found["kept"] == 2
    assert found["chats"]["edited"] is True and found["chats"]["rows"] == 2
    with pytest.raises(InputError, match=r"chats.jsonl: was edited .*\(options.deep.seed: 1 then, 4 now\): .* move it"):
        edited_summary(tmp_path, OTHERWISE)
    with pytest.raises(InputError, match="was edited since it was written"):
        write_chats(tmp_path, OTHER, dict(OTHERWISE))
    assert (tmp_path / CHATS).read_bytes() == content
    (tmp_path / CHATS).write_text('{"messages": []}\n')
    with pytest.raises(InputError, match="chats.jsonl: row 1 has .*'messages'"):
        edited_summary(tmp_path, MADE)


@pytest.mark.parametrize("writes", range(4))
def test_a_kill_between_writes_leaves_no_file_that_looks_edited(tmp_path, monkeypatch, writes):
    """Chats replace earlier ones in four writes; after any of them the same command goes on."""
    write_chats(tmp_path, OTHER, dict(OTHERWISE))
    done = []

    def killed(write):
        def writing(path, content):
            if len(done) == writes:
                raise KeyboardInterrupt
            done.append(write(path, content))

        return writing

    monkeypatch.setattr(chats, "write_atomic", killed(chats.write_atomic))
    monkeypatch.setattr(chats, "write_json_atomic", killed(chats.write_json_atomic))
    with pytest.raises(KeyboardInterrupt):
        write_chats(tmp_path, ROWS, dict(MADE))
    monkeypatch.undo()
    assert edited_summary(tmp_path, MADE) is None
    write_chats(tmp_path, ROWS, dict(MADE))
    assert read_jsonl(tmp_path / CHATS) == ROWS


def test_a_foreign_file_is_not_written_over(tmp_path):
    (tmp_path / CHATS).write_text("mine\n")
    with pytest.raises(InputError, match="or written by something else"):
        write_chats(tmp_path, ROWS, dict(MADE))
    assert (tmp_path / CHATS).read_text() == "mine\n"


def test_both_kinds_of_rows_are_read(tmp_path):
    pair = {"prompt": "How many?", "completion": "Five", "id": "7"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (ROWS[1] | {"id": "7"}, pair)))
    one, other = read_chat_file(path, "--part a")
    assert one == other == ROWS[1] | {"id": "7"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "--part a='.*rows.jsonl': has no rows"),
        ('{"question": "a"}\n', "row 1 has .'question'.: it must hold 'messages'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n', "row 1 has"),
        ('{"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "b"}]}\n', "row 1 has"),
        ("no json\n\n", "line 1 is not JSON"),
    ],
)
def test_rows_that_are_no_chats(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_chat_file(path, "--part a")
    with pytest.raises(InputError, match="no such file"):
        read_chat_file(tmp_path / "none", "--part a")
