"""The latent sequence: who sees whom, layouts, tasks, and packing into rows."""
