"""What the compiled kernels issue and move, counted without a GPU: python -m benchmarks.counts."""
