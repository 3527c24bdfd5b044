"""Files that may come from elsewhere, opened: regular ones alone, and read no further than is
expected. (Decoder processes import this: it needs nothing else.)
"""

import errno
import os
import stat


class NotRegular(OSError):
    """A pipe, a device or a folder where a file should be."""


def open_regular(path):
    """Open a regular file for reading. OSError; NotRegular for a pipe, device or folder.

    Opening a pipe without a writer would wait for one, and a device has no end.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise NotRegular(errno.EINVAL, "Not a regular file", os.fspath(path))
    return os.fdopen(file, "rb")


def read_regular(path, most):
    """The bytes of a regular file of `most` at most. OSError."""
    with open_regular(path) as f:
        data = f.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EINVAL, f"More than {most:,} bytes", os.fspath(path))
    return data
