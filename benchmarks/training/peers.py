"""Models of other libraries with our shape and weights, trained by the plain loop."""

from contextlib import ExitStack, nullcontext
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.training.job import Job, Trained
from benchmarks.training.plain import loader_batches, train_plainly
from benchmarks.training.workload import initial_model
from fastllama.distributed.world import distributed
from fastllama.model.llama import Llama


def train_huggingface(job: Job, *, compiled: bool = False, liger: bool = False) -> Trained:
    """Train Hugging Face's `LlamaForCausalLM` with SDPA."""
    details = f"transformers {version('transformers')}, SDPA, autocast"
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # Patches the classes that the model below is built from.
        apply_liger_kernel_to_llama()
        details += f", liger-kernel {version('liger-kernel')}"
    model = huggingface_model(initial_model(job.config, job.device)).train()
    forward = torch.compile(model) if compiled else model

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        # Targets are already shifted. `labels` only makes the model return a loss.
        output = forward(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False)
        return cast(Tensor, output.loss)

    with loader_batches(job) as next_batch:
        return train_plainly(
            job,
            loss_of,
            model.parameters,
            model.get_input_embeddings().weight,
            next_batch,
            details=f"{details}, compiled as a whole" if compiled else f"{details}, eager",
        )


def huggingface_model(llama: Llama) -> Any:
    """A `LlamaForCausalLM` with the shape and weights of `llama`, on its device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = llama.config
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.theta}
    if model.rope_scaling_factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_max_seq_len,
        }
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.n_embd,
        intermediate_size=model.ffn_width,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.max_seq_len,
        rms_norm_eps=model.eps,
        rope_parameters=rope,
        tie_word_embeddings=model.tied_embeddings,
        attn_implementation="sdpa",
    )
    with llama.embedding.weight.device:
        peer = LlamaForCausalLM(config)
    state = unpacked(
        llama,
        embedding="model.embed_tokens",
        norm="model.norm",
        output="lm_head",
        block="model.layers",
        attention_norm=["input_layernorm"],
        qkv=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        attention_output=["self_attn.o_proj"],
        mlp_norm=["post_attention_layernorm"],
        gate_up=["mlp.gate_proj", "mlp.up_proj"],
        down=["mlp.down_proj"],
    )
    peer.load_state_dict(state)
    return peer


def train_torchtitan(job: Job) -> Trained:
    """Train torchtitan's Llama 3 in the plain loop, compiled and sharded as by its trainer.

    torchtitan's trainer masks documents with FlexAttention. No contender masks documents, so
    attention is torchtitan's SDPA. The loss is its unchunked one, compiled.
    """
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder

    config = job.config
    with ExitStack() as stack:
        world = stack.enter_context(distributed(config))
        model = torchtitan_model(initial_model(config, job.device))
        if config.training.compile:
            for block in model.layers.values():
                block.compile(fullgraph=True)
        apply_fsdp_to_decoder(
            model,
            world.mesh,
            param_dtype=getattr(torch, config.training.dtype),
            reduce_dtype=torch.float32,
            pp_enabled=False,
        )

        def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

        loss = torch.compile(cross_entropy) if config.training.compile else cross_entropy
        return train_plainly(
            job,
            lambda tokens, targets: loss(model(tokens), targets),
            model.parameters,
            model.tok_embeddings.weight,
            stack.enter_context(loader_batches(job)),
            # FSDP casts the parameters, so autocast is not needed.
            autocast=nullcontext(),
            details=f"torchtitan {version('torchtitan')}, SDPA, FSDP2, blocks and loss "
            + ("compiled" if config.training.compile else "eager"),
        )


def torchtitan_model(llama: Llama) -> Any:
    """torchtitan's Llama 3 with the shape and weights of `llama`, on its device."""
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

    model = llama.config
    width, head_dim = model.n_embd, model.head_width
    rope = ComplexRoPE.Config(
        dim=head_dim,
        max_seq_len=model.max_seq_len,
        theta=model.theta,
        scaling="none" if model.rope_scaling_factor == 1.0 else "llama",
        scaling_factor=model.rope_scaling_factor,
        low_freq_factor=model.rope_low_freq_factor,
        high_freq_factor=model.rope_high_freq_factor,
        original_max_position_embeddings=model.rope_original_max_seq_len,
    )
    norm = RMSNorm.Config(normalized_shape=width, eps=model.eps)
    block = Llama3TransformerBlock.Config(
        attention_norm=norm,
        ffn_norm=norm,
        attention=make_gqa_config(
            dim=width,
            n_heads=model.n_heads,
            n_kv_heads=model.kv_heads,
            wqkv_param_init={},
            wo_param_init={},
            inner_attention=ScaledDotProductAttention.Config(),
            fuse_qkv=True,
            rope=rope,
        ),
        feed_forward=make_ffn_config(
            dim=width, hidden_dim=model.ffn_width, w1_param_init={}, w2w3_param_init={}
        ),
    )
    config = Llama3Model.Config(
        dim=width,
        vocab_size=model.vocab_size,
        enable_weight_tying=model.tied_embeddings,
        tok_embeddings=Embedding.Config(num_embeddings=model.vocab_size, embedding_dim=width),
        norm=norm,
        lm_head=Linear.Config(in_features=width, out_features=model.vocab_size),
        layers=[block] * model.n_layers,
    )
    with llama.embedding.weight.device:
        peer = config.build()
    state = unpacked(
        llama,
        embedding="tok_embeddings",
        norm="norm",
        output="lm_head",
        block="layers",
        attention_norm=["attention_norm"],
        qkv=[f"attention.qkv_linear.{name}" for name in ("wq", "wk", "wv")],
        attention_output=["attention.wo"],
        mlp_norm=["ffn_norm"],
        gate_up=["feed_forward.w1", "feed_forward.w3"],
        down=["feed_forward.w2"],
    )
    for name, weight in state.items():
        if name.endswith(("wq.weight", "wk.weight")):
            # torchtitan rotates pairs (x_2i, x_{2i+1}); we rotate pairs (x_i, x_{i + K/2}).
            halves = weight.view(-1, 2, head_dim // 2, width)
            state[name] = halves.transpose(1, 2).reshape(weight.shape)
    peer.load_state_dict(state)
    return peer


def unpacked(
    llama: Llama, *, embedding: str, norm: str, output: str, block: str, **parts: list[str]
) -> dict[str, Tensor]:
    """Weights of `llama` under the names of a peer, with packed projections split."""
    model, state = llama.config, llama.state_dict()
    heads = [model.n_heads, model.kv_heads, model.kv_heads]
    rows = {
        "attention.norm.weight": [model.n_embd],
        "attention.qkv.weight": [count * model.head_width for count in heads],
        "attention.output.weight": [model.n_embd],
        "mlp.norm.weight": [model.n_embd],
        "mlp.gate_up.weight": [model.ffn_width] * 2,
        "mlp.down.weight": [model.n_embd],
    }
    names = {"attention_norm": "attention.norm", "attention_output": "attention.output"}
    names |= {"qkv": "attention.qkv", "mlp_norm": "mlp.norm"}
    names |= {"gate_up": "mlp.gate_up", "down": "mlp.down"}
    peer = {f"{embedding}.weight": state["embedding.weight"]}
    peer |= {f"{norm}.weight": state["norm.weight"], f"{output}.weight": state["output.weight"]}
    for layer in range(model.n_layers):
        for part, peer_names in parts.items():
            packed = f"{names[part]}.weight"
            values = state[f"blocks.{layer}.{packed}"].split(rows[packed])
            for name, value in zip(peer_names, values, strict=True):
                peer[f"{block}.{layer}.{name}.weight"] = value
    return peer
