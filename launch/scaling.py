"""Prints the table of launch/SCALING.md: what a step of Conditional DETR R50 takes at least on many chips, on paper.

python launch/scaling.py
"""

from typing import NamedTuple

PICTURES = 4  # a chip, of 800x1344 pixels, in bfloat16
CHIPS_PER_HOST = 4
ALL_REDUCED_BYTES = 172_784_004  # float32 gradients of the trained parameters
MATCH_MS = 18.4 / 64  # of a picture, 6 layers, 21 targets in the mean (BENCHMARKS.md, "The host beside the device")
DECODED_PER_CORE_S = 98  # pictures, published augmentation (BENCHMARKS.md, "Reading pictures")
COCO_PICTURES = 117_266  # of train2017 with an object


class Chip(NamedTuple):
    """What `cdetr benchmark compile` and the chip's page say.

    Attributes:
      flops_ms, traffic_ms: "bound" and "with traffic" of the recipe's training step (README.md).
      link_gb_per_s: what a chip can send to its neighbours, all links together, one way: the pod's published all-reduce
        bandwidth over its chips (v4: 1.1 PB/s over 4096, v5e: 51.2 TB/s over 256, v6e: 102.4 TB/s over 256), or half of
        the published bidirectional rate (v5p: 1200 GB/s). https://docs.cloud.google.com/tpu/docs/ v4, v5e, v5p, v6e
    """

    flops_ms: float
    traffic_ms: float
    link_gb_per_s: float


CHIPS = {
    "v4": Chip(9.5, 43.4, 268),
    "v5e": Chip(13.4, 63.3, 200),
    "v5p": Chip(5.5, 16.3, 600),
    "v6e": Chip(3.4, 29.5, 400),
}


def main() -> None:
    """Prints Markdown."""
    print(
        "| chips | batch | lr | chip | compute, ms | with traffic, ms | all-reduce, ms | matching, ms | step, ms ",
        end="",
    )
    print("| images a second | an epoch of COCO, min | decoding cores a host |")
    print("|" + "---|" * 12)
    for chips in (8, 32, 128, 256):
        batch = PICTURES * chips
        for name, chip in CHIPS.items():
            # Each of n chips sends (n - 1) / n of the bytes to be summed, and as much of the sums.
            reduce_ms = 2 * (chips - 1) / chips * ALL_REDUCED_BYTES / chip.link_gb_per_s / 1e6
            match_ms = MATCH_MS * PICTURES * CHIPS_PER_HOST
            step_ms = chip.traffic_ms + reduce_ms + match_ms
            images_per_s = batch / step_ms * 1e3
            cores = images_per_s / (chips / CHIPS_PER_HOST) / DECODED_PER_CORE_S
            lr = 1e-4 * (batch / 16) ** 0.5
            cells = [
                chips, batch, f"{lr:.1e}", name, chip.flops_ms, chip.traffic_ms, f"{reduce_ms:.1f}", f"{match_ms:.1f}",
                f"{step_ms:.0f}", f"{images_per_s:,.0f}", f"{COCO_PICTURES / images_per_s / 60:.1f}", f"{cores:.1f}",
            ]  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
