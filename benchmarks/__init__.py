"""The numbers of docs/benchmarks.md: `python -m benchmarks [NAME…]`, from the root of the repository."""
