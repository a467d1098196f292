"""`grpo-jax reject`: what is kept of samples, and chats that `grpo-jax sft` reads."""

import dataclasses
import json

import pytest
import tiny
from gguf_writer import tokenizer_metadata
from judge_server import says, serving

from grpo_jax import cli
from grpo_jax.config import JudgeConfig, ModelJudgeConfig, TextConfig, from_dict
from grpo_jax.data.filters import FilterConfig
from grpo_jax.errors import InputError
from grpo_jax.metrics import read_jsonl
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import load_model
from grpo_jax.recipes import benchmark, mixing, rejection, sft
from grpo_jax.recipes.benchmark import Drawer, Settings
from grpo_jax.recipes.mixing import Mixture, Part
from grpo_jax.recipes.rejection import SURPLUS, Rejection, chat, first_of_each, opening_of, run
from grpo_jax.recipes.sft import read_chats
from grpo_jax.recipes.summaries import DROPPED, SummaryConfig
from grpo_jax.rewards.texts import thought_and_answer_fault
from grpo_jax.text import Tokenizer, encode_prompt

SAID = [
    ["So 1 + 2 is \\boxed{3}.", "\\boxed{4}", "so 1 + 2 is  \\boxed{3}.", "Три: \\boxed{3}", "Three, then: \\boxed{3}"],
    ["\\boxed{1}", "seven", "", "43 it is", "\\boxed{44}"],
    [
        "Five and six: \\boxed{11}",
        "Eleven \\boxed{11}",
        "a b " * 20 + "\\boxed{11}",
        "11 \\boxed{11}",
        "```\\boxed{11}```",
    ],
]


SUMMARIES = ["Three it is: \\boxed{3}", "Added up: <answer>3</answer>", "So it is 12.", "Всего <answer>11</answer>"]


def summary_record(problem: int, have, text: str) -> dict:
    assert not have, "summaries are drawn once"
    return {"problem": problem, "sample": None, "completion": text, "length": 5, "ended": True, "seconds": 0.1}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A model that says SAID: what is drawn is put in its place, all else is the recipe's."""
    of = tiny.architecture(vocabulary=265, layers=1)
    write_folder(str(tmp_path / "model"), of, tiny.params(of), Tokenizer.from_gguf(tokenizer_metadata()))
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a, b in ((1, 2), (3, 40), (5, 6))]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def draw(self, each, prompts, have):
        if each.name == "summaries":
            yield [summary_record(problem, have, text) for problem, text in enumerate(SUMMARIES)]
            return
        for problem, texts in enumerate(SAID):
            records = [
                {"problem": problem, "sample": i, "completion": text, "length": 10, "ended": True, "seconds": 0.5}
                for i, text in enumerate(texts)
                if (problem, i) not in have
            ]
            if records:
                yield records

    monkeypatch.setattr(Drawer, "_draw_missing", draw)
    sets = (f"jsonl={tmp_path / 'sums.jsonl'}",)
    return Settings(str(tmp_path / "model"), sets, samples=5, template="plain", max_new_tokens=8)


def test_right_and_readable_samples_become_chats_that_sft_reads(settings, tmp_path, capsys):
    filters = FilterConfig(repetition_ngram=2)
    summary = run(settings, Rejection(filters, most=2), tmp_path / "out")
    assert summary["dropped"] == {
        **dict.fromkeys(summary["dropped"], 0),
        "verified correct": 6,
        "one language": 1,
        "repetition": 1,
        "code blocks": 1,
        "exact duplicates": 1,
        SURPLUS: 1,
    }
    assert (summary["prompts"], summary["prompts_kept"], summary["completions"], summary["kept"]) == (3, 2, 15, 4)
    assert summary["right"] == 9 / 15 and summary["acceptance"] == 4 / 15
    assert (summary["tokens"], summary["tokens_per_second"], summary["completions_per_second"]) == (150, 20.0, 2.0)
    said = capsys.readouterr().out
    assert "15 completions of 3 prompts, 60.0% right, 26.7% kept, of 2 prompts; 20 tokens/s" in said
    chats = read_jsonl(tmp_path / "out" / "chats.jsonl")
    assert [(c["id"], c["messages"][-1]["content"]) for c in chats] == [
        ("0", SAID[0][0]),
        ("0", SAID[0][4]),
        ("2", SAID[2][0]),
        ("2", SAID[2][1]),
    ]
    tokenizer = Tokenizer.from_gguf(tokenizer_metadata())
    (ids, mask), *rest = read_chats(str(tmp_path / "out" / "chats.jsonl"), TextConfig("plain"), tokenizer, 1000)
    learned = tokenizer.decode([token for token, counted in zip(ids, mask, strict=True) if counted])
    assert len(rest) == 3 and learned == SAID[0][0]
    assert ids[: mask.index(1)] == encode_prompt("1+2", TextConfig("plain"), tokenizer)


def test_other_filters_need_no_new_samples_and_evaluation_sets_are_kept_out(settings, tmp_path, monkeypatch):
    run(settings, Rejection(), tmp_path / "out")
    monkeypatch.setattr(Drawer, "_draw_missing", lambda *_: iter(()))
    (tmp_path / "test.jsonl").write_text('{"question": "what: FIVE and six, eleven?", "answer": "11"}\n')
    none = Rejection(FilterConfig(most_length=5))
    with pytest.raises(InputError, match="none of 15 completions is kept .verified correct 6, .*length 7.: draw more"):
        run(settings, none, tmp_path / "out")
    filters, against = FilterConfig(code_blocks=True), (f"jsonl={tmp_path / 'test.jsonl'}",)
    found = run(settings, Rejection(filters, most=0, against=against, ngram=3), tmp_path / "out")
    assert found["dropped"]["contaminated"] == 1 and found["dropped"][SURPLUS] == 0


KEPT = [SAID[0][0], SAID[0][4], SAID[2][0], SAID[2][1]]
STRICT = FilterConfig(repetition_ngram=2)


def answers(folder) -> list[str]:
    return [c["messages"][-1]["content"] for c in read_jsonl(folder / "chats.jsonl")]


def test_chains_are_written_as_reasoning_and_summary(settings, tmp_path):
    summary = run(settings, Rejection(STRICT, most=2, summary=SummaryConfig("answer")), tmp_path / "out")
    right = ["3", "3", "11", "11"]
    wanted = [f"<think>{chain}</think>\n<answer>{n}</answer>" for chain, n in zip(KEPT, right, strict=True)]
    assert answers(tmp_path / "out") == wanted and summary["kept"] == 4
    assert not any(map(thought_and_answer_fault, wanted)), "the reward `format` is 1"
    chats = read_jsonl(tmp_path / "out" / "chats.jsonl")
    assert [c["completion"] for c in chats] == KEPT and [list(c)[:3] for c in chats] == [["set", "id", "messages"]] * 4
    assert [summary["dropped"][name] for name in DROPPED] == [0] * 5


def test_a_model_summarises_and_its_summaries_are_checked(settings, tmp_path, monkeypatch):
    given = Rejection(STRICT, most=2, summary=SummaryConfig("model", model=settings.model))
    summary = run(settings, given, tmp_path / "out")
    assert answers(tmp_path / "out") == [
        f"<think>{KEPT[0]}</think>\n{SUMMARIES[0]}\n<answer>3</answer>",
        f"<think>{KEPT[1]}</think>\n{SUMMARIES[1]}",
    ]
    assert summary["dropped"]["summary without the right answer"] == 1
    assert summary["dropped"]["summary in one language"] == 1
    assert (summary["kept"], summary["prompts_kept"]) == (2, 1)
    monkeypatch.setattr(Drawer, "_draw_missing", lambda *_: iter(()))
    assert run(settings, given, tmp_path / "out") == summary, "what was drawn is kept, summaries too"
    path = tmp_path / "out" / "chats.jsonl"
    path.write_text(path.read_text("utf-8").replace("Added up", "All in all"), "utf-8")
    again = run(settings, given, tmp_path / "out")
    assert again["chats"]["edited"] and "All in all" in answers(tmp_path / "out")[1]
    with pytest.raises(InputError, match="was edited since it was written, .*rejection.most: 2 then, 1 now"):
        run(settings, dataclasses.replace(given, most=1), tmp_path / "out")


def test_what_a_summary_adds_is_decontaminated_too(settings, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"question": "all added up: 3", "answer": "3"}\n')
    summary = SummaryConfig("model", model=settings.model)
    given = Rejection(STRICT, most=2, against=(f"jsonl={tmp_path / 'test.jsonl'}",), ngram=3, summary=summary)
    assert run(settings, given, tmp_path / "out")["dropped"]["contaminated"] == 1
    assert len(answers(tmp_path / "out")) == 1


def test_from_samples_to_a_model_that_has_learned_them(settings, tmp_path, one_device):
    """reject, summary, mix 3:1, sft from the base: each stage reads what the one before has written."""
    run(settings, Rejection(STRICT, most=2, summary=SummaryConfig("answer")), tmp_path / "cold")
    (tmp_path / "general.jsonl").write_text('{"prompt": "hello", "completion": "<think>greet</think>Hi!"}\n' * 2)
    parts = (
        Part("reasoning", str(tmp_path / "cold" / "chats.jsonl"), 3.0),
        Part("general", str(tmp_path / "general.jsonl"), 1.0, "simple"),
    )
    summary = mixing.run(Mixture(parts), tmp_path / "mix")
    assert [part["drawn"] for part in summary["parts"].values()] == [3, 1]
    learned = {
        "path": str(tmp_path / "mix" / "chats.jsonl"),
        "epochs": 9,
        "batch_size": 2,
        "max_length": 150,
        "lr": 0.02,
    }
    config = from_dict({"model": {"path": settings.model}, "mesh": {"data": 1}, "sft": learned})
    folder = sft.run(config, tmp_path / "sft")
    lines = read_jsonl(tmp_path / "sft" / "metrics.jsonl")
    assert len(lines) == 9 and lines[-1]["sft/loss"] < lines[0]["sft/loss"] - 1
    assert lines[-1]["lr"] < 0.2 * lines[0]["lr"], "a cosine to a tenth"
    assert load_model(folder).architecture == load_model(settings.model).architecture


def test_rows_without_an_answer_go_to_a_judge(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    path = tmp_path / "sums.jsonl"
    rows = read_jsonl(path)
    rows[0] = {"question": "Count to three"}
    rows[1] = rows[1] | {"judge": True}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="--set sums: problem 0 has no answer that rules compare: add one, or name a"):
        run(settings, Rejection(STRICT), tmp_path / "out")

    def verdict(body):
        said = body["messages"][0]["content"].partition("[answer to judge]")[2]
        return says("Three" in said or "\\boxed{44}" in said, f"read {len(said)}")

    with serving((200, {}, verdict)) as server:
        judge = JudgeConfig(url=server.url, model="m")
        summary = run(dataclasses.replace(settings, judge=judge), Rejection(STRICT, most=1), tmp_path / "out")
    assert len(server.seen) == 10, "each text once, and none of the rows that rules grade"
    assert sum("[reference answer, perhaps empty]\n43" in b["messages"][0]["content"] for *_, b in server.seen) == 5
    assert answers(tmp_path / "out") == [SAID[0][4], SAID[1][4], SAID[2][0]]
    samples = read_jsonl(tmp_path / "out" / "sums" / "samples.jsonl")
    assert [s["analysis"].startswith("read") if "analysis" in s else None for s in samples] == [True] * 10 + [None] * 5
    assert summary["right"] == (1 + 1 + 5) / 15


def test_the_language_of_a_runs_own_rows_is_kept(tmp_path):
    rows = [{"question": "Сколько?", "answer": "5", "language": "ru"}, {"question": "How?", "answer": "5"}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = from_dict({"data": {"source": "jsonl", "path": str(tmp_path / "rows.jsonl")}})
    found = benchmark._own_rows("train", Settings("m"), config)
    assert [row.get("language") for row in found] == ["ru", None, "ru"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"summary": SummaryConfig("poem")}, "--summary poem: is not one of answer, model, judge"),
        ({"summary": SummaryConfig("model")}, "--summary model: name the model .*--summary_model"),
        ({"summary": SummaryConfig("judge")}, "--summary judge: name the server .*--judge_url"),
        ({"summary": SummaryConfig("answer", form="{summary}")}, "--chat_form .*must hold .reasoning. and"),
        ({"summary": SummaryConfig("answer", form="nowhere.txt")}, "--chat_form 'nowhere.txt': cannot be read"),
        ({"summary": SummaryConfig("answer", sentences=("so",))}, "--sentence 'so': must hold .answer."),
        ({"summary": SummaryConfig("answer", sentences=("ru={answer}",))}, "--sentence: give one without a language"),
        ({"summary": SummaryConfig("answer", max_new_tokens=0)}, "--summary_tokens 0: must be at least 1"),
        ({"summary": SummaryConfig("answer", prompt="nowhere.txt")}, "--summary_prompt 'nowhere.txt': cannot be read"),
        ({"filters": FilterConfig(format="xml")}, "filters.format='xml' is not one of"),
        ({"against": ("gsm8k",)}, "--set gsm8k: has no file: fetch"),
        ({"most": -1}, "--most -1: must be at least 0"),
        ({"similarity": 0.0}, "similarity=0.0 must be above 0"),
        ({"ngram": 0}, "n=0 must be at least 1"),
    ],
)
def test_refused_before_anything_is_sampled(settings, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(rejection, "load_model", None)
    with pytest.raises(InputError, match=message):
        run(settings, dataclasses.replace(Rejection(), **change), tmp_path / "out")


def test_prompts_are_needed(settings, tmp_path):
    with pytest.raises(InputError, match="--set: name the prompts"):
        run(dataclasses.replace(settings, sets=()), Rejection(), tmp_path / "out")


def test_an_answer_goes_on_after_an_open_tag():
    class Spelling:
        decode = staticmethod(lambda ids, skip_special: bytes(ids).decode())

    assert opening_of(list(b"<think> a </think> Assistant: <think>\n"), Spelling()) == "<think>\n"
    assert opening_of(list(b"<think> a"), Spelling()) == ""
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": " so</think> 5\n", "opening": "<think>\n"}
    made = chat(row | {"set": "s", "id": "1"})
    assert made["messages"] == [*row["prompt"], {"role": "assistant", "content": "<think>\nso</think> 5"}]


def test_the_first_of_each_prompt():
    rows = [{"set": s, "id": i, "n": n} for n, (s, i) in enumerate([("a", "1")] * 3 + [("b", "1")])]
    found = first_of_each(rows, 2)
    assert [row["n"] for row in found.rows] == [0, 1, 3] and found.dropped == {SURPLUS: 1}
    assert first_of_each(rows, 0).kept == 4


def test_the_command_hands_on_all_its_options(monkeypatch):
    calls = []
    monkeypatch.setattr(
        rejection, "run", lambda settings, rejection, workdir: calls.append((settings, rejection, workdir))
    )
    monkeypatch.setattr(cli, "_set_up_jax", lambda *_: None)
    filters = {"format": "answer", "language": "de", "language_share": 0.5, "repetition": 0.2, "least_length": 3}
    filters |= {"most_length": 9, "paragraph_words": 7}
    options = [part for name, value in filters.items() for part in (f"--{name}", str(value))]
    more = ["--most", "1", "--similarity", "0.7", "--against", "gsm8k=x", "--ngram", "5", "--code_blocks"]
    assert cli.main(["reject", "--model", "runs/a", "--set", "train", "--samples", "3", *options, *more]) == 0
    ((settings, kept, workdir),) = calls
    assert kept == Rejection(FilterConfig(**filters, code_blocks=True), 1, 0.7, ("gsm8k=x",), 5)
    drawn = Settings("runs/a", ("train",), samples=3, temperature=1.0, top_p=1.0, language="de")
    assert settings == drawn and str(workdir) == "runs/reject_a"
    more += ["--summary", "model", "--chat_form", "f", "--sentence", "s", "--sentence", "ru=t", "--summary_tokens", "7"]
    more += ["--summary_model", "m", "--summary_prompt", "p", "--judge_url", "u", "--judge_model", "j"]
    more += ["--judge_key_file", "k", "--judge_cache", "c", "--judge_timeout", "5", "--judge_prompt", "q"]
    assert cli.main(["reject", "--model", "runs/a", "--set", "train", *more]) == 0
    assert calls[1][1].summary == SummaryConfig("model", "f", ("s", "ru=t"), "m", "p", 7)
    assert calls[1][0].judge == JudgeConfig("u", "j", "k", "q", timeout=5.0, cache="c")
    assert calls[1][0].model_judge == ModelJudgeConfig()
    assert cli.main(["reject", "--model", "a", "--judge_folder", "f", "--judge_prompt", "q"]) == 0
    assert calls[2][0].model_judge == ModelJudgeConfig("f", "q") and calls[2][0].judge == JudgeConfig()
    assert benchmark.OWN_ROWS["train"] == "train"
