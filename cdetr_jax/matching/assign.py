"""The optimal one-to-one assignment, on the host."""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment


class NonFiniteCostError(FloatingPointError):
    """A matching cost is NaN or infinite: the predictions are. `image`: row of the batch; `layer`: decoder layer."""

    def __init__(self, layer: int, image: int):
        super().__init__(f"the matching cost of decoder layer {layer} is not finite in row {image} of the batch")
        self.layer, self.image = layer, image


def assign(cost: Float[np.ndarray, "L B Q T"], valid: Bool[np.ndarray, "B T"]) -> Int[np.ndarray, "L B T"]:
    """Finds the query of each target that makes the total cost least, per layer and image.

    Source: arXiv:2005.12872, equation (1), by `scipy.optimize.linear_sum_assignment` on the real targets only.
    Args:
      cost: of query q for target t.
      valid: True = a real object; an image's real objects come first.
    Returns: the query of each target, int32; -1 for padded targets and, where an image has more targets than there
      are queries, for those that got none.
    Raises: NonFiniteCostError, if the cost of a real target is NaN or infinite.
    """
    counts = valid.sum(axis=-1)
    assert all(row[:n].all() for row, n in zip(valid, counts, strict=True)), "real targets must come first"
    queries = np.full((*cost.shape[:2], cost.shape[-1]), -1, np.int32)
    for image, count in enumerate(counts):
        real = cost[:, image, :, :count]
        if not np.isfinite(real).all():
            layer = int(np.argmin(np.isfinite(real).all(axis=(1, 2))))
            raise NonFiniteCostError(layer, image)
        for layer, layer_cost in enumerate(real):
            rows, columns = linear_sum_assignment(layer_cost)
            queries[layer, image, columns] = rows
    return queries
