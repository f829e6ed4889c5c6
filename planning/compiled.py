"""The real training step, compiled for TPUs that are not here: libtpu compiles on a CPU machine."""

import math
import os
import pathlib
import re
import tempfile
import time
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding

from batiste.data import Batch
from batiste.models import resolve_attention
from batiste.planning.buffers import writing_to
from batiste.planning.memory import GIB, Account
from batiste.planning.program_text import read_program
from batiste.planning.report import aligned, describe
from batiste.planning.step_time import bytes_sent, flops_of, product_flops
from batiste.planning.workload import Choice, Machine, Workload
from batiste.sharding import make_mesh, spec
from batiste.train import make_program, make_train_step


class Compiled(NamedTuple):
    """What the compiler found for each device.

    peak_bytes: of HBM; None where it refused: then it wanted `refused`. flops: by its own count.
    text: the optimized program.
    """

    peak_bytes: int | None
    refused: str | None = None
    flops: float = math.nan
    text: str = ""


def lower_step(workload: Workload, machine: Machine, choice: Choice) -> jax.stages.Lowered:
    """The training step of a choice, with the attention kernels of the chip, traced and lowered."""
    workload = workload.chosen(choice)
    mesh = make_mesh(choice.mesh, _topology_devices(machine))
    kind = mesh.devices.flat[0].device_kind
    model, _ = resolve_attention(workload.model, kind, mesh.shape)
    program = make_program(model, workload.train, mesh, choice.mesh)
    step = make_train_step(program, workload.train, mesh)
    shape, sharding = (workload.train.batch_size, workload.length), NamedSharding(mesh, spec("BT"))
    batch = Batch(**{
        name: jax.ShapeDtypeStruct(
            shape, np.float32 if name == "weights_BT" else np.int32, sharding=sharding
        )
        for name in workload.arrays
    })
    with jax.set_mesh(mesh):
        return step.jitted.lower(program.abstract_state, batch)


def compile_step(workload: Workload, machine: Machine, choice: Choice) -> Compiled:
    """Compiles it; a step that does not fit is refused by the compiler, which is an answer too."""
    lowered = lower_step(workload, machine, choice)
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = lowered.compile(writing_to(folder))
        except jax.errors.JaxRuntimeError as error:
            return Compiled(None, refused_bytes(error))
        (text,) = pathlib.Path(folder).glob("*.after_optimizations.txt")
        flops = program.cost_analysis().get("flops", math.nan)
        peak = program.memory_analysis().peak_memory_in_bytes
        return Compiled(peak, None, flops, text.read_text())


def refused_bytes(error: jax.errors.JaxRuntimeError) -> str:
    """How much a program wants and is refused; any other error is raised again."""
    wanted = re.search(r"\(([\d.]+[KMG])\) exceeds available HBM", str(error))
    if wanted is None:
        raise error
    return wanted[1]


def _topology_devices(machine: Machine) -> list:
    if not machine.topology:
        raise ValueError(
            f"--compile on {machine}: only TPU topologies compile without the hardware; leave "
            "--compile out, or give --topology"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There is no metadata server to ask.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    shape = "x".join(map(str, machine.topology))
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{machine.device.name}:{shape}"
    ).devices


def comparison(account: Account, machine: Machine, choice: Choice) -> str:
    """Compiles a choice and says what the compiler found beside what was predicted."""
    started = time.perf_counter()
    compiled = compile_step(account.workload, machine, choice)
    seconds = time.perf_counter() - started
    head = f"compiled for {machine} in {seconds:.0f} s: {describe(choice)}"
    peak = f"{account.estimate(choice).total / GIB:.2f} GiB"
    rows = [["", "predicted", "compiler"]]
    if compiled.peak_bytes is None:
        rows.append(["peak HBM", peak, f"refused, wants {compiled.refused}"])
        return "\n".join([head, *aligned(rows)])
    rows.append(["peak HBM", peak, f"{compiled.peak_bytes / GIB:.2f} GiB"])
    total = flops_of(account).total * account.workload.tokens_per_step / machine.num_devices
    rows.append(["FLOPs, attention too (compiler: loops once, no kernels)", f"{total:.4g}",
                 f"{compiled.flops:.4g}"])
    found = read_program(compiled.text)
    rows.append(["FLOPs of products, a device", f"{product_flops(account, machine, choice):.4g}",
                 f"{found.flops:.4g}"])
    sent = sum(bytes_sent(account, choice).values())
    moved = sum(found.collectives.values())
    rows.append(["collectives, bytes a device", f"{sent:.4g}", f"{moved:.4g}"])
    rows += [[f"  {kind}", "", f"{size:.4g}"] for kind, size in found.collectives.items()]
    return "\n".join([head, *aligned(rows)])
