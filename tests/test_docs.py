"""What the README, docs and the notebook show is executed, each as a newcomer would."""

import dataclasses
import inspect
import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest

from batiste import command_line
from batiste.configs import objectives
from batiste.data.record_objective import KINDS
from batiste.models import TransformerConfig, resolve_attention
from batiste.models.attention_choice import fused_losses
from batiste.pallas_kernels import AttentionMask, BlockSparsity, certified
from batiste.verbs import VERBS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ATTENTION = (ROOT / "docs" / "attention.md").read_text()
LAUNCH = (ROOT / "docs" / "launch.md").read_text()


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """A shell of its own: the real CPU, not the eight fake devices of the other tests."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return environment | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}


def run(command: list[str], folder: pathlib.Path, environment: dict[str, str]) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def ten_lines(tmp_path_factory, environment) -> tuple[pathlib.Path, str]:
    """A folder where the README's Python was run, and what it printed."""
    folder = tmp_path_factory.mktemp("readme")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    return folder, run([sys.executable, "-c", code], folder, environment)


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_train_and_sample(ten_lines):
    folder, output = ten_lines
    assert "bits_per_byte" in output
    assert (folder / "runs/ten_lines/report.md").exists()


@pytest.mark.slow
def test_the_commands_of_the_readme_run_on_its_own_work_directory(ten_lines, environment):
    folder, _ = ten_lines
    commands = re.findall(r"^batiste (evaluate|generate) (.*)$", README, re.M)
    assert {verb for verb, _ in commands} == {"evaluate", "generate"}
    for verb, flags in commands:
        flags = flags.split("  #")[0].replace("runs/quickstart", "runs/ten_lines")
        output = run([sys.executable, "-m", "batiste", verb, *shlex.split(flags)], folder, environment)
        assert output.strip()


@pytest.mark.slow
def test_the_processes_that_the_page_about_launching_starts_by_hand_train(ten_lines, environment):
    folder, _ = ten_lines
    by_hand = LAUNCH.split("## Several processes by hand")[1]
    (commands,) = re.findall(r"```bash\n(.*?)```", by_hand, re.S)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    assert ":8476" in commands
    commands = commands.replace("8476", port).replace("batiste", f"{sys.executable} -m batiste", 1)
    commands = commands.replace("--process_id", "--config.sample.max_tokens=8 --process_id")
    # The text is that of the README's example; preparing it again would take longer than the rest.
    shutil.copytree(folder / "runs/ten_lines/data", folder / "runs/by_hand/data")
    output = run(["bash", "-c", commands], folder, environment)
    assert output.count("validation: loss") == 1
    assert (folder / "runs/by_hand/report.md").exists()


def test_what_the_page_about_launching_writes_for_batiste_is_accepted():
    text = LAUNCH.replace("\\\n", " ").replace("$process", "1")
    commands = re.findall(r"batiste (train|evaluate|generate|prepare) (--[^\n\"`&]*)", text)
    assert len(commands) >= 5
    for verb, flags in commands:
        flags = [flag for flag in shlex.split(flags) if "..." not in flag]
        values = command_line._parse(VERBS[verb].define, [f"batiste {verb}", *flags])
        if "config" in values and values.config is not None:
            values.config.validate()


def test_the_page_about_objectives_has_every_kind_and_commands_that_are_accepted():
    page = (ROOT / "docs" / "objectives.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` ", page, re.M)) == set(KINDS)
    commands = re.findall(r"^batiste (train|generate) (.*)$", page, re.M)
    assert len(commands) >= 4
    for verb, flags in commands:
        values = command_line._parse(VERBS[verb].define, [f"batiste {verb}", *shlex.split(flags)])
        if verb == "train":
            values.config.validate_on(1)
    for name in objectives.NAMES:
        objectives.get_config(name).validate_on(1)


def test_the_python_about_launching_names_what_there_is():
    (code,) = re.findall(r"```python\n(.*?)```", LAUNCH, re.S)
    names = {}
    exec("\n".join(line for line in code.splitlines() if line.startswith("from")), names)
    call = re.search(r'connect\("10.0.0.1:8476", (.*?)\)', code)[1]
    inspect.signature(names["connect"]).bind("", **eval(f"dict({call})"))


def test_the_tree_of_the_readme_is_the_tree():
    (tree,) = re.findall(r"```text\n(configs/quickstart\.py.*?)```", README, re.S)
    files = re.findall(r"^(\S+\.py)", tree, re.M)
    assert len(files) > 25
    for name in files:
        assert (ROOT / name).exists(), name
    rooms = {"configs", "models", "train", "sharding", "data", "inference", "evaluation",
             "pallas_kernels", "planning", "interop", "tasks"}
    shown = {name for name in files if "/" in name}
    there = {str(path.relative_to(ROOT)) for room in rooms for path in (ROOT / room).glob("*.py")
             if path.name != "__init__.py"}
    assert shown == there


def test_relative_links_of_the_documents_lead_somewhere():
    for document in (ROOT / "README.md", *ROOT.glob("*/*.md")):
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), (document, target)


def test_the_python_about_attention_runs(tmp_path, environment):
    (code,) = re.findall(r"```python\n(.*?)```", ATTENTION, re.S)
    code += "print(out_BTNH.shape, lse_BTN.shape)"
    output = run([sys.executable, "-c", code], tmp_path, environment)
    assert output.endswith("(2, 100, 4, 64) (2, 100, 4)\n")


def test_the_certification_on_the_page_is_the_codes():
    table = f"<!-- table: begin -->\n{certified.certification_table()}\n<!-- table: end -->"
    assert table in ATTENTION, "run `python docs/attention_picture.py`, which writes the table"


def test_what_the_page_says_that_attention_prints_is_printed():
    config = TransformerConfig(attention="auto")
    printed = [resolve_attention(config, kind, {})[1] for kind in ("TPU v6 lite", "cpu")]
    wide = dataclasses.replace(config, head_dim=320)
    printed.append(resolve_attention(wide, "TPU v6 lite", {})[1])
    sparse = AttentionMask(causal=True, sparsity=BlockSparsity(48, 1))
    for refused in (
        lambda: resolve_attention(dataclasses.replace(config, attention="v6e"), "cpu", {}),
        lambda: certified.check("v6e", ("causal", "sparse", "offset"), "bfloat16", 64),
        lambda: certified.check_sparsity("v6e", sparse),
        lambda: fused_losses("reference", None, None, None, {}),
    ):
        with pytest.raises(ValueError) as error:
            refused()
        printed.append(str(error.value))
    said = "\n".join(re.findall(r"```text\n(.*?)```", ATTENTION, re.S)).splitlines()
    assert sorted(filter(None, said)) == sorted(printed)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(ten_lines, tmp_path, environment):
    shutil.copy(ROOT / "notebooks" / "quickstart.ipynb", tmp_path)
    # The notebook trains on the text of the README's example: prepared once.
    shutil.copytree(ten_lines[0] / "runs/ten_lines/data", tmp_path / "runs/notebook/data")
    code = """if True:
        import nbclient, nbformat
        notebook = nbformat.read("quickstart.ipynb", as_version=4)
        nbclient.NotebookClient(notebook, timeout=900).execute()
        nbformat.write(notebook, "executed.ipynb")
    """
    environment = environment | {"JUPYTER_PLATFORM_DIRS": "1"}
    run([sys.executable, "-c", code], tmp_path, environment)
    assert (tmp_path / "runs/notebook/report.md").exists()
    assert (tmp_path / "runs/notebook/report.html").exists()
    cells = json.loads((tmp_path / "executed.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    # What a person sees is no log of errors, no source of Markdown, and no type of NumPy.
    assert {output.get("name") for output in outputs} <= {None, "stdout"}
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert {"image/png", "text/markdown"} <= kinds
    printed = "".join("".join(output.get("text", output.get("data", {}).get("text/plain", "")))
                      for output in outputs)
    assert "np.float64" not in printed and "## Samples" not in printed
    assert "done after step 30: validation loss" in printed


def test_the_notebook_finds_the_clone_that_it_lies_in_or_asks(tmp_path):
    notebook = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())
    (code,) = ("".join(cell["source"]) for cell in notebook["cells"]
               if "REPOSITORY = None" in "".join(cell["source"]))
    names = {}
    exec(code, names)  # Where batiste is installed, as here, it installs nothing.
    assert names["clone_around"](ROOT / "notebooks") == ROOT
    assert names["clone_around"](tmp_path) is None and "REPOSITORY or input(" in code
