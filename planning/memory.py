"""Bytes on each device at the fullest moments of a training step, without compiling it.

State comes from `make_program` itself, what is kept for the backward pass from the model's own
derivative (planning/saved.py). What is left is an account of what is alive at four moments; its
numbers of bytes per token were found by compiling for TPUs (docs/plan.md has the errors).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from batiste.planning.saved import bytes_per_row, expert_rows, saved_arrays
from batiste.planning.workload import Choice, Policy, Workload
from batiste.sharding import AXES, HOST_MEMORY, MeshConfig, spec
from batiste.train import Program, make_program

GIB = 2**30
# Kernels pad the last dim of an array to the 128 lanes of a vector register.
LANES = 128


class Memory(NamedTuple):
    """Bytes per device by kind, at the moment when their sum is largest; that moment's name.

    activations: kept for the backward pass, and at work in it. collectives: weights gathered whole,
    and their gradients before they are scattered.
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


class StateBytes(NamedTuple):
    """Bytes per device of what the step updates, and of one weight-shaped tree whole over `data`.

    offloaded: what of the optimizer's state the host keeps between updates.
    layer: the weights of one repetition of the layer pattern; whole over `data`, as are embedding
    and head (both 0 and the same array when they are tied).
    """

    parameters: float
    optimizer: float
    offloaded: float
    gradients: float
    layer: float
    embedding: float
    head: float
    largest: float


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
        """When the loss is computed, a layer differentiated, the embedding, the update made."""
        state = self.state(choice.mesh)
        saved = self.saved_bytes(choice)
        several = choice.accumulation > 1
        gathers = choice.mesh.zero >= 3
        # Weights do not change between micro-batches: what is made of them before use stays. Copies
        # in the compute dtype, and embedding and head, if they are gathered.
        item = 4 if self.workload.model.dtype == "float32" else 2
        kept = 0.0
        if several:
            kept += state.parameters * item / 4 if item < 4 else 0.0
            kept += (state.embedding + state.head) * item / 4 if gathers else 0.0
        sum_so_far = state.gradients if several else 0.0
        Moment = functools.partial(Memory, state.parameters, optimizer=state.optimizer)
        whole_state = state.optimizer + state.offloaded  # Fetched from the host for the update.
        head = state.head or state.embedding
        features = 4 * self.tokens(choice) * self.workload.model.model_dim
        held = max(kept, head if gathers else 0.0)
        loss = Moment(
            gradients=sum_so_far + head, activations=saved + features,
            logits=self.logits_bytes(choice), collectives=held + head / 2, moment="loss",
        )
        # A layer's weights in the compute dtype, the next one's where they are gathered ahead; and
        # the gradients of the layer, in fp32.
        in_flight = state.layer * (item / 4 * (2 if gathers else 1) + 1)
        layers = Moment(
            gradients=sum_so_far + state.gradients, activations=saved + self.work_bytes(choice),
            logits=0.0, collectives=kept + in_flight, moment="layers",
        )
        update = Moment(
            gradients=state.gradients, activations=0.0, logits=0.0, collectives=state.largest,
            moment="update",
        )._replace(optimizer=whole_state)
        return [loss, layers, update]

    def tokens(self, choice: Choice) -> float:
        """Tokens of a micro-batch that a device works on."""
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
        letters = "".join(entry.letters for entry in self.saved(policy) if entry.per_layer)
        return Recomputes("F" not in letters, not set(letters) & set("NKG"))

    def _saved_by(self, policy: Policy) -> list:
        # What is offloaded is not kept on the device: there it is as if it were not saved.
        here = policy._replace(offloaded=())
        return saved_arrays(dataclasses.replace(self.workload.model, **here._asdict()))

    def _row_of(self, policy: Policy, items: tuple) -> float:
        model, sizes = self.workload.model, dict(items)
        return sum(
            bytes_per_row(entry, model, self.workload.length, sizes)
            * (self.periods / sizes["stage"] if entry.per_layer else 1)
            for entry in self.saved(policy)
        )

    def logits_bytes(self, choice: Choice) -> float:
        """Logits of a chunk in fp32 and a quarter of that for their gradient on its way."""
        model, objective = self.workload.model, self.workload.train.objective
        if objective.fused:
            return 0.0
        sizes = choice.sizes
        logits = self.tokens(choice) / self.chunks * model.vocab_size
        bytes_each = 5 if objective.loss_chunk else 10  # Not recomputed: logits and softmax stay.
        return bytes_each * logits / (sizes["stage"] * sizes["tensor"])

    def work_bytes(self, choice: Choice) -> float:
        """What a layer has alive in its backward pass, in its feed-forward or in its attention."""
        model, tensor = self.workload.model, choice.mesh.tensor
        item = 4 if model.dtype == "float32" else 2
        padding = -(-model.head_dim // LANES) * LANES / model.head_dim
        heads = model.num_heads * model.head_dim / tensor
        keys = model.num_kv_heads * model.head_dim / tensor
        recomputes = choice.remat != "none"
        # Feed-forward: each projection and its gradient, x in, its gradient, x itself in fp32; and
        # what attention's backward pass will need, if it was recomputed.
        rows = expert_rows(model, choice.mesh.expert)
        shared = model.shared_experts if model.num_experts else 0
        projections = (2 if model.gated else 1) * (rows + shared)
        feed_forward = projections * (2 if recomputes else 1) * item * model.mlp_dim / tensor
        if model.num_experts is not None:
            # To the experts and back, and the gradients of both.
            feed_forward += 4 * item * rows * model.model_dim
        feed_forward += (2 * item + 5 / tensor) * model.model_dim
        feed_forward += recomputes * item * 2 * (heads + keys * padding)
        if model.attention == "reference":
            probabilities = 3 * 4 * model.num_heads / tensor * self.workload.length
            attention = item * 3 * (heads + keys) + probabilities
        else:
            # Queries, outputs and gradients as they are and in the kernels' layouts, which pad
            # half of them; dq, dk and dv leave the kernel in fp32.
            attention = heads * (item * (4 + 2 * padding) + 4)
            attention += keys * (item * (1 + 2 * padding) + 8 * padding)
        attention += 2 * model.model_dim / tensor
        return self.tokens(choice) * max(feed_forward, attention)

    def _program(self, zero: int, offloads: bool) -> Program:
        """The program on a mesh of one: shapes, and specs that hold for every mesh."""
        mesh = AbstractMesh((1,) * len(AXES), AXES)
        layout = MeshConfig(data=1, zero=zero, offload_optimizer=offloads)
        return make_program(self.workload.model, self.workload.train, mesh, layout)

    def _state_of(self, zero: int, offloads: bool, shape: tuple[int, ...]) -> StateBytes:
        program, mesh = self._programs(zero, offloads), AbstractMesh(shape, AXES)
        state = program.abstract_state
        gradients, pattern = [], len(self.workload.model.layer_pattern)
        whole = {"layer": 0.0, "VD": 0.0, "DV": 0.0}
        leaves = jax.tree.leaves(state.params), jax.tree.leaves(program.letters)
        for leaf, name in zip(*leaves, strict=True):
            gradients.append(_leaf_bytes(mesh, leaf, spec(name, zero=zero >= 2)))
            size = _leaf_bytes(mesh, leaf, spec(name))
            if name.startswith("L"):
                periods = leaf.shape[0] / pattern / dict(zip(AXES, shape))["stage"]
                whole["layer"] += size / periods
            elif name in whole:
                whole[name] += size
        return StateBytes(
            parameters=_tree_bytes(mesh, state.params),
            optimizer=_kept_bytes(mesh, state.optimizer_state, on_host=False),
            offloaded=_kept_bytes(mesh, state.optimizer_state, on_host=True),
            gradients=sum(gradients), layer=whole["layer"], embedding=whole["VD"],
            head=whole["DV"], largest=max(gradients),
        )


def _tree_bytes(mesh: AbstractMesh, tree: Any) -> float:
    """Bytes per device of a tree placed by its own specs."""
    return sum(_leaf_bytes(mesh, leaf, leaf.sharding.spec) for leaf in jax.tree.leaves(tree))


def _kept_bytes(mesh: AbstractMesh, tree: Any, on_host: bool) -> float:
    """Bytes per device of the leaves that live on the host, or of those that do not."""
    leaves = jax.tree.leaves(tree)
    kept = [leaf for leaf in leaves if (leaf.sharding.memory_kind == HOST_MEMORY) == on_host]
    return _tree_bytes(mesh, kept)


def _leaf_bytes(mesh: AbstractMesh, leaf: Any, partition: PartitionSpec) -> float:
    size = float(math.prod(leaf.shape) * leaf.dtype.itemsize)
    for dim, axes in zip(leaf.shape, partition):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        parts = math.prod(mesh.shape[name] for name in names)
        if dim % parts:
            given = " * ".join(f"mesh.{name}={mesh.shape[name]}" for name in names)
            raise ValueError(f"a weight of shape {leaf.shape}: {dim} is not divisible by {given}")
        size /= parts
    return size
