"""Benchmarks of language models: prompts, scoring rules, answers."""
