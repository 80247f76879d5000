"""The one place that knows of devices: maps the parts of a step over them, replicates, shards and gathers.

What every device has alike (the state, the losses) is one replicated array; what each has of its own (batches,
predictions, residuals, gradients) is one array with a leading axis [devices, ...], cut along it. The parts are mapped
by `jit(shard_map)`, which is what `jax.pmap` is made of. Called directly it does without pmap's conversion of every
array at every call of a run of several processes, and the compiler chooses the layout of the residuals.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from cdetr_jax.matching.assign import NonFiniteCostError, assign
from cdetr_jax.structs import Batch, Counts, Detections, Match, Targets
from cdetr_jax.training.step import AXIS, StepFunctions, StepMetrics, TrainState


def _inner(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.squeeze(0), tree)


def _outer(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


SAME, OWN = PartitionSpec(), PartitionSpec(AXIS)  # alike on all devices | each device's own, along a leading axis


def unreplicate(tree: Any) -> Any:
    """The first local device's copy of a replicated tree, as NumPy arrays of its own."""
    return jax.tree.map(lambda x: np.array(jax.device_get(x.addressable_data(0))), tree)


def own(x: Array) -> np.ndarray:
    """What this process's devices have of an array [devices, ...], in their order."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


@dataclasses.dataclass(frozen=True)
class Placed:
    """A micro-batch on its way to this process's devices, and what the host itself reads of it.

    Attributes:
      batch: on the devices, sharded along a new leading axis.
      valid: `targets.valid` [devices, B, T], NumPy.
      index: position of each picture in its source [devices, B], NumPy.
    """

    batch: Batch
    valid: np.ndarray
    index: np.ndarray

    @property
    def images_shape(self) -> tuple[int, int, int]:
        """Pictures on one device, padded height and width in pixels."""
        return self.batch.images.shape[1:4]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Padded height, width and T: what its programs are compiled for."""
        return (*self.batch.images.shape[-3:-1], self.valid.shape[-1])


@dataclasses.dataclass(frozen=True)
class Program:
    """One of the programs that a step consists of. Once it is compiled, calling `function` compiles nothing.

    Attributes:
      name: forward, cost, loss, backward, add, apply or detect.
      function: a jitted one.
      arguments: shapes and shardings of what it is called with, the axis of devices included.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    @functools.cached_property
    def traced(self) -> jax.stages.Traced:
        """Not compiled yet."""
        return self.function.trace(*self.arguments)

    @functools.cached_property
    def lowered(self) -> jax.stages.Lowered:
        """For its devices, not compiled yet either."""
        return self.traced.lower()

    @property
    def compiled(self) -> jax.stages.Compiled:
        """Compiles it, the first time; JAX keeps what was compiled."""
        return self.lowered.compile()


def step_programs(height: int, width: int, targets: int, accumulates: bool) -> tuple[str, ...]:
    """What `Trainer.train_programs` gives, in its order, each with what it was made for."""
    add = ("sum of gradients", "sum of losses") if accumulates else ()
    names = (f"forward {height}x{width}", f"cost of {targets} targets", f"loss of {targets} targets")
    return (*names, f"backward {height}x{width}", *add, "update")


def detect_programs(height: int, width: int) -> tuple[str, ...]:
    """The same for `Trainer.detect_program`."""
    return (f"evaluation {height}x{width}",)


class Trainer:
    """The compiled train and evaluation steps of one configuration, on this process's devices.

    Attributes:
      devices: this process's devices that take part.
      matching_s: seconds spent in the assignment on the host, since the caller last set it to 0.
    """

    def __init__(self, functions: StepFunctions, devices: Sequence[jax.Device] | None = None):
        """Compiles nothing yet. `devices`: all local ones by default."""
        self.devices = list(devices or jax.local_devices())
        self.matching_s = 0.0
        self._num_queries = functions.model.num_queries
        # With all local devices those of the other processes take part too.
        self._mesh = Mesh(np.array(jax.devices() if self.devices == jax.local_devices() else self.devices), (AXIS,))
        self._sharding = NamedSharding(self._mesh, OWN)
        self._numbers: list[Array] = []
        own_layout = Format(Layout.AUTO, self._sharding)
        self.forward = self._map(functions.forward, (SAME, OWN, OWN, SAME), (OWN, OWN), (self._sharding, own_layout))
        self.cost = self._map(functions.cost, (OWN, OWN), OWN)
        self.loss = self._map(functions.loss, (OWN, OWN, OWN, OWN), (OWN, SAME))
        self.backward = self._map(functions.backward, (SAME, OWN, OWN), OWN)
        self.apply = self._map(functions.apply, (SAME, OWN, SAME), (SAME, SAME), donate=0)
        self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
        self._detect = self._map(functions.detect, (SAME, OWN), OWN)

    @property
    def device_count(self) -> int:
        """Devices of all processes that take part."""
        return self._mesh.size

    def _map(self, function: Callable, in_specs: Any, out_specs: Any, out_shardings: Any = None, donate: Any = ()):
        """A function of one device's share, for all; the leading axis of what is the device's own is taken off."""

        def on_device(*arguments: Any) -> Any:
            results = function(*(x if spec == SAME else _inner(x) for x, spec in zip(arguments, in_specs, strict=True)))
            if isinstance(out_specs, PartitionSpec):
                return results if out_specs == SAME else _outer(results)
            return tuple(x if spec == SAME else _outer(x) for x, spec in zip(results, out_specs, strict=True))

        on_device.__name__ = function.__name__  # in traces and logs
        mapped = jax.shard_map(on_device, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(mapped, out_shardings=out_shardings, donate_argnums=donate)

    def replicate(self, tree: Any) -> Any:
        """Copies a tree to every device."""
        copies = jax.tree.map(np.array, jax.device_get(tree))
        return jax.make_array_from_process_local_data(NamedSharding(self._mesh, SAME), copies)

    def shard(self, tree: Any) -> Any:
        """Cuts the leading axis of every array into equal parts, one per device.

        Raises: ValueError, if it cannot be cut so.
        """
        count = len(self.devices)

        def cut(x: np.ndarray) -> np.ndarray:
            if x.shape[0] % count:
                raise ValueError(f"a batch of {x.shape[0]} pictures does not divide among {count} devices")
            return x.reshape(count, -1, *x.shape[1:])

        return jax.tree.map(cut, tree)

    def put(self, batch: Batch) -> "Placed":
        """Starts the transfer of a host batch to the devices, all of it at once."""
        sharded = self.shard(batch)
        return Placed(self._put(sharded), sharded.targets.valid, sharded.index)

    def _put(self, tree: Any) -> Any:
        """Starts the transfer of arrays whose leading axis counts this process's devices."""
        return jax.make_array_from_process_local_data(self._sharding, tree)

    def step(self, state: TrainState, micro_batches: list["Batch | Placed"]) -> tuple[TrainState, StepMetrics]:
        """One optimiser step over this process's micro-batches, one after the other.

        Args:
          micro_batches: host batches, or what `put` made of them.
        Returns: the new state, and the step's metrics, both replicated.
        Raises: NonFiniteCostError, with the row of the concatenated micro-batches, if the predictions are not finite.
        """
        placed = [self._placed(batch) for batch in micro_batches]
        counts, network = self.counts(placed), state.network
        grads = losses = None
        queued = self._forward(network, placed, 0)
        for i, micro_batch in enumerate(placed):
            predictions, residuals, cost = queued
            queued = self._forward(network, placed, i + 1)  # the device has work while the host matches
            match = self.match(cost, micro_batch, i)
            cotangents, new_losses = self.loss(predictions, micro_batch.batch.targets, match, counts)
            new_grads = self.backward(network, residuals, cotangents)
            del predictions, residuals, cost, cotangents
            grads = new_grads if grads is None else self._add(grads, new_grads)
            losses = new_losses if losses is None else self._add(losses, new_losses)
        return self.apply(state, grads, losses)

    def _forward(self, network: TrainState, placed: list["Placed"], i: int) -> Any:
        """Starts on the micro-batch `i`, if there is one: predictions, residuals and matching cost."""
        if i == len(placed):
            return None
        batch = placed[i].batch
        predictions, residuals = self.forward(network, batch.images, batch.sizes_hw, self.number(i))
        return predictions, residuals, self.cost(predictions, batch.targets)

    def number(self, micro_batch: int) -> Array:
        """The number of a micro-batch, on every device."""
        while len(self._numbers) <= micro_batch:
            self._numbers.append(self.replicate(np.int32(len(self._numbers))))
        return self._numbers[micro_batch]

    def match(self, cost: Array, placed: "Placed", micro_batch: int = 0) -> Match:
        """Assigns on the host. `cost` is sharded; so is what comes back.

        Raises: NonFiniteCostError; `micro_batch` counts the batches of this size before, to name the row.
        """
        cost, valid = own(cost), placed.valid
        start = time.perf_counter()
        queries = []
        for device, (device_cost, device_valid) in enumerate(zip(cost, valid, strict=True)):
            try:
                queries.append(assign(device_cost, device_valid))
            except NonFiniteCostError as error:
                rows = micro_batch * valid.shape[0] * valid.shape[1] + device * valid.shape[1]
                raise NonFiniteCostError(error.layer, rows + error.image) from None
        self.matching_s += time.perf_counter() - start
        return Match(queries=self._put(np.stack(queries)))

    def counts(self, placed: list["Placed"]) -> Counts:
        """What the losses are divided by, per local device, over all micro-batches of a step."""
        per_image = np.concatenate([micro_batch.valid.sum(-1) for micro_batch in placed], axis=1)
        counts = Counts(
            targets=per_image.sum(1),
            matched=np.minimum(per_image, self._num_queries).sum(1),
            queries=np.full(len(per_image), per_image.shape[1] * self._num_queries),
            micro_batches=np.full(len(per_image), len(placed)),
        )
        return self._put(jax.tree.map(lambda x: x.astype(jnp.result_type(float)), counts))

    def detect(self, variables: Any, batch: "Batch | Placed") -> Detections:
        """Detections of a host batch, or of what `put` made of one, as NumPy arrays in its order.

        `variables` are replicated.
        """
        detections = jax.tree.map(own, self._detect(variables, self._placed(batch).batch))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), detections)

    def shapes(self, tree: Any, spec: PartitionSpec = SAME) -> Any:
        """Shapes of what `replicate` would make of a tree, which may be shapes itself."""
        sharding = NamedSharding(self._mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def train_programs(
        self, state: TrainState, batch: int, shape_hw: tuple[int, int], targets: int, accumulates: bool = False
    ) -> Iterator[Program]:
        """What `step` calls for micro-batches of one shape, in its order.

        `forward` is compiled when what comes after `loss` is asked for: `backward` needs the layout of its residuals.

        Args:
          state: replicated, or its shapes.
          batch: pictures a device.
          targets: T, which only `cost` and `loss` depend on.
          accumulates: whether a step takes several of them.
        """
        state = self.shapes(state)
        network, pictures = state.network, self._batch_shapes(batch, shape_hw, targets)
        number = self.shapes(jax.ShapeDtypeStruct((), np.int32))
        yield (forward := Program("forward", self.forward, (network, pictures.images, pictures.sizes_hw, number)))
        predictions, residuals = forward.lowered.out_info
        predictions = self.shapes(predictions, OWN)
        yield (cost := Program("cost", self.cost, (predictions, pictures.targets)))
        devices, layers = cost.lowered.out_info.shape[:2]
        matched = jax.ShapeDtypeStruct((devices, layers, batch, targets), np.int32)
        number = jax.ShapeDtypeStruct((devices,), jnp.result_type(float))
        match, counts = self.shapes((Match(matched), Counts(number, number, number, number)), OWN)
        yield (loss := Program("loss", self.loss, (predictions, pictures.targets, match, counts)))
        cotangents, losses = loss.lowered.out_info
        cotangents, losses = self.shapes(cotangents, OWN), self.shapes(losses)
        residuals = jax.tree.map(
            lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
            residuals,
            forward.compiled.output_formats[1],
        )
        yield (backward := Program("backward", self.backward, (network, residuals, cotangents)))
        grads = self.shapes(backward.lowered.out_info, OWN)
        if accumulates:
            yield Program("add", self._add, (grads, grads))
            yield Program("add", self._add, (losses, losses))
        yield Program("apply", self.apply, (state, grads, losses))

    def detect_program(self, variables: Any, batch: int, shape_hw: tuple[int, int], targets: int) -> Program:
        """What `detect` calls; see `train_programs`."""
        return Program("detect", self._detect, (self.shapes(variables), self._batch_shapes(batch, shape_hw, targets)))

    def _batch_shapes(self, batch: int, shape_hw: tuple[int, int], targets: int) -> Batch:
        def shape(*axes: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self._mesh.size, batch, *axes), dtype, sharding=self._sharding)

        return Batch(
            images=shape(*shape_hw, 3, dtype=np.uint8),
            sizes_hw=shape(2),
            original_sizes_hw=shape(2),
            index=shape(),
            targets=Targets(
                labels=shape(targets),
                boxes_cxcywh=shape(targets, 4, dtype=np.float32),
                valid=shape(targets, dtype=np.bool_),
            ),
        )

    def _placed(self, batch: "Batch | Placed") -> "Placed":
        return batch if isinstance(batch, Placed) else self.put(batch)
