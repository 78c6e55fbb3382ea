"""Measurements. Where there is no GPU they are rehearsed, with the kernels in the interpreter."""

import os

import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which what is in this package does after this.
    os.environ.setdefault("TRITON_INTERPRET", "1")
