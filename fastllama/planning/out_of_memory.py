"""Out-of-memory errors as one sentence with the numbers of the memory plan."""

import dataclasses

from fastllama.config import Config
from fastllama.planning.memory import plan_memory

_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "ALLOC_FAILED",
    # Sizes that no address has: of a storage, and of a dimension.
    "Storage size calculation overflowed",
    "Overflow when unpacking long",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, PyTorch or CUDA says that memory is missing.

    PyTorch raises a RuntimeError of its own only for the CUDA allocator.
    """
    message = str(error)
    return isinstance(error, MemoryError) or any(part in message for part in _MESSAGES)


def out_of_memory(error: BaseException, config: Config, world_size: int, when: str) -> str:
    """A sentence with the error, the plan, and the remedies for the larger half of the plan."""
    plan = plan_memory(config, world_size)
    parts = ", ".join(
        f"{name} {size / 2**30:,.1f}" for name, size in dataclasses.asdict(plan).items()
    )
    if plan.activations + plan.backward > plan.total / 2:
        remedy = "lower training.batch_size, or set training.activation_checkpointing"
    else:
        remedy = "choose a smaller model, or use more devices"
    if world_size > config.parallel.replicate:
        if config.parallel.accumulate != "sharded" and plan.gradients:
            remedy += ', or set parallel.accumulate = "sharded"'
        if config.parallel.reshard_after_forward is not True:
            remedy += ", or set parallel.reshard_after_forward = true"
    reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    return (
        f"Out of memory {when}: {reason}. The plan per device is {plan.total / 2**30:,.1f} GiB "
        f"({parts}); {remedy}."
    )
