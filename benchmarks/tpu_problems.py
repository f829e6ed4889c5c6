"""What tpu_static.py compiles: causal attention for one chip, ours and others'.

    python benchmarks/tpu_problems.py '{"contestant": "batiste", "chip": "v6e", ...}'

compiles one problem and prints one line of JSON; `compile_problem` runs that as a process and reads
the schedule that it leaves. There are so many heads that no operand fits into VMEM, where the
compiler would otherwise put it, which would change the kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from batiste.pallas_kernels import AttentionMask, tpu_attention
from batiste.pallas_kernels.operands import Operands, Options
from batiste.pallas_kernels.tpu_blocks import Blocks
from batiste.pallas_kernels.tpu_plan import make_plan
from tpu_schedule import Kernel, Schedule, dissect, environment, read

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
OURS, SPLASH, TOKAMAX = "batiste", "splash (jax)", "splash (tokamax)"
EXPERIMENTAL = "splash (tokamax, experimental scheduler)"  # Changes its forward pass only.
OPERAND_BYTES, HEADS = 2**28, 8


class Problem(NamedTuple):
    """One kernel: S queries and keys, bf16; `blocks` are a Blocks for ours, else queries, keys and
    keys of one product; `causal` False leaves the mask away (ours only)."""

    contestant: str
    chip: str
    head_dim: int
    length: int
    backward: bool
    blocks: tuple[int, ...]
    causal: bool = True


class Visits(NamedTuple):
    """What a body is for; how often it is entered, and for how many rounds of its loop in all."""

    body: str
    sections: int
    rounds: int


class Counts(NamedTuple):
    """What `heads` heads side by side cost: steps, rows whose edges are run, visits of bodies."""

    steps: int
    edges: int
    visits: list[Visits]
    heads: int = 1


class Compiled(NamedTuple):
    """A problem's schedule; the VMEM that the kernel uses."""

    problem: Problem
    schedule: Schedule
    kernel: Kernel
    counts: Counts
    vmem_bytes: int

    def cycles_of_head(self) -> int:
        """The cost of one head with all its tiles."""
        return round(self.cycles_of_step_heads() / self.counts.heads)

    def cycles_of_step_heads(self) -> int:
        """The cost of the heads that a step works off side by side."""
        bodies = zip(self.kernel.bodies, self.counts.visits, strict=True)
        return (self.counts.steps * self.kernel.step_cycles
                + self.counts.edges * self.kernel.edge_cycles
                + sum(body.cycles(visits.sections, visits.rounds) for body, visits in bodies))


def compile_problem(problem: Problem) -> Compiled | str:
    """The compiled problem, or why there is none in one line."""
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.run(
            [sys.executable, __file__, json.dumps(problem._asdict())],
            env=environment(folder), capture_output=True, text=True,
        )
        if child.returncode:
            return reason(child.stderr)
        facts = json.loads(child.stdout.splitlines()[-1])
        counts = Counts(facts["steps"], facts["edges"], [Visits(*pair) for pair in facts["visits"]],
                        facts["heads"])
        schedule = read(folder, facts["kernel"])
        return Compiled(problem, schedule, dissect(schedule), counts, facts["vmem_bytes"])


def reason(stderr: str) -> str:
    """The line of a failed process that says what was wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"^[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["it said nothing"])[-1][:160]


def compile_for(chip: str, function: Callable, shapes: list[jax.ShapeDtypeStruct]):
    """The function compiled for one core of the chip by the TPU's own compiler."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    sharding = SingleDeviceSharding(topology.devices[0])
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes]
    return jax.jit(function).lower(*placed).compile()


def vmem_bytes(compiled, kernel: str) -> int:
    """What the kernel allocates in VMEM, from the compiler's note beside its call."""
    note = rf'%\S*{kernel}\S* = .*?"used_scoped_memory_configs":\[(.*?)\]'
    found = re.search(note, compiled.as_text(), re.DOTALL)
    if not found:
        raise ValueError(f"the compiled program does not say what VMEM {kernel} uses")
    return sum(map(int, re.findall(r'"size":"(\d+)"', found[1])))


def ours(problem: Problem) -> tuple[Callable, list, str, Counts]:
    """The kernel's function, its operands, its name, and the counts of a head."""
    B, N, S, H = _batch(problem), HEADS, problem.length, problem.head_dim
    x_BSNH = jax.ShapeDtypeStruct((B, S, N, H), jnp.bfloat16)
    x_BSN = jax.ShapeDtypeStruct((B, S, N), jnp.float32)
    mask = AttentionMask(problem.causal)
    options = Options(H**-0.5, None, 0.0, problem.chip, False, Blocks(*problem.blocks))

    def operands(q, k, v):
        return Operands(q, k, v, mask, None, None, None)

    plan, lists = make_plan(options, operands(x_BSNH, x_BSNH, x_BSNH), problem.backward)
    if plan.chunks > 1:
        raise ValueError("a head in several chunks is not counted")
    counts_RK = lists["counts"].reshape(-1, 3)
    visits = [Visits(body, int((counts_R > 0).sum()), int(counts_R.sum()))
              for body, counts_R in zip(("full", "diagonal", "partial"), counts_RK.T)
              if counts_R.any()]
    counts = Counts(len(counts_RK), 1, visits, plan.heads)
    if not problem.backward:
        return (lambda q, k, v: tpu_attention.forward(options, operands(q, k, v)), [x_BSNH] * 3,
                "flash_forward", counts)
    return (lambda q, k, v, *rest: tpu_attention.backward(options, operands(q, k, v), *rest),
            [x_BSNH] * 4 + [x_BSN] * 2, "flash_backward", counts)


def splash(problem: Problem) -> tuple[Callable, list, str, Counts]:
    """The same for either splash; every block of the grid is a step, or every active one."""
    query, key, product = problem.blocks
    N, S, H = HEADS * _batch(problem), problem.length, problem.head_dim
    blocks = dict(block_q=query, block_kv=key, block_kv_compute=product, block_q_dkv=query,
                  block_kv_dkv=key, block_kv_dkv_compute=product, use_fused_bwd_kernel=True)
    if problem.contestant == SPLASH:
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel as library, splash_attention_mask as masks,
        )
        mask = masks.MultiHeadMask([masks.CausalMask((S, S))] * N)
        attention = library.make_splash_mha(
            mask, block_sizes=library.BlockSizes(**blocks), head_shards=1, q_seq_shards=1)
    else:
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_kernel as library, splash_attention_mask as masks,
        )
        config = library.SplashConfig(
            **blocks, use_experimental_scheduler=problem.contestant == EXPERIMENTAL)
        attention = library.make_splash_mha(
            masks.CausalMask((S, S)), config=config, q_seq_shards=1)
    info = attention.dkv_mask_info if problem.backward else attention.fwd_mask_info
    kinds = np.asarray(info.block_mask)
    kinds = kinds[0] if problem.contestant == SPLASH else kinds
    # 0 is empty, 1 is cut by the mask, 2 is full. jax's kernel has one body, which masks always;
    # tokamax's has one for full blocks and then one for cut ones.
    cut, full = (int((kinds == kind).sum()) for kind in (1, 2))
    runs = {"any": cut + full} if problem.contestant == SPLASH else {"full": full, "masked": cut}
    rows = S // (key if problem.backward else query)
    counts = Counts(kinds.size, rows, [Visits(body, run, run) for body, run in runs.items()])
    x_NSH = jax.ShapeDtypeStruct((N, S, H), jnp.bfloat16)
    if not problem.backward:
        return attention, [x_NSH] * 3, "splash_mha_fwd", counts
    return (lambda q, k, v, g: jax.vjp(attention, q, k, v)[1](g), [x_NSH] * 4, "splash_mha_dkv",
            counts)


def _batch(problem: Problem) -> int:
    """So many rows of HEADS heads that one operand has OPERAND_BYTES."""
    return max(1, OPERAND_BYTES // (2 * HEADS * problem.length * problem.head_dim))


def main(argument: str) -> None:
    """Compiles the problem and prints what the schedule does not say."""
    problem = Problem(**json.loads(argument))
    build = ours if problem.contestant == OURS else splash
    function, shapes, kernel, counts = build(problem)
    compiled = compile_for(problem.chip, function, shapes)
    print(json.dumps(counts._asdict() | {
        "kernel": kernel, "vmem_bytes": vmem_bytes(compiled, kernel)}))


if __name__ == "__main__":
    main(sys.argv[1])
