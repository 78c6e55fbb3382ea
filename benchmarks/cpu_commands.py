"""Commands around training on a CPU, against a plain script that does the same.

    python benchmarks/cpu_commands.py runs/quickstart [--rounds 5] [--output FILE.json]

| job             | fastllama                        | plain                                       |
|-----------------|----------------------------------|---------------------------------------------|
| tokenizer       | tokenizer train                  | `tokenizers` over the texts of the JSONL    |
| prepare         | prepare                          | `encode_batch` of `tokenizers`, one .npy    |
| generate        | generate, one token              | transformers, one token of an export        |
| train, cold     | train until the first update     | the plain loop, compiled, one update        |
| train, warm     | the same, with the cache filled  | the same                                    |
| save, waiting   | until training may go on         | torch.save and fsync                        |
| save            | until the checkpoint is complete | the same                                    |
| load            | check every byte, then load      | torch.load and copy                         |

The first five are whole processes, start-up included. The corpus and the shape are those of the
quickstart; a checkpoint holds its weights and moments. The contenders take turns. Prints medians
and extremes; a ratio is the plain script's time over fastllama's of the same round. Needs
`pip install transformers`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.conditions import current_conditions
from benchmarks.cpu_throughput import RECIPE, ROOT, plain_shape
from fastllama.checkpoints.reading import find_damage, load_tensors
from fastllama.checkpoints.state import TrainProgress, model_tensors
from fastllama.checkpoints.writing import CheckpointWriter
from fastllama.config import load_recipe
from fastllama.inference.load import load_run
from fastllama.weights.export import export

PLAIN = {
    "tokenizer": """
import json, sys
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
trainer = trainers.BpeTrainer(
    vocab_size=8192, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
)
texts = (json.loads(line)["text"] for line in open(sys.argv[1]))
tokenizer.train_from_iterator(texts, trainer)
tokenizer.save(sys.argv[2])
""",
    "prepare": """
import json, sys
import numpy as np
from tokenizers import Tokenizer
tokenizer, parts, batch = Tokenizer.from_file(sys.argv[2]), [], []
def encode():
    for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
        parts.append(np.array([*encoding.ids, 1], dtype=np.uint16))
    batch.clear()
for line in open(sys.argv[1]):
    batch.append(json.loads(line)["text"])
    if len(batch) == 64:
        encode()
encode()
np.save(sys.argv[3], np.concatenate(parts))
""",
    "generate": """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokens = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=1, do_sample=False)
print(tokenizer.decode(tokens[0]))
""",
}


def seconds(command: list[str], until: str = "", **environment: str) -> float:
    """How long a process runs, or how soon it prints a line with `until`. Then it may end."""
    began = time.perf_counter()
    printed, found = [], None
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if until and until in line and found is None:
                found = time.perf_counter() - began
    if process.returncode or (until and found is None):
        raise RuntimeError(f"{' '.join(command)} failed:\n{''.join(printed)}")
    return found or time.perf_counter() - began


def processes(run: Path, exported: Path, folder: Path) -> Iterator[tuple[str, float, float]]:
    """Job, seconds of fastllama and of the plain script."""
    recipe = load_recipe(RECIPE)
    data = ROOT / recipe.data.path
    corpus, tokenizer = f"{data}.jsonl", f"{data}-tokenizer.json"
    ours, python = [sys.executable, "-m", "fastllama"], [sys.executable, "-c"]
    train = ["tokenizer", "train", "--input", corpus, "--output", str(folder / "ours.json")]
    plain = [*python, PLAIN["tokenizer"], corpus, str(folder / "plain.json")]
    yield "tokenizer", seconds([*ours, *train]), seconds(plain)
    prepare = ["prepare", "--input", corpus, "--tokenizer", tokenizer]
    plain = [*python, PLAIN["prepare"], corpus, tokenizer, str(folder / "plain.npy")]
    took = seconds([*ours, *prepare, "--output", str(folder / "data")])
    yield "prepare", took, seconds(plain)
    generate = ["generate", str(run), "--prompt", "def ", "--max-new-tokens", "1"]
    generate += ["--temperature", "0", "--dtype", "float32", "--device", "cpu"]
    plain = [*python, PLAIN["generate"], str(exported)]
    yield "generate", seconds([*ours, *generate]), seconds(plain)
    settings = {
        "--data.path": str(data),
        "--training.device": "cpu",
        "--training.training-tokens": str(recipe.training.tokens_per_update),
        "--training.eval-interval": "0",
        "--optimizer.warmup-iterations": "0",
        "--logging.sample-interval": "0",
    }
    start = [*ours, "train", str(RECIPE), *(part for pair in settings.items() for part in pair)]
    plain = [sys.executable, str(ROOT / "benchmarks" / "plain_loop.py")]
    plain += [str(data / "train-00000.npy"), json.dumps(plain_shape(recipe)), "1"]
    plain += ["plain", "bfloat16", "compiled"]
    for job in ("train, cold", "train, warm"):
        new_run = ["--run-dir", str(folder / job)]
        took = seconds(
            [*start, *new_run], "first update done", TORCHINDUCTOR_CACHE_DIR=str(folder / "ours")
        )
        yield job, took, seconds(plain, TORCHINDUCTOR_CACHE_DIR=str(folder / "plain"))


def checkpoints(
    writer: CheckpointWriter, tensors: dict[str, torch.Tensor], folder: Path, step: int
) -> Iterator[tuple[str, float, float]]:
    """Job, seconds of fastllama and of the plain script."""
    plain, clock = folder / "plain.pt", time.perf_counter
    began = clock()
    writer.save(tensors, TrainProgress(step=step))
    waiting = clock() - began
    writer.wait()
    saving = clock() - began
    began = clock()
    with open(plain, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    plain_saving = clock() - began
    yield "save, waiting", waiting, plain_saving
    yield "save", saving, plain_saving
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    began = clock()
    assert find_damage(checkpoint) is None
    load_tensors(checkpoint, loaded)
    loading = clock() - began
    began = clock()
    for name, tensor in torch.load(plain).items():
        loaded[name].copy_(tensor)
    yield "load", loading, clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder with a trained model")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    config = load_recipe(RECIPE)
    weights = model_tensors(load_run(options.run, torch.device("cpu")).model)
    # AdamW keeps two moments of each weight.
    tensors = {f"{part}.{name}": weights[name].clone() for part in "abc" for name in weights}
    with tempfile.TemporaryDirectory() as root:
        exported = Path(root) / "export"
        export(options.run, exported, "float32")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        folder = Path(root) / "checkpoints"
        folder.mkdir()
        with CheckpointWriter(folder, config, {}, torch.device("cpu"), lambda text: None) as writer:
            for step in range(1, options.rounds + 1):
                for job, ours, plain in checkpoints(writer, tensors, Path(root), step):
                    found[job].append((ours, plain))
        dist.destroy_process_group()
        for number in range(options.rounds):
            folder = Path(root) / f"round-{number}"
            folder.mkdir()
            for job, ours, plain in processes(options.run, exported, folder):
                found[job].append((ours, plain))
            print(f"round {number + 1} of {options.rounds}", flush=True)
    for job, pairs in found.items():
        ratios = [plain / ours for ours, plain in pairs]
        medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
        print(
            f"{job:14} {medians[0]:7.3f} s, plain {medians[1]:7.3f} s; fastllama is "
            f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
            f"{max(ratios):.2f})"
        )
    if options.output:
        content = {"conditions": asdict(current_conditions()), "seconds_ours_and_plain": found}
        options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
