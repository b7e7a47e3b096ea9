"""Text: byte-level BPE tokens and a causal VAE of 16 channels per token (paper section 3)."""
