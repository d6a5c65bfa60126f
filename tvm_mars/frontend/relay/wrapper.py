"""The function by which generated code calls a region: it hands tensors to the runtime."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence

import attrs
import tvm
from tvm import tir

__all__ = ["TensorSpec", "wrapper"]

# Fields of a tensor's structure, as tvm_struct_get numbers them (TVMStructFieldKind).
_DATA, _SHAPE, _STRIDES, _RANK, _TYPE_CODE, _TYPE_BITS, _OFFSET = 1, 2, 3, 4, 5, 6, 8


@attrs.frozen
class TensorSpec:
    """Shape and type of a tensor that enters or leaves a region."""

    shape: tuple[int, ...]
    dtype: str


def wrapper(
    symbol: str,
    data: bytes,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    order: Sequence[int],
) -> tir.PrimFunc:
    """Give the TensorIR function of a region.

    The graph executor and the VM pass tensors with their shapes, which are checked here; the AOT
    executor passes bare data, whose shapes it has checked when it was compiled. Both are handed on
    with the shapes that the region was compiled for.

    Parameters
    ----------
    symbol : str
        Its name.
    data : bytes
        The program.
    inputs, outputs : sequence of TensorSpec
        Its parameters, first those that enter.
    order : sequence of int
        Which of the inputs the program takes, in its order.
    """
    handles = [tir.Var(f"x{i}", "handle") for i in range(len(inputs) + len(outputs))]
    specs = [*inputs, *outputs]
    pointers = [
        tir.Var(f"data{i}", tvm.ir.PointerType(tvm.ir.PrimType(spec.dtype)))
        for i, spec in enumerate(specs)
    ]
    tensors = [
        tir.decl_buffer(spec.shape, spec.dtype, data=pointer)
        for spec, pointer in zip(specs, pointers, strict=True)
    ]
    given = [tensors[index] for index in order]
    digest = hashlib.sha256(data).hexdigest()
    text = base64.b64encode(data).decode("ascii")
    known = tir.call_packed("mars.runtime.knows", digest)
    load = tir.Evaluate(tir.call_packed("mars.runtime.load", digest, text))
    run = tir.call_packed(
        "mars.runtime.run", digest, 0, len(given), *given, *tensors[len(inputs) :]
    )
    body: tir.Stmt = tir.SeqStmt([tir.IfThenElse(known == 0, load, None), tir.Evaluate(run)])
    for key, value in (("device_id", 0), ("device_type", tvm.cpu().device_type)):
        body = tir.AttrStmt(tir.StringImm("default"), key, tir.const(value, "int32"), body)
    for i in reversed(range(len(specs))):
        handle, spec = handles[i], specs[i]
        body = tir.LetStmt(pointers[i], _field(handle, _DATA, "handle"), body)
        message = f"{symbol}: argument {i} is not a compact {spec.dtype} tensor of {spec.shape}"
        fits = tir.Var("fits", "bool")  # what fails is part of TVM's message
        body = tir.LetStmt(
            fits, _fits(handle, spec), tir.AssertStmt(fits, tir.StringImm(message), body)
        )
    return tir.PrimFunc(handles, body).with_attr("global_symbol", symbol)


def _field(handle: tir.Var, field: int, dtype: str) -> tir.PrimExpr:
    return tir.tvm_struct_get(handle, 0, field, dtype)


def _fits(handle: tir.Var, spec: TensorSpec) -> tir.PrimExpr:
    """Compare a tensor with what was compiled for, unless it is bare data."""
    rank, kind = _field(handle, _RANK, "int32"), tvm.DataType(spec.dtype)
    wanted = [
        rank == len(spec.shape),
        _field(handle, _TYPE_CODE, "uint8") == tir.const(int(kind.type_code), "uint8"),
        _field(handle, _TYPE_BITS, "uint8") == tir.const(int(kind.bits), "uint8"),
        _field(handle, _OFFSET, "uint64") == tir.const(0, "uint64"),
    ]
    strides = [math.prod(spec.shape[axis + 1 :]) for axis in range(len(spec.shape))]
    yes, no = tir.const(True, "bool"), tir.const(False, "bool")
    # Nested, as what stands behind a condition is read only if it holds.
    plain = tir.isnullptr(_field(handle, _STRIDES, "handle"))
    compact = tir.if_then_else(plain, yes, _holds(handle, _STRIDES, strides))
    same = tir.if_then_else(_holds(handle, _SHAPE, spec.shape), compact, no)
    return tir.if_then_else(rank == 0, yes, tir.if_then_else(tir.all(*wanted), same, no))


def _holds(handle: tir.Var, field: int, values: Sequence[int]) -> tir.PrimExpr:
    """Compare integers that a tensor points to."""
    pointer = tir.Var("sizes", tvm.ir.PointerType(tvm.ir.PrimType("int64")))
    sizes = tir.decl_buffer((len(values),), "int64", data=pointer)
    equal = tir.all(
        *(
            tir.BufferLoad(sizes, [axis]) == tir.const(value, "int64")
            for axis, value in enumerate(values)
        )
    )
    return tir.Let(pointer, _field(handle, field, "handle"), equal)
