"""Failures that end a run, which the command line reports in one sentence; words for others."""

import errno
import os

from fastllama.printable import one_line


class TrainingFailedError(RuntimeError):
    """The run cannot continue. All files on disk are intact."""


class RankFailedError(RuntimeError):
    """This rank failed before all other ranks. `__cause__` is its failure."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} failed")
        self.rank = rank


class PeerFailedError(RuntimeError):
    """This rank failed after another rank. `__cause__` is its failure."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} failed after another rank")


class SideJobFailedError(ValueError):
    """A sample or a validation failed, on every rank alike. Training can continue."""


EXPECTED = (ValueError, OSError, TrainingFailedError)
"""Errors whose message is written for the user; any other error is a bug."""


def reason(error: BaseException) -> str:
    """Why something failed, on one line: the system's words, or type and message of the error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, SideJobFailedError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


REMEDIES = {
    errno.ENOENT: "restore it, or name another path",
    errno.ENOTDIR: "name a path below a folder",
    errno.EISDIR: "name a file, not a folder",
    errno.EEXIST: "move it elsewhere, or choose another path",
    errno.EBUSY: "end the program that uses it, and run the same command again",
    errno.ETXTBSY: "end the program that uses it, and run the same command again",
    errno.EFBIG: "choose a disk that takes larger files",
    errno.EACCES: "choose another path, or change its permissions",
    errno.EPERM: "choose another path, or change its permissions",
    errno.EROFS: "choose a path on a disk that can be written",
    errno.ENOSPC: "free space on the disk, and run the same command again",
    errno.EDQUOT: "free space in your quota, and run the same command again",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "the links lead in a circle; remove one",
    errno.EMFILE: "raise the limit of open files with ulimit -n",
    errno.ENFILE: "close other programs, or raise the limit of open files of the machine",
    errno.ESTALE: "mount the network file system again, and run the same command again",
    errno.EIO: "check the disk",
    errno.ENOMEM: "end other programs, or use a machine with more memory",
}
"""What to do about an error of the system."""
OTHER_REMEDY = "check the disk or the network that it is on, and run the same command again"


def sentence(error: BaseException) -> str:
    """The message of an error on one line. An error of the system names the path and a remedy."""
    if not (isinstance(error, OSError) and error.errno and error.strerror):
        return one_line(error)
    # A renaming has two paths. Those of a write without `atomic.naming` are missing or numbers.
    paths = [
        os.fsdecode(path)
        for path in (error.filename, error.filename2)
        if isinstance(path, (str, bytes, os.PathLike))
    ]
    where = f"{' -> '.join(paths)}: " if paths else ""
    return one_line(f"{where}{error.strerror}; {REMEDIES.get(error.errno, OTHER_REMEDY)}")
