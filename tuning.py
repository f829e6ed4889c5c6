"""Where tasks meet work directories: an encoder's weights and tokenizer in, a tuned one out."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from batiste import main
from batiste.configs.experiment import flatten
from batiste.configs.own_parts import load_module
from batiste.data import TextReader, text_reader
from batiste.data.json_files import check_json, read_json
from batiste.exchange import imported
from batiste.models import TransformerConfig
from batiste.tasks import Embedder, Example, Given, TaskConfig, Tuned, read_examples
from batiste.tasks import tune as tune_task
from batiste.tasks.baselines import bag_of_words, majority
from batiste.train import Checkpoints, work_directory_lock

TASK_FILE = "task.json"
# What `embedder` reads of it.
TASK_KINDS = {"encoder": str, "max_length": int, "heads": list}
HEAD_KINDS = {"kind": str, "pool": str | None}
COLUMNS = ("accuracy", "exact_match", "f1", "precision_macro", "recall_macro", "f1_macro",
           "f1_micro", "roc_auc", "retrieval", "examples")


def tune(
    config: TaskConfig, workdir: str | os.PathLike, resume: str = "auto", break_lock: bool = False
) -> Tuned:
    """Trains the heads of a task and the encoder under them, and measures them.

    The same call continues where it stopped. break_lock: as for `batiste.main.train`. Raises
    ValueError for a task that cannot be, or where another process writes to the work directory.
    """
    config.validate_on(len(jax.devices()))
    folder = pathlib.Path(workdir)
    with work_directory_lock(folder, break_lock):
        tuned = tune_task(config, given_of(config), folder, flatten(config), resume)
        text = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
        (folder / f"{TASK_FILE}.tmp").write_text(text)
        os.replace(folder / f"{TASK_FILE}.tmp", folder / TASK_FILE)
    return tuned


def given_of(config: TaskConfig) -> Given:
    """The encoder and the examples that a task's config names."""
    if config.encoder is None:
        raise ValueError("encoder=None: expected a work directory, of `batiste import --from=MODEL "
                         "--workdir=ENCODER` for instance")
    model = main.load_experiment(config.encoder).model
    check_encoder(config, model)
    splits = (examples_of(config, field) for field in ("train_data", "validation_data"))
    return Given(model, reader_of(config.encoder), *splits,
                 weights=lambda: main.load_model(config.encoder)[1])


def check_encoder(config: TaskConfig, model: TransformerConfig) -> None:
    """Raises ValueError for a model that tasks are not proven for."""
    if model.form == "encoder_decoder" or model.num_experts is not None:
        kind = "an encoder_decoder" if model.num_experts is None else "a mixture of experts"
        raise ValueError(f"encoder={config.encoder}: is {kind}; expected an encoder, or a decoder, "
                         "without experts")
    for index, head in enumerate(config.heads):
        if model.form == "decoder" and head.pool == "first":
            raise ValueError(f"heads[{index}].pool='first': the first token of a decoder has seen "
                             "nothing else: take 'last' or 'mean'")


def examples_of(config: TaskConfig, field: str) -> Sequence[Example]:
    """The examples that train_data or validation_data names: JSONL, or FILE.py:NAME."""
    name = getattr(config, field)
    if name is None:
        raise ValueError(f"{field}=None: expected a .jsonl file of examples, or FILE.py:NAME")
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        return read_examples(name)
    module = load_module(field, path)
    if not hasattr(module, attribute):
        raise ValueError(f"{field}={name!r}: {path} has no {attribute!r}")
    return list(getattr(module, attribute)())


def reader_of(workdir: str | os.PathLike) -> TextReader:
    """What reads texts for the model of a work directory."""
    begun = imported(pathlib.Path(workdir))
    if begun is not None:
        return begun.reader
    return text_reader(main.load_model(workdir)[0].prepared.tokenizer)


def table(config: TaskConfig, tuned: Tuned) -> str:
    """Every metric of every head as lines of text, beside the baselines of those that have some."""
    splits = (examples_of(config, field) for field in ("train_data", "validation_data"))
    train, validation = splits
    rows: list[tuple[str, dict[str, float]]] = []
    for head in config.heads:
        if head.kind == "sequence":
            rows.append((f"{head.name}: majority", majority(head, train, validation)))
            rows.append((f"{head.name}: bag of words", bag_of_words(head, train, validation)))
        rows.append((f"{head.name}: tuned", tuned.metrics[head.name]))
    columns = [name for name in COLUMNS if any(name in found for _, found in rows)]
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"  {name:>11}" for name in columns)]
    for name, found in rows:
        cells = ("" if column not in found else
                 f"{found[column]:,}" if column == "examples" else f"{found[column]:.4f}"
                 for column in columns)
        widths = (max(11, len(column)) for column in columns)
        lines.append(f"{name:<{width}}" + "".join(
            f"  {cell:>{wide}}" for cell, wide in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def embedder(
    workdir: str | os.PathLike, max_length: int = 256, trust_code: bool = False
) -> Embedder:
    """What makes unit vectors of texts, by an encoder's work directory or a tuned one's.

    A tuned one pools as its similarity head does, if it has one; all others take the mean.
    trust_code: as for `batiste.main.load_experiment`. Raises ValueError for a model whose vectors
    say nothing of texts.
    """
    folder, pool, pools = pathlib.Path(workdir), "mean", []
    path = folder / TASK_FILE
    encoder = folder
    if path.is_file():
        task = read_json(path, TASK_KINDS)
        for index, head in enumerate(task["heads"]):
            check_json(head, HEAD_KINDS, str(path), f"heads[{index}]")
        encoder = pathlib.Path(task["encoder"])
        max_length = min(max_length, task["max_length"])
        pools = [head["pool"] for head in task["heads"] if head["kind"] == "similarity"]
        pool = next((each for each in pools if each is not None), pool)
    form = main.load_experiment(encoder, trust_code).model.form
    if form == "encoder_decoder" or (form == "decoder" and not pools):
        raise ValueError(f"workdir={workdir}: its model is of form {form!r}; expected an encoder, or "
                         "a decoder with a similarity head of `batiste tune`")
    assembly, params = main.load_model(encoder)
    if path.is_file():
        params = _tuned_encoder(folder, assembly)
    max_length = min(max_length, assembly.experiment.model.max_length)
    return Embedder(
        assembly.program.graphdef, params, reader_of(encoder), assembly.mesh, pool, max_length)


def _tuned_encoder(folder: pathlib.Path, assembly: Any) -> Any:
    """The encoder's parameters of a tuned work directory's newest checkpoint."""
    checkpoints = Checkpoints(folder, assembly.experiment.train.checkpoint)
    found = checkpoints.newest_verified()
    if found.step is None:
        raise ValueError(f"workdir={folder}: holds no checkpoint yet: let `batiste tune` finish")
    abstract = {"params": {"encoder": assembly.program.abstract_state.params}}
    return checkpoints.restore(found.step, abstract)["params"]["encoder"]
