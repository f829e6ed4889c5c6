"""Health lines are thinned out, and a continued run decides as if they had not been."""

import json

import numpy as np
import pytest
from health_streams import settings

from batiste.train import TrainConfig
from batiste.train.findings import Finding
from batiste.train.ledger import Ledger
from batiste.train.metrics import MetricsWriter, _encode, read_all
from batiste.train.monitor import Monitor, Watched
from batiste.train.thinning import EVENLY, EVERY, is_thinned, kept_whole, thin

WINDOW, LOOKS, SAVED = 16, 300, (70, 200)
LOOK_BACK = Monitor.look_back(WINDOW)


def look(step, layers=3):
    """A noisy look of a healthy run; loud ones at some steps."""
    random = np.random.default_rng(step)
    loud = 100.0 if step in (40, 201, 290) else 1.0

    def by_layer():
        return [float(f"{each:.4g}") for each in np.exp(0.1 * random.normal(size=layers))]

    norms = {"embedding_VD": 1.5} | {
        f"layers.{name}": by_layer() for name in (
            "attention.key_DKH", "attention.norm.scale_D", "attention.out_NHD",
            "attention.query_DNH", "attention.value_DKH", "feed_forward.down_FD",
            "feed_forward.gate_DF", "feed_forward.norm.scale_D", "feed_forward.up_DF")}
    loud_norms = {name: [loud * each for each in norm] if isinstance(norm, list) else norm
                  for name, norm in norms.items()}
    rows = [float(f"{each:.4g}") for each in 3 + 0.1 * random.normal(size=8)]
    return {"loss": float(np.mean(rows)) - 0.002 * step, "gradient_norm": loud, "learning_rate": 0.1,
            "seconds": 0.1, "wait": 0.001, "gradient": loud_norms, "parameter": norms,
            "update": {name: [0.01 * each for each in norm] if isinstance(norm, list) else 0.01
                       for name, norm in norms.items()},
            "rms": by_layer(), "largest": by_layer(), "row_loss": rows,
            "row_checksum": random.integers(0, 2**24, 8).tolist()}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with two checkpoints and a finding at step 40, whose lines are all whole."""
    folder = tmp_path_factory.mktemp("run")
    for step in SAVED:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    with Ledger(folder) as ledger:
        ledger.begin()
        ledger.write("finding", **Finding("loss_spike", 40, None, None, (), {}, "", "").event())
        ledger.close("done")
    writer = MetricsWriter(folder, 0)
    for step in range(1, LOOKS + 1):
        writer.write(step, loss=1.0)
        writer.write_health(step, look(step))
    writer.close()
    return folder


def findings_after(workdir, step):
    """What is found in the steps after a checkpoint by a run that is continued there."""
    config = TrainConfig(num_steps=LOOKS)
    config.health.window = WINDOW
    said = []
    flat = settings(**{"train__health__window": WINDOW, "train__num_steps": LOOKS})
    with Ledger(None) as ledger:
        monitor = Monitor(config, Watched({"decisions": []}, ledger, flat, said.append, lambda _: ()))
        monitor.remember(workdir, step)
        noted = list(said)
        found = [finding.line() for after in range(step + 1, step + 31)
                 for finding in monitor._detector.observe({"step": after, **look(after)})]
    return noted, found


def test_a_continued_run_decides_as_with_every_line(workdir, monkeypatch):
    monkeypatch.setattr("batiste.train.thinning.EVENLY", 16)
    path = workdir / "metrics.jsonl"
    whole = path.read_bytes()
    before = {step: findings_after(workdir, step) for step in (*SAVED, LOOKS, 120)}
    assert "gradient_explosion at step 201" in before[200][1][0]
    thin(path, LOOK_BACK)
    after = {step: findings_after(workdir, step) for step in before}
    assert [after[step] for step in (*SAVED, LOOKS)] == [
        before[step] for step in (*SAVED, LOOKS)]
    # A step that has no checkpoint is where nothing was to be continued: it is said.
    assert not before[120][0] and "only the loss was kept" in after[120][0][0]
    records = read_all(workdir)
    path.write_bytes(whole)
    looks = [record for record in records if record["kind"] == "health"]
    assert [record["step"] for record in looks] == list(range(1, LOOKS + 1))
    assert [record["loss"] for record in looks] == [look(step)["loss"] for step in range(1, LOOKS + 1)]
    kept = {record["step"] for record in looks if not is_thinned(record)}
    assert kept >= {*range(70 - LOOK_BACK + 1, 71), *range(200 - LOOK_BACK + 1, 201),
                    *range(LOOKS - LOOK_BACK + 1, LOOKS + 1), *range(9, 72)}
    assert len(kept) < 260 and min(kept) == 1
    assert sum(record["kind"] == "train" for record in records) == LOOKS


def test_a_longer_run_keeps_some_of_those_that_were_kept():
    steps = list(range(1, 5 * EVENLY))
    kept = kept_whole(steps, [], [], LOOK_BACK)
    assert EVENLY / 2 <= len(kept) <= EVENLY
    for shorter in range(1, 5):
        assert kept_whole(steps[:shorter * EVENLY], [], [], LOOK_BACK) >= {
            number for number in kept if number < shorter * EVENLY}


def test_the_writer_thins_as_it_goes_and_after_it_was_continued(tmp_path, monkeypatch):
    for name in ("batiste.train.metrics.EVERY", "batiste.train.thinning.EVENLY"):
        monkeypatch.setattr(name, 64)
    for start, stop in ((0, 100), (100, 260)):
        writer = MetricsWriter(tmp_path, start, look_back=8)
        for step in range(start + 1, stop + 1):
            writer.write_health(step, look(step))
        writer.close()
    looks = read_all(tmp_path)
    assert len(looks) == 260 and 64 <= sum(not is_thinned(each) for each in looks) < 160
    thin(tmp_path / "metrics.jsonl", 8)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    thin(tmp_path / "metrics.jsonl", 8)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before, "thinning twice changes nothing"


def test_a_hundred_thousand_steps_of_32_layers_are_below_200_MB():
    """From the sizes of real lines, with as many as are ever whole between two rewritings."""
    whole = len(_encode({"step": 100_000, "kind": "health", **look(1, layers=32)}))
    short = len(json.dumps({"step": 100_000, "kind": "health", "loss": 3.0123456789012345}))
    train = len(_encode({"step": 100_000, "kind": "train", **dict.fromkeys(
        ("loss", "cross_entropy", "gradient_norm", "learning_rate", "tokens", "tokens_per_second",
         "mfu"), 3.0123456789012345)}))
    assert whole > 7_000
    most = EVENLY + EVERY + 2 * 64 * 10 + 4 * Monitor.look_back(64)  # 10 findings, 3 checkpoints.
    assert most * max(whole, 20_000) + 100_000 * (short + train) < 200e6


def test_a_full_disk_leaves_the_long_file(workdir, monkeypatch):
    path = workdir / "metrics.jsonl"
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("batiste.train.thinning.os.fsync", full)
    thin(path, LOOK_BACK)
    assert path.read_bytes() == before and not path.with_suffix(".tmp").exists()
