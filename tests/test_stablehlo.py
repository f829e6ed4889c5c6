"""What is exported as StableHLO runs without Batiste, for any number of rows, with the same numbers."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from test_resume import corpus, tiny_experiment

from batiste import command_line, main

__all__ = ["corpus"]  # A fixture.
# The card's own code, then decoding token by token.
PROGRAM = """
{code}
described = json.load(open("program.json"))
decode = jax.export.deserialize(open("decode.bin", "rb").read())
for tokens in (np.arange(5)[None].astype(np.int32), np.arange(12).reshape(3, 4).astype(np.int32)):
    logits = np.asarray(forward.call(weights, tokens))
    cache = [np.zeros([len(tokens) if size == "rows" else size for size in each["shape"]],
                      each["dtype"]) for each in described["cache"]]
    for place in range(tokens.shape[1]):
        found, *cache = decode.call(weights, tokens[:, place], *cache)
        assert np.abs(found - logits[:, place]).max() < 1e-5
    np.save(f"logits_{{len(tokens)}}.npy", logits)
import sys
assert not {{"batiste", "flax"}} & {{name.split(".")[0] for name in sys.modules}}
"""


@pytest.fixture(scope="module")
def workdir(corpus, tmp_path_factory):
    """A run of two steps."""
    experiment = tiny_experiment(corpus)
    experiment.train.num_steps = 2
    experiment.train.schedule.warmup_steps = 1
    folder = tmp_path_factory.mktemp("run")
    main.train(experiment, folder)
    return folder


def test_programs_run_without_batiste_for_any_number_of_rows(workdir, tmp_path, capsys):
    target = tmp_path / "program"
    with pytest.raises(SystemExit) as ended:
        command_line.run(["batiste", "export", f"--workdir={workdir}", f"--to={target}",
                          "--format=stablehlo"])
    assert ended.value.code == 0 and "bytes of weights" in capsys.readouterr().out
    (code,) = re.findall(r"```python\n(.*?)```", (target / "README.md").read_text(), re.S)
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(code=code)], cwd=target,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assembly, params = main._load(workdir)
    model = nnx.merge(assembly.program.graphdef, assembly.plain(params))
    for tokens in (np.arange(5)[None], np.arange(12).reshape(3, 4)):
        expected = model(tokens.astype(np.int32))
        found = np.load(target / f"logits_{len(tokens)}.npy")
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("flags,message", [
    (["--format=stablehlo", "--dtype=float16"], "--dtype is of --format=transformers"),
    (["--format=onnx"], "format=onnx|--format"),
])
def test_what_cannot_be_is_one_line(workdir, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        command_line.run(["batiste", "export", f"--workdir={workdir}", f"--to={tmp_path}/x", *flags])
    assert not (tmp_path / "x").exists()
