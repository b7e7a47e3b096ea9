"""The flow: its path, its timesteps, the loss of matching it, and solvers."""
