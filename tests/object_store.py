"""An object store in memory, behind store:// URLs, whose requests can fail."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class ObjectStore(MemoryFileSystem):
    """Objects have an ETag of their content, as those of S3."""

    protocol = "store"
    store: dict[str, Any] = {}  # noqa: RUF012  fsspec's own way: one store for all instances
    pseudo_dirs = [""]  # noqa: RUF012
    on_request: Callable[[str, str], None] | None = None
    """Called with "cat", "info" or "put" and the path before each request; may raise."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("store://", "memory://", 1))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self._request("info", path)
        return self._tagged(super().info(path, **options))

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        listed = super().ls(path, detail=detail, **options)
        return [self._tagged(entry) for entry in listed] if detail else listed

    def find(self, path: str, **options: Any) -> Any:
        found = super().find(path, **options)
        if isinstance(found, dict):
            return {name: self._tagged(info) for name, info in found.items()}
        return found

    def cat_file(self, path: str, *args: Any, **options: Any) -> bytes:
        self._request("cat", path)
        return super().cat_file(path, *args, **options)

    def put_file(self, lpath: str, rpath: str, *args: Any, **options: Any) -> None:
        self._request("put", rpath)
        super().put_file(lpath, rpath, *args, **options)

    def pipe_file(self, path: str, value: bytes, *args: Any, **options: Any) -> None:
        self._request("put", path)
        super().pipe_file(path, value, *args, **options)

    def _request(self, kind: str, path: str) -> None:
        if ObjectStore.on_request is not None:
            ObjectStore.on_request(kind, path)

    def _tagged(self, info: dict[str, Any]) -> dict[str, Any]:
        if info["type"] == "directory":
            return info
        content = self.store[self._strip_protocol(info["name"])].getvalue()
        return info | {"ETag": hashlib.md5(content).hexdigest()}


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """An empty store, whose content is gone afterwards."""
    fsspec.register_implementation("store", ObjectStore, clobber=True)
    try:
        yield ObjectStore()
    finally:
        ObjectStore.store.clear()
        ObjectStore.pseudo_dirs[:] = [""]
        ObjectStore.on_request = None


def upload(folder: Path, url: str) -> None:
    """Copy the files below a folder, through links too."""
    files, root = fsspec.url_to_fs(url)
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())


def fail(
    times: int, error: Callable[[], Exception], kind: str = "cat"
) -> Callable[[str, str], None]:
    """An `on_request` that fails the next `times` requests of a kind."""
    left = times

    def fail_some(request: str, path: str) -> None:
        nonlocal left
        if request == kind and left:
            left -= 1
            raise error()

    return fail_some
