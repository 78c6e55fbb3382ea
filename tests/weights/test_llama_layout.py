"""The layout of Hugging Face's Llama: config.json there and back, and every row once."""

import dataclasses
import json

import pytest
import torch

from fastllama.config import ModelConfig
from fastllama.model.llama import Llama
from fastllama.typed_json import parse_json
from fastllama.weights.llama_layout import (
    LlamaJson,
    config_json,
    model_config,
    refuse_softcap,
    tensors,
)
from fastllama_kernels import REFERENCE

LLAMA_3_SCALING = {
    "rope_scaling_factor": 32.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_seq_len": 64,
}
SMALL = ModelConfig(vocab_size=100, n_embd=48, n_layers=2, n_heads=6, max_seq_len=64)
MODELS = {
    "every head has its keys": SMALL,
    "grouped": dataclasses.replace(SMALL, n_kv_heads=2, theta=500000.0, eps=1e-6),
    "one head of keys": dataclasses.replace(SMALL, n_kv_heads=1, tied_embeddings=True),
    "wide heads": dataclasses.replace(SMALL, n_kv_heads=3, head_dim=20, ffn_hidden=77),
    "scaled": dataclasses.replace(SMALL, **LLAMA_3_SCALING, max_seq_len=128),
}


@pytest.mark.parametrize("name", MODELS)
def test_config_there_and_back(name: str) -> None:
    model = MODELS[name]
    content = json.dumps(config_json(model, "bfloat16", bos=2, eos=3))
    found = model_config(parse_json(content, LlamaJson, "config.json"), "config.json")
    # Widths that followed from other options have their values now.
    expected = dataclasses.replace(model, ffn_hidden=model.ffn_width, n_kv_heads=model.kv_heads)
    assert found == expected


@pytest.mark.parametrize("name", MODELS)
def test_every_row_of_every_weight_is_in_one_tensor(name: str) -> None:
    with torch.device("meta"):
        parameters = dict(Llama(MODELS[name], REFERENCE).named_parameters())
    places: dict[str, list[int]] = {parameter: [] for parameter in parameters}
    for rows in tensors(MODELS[name]).values():
        assert rows.shape[1:] == parameters[rows.parameter].shape[1:]
        places[rows.parameter] += range(rows.start, rows.start + rows.shape[0])
    for parameter, weight in parameters.items():
        assert places[parameter] == list(range(weight.shape[0])), parameter


def test_bound_on_the_logits_has_no_counterpart() -> None:
    refuse_softcap(SMALL)
    with pytest.raises(ValueError, match=r"model\.logit_softcap = 30\.0; it cannot be exported"):
        refuse_softcap(dataclasses.replace(SMALL, logit_softcap=30.0))
