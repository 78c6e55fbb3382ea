"""Every kernel of an update: its class, what it moves, and why it runs.

Bytes are counted, from the docstrings of our operators, from the size of a launch, or from the
shapes of the recipe. Symbols as in fastllama/model/llama.py; b is the width of an element of
`training.dtype`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.rehearsal.log import CUDA_TYPES, NCCL_TYPES, WIDTHS, Call
from fastllama.config import Config
from fastllama.planning.flops import n_parameters
from fastllama_kernels.linear_cross_entropy import SCALED_BLOCK, chunk_length
from fastllama_kernels.rms_norm import programs_per_multiprocessor

VECTORIZED, UNROLLED = 1024, 512
"""Elements of a block of PyTorch's elementwise kernels."""
MULTIPROCESSORS = 132
"""Of the null device, an H100."""


@dataclass(frozen=True)
class Shape:
    """The sizes that formulas use, of one rank and one micro-batch."""

    N: int
    D: int
    F: int
    V: int
    H: int
    G: int
    K: int
    b: int
    n_shard: int
    """Parameters of a rank."""
    n_units: int
    """Modules that FSDP2 gathers by themselves."""
    n_recomputed: int
    """Outputs that the backward of a norm, or of SwiGLU, recomputes: 1 or 0."""

    @staticmethod
    def of(config: Config, n_ranks: int) -> "Shape":
        model, training = config.model, config.training
        return Shape(
            N=training.batch_size * model.max_seq_len,
            D=model.n_embd,
            F=model.ffn_width,
            V=model.vocab_size,
            H=model.n_heads,
            G=model.kv_heads,
            K=model.head_width,
            b=2 if training.dtype == "bfloat16" else 4,
            n_shard=n_parameters(model) // (n_ranks // config.parallel.replicate),
            n_units=model.n_layers + (1 if model.tied_embeddings else 2),
            n_recomputed=0 if training.save_projection_inputs else 1,
        )


Formula = Callable[[Shape, Call], float]


@dataclass(frozen=True)
class Kernel:
    """Kernels whose names match a pattern."""

    pattern: str
    operator_class: str
    moved: Formula
    """Bytes that a launch reads and writes."""
    reason: str
    largest: float = math.inf
    """Most blocks of a launch; a larger one is another kernel's row."""
    together: bool = False
    """Whether `moved` counts all launches of an update, however many there are."""


def per_element(n_bytes: float, block: int) -> Formula:
    """A formula for a kernel that handles `block` elements in each of its blocks."""
    return lambda s, call: n_bytes * block * call.number("grid")


def per_block(n_bytes: float) -> Formula:
    """A formula for a kernel of which each block moves as many bytes."""
    return lambda s, call: n_bytes * call.number("grid")


def nothing(s: Shape, call: Call) -> float:
    """A few numbers."""
    return 0


def _scaled(s: Shape, call: Call) -> float:
    n_elements = call.number("grid") * SCALED_BLOCK
    is_weight = abs(n_elements - s.V * s.D) < abs(n_elements - s.N * s.D)
    return n_elements * (12 if is_weight else 2 * s.b)


def _matmul(s: Shape, call: Call) -> float:
    m, n, k, batch = (call.number(key) for key in ("m", "n", "k", "batch"))
    a, b, c = (WIDTHS[CUDA_TYPES[call.number(key)]] for key in "abc")
    reads = 2 if call.values["beta"] != "0" else 1
    return batch * (m * k * a + k * n * b + reads * m * n * c)


def _memcpy(s: Shape, call: Call) -> float:
    return call.number("bytes") * (2 if call.name == "D2D" else 1)


def _collective(s: Shape, call: Call) -> float:
    return call.number("count") * WIDTHS[NCCL_TYPES[call.number("type")]]


SMALL = 16
"""Most blocks of a launch over a few numbers, or over the weight of a norm."""

KERNELS = (
    Kernel("matmul", "matmul", _matmul, "projections and their gradients"),
    Kernel(
        "flash_fwd_kernel",
        "attention",
        lambda s, c: 2 * s.N * (s.H + s.G) * s.K * s.b + 4 * s.N * s.H,
        "forward",
    ),
    Kernel(
        "flash_bwd_dot_do_o",
        "attention",
        lambda s, c: 2 * s.N * s.H * s.K * s.b + 4 * s.N * s.H * (s.K + 1),
        "row sums of do * o; zeroes dq, a float32 sum",
    ),
    Kernel(
        "flash_bwd_dq_dk_dv",
        "attention",
        lambda s, c: s.N * s.K * (2 * (s.H + s.G) * s.b + 8 * s.H + 2 * s.H * s.b),
        "backward; dk and dv for each query head",
    ),
    Kernel(
        "flash_bwd_convert_dq", "attention", lambda s, c: s.N * s.H * s.K * (4 + s.b), "rounds dq"
    ),
    Kernel(
        "_rms_norm_fwd_kernel",
        "rms_norm",
        lambda s, c: 4 * s.N * s.D * s.b,
        "with the residual add",
    ),
    Kernel(
        "_rms_norm_bwd_kernel",
        "rms_norm",
        lambda s, c: (4 + s.n_recomputed) * s.N * s.D * s.b,
        "with the stream's gradient; recomputes y, unless it is saved",
    ),
    Kernel(
        "reduce_kernel<ReduceOp, sum_functor, BFloat16",
        "attention",
        lambda s, c: s.N * (s.H + s.G) * s.K * s.b,
        "sums dk or dv over the query heads of a group",
    ),
    Kernel(
        "_rms_norm_dweight_kernel",
        "rms_norm",
        lambda s, c: 4 * MULTIPROCESSORS * programs_per_multiprocessor(s.D) * s.D,
        "sums the partial weight gradients",
    ),
    Kernel(
        "_rope_kernel",
        "rope",
        lambda s, c: 2 * s.N * (s.H + s.G) * s.K * s.b,
        "rotates q and k in place",
    ),
    Kernel(
        "_rope_bwd_kernel",
        "rope",
        lambda s, c: 2 * s.N * (s.H + 2 * s.G) * s.K * s.b,
        "rotates back, and packs",
    ),
    Kernel("_swiglu_fwd_kernel", "swiglu", lambda s, c: 3 * s.N * s.F * s.b, "silu(gate) * up"),
    Kernel(
        "_swiglu_bwd_kernel",
        "swiglu",
        lambda s, c: (5 + s.n_recomputed) * s.N * s.F * s.b,
        "gradients; recomputes silu(gate) * up, unless it is saved",
    ),
    Kernel(
        "_cross_entropy_fwd_kernel",
        "cross_entropy",
        # Its programs may be fewer than its rows.
        lambda s, c: 2 * s.V * s.b * s.N // math.ceil(s.N / chunk_length(s.N, s.V, s.b)),
        "loss of a chunk; its gradient overwrites the logits",
    ),
    Kernel(
        "_scaled_kernel",
        "cross_entropy",
        _scaled,
        "both gradients of the loss, by the upstream one",
    ),
    Kernel(
        "reduce_kernel<ReduceOp, sum_functor, float",
        "cross_entropy",
        lambda s, c: 4 * s.N,
        "sums losses",
    ),
    Kernel(
        "vectorized_elementwise_kernel<AUnaryFunctor, CompareEqFunctor, long",
        "cross_entropy",
        per_element(9, VECTORIZED),
        "finds ignored targets",
    ),
    Kernel(
        "unrolled_elementwise_kernel<direct_copy_kernel_cuda, long",
        "cross_entropy",
        per_element(9, UNROLLED),
        "counts them as integers",
    ),
    Kernel(
        "(fused_dropout|triton_poi_fused_.*native_dropout)",
        "dropout",
        lambda s, c: s.N * s.D * (2 * s.b + 1),
        "draws and applies a mask",
    ),
    Kernel(
        "vectorized_elementwise_kernel<bool, BFloat16",
        "dropout",
        lambda s, c: s.N * s.D * (2 * s.b + 1),
        "masks the gradient",
    ),
    Kernel(
        "distribution_elementwise_grid_stride_kernel",
        "dropout",
        nothing,
        "seeds of Inductor's masks",
    ),
    Kernel(
        "vectorized_gather_kernel", "embedding", lambda s, c: 2 * s.N * s.D * s.b, "looks tokens up"
    ),
    Kernel(
        "at_cuda_detail|elementwise_kernel_with_index|krn_|compute_num_of",
        "embedding",
        lambda s, c: (32 if "Onesweep" in c.name else 8) * s.N,
        "sorts tokens, to sum gradients of equal ones in a fixed order",
    ),
    Kernel(
        "compute_grad_weight",
        "embedding",
        lambda s, c: s.N * s.D * s.b,
        "sums gradients of equal tokens",
    ),
    Kernel(
        "sum_and_scatter",
        "embedding",
        lambda s, c: s.N * s.D * s.b,
        "writes the sums to their rows",
    ),
    Kernel(
        "vectorized_elementwise_kernel<FillFunctor, BFloat16",
        "embedding",
        per_element(2, VECTORIZED),
        "zeroes the embedding's gradient",
    ),
    Kernel(
        "vectorized_elementwise_kernel<FillFunctor, float",
        "accumulation",
        per_element(4, VECTORIZED),
        "zeroes sums of weight gradients",
    ),
    Kernel(
        "unrolled_elementwise_kernel<CUDAFunctor_add, float",
        "accumulation",
        per_element(10, UNROLLED),
        "adds gradients of norms and embedding to their sums",
    ),
    Kernel(
        "unrolled_elementwise_kernel<direct_copy_kernel_cuda, float",
        "accumulation",
        per_element(6, UNROLLED),
        "begins these sums",
    ),
    Kernel(
        "vectorized_elementwise_kernel<CUDAFunctor_add, float",
        "accumulation",
        per_element(12, VECTORIZED),
        "sums gradients in shards",
    ),
    Kernel(
        "triton_poi_fused_(add|rms_norm_bwd_zeros)",
        "accumulation",
        lambda s, c: 3 * s.N * s.D * s.b,
        "the stream's two gradients in the first block",
    ),
    Kernel(
        "vectorized_elementwise_kernel<CUDAFunctor_add, BFloat16",
        "accumulation",
        per_element(6, VECTORIZED),
        "the same, and sums of gradients in bfloat16",
    ),
    Kernel(
        "multi_tensor_apply_kernel<FusedOptimizer",
        "optimizer",
        lambda s, c: 28 * s.n_shard,
        "AdamW",
        together=True,
    ),
    Kernel(
        "multi_tensor_apply_kernel<.*LpNorm",
        "optimizer",
        lambda s, c: 4 * s.n_shard,
        "norm of the gradients",
        together=True,
    ),
    Kernel(
        "multi_tensor_apply_kernel<.*TernaryOp",
        "optimizer",
        lambda s, c: 12 * s.n_shard,
        "average of the weights",
        together=True,
    ),
    Kernel(
        "vectorized_elementwise_kernel<bfloat16_copy_kernel_cuda, float",
        "fsdp",
        per_element(6, VECTORIZED),
        "casts parameters",
    ),
    Kernel(
        "multi_tensor_apply_kernel<.*CopyFunctor",
        "fsdp",
        lambda s, c: 6 * s.n_shard / s.n_units,
        "casts shards",
    ),
    Kernel(
        "multi_tensor_apply_kernel<.*UnaryOpFunctor",
        "fsdp",
        lambda s, c: 4 * s.n_shard / s.n_units,
        "copies shards into a gather's input",
    ),
    Kernel(
        "split_with_sizes_copy",
        "fsdp",
        per_block(2 * 128 * 32),
        "copies parameters out of a gather",
    ),
    Kernel(
        "chunk_cat_cuda_kernel<float, BFloat16",
        "fsdp",
        per_block(1.5 * 128 * 16),
        "casts gradients into a reduction's input",
    ),
    Kernel(
        "chunk_cat_cuda_kernel",
        "fsdp",
        per_block(2 * 128 * 16),
        "copies gradients into a reduction's input",
    ),
    Kernel("(D2D|H2D)", "fsdp", _memcpy, "copies of a group of one, and addresses of tensors"),
    Kernel(
        "(AllGather|ReduceScatter|AllReduce)",
        "collectives",
        _collective,
        "FSDP2, and means over ranks",
    ),
    Kernel("memset", "numbers", lambda s, c: c.number("bytes"), "counters of sums and sorts"),
    Kernel("multi_tensor_apply_kernel<.*Binary", "numbers", nothing, "AdamW's step counts"),
    Kernel(
        "(lpnorm_cleanup|CatArrayBatchedCopy)",
        "numbers",
        nothing,
        "norms of all parameters, together",
    ),
    Kernel(
        "(vectorized_elementwise|unrolled_elementwise|elementwise|reduce|triton)",
        "numbers",
        nothing,
        "loss, norm, clipping, count of targets",
        SMALL,
    ),
)
"""Every kernel, by the first pattern that its name begins with."""


def kernel_of(call: Call) -> Kernel | None:
    """The row of a launch, copy or collective; None for one that nobody has given a reason for."""
    blocks = int(call.values.get("grid", 0))
    for kernel in KERNELS:
        if blocks <= kernel.largest and re.match(kernel.pattern, call.name_or_kind):
            return kernel
    return None


def moved_bytes(calls: Iterable[Call], config: Config, n_ranks: int) -> Counter[str]:
    """Bytes that an update moves, by class."""
    shape = Shape.of(config, n_ranks)
    moved: Counter[str] = Counter()
    counted = set()
    for call in calls:
        kernel = kernel_of(call) if call.runs_on_device else None
        if kernel is None or (kernel.together and kernel in counted):
            continue
        counted.add(kernel)
        moved[kernel.operator_class] += round(kernel.moved(shape, call))
    return moved
