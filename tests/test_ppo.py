"""PPO in the step: an update with a value model against float64 numpy; what state and sampler see of it."""

import bigram
import jax
import numpy as np
import numpy_gae
import optax
import pytest
import tiny

from grpo_jax.errors import InputError
from grpo_jax.metrics import divide
from grpo_jax.models.value import without_value
from grpo_jax.parallel import partition_spec
from grpo_jax.step import Program, refresh_reference, sample_rollout, score_rollout, update

LR = 0.5
FIELDS = {
    "data.prompts_per_step": 4,
    "sampler.group_size": 2,
    "objective.baseline": "value",
    "objective.beta": 0.05,
    "optim.clip_norm": 0.0,
    "ppo.gamma": 0.97,
    "ppo.lam": 0.9,
    "ppo.vf_coef": 0.3,
}


def parts_of(**fields):
    return bigram.parts(tiny.config(**FIELDS, **fields), optimizer=optax.sgd(LR))


def started(parts):
    """A state with policy 0, reference 1 and a value head that is not 0; a critic of its own has table 2."""
    state = tiny.state(parts, {"params": bigram.params(0)})
    random = np.random.default_rng(3)
    head = {"kernel": random.normal(0, 0.2, (tiny.VOCABULARY, 1)), "bias": np.full(1, 0.3)}
    trainable = state.trainable | {"value_head": jax.tree.map(np.float32, head)}
    if "critic" in trainable:
        trainable["critic"] = bigram.params(2)
    return state.replace(trainable=trainable, reference={"params": bigram.params(1)})


@pytest.fixture(scope="module")
def rollout():
    """A scored rollout of policy 0 with a filler prompt, its log-probabilities shifted so that ratios clip."""
    parts = parts_of()
    state = tiny.state(parts, {"params": bigram.params(0)})
    prompts = tiny.prompts(parts.config).replace(weight=np.array([1, 0, 1, 1], np.float32))
    made = jax.device_get(
        jax.jit(lambda state, prompts: score_rollout(parts, prompts, sample_rollout(parts, state, prompts)))(
            state, prompts
        )
    )
    shift = np.random.default_rng(0).normal(0, 0.3, made.logps.shape)
    assert 0 < made.ended.sum() < 6
    return made.replace(logps=(made.logps + shift).astype(np.float32) * made.mask)


def values_of(trainable, rollout):
    """(values [B, T], hidden states [B, T, V]) of the critic, float64."""
    table = np.float64(trainable.get("critic", trainable["params"])["table"])
    hidden, head = table[bigram.contexts(rollout)], trainable["value_head"]
    return hidden @ np.float64(head["kernel"])[:, 0] + float(head["bias"][0]), hidden


def advantages_by_hand(config, rollout, values):
    """(advantages as the loss sees them, returns, mask)."""
    ppo, mask = config.ppo, (np.arange(6) < rollout.lengths[:, None]) * rollout.weight[:, None]
    rewards = rollout.scores.values @ np.float64(config.rewards.weights)
    reference = bigram.logps_of(bigram.params(1)["table"], rollout)[0]
    penalty = config.objective.beta * (rollout.logps - reference) * ppo.kl_in_reward
    rewards = numpy_gae.token_rewards(rewards, mask, penalty)
    raw = numpy_gae.gae(rewards, values, mask, ppo.gamma, ppo.lam)
    seen, chosen = raw, raw[mask > 0]
    if ppo.whiten_advantages:
        seen = (raw - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8) * mask
    return seen, (raw + values) * mask, mask


def descend_by_hand(config, trainable, rollout):
    """Trainable leaves after one epoch of plain descent, minibatch by minibatch, and the value losses."""
    new = jax.tree.map(np.float64, trainable)
    old_values, _ = values_of(trainable, rollout)
    seen, returns, mask = advantages_by_hand(config, rollout, old_values)
    o, ppo, losses = config.objective, config.ppo, []
    beta = {} if not ppo.kl_in_reward else {"objective.beta": 0.0}
    config = tiny.config(**{**FIELDS, "objective.minibatches": o.minibatches, **beta})
    for m in range(o.minibatches):
        rows = bigram.minibatch_rows(config, len(rollout.lengths), m)
        table, reference = new["params"]["table"], bigram.params(1)["table"]
        _, gradient = bigram.loss_and_gradient(table, reference, rollout.replace(advantages=seen), rows, config)
        values, hidden = values_of(new, rollout)
        free, held = values - returns, np.clip(values, old_values - 0.2, old_values + 0.2) - returns
        counted = mask[rows] / (mask.sum() * len(rows) / len(mask))  # loss_type dapo
        losses.append((np.maximum(free**2, held**2)[rows] / 2 * mask[rows]).sum() / mask[rows].sum())
        slope = ppo.vf_coef * (np.where(free**2 >= held**2, free, 0)[rows] * counted)
        kernel = new["value_head"]["kernel"][:, 0].copy()
        new["value_head"]["kernel"][:, 0] -= LR * np.einsum("bt,btv->v", slope, hidden[rows])
        new["value_head"]["bias"] -= LR * slope.sum()
        by_hidden = np.zeros_like(table)
        np.add.at(by_hidden, bigram.contexts(rollout)[rows].reshape(-1), (slope[..., None] * kernel).reshape(-1, 24))
        owner = new["critic" if "critic" in new else "params"]
        new["params"]["table"] -= LR * gradient
        owner["table"] -= LR * by_hidden
    return new, losses


@pytest.mark.parametrize(
    "fields",
    [
        {"ppo.kl_in_reward": True, "objective.minibatches": 2, "objective.micro_batch_size": 2},
        {"ppo.critic": "model", "ppo.whiten_advantages": False, "objective.minibatches": 2},
    ],
    ids=["KL in the reward", "critic of its own"],
)
def test_an_update_against_numpy(rollout, fields):
    parts = parts_of(**fields)
    state = started(parts)
    want, losses = descend_by_hand(parts.config, jax.device_get(state.trainable), rollout)
    new, metrics, told = jax.device_get(jax.jit(lambda s, r: update(parts, s, r))(state, rollout))
    means = divide(metrics.means)
    old_values, _ = values_of(jax.device_get(state.trainable), rollout)
    seen, returns, mask = advantages_by_hand(parts.config, rollout, old_values)
    np.testing.assert_allclose(told.advantages, seen, atol=2e-5)
    moved = jax.tree.map(lambda a, b: np.abs(np.float64(a) - b).max(), new.trainable, state.trainable)
    for leaves in (moved["params"]["table"], *jax.tree.leaves(moved["value_head"])):
        assert leaves > 1e-3
    assert ("critic" in moved) == (parts.config.ppo.critic == "model") and moved.get("critic", {"table": 1})[
        "table"
    ] > 1e-3
    jax.tree.map(lambda got, by_hand: np.testing.assert_allclose(got, by_hand, atol=2e-5), new.trainable, want)
    config = parts.config
    counts = [mask[bigram.minibatch_rows(config, 8, m)].sum() for m in range(config.objective.minibatches)]
    assert means["value/loss"] == pytest.approx(np.average(losses, weights=counts), rel=1e-4)
    chosen = mask > 0
    assert means["value/mean"] == pytest.approx(old_values[chosen].mean(), rel=1e-4)
    assert means["value/return"] == pytest.approx(returns[chosen].mean(), rel=1e-4)
    explained = 1 - (returns - old_values)[chosen].var() / returns[chosen].var()
    assert means["value/explained_variance"] == pytest.approx(explained, abs=1e-4)
    assert means["kl"] > 0.1 and 0 <= means["value/clip"] < 1


def test_state_and_reference():
    """The value model is trained, starts at 0, and is no part of the reference; a critic of its own is a copy."""
    for critic in ("head", "model"):
        state = tiny.state(parts_of(**{"ppo.critic": critic}), {"params": bigram.params(0)})
        names = ["params", "value_head"] + ["critic"] * (critic == "model")
        assert sorted(state.trainable) == sorted(names) and list(state.reference) == ["params"]
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(state.trainable["value_head"]))
        if critic == "model":
            np.testing.assert_array_equal(state.trainable["critic"]["table"], bigram.params(0)["table"])
    parts = parts_of(**{"objective.reference_every": 1})
    state = started(parts)
    refreshed = refresh_reference(parts, state)
    jax.tree.map(np.testing.assert_array_equal, refreshed.reference, without_value(state.trainable))
    of, config = tiny.architecture(), tiny.config(**FIELDS)
    state = tiny.state(tiny.parts(config), {"adapters": tiny.adapters(of)}, {"params": tiny.params(of)})
    assert sorted(state.trainable) == ["adapters", "value_head"] and list(state.reference) == ["adapters"]


def test_a_critic_of_its_own_is_laid_out_as_the_policy_is():
    mesh = tiny.mesh(tiny.config(**{"mesh.fsdp": 2, "mesh.tensor": 2}))
    path, shape = "stack_0/mlp/down/kernel", (2, 24, 16)
    want = partition_spec(f"params/{path}", shape, mesh)
    assert partition_spec(f"critic/{path}", shape, mesh) == want and "fsdp" in want
    assert not any(partition_spec("value_head/kernel", (16, 1), mesh))


def test_the_fused_step_samples_as_grpo_does_and_learns_as_numpy_says():
    """A whole step in one program: the same tokens from the same policy, then the update of policy and head."""
    parts = parts_of()
    fresh = tiny.state(parts, {"params": bigram.params(0)})
    state = started(parts)
    before = jax.device_get(state.trainable)
    prompts = tiny.on_mesh(tiny.prompts(parts.config), parts.mesh)
    layout = jax.tree.map(lambda x: x.sharding, fresh)
    after, metrics, rollout = jax.device_get(Program(parts, fresh)(jax.device_put(state, layout), prompts))
    want, _ = descend_by_hand(parts.config, before, rollout)
    jax.tree.map(lambda got, by_hand: np.testing.assert_allclose(got, by_hand, atol=2e-5), after.trainable, want)
    assert divide(metrics.means)["sampler_gap/max"] < 1e-5 and divide(metrics.means)["value/clip"] == 0
    assert divide(metrics.means)["advantage/mean_abs"] == pytest.approx(
        np.abs(rollout.advantages[rollout.mask > 0]).mean()
    )
    plain = tiny.config(**{**FIELDS, "objective.baseline": "group"})
    parts = bigram.parts(plain)
    state = tiny.state(parts, {"params": bigram.params(0)})
    alone = jax.jit(lambda s, p: sample_rollout(parts, s, p).tokens)(state, tiny.prompts(plain))
    np.testing.assert_array_equal(alone, rollout.tokens)


def test_what_ppo_needs():
    with pytest.raises(
        InputError, match="ppo.kl_in_reward=True needs objective.baseline='value' and objective.beta above 0"
    ):
        tiny.config(**{"ppo.kl_in_reward": True, "objective.beta": 0.1})
    assert tiny.config(**{"objective.baseline": "value", "sampler.group_size": 1}).completions == 2
    with pytest.raises(InputError, match="ppo.critic='model' trains a decoder of its own, and lora.rank=4 freezes"):
        tiny.config(**{"ppo.critic": "model", "lora.rank": 4})
    with pytest.raises(InputError, match="sampler.group_size=1 must be at least 2"):
        tiny.config(**{"sampler.group_size": 1})
