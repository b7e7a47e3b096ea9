"""Stages, the loop that runs them, checkpoints and metrics."""
