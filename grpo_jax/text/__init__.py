"""From messages to tokens and back: tokenizers, chat templates, assistant masks."""

from grpo_jax.text.chat import encode_chat, encode_prompt, render
from grpo_jax.text.tokenizer import Tokenizer
from grpo_jax.text.training import train_sentencepiece

__all__ = ["Tokenizer", "encode_chat", "encode_prompt", "render", "train_sentencepiece"]
