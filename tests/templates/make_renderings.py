"""Writes renderings.json: what transformers makes of the templates in this folder.

    pip install transformers && python tests/templates/make_renderings.py

The templates are written for these tests, each with the constructs of the models that its first line names.
strftime_now is given a fixed day; tests/test_templates.py does the same.
"""

import datetime
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


class Day(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        """The day in the stored renderings."""
        return cls(2025, 1, 20)


def main():
    """One entry for each template, chat and generation prompt; null where the template refuses."""
    chat_template_utils.datetime = Day
    made = {}
    for path in sorted(HERE.glob("*.jinja")):
        template = path.read_text("utf-8")
        for name, chat in CHATS.items():
            for prompted in (False, True):
                try:
                    (text,), _ = chat_template_utils.render_jinja_template(
                        [chat], chat_template=template, add_generation_prompt=prompted, **TOKENS
                    )
                except Exception as error:  # jinja's, for raise_exception and for what is undefined
                    print(path.name, name, type(error).__name__, error)
                    text = None
                made[f"{path.stem}/{name}/{'prompted' if prompted else 'bare'}"] = text
    found = {"transformers": transformers.__version__, "chats": CHATS, "tokens": TOKENS, "renderings": made}
    (HERE / "renderings.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
