"""Numbers of hidden states in storage dtype: to float32 and back, outlier tokens, and the lossy codecs, one chunk at a time.

Legend: T tokens, B tokens of a chunk, W channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ..records import STORAGE_DTYPE
from .format import COLUMN_TOLERANCE, OUTLIER_FACTOR

# Bits of a float's exponent; all set means infinite or not a number.
_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
_MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
KEPT_BITS = 4  # of the mantissa, under `bitround`
_FP8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # value of each byte
_FP8_LARGEST = 448.0


def all_finite(states: np.ndarray, dtype: str) -> bool:
    """Whether no value is infinite or not a number, from the bits of its exponent."""
    exponent = _EXPONENT[dtype]
    bits = np.ascontiguousarray(states).view(f"u{states.dtype.itemsize}")
    return not ((bits & bits.dtype.type(exponent)) == exponent).any()


def to_float32(states: np.ndarray, dtype: str) -> np.ndarray:
    """[T, W] storage dtype -> [T, W] float32, exactly."""
    if dtype == "bfloat16":
        return (states.astype(np.uint32) << 16).view(np.float32)
    return states.astype(np.float32, copy=False)


def put_float32(values: np.ndarray, out: np.ndarray, dtype: str) -> None:
    """[n, W] float32, rounded to the nearest, into `out` [n, W] of storage dtype."""
    (out.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else out)[...] = values


def outlier_tokens(states: np.ndarray, dtype: str) -> np.ndarray:
    """[T] bool of one row: tokens whose norm is above OUTLIER_FACTOR medians of the row's, such as attention sinks."""
    if not len(states):
        return np.zeros(0, bool)
    squares = np.square(to_float32(states, dtype).astype(np.float64)).sum(1)
    return squares > OUTLIER_FACTOR**2 * np.median(squares)


def channel_squares(states: np.ndarray, dtype: str, outliers: np.ndarray) -> np.ndarray:
    """[W] float64: each channel's sum of squares over the tokens that are no outliers."""
    values = to_float32(states[~outliers], dtype)
    return np.einsum("tw,tw->w", values, values, dtype=np.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Lossy codecs


@dataclass(frozen=True)
class Quantised:
    """A chunk under a lossy codec."""

    main: np.ndarray  # [B, W] what the array itself holds
    scale: np.ndarray | None  # int8: [1, W] of each channel; fp8: [B] of each token; bitround: None
    columns: np.ndarray  # [F] channels that are kept exactly besides


def quantise(codec: str, chunk: np.ndarray, dtype: str, exact: np.ndarray) -> Quantised:
    """chunk [B, W] in storage dtype; exact [B] bool: tokens that are kept elsewhere, and what pads a last chunk: they count as zero."""
    values = to_float32(chunk, dtype)
    values = np.where(exact[:, None], np.float32(0), values)
    main, scale = _QUANTISE[codec](values, chunk, dtype)
    lost = (values - dequantise(codec, main, scale, dtype))[~exact]
    values = values[~exact]
    if not len(values):
        return Quantised(main, scale, np.zeros(0, np.int64))
    missed = np.sqrt(np.square(lost, dtype=np.float64).mean(0))
    allowed = COLUMN_TOLERANCE * _spread(codec, values)
    return Quantised(main, scale, np.flatnonzero(~(missed <= allowed)))  # so that what is not a number counts as missed


def _spread(codec: str, values: np.ndarray) -> np.ndarray:
    """[W]: what an error is compared with. A value far larger than its channel's others widens the steps of int8 for them all, so there
    it is the rms of normal values with the same mean size, which such a value hardly moves; the other codecs' errors are relative."""
    if codec == "int8":
        return np.abs(values).mean(0, dtype=np.float64) * np.sqrt(np.pi / 2)
    return np.sqrt(np.square(values, dtype=np.float64).mean(0))


def dequantise(codec: str, main: np.ndarray, scale: np.ndarray | None, dtype: str) -> np.ndarray:
    """[n, W] float32 of a piece [n, W] of a chunk; scale [1, W] of int8, [n] of fp8."""
    if codec == "int8":
        return main * scale
    if codec == "fp8":
        return _FP8[main] * scale[:, None]
    return to_float32(main, dtype)


def _int8(values: np.ndarray, _chunk: np.ndarray, _dtype: str) -> tuple[np.ndarray, np.ndarray]:
    scale = (np.abs(values).max(0, keepdims=True) / 127).astype(np.float32)  # [1, W]
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint(values / np.where(scale > 0, scale, 1))
    return np.clip(steps, -127, 127).astype(np.int8), scale


def _fp8(values: np.ndarray, _chunk: np.ndarray, _dtype: str) -> tuple[np.ndarray, np.ndarray]:
    scale = (np.abs(values).max(1) / _FP8_LARGEST).astype(np.float32)  # [B]
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.clip(values / np.where(scale > 0, scale, 1)[:, None], -_FP8_LARGEST, _FP8_LARGEST)
    return steps.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale


def _bitround(values: np.ndarray, chunk: np.ndarray, dtype: str) -> tuple[np.ndarray, None]:
    """Round the mantissa to KEPT_BITS bits, halves to even: the bits that are dropped are zero and compress to nothing."""
    dropped = _MANTISSA_BITS[dtype] - KEPT_BITS
    bits = np.where(values == 0, 0, chunk.view(f"u{chunk.dtype.itemsize}").astype(np.uint64))
    rounded = bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)
    return (rounded >> dropped << dropped).astype(f"u{chunk.dtype.itemsize}").view(STORAGE_DTYPE[dtype]), None


_QUANTISE = {"int8": _int8, "fp8": _fp8, "bitround": _bitround}
