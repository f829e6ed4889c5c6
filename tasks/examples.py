"""Examples as people write them: a text, perhaps a second, and labels for some of the heads."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from batiste.data.json_files import parse_json
from batiste.tasks.config import HeadConfig, TaskConfig

SHAPES = {
    "sequence": "one of its classes", "multilabel": "a list of its classes",
    "tags": "one of its classes, or null, for each word between white space",
    "span": "a list of [start, end) in characters of text_pair, or of text without it",
    "similarity": "true for two texts that belong together, or false, beside a text_pair",
}
KIND = {"text": str, "text_pair": str | None, "labels": dict | None}  # Of a line of JSONL.


@dataclasses.dataclass(frozen=True)
class Example:
    """labels: by the head's name; a head without one learns nothing from this example."""

    text: str
    text_pair: str | None = None
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def context(self) -> str:
        """The text that an answer is looked for in."""
        return self.text if self.text_pair is None else self.text_pair

    @property
    def words(self) -> list[str]:
        """What tags are for."""
        return self.text.split()


def read_examples(path: str | pathlib.Path) -> list[Example]:
    """The examples of a JSONL file; ValueError names the line that holds none."""
    path, found = pathlib.Path(path), []
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected JSONL, one example a line")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = parse_json(line, path.name, KIND)
            found.append(Example(
                **{name: value for name, value in fields.items() if value is not None}))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected {{\"text\": ..., \"text_pair\": ..., "
                             f"\"labels\": {{...}}}}, got {line[:60]!r} ({error})") from None
    return found


def check_examples(config: TaskConfig, examples: Sequence[Example], field: str) -> None:
    """Raises ValueError, naming the example, for a label that its head cannot read."""
    if not examples:
        raise ValueError(f"{field}: expected examples, got none")
    heads = {head.name: head for head in config.heads}
    for index, example in enumerate(examples):
        place = f"{field}[{index}]"
        if not isinstance(example.text, str) or not isinstance(example.labels, dict):
            raise ValueError(f"{place}: expected a text and a dict of labels, got {example}")
        for name, label in example.labels.items():
            if name not in heads:
                raise ValueError(f"{place}.labels: {name!r} is none of the heads "
                                 f"{', '.join(heads)}")
            if not _fits(heads[name], example, label):
                raise ValueError(f"{place}.labels[{name!r}]={label!r}: expected "
                                 f"{SHAPES[heads[name].kind]} (heads.{name})")
        if config.balanced is not None and config.balanced not in example.labels:
            raise ValueError(f"{place}.labels: balanced={config.balanced!r} draws by that label, "
                             "and this example has none")
    for head in config.heads:
        if not any(head.name in example.labels for example in examples):
            raise ValueError(f"{field}: no example has a label for the head {head.name!r}")


def _fits(head: HeadConfig, example: Example, label: Any) -> bool:
    if head.kind == "sequence":
        return label in head.classes
    if head.kind == "similarity":
        return isinstance(label, bool) and example.text_pair is not None
    if not isinstance(label, (list, tuple)):
        return False
    if head.kind == "multilabel":
        return set(label) <= set(head.classes)
    if head.kind == "tags":
        return len(label) == len(example.words) and set(label) <= {None, *head.classes}
    size = len(example.context)
    return len(label) > 0 and all(
        len(each) == 2 and 0 <= each[0] < each[1] <= size for each in label)


def class_counts(head: HeadConfig, examples: Iterable[Example]) -> list[int]:
    """How often each class of a "sequence" or "tags" head is a label."""
    counts = dict.fromkeys(head.classes, 0)
    for example in examples:
        if head.name not in example.labels:
            continue
        label = example.labels[head.name]
        for each in ([label] if head.kind == "sequence" else label):
            if each is not None:
                counts[each] += 1
    return list(counts.values())


def class_weights(head: HeadConfig, examples: Sequence[Example]) -> tuple[float, ...] | None:
    """What losses of each class are multiplied by, None for 1.

    With balanced_loss n / (classes * count), as in scikit-learn: the mean over examples is 1.
    Raises ValueError for a class that no example has.
    """
    if not head.balanced_loss:
        return head.class_weights
    counts = class_counts(head, examples)
    for name, count in zip(head.classes, counts, strict=True):
        if count == 0:
            raise ValueError(f"heads.{head.name}.balanced_loss=True: no training example of class "
                             f"{name!r}: leave it out of classes, or give class_weights")
    total = sum(counts)
    return tuple(total / (len(counts) * count) for count in counts)
