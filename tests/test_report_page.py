"""The page of a run, and of several: what it leads with, that it fetches nothing and trusts no text."""

import base64
import gzip
import html.parser
import json
import math
import re

import pytest

from batiste import command_line
from batiste.train.curves import MOST_POINTS, curves_of, layers_of, thinned, tokens_of
from batiste.train.ledger import Ledger
from batiste.train.metrics import MetricsWriter
from batiste.train.page import report
from batiste.train.run_data import flat, headline_numbers, large, read_run
from batiste.train.samples import write_samples
from batiste.train.words import sentence

HOSTILE = "</script><img src=x onerror=alert(1)>&\u2028'\""
FINDING = {
    "kind": "data_fault", "step": 30, "layer": None, "parameter": None, "examples": [7, 9],
    "evidence": {"equal rows": 4.0}, "cause": "One document fills several rows.",
    "remedy": "remove duplicates", "policy": "log"}


def make_run(workdir, rate=0.1, steps=40):
    """A finished run as the real writers leave it, with hostile text wherever text can be."""
    with Ledger(workdir) as ledger:
        ledger.begin(device="cpu", devices=8, parameters=1_842_432, code="0.1.0", config="abc",
                     set=["train.schedule.learning_rate", "sample.prompts"])
        ledger.write("started", step=0, passed_over={"20": "missing"}, changed=[HOSTILE])
        ledger.write("from", step=0, reached=0)
        writer = MetricsWriter(workdir, 0)
        ledger.enter("step")
        for step in range(1, steps + 1):
            writer.write(step, loss=8 / step, real_tokens=100.0, learning_rate=rate, mfu=0.25,
                         gradient_norm=1.0, tokens_per_second=1000.0)
            norms = {"embedding_VD": 1.0, "layers.a_DF": [1.0, 2.0], "layers.b_D": [3.0, math.nan]}
            writer.write_health(step, {
                "loss": 8 / step, "gradient": norms, "parameter": norms, "update": norms,
                "rms": [1.0, 10.0], "largest": [2.0, 20.0]})
            ledger.reached(step)
        writer.write(steps, kind="validation", loss=1.5, bits_per_byte=1.25)
        writer.close()
        ledger.write("finding", **FINDING)
        ledger.write("saved", step=steps, seconds=0.5, hash_seconds=0.1, files=15, bytes=17_000_000)
        ledger.write("supervise", says=HOSTILE)
        ledger.write("finished", reason="done", step=steps, validation={
            "loss": 1.5, "bits_per_byte": 1.2345, "standard_error": 0.0123})
        write_samples(workdir, steps, [("def ", "f(): return 1"), (HOSTILE, HOSTILE)])
        ledger.close("done")
    config = {"train": {"num_steps": steps, "schedule": {"learning_rate": rate}},
              "data": {"sources": [{"path": HOSTILE}]}, "sample": {"prompts": [HOSTILE]},
              "model": {"num_layers": 2}}
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one folder that differ in their learning rate and length."""
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "first"), make_run(folder / "<i>second", rate=0.2, steps=50)]


class Page(html.parser.HTMLParser):
    """Checks that elements nest; collects elements and what would be fetched or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.fetched, self.handlers, self.texts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        if tag not in ("meta", "input"):
            self.open.append(tag)
        self.fetched += [value for name, value in attributes
                         if name in ("src", "href", "srcset", "data", "action")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def embedded(text):
    """The data and the plotting library that a page carries."""
    data, plotly = (re.search(rf'id="{name}">(.*?)</script>', text, re.S)[1]
                    for name in ("data", "plotly"))
    return json.loads(data), gzip.decompress(base64.b64decode(plotly)).decode()


def test_the_page_leads_with_the_result_and_the_curves(runs):
    text = report(runs[0])[1].read_text()
    page = Page(text)
    said = " ".join(page.texts)
    order = [said.index(piece) for piece in (
        "first", "done, step 40 of 40", "validation loss", "1.5000", "bits per byte", "1.2345",
        "± 0.0123", "tokens", "4 k", "parameters", "1.84 M", "MFU", "25.0%")]
    assert order == sorted(order)
    places = [text.index(piece) for piece in (
        "<header>", 'class="cards"', 'id="plots"', 'id="layers"', ">Samples<", ">Events<",
        'id="timeline"', ">Config<")]
    assert places == sorted(places)
    assert said.index("train.schedule.learning_rate") < said.index("all other fields")
    assert said.index("all other fields") < said.index("model.num_layers")
    data, plotly = embedded(text)
    (run,) = data["runs"]
    assert run["curves"]["train/loss"]["value"][-1] == 0.2 and "Plotly" in plotly
    assert run["tokens"]["value"][-1] == 4000 and run["findings"][0]["step"] == 30
    assert len(text) < 3e6


def test_the_page_fetches_nothing_and_no_text_of_a_run_is_code(runs):
    for path in (report(runs[0])[1], report(*runs)[1]):
        text = path.read_text()
        page = Page(text)
        assert page.fetched == [] and page.handlers == [] and "img" not in page.elements
        assert page.elements.count("script") == 3
        assert "default-src 'none'" in text
        rest = re.sub(r'id="plotly">.*?</script>', "", text, flags=re.S)
        assert not re.search(r"https?:|@import|url\(", rest)
        assert HOSTILE in "".join(page.texts), "shown as it is"
        assert "<i>second" not in re.sub(r"&lt;i&gt;second", "", text)


def test_events_are_sentences(runs):
    text, path = report(runs[0])
    assert "Checkpoint of step 40 saved in 0.5 s, 17.0 MB." in text
    assert ("data fault at step 30 (records 7, 9): One document fills several rows. Evidence: "
            "equal rows: 4. Try: remove duplicates.") in text
    assert "Started from step 0; checkpoint 20 was passed over (missing); changed: " in text
    assert "{" not in text and "[" not in text.replace("data.sources[0]", "")
    told = sentence({"event": "new kind", "time": 1.0, "clock": 2.0, "at": 3.0, "step": 1200,
                     "what": {"a": [1, 2.5], "b": None}, "nothing": []})
    assert told == "step 1,200, what a: 1, 2.5, b: none"
    assert sentence({"event": "decision", "kind": "loss_spike", "step": 50, "action": "roll_back",
                     "to": 40, "skip_records": [42, 50], "since": None}) == (
        "Rolled back to step 40 because of loss spike at step 50; records 42 to 49 of the "
        "order are not read again.")
    assert sentence({"event": "saved", "step": "x"}) == "step x", "what another version wrote"


def test_several_runs_are_compared(runs, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.run(["batiste", "report", *map(str, runs)])
    assert ended.value.code == 0
    said, _, path = capsys.readouterr().out.rpartition("\n\n")
    assert path.strip() == str(runs[0].parent / "comparison.html")
    assert re.search(r"^  tokens +4 k +5 k$", said, re.M)
    assert re.search(r"^  validation loss +1\.5000 +1\.5000$", said, re.M)
    differing = said.partition("Fields that differ")[2]
    assert re.findall(r"^  (\S+)", differing, re.M)[1:] == [
        "train.num_steps", "train.schedule.learning_rate"]
    data, _ = embedded((runs[0].parent / "comparison.html").read_text())
    assert [run["name"] for run in data["runs"]] == ["first", "<i>second"]
    assert [len(run["curves"]["train/loss"]["step"]) for run in data["runs"]] == [40, 50]
    with pytest.raises(ValueError, match="got one of them twice"):
        report(runs[0], runs[0])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for folder in ("a", "b"):
        make_run(tmp_path / folder / "run", steps=3)
    _, path = report(tmp_path / "a/run", tmp_path / "b/run")
    assert path == tmp_path / "comparison.html"
    assert [run["name"] for run in embedded(path.read_text())[0]["runs"]] == ["a/run", "b/run"]


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.begin()
        text, path = report(tmp_path)
        assert "running" in text
        Page(path.read_text())
        values = {number.label: number.value for number in headline_numbers(read_run(tmp_path))}
        assert values["validation loss"] == values["MFU"] == "–" and values["findings"] == "0"
        ledger.close("done")


def test_long_curves_are_thinned_and_keep_their_spikes():
    steps, values = list(range(1, 50_001)), [1.0] * 50_000
    values[31_234], values[40_001], values[7] = 9.0, -9.0, math.nan
    curve = thinned(steps, values)
    assert len(curve["step"]) <= MOST_POINTS
    assert dict(zip(curve["step"], curve["value"]))[31_235] == 9.0 and -9.0 in curve["value"]
    assert thinned([1, 2], [math.inf, 1.0]) == {"step": [1, 2], "value": [None, 1.0]}


def test_curves_tokens_and_heat_maps_come_from_the_records():
    records = [{"step": step, "kind": "train", "loss": "nan" if step == 2 else 1.0, "tokens": 10.0}
               for step in (1, 2, 3)]
    records += [{"step": 3, "kind": "validation", "loss": 2.0, "other": {"x": 1}}]
    norms = {"embedding_VD": 2.0, "layers.a_DF": [3.0, 4.0], "layers.b_D": [4.0, "inf"]}
    records += [{"step": 2, "kind": "health", "gradient": norms, "parameter": norms,
                 "update": norms, "rms": [1.0, 2.0]}, {"step": 3, "kind": "health", "loss": 1.0}]
    curves = curves_of(records)
    assert curves["train/loss"] == {"step": [1, 2, 3], "value": [1.0, None, 1.0]}
    assert "validation/other" not in curves and curves["validation/loss"]["value"] == [2.0]
    assert tokens_of(records) == ({"step": [1, 2, 3], "value": [10.0, 20.0, 30.0]}, 30.0)
    layers = layers_of(records)
    assert layers["step"] == [2], "a look of which only its loss was kept has no layers"
    assert layers["maps"]["gradient norm"] == {
        "rows": ["embedding_VD", "layer 0", "layer 1"], "z": [[2.0], [5.0], [None]]}
    assert layers["maps"]["gradient norm of layers.a_DF"]["z"] == [[3.0], [4.0]]
    assert layers["maps"]["activation RMS"]["z"] == [[1.0], [2.0]]
    assert layers["maps"]["update / parameter"]["z"] == [[1.0], [1.0], [None]]
    assert layers_of(records[:4]) == {"step": [], "maps": {}}


def test_counts_and_configs_read_well():
    assert [large(n) for n in (950, 12_300, 1_842_432, 8.03e9)] == ["950", "12.3 k", "1.84 M", "8.03 B"]
    assert flat({"a": [{"b": 1}, {"b": 2}], "c": [1, 2], "d": {}}) == {
        "a[0].b": 1, "a[1].b": 2, "c": [1, 2]}


@pytest.mark.parametrize("content", ["{", "[1]", "\0"])
def test_a_broken_config_is_one_line(tmp_path, content):
    make_run(tmp_path / "run", steps=2)
    (tmp_path / "run/config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: .*(no JSON|expected)"):
        report(tmp_path / "run")
