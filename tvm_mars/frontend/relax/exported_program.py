"""Importing ``torch.export`` programs with PyTorch's own quantize and dequantize operators.

TVM 0.27's importer does not know the operators of ``quantized_decomposed``, which PT2E quantization
leaves in a graph; it takes converters for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

__all__ = ["import_exported_program"]


def import_exported_program(program: Any) -> tvm.IRModule:
    """Import a ``torch.export.ExportedProgram``, quantized or not."""
    from tvm.relax.frontend.torch import from_exported_program

    return from_exported_program(
        program, custom_convert_map=_converters(program), unwrap_unit_return_tuple=True
    )


def _converters(program: Any) -> dict[str, Callable[[Any, Any], Any]]:
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    stored = {**program.state_dict, **program.constants}

    def values(node: Any) -> Any:
        """Give the values of scales or zero points; the importer has them as variables yet."""
        return stored[names[node.name]].numpy()

    def quantize_per_tensor(node: Any, importer: Any) -> Any:
        source, scale, zero, low, high, dtype = node.args[:6]
        numbers = importer.env[source]
        target = _name(dtype)
        whole = np.iinfo(target)
        if (low, high) != (whole.min, whole.max):
            # Fewer codes than the type has, such as 4 bits: the same clip, on the numbers.
            limits = ((limit - zero) * scale for limit in (low, high))
            numbers = importer.block_builder.emit(relax.op.clip(numbers, *limits))
        return importer.block_builder.emit(
            relax.op.quantize(numbers, *_grid(scale, zero, target), out_dtype=target)
        )

    def dequantize_per_tensor(node: Any, importer: Any) -> Any:
        source, scale, zero, _, _, dtype = node.args[:6]
        grid = _grid(scale, zero, _name(dtype))
        return importer.block_builder.emit(relax.op.dequantize(importer.env[source], *grid))

    def dequantize_per_channel(node: Any, importer: Any) -> Any:
        source, scales, zeros, axis, _, _, dtype = node.args[:7]
        grid = _grid(values(scales), values(zeros), _name(dtype))
        return importer.block_builder.emit(
            relax.op.dequantize(importer.env[source], *grid, axis=axis)
        )

    return {
        "quantize_per_tensor.default": quantize_per_tensor,
        "dequantize_per_tensor.default": dequantize_per_tensor,
        "dequantize_per_channel.default": dequantize_per_channel,
    }


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _grid(scale: Any, zero: Any, dtype: str) -> tuple[Any, Any]:
    return (
        relax.const(np.asarray(scale, np.float32)),
        relax.const(np.asarray(zero).astype(dtype)),
    )
