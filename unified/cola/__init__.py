"""The official Cola DLM checkpoints, in and out."""
