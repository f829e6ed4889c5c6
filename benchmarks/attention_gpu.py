"""The GPU attention kernels on an NVIDIA GPU: right first, then how fast, beside cuDNN and PyTorch.

    python benchmarks/attention_gpu.py [--tune] [--minutes=8]

First values and gradients of a spread of masks, head dims and dtypes against the reference in fp32
on the device; then forward, and forward with backward, in bf16 with grouped queries, 16,384 tokens
of 2,048 features (queries) in all; medians of 30. Prints Markdown. Whatever does not run says why
in its place. --tune times candidate block sizes instead and prints rows for
pallas_kernels/gpu_blocks.py. --rehearse runs all of it tiny and interpreted on a CPU: a test of
this file, not a measurement.
"""

import datetime
import importlib.metadata
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the memory.

import jax
import jax.numpy as jnp
from absl import app, flags

from attention_gpu_checks import Check, make_checks
from attention_gpu_timing import compile_all, jax_builder, measure, reason
from attention_gpu_tune import run_tuning
from batiste.pallas_kernels import AttentionMask
from batiste.pallas_kernels.attention import flash_attention

TUNE = flags.DEFINE_bool("tune", False, "Time candidate block sizes instead.")
MINUTES = flags.DEFINE_float("minutes", 8, "Rows that would start later are left out.", 0)
REHEARSE = flags.DEFINE_bool("rehearse", False, "Run tiny and interpreted on a CPU.")


class Case(NamedTuple):
    """One row's work: B x S tokens, N heads on K, in bf16; `backward` is forward with backward."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    backward: bool

    def flops(self) -> float:
        """Multiplications and additions that the mask leaves; backward is 2.5 times forward."""
        forward = 4 * self.batch * self.heads * self.length**2 * self.head_dim
        return forward * (3.5 if self.backward else 1) / (2 if self.causal else 1)

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """q, k, v and the output's gradient."""
        B, S, N, K, H = self[:5]
        q_BSNH, k_BSKH = (jax.ShapeDtypeStruct((B, S, n, H), jnp.bfloat16) for n in (N, K))
        return [q_BSNH, k_BSKH, k_BSKH, q_BSNH]


def make_cases(rehearse: bool) -> list[Case]:
    """All rows, the most telling head dim first in case time runs out."""
    if rehearse:
        return [Case(1, 40, 4, 2, 32, causal, backward)
                for causal, backward in itertools.product((True, False), repeat=2)]
    return [
        Case(16384 // S, S, 2048 // H, max(1, 512 // H), H, causal, backward)
        for H, causal, S, backward in itertools.product(
            (128, 64, 256), (True, False), (1024, 2048, 4096, 8192, 16384), (False, True))
    ]


def batiste_attention(case: Case, chip: str, interpret: bool) -> Callable:
    """Ours, from q, k and v to the output."""
    def attention(q, k, v):
        return flash_attention(
            q, k, v, AttentionMask(causal=case.causal), scale=case.head_dim**-0.5, soft_cap=None,
            sinks_N=None, alibi_slopes_N=None, dropout_rate=0.0, dropout_seeds_BN=None, chip=chip,
            interpret=interpret)[0]
    return attention


def cudnn_attention(case: Case) -> Callable:
    """JAX's door to cuDNN's fused attention."""
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=case.causal, scale=case.head_dim**-0.5, implementation="cudnn")


def jax_program(attention: Callable, case: Case) -> Callable:
    """The jitted function of q, k, v and g that is timed."""
    def program(q, k, v, g):
        if not case.backward:
            return attention(q, k, v)
        out, backward = jax.vjp(attention, q, k, v)
        return out, backward(g)
    return jax.jit(program)


def torch_call(backend: str, case: Case) -> tuple[Callable, Callable]:
    """The same for one of PyTorch's fused attentions."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not torch.cuda.is_available():
        raise RuntimeError("this PyTorch sees no GPU")
    kind = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend]
    B, S, N, K, H = case[:5]
    q, k, v, g = (torch.randn(B, S, n, H, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
                  for n in (N, K, K, N))
    inputs = [x.requires_grad_(case.backward) for x in (q, k, v)]

    def call():
        with sdpa_kernel(kind):
            out = torch.nn.functional.scaled_dot_product_attention(
                *inputs, is_causal=case.causal, enable_gqa=True)
            return torch.autograd.grad(out, inputs, g) if case.backward else out

    return call, lambda _: torch.cuda.synchronize()


def table_row(case: Case, seconds: dict[str, float | str]) -> str:
    """TFLOP/s of each, and ours as a share of the fastest other."""
    cells = [f"{case.flops() / s / 1e12:.0f}" if isinstance(s, float) else s
             for s in seconds.values()]
    ours, *others = seconds.values()
    others = [x for x in others if isinstance(x, float)]
    ratio = f"{min(others) / ours:.2f}" if others and isinstance(ours, float) else "–"
    milliseconds = f"{ours * 1e3:.3f}" if isinstance(ours, float) else "–"
    start = (case.head_dim, case.length, "causal" if case.causal else "full",
             "forward + backward" if case.backward else "forward")
    return "| " + " | ".join(map(str, (*start, milliseconds, *cells, ratio))) + " |"


def table_head(names: list[str]) -> str:
    """Its two header lines."""
    columns = ["D", "S", "mask", "pass", f"{names[0]}, ms", *names, "× best other"]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def run_table(chip: str, deadline: float, rehearse: bool) -> None:
    """Compiles all JAX programs, then prints row after row."""
    cases = make_cases(rehearse)
    attentions = {
        "batiste": lambda case: batiste_attention(case, chip, rehearse),
        "cuDNN (jax)": cudnn_attention,
    }
    compiled = compile_all({
        (name, case): (jax_program(attention(case), case), case.shapes())
        for case in cases for name, attention in attentions.items()
    })
    torch_backends = {"cuDNN (torch)": "cudnn", "flash (torch)": "flash"}
    print("\nTFLOP/s, bf16, four query heads to a key head:\n")
    names = [*attentions, *torch_backends]
    print(table_head(names))
    for case in cases:
        if time.monotonic() > deadline:
            print(table_row(case, dict.fromkeys(names, "out of time")))
            continue
        seconds = {
            name: measure(jax_builder(compiled[name, case], case.shapes())) for name in attentions
        }
        for name, backend in torch_backends.items():
            seconds[name] = measure(lambda backend=backend: torch_call(backend, case))
        print(table_row(case, seconds), flush=True)


def run_checks(chip: str, rehearse: bool) -> bool:
    """Prints errors relative to the largest number of each result; whether all are in bounds."""
    checks: list[Check] = make_checks(chip, rehearse)
    compiled = compile_all({
        (check.name, side): (jax.jit(function), check.arrays)
        for check in checks for side, function in (("kernel", check.kernel), ("want", check.want))
    })
    print("| check | worst error | bound | |\n|---|---|---|---|")
    all_right = True
    for check in checks:
        sides = [compiled[check.name, side] for side in ("kernel", "want")]
        try:
            for side in sides:
                if isinstance(side, BaseException):
                    raise side
            error, right = check.error(*(side(*check.arrays) for side in sides))
            right = right and error <= check.bound
            cells = f"{error:.1e} | {check.bound:.0e} | {'ok' if right else 'WRONG'}"
        except Exception as error:
            right, cells = False, f"{reason(error)} | {check.bound:.0e} | WRONG"
        all_right &= right
        print(f"| {check.name} | {cells} |", flush=True)
    return all_right


def chip_of_device() -> str:
    """The block table's name for the first device; exits when it is none."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None:
        sys.exit(f"This benchmark needs an NVIDIA GPU; JAX found {device.device_kind!r}.")
    if float(capability) < 8:
        sys.exit(f"The kernels need compute capability 8.0; {device.device_kind} has {capability}.")
    return "hopper" if float(capability) >= 9 else "ampere"


def main(argv: list[str]) -> None:
    """Checks, then times or tunes."""
    del argv
    rehearse, deadline = REHEARSE.value, time.monotonic() + 60 * MINUTES.value
    chip = "hopper" if rehearse else chip_of_device()
    versions = []
    for package in ("jax", "jaxlib", "torch"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    print(f"{datetime.date.today()}, {jax.devices()[0].device_kind}, Python "
          f"{platform.python_version()}, {', '.join(versions)}\n")
    if TUNE.value:
        run_tuning(chip, deadline, rehearse)
        return
    right = run_checks(chip, rehearse)
    run_table(chip, deadline, rehearse)
    if not right:
        sys.exit("Some checks failed; the table's times are of kernels that are wrong.")


if __name__ == "__main__":
    app.run(main)
