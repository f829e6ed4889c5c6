"""Bytes on each device at the fullest moments of a training step, without compiling it.

State comes from `make_program` itself (planning/state.py), what is kept for the backward pass from
the model's own derivative (planning/saved.py), what is at work in a layer from planning/work.py.
What is left is an account of what is alive at five moments, found by reading what the TPU's
compiler holds at its peak (docs/plan.md has the errors).
"""

import dataclasses
import functools
from typing import NamedTuple

from batiste.planning.saved import UNKNOWN, bytes_per_row, repetitions, saved_arrays
from batiste.planning.state import StateBytes, program_of, state_bytes
from batiste.planning.work import work_of_token
from batiste.planning.workload import Choice, Policy, Workload
from batiste.sharding import AXES, MeshConfig
from batiste.train import Program

GIB = 2**30


class Memory(NamedTuple):
    """Bytes per device by kind, at the moment when their sum is largest; that moment's name.

    activations: kept for the backward pass, and at work in it. collectives: copies of weights, in
    the compute dtype or gathered whole, and their gradients before they are scattered.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    collectives: float
    moment: str

    @property
    def total(self) -> float:
        """The peak, in bytes."""
        return sum(self[:-1])


class Recomputes(NamedTuple):
    """Whether a layer's products with weights, and its attention, are computed twice."""

    products: bool
    attention: bool


class Account:
    """Estimates the memory of one workload on any mesh; what it looks up it looks up once."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self._states = functools.cache(self._state_of)
        self._rows = functools.cache(self._row_of)
        self._programs = functools.cache(self._program)
        self.saved = functools.cache(self._saved_by)

    def estimate(self, choice: Choice) -> Memory:
        """The fullest moment; ValueError where a mesh axis does not divide a dim that it splits."""
        moments = self.moments(choice)
        return max(moments, key=lambda memory: memory.total)

    def moments(self, choice: Choice) -> list[Memory]:
        """When the loss is computed, the head's gradient summed, a layer differentiated, the
        embedding, the update made."""
        state, mesh = self.state(choice.mesh), choice.mesh
        item = self.item
        gathers, pipelined = mesh.zero >= 3, mesh.stage > 1
        saved = self.saved_bytes(choice)
        kept = self.kept_weights(choice)
        sum_so_far = state.gradients if choice.accumulation > 1 else 0.0
        Moment = functools.partial(Memory, state.parameters, optimizer=state.optimizer, logits=0.0)
        head = state.head or state.embedding
        stream = self.tokens(choice) * self.workload.model.model_dim
        gathered = head * item / 4 if gathers else 0.0
        loss = Moment(
            gradients=sum_so_far + head, activations=saved + 4 * stream,
            collectives=kept + gathered, moment="loss",
        )._replace(logits=self.logits_bytes(choice))
        # Each device's, and the sum of all; a layer waits for the share that ZeRO-2 leaves of it.
        scattered = mesh.zero >= 2 and mesh.data > 1
        summing = loss._replace(
            logits=0.0, collectives=kept + (head if scattered else 0.0), moment="head")
        # A layer's weights in the compute dtype, the next one's where they are gathered ahead; and
        # the gradients of the layer, in fp32.
        in_flight = state.layer * (item / 4 * (2 if gathers else 1) + 1)
        # A pipeline sums gradients over its ticks; what was kept of one tick is copied out, and
        # what enters or leaves it waits for all micro-batches.
        ticks = state.gradients if pipelined else 0.0
        ends = saved / choice.ticks + 2 * item * stream / mesh.tensor if pipelined else 0.0
        layers = Moment(
            gradients=sum_so_far + state.gradients + ticks,
            activations=saved + self.work_bytes(choice) + ends, collectives=kept + in_flight,
            moment="layers",
        )
        # The gradient of the lookup, and its sum over the devices that share the batch.
        embedding = Moment(
            gradients=sum_so_far + state.gradients, activations=2 * item * stream / mesh.tensor,
            collectives=self.doubled(choice) + 2 * state.embedding, moment="embedding",
        )
        update = Moment(
            gradients=state.gradients, activations=0.0,
            collectives=self.doubled(choice) + state.largest, moment="update",
        )._replace(optimizer=state.optimizer + state.offloaded)  # Fetched from the host.
        return [loss, summing, layers, embedding, update]

    @property
    def item(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 4 if self.workload.model.dtype == "float32" else 2

    def doubled(self, choice: Choice) -> float:
        """Parameters that exist twice: ZeRO-1 and 2 gather the new ones, and the compiler reads the
        old ones, whose buffers these take, from a copy that it makes when the step begins."""
        splits = choice.mesh.zero in (1, 2) and choice.mesh.data > 1
        return self.state(choice.mesh).parameters if splits else 0.0

    def kept_weights(self, choice: Choice) -> float:
        """Copies of weights that are alive from the first layer forward to the last backward.

        The compiler casts stacked weights before the loop over layers, and gathers all that a stage
        has before the loop over ticks. Weights do not change between micro-batches, so the
        embedding, if it is gathered, then stays gathered; so does the head of an unchunked loss.
        """
        state, mesh = self.state(choice.mesh), choice.mesh
        kept = self.doubled(choice) + (state.parameters * self.item / 4 if self.item < 4 else 0.0)
        if mesh.zero >= 3 and mesh.stage > 1:
            kept += state.layer * self.periods / mesh.stage * self.item / 4
        if mesh.zero < 3 or choice.accumulation == 1:
            return kept
        chunked = self.workload.train.objective.loss_chunk is not None
        head = 0.0 if chunked else state.head or state.embedding
        return kept + (state.embedding + head) * self.item / 4

    def tokens(self, choice: Choice) -> float:
        """Tokens of an accumulation step that a device works on, in all micro-batches."""
        rows = self.workload.train.batch_size / choice.accumulation / choice.batch_parts
        return rows * self.workload.length / choice.mesh.context

    def state(self, mesh: MeshConfig) -> StateBytes:
        """What the state takes on a device of this mesh."""
        shape = tuple(getattr(mesh, axis) for axis in AXES)
        return self._states(mesh.zero, mesh.offload_optimizer, shape)

    def saved_bytes(self, choice: Choice) -> float:
        """What the forward pass keeps for the backward pass."""
        sizes = choice.sizes
        rows = self.workload.train.batch_size / choice.accumulation / choice.batch_parts
        # A pipeline keeps what each tick works on, that of waiting stages too.
        rows *= choice.ticks / (choice.mesh.micro_batches * choice.mesh.interleave)
        kept = rows * self._rows(choice.policy, tuple(sizes.items()))
        if choice.remat == "none" and choice.mesh.zero >= 3:
            # Without rematerialization a layer's weights are kept as they were used: whole.
            kept += self.state(choice.mesh).layer * self.periods / choice.mesh.stage
        return kept

    @property
    def periods(self) -> int:
        """Whole repetitions of the layer pattern."""
        model = self.workload.model
        return model.num_layers // len(model.layer_pattern)

    @property
    def program(self) -> Program:
        """The program, on a mesh of one."""
        return self._programs(0, False)

    @property
    def chunks(self) -> float:
        """How often a chunk of logits is computed for a micro-batch."""
        return self.workload.length / min(
            self.workload.train.objective.loss_chunk or self.workload.length, self.workload.length
        )

    def recomputes(self, policy: Policy) -> Recomputes:
        """What the backward pass does again."""
        if policy.remat == "names":
            kept = {*policy.saved, *policy.offloaded}
            products = {"up", "gate"} if self.workload.model.gated else {"up"}
            return Recomputes(not products <= kept, "attended" not in kept)
        if policy.remat == "dots":  # What attention's products leave is not saved.
            return Recomputes(False, True)
        letters = {*"".join(entry.letters for entry in self.saved(policy) if entry.stack)}
        return Recomputes(not letters & {*"Fsm"}, not letters & {*"NKG"})

    def _saved_by(self, policy: Policy) -> list:
        # What is offloaded is not kept on the device: there it is as if it were not saved.
        here = policy._replace(offloaded=())
        return saved_arrays(dataclasses.replace(self.workload.model, **here._asdict()))

    def unknown(self, choice: Choice) -> str | None:
        """The line that says what is kept but not accounted for; None where all is."""
        strange = [entry for entry in self.saved(choice.policy) if UNKNOWN in entry.letters]
        if not strange:
            return None
        count = sum(entry.count for entry in strange)
        return (f"not accounted for: {count} kept arrays whose dims the planner does not know "
                f"({', '.join(entry.letters for entry in strange)})")

    def _row_of(self, policy: Policy, items: tuple) -> float:
        model, sizes = self.workload.model, dict(items)
        return sum(
            bytes_per_row(entry, model, self.workload.length, sizes)
            * repetitions(model, entry.stack) / (sizes["stage"] if entry.stack == "layers" else 1)
            for entry in self.saved(policy)
        )

    def logits_bytes(self, choice: Choice) -> float:
        """Logits of a chunk in fp32; of all of them also what their derivative needs."""
        model, objective = self.workload.model, self.workload.train.objective
        if model.discriminator:  # Its generator's, which are never computed in chunks.
            whole, chunks = True, 1.0
        else:
            whole, chunks = not objective.loss_chunk, self.chunks
        if not model.discriminator and objective.fused:
            return 0.0
        sizes = choice.sizes
        logits = self.tokens(choice) / chunks * model.vocab_size
        # A chunk's derivative is made inside the products that take it; of all logits, and of those
        # of each future head, there are also the softmax and, in the compute dtype, the derivative.
        bytes_each = (8 + self.item) * (1 + model.future_heads) if whole else 4
        return bytes_each * logits / (sizes["stage"] * sizes["tensor"])

    def work_bytes(self, choice: Choice) -> float:
        """What a layer has alive in its backward pass, of one micro-batch."""
        tokens = self.tokens(choice) / choice.mesh.micro_batches
        return tokens * work_of_token(self.workload.model, self.workload.length, choice)

    def _program(self, zero: int, offloads: bool) -> Program:
        return program_of(self.workload.model, self.workload.train, zero, offloads)

    def _state_of(self, zero: int, offloads: bool, shape: tuple[int, ...]) -> StateBytes:
        pattern = len(self.workload.model.layer_pattern)
        return state_bytes(self._programs(zero, offloads), pattern, zero, shape)
