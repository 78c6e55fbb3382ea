"""Hugging Face's hub on the loopback: data sets of folders, whose answers can fail."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


def needs_hub(test: Any) -> Any:
    """Mark a test with the server."""
    is_missing = find_spec("datasets") is None
    skipped = pytest.mark.skipif(is_missing, reason="no datasets: make test-all installs it")
    # datasets and huggingface_hub, about themselves.
    return pytest.mark.extra(skipped(pytest.mark.filterwarnings("default")(test)))


Answer = tuple[int, dict[str, str], bytes]


class HubServer:
    """The hub. `on_request` may answer instead: (method, path) to (status, headers, body)."""

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, Path]]] = {}
        """The commits of each data set, and the folders with their files."""
        self.on_request: Callable[[str, str], Answer | None] = lambda method, path: None
        self.bytes_sent = 0
        """Bytes of files."""

    def commit(self, name: str, folder: Path) -> str:
        """Make the files in `folder` the newest commit of a data set, and return its SHA."""
        commits = self.commits.setdefault(name, [])
        sha = hashlib.sha1(f"{folder} {len(commits)}".encode()).hexdigest()
        commits.append((sha, folder))
        return sha

    def answer(self, method: str, url: str) -> Answer:
        split = urlsplit(url)
        path = unquote(split.path)
        if (answer := self.on_request(method, path)) is not None:
            return answer
        _, owner, name, *rest = path.strip("/").removeprefix("api/").split("/")
        commits = self.commits.get(f"{owner}/{name}")
        if commits is None:
            return _missing("RepoNotFound")
        kind, revision, *parts = rest or ["revision", "main"]
        folder = (dict(commits) | {"main": commits[-1][1]}).get(revision)
        if folder is None:
            return _missing("RevisionNotFound")
        sha = next(sha for sha, at in commits if at == folder)
        file = folder / "/".join(parts)
        if kind == "resolve" and file.is_file():
            return 200, {"X-Repo-Commit": sha, "ETag": f'"{_oid(file)}"'}, file.read_bytes()
        if kind == "tree" and file.is_dir():
            is_recursive = parse_qs(split.query)["recursive"] == ["true"]
            found = sorted(file.rglob("*") if is_recursive else file.iterdir())
            return _json([_entry(path, folder) for path in found])
        if kind == "revision":
            return _json({"id": f"{owner}/{name}", "sha": sha, "siblings": []})
        return _missing("EntryNotFound")


def _missing(what: str) -> Answer:
    return 404, {"X-Error-Code": what}, b"{}"


def _json(content: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _entry(path: Path, root: Path) -> dict[str, Any]:
    name = str(path.relative_to(root))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": name, "oid": _oid(path), "size": path.stat().st_size}


@contextmanager
def hub_server(cache: Path) -> Iterator[HubServer]:
    """A hub that huggingface_hub and datasets use, with an empty `cache`."""
    import datasets.config
    from huggingface_hub import HfFileSystem, constants

    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self.path.startswith(("/api/datasets/", "/datasets/")):
                status, headers, content = hub.answer(self.command, self.path)
            else:
                status, headers, content = _missing("EntryNotFound")
            if status == 200 and (asked := self.headers.get("Range")):
                first, last = map(int, asked.removeprefix("bytes=").split("-"))
                part = content[first : last + 1]
                hub.bytes_sent += len(part)
                place = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
                status, headers, content = 206, headers | {"Content-Range": place}, part
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        url = f"http://127.0.0.1:{server.server_port}"
        template = "{repo_id}/resolve/{revision}/"
        # The libraries read HF_ENDPOINT and HF_HOME when they are imported.
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{template}{{filename}}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(datasets.config, "HF_ENDPOINT", url)
        patch.setattr(datasets.config, "HUB_DATASETS_URL", f"{url}/datasets/{template}{{path}}")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
        patch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
        patch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
        HfFileSystem.clear_instance_cache()
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
