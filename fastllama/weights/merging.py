"""fastllama merge: the average of several checkpoints of one run, or of its branches.

Averages of late checkpoints are often better than each of them: Kaddour 2022 (LAWA),
https://arxiv.org/abs/2209.14981. With a learning rate that is held, they replace its decay: Tian et
al. 2025 (WSM), https://arxiv.org/abs/2507.17634, with weights that follow from the decay.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastllama.checkpoints.reading import find_checkpoint, open_tensors, read_identity, stage_config
from fastllama.checkpoints.state import model_tensors
from fastllama.checkpoints.weights_only import write_weights
from fastllama.data.tokenizer import fingerprint, load_tokenizer
from fastllama.model.llama import Llama
from fastllama.run_folder import RunFolder, model_identity
from fastllama.weights.new_run import keep_tokenizer_model, new_run, refuse_output
from fastllama_kernels import REFERENCE


def merge(paths: Sequence[Path], output: Path, shares: Sequence[float] = ()) -> list[float]:
    """Write the run folder `output` with the average of the weights of checkpoints.

    Tensors are summed one at a time, in float64.

    Args:
        paths: checkpoints; a run folder is its newest one.
        output: the run folder to write.
        shares: a number for each checkpoint, in any unit; without numbers, all are equal.

    Returns:
        The share of each checkpoint in the average; they sum to 1.

    Raises:
        ValueError: a checkpoint is missing, damaged, or of another model; the numbers do not fit;
            or `output` exists. Nothing was written.
        OSError: a file cannot be read or written.
    """
    refuse_output(output)
    shares = _normalised(shares, len(paths))
    found = [find_checkpoint(path) for path in paths]
    (run, first), *_ = found
    for other, checkpoint in found[1:]:
        _refuse_other_model(run, first, other, checkpoint)
    config = stage_config(run.load_config(), first)
    # The average has no stages: it has the sequence length and the rotary base of its own.
    config = replace(config, data=replace(config.data, stages=()))
    identity = read_identity(first) | model_identity(config.model)
    with torch.device("meta"):
        shapes = model_tensors(Llama(config.model, REFERENCE))
    with ExitStack() as opened, new_run(output) as merged:
        readers = [opened.enter_context(open_tensors(checkpoint)) for _, checkpoint in found]

        def average(name: str) -> Tensor:
            total = torch.zeros(shapes[name].shape, dtype=torch.float64)
            for share, read in zip(shares, readers, strict=True):
                total.add_(read(name, shapes[name].shape), alpha=share)
            return total.float()

        merged.create(config, run.tokenizer)
        keep_tokenizer_model(run.tokenizer_model, merged.tokenizer_model)
        write_weights(merged.checkpoints, shapes, average, identity)
    return shares


def _normalised(shares: Sequence[float], n: int) -> list[float]:
    """Shares that sum to 1."""
    if n < 2:
        raise ValueError("A merge needs at least two checkpoints; give more.")
    if not shares:
        return [1 / n] * n
    if len(shares) != n:
        raise ValueError(f"There are {n} checkpoints and {len(shares)} weights; give one for each.")
    total = math.fsum(shares)
    if not (math.isfinite(total) and total > 0):
        raise ValueError(f"The weights sum to {total}; give finite numbers with a sum above 0.")
    return [share / total for share in shares]


def _refuse_other_model(run: RunFolder, first: Path, other: RunFolder, checkpoint: Path) -> None:
    """Raise ValueError if the average of two checkpoints is no model."""
    here, there = (
        model_identity(stage_config(each.load_config(), path).model)
        for each, path in ((run, first), (other, checkpoint))
    )
    if name := next((name for name, value in here.items() if there[name] != value), None):
        raise ValueError(
            f"{checkpoint} has {name} = {there[name]}, and {first} has {here[name]}; only weights "
            "of one model can be averaged."
        )
    if fingerprint(load_tokenizer(run.tokenizer)) != fingerprint(load_tokenizer(other.tokenizer)):
        raise ValueError(
            f"{checkpoint} and {first} have other tokenizers; only weights of one model can be "
            "averaged."
        )
