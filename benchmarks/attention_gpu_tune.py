"""Times candidate block sizes for `attention_gpu.py --tune`."""

import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention_gpu_timing import compile_all, jax_builder, measure
from batiste.pallas_kernels import AttentionMask, gpu_backward, gpu_blocks, gpu_forward
from batiste.pallas_kernels.operands import Operands, Options


class Candidate(NamedTuple):
    """Block sizes of one of the three kernels, to be timed."""

    kernel: str
    blocks: gpu_blocks.Blocks


def tune_program(candidate: Candidate, options: Options) -> Callable:
    """One kernel alone."""
    def program(q, k, v, g):
        operands = Operands(q, k, v, AttentionMask(causal=True), None, None, None)
        if candidate.kernel == "forward":
            return gpu_forward.forward(options, operands, candidate.blocks)
        # Any numbers will do: the time does not depend on them.
        sums_BNT = g.astype(jnp.float32).sum(axis=-1).swapaxes(1, 2)
        gradients = gpu_backward.Gradients(g, jnp.abs(sums_BNT) + 20, sums_BNT)
        function = getattr(gpu_backward, candidate.kernel)
        return function(options, operands, gradients, candidate.blocks)
    return jax.jit(program)


def tuning_shapes(head_dim: int, rehearse: bool) -> list[jax.ShapeDtypeStruct]:
    """q, k, v and the output's gradient."""
    B, S, N, K = (1, 40, 4, 2) if rehearse else (4, 4096, 2048 // head_dim, 512 // head_dim)
    return [jax.ShapeDtypeStruct((B, S, n, head_dim), jnp.bfloat16) for n in (N, K, K, N)]


def make_candidates(rehearse: bool) -> list[Candidate]:
    """Every kernel with every tile worth trying."""
    sizes, warps, stages = (32, 64, 128), (4, 8), (2, 3, 4)
    if rehearse:
        sizes, warps, stages = (16, 32), (4,), (2,)
    return [
        Candidate(kernel, gpu_blocks.Blocks(*numbers))
        for kernel in gpu_blocks.Plan._fields
        for numbers in itertools.product(sizes, sizes, warps, stages)
        # The side that stays is the tensor core's row: fewer than 64 is no unit of Hopper's.
        if rehearse or numbers[1 if kernel == "key_gradients" else 0] >= 64
    ]


def run_tuning(chip: str, deadline: float, rehearse: bool) -> None:
    """Prints the three fastest tiles of each kernel and a row for the table of each head dim."""
    for head_dim in (32,) if rehearse else (128, 64, 256):
        options = Options(head_dim**-0.5, None, 0.0, chip, rehearse)
        candidates = make_candidates(rehearse)
        shapes = tuning_shapes(head_dim, rehearse)
        compiled = compile_all({x: (tune_program(x, options), shapes) for x in candidates})
        best = {}
        for kernel in gpu_blocks.Plan._fields:
            timed = []
            for x in (x for x in candidates if x.kernel == kernel):
                if time.monotonic() < deadline:
                    seconds = measure(jax_builder(compiled[x], shapes))
                    timed += [(seconds, x.blocks)] if isinstance(seconds, float) else []
            timed.sort()
            best[kernel] = timed[0][1] if timed else None
            for seconds, blocks in timed[:3]:
                print(f"# {head_dim} {kernel}: {seconds * 1e3:.3f} ms {tuple(blocks)}", flush=True)
            print(f"# {head_dim} {kernel}: {len(timed)} tiles ran")
        rows = ", ".join("None" if x is None else f"Blocks{tuple(x)}" for x in best.values())
        print(f"        {head_dim}: Plan({rows}),", flush=True)
