"""Where an experiment meets the planner: what it would take elsewhere, and whether it fits here."""

import dataclasses
import sys
from collections.abc import Callable

from batiste.configs.experiment import Experiment
from batiste.models import resolve_attention
from batiste.planning import (
    SHOWN, Account, Budget, Choice, Machine, Workload, comparison, fits, machine_here, measure_cpu,
    memory_block, overrides, reason, rejections, remedy_line, search, table,
)
from batiste.sharding import AXES


def plan(
    experiment: Experiment, machine: Machine | None, budget: Budget, compiles: bool = False,
    applies: bool = False,
) -> str:
    """What the experiment would take on a machine, on every mesh that it could have there.

    machine: None measures this machine's CPU. compiles: adds what the TPU's compiler says of the
    fastest plan that fits. applies: the answer is the overrides for that plan, and nothing else.
    Raises ValueError where nothing fits.
    """
    unknown = _unknown(experiment)
    if unknown is not None:
        raise ValueError(f"{unknown}; `batiste train` trains them without a plan")
    workload = _workload(experiment, "cpu" if machine is None else machine.device.kind)
    machine = measure_cpu(workload) if machine is None else machine
    account, check = Account(workload), _checker(experiment, machine)
    plans = search(account, machine, check)
    best = [each for each in plans if each.fits][:SHOWN]
    rejected = rejections(account, machine, plans, check)
    if not best:
        raise ValueError(f"nothing fits on {machine}; closest: {rejected[0]}")
    if applies:
        return overrides(best[0].choice, choice_of(experiment, machine.num_devices))
    blocks = [table(account, machine, best, budget)]
    strange = account.unknown(best[0].choice)
    if strange is not None:
        blocks.append(strange)
    if rejected:
        blocks.append("\n".join(["would be faster, but do not fit:", *rejected]))
    if compiles:
        blocks.append(comparison(account, machine, best[0].choice))
    return "\n\n".join(blocks)


def check_memory(experiment: Experiment) -> None:
    """Raises ValueError, with the memory by kind and what to change, for a run that cannot fit.

    A model that the planner does not know is let through, with a line on stderr.
    """
    machine = machine_here()
    if machine is None:
        return
    unknown = _unknown(experiment)
    if unknown is not None:
        print(f"{unknown}, so nobody has checked whether the memory suffices", file=sys.stderr)
        return
    account = Account(_workload(experiment, machine.device.kind))
    choice = choice_of(experiment, machine.num_devices)
    memory, strange = account.estimate(choice), account.unknown(choice)
    if strange is not None:
        print(strange, file=sys.stderr)
    if fits(memory, machine):
        return
    remedy = remedy_line(account, machine, choice, _checker(experiment, machine))
    raise ValueError(
        f"this run does not fit on {machine}\n{memory_block(memory, machine)}\n"
        f"{reason(memory, machine)}: {remedy}; --force runs it all the same"
    )


def _workload(experiment: Experiment, device_kind: str) -> Workload:
    """What is planned, with attention settled for the device."""
    model, _ = resolve_attention(experiment.model, device_kind, {})
    return Workload(model, experiment.train, experiment.data.sequence_length)


def _unknown(experiment: Experiment) -> str | None:
    """What of the model the planner does not know; None where it knows all."""
    model = experiment.model
    if model.mixer != "attention":
        return f"model.mixer={model.mixer!r}: the planner does not know mixers of your own"
    return None


def choice_of(experiment: Experiment, num_devices: int) -> Choice:
    """What the config itself chooses."""
    sizes = dict(zip(AXES, experiment.mesh.shape(num_devices), strict=True))
    mesh = dataclasses.replace(experiment.mesh, **sizes)
    model = experiment.model
    return Choice(
        mesh, model.remat, experiment.train.accumulation, model.saved, model.offloaded
    )


def _checker(experiment: Experiment, machine: Machine) -> Callable[[Choice], None]:
    """Raises ValueError for a choice that this experiment could not run with."""

    def check(choice: Choice) -> None:
        dataclasses.replace(
            experiment,
            mesh=choice.mesh,
            model=dataclasses.replace(experiment.model, **choice.policy._asdict()),
            train=dataclasses.replace(experiment.train, accumulation=choice.accumulation),
        ).validate_on(machine.num_devices)

    return check
