"""The harness here keeps a tally like those in faults/, and is given the same kind of folder."""

from faults.conftest import scratch, tally

__all__ = ["scratch", "tally"]
