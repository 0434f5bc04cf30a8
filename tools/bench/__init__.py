"""Benchmarks on the real model: every figure is a ratio beside a baseline measured in the same run."""

from __future__ import annotations

from typing import Final

RESULTS_FOLDER: Final = "benchmarks/results"
