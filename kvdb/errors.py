"""Every error KVDB raises on purpose, grouped by what a handler would do.

    KVDBError
    ├── InvalidInput (ValueError)        the caller passed something that cannot work: fix the call
    │   ├── NotFinite                    KV that a lossy codec cannot keep: inf, NaN, or beyond what its scales hold
    │   └── Unsupported                  a model or option this version refuses rather than gets wrong
    ├── StoreError                       the store as a whole cannot be used
    │   ├── StoreNotFound (FileNotFoundError)
    │   ├── NotAStore
    │   ├── NewerFormat                  written by a later version: upgrade, nothing was touched
    │   ├── OlderFormat                  written by an earlier version: open it once for writing, which upgrades it
    │   ├── PrefixDeleted                what a cache continues was deleted meanwhile: make the cache again
    │   ├── ReadOnly                     a write was asked of a store opened with mode "r"
    │   ├── StoreLocked (TimeoutError)   another process holds the lock
    │   └── OutOfMemory (MemoryError)    the catalog cannot be mapped: no sign of damage, free memory and try again
    ├── StorageFull (OSError)            disk or quota is full: nothing was committed, earlier data is intact
    ├── Stalled (TimeoutError)           a device has not answered in time: nothing is known of the bytes, ask again later
    ├── Damaged                          bytes on disk are not what was written: verify, then recompute
    ├── SequenceNotFound (KeyError)
    └── IdentityMismatch                 KV of other weights, dtype or config: never reused

Messages read `<where>: <what is>, <what was expected>; <what to do>` and always show the values. `kind` is a stable,
append-only string for programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class KVDBError(Exception):
    """Base class of all errors raised on purpose."""

    kind: ClassVar[str] = "error"


class InvalidInput(KVDBError, ValueError):
    kind = "invalid-input"


class NotFinite(InvalidInput):
    kind = "not-finite"


class Unsupported(InvalidInput):
    kind = "unsupported"


class StoreError(KVDBError):
    kind = "store"


class StoreNotFound(StoreError, FileNotFoundError):
    kind = "store-not-found"
    __str__ = Exception.__str__


class NotAStore(StoreError):
    kind = "not-a-store"


class NewerFormat(StoreError):
    kind = "newer-format"


class OlderFormat(StoreError):
    kind = "older-format"


class PrefixDeleted(StoreError):
    kind = "prefix-deleted"


class ReadOnly(StoreError):
    kind = "read-only"


class StoreLocked(StoreError, TimeoutError):
    kind = "locked"
    __str__ = Exception.__str__


class OutOfMemory(StoreError, MemoryError):
    kind = "out-of-memory"


class StorageFull(KVDBError, OSError):
    kind = "storage-full"
    __str__ = Exception.__str__


class Stalled(KVDBError, TimeoutError):
    kind = "stalled"
    __str__ = Exception.__str__


class Damaged(KVDBError):
    """segment: the segment whose files are concerned, where it is known to be one."""

    kind = "damaged"

    def __init__(self, message: str, segment: str | None = None) -> None:
        super().__init__(message)
        self.segment = segment


class SequenceNotFound(KVDBError, KeyError):
    kind = "sequence-not-found"
    __str__ = Exception.__str__  # KeyError would print the message in quotes


class IdentityMismatch(KVDBError):
    kind = "identity-mismatch"


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding of `check()`: the same value serves the exception, the command line, the tests and `repair`.

    segment  the segment whose files or entries are concerned, if it is one
    """

    loc: str
    kind: str
    message: str
    segment: str | None = None

    def __str__(self) -> str:
        return f"{self.loc}: {self.message}"
