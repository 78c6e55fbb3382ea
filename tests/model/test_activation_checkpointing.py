"""Activation checkpointing: the same gradients, with fewer bytes saved for backward."""

import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastllama.config import Config, TrainingConfig
from fastllama.model.activation_checkpointing import checkpoint_activations
from fastllama.model.llama import Llama
from fastllama_kernels import REFERENCE, TRITON, Operators
from tests.kernels.small_model import GROUPED, loss_and_gradients, random_tokens, small_model
from tests.planning.test_memory import Meter, measure, recipe

MODES = ("selective", "full")
# Inductor's pipeline up to the partitioner, which decides what is saved. It fuses no operators into
# kernels, so results stay bit-equal.
BACKEND = "aot_eager_decomp_partition"
OPERATORS = pytest.mark.parametrize("operators", [REFERENCE, TRITON], ids=lambda x: x.name)


def model_with(
    operators: Operators, mode: str, dropout: float = 0.0, *, compile: bool = False
) -> Llama:
    config = dataclasses.replace(GROUPED, dropout=dropout)
    model = small_model(config, operators)
    training = TrainingConfig(activation_checkpointing=mode, compile=compile)  # type: ignore[arg-type]
    checkpoint_activations(model, Config(model=config, training=training))
    return model


def gradients(model: Llama) -> dict[str, Tensor]:
    tokens, targets = random_tokens(GROUPED, 2, 1, 4)
    torch.manual_seed(0)
    return loss_and_gradients(model, tokens, targets)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("mode", MODES)
@OPERATORS
def test_gradients_are_bit_equal(operators: Operators, mode: str) -> None:
    assert_equal(gradients(model_with(operators, mode)), gradients(model_with(operators, "none")))


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_repeats_dropout(mode: str) -> None:
    plain, recomputing = (model_with(REFERENCE, name, dropout=0.5) for name in ("none", mode))
    assert_equal(gradients(recomputing), gradients(plain))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
@OPERATORS
def test_compiled_gradients_are_bit_equal(operators: Operators, mode: str) -> None:
    assert_equal(compiled_gradients(operators, mode), compiled_gradients(operators, "none"))


@pytest.mark.filterwarnings("ignore")
def test_compiled_selective_rotates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, launches = sys.modules["fastllama_kernels.rope"], []
    kernel = module._rope_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_rope_kernel", Counted())
    compiled_gradients(TRITON, "selective")
    # The backward has the rotated qkv, and neither copies nor rotates it again.
    assert len(launches) == GROUPED.n_layers


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_save_less() -> None:
    saved = {mode: bytes_saved_by_graphs(compiled(TRITON, mode)) for mode in ("none", *MODES)}
    assert saved["full"] < saved["selective"] < saved["none"] / 2


def bytes_saved_by_graphs(model: Llama) -> int:
    """Bytes of activations that the compiled blocks save for backward."""
    weights = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    loss = model(*random_tokens(GROUPED, 2, 1, 8))
    nodes, seen, saved = [loss.grad_fn], set(), {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if "Compiled" in type(node).__name__:
            # Without the generator state that attention saves, 5 KB of integers on a CPU.
            tensors = [x for x in node.saved_tensors if x.is_floating_point()]
            saved |= {x.untyped_storage().data_ptr(): x.nbytes for x in tensors}
    return sum(size for address, size in saved.items() if address not in weights)


def compiled(operators: Operators, mode: str) -> Llama:
    """The model with compiled blocks."""
    torch._dynamo.reset()
    model = model_with(operators, mode, compile=True)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=BACKEND)
    return model


def compiled_gradients(operators: Operators, mode: str) -> dict[str, Tensor]:
    model = compiled(operators, mode)
    before = counters["stats"]["unique_graphs"]
    found = gradients(model)
    # Without this check, a block that runs in eager mode would pass.
    assert counters["stats"]["unique_graphs"] > before
    return found


def test_blocks_save_less() -> None:
    saved = {}
    for mode in ("none", *MODES):
        changes = {"activation_checkpointing": mode}
        config = recipe(
            64,
            model={"n_layers": 4},
            parallel={"reshard_after_forward": True},
            training=changes,
        )
        measured, _ = measure(config, 64)
        saved[mode] = measured["saved for backward"]
    n_tokens, n_layers = 8192, 4
    # Bytes per token that `save_expensive_ops` does not save: gate_up in bfloat16. It
    # saves the outputs of two projections more and one residual stream less, which is one bfloat16
    # row of 4096 more.
    per_token = (saved["none"] - saved["selective"]) / n_tokens / n_layers
    assert per_token == pytest.approx(2 * 28_672 - 2 * 4096, rel=0.05)
    assert saved["full"] < saved["selective"] < saved["none"]


def test_reference_operators_save_less() -> None:
    saved = {}
    for mode in ("none", *MODES):
        model = model_with(REFERENCE, mode)
        with Meter() as meter:
            loss = model(*random_tokens(GROUPED, 2, 1, 8))
            saved[mode] = meter.alive
        del loss
    assert saved["full"] < saved["selective"] < saved["none"]
