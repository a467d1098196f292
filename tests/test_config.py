"""Config: what is refused and in which words, and what comes through unchanged."""

import ast
import dataclasses
import json
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax.cli import load_config, split_arguments
from grpo_jax.config import Config, default_config, field_names, from_dict, parse_duration, to_config_dict, value_of
from grpo_jax.errors import InputError


def with_fields(**fields) -> ConfigDict:
    """The defaults with fields by dotted name."""
    made = default_config()
    for name, value in fields.items():
        *above, leaf = name.split(".")
        section = made
        for part in above:
            section = section[part]
        with section.ignore_type():
            section[leaf] = value
    return made


def refusal(values) -> str:
    with pytest.raises(InputError) as caught:
        from_dict(values, "file.py")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("file.py: ")
    return message


def test_the_defaults_come_through_unchanged():
    assert from_dict(default_config()) == Config()
    assert from_dict(json.loads(configs.to_json(Config()))) == Config()
    assert from_dict({}) == Config()
    changed = from_dict(with_fields(**{"optim.lr": 0.5, "text.end_tokens": ("a", "b"), "base.sft.steps": 3}))
    assert changed.optim.lr == 0.5 and changed.text.end_tokens == ("a", "b") and changed.base.sft.steps == 3
    assert from_dict(to_config_dict(changed)) == changed != Config()


@pytest.mark.parametrize(
    ("values", "unknown", "nearest"),
    [
        ({"optim": {"lrr": 1e-4}}, "optim.lrr", "optim.lr"),
        ({"optm": {"lr": 1e-4}}, "optm", "optim"),
        ({"lr": 1e-4}, "lr", ".lr"),
        ({"base": {"sft": {"step": 3}}}, "base.sft.step", "base.sft.steps"),
        ({"sampler": {"max_tokens": 3}}, "sampler.max_tokens", "sampler.max_new_tokens"),
        ({"grpo": {"group_size": 3}}, "grpo", None),
        ({"optim": {"beta": 0.1}}, "optim.beta", "objective.beta|optim.b"),
    ],
)
def test_an_unknown_field_names_the_nearest(values, unknown, nearest):
    message = refusal(values)
    assert f"unknown field {unknown}" in message
    if nearest:
        assert re.search(rf"did you mean .*({nearest})", message), message


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("optim.lr", "fast", "optim.lr='fast' must be float, not str"),
        ("optim.lr", True, "optim.lr=True must be float, not bool"),
        ("train.steps", 3.5, "train.steps=3.5 must be int, not float"),
        ("train.steps", True, "train.steps=True must be int, not bool"),
        ("data.shuffle", 1, "data.shuffle=1 must be bool, not int"),
        ("model.path", None, "model.path=None must be str, not NoneType"),
        ("rewards.names", "answer", "rewards.names='answer' must be a list"),
        ("rewards.names", 3, "rewards.names=3 must be a list"),
        ("rewards.weights", ("1",), "rewards.weights=('1',) must be float, not str"),
        ("step.mode", "fussed", "step.mode='fussed' is not one of fused, staged; did you mean 'fused'?"),
        ("data.source", "xyz", "data.source='xyz' is not one of arithmetic, tasks, jsonl, tfds, hf, memory"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(name, value, says):
    section, leaf = name.split(".")
    assert refusal({section: {leaf: value}}) == f"file.py: {says}"


def test_a_section_that_is_no_mapping_is_refused():
    assert "optim=3 must be a section of fields: name, lr" in refusal({"optim": 3})


def test_lists_become_tuples_and_ints_floats():
    made = from_dict({"rewards": {"names": ["answer"], "weights": [2]}, "optim": {"lr": 1}})
    assert made.rewards.names == ("answer",) and made.rewards.weights == (2.0,) and made.optim.lr == 1.0
    assert type(made.optim.lr) is float and type(made.rewards.weights[0]) is float


POSITIVE = (
    "data.max_prompt_length data.prompts_per_step sampler.max_new_tokens base.layers base.width base.heads "
    "base.kv_heads base.mlp_width base.rope_theta base.vocabulary base.worked_sums objective.num_iterations "
    "objective.minibatches train.steps eval.problems eval.samples eval.final_problems checkpoint.keep data.digits "
    "base.sft.steps base.sft.batch_size base.sft.max_length cold_start.prompts cold_start.rows cold_start.sft.steps "
    "cold_start.sft.batch_size cold_start.sft.max_length sft.steps sft.batch_size sft.max_length rewards.timeout "
    "optim.eps sampler.group_size objective.cispo_max_ratio objective.sapo_temperature_pos "
    "objective.sapo_temperature_neg objective.outer_iterations rewards.repetition_ngram rewards.math_timeout "
    "rewards.judge.max_tokens rewards.judge.timeout rewards.judge.concurrency "
    "data.pool_factor dpo.steps dpo.batch_size dpo.max_length dpo.beta rewards.code.seconds "
    "rewards.code.output_kb lora.alpha reward_model.steps rewards.model_judge.max_new_tokens "
    "reward_model.batch_size reward_model.max_length distributed.heartbeat_timeout distributed.join_timeout "
    "tasks.prompts tasks.held_out tasks.chats tasks.pairs tasks.points"
).split()
NOT_NEGATIVE = (
    "objective.micro_batch_size train.pack_prompts objective.reference_every objective.beta objective.epsilon_high "
    "objective.advantage_epsilon optim.lr optim.clip_norm optim.warmup_steps optim.weight_decay "
    "optim.final_lr_fraction sampler.top_k sampler.slots eval.every eval.majority eval.temperature eval.alarm_drop "
    "checkpoint.every log.samples_every log.samples model.logits_chunk model.unroll sampler.cache_pieces base.sft.lr "
    "cold_start.sft.lr sft.lr base.sft.epochs cold_start.sft.epochs sft.epochs "
    "train.halt_when_nonfinite objective.epsilon objective.delta objective.entropy_coef "
    "objective.correction_max objective.correction_min objective.vespo_k_pos objective.vespo_k_neg "
    "objective.vespo_lambda_pos objective.vespo_lambda_neg rewards.workers rewards.length_budget "
    "rewards.overlong_cache rewards.judge.retries rewards.judge.requests_per_second "
    "ppo.vf_coef ppo.cliprange_value dpo.lr lora.rank rewards.code.files_mb rewards.code.parallel "
    "optim.routing_bias_rate reward_model.lr log.watchdog_minutes mesh.cpu_devices"
).split()


@pytest.mark.parametrize("name", POSITIVE)
def test_must_be_positive(name):
    kind = type(value_of(Config(), name))
    assert f"{name}={kind(0)!r} must be positive" in refusal(with_fields(**{name: kind(0)}))


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_must_not_be_negative(name):
    value = type(value_of(Config(), name))(-1)
    assert f"{name}={value!r} must not be negative" in refusal(with_fields(**{name: value}))


TALK = {"name": "talk", "path": "talk.jsonl"}
SETS = {"data.sets": (TALK,), "model.path": "somewhere"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sampler.group_size": 1}, "sampler.group_size=1 must be at least 2: a group of 1 has no advantage"),
        ({"sampler.temperature": 0.0}, "sampler.temperature=0.0 must be above 0"),
        ({"sampler.temperature": -1.0}, "sampler.temperature=-1.0 must not be negative"),
        ({"sampler.top_p": 0.0}, "sampler.top_p=0.0 must be above 0 and at most 1"),
        ({"sampler.top_p": 1.5}, "sampler.top_p=1.5 must be above 0 and at most 1"),
        ({"sampler.min_p": -0.1}, "sampler.min_p=-0.1 must be from 0 to 1"),
        ({"sampler.min_new_tokens": 33}, "sampler.min_new_tokens=33 must be from 0 to sampler.max_new_tokens"),
        ({"sampler.cache_pieces": 2, "sampler.slots": 8}, "sampler.cache_pieces=2 needs sampler.slots=0, not 8"),
        (
            {"rewards.names": ("model_judge",), "rewards.weights": (1.0,), "rewards.model_judge.path": ""},
            "rewards.model_judge.path='' is empty, and rewards.names has 'model_judge'",
        ),
        ({"eval.top_p": 0.0}, "eval.top_p=0.0 must be above 0 and at most 1"),
        (
            {"ppo.critic": "model", "objective.baseline": "value", "lora.rank": 4},
            "ppo.critic='model' trains a decoder of its own, and lora.rank=4 freezes decoders: take head",
        ),
        ({"ppo.gamma": 1.1}, "ppo.gamma=1.1 must lie between 0 and 1"),
        ({"ppo.lam": -0.1}, "ppo.lam=-0.1 must lie between 0 and 1"),
        (
            {"ppo.kl_in_reward": True},
            "ppo.kl_in_reward=True needs objective.baseline='value' and objective.beta above 0",
        ),
        (
            {"data.pool_factor": 2, "objective.baseline": "value"},
            "data.pool_factor=2 selects groups by their advantages",
        ),
        ({"dpo.label_smoothing": 0.5}, "dpo.label_smoothing=0.5 must be at least 0 and below 0.5"),
        ({"lora.targets": "("}, "lora.targets='(' is no regular expression"),
        ({"rewards.code.memory_mb": 32}, "rewards.code.memory_mb=32 must be at least 64"),
        ({"rewards.code.threads": 1}, "rewards.code.threads=1 must lie between 2 and 1000"),
        (
            {"objective.baseline": "none", "objective.scale_rewards": "group"},
            "objective.scale_rewards='group' needs the group's mean as objective.baseline, not 'none'",
        ),
        ({"objective.outer_iterations": 2}, "objective.outer_iterations=2 has no effect at objective.beta=0"),
        (
            {"objective.outer_iterations": 3, "objective.beta": 0.1},
            "objective.outer_iterations=3 must divide train.steps=100, with objective.reference_every=0",
        ),
        (
            {"objective.outer_iterations": 2, "objective.beta": 0.1, "objective.reference_every": 5},
            "objective.outer_iterations=2 must divide train.steps=100, with objective.reference_every=0",
        ),
        (
            {"objective.loss_type": "luspo"},
            "objective.importance_sampling_level='token' does not go with objective.loss_type='luspo': take sequence",
        ),
        (
            {"objective.loss_type": "gmpo", "objective.importance_sampling_level": "sequence"},
            "objective.importance_sampling_level='sequence' does not go with objective.loss_type='gmpo': take token",
        ),
        ({"objective.delta": 1.1}, "objective.delta=1.1 must be at least 1 + objective.epsilon_high=1.2"),
        (
            {"objective.delta": 4.0, "objective.loss_type": "cispo"},
            "objective.delta=4.0 has no effect with objective.loss_type='cispo': leave it 0",
        ),
        ({"objective.top_entropy_quantile": 0.0}, "objective.top_entropy_quantile=0.0 must be above 0 and at most 1"),
        (
            {"objective.top_entropy_quantile": 0.2, "objective.importance_sampling_level": "sequence"},
            "objective.top_entropy_quantile=0.2 selects tokens, and this objective has one ratio for the whole",
        ),
        (
            {"objective.correction_max": 1.0, "objective.correction_min": 2.0},
            "objective.correction_max=1.0 is below objective.correction_min=2.0",
        ),
        (
            {"objective.correction": "sequence_mask", "objective.loss_type": "vespo"},
            "objective.correction='sequence_mask' does not go with objective.loss_type='vespo'",
        ),
        ({"rewards.late_names": ("answer",)}, "rewards.late_names=('answer',) must be of those after the first of"),
        ({"rewards.late_from": 0.5}, "rewards.late_from=0.5 has no effect: nothing is in rewards.late_names"),
        ({"distill.weight": 0.5}, "distill.weight=0.5 has no effect without distill.teacher: name a model there"),
        ({"distill.loss": "sampled"}, "distill.loss='sampled' has no effect without distill.teacher"),
        ({"distill.teacher": "x", "distill.weight": 1.1}, "distill.weight=1.1 must be above 0 and at most 1"),
        (
            {"distill.teacher": "x", "objective.baseline": "value"},
            "distill.teacher='x' does not go with objective.baseline='value'",
        ),
        (
            {"distill.teacher": "x", "data.pool_factor": 2},
            "data.pool_factor=2 selects groups by their rewards, of which",
        ),
        ({"data.path": "x", **SETS}, "data.path='x' is not read: each of data.sets names its own"),
        ({**SETS, "model.path": ""}, "model.path='' is empty, and data.sets are no sums to make a base from"),
        ({"cold_start.enabled": True, **SETS}, "cold_start.enabled=True samples one dataset"),
        ({**SETS, "data.sets": (TALK, TALK)}, "data.sets.name=('talk', 'talk') names two sets alike"),
        ({**SETS, "data.sets": ({**TALK, "late": True},), "rewards.late_from": 0.5}, "data.sets.late=(True,) leaves"),
        ({**SETS, "data.sets": ({**TALK, "rewards": ("format",)},)}, "data.sets.rewards=(('format',),) has 'answer'"),
        ({"base.right_share": 1.1}, "base.right_share=1.1 must lie between 0 and 1"),
        ({"tasks.good_share": -0.1}, "tasks.good_share=-0.1 must lie between 0 and 1"),
        ({"optim.b1": 1.0}, "optim.b1=1.0 must be at least 0 and below 1"),
        ({"optim.b2": -0.1}, "optim.b2=-0.1 must be at least 0 and below 1"),
        ({"rewards.names": (), "rewards.weights": ()}, "rewards.names=() is empty"),
        ({"rewards.cosine_right": (1.0,)}, "rewards.cosine_right=(1.0,) must hold two numbers"),
        ({"rewards.cosine_wrong": (1.0, 2.0, 3.0)}, "rewards.cosine_wrong=(1.0, 2.0, 3.0) must hold two numbers"),
        ({"rewards.overlong_cache": 33}, "rewards.overlong_cache=33 must not exceed the budget, 32"),
        ({"rewards.names": ("judge", "answer")}, "rewards.judge.url='' is empty, and the reward 'judge' needs it"),
        ({"rewards.weights": (1.0,)}, "rewards.weights=(1.0,) must hold one weight for each of rewards.names="),
        ({"rewards.names": ("answer", "answer")}, "rewards.names=('answer', 'answer') names a reward twice"),
        ({"base.sft.path": "a.jsonl"}, "base.sft.path='a.jsonl' must stay empty"),
        ({"base.width": 130}, "base.width=130 must divide by base.heads=4"),
        ({"base.width": 12}, "base.width=12 over base.heads=4 must be even"),
        ({"base.kv_heads": 3}, "base.heads=4 must divide by base.kv_heads=3"),
        ({"objective.reference_every": 5}, "objective.reference_every=5 has no effect at objective.beta=0"),
        ({"objective.minibatches": 3}, "objective.minibatches=3 must divide the 16 prompts of a step, or set"),
        (
            {"objective.minibatches": 3, "train.share_prefix": False},
            "objective.minibatches=3 must divide the 128 completions of a step",
        ),
        ({"train.time_budget": "soon"}, "train.time_budget='soon' is not a time such as 300s, 55m or 2h"),
        ({"mesh.fsdp": -1}, "mesh.data=-1 and another axis are both -1"),
        ({"mesh.data": 0}, "mesh.data=0 must be -1 or at least 1"),
        ({"mesh.fsdp": 0}, "mesh.fsdp=0 must be -1 or at least 1"),
        ({"mesh.tensor": -2}, "mesh.tensor=-2 must be -1 or at least 1"),
        ({"data.source": "jsonl", "data.path": ""}, "data.path='' is empty: data.source='jsonl' needs the file"),
    ],
)
def test_checks_between_fields(fields, says):
    assert says in refusal(with_fields(**fields))


def test_a_group_of_one_needs_a_baseline_beyond_the_group():
    alone = {"sampler.group_size": 1, "objective.baseline": "batch", "objective.scale_rewards": "batch"}
    assert from_dict(with_fields(**alone)).completions == 16


def test_every_check_of_validate_has_a_case():
    """A check added to `validate` must be added above: its fields are the strings in its source."""
    source = pathlib.Path(configs.__file__).read_text()
    checks = ("validate", "_validate_objective", "_validate_loss", "_validate_sets", "_validate_distill")
    functions = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name in checks]
    assert len(functions) == len(checks)
    nodes = [node for function in functions for node in ast.walk(function)]
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    named = {word for text in texts for word in text.split() if word in field_names()}
    marks = test_checks_between_fields.pytestmark[0].args[1]
    covered = {*POSITIVE, *NOT_NEGATIVE, *(name for fields, _ in marks for name in fields)}
    covered |= {name for name in field_names() if configs.list_around(name) in covered}
    assert named - covered == set()


@pytest.mark.parametrize(
    ("text", "seconds"), [("300", 300), ("300s", 300), ("55m", 3300), ("2h", 7200), ("1.5h", 5400)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5m", "0", "5d", "1h30m", "inf", "nan", "1e400s"])
def test_what_is_no_duration(text):
    with pytest.raises(InputError, match="is not a time such as 300s, 55m or 2h"):
        parse_duration(text)


def config_names() -> dict[str, pathlib.Path]:
    """Files by the name that --config takes: presets/dapo for the one in a folder."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in configs.config_folders()
        for path in sorted(folder.glob("**/*.py"))
    }


@pytest.mark.parametrize("name", config_names())
def test_every_config_file_loads_and_names_its_command(name):
    path = config_names()[name]
    module = configs.load_config_module(path)
    made = from_dict(configs.read_config_file(path), str(path))
    assert made != Config()
    verb = "sweep" if hasattr(module, "get_sweep") else "pipeline" if hasattr(module, "get_pipeline") else "train"
    command = r"grpo-jax train\n" if name == "arithmetic" else rf"grpo-jax {verb} --config {name}\b"
    assert re.search(command, module.__doc__), f"{path}: its docstring names no command"
    assert load_config(["--config", name]) == (path.stem, made)
    assert load_config([f"--config={path}"]) == (path.stem, made)


def test_the_default_is_arithmetic():
    assert load_config([])[0] == "arithmetic"


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--config.optim.lr=1e-4"], "optim.lr", 1e-4),
        (["--config.optim.lr", "1e-4"], "optim.lr", 1e-4),
        (["--config.optim.lr=1"], "optim.lr", 1.0),
        (["--config.optim.lr=1", "--config.optim.lr=2", "--config.optim.lr=1"], "optim.lr", 1.0),
        (["--config.train.steps", "7"], "train.steps", 7),
        (["--config.mesh.data=-1"], "mesh.data", -1),
        (['--config.rewards.names=("answer",)', "--config.rewards.weights=(1.0,)"], "rewards.names", ("answer",)),
        (["--config.rewards.weights=(2,3)"], "rewards.weights", (2.0, 3.0)),
        (["--config.rewards.weights", "(0.5, 1.5)"], "rewards.weights", (0.5, 1.5)),
        (["--config.text.end_tokens=('<eos>','x')"], "text.end_tokens", ("<eos>", "x")),
        (["--config.data.shuffle=false"], "data.shuffle", False),
        (["--config.data.shuffle=True"], "data.shuffle", True),
        (["--config.model.path=a=b"], "model.path", "a=b"),
        (["--config.text.system_prompt", "two words"], "text.system_prompt", "two words"),
        (["--config.base.sft.steps=5"], "base.sft.steps", 5),
        (["--config.seed=3"], "seed", 3),
        (["--config=arithmetic", "--config.log.compilation_cache="], "log.compilation_cache", ""),
    ],
)
def test_overrides(arguments, name, value):
    own, overrides = split_arguments(arguments)
    assert own == []
    _, made = load_config(overrides)
    got = value_of(made, name)
    assert got == value and type(got) is type(value)
    _, plain = load_config([])
    others = [n for n in field_names() if n != name and value_of(made, n) != value_of(plain, n)]
    assert others in ([], ["rewards.weights"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--config.optim.lrr=1"], "--config: unknown field optim.lrr; did you mean optim.lr?"),
        (["--config.optm.lr=1"], "--config: unknown field optm.lr; did you mean optim.lr?"),
        (["--config.learning_rate=1"], "--config: unknown field learning_rate; did you mean optim.lr?"),
        (["--config.num_generations=8"], "--config: unknown field num_generations; did you mean sampler.group_size?"),
        (["--config.optim=1"], "--config: optim is a section: set a field of it: optim.name, optim.lr"),
        (["--config.data.sets.weight=1"], "--config.data.sets.weight: data.sets is a list of sections: set it in a"),
        (["--config.data.sets=a.jsonl"], "--config.data.sets: data.sets is a list of sections: set it"),
        (["--config.data.sets=[{'name': 'a', 'size': 1}]"], "data.sets[0].size"),
        (["--config.optim.lr"], "--config.optim.lr: has no value; write --config.optim.lr=VALUE"),
        (["--config.optim.lr=fast"], "optim.lr=fast"),
        (["--config.train.steps=1.5"], "train.steps"),
        (["--config.data.shuffle=perhaps"], "data.shuffle"),
        (["--config"], "--config: has no value"),
        (["--config", "arithmetics"], "did you mean arithmetic?"),
        (["--config", "presets/dap"], "did you mean presets/dapo?"),
        (["--config", "no_such_file.py"], "--config no_such_file.py: no such file"),
        (["--config.sampler.group_size=1"], "sampler.group_size=1 must be at least 2"),
    ],
)
def test_overrides_that_are_refused(overrides, says):
    with pytest.raises(InputError) as caught:
        load_config(overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config(:\n", "raised SyntaxError"),
        ("x = 1\n", "has no get_config()"),
        ("def get_config():\n    return 1 / 0\n", "raised ZeroDivisionError: division by zero"),
        (
            "def get_config():\n    return {'seed': 1}\n",
            "get_config() returned dict: return an ml_collections.ConfigDict",
        ),
        (
            "from grpo_jax.config import default_config\n"
            "def get_config():\n    c = default_config()\n    c.optim.lrr = 1.0\n    return c\n",
            "unknown field optim.lrr; did you mean optim.lr?",
        ),
        (
            "from grpo_jax.config import default_config\n"
            "def get_config():\n    c = default_config()\n    c.optim.lr = 'fast'\n    return c\n",
            "raised TypeError",
        ),
    ],
)
def test_config_files_that_are_refused(tmp_path, text, says):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config([f"--config={path}"])
    assert str(caught.value).startswith(str(path)) and says in str(caught.value)


def test_every_field_is_documented_where_it_is_declared():
    def check(section, prefix):
        for f in dataclasses.fields(section):
            if dataclasses.is_dataclass(f.default):
                assert f.default.__doc__
                check(f.default, f"{prefix}{f.name}.")
            else:
                assert f.metadata["doc"], prefix + f.name

    check(Config(), "")


def test_the_page_of_options_is_what_the_code_says(repo_root):
    """Regenerate: python -c "from grpo_jax.config import config_markdown as m; print(m(), end='')" > docs/config.md."""
    page = configs.config_markdown()
    rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", page, re.MULTILINE)
    assert [name for name, _ in rows] and {name for name, _ in rows} == set(field_names())
    assert dict(rows)["optim.lr"] == "1e-06" and dict(rows)["base.sft.steps"] == "700"
    if not (repo_root / "docs").is_dir():
        pytest.skip("docs/ is in the checkout only")
    assert (repo_root / "docs" / "config.md").read_text() == page
