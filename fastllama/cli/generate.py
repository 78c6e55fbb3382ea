"""`fastllama generate`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastllama.cli.command import Command
from fastllama.cli.errors import UsageError
from fastllama.cli.parsing import parse
from fastllama.cli.streams import print_result, require_stdout, stdout_fails
from fastllama.inference.sampling import Sampling


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a text with a trained model and print it token by token.

    On a terminal, control characters of the text are shown as escapes such as \\x1b. A file or a
    pipe gets the text unchanged.
    """

    run: tyro.conf.Positional[Path]
    """Run folder, or one checkpoint inside it."""
    prompt: str = ""
    """Text to continue; - reads it from standard input. An empty prompt starts a document."""
    special_tokens: bool = False
    """Read names of special tokens in the prompt, such as <EOS>, as these tokens, not as text."""
    ema: bool = False
    """Generate with the average of the weights that `training.ema_decay` keeps."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA when there is a GPU."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What the model computes in. auto takes bfloat16 where the device is faster in it, unless the
    run trained in float32."""


def run(args: list[str]) -> None:
    """Print the prompt and its continuation as it is generated."""
    options = parse(GenerateOptions, args, "fastllama generate")
    import torch

    from fastllama.checkpoints.state import EMA, MODEL
    from fastllama.data.encoding import prompt_loss
    from fastllama.distributed.world import choose_device
    from fastllama.inference.generate import generate_text
    from fastllama.inference.load import load_run
    from fastllama.inference.packing import pack_model

    options.sampling.validate()
    prompt = prompt_of(options)
    weights = EMA if options.ema else MODEL
    device = choose_device(options.device, "--device")
    loaded = load_run(options.run, device, weights, options.dtype)
    pack_model(loaded.model)
    loss = prompt_loss(loaded.tokenizer, prompt, loaded.end_token)
    if loss.lost:
        print(f"note: of the prompt, the tokenizer cannot represent {loss}", file=sys.stderr)
    pieces = generate_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        options.sampling,
        loaded.end_token,
        special_tokens=options.special_tokens,
        start_token=loaded.start_token,
    )
    print_result(prompt, end="")
    try:
        # Each operator call is cheaper in it, and decoding on a CPU is many small calls.
        with torch.inference_mode():
            for piece in pieces:
                print_result(piece, end="")
                if stdout_fails():
                    break
    finally:
        print()
    require_stdout()


def prompt_of(options: GenerateOptions) -> str:
    """The prompt, from standard input where it is `-`.

    Raises:
        UsageError: standard input is not UTF-8.
    """
    if options.prompt != "-":
        return options.prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"Standard input is not UTF-8 text: byte {error.start} is "
            f"0x{error.object[error.start]:02x}; convert it first, as with iconv."
        ) from None


COMMAND = Command(run, {"runs/NAME --prompt TEXT": "continue a text with a trained model"})
