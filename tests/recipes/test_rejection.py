"""`grpo-jax reject`: what is kept of samples, and chats that `grpo-jax sft` reads."""

import dataclasses
import json

import pytest
import tiny
from gguf_writer import tokenizer_metadata

from grpo_jax import cli
from grpo_jax.config import TextConfig
from grpo_jax.data.filters import FilterConfig
from grpo_jax.errors import InputError
from grpo_jax.metrics import read_jsonl
from grpo_jax.models.huggingface import write_folder
from grpo_jax.recipes import benchmark, rejection
from grpo_jax.recipes.benchmark import Drawer, Settings
from grpo_jax.recipes.rejection import SURPLUS, Rejection, chat, first_of_each, opening_of, run
from grpo_jax.recipes.sft import read_chats
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


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A model that says SAID: what is drawn is put in its place, all else is the recipe's."""
    of = tiny.architecture(vocabulary=265, layers=1)
    write_folder(str(tmp_path / "model"), of, tiny.params(of), Tokenizer.from_gguf(tokenizer_metadata()))
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a, b in ((1, 2), (3, 40), (5, 6))]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def draw(self, each, prompts, have):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
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
    monkeypatch.setattr(cli, "_set_up_jax", lambda config: None)
    filters = {"format": "answer", "language": "de", "language_share": 0.5, "repetition": 0.2, "least_length": 3}
    filters |= {"most_length": 9, "paragraph_words": 7}
    options = [part for name, value in filters.items() for part in (f"--{name}", str(value))]
    more = ["--most", "1", "--similarity", "0.7", "--against", "gsm8k=x", "--ngram", "5", "--code_blocks"]
    assert cli.main(["reject", "--model", "runs/a", "--set", "train", "--samples", "3", *options, *more]) == 0
    ((settings, kept, workdir),) = calls
    assert kept == Rejection(FilterConfig(**filters, code_blocks=True), 1, 0.7, ("gsm8k=x",), 5)
    drawn = Settings("runs/a", ("train",), samples=3, temperature=1.0, top_p=1.0, language="de")
    assert settings == drawn and str(workdir) == "runs/reject_a"
    assert benchmark.OWN_ROWS["train"] == "train"
