"""The benchmark suite: `python -m bench --help`. docs/benchmarks.md explains its results."""
