"""Whole runs of small students: distillation on policy and beside it, prompt sets killed and resumed."""

import io
import json
import pathlib

import jax
import numpy as np
import pytest

from grpo_jax.config import Config, default_config, from_dict
from grpo_jax.models.loading import load_model
from grpo_jax.parallel import make_mesh
from grpo_jax.recipes import base, grpo, sft
from grpo_jax.recipes.loop import Stop, Stopped
from grpo_jax.terminal import Terminal

CLOCK = ("seconds/", "tokens_per_second", "compiles")
SIZES = {"teacher": (2, 64, 4, 2, 128, 500), "student": (2, 48, 4, 2, 96, 100)}  # of the base, and its steps of SFT


def quiet() -> Terminal:
    return Terminal(out=io.StringIO(), err=io.StringIO())


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        for recipe in ("grpo", "supervised", "base"):
            patch.setattr(f"grpo_jax.recipes.{recipe}.make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


def config_of(kind: str = "student", **fields) -> Config:
    """One-digit sums; a base of either kind, with the tokenizer that both have."""
    c = default_config()
    b, sizes = c.base, SIZES[kind]
    b.layers, b.width, b.heads, b.kv_heads, b.mlp_width, b.sft.steps = sizes
    b.vocabulary, b.worked_sums, b.right_share = 40, 1500, 0.9
    b.sft.batch_size, b.sft.max_length, b.sft.lr = 32, 48, 3e-3
    c.data.digits, c.data.max_prompt_length, c.data.prompts_per_step = 1, 4, 16
    c.sampler.group_size, c.sampler.max_new_tokens = 4, 24
    c.rewards.names, c.rewards.weights = ("answer", "answer_format"), (1.0, 0.2)
    c.optim.lr, c.optim.schedule, c.train.steps, c.checkpoint.every = 3e-3, "cosine", 160, 0
    c.eval.every, c.eval.final_problems, c.eval.samples, c.eval.majority = 0, 10, 16, 0
    c.log.tensorboard, c.log.samples_every, c.log.compilation_cache = False, 0, ""
    for name, value in fields.items():
        *above, leaf = name.split(".")
        section = c
        for part in above:
            section = section[part]
        with section.ignore_type():
            section[leaf] = value
    return from_dict(c)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A trained teacher and a student that has barely begun, of other sizes."""
    root = tmp_path_factory.mktemp("students")
    made = {kind: base.run(config_of(kind), root / kind, quiet()) for kind in SIZES}
    a, b = (load_model(path) for path in made.values())
    assert a.tokenizer.backend.pieces == b.tokenizer.backend.pieces and a.architecture != b.architecture
    return made


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_and_last(workdir: pathlib.Path, name: str) -> tuple[float, float]:
    """Means of a metric over the first three steps and over the last ten."""
    values = [line[name] for line in lines(workdir / "metrics.jsonl")]
    return float(np.mean(values[:3])), float(np.mean(values[-10:]))


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "factor"), [("full", 5.0), ("sampled", 1.3)])
def test_a_student_comes_near_its_teacher(folders, tmp_path, loss, factor):
    """The reverse KL falls by a factor, and more sums are right; `docs/distillation.md` has the figures."""
    fields = {"model.path": folders["student"], "distill.teacher": folders["teacher"], "distill.loss": loss}
    grpo.run(config_of(**fields), tmp_path / loss, terminal=quiet())
    kl, solved = (first_and_last(tmp_path / loss, name) for name in ("distill/kl", "solve_rate"))
    print(f"{loss}: reverse KL {kl[0]:.3f} -> {kl[1]:.3f} nats a token, solve rate {solved[0]:.3f} -> {solved[1]:.3f}")
    assert kl[1] < kl[0] / factor
    assert solved[1] > solved[0] + (0.3 if loss == "full" else 0.05)


@pytest.mark.slow
def test_a_student_learns_chains(folders, tmp_path):
    """`sft` starts from a base of any sizes."""
    chains = tmp_path / "chains.jsonl"
    chains.write_text('{"prompt": "1+2=", "completion": "<answer>3</answer>"}\n' * 8)
    fields = {"sft.path": str(chains), "sft.steps": 3, "sft.batch_size": 2, "sft.lr": 1e-2}
    config = config_of(**{"model.path": folders["student"], **fields})
    trained = load_model(sft.run(config, tmp_path / "sft", quiet()))
    assert trained.architecture == load_model(folders["student"]).architecture
    losses = [line["sft/loss"] for line in lines(tmp_path / "sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0]


class StopsAfter(Stop):
    """Asked to end while a step runs."""

    def __init__(self, step: int):
        super().__init__(None)
        self.step, self.asked = step, False

    def progress(self, doing: str) -> None:
        self.asked |= doing.startswith(f"step {self.step} of")

    def reason(self, needed: float = 0.0) -> str | None:
        return "the test" if self.asked else None


@pytest.mark.slow
def test_sets_and_a_teacher_go_on_to_the_same_bits(folders, tmp_path, monkeypatch):
    """A run on two prompt sets, the second late, mixed with a teacher: stopped after step 4 of 6 and gone on with."""
    sums = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 6) for b in range(1, 6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"text": f"{i}="}) + "\n" for i in range(10)))
    sets = (
        {"name": "sums", "path": str(tmp_path / "sums.jsonl"), "weight": 3.0, "rewards": ("answer", "answer_format")},
        {
            "name": "talk",
            "path": str(tmp_path / "talk.jsonl"),
            "prompt_column": "text",
            "answer_column": "",
            "rewards": ("repetition", "answer_format"),
            "reward_weights": (-1.0, 0.3),
            "late": True,
        },
    )
    config = config_of(
        **{
            "model.path": folders["student"],
            "data.sets": sets,
            "data.prompts_per_step": 4,
            "rewards.names": ("answer", "answer_format", "repetition"),
            "rewards.weights": (1.0, 0.2, 1.0),
            "rewards.late_names": ("repetition",),
            "rewards.late_from": 0.5,
            "distill.teacher": folders["teacher"],
            "distill.weight": 0.5,
            "train.steps": 6,
            "eval.every": 3,
            "log.samples_every": 1,
        }
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = grpo.run(config, whole, terminal=quiet())
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "open_stop", lambda config, workdir: StopsAfter(4))
        with pytest.raises(Stopped, match="after step 4 of 6"):
            grpo.run(config, cut, terminal=quiet())
    grpo.run(config, cut, terminal=quiet())
    mine, others = (
        [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in lines(run / "metrics.jsonl")]
        for run in (whole, cut)
    )
    assert mine == others and len(mine) == 6
    assert [("set_reward/talk" in line, "reward/repetition" in line) for line in mine] == [
        (i > 2,) * 2 for i in range(6)
    ]
    assert all(line["distill/kl"] > 0 and line["skipped"] == 0 for line in mine)
    for name in ("samples.jsonl", "before.samples.jsonl", "after.samples.jsonl", "after.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    jax.tree.map(np.testing.assert_array_equal, load_model(str(whole)).params, load_model(str(cut)).params)
    held = lines(whole / "after.samples.jsonl")
    assert {record["set"] for record in held} == {"sums", "talk"}
    assert all((record["rewards"]["answer"] is None) == (record["set"] == "talk") for record in held)
    assert set(summary["after"]["sets"]) == {"sums", "talk"} and 0 <= summary["after"]["pass@1"] <= 1
    assert "eval_reward/talk" in mine[5] and summary["after"]["sets"]["talk"]["rewards"].keys() == {
        "answer_format",
        "repetition",
    }
