"""Hypothesis profiles, the real models, and the harnesses' counts.

HYPOTHESIS_PROFILE picks a profile: dev (the default), ci (derandomised; the default where CI is set) or
nightly (long).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line: before torch is loaded
if "PYTEST_XDIST_WORKER" in os.environ:  # one of as many processes as there are cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Before triton is loaded, which transformers does where it is installed: without a GPU its kernels run in memory.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from hypothesis import HealthCheck, settings

from kvdb.tools.models import LoadedModel, ModelNotInstalled, load_model

settings.register_profile("dev", max_examples=30, deadline=None)
settings.register_profile("ci", max_examples=30, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("nightly", max_examples=2_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


# What a shell starts in the background ignores Ctrl-C, and so do its children; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Iterator[LoadedModel]:
    """SmolLM2-135M-Instruct, float32: 30 layers, 9 query heads, 3 KV heads, head_dim 64, context 8192."""
    yield from _real_model("smollm2")


@pytest.fixture(scope="session")
def gemma3_270m() -> Iterator[LoadedModel]:
    """gemma-3-270m, float32: 18 layers (3 full), 4 query heads, 1 KV head, head_dim 256, window 512."""
    yield from _real_model("gemma3-270m")


def _real_model(name: str) -> Iterator[LoadedModel]:
    try:
        loaded = load_model(name)
    except ModelNotInstalled as error:
        pytest.skip(str(error))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield loaded
    torch.set_num_threads(threads)


_TALLIES: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Where several processes run tests, this one hears of the tallies of all."""
    if report.when == "teardown":
        _TALLIES.extend(str(said) for name, said in report.user_properties if name == "tally")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _TALLIES:
        terminalreporter.section("faults: points tried and what came of them")
        for said in sorted(_TALLIES):
            terminalreporter.write_line(said)
