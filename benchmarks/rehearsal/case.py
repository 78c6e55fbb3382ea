"""What is rehearsed: a recipe, a number of ranks, and options; and what a process measures."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.training.workload import workload
from fastllama.config import Config, load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = ("quickstart-gpu", "llama-100m", "llama-1b", "llama-3.2-1b", "llama-3.1-8b")
OPTIONS = (
    {"training.activation_checkpointing": "selective"},
    {"training.activation_checkpointing": "full"},
    {"training.save_projection_inputs": True},
    {"training.deterministic": True},
    {"training.spike_z_score": 6.0},
    {"training.ema_decay": 0.999},
    {"training.compile_scope": "model"},
    {"model.dropout": 0.1},
    {"parallel.reduce_dtype": "bfloat16"},
    {"parallel.reshard_after_forward": True},
    {"parallel.accumulate": "sharded"},
    {"parallel.replicate": 2},
)
"""Each option that changes what a step launches."""
OPTIONS_OF = "llama-1b"
"""The recipe that is always rehearsed with every option."""
GROUPED = "llama-3.2-1b"
"""A recipe with grouped heads, of which the attention backends differ."""
MICRO_BATCHES = 2
"""Of an update: the first and the last differ, and any between them are like the first."""


@dataclass(frozen=True)
class Case:
    """One update that is rehearsed."""

    recipe: str
    ranks: int
    compiled: bool
    options: dict[str, Any] = field(default_factory=dict)
    """Options that differ from the recipe, as `training.dtype`."""
    mistake: str = ""
    """A mistake of `mistakes.py` to make on purpose."""
    whole_update: bool = False
    """Whether an update has as many tokens as in the recipe, not two micro-batches."""

    @property
    def name(self) -> str:
        """The case in a few words; the key of its budget."""
        words = [f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"]
        words.append("compiled" if self.compiled else "eager")
        words += [
            f"{key.partition('.')[2]} {str(value).lower()}" for key, value in self.options.items()
        ]
        return ", ".join(words)

    def config(self) -> Config:
        """The recipe with the case's options, and two micro-batches an update."""
        config = load_recipe(CONFIGS / f"{self.recipe}.toml")
        options = {"training.attention": "flash", "training.compile": self.compiled} | self.options
        for key, value in options.items():
            section, _, name = key.partition(".")
            changed = replace(getattr(config, section), **{name: value})
            config = replace(config, **{section: changed})
        tokens = config.training.tokens_per_update
        if not self.whole_update:
            tokens = (
                MICRO_BATCHES * config.training.batch_size * self.ranks * config.model.max_seq_len
            )
        dropout = config.model.dropout
        config = workload(config, tokens)
        model = replace(config.model, dropout=dropout)
        training = replace(config.training, device="cuda")
        return replace(config, model=model, training=training)


def cases(*, every: bool = False) -> Iterator[Case]:
    """Every recipe at 1 and 8 ranks, eager and compiled; one of them with every option.

    With `every`, each recipe has every option that applies, at 1 rank as well.
    """
    for recipe, ranks, compiled in product(RECIPES, (1, 8), (False, True)):
        # Eight billion parameters need more than one device.
        if recipe == "llama-3.1-8b" and ranks == 1:
            continue
        yield Case(recipe, ranks, compiled)
        if every or (recipe == OPTIONS_OF and ranks == 8):
            for options in OPTIONS:
                alone = ranks == 1 and any(name.startswith("parallel.") for name in options)
                eager_scope = not compiled and "training.compile_scope" in options
                if not alone and not eager_scope:
                    yield Case(recipe, ranks, compiled, dict(options))
    for recipe in RECIPES if every else (OPTIONS_OF, GROUPED):
        yield Case(recipe, 8, True, {"training.attention": "cudnn"})


@dataclass(frozen=True)
class Measured:
    """What PyTorch says of an update, beside the log of the device."""

    host_s: float
    """Seconds in which the host launched it."""
    peak_bytes: int
    """Most bytes of tensors at once."""
    reserved_bytes: int
    """Most bytes that the allocator took from the device."""
    allocator_retries: int
    planned_bytes: int
    """The sum of `plan_memory`."""
    config: dict[str, Any]
    """The options of the run, with every "auto" resolved: `Config.to_dict`."""
    streams: dict[str, str]
    """Names of streams, by address."""
