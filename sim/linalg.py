"""Products and the pseudo-inverse of small matrices, to the last bit as numpy in numba gives them, at half the cost and without locks.

``pinv`` goes through LAPACK's ``dgesdd``, which for a small square matrix spends a third of its time on asking its parts how much
workspace they want. Its parts are called here in its order: bidiagonalise (``dgebd2``), implicit QR (``dbdsqr``), and turn the singular
vectors back (``dorm2r``, ``dorml2``). The matrix is expected to be scaled like a robot's, not near the limits of a double.

A product goes through BLAS's ``dgemm``, whose kernels add up each entry by fused multiply-adds in the order of the columns, but which first
takes a buffer from a pool that all threads share. Here it is the same sum in a loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from sim.native import dbdsqr, dgebd2, dorm2r, dorml2

RCOND = 1e-15  # numpy's default: smaller singular values, relative to the largest, count as zero


@intrinsic
def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    """A * b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float64(types.float64, types.float64, types.float64), generate


@numba.njit(cache=True, nogil=True)
def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Matrix product of (n, k) and (k, m), in C order."""
    result = np.empty((a.shape[0], b.shape[1]))
    for i in range(a.shape[0]):
        for j in range(b.shape[1]):
            total = 0.0
            for k in range(a.shape[1]):
                total = fma(a[i, k], b[k, j], total)  # type: ignore[call-arg]
            result[i, j] = total
    return result


class PinvWork(NamedTuple):
    """Scratch for matrices of one size n."""

    integers: np.ndarray  # n, n - 1, 0, LAPACK's return code: int32
    letters: np.ndarray  # "U", "L", "N", "R"
    a: np.ndarray  # (n, n), as are u and vt, in LAPACK's column order
    u: np.ndarray
    vt: np.ndarray
    vectors: np.ndarray  # (4, n): singular values, superdiagonal, two sets of reflector scales
    work: np.ndarray


@numba.njit(cache=True, nogil=True)
def pinv_work(n: int) -> PinvWork:
    """Allocate scratch for (n, n) matrices."""
    letters = np.empty(4, dtype=np.uint8)
    for i, letter in enumerate(b"ULNR"):
        letters[i] = letter
    integers = np.array([n, n - 1, 0, 0], dtype=np.int32)
    shape = n, n
    return PinvWork(
        integers, letters, np.empty(shape), np.empty(shape), np.empty(shape), np.empty((4, n)), np.empty(8 * n)
    )


@numba.njit(cache=True, nogil=True)
def pinv(matrix: np.ndarray, scratch: PinvWork) -> np.ndarray:
    """Pseudo-inverse of a finite (n, n) matrix, in Fortran order."""
    n = matrix.shape[0]
    a, u, vt = scratch.a, scratch.u, scratch.vt
    for j in range(n):
        for i in range(n):
            a[j, i] = matrix[i, j]
            u[j, i] = vt[j, i] = 1.0 if i == j else 0.0
    integers = scratch.integers.ctypes.data
    n_, less_, zero_, info_ = integers, integers + 4, integers + 8, integers + 12
    letters = scratch.letters.ctypes.data
    upper_, left_, plain_, right_ = letters, letters + 1, letters + 2, letters + 3
    row = 8 * n  # bytes
    s_ = scratch.vectors.ctypes.data
    e_, tauq_, taup_ = s_ + row, s_ + 2 * row, s_ + 3 * row
    a_, u_, vt_, work_ = a.ctypes.data, u.ctypes.data, vt.ctypes.data, scratch.work.ctypes.data
    dgebd2(n_, n_, a_, n_, s_, e_, tauq_, taup_, work_, info_)
    dbdsqr(upper_, n_, n_, n_, zero_, s_, e_, vt_, n_, u_, n_, u_, n_, work_, info_)
    dorm2r(left_, plain_, n_, n_, n_, a_, n_, tauq_, u_, n_, work_, info_)
    dorml2(right_, plain_, n_, less_, less_, a_ + row, n_, taup_, vt_ + row, n_, work_, info_)

    s = scratch.vectors[0]
    rank, cutoff = 1, s[0] * RCOND
    for k in range(n):
        if s[k] > cutoff:
            s[k] = 1.0 / s[k]
            rank = k + 1
    for i in range(n):
        for j in range(rank):
            vt[i, j] *= s[j]
    result = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            total = 0.0
            for k in range(rank):
                total = fma(vt[i, k], u[k, j], total)  # type: ignore[call-arg]
            result[j, i] = total
    return result.T
