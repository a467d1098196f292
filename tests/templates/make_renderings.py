"""Writes renderings.json and own.json: what transformers makes of the templates here, and of models' own.

    pip install transformers && pip install --no-deps trl && python tests/templates/make_renderings.py

The templates in this folder are written for these tests, each with the constructs of the models that its first line
names. Models' own templates are those that the package trl ships; they are not copied here, own.json holds the
SHA-256 of each. strftime_now is given a fixed day; tests/test_templates.py does the same.
"""

import datetime
import hashlib
import importlib.util
import json
import pathlib

import transformers
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHATS = {
    "one": [{"role": "user", "content": " What is 7 + 5? "}],
    "system": [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "é <b> & 'q' \"q\""}],
    "turns": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\none more\n</think>\n\n2 "},
        {"role": "user", "content": "and {{ 2 }}+1?"},
    ],
    "ended": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}],
    "tool": [
        {"role": "user", "content": "1+1?"},
        {"role": "tool", "content": '{"sum": 2, "wörd": "<&>"}'},
        {"role": "tool", "content": "again"},
        {"role": "user", "content": "so?"},
    ],
    "wrong": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
}


OWN = (
    "deepseek_r1_distill deepseekv3 gemma gemma3 llama3 llama3_1 llama3_2 phi3 phi3_5 qwen2_5 qwen3 "
    "qwen3_instruct_2507".split()
)


class Day(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        """The day in the stored renderings."""
        return cls(2025, 1, 20)


def render(stem, template):
    """One entry for each chat and generation prompt; null where the template refuses."""
    made = {}
    for name, chat in CHATS.items():
        for prompted in (False, True):
            try:
                (text,), _ = chat_template_utils.render_jinja_template(
                    [chat], chat_template=template, add_generation_prompt=prompted, **TOKENS
                )
            except Exception as error:  # jinja's, for raise_exception and for what is undefined
                print(stem, name, type(error).__name__, error)
                text = None
            made[f"{stem}/{name}/{'prompted' if prompted else 'bare'}"] = text
    return made


def write(name, found):
    """A JSON file of this folder."""
    found = {"transformers": transformers.__version__, **found}
    (HERE / name).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main():
    """Both files; own.json only where trl is installed."""
    chat_template_utils.datetime = Day
    made = {}
    for path in sorted(HERE.glob("*.jinja")):
        made |= render(path.stem, path.read_text("utf-8"))
    write("renderings.json", {"chats": CHATS, "tokens": TOKENS, "renderings": made})
    if spec := importlib.util.find_spec("trl"):
        own, digests = {}, {}
        for stem in OWN:
            template = pathlib.Path(spec.submodule_search_locations[0], "chat_templates", f"{stem}.jinja").read_bytes()
            digests[stem] = hashlib.sha256(template).hexdigest()
            own |= render(stem, template.decode())
        write("own.json", {"sha256": digests, "renderings": own})


if __name__ == "__main__":
    main()
