"""The front door: takes an experiment apart and calls the rooms. The command line calls these."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from batiste.configs.experiment import Experiment, flatten, from_dict
from batiste.data import Batch, Loader, Prepared, load_prepared
from batiste.data import prepare as prepare_data
from batiste.evaluation import Perplexity, make_row_losses, perplexity
from batiste.inference import SamplingConfig
from batiste.inference import generate as generate_tokens
from batiste.models import Transformer
from batiste.sharding import MeshConfig, make_mesh, place
from batiste.train import (
    Checkpoints, Ledger, MetricsWriter, Program, Progress, Records, ReportFacts, Run, check_mode,
    check_same, fit, flops_per_token, make_program, make_train_step, mfu_formula_line,
    total_peak_flops, write_report,
)
from batiste.train.checkpoint import CHECKPOINT_FOLDER
from batiste.train.config import CheckpointConfig

CONFIG_FILE = "config.json"
# These change where or how a step is computed and recorded, not what it computes.
FREE_TO_CHANGE = (
    "mesh.", "sample.", "train.checkpoint.", "train.evaluation.", "train.stop.", "model.remat",
    "model.scan_unroll",
)


class Result(NamedTuple):
    """How training ended ("done", "patience", "SIGINT", "SIGTERM"), after which step, how good."""

    reason: str
    step: int
    validation: Perplexity | None


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where the rooms meet: an experiment, its data, and its program on a mesh."""

    experiment: Experiment
    workdir: pathlib.Path
    prepared: Prepared
    mesh: jax.sharding.Mesh
    program: Program

    def place(self, batch: Batch) -> Batch:
        """The batch on the mesh, split by rows."""
        return place(self.mesh, batch, Batch(*("BT",) * len(batch)))

    @functools.cached_property
    def row_losses(self) -> Callable[[Any, Batch], jax.Array]:
        """Compiled once, whoever measures."""
        loss_chunk = self.experiment.train.objective.loss_chunk
        return make_row_losses(self.program.graphdef, self.mesh, loss_chunk)

    def measure(self, params: Any, max_batches: int | None = None) -> Perplexity:
        """The perplexity of the validation split, or of its first batches."""
        batch_size = -(-self.experiment.train.batch_size // self.mesh.size) * self.mesh.size
        loader = Loader(self.prepared, "validation", batch_size, self.experiment.data.seed)
        return perplexity(
            functools.partial(self.row_losses, params),
            itertools.islice(loader.epoch_batches(), max_batches),
            self.place,
            self.prepared.tokenizer.byte_lengths_V,
        )

    def stream(
        self, params: Any, prompts: Sequence[str], config: SamplingConfig
    ) -> Iterator[list[str]]:
        """Continues each prompt; yields the text that each step adds to each."""
        tokenizer = self.prepared.tokenizer
        ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
        decoders = [tokenizer.stream() for _ in prompts]
        model = nnx.merge(self.program.graphdef, params)
        for tokens in generate_tokens(model, ids, tokenizer.bos_id, config):
            # A model may have more tokens than the tokenizer (a padded vocabulary): no text.
            yield [
                "" if token is None or token >= tokenizer.vocab_size else decoder.push(token)
                for token, decoder in zip(tokens, decoders, strict=True)
            ]
        yield [decoder.finish() for decoder in decoders]


def prepare(experiment: Experiment, workdir: str | os.PathLike) -> Prepared:
    """Turns raw text into records under `workdir`/data, or finds that this is already done."""
    experiment.data.validate()
    prepared = prepare_data(experiment.data, pathlib.Path(workdir, "data"))
    if prepared.tokenizer.vocab_size > experiment.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={experiment.model.vocab_size}, but the tokenizer has "
            f"{prepared.tokenizer.vocab_size} tokens: set model.vocab_size at least that high"
        )
    return prepared


def train(experiment: Experiment, workdir: str | os.PathLike, resume: str = "auto") -> Result:
    """Prepares, trains, evaluates, samples, and writes it all under `workdir`.

    resume: "auto" continues from the newest checkpoint if there is one, "must" demands one,
    "never" refuses to find one. Raises ValueError for a config that cannot run, or that differs
    from the checkpoint's.
    """
    started = time.perf_counter()
    workdir = pathlib.Path(workdir)
    experiment.validate_on(len(jax.devices()))
    start, stored = _stored(workdir, experiment.train.checkpoint)
    check_mode(resume, start, str(workdir))
    flat = flatten(experiment)
    if start is not None:
        check_same(stored["config"], flat, FREE_TO_CHANGE)
    prepared = prepare(experiment, workdir)
    fingerprint = {"fingerprint of the data": prepared.fingerprint}
    if start is not None:
        check_same(stored["data"], fingerprint, ())
    setup = _set_up(experiment, workdir, prepared, experiment.mesh)
    _save_config(experiment, workdir)
    ledger = Ledger(workdir)
    ledger.write("phase", name="prepare", seconds=time.perf_counter() - started)
    meta = {"validation": [], **stored, "config": flat, "data": fingerprint}
    with contextlib.closing(Checkpoints(workdir, experiment.train.checkpoint)) as checkpoints:
        state, reason = _fit(setup, checkpoints, ledger, meta, start)
    step = int(state.step)
    finished = not reason.startswith("SIG")
    return Result(reason, step, _finish(setup, state.params, ledger, step) if finished else None)


def evaluate(workdir: str | os.PathLike) -> Perplexity:
    """The perplexity of a trained work directory's newest checkpoint on its validation split."""
    setup, params = _load(workdir)
    return setup.measure(params)


def generate(
    workdir: str | os.PathLike,
    prompts: Sequence[str],
    config: SamplingConfig | None = None,
    on_text: Callable[[list[str]], None] | None = None,
) -> list[str]:
    """Continues each prompt with a trained work directory's newest checkpoint.

    config: None takes the one that the run was configured with. on_text is called, as text comes,
    with what each prompt gained.
    """
    setup, params = _load(workdir)
    config = setup.experiment.sample if config is None else config
    return _collect(setup.stream(params, prompts, config), len(prompts), on_text)


def load_experiment(workdir: str | os.PathLike) -> Experiment:
    """The experiment that a work directory remembers; ValueError if it holds none."""
    path = pathlib.Path(workdir, CONFIG_FILE)
    if not path.is_file():
        raise ValueError(
            f"workdir={workdir}: no {CONFIG_FILE} there, so no run; expected the --workdir of a "
            "`batiste train`"
        )
    return from_dict(Experiment, json.loads(path.read_text()))


def _stored(workdir: pathlib.Path, config: CheckpointConfig) -> tuple[int | None, dict[str, Any]]:
    """The newest committed step, and what was saved beside its arrays; creates nothing."""
    if not (workdir / CHECKPOINT_FOLDER).is_dir():
        return None, {}
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        step = checkpoints.latest_step
        return step, {} if step is None else checkpoints.meta(step)


def _fit(
    setup: Setup, checkpoints: Checkpoints, ledger: Ledger, meta: dict[str, Any], start: int | None
) -> tuple[Any, str]:
    """Trains from the checkpoint of step `start`, or from nothing; the state, and why it ended."""
    experiment = setup.experiment
    if start is None:
        state = setup.program.initialize()
    else:
        state = checkpoints.restore(start, setup.program.abstract_state)
        print(f"continuing from step {start} of {setup.workdir}", flush=True)
    ledger.lap("initialize")
    loader = Loader(setup.prepared, "train", experiment.train.batch_size, experiment.data.seed)
    batches = loader.iterate(start or 0)
    progress, last_step = _progress(setup)
    metrics = MetricsWriter(setup.workdir, start or 0)
    run = Run(
        train_step=make_train_step(setup.program, experiment.train, setup.mesh),
        batches=map(setup.place, batches),
        evaluate=lambda state: setup.measure(
            state.params, experiment.train.evaluation.max_batches
        ).loss,
        last_step=last_step,
    )
    try:
        return fit(experiment.train, state, run,
                   Records(checkpoints, metrics, progress, ledger, meta))
    finally:
        batches.close()
        metrics.close()


def _set_up(
    experiment: Experiment, workdir: pathlib.Path, prepared: Prepared, mesh_config: MeshConfig
) -> Setup:
    mesh = make_mesh(mesh_config)
    program = make_program(experiment.model, experiment.train, mesh, mesh_config.zero)
    return Setup(experiment, workdir, prepared, mesh, program)


def _load(workdir: str | os.PathLike) -> tuple[Setup, Any]:
    """Setup and parameters of the newest checkpoint, replicated over the devices that are here."""
    workdir = pathlib.Path(workdir)
    experiment = load_experiment(workdir)
    step, stored = _stored(workdir, experiment.train.checkpoint)
    check_mode("must", step, str(workdir))
    fingerprint = stored["data"]["fingerprint of the data"]
    prepared = load_prepared(pathlib.Path(workdir, "data", fingerprint[:12]))
    setup = _set_up(experiment, workdir, prepared, MeshConfig())
    with contextlib.closing(Checkpoints(workdir, experiment.train.checkpoint)) as checkpoints:
        return setup, checkpoints.restore_params(step, setup.program.abstract_state.params)


def _save_config(experiment: Experiment, workdir: pathlib.Path) -> None:
    temporary = workdir / f"{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(experiment), indent=1) + "\n")
    os.replace(temporary, workdir / CONFIG_FILE)


def _progress(setup: Setup) -> tuple[Progress, int]:
    """The terminal line, and the step at which the run ends by its steps or its FLOP budget."""
    experiment, program = setup.experiment, setup.program
    tokens_per_step = experiment.train.batch_size * experiment.data.sequence_length
    flops = flops_per_token(
        experiment.model, program.abstract_state.params, program.letters,
        experiment.data.sequence_length,
    )
    peak, source = total_peak_flops(setup.mesh, experiment.model.dtype)
    print(f"{mfu_formula_line(flops, peak)} ({source})", flush=True)
    last_step, budget = experiment.train.num_steps, experiment.train.stop.flops
    if budget is not None:
        last_step = min(last_step, max(1, int(budget // (flops * tokens_per_step))))
    progress = Progress(
        last_step, tokens_per_step=tokens_per_step, flops_per_token=flops, peak_flops=peak
    )
    return progress, last_step


def _finish(setup: Setup, params: Any, ledger: Ledger, step: int) -> Perplexity:
    """Evaluates on the whole validation split, samples, and writes the report."""
    experiment, manifest = setup.experiment, setup.prepared.manifest
    result = setup.measure(params)
    ledger.lap("evaluate")
    prompts = experiment.sample.prompts
    texts = _collect(setup.stream(params, prompts, experiment.sample), len(prompts), None)
    ledger.lap("sample")
    facts = ReportFacts(
        name=setup.workdir.name,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        tokens=step * experiment.train.batch_size * experiment.data.sequence_length,
        device=f"{setup.mesh.size} x {jax.devices()[0].device_kind}",
        config=flatten(experiment),
        seconds_by_phase=ledger.seconds_by_phase(),
        samples=list(zip(prompts, texts, strict=True)),
        bits_per_byte=result.bits_per_byte,
        standard_error=result.standard_error,
        xz_concatenated=manifest["validation"].get("xz_bits_per_byte"),
        xz_per_document=manifest["validation"].get("xz_bits_per_byte_per_document"),
    )
    write_report(setup.workdir, facts)
    return result


def _collect(
    pieces: Iterator[list[str]], num_prompts: int, on_text: Callable[[list[str]], None] | None
) -> list[str]:
    texts = [""] * num_prompts
    for step in pieces:
        if on_text is not None:
            on_text(step)
        texts = [text + piece for text, piece in zip(texts, step, strict=True)]
    return texts
