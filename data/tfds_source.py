"""Documents of a TFDS data set, read without TensorFlow."""

import difflib
import hashlib
import io
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from batiste.data.quarantine import Quarantine
from batiste.data.sources import LARGE_FILE_BYTES, Check, cut

READ_AT_ONCE = 256  # examples


class TfdsSource:
    """The train split of a data set by name, or of a prepared one by directory.

    A name that is not on this machine yet is downloaded and prepared by TFDS.
    """

    size_bytes = None

    def __init__(self, name: str, text_field: str | None, check: Check):
        self.name = f"tfds:{name}"
        self._text_field, self._check = text_field, check
        is_directory = pathlib.Path(name).expanduser().is_dir()
        builder = _from_directory(self.name, name) if is_directory else _from_name(name)
        self._builder = builder
        self._require_text()

    def _require_text(self) -> None:
        info = self._builder.info
        features = dict(info.features.items()) if hasattr(info.features, "items") else {}
        texts = sorted(key for key, feature in features.items()
                       if feature.shape == () and feature.np_dtype == np.object_)
        if self._text_field not in texts:
            raise ValueError(f"{self.name}: no text feature {self._text_field!r}; it has "
                             f"{', '.join(texts) or 'none'}; set text_field")
        if "train" not in info.splits:
            raise ValueError(f"{self.name}: no train split; it has "
                             f"{', '.join(info.splits) or 'none'}")
        if info.file_format.value != "array_record":
            raise ValueError(f"{self.name}: stored as {info.file_format.value}, which only "
                             "TensorFlow reads; prepare it with file_format='array_record'")

    def fingerprint(self) -> str:
        """Returns a hash of the description and of the names and sizes of the data files.

        TFDS data sets carry a version and do not change under it, so their contents, which may be
        terabytes, are not read for this.
        """
        directory = pathlib.Path(self._builder.data_dir)
        digest = hashlib.sha256(f"tfds train {self._text_field}\n".encode())
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            content = path.read_text() if path.suffix == ".json" else path.stat().st_size
            digest.update(f"{path.relative_to(directory)} {content}\n".encode())
        return digest.hexdigest()

    def described(self) -> str | None:
        return None

    def documents(self, quarantine: Quarantine | None) -> Iterator[str]:
        examples = self._builder.as_data_source("train")
        for start in range(0, len(examples), READ_AT_ONCE):
            rows = range(start, min(start + READ_AT_ONCE, len(examples)))
            for row, example in zip(rows, examples.__getitems__(list(rows))):
                # A whole corpus in one example (tiny_shakespeare) is cut up as a large file is.
                for _, piece in cut(io.BytesIO(example[self._text_field]), LARGE_FILE_BYTES):
                    try:
                        text, problem = self._check(piece.decode())
                    except UnicodeDecodeError as error:
                        text, problem = "", f"not UTF-8: {error.reason}"
                    if quarantine and problem is None:
                        quarantine.accept()
                    elif quarantine:
                        quarantine.add(self.name, row + 1, problem)
                    if problem is None:
                        yield text


def _from_directory(source: str, directory: str) -> tfds.core.DatasetBuilder:
    root = pathlib.Path(directory).expanduser()
    found = sorted(root.rglob("dataset_info.json"))
    if len(found) != 1:
        choices = ", ".join(str(path.parent) for path in found) or "none"
        raise ValueError(f"{source}: expected a directory with one prepared TFDS data set, "
                         f"found {choices}")
    return tfds.builder_from_directory(found[0].parent)


def _from_name(name: str) -> tfds.core.DatasetBuilder:
    # Without the community's, which only TensorFlow can look up.
    known = tfds.list_builders(with_community_datasets=False)
    base = re.split("[/:]", name)[0]
    if base not in known:
        near = difflib.get_close_matches(base, known, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see tfds.list_builders()"
        raise ValueError(f"tfds:{name}: no such TFDS data set or directory; {hint}")
    try:
        builder = tfds.builder(name, file_format="array_record")
        builder.download_and_prepare()
        return builder
    except ImportError as error:
        raise ValueError(f"tfds:{name}: preparing it needs a package that is not installed "
                         f"({error}); install that, or prepare the data set elsewhere with "
                         "file_format='array_record' and name its directory") from None
