"""What is mended in Triton's interpreter, and not in kernels that are right on hardware.

Its matrix product gets to be the same at every place of a tile; the one of triton 3.5 runs with numpy 2.4, and its
maximum of NaN and a number is the number.
"""

from __future__ import annotations

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_patch_tensor = interpreter._patch_lang_tensor
_theirs = InterpreterBuilder.create_dot


def _dot(self, a, b, d, *options):
    """`tl.dot` of fp32 tiles (what kernels multiply when interpreted) without BLAS.

    `numpy.matmul` calls BLAS, which adds in another order at the edge of its own blocks: with it equal rows have
    unequal products, and the cosine of i and j is not that of j and i, on some processors and not on others.
    """
    if not (a.dtype.scalar.is_fp32() and b.dtype.scalar.is_fp32()):
        return _theirs(self, a, b, d, *options)
    return TensorHandle(np.einsum("ik,kj->ij", a.data, b.data) + d.data, d.dtype.scalar)


InterpreterBuilder.create_dot = _dot
InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def _patched(tensor, *scope):
    """A scalar is an array of one element there, which numpy 2.4 takes for no integer (triton issue 9171)."""
    _patch_tensor(tensor, *scope)
    if not scope:  # releases that have a scope have the mend too
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())


interpreter._patch_lang_tensor = _patched
