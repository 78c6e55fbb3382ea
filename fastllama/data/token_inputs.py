"""Token files that other tools wrote: recognised, checked, and read in bounded memory."""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastllama.atomic import naming
from fastllama.data.files import FileKind
from fastllama.data.token_file import TokenFile
from fastllama.printable import one_line, printable, shortened

Format = Literal["datatrove", "megatron", "llm.c", "raw-uint16", "raw-uint32", "npy"]
FORMATS: tuple[Format, ...] = get_args(Format)

# Companions are found so that none is reported as left out; each is read with its token file.
INDEX, METADATA, LOSS, MEGATRON_INDEX = ".index", ".metadata", ".loss", ".idx"
_COMPANIONS = (f".ds{INDEX}", f".ds{METADATA}", f".ds{LOSS}", MEGATRON_INDEX)
TOKEN_FILES = FileKind(
    (".ds", ".bin", ".npy", *_COMPANIONS),
    ".ds, .bin or .npy",
    "name token files, or encode documents with `fastllama prepare`",
)

CHUNK_NUMBERS = 2**20
"""Tokens, or entries of an index, that are read at a time."""
MAX_METADATA_BYTES = 2**16

_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MEGATRON_FLOATS = (6, 7)

_LLM_C_HEADER_BYTES = 256 * 4
_LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Magic numbers of llm.c's token files, with the version and the dtype that belong to each."""
_LLM_C_EVALUATION = 20240522

_RAW = {"raw-uint16": "<u2", "raw-uint32": "<u4"}
_GUESSED_TOKENS = 16
"""A file in which every other of at least this many 16-bit numbers is 0 has 32-bit tokens."""


@dataclass(frozen=True)
class TokenInput:
    """A file with `tokens` token ids of `dtype`, from byte `start` to its end."""

    path: Path
    format: Format
    dtype: np.dtype
    start: int
    tokens: int
    companions: tuple[Path, ...] = ()
    """Files beside it that are read, too. The index, if there is one, comes first."""
    has_index: bool = False
    """Whether an index tells where documents end. Otherwise, their end tokens do."""
    tokenizer: str = ""
    """What the file's metadata calls its tokenizer."""

    def read(
        self, vocab_size: int
    ) -> Iterator[tuple[NDArray[np.integer], NDArray[np.int64] | None]]:
        """Yield all token ids in chunks, and for each chunk where documents end in it.

        An end is the place after the last token of a document that has tokens, from the beginning
        of the chunk; None instead of the ends if the file has no index.

        Raises:
            ValueError: a token id is outside of the vocabulary, the index is damaged or contradicts
                the file, or a file was truncated while it was read.
            OSError: a file cannot be read.
        """
        ends = _Ascending(self._document_ends()) if self.has_index else None
        first = 0
        for ids in _numbers(self.path, self.dtype, self.start, self.tokens):
            if ids.min() < 0 or ids.max() >= vocab_size:
                at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
                problem = "which is negative; -1 is often padding: remove it"
                if ids[at] >= 0:
                    problem = (
                        f"and the tokenizer has {vocab_size:,} ids: name the tokenizer that the "
                        "file was written with"
                    )
                    if self.format in _RAW:
                        problem += ", or another --format"
                raise ValueError(
                    f"{_shown(self.path)}, read as {self.format}, has token id {ids[at]} at "
                    f"position {first + at:,}, {problem}"
                )
            if ends is None:
                yield ids, None
            else:
                found = ends.up_to(first + ids.size)
                yield ids, found[found > first] - first
            first += ids.size

    def _document_ends(self) -> Iterator[NDArray[np.int64]]:
        index = self.companions[0]
        if self.format == "megatron":
            return _megatron_ends(index, self.dtype.itemsize)
        count = index.stat().st_size // 8
        return _checked_ascending(_numbers(index, np.dtype("<i8"), 0, count), index)


def open_token_inputs(
    paths: Sequence[Path], named: Format | None, vocab_size: int
) -> list[TokenInput]:
    """Recognise and check `paths`, which may hold companions, as files of one format.

    Reads headers only. `named` is the format where it is not recognised by content and suffix.

    Raises:
        ValueError: a file does not fit its format, is empty or truncated, lacks its companion, or
            the files have several formats or tokenizers.
        OSError: a file cannot be read.
    """
    present = set(paths)
    inputs: list[TokenInput] = []
    for path in paths:
        if path.name.lower().endswith(_COMPANIONS):
            _check_owner(path, present)
        else:
            inputs.append(_open(path, named, vocab_size))
    for file in inputs:
        if not (file.tokens or file.has_index):
            raise ValueError(f"{_shown(file.path)} holds no tokens: leave it out")
    for attribute, remedy in (
        ("format", "import them into separate folders"),
        ("tokenizer", f"import them into separate folders, or delete the {METADATA} files"),
    ):
        kinds = {getattr(file, attribute): file for file in inputs if getattr(file, attribute)}
        if len(kinds) > 1:
            (one, file), (other, another) = list(kinds.items())[:2]
            raise ValueError(
                f"the input files have several {attribute}s, {one_line(one, 80)} "
                f"({_shown(file.path)}) and {one_line(other, 80)} ({_shown(another.path)}): "
                f"{remedy}"
            )
    return inputs


def _open(path: Path, named: Format | None, vocab_size: int) -> TokenInput:
    found = named or _recognised(path)
    if found is None:
        if vocab_size > 2**16 or _has_zero_halves(path, np.dtype("<u2")):
            raise ValueError(
                f"{_shown(path)} has neither a header nor an {MEGATRON_INDEX} file beside it, and "
                "its tokens may have 16 or 32 bits: say which with --format raw-uint16 or "
                "--format raw-uint32"
            )
        found = "raw-uint16"
    if found == "datatrove":
        return _open_datatrove(path, vocab_size)
    if found == "megatron":
        return _open_megatron(path)
    if found == "llm.c":
        return _open_llm_c(path)
    if found == "npy":
        return _open_npy(path)
    dtype = np.dtype(_RAW[found])
    if found == "raw-uint32" and _has_zero_halves(path, dtype):
        raise ValueError(
            f"every second number of {_shown(path)}, read as raw-uint32, is 0: its tokens have 64 "
            "bits; save them with array.astype('uint32')"
        )
    return TokenInput(path, found, dtype, 0, _whole_tokens(path, dtype, 0))


def _recognised(path: Path) -> Format | None:
    """The format of `path` by its suffix, header and companion; None if it is raw."""
    suffix = path.suffix.lower()
    if suffix == ".ds":
        return "datatrove"
    if suffix == ".npy":
        return "npy"
    if _is_there(path.with_suffix(MEGATRON_INDEX)):
        return "megatron"
    magic = int.from_bytes(_read(path, 4, 0), "little")
    return "llm.c" if magic in (*_LLM_C, _LLM_C_EVALUATION) else None


def _has_zero_halves(path: Path, half: np.dtype) -> bool:
    """Whether every second number of `path` is 0: its tokens are twice as wide as `half`."""
    start = _read(path, 2**16, 0)
    halves = np.frombuffer(start[: len(start) // half.itemsize // 2 * 2 * half.itemsize], half)
    return halves.size >= _GUESSED_TOKENS and not halves[1::2].any() and bool(halves.any())


def _open_datatrove(path: Path, vocab_size: int) -> TokenInput:
    index, metadata = Path(f"{path}{INDEX}"), Path(f"{path}{METADATA}")
    has_index, has_metadata = _is_there(index), _is_there(metadata)
    size = path.stat().st_size
    tokenizer, itemsize, counted = "", 0, None
    if has_metadata:
        tokenizer, itemsize, counted = _read_datatrove_metadata(metadata)
    n_documents, remainder = divmod(index.stat().st_size, 8) if has_index else (0, 0)
    if remainder:
        raise ValueError(
            f"{_shown(index)} is truncated: its size is no multiple of 8 bytes; copy it again"
        )
    last = int.from_bytes(_read(index, 8, 8 * (n_documents - 1)), "little") if n_documents else 0
    if not itemsize:
        # As datatrove chooses the size, unless the index tells it.
        by_vocabulary = 2 if vocab_size <= 2**16 else 4
        itemsize = {2 * last: 2, 4 * last: 4}.get(size, by_vocabulary) if last else by_vocabulary
    dtype = np.dtype(f"<u{itemsize}")
    tokens = _whole_tokens(path, dtype, 0)
    if has_index and last != tokens:
        raise ValueError(
            f"{_shown(index)} ends at token {last:,}, and {_shown(path)} has {tokens:,} tokens: "
            "copy both files again"
        )
    if counted is not None and counted != tokens:
        raise ValueError(
            f"{_shown(metadata)} counts {counted:,} tokens, and {_shown(path)} has {tokens:,}: "
            "copy both files again"
        )
    present = ((index, has_index), (metadata, has_metadata))
    companions = tuple(companion for companion, is_there in present if is_there)
    return TokenInput(path, "datatrove", dtype, 0, tokens, companions, has_index, tokenizer)


def _read_datatrove_metadata(path: Path) -> tuple[str, int, int]:
    """The name of the tokenizer, the bytes of a token, and the number of tokens."""
    text = _read(path, MAX_METADATA_BYTES, 0).decode(errors="replace")
    try:
        first, second, *_ = text.split("\n")
        name, itemsize = first.rsplit("|", 1)
        if itemsize not in ("2", "4"):
            raise ValueError
        return name, int(itemsize), int(second)
    except ValueError:
        raise ValueError(
            f"{_shown(path)} is not metadata of datatrove (a tokenizer, | and 2 or 4, then the "
            "number of tokens): copy it again, or delete it"
        ) from None


def _open_megatron(path: Path) -> TokenInput:
    index = path.with_suffix(MEGATRON_INDEX)
    if not _is_there(index):
        raise ValueError(
            f"{_shown(path)} has no {_shown(index.name)} beside it, which tells the type of its "
            "tokens: copy it, too"
        )
    code, n_sequences, n_borders = _read_megatron_header(index)
    if code in _MEGATRON_FLOATS:
        raise ValueError(
            f"{_shown(index)} says that the file holds floats (dtype code {code}), not token ids: "
            "name token files"
        )
    if code not in _MEGATRON_DTYPES:
        raise ValueError(
            f"{_shown(index)} has the unknown dtype code {code}: it is damaged, or another tool "
            "wrote it; copy it again"
        )
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    lengths, pointers = _MEGATRON_HEADER.size, _MEGATRON_HEADER.size + 4 * n_sequences
    borders = pointers + 8 * n_sequences
    whole, size = borders + 8 * n_borders, index.stat().st_size
    if size == whole + n_sequences > whole:
        raise ValueError(
            f"{_shown(index)} describes multimodal data (it has a mode for each sequence), and "
            "fastllama trains on text: name token files of text"
        )
    if size != whole:
        raise ValueError(
            f"{_shown(index)} has {size:,} bytes, and its {n_sequences:,} sequences and "
            f"{n_borders:,} document indices take {whole:,}: copy it again"
        )
    described = 0
    if n_sequences:
        read = partial(_read_number, index)
        last = n_sequences - 1
        described = read("<i8", pointers + 8 * last) + dtype.itemsize * read(
            "<i4", lengths + 4 * last
        )
        if not n_borders or (read("<i8", borders), read("<i8", whole - 8)) != (0, n_sequences):
            raise ValueError(
                f"{_shown(index)} is damaged: its document indices do not go from 0 to the "
                f"{n_sequences:,} sequences; copy it again"
            )
    found = path.stat().st_size
    if described != found:
        raise ValueError(
            f"{_shown(index)} describes {described:,} bytes of tokens, and {_shown(path)} has "
            f"{found:,}: copy both files again"
        )
    tokens = _whole_tokens(path, dtype, 0)
    return TokenInput(path, "megatron", dtype, 0, tokens, (index,), has_index=True)


def _read_megatron_header(index: Path) -> tuple[int, int, int]:
    """The dtype code, the number of sequences, and the number of document indices."""
    header = _read(index, _MEGATRON_HEADER.size, 0)
    if not header.startswith(_MEGATRON_MAGIC):
        raise ValueError(
            f"{_shown(index)} is no index of Megatron-LM (it does not begin with MMIDIDX): copy it "
            "again, or move it away if it belongs to something else"
        )
    if len(header) < _MEGATRON_HEADER.size:
        raise ValueError(f"{_shown(index)} is truncated within its header: copy it again")
    _, version, code, n_sequences, n_borders = _MEGATRON_HEADER.unpack(header)
    if version != 1:
        raise ValueError(
            f"{_shown(index)} has version {version}, and fastllama reads version 1: write the "
            "files again with Megatron-LM's preprocess_data.py"
        )
    return code, n_sequences, n_borders


def _megatron_ends(index: Path, itemsize: int) -> Iterator[NDArray[np.int64]]:
    """Yield the document ends in tokens. A document is one sequence or several."""
    _, n_sequences, n_borders = _read_megatron_header(index)
    start = _MEGATRON_HEADER.size
    lengths = _numbers(index, np.dtype("<i4"), start, n_sequences)
    pointers = _numbers(index, np.dtype("<i8"), start + 4 * n_sequences, n_sequences)
    indices = _numbers(index, np.dtype("<i8"), start + 12 * n_sequences, n_borders)
    borders = _Ascending(_checked_ascending(indices, index))
    first = position = 0
    for n_tokens, pointer in zip(lengths, pointers, strict=True):
        ends = position + np.cumsum(n_tokens, dtype=np.int64)
        is_wrong = (n_tokens < 0) | ((ends - n_tokens) * itemsize != pointer)
        if is_wrong.any():
            raise ValueError(
                f"{_shown(index)} is damaged: sequence {first + int(np.argmax(is_wrong)):,} does "
                "not begin where the one before it ends; copy it again"
            )
        found = borders.up_to(first + ends.size)
        yield ends[found[found > first] - first - 1]
        first, position = first + ends.size, int(ends[-1])


def _open_llm_c(path: Path) -> TokenInput:
    header = _read(path, _LLM_C_HEADER_BYTES, 0)
    magic = int.from_bytes(header[:4], "little")
    if magic == _LLM_C_EVALUATION:
        raise ValueError(
            f"{_shown(path)} holds multiple-choice questions of llm.c, not a token stream: leave "
            "it out"
        )
    if magic not in _LLM_C:
        known = " or ".join(map(str, _LLM_C))
        raise ValueError(
            f"{_shown(path)} begins with {magic}, not with {known} as token files of llm.c do: "
            "name another --format"
        )
    if len(header) < _LLM_C_HEADER_BYTES:
        raise ValueError(f"{_shown(path)} is truncated within its header: copy it again")
    _, version, tokens = struct.unpack("<3i", header[:12])
    expected, name = _LLM_C[magic]
    if version != expected:
        raise ValueError(
            f"{_shown(path)} has version {version} of the format {magic}, and fastllama reads "
            f"version {expected}: write it again with a current llm.c"
        )
    dtype = np.dtype(name)
    found = _whole_tokens(path, dtype, _LLM_C_HEADER_BYTES)
    if found != tokens:
        raise ValueError(
            f"{_shown(path)} has {found:,} tokens, and its header counts {tokens:,}: copy it again"
        )
    return TokenInput(path, "llm.c", dtype, _LLM_C_HEADER_BYTES, tokens)


def _open_npy(path: Path) -> TokenInput:
    try:
        file = TokenFile(path)
    except ValueError as error:
        raise ValueError(
            f"{_shown(path)} is no .npy array of token ids ({error}): save its integers with "
            "numpy.save, or name the format of numbers without a header, --format raw-uint16 or "
            "--format raw-uint32"
        ) from None
    if file.dtype.kind not in "iu":
        raise ValueError(
            f"{_shown(path)} holds {file.dtype} numbers, not token ids: save an array of integers"
        )
    if len(file.shape) != 1:
        has = f"the shape {' x '.join(map(str, file.shape))}" if file.shape else "no dimension"
        raise ValueError(
            f"{_shown(path)} has {has}, and a token stream has one dimension: save "
            "array.reshape(-1), with the end token after each document"
        )
    found = _whole_tokens(path, file.dtype, len(file.header))
    if found != file.shape[0]:
        raise ValueError(
            f"{_shown(path)} has {found:,} tokens, and its header counts {file.shape[0]:,}: copy "
            "it again"
        )
    return TokenInput(path, "npy", file.dtype, len(file.header), found)


def _is_there(companion: Path) -> bool:
    """Whether a token file has this companion.

    Raises:
        ValueError: it cannot be read, which is no reason to read the token file without it.
    """
    if os.path.lexists(companion) and not companion.is_file():
        raise ValueError(
            f"{_shown(companion)} is a broken link or a special file: copy the file itself"
        )
    return companion.is_file()


def _check_owner(companion: Path, present: set[Path]) -> None:
    """Raise ValueError if the token file of an index or loss mask is missing."""
    owner = companion.with_suffix("")
    if companion.suffix.lower() == MEGATRON_INDEX:
        owner = companion.with_suffix(".bin")
    # datatrove's merger writes metadata about all files together, without a file of this name.
    if owner not in present and companion.suffix != METADATA:
        if owner.is_file():
            raise ValueError(
                f"{_shown(companion)} belongs to {_shown(owner)}: name that file instead"
            )
        raise ValueError(
            f"{_shown(companion)} belongs to {_shown(owner.name)}, which is not among the input "
            "files: name this file"
        )


class _Ascending:
    """Numbers that arrive in ascending arrays, taken up to a limit."""

    def __init__(self, arrays: Iterator[NDArray[np.int64]]) -> None:
        self._arrays = arrays
        self._waiting = np.empty(0, np.int64)

    def up_to(self, limit: int) -> NDArray[np.int64]:
        """The numbers up to `limit` that were not taken before, each once."""
        while not self._waiting.size or self._waiting[-1] <= limit:
            if (more := next(self._arrays, None)) is None:
                break
            self._waiting = np.unique(np.concatenate([self._waiting, more]))
        n = int(np.searchsorted(self._waiting, limit, side="right"))
        taken, self._waiting = self._waiting[:n], self._waiting[n:]
        return taken


def _checked_ascending(
    arrays: Iterable[NDArray[np.int64]], path: Path
) -> Iterator[NDArray[np.int64]]:
    last = 0
    for numbers in arrays:
        if (numbers < np.append(last, numbers[:-1])).any():
            raise ValueError(
                f"{_shown(path)} is damaged: the ends of its documents do not ascend; copy it again"
            )
        last = int(numbers[-1])
        yield numbers


def _numbers(path: Path, dtype: np.dtype, start: int, count: int) -> Iterator[np.ndarray]:
    """Yield `count` numbers of a file in chunks, from byte `start` on."""
    with naming(path), open(path, "rb") as file:
        file.seek(start)
        for first in range(0, count, CHUNK_NUMBERS):
            n_bytes = min(CHUNK_NUMBERS, count - first) * dtype.itemsize
            data = file.read(n_bytes)
            if len(data) < n_bytes:
                raise ValueError(
                    f"{_shown(path)} was truncated while it was read: copy it again, and run the "
                    "same command again"
                )
            yield np.frombuffer(data, dtype)


def _whole_tokens(path: Path, dtype: np.dtype, start: int) -> int:
    """Number of tokens from byte `start` to the end of the file."""
    size = os.stat(path).st_size - start
    tokens, remainder = divmod(size, dtype.itemsize)
    if remainder:
        raise ValueError(
            f"{_shown(path)} is truncated, or its tokens do not have {dtype.itemsize} bytes: "
            f"{size:,} bytes of tokens are no multiple of {dtype.itemsize}; copy it again"
        )
    return tokens


def _read_number(path: Path, dtype: str, at: int) -> int:
    return int(np.frombuffer(_read(path, np.dtype(dtype).itemsize, at), dtype)[0])


def _read(path: Path, n: int, at: int) -> bytes:
    """Bytes [at, at + n) of a file, fewer at its end."""
    with naming(path), open(path, "rb") as file:
        file.seek(at)
        return file.read(n)


def _shown(path: object) -> str:
    return shortened(printable(path), 300)
