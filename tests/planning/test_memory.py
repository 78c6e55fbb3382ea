"""Checks the plan against FSDP2, run with fake tensors and a fake process group."""

import dataclasses
import itertools
import math
import weakref
from collections import Counter
from pathlib import Path
from typing import Any, Self, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastllama.config import Config, load_recipe
from fastllama.distributed.fsdp import set_last_micro_batch, shard_model
from fastllama.distributed.world import World, build_mesh
from fastllama.model.activation_checkpointing import checkpoint_activations
from fastllama.model.llama import Llama
from fastllama.optim.adamw import build_optimizer
from fastllama.optim.clipping import update
from fastllama.planning.flops import n_parameters
from fastllama.planning.memory import (
    TrafficPlan,
    _gathered_bytes,
    activation_bytes,
    choose_by_memory,
    plan_memory,
    plan_traffic,
    refuse_small_host,
)
from fastllama_kernels import TRITON, TRITON_SAVING
from fastllama_kernels.linear_cross_entropy import chunk_length

RECIPE = Path(__file__).parents[2] / "configs" / "llama-3.1-8b.toml"
CPU, META = torch.device("cpu"), torch.device("meta")


@library.custom_op("fastllama_test::attention", mutates_args=())
def attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gives the policy of selective checkpointing the name of an attention operator."""
    raise AssertionError("never computed")


@attention_fwd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch_size, n_tokens, n_heads, _ = q.shape
    lse = q.new_empty(batch_size, n_heads, n_tokens, dtype=torch.float32)
    return q.new_empty(q.shape), lse


class FlashAttention(torch.autograd.Function):
    """Saves for backward what the FlashAttention backends save."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attention_fwd(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class Meter(TorchDispatchMode):
    """Measures bytes of live tensors, their peak, and bytes that collectives send."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.sent: Counter[str] = Counter()
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __enter__(self) -> Self:
        # FSDP2 allocates and frees gathered parameters with it, bypassing the dispatcher.
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_and_measure(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._measure(storage)
            return result

        torch.UntypedStorage.resize_ = resize_and_measure  # type: ignore[method-assign, assignment]
        return cast(Self, super().__enter__())

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.fastllama.linear_cross_entropy_fwd.default:
            hidden, weight = args[:2]
            logits = chunk_length(len(hidden), len(weight), 2) * len(weight) * 2
            self.peak = max(self.peak, self.alive + logits)
        if operator.namespace == "c10d":
            self._count(operator.__name__.partition(".")[0], args)
        for x in tree_leaves(result):
            # A DTensor has no memory besides its local shard.
            if isinstance(x, Tensor) and not isinstance(x, DTensor) and x.device != META:
                self._measure(x.untyped_storage())
        return result

    def _count(self, collective: str, args: Any) -> None:
        (group,) = (
            dist.ProcessGroup.unbox(x)
            for x in args
            if isinstance(x, torch.ScriptObject)
            if "ProcessGroup" in str(x._type())
        )
        whole = max(x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor))
        times = 2 if collective == "allreduce_" else 1
        self.sent[collective] += times * whole * (group.size() - 1) // group.size()

    def _measure(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = weakref.ref(storage, lambda _: self._forget(key)), 0
        reference, before = self._sizes[key]
        self._sizes[key] = reference, storage.nbytes()
        self.alive += storage.nbytes() - before
        self.peak = max(self.peak, self.alive)

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)[1]


def measure(config: Config, world_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Run one update as rank 0 of `world_size`; return memory and traffic in bytes by name."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        mesh = build_mesh("cpu", config.parallel.replicate)
        operators = dataclasses.replace(
            TRITON_SAVING if config.training.save_projection_inputs else TRITON,
            attention=lambda *qkv, cu_seqlens: FlashAttention.apply(*qkv),
        )
        with META:
            model = Llama(config.model, operators)
        checkpoint_activations(model, config)
        shard_model(model, config, World(0, world_size, META, mesh))
        with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
            model.to_empty(device="cpu")
            model.tie_weights()
            return run_update(model, config, world_size, meter), dict(meter.sent)
    finally:
        dist.destroy_process_group()


def run_update(model: Llama, config: Config, world_size: int, meter: Meter) -> dict[str, int]:
    optimizer = build_optimizer(model, config.optimizer)
    moments = [
        x for state in optimizer.state.values() for x in (state["exp_avg"], state["exp_avg_sq"])
    ]
    found = {"parameters": shard_bytes(model.parameters()), "optimizer": shard_bytes(moments)}
    before = meter.alive
    shape = config.training.batch_size, config.model.max_seq_len
    n_micro_batches = config.accumulation_steps(world_size)
    for micro_batch in range(n_micro_batches):
        is_last = micro_batch == n_micro_batches - 1
        set_last_micro_batch(model, is_last, config.parallel)
        tokens = torch.zeros(shape, dtype=torch.int64)
        loss = model(tokens, tokens)
        if micro_batch == 0:
            found["saved for backward"] = meter.alive - before
        loss.backward()
        del loss
        if not is_last:
            found["between micro-batches"] = meter.alive - before
    update(optimizer, torch.zeros(()), max_norm=1.0)
    return {**found, "total": meter.peak}


def shard_bytes(tensors: Any) -> int:
    return sum(cast(DTensor, x).to_local().nbytes for x in tensors)


def recipe(world_size: int, n_micro_batches: int = 1, **changes: dict[str, Any]) -> Config:
    """Llama 3.1 8B with changed options and `n_micro_batches` per update."""
    config = load_recipe(RECIPE)
    for group, options in changes.items():
        changed = dataclasses.replace(getattr(config, group), **options)
        config = dataclasses.replace(config, **{group: changed})
    micro_batch = world_size * config.training.batch_size * config.model.max_seq_len
    training = dataclasses.replace(config.training, tokens_per_update=n_micro_batches * micro_batch)
    return dataclasses.replace(config, training=training)


CASES = {
    # The recipe with 2 instead of 8 micro-batches. Later ones repeat the memory of the second.
    "8": (8, recipe(8, n_micro_batches=2, parallel={"reshard_after_forward": True})),
    "64": (64, recipe(64, parallel={"reshard_after_forward": True})),
    "512": (512, recipe(512, parallel={"reshard_after_forward": True})),
    "kept": (
        8,
        recipe(
            8,
            n_micro_batches=2,
            model={"n_layers": 8},
            parallel={"reshard_after_forward": False, "reduce_dtype": "bfloat16"},
        ),
    ),
    "in shards": (
        8,
        recipe(
            8,
            n_micro_batches=3,
            model={"n_layers": 8},
            parallel={"reshard_after_forward": False, "accumulate": "sharded"},
        ),
    ),
    "in shards, freed, bfloat16": (
        8,
        recipe(
            8,
            n_micro_batches=2,
            model={"n_layers": 8},
            parallel={
                "reshard_after_forward": True,
                "accumulate": "sharded",
                "reduce_dtype": "bfloat16",
            },
        ),
    ),
    "replicas in shards, bfloat16": (
        16,
        recipe(
            16,
            n_micro_batches=3,
            model={"n_layers": 8},
            parallel={
                "reshard_after_forward": True,
                "accumulate": "sharded",
                "replicate": 4,
                "reduce_dtype": "bfloat16",
            },
        ),
    ),
    "replicas, selective": (
        64,
        recipe(
            64,
            model={"n_layers": 8},
            parallel={"reshard_after_forward": True, "replicate": 8},
            training={"activation_checkpointing": "selective"},
        ),
    ),
    "projection inputs saved": (
        8,
        recipe(
            8,
            n_micro_batches=2,
            model={"n_layers": 8},
            parallel={"reshard_after_forward": False, "accumulate": "unsharded"},
            # Enough tokens that the peak is in the backward of a block.
            training={"save_projection_inputs": True, "batch_size": 8},
        ),
    ),
    "full": (
        64,
        recipe(
            64,
            model={"n_layers": 8},
            parallel={"reshard_after_forward": True},
            training={"activation_checkpointing": "full", "batch_size": 4, "compile": False},
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_plan_matches_fsdp(name: str) -> None:
    world_size, config = CASES[name]
    memory = plan_memory(config, world_size)
    traffic = plan_traffic(config, world_size)
    measured, sent = measure(config, world_size)
    assert_close(memory.parameters, measured["parameters"])
    assert_close(memory.optimizer, measured["optimizer"])
    # The loss computes its gradients in the forward and saves them too.
    model, n_tokens = config.model, config.training.batch_size * config.model.max_seq_len
    loss = 4 * model.vocab_size * model.n_embd + 2 * n_tokens * model.n_embd
    gathered = _gathered_bytes(config, in_block=False)
    freed = config.parallel.reshard_after_forward
    # The CPU frees the buffer of an all-gather at once, and has no cuBLAS, which needs 32 MiB.
    buffer = 2 * model.vocab_size * model.n_embd if freed else 0
    assert_close(gathered - buffer + memory.activations + loss, measured["saved for backward"])
    if config.accumulation_steps(world_size) > 1:
        stays = memory.gradients + (0 if freed else gathered)
        assert_close(stays, measured["between micro-batches"])
    only_gpu = 2**25 + (buffer if memory.gathered == gathered else 0)
    assert_close(memory.total - only_gpu, measured["total"])
    assert_close(traffic.all_gather, sent["_allgather_base_"])
    assert_close(traffic.reduce_scatter, sent["_reduce_scatter_base_"])
    assert_close(traffic.all_reduce, sent.get("allreduce_", 0))


def assert_close(planned: int, measured: int) -> None:
    assert math.isclose(planned, measured, rel_tol=0.01), (planned, measured)


def test_activation_bytes_of_1b_block() -> None:
    # As measured by tests/kernels/test_activation_memory.py.
    config = load_recipe(RECIPE.with_name("llama-1b.toml"))
    assert activation_bytes(config, "none") == 47_232


def test_saved_projection_inputs() -> None:
    config = recipe(64, training={"save_projection_inputs": True})
    outputs = 2 * (2 * config.model.n_embd + config.model.ffn_width)
    assert activation_bytes(config, "none") - activation_bytes(recipe(64), "none") == outputs


def test_dropout_saves_its_masks() -> None:
    # One byte an element on a GPU, for both branches. On a CPU a mask has the dtype of its input.
    config = recipe(64, model={"dropout": 0.1})
    without = recipe(64)
    for mode, masks in (("none", 2 * config.model.n_embd), ("selective", 0), ("full", 0)):
        assert activation_bytes(config, mode) - activation_bytes(without, mode) == masks


def test_one_device_sends_nothing() -> None:
    config = recipe(1, parallel={"reshard_after_forward": True})
    assert plan_traffic(config, 1) == TrafficPlan(0, 0, 0)


def chosen(config: Config, world_size: int, available: int | None) -> tuple[Any, str, str]:
    """The two options that memory decides, and the reason."""
    resolved, reason = choose_by_memory(config, world_size, available)
    parallel = resolved.parallel
    assert dataclasses.replace(resolved, parallel=config.parallel) == config
    return parallel.reshard_after_forward, parallel.accumulate, reason


def with_parallel(config: Config, **options: Any) -> Config:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **options))


def total(config: Config, world_size: int, reshard: bool, accumulate: str) -> int:
    choice = with_parallel(config, reshard_after_forward=reshard, accumulate=accumulate)
    return plan_memory(choice, world_size).total


ORDER = ((False, "unsharded"), (False, "sharded"), (True, "sharded"))
"""The choices for this model, least traffic first."""


@pytest.mark.parametrize("choice", ORDER)
def test_first_choice_that_fits_is_taken(choice: tuple[bool, str]) -> None:
    config = recipe(8, n_micro_batches=8)
    available = math.ceil(total(config, 8, *choice) / 0.9)
    assert chosen(config, 8, available)[:2] == choice
    # Every larger memory takes an earlier choice, and a smaller one a later.
    assert ORDER.index(chosen(config, 8, 2 * available)[:2]) <= ORDER.index(choice)
    if choice != ORDER[-1]:
        following = ORDER[ORDER.index(choice) + 1]
        assert chosen(config, 8, available - 2)[:2] == following


def test_order_is_that_of_traffic_per_saved_byte() -> None:
    config = recipe(8, n_micro_batches=8)
    plain, *saving = (
        with_parallel(config, reshard_after_forward=reshard, accumulate=accumulate)
        for reshard, accumulate in ((False, "unsharded"), (False, "sharded"), (True, "unsharded"))
    )
    sent = [sum(dataclasses.astuple(plan_traffic(choice, 8))) for choice in (plain, *saving)]
    held = [plan_memory(choice, 8).total for choice in (plain, *saving)]
    costs = [(sent[i] - sent[0]) / (held[0] - held[i]) for i in (1, 2)]
    assert costs == pytest.approx([8 - 1, 2 * 8 - 1], rel=0.05)


def test_reason_has_the_sums() -> None:
    config = recipe(8, n_micro_batches=8)
    assert chosen(config, 8, 80 * 2**30)[2] == (
        "parameters kept for the backward, gradients summed in shards: 56.1 of 80.0 GiB; 82.2 with "
        "parameters kept for the backward, gradients summed whole"
    )
    # One micro-batch per update has no sums.
    config = recipe(64)
    kept = total(config, 64, reshard=False, accumulate="unsharded")
    assert chosen(config, 64, kept) == (
        True,
        "unsharded",
        "parameters freed after the forward: 30.9 of 42.5 GiB; 42.5 with parameters kept for the "
        "backward",
    )


def test_cpu_keeps_all() -> None:
    assert chosen(recipe(8, n_micro_batches=8), 8, None) == (
        False,
        "unsharded",
        "parameters kept for the backward, gradients summed whole: 82.2 GiB, not limited on a CPU",
    )


def test_training_state_must_fit_on_a_machine_without_gpus() -> None:
    config = recipe(8, n_micro_batches=8)
    # Weights and two moments in float32; 4 of 8 processes hold half of the shards.
    state = 12 * n_parameters(config.model) // 2
    refuse_small_host(config, 8, 4, state)
    with pytest.raises(
        ValueError, match=r"alone need 44\.9 GiB here, and the machine has 44\.8 GiB; "
    ):
        refuse_small_host(config, 8, 4, int(44.8 * 2**30))
    training = dataclasses.replace(config.training, ema_decay=0.99)
    averaged = dataclasses.replace(config, training=training)
    with pytest.raises(
        ValueError, match=r"alone need 59\.8 GiB here, and the machine has 44\.9 GiB; "
    ):
        refuse_small_host(averaged, 8, 4, state)


def test_one_device_has_no_shards_to_sum_in() -> None:
    config = recipe(1, n_micro_batches=8)
    smallest = total(config, 1, reshard=True, accumulate="unsharded")
    assert chosen(config, 1, 2 * smallest)[:2] == (False, "unsharded")
    assert chosen(config, 1, smallest)[:2] == (True, "unsharded")


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("accumulate", ["unsharded", "sharded"])
def test_options_that_are_set_stay(reshard: bool, accumulate: str) -> None:
    config = recipe(8, n_micro_batches=8)
    one = with_parallel(config, reshard_after_forward=reshard)
    other = with_parallel(config, accumulate=accumulate)
    both = with_parallel(one, accumulate=accumulate)
    least = total(config, 8, reshard, accumulate)
    for available in (None, least, 2**60):
        assert chosen(both, 8, available)[:2] == (reshard, accumulate)
    for available in (None, 2**60):
        assert chosen(one, 8, available)[:2] == (reshard, "unsharded")
        assert chosen(other, 8, available)[:2] == (False, accumulate)
    # The other option is what makes it fit.
    assert chosen(one, 8, total(config, 8, reshard, "sharded"))[:2] == (reshard, "sharded")
    assert chosen(other, 8, total(config, 8, True, accumulate))[:2] == (True, accumulate)


def test_plan_that_fits_barely_is_tried() -> None:
    config = recipe(8, n_micro_batches=8)
    smallest = total(config, 8, *ORDER[-1])
    *options, reason = chosen(config, 8, smallest)
    assert tuple(options) == ORDER[-1]
    assert "44.5 of 44.5 GiB, more than the 90 % that a run can rely on; 82.2 with" in reason


def test_plan_that_does_not_fit_is_refused_with_its_remedies() -> None:
    config = recipe(8, n_micro_batches=8)
    smallest = total(config, 8, *ORDER[-1])
    with pytest.raises(ValueError, match=r"^The smallest plan needs 44\.5 GiB") as refusal:
        choose_by_memory(config, 8, smallest - 1)
    assert str(refusal.value) == (
        "The smallest plan needs 44.5 GiB, and the device has 44.5 GiB (activations 23.0, "
        "optimizer 7.5, parameters 3.7); use more devices, or set "
        'training.activation_checkpointing = "full" instead of "none".'
    )
    config = recipe(
        8,
        n_micro_batches=8,
        parallel={"accumulate": "unsharded", "reshard_after_forward": False},
        training={"batch_size": 2, "activation_checkpointing": "full"},
    )
    with pytest.raises(ValueError, match=r"^The smallest plan needs 67\.3 GiB") as refusal:
        choose_by_memory(config, 8, 1)
    assert str(refusal.value).endswith(
        "); use more devices, or lower training.batch_size = 2, or set "
        'parallel.reshard_after_forward = "auto" instead of false, or set parallel.accumulate = '
        '"auto" instead of "unsharded".'
    )


def table_rows(header: str) -> list[list[str]]:
    """Cells of the table in docs/distributed.md whose first line begins with `header`."""
    page = (RECIPE.parents[1] / "docs" / "distributed.md").read_text()
    lines = page[page.index(header) :].splitlines()[2:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def config_of_row(devices: str, reshard: str, accumulate: str) -> tuple[Config, int]:
    world_size, _, replicas = devices.partition(", ")
    parallel = {
        "replicate": int(replicas.removesuffix(" replicas") or 1),
        "reshard_after_forward": reshard == "true",
        "accumulate": accumulate,
    }
    n_micro_batches = max(1, 64 // int(world_size))
    return recipe(int(world_size), n_micro_batches, parallel=parallel), int(world_size)


def gibibytes(*counts: int) -> list[float]:
    return [round(count / 2**30, 1) for count in counts]


def test_docs_show_the_plan() -> None:
    memory = table_rows("| GPUs | reshard | accumulate | parameters")
    traffic = table_rows("| GPUs | reshard | accumulate | all-gather")
    assert [row[:3] for row in memory if row[0] != "1"] == [row[:3] for row in traffic]
    assert len(memory) == 11
    for *options, in_table in ((*row[:3], row[3:]) for row in memory):
        config, world_size = config_of_row(*options)
        plan = plan_memory(config, world_size)
        # The recipe keeps no average of the weights.
        parts = {name: size for name, size in vars(plan).items() if name != "ema"}
        expected = gibibytes(*parts.values(), plan.total)
        assert [float(cell) for cell in in_table] == expected, options
    for *options, in_table in ((*row[:3], row[3:]) for row in traffic):
        config, world_size = config_of_row(*options)
        sent = plan_traffic(config, world_size)
        assert [float(cell) for cell in in_table] == gibibytes(*dataclasses.astuple(sent)), options


def test_dropout_adds_masks_and_a_gradient() -> None:
    # On a CPU PyTorch saves wider masks, so `measure` cannot tell. The rehearsal of the step can.
    config = load_recipe(RECIPE.with_name("llama-1b.toml"))
    model = dataclasses.replace(config.model, dropout=0.1)
    without, with_dropout = (
        plan_memory(each, 8) for each in (config, dataclasses.replace(config, model=model))
    )
    n_stream = config.training.batch_size * config.model.max_seq_len * config.model.n_embd
    # Bytes of a mask of each branch, and bfloat16 of the gradient.
    assert with_dropout.activations - without.activations == 2 * config.model.n_layers * n_stream
    assert with_dropout.backward - without.backward == 2 * n_stream
