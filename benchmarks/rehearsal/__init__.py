"""The CUDA step without a GPU: every launch, byte, matmul, collective and wait, counted.

PyTorch's own CUDA build runs on null CUDA libraries (`null_cuda/`): memory is address space, and
kernels do nothing. All else is real: PyTorch's allocator, autograd, FSDP2, Inductor, Triton's
compiler and launcher, cuBLAS's and NCCL's call sites. docs/rehearsal.md has the details.
"""
