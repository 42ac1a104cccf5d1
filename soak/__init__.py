"""A long run under load and faults: `python -m soak`, from the root of the repository. See docs/reliability-soak.md."""
