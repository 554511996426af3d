"""The benchmark suite: `python -m bench --help`. docs/benchmarks.md says how to read what it writes."""
