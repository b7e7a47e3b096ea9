"""Shards made, checked and encoded: what comes before training."""
