"""The learning rate of an update, a pure function of its number: a resumed run cannot drift."""

import math

from fastllama.config import Config


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of update `step`, counted from 1 to `config.n_updates`.

    It rises linearly to max_lr at update `warmup_iterations`, then falls to min_lr at the last one:
    along half a cosine (Loshchilov and Hutter 2017), a line, or, for wsd, a line over the last
    `decay_fraction` of the updates only (Hu et al. 2024); constant stays at max_lr.
    """
    optimizer, last = config.optimizer, config.n_updates
    if step < optimizer.warmup_iterations:
        return optimizer.max_lr * step / optimizer.warmup_iterations
    if optimizer.schedule == "constant":
        return optimizer.max_lr
    begin = max(1, optimizer.warmup_iterations)
    if optimizer.schedule == "wsd":
        begin = max(begin, last - round(optimizer.decay_fraction * last))
    progress = min(1.0, max(0.0, (step - begin) / max(1, last - begin)))
    if optimizer.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return optimizer.max_lr + progress * (optimizer.min_lr - optimizer.max_lr)
