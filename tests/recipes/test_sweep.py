"""Seeds side by side: each as in a run of its own, loops with one condition for all, and what a sweep leaves."""

import dataclasses
import io
import json
import pathlib

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.config import config_file, from_dict, read_config_file
from grpo_jax.errors import InputError
from grpo_jax.metrics import divide
from grpo_jax.models.cache import init_cache
from grpo_jax.models.huggingface import write_folder
from grpo_jax.recipes import sweep
from grpo_jax.recipes.sweep import SeedsProgram, chosen_configs, read_sweep, seed_rows, seeds_step, stack_states
from grpo_jax.step import Metrics, init_state, noise_key, train_step
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, train_sentencepiece

SEEDS = (3, 7)
FIELDS = {"data.pool_factor": 3, "rewards.names": ("chosen",), "rewards.weights": (1.0,), "sampler.group_size": 2}


def chosen(prompts, rollout):
    """The sum of the ids, a hundredth each, where the prompt's column says 1, and a tie of 0.1 elsewhere."""
    ids = jnp.sum(rollout.tokens * rollout.mask, axis=1) / 100
    return jnp.where(prompts.columns["signal"][rollout.group] > 0, ids, 0.1)


def parts_of(**fields):
    return bigram.parts(tiny.config(**FIELDS, **fields), rewards={"chosen": chosen})


def pool(seed, step):
    """Another pool for each seed: the first is full after a round, the second needs two or three."""
    config = tiny.config(**{"data.prompts_per_step": 6})
    signal = np.ones(6) if seed == SEEDS[0] else np.array([0, 1, 1, 0, 0, 1])
    return tiny.prompts(config, 6 * step + 40 * seed).replace(columns={"signal": signal.astype(np.float32)})


def test_each_seed_is_as_in_a_run_of_its_own():
    """Two steps with dynamic sampling, in which the seeds take part in other numbers of rounds."""
    parts = parts_of()

    def state():
        return tiny.state(parts, {"params": bigram.params()})

    states = stack_states(parts, state(), len(SEEDS))
    program, together = SeedsProgram(parts, SEEDS, states), []
    for step in range(2):
        batch = jax.tree.map(lambda *x: np.stack(x), *(pool(seed, step) for seed in SEEDS))
        states, metrics, rollouts = program(states, jax.device_put(batch, seed_rows(parts.mesh)))
        together.append(jax.device_get((metrics.means, rollouts)))
    final, rounds = jax.device_get(states), []

    @jax.jit
    def single(seed, state, prompts):
        """A run of its own; the seed is an argument, so that one program serves both."""
        own = dataclasses.replace(parts, config=dataclasses.replace(parts.config, seed=seed))
        return train_step(own, state, prompts)

    for i, seed in enumerate(SEEDS):
        alone = state()
        assert (noise_key(jnp.int32(seed), 0, 1) == noise_key(seed, 0, 1)).all()
        for step in range(2):
            alone, metrics, rollout = single(jnp.int32(seed), alone, pool(seed, step))
            means, rollouts = jax.tree.map(lambda x: x[i], together[step])  # noqa: B023
            rollout = jax.device_get(rollout)
            for name in ("tokens", "lengths", "draw", "weight", "ended"):
                np.testing.assert_array_equal(getattr(rollouts, name), getattr(rollout, name), err_msg=name)
            assert divide(means) == pytest.approx(divide(jax.device_get(metrics.means)), rel=1e-4, abs=1e-5)
            rounds.append(divide(means)["pool/rounds"])
        table = alone.trainable["params"]["table"]
        np.testing.assert_allclose(final.trainable["params"]["table"][i], table, atol=1e-5)
        assert final.step[i] == 2 and final.draws[i] == 12
    assert rounds[:2] == [1, 1] and min(rounds[2:]) > 1
    assert (together[0][1].tokens[0] != together[0][1].tokens[1]).any(), "each seed has noise of its own"


def loops(jaxpr):
    """All while loops of a program, those inside others too."""
    found = []
    for equation in jaxpr.eqns:
        inner = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        for each in inner:
            each = getattr(each, "jaxpr", each)
            found += loops(each) if hasattr(each, "eqns") else []
        found += [equation] if equation.primitive.name == "while" else []
    return found


def selected_shapes(jaxpr):
    """Shapes of everything that a select makes, in loops and calls inside too."""
    shapes = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "select_n"]
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            each = getattr(value, "jaxpr", value)
            shapes += selected_shapes(each) if hasattr(each, "eqns") else []
    return shapes


@pytest.mark.slow
def test_the_decode_loop_has_one_condition_and_selects_no_cache():
    """A condition by seed, the plain vmap's, is lowered to a loop that selects old or new of all that it carries."""
    config = tiny.config(**{"sampler.max_new_tokens": 5})
    parts = tiny.parts(config, tiny.architecture(layers=1))
    state = jax.eval_shape(lambda: init_state(parts, {"params": tiny.params(parts.module.architecture)}))
    states = jax.eval_shape(lambda state: jax.tree.map(lambda x: jnp.stack([x] * 3), state), state)
    prompts = jax.tree.map(lambda x: np.stack([x] * 3), tiny.prompts(config))
    layer = jax.eval_shape(lambda: init_cache(parts.module.architecture, 2, 7, 8, 5, jnp.float32)).layers[0]
    cache = (3, *layer.key.shape)
    together = jax.make_jaxpr(lambda *given: seeds_step(parts, *given))(jnp.arange(3), states, prompts)

    def plain(states, prompts):
        return jax.vmap(lambda state, prompts: train_step(parts, state, prompts))(states, prompts)

    apart = jax.make_jaxpr(plain)(states, prompts)
    for program, shape in ((together, ()), (apart, (3,))):
        every = loops(program.jaxpr)
        conditions = [loop.params["cond_jaxpr"].jaxpr.outvars[0].aval.shape for loop in every]
        ((decode, condition),) = [
            (loop, found)
            for loop, found in zip(every, conditions, strict=True)
            if cache in [x.aval.shape for x in loop.outvars]
        ]
        assert condition == shape
        selected = selected_shapes(decode.params["body_jaxpr"].jaxpr)
        assert (3, 8) in selected and cache not in selected
        assert shape or set(conditions) == {()}, "every loop of the step of all seeds has one condition"


def test_host_rewards_are_refused():
    config = tiny.config(**{"rewards.names": ("told",), "rewards.weights": (1.0,)})
    parts = bigram.parts(config, callables={"told": lambda completions: [0.0] * len(completions)})
    with pytest.raises(InputError, match="'told',.* holds a reward in Python"):
        SeedsProgram(parts, SEEDS, tiny.state(parts, {"params": bigram.params()}))


def test_the_sweep_of_objectives_names_seven_configs_and_three_seeds():
    path = config_file("sweeps/objectives")
    config = from_dict(read_config_file(path))
    found = read_sweep(path, config)
    assert list(found.configs) == ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "ppo"] and len(found.seeds) == 3
    assert len({str(each) for each in found.configs.values()}) == 7
    assert all(each.seed == config.seed and each.objective.minibatches == 2 for each in found.configs.values())
    assert found.configs["ppo"].objective.baseline == "value" and found.configs["dapo"].data.pool_factor == 2
    assert chosen_configs(found, ("ppo",)).training == ("ppo",)
    with pytest.raises(InputError, match="--only pop: no such config; there are: grpo, dapo"):
        chosen_configs(found, ("pop",))


BAD = {
    "def get_config(): ...": r"has no get_sweep\(\)",
    "def get_sweep(): return {'seeds': (), 'runs': {}}": "must be different numbers",
    "def get_sweep(): return {'seeds': (1, 1), 'runs': {}}": "must be different numbers",
    "def get_sweep(): return {'seeds': (0,), 'runs': {'a': {'optim.lrr': 1}}}": r"runs\['a'\]: unknown field optim.lrr",
    "def get_sweep(): return {'seeds': (0,), 'runs': {'a': {'step.mode': 'staged'}}}": "no step.mode='staged' and no",
    "def get_sweep(): return {'seeds': (0,), 'runs': {'a': {'sampler.slots': 2}}}": "use 'fused' and 0",
}


@pytest.mark.parametrize("text", BAD)
def test_files_that_are_no_sweep(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text if "get_config" in text else f"def get_config(): ...\n{text}\n")
    with pytest.raises(InputError, match=BAD[text]) as info:
        read_sweep(path, tiny.config())
    assert str(path) in str(info.value)


def small_model(folder) -> str:
    """A Hugging Face folder of a random decoder of one layer that reads sums of one digit."""
    path = str(folder / "tokenizer.model")
    texts = [f"{a}+{b}=<answer>{a + b}</answer>" for a in range(10) for b in range(10)]
    train_sentencepiece(texts, 40, ("<answer>", "</answer>"), path)
    tokenizer = Tokenizer.from_sentencepiece(path)
    architecture = tiny.architecture(layers=1, vocabulary=tokenizer.vocabulary)
    write_folder(str(folder / "model"), architecture, tiny.params(architecture), tokenizer)
    return str(folder / "model")


class StandIn:
    """Stands for the program of all seeds: step s of seed number i solves s / 10 + i / 100."""

    def __init__(self, parts, seeds, states):
        self.seeds, self.step = np.asarray(seeds, np.float32), 0

    def compile(self, states, prompts):
        assert prompts.tokens.shape[:2] == (2, 2) and (prompts.draw[0] == prompts.draw[1]).all()

    def __call__(self, states, prompts):
        self.step += 1
        solved = self.step / 10 + np.arange(2, dtype=np.float32) / 100
        means = {"solve_rate": (solved, np.ones(2)), "length/right": (np.zeros(2), np.array([0.0, 1.0]))}
        return states, Metrics(means, np.zeros((2, 1)), np.zeros(2, bool), np.zeros(2)), None


def test_a_sweep_leaves_a_line_for_every_run_and_goes_on(tmp_path, monkeypatch):
    """One config trained now and one later: both are listed from the start."""
    base = read_config_file(pathlib.Path(__file__).with_name("micro_config.py"))
    base.model.path, base.train.steps, base.mesh.data, base.objective.beta = small_model(tmp_path), 2, 1, 0.0
    base.objective.reference_every = 0
    config = from_dict(base)
    file = tmp_path / "mine.py"
    runs = {"plain": {}, "mean": {"objective.scale_rewards": "none"}}
    file.write_text(f"def get_config(): ...\n\ndef get_sweep(): return {{'seeds': (1, 2), 'runs': {runs!r}}}\n")
    both = read_sweep(file, config)
    asked = []
    monkeypatch.setattr(sweep, "make_mesh", lambda config: tiny.mesh(tiny.config()))
    monkeypatch.setattr(sweep, "SeedsProgram", StandIn)
    monkeypatch.setattr(sweep.Evaluator, "measure", lambda *given: asked.append(given[4]) or ({"pass@1": 0.25}, []))
    terminal = Terminal(out=io.StringIO())
    table = sweep.run(config, tmp_path / "run", chosen_configs(both, ("plain",)), terminal)
    assert [(line["run"], line["seed"], line["steps"], line["pass@1"]) for line in table] == [
        ("plain", 1, 2, 0.25),
        ("plain", 2, 2, 0.25),
        ("mean", 1, 0, None),
        ("mean", 2, 0, None),
    ]
    written = [
        [
            json.loads(x)
            for x in (tmp_path / "run" / "plain" / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()
        ]
        for seed in (1, 2)
    ]
    assert [[(x["step"], round(x["solve_rate"], 3)) for x in lines] for lines in written] == [
        [(1, 0.1), (2, 0.2)],
        [(1, 0.11), (2, 0.21)],
    ]
    assert "length/right" not in written[0][0] and written[1][0]["length/right"] == 0 and len(asked) == 2
    assert table[1]["solve_rate_first"] == pytest.approx(0.16) == table[1]["solve_rate_last"]
    assert (tmp_path / "run" / "solve_rate.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / "runs.json").read_text()) == table
    monkeypatch.setattr(sweep, "prepare", None)  # what is finished is not made again
    assert sweep.run(config, tmp_path / "run", chosen_configs(both, ("plain",)), terminal) == table
