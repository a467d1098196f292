"""The smallest machine of each kind that holds the step of configs/scale.py, by the formulas of `grpo-jax plan`.

    python benchmarks/fits.py
    python benchmarks/fits.py --models Qwen2.5-7B --chips v5e h100

Prints a table in Markdown. A cell is the answer of

    grpo-jax plan --config scale --model MODEL --devices MACHINE --config.mesh.data=-1 --config.mesh.auto=True

with `--config.mesh.sampling=same` where "same" is said: the first machine that these say to take at most 85% of its
memory, or the largest one and what is missing on it.
"""

import argparse
import dataclasses

from grpo_jax.chips import GIB, parse_topology
from grpo_jax.config import Config, config_file, from_dict, read_config_file
from grpo_jax.errors import InputError
from grpo_jax.models.abstract import abstract_params, architecture_of, with_model
from grpo_jax.models.architecture import Architecture
from grpo_jax.recipes.mesh import USED, for_topology
from grpo_jax.recipes.plan import plan_params, sizes_of

MODELS = (
    "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3-8B", "Qwen2.5-32B", "Llama-3-70B", "DeepSeek-V3-671B",
)  # fmt: skip
SLICES = ("1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
MACHINES = {
    "v5e": [f"v5e:{shape}" for shape in SLICES] + [f"{n}*v5e:16x16" for n in (2, 4)],
    "v6e": [f"v6e:{shape}" for shape in SLICES] + [f"{n}*v6e:16x16" for n in (2, 4)],
    "v5p": [f"v5p:{shape}" for shape in ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")],
    "h100": [f"h100:{number}" for number in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)],
}
SAMPLING = {"": "tensor", ", same": "same"}  # what a cell says -> mesh.sampling


def main() -> None:
    """One line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--chips", nargs="+", choices=MACHINES, default=tuple(MACHINES))
    options = parser.parse_args()
    print(f"| model | {' | '.join(options.chips)} |\n|{'---|' * (len(options.chips) + 1)}")
    for name in options.models:
        config = with_model(from_dict(read_config_file(config_file("scale"))), name)
        architecture = architecture_of(config)
        params = abstract_params(architecture)
        cells = [smallest(config, architecture, params, MACHINES[chip]) for chip in options.chips]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def smallest(config: Config, architecture: Architecture, params: object, machines: list[str]) -> str:
    """A cell: the machine, the axes, GiB of a device, roofline seconds of sampling and of training."""
    last = "none: the batch does not split over any of these"
    for machine in machines:
        topology = parse_topology(machine)
        for said, sampling in SAMPLING.items():
            asked = dataclasses.replace(config.mesh, data=-1, auto=True, sampling=sampling)
            try:
                placed, _ = for_topology(dataclasses.replace(config, mesh=asked), architecture, topology)
                found = plan_params(placed, architecture, topology, params)
            except InputError:
                continue
            need, has = found.memory.total / GIB, topology.chip.memory / GIB
            axes = dataclasses.asdict(sizes_of(placed, topology.chips))
            laid = " x ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1) or "one chip"
            if need <= USED * has:
                seconds = f"{found.sampling_seconds:.1f} + {found.update_seconds:.1f} s"
                return f"{machine}: {laid}{said}; {need:.1f} GiB, {seconds}"
            last = f"none: {machine} lacks {need - USED * has:.1f} GiB a chip"
    return last


if __name__ == "__main__":
    main()
