"""The weights that a new run starts from, as `training.init_from` names them."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastllama.checkpoints.folder import locate
from fastllama.checkpoints.reading import (
    find_damage,
    has_tensors,
    load_tensors,
    newest_checkpoint,
)
from fastllama.checkpoints.state import MODEL, OPTIMIZER, model_tensors, training_tensors
from fastllama.config import Config, ModelConfig
from fastllama.data.dataset import Dataset
from fastllama.data.tokenizer import fingerprint, load_tokenizer
from fastllama.run_folder import RunFolder, model_identity


@dataclass(frozen=True)
class InitialWeights:
    """Weights of another run that fit the model of this one."""

    checkpoint: Path
    moments: bool
    """Whether AdamW's moments are taken too."""
    differences: list[str]
    """What this run computes with the weights in another way, as `option = value instead of`."""

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the weights, and the moments if they are wanted, sharded in any way.

        Raises:
            ValueError: the checkpoint cannot be read.
        """
        wanted = training_tensors(model, optimizer) if self.moments else model_tensors(model)
        load_tensors(self.checkpoint, wanted)

    def __str__(self) -> str:
        parts = [f"{self.checkpoint}{', with the moments of AdamW' if self.moments else ''}"]
        return "; ".join([*parts, *self.differences])


def find_initial_weights(config: Config, dataset: Dataset) -> InitialWeights:
    """Find the weights that `training.init_from` names: of a run's newest checkpoint, or of one.

    All ranks of a run call this together.

    Raises:
        ValueError: there are no such weights, they are damaged, or they do not fit the model or the
            tokenizer of the data.
    """
    path = Path(os.path.expanduser(config.training.init_from))
    run, checkpoint = locate(path)
    if not run.exists:
        raise ValueError(f"training.init_from = {path} is neither a run folder nor a checkpoint.")
    source, moments = run.load_config().model, config.training.init_moments
    checkpoint = _whole_checkpoint(run, checkpoint, source, "" if moments else MODEL)
    _refuse_other_shape(run, source, config.model)
    _refuse_other_tokenizer(run, dataset)
    if moments and not has_tensors(checkpoint, OPTIMIZER):
        raise ValueError(
            f"{checkpoint} has no moments of AdamW; leave out --training.init-moments."
        )
    return InitialWeights(checkpoint, moments, _differences(source, config.model))


def _whole_checkpoint(
    run: RunFolder, checkpoint: Path | None, model: ModelConfig, wanted: str
) -> Path:
    """`checkpoint`, or the newest whole one of the run."""
    if checkpoint is None:
        checkpoint, unusable = newest_checkpoint(
            run.checkpoints, model_identity(model), wanted, f"restore that value in {run.config}"
        )
        if checkpoint is None:
            reasons = "; ".join(unusable.values()) or f"{run.checkpoints} has none"
            raise ValueError(f"training.init_from needs a whole checkpoint: {reasons}.")
    elif damage := find_damage(checkpoint, wanted):
        raise ValueError(f"training.init_from names a damaged checkpoint: {damage}.")
    return checkpoint


SHAPE = {
    "vocab_size": "vocab_size",
    "n_embd": "n_embd",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "n_kv_heads": "kv_heads",
    "head_dim": "head_width",
    "ffn_hidden": "ffn_width",
    "tied_embeddings": "tied_embeddings",
}
"""Options that the shapes of the weights follow from, and where `ModelConfig` has their value."""


def _refuse_other_shape(run: RunFolder, source: ModelConfig, model: ModelConfig) -> None:
    for option, name in SHAPE.items():
        there, here = getattr(source, name), getattr(model, name)
        if there != here:
            raise ValueError(
                f"The weights of {run.path} have model.{option} = {there}, and this run has "
                f"{here}; set --model.{option.replace('_', '-')} {there}."
            )


def _refuse_other_tokenizer(run: RunFolder, dataset: Dataset) -> None:
    if fingerprint(load_tokenizer(run.tokenizer)) != dataset.manifest.tokenizer_fingerprint:
        raise ValueError(
            f"The weights of {run.path} belong to another tokenizer than the data "
            f"{dataset.folder}; prepare the data with {run.tokenizer}."
        )


def _differences(source: ModelConfig, model: ModelConfig) -> list[str]:
    options = ("max_seq_len", "theta", "eps", "logit_softcap")
    scaling = tuple(name for name in vars(model) if name.startswith("rope_"))
    return [
        f"model.{name} = {getattr(model, name)} instead of {getattr(source, name)}"
        for name in (*options, *scaling)
        if getattr(model, name) != getattr(source, name)
    ]
