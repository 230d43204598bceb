"""What several test files and the benchmarks share. `tests` is on the path: `from support.notebook import Session`."""
