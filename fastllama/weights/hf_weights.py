"""The safetensors files of a Hugging Face folder: found, checked by their headers, and read."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastllama.checkpoints.reading import utf8_path
from fastllama.config import ModelConfig
from fastllama.printable import one_line, printable
from fastllama.typed_json import DamagedFileError, read_json
from fastllama.weights.llama_layout import tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = ("F32", "BF16", "F16")
"""Types of safetensors whose values are all float32 values too."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""The rotary frequencies, which older versions of transformers saved; fastllama computes them."""


@dataclass(frozen=True)
class IndexJson:
    """What is read of an index."""

    weight_map: dict[str, str]
    """The file of each tensor."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, by its header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class LlamaTensors:
    """The tensors of a `LlamaForCausalLM` in a folder, read one at a time."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Read and check the headers of all files.

        Raises:
            ValueError: the folder has no safetensors, a file is damaged, or the tensors are not
                those of `model`; the sentence names the file or the first tensors.
            OSError: a file cannot be read.
        """
        self._stored = _stored(folder)
        self._refuse_others(folder, model)
        if model.tied_embeddings and OUTPUT in self._stored:
            self._refuse_untied()

    def read(self, name: str) -> Tensor:
        """The values of a tensor, on the CPU, in the type of the file.

        Raises:
            ValueError: the file is damaged, or a value is not finite.
        """
        stored = self._stored[name]
        # Opened for each tensor: pages that were read count as memory until the file is closed.
        with _opened(stored.file) as file:
            values: Tensor = file.get_tensor(name)
            if not values.isfinite().all():
                raise ValueError(
                    f"{stored.file} has {name} with values that are not finite, so the model "
                    "computes nothing; download the file again, or take another version of the "
                    "model."
                )
            return values

    def _refuse_others(self, folder: Path, model: ModelConfig) -> None:
        """Raise ValueError if there are other tensors than those of `model`."""
        if model.n_layers > len(self._stored):
            # Before the names of all layers are listed: a damaged number may be any.
            raise ValueError(
                f"{folder / 'config.json'} has num_hidden_layers = {model.n_layers}, and the "
                f"weights of {folder} are only {len(self._stored)} tensors; {ORIGINAL}."
            )
        wanted = tensors(model)
        allowed = {OUTPUT} if model.tied_embeddings else set()
        extra = [
            name
            for name in self._stored
            if name not in wanted and name not in allowed and not BUFFER.fullmatch(name)
        ]
        if missing := [name for name in wanted if name not in self._stored]:
            also = f", and {_listed(extra)} are not part of it" if extra else ""
            raise ValueError(
                f"The weights of {folder} lack {_listed(missing)} of the model in its "
                f"config.json{also}; {ORIGINAL}."
            )
        if extra:
            raise ValueError(
                f"The weights of {folder} have {_listed(extra)}, not part of the model in its "
                f"config.json; {ORIGINAL}."
            )
        shapes = {name: rows.shape for name, rows in wanted.items()}
        if OUTPUT in self._stored:
            shapes[OUTPUT] = shapes[EMBEDDING]
        for name, shape in shapes.items():
            stored = self._stored[name]
            if stored.shape != shape:
                raise ValueError(
                    f"{stored.file} has {name} with the shape {list(stored.shape)}, and "
                    f"config.json describes {list(shape)}; {ORIGINAL}."
                )
            if stored.dtype not in DTYPES:
                remedy = "take the version of the model that is not quantised"
                if stored.dtype == "F64":
                    remedy = "save the model as float32 with transformers"
                raise ValueError(
                    f"{stored.file} has {name} as {stored.dtype}, and only {', '.join(DTYPES)} can "
                    f"be imported; {remedy}."
                )

    def _refuse_untied(self) -> None:
        if not torch.equal(self.read(OUTPUT), self.read(EMBEDDING)):
            raise ValueError(
                f"{self._stored[OUTPUT].file} has a {OUTPUT} that is not {EMBEDDING}, and "
                "config.json has tie_word_embeddings = true; set it to false to keep both."
            )


ORIGINAL = "download config.json and all weights of one version of the model"
"""The remedy for files that do not fit together."""


def _stored(folder: Path) -> dict[str, Stored]:
    """All tensors of the folder, by name."""
    if os.path.lexists(folder / SINGLE):
        return _header(folder / SINGLE)
    if not os.path.lexists(folder / INDEX):
        raise ValueError(_no_weights(folder))
    files_of = _read_index(folder)
    found: dict[str, Stored] = {}
    for file in sorted(set(files_of.values())):
        path = folder / file
        listed = {name for name, named in files_of.items() if named == file}
        header = _header(path)
        if absent := sorted(listed - header.keys()):
            raise ValueError(
                f"{path} lacks {_listed(absent)}, which {INDEX} has there; {ORIGINAL}."
            )
        if unlisted := sorted(header.keys() - listed):
            raise ValueError(
                f"{path} has {_listed(unlisted)}, which {INDEX} does not have there; {ORIGINAL}."
            )
        found |= header
    return found


def _read_index(folder: Path) -> dict[str, str]:
    """The file name of each tensor."""
    path = folder / INDEX
    try:
        files_of = read_json(path, IndexJson).weight_map
    except DamagedFileError as error:
        raise ValueError(f"{error}; download it again.") from None
    for file in sorted(set(files_of.values())):
        if file in ("", ".", "..") or {"/", "\\", "\0"} & set(file):
            raise ValueError(
                f"{path} names {one_line(repr(file), 60)}, which is not the name of a file in this "
                "folder; correct the name."
            )
        if not os.path.lexists(folder / file):
            raise ValueError(
                f"{path} names {printable(file)}, and there is no such file; download it."
            )
    return files_of


def _no_weights(folder: Path) -> str:
    names = sorted(os.listdir(folder))
    if some := next((name for name in names if name.endswith(".safetensors")), None):
        return (
            f"{folder} has {printable(some)}, and neither {SINGLE} nor {INDEX}; download all files "
            "of the model."
        )
    if some := next((name for name in names if name.endswith(PICKLES)), None):
        return (
            f"{folder} has only pickled weights, such as {printable(some)}, and reading them could "
            "execute code; save them as safetensors with transformers: AutoModelForCausalLM."
            f"from_pretrained({str(folder)!r}).save_pretrained('NEW')."
        )
    return f"{folder} has no weights: neither {SINGLE} nor {INDEX}; download them."


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file."""
    with _opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: Stored(path, tuple(part.get_shape()), part.get_dtype())
            for name, part in parts.items()
        }


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; all its errors become a ValueError that names it."""
    # A pipe would wait for a writer, and safetensors calls a file missing that it may not open.
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; download it again.")
    with open(path, "rb"):
        pass
    try:
        with utf8_path(path) as name, safe_open(name, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({one_line(error, 100)}); download it again."
        ) from None


def _listed(names: list[str]) -> str:
    """The first three names, and how many there are."""
    first = ", ".join(one_line(name, 60) for name in names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more tensors"
