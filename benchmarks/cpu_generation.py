"""Generation on a CPU: fastllama against transformers, with the same weights.

    python benchmarks/cpu_generation.py runs/quickstart [--rounds 7] [--prompt-tokens 100]
        [--new-tokens 128] [--output FILE.json]

Exports the run to a temporary folder. Both libraries then continue the same prompt greedily, in
float32 and in bfloat16, in one process and in turns. The time to the first token is that of a call
for one token, the median of five. The rate of decoding is that of the tokens after it.

Prints medians and extremes; each ratio is fastllama over transformers of the same round, in the
same dtype. Needs `pip install transformers`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.conditions import current_conditions
from fastllama.inference.generate import generate_tokens
from fastllama.inference.load import load_run
from fastllama.inference.packing import pack_model
from fastllama.inference.sampling import Sampling
from fastllama.weights.export import export

DTYPES = ("float32", "bfloat16")
Generate = Callable[[int], list[int]]
"""Continues the prompt by a number of tokens."""


def of_fastllama(run: Path, dtype: str, prompt: list[int]) -> Generate:
    """`fastllama generate` without its command line."""
    loaded = load_run(run, torch.device("cpu"), dtype=dtype)  # type: ignore[arg-type]
    pack_model(loaded.model)

    def generate(n_new: int) -> list[int]:
        sampling = Sampling(max_new_tokens=n_new, temperature=0)
        with torch.inference_mode():
            # No token ends the text, so that every call makes n_new tokens.
            return list(generate_tokens(loaded.model, prompt, sampling, end_token=-1))

    return generate


def of_transformers(folder: Path, dtype: str, prompt: list[int]) -> Generate:
    """`generate` of transformers, with its key/value cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokens = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(n_new: int) -> list[int]:
        text = model.generate(tokens, max_new_tokens=n_new, **options)
        return list(text[0, len(prompt) :])

    return generate


def seconds(generate: Generate, n_new: int) -> float:
    """How long `n_new` tokens take."""
    began = time.perf_counter()
    assert len(generate(n_new)) == n_new
    return time.perf_counter() - began


def measure(generate: Generate, n_new: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens/s after it."""
    # One call takes milliseconds, and other guests of a virtual machine disturb it as often as not.
    first = statistics.median(seconds(generate, 1) for _ in range(5))
    return first, (n_new - 1) / (seconds(generate, n_new) - first)


def spread(values: list[float], digits: int) -> str:
    """Median and extremes."""
    median, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder with a trained model")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each")
    parser.add_argument("--prompt-tokens", type=int, default=100, help="length of the prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens that continue it")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    vocab_size = load_run(options.run, torch.device("cpu")).model.config.vocab_size
    prompt = [7 * position % vocab_size for position in range(options.prompt_tokens)]
    contenders: dict[tuple[str, str], Generate] = {}
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model"
        export(options.run, exported, "float32")
        for dtype in DTYPES:
            contenders["fastllama", dtype] = of_fastllama(options.run, dtype, prompt)
            contenders["transformers", dtype] = of_transformers(exported, dtype, prompt)
    for generate in contenders.values():
        generate(options.new_tokens)
    results: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in contenders}
    for _ in range(options.rounds):
        for key, generate in contenders.items():
            results[key].append(measure(generate, options.new_tokens))
    for (name, dtype), found in results.items():
        peer = results["transformers", dtype]
        print(f"{name}, {dtype}")
        for index, scale, unit in ((0, 1e3, "ms to the first token"), (1, 1, "tokens/s")):
            values = [scale * pair[index] for pair in found]
            ratios = [mine[index] / theirs[index] for mine, theirs in zip(found, peer, strict=True)]
            print(f"  {spread(values, 1)} {unit}, {spread(ratios, 2)} of transformers", flush=True)
    if options.output:
        content = {
            "conditions": asdict(current_conditions()),
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "first_token_seconds_and_tokens_per_s": {
                ", ".join(key): found for key, found in results.items()
            },
        }
        options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
