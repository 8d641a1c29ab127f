"""Data sets: `loader.load` loads a data set by name; each source of data is a module here."""
