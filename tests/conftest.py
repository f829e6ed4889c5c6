"""Eight fake CPU devices, strict JAX, a compilation cache, and the small models the laws use."""

import os
import pathlib
import re

os.environ["JAX_PLATFORMS"] = "cpu"
# On models this small LLVM's optimizations cost four times what they save, and fusions emitted
# by way of MLIR half of the compiler's time.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    # Eight devices on busy cores meet late: after 40 s XLA would end the process.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)

# What runs keep for a user (the code that they trust, compiled programs) is not this user's.
os.environ["BATISTE_COMPILATION_CACHE"] = "0"
os.environ["XDG_STATE_HOME"] = str(pathlib.Path(__file__).parents[1] / ".jax_cache" / "state")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

from batiste.data import Batch
from batiste.models import TransformerConfig
from batiste.train import TrainConfig
from kernel_checks import races

__all__ = ["races"]  # A fixture of every test of kernels.


def pytest_addoption(parser):
    """--update-golden rewrites the golden files that the tests it selects compare with.

    --without-torch skips the modules that import torch, each counted with its reason.
    --random-configs: so many random experiments are held to what every legal one must do.
    """
    parser.addoption("--update-golden", action="store_true")
    parser.addoption("--without-torch", action="store_true")
    parser.addoption("--random-configs", type=int, default=40)


class ModuleThatNeedsTorch(pytest.Module):
    """A module that is skipped before it is imported."""

    def collect(self):
        """Skips."""
        pytest.skip("compares with torch: this run is --without-torch", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Without torch, a module that imports it, or one that does, is skipped; else an error."""
    if parent.config.getoption("--without-torch") and imports_torch(module_path):
        return ModuleThatNeedsTorch.from_parent(parent, path=module_path)


def imports_torch(path: pathlib.Path) -> bool:
    """Whether a module of tests imports torch where it begins, or another that does."""
    names = re.findall(r"^(?:import|from) (torch\b|test_\w+)", path.read_text(), re.MULTILINE)
    others = set(names) - {"torch", path.stem}  # Some write programs that import their own module.
    return "torch" in names or any(imports_torch(path.with_name(f"{name}.py")) for name in others)


@pytest.fixture
def update_golden(request) -> bool:
    """Whether to rewrite golden files."""
    return request.config.getoption("--update-golden")


@pytest.fixture
def model_config() -> TransformerConfig:
    """A model whose dims all differ (L 3, D 24, N 4, K 2, H 6, F 40, V 37, T 16)."""
    return TransformerConfig(
        vocab_size=37, num_layers=3, model_dim=24, num_heads=4, num_kv_heads=2, head_dim=6,
        mlp_dim=40, max_length=16,
    )


@pytest.fixture
def train_config() -> TrainConfig:
    """Three steps of eight rows."""
    config = TrainConfig(num_steps=3, batch_size=8)
    config.schedule.warmup_steps = 1
    config.health.every = None
    return config


@pytest.fixture
def batch() -> Batch:
    """Eight rows of eleven tokens in packed documents of unequal length, padded unequally."""
    return make_batch(rows=8, length=11, vocab_size=37, seed=0)


def make_batch(rows: int, length: int, vocab_size: int, seed: int) -> Batch:
    """Random tokens; row b has a document boundary at 3 + b % 5 and b % 4 tokens of padding."""
    import numpy as np

    random = np.random.default_rng(seed)
    stream = random.integers(0, vocab_size, (rows, length + 1)).astype(np.int32)
    place = np.arange(length)[None]
    boundary = 3 + np.arange(rows)[:, None] % 5
    real = place < length - np.arange(rows)[:, None] % 4
    segments = np.where(real, 1 + (place >= boundary), 0).astype(np.int32)
    positions = np.where(place >= boundary, place - boundary, place).astype(np.int32)
    following = np.concatenate([segments[:, 1:], np.zeros((rows, 1), np.int32)], axis=1)
    weights = ((segments != 0) & (segments == following)).astype(np.float32)
    return Batch(stream[:, :-1], stream[:, 1:], weights, segments, positions)
