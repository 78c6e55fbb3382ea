"""The checkpoint that an export reads: found, checked, and read one tensor at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastllama.checkpoints.reading import (
    find_checkpoint,
    open_tensors,
    read_end_token,
    read_start_token,
    stage_config,
)
from fastllama.checkpoints.state import checkpoint_name, model_tensors
from fastllama.config import Config
from fastllama.inference.load import run_tokenizer
from fastllama.model.llama import Llama
from fastllama.run_folder import RunFolder
from fastllama.weights.llama_layout import refuse_softcap, tensors
from fastllama_kernels import REFERENCE


@dataclass(frozen=True)
class Source:
    """A whole checkpoint, whose model Hugging Face and llama.cpp can compute."""

    run: RunFolder
    checkpoint: Path
    weights: str
    """`MODEL`, or `EMA` for the averaged weights."""
    config: Config
    tokenizer: Tokenizer
    end_token: int
    start_token: int | None
    """The token in front of every document, if the model was trained with one."""

    @property
    def bos_token(self) -> int:
        """What other programs call the token of a beginning."""
        return self.end_token if self.start_token is None else self.start_token

    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        """The tensors of Hugging Face's model with these names, float32, on the CPU.

        Each is a view of a weight of `Llama`, which is read once for neighbouring names.

        Raises:
            ValueError: the checkpoint cannot be read.
        """
        with torch.device("meta"):
            shapes = model_tensors(Llama(self.config.model, REFERENCE), self.weights)
        layout = tensors(self.config.model)
        with open_tensors(self.checkpoint) as read:
            last, packed = "", torch.empty(0)
            for name in names:
                rows = layout[name]
                parameter = f"{self.weights}{checkpoint_name(rows.parameter)}"
                if parameter != last:
                    # Freed before the next one is read.
                    packed = torch.empty(0)
                    last, packed = parameter, read(parameter, shapes[parameter].shape)
                yield packed[rows.start : rows.start + rows.shape[0]]


def find_source(path: Path, weights: str) -> Source:
    """The newest whole checkpoint of a run folder, or the checkpoint that `path` names.

    Raises:
        ValueError: there is no whole checkpoint or it has no such weights, its files do not belong
            together, or its model has a bound on the logits.
        OSError: a file cannot be read.
    """
    run, checkpoint = find_checkpoint(path, weights)
    config = stage_config(run.load_config(), checkpoint)
    refuse_softcap(config.model)
    tokenizer = run_tokenizer(run, config.model.vocab_size)
    end_token = read_end_token(checkpoint, config.model.vocab_size)
    start_token = read_start_token(checkpoint, config.model.vocab_size)
    return Source(run, checkpoint, weights, config, tokenizer, end_token, start_token)
