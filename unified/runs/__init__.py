"""How a run went: its history, its curves, its health."""
