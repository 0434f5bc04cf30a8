"""What a generation cost: bytes and seconds, counted where they happen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Metrics:
    """Counters of one cache, all rows together. Bytes are KV bytes requested from segments, abstracts not included.

    reuse                   why a stored prefix was loaded, computed again, or both
    recomputed_tokens       of reused_tokens, for each row: the first ones, computed again for dense attention
    ranges_evaluated        ranges and records that selectors scored, over all steps and layers; abstract_bytes_read: for that,
                            and for estimates of what was not read
    unread_mass_bound       largest proven share of softmax mass left unread at any step; None: nothing was proven
    mass_sum, mass_samples  attention mass of what was read, estimated on sampled steps (see selection)
    """

    reuse: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    restore_seconds: float = 0.0
    restore_bytes_read: int = 0
    prefill_bytes_read: int = 0
    decode_tokens: int = 0
    decode_bytes_read: int = 0
    decode_bytes_full: int = 0
    abstract_bytes_resident: int = 0
    kv_bytes_resident_peak: int = 0
    ranges_evaluated: int = 0
    abstract_bytes_read: int = 0
    unread_mass_bound: float | None = None
    mass_sum: float = 0.0
    mass_samples: int = 0

    def resident(self, tail_bytes: int, buffer_bytes: int) -> None:
        self.kv_bytes_resident_peak = max(self.kv_bytes_resident_peak, tail_bytes + buffer_bytes)

    @property
    def mass_covered_estimate(self) -> float:
        """1.0 where every token was attended to."""
        return self.mass_sum / self.mass_samples if self.mass_samples else 1.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe; the names of the command line's `--json`."""
        return {
            "reuse": self.reuse,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "recomputed_tokens": self.recomputed_tokens,
            "prefill_tokens": self.prefill_tokens,
            "prefill_seconds": self.prefill_seconds,
            "restore_seconds": self.restore_seconds,
            "restore_bytes_read": self.restore_bytes_read,
            "prefill_bytes_read": self.prefill_bytes_read,
            "decode_tokens": self.decode_tokens,
            "kv_bytes_read": self.decode_bytes_read,
            "kv_bytes_read_share": self.decode_bytes_read / self.decode_bytes_full if self.decode_bytes_full else 0.0,
            "ranges_evaluated": self.ranges_evaluated,
            "abstract_bytes_read": self.abstract_bytes_read,
            "abstract_bytes_resident": self.abstract_bytes_resident,
            "kv_bytes_resident_peak": self.kv_bytes_resident_peak,
            "mass_covered_estimate": self.mass_covered_estimate,
            "unread_mass_bound": self.unread_mass_bound,
        }
