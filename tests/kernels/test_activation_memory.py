"""What waits for the backward: bytes a token, and recomputing instead of waiting."""

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
from fastllama_kernels import REFERENCE, TRITON, Operators
from tests.compare import DEVICE, Operator, outputs_and_gradients, randn
from tests.kernels.operator_cases import CASES, Case, loss_in_logits
from tests.kernels.small_model import GROUPED, small_model

RECIPE = Path(__file__).parents[2] / "configs" / "llama-1b.toml"
BUDGET = 48_000
"""Bytes a token and layer at the shape of `RECIPE` in bfloat16; see the list below."""

# Few, for the interpreter; more on a GPU, where kernels pad a short lse.
N_TOKENS = 8 if DEVICE == "cpu" else 128

KEPT: dict[str, Callable[[Any], bool] | None] = {
    "nothing": None,
    "our operators": lambda operator: operator.namespace == "fastllama",
    "products": lambda operator: operator is torch.ops.aten.mm.default,
    "attention": lambda operator: "attention" in operator.name(),
}


def saved_bytes(run: Callable[[], tuple[Tensor, ...]], given: list[Tensor]) -> int:
    """Bytes that wait for the backward of `run`, once for each memory, without those of `given`."""
    known = {address(x) for x in given}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if address(x) not in known:
            kept[address(x)] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = run()
    for x in attributes_of_nodes(outputs):
        keep(x)
    return sum(kept.values())


def address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def attributes_of_nodes(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What an autograd Function keeps as an attribute, which passes by the hooks."""
    todo, seen, found = [x.grad_fn for x in outputs], set(), []
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
            values = tree_leaves(getattr(node, "__dict__", {}))
            found += [value for value in values if isinstance(value, Tensor)]
    return found


def bytes_a_token_and_layer(operators: Operators, n_layers: int, n_tokens: int = N_TOKENS) -> float:
    config = load_recipe(RECIPE).model
    with torch.device("meta"):
        blocks = [Block(config, operators, layer).bfloat16() for layer in range(n_layers)]
    for block in blocks:
        block.to_empty(device=DEVICE).apply(zero_weights)
    table = torch.zeros(n_tokens, config.head_dim // 2, device=DEVICE)
    x = randn(1, n_tokens, config.n_embd, seed=0, dtype=torch.bfloat16).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        stream: tuple[Any, ...] = x, None
        for block in blocks:
            stream = block(*stream, table, table)
        return stream

    weights = [weight for block in blocks for weight in block.parameters()]
    return saved_bytes(run, [*weights, table]) / n_tokens / n_layers


def zero_weights(module: torch.nn.Module) -> None:
    for weight in module.parameters(recurse=False):
        torch.nn.init.zeros_(weight)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_block_keeps_what_cannot_be_computed_again(n_layers: int) -> None:
    # In bytes a token: the stream before each of two norms 2 x 4,096 and their rstd 2 x 4, turned
    # qkv 12,288, attention's output 4,096 and lse 128, gate_up 22,528: 47,240.
    assert bytes_a_token_and_layer(TRITON, n_layers) <= BUDGET


def test_plain_pytorch_keeps_twice_as_much() -> None:
    assert bytes_a_token_and_layer(REFERENCE, n_layers=1) > 2 * BUDGET


def recomputed(run: Operator, kept: str) -> Operator:
    """`run`, of which the results of no operators but those `kept` wait for the backward."""
    keep = KEPT[kept]
    if keep is None:
        return lambda *inputs: checkpoint(run, *inputs, use_reentrant=False)
    contexts = partial(
        create_selective_checkpoint_contexts, lambda context, operator, *_, **__: keep(operator)
    )
    return lambda *inputs: checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)


def assert_recomputed_bit_for_bit(
    run: Operator, inputs: list[Tensor], kept: str, plain: Operator | None = None
) -> None:
    found = outputs_and_gradients(recomputed(run, kept), inputs)
    wanted = outputs_and_gradients(plain or run, inputs)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kept", ["nothing", "our operators", "products"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_recomputed_operator(case: Case, kept: str) -> None:
    # What was kept must not be written to: the gradients are then computed in the backward.
    at_rest = case.name == "cross_entropy inplace" and kept != "nothing"
    plain = partial(loss_in_logits, inplace=False) if at_rest else None
    assert_recomputed_bit_for_bit(case.run, case.inputs(), kept, plain)


@pytest.mark.parametrize("kept", ["nothing", "attention"])
def test_recomputed_block(kept: str) -> None:
    model = small_model(GROUPED, TRITON)
    rows = (1, 4, GROUPED.n_embd)
    names, weights = zip(*model.blocks[0].named_parameters(), strict=True)

    def run(x: Tensor, residual: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        inputs = x, residual, model.cos_PR[:4], model.sin_PR[:4]
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(model.blocks[0], named, inputs)

    inputs = [randn(*rows, seed=seed, dtype=torch.float32) for seed in (0, 1)]
    assert_recomputed_bit_for_bit(run, [*inputs, *weights], kept)
