"""What a model learns from a record: one entry of data.objectives."""

import dataclasses
import difflib
from collections.abc import Callable

from batiste.fields import Config, check_types

# Which kinds there are, by the form of model that learns them.
FORMS = {
    "decoder": ("causal", "prefix", "middle"),
    "encoder": ("masked", "order", "replaced"),
    "encoder_decoder": ("spans", "denoise", "prefix"),
}
KINDS = tuple(dict.fromkeys(kind for kinds in FORMS.values() for kind in kinds))
# Kinds of your own, for decoders (docs/extend.md): (record [T+1], RecordObjective, Vocabulary,
# numpy Generator) -> the Batch of one row.
OWN_KINDS: dict[str, Callable] = {}
# Which kinds read a field; the others leave it as it is.
READ_BY = {
    "rate": ("middle", "masked", "order", "replaced", "spans", "denoise"),
    "mean_span": ("spans", "denoise"),
    "whole_words": ("masked", "order", "replaced"),
    "suffix_first": ("middle",),
    "shuffled": ("denoise",),
    "mode": ("spans", "prefix", "denoise"),
}
# UL2's denoisers: regular, sequential, extreme (arXiv:2205.05131).
MODES = ("[R]", "[S]", "[X]")


def kinds_of(form: str) -> tuple[str, ...]:
    """The kinds that a form of model learns; those of your own are for decoders."""
    return (*FORMS[form], *(OWN_KINDS if form == "decoder" else ()))


@dataclasses.dataclass
class RecordObjective(Config):
    """One way to make inputs and targets of a record; docs/objectives.md has them side by side.

    kind: "causal", next tokens; "prefix", next tokens after a part that is seen whole; "middle",
        next tokens with the middle of a document moved to its end; "masked", hidden tokens;
        "order", those and whether the halves of a document are swapped; "replaced", which tokens a
        generator replaced; "spans", what spans left out; or "denoise", the document from a damaged
        copy.
    weight: the share of the records that it is applied to, relative to the others.
    rate: the share of tokens that are hidden, or for "middle" of documents that are rearranged.
    mean_span: tokens of a hidden span, on average.
    whole_words: words are hidden whole.
    suffix_first: of the rearranged documents, the share whose suffix comes before the prefix.
    shuffled: sentences come in random order.
    mode: the token, of MODES, that an encoder reads before each document, so that it can be asked
        for this objective later; None puts none.
    """

    kind: str = "causal"
    weight: float = 1.0
    rate: float = 0.15
    mean_span: float = 3.0
    whole_words: bool = False
    suffix_first: float = 0.5
    shuffled: bool = False
    mode: str | None = None

    def validate(self, name: str) -> None:
        """Raises ValueError, calling this entry `name`, for the first field that cannot work."""
        check_types(self, f"{name}.")
        own = self.kind in OWN_KINDS
        if self.kind not in KINDS and not own:
            near = difflib.get_close_matches(str(self.kind), KINDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{name}.kind={self.kind!r}: expected one of {', '.join(KINDS)}{hint}")
        for field in dataclasses.fields(self):
            value, readers = getattr(self, field.name), READ_BY.get(field.name, KINDS)
            readers = (*readers, *OWN_KINDS)
            if self.kind not in readers and value != field.default:
                raise ValueError(
                    f"{name}.{field.name}={value} has no effect on kind={self.kind!r}, but on "
                    f"{', '.join(readers)}: leave it at {field.default}")
        if not self.weight > 0:
            raise ValueError(f"{name}.weight={self.weight}: expected a number above 0; leave an "
                             "objective out to give it no share")
        most = 1 if self.kind == "middle" or own else 0.9
        if not 0 < self.rate <= most:
            raise ValueError(
                f"{name}.rate={self.rate}: expected a number above 0 and at most {most}")
        if not self.mean_span >= 1:
            raise ValueError(f"{name}.mean_span={self.mean_span}: expected at least 1 token")
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(
                f"{name}.mode={self.mode!r}: expected one of {', '.join(MODES)}, or None")
        if not 0 <= self.suffix_first <= 1:
            raise ValueError(
                f"{name}.suffix_first={self.suffix_first}: expected a number from 0 to 1")


def validate_objectives(objectives: tuple[RecordObjective, ...]) -> None:
    """Raises ValueError, naming the field, for objectives that cannot be, alone or together."""
    for index, objective in enumerate(objectives):
        objective.validate(f"data.objectives[{index}]")
    kinds = [objective.kind for objective in objectives]
    groups = [(*kinds_of(form),) for form in FORMS]
    if not any(set(kinds) <= set(together) for together in groups):
        groups = "; ".join(", ".join(together) for together in groups)
        raise ValueError(
            f"data.objectives: one model does not learn {', '.join(kinds)} together; expected "
            f"kinds of one of these groups: {groups}")
