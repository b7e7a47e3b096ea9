"""The prior, and what it is made of."""
