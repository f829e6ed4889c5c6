"""What a run writes down: metrics.jsonl, TensorBoard events, progress and the report."""

import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from batiste.train import progress as progress_module
from batiste.train.ledger import Ledger, read_ledger
from batiste.train.metrics import MetricsWriter, read_metrics
from batiste.train.progress import Progress, duration, mfu_formula_line
from batiste.train.samples import write_samples
from batiste.train.report import ReportFacts, smoothed, write_report


def write_run(workdir, steps_done, last_step, offset=0.0):
    writer = MetricsWriter(workdir, steps_done)
    for step in range(steps_done + 1, last_step + 1):
        writer.write(step, loss=10.0 - step + offset)
    writer.write(last_step, kind="validation", loss=9.5)
    writer.close()


def tensorboard_events(workdir):
    """Reads TFRecord files: a length of 8 bytes, its checksum of 4, the event, its checksum."""
    events = []
    files = (workdir / "tensorboard").iterdir()
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            end = 12 + int.from_bytes(data[:8], "little")
            events.append(event_pb2.Event.FromString(data[12:end]))
            data = data[end + 4:]
    return events


def test_what_is_written_is_read_back(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(3, loss=2.5, tokens_per_second=1000)
    assert read_metrics(tmp_path) == [  # before close: every record is flushed
        {"step": 3, "kind": "train", "loss": 2.5, "tokens_per_second": 1000.0}]
    with pytest.raises(ValueError, match="train or validation, got 'test'"):
        writer.write(3, kind="test", loss=1.0)
    writer.close()


def test_a_diverged_run_is_strict_json_and_reads_back(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(0, a=math.nan, b=math.inf, c=-math.inf)
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["a"] == "nan"
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf
    write_run(tmp_path, 1, 2)  # a resume rewrites the record without changing it
    assert (tmp_path / "metrics.jsonl").read_text().startswith(line)


def test_resuming_replaces_the_steps_that_are_computed_again(tmp_path):
    write_run(tmp_path, 0, 8)
    write_run(tmp_path, 5, 9, offset=100.0)
    records = [r for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, 10))
    assert [r["loss"] > 100 for r in records] == [False] * 5 + [True] * 4
    validation = [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "validation"]
    assert validation == [9]  # that of step 8 belonged to the abandoned steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_tensorboard_gets_the_values_and_hides_the_abandoned_steps(tmp_path):
    write_run(tmp_path, 0, 4)
    write_run(tmp_path, 2, 3)
    events = tensorboard_events(tmp_path)
    scalars = [(event.step, value.tag) for event in events for value in event.summary.value]
    assert (3, "train/loss") in scalars and (3, "validation/loss") in scalars
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [1, 3]


@pytest.mark.parametrize("torn", [b'{"step": 3, "kin', b'{"step": 3, "kind": "train"}', b"\xff"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write_run(tmp_path, 0, 3)
    whole = read_metrics(tmp_path)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert read_metrics(tmp_path) == whole
    write_run(tmp_path, 3, 4)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"step": 1}',
                                  b'{"step":1,"kind":"train","x":[]}'])
def test_a_broken_line_elsewhere_is_an_error_that_says_where(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "kind": "train"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a JSON object"):
        read_metrics(tmp_path)


def test_a_killed_process_leaves_every_record_it_had_written(tmp_path):
    program = textwrap.dedent("""
        import sys
        from batiste.train.metrics import MetricsWriter
        writer = MetricsWriter(sys.argv[1], 0)
        for step in range(10**9):
            writer.write(step, loss=float(step))
            if step == 100:
                print("ready", flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)],
                               stdout=subprocess.PIPE, env={**os.environ})
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [r["step"] for r in read_metrics(tmp_path)]
    assert steps == list(range(len(steps))) and len(steps) > 100


def test_a_full_disk_ends_nothing_and_what_it_did_not_take_comes_later(tmp_path):
    """A limit on the size of a file stands for the disk; the second record would fit in part."""
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    line = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(line) + 9, limit[1]))
        for step in range(2, 40):  # More than any buffer or queue of TensorBoard's holds.
            writer.write(step, loss=float(step))
        assert path.read_bytes() == line
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    writer.write(40, loss=40.0)
    writer.close()
    assert [record["loss"] for record in read_metrics(tmp_path)] == list(range(1, 41))
    scalars = [event.step for event in tensorboard_events(tmp_path) if event.summary.value]
    assert scalars[-1] == 40 and len(scalars) < 40


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: Clock.now)
    return Clock


def progress(stream, peak_flops=1e12):
    return Progress(1000, flops_per_token=1e7, peak_flops=peak_flops,
                    stream=stream)


def test_progress_rates_leave_out_the_first_step(clock):
    bar = progress(io.StringIO())
    assert bar.tokens_per_second is None
    clock.now += 300  # compilation
    bar.update(401, 3.0, 512)
    assert bar.tokens_per_second is None and bar.mfu is None
    for step in range(402, 412):
        clock.now += 0.5
        bar.update(step, 3.0, 512)
    assert bar.steps_per_second == pytest.approx(2.0)
    assert bar.tokens_per_second == pytest.approx(1024)
    assert bar.mfu == pytest.approx(1024 * 1e7 / 1e12)


def test_progress_on_a_terminal_rewrites_one_line(clock):
    stream = Terminal()
    bar = progress(stream)
    for step in (500, 501):
        bar.update(step, 3.25, 512)
        clock.now += 0.5
    bar.close()
    assert stream.getvalue() == (
        "\rstep 500/1,000  loss 3.2500\x1b[K"
        "\rstep 501/1,000  loss 3.2500  1,024 tokens/s  MFU 1.0%  4 min 09 s left\x1b[K\n")


def test_progress_in_a_log_is_a_plain_line_now_and_then_and_at_the_end(clock):
    stream = io.StringIO()
    bar = progress(stream, peak_flops=None)
    for step in range(971, 1001):
        bar.update(step, 3.0, 512)
        clock.now += 1
    bar.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [
        "971/1,000", "981/1,000", "991/1,000", "1,000/1,000"]
    assert lines[1] == "step 981/1,000  loss 3.0000  512 tokens/s  19 s left"  # no peak: no MFU
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_the_mfu_line_gives_the_formula_or_says_why_there_is_none():
    assert mfu_formula_line(8.6e7, 4.59e14) == (
        "MFU = tokens/s × training FLOPs per token / peak FLOP/s = tokens/s × 8.6e+07 / 4.59e+14")
    assert mfu_formula_line(8.6e7, None) == (
        "MFU is left out: the peak FLOP/s of this device is unknown "
        "(8.6e+07 training FLOPs per token)")


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (7505, "2 h 05 min"), (356400, "4 d 03 h")])
def test_a_duration_reads_in_two_units(seconds, text):
    assert duration(seconds) == text


def facts(**fields):
    return ReportFacts(**{
        "name": "quickstart", "parameters": 1234567, "tokens": 8192000, "device": "cpu",
        "config": {"model.num_layers": 3}, "seconds_by_phase": {"compile": 20.0, "train": 180.0},
        "samples": [("def ", "f():\n    return ```1```")], **fields})


def test_the_report_holds_the_best_validation_and_both_coders(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(40):
        writer.write(step, loss=8.0 / (1 + step), gradient_norm=1.0)
    for step, loss in ((10, 1.5), (20, 1.25), (30, 1.75)):
        writer.write(step, kind="validation", loss=loss)
    writer.close()
    text = write_report(tmp_path, facts(bits_per_byte=1.0625, standard_error=0.02,
                                        xz_concatenated=1.586)).read_text()
    for expected in ("# quickstart", "**1.2500** nats per token (step 20)", "1,234,567 parameters",
                     "![Training and validation loss over steps](loss.png)",
                     "| this model | 1.062 ± 0.020 |", "in one file | 1.586 |",
                     "| train | 180.0 | 90.0% |", "3 min 20 s in all", "| `model.num_layers` | `3` |",
                     "| optax | ", "````text\nf():\n    return ```1```\n````"):
        assert expected in text, expected
    assert "each document" not in text and "| libtpu | None" not in text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_of_a_diverged_run_without_measurements_is_still_written(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step, loss in enumerate((3.0, math.nan, math.inf)):
        writer.write(step, loss=loss)
    for step, loss in enumerate((math.nan, 4.0)):
        writer.write(step, kind="validation", loss=loss)
    writer.close()
    text = write_report(tmp_path, facts(samples=[], seconds_by_phase={})).read_text()
    assert "**4.0000** nats per token (step 1)" in text
    assert "Bits per byte" not in text and "Samples" not in text and "## Config" in text


def test_the_report_refuses_a_folder_without_a_training_loss(tmp_path):
    with pytest.raises(ValueError, match="training records with a loss.*got none"):
        write_report(tmp_path, facts())


def test_smoothing_follows_a_line_to_both_ends_and_damps_noise():
    line = np.linspace(9.0, 2.0, 500)
    np.testing.assert_allclose(smoothed(tuple(line)), line)
    noisy = smoothed(tuple(line + np.where(np.arange(500) % 2, 1.0, -1.0)))
    assert np.abs(noisy - line)[10:-10].max() < 0.1
    losses = [4.0] * 100
    losses[40:42] = math.nan, math.inf  # what was skipped breaks nothing after it
    np.testing.assert_allclose(smoothed(tuple(losses)), 4.0)
    np.testing.assert_array_equal(smoothed((math.nan, 1.0)), [math.nan, 1.0])


def test_a_note_stays_between_the_states_of_the_run():
    for stream, erase in ((io.StringIO(), ""), (Terminal(), "\r\x1b[K")):
        progress = Progress(
            9, flops_per_token=1.0, peak_flops=None, stream=stream)
        progress.note("validation loss 3.5")
        assert stream.getvalue() == f"{erase}validation loss 3.5\n"


def test_a_step_is_recorded_once_and_what_is_missing_is_said_and_written_down(tmp_path, capsys):
    write_run(tmp_path, 0, 12)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 13
    # Steps 3, 4 and 9 are gone; 6 and 7 are there twice, written by two runs at once.
    path.write_text("".join([*lines[:2], *lines[4:6], lines[6].replace(":3", ":5"), *lines[5:8],
                             *lines[9:]]))
    with Ledger(tmp_path) as ledger:
        ledger.begin()
        writer = MetricsWriter(tmp_path, 12)
        writer.say_what_is_missing(ledger)
        writer.close()
    assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"] == [
        1, 2, 5, 6, 7, 8, 10, 11, 12]
    (line,) = capsys.readouterr().err.splitlines()
    assert "it lacks steps 3-4, 9 and 2 of its records were there twice" in line
    (event,) = [event for event in read_ledger(tmp_path) if event["event"] == "records"]
    assert (event["missing"], event["repeated"]) == ([[3, 4], [9, 9]], 2)
    # All of it gone, and a run of which nothing is.
    path.unlink()
    writer = MetricsWriter(tmp_path, 12)
    assert writer.missing == [[1, 12]]
    writer.close()
    write_run(tmp_path, 0, 12)
    writer = MetricsWriter(tmp_path, 5)
    assert (writer.missing, writer.repeated) == ([], 0)
    writer.close()


def test_a_rate_is_of_the_tokens_that_each_step_had(clock):
    bar = progress(io.StringIO())
    for step, tokens in enumerate((900, 300, 500, 100), start=1):
        clock.now += 0.5
        bar.update(step, 3.0, tokens)
    assert bar.tokens_per_second == pytest.approx((300 + 500 + 100) / 1.5)


def look(step, layers=2):
    """A record of a step's health as a run writes it."""
    by_layer = [0.5 + layer for layer in range(layers)]
    norms = {"embedding_VD": 2.0, "layers.a_D": by_layer, "layers.b_DF": by_layer}
    return {"loss": 10.0 / step, "gradient_norm": 1.0, "learning_rate": 0.1, "seconds": 0.5,
            "wait": 0.1, **dict.fromkeys(("gradient", "parameter", "update"), norms),
            "rms": by_layer, "largest": by_layer, "row_loss": [1.0, 2.0], "row_checksum": [3, 4]}


def test_tensorboard_gets_tokens_mfu_layers_config_and_samples(tmp_path):
    config = {"model.num_layers": 2, "data.sources": ["a"], "train.faults": None, "x.rate": 0.5}
    writer = MetricsWriter(tmp_path, 0, config)
    for step in (1, 2, 3):
        writer.write(step, loss=2.0, tokens=100.0 * step, mfu=0.25)
        writer.write_health(step, look(step))
    writer.write(3, kind="validation", loss=2.0, bits_per_byte=1.5)
    writer.close()
    MetricsWriter(tmp_path, 2, config).write(3, loss=1.0, tokens=7.0)  # Continued from step 2.
    write_samples(tmp_path, 3, [("<b>", "it **is**\nso")])
    values = {}
    for event in tensorboard_events(tmp_path):
        for value in event.summary.value:
            values.setdefault(value.tag, []).append(value)
    last = {tag: each[-1].simple_value for tag, each in values.items()}
    assert last["train/tokens_in_all"] == 307.0 and last["train/mfu"] == 0.25
    assert last["validation/bits_per_byte"] == 1.5
    assert last["gradient_norm/layer_01"] == pytest.approx(math.sqrt(2 * 1.5**2))
    assert last["update_norm/embedding_VD"] == 2.0 and last["rms/layer_00"] == 0.5
    plugin = HParamsPluginData.FromString(
        values["_hparams_/session_start_info"][0].metadata.plugin_data.content)
    shown = plugin.session_start_info.hparams
    assert shown["model.num_layers"].number_value == 2 and shown["x.rate"].number_value == 0.5
    assert shown["data.sources"].string_value == "['a']" and "train.faults" not in shown
    (sample,) = values["samples/0/text_summary"]
    assert sample.tensor.string_val == [b"    <b>it **is**\n    so\n"]


def test_layers_are_shown_to_tensorboard_at_steps_that_grow_apart(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 1001):
        writer.write_health(step, look(step))
    writer.close()
    steps = [event.step for event in tensorboard_events(tmp_path)
             for value in event.summary.value if value.tag == "rms/layer_00"]
    assert steps[:50] == list(range(1, 51)) and 250 < len(steps) < 400 and steps[-1] > 980
