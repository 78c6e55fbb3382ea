"""fastllama export: a folder of Hugging Face's `LlamaForCausalLM` from a run."""

import csv
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from fastllama.atomic import fsync_file, fsync_folder, replace, write_atomic
from fastllama.checkpoints.reading import (
    find_checkpoint,
    open_tensors,
    read_end_token,
    read_progress,
)
from fastllama.checkpoints.state import MODEL, checkpoint_name, model_tensors
from fastllama.config import Config, ModelConfig
from fastllama.data.tokenizer import load_tokenizer
from fastllama.model.llama import Llama
from fastllama.planning.flops import n_parameters
from fastllama.printable import printable
from fastllama.run_folder import RunFolder
from fastllama.typed_json import DamagedFileError, read_json
from fastllama.weights.llama_layout import config_json, tensors
from fastllama.weights.new_run import refuse_output
from fastllama_kernels import REFERENCE

FILE_BYTES = 4 * 2**30
"""Size of one file of weights, unless a single tensor is larger."""


def export(path: Path, output: Path, dtype: str = "bfloat16", weights: str = MODEL) -> Path:
    """Write the folder `output`, which `AutoModelForCausalLM` and `AutoTokenizer` load as it is.

    Host memory holds the tensors of one file and one more. `output` appears when it is complete.

    Args:
        path: a run folder, of which the newest whole checkpoint is exported, or a checkpoint.
        output: the folder to write.
        dtype: "bfloat16" or "float32". Checkpoints are float32.
        weights: `MODEL`, or `EMA` for the averaged weights.

    Returns:
        The checkpoint.

    Raises:
        ValueError: `output` exists, there is no whole checkpoint, or Hugging Face's model cannot
            compute this one. Nothing was written.
        OSError: a file cannot be read or written.
    """
    refuse_output(output)
    run, checkpoint = find_checkpoint(path, weights)
    config, tokenizer = run.load_config(), load_tokenizer(run.tokenizer)
    end_token = read_end_token(checkpoint, config.model.vocab_size)
    content = config_json(config.model, dtype, end_token)
    with _new_folder(output) as folder:
        _write_weights(folder, checkpoint, config.model, dtype, weights)
        shutil.copyfile(run.tokenizer, folder / "tokenizer.json")
        ends = {"bos_token_id": end_token, "eos_token_id": end_token}
        for name, value in {
            "config.json": content,
            "generation_config.json": {"_from_model_config": True, **ends},
            "tokenizer_config.json": _tokenizer_config(tokenizer, end_token, config.model),
        }.items():
            write_atomic(folder / name, json.dumps(value, indent=2) + "\n")
        write_atomic(folder / "README.md", model_card(run, checkpoint, config, output.name))
    return checkpoint


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder under a hidden name, renamed to `output` at the end, or removed."""
    aside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True)
    try:
        yield aside
        fsync_folder(aside)
        replace(aside, output)
    except BaseException:
        shutil.rmtree(aside)
        raise
    fsync_folder(output.parent)


def _write_weights(
    folder: Path, checkpoint: Path, model: ModelConfig, dtype: str, weights: str
) -> None:
    """Write all tensors of Hugging Face's model into safetensors files; several get an index."""
    element_bytes = torch.finfo(getattr(torch, dtype)).bits // 8
    files = _files(model, element_bytes)
    names = ["model.safetensors"]
    if len(files) > 1:
        n = len(files)
        names = [f"model-{number:05d}-of-{n:05d}.safetensors" for number in range(1, n + 1)]
    for name, part in zip(names, files, strict=True):
        found = dict(_read(checkpoint, model, part, getattr(torch, dtype), weights))
        _save(found, folder / name)
    if len(files) > 1:
        n_bytes = element_bytes * n_parameters(model)
        index = {
            "metadata": {"total_size": n_bytes},
            "weight_map": {
                tensor: name for name, part in zip(names, files, strict=True) for tensor in part
            },
        }
        path = folder / "model.safetensors.index.json"
        write_atomic(path, json.dumps(index, indent=2) + "\n")


def _save(found: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file(found, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library reports an error of the system as text: "… (os error 28)".
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
    # The library creates files that only their owner may read.
    path.chmod(stat.S_IMODE(path.parent.stat().st_mode) & 0o666)
    fsync_file(path)


def _files(model: ModelConfig, element_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, in the order of the layers."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, rows in tensors(model).items():
        size = torch.Size(rows.shape).numel() * element_bytes
        if filled and filled + size > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def _read(
    checkpoint: Path, model: ModelConfig, names: list[str], dtype: torch.dtype, weights: str
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of Hugging Face's model with these names, in `dtype`."""
    with torch.device("meta"):
        shapes = model_tensors(Llama(model, REFERENCE), weights)
    with open_tensors(checkpoint) as read:
        last, packed = "", torch.empty(0)
        for name in names:
            rows = tensors(model)[name]
            parameter = f"{weights}{checkpoint_name(rows.parameter)}"
            if parameter != last:
                last, packed = parameter, read(parameter, shapes[parameter].shape)
            part = packed[rows.start : rows.start + rows.shape[0]]
            # A copy, because the file may not share memory between tensors.
            yield name, part.to(dtype, copy=True)


def _tokenizer_config(tokenizer: Tokenizer, end_token: int, model: ModelConfig) -> dict[str, Any]:
    text = tokenizer.id_to_token(end_token)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text,
        "eos_token": text,
        "add_bos_token": False,
        "model_max_length": model.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }


def model_card(run: RunFolder, checkpoint: Path, config: Config, name: str) -> str:
    """README.md of an export: what was trained, on what, how well, and how to load it."""
    model, step = config.model, read_progress(checkpoint).step
    tokens = step * config.training.tokens_per_update
    facts = {
        "parameters": f"{n_parameters(model):,}",
        "shape": f"{model.n_layers} layers of width {model.n_embd}, {model.n_heads} heads of width "
        f"{model.head_width} and {model.kv_heads} for keys and values, feed-forward "
        f"{model.ffn_width}",
        "context": f"{model.max_seq_len:,} tokens",
        "vocabulary": f"{model.vocab_size:,}",
        "trained on": f"{tokens:,} tokens in {step:,} updates, of the data in {config.data.path}",
        **_losses(run, step),
        **_origin(run),
    }
    table = "\n".join(f"| {key} | {printable(value)} |" for key, value in facts.items())
    recipe = run.config.read_text(encoding="utf-8")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- fastllama
---

# {printable(name)}

A LLaMA, trained with fastllama.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # The folder of this file.
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

The recipe:

```toml
{recipe.rstrip()}
```
"""


def _losses(run: RunFolder, step: int) -> dict[str, str]:
    """The last losses up to update `step`, where the log of the run has them."""
    found: dict[str, str] = {}
    names = {
        "loss": "training loss",
        "val_loss": "validation loss",
        "val_bits_per_byte": "bits/byte",
    }
    with (
        suppress(OSError, ValueError, KeyError, csv.Error),
        open(run.metrics_csv, encoding="utf-8", newline="") as file,
    ):
        for row in csv.DictReader(file):
            if int(row["step"]) <= step:
                found |= {
                    key: f"{float(row[column]):.4f}, after update {row['step']}"
                    for column, key in names.items()
                    if row[column]
                }
    return found


def _origin(run: RunFolder) -> dict[str, str]:
    """Versions and commit of the last session that trained the run."""
    try:
        sessions = read_json(run.path / "environment.json", list[dict[str, Any]])
    except (OSError, DamagedFileError):
        return {}
    last = sessions[-1] if sessions else {}
    packages = last.get("packages")
    torch_version = packages.get("torch") if isinstance(packages, dict) else None
    facts = {"fastllama": last.get("fastllama"), "commit": last.get("git"), "torch": torch_version}
    return {name: str(value) for name, value in facts.items() if value}
