"""A small LLaMA and its optimizer."""

import dataclasses

import torch

from fastllama.config import ModelConfig, OptimizerConfig
from fastllama.model.llama import Llama
from fastllama.optim.adamw import build_optimizer
from fastllama_kernels import REFERENCE

MODEL = ModelConfig(vocab_size=32, n_embd=16, n_layers=2, n_heads=2, multiple_of=16, max_seq_len=8)
# The weight decay is large, so that decaying the wrong parameters shows.
CONFIG = OptimizerConfig(max_lr=1e-2, weight_decay=0.5)


def build(tied: bool = False) -> tuple[Llama, torch.optim.AdamW]:
    """`MODEL` with the same weights in every call, and its optimizer."""
    model = Llama(dataclasses.replace(MODEL, tied_embeddings=tied), REFERENCE)
    model.init_weights(seed=0)
    return model, build_optimizer(model, CONFIG)


def is_decayed(name: str) -> bool:
    """Whether weight decay should apply to a parameter."""
    return "norm" not in name and name != "embedding.weight"
