"""Makes tests/models/peft/: a tiny Llama of transformers, adapters of peft for it, and the logits of both together.

    pip install torch transformers peft
    python tests/models/make_peft.py                  # writes the folder
    python tests/models/make_peft.py --check FOLDER   # a folder written by grpo_jax.models.peft against the same logits

FOLDER is what write_adapters makes of read_adapters("tests/models/peft/adapter", architecture), with alpha 6.
"""

import argparse
import pathlib

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent / "peft"
TOKENS = [[3, 9, 14, 7, 20, 0, 5]]


def base() -> transformers.LlamaForCausalLM:
    """The stored base model."""
    return transformers.LlamaForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32)


def logits(model) -> np.ndarray:
    """Of TOKENS, float32."""
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits[0].float().numpy()


def make() -> None:
    """Base, adapters with a B that is not zero, logits without and with them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=64, rope_theta=1000.0, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(HERE / "base")
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(HERE / "adapter")
    for name in ("adapter/README.md", "base/generation_config.json"):
        (HERE / name).unlink(missing_ok=True)
    config = HERE / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(HERE / "base"), "base"))
    np.savez(HERE / "logits.npz", tokens=np.array(TOKENS), base=logits(base()), adapted=logits(model))


def check(folder: str) -> None:
    """Prints the largest difference between the stored logits and those of peft with another folder's adapters."""
    found = logits(peft.PeftModel.from_pretrained(base(), folder))
    print(f"peft {peft.__version__}, transformers {transformers.__version__}: largest difference", end=" ")
    print(np.abs(found - np.load(HERE / "logits.npz")["adapted"]).max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check")
    given = parser.parse_args()
    check(given.check) if given.check else make()
