"""`fastllama import`."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastllama.cli.command import Command
from fastllama.cli.parsing import parse
from fastllama.cli.streams import say


@dataclass(frozen=True)
class ImportOptions:
    """Make a run folder from a folder with a Llama model of Hugging Face.

    The folder needs config.json, tokenizer.json and safetensors files of a LlamaForCausalLM, such
    as Llama 2 to 3.2, TinyLlama and SmolLM2. The run has weights and no moments: generate from it,
    or start a new run with --training.init-from.
    """

    folder: tyro.conf.Positional[Path]
    """Folder with config.json."""
    output: Path
    """Run folder to write; it must not exist."""


def run(args: list[str]) -> None:
    """Write the run folder, and print its size and what to do next."""
    options = parse(ImportOptions, args, "fastllama import")
    from fastllama.planning.flops import n_parameters
    from fastllama.weights.importing import import_run

    imported = import_run(options.folder, options.output)
    model, end_token = imported.model, imported.end_token
    choice = f", the first of {end_token.n_choices}" if end_token.n_choices > 1 else ""
    start = ""
    if token := imported.start_token:
        start = (
            f"start  token {token.id}, {token.text!r}, in front of every prompt, as in "
            f"{token.source}\n"
        )
    path = shlex.quote(str(options.output))
    say(
        f"run    {options.output}: {n_parameters(model):,} parameters, context of "
        f"{model.max_seq_len:,} tokens\n{start}"
        f"end    token {end_token.id}, {end_token.text!r}, as in {end_token.source}{choice}\n"
        f"next   fastllama generate {path} --prompt TEXT\n"
        f"train  fastllama train {path}/config.toml --run-dir runs/NEW --training.init-from {path} "
        "--data.path data/NAME"
    )


COMMAND = Command(
    run, {"FOLDER --output runs/NAME": "a run folder from a Llama model of Hugging Face"}
)
