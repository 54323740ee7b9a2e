"""Standard output and error that never fail: what nobody can read is dropped, and the command goes on."""

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO


class _Forgiving(io.RawIOBase):
    """A file descriptor to write to. From the first write that fails (a closed pipe, a full disk), all that is written
    is dropped; ``problem`` says why."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.problem: str | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        left = view
        while left and self.problem is None:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.problem = os.strerror(error.errno or errno.EIO)
        return len(view)


@contextmanager
def forgiving_output() -> Iterator[None]:
    """Let ``sys.stdout`` and ``sys.stderr`` drop what cannot be written, and escape what their encoding lacks.

    What is lost for another reason than a reader that has left is said on standard error, if that can be.
    """
    _open_missing_descriptors()
    with ExitStack() as stack:
        stack.enter_context(_forgiving("stderr"))
        stack.enter_context(_forgiving("stdout"))
        yield


@contextmanager
def _forgiving(name: str) -> Iterator[None]:
    before: TextIO | None = getattr(sys, name)
    try:
        descriptor = before.fileno() if before is not None else os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError):  # not a file: a test that listens
        yield
        return
    if before is not None:
        before.flush()
    raw = _Forgiving(descriptor)
    encoding = getattr(before, "encoding", None) or "utf-8"
    stream = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=True, write_through=True
    )
    setattr(sys, name, stream)
    try:
        yield
    finally:
        stream.flush()
        setattr(sys, name, before)
        if raw.problem is not None and name == "stdout" and raw.problem != os.strerror(errno.EPIPE):
            print(f"standard output could not be written: {raw.problem}", file=sys.stderr)


def _open_missing_descriptors() -> None:
    """Open /dev/null wherever one of the three standard descriptors is closed: the next file to be opened would get its
    number, and what a library prints would go into that file."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
