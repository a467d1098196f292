"""Prompts: where rows come from (`sources`, `arithmetic`, `tasks`) and in which order they are drawn (`prompts`)."""
