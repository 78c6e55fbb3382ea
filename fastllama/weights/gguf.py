"""fastllama export --gguf: one GGUF file for llama.cpp and the programs that are built on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastllama.atomic import fsync_file
from fastllama.checkpoints.state import MODEL
from fastllama.config import ModelConfig
from fastllama.data.tokenizer_variants import description, missing_bytes, steps
from fastllama.model.rotary import rope_frequencies
from fastllama.printable import printable
from fastllama.safetensors_file import stored
from fastllama.weights.llama_layout import tensors
from fastllama.weights.new_run import new_path, refuse_output
from fastllama.weights.source import Source, find_source

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (LLAMA_3_WORDS, "bytes"): "llama-bpe",
}
"""Pre-tokenizers, as `_step` calls their steps, and the names that llama.cpp knows them by."""


def export_gguf(path: Path, output: Path, dtype: str = "bfloat16", weights: str = MODEL) -> Path:
    """Write the file `output`, which llama.cpp loads as it is.

    The weights of norms are float32 in any case: llama.cpp takes no others. Host memory holds one
    packed weight in float32 and a part of it twice. `output` appears when it is complete.

    Args:
        path: a run folder, of which the newest whole checkpoint is exported, or a checkpoint.
        output: the file to write.
        dtype: "bfloat16" or "float32", the type of matrices.
        weights: `MODEL`, or `EMA` for the averaged weights.

    Returns:
        The checkpoint.

    Raises:
        ValueError: the library gguf is missing, `output` exists, there is no whole checkpoint, or
            llama.cpp cannot compute this model or encode text as its tokenizer does. Nothing was
            written.
        OSError: a file cannot be read or written.
    """
    try:
        from gguf import GGUFWriter
    except ModuleNotFoundError:
        raise ValueError(
            "--gguf needs the library gguf, which is not installed; install it with "
            "pip install 'fastllama[gguf]'."
        ) from None
    refuse_output(output)
    source = find_source(path, weights)
    model = source.config.model
    try:
        vocabulary = _vocabulary(source.tokenizer, model.vocab_size)
    except ValueError as error:
        raise ValueError(
            f"llama.cpp cannot encode text as {source.run.tokenizer} does: {error}; export without "
            "--gguf."
        ) from None
    vocabulary |= {
        "bos_token_id": source.bos_token,
        "eos_token_id": source.end_token,
        "add_bos_token": source.start_token is not None,
        "add_eos_token": False,
    }
    matrices: torch.dtype = getattr(torch, dtype)
    with new_path(output) as file:
        writer = GGUFWriter(file, "llama")
        for key, value in (_options(model, matrices, output) | vocabulary).items():
            getattr(writer, f"add_{key}")(value)
        _write(writer, file, _shapes(model, matrices), _values(source))
        fsync_file(file)
    return source.checkpoint


def _options(model: ModelConfig, matrices: torch.dtype, output: Path) -> dict[str, Any]:
    """What the file says about the model, by the names of the writer's methods."""
    from gguf import LlamaFileType

    kinds = {torch.float32: LlamaFileType.ALL_F32, torch.bfloat16: LlamaFileType.MOSTLY_BF16}
    return {
        "type": "model",
        "name": printable(output.stem),
        "file_type": kinds[matrices],
        "vocab_size": model.vocab_size,
        "context_length": model.max_seq_len,
        "embedding_length": model.n_embd,
        "block_count": model.n_layers,
        "feed_forward_length": model.ffn_width,
        "head_count": model.n_heads,
        "head_count_kv": model.kv_heads,
        "key_length": model.head_width,
        "value_length": model.head_width,
        "layer_norm_rms_eps": model.eps,
        "rope_dimension_count": model.head_width,
        "rope_freq_base": model.theta,
    }


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """What the file says about the tokenizer, by the names of the writer's methods.

    Raises:
        ValueError: llama.cpp has no such tokenizer; the message is a clause with the reason.
    """
    from gguf import TokenType

    content = description(tokenizer)
    name = _pre_tokenizer(content)
    # Each id needs a text of its own.
    texts = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for text, number in content["model"]["vocab"].items():
        texts[number], types[number] = text, int(TokenType.NORMAL)
    for token in content["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        texts[token["id"]], types[token["id"]] = token["content"], int(kind)
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": name,
        "token_list": texts,
        "token_types": types,
        "token_merges": [" ".join(pair) for pair in content["model"]["merges"]],
    }


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """The name that llama.cpp has for the pre-tokenizer of a byte-level BPE.

    Raises:
        ValueError: it has none, or the rest of the tokenizer is not a plain byte-level BPE.
    """
    model, normalizer = content["model"], content["normalizer"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, not byte-level BPE")
    name = PRE_TOKENIZERS.get(tuple(_step(part) for part in steps(content["pre_tokenizer"])))
    if name is None:
        raise ValueError(
            "its pre-tokenizer is none of ByteLevel, Digits with ByteLevel, and that of Llama 3"
        )
    if normalizer is not None:
        raise ValueError(f"it changes text by a normalizer, {normalizer['type']}")
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise ValueError("its tokens have prefixes or suffixes")
    if missing_bytes(content):
        raise ValueError("its vocabulary lacks bytes")
    if not model["merges"]:
        raise ValueError("it has no merges")
    # llama.cpp takes this from the name of the pre-tokenizer.
    if model["ignore_merges"] != (name == "llama-bpe"):
        raise ValueError(f"its ignore_merges is {model['ignore_merges']}")
    for token in content["added_tokens"]:
        if not token["special"] and (token["single_word"] or token["lstrip"] or token["rstrip"]):
            raise ValueError(f"its token {token['content']!r} takes spaces or words around it")
    return name


def _step(part: dict[str, Any]) -> str:
    """What a step of a pre-tokenizer does, as in `PRE_TOKENIZERS`; empty for any other."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return "words" if use_regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}:
            return "" if part["invert"] else str(regex)
    return ""


ROPE_DIVISORS = "rope_freqs.weight"


def _shapes(model: ModelConfig, matrices: torch.dtype) -> dict[str, Tensor]:
    """All tensors of the file by name, on the meta device."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.n_layers)
    found = {}
    if model.rope_scaling_factor != 1:
        found[ROPE_DIVISORS] = torch.empty(model.head_width // 2, device="meta")
    for name, rows in tensors(model).items():
        dtype = torch.float32 if len(rows.shape) == 1 else matrices
        known = names.get_name(name, try_suffixes=(".weight",))
        found[known] = torch.empty(rows.shape, dtype=dtype, device="meta")
    return found


def _values(source: Source) -> Iterator[Tensor]:
    """The values of these tensors, float32."""
    model = source.config.model
    if model.rope_scaling_factor != 1:
        yield _rope_divisors(model).float()
    names = list(tensors(model))
    for name, tensor in zip(names, source.read(names), strict=True):
        if ".q_proj." in name:
            yield _interleaved(tensor, model.n_heads)
        elif ".k_proj." in name:
            yield _interleaved(tensor, model.kv_heads)
        else:
            yield tensor


def _rope_divisors(model: ModelConfig) -> Tensor:
    """What llama.cpp divides the frequencies of `theta` by, (R,) float64."""
    exponents = torch.arange(0, model.head_width, 2, dtype=torch.float64) / model.head_width
    return model.theta**-exponents / rope_frequencies(model)


def _interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of q or k for llama.cpp, which rotates neighbours and not the halves of a head."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _write(writer: Any, path: Path, shapes: dict[str, Tensor], values: Iterator[Tensor]) -> None:
    """Write the header, and the values one after the other."""
    from gguf import GGMLQuantizationType

    kinds = {
        torch.float32: GGMLQuantizationType.F32,
        torch.bfloat16: GGMLQuantizationType.BF16,
    }
    for name, tensor in shapes.items():
        writer.add_tensor_info(name, tensor.shape, None, tensor.nbytes, kinds[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    # Not by the writer: it would lose the reason of an error, as on a full disk.
    with open(path, "ab") as file:
        for shape, value in zip(shapes.values(), values, strict=True):
            file.write(bytes(-file.tell() % writer.data_alignment))
            file.write(stored(value, shape.dtype))
        file.write(bytes(-file.tell() % writer.data_alignment))
