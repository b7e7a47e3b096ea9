"""What a modality is, what it gives, and its weights on disk."""
