"""`fastllama export`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fastllama.cli.command import Command
from fastllama.cli.errors import UsageError
from fastllama.cli.parsing import parse
from fastllama.cli.streams import say


@dataclass(frozen=True)
class ExportOptions:
    """Write a folder that transformers and vLLM load as it is, or a file for llama.cpp."""

    run: tyro.conf.Positional[Path]
    """Run folder, of which the newest checkpoint is exported, or a checkpoint."""
    output: Path
    """Folder to write, or with --gguf a file; it must not exist."""
    gguf: bool = False
    """Write one GGUF file, for llama.cpp, Ollama and others."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights; in a GGUF file of the matrices."""
    ema: bool = False
    """Export the average of the weights that `training.ema_decay` keeps."""


def run(args: list[str]) -> None:
    """Write the folder, and print what it was made of and how to use it."""
    options = parse(ExportOptions, args, "fastllama export")
    if options.output.suffix.lower() == ".gguf" and not options.gguf:
        raise UsageError(
            f"--output {options.output} names a GGUF file, and without --gguf it would be a folder "
            "for transformers; add --gguf, or choose another --output."
        )
    from fastllama.checkpoints.state import EMA, MODEL
    from fastllama.weights.export import export
    from fastllama.weights.gguf import export_gguf

    weights = EMA if options.ema else MODEL
    write = export_gguf if options.gguf else export
    checkpoint = write(options.run, options.output, options.dtype, weights)
    path = shlex.quote(str(options.output))
    say(f"exported {checkpoint} to {options.output} in {options.dtype}")
    if options.gguf:
        say(f"next: llama-cli -m {path} -no-cnv -p TEXT")
    else:
        say(f"next: vllm serve {path}, or in Python")
        say(f"      transformers.AutoModelForCausalLM.from_pretrained({str(options.output)!r})")


COMMAND = Command(
    run, {"runs/NAME --output DIR": "a folder for transformers and vLLM, or a file for llama.cpp"}
)
