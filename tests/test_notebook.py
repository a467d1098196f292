"""The quickstart notebook runs from top to bottom and draws its curve."""

import base64
import os
import struct

import pytest

from grpo_jax.metrics import read_jsonl

nbformat = pytest.importorskip("nbformat", reason="nbformat (extra 'test') reads the notebook")
nbclient = pytest.importorskip("nbclient", reason="nbclient (extra 'test') runs the notebook")


@pytest.fixture
def source(repo_root):
    notebook = nbformat.read(repo_root / "notebooks" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def text(cells) -> str:
    """What the cells printed."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def test_no_outputs_are_stored(source):
    code = [cell for cell in source.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


def test_the_notebook_runs_and_draws_the_curve(source, cli_env, quick_compiles, tmp_path):
    cells = source.cells
    place = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    cells.insert(place + 1, nbformat.v4.new_code_cell("QUICK = True"))
    # A kernel starts with a user's environment, not these tests' eight devices; their cache of programs it may use.
    cached = {name: value for name, value in os.environ.items() if "CACHE" in name and name.startswith("JAX_")}
    env = cli_env | cached | quick_compiles | {"IPYTHONDIR": str(tmp_path / "ipython")}
    nbclient.NotebookClient(source, timeout=180, resources={"metadata": {"path": str(tmp_path)}}).execute(env=env)

    figures = [o.data["image/png"] for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    (picture,) = [base64.b64decode(figure) for figure in figures]
    width, height = struct.unpack(">2I", picture[16:24])  # of the PNG's header
    assert picture.startswith(b"\x89PNG") and width > 400 and height > 150

    steps = read_jsonl(tmp_path / "runs" / "quickstart" / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in steps if "eval/pass@1" in line] == [2, 4, 6], "the curve has three points inside"
    own = read_jsonl(tmp_path / "runs" / "own_reward" / "metrics.jsonl")
    assert all({"reward/right", "reward/short"} <= line.keys() for line in own)
    assert all(line["reward/short"] < 0 for line in own)

    printed = text(cells)
    for heading in ("held-out problems    before    after", "pass@1", "mean length"):
        assert heading in printed
    assert printed.count(" -> '") == 3, "three samples"
    assert "\x1b" not in printed, "no terminal commands in a notebook"
