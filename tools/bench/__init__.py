"""Benchmarks on the real model: every figure is a ratio beside a baseline measured in the same run."""
