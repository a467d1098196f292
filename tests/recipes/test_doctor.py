"""`grpo-jax doctor`: each line is ok or says what to do; a CPU that nobody asked for is an error."""

import jax
import pytest

from grpo_jax import cli
from grpo_jax.errors import InputError
from grpo_jax.recipes import doctor as subject


def test_every_check_has_a_line(capsys, monkeypatch):
    monkeypatch.setattr(subject, "matmul", lambda: subject.Finding("matmul", "not measured here"))
    monkeypatch.setattr(subject, "bandwidth", lambda: subject.Finding("bandwidth", "not measured here"))
    code = cli.main(["doctor", "--expect", "cpu:8"])
    said = capsys.readouterr().out.splitlines()
    names = [line.split(":")[0].split(None, 1) for line in said]
    assert [name for _, name in names] == [
        "versions", "devices", "matmul", "bandwidth", "collectives", "sampler gap", "padding", "cache", "sandbox",
    ]  # fmt: skip
    verdicts = {name: verdict for verdict, name in names}
    sandboxed = verdicts.pop("sandbox")  # depends on the machine
    assert set(verdicts.values()) == {"ok"} and code == (0 if sandboxed == "ok" else 1)
    assert any("sum of 4 MiB over 8 devices" in line for line in said)


def test_a_silent_fall_back_to_cpu_is_an_error():
    assert "--expect cpu" in subject.devices(environment={}).fix
    assert subject.devices(environment={"JAX_PLATFORMS": "cpu"}).fix == ""
    assert subject.devices("cpu", environment={}).fix == ""
    assert "jax[tpu]" in subject.devices("tpu", 8, {}).fix
    assert "jax[cuda12]" in subject.devices(environment={"JAX_PLATFORMS": "cuda"}).fix
    assert "are all hosts started" in subject.devices("cpu", jax.device_count() + 1).fix


def test_measured_rates_stand_beside_the_chips():
    assert subject.share_of("matmul", "x", 1.0, 0.0).fix == ""
    assert "40%" in subject.share_of("matmul", "x", 0.4, 1.0).told and subject.share_of("matmul", "x", 0.4, 1.0).fix
    assert subject.share_of("matmul", "x", 0.9, 1.0).fix == ""
    assert subject.measure(lambda x: x + 1, 1.0, times=3) >= 0


def test_a_folder_that_cannot_be_written_is_a_finding(tmp_path):
    (tmp_path / "file").write_text("")
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "below"))
    try:
        assert "XDG_CACHE_HOME" in subject.cache().fix
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_check_that_raises_is_a_finding_and_the_others_go_on(monkeypatch):
    def broken():
        raise RuntimeError("no such link")

    for name in ("matmul", "bandwidth", "collectives", "sampler_gap", "padding", "cache", "sandbox"):
        monkeypatch.setattr(subject, name, broken)
    said = []
    assert subject.doctor("cpu", said.append) == 1
    assert said[-1] == "fix  sandbox: RuntimeError: no such link: see the message" and len(said) == 9


@pytest.mark.parametrize("text", ["cpu:x", "npu", "tpu:0"])
def test_bad_expectations_are_refused(text):
    with pytest.raises(InputError, match="say cpu, gpu or tpu"):
        subject.parse_expect(text)
