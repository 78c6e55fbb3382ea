"""fastllama export: a folder of Hugging Face's `LlamaForCausalLM` from a run."""

import csv
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastllama.atomic import fsync_file, fsync_folder, naming, write_atomic
from fastllama.checkpoints.reading import read_identity, read_progress
from fastllama.checkpoints.state import EMA, MODEL
from fastllama.data.tokenizer_variants import description, unknown_id
from fastllama.planning.flops import n_parameters
from fastllama.printable import printable
from fastllama.run_folder import RunFolder
from fastllama.safetensors_file import write_safetensors
from fastllama.typed_json import DamagedFileError, read_json
from fastllama.weights.llama_layout import Rows, config_json, tensors
from fastllama.weights.new_run import keep_tokenizer_model, new_path, refuse_output
from fastllama.weights.source import Source, find_source

FILE_BYTES = 4 * 2**30
"""Size of one file of weights, unless a single tensor is larger."""


def export(path: Path, output: Path, dtype: str = "bfloat16", weights: str = MODEL) -> Path:
    """Write the folder `output`, which `AutoModelForCausalLM` and `AutoTokenizer` load as it is.

    Host memory holds one weight of `Llama` in float32, and one tensor of the file. `output` appears
    when it is complete.

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
    source = find_source(path, weights)
    bos, eos = source.bos_token, source.end_token
    ends = {"bos_token_id": bos, "eos_token_id": eos}
    with new_path(output) as folder:
        folder.mkdir()
        _write_weights(folder, source, getattr(torch, dtype))
        for name, content in {
            "config.json": config_json(source.config.model, dtype, bos, eos),
            "generation_config.json": {"_from_model_config": True, **ends},
            "tokenizer_config.json": _tokenizer_config(source),
        }.items():
            write_atomic(folder / name, json.dumps(content, indent=2) + "\n")
        write_atomic(folder / "tokenizer.json", _tokenizer_json(source))
        keep_tokenizer_model(source.run.tokenizer_model, folder / "tokenizer.model")
        write_atomic(folder / "README.md", model_card(source, output.name))
        fsync_folder(folder)
    return source.checkpoint


def _write_weights(folder: Path, source: Source, dtype: torch.dtype) -> None:
    """Write all tensors of Hugging Face's model into safetensors files; several get an index."""
    layout = tensors(source.config.model)
    files = _files(layout, dtype)
    names = ["model.safetensors"]
    if len(files) > 1:
        n = len(files)
        names = [f"model-{number:05d}-of-{n:05d}.safetensors" for number in range(1, n + 1)]
    for name, part in zip(names, files, strict=True):
        _write_file(folder / name, {tensor: layout[tensor] for tensor in part}, source, dtype)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(_n_bytes(rows, dtype) for rows in layout.values())},
            "weight_map": {
                tensor: name for name, part in zip(names, files, strict=True) for tensor in part
            },
        }
        path = folder / "model.safetensors.index.json"
        write_atomic(path, json.dumps(index, indent=2) + "\n")


def _files(layout: Mapping[str, Rows], dtype: torch.dtype) -> list[list[str]]:
    """Names of the tensors of each file, in the order of the layers."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, rows in layout.items():
        size = _n_bytes(rows, dtype)
        if filled and filled + size > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def _n_bytes(rows: Rows, dtype: torch.dtype) -> int:
    return torch.Size(rows.shape).numel() * dtype.itemsize


def _write_file(path: Path, part: Mapping[str, Rows], source: Source, dtype: torch.dtype) -> None:
    """Write one safetensors file."""
    layout = {
        name: torch.empty(rows.shape, dtype=dtype, device="meta") for name, rows in part.items()
    }
    with naming(path), open(path, "xb") as file:
        write_safetensors(file, layout, source.read(part), {"format": "pt"})
    fsync_file(path)


def _tokenizer_json(source: Source) -> bytes:
    """The tokenizer as training used it: whole texts, and only the start token put before them."""
    content = description(source.tokenizer)
    n_added = source.tokenizer.num_special_tokens_to_add(False)
    if source.start_token is None and n_added:
        content["post_processor"] = None
    elif source.start_token is not None and n_added > 1:
        name = source.tokenizer.id_to_token(source.start_token)
        assert name is not None
        content["post_processor"] = _template(name, source.start_token)
    saved = source.run.tokenizer.read_bytes()
    if json.loads(saved.decode("utf-8-sig")) == content:
        return saved
    return json.dumps(content, ensure_ascii=False, indent=2).encode()


def _template(name: str, token: int) -> dict[str, Any]:
    """The template of the tokenizers library that puts one token before a text."""
    start: dict[str, Any] = {"SpecialToken": {"id": name, "type_id": 0}}
    texts = [{"Sequence": {"id": text, "type_id": 0}} for text in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [start, texts[0]],
        "pair": [start, texts[0], start, texts[1]],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _tokenizer_config(source: Source) -> dict[str, Any]:
    name = source.tokenizer.id_to_token
    unknown = unknown_id(description(source.tokenizer))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name(source.bos_token),
        "eos_token": name(source.end_token),
        **({} if unknown is None else {"unk_token": name(unknown)}),
        "add_bos_token": source.start_token is not None,
        # transformers 4 would add token types, which a Llama does not take.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": source.config.model.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }


def model_card(source: Source, name: str) -> str:
    """README.md of an export: what was trained, on what, how well, and how to load it."""
    run, model = source.run, source.config.model
    step = read_progress(source.checkpoint).step
    facts = {
        "parameters": f"{n_parameters(model):,}",
        "shape": f"{model.n_layers} layers of width {model.n_embd}, {model.n_heads} heads of width "
        f"{model.head_width} and {model.kv_heads} for keys and values, feed-forward "
        f"{model.ffn_width}",
        "context": f"{model.max_seq_len:,} tokens",
        "vocabulary": f"{model.vocab_size:,}",
        **_training(source, step),
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

A LLaMA in the layout of Hugging Face, written by `fastllama export`.

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


def _training(source: Source, step: int) -> dict[str, str]:
    """What this run has trained on; nothing for an import or a merge."""
    if step == 0:
        return {}
    config, data = source.config, read_identity(source.checkpoint).get("data.fingerprint")
    tokens = step * config.training.tokens_per_update
    folders = config.data.path or ", ".join(source.path for source in config.data.sources)
    averaged = {"weights": f"average with training.ema_decay = {config.training.ema_decay}"}
    return {
        **(averaged if source.weights == EMA else {}),
        "trained on": f"{tokens:,} tokens in {step:,} updates, of the data in {folders}",
        "fingerprint of the data": str(data),
    }


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
