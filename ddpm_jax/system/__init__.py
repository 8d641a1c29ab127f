"""Files, the terminal and signals."""
