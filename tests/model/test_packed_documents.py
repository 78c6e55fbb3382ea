"""Documents packed into sequences train as if each was alone."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend

from fastllama.config import Config, TrainingConfig
from fastllama.model.activation_checkpointing import checkpoint_activations
from fastllama.model.llama import Llama
from fastllama.model.reference import ReferenceLlama
from fastllama_kernels import CPU, REFERENCE, TRITON, Operators, attention_backends
from fastllama_kernels.attention_backends import pinned_sdpa
from tests.compare import DEVICE, assert_as_exact_as
from tests.kernels.small_model import GROUPED, loss_and_gradients, random_tokens, small_model
from tests.kernels.test_attention_backends import fake_varlen_attn
from tests.model.test_activation_checkpointing import BACKEND as PARTITIONED

B, T, LENGTH = 2, 8, 20
"""Sequences, their tokens, and the fixed length of cu_seqlens."""

# Documents of no tokens are two borders at one place.
STARTS = {
    "a token alone": [1, 3, 4],
    "all tokens alone": list(range(B * T)),
    "empty": [3, 3, 8, 8, 11, 16],
    "longer than a sequence": [5, 14],
}


def cu_seqlens_of(starts: Sequence[int]) -> Tensor:
    """Borders of the documents, among them those of the sequences, padded to LENGTH."""
    borders = sorted([*starts, *range(0, B * T, T)])
    return torch.tensor(borders + [B * T] * (LENGTH - len(borders)), dtype=torch.int32).to(DEVICE)


def apart(
    model: nn.Module, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (B * T, V), and the loss as the mean over tokens, of documents run one by one."""
    logits = [
        model(tokens.flatten()[None, start:end])[0]
        for start, end in pairwise(cu_seqlens.tolist())
        if end > start
    ]
    joined = torch.cat(logits)
    wide = joined.to(torch.promote_types(joined.dtype, torch.float32))
    return joined, nn.functional.cross_entropy(wide, targets.flatten())


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def truth_of(model: Llama, *batch: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of the LLaMA of the papers, document by document in float64."""
    reference = ReferenceLlama(GROUPED).to(DEVICE).double()
    reference.load_packed(dict(model.named_parameters()))
    logits, loss = apart(reference, *batch)
    separate = gradients(reference, loss)
    return (
        logits.detach(),
        loss.detach(),
        {
            name: torch.cat([separate[part] for part in parts])
            for name, parts in reference.packed_names().items()
        },
    )


def assert_packed_as_apart(operators: Operators, dtype: torch.dtype, starts: Sequence[int]) -> None:
    """Compare packed documents with the same model on each alone; float64 is the truth."""
    cu_seqlens = cu_seqlens_of(starts)
    batch = (*random_tokens(GROUPED, 2, B, T), cu_seqlens)
    model = small_model(GROUPED, operators, dtype)
    plain = small_model(GROUPED, REFERENCE, dtype)
    logits, loss, exact = truth_of(model, *batch)

    alone, alone_loss = apart(plain, *batch)
    packed = model(batch[0], cu_seqlens=cu_seqlens).flatten(0, 1)
    assert_as_exact_as(packed.detach(), alone.detach(), logits)

    packed_loss = model(*batch[:2], cu_seqlens=cu_seqlens)
    # The error of one number can be 0 by luck, so its eps is that of the dtype of the model.
    assert_as_exact_as(*(x.detach().to(dtype) for x in (packed_loss, alone_loss)), loss)
    found, expected = gradients(model, packed_loss), gradients(plain, alone_loss)
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert_as_exact_as(gradient, expected[name], exact[name])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Operators:
    """Kernels of variable length, of which a fake runs on a CPU."""
    monkeypatch.setattr(attention_backends, "varlen_attn", fake_varlen_attn)
    monkeypatch.setattr(attention_backends, "_GROUPED", {"enable_gqa": True})
    return dataclasses.replace(REFERENCE, attention=pinned_sdpa(SDPBackend.MATH))


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operators", [REFERENCE, CPU], ids=lambda x: x.name)
def test_as_if_alone(operators: Operators, dtype: torch.dtype, starts: list[int]) -> None:
    assert_packed_as_apart(operators, dtype, starts)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_as_if_alone_on_triton(dtype: torch.dtype) -> None:
    assert_packed_as_apart(TRITON, dtype, [3, 3, 4, 8, 8, 14])


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
def test_as_if_alone_on_kernels_of_variable_length(flash: Operators, starts: list[int]) -> None:
    assert_packed_as_apart(flash, torch.float32, starts)


@settings(max_examples=15, deadline=None)
@given(starts=st.lists(st.integers(0, B * T), max_size=LENGTH - B - 1))
def test_any_documents(starts: list[int]) -> None:
    """In float64, where nothing but a wrong mask or position is off by 1e-10."""
    batch = (*random_tokens(GROUPED, 2, B, T), cu_seqlens_of(starts))
    model = small_model(GROUPED, CPU, exact=True)
    model.init_rotary()
    logits, loss, exact = truth_of(model, *batch)
    packed = model(batch[0], cu_seqlens=batch[2]).flatten(0, 1)
    torch.testing.assert_close(packed.detach(), logits, rtol=0, atol=1e-10)
    packed_loss = model(*batch[:2], cu_seqlens=batch[2])
    torch.testing.assert_close(packed_loss.detach(), loss, rtol=0, atol=1e-10)
    for name, gradient in gradients(model, packed_loss).items():
        torch.testing.assert_close(gradient, exact[name], rtol=0, atol=1e-10)


def updates(model: Llama) -> list[dict[str, Tensor]]:
    """Loss and gradients of two micro-batches with other documents."""
    batch = random_tokens(GROUPED, 2, B, T)
    return [
        loss_and_gradients(model, *batch, cu_seqlens_of(starts))
        for starts in ([1, 3, 4], [5, 5, 14])
    ]


def model_with(operators: Operators, mode: str, *, compile: bool = False) -> Llama:
    model = small_model(GROUPED, operators)
    training = TrainingConfig(activation_checkpointing=mode, compile=compile)  # type: ignore[arg-type]
    checkpoint_activations(model, Config(model=GROUPED, training=training))
    return model


def assert_close(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing(mode: str) -> None:
    assert_close(updates(model_with(REFERENCE, mode)), updates(model_with(REFERENCE, "none")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("operators", "mode", "backend"),
    [
        (REFERENCE, "selective", PARTITIONED),
        (REFERENCE, "full", PARTITIONED),
        (TRITON, "selective", PARTITIONED),
        (CPU, "none", "inductor"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_other_documents_recompile_nothing(operators: Operators, mode: str, backend: str) -> None:
    expected = updates(model_with(REFERENCE, "none"))
    torch._dynamo.reset()
    counters.clear()
    model = model_with(operators, mode, compile=True)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    assert_close(updates(model), expected)
    # Of the first block, and of all others.
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_no_documents_is_the_causal_mask() -> None:
    tokens = random_tokens(GROUPED, B, T)
    model = small_model(GROUPED, REFERENCE, exact=True)
    packed = model(tokens, cu_seqlens=cu_seqlens_of([]))
    torch.testing.assert_close(packed, model(tokens), rtol=0, atol=1e-10)
