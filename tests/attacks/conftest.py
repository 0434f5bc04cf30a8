"""The harness here keeps a tally like those in faults/, and is given the same kind of folder."""

from faults.conftest import pytest_terminal_summary, scratch, tally

__all__ = ["pytest_terminal_summary", "scratch", "tally"]
