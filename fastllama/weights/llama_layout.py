"""The layout of Hugging Face's `LlamaForCausalLM`: its config.json and its tensors.

Both sides rotate the halves of a head, so no rows are permuted. Hugging Face keeps q, k, v, gate
and up apart; `Llama` packs them by rows.
"""

import json
from dataclasses import dataclass
from typing import Any

from fastllama.config import ModelConfig
from fastllama.printable import one_line

ARCHITECTURE = "LlamaForCausalLM"


@dataclass(frozen=True)
class Rows:
    """Where a tensor of Hugging Face is in `Llama`."""

    parameter: str
    """Name of the parameter of `Llama`."""
    start: int
    """First row of the tensor in it."""
    shape: tuple[int, ...]
    """Shape of the tensor; rows come first."""


def tensors(model: ModelConfig) -> dict[str, Rows]:
    """All tensors of Hugging Face's model by name, in the order of its layers.

    A tied output projection is not among them: the embedding is its weight.
    """
    width = model.n_embd
    q, kv = model.attention_width, model.kv_heads * model.head_width
    found = {"model.embed_tokens.weight": Rows("embedding.weight", 0, (model.vocab_size, width))}
    for layer in range(model.n_layers):
        parts = {
            "input_layernorm": ("attention.norm", 0, (width,)),
            "self_attn.q_proj": ("attention.qkv", 0, (q, width)),
            "self_attn.k_proj": ("attention.qkv", q, (kv, width)),
            "self_attn.v_proj": ("attention.qkv", q + kv, (kv, width)),
            "self_attn.o_proj": ("attention.output", 0, (width, q)),
            "post_attention_layernorm": ("mlp.norm", 0, (width,)),
            "mlp.gate_proj": ("mlp.gate_up", 0, (model.ffn_width, width)),
            "mlp.up_proj": ("mlp.gate_up", model.ffn_width, (model.ffn_width, width)),
            "mlp.down_proj": ("mlp.down", 0, (width, model.ffn_width)),
        }
        for name, (module, start, shape) in parts.items():
            found[f"model.layers.{layer}.{name}.weight"] = Rows(
                f"blocks.{layer}.{module}.weight", start, shape
            )
    found["model.norm.weight"] = Rows("norm.weight", 0, (width,))
    if not model.tied_embeddings:
        found["lm_head.weight"] = Rows("output.weight", 0, (model.vocab_size, width))
    return found


def refuse_softcap(model: ModelConfig) -> None:
    """Raise ValueError if the model computes logits that Hugging Face's does not."""
    if model.logit_softcap is not None:
        raise ValueError(
            f"{ARCHITECTURE} has no bound on its logits, and the model was trained with "
            f"model.logit_softcap = {model.logit_softcap}; it cannot be exported."
        )


def config_json(model: ModelConfig, dtype: str, bos: int, eos: int) -> dict[str, Any]:
    """The content of config.json for a model whose weights are saved in `dtype`."""
    content: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.n_embd,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.eps,
        "rope_theta": model.theta,
        "rope_scaling": None,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if model.rope_scaling_factor != 1:
        content["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_max_seq_len,
        }
    return content


@dataclass(frozen=True)
class RotaryJson:
    """The objects `rope_parameters` (transformers 5) and `rope_scaling` (before)."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float | None = None


@dataclass(frozen=True)
class ArchitectureJson:
    """What a config.json of any model says about its kind."""

    architectures: list[str] | None = None
    model_type: str = "llama"


@dataclass(frozen=True)
class LlamaJson:
    """What an import reads of a config.json. Defaults are those of transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RotaryJson | None = None
    rope_parameters: RotaryJson | None = None
    eos_token_id: int | list[int] | None = 2
    auto_map: Any = None
    hidden_act: Any = "silu"
    attention_bias: Any = False
    mlp_bias: Any = False
    sliding_window: Any = None
    partial_rotary_factor: Any = 1.0
    quantization_config: Any = None


def refuse_other_architecture(found: ArchitectureJson, source: str) -> None:
    """Raise ValueError if a config.json describes another model; `source` names the file."""
    is_other = (found.architectures or [ARCHITECTURE]) != [ARCHITECTURE]
    if is_other or found.model_type != "llama":
        described = found.architectures if is_other else found.model_type
        raise ValueError(
            f"{source} describes {_shown(described)}, and only {ARCHITECTURE} can be imported."
        )


def model_config(found: LlamaJson, source: str) -> ModelConfig:
    """The model that a config.json of a Llama describes; `source` names the file in errors.

    Raises:
        ValueError: `Llama` computes another model; the sentence has the reason.
    """
    _refuse_other_options(found, source)
    n_heads = found.num_attention_heads
    is_derived = found.head_dim is None or found.head_dim * n_heads == found.hidden_size
    return ModelConfig(
        vocab_size=found.vocab_size,
        n_embd=found.hidden_size,
        n_layers=found.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=found.num_key_value_heads,
        head_dim=None if is_derived else found.head_dim,
        ffn_hidden=found.intermediate_size,
        eps=found.rms_norm_eps,
        max_seq_len=found.max_position_embeddings,
        tied_embeddings=found.tie_word_embeddings,
        **_rotary_options(found, source),
    )


def _refuse_other_options(found: LlamaJson, source: str) -> None:
    """Raise ValueError if the file describes anything that `Llama` does not compute."""
    if found.auto_map is not None:
        raise ValueError(
            f"{source} names code of its own (auto_map), and an import executes no code; save the "
            f"model with the {ARCHITECTURE} of transformers."
        )
    only: dict[str, Any] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }
    for name, computed in only.items():
        value = getattr(found, name)
        if value is not None and value != computed:
            raise ValueError(
                f"{source} has {name} = {_shown(value)}, and fastllama's model computes only "
                f"{name} = {_shown(computed)}; this model cannot be imported."
            )


def _rotary_options(found: LlamaJson, source: str) -> dict[str, Any]:
    """Options of the rotary embedding, by their names in `ModelConfig`."""
    # In the order of transformers.
    rotary = found.rope_scaling or found.rope_parameters or RotaryJson()
    if rotary.partial_rotary_factor not in (None, 1.0):
        raise ValueError(
            f"{source} has partial_rotary_factor = {rotary.partial_rotary_factor}, and fastllama's "
            "model rotates whole heads; this model cannot be imported."
        )
    theta = found.rope_theta if rotary.rope_theta is None else rotary.rope_theta
    kind = rotary.rope_type or rotary.type or "default"
    if kind == "default":
        return {"theta": theta}
    if kind != "llama3":
        raise ValueError(
            f"{source} has rotary embeddings of type {_shown(kind)}, and fastllama's model "
            "computes only default and llama3; this model cannot be imported."
        )
    options = {
        "rope_scaling_factor": rotary.factor,
        "rope_low_freq_factor": rotary.low_freq_factor,
        "rope_high_freq_factor": rotary.high_freq_factor,
        "rope_original_max_seq_len": rotary.original_max_position_embeddings,
    }
    if None in options.values():
        raise ValueError(
            f"{source} has rotary embeddings of type llama3 without all of factor, "
            "low_freq_factor, high_freq_factor and original_max_position_embeddings; add them."
        )
    return {"theta": theta, **options}


def _shown(value: Any) -> str:
    return one_line(json.dumps(value), 60)
