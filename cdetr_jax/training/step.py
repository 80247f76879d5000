"""A train step around the matching on the host, as pure functions of one device's share, and the evaluation step.

    forward    params, pictures          -> predictions, residuals
    cost       predictions, targets      -> matching cost
    (host)     matching cost             -> match                            matching/assign.py
    loss       predictions, match        -> losses, cotangents
    backward   params, residuals, cotangents -> gradients
    apply      gradients, losses         -> mean over devices -> clip -> AdamW, metrics

The residuals are what `jax.vjp`'s closure holds, less the parameters, so that they can leave one program and enter
another. Only the two small programs in the middle know the number of targets T: for another T the network is not
compiled again.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from cdetr_jax.evaluation.postprocess import detect
from cdetr_jax.losses.criterion import LossSettings, criterion
from cdetr_jax.matching.cost import CostSettings, matching_cost
from cdetr_jax.structs import Batch, Counts, Detections, Losses, Match, Predictions, Targets
from cdetr_jax.training.optimizer import FROZEN, parameter_groups

AXIS = "devices"

Pullback = Callable[[Predictions], tuple[Any]]


@struct.dataclass
class Residuals:
    """A pullback without what the second program is given anyway, and with every array once.

    Attributes:
      arrays: what leaves the first program.
      sources: of each leaf of the pullback, its position in `arrays` after the leaves that are given.
      structure: the pullback's.
    """

    arrays: list[Array]
    sources: tuple[int, ...] = struct.field(pytree_node=False)
    structure: Any = struct.field(pytree_node=False)

    @classmethod
    def of(cls, pullback: Pullback, given: Any) -> "Residuals":
        """Takes apart a pullback that was just traced: what is the same array is then the same object."""
        leaves, structure = jax.tree.flatten(pullback)
        known = jax.tree.leaves(given)
        start = len(known)
        position = {id(leaf): i for i, leaf in enumerate(known)}
        for leaf in leaves:
            if id(leaf) not in position:
                position[id(leaf)] = len(known)
                known.append(leaf)
        return cls(known[start:], tuple(position[id(leaf)] for leaf in leaves), structure)

    def pullback(self, given: Any) -> Pullback:
        """Puts it together again."""
        known = (*jax.tree.leaves(given), *self.arrays)
        return jax.tree.unflatten(self.structure, [known[i] for i in self.sources])


# XLA's own generator: dropout masks cost less, and initialisation compiles several times faster, than with threefry.
RNG = "rbg"


def new_rng(seed: int) -> Array:
    """The key that a state is made from."""
    return jax.random.key(seed, impl=RNG)


@struct.dataclass
class TrainState:
    """Everything that a run has to keep.

    Attributes:
      step: optimiser steps taken.
      params: what is trained, and the frozen stages.
      constants: frozen batch norm.
      opt_state: of the optimiser.
      ema_params: moving average of `params`, or None.
      rng: seed of the dropout masks; each step folds its number in.
    """

    step: Int[Array, ""]
    params: Any
    constants: Any
    opt_state: Any
    ema_params: Any
    rng: Array

    @property
    def network(self) -> "TrainState":
        """What forward and backward read: without the optimiser's part, whose arrays would only be handed over."""
        return self.replace(opt_state=None, ema_params=None)

    @property
    def eval_variables(self) -> dict[str, Any]:
        """What evaluation and prediction run with: the moving average where there is one."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "constants": self.constants}


@struct.dataclass
class StepMetrics:
    """What one optimiser step tells of itself, the same on every device.

    Attributes:
      losses: over everything that the step saw.
      grad_norm: global norm before clipping.
      is_finite: whether all of these are.
    """

    losses: Losses
    grad_norm: Float[Array, ""]
    is_finite: Bool[Array, ""]


def _is_none(x: Any) -> bool:
    return x is None


@struct.dataclass
class StepFunctions:
    """The pure functions of one configuration. See the module's docstring.

    Attributes:
      model: the detector, a module that makes `Predictions` of pictures and their sizes.
      optimizer: see `make_optimizer`.
      ema_decay: 0 = no moving average.
      top_k: detections per picture.
      frozen_modules: the optimizer's.
    """

    model: nn.Module = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)
    cost_settings: CostSettings = struct.field(pytree_node=False)
    loss_settings: LossSettings = struct.field(pytree_node=False)
    ema_decay: float = struct.field(pytree_node=False)
    top_k: int = struct.field(pytree_node=False)
    frozen_modules: tuple[str, ...] = struct.field(pytree_node=False, default=())

    def init(self, rng: Array, image_shape: tuple[int, int]) -> TrainState:
        """A new state from `new_rng`'s key. `image_shape` (height, width in pixels) is traced, but changes nothing."""
        init_rng, dropout_rng = jax.random.split(rng)
        images = jnp.zeros((1, *image_shape, 3), jnp.uint8)
        variables = jax.jit(self.model.init)(init_rng, images, jnp.array([image_shape]))
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            constants=variables.get("constants", {}),
            opt_state=self.optimizer.init(params),
            ema_params=params if self.ema_decay > 0 else None,
            rng=jax.random.key_data(dropout_rng),
        )

    def forward(
        self,
        state: TrainState,
        images: UInt8[Array, "B H W 3"],
        sizes_hw: Int[Array, "B 2"],
        micro_batch: Int[Array, ""],
    ) -> tuple[Predictions, Residuals]:
        """Predicts, with `TrainState.network`. `micro_batch` counts those of one optimiser step."""
        rng = jax.random.wrap_key_data(state.rng, impl=RNG)
        for number in (state.step, micro_batch, jax.lax.axis_index(AXIS)):
            rng = jax.random.fold_in(rng, number)

        def predict(params: Any) -> Predictions:
            variables = {"params": params, "constants": state.constants}
            return self.model.apply(variables, images, sizes_hw, train=True, rngs={"dropout": rng})

        predictions, pullback = jax.vjp(predict, state.params)
        return predictions, Residuals.of(pullback, (state.params, state.constants))

    def cost(self, predictions: Predictions, targets: Targets) -> Float[Array, "L B Q T"]:
        """The matching cost."""
        return matching_cost(predictions, targets, self.cost_settings)

    def loss(
        self, predictions: Predictions, targets: Targets, match: Match, counts: Counts
    ) -> tuple[Predictions, Losses]:
        """The total loss's gradients in this device's predictions of one micro-batch, and the losses of all devices.

        Args:
          counts: of all micro-batches of this optimiser step on this device.
        """
        counts = jax.lax.pmean(counts, AXIS)

        def total(predictions: Predictions) -> tuple[Float[Array, ""], Losses]:
            losses = criterion(predictions, targets, match, counts, self.loss_settings)
            return losses.total, losses

        cotangents, losses = jax.grad(total, has_aux=True)(predictions)
        return cotangents, jax.lax.pmean(losses, AXIS)

    def backward(self, state: TrainState, residuals: Residuals, cotangents: Predictions) -> Any:
        """This device's gradients of one micro-batch, with the state that `forward` had."""
        (grads,) = residuals.pullback((state.params, state.constants))(cotangents)
        return grads

    def apply(self, state: TrainState, grads: Any, losses: Losses) -> tuple[TrainState, StepMetrics]:
        """One optimiser step with the summed gradients of its micro-batches, and its losses, to pass on."""
        grads = self._of_all_devices(grads)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - self.ema_decay)
        new_state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves((losses, grad_norm))]).all()
        return new_state, StepMetrics(losses, grad_norm, is_finite)

    def _of_all_devices(self, grads: Any) -> Any:
        """The mean over devices. Frozen parameters, whose gradients are zero, are not sent around."""
        groups = parameter_groups(grads, self.frozen_modules)
        trained = jax.tree.map(lambda grad, group: None if group == FROZEN else grad, grads, groups)
        trained = jax.lax.pmean(trained, AXIS)  # all at once; None is a tree without leaves
        return jax.tree.map(lambda mean, grad: grad if mean is None else mean, trained, grads, is_leaf=_is_none)

    def detect(self, variables: Any, batch: Batch) -> Detections:
        """The evaluation step: the best detections in pixels of the original pictures."""
        return detect(self.model, variables, batch.images, batch.sizes_hw, batch.original_sizes_hw, top_k=self.top_k)
