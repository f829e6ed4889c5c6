"""Where documents come from: the standard library, local files, TFDS data sets."""

import collections
import glob
import hashlib
import json
import pathlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

from batiste.data.config import SourceConfig
from batiste.data.file_formats import (
    BOM, LARGEST_JSON_BYTES, LINES, TEXT, VALUES, Format, lines_of, open_file, recognize, values_of,
)
from batiste.data.quarantine import Quarantine

# A plain-text file up to this size is one document. A larger one is cut at line ends into documents
# of about DOCUMENT_BYTES: a corpus in one file then has something to hold out, in bounded memory.
LARGE_FILE_BYTES = 256 * 1024
DOCUMENT_BYTES = 16 * 1024

STDLIB_LEFT_OUT = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))


# The line where a document begins, its text, and None or why there is none.
Read = tuple[int, str, str | None]
# A text -> the text to use, and None or why there is none.
Check = Callable[[str], tuple[str, str | None]]


class Source(Protocol):
    """Documents that can be read several times, always in the same order."""

    name: str
    size_bytes: int | None  # of the text if known, for progress

    def fingerprint(self) -> str:
        """Returns a hash that changes with the documents."""

    def described(self) -> str | None:
        """Returns how it is read, where its name does not say so."""

    def documents(self, quarantine: Quarantine | None) -> Iterator[str]:
        """Yields each document; what cannot be read goes to `quarantine`, if there is one."""


def open_source(config: SourceConfig, check: Check = lambda text: (text, None)) -> Source:
    """Returns the source that `config.path` names; ValueError if there is no such thing.

    check: what becomes of each document.
    """
    if config.path == "stdlib":
        formats = [(path, Format(False, TEXT, TEXT)) for path in _stdlib_modules()]
        return LocalFiles("stdlib", formats, config.text_field, sys.maxsize, check)
    if config.path.startswith("tfds:"):
        from batiste.data.tfds_source import TfdsSource
        return TfdsSource(config.path.removeprefix("tfds:"), config.text_field, check)
    pattern = pathlib.Path(config.path).expanduser()
    paths = _below(pattern) if pattern.is_dir() else [
        path for path in map(pathlib.Path, sorted(glob.glob(str(pattern), recursive=True)))
        if path.is_file()]
    if not paths:
        raise ValueError(f"data.sources path={config.path!r}: no such file; expected stdlib, "
                         "tfds:NAME, tfds:DIRECTORY, a directory or a glob that matches files")
    formats = [(path, recognize(path)) for path in paths]
    if config.text_field is None:
        formats = [(path, format_._replace(kind=TEXT)) for path, format_ in formats]
    return LocalFiles(config.path, formats, config.text_field, LARGE_FILE_BYTES, check)


def _below(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a directory and those below it, but hidden ones."""
    if (folder / "dataset_info.json").is_file():
        raise ValueError(f"data.sources path={str(folder)!r}: is a TFDS data set: set "
                         f"path='tfds:{folder}'")
    return sorted(path for path in folder.rglob("*") if path.is_file() and not any(
        part.startswith(".") for part in path.relative_to(folder).parts))


def _stdlib_modules() -> list[pathlib.Path]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py")
                  if not STDLIB_LEFT_OUT.intersection(path.relative_to(root).parts))


class LocalFiles:
    """Plain text or JSON files, each perhaps compressed with gzip.

    formats: each path with its format. large_bytes: a larger plain text is cut up.
    """

    def __init__(
        self, name: str, formats: list[tuple[pathlib.Path, Format]], text_field: str | None,
        large_bytes: int, check: Check,
    ):
        self.name = name
        self._formats, self._text_field, self._large_bytes = formats, text_field, large_bytes
        self._check = check
        compressed = any(format_.compressed for _, format_ in formats)
        self.size_bytes = None if compressed else sum(path.stat().st_size for path, _ in formats)

    def fingerprint(self) -> str:
        """Returns a hash of the contents in order; moving the files does not change it."""
        digest = hashlib.sha256()
        for path, format_ in self._formats:
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            field = "" if format_.kind == TEXT else self._text_field
            digest.update(f"{format_.kind} {field} {format_.compressed} {content}\n".encode())
        return digest.hexdigest()

    def described(self) -> str | None:
        named = all(format_.obvious for _, format_ in self._formats)
        if named and not pathlib.Path(self.name).expanduser().is_dir():
            return None
        kinds = collections.Counter(format_.kind for _, format_ in self._formats)
        counts = ", ".join(
            f"{count} as {kind}" + (f" (field {self._text_field!r})" if kind != TEXT else "")
            for kind, count in kinds.items())
        return f"{self.name}: {len(self._formats)} files are read, {counts}"

    def documents(self, quarantine: Quarantine | None) -> Iterator[str]:
        readers = {LINES: self._lines, VALUES: self._values, TEXT: self._texts}
        for path, format_ in self._formats:
            with open_file(path, format_.compressed) as stream:
                for line, text, problem in readers[format_.kind](path, stream):
                    if problem is None:
                        text, problem = self._check(text)
                    if problem is None:
                        if quarantine:
                            quarantine.accept()
                        yield text
                    elif quarantine:
                        quarantine.add(str(path), line, problem)

    def _lines(self, path: pathlib.Path, stream: BinaryIO) -> Iterator[Read]:
        for line, content in lines_of(stream):
            if content is None:
                yield line, "", f"a line above {LARGEST_JSON_BYTES >> 20} MiB"
            elif content.strip():
                yield line, *parse_json_line(content, self._text_field)

    def _values(self, path: pathlib.Path, stream: BinaryIO) -> Iterator[Read]:
        try:
            for line, value in values_of(stream):
                yield line, *_text_of(value, self._text_field)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _texts(self, path: pathlib.Path, stream: BinaryIO) -> Iterator[Read]:
        for line, content in cut(stream, self._large_bytes):
            try:
                yield line, content.decode(), None
            except UnicodeDecodeError as error:
                line += content.count(b"\n", 0, error.start)
                yield line, "", f"not UTF-8: byte 0x{content[error.start]:02x}"


def cut(stream: BinaryIO, large_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yields (first line, content) of each document of a plain text, cut up if it is large."""
    documents, size = [], 0
    for index, (line, content) in enumerate(_pieces(stream)):
        documents.append((line, content if index else content.removeprefix(BOM)))
        size += len(content)
        if size > large_bytes:
            yield from documents
            documents = []
    if size <= large_bytes:
        yield 1, b"".join(content for _, content in documents)


def _pieces(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields (first line, content) of lines of about DOCUMENT_BYTES together."""
    pieces, size, line, first = [], 0, 1, 1
    for content in _short_lines(stream):
        pieces.append(content)
        size += len(content)
        line += content.endswith(b"\n")
        if size > DOCUMENT_BYTES:
            yield first, b"".join(pieces)
            pieces, size, first = [], 0, line
    if pieces:
        yield first, b"".join(pieces)


def _short_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yields lines; one above LARGE_FILE_BYTES in pieces of DOCUMENT_BYTES, cut between characters,
    so that no line is held whole."""
    carried = b""  # The end of a piece, which the next one continues.
    while content := stream.readline(LARGE_FILE_BYTES):
        ends = content.endswith(b"\n")
        if not carried and (ends or len(content) < LARGE_FILE_BYTES):
            yield content
            continue
        content = carried + content
        while len(content) > DOCUMENT_BYTES:
            place = _between_characters(content, DOCUMENT_BYTES)
            yield content[:place]
            content = content[place:]
        carried = b"" if ends else content
        if ends:
            yield content
    if carried:
        yield carried


def _between_characters(content: bytes, place: int) -> int:
    """The last place up to `place` where a character of UTF-8 begins; `place` if none is near."""
    return next((each for each in range(place, place - 4, -1) if content[each] & 0xC0 != 0x80), place)


def parse_json_line(content: bytes, field: str) -> tuple[str, str | None]:
    """Returns (text, None), or ("", reason) if the line has no text in `field`."""
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte 0x{content[error.start]:02x}"
    except (ValueError, RecursionError) as error:
        return "", f"not JSON: {error}"
    return _text_of(value, field)


def _text_of(value: Any, field: str) -> tuple[str, str | None]:
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        fields = ", ".join(list(value)[:8]) if isinstance(value, dict) else type(value).__name__
        return "", (f"no text in field {field!r}, but it has {fields}: set text_field, or None for "
                    "files of plain text")
    try:
        value[field].encode()
    except UnicodeEncodeError:
        return "", f"field {field!r} holds half a surrogate pair, which UTF-8 cannot"
    return value[field], None
