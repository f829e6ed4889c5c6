"""An import holds one tensor at a time: the peak of a process of its own, as the kernel counts it."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from batiste.interop import FAMILIES, WeightMap, family_of
from batiste.interop.files import Planned, write
from batiste.models import Transformer

# 155 M parameters, 310 MB in bfloat16; the largest tensor is of 42 M, 168 MB as it is kept.
THEIRS = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
    "vocab_size": 41_000, "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 3072, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}
SMALL = {"vocab_size": 4100, "num_hidden_layers": 2}
CHILD = """
import json, pathlib, re, sys
import jax
from batiste.interop import Tensors
sys.path.insert(0, sys.argv[1])
from test_import_memory import SMALL, parts

def kilobytes(name):
    return int(re.search(rf"^{name}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.M)[1])

# What jax and its compiler need once, they have before it counts.
small, abstract = parts(**SMALL)
small.parameters(Tensors(pathlib.Path(sys.argv[2]) / "small"), abstract)
weights, abstract = parts()
weights.rows.sort(key=lambda row: "head_DV" in row.ours)  # The largest, when all others are there.
found = Tensors(pathlib.Path(sys.argv[2]))
open("/proc/self/clear_refs", "w").write("5")  # From here on the peak is anew.
before = kilobytes("VmRSS")
params = weights.parameters(found, abstract)
leaves = jax.tree.leaves(params)
print(json.dumps({"peak": 1024 * (kilobytes("VmHWM") - before),
                  "kept": sum(leaf.nbytes for leaf in leaves),
                  "sums": [float(abs(leaf).sum()) for leaf in leaves]}))
"""


def parts(**change) -> tuple[WeightMap, dict]:
    """The map of the weights, and the parameters as they are to lie on the first device."""
    theirs, sharding = THEIRS | change, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    family = family_of(theirs, FAMILIES)
    config = family.model_of(theirs)
    abstract = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)[1]
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nnx.to_pure_dict(abstract))
    return WeightMap(family, config, theirs, abstract), abstract


def written(folder: pathlib.Path, **change) -> list[Planned]:
    """Writes the model's files, and says what is in them."""
    planned, random = parts(**change)[0].planned(np.dtype(ml_dtypes.bfloat16)), np.random
    tensors = (np.resize(random.normal(size=4096).astype(each.dtype), each.shape)
               for each in planned)
    write(folder, planned, tensors)
    return planned


@pytest.mark.slow
def test_an_import_holds_the_parameters_and_one_tensor(tmp_path):
    """On a CPU the parameters are in the host's memory too: what comes on top is what counts."""
    (tmp_path / "small").mkdir()
    written(tmp_path / "small", **SMALL)
    planned = written(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(pathlib.Path(__file__).parent), str(tmp_path)],
        # What is freed goes back at once: malloc would keep some of it, now more and now less.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"},
        text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    largest = max(4 * int(np.prod(each.shape)) for each in planned)
    assert sum(each.bytes for each in planned) > 300e6 and all(measured["sums"])
    on_top = measured["peak"] - measured["kept"]
    print(f"{on_top / 1e6:.0f} MB on top of {measured['kept'] / 1e6:.0f}; {largest / 1e6:.0f}")
    assert on_top <= 1.2 * largest, (on_top, largest)
