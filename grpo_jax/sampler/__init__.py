"""Prompts in, rollouts out: prefill once a prompt, decode all rows until each has ended."""
