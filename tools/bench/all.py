"""Every benchmark in turn, with its defaults: `make bench`, which is `kvdb bench`. Results go to benchmarks/results/."""

from __future__ import annotations

from pathlib import Path

from kvdb.tools.bench import RESULTS_FOLDER
from kvdb.tools.bench.command import bench

if __name__ == "__main__":
    raise SystemExit(bench([], results=Path(RESULTS_FOLDER)))
