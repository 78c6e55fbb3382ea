"""The files of tensors in a checkpoint: as PyTorch's writer makes them, tensor by tensor."""

import errno
import hashlib
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastllama.checkpoints.shards as module
from fastllama.checkpoints.folder import describe
from fastllama.checkpoints.shards import ShardWriter, file_numbers, write_shard


def content(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Texts of the header, and the tensors, of a safetensors file."""
    with safe_open(str(path), framework="pt") as file:
        names = file.keys()
        return file.metadata(), {name: file.get_tensor(name) for name in names}


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def some_tensors() -> dict[str, Tensor]:
    return {
        "b.matrix": torch.randn(300, 17),
        "a.transposed": torch.randn(40, 30).t(),
        "c.part of another": torch.randn(64, 8)[10:20],
        "every second": torch.randn(40)[::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "näme": torch.randn(5),
    }


@pytest.mark.parametrize("limit", [10, 2**13, 2**30])
def test_files_are_those_of_pytorch(
    tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", limit)
    tensors = some_tensors()
    numbers = file_numbers(tensors)
    theirs = HuggingFaceStorageWriter(
        str(tmp_path / "theirs"),
        fqn_to_index_mapping=numbers,
        save_distributed=True,
    )
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    dcp.save(contiguous, storage_writer=theirs)
    (tmp_path / "ours").mkdir()
    ours = ShardWriter(tmp_path / "ours", numbers)
    dcp.save(tensors, storage_writer=ours)
    names = sorted(os.listdir(tmp_path / "theirs"))
    assert sorted(os.listdir(tmp_path / "ours")) == names
    assert ours.files == describe(tmp_path / "ours", names)
    for name in names:
        headers, saved = zip(
            *(content(tmp_path / which / name) for which in ("theirs", "ours")), strict=True
        )
        sharding = [json.loads(header.pop("DCP_SHARDING_INFO")) for header in headers]
        assert sharding[0] == sharding[1]
        assert headers[0] == headers[1]
        assert saved[0].keys() == saved[1].keys()
        for tensor, value in saved[0].items():
            assert torch.equal(saved[1][tensor], value)
    loaded = {name: torch.full_like(tensor, 9.0) for name, tensor in tensors.items()}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path / "ours")))
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


def test_dtypes_keep_their_bits_and_are_aligned(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(3),
        "odd bfloat16": torch.randn(5, dtype=torch.bfloat16),
        "last": torch.randn(7, dtype=torch.bfloat16),
    }
    path = tmp_path / "a.safetensors"
    entry = write_shard(path, tensors, tensors.values(), {name: [0] for name in tensors})
    data = path.read_bytes()
    assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert int.from_bytes(data[:8], "little") % 8 == 0
    _, saved = content(path)
    assert {name: value.dtype for name, value in saved.items()} == {
        name: value.dtype for name, value in tensors.items()
    }
    for name, value in tensors.items():
        assert torch.equal(saved[name], value)


def test_values_are_read_one_after_the_other(tmp_path: Path) -> None:
    layout = {name: torch.empty(2**16, device="meta") for name in "abc"}
    path, sizes = tmp_path / "a.safetensors", []

    def values() -> Iterator[Tensor]:
        for number in range(3):
            sizes.append(path.stat().st_size)
            yield torch.full((2**16,), float(number))

    write_shard(path, layout, values(), {name: [0] for name in layout})
    # The tensors before are in the file, but for the end of a buffer.
    assert [size // 2**17 for size in sizes] == [0, 2, 4]
    assert torch.equal(content(path)[1]["c"], torch.full((2**16,), 2.0))


def test_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    path, layout = tmp_path / "a.safetensors", {"a": torch.zeros(2**14)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as failure:
            write_shard(path, layout, layout.values(), {"a": [0]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (failure.value.errno, failure.value.filename) == (errno.EFBIG, str(path))


def test_file_numbers_agree_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 100)
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        mesh = init_device_mesh("cpu", (2, 4))
        # 200 bytes in 4 shards of 80, 80, 40 and 0 bytes.
        sharded = {
            name: distribute_tensor(torch.zeros(5, 10), mesh, (Replicate(), Shard(0)))
            for name in ("c", "d", "e")
        }
        numbers = file_numbers({"b": torch.zeros(25), **sharded, "a": torch.zeros(100)})
        dist.destroy_process_group()
        assert numbers == {"a": 1, "b": 2, "c": 3, "d": 3, "e": 4}, rank
