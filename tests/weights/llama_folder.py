"""Small folders in the layout of Hugging Face's Llama, written without transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from fastllama.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Of the wavelengths up to 32 positions some are kept, some interpolated and some divided.
    "original_max_position_embeddings": 32,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama 2": {"num_key_value_heads": 4},
    "Llama 3": {"rope_theta": 500000.0},
    "Llama 3.1": {"rope_theta": 500000.0, "rope_scaling": LLAMA_3_SCALING},
    "Llama 3.2": {"tie_word_embeddings": True, "rope_scaling": LLAMA_3_SCALING},
    "TinyLlama": {"rms_norm_eps": 1e-5, "intermediate_size": 88},
    "SmolLM2": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 36,
        "tie_word_embeddings": True,
    },
    "one key/value head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
}
"""Fields of config.json, over `CONFIG`, that give the shapes of known models in small."""
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors of the model that `config` describes, by the names of transformers."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.self_attn.q_proj.weight": (q, width),
            f"{prefix}.self_attn.k_proj.weight": (kv, width),
            f"{prefix}.self_attn.v_proj.weight": (kv, width),
            f"{prefix}.self_attn.o_proj.weight": (width, q),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.mlp.gate_proj.weight": (hidden, width),
            f"{prefix}.mlp.up_proj.weight": (hidden, width),
            f"{prefix}.mlp.down_proj.weight": (width, hidden),
        }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    generator = torch.Generator().manual_seed(0)
    # Norms near 1, so that activations, attention scores and logits are near 1 too.
    return {
        name: (torch.randn(shape, generator=generator) / width**0.5 + (len(shape) == 1)).to(dtype)
        for name, shape in shapes.items()
    }


def save_sharded(tensors: dict[str, Tensor], path: Path, n_files: int) -> None:
    """Write the tensors in turn into several files, and their index."""
    weight_map = {}
    for number in range(n_files):
        file = f"model-{number + 1:05d}-of-{n_files:05d}.safetensors"
        part = dict(list(tensors.items())[number::n_files])
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index))


def write_llama(
    path: Path, dtype: torch.dtype = torch.float32, n_files: int = 1, **fields: Any
) -> dict[str, Tensor]:
    """Write a folder with a model of random weights; return its tensors.

    `fields` replace those of `CONFIG`.
    """
    config = CONFIG | fields
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_tokenizer(train_tokenizer(["def self return"] * 9, 270), path / "tokenizer.json")
    tensors = random_tensors(config, dtype)
    if n_files == 1:
        save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    else:
        save_sharded(tensors, path, n_files)
    return tensors


def put_before_texts(path: Path, token: int = 0, template: str = "<SOS> $A") -> None:
    """Make the tokenizer of a folder put `<SOS>` before every text, as those of Llama 2 and 3.

    `token` is the id of `<SOS>`. Another `template` may also put `<EOS>` somewhere.
    """
    tokenizer = load_tokenizer(path / "tokenizer.json")
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single=template, special_tokens=[("<SOS>", token), ("<EOS>", 1)]
    )
    save_tokenizer(tokenizer, path / "tokenizer.json")
