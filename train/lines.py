"""Appends lines to a file, whole or not at all; what a full disk does not take is kept for later."""

import contextlib
import os
import pathlib
import sys


class Lines:
    """The lines of one file, which a run goes on adding to though the disk may be full or gone."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._kept: list[str] = []
        self._complained = False

    def add(self, line: str) -> None:
        """Keeps a line, its end included, for the next `write`."""
        self._kept.append(line)

    def write(self) -> None:
        """Appends all that is kept; where that fails, says so once and goes on keeping it."""
        try:
            append(self.path, "".join(self._kept))
        except OSError as error:
            if not self._complained:
                complain(f"{self.path} cannot be written ({error.strerror}); what belongs there is "
                         "kept for later")
            self._complained = True
        else:
            self._kept, self._complained = [], False


def append(path: pathlib.Path, text: str) -> None:
    """Appends whole lines, or nothing and OSError; a line that a kill has torn is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read(1) not in (b"", b"\n")
        rest = b"\n" * torn + text.encode()
        try:
            while rest:
                rest = rest[file.write(rest):]
        except OSError:
            file.truncate(size)
            raise


def complain(text: str) -> None:
    """Writes a line on stderr, which may be a file on that very disk."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
