"""What `init` writes: the beginning of a model folder."""
