"""Where documents come from: the standard library, local files, TFDS data sets."""

import glob
import gzip
import hashlib
import json
import pathlib
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from batiste.data.config import SourceConfig
from batiste.data.quarantine import Quarantine

# A plain-text file up to this size is one document. A larger one is cut at line ends into documents
# of about DOCUMENT_BYTES: a corpus in one file then has something to hold out, in bounded memory.
LARGE_FILE_BYTES = 256 * 1024
DOCUMENT_BYTES = 16 * 1024

STDLIB_LEFT_OUT = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))


class Source(Protocol):
    """Documents that can be read several times, always in the same order."""

    name: str
    size_bytes: int | None  # of the text if known, for progress

    def fingerprint(self) -> str:
        """Returns a hash that changes with the documents."""

    def documents(self, quarantine: Quarantine | None) -> Iterator[str]:
        """Yields each document; what cannot be read goes to `quarantine`, if there is one."""


def open_source(config: SourceConfig) -> Source:
    """Returns the source that `config.path` names; ValueError if there is no such thing."""
    if config.path == "stdlib":
        return LocalFiles("stdlib", _stdlib_modules(), config.text_field, sys.maxsize)
    if config.path.startswith("tfds:"):
        from batiste.data.tfds_source import TfdsSource
        return TfdsSource(config.path.removeprefix("tfds:"), config.text_field)
    pattern = str(pathlib.Path(config.path).expanduser())
    paths = [pathlib.Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ValueError(f"data.sources path={config.path!r}: no such file; expected stdlib, "
                         "tfds:NAME, tfds:DIRECTORY or a glob that matches files")
    return LocalFiles(config.path, paths, config.text_field, LARGE_FILE_BYTES)


def _stdlib_modules() -> list[pathlib.Path]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py")
                  if not STDLIB_LEFT_OUT.intersection(path.relative_to(root).parts))


class LocalFiles:
    """Plain text or JSONL files, each perhaps compressed with gzip."""

    def __init__(self, name: str, paths: list[pathlib.Path], text_field: str, large_bytes: int):
        self.name = name
        self._paths, self._text_field, self._large_bytes = paths, text_field, large_bytes
        compressed = any(path.suffix == ".gz" for path in paths)
        self.size_bytes = None if compressed else sum(path.stat().st_size for path in paths)

    def fingerprint(self) -> str:
        """Returns a hash of the contents in order; moving the files does not change it."""
        digest = hashlib.sha256()
        for path in self._paths:
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            kind = f"jsonl {self._text_field}" if _is_jsonl(path) else "text"
            digest.update(f"{kind} {path.suffix == '.gz'} {content}\n".encode())
        return digest.hexdigest()

    def documents(self, quarantine: Quarantine | None) -> Iterator[str]:
        for path in self._paths:
            read = self._lines if _is_jsonl(path) else self._texts
            opener = gzip.open if path.suffix == ".gz" else open
            try:
                with opener(path, "rb") as stream:
                    for line, text, problem in read(stream):
                        if problem is None:
                            if quarantine:
                                quarantine.accept()
                            yield text
                        elif quarantine:
                            quarantine.add(str(path), line, problem)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path}: broken gzip file: {error}") from None

    def _lines(self, stream: BinaryIO) -> Iterator[tuple[int, str, str | None]]:
        for line, content in enumerate(stream, start=1):
            if content.strip():
                text, problem = parse_json_line(content, self._text_field)
                yield line, text, problem

    def _texts(self, stream: BinaryIO) -> Iterator[tuple[int, str, str | None]]:
        for line, content in cut(stream, self._large_bytes):
            try:
                yield line, content.decode(), None
            except UnicodeDecodeError as error:
                line += content.count(b"\n", 0, error.start)
                yield line, "", f"not UTF-8: byte 0x{content[error.start]:02x}"


def _is_jsonl(path: pathlib.Path) -> bool:
    return ".jsonl" in path.suffixes[-2:]


def cut(stream: BinaryIO, large_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yields (first line, content) of each document of a plain text, cut up if it is large."""
    pieces, size, line = [], 0, 1
    while lines := stream.readlines(DOCUMENT_BYTES):
        content = b"".join(lines)
        pieces.append((line, content))
        size += len(content)
        line += len(lines)
        if size > large_bytes:
            yield from pieces
            pieces = []
    if size > large_bytes:
        yield from pieces
    else:
        yield 1, b"".join(content for _, content in pieces)


def parse_json_line(content: bytes, field: str) -> tuple[str, str | None]:
    """Returns (text, None), or ("", reason) if the line has no text in `field`."""
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte 0x{content[error.start]:02x}"
    except (ValueError, RecursionError) as error:
        return "", f"not JSON: {error}"
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        return "", f"no text in field {field!r}"
    try:
        value[field].encode()
    except UnicodeEncodeError:
        return "", f"field {field!r} holds half a surrogate pair, which UTF-8 cannot"
    return value[field], None
