"""Loads a trained model and its tokenizer from a run folder or one of its checkpoints."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from fastllama.atomic import report_once
from fastllama.checkpoints.folder import complete_checkpoints, locate
from fastllama.checkpoints.reading import (
    find_damage,
    find_difference,
    load_tensors,
    newest_checkpoint,
    no_checkpoint,
    read_end_token,
    read_start_token,
    refuse_missing_average,
    stage_config,
)
from fastllama.checkpoints.state import MODEL, model_tensors
from fastllama.config import Config
from fastllama.data.tokenizer import load_tokenizer, vocabulary_size
from fastllama.model.dtype_choice import faster_dtype
from fastllama.model.llama import Llama
from fastllama.planning.flops import n_parameters
from fastllama.planning.out_of_memory import is_out_of_memory
from fastllama.run_folder import RunFolder, model_identity
from fastllama_kernels import REFERENCE
from fastllama_kernels.attention import attention_without_cudnn

ATTEMPTS = 5
"""How often to look for the newest checkpoint while a training replaces checkpoints."""


@dataclass(frozen=True)
class LoadedRun:
    """A trained model in evaluation mode, and its tokenizer."""

    model: Llama
    tokenizer: Tokenizer
    end_token: int
    start_token: int | None
    """The token in front of every document, if the model was trained with one."""


def load_run(
    path: Path,
    device: torch.device,
    weights: str = MODEL,
    dtype: Literal["auto", "bfloat16", "float32"] = "float32",
) -> LoadedRun:
    """Load the newest whole checkpoint of a run folder, or one checkpoint inside it.

    `weights` is `MODEL`, or `EMA` for the averaged weights. "auto" of `dtype` is bfloat16 where the
    device is faster in it, unless the run trained in float32. Other tensors, two thirds of a
    checkpoint or more, are neither read nor checked. A newer checkpoint that is not used is
    reported on stderr. A training may write into the folder meanwhile.

    Raises:
        ValueError: there is no run or checkpoint, the checkpoint is damaged, has other options
            than config.toml or no such weights, or the device has too little memory.
        OSError: a file cannot be read.
    """
    run, checkpoint = locate(path)
    config = run.load_config()
    if checkpoint is None:
        return _load_newest(run, config, device, weights, dtype)
    if damage := find_damage(checkpoint, weights):
        raise ValueError(
            f"The checkpoint is damaged: {damage}; use another one of {checkpoint.parent}."
        )
    if difference := find_difference(checkpoint, model_identity(config.model)):
        raise ValueError(f"{difference}; {_remedy(run)}.")
    return _load(run, config, checkpoint, device, weights, dtype)


def _load_newest(
    run: RunFolder, config: Config, device: torch.device, weights: str, dtype: str
) -> LoadedRun:
    for _ in range(ATTEMPTS):
        listed = complete_checkpoints(run.checkpoints)
        unusable: dict[Path, str] = {}
        failure: Exception | None = None
        try:
            checkpoint, unusable = newest_checkpoint(
                run.checkpoints, model_identity(config.model), weights, _remedy(run)
            )
            if checkpoint is None:
                raise ValueError(no_checkpoint(run, unusable))
            loaded = _load(run, config, checkpoint, device, weights, dtype)
        except (ValueError, OSError) as error:
            failure = error
        # A training may have removed a checkpoint after it was listed.
        if not (failure or unusable) or complete_checkpoints(run.checkpoints) == listed:
            break
    if failure is not None:
        raise failure
    for reason in unusable.values():
        report_once(reason, f"Not using a checkpoint: {reason}.")
    if checkpoint is not None and unusable:
        report_once(str(checkpoint), f"Using {checkpoint}.")
    return loaded


def _remedy(run: RunFolder) -> str:
    return f"restore that value in {run.config}"


def run_tokenizer(run: RunFolder, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run, whose model has `vocab_size` token ids.

    Raises:
        ValueError: it cannot be read, or it has more ids than the model.
    """
    if not run.tokenizer.exists():
        raise ValueError(f"{run.tokenizer} does not exist; restore the tokenizer of the run.")
    tokenizer = load_tokenizer(run.tokenizer)
    n_ids = vocabulary_size(tokenizer)
    if n_ids > vocab_size:
        raise ValueError(
            f"{run.tokenizer} has {n_ids} token ids and the model {vocab_size}; restore the "
            "tokenizer of the run."
        )
    return tokenizer


def _load(
    run: RunFolder,
    config: Config,
    checkpoint: Path,
    device: torch.device,
    weights: str,
    dtype: str,
) -> LoadedRun:
    """Load an undamaged checkpoint with the options of `config`, in the stage of the checkpoint."""
    config = stage_config(config, checkpoint)
    refuse_missing_average(checkpoint, weights)
    tokenizer = run_tokenizer(run, config.model.vocab_size)
    end_token = read_end_token(checkpoint, config.model.vocab_size)
    start_token = read_start_token(checkpoint, config.model.vocab_size)
    try:
        model = _build(config, device, _resolve_dtype(dtype, config, device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"Out of memory while loading {checkpoint}: the model has "
            f"{n_parameters(config.model):,} parameters, too many for --device {device.type}."
        ) from None
    load_tensors(checkpoint, model_tensors(model, weights))
    return LoadedRun(model.eval(), tokenizer, end_token, start_token)


def _resolve_dtype(dtype: str, config: Config, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        dtype = "float32" if config.training.dtype == "float32" else faster_dtype(device)
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def _build(config: Config, device: torch.device, dtype: torch.dtype) -> Llama:
    """The model with uninitialized weights."""
    operators = REFERENCE
    if device.type == "cuda":
        # cuDNN would build a new plan for every token, because the number of keys changes.
        operators = replace(REFERENCE, attention=attention_without_cudnn)
    with torch.device("meta"):
        model = Llama(config.model, operators)
    # Parameters only: the rotary tables stay float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    model.init_rotary()
    return model
