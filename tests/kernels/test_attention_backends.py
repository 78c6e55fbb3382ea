import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.backends.cuda import SDPAParams
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, _registry, current_flash_attention_impl

from fastllama_kernels import attention, attention_backends
from fastllama_kernels.attention import attention_reference, attention_without_cudnn
from fastllama_kernels.attention_backends import (
    BACKENDS,
    Attention,
    AttentionShape,
    Backend,
    backends_for,
    fused_attention,
    pinned_sdpa,
    set_flash_implementation,
)
from tests.compare import (
    DTYPES,
    assert_as_exact_as,
    assert_operator_as_exact_as,
    outputs_and_gradients,
    randn,
)
from tests.kernels.gpu import host_wait_is_an_error

B, K = 2, 16
HEADS = [(4, 4), (4, 2), (3, 1)]
# Two sequences of 9 tokens, with documents of length 0 at the start, in the middle and as padding.
CU_SEQLENS = torch.tensor([0, 0, 2, 2, 9, 14, 15, 18, 18], dtype=torch.int32)
SHAPE = AttentionShape(
    batch_size=2,
    seq_len=128,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    dtype=torch.bfloat16,
    device=torch.device("cuda"),
)
NAMED = {backend.name: backend for backend in BACKENDS}


def qkv(
    n_queries: int,
    n_keys: int,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    width: int = K,
) -> list[Tensor]:
    shapes = [(n_queries, heads[0]), (n_keys, heads[1]), (n_keys, heads[1])]
    return [
        randn(B, *shape, width, seed=seed, dtype=dtype, device=device)
        for seed, shape in enumerate(shapes)
    ]


def document_by_document(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> Tensor:
    """A variable-length kernel that checks its arguments."""
    assert (cu_seqlens.dtype, cu_seqlens.dim()) == (torch.int32, 1)
    assert cu_seqlens.is_contiguous()
    starts = cu_seqlens.tolist()
    assert (starts[0], starts[-1]) == (0, len(q))
    lengths = [end - start for start, end in pairwise(starts)]
    assert min(lengths) >= 0
    assert max(lengths) <= max_seqlen
    parts = torch.zeros_like(q).split(lengths)
    out = [
        attention_reference(*(x[None, start:end] for x in (q, k, v)), causal=causal)[0]
        if end > start
        else empty
        for (start, end), empty in zip(pairwise(starts), parts, strict=True)
    ]
    return torch.cat(out)


def fake_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, with the arguments that we pass."""
    assert cu_seq_q is cu_seq_k
    assert max_q == max_k
    assert enable_gqa or query.shape[1] == key.shape[1]
    causal = {(-1, -1): False, (-1, 0): True}[window_size]
    return document_by_document(query, key, value, cu_seq_q, max_q, causal)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    causal: bool = False,
    deterministic: bool = False,
) -> Tensor:
    assert dropout_p == 0.0
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    return attention_reference(q, k, v, causal=causal)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    causal: bool = False,
    deterministic: bool = False,
) -> Tensor:
    assert cu_seqlens_q is cu_seqlens_k
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert (max_seqlen_q, dropout_p) == (max_seqlen_k, 0.0)
    return document_by_document(q, k, v, cu_seqlens_q, max_seqlen_q, causal)


def module(name: str, **attributes: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(attributes)
    return made


@pytest.fixture
def flash_attn_2(monkeypatch: pytest.MonkeyPatch) -> Attention:
    fake = module(
        "flash_attn",
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
    )
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    return NAMED["flash-attn-2"].load()


@pytest.fixture(params=["MATH", "FLASH_ATTENTION", "flash-attn-2"])
def operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attention:
    """Backends that run on a CPU, with a fake kernel if need be."""
    if request.param == "flash-attn-2":
        loaded: Attention = request.getfixturevalue("flash_attn_2")
        return loaded
    monkeypatch.setattr(attention_backends, "varlen_attn", fake_varlen_attn)
    monkeypatch.setattr(attention_backends, "_GROUPED", {"enable_gqa": True})
    return pinned_sdpa(getattr(SDPBackend, request.param))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("n_queries", "n_keys"), [(2, 2), (33, 33), (4, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(
    operator: Attention,
    dtype: torch.dtype,
    n_queries: int,
    n_keys: int,
    heads: tuple[int, int],
    causal: bool,
) -> None:
    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference(q, k, v, causal=causal)

    assert_operator_as_exact_as(
        lambda q, k, v: operator(q, k, v, causal=causal),
        reference,
        reference,
        qkv(n_queries, n_keys, heads, dtype),
    )


def test_flash_attn_2_gets_the_deterministic_mode(
    flash_attn_2: Attention, deterministic_mode: None
) -> None:
    inputs = qkv(9, 9, HEADS[0], DTYPES[0])
    # The fakes compare their argument with the mode.
    flash_attn_2(*inputs)
    flash_attn_2(*inputs, cu_seqlens=CU_SEQLENS)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_documents(
    operator: Attention, dtype: torch.dtype, heads: tuple[int, int], causal: bool
) -> None:
    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference(q, k, v, causal=causal, cu_seqlens=CU_SEQLENS)

    assert_operator_as_exact_as(
        lambda q, k, v: operator(q, k, v, causal=causal, cu_seqlens=CU_SEQLENS),
        reference,
        reference,
        qkv(9, 9, heads, dtype),
    )


def test_causal_by_default(operator: Attention) -> None:
    inputs = qkv(9, 9)
    for options in ({}, {"cu_seqlens": CU_SEQLENS}):
        torch.testing.assert_close(
            operator(*inputs, **options), attention_reference(*inputs, **options)
        )


@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS])
def test_views_of_packed_qkv(operator: Attention, cu_seqlens: Tensor | None) -> None:
    def on_packed(attention: Attention) -> Callable[[Tensor], Tensor]:
        return lambda x: attention(*x.split((4, 2, 2), dim=2), cu_seqlens=cu_seqlens)

    assert_operator_as_exact_as(
        on_packed(operator),
        on_packed(attention_reference),
        on_packed(attention_reference),
        [randn(B, 9, 8, K, seed=0, dtype=torch.float32, device="cpu")],
    )


def test_varlen_attn_without_enable_gqa(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def older(*arguments: Any, window_size: tuple[int, int]) -> Tensor:
        return fake_varlen_attn(*arguments, window_size=window_size, enable_gqa=True)

    monkeypatch.setattr(attention_backends, "varlen_attn", older)
    monkeypatch.setattr(attention_backends, "_GROUPED", {})
    inputs = qkv(9, 9)
    torch.testing.assert_close(
        pinned_sdpa(SDPBackend.MATH)(*inputs, cu_seqlens=CU_SEQLENS),
        attention_reference(*inputs, cu_seqlens=CU_SEQLENS),
    )


def fail_if_called(*arguments: Any) -> Tensor:
    raise AssertionError("a kernel was called")


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "cu_seqlens"),
    [(1, 9, None), (4, 9, None), (1, 1, None), (1, 1, torch.tensor([0, 1, 2]))],
)
def test_decoding_runs_on_the_reference(
    n_queries: int, n_keys: int, cu_seqlens: Tensor | None
) -> None:
    inputs = qkv(n_queries, n_keys)
    decode = fused_attention(dense=fail_if_called, packed=fail_if_called)
    out = decode(*inputs, cu_seqlens=cu_seqlens)
    assert torch.equal(out, attention_reference(*inputs, cu_seqlens=cu_seqlens))


class RecordGradient:
    """A dense entry point that records the layout of its upstream gradient."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = attention_reference(q, k, v, causal=causal)
        out.register_hook(self.record)
        return out

    def record(self, gradient: Tensor) -> None:
        self.strides, self.address = gradient.stride(), gradient.data_ptr()


def test_expanded_upstream_gradient_is_made_contiguous() -> None:
    kernel = RecordGradient()
    operator = fused_attention(dense=kernel, packed=fail_if_called)
    inputs = [x.requires_grad_() for x in qkv(9, 9)]
    row = randn(K, seed=3, dtype=torch.float32, device="cpu")
    for expanded in (row.expand(B, 9, 4, K), torch.ones(()).expand(B, 9, 4, K)):
        gradients = torch.autograd.grad(operator(*inputs), inputs, expanded)
        assert kernel.strides == (9 * 4 * K, 4 * K, K, 1)
        expected = torch.autograd.grad(operator(*inputs), inputs, expanded.contiguous())
        assert all(map(torch.equal, gradients, expected))


def test_contiguous_upstream_gradient_is_not_copied() -> None:
    kernel = RecordGradient()
    operator = fused_attention(dense=kernel, packed=fail_if_called)
    inputs = [x.requires_grad_() for x in qkv(9, 9)]
    upstream = randn(B, 9, 4, K, seed=3, dtype=torch.float32, device="cpu")
    torch.autograd.grad(operator(*inputs), inputs, upstream)
    assert kernel.address == upstream.data_ptr()


def enabled_kernels() -> set[str]:
    switches = torch.backends.cuda
    enabled = {
        "cudnn": switches.cudnn_sdp_enabled(),
        "flash": switches.flash_sdp_enabled(),
        "efficient": switches.mem_efficient_sdp_enabled(),
        "math": switches.math_sdp_enabled(),
    }
    return {name for name, is_enabled in enabled.items() if is_enabled}


class RecordCalls:
    """Replaces SDPA; records the enabled kernels of each call and whether it had a mask."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded: list[tuple[set[str], bool]] = []
        monkeypatch.setattr(F, "scaled_dot_product_attention", self)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        self.recorded.append((enabled_kernels(), attn_mask is not None))
        return torch.zeros_like(query)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (SDPBackend.CUDNN_ATTENTION, "cudnn"),
        (SDPBackend.FLASH_ATTENTION, "flash"),
        (SDPBackend.MATH, "math"),
    ],
)
def test_training_runs_on_the_pinned_kernel_without_a_mask(
    kernel: SDPBackend, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, before = RecordCalls(monkeypatch), enabled_kernels()
    pinned_sdpa(kernel)(*qkv(9, 9))
    assert calls.recorded == [({name}, False)]
    assert enabled_kernels() == before


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n_queries", "cu_seqlens"), [(1, None), (4, None), (9, None), (9, CU_SEQLENS)]
)
@pytest.mark.parametrize("pinned", [True, False])
def test_cudnn_gets_no_mask(
    pinned: bool,
    n_queries: int,
    cu_seqlens: Tensor | None,
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def varlen(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        assert enabled_kernels() == {"flash"}
        return torch.zeros_like(query)

    calls = RecordCalls(monkeypatch)
    monkeypatch.setattr(attention_backends, "varlen_attn", varlen)
    operator = pinned_sdpa(SDPBackend.CUDNN_ATTENTION) if pinned else attention
    operator(*qkv(n_queries, 9), causal=causal, cu_seqlens=cu_seqlens)
    assert calls.recorded or (pinned and cu_seqlens is not None)
    assert not any("cudnn" in kernels and masked for kernels, masked in calls.recorded)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("pinned", [True, False])
def test_cudnn_never_decodes(
    pinned: bool, n_queries: int, n_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = RecordCalls(monkeypatch)
    operator = pinned_sdpa(SDPBackend.CUDNN_ATTENTION) if pinned else attention
    operator(*qkv(n_queries, n_keys))
    ((kernels, _),) = calls.recorded
    assert ("cudnn" in kernels) == (n_queries == 9)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (1, 9), (4, 9), (9, 9)])
def test_attention_without_cudnn(
    n_queries: int, n_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, before = qkv(n_queries, n_keys), enabled_kernels()
    assert torch.equal(attention_without_cudnn(*inputs), attention_reference(*inputs))
    calls = RecordCalls(monkeypatch)
    attention_without_cudnn(*inputs)
    assert [kernels for kernels, _ in calls.recorded] == [before - {"cudnn"}]
    assert enabled_kernels() == before


def test_unsupported_kernel_raises() -> None:
    with pytest.raises(RuntimeError, match="No viable backend"):
        pinned_sdpa(SDPBackend.CUDNN_ATTENTION)(*qkv(9, 9))


# PyTorch warns when Dynamo instantiates an autograd.Function to trace it.
TRACES_FUNCTIONS = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)


def compiled(operator: Attention, **options: Any) -> Attention:
    torch.compiler.reset()
    # Inductor would need a C++ compiler; graph breaks show without it.
    made: Attention = torch.compile(
        lambda q, k, v: operator(q, k, v, **options),
        fullgraph=True,
        dynamic=False,
        backend="aot_eager",
    )
    return made


def assert_compiles(operator: Attention, inputs: list[Tensor], **options: Any) -> None:
    eager = outputs_and_gradients(lambda q, k, v: operator(q, k, v, **options), inputs)
    traced = outputs_and_gradients(compiled(operator, **options), inputs)
    assert all(map(torch.equal, eager, traced))


@TRACES_FUNCTIONS
@pytest.mark.parametrize(("n_queries", "n_keys"), [(9, 9), (1, 9), (4, 9)])
def test_compiles_in_one_graph(operator: Attention, n_queries: int, n_keys: int) -> None:
    assert_compiles(operator, qkv(n_queries, n_keys))


@pytest.mark.parametrize(
    ("n_queries", "cu_seqlens"), [(9, None), (1, None), (4, None), (9, CU_SEQLENS)]
)
def test_attention_compiles_in_one_graph(n_queries: int, cu_seqlens: Tensor | None) -> None:
    assert_compiles(attention, qkv(n_queries, 9), cu_seqlens=cu_seqlens)


@TRACES_FUNCTIONS
@pytest.mark.parametrize(("causal", "window"), [(True, (-1, 0)), (False, (-1, -1))])
def test_packed_documents_compile_in_one_graph(causal: bool, window: tuple[int, int]) -> None:
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        # The kernel does not run on a CPU; the graph must contain PyTorch's function.
        graphs.append(graph)
        return lambda *arguments: (torch.zeros(B, 9, 4, K),)

    torch.compiler.reset()
    torch.compile(pinned_sdpa(SDPBackend.CUDNN_ATTENTION), fullgraph=True, backend=record)(
        *qkv(9, 9, dtype=torch.bfloat16), causal=causal, cu_seqlens=CU_SEQLENS
    )
    (graph,) = graphs
    (call,) = [node for node in graph.graph.nodes if "varlen_attn" in str(node.target)]
    given = dict(
        zip((x.name for x in call.target.default._schema.arguments), call.args, strict=False)
    )
    assert (given["max_q"], given["max_k"], given["is_causal"]) == (9, 9, causal)
    assert tuple(given["window_size"]) == window
    cu_seqlens = given["cu_seq_q"]
    assert cu_seqlens is given["cu_seq_k"]
    assert cu_seqlens.meta["example_value"].shape == (CU_SEQLENS.numel(),)
    assert given["query"].meta["example_value"].shape == (B * 9, 4, K)


class Handle:
    def __init__(self, override: library.Library | None = None) -> None:
        self.override = override

    def remove(self) -> None:
        self.override = None


@pytest.fixture
def fake_implementations(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("FA3", "FA4"):
        monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, name, Handle)
    yield
    set_flash_implementation(None)


@pytest.mark.usefixtures("fake_implementations", "flash_attn_2")
def test_load_sets_the_flash_implementation() -> None:
    expected = {"flash-attn-3": "FA3", "flash-attn-4": "FA4"}
    for backend in BACKENDS:
        for before in ("FA3", "FA4", None):
            set_flash_implementation(before)
            backend.load()
            assert current_flash_attention_impl() == expected.get(backend.name)


def test_flash_implementation_is_replaced_and_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kernel(query: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return torch.full_like(query, 7.0), query.new_zeros(query.shape[:3])

    def register() -> Handle:
        # PyTorch warns once per process, perhaps at its import; this warns every time.
        warnings.warn(
            "Warning only once\n  Overriding a previously registered kernel", stacklevel=1
        )
        override = library.Library("aten", "IMPL", "CPU")
        override.impl("_scaled_dot_product_flash_attention_for_cpu", kernel, "CPU")
        return Handle(override)

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", register)
    inputs = qkv(9, 9)
    truth = NAMED["flash"].load()(*inputs)
    assert (NAMED["flash-attn-3"].load()(*inputs) == 7.0).all()
    assert torch.equal(NAMED["flash"].load()(*inputs), truth)


def test_missing_implementation_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(ModuleNotFoundError):
        NAMED["flash-attn-3"].load()
    assert current_flash_attention_impl() is None


def with_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.fixture
def hopper_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    with_capability(monkeypatch, (9, 0))
    monkeypatch.setattr(
        attention_backends, "_pytorch_unsupported_reason", lambda shape, can_use: None
    )
    attributes = {"flash_attn_func": None, "_flash_attn_fwd": None}
    for name in (
        "flash_attn_interface",
        "flash_attn",
        "flash_attn.cute",
        "flash_attn.cute.interface",
    ):
        monkeypatch.setitem(sys.modules, name, module(name, **attributes))


@pytest.mark.usefixtures("hopper_with_everything")
def test_every_backend_is_supported_on_hopper() -> None:
    unsupported = {backend.name: backend.unsupported_reason(SHAPE) for backend in BACKENDS}
    assert unsupported.pop("matmul") == "it is for CPUs, not cuda"
    assert set(unsupported.values()) == {None}


*FUSED, _MATMUL, _REFERENCE = BACKENDS


@pytest.mark.usefixtures("hopper_with_everything")
@pytest.mark.parametrize("backend", FUSED, ids=lambda backend: backend.name)
def test_unsupported_shapes(backend: Backend) -> None:
    for changed, clause in (
        ({"device": torch.device("cpu")}, "it needs a CUDA device, not cpu"),
        ({"dtype": torch.float32}, "it takes bfloat16 and float16, not float32"),
        ({"head_dim": 36}, "not 36"),
        ({"head_dim": 264}, "not 264"),
    ):
        unsupported_reason = backend.unsupported_reason(replace(SHAPE, **changed))
        assert unsupported_reason is not None
        assert clause in unsupported_reason
    assert backend.unsupported_reason(replace(SHAPE, dtype=torch.float16, head_dim=96)) is None


@pytest.mark.usefixtures("hopper_with_everything")
def test_cudnn_does_not_support_head_dim_256() -> None:
    able = [x.name for x in FUSED if x.unsupported_reason(replace(SHAPE, head_dim=256)) is None]
    assert able == ["flash-attn-3", "flash-attn-4", "flash-attn-2", "flash"]
    assert NAMED["cudnn"].unsupported_reason(replace(SHAPE, head_dim=128)) is None


@pytest.mark.usefixtures("hopper_with_everything")
@pytest.mark.parametrize(("width", "unable"), [(128, {"cudnn"}), (192, {"cudnn", "flash-attn-4"})])
def test_backends_without_packed_documents(width: int, unable: set[str]) -> None:
    packed = replace(SHAPE, head_dim=width, n_documents=16)
    refused = {x.name for x in FUSED if x.unsupported_reason(packed) is not None}
    assert refused == unable


@pytest.mark.usefixtures("hopper_with_everything")
@pytest.mark.parametrize(
    ("capability", "able"),
    [
        ((7, 5), []),
        ((8, 0), ["flash-attn-2", "cudnn", "flash"]),
        ((8, 9), ["flash-attn-2", "cudnn", "flash"]),
        ((9, 0), ["flash-attn-3", "flash-attn-4", "flash-attn-2", "cudnn", "flash"]),
        ((10, 0), ["flash-attn-4", "flash-attn-2", "cudnn", "flash"]),
        ((11, 0), ["flash-attn-2", "cudnn", "flash"]),
        ((12, 0), ["flash-attn-2", "cudnn", "flash"]),
    ],
)
def test_compute_capability(
    capability: tuple[int, int], able: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_capability(monkeypatch, capability)
    assert [backend.name for backend in FUSED if backend.unsupported_reason(SHAPE) is None] == able
    missing = [backend for backend in FUSED if backend.name not in able]
    clause = "it has no kernels for compute capability {}.{}".format(*capability)
    assert {backend.unsupported_reason(SHAPE) for backend in missing} <= {clause}


@pytest.mark.parametrize("name", ["flash-attn-3", "flash-attn-4", "flash-attn-2"])
def test_missing_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_capability(monkeypatch, (9, 0))
    for imported in ("flash_attn_interface", "flash_attn"):
        # None makes the import fail as if the package were missing.
        monkeypatch.setitem(sys.modules, imported, None)
    unsupported_reason = NAMED[name].unsupported_reason(SHAPE)
    assert unsupported_reason is not None
    assert "is not installed (" in unsupported_reason


def test_flash_attention_4_alone_is_not_flash_attention_2(monkeypatch: pytest.MonkeyPatch) -> None:
    with_capability(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", module("flash_attn"))
    assert NAMED["flash-attn-2"].unsupported_reason(SHAPE) == (
        "the package flash_attn is not installed "
        "(pip install --no-build-isolation 'fastllama[flash]')"
    )


@pytest.mark.parametrize(
    ("error", "clause"),
    [
        (ImportError("undefined symbol: x\nmore"), "ImportError: undefined symbol: x)"),
        (ModuleNotFoundError("No module named 'cutlass'", name="cutlass"), "'cutlass')"),
        (OSError("libcudart.so.12"), "OSError: libcudart.so.12)"),
    ],
)
def test_broken_package(error: Exception, clause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error

    with_capability(monkeypatch, (9, 0))
    monkeypatch.setattr(attention_backends, "import_module", fail)
    for name in ("flash-attn-3", "flash-attn-4", "flash-attn-2"):
        unsupported_reason = NAMED[name].unsupported_reason(SHAPE)
        assert unsupported_reason is not None
        assert "cannot be imported (" in unsupported_reason
        assert unsupported_reason.endswith(clause)


def test_pytorch_is_asked_about_the_shape() -> None:
    asked = []

    def can_use(params: SDPAParams, debug: bool) -> bool:
        asked.append(params)
        assert debug
        return True

    shape = replace(SHAPE, device=torch.device("cpu"))
    assert attention_backends._pytorch_unsupported_reason(shape, can_use) is None
    (params,) = asked
    assert params.query.shape == (2, 4, 128, 64)
    assert params.key.shape == params.value.shape == (2, 2, 128, 64)
    assert {x.stride(-1) for x in (params.query, params.key, params.value)} == {1}
    assert {x.dtype for x in (params.query, params.key, params.value)} == {torch.bfloat16}
    assert params.query.requires_grad
    assert (params.attn_mask, params.dropout) == (None, 0.0)
    assert params.is_causal
    assert params.enable_gqa


def test_pytorch_unsupported_reason() -> None:
    def can_use(params: SDPAParams, debug: bool) -> bool:
        warnings.warn("cuDNN SDPA is not deterministic. (Triggered internally at x)", stacklevel=1)
        return False

    shape = replace(SHAPE, device=torch.device("cpu"))
    assert attention_backends._pytorch_unsupported_reason(shape, can_use) == (
        "PyTorch refuses it (cuDNN SDPA is not deterministic.)"
    )


def test_pytorch_is_asked_about_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with_capability(monkeypatch, (9, 0))
    monkeypatch.setattr(
        attention_backends, "_pytorch_unsupported_reason", lambda shape, can_use: can_use.__name__
    )
    assert NAMED["cudnn"].unsupported_reason(SHAPE) == "can_use_cudnn_attention"
    assert NAMED["flash"].unsupported_reason(SHAPE) == "can_use_flash_attention"


def test_pytorch_does_not_support_the_cpu() -> None:
    shape = replace(SHAPE, device=torch.device("cpu"))
    unsupported_reason = attention_backends._pytorch_unsupported_reason(
        shape, torch.backends.cuda.can_use_flash_attention
    )
    assert unsupported_reason is not None
    assert unsupported_reason.startswith("PyTorch refuses it (")


@pytest.mark.parametrize(
    ("device", "capability", "first"),
    [
        ("cuda", (8, 9), "flash"),
        ("cuda", (9, 0), "cudnn"),
        ("cuda", (12, 0), "cudnn"),
        ("cpu", None, "cudnn"),
    ],
)
def test_order_of_backends(
    device: str, capability: Any, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_capability(monkeypatch, capability)
    order = [backend.name for backend in backends_for(torch.device(device))]
    assert sorted([*order, "matmul"]) == sorted(NAMED)
    assert order[:3] == ["flash-attn-3", "flash-attn-4", "flash-attn-2"]
    assert order[3] == first
    assert order[-1] == "reference"


def load_or_skip(backend: Backend, **changes: Any) -> Attention:
    shape = replace(SHAPE, batch_size=B, **changes)
    unsupported_reason = backend.unsupported_reason(shape)
    if unsupported_reason is not None:
        pytest.skip(f"{backend.name}: {unsupported_reason}")
    return backend.load()


def assert_exact_on_gpu(
    operator: Attention, plain: Attention, inputs: list[Tensor], **options: Any
) -> None:
    def with_options(attention: Attention) -> Attention:
        return lambda *x: attention(*x, **options)

    assert_operator_as_exact_as(
        with_options(operator), with_options(plain), with_options(plain), inputs
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", FUSED, ids=lambda backend: backend.name)
class TestOnGpu:
    @pytest.fixture(autouse=True)
    def restore_flash_implementation(self) -> Any:
        yield
        set_flash_implementation(None)

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("heads", [(4, 4), (8, 2), (3, 1)])
    @pytest.mark.parametrize("width", [64, 96, 128])
    def test_matches_reference(
        self, backend: Backend, width: int, heads: tuple[int, int], causal: bool
    ) -> None:
        n_heads, n_kv_heads = heads
        operator = load_or_skip(backend, head_dim=width, n_heads=n_heads, n_kv_heads=n_kv_heads)
        for seq_len in (1, 2, 63, 64, 65, 127, 128, 192, 257):
            inputs = qkv(seq_len, seq_len, heads, torch.bfloat16, "cuda", width)
            assert_exact_on_gpu(operator, attention, inputs, causal=causal)

    @pytest.mark.parametrize("n_queries", [1, 7, 64])
    def test_decoding(self, backend: Backend, n_queries: int) -> None:
        operator = load_or_skip(backend)
        inputs = qkv(n_queries, 64, (4, 2), torch.bfloat16, "cuda", 64)
        assert_exact_on_gpu(operator, attention, inputs)

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
    @pytest.mark.parametrize("starts", [[0, 0, 2, 2, 200], [0, 1, 128, 129, 200]])
    def test_packed_documents(
        self, backend: Backend, starts: list[int], heads: tuple[int, int], causal: bool
    ) -> None:
        operator = load_or_skip(backend, seq_len=200)
        cu_seqlens = torch.tensor([*starts, *[400] * 20], dtype=torch.int32)
        inputs = qkv(200, 200, heads, torch.bfloat16, "cuda", 64)
        assert_exact_on_gpu(
            operator, attention, inputs, causal=causal, cu_seqlens=cu_seqlens.cuda()
        )

    @pytest.mark.parametrize("expand", [(0, 0, 0, 0), (0, 0, 0, 1), (1, 0, 1, 1)])
    def test_expanded_upstream_gradient(self, backend: Backend, expand: tuple[int, ...]) -> None:
        operator = load_or_skip(backend)
        inputs = [x.requires_grad_() for x in qkv(128, 128, (4, 2), torch.bfloat16, "cuda", 64)]
        size = (B, 128, 4, 64)
        kept = [length if keep else 1 for length, keep in zip(size, expand, strict=True)]
        upstream = randn(*kept, seed=3, dtype=torch.bfloat16, device="cuda").expand(size)
        gradients = torch.autograd.grad(operator(*inputs), inputs, upstream)
        plain = torch.autograd.grad(attention(*inputs), inputs, upstream.contiguous())
        wide = [x.detach().double().requires_grad_() for x in inputs]
        truth = torch.autograd.grad(attention(*wide), wide, upstream.double())
        for compared in zip(gradients, plain, truth, strict=True):
            assert_as_exact_as(*compared)

    def test_views_of_packed_qkv(self, backend: Backend) -> None:
        operator = load_or_skip(backend)

        def on_packed(attention: Attention) -> Callable[[Tensor], Tensor]:
            return lambda x: attention(*x.split((4, 2, 2), dim=2))

        assert_operator_as_exact_as(
            on_packed(operator),
            on_packed(attention),
            on_packed(attention),
            [randn(B, 128, 8, 64, seed=0, dtype=torch.bfloat16, device="cuda")],
        )

    @TRACES_FUNCTIONS
    @pytest.mark.parametrize("packed", [False, True])
    def test_compiles_in_one_graph(self, backend: Backend, packed: bool) -> None:
        operator = load_or_skip(backend)
        cu_seqlens = torch.tensor([0, 5, 128, 256, 256], dtype=torch.int32, device="cuda")
        inputs = qkv(128, 128, (4, 2), torch.bfloat16, "cuda", 64)
        assert_exact_on_gpu(
            compiled(operator, cu_seqlens=cu_seqlens if packed else None),
            lambda q, k, v: attention(q, k, v, cu_seqlens=cu_seqlens if packed else None),
            inputs,
        )

    @pytest.mark.parametrize("packed", [False, True])
    def test_host_never_waits(self, backend: Backend, packed: bool) -> None:
        operator = load_or_skip(backend)
        cu_seqlens = torch.tensor([0, 5, 128, 256, 256], dtype=torch.int32, device="cuda")
        inputs = [x.requires_grad_() for x in qkv(128, 128, (4, 2), torch.bfloat16, "cuda", 64)]
        options = {"cu_seqlens": cu_seqlens} if packed else {}
        torch.autograd.grad(operator(*inputs, **options), inputs, inputs[0].detach())
        with host_wait_is_an_error():
            torch.autograd.grad(operator(*inputs, **options), inputs, inputs[0].detach())
