"""The five operations for CUDA tensors, written in Triton; each page's contract stands on its plain page one floor up.

Pages are imported at the call, where `takes` says so, so that `sae.kernels` needs no Triton. Every kernel loads, then
works in float32, and rounds where it says so: Triton's interpreter, which the tests use, is right in float32 only.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


def takes(tensor: Tensor) -> bool:
    """Whether these kernels work on `tensor`: on CUDA, with Triton installed, and no autograd to follow."""
    return tensor.is_cuda and _installed() and not (tensor.requires_grad and torch.is_grad_enabled())


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
