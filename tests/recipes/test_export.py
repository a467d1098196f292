"""`grpo-jax export`: a run's weights and any model as a Hugging Face folder."""

import jax
import numpy as np

from grpo_jax import cli
from grpo_jax.models.loading import load_model, parameter_table
from grpo_jax.models.weights import take


def test_the_newest_checkpoint_of_a_run(micro_run, micro_base, tmp_path, capsys):
    assert cli.main(["export", str(micro_run), str(tmp_path / "m")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'm'}: llama from {micro_run}\n"
    base, trained = load_model(micro_base), load_model(str(micro_run / "checkpoints" / "6"))
    exported = load_model(str(tmp_path / "m"))
    assert exported.architecture == base.architecture
    assert exported.tokenizer.fingerprint() == base.tokenizer.fingerprint()
    changed = 0
    for path, *_ in parameter_table(exported.params):
        np.testing.assert_array_equal(take(exported.params, path), take(trained.params, path))
        changed += not np.array_equal(take(exported.params, path), take(base.params, path))
    assert changed > 5  # the run has trained
    assert cli.main(["export", str(micro_run), str(tmp_path / "m")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_model_in_another_dtype_and_in_shards(micro_base, tmp_path, capsys):
    command = ["export", micro_base, str(tmp_path / "m"), "--dtype", "bfloat16", "--max_shard", "0.000002"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'm'}: llama from {micro_base}\n"
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 1
    leaves = (jax.tree.leaves(load_model(str(path)).params) for path in (micro_base, tmp_path / "m"))
    for left, right in zip(*leaves, strict=True):
        np.testing.assert_allclose(np.asarray(right), np.asarray(left), rtol=2**-8)


def test_what_cannot_be_exported_is_said(micro_base, tmp_path, capsys):
    for source, options, message in (
        (str(tmp_path / "none"), [], "does not exist"),
        (micro_base, ["--max_shard", "0"], "--max_shard=0.0 must be above 0"),
        (micro_base, ["--dtype", "int8"], "invalid choice: 'int8'"),
        (micro_base, ["--config.seed=1"], "leave --config out"),
    ):
        assert cli.main(["export", source, str(tmp_path / "m"), *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
