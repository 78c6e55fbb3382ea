"""Data sets of Hugging Face's hub by name, streamed by the library datasets.

`datasets` divides a split into shards: its files. Each shard is an input file, so an interrupted
preparation reads again only the beginning of one of them. A commit of a data set never changes.
"""

import logging
import lzma
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import EIO
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa

from fastllama.data.records import (
    NoText,
    Record,
    check_text,
    list_fields,
    missing_field,
    too_long,
)
from fastllama.errors import reason
from fastllama.printable import one_line
from fastllama.urls import shown

SHARD_BYTES = 2**28
"""Assumed size of a shard, because `datasets` tells none. Large data sets have files of this size.

Only the progress bar and the shares of parts depend on it."""
BATCH_ROWS = 1024
"""Rows of Parquet that are in memory at a time."""

_URL = re.compile(r"hub://(?P<name>[\w.-]+(/[\w.-]+)?)(\?(?P<options>[^#]*))?", re.IGNORECASE)
_OPTIONS = ("config", "split", "revision")
_COMMIT = re.compile("[0-9a-f]{40}")
_TEXT_TYPES = ("string", "large_string")
_DAMAGE = (ValueError, TypeError, LookupError, EOFError, zlib.error, lzma.LZMAError)
"""What readers raise about content that they cannot read. Other errors are those of the network."""


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set at one commit."""

    name: str  # OWNER/NAME
    config: str
    split: str
    commit: str  # its SHA
    count: int  # of its shards
    is_parquet: bool
    stream: Any = field(compare=False, repr=False)  # an IterableDataset of all columns
    _selected: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def url(self) -> str:
        """The input that names this split at this commit."""
        config, split = quote(self.config, safe=""), quote(self.split, safe="")
        return f"hub://{self.name}?config={config}&split={split}&revision={self.commit}"

    def check_field(self, field: str) -> None:
        """Raise ValueError if the columns of the data set are known, and none is text in `field`.

        Columns are known if files or the data set's card declare them.
        """
        if self.stream.features is None:
            return
        types = {
            name: getattr(feature, "dtype", None) for name, feature in self.stream.features.items()
        }
        # A column of mixed types has no type.
        if field not in types or types[field] not in (*_TEXT_TYPES, None):
            texts = [name for name in types if types[name] in _TEXT_TYPES]
            known = f"choose one of {list_fields(texts)} with --field" if texts else "it has none"
            raise ValueError(f"{shown(self.url)} has no text field {field!r}: {known}")

    def shard(self, number: int, field: str) -> Any:
        """A shard as an `IterableDataset`; `field` is the only column that is needed."""
        if field not in self._selected:
            stream = self.stream
            if self.is_parquet:
                # Of other formats, the bytes of the other columns come anyway.
                options = {"columns": [field], "batch_size": BATCH_ROWS}
                builder = _builder(self.name, self.config, self.commit, **options)
                stream = builder.as_streaming_dataset()[self.split]
            elif stream.features is not None:
                # Images and audio in other columns would be decoded.
                stream = stream.select_columns([field])
            self._selected[field] = stream
        return self._selected[field].shard(self.count, number)


@dataclass(frozen=True)
class HubShard:
    """Shard number `number`, from 0, of a split."""

    source: HubSplit
    number: int

    size = SHARD_BYTES

    @property
    def version(self) -> str:
        """The commit."""
        return self.source.commit

    def __str__(self) -> str:
        # With leading zeros, the order of names is that of shards.
        count = str(self.source.count)
        return f"{self.source.url}#{self.number + 1:0{len(count)}}/{count}"


def is_hub(url: str) -> bool:
    """Whether `url` names a data set of the hub."""
    return url.lower().startswith("hub://")


def find_shards(url: str, commits: dict[str, str]) -> list[HubShard]:
    """The shards of the split that `url` names, in the order of the data set.

    `commits` holds the commit of each branch that was read before, by "OWNER/NAME@BRANCH". A branch
    that it lacks is looked up, and added.

    Raises:
        ValueError: `url` has another form; there is no such data set, revision, config or split; it
            may not be read; or the library datasets is missing or cannot read it.
        OSError: the network fails.
    """
    name, options = _parse(url)
    try:
        import datasets
        from datasets.packaged_modules.parquet.parquet import ParquetConfig
        from huggingface_hub import HfApi
    except ModuleNotFoundError:
        raise ValueError("reading hub:// needs datasets: pip install 'fastllama[hub]'") from None
    # It warns about cards without metadata, which a reader of the data set cannot change.
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    branch = options.get("revision", "main")
    with _explained(url, name):
        revision = commits.get(f"{name}@{branch}", branch)
        info = HfApi().dataset_info(name, revision=revision)
        if not _COMMIT.fullmatch(branch):
            commits[f"{name}@{branch}"] = info.sha
        try:
            builder = _builder(info.id, options.get("config"), info.sha)
        except ValueError as error:
            configs = datasets.get_dataset_config_names(
                f"hf://datasets/{info.id}", revision=info.sha
            )
            if options.get("config") in configs or (len(configs) == 1 and "config" not in options):
                raise
            lack = f"no config {options['config']!r}" if "config" in options else "several configs"
            known = list_fields(configs)
            raise _refused(url, f"it has {lack}: choose one of {known} with ?config=") from error
        splits = builder.as_streaming_dataset()
    split = options.get("split", "train")
    if split not in splits:
        raise _refused(
            url,
            f"it has no split {split!r}: choose one of {list_fields(list(splits))} with ?split=",
        )
    stream = splits[split]
    is_parquet = isinstance(builder.config, ParquetConfig)
    source = HubSplit(
        info.id, builder.config.name, split, info.sha, stream.num_shards, is_parquet, stream
    )
    return [HubShard(source, number) for number in range(source.count)]


def read_shard(shard: HubShard, field: str, skip: int, max_bytes: int) -> Iterator[Record]:
    """Yield the records of a shard after the first `skip`. How far it was read is not known.

    Raises:
        ValueError: it cannot be read.
        OSError: the network fails.
    """
    with _explained(str(shard), shard.source.name):
        rows = shard.source.shard(shard.number, field).skip(skip)
        for number, row in enumerate(rows, skip + 1):
            yield Record(number, _text_of(row, field, max_bytes), 0)


def _text_of(row: dict[str, Any], field: str, max_bytes: int) -> str | NoText:
    if field not in row:
        texts = tuple(name for name, value in row.items() if isinstance(value, str))
        return missing_field(field, tuple(row), texts)
    text = check_text(row[field], field)
    if isinstance(text, str) and len(text.encode()) > max_bytes:
        return too_long(max_bytes)
    return text


def _parse(url: str) -> tuple[str, dict[str, str]]:
    """The name and the options of a URL."""
    found = _URL.fullmatch(url)
    pairs = [pair.partition("=") for pair in (found["options"] or "").split("&")] if found else []
    options = {name: unquote(value) for name, _, value in pairs if name}
    if found is None or not all(options.values()) or not options.keys() <= set(_OPTIONS):
        raise _refused(
            url,
            "write 'hub://OWNER/NAME', or 'hub://OWNER/NAME?config=…&split=…&revision=…' with any "
            "of the three",
        )
    return found["name"], options


def _builder(name: str, config: str | None, commit: str, **options: Any) -> Any:
    import datasets

    # If the network fails, `datasets` would go on with another commit that it finds in its cache.
    with tempfile.TemporaryDirectory() as empty_cache:
        # The prefix makes sure that a folder OWNER/NAME on the disk is no data set.
        return datasets.load_dataset_builder(
            f"hf://datasets/{name}", config, revision=commit, cache_dir=empty_cache, **options
        )


@contextmanager
def _explained(url: str, name: str) -> Iterator[None]:
    """Raise the errors of `datasets` and of the hub as one sentence about `url`."""
    try:
        yield
    except Exception as error:  # The libraries behind `datasets` share no base class.
        raise _explanation(error, url, name) from error


def _explanation(error: Exception, url: str, name: str) -> Exception:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    match error:
        case _RefusedError():
            return error
        case errors.OfflineModeIsEnabled():
            problem = "HF_HUB_OFFLINE is set: unset it, or name files on a disk"
        case errors.RevisionNotFoundError():
            problem = "it has no such revision: name a branch, a tag or a commit of it"
        case _ if isinstance(error, errors.GatedRepoError) or "gated dataset" in str(error):
            problem = (
                f"it is gated: accept its conditions on https://huggingface.co/datasets/{name}, "
                "and use `hf auth login`, or set HF_TOKEN"
            )
        case errors.RepositoryNotFoundError():
            problem = (
                "the hub has no such data set, or it is private: correct the name; for a private "
                "one, use `hf auth login`, or set HF_TOKEN"
            )
        case _ if status in (401, 403):
            problem = "permission denied: use `hf auth login`, or set HF_TOKEN"
        case RuntimeError() if "scripts are no longer supported" in str(error):
            problem = (
                "it is a script, which `datasets` does not run: choose a data set of files, or its "
                "branch with Parquet, ?revision=refs/convert/parquet"
            )
        case ImportError() | errors.HFValidationError():
            problem = one_line(error, 200)
        case DatasetsError() | EmptyDatasetError() | pa.ArrowException():
            problem = _unreadable(error, name)
        case _ if isinstance(error, _DAMAGE) and status is None:
            problem = _unreadable(error, name)
        case _:
            failure = OSError(
                f"cannot read {shown(url)}: {one_line(reason(error), 200)}; check the network, and "
                "run the same command again"
            )
            failure.errno = getattr(error, "errno", None) or EIO
            return failure
    return _refused(url, problem)


def _unreadable(error: Exception, name: str) -> str:
    return (
        f"datasets cannot read it ({one_line(reason(error), 200)}); of JSON, Parquet and text, "
        f"hf://datasets/{name} reads the files themselves, and skips what is damaged"
    )


class _RefusedError(ValueError):
    """A mistake, in words."""


def _refused(url: str, problem: str) -> _RefusedError:
    return _RefusedError(f"cannot read {shown(url)}: {problem}")
