"""Where work directories meet the models of other libraries: import, export, and the certificate."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from batiste.assembly import Assembly
from batiste.configs.experiment import Experiment, flatten
from batiste.data import (
    PackedReader, RecordObjective, TextReader, Tokenizer, can_pack, load_tokenizer, pack_tokenizer,
)
from batiste.data.json_files import read_json
from batiste.interop import FAMILIES, Family, Tensors, WeightMap, family_of, fitting_family
from batiste.interop import certificate as certificates
from batiste.interop.chat import chat_tokens
from batiste.interop.directory import (
    CONFIG, IDS, Written, open_source, read_aside, read_config, write_aside, write_directory,
)
from batiste.interop.family import FREE_FIELDS
from batiste.interop.stablehlo import write_stablehlo
from batiste.interop.tokenizer_files import write_tokenizer
from batiste.models import PARTS, TransformerConfig, alone
from batiste.sharding import MeshConfig, is_first, make_mesh, restack
from batiste.train import (
    Checkpoints, Program, TrainConfig, TrainState, arrays_of, check_same, make_program,
)

FOLDER, META, FILES, TOKENIZER = "imported", "import.json", "files", "tokenizer.json"
META_KIND = {"family": str, "model": dict, "arrays": dict}
USUAL_OBJECTIVES = {"decoder": (), "encoder": ("masked",), "encoder_decoder": ("spans",)}


class Imported(NamedTuple):
    """The weights that a work directory begins with: its folder, and what was saved beside them."""

    folder: pathlib.Path
    meta: dict[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came along; ValueError if none did."""
        return load_tokenizer(self._packed)

    @property
    def reader(self) -> TextReader:
        """What reads texts as the model was trained to; also where the tokenizer loses some."""
        return PackedReader(self._packed.read_bytes())

    @property
    def _packed(self) -> pathlib.Path:
        path = self.folder / TOKENIZER
        if not path.is_file():
            raise ValueError(
                f"{self.folder}: the model came without a tokenizer.json, vocab.txt, "
                "tokenizer.model, or vocab.json with merges.txt; put one "
                "beside its config.json and import it again"
            )
        return path

    def check(self, experiment: Experiment, abstract_params: Any) -> None:
        """Raises ValueError where an experiment's model is not the imported one."""
        free = tuple(f"model.{name}" for name in FREE_FIELDS)
        check_same(self.meta["model"], _model_fields(experiment.model), free)
        check_same(self.meta["arrays"], arrays_of(abstract_params))

    def parameters(self, experiment: Experiment, program: Program) -> Any:
        """The weights, verified, laid out for a program."""
        abstract = program.abstract_state.params
        self.check(experiment, abstract)
        with contextlib.closing(Checkpoints(self.folder, experiment.train.checkpoint)) as saved:
            found = saved.newest_verified()
            if found.step is None:
                raise ValueError(
                    f"{self.folder}: the imported weights are damaged: "
                    f"{'; '.join(found.passed_over.values()) or 'there are none'}; import them again"
                )
            params = saved.restore(0, {"params": abstract})["params"]
        targets = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return restack(params, MeshConfig(), program.layout, targets)


def imported(workdir: pathlib.Path) -> Imported | None:
    """What a work directory begins with, None if it was not imported."""
    folder = pathlib.Path(workdir, FOLDER)
    path = folder / META
    return Imported(folder, read_json(path, META_KIND)) if path.is_file() else None


def chat_prompt(workdir: pathlib.Path, message: str) -> list[int]:
    """The tokens of what a user says to an imported model; ValueError where it has no template."""
    begun = imported(workdir)
    if begun is None:
        raise ValueError(
            f"{workdir} was not imported, so it has no chat template: leave --chat out")
    return chat_tokens(begun.folder / FILES, [{"role": "user", "content": message}])


def beginning(assembly: Assembly) -> TrainState:
    """The state before the first step: of imported weights, where the run has some."""
    begun = imported(assembly.workdir)
    if begun is None:
        return assembly.program.initialize()
    if is_first():
        print(f"beginning with the weights in {begun.folder}", flush=True)
    return assembly.program.begin(begun.parameters(assembly.experiment, assembly.program))


def import_model(source: str, workdir: str, experiment: Experiment | None = None) -> Experiment:
    """Makes a work directory of a model in Hugging Face's format, or GGUF; returns its experiment.

    experiment: what it is to be trained on and how; the model's sizes become those of `source`.
    Reads one tensor at a time into its place on the devices. Raises ValueError for a model that is
    not known here, files that are damaged, or a work directory that is taken.
    """
    path, target = pathlib.Path(source), pathlib.Path(workdir)
    opened = open_source(path)
    theirs = opened.theirs
    family = family_of(theirs, FAMILIES)
    model = family.model_of(theirs)
    if (target / "config.json").exists() or (target / FOLDER).exists():
        raise ValueError(f"workdir={workdir}: holds a run; choose another --workdir")
    experiment = _with_model(experiment, model)
    unfinished = target / f"{FOLDER}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    if can_pack(opened.bring(unfinished / FILES)):
        _bring_tokenizer(unfinished, model)
        experiment.data.tokenizer = str(target / FOLDER / TOKENIZER)
    experiment.validate()
    layout = experiment.mesh.plain(len(jax.devices()))
    program = make_program(experiment.model, experiment.train, make_mesh(layout), layout)
    abstract = program.abstract_state.params
    weights = WeightMap(family, model, theirs, abstract)
    state = TrainState(np.int32(0), weights.parameters(opened.tensors, abstract), None, None)
    write_aside(unfinished / FILES, weights.aside(opened.tensors))
    with contextlib.closing(Checkpoints(unfinished, experiment.train.checkpoint)) as saved:
        saved.save(0, state, {})
        saved.finish(0, state, {})
    meta = {"family": family.model_type, "model": _model_fields(experiment.model),
            "arrays": arrays_of(abstract)}
    (unfinished / META).write_text(json.dumps(meta, indent=1) + "\n")
    os.replace(unfinished, target / FOLDER)
    return experiment


def _bring_tokenizer(folder: pathlib.Path, model: TransformerConfig) -> None:
    """Makes of the tokenizer.json that came along what encodes text here.

    Where an encoder reads, one that loses text (BERT's) is no reason to refuse the weights: what
    reads texts alone can do with it, and what prepares them refuses it when it is asked to.
    """
    (folder / TOKENIZER).write_bytes(pack_tokenizer(folder / FILES))
    try:
        tokenizer = load_tokenizer(folder / TOKENIZER)
        size = tokenizer.vocab_size
        if tokenizer.normal_form is not None:
            print(f"the tokenizer knows text in Unicode's {tokenizer.normal_form} alone: "
                  "data.normalize=True brings other text into it, False sets it aside", flush=True)
    except ValueError as error:
        if model.form == "decoder":
            raise
        final = str(error).replace(".unfinished", "", 1)
        print(f"weights only, for `batiste tune` and `embed`; no text is prepared for them: {final}",
              flush=True)
        size = PackedReader((folder / TOKENIZER).read_bytes()).vocab_size
    if size > model.vocab_size:
        raise ValueError(
            f"{TOKENIZER} has {size} tokens, but config.json says vocab_size={model.vocab_size}: "
            "one of the two is of another model"
        )


def _with_model(experiment: Experiment | None, model: TransformerConfig) -> Experiment:
    """The experiment with the model's sizes, and its own way to compute it if it says one."""
    if experiment is None:
        experiment = Experiment()
        experiment.model = dataclasses.replace(model, attention="auto")
        data, health = experiment.data, experiment.train.health
        data.sequence_length = min(data.sequence_length, model.max_length)
        data.vocab_size = min(data.vocab_size, model.vocab_size)
        health.every = None if model.dense_layers else health.every
        kinds = ("replaced",) if model.discriminator else USUAL_OBJECTIVES[model.form]
        data.objectives = tuple(map(RecordObjective, kinds))
    else:
        own = {name: getattr(experiment.model, name) for name in FREE_FIELDS if name != "dtype"}
        experiment.model = dataclasses.replace(model, **own)
    return experiment


def _model_fields(model: TransformerConfig) -> dict[str, Any]:
    return {f"model.{name}": value for name, value in flatten(model).items()}


class Export(NamedTuple):
    """What is exported: the model and its parameters, and the work directory they are from."""

    model: TransformerConfig
    params: Any
    workdir: pathlib.Path
    tokenizer: Tokenizer | None

    def part(self, name: str | None) -> "Export":
        """One of the two models that a run of a discriminator trains; the model where it is one."""
        two = self.model.generator_heads is not None
        if two != (name in PARTS):
            expected = " or ".join(PARTS) if two else "nothing"
            raise ValueError(
                f"part={name}: expected {expected}, as model.generator_heads="
                f"{self.model.generator_heads}")
        if not two:
            return self
        model, params = alone(self.model, self.params, name)
        return self._replace(model=model, params=params)


def export_model(
    given: Export, to: str, family_name: str | None = None, dtype: str | None = None
) -> dict[str, int]:
    """Writes a directory that `transformers` loads; returns its number of tensors and of bytes.

    family_name: None takes the family it was imported as, or the first that has such a model. dtype:
    of the files, None for the model's compute dtype. Raises ValueError where no family has it.
    """
    target = pathlib.Path(to)
    _check_free(target)
    begun = imported(given.workdir)
    brought = None if begun is None else begun.folder / FILES
    family = _family(given.model, family_name, begun)
    config = {} if brought is None else read_json(brought / CONFIG)
    aside = read_aside(brought)
    if begun is None:
        config = _ids(given)
    elif family.model_type != begun.meta["family"]:
        config, aside = {key: config[key] for key in IDS if config.get(key) is not None}, {}
    model = dataclasses.replace(given.model, dtype=dtype or given.model.dtype)
    theirs = family.config_of(model, config)
    weights = WeightMap(family, model, theirs, given.params, aside)
    file_dtype = jax.numpy.dtype(model.dtype)
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    content = Written(weights, given.params, file_dtype, theirs, brought)
    write_directory(unfinished, content, given.workdir.resolve().name)
    if brought is None and given.tokenizer is not None:
        try:
            reads = model.form == "encoder_decoder"
            write_tokenizer(unfinished, given.tokenizer, model.max_length, reads)
        except ValueError as error:  # The weights are worth having without it.
            print(f"{to}: has no tokenizer.json: {error}", file=sys.stderr, flush=True)
    certificates.write(unfinished, _fingerprint_of(unfinished))
    os.replace(unfinished, target)
    planned = weights.planned(file_dtype)
    return {"tensors": len(planned), "bytes": sum(each.bytes for each in planned)}


def export_stablehlo(given: Export, to: str) -> int:
    """Writes a directory of programs and weights that run without Batiste; bytes of the weights."""
    target = pathlib.Path(to)
    _check_free(target)
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    size = write_stablehlo(unfinished, given.model, given.params, given.workdir.resolve().name)
    os.replace(unfinished, target)
    return size


def _check_free(target: pathlib.Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"to={target}: is there already; choose another --to, or remove it")


def verify_export(folder: str) -> float:
    """How far the logits of an exported directory are from its certificate, relative to the largest.

    Raises ValueError where that is beyond the tolerance, or a file is not as it was written.
    """
    path = pathlib.Path(folder)
    certificate = certificates.read(path)
    return certificates.check(certificate, _fingerprint_of(path))


def _family(model: TransformerConfig, name: str | None, begun: Imported | None) -> Family:
    if name is not None:
        return family_of({"model_type": name}, FAMILIES)
    if begun is not None:
        return family_of({"model_type": begun.meta["family"]}, FAMILIES)
    return fitting_family(model, FAMILIES)


def _ids(given: Export) -> Mapping[str, Any]:
    tokenizer = given.tokenizer
    if tokenizer is None:
        return {}
    stops = list(tokenizer.stop_ids)
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id,
           "eos_token_id": stops if len(stops) > 1 else tokenizer.end_id}
    reads = given.model.form == "encoder_decoder"
    return ids | ({"decoder_start_token_id": tokenizer.start_ids[0]} if reads else {})


def _fingerprint_of(folder: pathlib.Path) -> dict[str, Any]:
    """The fingerprint of a directory's model, read as an import would, in float32."""
    theirs = read_config(folder)
    family = family_of(theirs, FAMILIES)
    model = dataclasses.replace(family.model_of(theirs), dtype="float32")
    mesh = make_mesh(MeshConfig())
    program = make_program(model, TrainConfig(), mesh, MeshConfig())
    abstract = program.abstract_state.params
    params = WeightMap(family, model, theirs, abstract).parameters(Tensors(folder), abstract)

    @jax.jit
    def logits(params: Any, tokens_BT: np.ndarray) -> jax.Array:
        says = nnx.merge(program.graphdef, params)
        if not model.discriminator:
            return says(tokens_BT)
        odds_BT = says.replaced_odds(says.features(tokens_BT)[0])
        return jax.numpy.stack([jax.numpy.zeros_like(odds_BT), odds_BT], axis=-1)


    def logits_of(tokens_BT: np.ndarray) -> np.ndarray:
        # Each device must have rows of its own.
        rows = -(-len(tokens_BT) // mesh.size) * mesh.size
        tiled_BT = np.resize(tokens_BT, (rows, tokens_BT.shape[1]))
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            return np.asarray(logits(params, tiled_BT))[: len(tokens_BT)]

    classes = 2 if model.discriminator else model.vocab_size
    return certificates.fingerprint(logits_of, model.vocab_size, model.max_length, classes)
