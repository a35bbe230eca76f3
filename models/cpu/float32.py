"""What numba kernels lack: an exp that vectorises (numba's own is a call for each number), and rows of bfloat16.

A bfloat16 is the upper half of a float32; numba sees its pattern as int16. Numba's cache on disk does not see an edit
of this file in kernels of other files that call it: after one, `make clean`.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LEAST, _MOST = np.float32(-87.3), np.float32(89.0)  # below: the least normal number; above: infinity
_SHIFTER = np.float32(1.5 * 2**23)  # adding it rounds to an integer, held by the low bits
_C2, _C3, _C4 = np.float32(5.0000001201e-1), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_C5, _C6, _C7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)
_ONE, _BIAS, _MANTISSA = np.float32(1), np.int32(127), np.int32(23)
_HALF, _LAST, _SIXTEEN = np.int32(0x7FFF), np.int32(1), np.int32(16)


# no reassociation, whatever the caller's setting: it would undo the two-part reduction
@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def exp32(x):
    """exp of a float32 to 1e-7 relative: 2^n by the exponent bits times the polynomial of Cephes' expf.

    From -87.3 down it gives e^-87.3 = 1e-38; NaN stays NaN.
    """
    x = _LEAST if x < _LEAST else x  # a comparison that NaN does not pass
    x = _MOST if x > _MOST else x
    shifted = x * _LOG2_E + _SHIFTER
    n = shifted - _SHIFTER
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2
    power = np.int32((np.float32(shifted).view(np.int32) + _BIAS) << _MANTISSA).view(np.float32)
    return (p * (r * r) + r + _ONE) * power


def read_row(row_D, z_D):
    """z = row, of float32 or of patterns of bfloat16."""
    raise NotImplementedError("for compiled code only")


def write_row(z_D, row_D):
    """row = z rounded to the row's type."""
    raise NotImplementedError("for compiled code only")


@overload(read_row)
def _read_of_kind(row_D, z_D):
    if row_D.dtype == types.int16:

        def read(row_D, z_D):
            for i in range(len(row_D)):
                z_D[i] = np.int32(np.int32(row_D[i]) << _SIXTEEN).view(np.float32)
    else:

        def read(row_D, z_D):
            for i in range(len(row_D)):
                z_D[i] = row_D[i]

    return read


@overload(write_row)
def _write_of_kind(z_D, row_D):
    if row_D.dtype == types.int16:

        def write(z_D, row_D):
            for i in range(len(row_D)):
                bits = np.float32(z_D[i]).view(np.int32)
                # to the nearest, of two as near to the even
                row_D[i] = np.int16(np.int32(bits + _HALF + ((bits >> _SIXTEEN) & _LAST)) >> _SIXTEEN)
    else:

        def write(z_D, row_D):
            for i in range(len(row_D)):
                row_D[i] = z_D[i]

    return write
