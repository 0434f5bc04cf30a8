"""Rows of integers and of planes to numbers, in Triton: one program takes a run of a half's bytes of codes to the vectors they stand for.

Numbers are those of NumPy, to the bit. Of integers, a code times its scale is exact in float32 (8 by 11 bits), so that a compiler that
fuses the sum into one rounding changes nothing; of planes it would, so they are launched without. bfloat16 is rounded by its bits,
as on the CPU. What damaged scales make, infinities and NaN, may become other such. Whatever the bytes are, nothing outside the row's half
is read, and nothing but the record in `out` is written. Import it only to decode: triton takes a while.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def integers(
    rows,
    columns,
    out,
    row_bytes,
    first,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    NBITS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A half of `Integers`, of each row.

    rows     uint8, `row_bytes` of them each; the half begins at byte `first`
    columns  int64: where in `out`, (..., TOKENS, DIM), each row's half goes
    CHANNELS of a group, BY_TOKEN; by channel they are not looked at
    grid     (rows, blocks of BLOCK bytes of codes)
    """
    PER: tl.constexpr = 8 // NBITS
    LINES: tl.constexpr = (TOKENS + PER - 1) // PER
    ACROSS: tl.constexpr = DIM // CHANNELS
    GROUPS: tl.constexpr = ACROSS * TOKENS if BY_TOKEN else DIM
    row = tl.program_id(0).to(tl.int64)
    half = rows + row * row_bytes + first
    own = out + tl.load(columns + row) * (TOKENS * DIM)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, inside = at % DIM, at < LINES * DIM
    codes = tl.load(half + 4 * GROUPS + at, mask=inside, other=0).to(tl.int32)
    if not BY_TOKEN:
        scale, low = _half_at(half + 2 * channel, inside), _half_at(half + 2 * (GROUPS + channel), inside)
    for nth in tl.static_range(PER):
        token = at // DIM * PER + nth
        real = token < TOKENS
        if BY_TOKEN:
            group = token * ACROSS + channel // CHANNELS
            scale, low = _half_at(half + 2 * group, real), _half_at(half + 2 * (GROUPS + group), real)
        code = (codes >> (nth * NBITS)) & (2**NBITS - 1)
        _store(own + token * DIM + channel, code.to(tl.float32) * scale + low, real)


@triton.jit
def planes(
    rows,
    columns,
    out,
    row_bytes,
    first,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A half of `Planes`, of each row, from its first BITS planes; otherwise as `integers`.

    grid  (rows, blocks of BLOCK bytes of one plane)
    """
    PLANE: tl.constexpr = (TOKENS + 7) // 8 * DIM
    CELL: tl.constexpr = 2.0 ** -(BITS + 2)
    row = tl.program_id(0).to(tl.int64)
    half = rows + row * row_bytes + first
    own = out + tl.load(columns + row) * (TOKENS * DIM)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, inside = at % DIM, at < PLANE
    scale_bits = tl.load(half + 2 * DIM).to(tl.uint32)
    for byte in tl.static_range(1, 4):
        scale_bits |= tl.load(half + 2 * DIM + byte).to(tl.uint32) << (8 * byte)
    scale = scale_bits.to(tl.float32, bitcast=True)
    lo = tl.load(half + channel, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    hi = tl.load(half + DIM + channel, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    low, cell = lo * scale, (hi - lo) * scale * CELL
    ones = tl.zeros([BLOCK], tl.int64)  # byte p holds eight tokens' bits of plane p
    for plane in tl.static_range(BITS):
        line = tl.load(half + 2 * DIM + 4 + plane * PLANE + at, mask=inside, other=0)
        ones |= line.to(tl.int64) << (8 * plane)
    for nth in tl.static_range(8):
        token = at // DIM * 8 + nth
        u = tl.zeros([BLOCK], tl.int32)
        for plane in tl.static_range(BITS):
            u = (u << 1) | ((ones >> (8 * plane + nth)) & 1).to(tl.int32)
        v = 4 * u + 2 - (u == 0).to(tl.int32) + (u == 2**BITS - 1).to(tl.int32)
        _store(own + token * DIM + channel, low + cell * v.to(tl.float32), token < TOKENS)


@triton.jit
def _half_at(at, real):
    """The float16 whose two bytes lie there, wherever that is, as float32."""
    bits = tl.load(at, mask=real, other=0).to(tl.uint16) | (tl.load(at + 1, mask=real, other=0).to(tl.uint16) << 8)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _store(at, value, real):
    """float32 rounded to what is stored there, as `kvdb.codecs.lossy.rounded` does."""
    if at.dtype.element_ty == tl.float16:
        tl.store(at, tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16), mask=real)
    elif at.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(at, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=real)
    else:
        tl.store(at, value, mask=real)
