"""The objectives that are not next tokens, each with the form of model that learns it, on a laptop.

    batiste train --config=configs/objectives.py --workdir=runs/objectives

That is "middle"; `--config=configs/objectives.py:NAME` takes another of NAMES. The quickstart's
data and size, 300 steps. docs/objectives.md says what each of them is.
"""

import dataclasses

from batiste.configs import quickstart
from batiste.configs.experiment import Experiment
from batiste.data import RecordObjective

# UL2's denoisers (arXiv:2205.05131, table 1): regular, sequential, extreme.
UL2 = (
    *(RecordObjective("spans", rate=0.15, mean_span=mean_span, mode="[R]")
      for mean_span in (3.0, 8.0)),
    RecordObjective("prefix", mode="[S]"),
    *(RecordObjective("spans", rate=rate, mean_span=mean_span, mode="[X]")
      for rate, mean_span in ((0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0))),
)
NAMES = {
    "middle": (RecordObjective("middle", rate=0.5),),
    "prefix": (RecordObjective("prefix"),),
    "masked": (RecordObjective("masked"),),
    "words": (RecordObjective("masked", whole_words=True),),
    "order": (RecordObjective("order"),),
    "replaced": (RecordObjective("replaced"),),
    "spans": (RecordObjective("spans"),),
    "ul2": UL2,
    "denoise": (RecordObjective("denoise", rate=0.3, shuffled=True),),
}
MODELS = {
    "masked": {"form": "encoder", "head_transform": True},
    # A generator of half the widths: ELECTRA's are from a quarter to a half.
    "replaced": {
        "form": "encoder", "discriminator": True, "generator_heads": 1, "tied_embeddings": True},
    "spans": {"form": "encoder_decoder", "encoder_layers": 4, "positions": "relative"},
    "denoise": {"form": "encoder_decoder", "encoder_layers": 4, "positions": "learned"},
}
MODELS |= {"words": MODELS["masked"], "order": MODELS["masked"] | {"token_types": 2},
           "ul2": MODELS["spans"]}


def get_config(arg: str | None = None) -> Experiment:
    """The quickstart with another objective; ValueError for one that is not in NAMES."""
    name = "middle" if arg is None else arg
    if name not in NAMES:
        raise ValueError(
            f"--config=configs/objectives.py:{arg}: expected one of {', '.join(NAMES)}")
    experiment = quickstart.get_config()
    # Room for special tokens above the 4,096 that are learned.
    model = dataclasses.replace(
        experiment.model, vocab_size=4160, attention="reference", **MODELS.get(name, {}))
    data = dataclasses.replace(experiment.data, objectives=NAMES[name])
    train = dataclasses.replace(experiment.train, num_steps=300)
    train.checkpoint.every, train.evaluation.every = 100, 100
    train.schedule.warmup_steps = 1 / 3
    return dataclasses.replace(experiment, model=model, data=data, train=train)
