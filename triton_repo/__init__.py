"""The Triton model repository: one thin adapter per model, its packager and its local server."""
