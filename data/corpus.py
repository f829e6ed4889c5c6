"""One pass over the documents: which are held out, how many there are, what to learn from."""

import dataclasses
import hashlib
import heapq
import lzma
from collections.abc import Iterator

from batiste.data.progress import Progress
from batiste.data.quarantine import Quarantine
from batiste.data.sources import Source

# The text kept for measuring xz, whose strongest setting reads about 1.5 MB/s.
XZ_BYTES = 4 << 20


def document_hash(content: bytes) -> float:
    """Returns a number in [0, 1) that depends on the document alone."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def documents_of(source: Source, split: str, validation_fraction: float) -> Iterator[str]:
    """Yields the non-empty documents of one split; the same text is always in the same split."""
    for text in source.documents(None):
        held_out = document_hash(text.encode()) < validation_fraction
        if text and held_out == (split == "validation"):
            yield text


@dataclasses.dataclass
class Survey:
    """What a pass over one source found. counts: documents and bytes of each split."""

    counts: dict[str, dict[str, int]]
    empty_documents: int
    sample: "Sample"


class Sample:
    """The training documents with the smallest hashes, up to a number of bytes.

    Which documents those are does not depend on the order in which they come.
    """

    def __init__(self, most_bytes: int):
        self._most_bytes, self._bytes = most_bytes, 0
        self._heap: list[tuple[float, str, int]] = []

    def add(self, order: float, text: str, size: int) -> None:
        """Considers a document of `size` bytes."""
        heapq.heappush(self._heap, (-order, text, size))
        self._bytes += size
        while self._bytes > self._most_bytes and len(self._heap) > 1:
            self._bytes -= heapq.heappop(self._heap)[2]

    def texts(self) -> list[str]:
        """Returns the documents, in the order of their hashes."""
        return [text for _, text, _ in sorted(self._heap, reverse=True)]


class HeldOut:
    """The first held-out documents, to compare a model's compression with that of xz."""

    def __init__(self):
        self._documents: list[bytes] = []
        self._bytes = 0

    def add(self, content: bytes) -> None:
        """Keeps a document while there is room."""
        if self._bytes < XZ_BYTES:
            self._documents.append(content)
            self._bytes += len(content)

    def figures(self) -> dict[str, float | int]:
        """Returns the bits per byte that `xz -9e` needs, for all at once and one by one."""
        if not self._documents:
            return {}
        alone = sum(_xz_bytes(document) for document in self._documents)
        together = _xz_bytes(b"".join(self._documents))
        return {
            "xz_bytes": self._bytes,
            "xz_bits_per_byte": round(8 * together / self._bytes, 4),
            "xz_bits_per_byte_per_document": round(8 * alone / self._bytes, 4),
        }


def _xz_bytes(content: bytes) -> int:
    # A dictionary as large as the content compresses as well as xz's 64 MiB, without allocating it.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME,
                "dict_size": max(4096, len(content))}]
    return len(lzma.compress(content, lzma.FORMAT_XZ, lzma.CHECK_CRC64, filters=filters))


def survey(
    source: Source, validation_fraction: float, sample_bytes: int, held_out: HeldOut,
    quarantine: Quarantine,
) -> Survey:
    """Reads a source once; ValueError if too much of it cannot be read."""
    counts = {split: {"documents": 0, "bytes": 0} for split in ("train", "validation")}
    empty, sample = 0, Sample(sample_bytes)
    with Progress(f"reading {source.name}", source.size_bytes) as progress:
        for text in source.documents(quarantine):
            content = text.encode()
            progress.update(len(content))
            if not content:
                empty += 1
                continue
            order = document_hash(content)
            if order < validation_fraction:
                split = counts["validation"]
                held_out.add(content)
            else:
                split = counts["train"]
                sample.add(order, text, len(content))
            split["documents"] += 1
            split["bytes"] += len(content)
    quarantine.finish_source(source.name)
    return Survey(counts, empty, sample)
