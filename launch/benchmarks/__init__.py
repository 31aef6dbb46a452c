"""The benchmarks of launch/bench.py, one module each, with what they share and what they compare with."""
