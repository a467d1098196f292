"""Machines by name, and the table of chips."""

import pytest

from grpo_jax.chips import CHIPS, GIB, environment, parse_topology, slice_shape
from grpo_jax.errors import InputError


@pytest.mark.parametrize(
    ("text", "shape", "slices", "chips", "name"),
    [
        ("v5e:4x4", (4, 4), 1, 16, "v5e:4x4"),
        ("v5e:16", (4, 4), 1, 16, "v5e:4x4"),
        ("v5e:8", (2, 4), 1, 8, "v5e:2x4"),
        ("v5p:2x2x4", (2, 2, 4), 1, 16, "v5p:2x2x4"),
        ("v4:4", (2, 2, 1), 1, 4, "v4:2x2x1"),
        ("2*v6e:4x8", (4, 8), 2, 64, "2*v6e:4x8"),
        ("h100:8", (8,), 1, 8, "h100:8"),
    ],
)
def test_names_are_read(text, shape, slices, chips, name):
    found = parse_topology(text)
    assert (found.shape, found.slices, found.chips, found.name) == (shape, slices, chips, name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v9:2x2", "no such chip 'v9'; there are: v4, v5e"),
        ("v5e", "name a slice such as v5e:4x4"),
        ("v5e:2x2x2", "a slice of v5e has 2 sizes, such as v5e:2x2"),
        ("v5p:2x2", "has 3 sizes"),
        ("h100:2x4", "give a number of GPUs"),
        ("h100:12", "more than 8 GPUs are boxes of 8, such as h100:8"),
        ("2*h100:8", "give a number of GPUs"),
        ("v5e:0x4", "must be positive"),
    ],
)
def test_bad_names_say_the_fix(text, words):
    with pytest.raises(InputError, match=words.replace("(", "\\(")):
        parse_topology(text)


@pytest.mark.parametrize("chips", [1, 2, 4, 8, 12, 16, 32, 64, 256])
def test_slices_are_as_square_as_they_can_be(chips):
    for dimensions in (2, 3):
        shape = slice_shape(chips, dimensions)
        product = 1
        for side in shape:
            product *= side
        assert product == chips and len(shape) == dimensions
    assert slice_shape(64, 3) == (4, 4, 4) and slice_shape(256, 2) == (16, 16)


def test_chips_have_sources_and_sensible_figures():
    """A v6e is the faster v5e, a v5p the larger one, and no figure is off by a unit."""
    for chip in CHIPS.values():
        assert chip.source.startswith("https://")
        assert 1e14 < chip.flops < 1e15 and 8 * GIB < chip.memory < 128 * GIB
        assert 5e11 < chip.memory_bandwidth < 5e12 and 1e11 < chip.link_bandwidth < chip.memory_bandwidth
        assert chip.tpu == (chip.target_config == "")


def test_the_environment_keeps_what_the_user_set():
    tpu = environment(parse_topology("v5e:2x2"), {})
    assert tpu["JAX_PLATFORMS"] == "cpu" and tpu["TPU_ACCELERATOR_TYPE"] == "v5litepod-8"
    gpu = environment(parse_topology("h100:8"), {"XLA_FLAGS": "--xla_dump_to=x"})
    assert gpu["XLA_FLAGS"] == "--xla_dump_to=x --xla_gpu_autotune_level=0"


def test_links_between_boxes_are_slower():
    assert parse_topology("h100:8").link_bandwidth == CHIPS["h100"].link_bandwidth
    assert parse_topology("h100:16").link_bandwidth < CHIPS["h100"].link_bandwidth / 5
    assert parse_topology("v5e:16").link_bandwidth == CHIPS["v5e"].link_bandwidth
