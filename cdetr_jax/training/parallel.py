"""The one place that pmaps: wraps the parts of a step, replicates, shards and gathers."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cdetr_jax.losses.criterion import Counts, Losses
from cdetr_jax.matching.assign import NonFiniteCostError, assign
from cdetr_jax.structs import Batch, Detections, Match
from cdetr_jax.training.step import AXIS, StepFunctions, TrainState


def first(tree: Any) -> Any:
    """The first local device's copy of a replicated tree, as NumPy arrays of its own."""
    return jax.tree.map(lambda x: np.array(x.addressable_data(0)).reshape(x.shape[1:]), tree)


class Trainer:
    """The compiled train and evaluation steps of one configuration, on this host's devices.

    Attributes:
      devices: this host's devices that take part.
      matching_s: seconds spent in the assignment on the host, since the caller last set it to 0.
    """

    def __init__(self, functions: StepFunctions, devices: Sequence[jax.Device] | None = None):
        """Compiles nothing yet. `devices`: all local ones by default."""
        self.devices = list(devices or jax.local_devices())
        self.matching_s = 0.0
        self._num_queries = functions.model.num_queries
        # With all devices pmap finds them itself, which is also what several hosts need.
        chosen = None if devices is None else self.devices
        self.forward = jax.pmap(functions.forward, AXIS, in_axes=(0, 0, 0, None), devices=chosen)
        self.price = jax.pmap(functions.price, AXIS, devices=chosen)
        self.loss = jax.pmap(functions.loss, AXIS, devices=chosen)
        self.backward = jax.pmap(functions.backward, AXIS, devices=chosen)
        self.apply = jax.pmap(functions.apply, AXIS, donate_argnums=0, devices=chosen)
        self._add = jax.pmap(lambda a, b: jax.tree.map(jnp.add, a, b), AXIS, donate_argnums=0, devices=chosen)
        self._detect = jax.pmap(functions.detect, AXIS, devices=chosen)
        self._copy = jax.pmap(lambda _, x: x, AXIS, in_axes=(0, None), devices=chosen)

    def replicate(self, tree: Any) -> Any:
        """Copies a tree to every device, along a new leading axis."""
        return self._copy(np.arange(len(self.devices)), tree)

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

    def put(self, batch: Batch) -> Batch:
        """Shards a host batch and starts the transfer of its pixels; the rest is small, and needed here as well."""
        sharded = self.shard(batch)
        mesh = jax.sharding.Mesh(np.array(self.devices), (AXIS,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
        return sharded.replace(images=jax.device_put(sharded.images, sharding))

    def step(self, state: TrainState, parts: list[Batch]) -> tuple[TrainState, Losses, Array]:
        """One optimiser step over this host's micro-batches, one after the other.

        Args:
          parts: host batches, or what `put` made of them.
        Returns: the new replicated state, the losses over everything that the step saw and the gradient norm before
          clipping, both once per device.
        Raises: NonFiniteCostError, with the row of the concatenated parts, if the predictions are not finite.
        """
        parts = [self._sharded(part) for part in parts]
        counts = self.counts(parts)
        grads = losses = None
        for i, part in enumerate(parts):
            predictions, pullback = self.forward(state, part.images, part.sizes_hw, i)
            match = self.match(self.price(predictions, part.targets), part, i)
            cotangents, part_losses = self.loss(predictions, part.targets, match, counts)
            part_grads = self.backward(pullback, cotangents)
            del predictions, pullback, cotangents
            grads = part_grads if grads is None else self._add(grads, part_grads)
            losses = part_losses if losses is None else jax.tree.map(jnp.add, losses, part_losses)
        if len(parts) > 1:
            # The loss terms are divided by what the whole step saw, so they add up; the errors are means over parts.
            losses = losses.replace(
                class_error=losses.class_error / len(parts), cardinality_error=losses.cardinality_error / len(parts)
            )
        state, grad_norm = self.apply(state, grads)
        return state, losses, grad_norm

    def match(self, cost: Array, batch: Batch, part: int = 0) -> Match:
        """Assigns on the host. `cost` and `batch` are sharded; so is what comes back.

        Raises: NonFiniteCostError; `part` counts the batches of this size before, to name the row.
        """
        cost, valid = np.asarray(cost), np.asarray(batch.targets.valid)
        start = time.perf_counter()
        queries = []
        for device, (device_cost, device_valid) in enumerate(zip(cost, valid, strict=True)):
            try:
                queries.append(assign(device_cost, device_valid))
            except NonFiniteCostError as error:
                rows = part * valid.shape[0] * valid.shape[1] + device * valid.shape[1]
                raise NonFiniteCostError(error.layer, rows + error.image) from None
        self.matching_s += time.perf_counter() - start
        return Match(queries=np.stack(queries))

    def counts(self, parts: list[Batch]) -> Counts:
        """What the losses are divided by, per local device, over all (sharded) parts."""
        per_image = np.concatenate([np.asarray(part.targets.valid).sum(-1) for part in parts], axis=1)
        return Counts(
            targets=per_image.sum(1).astype(np.float32),
            matched=np.minimum(per_image, self._num_queries).sum(1).astype(np.float32),
            queries=np.full(len(per_image), per_image.shape[1] * self._num_queries, np.float32),
        )

    def detect(self, variables: Any, batch: Batch) -> Detections:
        """Detections of a host batch, or of what `put` made of one, as NumPy arrays in its order.

        `variables` are replicated.
        """
        detections = self._detect(variables, self._sharded(batch))
        return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), detections)

    def _sharded(self, batch: Batch) -> Batch:
        return batch if isinstance(batch.images, jax.Array) else self.shard(batch)
