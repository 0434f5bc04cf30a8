"""One generation on one device: KVDB joined to transformers. Start at `attach`."""

from __future__ import annotations

from kvdb.runtime.attach import Attachment, attach
from kvdb.runtime.cache import KVDBCache

__all__ = ["Attachment", "KVDBCache", "attach"]
