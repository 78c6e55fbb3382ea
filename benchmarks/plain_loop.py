"""LLaMA as a plain PyTorch script: the baselines of cpu_throughput.py.

    python benchmarks/plain_loop.py TOKENS.npy SHAPE UPDATES MODEL DTYPE HOW

SHAPE is a JSON object: width, layers, heads, ffn, vocabulary, sequence, batch. An update is one
batch. MODEL is plain or hugging-face, DTYPE float32 or bfloat16 (autocast), HOW eager or compiled.
Prints the median tokens/s after two warm-up updates.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SHAPE = json.loads(sys.argv[2])
D, L, H, FF = (SHAPE[name] for name in ("width", "layers", "heads", "ffn"))
V, T, BATCH = (SHAPE[name] for name in ("vocabulary", "sequence", "batch"))
MODEL, DTYPE, HOW = sys.argv[4:]


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.w13, self.w2 = nn.Linear(D, 2 * FF, bias=False), nn.Linear(FF, D, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.n1(x)).view(*x.shape[:2], 3, H, D // H).permute(2, 0, 3, 1, 4)
        q, k = rope(heads[0], cos, sin), rope(heads[1], cos, sin)
        a = F.scaled_dot_product_attention(q, k, heads[2], is_causal=True).transpose(1, 2)
        x = x + self.out(a.flatten(2))
        gate, up = self.w13(self.n2(x)).chunk(2, dim=-1)
        return x + self.w2(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(V, D), nn.RMSNorm(D, eps=1e-5)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.head = nn.Linear(D, V, bias=False)
        angles = torch.outer(torch.arange(T), 1e4 ** -(torch.arange(0, D // H, 2) / (D // H)))
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), y.flatten())


def hugging_face() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=L,
        num_attention_heads=H,
        max_position_embeddings=T,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if MODEL == "plain":
        return model(x, y)
    return model(input_ids=x, labels=x).loss


tokens = np.load(sys.argv[1], mmap_mode="r")
model = Model() if MODEL == "plain" else hugging_face()
if HOW == "compiled":
    model.compile()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
rng, times = np.random.default_rng(0), []
for _ in range(int(sys.argv[3])):
    start = time.perf_counter()
    rows = np.stack([tokens[i : i + T + 1] for i in rng.integers(0, len(tokens) - T, BATCH)])
    batch = torch.from_numpy(rows.astype(np.int64))
    with torch.autocast("cpu", torch.bfloat16, enabled=DTYPE == "bfloat16"):
        loss = loss_of(batch[:, :-1], batch[:, 1:])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - start)
print(BATCH * T / np.median(times[2:]))
