"""From a float network to the ONNX form that every importer of ours reads, whatever the IR."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import CapacityError, InputError

from ..onnx_export import to_onnx
from ..options import require_known
from ..ptq import FloatNetwork, Options, quantize_network

__all__ = ["Calibration", "quantized_onnx", "read_options"]

Calibration: TypeAlias = "Mapping[str, npt.ArrayLike] | Iterable[Mapping[str, npt.ArrayLike]]"


def read_options(given: Mapping[str, Any]) -> Options:
    """Read the options of a quantization.

    Raises
    ------
    OptionError
        If one is unknown (the nearest names are given) or bad.
    """
    require_known(given, [field.name for field in attrs.fields(Options)])
    return Options(**given)


def quantized_onnx(
    network: FloatNetwork,
    calibration: Calibration | None,
    options: Options,
    batches: Sequence[int | None],
) -> Any:
    """Quantize a network and write it in the native Q/DQ form, under the network's names.

    Parameters
    ----------
    calibration : mapping of str to array, or an iterable of such mappings
        Images by input; those of several mappings are taken together.
    batches : sequence of int or None
        The batch size of each input, None for one that is open.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    InputError
        If the calibration is missing or does not fit the network.
    CapacityError
        If a layer's sums could leave the integers that float32 holds.
    """
    quantized = quantize_network(network, _collected(calibration), options)
    graph = quantized.graph
    inputs = [entry.name for entry in network.inputs]
    outputs = [out.name for out in network.outputs]
    try:
        model = to_onnx(graph, inputs, outputs)
    except CapacityError as error:
        raise CapacityError(
            error.problem.rpartition(": needs")[0],
            op=quantized.names.get(error.where, error.where),
            need=error.need,
            have=error.have,
            hint=error.hint,
        ) from None
    sizes = set(batches) - {None}
    if len(sizes) == 1:
        (size,) = sizes
        for entry in (*model.graph.input, *model.graph.output):
            entry.type.tensor_type.shape.dim[0].dim_value = size
    return model


def _collected(calibration: Calibration | None) -> dict[str, npt.NDArray[Any]]:
    if calibration is None:
        raise InputError(
            "missing",
            where="calibration",
            hint="give some hundred typical images by input name: calibration={'image': array}",
        )
    if isinstance(calibration, Mapping):
        return {str(name): np.asarray(array) for name, array in calibration.items()}
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    for batch in calibration:
        if not isinstance(batch, Mapping):
            raise InputError(
                f"holds a {type(batch).__name__}",
                where="calibration",
                hint="give a dict of arrays by input name, or an iterable of such dicts",
            )
        for name, array in batch.items():
            parts.setdefault(str(name), []).append(np.asarray(array))
    if not parts:
        raise InputError("holds no images", where="calibration")
    try:
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}
    except ValueError as error:
        raise InputError(f"does not fit together: {error}", where="calibration") from None
