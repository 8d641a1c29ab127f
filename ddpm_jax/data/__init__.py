"""Data sets: `loader.load` finds one by name; each source is a file of its own."""
