"""Asking for memory before it is needed, in compiled loops that gather rows in random order.

A row is about a kilobyte: by the time a processor has found out that it is read from end to end, it is over. So each loop asks for the
row after the next while it decodes one. `llvm.prefetch` is an instruction of most machines, and nothing on the others.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

AHEAD: Final = 2
LINE: Final = 64
"""Bytes that memory sends at a time."""


def _fetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line that holds an element of a contiguous array."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        declared: Any = cgutils.get_or_insert_function  # numba types nothing
        function = declared(b.module, kind, "llvm.prefetch.p0i8")
        first = context.make_array(signature.args[0])(context, b, args[0]).data
        b.call(function, [b.bitcast(b.gep(first, [args[1]]), byte), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


fetch: Any = intrinsic(_fetch)
