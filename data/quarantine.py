"""Input that could not be read: set aside with its place and reason, never silently dropped."""

import json
import pathlib

LARGEST_SHARE = 0.01
# When so many documents have come and none of them can be read, the others are not tried.
ENOUGH = 100


class Quarantine:
    """Counts what a source gave, and writes what it could not give to a JSONL file.

    path: the file, made with the first entry. Each line has file, line (from 1) and reason.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.total = 0  # entries of all sources
        self._seen = self._bad = 0  # of the source being read
        self._first = ""

    def accept(self) -> None:
        """Counts a document that could be read."""
        self._seen += 1

    def add(self, file: str, line: int, reason: str) -> None:
        """Sets a document aside; ValueError if none of the first ENOUGH could be read."""
        self._seen += 1
        self._bad += 1
        self.total += 1
        self._first = self._first or f"{file}:{line}: {reason}"
        with self.path.open("a", encoding="utf-8") as stream:
            entry = {"file": file, "line": line, "reason": reason}
            stream.write(json.dumps(entry) + "\n")
        if self._bad == self._seen == ENOUGH:
            raise ValueError(f"none of the first {ENOUGH} documents could be read; the first is "
                             f"{self._first}; all are listed in {self.path}")

    def finish_source(self, name: str) -> None:
        """Raises ValueError if more than 1 % of the source was set aside, and begins the next."""
        if self._bad > LARGEST_SHARE * self._seen:
            raise ValueError(
                f"{name}: {self._bad} of {self._seen} documents could not be read, more than "
                f"{LARGEST_SHARE:.0%}; the first is {self._first}; all are listed in {self.path}")
        self._seen, self._bad, self._first = 0, 0, ""
