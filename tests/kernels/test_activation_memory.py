"""Bytes saved for backward per token, and activation checkpointing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastllama.config import load_recipe
from fastllama.model.llama import Block
from fastllama_kernels import REFERENCE, TRITON, TRITON_SAVING, Operators
from tests.compare import DEVICE, Operator, outputs_and_gradients, randn
from tests.kernels.operator_cases import IN_MODEL, Case, loss_of_linear
from tests.kernels.small_model import GROUPED, small_model

RECIPE = Path(__file__).parents[2] / "configs" / "llama-1b.toml"
BUDGET = 48_000
"""Bytes per token and layer at the shapes of `RECIPE` in bfloat16; the test below lists them."""

# The interpreter is slow; on a GPU kernels pad a short lse.
N_TOKENS = 8 if DEVICE == "cpu" else 128

SAVED: dict[str, Callable[[Any], bool] | None] = {
    "nothing": None,
    "our operators": lambda operator: operator.namespace == "fastllama",
    "matmuls": lambda operator: operator is torch.ops.aten.mm.default,
    "attention": lambda operator: "attention" in operator.name(),
}


def saved_bytes(run: Callable[[], tuple[Tensor, ...]], given: list[Tensor]) -> int:
    """Bytes of storage that `run` saves for backward, each storage once, except `given`."""
    known = {address(x) for x in given}
    saved: dict[int, int] = {}

    def save(x: Tensor) -> Tensor:
        if address(x) not in known:
            saved[address(x)] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        outputs = run()
    for x in attributes_of_nodes(outputs):
        save(x)
    return sum(saved.values())


def address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def attributes_of_nodes(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Tensors that are attributes of an autograd Function; the hooks do not see them."""
    todo, seen, found = [x.grad_fn for x in outputs], set(), []
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
            values = tree_leaves(getattr(node, "__dict__", {}))
            found += [value for value in values if isinstance(value, Tensor)]
    return found


def bytes_per_token_and_layer(operators: Operators, n_layers: int) -> float:
    config = load_recipe(RECIPE).model
    with torch.device("meta"):
        blocks = [Block(config, operators, layer).bfloat16() for layer in range(n_layers)]
    for block in blocks:
        block.to_empty(device=DEVICE).apply(zero_weights)
    table = torch.zeros(N_TOKENS, config.head_width // 2, device=DEVICE)
    x = randn(1, N_TOKENS, config.n_embd, seed=0, dtype=torch.bfloat16).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        stream: tuple[Any, ...] = x, None
        for block in blocks:
            stream = block(*stream, (table, table))
        return stream

    weights = [weight for block in blocks for weight in block.parameters()]
    return saved_bytes(run, [*weights, table]) / N_TOKENS / n_layers


def zero_weights(module: torch.nn.Module) -> None:
    for weight in module.parameters(recurse=False):
        torch.nn.init.zeros_(weight)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_saved_bytes_of_a_block(n_layers: int) -> None:
    # In bytes per token: the stream before each of two norms 2 x 4,096, rotated qkv 12,288,
    # attention's output 4,096 and lse 128, gate_up 22,528: 47,232.
    assert bytes_per_token_and_layer(TRITON, n_layers) <= BUDGET


def test_saved_bytes_of_a_block_with_the_inputs_of_projections() -> None:
    # The outputs of two norms 2 x 4,096, and of SwiGLU 11,264.
    assert bytes_per_token_and_layer(TRITON_SAVING, n_layers=1) <= BUDGET + 19_456


def test_plain_pytorch_saves_more_than_twice_as_much() -> None:
    assert bytes_per_token_and_layer(REFERENCE, n_layers=1) > 2 * BUDGET


def recomputed(run: Operator, saved: str) -> Operator:
    """`run` under activation checkpointing that saves only the results of operators in `saved`."""
    is_saved = SAVED[saved]
    if is_saved is None:
        return lambda *inputs: checkpoint(run, *inputs, use_reentrant=False)
    contexts = partial(
        create_selective_checkpoint_contexts, lambda context, operator, *_, **__: is_saved(operator)
    )
    return lambda *inputs: checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)


def assert_recomputed_bit_for_bit(
    run: Operator, inputs: list[Tensor], saved: str, plain: Operator | None = None
) -> None:
    results = outputs_and_gradients(recomputed(run, saved), inputs)
    assert all(map(torch.equal, results, outputs_and_gradients(plain or run, inputs)))


@pytest.mark.parametrize("saved", ["nothing", "our operators", "matmuls"])
@pytest.mark.parametrize("case", IN_MODEL, ids=str)
def test_recomputed_operator(case: Case, saved: str) -> None:
    plain = case
    if case.name == "cross_entropy-inplace" and saved != "nothing":
        # Logits that may be saved are not written to; the backward computes the gradient.
        plain = loss_of_linear(inplace=False)
    assert_recomputed_bit_for_bit(
        case.of_inputs(case.triton),
        list(case.inputs().values()),
        saved,
        plain.of_inputs(plain.triton),
    )


@pytest.mark.parametrize("saved", ["nothing", "attention"])
def test_recomputed_block(saved: str) -> None:
    model = small_model(GROUPED, TRITON)
    rows = (1, 4, GROUPED.n_embd)
    names, weights = zip(*model.blocks[0].named_parameters(), strict=True)

    def run(x: Tensor, residual: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        inputs = x, residual, (model.cos_PR[:4], model.sin_PR[:4])
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(model.blocks[0], named, inputs)

    inputs = [randn(*rows, seed=seed, dtype=torch.float32) for seed in (0, 1)]
    assert_recomputed_bit_for_bit(run, [*inputs, *weights], saved)
