"""Code that the benchmarks share: alternating pairs and their arithmetic, raw limits, the command line.

An *arm* is one of the implementations that a benchmark compares. The arm "ours" is KempnerForge.
"stock" is PyTorch's own distributed checkpoint (DCP).
"""
