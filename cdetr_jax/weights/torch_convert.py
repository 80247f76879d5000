"""Tables from our parameter paths to the published PyTorch names, and the conversion along them, both ways."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from cdetr_jax.checkpoints import mismatch

Rename = tuple[str, str | Callable[[re.Match], str]]

_RESNET: tuple[Rename, ...] = (
    (r"(layer\d)_(\d+)", r"\1/\2"),
    (r"downsample_conv", "downsample/0"),
    (r"downsample_bn", "downsample/1"),
)
# transformers' own ResNet counts stages from 0, and calls a convolution and its norm a layer.
_RESNET_OF_TRANSFORMERS: tuple[Rename, ...] = (
    (r"model/(conv|bn)1/", r"model/embedder/embedder/\g<1>1/"),
    (r"layer(\d)_(\d+)/", lambda found: f"encoder/stages/{int(found[1]) - 1}/layers/{found[2]}/"),
    (r"(layers/\d+)/(conv|bn)(\d)", lambda found: f"{found[1]}/layer/{int(found[3]) - 1}/{found[2]}{found[3]}"),
    (r"downsample_(conv|bn)", r"shortcut/\g<1>1"),
    (r"/conv\d/", "/convolution/"),
    (r"/bn\d/", "/normalization/"),
)
_HUB: tuple[Rename, ...] = (
    (r"^backbone/", "model/backbone/conv_encoder/model/"),
    (r"^input_proj/", "model/input_projection/"),
    (r"^query_embed$", "model/query_position_embeddings/weight"),
    (r"^class_embed/", "class_labels_classifier/"),
    (r"^bbox_embed/", "bbox_predictor/"),
    (r"^transformer/(query_scale|ref_point_head)", r"model/decoder/\1"),
    (r"^transformer/decoder_norm", "model/decoder/layernorm"),
    (r"^transformer/(encoder|decoder)_layers_(\d+)", r"model/\1/layers/\2"),
    (r"layers_(\d+)", r"layers/\1"),
    (r"/linear(\d)/", r"/fc\1/"),
    (r"/(cross_attn|multihead_attn)/", "/encoder_attn/"),
    (r"/norm1/", "/self_attn_layer_norm/"),
    (r"(encoder/layers/\d+)/norm2/", r"\1/final_layer_norm/"),
    (r"/norm2/", "/encoder_attn_layer_norm/"),
    (r"/norm3/", "/final_layer_norm/"),
)
_LEAVES: tuple[Rename, ...] = (
    (r"/(kernel|scale)$", "/weight"),
    (r"/mean$", "/running_mean"),
    (r"/var$", "/running_var"),
)


class Layout(NamedTuple):
    """One published way to name the same arrays.

    Attributes:
      name: what it is called.
      renames: regular expressions that rewrite our slash-joined path, applied in order.
      packed: an attention's q, k and v projections are one array.
    """

    name: str
    renames: tuple[Rename, ...]
    packed: bool = False

    def __repr__(self) -> str:
        return self.name


OFFICIAL = Layout(  # the authors' `.pth` files, and facebookresearch/detr's
    "OFFICIAL",
    (
        (r"^transformer/(query_scale|ref_point_head)", r"transformer/decoder/\1"),
        (r"^transformer/decoder_norm", "transformer/decoder/norm"),
        (r"(encoder|decoder)_layers_(\d+)", r"\1/layers/\2"),
        (r"layers_(\d+)", r"layers/\1"),
        (r"^backbone/", "backbone/0/body/"),
        *_RESNET,
        (r"^query_embed$", "query_embed/weight"),
        *_LEAVES,
    ),
    packed=True,
)
HUB = Layout("HUB", (*_HUB, *_RESNET, *_LEAVES))  # the hub's, whose backbone is timm's
HUB_WITHOUT_TIMM = Layout(
    "HUB_WITHOUT_TIMM", (*_HUB, *_RESNET_OF_TRANSFORMERS, *_LEAVES)
)  # the same with transformers' own backbone
BACKBONE = Layout("BACKBONE", ((r"^backbone/", ""), *_RESNET, *_LEAVES))  # torchvision's and timm's ResNets


def layout_of(names: Collection[str]) -> Layout:
    """The layout that a state dict's names are in.

    Raises: ValueError, if they are of another architecture.
    """
    if any(name.startswith(("transformer.", "backbone.0.body.")) for name in names):
        return OFFICIAL
    if any(name.startswith("model.backbone.conv_encoder.model.embedder.") for name in names):
        return HUB_WITHOUT_TIMM
    if any(name.startswith("model.backbone.conv_encoder.") for name in names):
        return HUB
    if any(name.startswith("layer1.0.conv1.") for name in names):
        return BACKBONE
    raise ValueError(
        "these are the weights of no Conditional DETR, DETR or ResNet in a published layout; the first names are "
        f"{', '.join(sorted(names)[:4]) or 'none at all'}"
    )


def torch_name(path: str, layout: Layout) -> tuple[str, int | None]:
    """The name of one of our variables (without its collection) in a layout, and its third of a packed projection."""
    name = path
    for pattern, replacement in layout.renames:
        name = re.sub(pattern, replacement, name)
    packed = layout.packed and re.search(r"/(self_attn|multihead_attn)/([qkv])_proj/(weight|bias)$", name)
    if not packed:
        return name.replace("/", "."), None
    return f"{name[: packed.end(1)]}/in_proj_{packed[3]}".replace("/", "."), "qkv".index(packed[2])


def from_torch(state_dict: Mapping[str, np.ndarray], template: Any, layout: Layout) -> Any:
    """Reads a published state dict into our variables.

    Args:
      state_dict: every array under its published name; `num_batches_tracked`, and a ResNet's ImageNet classifier
        `fc`, are ignored.
      template: the model's variables, or their `jax.eval_shape`; only their backbone for `BACKBONE`.
      layout: the names.
    Returns: the same tree with NumPy arrays of the state dict's numbers.
    Raises: ValueError, with the missing, unused and mis-shaped names.
    """
    ours: dict[tuple[str, ...], np.ndarray] = {}
    missing, misshapen, used = {}, [], set()
    for (collection, path), leaf in _flatten(template).items():
        name, third = torch_name(path, layout)
        if name not in state_dict:
            missing[name] = None
            continue
        used.add(name)
        array = _to_ours(np.asarray(state_dict[name]), leaf.shape, third, path.endswith("/kernel"))
        if array.shape != leaf.shape:
            misshapen.append(f"{name} {array.shape}, expected {leaf.shape}")
        ours[(collection, *path.split("/"))] = array
    unused = [name for name in state_dict if name not in used and not is_ignored(name, layout)]
    problems = mismatch.describe(missing, unused, misshapen)
    if problems:
        raise ValueError(f"the weights do not fit the model: {problems}")
    return traverse_util.unflatten_dict(ours)


def to_torch(variables: Any, layout: Layout) -> dict[str, np.ndarray]:
    """Our variables under their published names and in PyTorch's layout; `from_torch` undoes it bit for bit."""
    found: dict[str, np.ndarray] = {}
    thirds: dict[str, list[np.ndarray]] = {}
    for (_, path), leaf in _flatten(variables).items():
        name, third = torch_name(path, layout)
        array = np.asarray(leaf)
        if path.endswith("/kernel"):
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        if path == "input_proj/kernel":
            array = array[:, :, None, None]
        if third is None:
            found[name] = np.ascontiguousarray(array)
        else:
            thirds.setdefault(name, [array] * 3)[third] = array
    return found | {name: np.concatenate(arrays) for name, arrays in thirds.items()}


def is_ignored(name: str, layout: Layout) -> bool:
    """Whether a published array has no place in a detector, as a layout's files hold it."""
    return name.endswith("num_batches_tracked") or (layout == BACKBONE and name in ("fc.weight", "fc.bias"))


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


def _flatten(variables: Any) -> dict[tuple[str, str], Any]:
    flat = traverse_util.flatten_dict(variables)
    return {(path[0], "/".join(path[1:])): leaf for path, leaf in flat.items()}
