"""Processes connect their devices before any of them waits for a program that others still compile."""

import itertools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from batiste.sharding.processes import together

COMPILE_SECONDS = 3600.0


def connect_groups(mesh: Mesh) -> None:
    """Makes a collective over every group of devices that the axes of a mesh form.

    A group of devices is connected in its first collective. There the others wait 30 s (gloo, on
    CPUs) or 40 s (GPUs) for the last process and then end the run, however long it still compiles;
    once a group is connected they wait without an end. So it happens here, in programs that take a
    moment, after all processes have compiled them. All processes of a run call this alike.
    """
    if not mesh.is_multi_process:
        return
    # What jax and Orbax themselves send goes between the n-th devices of all processes.
    devices = np.array(jax.devices()).reshape(jax.process_count(), jax.local_device_count())
    calls = [_compiled_sums(each) for each in (mesh, Mesh(devices, ("process", "local")))]
    together("compile what connects the devices", seconds=COMPILE_SECONDS)
    for compiled, x in calls:
        jax.block_until_ready(compiled(x))


def _compiled_sums(mesh: Mesh) -> tuple[Callable, jax.Array]:
    """A compiled program of sums over every combination of the axes of a mesh, and its argument."""
    axes = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    groups = [group for count in range(1, len(axes) + 1)
              for group in itertools.combinations(axes, count)]

    def sums(x):
        return [jax.lax.psum(x, group) for group in groups]

    spec = PartitionSpec(mesh.axis_names)
    numbers = np.arange(mesh.size, dtype=np.int32)
    x = jax.make_array_from_callback(
        numbers.shape, NamedSharding(mesh, spec), lambda index: numbers[index])
    mapped = jax.jit(jax.shard_map(
        sums, mesh=mesh, in_specs=spec, out_specs=[spec] * len(groups), check_vma=False))
    return mapped.lower(x).compile(), x
