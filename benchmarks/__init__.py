"""Benchmarks. Without a GPU they run as a rehearsal: toy sizes, kernels in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported. The modules of this package import it later.
    os.environ.setdefault("TRITON_INTERPRET", "1")
