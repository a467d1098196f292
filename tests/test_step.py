"""The step: one program, its numbers against numpy, the same for any split, and what it refuses to learn from."""

import dataclasses
import functools
import itertools
import types

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import optax
import pytest
import tiny

from grpo_jax.batches import PackShape, join, make_packs, pack_shape, split, training_batch
from grpo_jax.metrics import CompileCounter, Fetcher, divide
from grpo_jax.models.architecture import Experts, Stack
from grpo_jax.parallel import AXES, HOST, path_name
from grpo_jax.step import (
    Program,
    add_advantages,
    completion_logps,
    minibatch_gradient,
    sample_rollout,
    score_rollout,
    update,
)


def leaves(tree):
    return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def assert_bitwise(got, want):
    got, want = leaves(got), leaves(want)
    assert got.keys() == want.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def relative_error(got, want):
    """|got - want| / |want| over all leaves."""
    difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), got, want)

    def norm(tree):
        return np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))

    assert norm(want) > 1e-3
    return norm(difference) / norm(want)


def first_gradient(state, config):
    """The gradient of the first step: Adam's first moment is (1 - b1) times it, clipping being off."""
    moments = [x.mu for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")]
    return jax.tree.map(lambda m: m / np.float32(1 - config.optim.b1), jax.device_get(moments[0]))


# One program for a whole run: seven steps of the decoder, of which the last three are at learning rate 0.

ONE_LAYER = tiny.architecture(layers=1)
SMALL = {"data.prompts_per_step": 8, "sampler.group_size": 2, "sampler.max_new_tokens": 4, "optim.clip_norm": 0.0}
STEPS, LEARNING = 7, 4
RUN_FIELDS = {
    "objective.beta": 0.04,
    "objective.reference_every": LEARNING,
    "optim.schedule": "linear",  # 1e-2 at the first update, 0 after LEARNING
    "optim.clip_norm": 0.0,
    "train.steps": LEARNING,
}
RUN = tiny.config(**RUN_FIELDS)


@pytest.fixture(scope="module")
def run():
    """The run, all on the host: states before and after each step, metrics, rollouts, and what was counted."""
    parts = tiny.parts(RUN, ONE_LAYER)
    fetch = Fetcher()
    out = types.SimpleNamespace(parts=parts, fetch=fetch, metrics=[], rollouts=[], deleted=[])
    out.states = [jax.device_get(tiny.state(parts))]
    state = tiny.state(parts)  # never read: what the host has seen cannot be donated on CPU
    given = [tiny.on_mesh(tiny.prompts(RUN, 2 * step), parts.mesh) for step in range(STEPS)]
    array, reads = type(state.step), []
    read = array._value
    with pytest.MonkeyPatch.context() as patch, CompileCounter() as counter:
        out.counter, out.program = counter, Program(parts, state)
        out.program.compile(state, given[0])
        out.compiles_before = counter.compiles
        for prompts in given:
            old = state
            with jax.transfer_guard("disallow"):
                with patch.context() as counting:
                    # float(), bool(), tolist() and device_get read through this property (np.asarray does not).
                    counting.setattr(array, "_value", property(lambda x: reads.append(x.shape) or read.fget(x)))
                    state, metrics, rollout = out.program(state, prompts)
            out.deleted.append([x.is_deleted() for x in jax.tree.leaves(old)])
            fetched = fetch((state, metrics, rollout))
            out.states.append(fetched[0])
            out.metrics.append(divide(fetched[1].means))
            out.rollouts.append(fetched[2])
        out.compiles_after, out.reads = counter.compiles, list(reads)
        patch.setattr(array, "_value", property(lambda x: reads.append(x.shape) or read.fget(x)))
        float(state.step), bool(state.draws), fetch(state.updates)
        out.reads_seen = len(reads)
    return out


def test_a_run_traces_and_compiles_the_step_once(run):
    assert run.program.traces == 1
    assert run.counter.programs["jit(train_step)"] == 1 and run.counter.traces["train_step"] == 1
    assert run.compiles_after == run.compiles_before
    assert isinstance(run.program.fused, jax.stages.Compiled)  # which cannot trace


def test_the_host_reads_nothing_while_the_step_runs(run):
    assert run.reads == [] and run.fetch.count == STEPS + 1
    assert run.reads_seen == 3  # the fixture's own reads afterwards: the counter does see them


def test_the_state_is_donated(run):
    assert all(run.deleted[0]) and len(run.deleted[0]) == len(jax.tree.leaves(run.states[0]))


def test_counters_of_the_state(run):
    for step, state in enumerate(run.states):
        assert (state.step, state.draws, state.updates, state.skipped) == (step, 2 * step, step, 0)


def rollout_oracle(rollout, params, temperature=1.0):
    """Log-probabilities [B, T] of the rollout's tokens by the numpy decoder, 0 in the padding."""
    out = np.zeros(rollout.tokens.shape)
    for b, n in enumerate(rollout.lengths):
        prompt = rollout.prompt_tokens[b, rollout.prompt_tokens.shape[1] - rollout.prompt_lengths[b] :]
        out[b, :n] = numpy_decoder.completion_logps(params, ONE_LAYER, prompt, rollout.tokens[b, :n], temperature)
    return out


@pytest.mark.parametrize("step", [0, 2, 5])
def test_loss_and_metrics_against_numpy(run, step):
    state, rollout, metrics = run.states[step], run.rollouts[step], dict(run.metrics[step])
    logps = rollout_oracle(rollout, state.trainable["params"])
    np.testing.assert_allclose(rollout.logps, logps, atol=1e-5)
    mask = np.arange(6) < rollout.lengths[:, None]
    odd = (rollout.tokens % 2 * mask).sum(1) / rollout.lengths
    rewards = odd + 0.5 * rollout.lengths / 6
    groups = rewards.reshape(2, 4)
    scaled = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(rollout.advantages, scaled.reshape(-1, 1) * mask, atol=1e-5)
    difference = (rollout_oracle(rollout, state.reference["params"]) - logps)[mask]
    kl = (np.exp(difference) - difference - 1).mean()
    want = {
        "loss": -(scaled.reshape(-1, 1) * mask).sum() / mask.sum() + 0.04 * kl,
        "kl": kl,
        "reward/total": rewards.mean(),
        "reward/odd": odd.mean(),
        "reward/long": rollout.lengths.mean() / 6,
        "length/mean": rollout.lengths.mean(),
        "truncated": 1 - rollout.ended.mean(),
        "solve_rate": (odd >= 1).mean(),
        "groups/all_right": (odd >= 1).reshape(2, 4).all(1).sum(),
        "groups/all_wrong": (odd < 1).reshape(2, 4).all(1).sum(),
        "advantage/mean_abs": np.abs(scaled.reshape(-1, 1) * mask).sum() / mask.sum(),
        "tokens": mask.sum(),
        "occupancy": (rollout.lengths - 1).mean() / max(rollout.lengths.max() - 1, 1),
        "ratio/mean": 1,
        "clip/low": 0,
        "clip/high": 0,
        "skipped": 0,
        "lr": 1e-2 * max(1 - step / LEARNING, 0),
    }
    if 0 < (odd >= 1).sum():
        want["length/right"] = rollout.lengths[odd >= 1].mean()
    want["length/wrong"] = rollout.lengths[odd < 1].mean()
    for name, value in want.items():
        np.testing.assert_allclose(metrics.pop(name), value, atol=2e-5, rtol=1e-5, err_msg=name)
    assert sorted(metrics) == ["entropy", "grad_norm", "sampler_gap/max", "sampler_gap/mean"]


def test_sampler_and_trainer_agree_in_every_step(run):
    for metrics in run.metrics:
        assert 0 < metrics["sampler_gap/mean"] <= metrics["sampler_gap/max"] <= 1e-5


def test_entropy_against_numpy(run):
    state, rollout = run.states[3], run.rollouts[3]
    total, count = 0.0, 0
    for b, n in enumerate(rollout.lengths):
        prompt = rollout.prompt_tokens[b, 7 - rollout.prompt_lengths[b] :]
        tokens = np.concatenate([prompt, rollout.tokens[b, :n]])
        place = np.arange(len(tokens))
        logits = numpy_decoder.forward(state.trainable["params"], ONE_LAYER, tokens, place, np.ones_like(place))
        logps = numpy_decoder.log_softmax(logits[len(prompt) - 1 : -1])
        total, count = total - (np.exp(logps) * logps).sum(), count + n
    assert run.metrics[3]["entropy"] == pytest.approx(total / count, rel=1e-5)


def test_the_reference_is_a_copy_that_is_refreshed_every_k_steps(run):
    for step in range(LEARNING):
        assert_bitwise(run.states[step].reference, run.states[0].trainable)
    for state in run.states[LEARNING:]:
        assert_bitwise(state.reference, run.states[LEARNING].trainable)
    assert all(m["kl"] > 1e-6 for m in run.metrics[1:LEARNING])


def test_learning_rate_zero_changes_no_bit_and_has_no_kl(run):
    for step in range(LEARNING, STEPS):
        assert_bitwise(run.states[step + 1].trainable, run.states[LEARNING].trainable)
        assert run.metrics[step]["kl"] < 1e-9 and run.metrics[step]["lr"] == 0 and run.metrics[step]["grad_norm"] > 0.1
    assert run.metrics[0]["kl"] < 1e-9
    before, after = leaves(run.states[LEARNING - 1].trainable), leaves(run.states[LEARNING].trainable)
    assert all((before[name] != after[name]).any() for name in before)


def test_adam_moves_by_the_gradient_that_it_keeps(run):
    gradient = first_gradient(run.states[1], RUN)
    assert float(np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))) == pytest.approx(
        run.metrics[0]["grad_norm"], rel=1e-5
    )
    for got, old, g in zip(
        *map(jax.tree.leaves, (run.states[1].trainable, run.states[0].trainable, gradient)), strict=True
    ):
        np.testing.assert_allclose(got, old - 1e-2 * g / (np.abs(g) + 1e-8), atol=1e-6)


def test_staged_equals_fused(run):
    config = dataclasses.replace(RUN, step=dataclasses.replace(RUN.step, mode="staged"))
    parts = tiny.parts(config, ONE_LAYER)
    state = tiny.state(parts)
    program = Program(parts, state)
    state, metrics, rollout = jax.device_get(program(state, tiny.on_mesh(tiny.prompts(config), parts.mesh)))
    for name in ("tokens", "lengths", "ended", "mask", "draw", "group", "prompt_tokens"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(run.rollouts[0], name))
    assert relative_error(first_gradient(state, config), first_gradient(run.states[1], RUN)) < 1e-5
    means = divide(metrics.means)
    assert means.keys() == run.metrics[0].keys()
    for name, value in run.metrics[0].items():
        assert means[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert sorted(program.seconds) == ["sample", "score", "update"] and min(program.seconds.values()) > 0
    # Its programs are built once each, too.
    assert program.traces == 4


def test_staged_equals_fused_on_two_devices():
    """Each program is handed rows laid out as the one before it left them."""
    got = []
    for mode in ("fused", "staged"):
        parts = bigram.parts(tiny.config(**{"step.mode": mode, "mesh.data": 2}))
        state = tiny.state(parts, {"params": bigram.params()})
        prompts = tiny.on_mesh(tiny.prompts(parts.config), parts.mesh)
        got.append(jax.device_get(Program(parts, state)(state, prompts)))
    (fused, _, one), (staged, _, other) = got
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(
        fused.trainable["params"]["table"], staged.trainable["params"]["table"], rtol=0, atol=1e-6
    )


@pytest.mark.slow
def test_a_state_in_host_memory_takes_the_same_steps(run):
    """Optimizer and reference, through an update that refreshes the reference; what lies there goes on lying there."""
    config = dataclasses.replace(RUN, mesh=dataclasses.replace(RUN.mesh, offload="both"))
    parts = tiny.parts(config, ONE_LAYER)
    state = tiny.state(parts)
    program = Program(parts, state)
    for step in range(LEARNING):
        given = tiny.on_mesh(tiny.prompts(config, 2 * step), parts.mesh)
        state, _, _ = program(state, given)
        for part in (state.opt_state, state.reference):
            assert {x.sharding.memory_kind for x in jax.tree.leaves(part) if x.ndim} == {HOST}
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.trainable)} == {"device"}
    assert program.traces == 1
    got = jax.device_get(state)
    for name in ("trainable", "reference"):
        assert relative_error(getattr(got, name), getattr(run.states[LEARNING], name)) < 1e-6


def test_in_bfloat16_sampler_and_trainer_agree_within_its_bound():
    """Products in bfloat16 are rounded to 8 bits wherever they are summed in another order: 0.05 is the bound."""
    config = tiny.config(**{"model.compute_dtype": "bfloat16"})
    parts = tiny.parts(config)
    state = tiny.state(parts)

    @jax.jit
    def gaps(state, prompts):
        rollout = sample_rollout(parts, state, prompts)
        shape = pack_shape(config, 1)
        piece = jax.tree.map(lambda x: x[0], split(training_batch(rollout, False), 1, shape))
        pack, rows = make_packs(piece, shape).pick(0)
        logps, _ = completion_logps(parts, {**state.frozen, **state.trainable}, pack)
        return jnp.abs(logps - rows.old_logps) * rows.mask

    gap = np.asarray(gaps(state, tiny.prompts(config)))
    assert 1e-5 < gap.max() < 0.05


# The same gradient for any cut into micro-batches, and none from padding.


@functools.cache
def gradient_in_packs(**fields):
    """(loss, gradient) of a rollout whose reference is the policy, jitted, in packs of the shape that fields say."""
    parts = tiny.parts(RUN, ONE_LAYER)
    state = tiny.state(parts)
    parts = dataclasses.replace(parts, config=tiny.config(**RUN_FIELDS, **fields))

    @jax.jit
    def compute(rollout):
        batch = training_batch(rollout, False).replace(ref_logps=rollout.logps)
        piece = jax.tree.map(lambda x: x[0], split(batch, 1, pack_shape(parts.config, 1)))
        return minibatch_gradient(parts, state, piece, jnp.sum(rollout.mask))[:2]

    return lambda rollout: jax.device_get(compute(rollout))


PLAIN = {"train.share_prefix": False}


@pytest.mark.parametrize(
    "fields",
    [
        {"objective.micro_batch_size": 8},
        PLAIN | {"objective.micro_batch_size": 1},
        # Other shapes of packs: `test_updates_against_numpy` has them, of the bigram table.
        pytest.param({"objective.micro_batch_size": 5, "train.pack_prompts": 2}, marks=pytest.mark.slow),
        pytest.param(PLAIN | {"objective.micro_batch_size": 3, "train.pack_prompts": 4}, marks=pytest.mark.slow),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_packs_of_any_shape_give_one_gradient_of_the_decoder(run, fields):
    loss, gradient = gradient_in_packs(**fields)(run.rollouts[0])
    assert loss == pytest.approx(run.metrics[0]["loss"], rel=1e-5) and abs(loss) > 1e-3
    assert relative_error(gradient, first_gradient(run.states[1], RUN)) < 1e-5


def test_what_stands_in_padding_changes_no_bit_of_the_gradient(run):
    rollout = run.rollouts[0]
    prompt_padding = np.arange(7) < 7 - rollout.prompt_lengths[:, None]
    padding = np.arange(6) >= rollout.lengths[:, None]
    assert prompt_padding.any() and padding.any()
    junk = rollout.replace(
        tokens=np.where(padding, 5, rollout.tokens),
        logps=np.where(padding, -3, rollout.logps).astype(np.float32),
        advantages=np.where(padding, 100, rollout.advantages).astype(np.float32),
        prompt_tokens=np.where(prompt_padding, 6, rollout.prompt_tokens),
    )
    for fields in ({"objective.micro_batch_size": 8}, PLAIN | {"objective.micro_batch_size": 1}):
        assert_bitwise(gradient_in_packs(**fields)(junk), gradient_in_packs(**fields)(rollout))


# Updates against numpy: all losses, minibatches, epochs, micro-batches, clipping, filler, truncation.

UPDATE = {"data.prompts_per_step": 4, "objective.beta": 0.04, "optim.clip_norm": 0.0}


@pytest.fixture(scope="module")
def recorded():
    """A scored rollout of the bigram table with a filler prompt, its log-probabilities shifted so that ratios clip."""
    config = tiny.config(**UPDATE)
    parts = bigram.parts(config)
    state = tiny.state(parts, {"params": bigram.params()})
    prompts = tiny.prompts(config).replace(weight=np.array([1, 1, 0, 1], np.float32))
    roll = jax.jit(lambda state, prompts: score_rollout(parts, prompts, sample_rollout(parts, state, prompts)))
    rollout = jax.device_get(roll(state, prompts))
    shift = np.random.default_rng(0).normal(0, 0.3, rollout.logps.shape)
    assert 0 < rollout.ended.sum() < 12 and (rollout.advantages[8:12] == 0).all()
    stale = np.random.default_rng(1).normal(0, 0.3, rollout.logps.shape)
    return rollout.replace(
        logps=(rollout.logps + shift).astype(np.float32), sampled_logps=(rollout.logps + stale).astype(np.float32)
    )


def descended(rollout, fields, **more):
    """(config, table after `update` by gradient descent, metrics, state), from policy 0 and reference 1."""
    config = tiny.config(
        **UPDATE, **more, **{name if "." in name else f"objective.{name}": value for name, value in fields.items()}
    )
    parts = bigram.parts(config, optimizer=optax.sgd(3.0))
    state = tiny.state(parts, {"params": bigram.params(0)})
    state = state.replace(reference={"params": bigram.params(1)})
    rollout = tiny.on_mesh(rollout, parts.mesh)
    new, metrics, _ = jax.device_get(jax.jit(lambda state, rollout: update(parts, state, rollout))(state, rollout))
    return config, new.trainable["params"]["table"], divide(metrics.means), new


def clear_share(recorded):
    """A share of tokens, near 0.4, whose threshold lies between entropies that rounding does not confuse.

    A token's entropy is that of the token before it, so many are equal.
    """
    config = tiny.config(**UPDATE)
    p = bigram.logps_of(bigram.params(0)["table"], recorded)[1]
    entropies = np.sort(-(p * np.log(p)).sum(-1)[bigram.counted_mask(recorded, config) > 0])
    gaps = np.diff(entropies)
    place = min(np.flatnonzero(gaps > 1e-3), key=lambda at: abs(at / len(entropies) - 0.6))
    return 1 - (place + 0.5) / (len(entropies) - 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_type": "grpo", "minibatches": 2, "num_iterations": 2, "micro_batch_size": 2, **PLAIN},
        pytest.param(
            {"loss_type": "bnpo", "minibatches": 2, "micro_batch_size": 4, "mask_truncated": True},
            marks=pytest.mark.slow,
        ),
        {"loss_type": "dapo", "minibatches": 4, "micro_batch_size": 1, "epsilon_high": 0.4, **PLAIN},
        pytest.param({"loss_type": "dapo", "num_iterations": 3}, marks=pytest.mark.slow),
        pytest.param(
            {"loss_type": "dr_grpo", "minibatches": 2, "micro_batch_size": 8, "epsilon": 0.1}, marks=pytest.mark.slow
        ),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.05},
        {
            "entropy_coef": 0.3,
            "top_entropy_quantile": 0.4,
            "minibatches": 2,
            "micro_batch_size": 2,
            "num_iterations": 2,
            **PLAIN,
        },
        {
            "loss_type": "bnpo",
            "correction": "token_mask",
            "correction_min": 0.8,
            "correction_max": 1.4,
            "kl_estimator": "k1",
            "kl_gradient": "k2",
            "minibatches": 2,
            "num_iterations": 2,
        },
        {"loss_type": "vespo", "correction": "token_truncate", "correction_max": 1.2, "micro_batch_size": 4},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_updates_against_numpy(recorded, fields):
    if "top_entropy_quantile" in fields:
        fields = fields | {"top_entropy_quantile": clear_share(recorded)}
    config, table, metrics, state = descended(recorded, fields)
    tables = bigram.params(0)["table"], bigram.params(1)["table"]
    want, losses = bigram.descend(*tables, recorded, config, 3.0)
    assert relative_error(table - tables[0], want - tables[0]) < 1e-5
    updates = fields.get("minibatches", 1) * fields.get("num_iterations", 1)
    assert state.updates == updates == len(losses) and state.skipped == 0
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5, abs=1e-6)
    if fields.get("correction", "none") == "none":  # else the trainer's own law is the ratio's denominator
        assert metrics["clip/low"] + metrics["clip/high"] > 0.05
    # The gap is that of the first minibatch, before its update.
    rows = bigram.minibatch_rows(config, 16, 0)
    mask = (np.arange(6) < recorded.lengths[:, None]) * recorded.weight[:, None]
    if config.objective.mask_truncated:
        mask = mask * recorded.ended[:, None]
    gap = np.abs(bigram.logps_of(tables[0], recorded)[0] - recorded.logps)[rows][mask[rows] > 0]
    assert metrics["sampler_gap/max"] == pytest.approx(gap.max(), rel=1e-4)
    assert metrics["sampler_gap/mean"] == pytest.approx(gap.mean(), rel=1e-4)
    assert state.draws == 3  # the filler prompt was not drawn


@pytest.fixture(scope="module")
def corrected(recorded):
    """(config, table, metrics, state) with corrections by row and tokens of high entropy, on one and on 8 devices."""
    fields = {
        "correction": "sequence_mask",
        "correction_max": 1.5,
        "top_entropy_quantile": clear_share(recorded),
        "entropy_coef": 0.1,
        "loss_type": "grpo",
        "minibatches": 2,
        **PLAIN,
    }
    return [descended(recorded, fields, **{"mesh.data": devices}) for devices in (1, 8)]


def test_corrections_and_selected_tokens_are_counted(recorded, corrected):
    config, _, metrics, _ = corrected[0]
    counted = bigram.counted_mask(recorded, config) > 0
    made = bigram.beside(bigram.params(0)["table"], recorded, config)
    weights = made["corrections"][counted]
    assert 0.1 < metrics["correction/outside"] == pytest.approx((weights == 0).mean(), rel=1e-5)
    assert metrics["correction/weight"] == pytest.approx(weights.mean(), rel=1e-4)
    d = (made["old"] - recorded.sampled_logps)[counted]
    assert metrics["correction/kl"] == pytest.approx((np.exp(d) - 1 - d).mean(), rel=1e-4)
    assert metrics["entropy/selected"] == pytest.approx(made["selected"][counted].mean(), rel=1e-5)
    assert abs(metrics["entropy/selected"] - config.objective.top_entropy_quantile) < 0.1
    # The gap to the sampler is still that of the recorded log-probabilities.
    assert metrics["sampler_gap/mean"] > 0.1


def test_sums_over_rows_and_a_quantile_of_the_rollout_are_the_same_on_eight_devices(corrected):
    alone, spread = corrected
    start = bigram.params(0)["table"]
    assert relative_error(spread[1] - start, alone[1] - start) < 1e-5
    assert spread[2].keys() == alone[2].keys()
    for name, value in alone[2].items():
        assert spread[2][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("mode", ["outcome", "gdpo", "steps"])
def test_advantages_of_a_step(recorded, mode):
    """From scores to advantages [B, T]: components, rewards of steps."""
    fields = {
        "gdpo": {"objective.multi_objective_aggregation": "normalize_then_sum"},
    }.get(mode, {})
    config = tiny.config(**UPDATE, **fields)
    parts, scores = bigram.parts(config), recorded.scores
    mask, weights = bigram.counted_mask(recorded, config), np.array([1.0, 0.5])
    values = scores.values * scores.valid
    if mode == "steps":
        random = np.random.default_rng(0)
        steps, ends = random.random(mask.shape).astype(np.float32), (random.random(mask.shape) < 0.4) * mask
        scores = scores.replace(step_rewards=steps * ends, step_ends=ends.astype(np.float32))
    compute = jax.jit(lambda rollout, scores: add_advantages(parts, rollout, scores).advantages)
    got = np.asarray(compute(recorded, scores))
    total = values @ weights
    real = recorded.weight.reshape(4, 4)[:, 0] > 0
    want = np.zeros((4, 4, 6))
    for n, group in enumerate(total.reshape(4, 4)):
        if not real[n]:
            continue
        if mode == "steps":
            rows = slice(4 * n, 4 * n + 4)
            at_end = np.arange(6) == recorded.lengths[rows, None] - 1
            reward = steps[rows] * ends[rows] + at_end * group[:, None]
            counted = (ends[rows] > 0) | at_end
            scaled = (reward - reward[counted].mean()) / (reward[counted].std(ddof=1) + 1e-4) * counted
            want[n] = scaled[:, ::-1].cumsum(axis=1)[:, ::-1]
        elif mode == "gdpo":
            of_each = values.reshape(4, 4, 2)[n]
            scaled = (of_each - of_each.mean(0)) / (of_each.std(0, ddof=1) + 1e-4)
            want[n] = (scaled @ weights)[:, None]
        else:
            want[n] = ((group - group.mean()) / (group.std(ddof=1) + 1e-4))[:, None]
    if mode == "gdpo":
        known = want[real][..., 0]
        want = (want - known.mean()) / (known.std(ddof=1) + 1e-4)
    want = want.reshape(16, 6) * mask
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(want).max() > 0.3


def test_the_end_token_is_trained_on(recorded):
    config, table, _, _ = descended(recorded, {"loss_type": "grpo"})
    tables = bigram.params(0)["table"], bigram.params(1)["table"]
    cut = recorded.replace(lengths=recorded.lengths - recorded.ended)
    want, without = (bigram.descend(*tables, rollout, config, 3.0)[0] - tables[0] for rollout in (recorded, cut))
    assert relative_error(table - tables[0], want) < 1e-5 < 0.05 < relative_error(without, want)


def test_zeros_for_the_gradient_are_not_made_before_sampling():
    """They would lie beside sampling's copy of the weights: 2.03 times the weights in a step of one pack."""
    one_pack = {"objective.micro_batch_size": 4, "sampler.group_size": 2, "sampler.max_new_tokens": 3}
    config = tiny.config(**one_pack, **{"objective.beta": 0.0, "model.remat": "full"})
    parts = tiny.parts(config, tiny.architecture(layers=6, width=128, mlp_width=1024, head_size=32))
    state = tiny.state(parts)
    program = Program(parts, state)
    program.compile(state, tiny.on_mesh(tiny.prompts(config), parts.mesh))
    size = sum(x.nbytes for x in jax.tree.leaves(state.trainable))
    assert program.fused.memory_analysis().temp_size_in_bytes < 1.5 * size


def test_pieces_are_the_same_minibatches_on_any_devices():
    rows = {"x": np.arange(24), "y": np.arange(48).reshape(24, 2)}
    for parts, group, minibatches in ((1, 4, 1), (2, 4, 3), (2, 1, 4), (1, 1, 3), (3, 2, 2)):
        shape = PackShape(parts, group, group, 1, group > 1)
        pieces = split(rows, minibatches, shape)
        assert pieces["x"].shape == (minibatches, parts, 24 // minibatches // parts // group, group)
        np.testing.assert_array_equal(pieces["y"][..., 0], 2 * pieces["x"])
        np.testing.assert_array_equal(join(pieces["y"]), rows["y"])
        for m in range(minibatches):
            held = sorted(pieces["x"][m].ravel().tolist())
            assert held == [b for b in range(24) if b // group % minibatches == m]
        for part in range(parts):  # contiguous shards of the rows
            assert (pieces["x"][:, part] // (24 // parts) == part).all()


# What must not be learnt from. One program of the bigram table with a host reward that can be told to fail.


class Told:
    """A host reward: the length, a constant, or an exception, as it was told."""

    def __init__(self):
        self.what, self.ids = "length", []

    def __call__(self, completions, completion_ids, **columns):
        self.ids += completion_ids
        if self.what == "raise":
            raise RuntimeError("told to")
        return [0.1 if self.what == "tie" else float(len(ids)) for ids in completion_ids]


@pytest.fixture(scope="module")
def told():
    """(config, parts, fresh state, program, host reward) with reward "boost", a column of the prompts, in-graph."""

    def boost(prompts, rollout):
        second = jnp.arange(len(rollout.lengths)) % 4 == 1
        return jnp.where(second, prompts.columns["boost"][rollout.group], 0)

    config = tiny.config(**{"rewards.names": ("told", "boost"), "rewards.weights": (1.0, 1.0)})
    reward = Told()
    parts = bigram.parts(config, rewards={"boost": boost}, callables={"told": reward})

    def fresh(**params):
        return tiny.state(parts, {"params": bigram.params() | params})

    program = Program(parts, fresh())
    program.compile(fresh(), stepped_prompts(config))
    return types.SimpleNamespace(config=config, parts=parts, fresh=fresh, program=program, reward=reward)


def stepped_prompts(config, boost=0.0):
    return tiny.prompts(config).replace(columns={"boost": np.array([0, boost], np.float32)})


def step_told(told, what="length", boost=0.0, state=None, **params):
    """The host's view of (state before, state after, metrics, rollout) of a step."""
    told.reward.what, told.reward.ids = what, []
    state = told.fresh(**params) if state is None else state
    before = jax.device_get(state)
    after, metrics, rollout = told.program(state, stepped_prompts(told.config, boost))
    return before, after, jax.device_get(metrics), jax.device_get(rollout)


def assert_skipped(before, after, metrics):
    after = jax.device_get(after)
    assert_bitwise((after.trainable, after.opt_state), (before.trainable, before.opt_state))
    assert (after.step, after.updates, after.skipped, after.skipped_in_row) == (1, 0, 1, 1)
    assert metrics.skipped_in_row == 1 and divide(metrics.means)["skipped"] == 1


def test_host_rewards_score_each_completion_once_inside_the_program(told):
    before, after, metrics, rollout = step_told(told)
    want = sorted(tokens[:n].tolist() for tokens, n in zip(rollout.tokens, rollout.lengths, strict=True))
    assert sorted(told.reward.ids) == want and told.program.traces == 1
    np.testing.assert_array_equal(rollout.scores.values[:, 0], rollout.lengths)
    assert not metrics.failed and divide(metrics.means)["skipped"] == 0
    assert relative_error(after.trainable, before.trainable) > 1e-3 and told.parts.scorer.host.take_error() is None


def test_a_failing_host_reward_masks_the_update(told):
    before, after, metrics, _ = step_told(told, "raise")
    assert metrics.failed
    assert_skipped(before, after, metrics)
    assert "told to" in str(told.parts.scorer.host.take_error())
    _, after, metrics, _ = step_told(told, state=after)
    assert not metrics.failed and metrics.skipped_in_row == 0 and (after.updates, after.skipped) == (1, 1)


def test_a_reward_that_is_not_finite_skips_the_update(told):
    before, after, metrics, _ = step_told(told, boost=np.inf)
    assert_skipped(before, after, metrics)
    assert not metrics.failed and dict(zip(told.program.paths, metrics.nonfinite, strict=True))["params/table"] == 1


def test_a_gradient_that_is_not_finite_is_named_and_skips_the_update(told):
    before, after, metrics, _ = step_told(told, spike=np.float32(0))
    assert_skipped(before, after, metrics)
    assert dict(zip(told.program.paths, metrics.nonfinite, strict=True)) == {"params/spike": 1, "params/table": 0}
    assert np.isfinite(divide(metrics.means)["loss"])


def test_groups_that_tie_have_advantage_and_gradient_of_exactly_zero(told):
    before, after, metrics, rollout = step_told(told, "tie")
    assert (rollout.scores.values[:, 0] == np.float32(0.1)).all() and not rollout.advantages.any()
    means = divide(metrics.means)
    assert means["grad_norm"] == 0 and means["loss"] == 0 and means["skipped"] == 0 and after.updates == 1
    assert_bitwise(after.trainable, before.trainable)
    # One group ties, the other does not: rows of the first add nothing.
    _, _, _, rollout = step_told(told, "tie", boost=1.0)
    assert not rollout.advantages[:4].any() and np.abs(rollout.advantages[4:, 0]).min() > 0.1


# A sampler that is not the trainer: top-p, and a cache in bfloat16.


def test_the_correction_is_that_of_the_trainer_to_the_law_really_drawn_from():
    fields = {"sampler.top_p": 0.8, "sampler.cache_dtype": "bfloat16", "objective.correction": "token_truncate"}
    parts = tiny.parts(tiny.config(**fields, **SMALL), ONE_LAYER, optax.sgd(1.0))
    before, _, metrics, rollout = one_step(parts)
    logps = rollout_oracle(rollout, before.trainable["params"])
    mask = np.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    weights = np.minimum(np.exp(logps - rollout.sampled_logps)[mask], 3.0)
    assert metrics["correction/weight"] == pytest.approx(weights.mean(), rel=1e-4) and weights.mean() < 0.95
    # The trainer's law is the ratio's denominator, so that the ratio is 1 though the sampler's numbers are off.
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-5) and metrics["sampler_gap/max"] > 1e-4
    assert metrics["correction/kl"] > 0.01 and metrics["correction/outside"] == 0


# Devices.


def one_step(parts, variables=None):
    """(state before, state after, metrics, rollout) on the host."""
    state = tiny.state(parts, variables)
    before = jax.device_get(state)
    prompts = tiny.on_mesh(tiny.prompts(parts.config), parts.mesh)
    after, metrics, rollout = jax.device_get(Program(parts, state)(state, prompts))
    return before, after, divide(metrics.means), rollout


# A layer with experts and an MLP for all tokens; sizes that eight devices of any axis divide.
MIXED = dataclasses.replace(
    tiny.architecture(),
    stacks=(Stack((0,), experts=True),),
    experts=Experts(count=8, chosen=2, width=8, shared_width=16),
)
WIDE = SMALL | {"data.max_prompt_length": 8, "sampler.max_new_tokens": 8}


@functools.cache
def step_on(sampling="same", more=(), **sizes):
    """One step of MIXED on a mesh of these sizes, by plain descent at rate 1."""
    fields = WIDE | {f"mesh.{axis}": size for axis, size in sizes.items()} | {"mesh.sampling": sampling} | dict(more)
    parts = tiny.parts(tiny.config(**fields), MIXED, optax.sgd(1.0))
    return one_step(parts, {"params": tiny.drawn(MIXED)})


def same_step(sampling="same", more=(), **sizes):
    """Asserts that a step on a mesh is the step of one device."""
    before, alone, metrics, rollout = step_on(more=more)
    _, state, got_metrics, got = step_on(sampling, more, **sizes)
    for name in ("tokens", "lengths", "ended", "draw", "group"):
        np.testing.assert_array_equal(getattr(got, name), getattr(rollout, name), err_msg=name)
    assert got_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
    # At learning rate 1 of plain descent the gradient is what the parameters moved by.
    moved = [jax.tree.map(lambda new, old: old - new, s.trainable, before.trainable) for s in (state, alone)]
    assert relative_error(*moved) < 1e-5
    assert got_metrics["sampler_gap/max"] <= 1e-5
    for name in ("reward/total", "length/mean", "advantage/mean_abs", "groups/all_wrong"):
        assert got_metrics[name] == pytest.approx(metrics[name], rel=1e-5), name


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2, "sampling": "replicated"},
        {"fsdp": 2, "expert": 2, "tensor": 2, "sampling": "same"},
        {"data": 2, "fsdp": 2, "sequence": 2, "sampling": "tensor"},
        {"expert": 2, "sequence": 2, "tensor": 2, "sampling": "replicated"},
        {"data": 2, "expert": 4, "sampling": "tensor"},
    ],
    ids=lambda mesh: "-".join(f"{k}_{v}" for k, v in mesh.items()),
)
def test_any_devices_give_the_same_tokens_loss_and_gradient(mesh):
    same_step(**mesh)


def every_mesh():
    """All ways to lay eight devices along the axes, with each layout of sampling that differs from "same" there."""
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES)):
        if np.prod(sizes) == 8:
            mesh = dict(zip(AXES, sizes, strict=True))
            yield mesh
            if mesh["fsdp"] > 1:
                yield mesh | {"sampling": "tensor"}
            if mesh["fsdp"] * mesh["expert"] * mesh["tensor"] > 1:
                yield mesh | {"sampling": "replicated"}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", list(every_mesh()), ids=lambda mesh: "-".join(map(str, mesh.values())))
def test_every_mesh_of_eight_devices_gives_the_same_tokens_loss_and_gradient(mesh):
    same_step(**mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"train.share_prefix": False},
        {"model.logits_chunk": 16, "model.remat": "full"},
        {"objective.beta": 0.04, "objective.minibatches": 2, "objective.micro_batch_size": 8},
        {"objective.baseline": "value", "ppo.critic": "model"},
        {"sampler.slots": 8},
    ],
    ids=lambda more: "-".join(map(str, more)),
)
def test_other_steps_are_the_same_over_columns_and_experts(more):
    same_step(more=tuple(more.items()), fsdp=2, expert=2, sequence=2)
