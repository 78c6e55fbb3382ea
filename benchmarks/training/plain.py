"""A plain PyTorch training loop, and the contenders that train our model in it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from benchmarks.training.job import Batch, Job, Trained
from benchmarks.training.workload import initial_model, read_batches
from fastllama.config import Config
from fastllama.data.dataset import open_dataset
from fastllama.data.loader import BatchLoader
from fastllama.optim.schedule import learning_rate


def train_reference(job: Job, *, compiled: bool) -> Trained:
    """Train our model on plain PyTorch operators and SDPA, without FSDP.

    `fastllama.model.reference` would be an unfairly slow baseline: it materialises every attention
    score. `compiled` compiles the whole model at once, which gives Inductor the most to fuse.
    """
    model = initial_model(job.config, job.device)
    how = "compiled as a whole" if compiled else "eager"
    with loader_batches(job) as next_batch:
        return train_plainly(
            job,
            torch.compile(model) if compiled else model,
            model.parameters,
            model.embedding.weight,
            next_batch,
            details=f"PyTorch operators, SDPA, autocast, {how}",
        )


def train_tutorial(job: Job) -> Trained:
    """Train as tutorials do: batches are read and copied on demand, every loss is read back."""
    model = initial_model(job.config, job.device)
    batches = read_batches(job.config)

    def next_batch() -> Batch:
        tokens, targets = next(batches)
        return tokens.to(job.device), targets.to(job.device)

    return train_plainly(
        job,
        torch.compile(model),
        model.parameters,
        model.embedding.weight,
        next_batch,
        reads_every_loss=True,
        details="PyTorch operators, SDPA, autocast, compiled as a whole; blocking copies, "
        "loss.item() after every micro-batch",
    )


@contextmanager
def loader_batches(job: Job) -> Iterator[Callable[[], Batch]]:
    """Yield a function that returns the next micro-batch, prefetched to the device."""
    config = job.config
    with BatchLoader(
        open_dataset(config).train,
        seq_len=config.model.max_seq_len,
        batch_size=config.training.batch_size,
        device=job.device,
        depth=config.data.prefetch,
    ) as loader:
        yield lambda: loader.next()[:2]


def train_plainly(
    job: Job,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    parameters: Callable[[], Iterator[nn.Parameter]],
    embedding: Tensor,
    next_batch: Callable[[], Batch],
    *,
    details: str,
    reads_every_loss: bool = False,
    autocast: AbstractContextManager[None] | None = None,
) -> Trained:
    """Plain PyTorch training loop. It waits for the device once per update.

    Args:
        job: the workload and its stopping rule.
        loss_of: mean loss of inputs and targets, (B, T) int64 each.
        parameters: all parameters of the model.
        embedding: the only matrix without weight decay.
        next_batch: returns inputs and targets on the device.
        details: description of the contender, for its row.
        reads_every_loss: wait for the loss of every micro-batch.
        autocast: None means autocast to `training.dtype`.
    """
    config, dtype = job.config, job.config.training.dtype
    if autocast is None:
        autocast = (
            nullcontext()
            if dtype == "float32"
            else torch.autocast(job.device.type, dtype=getattr(torch, dtype))
        )
    optimizer = adamw(list(parameters()), embedding, config)
    n_micro_batches = config.accumulation_steps(1)
    losses: list[float] = []
    seconds: list[float] = []
    while True:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(len(losses) + 1, config.n_updates, config.optimizer)
        loss: Tensor | float = 0.0
        for _ in range(n_micro_batches):
            tokens, targets = next_batch()
            with autocast:
                micro_loss = loss_of(tokens, targets) / n_micro_batches
            micro_loss.backward()
            loss = loss + (micro_loss.item() if reads_every_loss else micro_loss.detach())
        nn.utils.clip_grad_norm_(parameters(), config.optimizer.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
        if job.budget.is_spent():
            return Trained(losses, seconds, details)


def adamw(parameters: list[nn.Parameter], embedding: Tensor, config: Config) -> torch.optim.AdamW:
    """Fused AdamW with fastllama's weight decay: all matrices except the embedding."""
    options = config.optimizer
    is_decayed = [parameter.ndim >= 2 and parameter is not embedding for parameter in parameters]
    pairs = list(zip(parameters, is_decayed, strict=True))
    groups = [
        {"params": [p for p, decayed in pairs if decayed], "weight_decay": options.weight_decay},
        {"params": [p for p, decayed in pairs if not decayed], "weight_decay": 0.0},
    ]
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(
        groups, lr=options.max_lr, betas=betas, eps=options.adam_eps, fused=True
    )
