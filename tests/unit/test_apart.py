"""A function in a process of its own: its value, its error, its death and its silence all come back."""

from __future__ import annotations

import importlib
import os
import signal
import time

import pytest

from kvdb.tools.bench.apart import NoResult, apart


def test_its_value_comes_back_from_another_process() -> None:
    assert apart(os.getppid, limit_s=60) == os.getpid()


def test_an_error_comes_back_in_words() -> None:
    with pytest.raises(NoResult, match="ValueError: invalid literal") as caught:
        apart(int, "x", limit_s=60)
    assert not caught.value.killed
    assert not caught.value.missing


def test_a_missing_package_is_told_from_other_errors() -> None:
    with pytest.raises(NoResult, match="no_such_package") as caught:
        apart(importlib.import_module, "no_such_package", limit_s=60)
    assert caught.value.missing


@pytest.mark.parametrize(("number", "killed"), [(signal.SIGKILL, True), (signal.SIGABRT, False)])
def test_the_caller_outlives_its_death(number: signal.Signals, killed: bool) -> None:
    with pytest.raises(NoResult, match=number.name) as caught:
        apart(signal.raise_signal, number, limit_s=60)
    assert caught.value.killed is killed


def test_an_end_without_a_word_is_no_result() -> None:
    with pytest.raises(NoResult, match="ended with 3"):
        apart(os._exit, 3, limit_s=60)


def test_silence_is_ended() -> None:
    started = time.perf_counter()
    with pytest.raises(NoResult, match="took more than 2 s"):
        apart(time.sleep, 600, limit_s=2)
    assert time.perf_counter() - started < 60
