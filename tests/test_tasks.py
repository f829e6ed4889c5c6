"""The laws of tasks: what heads learn, what sums, what is left alone, what is refused."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_cases import (
    HEADS, PAIRS, READER, assert_close, examples, given, letters, make_task, run_steps, task_config,
)

from batiste.sharding import MeshConfig
from batiste.tasks import Example, HeadConfig, Task, read_examples, tune
from batiste.tasks.baselines import bag_of_words, majority
from batiste.tasks.config import KINDS
from batiste.tasks.examples import check_examples, class_weights
from batiste.tasks.heads import pooled
from batiste.tasks.losses import class_losses, contrastive, multilabel_losses, span_losses
from batiste.tasks.metrics import (
    answer_metrics, best_span, class_metrics, multilabel_metrics, similarity_metrics,
)
from batiste.tasks.rows import Labels, Rows, encode


@pytest.fixture(scope="module")
def learned():
    """Four heads at once, trained; the task, its parameters, its metrics."""
    task = make_task(task_config())
    state, _ = run_steps(task, task.config.num_steps)
    return task, state.params, task.measure(state.params)


def test_heads_that_are_trained_together_all_beat_saying_nothing_of_the_text(learned):
    _, _, metrics = learned
    alone = majority(HEADS[0], examples(96, 1), examples(48, 2))
    assert metrics["letter"]["accuracy"] > 0.9 > 0.7 > alone["accuracy"]
    assert metrics["letter"]["f1_macro"] > 0.9 > 0.4 > alone["f1_macro"]
    assert metrics["letter"]["roc_auc"] > 0.95 and alone["roc_auc"] == 0.5
    assert metrics["has"]["exact_match"] > 0.8
    assert metrics["case"]["accuracy"] > 0.95
    assert metrics["number"]["exact_match"] > 0.6 and metrics["number"]["f1"] > 0.6


@pytest.mark.slow
def test_texts_that_belong_together_are_found():
    task = make_task(task_config(heads=PAIRS))
    before = task.measure(task.begin().params)["same"]
    state, _ = run_steps(task, 60)
    after = task.measure(state.params)["same"]
    assert before["retrieval"] < 0.4
    assert after["roc_auc"] > 0.95 and after["retrieval"] > before["retrieval"]


def test_padding_changes_nothing_that_a_head_says(learned):
    task, params, _ = learned
    longer = make_task(task_config(max_length=40))
    said, wide = (each.answers(params) for each in (task, longer))
    for name in ("letter", "has"):
        assert_close(said.said[name], wide.said[name], 1e-5)
    real = task.validation.batch.rows.segments_BT > 0
    for name in ("case", "number"):
        assert_close(said.said[name][real], wide.said[name][:, :36][real], 1e-5)
    for name, loss in said.losses.items():
        assert wide.losses[name] == pytest.approx(loss, abs=1e-5)


def test_an_answer_lies_in_the_context(learned):
    task, params, _ = learned
    texts = [Example("ba 12", "du 34 ka", {"number": [[3, 5]]}), *examples(20, 3)]
    task = make_task(task.config, validation=texts)
    logits_BTY, context_BT = (task.answers(params).said["number"],
                              task.validation.batch.rows.context_BT)
    for logits_TY, read, context_T in zip(
            logits_BTY, task.validation.reads, context_BT, strict=True):
        first, last = best_span(logits_TY, 4)
        assert context_T[first] and context_T[last] and first <= last < first + 4
        assert context_T.sum() == sum(side == max(read.sides) for side in read.sides)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_are_one_batch_with_labels_here_and_there(accumulation):
    def once(k):
        config = task_config(accumulation=k)
        config.optimizer.kind, config.optimizer.clip_norm = "sgd", None
        config.schedule.warmup_steps = 0
        state, metrics = run_steps(make_task(config), 1)
        return state.params, metrics

    (whole, losses), (split, again) = once(1), once(accumulation)
    assert_close(whole, split, 1e-5)
    assert_close(losses, again, 1e-5)
    parts = [head.weight * losses[f"loss_{head.name}"] for head in HEADS]
    assert losses["loss"] == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("heads,mesh", [
    (HEADS, MeshConfig(data=4, tensor=2, zero=3)), (HEADS, MeshConfig(data=8, zero=1)),
    (PAIRS, MeshConfig(data=8)),
])
def test_sharded_is_unsharded(heads, mesh):
    def three(layout, devices):
        config = task_config(heads=heads, mesh=layout)
        config.optimizer.kind, config.optimizer.clip_norm = "sgd", None
        state, metrics = run_steps(make_task(config, devices=devices), 3)
        return jax.device_get(state.params), metrics

    alone, many = three(MeshConfig(data=1), 1), three(mesh, 8)
    assert_close(alone, many, 1e-5)


def test_the_batch_is_split_over_data():
    task = make_task(task_config(mesh=MeshConfig(data=8, zero=3)), devices=8)
    rows = next(task.batches(0)).rows.tokens_BT
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 36)}
    weight = task.program.abstract_state.params["head_letter"]["weight_DY"]
    assert weight.sharding.shard_shape(weight.shape) == (3, 3)


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch):
    config = task_config(heads=HEADS[:1], num_steps=6, dropout=0.2, mesh=MeshConfig(data=8))
    config.schedule.warmup_steps, config.evaluation.every = 2, 3
    toys = given(letters(40, 1), letters(16, 2))
    fields = {"seed": config.seed}
    whole = tune(config, toys, tmp_path / "whole", fields)
    batches = Task.batches

    def stopping(self, start):
        for step, batch in zip(itertools.count(start + 1), batches(self, start)):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(Task, "batches", stopping)
        first = tune(config, toys, tmp_path / "cut", fields)
    assert (first.reason, first.step, first.metrics) == ("SIGTERM", 3, {})
    second = tune(config, toys, tmp_path / "cut", fields)
    assert (second.reason, second.step) == ("done", 6)
    assert second.metrics == whole.metrics
    for one, other in zip(
            jax.tree.leaves(whole.params), jax.tree.leaves(second.params), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        tune(config, toys, tmp_path / "cut", {"seed": 1})
    with pytest.raises(ValueError, match="examples was"):
        tune(config, given(letters(40, 9), letters(16, 2)), tmp_path / "cut", fields)


def test_the_order_of_examples_is_a_function_of_the_step():
    task = make_task(task_config())
    run = np.stack(list(itertools.islice(task.indices(0), 12)))
    np.testing.assert_array_equal(next(task.indices(7)), run[7])
    for epoch in (run[:6], run[6:]):
        np.testing.assert_array_equal(np.sort(epoch.reshape(-1)), np.arange(96))
    assert (run[:6] != run[6:]).any()
    other = make_task(task_config(seed=1))
    assert (next(other.indices(0)) != run[0]).any()


def test_balanced_sampling_draws_every_class_equally_often():
    task = make_task(task_config(balanced="letter", batch_size=18))
    drawn = np.concatenate(list(itertools.islice(task.indices(0), 20)))
    labels = np.array(["aeo".index(example.labels["letter"]) for example in examples(96, 1)])
    counts, there = np.bincount(labels[drawn]), np.bincount(labels)
    assert there.max() > 2 * there.min() and counts.max() - counts.min() <= 2
    rare = drawn[labels[drawn] == there.argmin()][: there.min()]
    assert len(set(rare)) == there.min()  # Each once before any comes again.
    np.testing.assert_array_equal(next(task.indices(11)), drawn[11 * 18:12 * 18])


def test_losses_are_what_their_formulas_say():
    logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
    labels = Labels(jnp.array([0, 2]), jnp.ones(2))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p = np.array([p[0, 0], p[1, 2]])
    np.testing.assert_allclose(class_losses(logits, labels, None, 0.0), -np.log(p), rtol=1e-5)
    np.testing.assert_allclose(
        class_losses(logits, labels, (3.0, 1.0, 0.5), 2.0),
        -np.array([3.0, 0.5]) * (1 - p) ** 2 * np.log(p), rtol=1e-5)
    told = Labels(jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), jnp.ones(2))
    q = 1 / (1 + np.exp(-np.array(logits)))
    q = np.where(told.values > 0, q, 1 - q)
    np.testing.assert_allclose(
        multilabel_losses(logits, told, 1.5), (-(1 - q) ** 1.5 * np.log(q)).mean(1), rtol=1e-5)
    spans = jnp.array([[[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]]])
    found = span_losses(spans, Labels(jnp.array([[1, 2]]), jnp.ones(1)))
    both = [np.log(np.exp(spans[0, :, side]).sum()) - spans[0, place, side]
            for side, place in ((0, 1), (1, 2))]
    np.testing.assert_allclose(found, [np.mean(both)], rtol=1e-5)


def test_a_text_is_looked_for_among_the_second_texts_that_there_are():
    x_B2D = jnp.array(
        [[[1.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [0.0, 1.0]], [[0.6, 0.8], [0.0, 0.0]]])
    there = jnp.array([True, True, False])
    losses = contrastive(x_B2D, there, 0.5)
    logits = np.array([[0.6, 0.0], [0.8, 1.0]]) / 0.5
    expected = [np.log(np.exp(row).sum()) - row[index] for index, row in enumerate(logits)]
    np.testing.assert_allclose(losses[:2], expected, rtol=1e-5)


def test_dropout_is_of_training_alone_and_bfloat16_of_the_computation():
    alone = make_task(task_config(heads=HEADS[:1]), letters(16, 1), letters(16, 1))
    state = alone.begin()
    exact = alone.answers(state.params)
    noisy = make_task(task_config(heads=HEADS[:1], dropout=0.5, dtype="bfloat16"),
                      letters(16, 1), letters(16, 1))
    said = noisy.answers(state.params)
    gap = np.abs(said.said["letter"] - exact.said["letter"]).max()
    assert said.said["letter"].dtype == np.float32 and 1e-5 < gap < 0.05
    batch = next(noisy.batches(0))  # All sixteen, in another order.
    _, trained = noisy.train_step(noisy.begin(), batch)
    assert said.losses["letter"] == pytest.approx(exact.losses["letter"], abs=2e-3)
    assert abs(float(trained["loss"]) - exact.losses["letter"]) > 4e-3


def test_what_has_no_label_counts_nothing(learned):
    task, params, _ = learned
    losses = task.answers(params).losses
    for name in ("has", "case", "number"):
        labelled = [each for each in examples(48, 2) if name in each.labels]
        assert len(labelled) < 48
        alone = make_task(task.config, validation=labelled).answers(params)
        assert alone.losses[name] == pytest.approx(losses[name], rel=1e-4)


def test_a_row_is_its_first_its_last_or_the_mean_of_its_real_tokens():
    x_BTD = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)
    segments_BT = jnp.array([[1, 1, 0], [1, 1, 1]])
    rows = Rows(segments_BT, segments_BT, segments_BT, segments_BT)
    for how, expected in (("first", x_BTD[:, 0]), ("last", x_BTD[(0, 1), (1, 2)]),
                          ("mean", jnp.stack([x_BTD[0, :2].mean(0), x_BTD[1].mean(0)]))):
        np.testing.assert_array_equal(pooled(x_BTD, rows, how), expected)


def test_class_weights_balance():
    head = HeadConfig("x", classes=("p", "q"), balanced_loss=True)
    toys = [Example("", None, {"x": name}) for name in "pppq"]
    assert class_weights(head, toys) == (4 / (2 * 3), 4 / (2 * 1))
    with pytest.raises(ValueError, match="no training example of class 'q'"):
        class_weights(head, toys[:3])


def test_metrics_are_what_hand_and_paper_say():
    told = np.array([0, 0, 0, 1, 1, 2])
    said = np.array([0, 0, 1, 1, 0, 0])
    logits_BY = np.log(np.eye(3)[said] * 0.8 + 0.1)
    found = class_metrics(told, logits_BY)
    assert found["accuracy"] == found["f1_micro"] == 0.5
    # Class 0: 2 of 4 said, 2 of 3 told; class 1: 1 of 2, 1 of 2; class 2: never said.
    assert found["precision_macro"] == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    assert found["recall_macro"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["f1_macro"] == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    # Of pairs of one told and one not told, the share in which the first has the larger score.
    areas = [4.5 / 9, 5 / 8, 2.5 / 5]
    assert found["roc_auc"] == pytest.approx(np.mean(areas))
    logits_BY[0] = np.nan
    assert class_metrics(told, logits_BY)["accuracy"] == pytest.approx(2 / 6)
    several = multilabel_metrics(
        np.array([[True, False], [True, True]]), np.array([[1.0, -2.0], [1.0, -1.0]]))
    assert several["exact_match"] == 0.5 and several["recall_micro"] == pytest.approx(2 / 3)
    answers = answer_metrics(["The cat!", "a big dog", ""], [["cat"], ["dog", "no"], ["x"]])
    assert answers["exact_match"] == pytest.approx(1 / 3)
    assert answers["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    x_B2D = np.array([[[1, 0], [1, 0]], [[0, 1], [0, 1]], [[1, 0], [0, 1]]], np.float32)
    found = similarity_metrics(x_B2D, np.array([True, True, False]))
    assert found == {"examples": 3, "retrieval": 1.0, "roc_auc": 1.0}


def test_the_best_span_is_the_best_of_all_that_may_be():
    draw = np.random.default_rng(0)
    for longest in (1, 3, 9):
        logits_TY = draw.normal(size=(9, 2))
        may = [(first, last) for first in range(9)
               for last in range(first, min(9, first + longest))]
        best = max(may, key=lambda span: logits_TY[span[0], 0] + logits_TY[span[1], 1])
        assert best_span(logits_TY, longest) == best


def test_a_bag_of_words_knows_what_words_know():
    head = HeadConfig("kind", classes=("fruit", "tool"))
    words = {"fruit": ("apple", "pear"), "tool": ("hammer", "saw")}
    toys = [Example(f"{name} {number}", None, {"kind": kind})
            for kind, names in words.items() for name in names for number in range(6)]
    assert bag_of_words(head, toys, toys)["accuracy"] == 1.0
    assert majority(head, toys[:13], toys)["accuracy"] == 0.5


REFUSED = [
    ({"heads": ()}, "heads: expected at least one"),
    ({"heads": (HeadConfig(kind="tag", classes=("a", "b")),)}, r"heads\[0\].kind: .*did you mean"),
    ({"heads": (HeadConfig(classes=("a",)),)}, r"heads\[0\].classes: kind sequence has at least 2"),
    ({"heads": (HeadConfig(classes=("a", "a")),)}, "names that differ"),
    ({"heads": HEADS[:1] * 2}, "heads: expected names that differ, got letter, letter"),
    ({"heads": (dataclasses.replace(HEADS[0], weight=0.0),)}, r"heads\[0\].weight=0.0"),
    ({"heads": (dataclasses.replace(HEADS[0], focal=-1.0),)}, "focal=-1.0: expected gamma >= 0"),
    ({"heads": (dataclasses.replace(HEADS[0], class_weights=(1.0,) * 3),)}, "leave one of the two"),
    ({"heads": (HeadConfig(classes=("a", "b"), class_weights=(1.0,)),)}, "expected 2 numbers"),
    ({"heads": (dataclasses.replace(HEADS[3], focal=2.0),)}, "only kind sequence or multilabel"),
    ({"heads": (HEADS[3], PAIRS[0])}, "reads two texts apart"),
    ({"heads": PAIRS, "accumulation": 2}, "accumulation=2: the loss of 'similarity'"),
    ({"balanced": "case"}, "balanced: expected one of letter, got 'case'"),
    ({"dropout": 1.0}, "dropout=1.0"), ({"dtype": "float16"}, "dtype: expected one of"),
    ({"mesh": MeshConfig(data=1, stage=2)}, "mesh.stage=2"),
    ({"num_steps": 5}, "schedule.warmup_steps: expected at most the run's 5"),
    ({"batch_size": 0}, "^batch_size=0: expected a positive number"),
    ({"max_length": 2}, "max_length=2"),
    ({"max_length": 64}, "max_length=64: .* at most 40"),
]


@pytest.mark.parametrize("change,message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_is_refused_in_one_line_that_names_the_field(change, message):
    with pytest.raises(ValueError, match=message) as error:
        make_task(task_config(**change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label,message", [
    ({"letter": "u"}, r"train_data\[0\].labels\['letter'\]='u': expected one of its classes"),
    ({"kind": "a"}, "'kind' is none of the heads letter, has, case, number"),
    ({"case": ["lower"]}, "for each word between white space"),
    ({"number": [[3, 99]]}, "in characters"),
])
def test_a_label_that_its_head_cannot_read_is_refused(label, message):
    with pytest.raises(ValueError, match=message):
        make_task(task_config(), [Example("ba 12", None, label), *examples(20, 0)])


def test_a_task_has_the_loop_of_all_training():
    config = task_config(patience=3, seed=7, accumulation=2)
    config.evaluation.max_batches = 5
    train = config.train
    assert (train.stop.patience, train.seed, train.accumulation) == (3, 7, 2)
    assert train.evaluation.max_batches == 5 and not train.measures


def test_examples_come_from_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "labels": {"x": "p"}}\n\n{"text": "b", "text_pair": "c"}\n')
    assert read_examples(path) == [Example("a", None, {"x": "p"}), Example("b", "c", {})]
    path.write_text('{"text": "a"}\n{"texts": "a"}\n')
    with pytest.raises(ValueError, match="x.jsonl:2: expected"):
        read_examples(path)


def test_what_the_page_shows_is_accepted():
    page = (pathlib.Path(__file__).parents[1] / "docs/tasks.md").read_text()
    code = next(each for each in re.findall(r"```python\n(.*?)```", page, re.S)
                if "get_config" in each)
    made = {}
    exec(code, made)
    config = made["get_config"]()
    config.validate_on(1)
    answer = HeadConfig("answer", "span")
    lines = re.findall(r"```json\n(.*?)```", page, re.S)[0].splitlines()
    shown = [Example(**json.loads(line)) for line in lines]
    whole = dataclasses.replace(config, heads=(*config.heads, answer), balanced=None)
    check_examples(whole, shown, "train_data")
    (start, end), = shown[1].labels["answer"]
    assert shown[1].context[start:end] == "Ada Lovelace"
    assert set(re.findall(r"^\| `(\w+)` ", page, re.M)) == set(KINDS)


def test_rows_point_back_into_the_text():
    text, pair = "né 12", "où 34 k"
    read = READER.read(text, pair, 30, False)
    for token, side, (start, end) in zip(read.tokens, read.sides, read.spans, strict=True):
        if side:
            assert bytes([token - 2]) in (text, pair)[side - 1][start:end].encode()
    cut = READER.read(text, pair, 10, True)
    assert len(cut.tokens) == 10 and cut.tokens[:7] == read.tokens[:7]
    with pytest.raises(ValueError, match="max_length=7 has no room beside the first text"):
        READER.read(text, pair, 7, True)
    answers = (Example(text, pair, {"number": [[3, 5]]}), Example(text, pair, {"number": [[6, 7]]}),
               Example(text, pair, {"number": [[3, 7]]}))
    config = task_config(heads=(HEADS[3],), max_length=15)
    encoded = encode(config, answers, READER)
    labels = encoded.batch.labels["number"]
    assert labels.weights.tolist() == [1, 0, 0]  # The second was cut off, the third in part.
    first, last = labels.values[0]
    spans = encoded.reads[0].spans
    assert pair[spans[first][0]:spans[last][1]] == "34"
