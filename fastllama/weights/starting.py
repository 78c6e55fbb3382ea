"""The weights that a new run starts from, as `training.init_from` names them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastllama.checkpoints.folder import locate
from fastllama.checkpoints.reading import (
    find_checkpoint,
    has_tensors,
    load_tensors,
    stage_config,
)
from fastllama.checkpoints.state import MODEL, OPTIMIZER, model_tensors, training_tensors
from fastllama.config import Config, ModelConfig
from fastllama.data.dataset import Dataset
from fastllama.data.tokenizer import load_tokenizer
from fastllama.data.tokenizer_variants import description
from fastllama.weights.importing import HuggingFaceModel, open_hugging_face


@dataclass(frozen=True)
class InitialWeights:
    """Weights that fit the model of a new run."""

    path: Path
    """A checkpoint of another run, or the folder of `hugging_face`."""
    moments: bool
    """Whether AdamW's moments are taken too."""
    differences: list[str]
    """What this run computes with the weights in another way, as `option = value instead of`."""
    hugging_face: HuggingFaceModel | None = None

    @torch.no_grad()
    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the weights, and the moments if they are wanted, sharded in any way.

        Raises:
            ValueError: the weights cannot be read.
        """
        if self.hugging_face is None:
            wanted = training_tensors(model, optimizer) if self.moments else model_tensors(model)
            load_tensors(self.path, wanted)
            return
        for name, weight in model_tensors(model).items():
            full = self.hugging_face.read(name).to(weight.device)
            if isinstance(weight, DTensor):
                # src_data_rank=None sends nothing: every rank has read the same values.
                full = distribute_tensor(
                    full, weight.device_mesh, weight.placements, src_data_rank=None
                )
            weight.copy_(full)

    def __str__(self) -> str:
        parts = [f"{self.path}{', with the moments of AdamW' if self.moments else ''}"]
        return "; ".join([*parts, *self.differences])


def find_initial_weights(config: Config, dataset: Dataset) -> InitialWeights:
    """Find the weights that `training.init_from` names.

    They are those of a run's newest whole checkpoint, of one checkpoint, or of a Llama in a folder
    of Hugging Face. All ranks of a run call this together.

    Raises:
        ValueError: there are no such weights, they are damaged, or they do not fit the model or the
            tokenizer of the data.
    """
    path, moments = (
        Path(os.path.expanduser(config.training.init_from)),
        config.training.init_moments,
    )
    run, _ = locate(path)
    hugging_face = None
    if run.exists:
        _, path = find_checkpoint(path, "" if moments else MODEL)
        source, tokenizer = stage_config(run.load_config(), path).model, run.tokenizer
    else:
        try:
            hugging_face = open_hugging_face(path)
        except ValueError as error:
            raise ValueError(f"training.init_from: {error}") from None
        source, tokenizer = hugging_face.model, hugging_face.tokenizer
    _refuse_other_shape(path, source, config.model)
    _refuse_other_tokenizer(path, tokenizer, dataset)
    if moments and (hugging_face is not None or not has_tensors(path, OPTIMIZER)):
        raise ValueError(f"{path} has no moments of AdamW; leave out --training.init-moments.")
    return InitialWeights(path, moments, _differences(source, config.model), hugging_face)


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


def _refuse_other_shape(path: Path, source: ModelConfig, model: ModelConfig) -> None:
    for option, name in SHAPE.items():
        there, here = getattr(source, name), getattr(model, name)
        if there != here:
            raise ValueError(
                f"The weights of {path} have model.{option} = {there}, and this run has "
                f"{here}; set --model.{option.replace('_', '-')} {there}."
            )


def _refuse_other_tokenizer(path: Path, tokenizer: Path, dataset: Dataset) -> None:
    if _without_template(load_tokenizer(tokenizer)) != _without_template(dataset.tokenizer):
        raise ValueError(
            f"The weights of {path} belong to another tokenizer than the data {dataset.folder}; "
            f"prepare the data with {tokenizer}."
        )


def _without_template(tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the ids of a text: a template of tokens around it, and its length, do not."""
    return description(tokenizer) | dict.fromkeys(("post_processor", "truncation", "padding"))


def _differences(source: ModelConfig, model: ModelConfig) -> list[str]:
    options = ("max_seq_len", "theta", "eps", "logit_softcap")
    scaling = tuple(name for name in vars(model) if name.startswith("rope_"))
    return [
        f"model.{name} = {getattr(model, name)} instead of {getattr(source, name)}"
        for name in (*options, *scaling)
        if getattr(model, name) != getattr(source, name)
    ]
