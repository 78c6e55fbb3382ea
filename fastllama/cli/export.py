"""`fastllama export`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse
from fastllama.cli.streams import say


@dataclass(frozen=True)
class ExportOptions:
    """Write a folder that transformers, vLLM and llama.cpp's converter load as it is."""

    run: tyro.conf.Positional[Path]
    """Run folder, of which the newest checkpoint is exported, or a checkpoint."""
    output: Path
    """Folder to write; it must not exist."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights."""
    ema: bool = False
    """Export the average of the weights that `training.ema_decay` keeps."""


def run(args: list[str]) -> None:
    """Write the folder, and print what it was made of and how to use it."""
    options = parse(ExportOptions, args, "fastllama export")
    from fastllama.checkpoints.state import EMA, MODEL
    from fastllama.weights.export import export

    weights = EMA if options.ema else MODEL
    checkpoint = export(options.run, options.output, options.dtype, weights)
    path = shlex.quote(str(options.output))
    say(f"exported {checkpoint} to {options.output} in {options.dtype}")
    say(f"next: vllm serve {path}, or transformers: AutoModelForCausalLM.from_pretrained({path})")


COMMAND = Command(
    run, {"runs/NAME --output DIR": "a folder for transformers, vLLM and llama.cpp from a run"}
)
