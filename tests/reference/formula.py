"""Weights, inputs and targets by formula, so that two frameworks can hold the same model.

A tensor depends only on its name, its shape and a seed, so a manifest of names
and shapes (manifest_*.json) is all it takes to rebuild a whole checkpoint:

    state = formula.state_dict(json.load(open("manifest_official_r50.json")), seed=0)

Arrays are float32 in the reference's own (PyTorch) layout: convolution kernels
OIHW, linear kernels (out, in). NumPy only.
"""

import zlib

import numpy as np


def tensor(name: str, shape, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    shape = tuple(shape)
    leaf = name.rsplit(".", 1)[-1]
    normal = lambda std: (rng.standard_normal(shape) * std).astype(np.float32)
    uniform = lambda lo, hi: rng.uniform(lo, hi, shape).astype(np.float32)
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_mean":
        return normal(0.1)
    if leaf == "running_var":
        return uniform(0.6, 1.4)
    if "query_embed" in name or "query_position_embeddings" in name:
        return normal(1.0)
    if "row_embed" in name or "col_embed" in name:
        return uniform(0.0, 1.0)
    if len(shape) == 4:
        fan_in = shape[1] * shape[2] * shape[3]
        return normal(np.sqrt(2.0 / fan_in))
    if len(shape) == 2 and ("class_embed" in name or "class_labels_classifier" in name):
        return normal(0.03)
    if len(shape) == 2:
        return normal(np.sqrt(2.0 / (shape[0] + shape[1])))
    if leaf == "weight":  # batch-norm or layer-norm scale; residual branches small
        return uniform(0.2, 0.4) if "bn3" in name else uniform(0.8, 1.2)
    if leaf == "bias" and ("class_embed" in name or "class_labels_classifier" in name):
        return (normal(0.3) - 4.0).astype(np.float32)
    return normal(0.05)


def state_dict(manifest: dict, seed: int = 0) -> dict:
    return {name: tensor(name, shape, seed) for name, shape in manifest.items()}


def images(sizes, seed: int = 0):
    """Normalised images, list of float32 (3, h, w): smooth fields plus noise."""
    out = []
    for i, (h, w) in enumerate(sizes):
        rng = np.random.default_rng([977, seed, i])
        y, x = np.mgrid[0:h, 0:w].astype(np.float32)
        img = np.stack(
            [
                np.sin(x / (7 + 3 * c) + rng.uniform(0, 6)) + np.cos(y / (11 + 2 * c) + rng.uniform(0, 6))
                for c in range(3)
            ]
        )
        img += 0.3 * rng.standard_normal((3, h, w))
        out.append(img.astype(np.float32))
    return out


def targets(counts, num_classes: int, seed: int = 0):
    """List of {'labels': int64 (T,), 'boxes': float32 (T, 4) cxcywh in [0, 1]}."""
    out = []
    for i, t in enumerate(counts):
        rng = np.random.default_rng([331, seed, i])
        wh = rng.uniform(0.05, 0.5, (t, 2))
        c = rng.uniform(0, 1, (t, 2)) * (1 - wh) + wh / 2
        out.append(
            {
                "labels": rng.integers(1, num_classes, t).astype(np.int64),
                "boxes": np.concatenate([c, wh], 1).astype(np.float32),
            }
        )
    return out
