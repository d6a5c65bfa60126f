"""Conversions at the border of a region: the caller's arrays to stored codes and back.

They follow ONNX's QuantizeLinear and DequantizeLinear in float32 (quotient, round half to even,
zero point, saturation), so that the codes are those of ONNX Runtime and of TVM's CPU build.
"""

from __future__ import annotations

import attrs
import numpy as np
import numpy.typing as npt

from .errors import InputError

__all__ = ["Dequantize", "Quantize"]

_INTEGER_TYPES = ("uint8", "int8")


@attrs.frozen
class Quantize:
    """From what the caller passes to stored codes ``0 .. 2**bits - 1``.

    A caller's float32 array is clipped to ``clip`` (if given), multiplied by ``factor``, divided by
    ``scale``, rounded half to even, offset by ``zero_point``, saturated to ``low .. high``; the
    stored code is that minus ``low``. A caller's integer array holds the codes ``low .. high``
    already.

    Parameters
    ----------
    dtype : str
        ``float32``, ``uint8`` or ``int8``: what the caller passes.
    low, high : int
        Range of the codes in the caller's terms, such as -128 .. 127.
    """

    dtype: str = "float32"
    low: int = 0
    high: int = 255
    scale: float = 1.0
    zero_point: int = 0
    factor: float = 1.0
    clip: tuple[float, float] | None = None

    def check_type(self, array: npt.NDArray[np.generic], where: str = "input") -> None:
        """Refuse an array of another dtype.

        Raises
        ------
        InputError
            If its dtype is another.
        """
        if array.dtype != self.dtype:
            raise InputError(
                f"dtype {array.dtype}, expected {self.dtype}",
                where=where,
                hint=f"convert it with .astype('{self.dtype}')",
            )

    def apply(self, array: npt.NDArray[np.generic], where: str = "input") -> npt.NDArray[np.uint8]:
        """Convert a batch.

        Raises
        ------
        InputError
            If the dtype is another, a value is NaN, or an integer is out of range.
        """
        self.check_type(array, where)
        if self.dtype in _INTEGER_TYPES:
            codes = array.astype(np.int16)
            if codes.size and not (self.low <= codes.min() and codes.max() <= self.high):
                raise InputError(
                    f"codes {codes.min()}..{codes.max()}, expected {self.low}..{self.high}",
                    where=where,
                )
            return (codes - self.low).astype(np.uint8)
        # The least is NaN if any is; of a step that changes nothing, the pass is saved.
        if np.isnan(array.min(initial=np.inf)):
            raise InputError("holds NaN", where=where)
        x = array.astype(np.float32)
        if self.clip is not None:
            np.maximum(x, np.float32(self.clip[0]), out=x)
            np.minimum(x, np.float32(self.clip[1]), out=x)
        if self.factor != 1.0:
            x *= np.float32(self.factor)
        if self.scale != 1.0:
            x /= np.float32(self.scale)
        np.rint(x, out=x)
        if self.zero_point:
            x += np.float32(self.zero_point)
        np.maximum(x, self.low, out=x)
        np.minimum(x, self.high, out=x)
        if self.low:
            x -= self.low
        return x.astype(np.uint8)

    def __str__(self) -> str:
        if self.dtype in _INTEGER_TYPES:
            return f"{self.dtype} {self.low}..{self.high}"
        factor = f" * {self.factor:g}" if self.factor != 1.0 else ""
        clip = f" clip {self.clip[0]:g}..{self.clip[1]:g}" if self.clip else ""
        return (
            f"{self.dtype}{clip}{factor} / {self.scale:g} + {self.zero_point} "
            f"in {self.low}..{self.high}"
        )


@attrs.frozen
class Dequantize:
    """From stored codes or accumulators to what the caller receives.

    ``float32``: ``(code - zero_point) * scale`` in float32, ``scale`` one number or one per
    channel. ``uint8``, ``int8``: the code in the caller's terms, ``code + low``. ``int32``: the
    accumulators themselves.
    """

    dtype: str = "float32"
    scale: tuple[float, ...] = (1.0,)
    zero_point: int = 0
    low: int = 0

    def apply(self, codes: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Convert codes or accumulators ``[N, C, H, W]``."""
        if self.dtype != "float32":
            return (codes.astype(np.int64) + self.low).astype(self.dtype)
        scale = np.asarray(self.scale, np.float32)[:, None, None]
        steps = codes.astype(np.int64) - self.zero_point if self.zero_point else codes
        return steps.astype(np.float32) * scale

    def __str__(self) -> str:
        if self.dtype != "float32":
            return f"as {self.dtype}"
        scale = f"{self.scale[0]:g}" if len(self.scale) == 1 else f"{len(self.scale)} scales"
        return f"as float32 (code - {self.zero_point}) * {scale}"
