"""Data sets: `loader.load` loads one by name; each source is a module of this package."""
