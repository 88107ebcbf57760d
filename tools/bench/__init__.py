"""Training steps of this project beside those of its peers, on one machine, from the same random weights.

`python -m tools.bench --help`; `python -m tools.bench.report` puts results into docs/benchmarks.md.
"""
