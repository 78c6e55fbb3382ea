"""A training step on a GPU: host waits, CUDA graphs, streams, stale memory, determinism."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastllama.config import ModelConfig, OptimizerConfig
from fastllama.model.llama import Llama
from fastllama.optim.adamw import build_optimizer
from fastllama.optim.clipping import update
from fastllama_kernels import TRITON
from tests.compare import DEVICE
from tests.kernels.gpu import captured, host_wait_is_an_error, on_side_stream
from tests.kernels.small_model import loss_and_gradients, random_tokens, small_model

pytestmark = pytest.mark.gpu

# A sequence is one block of keys; over several, the backward of attention sums in any order.
CONFIG = ModelConfig(
    vocab_size=1000, n_embd=256, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64
)
N_UPDATES = 5


def batches() -> Tensor:
    """Tokens and targets of every update."""
    return random_tokens(CONFIG, N_UPDATES, 2, 4, CONFIG.max_seq_len)


def model_on(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Llama:
    return small_model(CONFIG, TRITON, dtype).to(device)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [
        name for name, x in actual.items() if not torch.equal(x.cpu(), expected[name].cpu())
    ] == []


def trained_with(step: Callable[[Llama], Callable[[Tensor], Tensor]]) -> tuple[Tensor, Llama]:
    """The losses of all updates and the weights after them."""
    model = model_on(torch.device(DEVICE), torch.float32)
    do_update = step(model)
    return torch.stack([do_update(batch).clone() for batch in batches()]), model


def eager_step(model: Llama) -> Callable[[Tensor], Tensor]:
    optimizer = build_optimizer(model, OptimizerConfig(max_lr=1e-3))

    def do_update(batch: Tensor) -> Tensor:
        loss: Tensor = model(*batch)
        loss.backward()
        update(optimizer, loss.detach(), max_norm=1.0)
        return loss.detach()

    return do_update


def warm_step(model: Llama) -> Callable[[Tensor], Tensor]:
    """An update that a CUDA graph can capture: it ran once, and its step count is on the GPU."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def do_update(batch: Tensor) -> Tensor:
        loss: Tensor = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    # Compiles kernels and allocates the moments before a capture.
    on_side_stream(lambda: do_update(batches()[0]))
    return do_update


def captured_step(model: Llama) -> Callable[[Tensor], Tensor]:
    """The same as a CUDA graph; every batch is copied to where the first was."""
    do_update, batch = warm_step(model), batches()[0].clone()
    graph, loss = captured(lambda: do_update(batch))

    def replay(new: Tensor) -> Tensor:
        batch.copy_(new)
        graph.replay()
        return loss

    return replay


def test_five_updates_are_bit_equal() -> None:
    (losses, model), (again, twin) = (trained_with(eager_step) for _ in range(2))
    assert torch.equal(losses, again)
    assert_same_bits(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert not torch.equal(model.output.weight, model_on(torch.device(DEVICE)).output.weight)


def test_host_never_waits() -> None:
    model = model_on(torch.device(DEVICE), torch.float32)
    do_update, (batch, other, *_) = eager_step(model), batches()
    do_update(batch)
    with host_wait_is_an_error():
        do_update(other)


def test_cuda_graph() -> None:
    losses, _ = trained_with(warm_step)
    replayed, _ = trained_with(captured_step)
    # cuBLAS may choose another kernel in a graph.
    torch.testing.assert_close(replayed, losses, rtol=1e-4, atol=0)


def test_freed_memory_is_not_read() -> None:
    model, batch = model_on(torch.device(DEVICE)), batches()[0]
    expected = loss_and_gradients(model, *batch)
    # Small tensors first: they fill the gaps, and tensors above 1 MB get their own segments.
    stale = [
        torch.full((size,), torch.nan, device=DEVICE)
        for size, count in ((2**7, 4096), (2**12, 1024), (2**17, 256), (2**26, 4))
        for _ in range(count)
    ]
    del stale
    assert torch.empty(2**26, device=DEVICE).isnan().all()
    assert_same_bits(loss_and_gradients(model, *batch), expected)


def test_current_stream() -> None:
    model, batch = model_on(torch.device(DEVICE)), batches()[0]
    expected = loss_and_gradients(model, *batch)
    side, late = torch.cuda.Stream(), torch.zeros_like(batch)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        # A kernel on another stream would not wait for the tokens.
        torch.cuda._sleep(100_000_000)
        late.copy_(batch)
        actual = loss_and_gradients(model, *late)
    torch.cuda.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_device_of_the_tensors() -> None:
    (first, second), batch = (torch.device("cuda", index) for index in (0, 1)), batches()[0]
    with torch.cuda.device(first):
        expected = loss_and_gradients(model_on(first), *batch.to(first))
        assert_same_bits(loss_and_gradients(model_on(second), *batch.to(second)), expected)
