"""Replaced-token detection: what is drawn, who learns what of whom, and that both learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_checks
from flax import nnx
from test_forms import model_of, records
from test_objectives import LENGTH, TOKENIZER, WORDS, config

from batiste import exchange, main
from batiste.configs.experiment import Experiment
from batiste.data import RecordObjective, SourceConfig, transform_of
from batiste.models import Transformer
from batiste.sharding import MeshConfig
from batiste.train import ReplacedTerms, batch_loss, replaced
from batiste.train.metrics import read_metrics
from batiste.verbs import print_perplexity

__all__ = ["records"]  # A fixture.

REPLACED = RecordObjective("replaced", rate=0.15)


def electra(**change):
    """Generator: D 12, N 4, K 2, F 20; discriminator: twice that; embeddings of 10."""
    return model_of("encoder", **dict(
        discriminator=True, generator_heads=4, num_heads=8, num_kv_heads=4, head_dim=6,
        embedding_dim=10, positions="learned", embedding_norm=True, bias="all", norm="layer",
    ) | change)


def batch_of(records, rows: int):
    numbers = np.arange(rows)
    return transform_of(config(REPLACED), "encoder", TOKENIZER)(records[:rows], numbers, numbers * 0)


@pytest.fixture(scope="module")
def batch(records):
    return jax.tree.map(jnp.asarray, batch_of(records, 5))


@pytest.fixture(scope="module")
def differentiated():
    """(graphdef, params, batch -> (gradients, Terms)), and the model's parts by name."""
    model = Transformer(electra(), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    objective = step_checks.train_config("sgd").objective

    def loss(params, batch):
        terms = batch_loss(nnx.merge(graphdef, params), batch, None, objective, None)
        return terms.loss, terms

    return graphdef, params, lambda: jax.jit(jax.grad(loss, has_aux=True))


def test_what_is_drawn_are_hidden_tokens_by_the_generators_probabilities(batch):
    logits_V = np.log(np.float32([0.6, 0.3, 0.1, 1e-30] + [1e-30] * 8))
    logits_BTV = jnp.asarray(np.broadcast_to(logits_V, (5, LENGTH, 12)))
    drawn = []
    for shift in range(60):  # Other rows, other draws.
        rows = batch._replace(tokens_BT=batch.tokens_BT + shift)
        filled_BT = np.asarray(replaced.filled(logits_BTV, rows))
        hidden = np.asarray(batch.weights_BT) > 0
        np.testing.assert_array_equal(filled_BT[~hidden], np.asarray(rows.tokens_BT)[~hidden])
        drawn.append(filled_BT[hidden])
        # A row is drawn alike in whatever batch it is.
        alone = jax.tree.map(lambda x: x[3:4], rows)
        np.testing.assert_array_equal(replaced.filled(logits_BTV[3:4], alone), filled_BT[3:4])
    shares = np.bincount(np.concatenate(drawn), minlength=12) / np.concatenate(drawn).size
    assert np.concatenate(drawn).size > 1500
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1] + [0] * 9, atol=0.04)


def test_the_loss_is_its_formula(batch, differentiated):
    """By hand, from the generator's logits and the discriminator's odds; padding counts nothing."""
    graphdef, params, gradient = differentiated
    segments_BT = batch.segments_BT.at[:2, -7:].set(0)
    batch = batch._replace(
        segments_BT=segments_BT, weights_BT=jnp.where(segments_BT > 0, batch.weights_BT, 0))
    _, terms = gradient()(params, batch)

    @jax.jit
    def said(params, batch):
        model, rows = nnx.merge(graphdef, params), (batch.positions_BT, batch.segments_BT)
        logits_BTV = model.guesses(batch.tokens_BT, (*rows, None), None)
        filled_BT = replaced.filled(logits_BTV, batch)
        x_BTD, _ = model.features(filled_BT, *rows)
        return logits_BTV, filled_BT, model.replaced_odds(x_BTD)

    logits_BTV, filled_BT, odds_BT = jax.device_get(said(params, batch))
    total, sums = 0.0, np.zeros((4, 5))
    for row in range(5):
        of_row, hidden = 0.0, 0
        for place in np.flatnonzero(batch.segments_BT[row]):
            target = int(batch.targets_BT[row, place])
            if batch.weights_BT[row, place]:
                logits_V = logits_BTV[row, place].astype(np.float64)
                total -= logits_V[target] - np.log(np.exp(logits_V).sum())
                hidden += 1
            changed = filled_BT[row, place] != target
            p = 1 / (1 + np.exp(-np.float64(odds_BT[row, place])))
            of_row -= np.log(p if changed else 1 - p)
            sums[:, row] += 0, 1, changed, (p > 0.5) == changed
        sums[0, row] = of_row
        total += 50 * hidden * of_row / sums[1, row]
    np.testing.assert_allclose(terms.loss, total, rtol=1e-5)
    for name, expected_B in zip(ReplacedTerms._fields, sums, strict=True):
        np.testing.assert_allclose(getattr(terms.replaced, name), expected_B, rtol=1e-5, err_msg=name)
    assert 0 < sums[2].sum() < batch.weights_BT.sum() + 1


def test_a_draw_that_is_the_token_itself_counts_as_original(batch):
    odds_BT = jnp.full(batch.tokens_BT.shape, -3.0)
    _, terms = replaced.detection(odds_BT, batch.targets_BT, batch)
    assert not terms.replaced_B.any() and (terms.right_B == terms.tokens_B).all()
    _, terms = replaced.detection(odds_BT, batch.targets_BT + 1, batch)
    np.testing.assert_array_equal(terms.replaced_B, batch.weights_BT.sum(axis=1))


def test_what_was_hidden_reaches_neither_of_the_two(batch):
    """Other targets at hidden places: the same logits, the same tokens filled in."""
    model = Transformer(electra(num_layers=1), rngs=nnx.Rngs(0))
    hidden = batch.weights_BT > 0
    others = batch._replace(targets_BT=jnp.where(hidden, batch.targets_BT + 1, batch.targets_BT))
    seen = []
    for each in (batch, others):
        rows = each.positions_BT, each.segments_BT, None
        logits_BTV = model.guesses(each.tokens_BT, rows, None)
        filled_BT = replaced.filled(logits_BTV, each)
        np.testing.assert_array_equal(filled_BT[~hidden], each.targets_BT[~hidden])
        seen.append((logits_BTV, filled_BT))
    jax.tree.map(np.testing.assert_array_equal, *seen)
    # The mask itself never reaches the discriminator, but where the generator says so.
    mask = batch.tokens_BT[hidden][0]
    assert (batch.tokens_BT[hidden] == mask).all() and not (batch.targets_BT == mask).any()


def test_the_two_learn_of_each_other_by_their_tables_alone(batch, differentiated, monkeypatch):
    _, params, gradient = differentiated
    both, _ = gradient()(params, batch)
    monkeypatch.setattr(replaced, "DISCRIMINATOR_WEIGHT", 0.0)
    generators, _ = gradient()(params, batch)
    monkeypatch.undo()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=5e-6),
                 both["generator"], generators["generator"])
    tables = {"embedding_VR", "position_TR", "embedding_norm"}
    assert tables < set(params)
    for name in tables:
        of_both, of_one = (jax.tree.leaves(each[name])[0] for each in (both, generators))
        assert jnp.abs(of_one).max() > 0 and jnp.abs(of_both - of_one).max() > 1e-3, name
    for name in set(params) - tables - {"generator"}:
        assert not any(leaf.any() for leaf in jax.tree.leaves(generators[name])), name
        assert all(leaf.any() for leaf in jax.tree.leaves(both[name])), name


@pytest.mark.parametrize("accumulation,mesh", (
    (2, MeshConfig(data=2)),
    pytest.param(2, MeshConfig(data=4, tensor=2, zero=3), marks=pytest.mark.slow),
    pytest.param(4, MeshConfig(data=2, tensor=2, zero=1), marks=pytest.mark.slow),
), ids=lambda value: f"{value.data}_{value.tensor}" if isinstance(value, MeshConfig) else None)
def test_a_mesh_and_micro_batches_have_the_numbers_of_one_device(accumulation, mesh, records):
    """Drawn tokens included: a row's draw knows neither its micro-batch nor its device."""
    batch, model = batch_of(records, 16), electra(num_layers=1)
    train, micro = step_checks.train_config("sgd"), step_checks.train_config("sgd", accumulation)
    train.batch_size = micro.batch_size = 16
    train.schedule.learning_rate = micro.schedule.learning_rate = 0.01
    devices = jax.devices()[: mesh.data * mesh.tensor]
    mine = step_checks.three_steps(micro, mesh, model, batch, devices)
    theirs = step_checks.alone(train, model, batch)
    step_checks.check_equal(mine, theirs)
    history = theirs.history
    np.testing.assert_allclose(history["replaced"] + history["always_original_accuracy"], 1, 1e-6)
    np.testing.assert_allclose(
        history["loss"][0],
        history["cross_entropy"][0] + 50 * history["discriminator_loss"][0], rtol=0.05)


@pytest.mark.slow
def test_both_learn(records):
    """On modules of the standard library: the generator beats unigrams, the other `original`."""
    model = electra(model_dim=48, mlp_dim=96, embedding_dim=24, positions="rope")
    train = step_checks.train_config("adamw")
    train.schedule.learning_rate, train.num_steps, train.batch_size = 0.005, 400, 32
    mesh, program, step = step_checks.start(train, MeshConfig(data=1), jax.devices()[:1], model)
    transform = transform_of(config(REPLACED), "encoder", TOKENIZER)
    state, random, history = program.initialize(), np.random.default_rng(0), []
    for epoch in range(train.num_steps):
        drawn = random.integers(0, len(records), train.batch_size)
        batch = transform(records[drawn], drawn, np.full(train.batch_size, epoch))
        state, metrics = step(state, step_checks.place_batch(mesh, batch))
        history.append(metrics)
    last = {name: np.mean([each[name] for each in history[-100:]]) for name in history[0]}
    counts = np.bincount(records[records >= 0])
    shares = counts[counts > 0] / counts.sum()
    unigram, share = -(shares * np.log(shares)).sum(), last["replaced"]
    trivial = -share * np.log(share) - (1 - share) * np.log(1 - share)
    print(last, unigram, trivial)
    # Over 100 steps of 1,500 tokens the standard errors are 0.02 and 0.001.
    assert last["cross_entropy"] < unigram - 0.1
    assert last["discriminator_loss"] < trivial - 0.02
    assert last["discriminator_accuracy"] > last["always_original_accuracy"] + 0.002


@pytest.mark.slow
def test_a_run_of_both_is_evaluated_and_exports_either_part(tmp_path, capsys):
    """`transformers` loads what it wrote, and says what our parts say."""
    torch = pytest.importorskip("torch", reason="compares with torch")
    import transformers

    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(WORDS[number % 9:] * 9))
    experiment = Experiment(
        electra(num_layers=2, vocab_size=264, token_types=2, positions="learned",
                activation="gelu_exact", norm_placement="post", norm_epsilon=1e-12, num_kv_heads=8,
                head_dim=3, init_stddev=0.3), config(REPLACED))
    experiment.data.sources = (SourceConfig(path=f"{tmp_path}/text/*.txt"),)
    experiment.data.validation_fraction = 0.3
    train = experiment.train
    train.num_steps, train.batch_size, train.schedule.warmup_steps = 3, 8, 1
    main.train(experiment, tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")[0]
    assert {"discriminator_loss", "replaced", "always_original_accuracy"} <= set(metrics)
    capsys.readouterr()
    print_perplexity(main.evaluate(tmp_path / "run"))
    assert "discriminator: loss" in capsys.readouterr().out
    with pytest.raises(ValueError, match="part=None: expected generator or discriminator"):
        main.export_weights(tmp_path / "run", tmp_path / "neither")
    params = main._load(tmp_path / "run")[1]
    tokens_BT = np.random.default_rng(0).integers(3, 258, (2, 9)).astype(np.int32)
    places_BT = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    model = nnx.merge(nnx.split(nnx.eval_shape(
        lambda: Transformer(experiment.model, rngs=nnx.Rngs(0))), nnx.Param)[0], params)
    ours = {
        "generator": model.guesses(tokens_BT, (places_BT, None, None), None),
        "discriminator": model.replaced_odds(model.features(tokens_BT)[0]),
    }
    for part, kind in (("generator", "MaskedLM"), ("discriminator", "PreTraining")):
        folder = tmp_path / part
        main.export_weights(tmp_path / "run", folder, part=part)
        assert exchange.verify_export(str(folder)) < 1e-5
        loaded, report = getattr(transformers, f"ElectraFor{kind}").from_pretrained(
            folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        with torch.no_grad():
            theirs = loaded.eval()(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours[part], theirs, atol=1e-4)


@pytest.mark.parametrize("change,named", (
    ({"model.discriminator": False}, "generator_heads=4 has no effect"),
    ({"model.generator_heads": 8}, "generator_heads=8: expected 1 to model.num_heads - 1=7"),
    ({"model.generator_heads": 3}, "num_kv_heads=4 \\* model.generator_heads=3"),
    ({"model.form": "decoder"}, "model.form='decoder' does not know model.discriminator"),
    ({"model.head_transform": True}, "model.head_transform=True does not know"),
    ({"model.tied_embeddings": False}, "model.tied_embeddings|model.embedding_dim"),
    ({"model.shared_layers": True}, "model.shared_layers=True does not know"),
    ({"model.positions": "relative"}, "model.positions='relative' does not know"),
    ({"data.objectives": (RecordObjective("masked"),)}, "kind 'masked' are not learned by"),
    ({"data.objectives": (REPLACED, RecordObjective("order"))}, "kind 'order' are not learned by"),
    ({"train.objective.loss_chunk": 8}, "train.objective.loss_chunk=8 does not know"),
    ({"mesh.stage": 2}, "mesh.stage=2 does not know model.form='encoder'"),
    ({"mesh.context": 2}, "mesh.context=2 does not know model.form='encoder'"),
    ({"mesh.slice": 2}, "mesh.slice=2 does not know model.form='encoder'"),
    ({"mesh.tensor": 4}, "generator's num_kv_heads .model.generator_heads=4.=2 is not divisible"),
), ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_what_is_not_known_is_refused_by_name(change, named):
    from field_probes import change as set_field

    experiment = Experiment(electra(token_types=2), config(REPLACED))
    experiment.validate()
    for name, value in change.items():
        set_field(experiment, name, value)
    with pytest.raises(ValueError, match=named) as error:
        experiment.validate()
    assert "\n" not in str(error.value)


def test_a_discriminator_alone_has_nothing_to_find_and_no_logits(batch):
    model = Transformer(electra(generator_heads=None, num_layers=1), rngs=nnx.Rngs(0))
    objective = step_checks.train_config("sgd").objective
    with pytest.raises(ValueError, match="model.generator_heads=None"):
        batch_loss(model, batch, None, objective, None)
    with pytest.raises(ValueError, match="model.discriminator=True has no logits"):
        model(batch.tokens_BT)
