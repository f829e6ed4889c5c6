"""Random legal experiments, and what must hold for each of them (tests/test_random_configs.py)."""

import dataclasses
import math
import random
from typing import Any, NamedTuple

import jax
import numpy as np
from conftest import make_batch
from flax import nnx
from step_checks import by_depth, place_batch

from batiste.configs.experiment import Experiment
from batiste.data import Batch, RecordObjective, target_length
from batiste.data.record_objective import FORMS as OBJECTIVES
from batiste.forecast import choice_of
from batiste.inference import SamplingConfig, generate
from batiste.interop import FAMILIES, WeightMap, fitting_family
from batiste.interop import files as weight_files
from batiste.interop.family import FREE_FIELDS
from batiste.models import Beside, Transformer, resolve_attention
from batiste.models.config_checks import (
    BIASES, DTYPES, EXPERT_SCORES, FORMS, NORM_PLACEMENTS, POSITIONS, REMAT_POLICIES, ROPE_SCALINGS,
    TENSOR_NAMES,
)
from batiste.models.parts import ACTIVATIONS, NORMS
from batiste.planning import Account, Workload
from batiste.planning.saved import bytes_per_row, repetitions
from batiste.sharding import AXES, CONTEXT_EXCHANGES, RULES, MeshConfig, layer_order, make_mesh
from batiste.train import Replicas, make_program, make_train_step
from batiste.train.health import HealthConfig
from batiste.train.optimizer import KINDS as OPTIMIZERS
from batiste.train.schedule import KINDS as SCHEDULES
from batiste.train.schedule import WARMUPS

DEVICES = 4
ALONE = dict.fromkeys(AXES, 1)
ROWS = 11  # With which tokens of rows, and of experts, are no size of a model drawn here.


class Drawn(NamedTuple):
    """A legal experiment, the generator that drew it, and how many were refused before."""

    experiment: Experiment
    random: random.Random
    refused: list[str]


def draw(seed: int) -> Drawn:
    """Draws experiments until `validate_on` accepts one."""
    source, refused = random.Random(seed), []
    for _ in range(1000):
        experiment = _experiment(source)
        try:
            experiment.validate_on(DEVICES)
        except ValueError as error:
            assert "\n" not in str(error), error
            refused.append(str(error))
            continue
        return Drawn(experiment, source, refused)
    raise AssertionError(f"of 1,000 draws none is legal, the last because {refused[-1]}")


def _experiment(source: random.Random) -> Experiment:
    experiment = Experiment()
    experiment.data.sequence_length = source.choice((8, 16))
    experiment.data.tokenizer = "bytes"  # Which is not there: batches are made here.
    experiment.model = dataclasses.replace(experiment.model, **_model(source, experiment))
    kinds = OBJECTIVES[experiment.model.form]
    if experiment.model.discriminator:
        kinds = ("replaced",)
    elif experiment.model.form == "encoder":
        kinds = ("masked",) if experiment.model.token_types is None else ("masked", "order")
    if experiment.model.form != "decoder" or source.random() < 0.3:
        experiment.data.objectives = (RecordObjective(source.choice(kinds)),)
    experiment.mesh = _mesh(source)
    _train(source, experiment)
    return experiment


def _model(source: random.Random, experiment: Experiment) -> dict[str, Any]:
    """Fields of the model: a form and sizes, and each feature now and then."""
    def some(chance: float) -> bool:
        return source.random() < chance

    heads = source.choice((2, 4, 4, 8))
    fields: dict[str, Any] = {
        "form": source.choice((FORMS[0], *FORMS)), "vocab_size": source.choice((24, 40)),
        "num_layers": source.choice((1, 2, 2, 4)), "model_dim": source.choice((16, 24, 32)),
        "num_heads": heads, "num_kv_heads": source.choice((heads, heads, heads // 2, 1)),
        "head_dim": source.choice((4, 6, 8, 16)), "mlp_dim": source.choice((16, 24, 40)),
        "max_length": experiment.data.sequence_length + source.choice((0, 8)),
        "activation": source.choice([*ACTIVATIONS]), "norm": source.choice([*NORMS]),
        "norm_placement": source.choice(NORM_PLACEMENTS), "bias": source.choice(BIASES),
        "positions": source.choice((*POSITIONS, "rope", "rope")), "attention": "auto",
        "remat": source.choice(REMAT_POLICIES), "qk_norm": some(0.3), "embedding_norm": some(0.2),
        "attention_sinks": some(0.2), "tied_embeddings": some(0.6), "shared_layers": some(0.1),
        "scale_embeddings": some(0.2), "scale_logits": some(0.15), "scan_unroll": source.choice((1, 2)),
        "depth_scaled_init": some(0.5), "norm_epsilon": source.choice((1e-6, 1e-5)),
        "dtype": source.choice(("float32",) * 7 + DTYPES),
        "dropout": 0.1 if some(0.1) else 0.0, "init_stddev": 0.02 if some(0.2) else None,
        "attention_scale": 0.3 if some(0.2) else None,
        "attention_soft_cap": 5.0 if some(0.2) else None,
        "logit_soft_cap": 5.0 if some(0.2) else None, "token_types": 2 if some(0.2) else None,
        "rope_scaling": source.choice(ROPE_SCALINGS) if some(0.25) else None,
        "rope_original_length": 8, "rope_base": source.choice((100.0, 10_000.0)),
        "future_heads": source.choice((1, 2)) if some(0.15) else 0,
        "head_transform": some(0.15), "discriminator": some(0.1),
    }
    names = source.sample(TENSOR_NAMES, 3)
    if fields["remat"] == "names":
        fields |= {"saved": tuple(names[:2]), "offloaded": tuple(names[2:]) if some(0.3) else ()}
    if some(0.3):
        pattern = source.choice((("local",), ("local", "global"), ("local", "local", "global")))
        fields |= {"layer_pattern": pattern, "window": source.choice((2, 5)),
                   "local_rope_base": 50.0 if some(0.2) else None}
    if fields["form"] == "encoder_decoder":
        fields["encoder_layers"] = source.choice((1, 2, 3))
    if fields["discriminator"] and some(0.8):
        fields |= {"generator_heads": fields["num_heads"] // 2, "head_transform": False,
                   "form": "encoder", "tied_embeddings": True}
        fields.pop("encoder_layers", None)
    if (fields["head_transform"] or fields["discriminator"]) and some(0.3):
        fields["embedding_dim"] = source.choice((8, 12))
    if some(0.3):
        fields |= _experts(source, fields["num_layers"])
    if some(0.2):
        fields |= _latent(source, fields)
    return _of_family(source, fields) if some(0.3) else fields


def _of_family(source: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    """Of the fields those in which members of a family differ; of the others what all have."""
    family = source.choice(FAMILIES)
    own = {*FREE_FIELDS, *(field.ours for field in family.fields)}
    if family.rotates:
        own |= {"rope_base", "rope_scaling", "rope_original_length"}
    absent = {field.ours: field.absent for field in family.fields if field.theirs is None}
    return {name: value for name, value in fields.items() if name in own} | {
        name: value for name, value in (absent | dict(family.fixed)).items() if not callable(value)}


def _experts(source: random.Random, num_layers: int) -> dict[str, Any]:
    count, groups = source.choice((4, 6, 8)), source.choice((1, 1, 2))
    fields = {
        "num_experts": count, "experts_per_token": source.choice((1, 2, 3)),
        "shared_experts": source.choice((0, 0, 1, 2, 3)),
        "expert_scores": source.choice(EXPERT_SCORES), "router_bias": source.random() < 0.4,
        "routed_scale": source.choice((1.0, 2.5)), "expert_groups": groups,
        "groups_per_token": source.choice((1, groups)), "bias": source.choice(("none", "qkv")),
    }
    if num_layers > 1 and source.random() < 0.3:
        fields |= {"dense_layers": source.randrange(1, num_layers),
                   "dense_mlp_dim": source.choice((16, 56))}
    return fields


def _latent(source: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    own = {"rope_dim": source.choice((2, 4)), "latent_rank": source.choice((6, 12, 16)),
           "query_rank": source.choice((None, 10)), "head_dim": 8, "positions": "rope",
           "bias": "none", "qk_norm": False, "attention_sinks": False}
    return own | {"value_dim": source.choice((4, 8)), "num_kv_heads": fields["num_heads"]}


def _mesh(source: random.Random) -> MeshConfig:
    axes = [source.choice(AXES[1:])] if source.random() < 0.4 else source.sample(AXES, 2)
    sizes = {axis: DEVICES if len(axes) == 1 else 2 for axis in axes}
    mesh = MeshConfig(
        **{axis: size for axis, size in sizes.items() if axis != "data"},
        zero=source.choice((0, 1, 2, 3)), offload_optimizer=source.random() < 0.1,
        context_exchange=source.choice(CONTEXT_EXCHANGES))
    if mesh.stage > 1:
        mesh.micro_batches, mesh.interleave = source.choice((1, 2, 4)), source.choice((1, 1, 2))
    return mesh


def _train(source: random.Random, experiment: Experiment) -> None:
    train = experiment.train
    train.num_steps, train.batch_size = source.choice((3, 8)), source.choice((8, 16))
    train.accumulation = source.choice((1, 1, 2, 4))
    optimizer, schedule, objective = train.optimizer, train.schedule, train.objective
    optimizer.kind = source.choice(("sgd",) * 4 + OPTIMIZERS)
    optimizer.clip_norm = source.choice((None, 1.0))
    optimizer.clip_value = source.choice((None, None, 0.5))
    optimizer.momentum = source.choice((0.0, 0.9))
    optimizer.matrix_multiplier = source.choice((1.0, 0.5))
    optimizer.epsilon = 1e-3
    schedule.kind, schedule.warmup = source.choice(SCHEDULES), source.choice(WARMUPS)
    schedule.warmup_steps = source.choice((0, 1, 2))
    schedule.learning_rate = 0.1 if optimizer.kind == "sgd" else 1e-3
    if schedule.kind == "warmup_stable_decay":
        schedule.decay_steps = 1
    if schedule.kind == "step":
        schedule.step_every, schedule.step_factor = 1, 0.5
    objective.label_smoothing = source.choice((0.0, 0.0, 0.1))
    objective.z_loss = source.choice((0.0, 0.0, 0.01))
    objective.loss_chunk = source.choice((None, None, 4, 8))
    if experiment.model.num_experts is not None:
        objective.balance_loss = source.choice((0.0, 0.01))
        objective.router_z_loss = source.choice((0.0, 0.001))
    train.health.every = source.choice((None, 1))


def batch_of(experiment: Experiment, seed: int) -> Batch:
    """A batch as this experiment's objective makes them: what is hidden, seen whole, or read."""
    model, rows = experiment.model, experiment.train.batch_size
    length, random_ = experiment.data.sequence_length, np.random.default_rng(seed)
    kinds = {objective.kind for objective in experiment.data.objectives}
    source = {}
    if model.form == "encoder_decoder":
        read = make_batch(rows, length, model.vocab_size, seed + 1)
        source = {"source_tokens_BS": read.tokens_BT, "source_segments_BS": read.segments_BT,
                  "source_positions_BS": read.positions_BT}
        length = target_length(experiment.data)
    batch = make_batch(rows, length, model.vocab_size, seed)._replace(**source)
    if model.form == "encoder":
        hidden_BT = (random_.random((rows, length)) < 0.3) & (batch.segments_BT > 0)
        targets_BT = batch.tokens_BT
        batch = batch._replace(
            tokens_BT=np.where(hidden_BT, 3, batch.tokens_BT), targets_BT=targets_BT,
            weights_BT=hidden_BT.astype(np.float32))
    if model.token_types is not None:
        batch = batch._replace(types_BT=random_.integers(
            0, model.token_types, (rows, length)).astype(np.int32))
    if "prefix" in kinds and model.form == "decoder":
        one_BT = np.ones_like(batch.segments_BT)
        batch = batch._replace(
            segments_BT=one_BT, positions_BT=one_BT.cumsum(axis=1, dtype=np.int32) - 1,
            prefix_B=random_.integers(1, length // 2, rows).astype(np.int32))
    return batch


class Settled(NamedTuple):
    """An experiment with attention settled, its program on one device, and a state for it."""

    experiment: Experiment
    program: Any
    params: Any
    state: Any


def settle(drawn: Drawn, seed: int) -> Settled:
    """The program on one device, and parameters that are far from where training begins."""
    experiment, one = drawn.experiment, jax.devices()[:1]
    model, _ = resolve_attention(experiment.model, one[0].device_kind, {})
    experiment = dataclasses.replace(experiment, model=model)
    mesh = make_mesh(MeshConfig(data=1), one)
    program = make_program(model, experiment.train, mesh, MeshConfig(data=1))
    source = np.random.default_rng(seed)

    def value(path: tuple, leaf: Any) -> np.ndarray:
        name = path[-1].key
        noise = source.standard_normal(leaf.shape).astype(np.float32)
        if name.startswith("scale_"):
            return (0.0 if model.norm == "rms_plus_one" else 1.0) + np.float32(0.1) * noise
        return noise * np.float32(0.1 if "bias" in name else leaf.shape[-2:][0] ** -0.5)

    params = jax.tree_util.tree_map_with_path(value, program.abstract_state.params)
    state = jax.device_get(program.begin(jax.device_put(params, one[0])))
    return Settled(experiment, program, params, state)


def check_account(settled: Settled) -> None:
    """The planner knows all that is kept, and of a real derivative's arrays the bytes."""
    experiment, model = settled.experiment, settled.experiment.model
    length = experiment.data.sequence_length
    account = Account(Workload(model, experiment.train, length))
    choice = choice_of(experiment, DEVICES)
    assert account.unknown(choice) is None, account.unknown(choice)
    assert 0 < account.estimate(choice).total < math.inf
    state = account.state(choice.mesh)
    mesh = make_mesh(experiment.mesh, jax.devices()[:DEVICES])
    program = make_program(model, experiment.train, mesh, experiment.mesh)
    for tree, predicted in ((program.abstract_state.params, state.parameters),
                            (program.abstract_state.optimizer_state,
                             state.optimizer + state.offloaded)):
        held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                   for leaf in jax.tree.leaves(tree))
        assert predicted == held
    predicted = sum(
        ROWS * bytes_per_row(entry, model, length, ALONE) * repetitions(
            dataclasses.replace(model, future_heads=0), entry.stack)
        for entry in account.saved(choice.policy) if not entry.generator)
    assert predicted == _kept(model, choice.policy, length)


def _kept(model: Any, policy: Any, length: int) -> int:
    """Bytes of what the features of some rows keep for their derivative."""
    rows, policy = ROWS, policy._replace(offloaded=())
    model = dataclasses.replace(model, **policy._asdict(), dropout=0.0, generator_heads=None)
    tokens = jax.ShapeDtypeStruct((rows, length), np.int32)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0))))

    def residuals(params, tokens_BT, segments_BT):
        rows_BT = tokens_BT, segments_BT, segments_BT
        source = rows_BT if model.encoder_layers else (None,) * 3

        def features(params):
            return nnx.merge(graphdef, params).features(
                *rows_BT, beside=Beside(None, None, *source))

        return jax.tree.leaves(jax.vjp(features, params)[1])

    first = (rows, rows * length, rows * length * model.experts_per_token)
    depths = {(model.num_layers - model.dense_layers) // len(model.layer_pattern),
              model.dense_layers, model.encoder_layers}
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.eval_shape(residuals, params, tokens, tokens)
        if {*leaf.shape[:1]} & {*first}
        or ({*leaf.shape[:1]} & depths and {*leaf.shape[1:2]} & {*first})
    )


def two_steps(settled: Settled, layout: MeshConfig, devices: int, batch: Batch) -> tuple:
    """Metrics of each of two steps on a mesh, and the parameters after them, layers by depth."""
    experiment = settled.experiment
    model = experiment.model
    mesh = make_mesh(layout, jax.devices()[:devices])
    program = make_program(model, experiment.train, mesh, layout)
    step = make_train_step(program, experiment.train, mesh)
    order = layer_order(model.num_layers, layout.stage, layout.interleave)

    def put(leaf, like):
        leaf, axes = np.asarray(leaf), tuple(like.sharding.spec)
        if layout.interleave > 1 and RULES["L"] in axes:
            leaf = np.take(leaf, order, axis=axes.index(RULES["L"]))
        return jax.device_put(leaf, like.sharding)

    state, measured = jax.tree.map(put, settled.state, program.abstract_state), []
    placed = place_batch(mesh, batch)
    for _ in range(2):
        state, metrics = step(state, placed)
        measured.append(jax.device_get(metrics))
    if devices > 1:  # Raises where devices came to different bits of what they all have.
        Replicas(HealthConfig(), mesh, program.abstract_state).check(2, state)
    return measured, by_depth(jax.device_get(state.params), layout, model.num_layers)


def plainly(settled: Settled) -> Settled:
    """The same model and optimizer with nothing that only changes how a step is computed."""
    experiment = settled.experiment
    train = dataclasses.replace(
        experiment.train, health=dataclasses.replace(experiment.train.health, every=None),
        objective=dataclasses.replace(experiment.train.objective, loss_chunk=None))
    model = dataclasses.replace(
        experiment.model, remat="none", saved=(), offloaded=(), scan_unroll=1)
    if not model.dropout:  # Which draws for each micro-batch.
        train.accumulation = 1
    return settled._replace(experiment=dataclasses.replace(experiment, model=model, train=train))


def check_steps(settled: Settled, seed: int) -> None:
    """Two steps on the mesh are two steps on one device, computed as plainly as can be."""
    experiment = settled.experiment
    batch = batch_of(experiment, seed)
    mine, params = two_steps(settled, experiment.mesh, DEVICES, batch)
    theirs, expected = two_steps(plainly(settled), MeshConfig(data=1), 1, batch)
    exact = experiment.model.dtype == "float32"
    kind = experiment.train.optimizer.kind
    for number, (here, there) in enumerate(zip(mine, theirs)):
        tolerance = (3e-5 if number == 0 or kind == "sgd" else 1e-3) if exact else 0.05
        # What a step sends between slices depends on the mesh.
        names = set(there) - {"slice_bytes"}
        assert names <= set(here)
        for name in names if exact else ("loss", "cross_entropy", "tokens"):
            np.testing.assert_allclose(
                here[name], there[name], rtol=tolerance, atol=tolerance, err_msg=name)
        finite = jax.tree.map(lambda x: bool(np.isfinite(x).all()), here.get("health"))
        assert all(jax.tree.leaves(finite)), finite
    if exact and kind == "sgd":
        jax.tree_util.tree_map_with_path(
            lambda path, a, b: np.testing.assert_allclose(
                a, b, rtol=1e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path)), params, expected)


def check_decoding(settled: Settled, seed: int) -> None:
    """Each token that greedy decoding chooses is the likeliest of a full forward pass."""
    experiment, model = settled.experiment, settled.experiment.model
    if model.form == "encoder":
        return
    source = np.random.default_rng(seed)
    prompts = [[int(i) for i in source.integers(0, model.vocab_size, size)] for size in (3, 1, 5)]
    kinds = {objective.kind for objective in experiment.data.objectives}
    whole = kinds == {"prefix"} and model.form == "decoder"
    transformer = nnx.merge(settled.program.graphdef, jax.device_put(settled.params, jax.devices()[0]))
    config = SamplingConfig(temperature=0.0, top_p=None, max_tokens=min(6, model.max_length - 5))
    two = model.form == "encoder_decoder"
    stop_id = 0 if two else -1  # What is written to a source begins with it.
    steps = list(generate(transformer, prompts, (stop_id,), config, whole_prompts=whole,
                          start_ids=(stop_id,) if two else ()))
    written = [[token for token in each if token is not None] for each in zip(*steps)]
    written = written or [[] for _ in prompts]
    starts = [[stop_id] for _ in prompts] if two else prompts
    length = max(map(len, starts)) + len(steps)
    tokens_BT = np.zeros((len(prompts), length), np.int32)
    for row, start, more in zip(tokens_BT, starts, written):
        row[: len(start) + len(more)] = [*start, *more]
    source_BS = np.zeros((len(prompts), 5), np.int32)
    real_BS = np.zeros_like(source_BS)
    for row, real, prompt in zip(source_BS, real_BS, prompts):
        row[: len(prompt)], real[: len(prompt)] = prompt, 1
    beside = Beside(
        prefix_B=np.array([len(prompt) for prompt in prompts], np.int32) if whole else None,
        source_tokens_BS=source_BS if two else None, source_segments_BS=real_BS if two else None)
    ones_BT = np.ones_like(tokens_BT)
    logits_BTV = np.asarray(jax.jit(lambda tokens_BT, beside: transformer(
        tokens_BT, None, ones_BT if two else None, None, beside))(tokens_BT, beside))
    tolerance = 1e-4 if model.dtype == "float32" else 0.1
    for row, start, more in zip(logits_BTV, starts, written):
        for place, token in enumerate(more, start=len(start) - 1):
            assert row[place, token] >= row[place].max() - tolerance * np.abs(row[place]).max()


def check_exchange(settled: Settled, folder: Any) -> str | None:
    """What is written for a family that has such a model is read back as the same model."""
    model = dataclasses.replace(settled.experiment.model, dtype="float32")
    try:
        family = fitting_family(model, FAMILIES)
    except ValueError as error:
        assert "\n" not in str(error)
        return None
    theirs = family.config_of(model, {})
    weights = WeightMap(family, model, theirs, settled.params)
    planned = weights.planned(np.dtype(np.float32))
    weight_files.write(folder, planned, weights.tensors(settled.params, np.dtype(np.float32)))
    again, abstract = family.model_of(theirs), settled.program.abstract_state.params
    read = WeightMap(family, again, theirs, abstract).parameters(
        weight_files.Tensors(folder), abstract)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(read), settled.params)
    free = {name: getattr(model, name) for name in FREE_FIELDS}
    if model.discriminator or dataclasses.replace(again, **free) == model:
        return family.model_type  # The same parameters of the same model say the same.
    tokens_BT = np.arange(16, dtype=np.int32).reshape(2, 8) % model.vocab_size
    beside = Beside(source_tokens_BS=tokens_BT if model.encoder_layers else None)

    def logits(model, params):
        graphdef = nnx.split(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0))))[0]
        return jax.jit(lambda params: nnx.merge(graphdef, params)(tokens_BT, beside=beside))(params)

    np.testing.assert_allclose(
        logits(again, read), logits(model, settled.params), rtol=1e-5, atol=1e-5)
    return family.model_type
