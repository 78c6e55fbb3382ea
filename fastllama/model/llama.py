"""The LLaMA that is trained: pre-norm decoder blocks over a set of operators.

Shapes, here and in the whole repository:
    B  sequences of a batch            H  query heads
    T  positions of a sequence         G  key/value heads
    S  keys a query may see            K  width of a head
    N  rows, B * T                     R  rotary pairs of a head, K / 2
    D  width of the residual stream    P  positions in the rotary tables
    V  entries of the vocabulary       E  width of packed q, k and v, (H + 2G) * K
    F  width of the feed-forward       I  width of packed gate and up, 2F

Modules hold the weights; `Operators` do the arithmetic. An operator that fuses a norm with the
matmul after it takes both weights, so that the normalised rows between them are never saved.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastllama.config import ModelConfig
from fastllama.model.kv_cache import KVCache
from fastllama.model.rotary import rotary_tables
from fastllama_kernels import Operators, linear


class Linear(nn.Linear):
    """A projection without bias."""

    main_grad_of: Callable[[], Tensor | None] | None = None
    """Where the backward adds the gradient of the weight, if asked; None returns it to autograd."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    @property
    def main_grad(self) -> Tensor | None:
        """Float32 sum of the weight's gradients over micro-batches, while there is one."""
        return None if self.main_grad_of is None else self.main_grad_of()

    def reset_parameters(self) -> None:
        """Leave the weight empty, as `Llama` does. PyTorch's own would import its compiler."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight^T."""
        return linear(x, self.weight, self.main_grad)


class Embedding(nn.Embedding):
    """A table of vectors by token."""

    def reset_parameters(self) -> None:
        """Leave the weight empty, as `Llama` does. PyTorch's own would import its compiler."""


class Attention(nn.Module):
    """Norm, packed q, k and v, rotary positions, causal grouped-query attention, projection."""

    def __init__(self, config: ModelConfig, operators: Operators, layer: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.kv_heads
        packed_width = (config.n_heads + 2 * config.kv_heads) * config.head_width
        self.norm = nn.RMSNorm(config.n_embd, eps=config.eps)
        self.qkv = Linear(config.n_embd, packed_width)
        self.output = Linear(config.attention_width, config.n_embd)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.operators = operators
        self.layer = layer

    def forward(
        self,
        x_BTD: Tensor,
        stream_BTD: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        last_only: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add `x` to the residual stream and attend; return (this branch's output, the stream)."""
        qkv_BTE, stream_BTD = self.operators.add_rms_norm_linear(
            x_BTD,
            stream_BTD,
            self.norm.weight,
            self.norm.eps,
            self.qkv.weight,
            self.qkv.main_grad,
        )
        q_BTHK, k_BSGK, v_BSGK = self.operators.rope(
            qkv_BTE, *rotary, self.n_heads, self.n_kv_heads
        )
        if cache is not None:
            kv_BSXK = cache.extend(self.layer, torch.cat((k_BSGK, v_BSGK), dim=2))
            k_BSGK, v_BSGK = kv_BSXK.chunk(2, dim=2)
        if last_only:
            q_BTHK, stream_BTD = q_BTHK[:, -1:], stream_BTD[:, -1:]
        out_BTHK = self.operators.attention(q_BTHK, k_BSGK, v_BSGK, cu_seqlens=cu_seqlens)
        return self.dropout(self.output(out_BTHK.flatten(2))), stream_BTD


class MLP(nn.Module):
    """Norm, then SwiGLU on one packed projection, gate first."""

    def __init__(self, config: ModelConfig, operators: Operators) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.n_embd, eps=config.eps)
        self.gate_up = Linear(config.n_embd, 2 * config.ffn_width)
        self.down = Linear(config.ffn_width, config.n_embd)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.operators = operators

    def forward(self, x_BTD: Tensor, stream_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Add `x` to the residual stream and feed forward; return (branch output, stream)."""
        gate_up_BTI, stream_BTD = self.operators.add_rms_norm_linear(
            x_BTD,
            stream_BTD,
            self.norm.weight,
            self.norm.eps,
            self.gate_up.weight,
            self.gate_up.main_grad,
        )
        out_BTD = self.operators.swiglu_linear(gate_up_BTI, self.down.weight, self.down.main_grad)
        return self.dropout(out_BTD), stream_BTD


class Block(nn.Module):
    """One decoder layer: two residual branches.

    A branch adds the output of the branch before it to the stream, in the same pass over memory as
    its norm. So a block receives an output that is still to be added, and returns one.
    """

    def __init__(self, config: ModelConfig, operators: Operators, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, operators, layer)
        self.mlp = MLP(config, operators)

    def forward(
        self,
        x_BTD: Tensor,
        stream_BTD: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        last_only: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run both branches; return (output to add, stream), (B, T, D) each.

        `rotary` is (cos, sin), (T, R) each. The first block gets no stream: `x` becomes it. With
        `last_only` the results are those of the last position, (B, 1, D).
        """
        x_BTD, stream_BTD = self.attention(x_BTD, stream_BTD, rotary, cache, last_only, cu_seqlens)
        x_BTD, stream_BTD = self.mlp(x_BTD, stream_BTD)
        return x_BTD, stream_BTD


class FinalNorm(nn.RMSNorm):
    """The norm after the last block. A module that is called, so that FSDP2 can shard it."""

    def __init__(self, config: ModelConfig, operators: Operators) -> None:
        super().__init__(config.n_embd, eps=config.eps)
        self.operators = operators

    def forward(self, x_BTD: Tensor, stream_BTD: Tensor | None) -> Tensor:  # type: ignore[override]
        """Add `x` to the residual stream and normalise it, (B, T, D)."""
        return self.operators.add_rms_norm(x_BTD, stream_BTD, self.weight, self.eps)[0]


class Output(Linear):
    """Output projection, with the loss inside the forward."""

    def __init__(
        self, config: ModelConfig, operators: Operators, *, z_loss: float, label_smoothing: float
    ) -> None:
        super().__init__(config.n_embd, config.vocab_size)
        self.softcap = config.logit_softcap
        self.loss_options = {"z_loss": z_loss, "label_smoothing": label_smoothing}
        self.operators = operators

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, targets_BT: Tensor | None = None, return_losses: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the mean loss, a float32 scalar, or the logits (B, T, V) without `targets`.

        With `return_losses` also the loss of each target, (B, T) float32, without a gradient.
        """
        if targets_BT is not None:
            return self.operators.linear_cross_entropy(
                x_BTD,
                self.weight,
                targets_BT,
                softcap=self.softcap,
                main_grad=self.main_grad,
                return_losses=return_losses,
                **(self.loss_options if self.training else {}),
            )
        logits_BTV = linear(x_BTD, self.weight)
        if self.softcap is None:
            return logits_BTV
        wide_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return (self.softcap * torch.tanh(wide_BTV / self.softcap)).to(logits_BTV.dtype)


class Llama(nn.Module):
    """Embedding, blocks, final norm, output projection, and the loss inside the forward."""

    cos_PR: Tensor
    sin_PR: Tensor

    def __init__(
        self,
        config: ModelConfig,
        operators: Operators,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        """Allocate on the current default device; `init_weights` or a checkpoint fills it.

        `z_loss` and `label_smoothing` are part of the loss in training mode only.
        """
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(
            Block(config, operators, layer) for layer in range(config.n_layers)
        )
        self.norm = FinalNorm(config, operators)
        self.output = Output(config, operators, z_loss=z_loss, label_smoothing=label_smoothing)
        self.tie_weights()
        table_PR = torch.empty(config.max_seq_len, config.head_width // 2, dtype=torch.float32)
        self.register_buffer("cos_PR", table_PR, persistent=False)
        self.register_buffer("sin_PR", torch.empty_like(table_PR), persistent=False)
        self.init_rotary()

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        return_losses: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the mean loss, a float32 scalar, or the logits (B, T, V) without `targets`.

        Args:
            tokens_BT: token ids (B, T), T at most max_seq_len.
            targets_BT: the next token of each position, (B, T).
            cache: earlier positions to attend to as well; it grows by T.
            last_only: compute only the logits of the last position, (B, 1, V).
            return_losses: also return the loss of each target, (B, T) float32, without a gradient.
            cu_seqlens: (n_docs + 1,) int32, the start of each packed document among the B * T
                tokens, padded with B * T; not together with `cache`. Attention stays inside of a
                document. Its rotary part depends on distances only, so positions need no restart.
                None means one document per sequence.
        """
        # First, since torch.compile leaves it out and begins its graph behind it.
        x_BTD, stream_BTD = self.embedding(tokens_BT), None
        start = 0 if cache is None else cache.length
        positions = slice(start, start + tokens_BT.shape[1])
        rotary = self.cos_PR[positions], self.sin_PR[positions]
        for layer, block in enumerate(self.blocks, start=1):
            # Of the last block, no other position is read again.
            last = last_only and layer == len(self.blocks)
            x_BTD, stream_BTD = block(x_BTD, stream_BTD, rotary, cache, last, cu_seqlens)
        if cache is not None:
            cache.length = positions.stop
        x_BTD = self.norm(x_BTD, stream_BTD)
        result: Tensor | tuple[Tensor, Tensor] = self.output(x_BTD, targets_BT, return_losses)
        return result

    def tie_weights(self) -> None:
        """Use the embedding as the output projection, if the configuration ties them.

        Call it again after `to_empty`, which allocates two weights.
        """
        if self.config.tied_embeddings:
            self.output.weight = self.embedding.weight

    def init_rotary(self, theta: float | None = None) -> None:
        """Fill the rotary tables, unless the model is on the meta device.

        `theta` takes the place of the configuration's.
        """
        config = self.config if theta is None else replace(self.config, theta=theta)
        if not self.cos_PR.is_meta:
            cos_PR, sin_PR = rotary_tables(config)
            self.cos_PR.copy_(cos_PR)
            self.sin_PR.copy_(sin_PR)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every weight from a normal distribution; the first loss is then near ln V.

        | weight                         | standard deviation               |
        |--------------------------------|----------------------------------|
        | qkv, gate_up                   | fan_in^-1/2                      |
        | attention.output, mlp.down     | fan_in^-1/2 / sqrt(2 n_layers)   |
        | embedding                      | 0.02, or as output when tied     |
        | output                         | n_embd^-1/2 / 4                  |
        | norms                          | all ones                         |

        The residual branches are scaled down so that their sum over the layers keeps unit variance
        (Radford et al. 2019). The output projection is scaled so that the logits start with
        standard deviation 1/4, which adds 1/32 to ln V. Each weight has its own generator, seeded
        by its name, so the values do not depend on how the model is sharded.
        """
        self.init_rotary()
        for name, parameter in self.named_parameters():
            std = self._initial_std(name, parameter.shape)
            if std is None:
                parameter.fill_(1.0)
                continue
            generator = torch.Generator(parameter.device)
            generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            full.normal_(std=std, generator=generator)
            if isinstance(parameter, DTensor):
                # src_data_rank=None sends nothing: every rank drew the same values.
                full = distribute_tensor(
                    full, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(full)

    def _initial_std(self, name: str, shape: torch.Size) -> float | None:
        if name.endswith("norm.weight"):
            return None
        if name == "output.weight" or (name == "embedding.weight" and self.config.tied_embeddings):
            return self.config.n_embd**-0.5 / 4
        if name == "embedding.weight":
            return 0.02
        residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
        return shape[1] ** -0.5 / (math.sqrt(2 * self.config.n_layers) if residual else 1)
