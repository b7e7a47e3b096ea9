"""What makes the prior fast on a device; nothing here changes a result."""
