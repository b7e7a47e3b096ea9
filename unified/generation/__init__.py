"""From what is given to something new, block by block."""
