"""Every benchmark in turn, with its defaults: `make bench`. Results go to benchmarks/results/."""

from __future__ import annotations

from kvdb.tools.bench import (
    append,
    codecs,
    cold,
    commit,
    decode,
    gather,
    policies,
    prefill,
    recoded,
    replay,
    reuse,
    scale,
    selection,
    side_by_side,
    tiers,
    verify,
)
from kvdb.tools.bench.setup import RESULTS
from kvdb.tools.evaluate.command import evaluate


def run() -> None:
    """Run them one after the other, so that none disturbs another."""
    reuse.run()
    prefill.run()
    decode.run()
    codecs.run()
    recoded.run()
    selection.run()
    RESULTS.mkdir(parents=True, exist_ok=True)
    evaluate(stats=RESULTS / "eval.json", plot=RESULTS / "eval.svg")
    verify.run()
    append.run()
    commit.run()
    gather.run()
    cold.run()
    scale.run()
    tiers.run()
    policies.run()
    replay.run()
    side_by_side.run()


if __name__ == "__main__":
    run()
