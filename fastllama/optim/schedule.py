"""The learning rate of an update: a pure function of its number, so a resumed run cannot drift."""

import math

from fastllama.config import OptimizerConfig


def learning_rate(step: int, n_updates: int, config: OptimizerConfig) -> float:
    """Learning rate of update `step`, counted from 1 to `n_updates`.

    It rises linearly to max_lr at update `warmup_iterations`, then falls to min_lr at the last
    update: along half a cosine (Loshchilov and Hutter 2017), along a line, or, for wsd, along a
    line over the last `decay_fraction` of the updates only (Hu et al. 2024). constant stays at
    max_lr.
    """
    if step < config.warmup_iterations:
        return config.max_lr * step / config.warmup_iterations
    if config.schedule == "constant":
        return config.max_lr
    begin = max(1, config.warmup_iterations)
    if config.schedule == "wsd":
        begin = max(begin, n_updates - round(config.decay_fraction * n_updates))
    progress = min(1.0, max(0.0, (step - begin) / max(1, n_updates - begin)))
    if config.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return config.max_lr + progress * (config.min_lr - config.max_lr)
