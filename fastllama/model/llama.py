"""The LLaMA that is trained: pre-norm decoder blocks over the operators it is given.

Shapes, here and in the whole repository:
    B  sequences of a batch            H  query heads
    T  positions of a sequence         G  key/value heads
    S  keys a query may see            K  width of a head
    N  rows, B * T                     R  rotary pairs of a head, K / 2
    D  width of the residual stream    P  positions in the rotary tables
    V  entries of the vocabulary       E  width of packed q, k and v, (H + 2G) * K
    F  width of the feed-forward       I  width of packed gate and up, 2F
"""

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from fastllama.config import ModelConfig
from fastllama_kernels import Operators


class KVCache:
    """Keys and values of the positions decoded so far, for every layer."""

    def __init__(self, config: ModelConfig) -> None:
        """Start empty; the first `extend` of a layer makes room for `max_seq_len` positions."""
        self.length = 0
        self._max_seq_len = config.max_seq_len
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write new positions of one layer; return all of its keys and values (B, S, G, K)."""
        if layer not in self._layers:
            batch_size, _, *head = k_BTGK.shape
            shape = (batch_size, self._max_seq_len, *head)
            self._layers[layer] = (k_BTGK.new_empty(shape), v_BTGK.new_empty(shape))
        end = self.length + k_BTGK.shape[1]
        for buffer, new in zip(self._layers[layer], (k_BTGK, v_BTGK), strict=True):
            buffer[:, self.length : end] = new
        k_BSGK, v_BSGK = self._layers[layer]
        return k_BSGK[:, :end], v_BSGK[:, :end]


class RMSNorm(nn.Module):
    """Adds the branch to the residual stream and normalises the sum."""

    def __init__(self, config: ModelConfig, operators: Operators) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_embd))
        self.eps = config.eps
        self.operators = operators

    def forward(
        self, x_BTD: Tensor, residual_BTD: Tensor | None, projection: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (normalised sum, sum); the first projected where a `projection` is given.

        None for the residual starts the stream with `x`. Norm and projection are one operator,
        so that what is between them need not be saved.
        """
        if projection is None:
            return self.operators.add_rms_norm(x_BTD, residual_BTD, self.weight, self.eps)
        return self.operators.add_rms_norm_linear(
            x_BTD, residual_BTD, self.weight, self.eps, projection
        )


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, on one packed projection."""

    def __init__(self, config: ModelConfig, operators: Operators, layer: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.kv_heads
        width = (config.n_heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.n_embd, width, bias=False)
        self.output = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.operators = operators
        self.layer = layer

    def forward(
        self, qkv_BTE: Tensor, cos_TR: Tensor, sin_TR: Tensor, cache: KVCache | None
    ) -> Tensor:
        q_BTHK, k_BSGK, v_BSGK = self.operators.rope(
            qkv_BTE, cos_TR, sin_TR, self.n_heads, self.n_kv_heads
        )
        if cache is not None:
            k_BSGK, v_BSGK = cache.extend(self.layer, k_BSGK, v_BSGK)
        out_BTHK = self.operators.attention(q_BTHK, k_BSGK, v_BSGK)
        return self.dropout(self.output(out_BTHK.flatten(2)))


class MLP(nn.Module):
    """SwiGLU feed-forward on one packed projection, gate first."""

    def __init__(self, config: ModelConfig, operators: Operators) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.ffn_hidden, bias=False)
        self.down = nn.Linear(config.ffn_hidden, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.operators = operators

    def forward(self, gate_up_BTI: Tensor) -> Tensor:
        return self.dropout(self.operators.swiglu_linear(gate_up_BTI, self.down.weight))


class Block(nn.Module):
    """One decoder layer: norm, project, attend; norm, project, gate.

    `checkpoint`, where it is set, runs the layer so that the backward can compute it again.
    """

    checkpoint: Callable[..., tuple[Tensor, Tensor]] | None = None

    def __init__(self, config: ModelConfig, operators: Operators, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config, operators)
        self.attention = Attention(config, operators, layer)
        self.mlp_norm = RMSNorm(config, operators)
        self.mlp = MLP(config, operators)

    def forward(
        self,
        x_BTD: Tensor,
        residual_BTD: Tensor | None,
        cos_TR: Tensor,
        sin_TR: Tensor,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take the branch still to be added and the stream; return the same, a layer on."""
        inputs = x_BTD, residual_BTD, cos_TR, sin_TR, cache
        if self.checkpoint is None:
            return self._layer(*inputs)
        return self.checkpoint(self._layer, *inputs)

    def _layer(
        self,
        x_BTD: Tensor,
        residual_BTD: Tensor | None,
        cos_TR: Tensor,
        sin_TR: Tensor,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        qkv_BTE, residual_BTD = self.attention_norm(x_BTD, residual_BTD, self.attention.qkv.weight)
        x_BTD = self.attention(qkv_BTE, cos_TR, sin_TR, cache)
        gate_up_BTI, residual_BTD = self.mlp_norm(x_BTD, residual_BTD, self.mlp.gate_up.weight)
        return self.mlp(gate_up_BTI), residual_BTD


class Llama(nn.Module):
    """Embedding, blocks, final norm, output projection, and the loss inside the forward."""

    cos_PR: Tensor
    sin_PR: Tensor

    def __init__(self, config: ModelConfig, operators: Operators) -> None:
        """Allocate on the current default device; `init_weights` or a checkpoint fills it."""
        super().__init__()
        self.config = config
        self.operators = operators
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(
            Block(config, operators, layer) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(config, operators)
        self.output = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        table = torch.empty(config.max_seq_len, config.head_dim // 2, dtype=torch.float32)
        self.register_buffer("cos_PR", table, persistent=False)
        self.register_buffer("sin_PR", torch.empty_like(table), persistent=False)
        self.init_rope()

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the mean loss, float32, or without `targets` the logits (B, T, V).

        Args:
            tokens_BT: token ids (B, T), T at most max_seq_len.
            targets_BT: the next token of each, (B, T).
            cache: earlier positions to attend to as well; it grows by T.
        """
        start = 0 if cache is None else cache.length
        positions = slice(start, start + tokens_BT.shape[1])
        cos_TR, sin_TR = self.cos_PR[positions], self.sin_PR[positions]
        x_BTD, residual_BTD = self.embedding(tokens_BT), None
        for block in self.blocks:
            x_BTD, residual_BTD = block(x_BTD, residual_BTD, cos_TR, sin_TR, cache)
        x_BTD, _ = self.norm(x_BTD, residual_BTD)
        if cache is not None:
            cache.length = positions.stop
        if targets_BT is None:
            return F.linear(x_BTD, self.output.weight)
        return self.operators.linear_cross_entropy(x_BTD, self.output.weight, targets_BT)

    def tie_weights(self) -> None:
        """Make the output projection the embedding, where the configuration says so.

        Needed again after `to_empty`, which gives each of the two names memory of its own.
        """
        if self.config.tied_embeddings:
            self.output.weight = self.embedding.weight

    def init_rope(self) -> None:
        """Fill the rotary tables (max_seq_len, K/2), computed in float64, kept in float32."""
        if self.cos_PR.is_meta:
            return
        positions = torch.arange(self.config.max_seq_len, dtype=torch.float64)
        angles = torch.outer(positions, rope_frequencies(self.config))
        self.cos_PR.copy_(angles.cos())
        self.sin_PR.copy_(angles.sin())

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

        The residual branches are scaled down so that their sum over the layers keeps unit
        variance (Radford et al. 2019); the output projection so that the logits start with
        standard deviation 1/4, which costs 1/32 over ln V. Each weight has its own generator,
        seeded by its name, so the values do not depend on how the model is sharded.
        """
        self.init_rope()
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
                # None: every rank drew the same values, nothing has to be sent.
                full = distribute_tensor(
                    full, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(full)

    def _initial_std(self, name: str, shape: torch.Size) -> float | None:
        if "norm" in name:
            return None
        if name == "output.weight" or (name == "embedding.weight" and self.config.tied_embeddings):
            return self.config.n_embd**-0.5 / 4
        if name == "embedding.weight":
            return 0.02
        residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
        return shape[1] ** -0.5 / (math.sqrt(2 * self.config.n_layers) if residual else 1)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle a position turns each pair by, (K/2,) float64: theta^(-2i/K), with Llama 3 scaling.

    Scaling (Llama 3.1, https://arxiv.org/abs/2407.21783): wavelengths longer than
    context / low_freq_factor are divided by the factor, shorter than context / high_freq_factor
    kept, and those between interpolated.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.theta**-exponents
    if config.rope_scaling_factor == 1.0:
        return frequencies
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_max_seq_len * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_scaling_factor)
