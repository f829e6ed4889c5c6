"""What a corpus is made of, and how it becomes records."""

import dataclasses
import difflib

from batiste.data.record_objective import RecordObjective, validate_objectives
from batiste.fields import Config, check_types

TOKENIZERS = ("bpe", "unigram", "characters", "bytes")
PACKINGS = ("concatenate", "first_fit")


@dataclasses.dataclass
class SourceConfig(Config):
    """One place that documents come from.

    path: "stdlib", the modules of the running interpreter's standard library without its tests;
        "tfds:NAME" or "tfds:DIRECTORY", the train split of a TFDS data set; or a directory or a glob
        of local files: JSON lines, a JSON array or objects, or plain text, each also in gzip. A
        file's content and name say which.
    text_field: the field of a JSON object, or the feature of a TFDS data set, that holds the text;
        None reads every file as plain text.
    weight: the share of the training records drawn from this source, relative to the others.
    """

    path: str = "stdlib"
    text_field: str | None = "text"
    weight: float = 1.0


@dataclasses.dataclass
class DataConfig(Config):
    """A corpus, its tokenizer and its records.

    sources: where documents come from, each with the share of records drawn from it. On the command
        line a list of paths, --config.data.sources=FIRST,SECOND, makes one source of each.
    validation_fraction: the share of documents held out, chosen by the hash of their text; not read
        where there are validation_sources.
    validation_sources: text of one's own to validate on; a training document that is in it, too, is
        left out of training. () holds out a fraction. Weights are not read.
    normalize: text is brought into Unicode's NFC first. Otherwise a tokenizer that knows text in that
        form alone, as Qwen's, sets other documents aside (quarantine.jsonl).
    tokenizer: "bpe", "unigram", "characters", "bytes", or the path of a SentencePiece .model or of the
        tokenizer.json of a work directory that `batiste import` made.
    vocab_size: tokens to learn for "bpe" and "unigram", the most to keep for "characters" (rarer
        ones are spelled in bytes); "bytes" and files bring their own size and do not read it.
    sequence_length: T, the inputs of a record.
    packing: "concatenate" cuts one stream of documents every T tokens and fills every record;
        "first_fit" keeps a document in one record where it fits, at the price of some padding.
    objectives: what is learned from the records, one drawn for each by weight; () is next tokens.
    seed: the order of the training examples, and what their objectives draw. Neither it nor
        `objectives` changes what is prepared.
    """

    sources: tuple[SourceConfig, ...] = dataclasses.field(
        default_factory=lambda: (SourceConfig(),))
    validation_fraction: float = 0.05
    validation_sources: tuple[SourceConfig, ...] = ()
    normalize: bool = False
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    sequence_length: int = 256
    packing: str = "concatenate"
    objectives: tuple[RecordObjective, ...] = ()
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError naming the first field that cannot work."""
        check_types(self, "data.")
        if not self.sources:
            raise ValueError("data.sources=(): expected at least one SourceConfig")
        named = [(f"data.{field}[{index}]", source) for field in ("sources", "validation_sources")
                 for index, source in enumerate(getattr(self, field))]
        for name, source in named:
            if not source.path:
                raise ValueError(f"{name}.path={source.path!r}: expected stdlib, tfds:NAME, "
                                 "tfds:DIRECTORY or a glob of files")
            if not source.weight > 0:
                raise ValueError(f"{name}.weight={source.weight}: expected a number above 0; "
                                 "leave a source out to give it no share")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction={self.validation_fraction}: "
                             "expected a number between 0 and 1, such as 0.05")
        if not self.tokenizer.endswith((".model", ".json")):
            _require_choice("tokenizer", self.tokenizer, TOKENIZERS,
                            " or a path to a .model or .json file")
        _require_choice("packing", self.packing, PACKINGS)
        for field, least in (("vocab_size", 1), ("sequence_length", 2), ("seed", 0)):
            value = getattr(self, field)
            if value < least:
                raise ValueError(
                    f"data.{field}={value!r}: expected a whole number of at least {least}")
        validate_objectives(self.objectives)


def _require_choice(field: str, value: str, choices: tuple[str, ...], rest: str = "") -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"data.{field}={value!r}: expected one of {', '.join(choices)}{rest}{hint}")
