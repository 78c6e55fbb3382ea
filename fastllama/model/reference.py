"""The LLaMA of the papers, written for reading. Tests compare `fastllama.model.llama` with it.

It shares no code with the trained model or its operators. Projections are separate, heads are
repeated, rotations are complex multiplications, the softmax is written out. It is slow and uses
much memory on purpose.
Sources: Touvron et al. 2023 (https://arxiv.org/abs/2302.13971) and the code published with it.
"""

import math

import torch
from torch import Tensor, nn

from fastllama.config import ModelConfig


class ReferenceNorm(nn.Module):
    """Root-mean-square normalisation."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class ReferenceAttention(nn.Module):
    """Masked softmax attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads_width, kv_width = config.attention_width, config.kv_heads * config.head_width
        self.wq = nn.Linear(config.n_embd, heads_width, bias=False)
        self.wk = nn.Linear(config.n_embd, kv_width, bias=False)
        self.wv = nn.Linear(config.n_embd, kv_width, bias=False)
        self.wo = nn.Linear(heads_width, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        batch, time, _ = x.shape
        heads, groups, width = self.config.n_heads, self.config.kv_heads, self.config.head_width
        q = rotate(self.wq(x).view(batch, time, heads, width), rotations)
        k = rotate(self.wk(x).view(batch, time, groups, width), rotations)
        v = self.wv(x).view(batch, time, groups, width)
        k = torch.stack([k[:, :, head * groups // heads] for head in range(heads)], dim=2)
        v = torch.stack([v[:, :, head * groups // heads] for head in range(heads)], dim=2)
        scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(width)
        future = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        weights = torch.exp(scores.masked_fill(future, -math.inf))
        weights = weights / weights.sum(-1, keepdim=True)
        return self.wo(torch.einsum("bhts,bshk->bthk", weights, v).reshape(batch, time, -1))


class ReferenceBlock(nn.Module):
    """Attention and the gated feed-forward, each with a residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = ReferenceNorm(config.n_embd, config.eps)
        self.attention = ReferenceAttention(config)
        self.norm2 = ReferenceNorm(config.n_embd, config.eps)
        self.w1 = nn.Linear(config.n_embd, config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.n_embd, bias=False)
        self.w3 = nn.Linear(config.n_embd, config.ffn_width, bias=False)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), rotations)
        h = self.norm2(x)
        gate = self.w1(h)
        return x + self.w2(gate * torch.sigmoid(gate) * self.w3(h))


class ReferenceLlama(nn.Module):
    """`ReferenceLlama(config)(tokens)` returns the logits (batch, time, vocabulary)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(ReferenceBlock(config) for _ in range(config.n_layers))
        self.norm = ReferenceNorm(config.n_embd, config.eps)
        self.output = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of `tokens` (batch, time)."""
        rotations = position_rotations(self.config, tokens.shape[1]).to(tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotations)
        logits = self.output(self.norm(x))
        softcap = self.config.logit_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log-likelihood of `targets` (batch, time)."""
        logits = self(tokens)
        log_likelihood = logits - logits.exp().sum(-1, keepdim=True).log()
        return -log_likelihood.gather(-1, targets.unsqueeze(-1)).mean()

    def packed_names(self) -> dict[str, list[str]]:
        """For each parameter of `Llama`, the parameters of this model that it stacks on dim 0."""
        names = {"embedding.weight": ["embedding.weight"], "norm.weight": ["norm.weight"]}
        if not self.config.tied_embeddings:
            names["output.weight"] = ["output.weight"]
        for block in (f"blocks.{layer}." for layer in range(self.config.n_layers)):
            parts = {
                "attention.norm": ["norm1"],
                "attention.qkv": ["attention.wq", "attention.wk", "attention.wv"],
                "attention.output": ["attention.wo"],
                "mlp.norm": ["norm2"],
                "mlp.gate_up": ["w1", "w3"],
                "mlp.down": ["w2"],
            }
            for packed, separate in parts.items():
                names[f"{block}{packed}.weight"] = [f"{block}{part}.weight" for part in separate]
        return names

    @torch.no_grad()
    def load_packed(self, parameters: dict[str, Tensor]) -> None:
        """Load the weights of a `Llama`, given by its parameter names."""
        own = dict(self.named_parameters())
        for packed, separate in self.packed_names().items():
            rows = [own[name].shape[0] for name in separate]
            for name, values in zip(separate, parameters[packed].split(rows), strict=True):
                own[name].copy_(values)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Multiply the pairs (x_i, x_{i + width / 2}) of (batch, time, heads, width) by `rotations`."""
    real, imaginary = x.chunk(2, dim=-1)
    rotated = torch.complex(real, imaginary) * rotations[None, :, None, :]
    return torch.cat((rotated.real, rotated.imag), dim=-1)


def position_rotations(config: ModelConfig, time: int) -> Tensor:
    """exp(i * position * frequency), (time, head_dim / 2) complex128."""
    frequencies = []
    for pair in range(config.head_width // 2):
        frequency = 1.0 / config.theta ** (2 * pair / config.head_width)
        if config.rope_scaling_factor != 1.0:
            frequency = scaled_frequency(config, frequency)
        frequencies.append(frequency)
    angles = [[position * frequency for frequency in frequencies] for position in range(time)]
    angles_tensor = torch.tensor(angles, dtype=torch.float64)
    return torch.complex(angles_tensor.cos(), angles_tensor.sin())


def scaled_frequency(config: ModelConfig, frequency: float) -> float:
    """The frequency scaling of Llama 3.1, as published with its weights."""
    context = config.rope_original_max_seq_len
    wavelength = 2 * math.pi / frequency
    if wavelength < context / config.rope_high_freq_factor:
        return frequency
    if wavelength > context / config.rope_low_freq_factor:
        return frequency / config.rope_scaling_factor
    smooth = (context / wavelength - config.rope_low_freq_factor) / (
        config.rope_high_freq_factor - config.rope_low_freq_factor
    )
    return (1 - smooth) * frequency / config.rope_scaling_factor + smooth * frequency
