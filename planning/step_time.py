"""How long a step takes: compute, what waits for memory, exposed communication, pipeline bubble.

A model of the machine and not a measurement: peak rates from the table of devices, times what is
reached of them in practice, which is stated here once. Only `--cpu` measures.
"""

import functools
import math
from typing import NamedTuple

from batiste.planning.memory import Account
from batiste.planning.workload import Choice, Machine, Measured
from batiste.train import flops_per_token

# Of peak, in products with weights: what large products reach on TPUs and GPUs alike.
MATMUL_EFFICIENCY = 0.8
# Of what the matrix unit can do with the head dim: static schedules of our kernels on v5e and v6e,
# forward and backward, the latter slower on the device by a quarter (benchmarks/README.md).
ATTENTION_EFFICIENCY = 0.85
# Of bandwidth, reached by copies.
BANDWIDTH_EFFICIENCY = 0.9
# What the compiler cannot hide even of communication that has work beside it.
NEVER_HIDDEN = 0.1


class StepTime(NamedTuple):
    """Seconds of a step. exposed: by mesh axis, what of its communication nothing hides.

    memory: elementwise work, norms, the optimizer. bubble: stages that wait for each other.
    """

    compute: float
    memory: float
    exposed: dict[str, float]
    bubble: float

    @property
    def total(self) -> float:
        """Seconds of a whole step."""
        return self.compute + self.memory + sum(self.exposed.values()) + self.bubble


class Flops(NamedTuple):
    """Training FLOPs of a token, forward and backward, none of it twice."""

    layers: float
    head: float
    attention: float

    @property
    def total(self) -> float:
        """As in `train.flops_per_token`, which MFU is computed from."""
        return sum(self)


@functools.lru_cache(maxsize=4)
def flops_of(account: Account) -> Flops:
    """The model's FLOPs of a token by part."""
    workload, program = account.workload, account.program
    params, letters = program.abstract_state.params, program.letters
    total = flops_per_token(workload.model, params, letters, workload.length)
    products = flops_per_token(workload.model, params, letters, 0)
    head = 6.0 * workload.model.model_dim * workload.model.vocab_size
    return Flops(products - head, head, total - products)


def predict(account: Account, machine: Machine, choice: Choice) -> StepTime:
    """Seconds of a step of this choice on this machine."""
    if machine.measured is not None:
        return _measured(account, machine.measured, choice)
    tokens = account.workload.tokens_per_step / machine.num_devices
    compute, attention = _compute(account, machine, choice, tokens)
    memory = _memory(account, machine, choice)
    exposed = _exposed(account, machine, choice, (compute, attention))
    # Of ticks M R + S - 1 a stage waits S - 1; embedding and head are not on a stage.
    flops, waits = flops_of(account), choice.mesh.stage - 1
    in_layers = 1 - flops.head / flops.total
    waiting = waits / (choice.ticks - waits) * in_layers
    return StepTime(compute, memory, exposed, bubble=waiting * (compute + memory))


def _measured(account: Account, measured: Measured, choice: Choice) -> StepTime:
    """Of a machine that was measured: layers, what is computed again in them, and the rest."""
    again = account.recomputes(choice.policy).products
    layers = account.workload.model.num_layers * measured.layer * (1 + again / 3)
    return StepTime(account.workload.tokens_per_step * (layers + measured.rest), 0.0, {}, 0.0)


def mfu(account: Account, machine: Machine, seconds: float) -> float:
    """tokens/s x training FLOPs of a token / peak FLOP/s of all devices."""
    peak = machine.device.flops["bfloat16"] * machine.num_devices
    tokens_per_second = account.workload.tokens_per_step / seconds
    return tokens_per_second * flops_of(account).total / peak


def _compute(account: Account, machine: Machine, choice: Choice, tokens: float) -> tuple:
    """Seconds in matrix units, and those of them in attention."""
    flops, device, model = flops_of(account), machine.device, account.workload.model
    again = account.recomputes(choice.policy)
    # Forward 2 products, backward 5, one of them the forward's again; 2 more if recomputed.
    attention = flops.attention / 12 * (14 + 4 * again.attention)
    rate = device.flops["bfloat16"]
    filled = min(1.0, model.head_dim / device.matrix_width)
    attending = tokens * attention / (rate * ATTENTION_EFFICIENCY * filled)
    products = product_flops(account, machine, choice)
    return products / (rate * MATMUL_EFFICIENCY) + attending, attending


def product_flops(account: Account, machine: Machine, choice: Choice) -> float:
    """FLOPs of a device in products with weights, those that are done twice counted twice."""
    flops, tokens = flops_of(account), account.workload.tokens_per_step / machine.num_devices
    again = account.recomputes(choice.policy).products
    return tokens * (flops.layers * (1 + again / 3) + flops.head)


def _memory(account: Account, machine: Machine, choice: Choice) -> float:
    """Seconds at HBM bandwidth: each activation of a layer and each logit written and read once in
    each direction, the sum of the head's gradient for each chunk, the state once in the update."""
    model, mesh = account.workload.model, choice.mesh
    state = account.state(mesh)
    layers = model.num_layers / mesh.stage * mesh.micro_batches
    passes = 3 if choice.remat != "none" else 2
    activations = passes * 2 * layers * account.work_bytes(choice)
    activations += 2 * account.saved_bytes(choice)
    logits = 2 * (account.logits_bytes(choice) + (state.head or state.embedding)) * account.chunks
    update = 2 * (state.optimizer + state.offloaded + state.gradients + state.parameters)
    moved = choice.accumulation * (activations + logits) + update
    return moved / (machine.device.hbm_bandwidth * BANDWIDTH_EFFICIENCY)


def _exposed(
    account: Account, machine: Machine, choice: Choice, compute: tuple[float, float]
) -> dict[str, float]:
    """Seconds of communication that nothing hides, by axis; axes of one are left out."""
    sent = bytes_sent(account, choice)
    ring = choice.mesh.context_exchange == "ring"
    cover = {"data": compute[0], "context": compute[1] if ring else 0.0}
    exposed = {}
    for axis, size in sent.items():
        if choice.sizes[axis] == 1:
            continue
        seconds = size / axis_bandwidth(machine, choice, axis)
        exposed[axis] = max(NEVER_HIDDEN * seconds, seconds - cover.get(axis, 0.0))
    return exposed


def bytes_sent(account: Account, choice: Choice) -> dict[str, float]:
    """Bytes that a device sends along each axis in a step."""
    model, mesh, k = account.workload.model, choice.mesh, choice.accumulation
    layers, item = model.num_layers / mesh.stage, account.item
    part = {axis: (size - 1) / size for axis, size in choice.sizes.items()}
    stream = account.tokens(choice) * model.model_dim * item
    again = account.recomputes(choice.policy).products
    # A tick sends a micro-batch on, forward and backward; embedding and head are sums over stages.
    flowing = 2 * choice.ticks / mesh.micro_batches + 4 * 2 * part["stage"]
    return {
        "tensor": k * layers * stream * (8 + 3 * again) * part["tensor"],
        "context": k * layers * _attention_sent(account, choice),
        "expert": k * layers * stream * model.experts_per_token * (4 + 2 * again) * part["expert"],
        "stage": k * flowing * stream / mesh.tensor,
        "data": _weights_sent(account, choice) * part["data"],
        "slice": 2 * account.state(mesh).gradients * part["slice"],
    }


def _weights_sent(account: Account, choice: Choice) -> float:
    """Bytes of weights gathered and gradients reduced in a step, on a ring of very many devices.

    Weights travel in the compute dtype, gradients in fp32; the lookup's gradient is summed whole.
    ZeRO-2 and 3 do so in every accumulation step, and with its layers at every tick of a pipeline.
    """
    mesh, state, k = choice.mesh, account.state(choice.mesh), choice.accumulation
    layers = state.layer * account.periods / mesh.stage
    everything = layers + state.embedding + state.head
    if mesh.zero < 2:
        several = k * mesh.micro_batches > 1  # Then gradients are scattered once a step.
        twice = 0.0 if state.head or several else state.embedding
        return everything * (3 if mesh.zero == 1 and not several else 2) + 2 * twice
    weights = account.item / 4 if mesh.zero >= 3 else 0.0
    ticks = choice.ticks / mesh.interleave if mesh.stage > 1 else 1
    each = layers * ticks * (2 * weights + 1) + state.embedding * (weights + 2)
    each += (state.head or state.embedding) * (weights + 1)
    return k * each + (everything if mesh.zero == 2 else 0.0)


def _attention_sent(account: Account, choice: Choice) -> float:
    """Bytes that attention in one layer sends along `context`, forward and backward."""
    model, mesh = account.workload.model, choice.mesh
    head = account.tokens(choice) * model.head_dim * account.item / mesh.tensor
    again = account.recomputes(choice.policy).attention
    if mesh.context_exchange == "ring":
        return 2 * model.num_kv_heads * head * (3 + again) * (mesh.context - 1)
    moved = 2 * (model.num_heads + model.num_kv_heads) * head * (2 + again)
    return moved * (mesh.context - 1) / mesh.context


def axis_bandwidth(machine: Machine, choice: Choice, axis: str) -> float:
    """Bytes/s that a device can send along a mesh axis.

    On a torus an axis has the links of as many dims as it takes to hold it. Behind a switch it has
    all links, while it and the axes inside it fit into one machine.
    """
    device, sizes = machine.device, choice.sizes
    if axis == "slice":
        return device.network_bandwidth
    if not device.torus_dims:
        names = list(sizes)
        inside = math.prod(sizes[name] for name in names[names.index(axis):])
        return device.link_bandwidth if inside <= device.neighbours else device.network_bandwidth
    held, dims = device.devices_per_chip, 0
    for size in sorted(machine.topology, reverse=True):
        if dims and held >= sizes[axis]:
            break
        held, dims = held * size, dims + 1
    return device.link_bandwidth * dims / device.torus_dims
