"""Loops that numba compiles, kept for later processes where the machine lets it.

numba takes 0.3 s to import: import this, and whatever uses it, only where something is to be computed. To compile takes seconds,
to load what was kept tenths of one.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numba


def compiled(function: Callable[..., Any], signature: str, **options: Any) -> Callable[..., Any]:
    """A function compiled at once for arguments of these types; arrays that are "[:, ::1]" must be C-contiguous.

    numba keeps code in NUMBA_CACHE_DIR, or else beside the source, or else in the user's cache folder. Where none of them can
    be written, where it is full, where what is in it is damaged, or where there is no source to keep it by, each process compiles
    for itself.

    options  of `numba.njit`
    """
    try:
        made: Callable[..., Any] = numba.njit(signature, cache=True, **options)(function)
    except Exception:  # numba has no error of its own for such folders; what is wrong with the function is raised again
        made = numba.njit(signature, **options)(function)
    return made


def stamp(*modules: ModuleType) -> int:
    """A digest of the files of modules whose constants and functions end up in a compiled function of another one, for that to close
    over and use.

    numba keeps code by the file a function is in and the numbers it closes over, if it uses them; a change in other files would go
    unseen. A digest is never negative, so a function that returns where it is uses it and is otherwise as it was.
    """
    return zlib.crc32(b"".join(map(_file_of, modules)))


def _file_of(module: ModuleType) -> bytes:
    """What a module was loaded from: its source, or the bytecode of an installation that has no sources. Where its loader shows
    neither, bytes that no other process has."""
    try:
        content: bytes = module.__spec__.loader.get_data(module.__file__)  # type: ignore[union-attr]
    except (AttributeError, OSError):
        return os.urandom(16)
    return content
