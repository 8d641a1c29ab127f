"""Files, the terminal, signals and environment variables."""
