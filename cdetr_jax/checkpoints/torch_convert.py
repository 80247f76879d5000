"""Table from the published PyTorch names to our parameter paths, and the conversion along it."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

# Rewrites of our slash-joined path into the name of the official `.pth` files, applied in order.
_RENAMES = (
    (r"^transformer/(query_scale|ref_point_head)", r"transformer/decoder/\1"),
    (r"^transformer/decoder_norm", "transformer/decoder/norm"),
    (r"(encoder|decoder)_layers_(\d+)", r"\1/layers/\2"),
    (r"layers_(\d+)", r"layers/\1"),
    (r"^backbone/", "backbone/0/body/"),
    (r"(layer\d)_(\d+)", r"\1/\2"),
    (r"downsample_conv", "downsample/0"),
    (r"downsample_bn", "downsample/1"),
    (r"^query_embed$", "query_embed/weight"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/mean$", "/running_mean"),
    (r"/var$", "/running_var"),
)
_PACKED = re.compile(r"/([qkv])_proj/(weight|bias)$")


def official_name(path: str) -> tuple[str, int | None]:
    """The official name of one of our variables (without its collection), and its third of a packed projection."""
    name = path
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    packed = _PACKED.search(name)
    if not packed or "ca_" in name or "sa_" in name:
        return name.replace("/", "."), None
    return _PACKED.sub(rf"/in_proj_{packed[2]}", name).replace("/", "."), "qkv".index(packed[1])


def _to_ours(array: np.ndarray, shape: tuple[int, ...], third: int | None, is_kernel: bool) -> np.ndarray:
    if third is not None and array.ndim and len(array) % 3 == 0:  # else it stays whole, and is mis-shaped
        array = np.split(array, 3)[third]
    if is_kernel and array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)  # OIHW to HWIO
        if len(shape) == 2 and array.shape[:2] == (1, 1):  # the 1x1 input projection is a matrix product here
            array = array[0, 0]
    elif is_kernel:
        array = array.T
    return array


def from_official(state_dict: Mapping[str, np.ndarray], variables: Any) -> Any:
    """Reads an official state dict into the shape of `variables`.

    Args:
      state_dict: the published names; `num_batches_tracked` is ignored.
      variables: the model's variables, or their `jax.eval_shape`.
    Returns: the same tree with NumPy arrays.
    Raises: ValueError, with the missing, unused and mis-shaped names.
    """
    ours = {}
    missing, misshapen, used = {}, [], set()
    for (collection, path), leaf in _flatten(variables).items():
        name, third = official_name(path)
        if name not in state_dict:
            missing[name] = None
            continue
        used.add(name)
        array = _to_ours(np.asarray(state_dict[name]), leaf.shape, third, path.endswith("/kernel"))
        if array.shape != leaf.shape:
            misshapen.append(f"{name} {array.shape}, expected {leaf.shape}")
        ours[(collection, *path.split("/"))] = array
    unused = [name for name in state_dict if name not in used and not name.endswith("num_batches_tracked")]
    if missing or unused or misshapen:
        raise ValueError(
            f"the checkpoint does not fit the model: missing {list(missing)}, unused {unused}, mis-shaped {misshapen}"
        )
    return traverse_util.unflatten_dict(ours)


def _flatten(variables: Any) -> dict[tuple[str, str], Any]:
    flat = traverse_util.flatten_dict(variables)
    return {(path[0], "/".join(path[1:])): leaf for path, leaf in flat.items()}
