"""Access to files, the terminal, signals and environment variables."""
