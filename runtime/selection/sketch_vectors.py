"""The inmost steps of sketch scoring as vector instructions: products with 8-bit boxes, and the logits of sixteen keys straight from
their packed codes.

Both multiply 16-bit numbers in pairs and add at once, as processors can. Compilers make poor vectors of bits that lie in bytes. Here a lane of 32 bits stands for a key: the bytes of four elements are
spread over all lanes, each lane shifts them by its own number, and what is left of each byte is that key's bit. Place numbers then
meet 16-bit reaches. The instructions are LLVM's own vectors of any
machine; where it has none so wide, it takes several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES: Final = 16
"""Keys at a time: two bytes of a plane's bits."""
LINE: Final = 64
"""Bytes that memory sends at a time."""

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_I32, LANES)
_PAIRS = ir.VectorType(_I16, 2 * LANES)
_BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)
_NONE = 4 * LANES
"""The place of a byte that is zero, of those of two vectors."""
_PRODUCTS = ir.VectorType(_I32, 2 * LANES)


def _lanes(values: Any) -> ir.Constant:
    return ir.Constant(_VECTOR, list(values))


def _splat(b: Any, value: Any) -> Any:
    """A 32-bit number in every lane."""
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    return b.shuffle_vector(b.insert_element(nothing, value, _I32(0)), nothing, _lanes([0] * LANES))


def _pairs_added(b: Any, total: Any, left: Any, right: Any) -> Any:
    """total + left * right, neighbours added: numbers of 16 bits that are given in 32."""
    products = b.mul(left, right)
    even, odd = (b.shuffle_vector(products, products, _lanes(range(i, 2 * LANES, 2))) for i in (0, 1))
    return b.add(total, b.add(even, odd))


def _summed(b: Any, count: Any, sums_of: int, step: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """So many sums after a loop of `count` steps, at least one. step(number, sums) -> sums"""
    entry, loop, end = b.block, b.append_basic_block("loop"), b.append_basic_block("end")
    b.branch(loop)
    b.position_at_end(loop)
    number = b.phi(_I64)
    number.add_incoming(_I64(0), entry)
    sums = [b.phi(_VECTOR) for _ in range(sums_of)]
    added = step(number, sums)
    following = b.add(number, _I64(1))
    number.add_incoming(following, loop)
    for phi, total in zip(sums, added, strict=True):
        phi.add_incoming(_lanes([0] * LANES), entry)
        phi.add_incoming(total, loop)
    b.cbranch(b.icmp_signed("<", following, count), loop, end)
    b.position_at_end(end)
    return added


def _totals(b: Any, sums: list[Any]) -> Any:
    """Lane v is what all lanes of the v-th of up to four vectors add up to: half the work of one vector after the other.

    Quarters of a vector are what processors shuffle quickly: first pairs within them, of two vectors each, then the quarters.
    """
    first, second, third, fourth = [*sums, *[_lanes([0] * LANES)] * (4 - len(sums))]

    def folded(x: Any, y: Any, low: tuple[int, ...], high: tuple[int, ...]) -> Any:
        places = ([quarter + at for quarter in range(0, LANES, 4) for at in part] for part in (low, high))
        return b.add(*(b.shuffle_vector(x, y, _lanes(place)) for place in places))

    one, two = (
        folded(x, y, (0, LANES, 1, LANES + 1), (2, LANES + 2, 3, LANES + 3))
        for x, y in ((first, second), (third, fourth))
    )
    total = folded(one, two, (0, 1, LANES, LANES + 1), (2, 3, LANES + 2, LANES + 3))
    for half in (8, 4):
        total = b.add(total, b.shuffle_vector(total, total, _lanes((lane + half) % LANES for lane in range(LANES))))
    return total


def _address(typingctx: Any, array: Any, index: Any) -> Any:
    """Pointer to an element of a contiguous array of one dimension."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, b, args[0]).data
        return b.gep(data, [b.sext(args[1], _I64) if args[1].type.width < 64 else args[1]])

    return types.CPointer(array.dtype)(array, index), codegen


def _fetch(typingctx: Any, pointer: Any) -> Any:
    """Ask for the cache line at an address: it arrives while other work goes on."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0i8")
        b.call(function, [b.bitcast(args[0], byte), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(pointer), codegen


def _sixteen(
    typingctx: Any,
    planes: Any,
    stride: Any,
    second: Any,
    reach: Any,
    quads: Any,
    out: Any,
    apart: Any,
    bits: Any,
    queries: Any,
) -> Any:
    """out[query, key] = sum over elements of reach[query, element] * place[key, element].

    planes   uint8 *: bits of the first eight keys, most significant plane first; a byte per element
    stride   bytes from plane to plane
    second   bytes from there to the bits of the second eight keys
    reach    int16 *: (queries, 4 * quads)
    out      int32 *: LANES numbers for each query, `apart` from each other
    bits     how many planes, queries how many rows: constants to the compiler
    """
    planes_of, queries_of = bits.literal_value, queries.literal_value

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        planes, stride, second, reach, quads, out, apart = args[:7]
        word = _I32.as_pointer()
        reach_words = b.bitcast(reach, word)

        def plane_bits(plane: int, quad: Any) -> Any:
            """Bit of each key in each of four elements, a byte each."""
            first = b.gep(planes, [b.add(b.mul(stride, _I64(plane)), b.mul(quad, _I64(4)))])
            low, high = (_splat(b, b.load(b.bitcast(at, word), align=1)) for at in (first, b.gep(first, [second])))
            both = b.shuffle_vector(low, high, _lanes([*range(8), *range(LANES + 8, 2 * LANES)]))
            return b.and_(b.lshr(both, _lanes(lane % 8 for lane in range(LANES))), _lanes([0x01010101] * LANES))

        def pairs(places: Any, half: int) -> Any:
            """Two of each four places, 16 bits each."""
            first = range(2 * half, 4 * LANES, 4)
            mask = ir.Constant(ir.VectorType(_I32, 4 * LANES), [x for at in first for x in (at, _NONE, at + 1, _NONE)])
            zeros = ir.Constant(_BYTES, [0] * 4 * LANES)
            return b.bitcast(b.shuffle_vector(b.bitcast(places, _BYTES), zeros, mask), _PAIRS)

        def step(quad: Any, sums: list[Any]) -> list[Any]:
            places = plane_bits(0, quad)
            for plane in range(1, planes_of):
                places = b.or_(b.shl(places, _lanes([1] * LANES)), plane_bits(plane, quad))
            halves = [b.sext(pairs(places, half), _PRODUCTS) for half in (0, 1)]
            added = []
            for number, total in enumerate(sums):
                query, half = divmod(number, 2)
                at = b.add(b.mul(b.add(b.mul(quads, _I64(query)), quad), _I64(2)), _I64(half))
                pair = b.bitcast(_splat(b, b.load(b.gep(reach_words, [at]), align=4)), _PAIRS)
                added.append(_pairs_added(b, total, halves[half], b.sext(pair, _PRODUCTS)))
            return added

        # each half has sums of its own: one sum would wait for the last addition before the next
        added = _summed(b, quads, 2 * queries_of, step)
        for query in range(queries_of):
            total = b.add(*added[2 * query : 2 * query + 2])
            b.store(total, b.bitcast(b.gep(out, [b.mul(apart, _I64(query))]), _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    pointer = types.CPointer
    signature = types.void(
        pointer(types.uint8),
        types.intp,
        types.intp,
        pointer(types.int16),
        types.intp,
        pointer(types.int32),
        types.intp,
        bits,
        queries,
    )
    return signature, codegen


def _products(typingctx: Any, box: Any, weights: Any, steps: Any, out: Any, queries: Any) -> Any:
    """out[query] = sum of box times weights.

    box      int8 *: 2 * LANES * steps numbers
    weights  int16 *: (queries, 2 * LANES * steps)
    out      int32 *: (queries,)
    queries  a constant to the compiler, at most 4
    """
    queries_of = queries.literal_value

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        box, weights, steps, out = args[:4]
        bytes_of = ir.VectorType(ir.IntType(8), 2 * LANES)

        def step(number: Any, sums: list[Any]) -> list[Any]:
            at = b.mul(number, _I64(2 * LANES))
            values = b.sext(b.load(b.bitcast(b.gep(box, [at]), bytes_of.as_pointer()), align=1), _PRODUCTS)
            added = []
            for query, total in enumerate(sums):
                first = b.add(b.mul(b.mul(steps, _I64(2 * LANES)), _I64(query)), at)
                own = b.load(b.bitcast(b.gep(weights, [first]), _PAIRS.as_pointer()), align=2)
                added.append(_pairs_added(b, total, values, b.sext(own, _PRODUCTS)))
            return added

        totals = _totals(b, _summed(b, steps, queries_of, step))
        own = b.shuffle_vector(totals, totals, ir.Constant(ir.VectorType(_I32, queries_of), list(range(queries_of))))
        b.store(own, b.bitcast(out, own.type.as_pointer()), align=4)
        return context.get_dummy_value()

    pointer = types.CPointer
    signature = types.void(pointer(types.int8), pointer(types.int16), types.intp, pointer(types.int32), queries)
    return signature, codegen


address: Any = intrinsic(_address)
fetch: Any = intrinsic(_fetch)
sixteen: Any = intrinsic(prefer_literal=True)(_sixteen)
products: Any = intrinsic(prefer_literal=True)(_products)
