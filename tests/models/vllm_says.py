"""What vLLM makes of a folder: its greedy tokens and their log-probabilities.

    VENV/bin/python tests/models/vllm_says.py FOLDER PROMPTS.json SAID.json TOKENS

PROMPTS.json is a list of lists of token ids. Runs in an environment that has vLLM, of which it names the versions of
many packages; nothing of grpo_jax is needed there.
"""

import json
import os
import pathlib
import sys


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process alone
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    folder, prompts, said, tokens = sys.argv[1:]
    model = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=64, disable_log_stats=True)
    given = [{"prompt_token_ids": ids} for ids in json.loads(pathlib.Path(prompts).read_text())]
    made = model.generate(given, SamplingParams(temperature=0, max_tokens=int(tokens), logprobs=0, ignore_eos=True))
    rows = [
        {
            "ids": list(row.outputs[0].token_ids),
            "logps": [
                place[token].logprob
                for place, token in zip(row.outputs[0].logprobs, row.outputs[0].token_ids, strict=True)
            ],
            "text": row.outputs[0].text,
        }
        for row in made
    ]
    pathlib.Path(said).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
