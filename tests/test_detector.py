"""Every class is found soon, where it began, with a remedy; a healthy run is left in peace."""

import copy
import itertools
import time

import numpy as np
import pytest
from health_streams import BEGUN, ROWS, batch, findings, stream, settings

from batiste.configs.experiment import Experiment, flatten
from batiste.data import position
from batiste.train import (
    Ledger, MetricsWriter, Monitor, Watched, all_decisions, faulty_batches, parse_fault,
)
from batiste.train.config import TrainConfig
from batiste.train.decisions import (
    Decision, learning_rate_factor, lower, roll_back, skipped, start_of,
)
from batiste.train.detector import Detector
from batiste.train.findings import CAUSES, Finding
from batiste.train.health import CLASSES, parse_policies
from batiste.train.health_statistics import HealthStatistics
from batiste.train.loss_rules import LossRules
from batiste.train.monitor import STUCK

# fault: class, layer, parameter, looks until it is found, what the remedy names.
FAULTS = {
    "nan_gradient:layer=1": ("not_finite", 1, "layers.attention.out_NHD", 0, "learning_rate"),
    "activation:layer=1": ("activation_blow_up", 1, None, 0, "roll_back"),
    "dead_layer:layer=1": ("dead_units", 1, "layers.feed_forward", 3, "activation=swiglu"),
    "frozen:layer=1": ("frozen_layers", 1, None, 3, "multiplier"),
    "no_gradient:layer=1:layers=2": ("frozen_layers", 1, None, 3, "stop_gradient"),
    "shifted_targets": ("wrong_targets", None, None, 0, "input t + 1"),
    "same_batch": ("repeated_batch", None, None, 2, "batch_size"),
    "learning_rate": ("update_ratio", None, None, 0, "learning_rate=0.0001"),
    "garbage": ("data_fault", None, None, 0, "roll_back"),
    "repeated_document": ("data_fault", None, None, 0, "duplicates"),
}


def test_a_healthy_run_is_left_in_peace():
    assert findings(stream(None)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_where_it_is(fault):
    kind, layer, parameter, looks, remedy = FAULTS[fault]
    first, *others = findings(stream(f"{fault}:step={BEGUN}"))
    assert (first.kind, first.layer) == (kind, layer), first.line()
    assert BEGUN <= first.step <= BEGUN + looks, first.line()
    assert (first.parameter or "").startswith(parameter or "")
    assert remedy in first.remedy and first.evidence
    if kind == "frozen_layers":
        last = 2 if "layers=2" in fault else 1
        assert (first.evidence["first layer"], first.evidence["last layer"]) == (1, last)
    if kind == "data_fault":
        assert set(first.examples) == set(range(100 * BEGUN, 100 * BEGUN + ROWS))
    if kind == "not_finite":  # The step was not taken, and nobody can tell from the next one.
        healthy = stream(None)
        assert stream(f"{fault}:step={BEGUN}")[BEGUN]["loss"] == pytest.approx(
            healthy[BEGUN]["loss"], rel=0.05)
    # What follows of it is not said again; a learning rate of a hundred times ruins more than that.
    assert not others or fault == "learning_rate", [finding.line() for finding in others]


def changed(change) -> list[Finding]:
    """What is found in the healthy stream when its records from BEGUN on are changed."""
    records = copy.deepcopy(stream(None))
    for record in records[BEGUN - 1:]:
        change(record, record["step"] - BEGUN)
    return findings(records)


def _ramp(record, since):
    record["loss"] += 0.1 * (since + 1)
    record["row_loss"] = [loss + 0.1 * (since + 1) for loss in record["row_loss"]]


def _scale_gradients(factor, upto):
    def change(record, since):
        for name, norm in record["gradient"].items():
            if isinstance(norm, list):
                norm[:upto + 1] = [factor * value for value in norm[:upto + 1]]
            elif name == "embedding_VD":
                record["gradient"][name] = factor * norm
    return change


def _still(factor):
    """Half of the layers move so little beside the others that it is nothing."""
    def change(record, since):
        for norm in record["update"].values():
            if isinstance(norm, list):
                norm[:2] = [factor * value for value in norm[:2]]
    return change


def _set(name, layer, value):
    def change(record, since):
        record[name][layer] = value
    return change


def _odd_rows(record, since):
    record["row_loss"][2:5] = [30.0] * 3


def _slow(seconds, wait):
    def change(record, since):
        record.update(seconds=seconds, wait=wait)
    return change


CHANGES = {
    "loss_spike": (_ramp, None, 20),
    "gradient_explosion": (_scale_gradients(50.0, upto=1), 1, 0),
    "frozen_layers": (_still(1e-8), 0, 3),
    "vanishing_gradients": (_scale_gradients(1e-6, upto=1), 1, 3),
    "activation_blow_up": (_set("rms", 1, 1e4), 1, 0),
    "dead_units": (_set("dead", 2, 0.9), 2, 3),
    "attention": (_set("entropy", 2, 0.01), 2, 3),
    "attention ": (_set("logit", 0, 500.0), 0, 3),
    "data_fault": (_odd_rows, None, 0),
    "slow_input": (_slow(0.2, 0.18), None, 32),
    "slow_input ": (_slow(0.9, 0.001), None, 32),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_in_the_records_is_found(kind):
    change, layer, looks = CHANGES[kind]
    found = changed(change)
    assert [finding.kind for finding in found] == [kind.strip()]
    assert found[0].layer == layer and BEGUN <= found[0].step <= BEGUN + looks
    if kind == "data_fault":
        assert found[0].examples == tuple(100 * BEGUN + row for row in (2, 3, 4))


@pytest.mark.parametrize("where", ["layers", "embedding_VD"])
def test_a_gradient_27_times_a_restless_median_is_said(where):
    """Norms that go up and down by 1.6: 27 times their median is 7 robust deviations of them."""
    records, random = copy.deepcopy(stream(None)), np.random.default_rng(0)
    for record in records:
        factor = 10 ** (0.2 * random.normal())
        for name, norm in record["gradient"].items():
            record["gradient"][name] = (factor * np.array(norm)).tolist()
    assert findings(records) == []
    once = records[BEGUN - 1]
    for name, norm in once["gradient"].items():
        times = 27 if where == "layers" else 600 * (name == where) or 1
        once["gradient"][name] = (times * np.array(norm)).tolist()
    (found,) = findings(records)
    assert (found.kind, found.step) == ("gradient_explosion", BEGUN)
    assert found.evidence["times the median"] > 20
    assert where == "layers" or found.parameter == where


@pytest.mark.parametrize("spread,begun,step", [
    (0.27, BEGUN, BEGUN + 3),  # 2.2 of 8 experts, and 2 of a token.
    (0.45, BEGUN, None),       # One expert of every token, 4 each of some.
    (0.27, 9, 65),             # Never settled: said when others have.
])
def test_a_router_that_collapses_is_found(spread, begun, step):
    records = copy.deepcopy(stream(None))
    for record in records:
        bad = record["step"] >= begun
        record.update(router_load=[1.2, 3.9 if bad else 1.5], router_idle=[0.0, 0.0],
                      router_spread=[0.9, spread if bad else 0.9])
    found = findings(records, model__num_experts=8, model__experts_per_token=2)
    assert [(each.kind, each.layer, each.step) for each in found] == (
        [("router_collapse", 1, step)] if step else [])


def test_what_one_process_alone_sees_keeps_nothing_quiet():
    """Targets are looked at by each process in its own rows: all must still act alike."""
    records = copy.deepcopy(stream(None))
    for record in records[BEGUN - 1:]:
        _ramp(record, record["step"] - BEGUN)
        record["targets"] = {"next": 0.0, "same": 0.0, "after": 0.0}
    assert stream(None)[-1]["targets"]["next"] == 1.0
    assert [finding.kind for finding in findings(records)] == ["wrong_targets"]
    detector = Detector(settings(), alone=False)
    kinds = [found.kind for record in records for found in detector.observe(record)]
    assert kinds[0] == "wrong_targets" and "loss_spike" in kinds


def test_a_router_with_one_expert_of_every_token_is_left_in_peace():
    """The quickstart with 4 experts and 2 of a token, measured: from step 12 on one expert is among
    the two of nearly every token, and the others share what is left."""
    records = copy.deepcopy(stream(None))
    for record in records:
        uneven = record["step"] >= 12
        record.update(router_load=[1.979 if uneven else 1.2] * 2, router_idle=[0.0] * 2,
                      router_spread=[0.717 if uneven else 0.99] * 2)
    assert findings(records, model__num_experts=4, model__experts_per_token=2) == []


def test_a_plateau_is_found_and_a_slow_fall_is_not():
    random = np.random.default_rng(0)
    noise = 0.1 * random.normal(size=1024)
    for fall, wanted in ((0.0, {"plateau"}), (4e-4, set())):
        rules = LossRules(window=64, total=1024)
        losses = 3 + noise - fall * np.arange(1024)
        found = [symptom.kind for loss in losses
                 for symptom in rules.loss({"loss": loss, "row_loss": [loss] * 4})]
        assert set(found) == wanted


def test_overfitting_is_found_when_training_falls_and_validation_rises():
    for validation, wanted in (((3.0, 3.1, 3.2), ["overfitting"]), ((3.0, 2.9, 2.8), [])):
        rules, found = LossRules(window=64, total=1024), []
        for turn, loss in enumerate(validation):
            for _ in range(10):
                rules.loss({"loss": 3 - 0.2 * turn, "row_loss": [3.0] * 4})
            found += [symptom.kind for symptom in rules.validation(loss)]
        assert found == wanted


def test_what_is_not_finite_has_a_place():
    for name, layer, kind in (("rms", 1, "activation"), ("gradient", 2, "gradient")):
        record = copy.deepcopy(stream(None)[-1])
        for values in ([record["rms"]] if name == "rms" else record["gradient"].values()):
            if isinstance(values, list):
                # Forward, what follows is lost as well; backward, what came before.
                values[layer if name == "rms" else 0: None if name == "rms" else layer + 1] = (
                    [np.nan] * (3 - layer if name == "rms" else layer + 1))
        (found,) = findings([record])
        assert (found.kind, found.layer) == ("not_finite", layer)
        assert found.cause == CAUSES["not_finite"][kind][0]
        assert Finding.from_event(found.event()).layer == layer


def test_every_class_has_a_cause():
    assert tuple(CAUSES) == CLASSES


def test_a_detector_that_looked_before_says_the_same():
    records = stream(f"garbage:step={BEGUN}")
    again = [finding for _ in range(2) for finding in findings(records)]
    assert again[:len(again) // 2] == again[len(again) // 2:]


def test_a_slow_host_is_late():
    numbered = ((number, batch(number)) for number in itertools.count())
    batches = faulty_batches(parse_fault("slow_host:step=2:seconds=0.05"), numbered, 31)
    next(batches)
    started = time.perf_counter()
    next(batches)
    assert time.perf_counter() - started >= 0.05


@pytest.mark.parametrize("text,names", [
    ("nan", "train.faults.*nan_gradient"), ("frozen:layer", "layer"),
    ("dead_layer", "add :layer=0"), ("garbage:when=3", "step, steps"),
])
def test_a_fault_that_is_not_known_is_refused(text, names):
    with pytest.raises(ValueError, match=names):
        parse_fault(text)


def test_policies_are_of_the_classes_that_are_named():
    policies = parse_policies("loss_spike=roll_back, plateau=lower")
    assert tuple(policies) == CLASSES and policies["not_finite"] == "stop"
    assert {kind for kind in CLASSES if policies[kind] == "log"} == {
        *CLASSES} - {"not_finite", "loss_spike", "plateau"}


@pytest.mark.parametrize("text,says", [
    ("loss_spkie=stop", "did you mean 'loss_spike'"), ("plateau=lowr", "plateau.*mean 'lower'"),
    ("plateau", "plateau: expected one of log"), ("plateau=lower,", "got ''"),
    ("dead_units=skip", "after the update"), ("slow_input=stop", "clock"),
])
def test_a_policy_that_cannot_be_is_refused(text, says):
    with pytest.raises(ValueError, match=f"^train.health.policies=.*{says}"):
        parse_policies(text)


def test_positions_pass_by_what_is_skipped_and_nothing_else():
    windows = [(18, 20), (5, 8), (6, 10)]
    kept = [place for place in range(40) if not any(a <= place < b for a, b in windows)]
    assert [position(step, windows) for step in range(len(kept))] == kept
    assert position(7, ()) == 7


def test_decisions_are_functions_of_the_step():
    finding = Finding("loss_spike", 50, None, None, (), {}, "", "")
    how = {"back": 8, "sizes": [[0, 2]]}
    going = roll_back(finding, [20, 40, 45, 49], [], **how)
    assert (going.to, going.skip_records) == (40, (84, 100))
    assert roll_back(finding, [48, 49], [], **how).to == 48
    assert roll_back(finding, [], [], **how) == Decision(
        "roll_back", "loss_spike", 50, 0, (84, 100))
    again = roll_back(finding, [40], [going], **how)
    assert skipped([going, again])[1] == (100, 116)
    # Of batches of two until step 46, then of five.
    changed = roll_back(finding, [40], [], back=8, sizes=[[0, 2], [46, 5]])
    assert changed.skip_records == (84, 92 + 4 * 5)
    with pytest.raises(ValueError, match="rolled back to step 40 3 times"):
        roll_back(finding, [40], [going] * 3, **how)
    slower = lower(finding)
    assert [learning_rate_factor([slower], step) for step in (51, 52)] == [1, 0.5]
    assert start_of(60, [], [going]) == 40 and start_of(60, [going], [going]) == 60
    assert start_of(None, [], [slower]) is None and start_of(30, [], [going]) == 30


def statistics_of_nothing() -> HealthStatistics:
    """Of a model of one parameter, whose gradient is not finite."""
    one = {"norm_D": np.float32(1)}
    of_layers = np.ones(1, np.float32)
    return HealthStatistics({"norm_D": np.float32(np.nan)}, one, one, of_layers, of_layers, None,
                            None, None, None, None, None, np.ones(8, np.float32), np.arange(8))


def test_halving_the_loss_scale_is_no_finding_and_a_scale_that_cannot_be_halved_is(tmp_path):
    """2^24 down to 1 are 24 overflows in a row, and normal; 8 more at 1 are not."""
    config = TrainConfig()
    config.health.every = 1
    notes = []
    settings = flatten(Experiment())
    with Ledger(tmp_path) as ledger:
        monitor = Monitor(config, Watched({"decisions": []}, ledger, settings, notes.append,
                                          lambda step: np.arange(8)))
        writer, scale = MetricsWriter(tmp_path, 0), config.loss_scale.maximum
        for step, _ in enumerate(monitor.inspect(itertools.repeat(batch(0), 99)), start=1):
            metrics = {"loss": 4.0, "gradient_norm": np.inf, "learning_rate": 1e-3, "skipped": 1.0,
                       "loss_scale": scale}
            try:
                monitor.look(writer, step, statistics_of_nothing(), metrics)
            except ValueError as error:
                assert f"{STUCK} steps in a row, up to step {24 + STUCK}," in str(error)
                break
            scale = max(scale / 2, config.loss_scale.minimum)
        writer.close()
    assert step == 24 + STUCK and not notes


def test_decisions_survive_a_ledger_of_which_lines_are_gone():
    first, second, third = (
        Decision("roll_back", "loss_spike", step, 0, (step, step + 8)) for step in (10, 20, 30))
    assert all_decisions([first, second], [first, second, third]) == [first, second, third]
    assert all_decisions([first, second], []) == [first, second]
    assert all_decisions([first, second], [second, third]) == [first, second, third]


def test_rows_of_another_batch_size_are_compared_with_those_before():
    rules = LossRules(24, 100)
    def record(rows, loss):
        return {"row_loss": [loss + 0.01 * row for row in range(rows)],
                "row_checksum": list(range(rows)), "loss": loss, "step": 1}

    for _ in range(20):
        assert rules.rows(record(8, 4.0)) == [] and rules.loss(record(8, 4.0)) == []
    for _ in range(3):
        assert rules.rows(record(16, 4.0)) == [] and rules.loss(record(16, 4.0)) == []
    (found,) = rules.rows(record(16, 9.0))
    assert found.kind == "data_fault" and len(found.rows) == 16
