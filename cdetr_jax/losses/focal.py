"""Classification losses, element-wise and unreduced."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sigmoid_focal_loss(
    logits: Float[Array, "..."], is_class: Float[Array, "..."], *, alpha: float, gamma: float
) -> Float[Array, "..."]:
    """Focal loss of independent binary decisions.

    Source: arXiv:1708.02002, equation (5): `-alpha_t (1 - p_t)^gamma log(p_t)`.
    Args:
      logits: before the sigmoid.
      is_class: 1 where the decision should be yes, else 0.
      alpha: weight of the yes, 1 - alpha that of the no.
      gamma: how strongly easy decisions are played down.
    """
    cross_entropy = jnp.maximum(logits, 0) - logits * is_class + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    probs = jax.nn.sigmoid(logits)
    p_t = probs * is_class + (1 - probs) * (1 - is_class)
    alpha_t = alpha * is_class + (1 - alpha) * (1 - is_class)
    return alpha_t * (1 - p_t) ** gamma * cross_entropy


def softmax_cross_entropy(logits: Float[Array, "... C"], labels: Int[Array, "..."]) -> Float[Array, "..."]:
    """Minus the log-probability of the label's class."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
