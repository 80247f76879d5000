"""`cdetr benchmark`: where the time of a train step goes, on made-up pictures; `input` and `compile`: see beside."""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cdetr_jax import build
from cdetr_jax.cli import benchmark_compile, benchmark_input
from cdetr_jax.cli.data_flag import config_of
from cdetr_jax.cli.settings import set_up_logging
from cdetr_jax.config_check import check_config, count_train_devices
from cdetr_jax.device_memory import must_fit
from cdetr_jax.structs import Batch, Targets
from cdetr_jax.training.parallel import Trainer
from cdetr_jax.training.step import new_rng

TRACED_STEPS = 3


def made_up_batch(batch: int, height: int, width: int, targets: int, num_classes: int) -> Batch:
    """Noise pictures that fill the whole shape, with random boxes of 5 to 50 % of the sides."""
    rng = np.random.default_rng(0)
    size = rng.uniform(0.05, 0.5, (batch, targets, 2))
    centre = rng.uniform(0, 1, (batch, targets, 2)) * (1 - size) + size / 2
    sizes = np.tile(np.array([height, width], np.int32), (batch, 1))
    return Batch(
        images=rng.integers(0, 256, (batch, height, width, 3), np.uint8),
        sizes_hw=sizes,
        original_sizes_hw=sizes,
        index=np.arange(batch, dtype=np.int32),
        targets=Targets(
            labels=rng.integers(0, num_classes, (batch, targets)).astype(np.int32),
            boxes_cxcywh=np.concatenate([centre, size], -1).astype(np.float32),
            valid=np.ones((batch, targets), bool),
        ),
    )


class _Clock:
    """Wall times of each part, waiting for its results."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    def time(self, part: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(call(*arguments))
        self.seconds.setdefault(part, []).append(time.perf_counter() - start)
        return result


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Prints compile time, the time of each part, images per second and memory; or what the other two do.

    Raises: ValueError, if the config is wrong, or the batch does not divide among the devices.
    """
    if arguments.data:
        set_up_logging()  # it says what was found
    if arguments.what != "step":
        {"input": benchmark_input, "compile": benchmark_compile}[arguments.what].run(arguments, fields)
        return
    config = config_of(arguments.config, arguments.data, fields)
    check_config(config)
    arguments.batch = arguments.batch or 2
    device_count = count_train_devices(arguments.batch, 1, jax.local_device_count(), name="--batch")
    height, width = arguments.size
    num_classes = config.model.num_classes or 91
    schedules = build.make_schedules(config, steps_per_epoch=1000)
    functions = build.make_step_functions(config, num_classes, schedules)
    trainer = Trainer(functions, jax.local_devices()[:device_count])
    state = trainer.replicate(functions.init(new_rng(0), (height, width)))
    batch = made_up_batch(arguments.batch, height, width, arguments.targets, num_classes)
    clock = _Clock()
    remedy = "use a smaller --batch or --size, or --config.model.compute_dtype=bfloat16"
    fits = must_fit(arguments.batch // device_count, height, width, remedy)

    @fits
    def step(state: Any) -> Any:
        placed = trainer.put(batch)
        images, sizes_hw, targets = placed.batch.images, placed.batch.sizes_hw, placed.batch.targets
        number = trainer.number(0)
        predictions, residuals = clock.time("forward", trainer.forward, state.network, images, sizes_hw, number)
        cost = clock.time("cost", trainer.cost, predictions, targets)
        match = clock.time("matching", trainer.match, cost, placed)
        counts = trainer.counts([placed])
        cotangents, losses = clock.time("losses", trainer.loss, predictions, targets, match, counts)
        grads = clock.time("backward", trainer.backward, state.network, residuals, cotangents)
        del residuals
        state, _ = clock.time("update", trainer.apply, state, grads, losses)
        return state

    @fits
    def whole(state: Any) -> Any:
        return trainer.step(state, [batch] * arguments.accumulation)[0]

    start = time.perf_counter()
    state = step(state)
    compile_s = time.perf_counter() - start
    clock.seconds.clear()
    state = whole(state)  # compiles what only accumulation needs
    for _ in range(arguments.steps):
        state = step(state)
    for _ in range(arguments.steps):
        state = clock.time("whole step", whole, state)
    if arguments.trace:
        with jax.profiler.trace(arguments.trace, create_perfetto_trace=True):
            for _ in range(TRACED_STEPS):
                state = jax.block_until_ready(whole(state))
    peak_train = _peak_gib()
    variables = state.eval_variables
    del state
    detect = fits(trainer.detect)
    detect(variables, batch)
    for _ in range(arguments.steps):
        clock.time("inference", detect, variables, batch)

    device = jax.devices()[0]
    print(
        f"{arguments.config or arguments.data}, {config.model.compute_dtype}, "
        f"batch {arguments.batch}, {height}x{width}, "
        f"{arguments.targets} targets, jax {jax.__version__}, {device_count} x {device.device_kind}"
    )
    print(f"{'first step, with compilation':30s} {compile_s:9.2f} s")
    for part, seconds in clock.seconds.items():
        median = statistics.median(seconds)
        pictures = {"whole step": arguments.batch * arguments.accumulation, "inference": arguments.batch}
        rate = f"   {pictures[part] / median:8.2f} images/s" if part in pictures else ""
        print(f"{part:30s} {median:9.4f} s  (from {min(seconds):.4f} to {max(seconds):.4f}){rate}")
    print(f"{'peak memory, training':30s} {peak_train:9.2f} GiB")


def _peak_gib() -> float:
    """Of the device where it tells, else of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
