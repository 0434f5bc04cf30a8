"""Which codec stores each layer.

int4                    all layers
int4;0-1=raw;29=int8    all but some
balanced                a policy: see `POLICIES`
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from kvdb.codecs.record import RecordCodec
from kvdb.errors import InvalidInput
from kvdb.geometry import Geometry, LayerGroup

POLICIES: Final = {"lossless": "raw", "balanced": "planes:bits=6+int8", "small": "int4"}
"""Names for what most people want; docs/design/004-codecs.md has the figures."""
_DIGITS: Final = 6


@dataclass(frozen=True, slots=True)
class CodecPlan:
    """usual   of every layer that is not in `others`
    others  layer index, codec: ascending, and none that is the usual one
    """

    usual: RecordCodec
    others: tuple[tuple[int, RecordCodec], ...] = ()

    @property
    def lossless(self) -> bool:
        return self.usual.lossless and all(codec.lossless for _, codec in self.others)

    @property
    def exact_keys(self) -> bool:
        return self.usual.key.lossless and all(codec.key.lossless for _, codec in self.others)

    @property
    def by_record(self) -> bool:
        """Whether every record can be written and read by itself."""
        return self.usual.blocks is None and all(codec.blocks is None for _, codec in self.others)

    def of(self, layer: int) -> RecordCodec:
        return dict(self.others).get(layer, self.usual)

    def grouped(self, geometry: Geometry) -> tuple[Geometry, tuple[RecordCodec, ...]]:
        """Layers that share a shape and a codec in one group each, and the codecs of the groups. Grouping again changes nothing.

        raises  InvalidInput for layers that are not there, or shapes that a codec cannot store
        """
        if missing := [layer for layer, _ in self.others if layer not in geometry.layers]:
            raise InvalidInput(f"codec {self}: layers {missing}, expected some of {geometry.layers}")
        for layer in geometry.layers:
            self.of(layer).check(
                geometry.chunk_tokens, geometry.groups[geometry.locate(layer)[0]].head_dim, geometry.dtype
            )
        if not self.others:
            return geometry, (self.usual,) * len(geometry.groups)
        found: dict[tuple[int, int, RecordCodec], list[int]] = {}
        for layer in geometry.layers:
            g = geometry.groups[geometry.locate(layer)[0]]
            found.setdefault((g.kv_heads, g.head_dim, self.of(layer)), []).append(layer)
        groups = tuple(LayerGroup(layers=tuple(layers), kv_heads=h, head_dim=d) for (h, d, _), layers in found.items())
        split = Geometry(dtype=geometry.dtype, chunk_tokens=geometry.chunk_tokens, groups=groups)
        return split, tuple(codec for _, _, codec in found)

    @classmethod
    def of_groups(cls, geometry: Geometry, codecs: tuple[RecordCodec, ...]) -> CodecPlan:
        """Inverse of `grouped`."""
        usual = codecs[0]
        others = [(n, c) for g, c in zip(geometry.groups, codecs, strict=True) if c != usual for n in g.layers]
        return cls(usual, tuple(sorted(others, key=lambda item: item[0])))

    @classmethod
    def parse(cls, text: str) -> CodecPlan:
        """As on a command line: `str` is its inverse, but for policies, which it spells out.

        raises  InvalidInput for what is no such text; Unsupported for a codec or parameter that is not known
        """
        usual, *exceptions = (part.strip() for part in text.split(";"))
        found: dict[int, RecordCodec] = {}
        for exception in exceptions:
            layers, equals, codec = exception.partition("=")
            first, _, last = layers.partition("-")
            numbers = (first, last or first)
            known = equals and all(n.isascii() and n.isdecimal() and len(n) < _DIGITS for n in numbers)
            if not known or int(numbers[0]) > int(numbers[1]):
                raise InvalidInput(f"codec {text!r:.200}: {exception!r:.80}, expected LAYER=CODEC or FIRST-LAST=CODEC")
            for layer in range(int(numbers[0]), int(numbers[1]) + 1):
                if layer in found:
                    raise InvalidInput(f"codec {text!r}: layer {layer} twice, expected it once")
                found[layer] = RecordCodec.parse(POLICIES.get(codec, codec))
        plan = cls(RecordCodec.parse(POLICIES.get(usual, usual)))
        return replace(
            plan, others=tuple(sorted(((n, c) for n, c in found.items() if c != plan.usual), key=lambda item: item[0]))
        )

    def __str__(self) -> str:
        parts, runs = [str(self.usual)], list[tuple[int, int, RecordCodec]]()
        for layer, codec in self.others:
            if runs and runs[-1][1] == layer - 1 and runs[-1][2] == codec:
                runs[-1] = (runs[-1][0], layer, codec)
            else:
                runs.append((layer, layer, codec))
        for first, last, codec in runs:
            parts.append(f"{first}={codec}" if first == last else f"{first}-{last}={codec}")
        return ";".join(parts)


RAW: Final = CodecPlan.parse("raw")
