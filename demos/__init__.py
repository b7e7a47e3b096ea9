"""Small programs on the embedded data."""
