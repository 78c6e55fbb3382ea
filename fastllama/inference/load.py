"""Loads a trained model and its tokenizer from a run folder or one of its checkpoints."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from fastllama.checkpoints.reading import (
    find_damage,
    find_difference,
    load_tensors,
    newest_checkpoint,
    read_identity,
)
from fastllama.checkpoints.state import MODEL, model_tensors
from fastllama.data.tokenizer import load_tokenizer
from fastllama.model.llama import Llama
from fastllama.run_folder import RunFolder
from fastllama_kernels import REFERENCE
from fastllama_kernels.attention import attention_without_cudnn


@dataclass(frozen=True)
class LoadedRun:
    """A trained model in evaluation mode, and its tokenizer."""

    model: Llama
    tokenizer: Tokenizer
    end_token: int


def load_run(path: Path, device: torch.device) -> LoadedRun:
    """Load the newest whole checkpoint of a run folder, or one checkpoint inside it.

    AdamW's moments, two thirds of a checkpoint, are neither read nor checked.

    Raises:
        ValueError: there is no run or checkpoint, or the checkpoint is damaged.
    """
    run = RunFolder(path)
    around = RunFolder(path.resolve().parent.parent)
    is_checkpoint = not run.exists and around.exists
    if is_checkpoint:
        run = around
    config = run.load_config()
    checkpoint: Path | None
    if is_checkpoint:
        checkpoint = path
        damage = find_damage(path, wanted=MODEL) or find_difference(path, identity={})
        if damage is not None:
            raise ValueError(
                f"The checkpoint is damaged: {damage}; use another one of {path.parent}."
            )
    else:
        checkpoint, _ = newest_checkpoint(run.checkpoints, identity={}, wanted=MODEL)
    if checkpoint is None:
        raise ValueError(f"{path} has no complete checkpoint yet; train on, or wait for the first.")
    with torch.device("meta"):
        # cuDNN would build a new plan for every token, because the number of keys changes.
        model = Llama(config.model, replace(REFERENCE, attention=attention_without_cudnn))
    if device.type == "cuda":
        # Parameters only: the rotary tables stay float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, config.training.dtype))
    model.to_empty(device=device)
    model.tie_weights()
    model.init_rotary()
    load_tensors(checkpoint, model_tensors(model))
    end_token = read_identity(checkpoint)["data.end_token_id"]
    return LoadedRun(model.eval(), load_tokenizer(run.tokenizer), end_token)
