"""A small corpus with its tokenizer and shards, and a recipe that trains in seconds."""

import random
from dataclasses import dataclass
from pathlib import Path

from fastllama.data.prepare import prepare
from fastllama.data.tokenizer import save_tokenizer, train_tokenizer

RECIPE = """
[model]
vocab_size = 320
n_embd = 32
n_layers = 2
n_heads = 4
n_kv_heads = 2
multiple_of = 16
max_seq_len = 32

[data]
path = "{data}"

[optimizer]
max_lr = 1e-2
min_lr = 1e-3
warmup_iterations = 5

[training]
batch_size = 2
tokens_per_update = 256
training_tokens = 2560
eval_interval = 5
eval_tokens = 256
dtype = "float32"
device = "cpu"
compile = false

[checkpoint]
interval_tokens = 1280

[logging]
log_interval = 1
sample_interval = 4
sample_tokens = 4
tensorboard = false
"""


@dataclass(frozen=True)
class Workspace:
    """The paths that a run needs, all below `path`."""

    path: Path
    recipe: Path
    data: Path
    tokenizer: Path
    corpus: Path


def make_workspace(path: Path) -> Workspace:
    """Create the corpus of 80 random texts, and prepare it."""
    draw = random.Random(0)
    words = ["def", "return", "self", "class", "import", "naïve", "x = 1\n", "(", ")", ":", "\n"]
    corpus = path / "corpus"
    corpus.mkdir()
    texts = [" ".join(draw.choices(words, k=200)) for _ in range(80)]
    for number, text in enumerate(texts):
        (corpus / f"{number}.txt").write_text(text, encoding="utf-8")
    tokenizer = path / "tokenizer.json"
    save_tokenizer(train_tokenizer(texts, 320), tokenizer)
    data = path / "data"
    prepare([str(corpus)], tokenizer, data, validation_fraction=0.1, shard_tokens=3000)
    recipe = path / "tiny.toml"
    recipe.write_text(RECIPE.format(data=data))
    return Workspace(path, recipe, data, tokenizer, corpus)
