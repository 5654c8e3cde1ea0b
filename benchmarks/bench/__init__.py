"""Code that the benchmarks share: alternating pairs and their arithmetic, raw limits, the command line."""
