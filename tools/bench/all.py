"""Every benchmark in turn, with its defaults: `make bench`. Results go to benchmarks/results/."""

from __future__ import annotations

from kvdb.tools.bench import append, cold, commit, decode, gather, mass, quality, reuse, scale, verify


def run() -> None:
    """Run them one after the other, so that none disturbs another."""
    reuse.run()
    decode.run()
    quality.run()
    mass.run()
    verify.run()
    append.run()
    commit.run()
    gather.run()
    cold.run()
    scale.run()


if __name__ == "__main__":
    run()
