"""The reward 'judge' against a server of our own on this machine."""

import contextlib

import pytest
from judge_server import reply, says, serving

from grpo_jax.config import JudgeConfig
from grpo_jax.errors import InputError
from grpo_jax.rewards.judge import JudgeError, JudgeReward, Retry, parse_verdict

GOOD = (200, {}, says(True))


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with contextlib.ExitStack() as stack:

        def start(*script, **options):
            server, waits = stack.enter_context(serving(*script)), []
            config = JudgeConfig(url=server.url, model="judge-1", **options)
            return server, JudgeReward(config, sleep=waits.append), waits

        yield start


def test_what_is_asked_and_what_comes_back(served, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    verdict = lambda body: says("12" in body["messages"][0]["content"].split("[answer to judge]")[1])  # noqa: E731
    server, judge, _ = served((200, {}, verdict), key_file=str(tmp_path / "key"), max_tokens=77)
    logged = {}
    chat = [{"role": "user", "content": "7+5?"}]
    scores = judge(
        prompts=["7+5?", chat, "7+5?", "7+5?"],
        completions=["it is 12 {prompt}", [{"role": "assistant", "content": "it is 13"}], "11", "it is 12 {prompt}"],
        answer=["12", "12", None, "12"],
        log_extra=logged.__setitem__,
        log_metric=logged.__setitem__,
    )
    assert scores == [1.0, 0.0, 0.0, 1.0] and logged == {"judge": ["because"] * 4, "judge/requests": 3}
    path, key, body = server.seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0.0, 77)
    assert any("user: 7+5?" in b["messages"][0]["content"] for *_, b in server.seen)
    assert judge(prompts=["7+5?"], completions=["it is 12 {prompt}"], answer=["12"]) == [1.0]
    assert len(server.seen) == 3  # the second time nobody is asked


def test_failures_are_repeated_with_growing_pauses(served):
    script = [(500, {}, ""), (429, {"Retry-After": "7"}, ""), (200, {}, "no json"), (200, {}, reply("hm")), GOOD]
    server, judge, waits = served(*script, retries=4)
    assert judge(prompts=["p"], completions=["c"]) == [1.0]
    assert waits == [0.5, 7.0, 2.0, 4.0] and len(server.seen) == 5


def test_a_server_that_never_answers_well_is_an_error(served):
    server, judge, waits = served((503, {}, ""), retries=2)
    with pytest.raises(JudgeError, match="HTTP 503, 3 times"):
        judge(prompts=["p"], completions=["c"])
    assert len(server.seen) == 3 and len(waits) == 2
    server, judge, waits = served((401, {}, ""), retries=2)
    with pytest.raises(JudgeError, match="HTTP 401"):
        judge(prompts=["p"], completions=["c"])
    assert len(server.seen) == 1 and not waits  # another try would not help


def test_a_server_that_is_silent_or_gone(served):
    _, judge, _ = served((200, {"sleep": 1.0}, says(True)), timeout=0.1, retries=1)
    with pytest.raises(JudgeError, match="2 times"):
        judge(prompts=["p"], completions=["c"])
    gone = JudgeReward(JudgeConfig(url="http://127.0.0.1:1", model="m", retries=1), sleep=lambda _: None)
    with pytest.raises(JudgeError, match="refused"):
        gone(prompts=["p"], completions=["c"])


def test_the_cache_is_a_file_that_a_later_run_reads(served, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    server, judge, _ = served((200, {}, says(0.25, "half-hearted")), cache=str(path))
    assert judge(prompts=["p"] * 3, completions=["a", "b", "a"]) == [0.25] * 3 and len(server.seen) == 2
    whole = path.read_text()
    path.write_text(whole + '{"key": "torn')
    again, later, _ = served((500, {}, ""), cache=str(path))
    assert later(prompts=["p"] * 2, completions=["b", "a"]) == [0.25] * 2 and not again.seen
    assert path.read_text() == whole, "what is added stands on a line of its own"
    path.write_text("not a verdict\n" + path.read_text())
    with pytest.raises(InputError, match="line 1 is no verdict"):
        JudgeReward(JudgeConfig(url="u", model="m", cache=str(path)))


def test_rate_and_concurrency(served):
    server, judge, waits = served((200, {"sleep": 0.05}, says(True)), requests_per_second=4.0, concurrency=3)
    judge._clock = lambda: 100.0
    judge(prompts=["p"] * 8, completions=[str(i) for i in range(8)])
    assert sorted(waits) == pytest.approx([0.25 * i for i in range(1, 8)]) and 1 <= server.most <= 3


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('{"analysis": "a", "correctness": true}', ("a", 1.0)),
        ('```json\n{"analysis": "a", "correctness": false}\n```', ("a", 0.0)),
        ('<think>{"correctness": true}</think> {"correctness": 0.5, "analysis": "b"} done', ("b", 0.5)),
        ('{"analysis": "a", "correctness": "Correct"}', ("a", 1.0)),
        ('{"correctness": "no"}', ("", 0.0)),
    ],
)
def test_verdicts_are_found(text, want):
    found = parse_verdict(text)
    assert (found["analysis"], found["correctness"]) == want


@pytest.mark.parametrize(
    "text",
    ["", "true", "{", "[1]", '{"analysis": "a"}', '{"correctness": 2}', '{"correctness": NaN}', '{"correctness": "so"}']
    + ['{"correctness": null}', '{"a":' * 300, "{" * 2000],
)
def test_replies_without_a_verdict(text):
    with pytest.raises(Retry):
        parse_verdict(text)


def test_files_that_cannot_be_used(tmp_path):
    for field in ("key_file", "prompt"):
        with pytest.raises(InputError, match=f"rewards.judge.{field}=.*cannot be read"):
            JudgeReward(JudgeConfig(url="u", model="m", **{field: str(tmp_path / "none")}))
    (tmp_path / "prompt").write_text('judge {question}: reply {"correctness": true}')
    with pytest.raises(InputError, match="rewards.judge.prompt=.*is no field"):
        JudgeReward(JudgeConfig(url="u", model="m", prompt=str(tmp_path / "prompt")))
