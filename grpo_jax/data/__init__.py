"""Prompts: where rows come from (`sources`, `arithmetic`) and in which order they are drawn (`prompts`)."""
