"""What several test files and the benchmarks share.

The folder `tests` is on the path: `from support.notebook import Session`.
"""
