"""A plan as a person reads it: the ranked table, what was rejected and why, overrides to paste."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from batiste.planning.memory import GIB, Account, Memory
from batiste.planning.search import KINDS, Check, Plan, reason, remedy_line
from batiste.planning.step_time import flops_of, mfu
from batiste.planning.workload import Choice, Machine
from batiste.sharding import AXES, MeshConfig

SHOWN = 10
REJECTED = 3


class Budget(NamedTuple):
    """What is to be reached: training tokens; dollars (or any money) of a chip-hour, if known."""

    tokens: float
    price_per_chip_hour: float | None


def table(account: Account, machine: Machine, plans: Sequence[Plan], budget: Budget) -> str:
    """The fastest plans that fit, one a line, under a head that says what the columns are."""
    workload, device = account.workload, machine.device
    flops, peak = flops_of(account).total, device.flops["bfloat16"] * machine.num_devices
    shared = " (two devices a chip)" if device.devices_per_chip == 2 else ""
    lines = [
        f"{machine}: {machine.num_devices:,} devices{shared} with {device.hbm_bytes / GIB:.2f} "
        f"GiB; {workload.tokens_per_step:,} tokens a step, {budget.tokens:.4g} in all",
        f"MFU = tokens/s x training FLOPs per token / peak FLOP/s = tokens/s x {flops:.4g} / "
        f"{peak:.4g}",
        "GiB per device: par(ameters), gra(dients), opt(imizer), act(ivations), log(its), "
        "col(lectives: weights gathered, copied)",
        "seconds of a step: com(pute), mem(ory-bound), what is exposed of communication by axis, "
        "bub(ble)",
        "",
    ]
    rows = [_head(plans, budget)]
    rows += [
        [str(rank), *_cells(account, machine, plan, plans), *_costs(account, machine, plan, budget)]
        for rank, plan in enumerate(plans, 1)
    ]
    return "\n".join(lines + aligned(rows))


def rejections(
    account: Account, machine: Machine, plans: Sequence[Plan], check: Check
) -> list[str]:
    """The fastest plans that do not fit and would beat all that do, each with a way to mend it."""
    best = min((plan.time.total for plan in plans if plan.fits), default=float("inf"))
    lines, seen = [], set()
    for plan in plans:
        key = tuple(plan.choice.sizes.values()), plan.choice.policy
        if plan.fits or plan.time.total >= best or key in seen or len(lines) == REJECTED:
            continue
        seen.add(key)
        why = f"{reason(plan.memory, machine)}: {remedy_line(account, machine, plan.choice, check)}"
        lines.append(f"{describe(plan.choice)}, {plan.time.total:.4g} s: {why}")
    return lines


def overrides(choice: Choice, now: Choice) -> str:
    """Flags that turn the config `now` into the choice; mesh.data is always said."""
    flags = [
        f"--config.mesh.{field.name}={getattr(choice.mesh, field.name)}"
        for field in dataclasses.fields(MeshConfig)
        if field.name == "data" or getattr(choice.mesh, field.name) != getattr(now.mesh, field.name)
    ]
    if choice.remat != now.remat:
        flags.append(f"--config.model.remat={choice.remat}")
    flags += [
        f"--config.model.{name}=\"{getattr(choice, name)}\"" for name in ("saved", "offloaded")
        if getattr(choice, name) != getattr(now, name)
    ]
    if choice.accumulation != now.accumulation:
        flags.append(f"--config.train.accumulation={choice.accumulation}")
    return " ".join(flags)


def memory_block(memory: Memory, machine: Machine) -> str:
    """The memory of one choice by kind, against what a device has."""
    rows = [["", "GiB per device"]]
    rows += [[kind, f"{getattr(memory, kind) / GIB:.2f}"] for kind in KINDS]
    rows.append(["sum", f"{memory.total / GIB:.2f}"])
    rows.append(["there is", f"{machine.device.hbm_bytes / GIB:.2f}"])
    return "\n".join(aligned(rows))


def describe(choice: Choice) -> str:
    """A choice in words."""
    sizes = " x ".join(f"{axis} {size}" for axis, size in choice.sizes.items() if size > 1)
    flow = f" {_flow(choice)}" if choice.mesh.stage > 1 else ""
    exchange = f" {choice.mesh.context_exchange}" if choice.mesh.context > 1 else ""
    return (f"{sizes or 'one device'}{flow}{exchange}, zero {choice.mesh.zero}, remat "
            f"{_policy(choice)}, accumulation {choice.accumulation}")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]


def _policy(choice: Choice) -> str:
    """The policy, with how many tensors it names."""
    return f"names:{len(choice.saved)}" if choice.remat == "names" else choice.remat


def _flow(choice: Choice) -> str:
    """Micro-batches that flow through the stages, and how often each."""
    return f"{choice.mesh.micro_batches}x{choice.mesh.interleave}"


def _axes(plans: Sequence[Plan]) -> list[str]:
    """Axes that any of the plans uses."""
    return [axis for axis in AXES if any(plan.choice.sizes[axis] > 1 for plan in plans)]


def _extra_head(axes: Sequence[str]) -> list[str]:
    """Columns that only pipelines and split rows need."""
    return ["flow"] * ("stage" in axes) + ["exchange"] * ("context" in axes)


def _head(plans: Sequence[Plan], budget: Budget) -> list[str]:
    axes = _axes(plans)
    head = ["#", *axes, *_extra_head(axes), "zero", "remat", "micro", "accum",
            *(kind[:3] for kind in KINDS), "= GiB", "com", "mem", *axes, "bub", "= s", "MFU",
            "tokens/s", "days", "chip-hours"]
    return head if budget.price_per_chip_hour is None else [*head, "cost"]


def _cells(account: Account, machine: Machine, plan: Plan, plans: Sequence[Plan]) -> list[str]:
    choice, time, axes = plan.choice, plan.time, _axes(plans)
    micro = account.workload.train.batch_size // choice.accumulation
    exposed = (time.exposed.get(axis, 0.0) for axis in axes)
    columns = {
        "flow": _flow(choice) if choice.mesh.stage > 1 else "-",
        "exchange": choice.mesh.context_exchange if choice.mesh.context > 1 else "-",
    }
    extra = (columns[name] for name in _extra_head(axes))
    seconds = (time.compute, time.memory, *exposed, time.bubble)
    return [
        *(str(choice.sizes[axis]) for axis in axes), *extra, str(choice.mesh.zero), _policy(choice),
        str(micro), str(choice.accumulation),
        *(f"{getattr(plan.memory, kind) / GIB:.2f}" for kind in KINDS),
        f"{plan.memory.total / GIB:.2f}", *(f"{value:.3g}" for value in seconds),
        f"{time.total:.4g}", f"{mfu(account, machine, time.total):.1%}",
    ]


def _costs(account: Account, machine: Machine, plan: Plan, budget: Budget) -> list[str]:
    """Tokens/s, days and chip-hours to the budget, and money."""
    rate = account.workload.tokens_per_step / plan.time.total
    hours = budget.tokens / rate / 3600
    cells = [f"{rate:,.0f}", f"{hours / 24:,.2f}", f"{hours * machine.chips:,.0f}"]
    if budget.price_per_chip_hour is None:
        return cells
    return [*cells, f"{hours * machine.chips * budget.price_per_chip_hour:,.0f}"]
