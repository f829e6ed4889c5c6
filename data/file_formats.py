"""What is in a local file: gzip or not, plain text or JSON, told by its content and its name."""

import codecs
import contextlib
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

# Read of each file to recognize it; a first line that is longer is judged by its first character.
PEEKED_BYTES = 64 * 1024
# A JSON document above this is set aside, before it is held in memory: a gzip file of 7 MB may have
# a line of 1.6 GB.
LARGEST_JSON_BYTES = 64 << 20
READ_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
# Files that hold no text as they are, by their first bytes.
REFUSED = {
    b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip",
    b"PAR1": "Parquet", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}
LINES, VALUES, TEXT = "JSON lines", "JSON values", "plain text"
JSON_NAMES = {".jsonl": LINES, ".ndjson": LINES, ".jsonlines": LINES, ".json": VALUES}

KEY = re.compile(rb'\{\s*"[^"\\]*"\s*:')
SPACE, SPACE_OR_COMMA = re.compile(r"\s*"), re.compile(r"[\s,]*")
OPENING = re.compile(r"\ufeff?\s*\[?")


class Format(NamedTuple):
    """kind: LINES, one document a line; VALUES, an array or objects over several lines; or TEXT.

    expected: the kind that the name alone would say.
    """

    compressed: bool
    kind: str
    expected: str

    @property
    def obvious(self) -> bool:
        """Whether the name says the same."""
        return self.kind == self.expected


def recognize(path: pathlib.Path) -> Format:
    """The format of a file; ValueError for one that is packed in another way than gzip."""
    with path.open("rb") as stream:
        compressed = stream.read(2) == GZIP
    with open_file(path, compressed) as stream:
        start = stream.read(PEEKED_BYTES)
    for magic, name in REFUSED.items():
        if start.startswith(magic):
            raise ValueError(f"{path}: is {name}: expected UTF-8 text, JSON lines or JSON, plain or "
                             "in gzip")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    by_name = JSON_NAMES.get(next((each for each in reversed(suffixes) if each != ".gz"), ""), TEXT)
    return Format(compressed, _kind(start.removeprefix(BOM).lstrip(), by_name), by_name)


@contextlib.contextmanager
def open_file(path: pathlib.Path, compressed: bool) -> Iterator[BinaryIO]:
    """The content of a file, as a stream of bytes; ValueError, while it is read, for broken gzip."""
    try:
        with gzip.open(path, "rb") if compressed else path.open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip file: {error}") from None


def _kind(start: bytes, by_name: str) -> str:
    line, ended, _ = start.partition(b"\n")
    if start[:1] == b"[":
        return VALUES if by_name == VALUES or _holds_objects(start) else by_name
    # A line of which the end was not read is taken at its word.
    if _is_object(line) or (not ended and len(start) > PEEKED_BYTES // 2 and KEY.match(line)):
        return LINES
    if start[:1] == b"{":
        return VALUES if by_name == VALUES or _is_object(start) else by_name
    return LINES if by_name == VALUES else by_name


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def _holds_objects(start: bytes) -> bool:
    """Whether an array begins with an object, as far as it was read."""
    text = start[1:].decode(errors="replace").lstrip()
    try:
        return isinstance(json.JSONDecoder().raw_decode(text)[0], dict)
    except (ValueError, RecursionError):
        return False


def lines_of(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number, content) of each line; None for one above LARGEST_JSON_BYTES."""
    number = 0
    while content := stream.readline(LARGEST_JSON_BYTES + 1):
        number += 1
        if len(content) <= LARGEST_JSON_BYTES:
            yield number, content.removeprefix(BOM)
            continue
        while content and not content.endswith(b"\n"):
            content = stream.readline(READ_BYTES)
        yield number, None


def values_of(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yields (line, value) of each item of an array, or of values one after another.

    Raises ValueError, naming the line, where there is no JSON, or too much of it in one value.
    """
    decoder, parser = codecs.getincrementaldecoder("utf-8")("surrogateescape"), json.JSONDecoder()
    text, line, opened, between = decoder.decode(stream.read(READ_BYTES)), 1, False, SPACE
    start = OPENING.match(text).end()
    if text[:start].endswith("["):
        opened, between = True, SPACE_OR_COMMA
    more = bool(text)
    while True:
        line += text.count("\n", 0, start)
        while True:
            before, start = start, between.match(text, start).end()
            if opened and text[start:start + 1] == "]":
                start, opened = start + 1, False
            line += text.count("\n", before, start)
            try:
                value, end = parser.raw_decode(text, start)
            except (ValueError, RecursionError):
                break
            if more and end == len(text):
                break  # A number may go on.
            yield line, value
            line += text.count("\n", start, end)
            start = end
        text, start = text[start:], 0
        if len(text) > LARGEST_JSON_BYTES or (not more and (text or opened)):
            raise ValueError(f"line {line}: not JSON, or not all of it, or above "
                             f"{LARGEST_JSON_BYTES >> 20} MiB: {text[:40]!r}")
        if not more:
            return
        more = stream.read(max(READ_BYTES, len(text)))
        text += decoder.decode(more, final=not more)
