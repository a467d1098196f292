"""Reward models: loss and gradient against float64, learning, the folder, and the pass inside the step."""

import dataclasses
import functools
import io
import json

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import tiny

from grpo_jax.config import MeshConfig, ModelConfig, RewardModelConfig, TextConfig, from_dict
from grpo_jax.errors import InputError
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.heads import init_head, load_head, read_head, save_head
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import load_model
from grpo_jax.parallel import make_mesh
from grpo_jax.recipes import reward_model as recipe
from grpo_jax.recipes import supervised
from grpo_jax.rewards.model_files import load_reward_variables, open_reward_models
from grpo_jax.rewards.reward_model import COLLECTION, RewardModel, after_marker
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.rewards.verifiers import byte_table
from grpo_jax.sampler.types import Rollout
from grpo_jax.step import Program
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, train_sentencepiece

PAIRS = [([[5, 9, 4, 7, 2], [5, 9, 8, 2]], 1.0), ([[3, 3, 2], [3, 3, 4, 6, 10, 2]], 1.0), ([[7, 1, 2], [7, 8, 2]], 1.0)]
POINTS = [([[5, 9, 4, 7, 2]], 1.0), ([[3, 3, 2]], 0.0), ([[7, 1, 2]], 0.25)]


def head(seed: int = 3) -> dict:
    random = np.random.default_rng(seed)
    return {
        "kernel": random.normal(0, 0.5, (tiny.architecture().width, 1)).astype(np.float32),
        "bias": np.array([0.3], np.float32),
    }


def variables(seed: int = 0) -> dict:
    return {"params": tiny.params(tiny.architecture(), seed), "score": head(seed)}


def score_by_hand(given: dict, ids: list[int]) -> float:
    """The head on the last token's hidden state, from the oracle of the decoder: its logits under a head of one."""
    architecture = tiny.architecture(tied=False)
    place = np.arange(len(ids))
    params = {**given["params"], "head": {"kernel": np.eye(architecture.width)}}
    hidden = numpy_decoder.forward(params, architecture, np.array(ids), place, np.ones_like(place))
    return float(hidden[-1] @ np.asarray(given["score"]["kernel"], np.float64)[:, 0] + given["score"]["bias"][0])


def loss_by_hand(given: dict, rows) -> float:
    losses = []
    for answers, label in rows:
        scores = [score_by_hand(given, ids) for ids in answers]
        margin = scores[0] - scores[1] if len(scores) == 2 else scores[0]
        sigmoid = 1 / (1 + np.exp(-margin))
        losses.append(-label * np.log(sigmoid) - (1 - label) * np.log(1 - sigmoid))
    return float(np.mean(losses))


@pytest.mark.parametrize("rows", [PAIRS, POINTS], ids=["pairs", "points"])
def test_loss_and_gradient_are_those_of_float64(rows):
    """Along a random direction in all variables the gradient gives the slope of the oracle's loss."""
    given = variables()
    module = Decoder(tiny.architecture())
    batch = recipe.make_preference_batch(rows, 4, 7)  # one row of filler
    program = jax.jit(jax.value_and_grad(lambda v: recipe.preference_loss(module, v, batch), has_aux=True))
    (loss, means), gradient = program(given)
    assert loss == pytest.approx(loss_by_hand(given, rows), rel=1e-5)
    random = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: random.normal(0, 1, x.shape), given)
    eps = 1e-5

    def moved(by: float) -> dict:
        return jax.tree.map(lambda x, d: np.asarray(x, np.float64) + by * d, given, direction)

    slope = (loss_by_hand(moved(eps), rows) - loss_by_hand(moved(-eps), rows)) / (2 * eps)
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float(np.sum(g * d)), gradient, direction)))
    assert along == pytest.approx(slope, rel=1e-3) and abs(slope) > 0.01
    scores = [[score_by_hand(given, ids) for ids in answers] for answers, _ in rows]
    margins = np.array([s[0] - s[1] if len(s) == 2 else s[0] for s in scores])
    right = (margins > 0) == (np.array([label for _, label in rows]) > 0.5)
    assert [float(x) for x in means["reward_model/accuracy"]] == [right.sum(), 3]
    np.testing.assert_allclose(means["reward_model/margin"][0], margins.sum(), rtol=1e-4)


def test_the_score_is_that_of_the_last_token_and_padding_is_nothing():
    given, module = variables(), Decoder(tiny.architecture())
    scores = {}
    for width in (6, 9):
        batch = recipe.make_preference_batch(PAIRS, 3, width)
        scores[width] = np.asarray(jax.jit(lambda v, b: recipe.answer_scores(module, v, b))(given, batch))
    np.testing.assert_allclose(scores[6], scores[9], atol=1e-5)
    by_hand = [[score_by_hand(given, ids) for ids in answers] for answers, _ in PAIRS]
    np.testing.assert_allclose(scores[6], by_hand, atol=1e-5)


# The folder and the file.


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    """A folder of a tiny model with a tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    path = str(folder / "tokenizer.model")
    train_sentencepiece(["say a", "say b", "abc xyz", "one two three"], 60, ("</think>",), path)
    tokenizer = Tokenizer.from_sentencepiece(path)
    architecture = tiny.architecture(vocabulary=tokenizer.vocabulary, layers=1)
    write_folder(str(folder / "model"), architecture, tiny.params(architecture), tokenizer)
    return str(folder / "model")


def pairs_file(path, count: int = 40) -> str:
    """The chosen answer holds more of the letter x than of y, whatever its length."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        many, few = random.integers(2, 5), random.integers(0, 2)
        chosen, rejected = ("".join(random.permutation(list("x" * a + "y" * b))) for a, b in ((many, few), (few, many)))
        rows.append({"prompt": f"say {'abc'[number % 3]}", "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(policy: str, path: str, **fields):
    given = {"path": path, "steps": 30, "batch_size": 8, "max_length": 16, "lr": 0.02} | fields
    return from_dict({"model": {"path": policy}, "mesh": {"data": 1}, "reward_model": given})


@pytest.fixture(scope="module")
def trained(policy, tmp_path_factory):
    """The folder of a run, and what it said."""
    folder = tmp_path_factory.mktemp("reward")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        made = recipe.run(config(policy, pairs_file(folder / "pairs.jsonl")), folder / "run", Terminal(out=said))
    return folder / "run", made, said.getvalue()


def test_it_learns_and_reports_held_out_accuracy(trained):
    folder, _, said = trained
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["kind"] == "pairs" and (summary["rows"], summary["held_out"]) == (36, 4)
    assert summary["before"]["accuracy"] == 0, "a head of zeros prefers nothing"
    assert summary["before"]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert summary["after"]["accuracy"] == 1 and summary["after"]["loss"] < 0.3
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and lines[-1]["reward_model/loss"] < lines[0]["reward_model/loss"] / 2
    assert "held-out accuracy 0.000 before, 1.000 after" in said


def test_the_folder_is_a_model_with_a_head(trained, policy):
    _, made, _ = trained
    loaded = load_model(made)
    before, after = (jax.tree.leaves(model.params) for model in (load_model(policy), loaded))
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(before, after, strict=True))
    assert np.abs(load_head(made, 16)["kernel"]).max() > 0
    rewards = from_dict({"rewards": {"names": ("helpful",), "weights": (1.0,), "helpful": {"path": made}}}).rewards
    given = load_reward_variables(rewards, ModelConfig(), make_mesh(MeshConfig(data=1), jax.devices()[:1]))[COLLECTION][
        "helpful"
    ]
    (model,) = open_reward_models(rewards, ModelConfig(), loaded.tokenizer).values()
    rows = [
        recipe.read_preference({"prompt": "say a", "chosen": a, "rejected": b}, TextConfig(), loaded.tokenizer, 16)
        for a, b in (("xxxy", "y"), ("x", "yyx"))
    ]
    batch = recipe.make_preference_batch(rows, 2, 16)
    scores = jax.jit(lambda v, b: recipe.answer_scores(model.module, v, b))(given, batch)
    assert (scores[:, 0] > scores[:, 1]).all()


def test_a_folder_that_is_no_reward_model_is_refused(tmp_path, policy, trained):
    _, made, _ = trained

    def opened(path: str, tokenizer: Tokenizer):
        rewards = from_dict({"rewards": {"names": ("helpful",), "weights": (1.0,), "helpful": {"path": path}}}).rewards
        return open_reward_models(rewards, ModelConfig(), tokenizer)

    own = load_model(policy).tokenizer
    with pytest.raises(InputError, match="is no reward model; make one by `grpo-jax reward-model train`"):
        opened(policy, own)
    with pytest.raises(InputError, match="config.json: cannot be read"):
        opened("nowhere", own)
    path = str(tmp_path / "tokenizer.model")
    train_sentencepiece(["quite another text"], 50, (), path)
    with pytest.raises(InputError, match=r"rewards\.helpful\.path=.*: its tokenizer is not the policy's"):
        opened(made, Tokenizer.from_sentencepiece(path))
    save_head(str(tmp_path), {"kernel": np.full((16, 1), np.nan), "bias": np.zeros(1)})
    with pytest.raises(InputError, match="not finite tensors of shape"):
        load_head(str(tmp_path), 16)
    with pytest.raises(InputError, match="not finite tensors of shape"):
        load_head(made, 17)
    (tmp_path / "score.safetensors").write_text("no")
    with pytest.raises(InputError, match="is no whole safetensors file"):
        load_head(str(tmp_path), 16)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"prompt": "a", "answer": "b"}], r"row 1: has \['answer', 'prompt'\], not 'prompt', 'chosen' and"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "row 1: 'chosen' and 'rejected' are the same"),
        ([{"prompt": "a", "chosen": "b", "rejected": 3}], "row 1: has '3' where a text or a list of messages belongs"),
        ([{"prompt": "a", "completion": "b", "label": 2}], "row 1: has label=2"),
        (
            [{"prompt": "a", "completion": "b" * 40, "label": 1}],
            "row 1: has .. tokens, more than reward_model.max_length",
        ),
        (
            [{"prompt": "a", "completion": "b", "label": 1}, {"prompt": "a", "chosen": "b", "rejected": "c"}],
            "row 2: is a pair",
        ),
    ],
)
def test_rows_that_cannot_be_learned_are_named(tmp_path, policy, rows, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=message) as caught:
        recipe.read_preferences(str(path), "reward_model.path", TextConfig(), load_model(policy).tokenizer, 16)
    assert str(path) in str(caught.value)


def test_texts_messages_and_conversations_give_the_same_tokens(policy):
    tokenizer = load_model(policy).tokenizer
    user, assistant = {"role": "user", "content": "say a"}, {"role": "assistant", "content": "xx"}
    other = {"role": "assistant", "content": "y"}
    made = [
        recipe.read_preference(row, TextConfig(), tokenizer, 16)
        for row in (
            {"prompt": "say a", "chosen": "xx", "rejected": "y"},
            {"prompt": [user], "chosen": [assistant], "rejected": [other]},
            {"chosen": [user, assistant], "rejected": [user, other]},
        )
    ]
    assert made[0] == made[1] == made[2]
    (chosen, rejected), label = made[0]
    assert chosen[-1] == rejected[-1] == tokenizer.end_ids[0] and label == 1.0
    labelled = recipe.read_preference(
        {"prompt": "say a", "completion": "xx", "label": True}, TextConfig(), tokenizer, 16
    )
    assert labelled == ([chosen], 1.0)


# Inside the step.

MARKER = "a"
NAMES = ("helpful", "harmless")


def reward_models(**fields) -> dict[str, RewardModel]:
    module = Decoder(tiny.architecture())
    sections = {
        "helpful": RewardModelConfig(path="x", sees="summary", marker=MARKER, **fields),
        "harmless": RewardModelConfig(path="y", **fields),
    }
    return {name: RewardModel(section, module) for name, section in sections.items()}


def with_models(parts, **fields):
    scorer = Scorer(
        NAMES, (1.0, -0.5), byte_table(tiny.TOKEN_BYTES), None, parts.mesh, {}, models=reward_models(**fields)
    )
    return dataclasses.replace(parts, scorer=scorer)


def frozen() -> dict:
    return {COLLECTION: {"helpful": variables(11), "harmless": variables(12)}}


def expected(rollout: Rollout) -> np.ndarray:
    """Scores on the host: the sequences cut by their text, one forward each, in float64."""
    rows = []
    for i in range(len(rollout.lengths)):
        prompt = np.asarray(rollout.prompt_tokens[i])[-int(rollout.prompt_lengths[i]) :].tolist()
        ids = np.asarray(rollout.tokens[i])[: int(rollout.lengths[i])].tolist()
        summary = ids
        for place, token in enumerate(ids):
            if tiny.TOKEN_BYTES[token] == MARKER.encode():
                summary = ids[place + 1 :]
        given = frozen()[COLLECTION]
        rows.append([score_by_hand(given["helpful"], prompt + summary), score_by_hand(given["harmless"], prompt + ids)])
    return np.array(rows)


@functools.cache
def stepped():
    """A fused step whose rewards are two reward models."""
    config = tiny.config(**{"sampler.max_new_tokens": 14, "rewards.names": ("odd",), "rewards.weights": (1.0,)})
    parts = with_models(bigram.parts(config))
    state = tiny.state(parts, {"params": bigram.params()}, frozen())
    prompts = tiny.on_mesh(tiny.prompts(config), parts.mesh)
    state, metrics, rollout = Program(parts, state)(state, prompts)
    return parts, prompts, jax.device_get(state), jax.device_get(metrics), jax.device_get(rollout)


def test_the_fused_step_scores_as_the_host_does():
    _, _, state, metrics, rollout = stepped()
    marked = [tiny.encode(MARKER)[0] in rollout.tokens[i, : rollout.lengths[i]] for i in range(8)]
    assert 0 < sum(marked) < 8, "some completions hold the marker, some do not"
    want = expected(rollout)
    np.testing.assert_allclose(rollout.scores.values, want, atol=2e-5)
    assert rollout.scores.valid.min() == 1 and want.std(axis=0).min() > 0.01
    reward = want @ [1.0, -0.5]
    total, count = metrics.means["reward/total"]
    assert total / count == pytest.approx(reward.mean(), rel=1e-4)
    groups = reward.reshape(2, 4)
    by_hand = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(rollout.advantages[:, 0], by_hand.ravel(), rtol=1e-3, atol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen())  # a reward model does not learn


@pytest.mark.parametrize(
    ("shape", "rows"), [((1, 1, 1), 2), pytest.param((2, 2, 2), 0, marks=pytest.mark.slow), ((2, 2, 2), 4)]
)
def test_the_scores_do_not_depend_on_the_mesh_or_the_pieces(shape, rows):
    _, prompts, _, _, rollout = stepped()
    sizes = {"mesh.data": shape[0], "mesh.fsdp": shape[1], "mesh.tensor": shape[2], "data.prompts_per_step": 4}
    parts = with_models(bigram.parts(tiny.config(**sizes)), micro_batch_size=rows)
    rollout = rollout.replace(scores=None, advantages=None)
    prompts = jax.device_get(prompts)
    given = tiny.on_mesh(rollout, parts.mesh)
    score = jax.jit(lambda rollout, given: parts.scorer.score(prompts, rollout, given))
    scores = score(given, tiny.state(parts, {"params": bigram.params()}, frozen()).frozen[COLLECTION])
    np.testing.assert_allclose(scores.values, expected(rollout), atol=2e-5)
    staged = parts.scorer.score_on_host(prompts, rollout, lambda *_: (scores.values, scores.valid))
    np.testing.assert_array_equal(staged.values, scores.values)


def test_what_follows_the_last_marker_is_the_summary():
    pieces = [b"", b"<", b"/think>", b"</thi", b"nk>\n", b"so", b"</think>", b"x</think>y", b"\xc3", b"\xa9"]
    table = byte_table(pieces)
    rows = {
        (5, 6, 5, 5): [0, 0, 1, 1],
        (5, 1, 2, 5): [0, 0, 0, 1],
        (5, 3, 4, 5): [0, 0, 0, 1],  # the token that ends the marker goes on: it belongs to the thought
        (7, 5, 5, 5): [0, 1, 1, 1],
        (6, 5, 6, 5): [0, 0, 0, 1],
        (5, 5, 1, 5): [1, 1, 1, 1],
        (8, 9, 6, 8): [0, 0, 0, 1],
        (5, 5, 5, 6): [0, 0, 0, 0],
        (6, 0, 0, 5): [0, 1, 1, 1],  # special tokens have no text; those after the marker are the summary's
    }
    found = after_marker(table, jnp.array(list(rows)), jnp.full(len(rows), 4), b"</think>")
    assert found.astype(int).tolist() == list(rows.values())
    cut = after_marker(table, jnp.array([[5, 6, 5, 6]]), jnp.array([3]), b"</think>")
    assert cut.astype(int).tolist()[0][:3] == [0, 0, 1], "a marker in the padding is none"


def test_a_head_starts_at_zero():
    assert float(jnp.abs(read_head(init_head(4), jnp.ones((2, 3, 4)))).max()) == 0
    assert read_head({"kernel": jnp.ones((4, 1)), "bias": jnp.ones(1)}, jnp.ones((2, 4))).tolist() == [5, 5]
