"""fastllama import: a run folder from a folder with Hugging Face's `LlamaForCausalLM`."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastllama.checkpoints.folder import locate
from fastllama.checkpoints.state import MODEL, checkpoint_name, model_tensors
from fastllama.checkpoints.weights_only import write_weights
from fastllama.config import Config, ModelConfig, validate_values
from fastllama.data.tokenizer import HUB_NAME, load_tokenizer, vocabulary_size
from fastllama.model.llama import Llama
from fastllama.printable import printable
from fastllama.run_folder import RunFolder, model_identity
from fastllama.typed_json import DamagedFileError, read_json
from fastllama.weights.hf_weights import LlamaTensors
from fastllama.weights.llama_layout import (
    ArchitectureJson,
    LlamaJson,
    model_config,
    refuse_other_architecture,
    tensors,
)
from fastllama.weights.new_run import keep_tokenizer_model, new_run, refuse_output
from fastllama_kernels import REFERENCE

MAX_CONTEXT = 2**26
"""Longest context. No tensor shows whether the number is right, and tables are as long as it."""


@dataclass(frozen=True)
class DocumentToken:
    """A token that begins or ends a document."""

    id: int
    text: str
    source: Path
    """The file that names it."""
    n_choices: int = 1
    """How many the file names; the first is taken."""


@dataclass(frozen=True)
class HuggingFaceModel:
    """A folder in the layout of Hugging Face's Llama, checked."""

    model: ModelConfig
    tokenizer: Path
    end_token: DocumentToken
    start_token: DocumentToken | None
    """The token that the tokenizer puts before a text."""
    weights: LlamaTensors

    def read(self, name: str) -> Tensor:
        """A weight of `Llama`, float32, by its checkpoint name.

        Raises:
            ValueError: a file is damaged, or a value is not finite.
        """
        parts = {
            tensor: rows
            for tensor, rows in tensors(self.model).items()
            if f"{MODEL}{checkpoint_name(rows.parameter)}" == name
        }
        return torch.cat([self.weights.read(tensor).float() for tensor in parts])


@dataclass(frozen=True)
class GenerationJson:
    """What is read of a generation_config.json."""

    eos_token_id: int | list[int] | None = None


def import_run(folder: Path, output: Path) -> HuggingFaceModel:
    """Write the run folder `output` from a folder in the layout of Hugging Face's Llama.

    The weights become float32, which keeps every value. They are read and written one file of a
    checkpoint at a time. Nothing is written unless everything else has been checked, and `output`
    appears when it is complete.

    Raises:
        ValueError: `output` exists, or `folder` has no model that `Llama` computes, or one that is
            damaged; the sentence names the file or the tensor.
        OSError: a file cannot be read or written.
    """
    refuse_output(output)
    source = open_hugging_face(folder)
    with torch.device("meta"):
        shapes = model_tensors(Llama(source.model, REFERENCE))
    identity = {**model_identity(source.model), "data.end_token_id": source.end_token.id}
    if source.start_token:
        identity["data.start_token_id"] = source.start_token.id
    with new_run(output) as run:
        run.create(Config(model=source.model), source.tokenizer)
        keep_tokenizer_model(folder / "tokenizer.model", run.tokenizer_model)
        write_weights(run.checkpoints, shapes, source.read, identity)
    return source


def open_hugging_face(folder: Path) -> HuggingFaceModel:
    """Check a folder in the layout of Hugging Face's Llama: everything but the values.

    Raises:
        ValueError: `folder` has no model that `Llama` computes, or one that is damaged; the
            sentence names the file or the tensor.
        OSError: a file cannot be read.
    """
    _refuse_source(folder)
    found, model = _read_config(folder / "config.json")
    tokenizer = _read_tokenizer(folder, model)
    end_token = _end_token(folder, found, tokenizer)
    return HuggingFaceModel(
        model=model,
        tokenizer=folder / "tokenizer.json",
        end_token=end_token,
        start_token=_start_token(folder, tokenizer),
        weights=LlamaTensors(folder, model),
    )


def _refuse_source(folder: Path) -> None:
    """Raise ValueError if `folder` is certainly not a Hugging Face folder."""
    shown = printable(folder)
    if folder.is_dir() and os.path.lexists(folder / "config.json"):
        return
    run = locate(folder)[0]
    if not run.exists:
        # A file of a run, or its folder of checkpoints.
        run = RunFolder(folder.parent)
    if run.exists:
        raise ValueError(
            f"{shown} is a run folder of fastllama, or in one, and needs no import: use it with "
            f"fastllama generate {run.path}, or start from it with --training.init-from {run.path}."
        )
    if folder.is_dir():
        raise ValueError(
            f"{shown} has no config.json; give the folder of a Llama model in the format of "
            "Hugging Face."
        )
    if os.path.lexists(folder):
        raise ValueError(f"{shown} is not a folder; give the folder with config.json.")
    remedy = "name the folder with config.json"
    if HUB_NAME.fullmatch(shown):
        remedy = f"for a model of this name, hf download {shown} --local-dir DIR, and import DIR"
    raise ValueError(f"There is no folder {shown}, and fastllama downloads nothing; {remedy}.")


def _read_config(path: Path) -> tuple[LlamaJson, ModelConfig]:
    try:
        # A model of another kind lacks fields of Llama's.
        refuse_other_architecture(read_json(path, ArchitectureJson), str(path))
        found = read_json(path, LlamaJson)
    except DamagedFileError as error:
        raise ValueError(f"{error}; restore the config.json of the model.") from None
    if found.max_position_embeddings > MAX_CONTEXT:
        raise ValueError(
            f"{path} has max_position_embeddings = {found.max_position_embeddings}, more than "
            f"{MAX_CONTEXT}; set it to the context that the model was trained for."
        )
    model = model_config(found, str(path))
    try:
        validate_values(Config(model=model))
    except ValueError as error:
        raise ValueError(f"{path} cannot be imported: {error}") from None
    return found, model


def _read_tokenizer(folder: Path, model: ModelConfig) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        others = ("tokenizer.model", "vocab.json", "tokenizer_config.json")
        if other := next((name for name in others if (folder / name).exists()), None):
            raise ValueError(
                f"{folder} has {other} and no tokenizer.json, the format that fastllama reads; "
                "convert it with transformers: AutoTokenizer.from_pretrained("
                f"{str(folder)!r}).save_pretrained({str(folder)!r})."
            )
        raise ValueError(f"{folder} has no tokenizer.json; download that of the model.")
    tokenizer = load_tokenizer(path)
    n_ids = vocabulary_size(tokenizer)
    if n_ids > model.vocab_size:
        raise ValueError(
            f"{path} has {n_ids} token ids and the model {model.vocab_size}; take the tokenizer of "
            "the model, or add rows with resize_token_embeddings of transformers."
        )
    return tokenizer


def _end_token(folder: Path, found: LlamaJson, tokenizer: Tokenizer) -> DocumentToken:
    """The end token that generation_config.json names, or else config.json."""
    path = folder / "generation_config.json"
    named = None
    if os.path.lexists(path):
        try:
            named = read_json(path, GenerationJson).eos_token_id
        except DamagedFileError as error:
            raise ValueError(f"{error}; restore it, or remove it.") from None
    if named is None:
        path, named = folder / "config.json", found.eos_token_id
    ids = named if isinstance(named, list) else [named]
    end_token = ids[0] if ids else None
    if end_token is None:
        raise ValueError(
            f"{path} has no eos_token_id; set it to the id of the token that ends a document."
        )
    # The tokenizers library takes 32-bit numbers.
    text = tokenizer.id_to_token(end_token) if 0 <= end_token < 2**32 else None
    if text is None:
        raise ValueError(
            f"{path} has eos_token_id = {end_token}, which is no token of "
            f"{folder / 'tokenizer.json'}; set it to the id of the token that ends a document."
        )
    return DocumentToken(end_token, text, path, len(ids))


def _start_token(folder: Path, tokenizer: Tokenizer) -> DocumentToken | None:
    """The token that the template of the tokenizer puts before a text.

    Tokens that it puts after a text are those of an encoder: training ends documents by itself.
    """
    plain, framed = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    n = len(plain)
    starts = [start for start in range(len(framed) - n + 1) if framed[start : start + n] == plain]
    if not starts or starts[0] == 0:
        return None
    path, token = folder / "tokenizer.json", framed[0]
    if starts[0] > 1:
        raise ValueError(
            f"{path} puts {starts[0]} tokens before a text, and fastllama one at most; remove the "
            "others from its post_processor."
        )
    text = tokenizer.id_to_token(token)
    if text is None:
        raise ValueError(
            f"{path} puts token {token} before a text and has no such token; restore the "
            "tokenizer.json of the model."
        )
    return DocumentToken(token, text, path)
