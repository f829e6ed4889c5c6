"""One pass over the documents: which are held out, how many there are, what to learn from."""

import dataclasses
import hashlib
import heapq
import lzma
from collections.abc import Callable, Iterator

from batiste.data.progress import Progress
from batiste.data.quarantine import Quarantine
from batiste.data.sources import Source

# The text kept for measuring xz, whose strongest setting reads about 1.5 MB/s.
XZ_BYTES = 4 << 20


# The bytes of a document -> the split it belongs to, None for one that is left out.
Rule = Callable[[bytes], str | None]


def document_hash(content: bytes) -> float:
    """Returns a number in [0, 1) that depends on the document alone."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def by_fraction(fraction: float) -> Rule:
    """Holds a fraction out; the same text is always in the same split."""
    return lambda content: "validation" if document_hash(content) < fraction else "train"


class OwnValidation:
    """The rules of a corpus with validation text of its own, of which nothing is trained on.

    `validation` remembers what it is asked about, all of it before `train` is asked.
    """

    def __init__(self):
        self._digests: set[bytes] = set()

    def validation(self, content: bytes) -> str:
        """The rule of the sources that are validated on."""
        self._digests.add(hashlib.blake2b(content, digest_size=16).digest())
        return "validation"

    def train(self, content: bytes) -> str | None:
        """The rule of the sources that are trained on."""
        held_out = hashlib.blake2b(content, digest_size=16).digest() in self._digests
        return None if held_out else "train"


def documents_of(source: Source, split: str, rule: Rule) -> Iterator[str]:
    """Yields the non-empty documents of one split."""
    for text in source.documents(None):
        if text and rule(text.encode()) == split:
            yield text


@dataclasses.dataclass
class Survey:
    """What a pass over one source found. counts: documents and bytes of each split. left_out:
    documents of neither."""

    source: Source
    rule: Rule
    counts: dict[str, dict[str, int]]
    empty_documents: int
    left_out: int
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
    source: Source, rule: Rule, sample_bytes: int, held_out: HeldOut, quarantine: Quarantine,
) -> Survey:
    """Reads a source once; ValueError if too much of it cannot be read."""
    counts = {split: {"documents": 0, "bytes": 0} for split in ("train", "validation")}
    empty, left_out, sample = 0, 0, Sample(sample_bytes)
    with Progress(f"reading {source.name}", source.size_bytes) as progress:
        for text in source.documents(quarantine):
            content = text.encode()
            progress.update(len(content))
            if not content:
                empty += 1
                continue
            split = rule(content)
            if split is None:
                left_out += 1
                continue
            if split == "validation":
                held_out.add(content)
            else:
                sample.add(document_hash(content), text, len(content))
            counts[split]["documents"] += 1
            counts[split]["bytes"] += len(content)
    quarantine.finish_source(source.name)
    return Survey(source, rule, counts, empty, left_out, sample)
