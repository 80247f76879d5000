"""`cdetr export`: a trained detector as one file that runs without this package, checked and timed."""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cdetr_jax.cli.settings import set_up_logging
from cdetr_jax.data.synthetic import SyntheticShapes
from cdetr_jax.export import Detect, export_onnx, export_stablehlo, load_onnx, load_stablehlo, make_detect
from cdetr_jax.files import is_remote, refuse_to_overwrite
from cdetr_jax.weights.load import Weights, load_weights

FORMATS = {"stablehlo": (export_stablehlo, load_stablehlo), "onnx": (export_onnx, load_onnx)}
RUNS_ON = {"stablehlo": "StableHLO for CPU, CUDA and TPU", "onnx": "ONNX in float32"}
TOLERANCE = 1e-4
CALLS = 5


def run(arguments: argparse.Namespace) -> None:
    """Writes the file, loads it again, and prints its size, its times and its difference from our own function.

    Raises: ValueError, if an argument is wrong, or the file finds something else than the weights do; see also
      `load_weights` and `export_onnx`.
    """
    if is_remote(arguments.output):
        raise ValueError(f"--output is {arguments.output}, expected a local file, for it is loaded again and checked")
    if os.path.isdir(arguments.output):
        raise ValueError(f"--output is {arguments.output}, a folder; name the file to write, such as detector.zip")
    refuse_to_overwrite(arguments.weights, arguments.output, "--output")
    set_up_logging()
    weights = load_weights(arguments.weights, arguments.checkpoint, arguments.dc5)
    # It holds every picture that is resized as `cdetr predict` does.
    shape_hw = arguments.size or weights.preprocessing.largest_hw
    settings = {"shape_hw": shape_hw, "batch": arguments.batch, "top_k": arguments.top_k or weights.top_k}
    export, load = FORMATS[arguments.to]
    export(weights, arguments.output, **settings)
    print(f"{arguments.output}: {RUNS_ON[arguments.to]}, {os.path.getsize(arguments.output) / 1e6:.1f} MB")
    check(weights, arguments.output, load, in_float32=arguments.to == "onnx", **settings)


def check(
    weights: Weights,
    path: str,
    load: Callable[[str], Detect],
    *,
    in_float32: bool,
    shape_hw: tuple[int, int],
    batch: int | None,
    top_k: int,
) -> None:
    """Prints the times of a written file and its largest difference from our own function.

    Args:
      load: of the file's format.
      in_float32: the file computes in float32 whatever the model's compute dtype.
      shape_hw, batch, top_k: what it was written with.
    Raises: ValueError, if the difference is above `TOLERANCE`.
    """
    images, sizes_hw = made_up_pictures(batch or 2, shape_hw)
    first = batch or 1
    seconds = [time.perf_counter()]
    detect = load(path)
    seconds.append(time.perf_counter())
    for _ in range(1 + CALLS):
        found = detect(images[:first], sizes_hw[:first])
        seconds.append(time.perf_counter())
    load_s, first_s, *calls_s = np.diff(seconds).tolist()
    call_s, kept = statistics.median(calls_s), found["scores"].shape[1]
    spread = f"batch {first}; median of {CALLS}, {min(calls_s):.3f} to {max(calls_s):.3f}"
    print(f"input          {batch or 'any number of'} x {shape_hw[0]}x{shape_hw[1]}, the best {kept}")
    print(f"load           {load_s:8.3f} s")
    print(f"first call     {first_s:8.3f} s  (with compilation, if there is any)")
    print(f"later calls    {call_s:8.3f} s  ({spread})")

    model = weights.make_model()
    if in_float32:
        model = model.clone(dtype=jnp.float32)
    with jax.default_matmul_precision("highest" if in_float32 else None):
        own = jax.jit(make_detect(model, weights.classes, top_k=2**31 - 1))  # all candidates, see `difference`
        candidates = jax.tree.map(np.asarray, own(weights.variables, images, sizes_hw))
    largest = difference(found, {name: x[:first] for name, x in candidates.items()})
    if batch is None:
        largest = max(largest, difference(detect(images, sizes_hw), candidates))
    print(f"difference     {largest:8.1e}    the largest of scores and boxes (as fractions) from cdetr's own")
    if not largest <= TOLERANCE:
        raise ValueError(
            f"{path} finds something else than {weights.source} does: they differ by {largest:.1e}, expected at most "
            f"{TOLERANCE:.0e}; do not use the file, and report this with the lines above"
        )


def difference(found: dict[str, np.ndarray], candidates: dict[str, np.ndarray]) -> float:
    """The largest difference of scores and boxes from the best of the candidates.

    Detections that score the same may be chosen and sorted in any way, so each is compared with the nearest candidate
    of its class, and the scores alone in their order.
    Args:
      found: [B, K, ...] as `make_detect` gives it.
      candidates: the same of all queries and classes.
    """
    largest = np.abs(found["scores"] - candidates["scores"][:, : found["scores"].shape[1]]).max()
    for i, ids in enumerate(found["category_ids"]):
        for k, category_id in enumerate(ids):
            same = candidates["category_ids"][i] == category_id
            score_gaps = np.abs(candidates["scores"][i][same] - found["scores"][i, k])
            box_gaps = np.abs(candidates["boxes_xyxy"][i][same] - found["boxes_xyxy"][i, k]).max(-1)
            largest = max(largest, np.maximum(score_gaps, box_gaps).min(initial=np.inf))
    return float(largest)


def made_up_pictures(count: int, shape_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Drawn shapes, each picture of another size; uint8 [count, H, W, 3] with padding, and int32 [count, 2]."""
    images, sizes_hw = np.zeros((count, *shape_hw, 3), np.uint8), np.zeros((count, 2), np.int32)
    for i in range(count):
        height, width = (max(side * part // (i + part + 1), 32) for side, part in zip(shape_hw, (3, 7), strict=True))
        source = SyntheticShapes(seed=i, size=1, height=height, width=width, max_objects=4)
        images[i, :height, :width] = source.load_image(0)
        sizes_hw[i] = height, width
    return images, sizes_hw
