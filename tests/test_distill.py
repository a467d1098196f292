"""On-policy distillation in the step: values and gradients against float64, splits, equal laws, what is refused."""

import dataclasses

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import optax
import pytest
import tiny

from grpo_jax.batches import make_packs, pack_shape, split, training_batch
from grpo_jax.errors import InputError
from grpo_jax.metrics import divide
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.teacher import open_teacher
from grpo_jax.models.value import TEACHER
from grpo_jax.ops.logprobs import distilled_logps, reverse_kl
from grpo_jax.step import (
    Program,
    micro_loss,
    sample_rollout,
    sampling_variables,
    score_rollout,
    train_step,
    update,
    with_teacher,
)
from grpo_jax.text import Tokenizer, train_sentencepiece

LR = 0.5
FIELDS = {
    "data.prompts_per_step": 4,
    "sampler.group_size": 2,
    "sampler.temperature": 0.8,
    "optim.clip_norm": 0.0,
    "distill.teacher": "somewhere",
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


# The divergence by itself.


def kl_by_hand(logits, teacher):
    """(KL, d KL / d logits) of float64 logits, from the definition."""

    def law(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    p, q = law(logits), law(teacher)
    difference = np.log(p) - np.log(q)
    value = (p * difference).sum(-1)
    return value, p * (difference - value[..., None])


def test_reverse_kl_against_finite_differences():
    random = np.random.default_rng(0)
    logits, teacher, slope = random.normal(0, 2, (3, 5, 7)), random.normal(0, 2, (3, 5, 7)), random.normal(0, 1, (3, 5))
    value, by_logits = kl_by_hand(logits, teacher)
    eps, direction = 1e-6, random.normal(0, 1, logits.shape)
    moved = [(slope * kl_by_hand(logits + s * eps * direction, teacher)[0]).sum() for s in (1, -1)]
    assert (slope[..., None] * by_logits * direction).sum() == pytest.approx(
        (moved[0] - moved[1]) / (2 * eps), rel=1e-6
    )
    with jax.enable_x64(True):
        got, gradients = jax.value_and_grad(lambda x, t: jnp.sum(slope * reverse_kl(x, t)), (0, 1))(logits, teacher)
        np.testing.assert_allclose(reverse_kl(jnp.asarray(logits), jnp.asarray(teacher)), value, rtol=1e-12)
    assert got == pytest.approx((slope * value).sum(), rel=1e-12) and (value > 0.1).all()
    np.testing.assert_allclose(gradients[0], slope[..., None] * by_logits, atol=1e-12)
    assert not np.asarray(gradients[1]).any(), "the teacher is not trained"


def test_equal_laws_have_no_distance_and_no_gradient_at_all():
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 5, (4, 50)), jnp.float32)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(reverse_kl(x, logits)))(logits)
    assert value == 0 and not np.asarray(gradient).any()


@pytest.mark.parametrize("chunk", [0, 4])
def test_chunks_change_nothing_and_vocabularies_may_be_padded(chunk):
    """Student of 7 words and width 3, teacher of 9 words and width 5; of the latter's rows the first 7 count."""
    random = np.random.default_rng(2)
    hidden, taught = random.normal(0, 1, (3, 5, 3)), random.normal(0, 1, (3, 5, 5))
    matrix, frozen, targets = random.normal(0, 1, (3, 7)), random.normal(0, 1, (5, 9)), random.integers(0, 7, (3, 5))
    slopes = random.normal(0, 1, (3, 3, 5))

    def total(hidden, matrix):
        laws = distilled_logps(hidden, lambda h: h @ matrix, taught, lambda h: h @ frozen, targets, 0.7, chunk, True)
        return sum(jnp.sum(a * b) for a, b in zip(slopes, laws, strict=True)), laws

    with jax.enable_x64(True):
        (_, laws), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(jnp.asarray(hidden), jnp.asarray(matrix))
    logits = hidden @ matrix / 0.7
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p = np.exp(logps)
    spread = -(p * logps).sum(-1)
    distance, by_distance = kl_by_hand(logits, (taught @ frozen)[..., :7] / 0.7)
    np.testing.assert_allclose(laws[0], np.take_along_axis(logps, targets[..., None], -1)[..., 0], rtol=1e-10)
    np.testing.assert_allclose(laws[1], spread, rtol=1e-10)
    np.testing.assert_allclose(laws[2], distance, rtol=1e-10)
    by_logits = slopes[0][..., None] * (np.eye(7)[targets] - p) + slopes[2][..., None] * by_distance
    by_logits -= slopes[1][..., None] * p * (logps + spread[..., None])
    np.testing.assert_allclose(gradients[0], by_logits @ matrix.T / 0.7, atol=1e-10)
    np.testing.assert_allclose(gradients[1], np.einsum("btd,btv->dv", hidden, by_logits) / 0.7, atol=1e-10)


# In the step, on the table of bigrams.


def parts_of(**fields):
    parts = bigram.parts(tiny.config(**{**FIELDS, **fields}), optimizer=optax.sgd(LR))
    return dataclasses.replace(parts, teacher=bigram.Bigram())


def state_of(parts, student=0, teacher=2):
    """Student, reference 1 and teacher by the seeds of their tables."""
    state = tiny.state(parts, {"params": bigram.params(student)}, {TEACHER: {"params": bigram.params(teacher)}})
    return state if state.reference is None else state.replace(reference={"params": bigram.params(1)})


@pytest.fixture(scope="module")
def plain_rollout():
    """A scored rollout of policy 0 with a filler prompt."""
    parts = parts_of()
    prompts = tiny.prompts(parts.config).replace(weight=np.array([1, 0, 1, 1], np.float32))
    made = jax.device_get(
        jax.jit(lambda s, p: score_rollout(parts, p, sample_rollout(parts, s, p)))(state_of(parts), prompts)
    )
    assert 0 < made.ended.sum() < 6
    return made


@pytest.fixture(scope="module")
def rollout(plain_rollout):
    """The same, its log-probabilities shifted so that ratios clip."""
    shift = np.random.default_rng(0).normal(0, 0.3, plain_rollout.logps.shape)
    return plain_rollout.replace(logps=(plain_rollout.logps + shift).astype(np.float32) * plain_rollout.mask)


def descend_by_hand(config, rollout):
    """(table after every minibatch of plain descent, mean distance to the teacher) in float64."""
    d, t = config.distill, config.sampler.temperature
    table, teacher = np.float64(bigram.params(0)["table"]), bigram.params(2)["table"]
    mask = bigram.counted_mask(rollout, config)
    share = mask.sum() / config.objective.minibatches  # loss_type dapo
    mixed = (1 - d.weight) * np.float64(rollout.advantages)
    apart = (np.float64(rollout.logps) - bigram.logps_of(teacher, rollout, t)[0]) * mask
    if d.loss == "sampled":
        mixed = mixed - d.weight * apart
    mixed, told = rollout.replace(advantages=mixed), []
    contexts = bigram.contexts(rollout)
    for m in range(config.objective.minibatches):
        rows = bigram.minibatch_rows(config, len(rollout.lengths), m)
        _, gradient = bigram.loss_and_gradient(table, bigram.params(1)["table"], mixed, rows, config)
        if d.loss == "full":
            value, slope = kl_by_hand(table[contexts[rows]] / t, np.float64(teacher)[contexts[rows]] / t)
            slope = d.weight * slope * mask[rows][..., None] / share / t
            np.add.at(gradient, contexts[rows].reshape(-1), slope.reshape(-1, slope.shape[-1]))
            told.append((value * mask[rows]).sum())
        table = table - LR * gradient
    return table, (sum(told) if d.loss == "full" else apart.sum()) / mask.sum()


@pytest.mark.parametrize(
    "fields",
    [
        {"objective.minibatches": 2, "objective.micro_batch_size": 2, "model.logits_chunk": 3},
        {"distill.weight": 0.3, "objective.beta": 0.05, "train.share_prefix": False},
        {
            "distill.loss": "sampled",
            "distill.weight": 0.6,
            "train.share_prefix": False,
            "objective.micro_batch_size": 1,
        },
    ],
    ids=["teacher alone, packs and chunks", "mixed, rows", "sampled, mixed"],
)
def test_an_update_against_numpy(rollout, fields):
    parts = parts_of(**fields)
    state = state_of(parts)
    program = jax.jit(lambda s, r: update(parts, s, r)).lower(state, rollout).compile(compiler_options=QUICK)
    new, metrics, told = jax.device_get(program(state, rollout))
    table, distance = descend_by_hand(parts.config, rollout)
    got = new.trainable["params"]["table"]
    np.testing.assert_allclose(got, table, atol=2e-5)
    assert np.abs(table - bigram.params(0)["table"]).max() > 0.02
    assert divide(metrics.means)["distill/kl"] == pytest.approx(distance, rel=1e-4) and abs(distance) > 0.3
    np.testing.assert_array_equal(new.frozen[TEACHER]["params"]["table"], bigram.params(2)["table"])
    if parts.config.distill.loss == "full":
        scaled = (1 - parts.config.distill.weight) * rollout.advantages
        np.testing.assert_allclose(told.advantages, scaled, atol=1e-6)
    if parts.config.distill.weight == 1 and parts.config.distill.loss == "full":
        assert not told.advantages.any(), "rewards are told and do not count"


def program_of(mode):
    parts = dataclasses.replace(bigram.parts(tiny.config(**FIELDS, **{"step.mode": mode})), teacher=bigram.Bigram())
    return parts, Program(parts, state_of(parts))


@pytest.fixture(scope="module")
def fused():
    return program_of("fused")


def stepped(parts, program, teacher):
    """(parameters before, state, metrics, rollout) of a step under Adam."""
    state = state_of(parts, teacher=teacher)
    before = jax.device_get(state.trainable)
    return before, *jax.device_get(program(state, tiny.on_mesh(tiny.prompts(parts.config), parts.mesh)))


def test_a_teacher_that_is_the_student_teaches_nothing(fused):
    """The whole step: no loss, no gradient, not one bit of the table moves under Adam, whatever the rewards."""
    before, after, metrics, _ = stepped(*fused, teacher=0)
    told = divide(metrics.means)
    assert told["distill/kl"] == told["loss"] == told["grad_norm"] == 0 < told["reward/total"]
    jax.tree.map(np.testing.assert_array_equal, after.trainable, before)
    assert after.updates == 1


def test_a_sampled_teacher_that_is_the_student_gives_no_advantage(plain_rollout):
    parts = parts_of(**{"distill.loss": "sampled"})
    pieces = split(training_batch(plain_rollout, False), 1, pack_shape(parts.config, 1))
    told, pieces, means = with_teacher(parts, state_of(parts, teacher=0), plain_rollout, pieces)
    assert np.abs(told.advantages).max() < 1e-6 and np.abs(pieces.advantages).max() < 1e-6
    assert abs(float(means["distill/kl"][0])) < 1e-5


def test_fused_is_staged(fused):
    before, new, metrics, rollout = stepped(*fused, teacher=2)
    _, other, again, rows = stepped(*program_of("staged"), teacher=2)
    assert np.abs(new.trainable["params"]["table"] - before["params"]["table"]).max() > 1e-3
    np.testing.assert_array_equal(rollout.tokens, rows.tokens)
    assert divide(metrics.means)["distill/kl"] == pytest.approx(divide(again.means)["distill/kl"], rel=1e-5)
    moments = [jax.tree.leaves(state.opt_state) for state in (new, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *moments)


# With decoders.

STUDENT, LARGER = tiny.architecture(layers=1), tiny.architecture(layers=2, width=24, heads=2, kv_heads=1, head_size=8)


def test_the_distance_between_decoders_of_other_sizes(rollout):
    """One gradient pass of a decoder and its larger teacher, against the numpy decoder's laws; sampling sees one."""
    config = tiny.config(**{**FIELDS, "objective.micro_batch_size": 8})
    teacher = Decoder(LARGER)
    parts = dataclasses.replace(tiny.parts(config, STUDENT), teacher=teacher)
    state = tiny.state(parts, {"params": tiny.params(STUDENT)}, {TEACHER: {"params": tiny.params(LARGER, 5)}})
    shape = pack_shape(config, 1)
    untaught = rollout.replace(advantages=0 * rollout.advantages)
    packs = make_packs(jax.tree.map(lambda x: x[0], split(training_batch(untaught, False), 1, shape)), shape)
    assert packs.count == 1
    numerator, (means, _) = jax.jit(lambda s: micro_loss(s.trainable, parts, s.frozen, *packs.pick(jnp.int32(0))))(
        state
    )
    means = divide(jax.device_get(means))
    total = count = 0.0
    for b in np.flatnonzero(rollout.weight):
        prompt = rollout.prompt_tokens[b, 7 - rollout.prompt_lengths[b] :]
        tokens = np.concatenate([prompt, rollout.tokens[b, : rollout.lengths[b]]])
        place = np.arange(len(tokens))
        laws = [
            numpy_decoder.forward(given, of, tokens, place, np.ones_like(place))[len(prompt) - 1 : -1] / 0.8
            for given, of in ((tiny.params(STUDENT), STUDENT), (tiny.params(LARGER, 5), LARGER))
        ]
        total, count = total + kl_by_hand(*laws)[0].sum(), count + rollout.lengths[b]
    assert means["distill/kl"] == pytest.approx(total / count, rel=1e-4) and total > 1
    assert numerator == pytest.approx(total, rel=1e-4), "at weight 1 the loss is the distance alone"
    ready = jax.eval_shape(lambda v: sampling_variables(parts, v), {**state.frozen, **state.trainable})
    assert list(ready) == ["params"]


@pytest.mark.parametrize("fields", [{"distill.weight": 0.5, "data.pool_factor": 2}, {"sampler.group_size": 1}])
def test_every_step_takes_a_teacher(fields):
    """Traced, not compiled: a pool with a mix, one completion a prompt."""
    parts = parts_of(**fields)
    prompts = tiny.prompts(tiny.config(**{"data.prompts_per_step": parts.config.draws_per_step}))
    _, metrics, _ = jax.eval_shape(lambda s, p: train_step(parts, s, p), state_of(parts), prompts)
    assert "distill/kl" in metrics.means


# What is refused.


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"distill.weight": 0.0}, "distill.weight=0.0 must be above 0 and at most 1"),
        ({"distill.weight": 1.5}, "distill.weight=1.5 must be above 0 and at most 1"),
        ({"distill.teacher": "", "distill.weight": 0.5}, "distill.weight=0.5 has no effect without distill.teacher"),
        ({"distill.teacher": "", "distill.loss": "sampled"}, "distill.loss='sampled' has no effect without"),
        ({"objective.baseline": "value"}, "distill.teacher='somewhere' does not go with objective.baseline='value'"),
        ({"data.pool_factor": 2}, "data.pool_factor=2 selects groups by their rewards, of which none counts"),
        ({"distill.weight": 0.5, "sampler.group_size": 1}, "sampler.group_size=1 must be at least 2"),
    ],
)
def test_what_does_not_go_together(fields, says):
    with pytest.raises(InputError) as caught:
        tiny.config(**{**FIELDS, **fields})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_teachers_folder_and_its_tokenizer(tmp_path):
    tokenizers = []
    for number, texts in enumerate((["1+2=3", "4+5=9"], ["one two", "three four"])):
        train_sentencepiece(texts * 3, 40, ("<answer>",), str(tmp_path / f"{number}.model"))
        tokenizers.append(Tokenizer.from_sentencepiece(str(tmp_path / f"{number}.model")))
    sizes = tiny.architecture(vocabulary=tokenizers[0].vocabulary, layers=1)
    write_folder(str(tmp_path / "teacher"), sizes, tiny.params(sizes), tokenizers[0])
    config = tiny.config(**{**FIELDS, "distill.teacher": str(tmp_path / "teacher")})
    found = open_teacher(config.distill, config.model, tokenizers[0])
    assert found is not None and found.architecture == sizes
    assert open_teacher(tiny.config().distill, config.model, tokenizers[0]) is None
    with pytest.raises(InputError, match=r"distill.teacher='.*teacher': its tokenizer is not the student's: take two"):
        open_teacher(config.distill, config.model, tokenizers[1])
    gone = dataclasses.replace(config.distill, teacher=str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"^distill.teacher='.*gone' does not exist: give a Hugging Face folder"):
        open_teacher(gone, config.model, None)
