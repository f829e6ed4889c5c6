"""Every mesh, ZeRO level, rematerialization and accumulation that could be, ranked by time."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from batiste.planning.memory import GIB, Account, Memory
from batiste.planning.step_time import StepTime, predict
from batiste.planning.workload import Choice, Machine, Policy
from batiste.sharding import AXES, CONTEXT_EXCHANGES, MeshConfig

# What the account may be short of the compiler's peak (docs/plan.md has the errors).
RESERVE = 0.05
# Tried in this order; of policies that keep the same, the first stays. Named are first what flash
# attention's backward pass reads, then the feed-forward's projections too.
ATTENTION = ("query", "key", "value", "attended")
POLICIES = (
    Policy("full"), Policy("none"), Policy("dots"), Policy("names", ATTENTION),
    Policy("names", (*ATTENTION, "up", "gate")),
)
KINDS = ("parameters", "gradients", "optimizer", "activations", "logits", "collectives")


class Plan(NamedTuple):
    """A choice, its memory, its time, and whether a device can hold it."""

    choice: Choice
    memory: Memory
    time: StepTime
    fits: bool


Check = Callable[[Choice], None]


def search(account: Account, machine: Machine, check: Check) -> list[Plan]:
    """All plans, the fastest first; of one mesh, ZeRO and remat, those with the fewest
    micro-batches, and with the fewest that fit.

    check: raises ValueError for a choice that cannot run, as an experiment's `validate_on` does.
    """
    plans = []
    meshes = list(_meshes(machine.num_devices, account.workload.model.num_layers))
    for mesh, policy in itertools.product(meshes, _policies(account)):
        whole = Choice(mesh, policy.remat, 1, policy.saved)
        plans += _with_accumulation(account, machine, whole, check)
    if not plans:
        raise ValueError(
            f"no mesh of {machine} divides this model and train.batch_size="
            f"{account.workload.train.batch_size}: choose a batch that the devices divide"
        )
    return sorted(plans, key=lambda plan: plan.time.total)


def fits(memory: Memory, machine: Machine) -> bool:
    """Whether a device holds it, with a reserve for what the account does not know."""
    return memory.total * (1 + RESERVE) <= machine.device.hbm_bytes


def reason(memory: Memory, machine: Machine) -> str:
    """Why it does not fit: the largest kind, and the sum."""
    kind = max(KINDS, key=lambda name: getattr(memory, name))
    return (
        f"{kind} {getattr(memory, kind) / GIB:.1f} GiB of {memory.total / GIB:.1f} GiB > "
        f"{machine.device.hbm_bytes / GIB:.2f} GiB"
    )


def remedies(account: Account, machine: Machine, choice: Choice, check: Check) -> list[str]:
    """Single changes that would make it fit, as overrides; the least harmful first."""
    found = []
    for text, changed in _changes(account, machine, choice):
        try:
            check(changed)
            if fits(account.estimate(changed), machine):
                found.append(text)
        except ValueError:
            continue
    return found


def remedy_line(account: Account, machine: Machine, choice: Choice, check: Check) -> str:
    """"try A or B", or what to do where no single change helps."""
    found = remedies(account, machine, choice, check)
    return f"try {' or '.join(found[:2])}" if found else "no single change makes it fit"


def _changes(account: Account, machine: Machine, choice: Choice) -> Iterator[tuple[str, Choice]]:
    for zero in range(choice.mesh.zero + 1, 4):
        mesh = dataclasses.replace(choice.mesh, zero=zero)
        yield f"mesh.zero={zero}", choice._replace(mesh=mesh)
    k, batch = choice.accumulation, account.workload.train.batch_size
    for accumulation in range(k + 1, batch + 1):
        if batch % accumulation == 0:
            yield f"train.accumulation={accumulation}", choice._replace(accumulation=accumulation)
    if choice.remat != "full":
        yield "model.remat=full", choice._replace(remat="full", saved=(), offloaded=())
    for axis, size in itertools.product(("context", "tensor"), (2, 4, 8)):
        factor = size / getattr(choice.mesh, axis)
        data = choice.mesh.data / factor
        if factor > 1 and data.is_integer():
            mesh = dataclasses.replace(choice.mesh, data=int(data), **{axis: size})
            yield f"mesh.{axis}={size}", choice._replace(mesh=mesh)


def _with_accumulation(
    account: Account, machine: Machine, whole: Choice, check: Check
) -> list[Plan]:
    """The plan with the fewest micro-batches, and that with the fewest that fits, if another."""
    first = None
    batch = account.workload.train.batch_size
    rows = whole.batch_parts * whole.mesh.micro_batches
    for k in (k for k in range(1, batch // rows + 1) if batch % (rows * k) == 0):
        choice = whole._replace(accumulation=k)
        if first is None:
            try:
                check(choice)
            except ValueError:
                return []
        memory = account.estimate(choice)
        if fits(memory, machine):
            plan = Plan(choice, memory, predict(account, machine, choice), True)
            return [plan] if first is None else [first, plan]
        if first is None:
            first = Plan(choice, memory, predict(account, machine, choice), False)
    return [] if first is None else [first]


def _meshes(num_devices: int, num_layers: int) -> Iterator[MeshConfig]:
    """All meshes of so many devices, with every ZeRO level that splits anything, and with what
    flows through stages or around a ring."""
    inner = [axis for axis in AXES if axis not in ("slice", "data")]
    for sizes in itertools.product(_divisors(num_devices), repeat=len(inner)):
        data = num_devices
        for size in sizes:
            data, rest = divmod(data, size)
            if rest:
                break
        else:
            named = dict(zip(inner, sizes))
            exchanges = CONTEXT_EXCHANGES if named["context"] > 1 else CONTEXT_EXCHANGES[:1]
            for zero, exchange, (micro_batches, interleave) in itertools.product(
                range(4) if data > 1 else (0,), exchanges, _flows(named["stage"], num_layers)
            ):
                yield MeshConfig(
                    data=data, zero=zero, context_exchange=exchange, micro_batches=micro_batches,
                    interleave=interleave, **named,
                )


def _flows(stages: int, num_layers: int) -> Iterator[tuple[int, int]]:
    """Micro-batches and rounds of a pipeline: two to eight micro-batches for each stage."""
    if stages == 1:
        yield 1, 1
    elif num_layers % stages == 0:
        for several, rounds in itertools.product((2, 4, 8), (1, 2, 4)):
            if num_layers % (stages * rounds) == 0:
                yield several * stages, rounds


def _policies(account: Account) -> list[Policy]:
    """The policies, less those that keep what one before them keeps."""
    kept = {}
    for policy in POLICIES:
        kept.setdefault(tuple(account.saved(policy)), policy)
    return list(kept.values())


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
