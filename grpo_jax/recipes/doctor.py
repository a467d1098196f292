"""Is this machine ready: each line is ok, or what to do."""

import dataclasses
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.config import CodeConfig, Config, cache_folder, from_dict
from grpo_jax.errors import InputError
from grpo_jax.metrics import divide
from grpo_jax.models.architecture import llama
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.parallel import make_mesh, place, row_sharding
from grpo_jax.recipes.shapes import step_parts
from grpo_jax.rewards.code import code_reward
from grpo_jax.sampler.sample import left_positions
from grpo_jax.sampler.types import Prompts
from grpo_jax.step import Program, init_state
from grpo_jax.topology import chip_here

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
GAP = {"cpu": 1e-5, "gpu": 1e-4, "tpu": 1e-4}  # float32 with highest precision; other chips sum in other orders


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line: what was looked at, what was found, and the fix ('' when all is well)."""

    name: str
    told: str
    fix: str = ""

    def __str__(self) -> str:
        """As it is printed."""
        return f"fix  {self.name}: {self.told}: {self.fix}" if self.fix else f"ok   {self.name}: {self.told}"


def doctor(expect: str = "", tell: Callable[[str], None] = print) -> int:
    """Looks at everything and prints a line each; 0 when all is well, else 1."""
    wanted = parse_expect(expect)
    checks: dict[str, Callable[[], Finding]] = {
        "versions": versions,
        "devices": lambda: devices(*wanted),
        "matmul": matmul,
        "bandwidth": bandwidth,
        "collectives": collectives,
        "sampler gap": sampler_gap,
        "padding": padding,
        "cache": cache,
        "sandbox": sandbox,
    }
    well = True
    for name, check in checks.items():
        try:
            finding = check()
        except Exception as error:  # a check that fails is a finding, the others go on
            words = str(error).splitlines()[0] if str(error) else ""
            finding = Finding(name, f"{type(error).__name__}: {words}", "see the message")
        tell(str(finding))
        well = well and not finding.fix
    return 0 if well else 1


def parse_expect(text: str) -> tuple[str, int]:
    """(platform, count) of 'tpu:8', 'gpu' or ''; count 0: any number."""
    name, _, count = text.partition(":")
    if name not in ("", "cpu", "gpu", "tpu") or (count and not (count.isdigit() and int(count) > 0)):
        raise InputError(f"--expect {text}: say cpu, gpu or tpu, and how many, such as tpu:8")
    return name, int(count or 0)


def versions() -> Finding:
    """Python and the packages that must fit together."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    told = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version}" for name, version in found.items())])
    for name in ("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        if name in found and found[name].split(".")[:2] != found["jax"].split(".")[:2]:
            return Finding("versions", told, f"pip install '{name}=={found['jax']}', jax's own version")
    return Finding("versions", told)


def devices(wanted: str = "", count: int = 0, environment: Mapping[str, str] | None = None) -> Finding:
    """Devices seen; a CPU where nobody asked for one, or another number than expected, is an error."""
    found = jax.devices()
    seen, environment = found[0].platform, os.environ if environment is None else environment
    told = f"{len(found)} x {found[0].device_kind} ({seen}), {jax.process_count()} processes"
    asked = wanted or environment.get("JAX_PLATFORMS", "").split(",")[0]
    asked = "gpu" if asked == "cuda" else asked
    if asked and seen != asked:
        return Finding(
            "devices", f"{told}, expected {asked}", f"pip install 'jax[{_extra(asked)}]' and see its warnings"
        )
    if not asked and seen == "cpu":
        fix = "pip install 'grpo-jax[tpu]' or 'grpo-jax[cuda12]'; a CPU on purpose: --expect cpu or JAX_PLATFORMS=cpu"
        return Finding("devices", f"{told}, nothing faster found", fix)
    if count and len(found) != count:
        return Finding(
            "devices", f"{told}, expected {count}", "is another process holding them? are all hosts started?"
        )
    return Finding("devices", told)


def _extra(name: str) -> str:
    return {"gpu": "cuda12", "tpu": "tpu", "cpu": "cpu"}[name]


def matmul() -> Finding:
    """FLOPs a second of a square product on one device, bfloat16 (float32 on CPU)."""
    on_cpu = jax.default_backend() == "cpu"
    size, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    x = jnp.ones((size, size), dtype)
    seconds = measure(jax.jit(lambda x: x @ x), x)
    rate, chip = 2 * size**3 / seconds, chip_here()
    told = f"{rate / 1e12:.3g} TFLOP/s, {jnp.dtype(dtype).name} of {size}"
    return share_of("matmul", told, rate, chip.flops if chip else 0.0)


def bandwidth() -> Finding:
    """Bytes a second that adding 1 to a large array reads and writes."""
    size = 2**24 if jax.default_backend() == "cpu" else 2**28
    x = jnp.zeros((size,), jnp.float32)
    rate, chip = 2 * 4 * size / measure(jax.jit(lambda x: x + 1), x), chip_here()
    told = f"{rate / 1e9:.3g} GB/s over {4 * size >> 20} MiB"
    return share_of("bandwidth", told, rate, chip.memory_bandwidth if chip else 0.0)


def share_of(name: str, told: str, rate: float, peak: float) -> Finding:
    """A measured rate beside the chip's; below half of it something is wrong."""
    if not peak:
        return Finding(name, told)
    told = f"{told}, {rate / peak:.0%} of the chip's {peak:.3g}"
    return Finding(name, told, "" if rate > 0.5 * peak else "is another process using the chip? is it throttled?")


def measure(function: Callable[..., Any], *arguments: Any, times: int = 5) -> float:
    """Median seconds of a call, compiled before."""
    jax.block_until_ready(function(*arguments))
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def collectives() -> Finding:
    """The sum over all devices is right, and how long it takes."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    if mesh.size == 1:
        return Finding("collectives", "one device: none needed")
    count, split = 2**20, NamedSharding(mesh, PartitionSpec("all"))
    rows = jax.make_array_from_callback(
        (mesh.size, count),
        split,
        lambda index: np.full((1, count), float(index[0].start or 0) if index else 0.0, np.float32),
    )
    total = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    seconds = measure(total, rows)
    found, right = float(jnp.max(jnp.abs(total(rows)))), mesh.size * (mesh.size - 1) / 2
    told = f"sum of 4 MiB over {mesh.size} devices in {seconds * 1e3:.2f} ms"
    return Finding(
        "collectives", told, "" if found == right else f"it gives {found}, not {right}: broken links or driver"
    )


def small_config() -> Config:
    """A step of two prompts a device that takes a second."""
    prompts = 2 * jax.device_count()
    return from_dict(
        {
            "data": {"max_prompt_length": 8, "prompts_per_step": prompts},
            "sampler": {"group_size": 2, "max_new_tokens": 8},
            "rewards": {"names": ("overlong",), "weights": (1.0,)},
            "base": {"sft": {"batch_size": prompts}},
        },
        "doctor",
    )


def sampler_gap() -> Finding:
    """One step of a small model: the sampler's log-probabilities against the trainer's."""
    config, sizes = small_config(), llama(1, vocabulary=64, width=64, heads=4, kv_heads=2, head_size=16, mlp_width=128)
    mesh = make_mesh(config.mesh)
    parts = step_parts(config, mesh, sizes)
    with jax.default_matmul_precision("highest"):
        params = init_params(Decoder(sizes), jax.random.key(0))
    state = init_state(parts, place({"params": jax.device_get(params)}, mesh, jnp.float32))
    count, length = config.data.prompts_per_step, config.data.max_prompt_length
    numbers = np.arange(count, dtype=np.int32)
    tokens = (numbers[:, None] * 7 + np.arange(length)) % 60 + 2
    ones: Any = np.ones(count, np.float32)
    made: Any = (tokens.astype(np.int32), np.full(count, length, np.int32), numbers, numbers, ones, {})
    given = Prompts(*made)
    _, metrics, _ = Program(parts, state)(state, jax.device_put(given, row_sharding(mesh)))
    gap = divide(jax.device_get(metrics.means))["sampler_gap/max"]
    bound = GAP[jax.default_backend()]
    fix = "" if gap <= bound else f"above {bound:g}: report it with these versions; objective.correction can bridge it"
    return Finding("sampler gap", f"largest {gap:.2g} on {mesh.size} devices", fix)


def padding() -> Finding:
    """The law after a prompt, with less and with more padding before it."""
    sizes = llama(2, vocabulary=64, width=64, heads=4, kv_heads=2, head_size=16, mlp_width=128)
    module = Decoder(sizes)

    @jax.jit
    def law(params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        hidden: Any = module.apply({"params": params}, tokens, *left_positions(lengths, tokens.shape[1]))
        logits: Any = module.apply({"params": params}, hidden[:, -1], method="logits")
        return jax.nn.log_softmax(logits)

    with jax.default_matmul_precision("highest"):
        params = init_params(module, jax.random.key(0))
        tokens, lengths = jnp.arange(2, 18, dtype=jnp.int32).reshape(2, 8), jnp.array([8, 5], jnp.int32)
        wide = jnp.pad(tokens, ((0, 0), (8, 0)), constant_values=63)
        gap = float(jnp.max(jnp.abs(law(params, tokens, lengths) - law(params, wide, lengths))))
    bound = GAP[jax.default_backend()]
    return Finding(
        "padding", f"changes log-probabilities by {gap:.2g}", "" if gap <= bound else f"above {bound:g}: report it"
    )


def cache() -> Finding:
    """The folder of compiled programs can be written."""
    folder = jax.config.values["jax_compilation_cache_dir"] or str(cache_folder() / "compiled")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return Finding("cache", f"{folder}: {error.strerror}", "set XDG_CACHE_HOME to a folder that can be written")
    size = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
    return Finding("cache", f"{folder}, {size / 2**20:,.0f} MiB")


def sandbox() -> Finding:
    """Code rewards can be isolated here."""
    try:
        code_reward(CodeConfig(), [])
    except InputError as error:
        told, _, fix = str(error).partition(": ")
        return Finding("sandbox", told, f"{fix} (only code rewards need it)")
    return Finding("sandbox", "bubblewrap isolates code rewards")
