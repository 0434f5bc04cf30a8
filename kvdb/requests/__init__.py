"""Ways to have many reads in flight, by name. To add one: its file, and its line in the table."""

from __future__ import annotations

import logging
from typing import Final

from kvdb.errors import Unsupported
from kvdb.requests.base import Requests, Ticket
from kvdb.requests.threads import Threads
from kvdb.requests.uring import Uring

_LOG: Final = logging.getLogger(__name__)
REQUESTS: Final[dict[str, type[Requests]]] = {kind.name: kind for kind in (Uring, Threads)}
"""The one with less work for the processor comes first."""


def best_requests() -> Requests:
    """The first of the table that works here."""
    for kind in REQUESTS.values():
        try:
            return kind()
        except Unsupported as why:
            _LOG.info("%s", why)
    raise AssertionError("threads work everywhere")


__all__ = ["REQUESTS", "Requests", "Threads", "Ticket", "Uring", "best_requests"]
