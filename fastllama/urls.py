"""File systems behind URLs, by fsspec: s3://, gs://, hf://, https:// and many others.

Networks fail for seconds. So every access is tried several times, and then fails in one sentence
with the URL. What another try cannot change is a mistake, and is reported at once.
"""

import errno
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.registry import known_implementations

from fastllama.errors import reason
from fastllama.printable import one_line, printable, shortened

PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Seconds between the tries of an access. Most file systems also try again by themselves."""

Result = TypeVar("Result")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "s3")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "gs")),
    **dict.fromkeys(("http", "https"), ("aiohttp", "http")),
}
"""The library of a scheme, and the extra of fastllama that installs it."""
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for public data, FSSPEC_S3_ANON=true",
    "gs": "use `gcloud auth application-default login`; for public data, FSSPEC_GS_TOKEN=anon",
    "file": "change its permissions, or name another folder",
    "hf": "use `hf auth login`, or set HF_TOKEN",
}
_OTHER_CREDENTIALS = "give its library credentials that may use it"
_TRY_AGAIN = (408, 425, 429)
"""HTTP statuses from 400 to 499 after which another try may succeed."""
_OF_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)
"""Errors of the disk that a file is fetched to, or sent from."""


def is_url(value: str) -> bool:
    """Whether `value` is a URL. A path on the disk is none, not even below a folder named "s3:"."""
    found = _SCHEME.match(value)
    return found is not None and not any(map(os.path.lexists, (value, f"{found[1]}:")))


def shown(url: str) -> str:
    """`url` as messages print it."""
    return shortened(printable(url), 300)


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of `url`, and the path in it.

    Raises:
        ValueError: fsspec knows no such scheme, or its library is missing.
    """
    scheme = url.partition("://")[0]
    if "::" in url:
        raise ValueError(f"cannot use {shown(url)}: '::' chains URLs; name one URL")
    try:
        # Of a disk, other file systems make no folders. A cached listing would hide changes.
        options = {"auto_mkdir": True} if scheme == "file" else {"use_listings_cache": False}
        return fsspec.url_to_fs(url, **options)
    except ImportError:
        library, extra = _EXTRAS.get(scheme.lower(), ("", ""))
        needed = f"{library}: pip install 'fastllama[{extra}]'"
        if not library:
            needed = f"another library: {known_implementations[scheme]['err']}"
        raise ValueError(f"reading {scheme}:// needs {needed}") from None
    except ValueError as error:
        is_known = scheme in known_implementations
        problem = one_line(error, 200) if is_known else f"fsspec knows no scheme {scheme}://"
        raise ValueError(
            f"cannot use {shown(url)}: {problem}; name a local path, or a URL such as s3://…, "
            "gs://…, hf://… or https://…"
        ) from None


def patiently(
    url: str,
    access: Callable[[AbstractFileSystem, str], Result],
    verb: str = "read",
    remedy: str = "check the network, and run the same command again",
) -> Result:
    """Call `access` with the file system and the path of `url`, again after a failure.

    Raises:
        FileNotFoundError: there is nothing at `url`.
        ValueError: another mistake, which the next try would repeat: no permission, no credentials,
            or a request that the server rejects.
        OSError: the last try failed, or the disk of this machine. Its errno is set.
    """
    files, path = file_system(url)
    for pause in (*PAUSES_S, None):
        try:
            return access(files, path)
        except Exception as error:  # The libraries behind fsspec share no base class.
            if isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE:
                raise
            _raise_mistake(error, url, verb)
            if pause is None:
                failure = OSError(
                    f"cannot {verb} {shown(url)}: {len(PAUSES_S) + 1} tries failed, the last with "
                    f"{_words(error)}; {remedy}"
                )
                failure.errno = getattr(error, "errno", None) or errno.EIO
                raise failure from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def _raise_mistake(error: Exception, url: str, verb: str) -> None:
    """Raise what no further try would change."""
    status = _http_status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        words = one_line(error, 200) if isinstance(error, FileNotFoundError) else ""
        # Some file systems only repeat the path.
        says_nothing = words.strip("'/") in url
        raise FileNotFoundError(
            errno.ENOENT, "it does not exist" if says_nothing else words, shown(url)
        ) from error
    scheme = url.partition("://")[0].lower()
    remedy = _CREDENTIALS.get(scheme, _OTHER_CREDENTIALS)
    if "Credential" in type(error).__name__:
        raise ValueError(f"cannot {verb} {shown(url)}: no credentials; {remedy}") from error
    if isinstance(error, PermissionError) or status in (401, 403):
        raise ValueError(
            f"cannot {verb} {shown(url)}: permission denied ({_words(error)}); {remedy}"
        ) from error
    is_rejected = status is not None and 400 <= status < 500 and status not in _TRY_AGAIN
    # What botocore calls a name that no bucket can have.
    is_invalid = (
        isinstance(error, (ValueError, NotADirectoryError))
        or type(error).__name__ == "ParamValidationError"
    )
    if is_rejected or is_invalid:
        raise ValueError(f"cannot {verb} {shown(url)}: {_words(error)}") from error


def _http_status(error: Exception) -> int | None:
    """The status of the server's answer, where a library of fsspec keeps it."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder, name in ((error, "status"), (error, "code"), (response, "status_code")):
        if isinstance(status := getattr(holder, name, None), int):
            return status
    return None


def _words(error: Exception) -> str:
    """What the server or the library said."""
    return one_line(reason(error), 200)
