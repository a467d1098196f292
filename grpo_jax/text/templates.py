"""Chat templates: jinja as transformers sets it up, in jinja's sandbox."""

import datetime
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from grpo_jax.errors import InputError
from grpo_jax.text.files import read
from grpo_jax.text.tokenizer import Tokenizer

TEMPLATES = pathlib.Path(__file__).parents[1] / "templates"

Message = Mapping[str, Any]
Draw = Callable[[Sequence[Message], bool], str]


def template_named(name: str, tokenizer: Tokenizer) -> Draw:
    """The template as a function of messages and add_generation_prompt."""
    if name == "chat":
        source = tokenizer.chat_template
        if not source:
            raise InputError("text.template='chat', but the model has none: use 'plain', 'r1_zero' or a file")
    elif name in ("plain", "r1_zero"):
        source = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    elif name.endswith(".jinja"):
        source = read(name).decode(errors="replace")
    else:
        raise InputError(f"text.template={name!r} is not plain, r1_zero, chat or a .jinja file: use one of them")
    try:
        template = _compiled(source)
    except jinja2.TemplateError as error:
        raise InputError(f"text.template={name!r} is no jinja template ({error}): mend it") from None
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    special: dict[str, Any] = {k: tokenizer.backend.pieces[i] for k, i in ids.items() if i is not None}
    special["end_token"] = tokenizer.decode(tokenizer.end_ids[:1], skip_special=False)

    def draw(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            # transformers hands in both, so that a template may ask `tools is not none`.
            given = {"messages": messages, "tools": None, "documents": None}
            return template.render(**given, add_generation_prompt=add_generation_prompt, **special)
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
            raise InputError(f"text.template={name!r} refuses the messages ({error}): mend one of them") from None

    return draw


class _Generation(jinja2.ext.Extension):
    """transformers' {% generation %} block, which marks the assistant's text: its body alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """The template, compiled once for all prompts: Jinja as transformers sets it up, in the sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
