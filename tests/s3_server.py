"""An S3 server on the loopback, whose answers can fail."""

import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import fsspec
import pytest

MISSING = [name for name in ("s3fs", "moto", "flask_cors") if find_spec(name) is None]
NEEDS_S3 = [
    pytest.mark.extra,
    pytest.mark.skipif(bool(MISSING), reason=f"no {MISSING}: make test-all installs them"),
    # boto3 and moto, about themselves.
    pytest.mark.filterwarnings("default"),
]
"""Marks of tests with the server."""


class Server:
    """An S3 server. `on_request` may answer instead: (method, path) to (status, headers, body)."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        moto = DomainDispatcherApplication(create_backend_app)
        self.on_request: Callable[[str, str], tuple[str, dict[str, str], bytes] | None]
        self.requests: list[tuple[str, str]] = []
        self.reset()

        def application(environ: Any, start_response: Any) -> Any:
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            self.requests.append((method, path))
            answer = self.on_request(method, path)
            if answer is None:
                return moto(environ, start_response)
            status, headers, body = answer
            start_response(status, list(headers.items()))
            return [body]

        self._server = make_server("127.0.0.1", 0, application, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        self.on_request = lambda method, path: None
        self.requests.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def s3_server() -> Iterator[Server]:
    """A server that s3fs uses, with credentials."""
    server = Server()
    # moto keeps the buckets of earlier servers of this process.
    urllib.request.urlopen(f"{server.url}/moto-api/reset", data=b"").close()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": server.url,
            # Of botocore itself, which would wait for seconds.
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        try:
            yield server
        finally:
            server.close()
