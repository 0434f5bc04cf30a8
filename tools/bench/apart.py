"""One function in a process of its own, which may be killed: by a memory limit, say. The caller outlives it and learns what happened."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from kvdb.errors import KVDBError
from kvdb.tools.bench.capped import remove_group

T = TypeVar("T")


class NoResult(KVDBError, RuntimeError):
    """The function gave nothing back; the message says why, in a few words.

    killed   by the kernel
    missing  a package it needs is not installed
    """

    kind = "no-result"

    def __init__(self, message: str, *, killed: bool = False, missing: bool = False) -> None:
        super().__init__(message)
        self.killed, self.missing = killed, missing


def apart(work: Callable[..., T], *arguments: Any, limit_s: float) -> T:
    """What `work`, a function of a module, returns when a new interpreter runs it.

    raises  NoResult when it fails, dies, or takes longer than `limit_s`
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(there, work, arguments))
    process.start()
    there.close()
    try:
        told = here.recv() if here.poll(limit_s) else None
    except EOFError:
        process.join()
        raise NoResult(_death(process.exitcode), killed=process.exitcode == -signal.SIGKILL) from None
    finally:
        if process.is_alive():
            process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
        if process.pid is not None:
            remove_group(process.pid)
    if told is None:
        raise NoResult(f"took more than {limit_s:.0f} s")
    result, failure, missing = told
    if failure is not None:
        raise NoResult(failure, missing=missing)
    return result


def _tell(there: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        there.send((work(*arguments), None, False))
    except ImportError as error:
        there.send((None, _said(error), True))
    except Exception as error:
        there.send((None, f"{type(error).__name__}: {_said(error)}", False))


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with {code}"
    return f"killed, {signal.Signals(-code).name}"
