"""Where the rooms meet: an experiment, its data and its program on a mesh, ready to be used."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from batiste import __version__
from batiste.configs.experiment import Experiment, flatten
from batiste.data import (
    Batch, Loader, Prepared, Transform, encode_prompt, special_ids, target_length,
    transform_of,
)
from batiste.evaluation import Perplexity, RowSums, make_row_losses, perplexity
from batiste.inference import SamplingConfig, generate
from batiste.models import resolve_attention
from batiste.sharding import (
    RULES, MeshConfig, Share, check_host_memory, connect_groups, is_first, make_mesh,
    make_mesh_like, replicate, restack, shardings,
)
from batiste.train import (
    Ledger, Program, Progress, ReportFacts, flops_per_token, make_program, mfu_formula_line,
    read_account, total_peak_flops, write_report, write_samples,
)


@dataclasses.dataclass(frozen=True)
class Assembly:
    """An experiment, its work directory, its data, and its program on a mesh."""

    experiment: Experiment
    workdir: pathlib.Path
    prepared: Prepared
    mesh: jax.sharding.Mesh
    program: Program

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.program.abstract_state.params))

    @functools.cached_property
    def row_losses(self) -> Callable[[Any, Batch, jax.Array], RowSums]:
        """Compiled once, whoever measures."""
        objective = self.experiment.train.objective
        return make_row_losses(self.program, self.mesh, objective)

    @functools.cached_property
    def byte_lengths_V(self) -> jax.Array:
        """Bytes of text that each token stands for, whole on every device; special tokens: none."""
        lengths_V = np.zeros(self.experiment.model.vocab_size, np.float32)
        known = self.prepared.tokenizer.byte_lengths_V
        lengths_V[: len(known)] = known
        return replicate(self.mesh, lengths_V)

    @functools.cached_property
    def transform(self) -> Transform:
        """What becomes of each record."""
        return transform_of(
            self.experiment.data, self.experiment.model.form, self.prepared.tokenizer)

    def measure(self, params: Any, max_batches: int | None = None) -> Perplexity:
        """The perplexity of the validation split, or of its first batches."""
        rows = self.program.layout.micro_batches
        rows *= math.prod(self.mesh.shape[axis] for axis in RULES["B"])
        batch_size = -(-self.experiment.train.batch_size // rows) * rows
        loader = Loader(
            self.prepared, "validation", batch_size, self.experiment.data.seed, self.transform)
        share = Share(self.mesh, batch_size)
        return perplexity(
            lambda batch: self.row_losses(params, share.place(batch), self.byte_lengths_V),
            itertools.islice(loader.epoch_batches(share.rows), max_batches),
        )

    def validation(self, params: Any, max_batches: int | None = None) -> dict[str, float]:
        """What `measure` says, as a run writes it down."""
        return self.measured(self.measure(params, max_batches))

    def measured(self, result: Perplexity) -> dict[str, float]:
        """What is written down of a measurement."""
        if self.experiment.data.objectives:  # They do not predict every byte from those before.
            return {"loss": result.loss}
        return {"loss": result.loss, "bits_per_byte": result.bits_per_byte}

    def sample(self, params: Any, step: int) -> list[tuple[str, str]]:
        """Continues the config's prompts and (process 0) writes them down, as those of a step."""
        # An encoder continues nothing.
        encoder = self.experiment.model.form == "encoder"
        prompts = () if encoder else self.experiment.sample.prompts
        with jax.transfer_guard("allow"):  # Not a step of training: it waits for each token.
            texts = self.write(params, prompts, self.experiment.sample)
        samples = list(zip(prompts, texts, strict=True))
        if is_first():
            write_samples(self.workdir, step, samples)
        return samples

    def plain(self, params: Any) -> Any:
        """The parameters as decoding wants them: layers by depth, on MeshConfig.plain."""
        layout = self.program.layout
        plain = layout.plain(self.mesh.size)
        if plain is layout:
            return params
        mesh = make_mesh_like(self.mesh, plain)
        targets = shardings(mesh, self.program.letters, zero=True)
        return restack(params, layout, plain, targets)

    def stream(
        self, params: Any, prompts: Sequence[str | list[int]], config: SamplingConfig
    ) -> Iterator[list[str]]:
        """Continues each prompt, a text or tokens; yields the text that each step adds to each."""
        tokenizer, data = self.prepared.tokenizer, self.experiment.data
        special = special_ids(data, tokenizer)
        # A prompt is what the decoder begins with, or what an encoder reads.
        reads = self.experiment.model.form == "encoder_decoder"
        begin = tokenizer.source_begin_ids if reads else tokenizer.begin_ids
        close = tokenizer.source_end_ids if reads else ()
        ids = [[*begin, *encode_prompt(tokenizer, special, prompt), *close]
               if isinstance(prompt, str) else prompt for prompt in prompts]
        # Some tokenizers put nothing before a prompt, but something must be there.
        ids = [row or [tokenizer.bos_id] for row in ids]
        decoders = [tokenizer.stream() for _ in prompts]
        model = nnx.merge(self.program.graphdef, self.plain(params))
        kinds = {objective.kind for objective in data.objectives}
        whole = kinds == {"prefix"} and not reads  # As trained.
        starts = tokenizer.start_ids if reads else ()
        for tokens in generate(
                model, ids, tokenizer.stop_ids, config, whole_prompts=whole, start_ids=starts):
            # A model may have more tokens than the tokenizer (a padded vocabulary): no text.
            yield [
                "" if token is None or token >= tokenizer.vocab_size else decoder.push(token)
                for token, decoder in zip(tokens, decoders, strict=True)
            ]
        yield [decoder.finish() for decoder in decoders]

    def write(
        self,
        params: Any,
        prompts: Sequence[str | list[int]],
        config: SamplingConfig,
        on_text: Callable[[list[str]], None] | None = None,
    ) -> list[str]:
        """The continuation of each prompt, whole; `on_text` is called with each step's pieces."""
        texts = [""] * len(prompts)
        if not prompts:
            return texts
        for pieces in self.stream(params, prompts, config):
            if on_text is not None:
                on_text(pieces)
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def progress(self, step: int, records: int) -> tuple[Progress, int]:
        """The terminal line, and the step at which the run ends by its steps or its FLOP budget.

        records: what the first `step` steps have read.
        """
        experiment, program = self.experiment, self.program
        length = experiment.data.sequence_length
        two = experiment.model.form == "encoder_decoder"
        flops = flops_per_token(
            experiment.model, program.abstract_state.params, program.letters, length,
            target_length(experiment.data) / length if two else 1.0,
        )
        peak, source = total_peak_flops(self.mesh, experiment.model.dtype)
        if is_first():
            print(f"{mfu_formula_line(flops, peak)} ({source})", flush=True)
        last_step, budget = experiment.train.num_steps, experiment.train.stop.flops
        if budget is not None:
            left = int(budget // (flops * length)) - records
            last_step = min(last_step, max(1, step + left // experiment.train.batch_size))
        progress = Progress(
            last_step, flops_per_token=flops, peak_flops=peak,
            stream=sys.stderr if is_first() else open(os.devnull, "w", encoding="utf-8"),
        )
        return progress, last_step

    def facts(self) -> dict[str, Any]:
        """What this run is made of, for its ledger."""
        config = json.dumps(flatten(self.experiment), sort_keys=True)
        defaults = flatten(Experiment())
        return {
            "config": hashlib.sha256(config.encode()).hexdigest()[:12],
            "code": code_version(),
            "device": self.mesh.devices.flat[0].device_kind,
            "devices": self.mesh.size,
            "processes": jax.process_count(),
            "data": self.prepared.fingerprint,
            "parameters": self.parameters,
            # Which fields are not at the defaults of their classes: the report shows them first.
            "set": [name for name, value in flatten(self.experiment).items()
                    if name not in defaults or value != defaults[name]],
        }

    def finish(self, params: Any, ledger: Ledger, *, step: int, tokens: int) -> Perplexity:
        """Evaluates on the whole validation split, samples, and (process 0) writes the report.

        step: the last one. tokens: that the run was trained on, padding left out.
        """
        experiment, manifest = self.experiment, self.prepared.manifest
        ledger.enter("evaluation")
        result = self.measure(params)
        ledger.enter("sampling")
        samples = self.sample(params, step)
        ledger.enter("idle")
        if not is_first():
            return result
        facts = ReportFacts(
            name=self.workdir.name,
            parameters=self.parameters,
            tokens=tokens,
            device=f"{self.mesh.size} x {jax.devices()[0].device_kind}",
            config=flatten(experiment),
            seconds_by_phase=read_account(self.workdir).seconds,
            samples=samples,
        )
        if not experiment.data.objectives:  # Others do not predict every byte from those before.
            facts = dataclasses.replace(
                facts, bits_per_byte=result.bits_per_byte, standard_error=result.standard_error,
                xz_concatenated=manifest["validation"].get("xz_bits_per_byte"),
                xz_per_document=manifest["validation"].get("xz_bits_per_byte_per_document"),
            )
        write_report(self.workdir, facts)
        return result


def assemble(
    experiment: Experiment, workdir: pathlib.Path, prepared: Prepared, mesh_config: MeshConfig
) -> "Assembly":
    """Lays the experiment's program out on a mesh of all devices; allocates nothing."""
    mesh = make_mesh(mesh_config)
    kind = mesh.devices.flat[0].device_kind
    model, choice = resolve_attention(experiment.model, kind, mesh.shape)
    if is_first():
        print(choice, file=sys.stderr, flush=True)  # The output of `generate` is text alone.
    for field, wanted in (
        ("mesh.offload_optimizer", mesh_config.offload_optimizer),
        ("model.offloaded", bool(model.offloaded)),
    ):
        if wanted:
            check_host_memory(mesh, field)
    program = make_program(model, experiment.train, mesh, mesh_config)
    connect_groups(mesh)
    return Assembly(experiment, workdir, prepared, mesh, program)


def code_version() -> str:
    """The package's version, with the git commit (and -dirty) where the package is a clone."""
    root = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = ""
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            commit = f" ({done.stdout.strip()})"
    return f"{__version__}{commit}"
