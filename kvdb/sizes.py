"""Sizes as people write them: "50GB", "1 GiB", 4096."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from kvdb.errors import InvalidInput

_UNITS: Final = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGTP", start=1)
}
_MOST: Final = (1 << 63) - 1
_BY_CASE: Final = {unit.lower(): factor for unit, factor in _UNITS.items()}


def parse_bytes(where: str, size: int | str) -> int:
    """Bytes of "50GB" (decimal), "1GiB" (binary), or a plain number.

    raises  InvalidInput for anything else, negative numbers included
    """
    text = str(size) if isinstance(size, (int, str)) else ""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text, re.ASCII)
    if found is None or found[2].lower() not in _BY_CASE:
        raise InvalidInput(f'{where} is {size!r}, expected bytes such as "50GB", "1GiB" or 4096')
    size_bytes = int(Decimal(found[1]) * _BY_CASE[found[2].lower()])
    if size_bytes > _MOST:
        raise InvalidInput(f'{where} is {size!r}, expected bytes such as "50GB", "1GiB" or 4096, at most {_MOST}')
    return size_bytes
