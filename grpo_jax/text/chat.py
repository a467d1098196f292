"""From messages to tokens: prompts to complete, conversations to learn from.

What a user typed never becomes a control token: special-token strings in the content of messages
are hidden from the template's tokens and encoded as plain text.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.config import TextConfig
from grpo_jax.errors import InputError
from grpo_jax.text.backends import split_at
from grpo_jax.text.templates import Draw, Message, template_named
from grpo_jax.text.tokenizer import Tokenizer


def render(
    messages: Sequence[Message] | str,
    template_name: str,
    tokenizer: Tokenizer,
    system_prompt: str = "",
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation under a template: 'plain', 'r1_zero', 'chat' or a .jinja file.

    Templates see `messages`, `add_generation_prompt`, the special tokens by transformers' names, and
    `end_token`, the first end token. Raises InputError naming the template.
    """
    return template_named(template_name, tokenizer)(_checked(messages, system_prompt), add_generation_prompt)


def encode_prompt(messages: Sequence[Message] | str, config: TextConfig, tokenizer: Tokenizer) -> list[int]:
    """Ids of the prompt that a completion follows; a bare text is one user message."""
    tokenizer = tokenizer.with_end_tokens(config.end_tokens)
    checked = _checked(messages, config.system_prompt)
    if checked[-1]["role"] == "assistant":
        raise InputError("messages: the last one is the assistant's: a prompt must end with the user's")
    checked, hidden = _hide(checked, tokenizer)
    text = template_named(config.template, tokenizer)(checked, True)
    return [*_opening(text, config, tokenizer), *_encode(text, hidden, tokenizer)]


def encode_chat(messages: Sequence[Message], config: TextConfig, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation, and 1 on the assistant's tokens and the end token that closes them.

    Where a token would straddle the border between prompt and answer, both are encoded apart, as
    they are when the answer is sampled. Raises InputError when the template closes an answer with
    no end token, or rewrites earlier messages.
    """
    tokenizer = tokenizer.with_end_tokens(config.end_tokens)
    checked, hidden = _hide(_checked(messages, config.system_prompt), tokenizer)
    segments = _segments(checked, template_named(config.template, tokenizer), config.template)
    text = "".join(segment for segment, _ in segments)
    opening = _opening(text, config, tokenizer)
    ids, mask = list(opening), [0] * len(opening)
    parts = _encode_segments([segment for segment, _ in segments], hidden, tokenizer)
    for part, (_, assistant) in zip(parts, segments, strict=True):
        ends = [i for i, token in enumerate(part) if token in tokenizer.end_ids]
        if assistant and not ends:
            raise InputError(
                f"text.template={config.template!r} closes the assistant's message with no end token "
                f"({[tokenizer.backend.pieces[i] for i in tokenizer.end_ids]}): mend the template or text.end_tokens"
            )
        length = ends[-1] + 1 if assistant else 0
        ids += part
        mask += [1] * length + [0] * (len(part) - length)
    return ids, mask


def _segments(messages: list[Message], draw: Draw, template: str) -> list[tuple[str, bool]]:
    """The text cut at the borders of the assistant's messages: (text, is the assistant's)."""
    if not any(m["role"] == "assistant" for m in messages) or messages[0]["role"] == "assistant":
        raise InputError("messages: a chat row needs an assistant message after another one: mend the row")
    full, segments, at = draw(messages, False), [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, upto = draw(messages[:i], True), draw(messages[: i + 1], False)
        if not full.startswith(upto) or not upto.startswith(before) or len(before) < at:
            raise InputError(
                f"text.template={template!r} rewrites messages {i - 1} and {i} when others follow: answers cannot be "
                "told apart: use a template that only appends"
            )
        segments += [(full[at : len(before)], False), (full[len(before) : len(upto)], True)]
        at = len(upto)
    return [*segments, (full[at:], False)] if at < len(full) else segments


def _encode_segments(segments: list[str], hidden: dict[str, str], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of each segment: cut from the ids of the whole where the cuts fall between tokens, else apart."""
    whole, parts, at, text = _encode("".join(segments), hidden, tokenizer), [], 0, ""
    for segment in segments:
        text += segment
        prefix = _encode(text, hidden, tokenizer)
        if whole[: len(prefix)] != prefix:
            return [_encode(s, hidden, tokenizer) for s in segments]
        parts.append(prefix[at:])
        at = len(prefix)
    return parts


def _opening(text: str, config: TextConfig, tokenizer: Tokenizer) -> list[int]:
    """BOS where the tokenizer wants it; a model's own template writes it itself."""
    if config.template == "chat" or not tokenizer.add_bos or tokenizer.bos_id is None:
        return []
    piece = tokenizer.backend.pieces[tokenizer.bos_id]
    return [] if piece and text.startswith(piece) else [tokenizer.bos_id]


def _checked(messages: Sequence[Message] | str, system_prompt: str) -> list[Message]:
    """Messages as a list, the system prompt first."""
    rows: list[Message] = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    for i, message in enumerate(rows):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError(f"messages[{i}]={message!r} must hold a 'role' and a 'content', both text: mend the row")
    if not rows:
        raise InputError("messages=[] is empty: mend the row")
    if system_prompt and rows[0]["role"] == "system":
        raise InputError(
            f"text.system_prompt={system_prompt!r}, but the messages start with a system message: leave one of them out"
        )
    return [{"role": "system", "content": system_prompt}, *rows] if system_prompt else rows


def _hide(messages: list[Message], tokenizer: Tokenizer) -> tuple[list[Message], dict[str, str]]:
    """Special-token strings in the messages as private-use characters, and what these stand for."""
    pattern = tokenizer.backend.special_pattern
    texts = list(_strings(messages))
    found = {name for text in texts for name in tokenizer.backend.specials if name in text} if pattern else set()
    if not found:
        return messages, {}
    used = set("".join(texts))
    free = (chr(i) for i in range(0xF0000, 0xFFFFE) if chr(i) not in used)
    marks = dict(zip(sorted(found, key=len, reverse=True), free, strict=False))
    literal = re.compile("|".join(re.escape(name) for name in marks))
    hidden = _mapped(messages, lambda text: literal.sub(lambda match: marks[match[0]], text))
    return hidden, {mark: name for name, mark in marks.items()}


def _strings(node: Any) -> Iterable[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping | list | tuple):
        for child in node.values() if isinstance(node, Mapping) else node:
            yield from _strings(child)


def _mapped(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, str):
        return change(node)
    if isinstance(node, Mapping):
        return {key: _mapped(value, change) for key, value in node.items()}
    return [_mapped(value, change) for value in node] if isinstance(node, list | tuple) else node


def _encode(text: str, hidden: dict[str, str], tokenizer: Tokenizer) -> list[int]:
    """Ids of a rendered text: the template's special tokens as such, hidden ones as the text they were."""
    backend, ids = tokenizer.backend, []
    back = {ord(mark): name for mark, name in hidden.items()}
    if not hidden or backend.special_pattern is None:
        ids = tokenizer.encode(text)
    else:
        for part, marked in split_at(backend.special_pattern, text):
            ids += [backend.specials[part]] if marked else tokenizer.encode(part.translate(back), special=False)
    if backend.unknown_id is not None and backend.unknown_id in ids:
        plain = backend.special_pattern.sub("", text) if backend.special_pattern else text
        lost = sorted(c for c in set(plain.translate(back)) if backend.unknown_id in tokenizer.encode(c, special=False))
        raise InputError(f"text {plain[:60]!r}: the tokenizer cannot spell {''.join(lost)!r}: leave it out of the data")
    return ids
