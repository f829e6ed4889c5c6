"""Imports flow one way, the data room is host-side, and names spell the alphabet."""

import ast
import pathlib
import subprocess
import sys
import time

import jax
import pytest
from flax import nnx

from batiste.models import Transformer, letters_tree
from batiste.sharding import ALPHABET

ROOT = pathlib.Path(__file__).parents[1]
# A room may import fields.py and the rooms named for it, and nothing else of batiste.
MAY_IMPORT = {
    "pallas_kernels": set(),
    "sharding": set(),
    "data": set(),
    "models": {"pallas_kernels", "sharding"},
    "inference": {"pallas_kernels", "sharding", "models"},
    "train": {"pallas_kernels", "sharding", "models", "inference", "data"},
    "evaluation": {"pallas_kernels", "sharding", "models", "inference", "data", "train"},
    "tasks": {"sharding", "data", "models", "train"},
    "planning": {"sharding", "data", "models", "train"},
    "interop": {"pallas_kernels", "sharding", "data", "models", "inference"},
    "configs": {"pallas_kernels", "sharding", "models", "inference", "data", "train", "evaluation"},
}
PUBLIC_ONLY = [(path, room) for room in MAY_IMPORT for path in sorted((ROOT / room).glob("*.py"))]


def imported_modules(path: pathlib.Path) -> set[str]:
    """Every module that a file imports anywhere in it: lazily and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path,room", PUBLIC_ONLY, ids=lambda value: getattr(value, "name", value))
def test_imports_flow_one_way(path, room):
    for name in imported_modules(path):
        if not name.startswith("batiste."):
            assert name != "batiste", f"{path} imports the whole package"
            continue
        target = name.split(".")[1]
        allowed = {room, "fields", *MAY_IMPORT[room]}
        assert target in allowed, f"{path} imports {name}"


def test_the_base_of_all_configs_imports_nothing_of_batiste():
    assert not any(name.startswith("batiste") for name in imported_modules(ROOT / "fields.py"))


def test_every_room_is_installed_and_listed():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert rooms == set(MAY_IMPORT)
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{room}"' in setup for room in rooms)


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("*.py")), ids=lambda path: path.name)
def test_data_never_imports_jax(path):
    roots = {name.split(".")[0] for name in imported_modules(path)}
    assert not roots & {"jax", "flax", "optax", "orbax", "tensorflow"}


def test_import_is_quick_and_touches_no_device():
    def seconds(code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    # A loose guard on a shared machine: it takes 0.02 s, and 2.5 with every room.
    assert min(seconds("import batiste") for _ in range(3)) < 2
    code = (
        "import batiste.main, batiste.command_line, jax._src.xla_bridge as bridge; "
        "print(bridge.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("change", [
    {}, {"bias": "all", "norm": "layer", "norm_placement": "sandwich", "qk_norm": True,
         "positions": "learned", "attention_sinks": True, "tied_embeddings": False},
])
def test_parameter_names_spell_their_letters(model_config, change):
    for field, value in change.items():
        setattr(model_config, field, value)
    model = nnx.eval_shape(lambda: Transformer(model_config, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    letters = letters_tree(params)
    sizes = model_config.sizes
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params)):
        here = letters
        for key in path:
            here = here[key.key]
        suffix = path[-1].key.rsplit("_", 1)[1]
        stacked = path[0].key == "layers"
        assert here == ("L" if stacked else "") + suffix
        assert set(here) <= set(ALPHABET)
        assert leaf.shape == tuple(sizes[letter] for letter in here)
