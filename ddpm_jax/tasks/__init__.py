"""Tasks: each one defines a model, its loss, its evaluation and its sampling."""
