"""A trained detector as one file that runs without this package: StableHLO for JAX, or ONNX.

Both files hold a function of `images`, uint8 [B, H, W, 3] RGB with each picture in the upper left corner, and of
`sizes_hw`, int32 [B, 2], its height and width in pixels there. What lies outside of the picture does not count. The K
best detections of each picture come out, best first:

- `boxes_xyxy`, float32 [B, K, 4]: left, top, right, bottom as fractions of the picture, clipped to it, so that they can
  be scaled to the original picture's size;
- `scores`, float32 [B, K];
- `category_ids`, int32 [B, K]: the data set's own.

A StableHLO file needs `pip install jax flatbuffers`, no older than its signature's "jax"; an ONNX file needs
`pip install onnxruntime`. README.md, "Deploy", has the lines that load them and resize a picture as `Detector` does.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Int, UInt8

from cdetr_jax.classes import ClassTable
from cdetr_jax.evaluation.postprocess import detect
from cdetr_jax.files import whole_file
from cdetr_jax.models.detector import DetectionTransformer
from cdetr_jax.onnx_convert import to_onnx
from cdetr_jax.weights.load import Weights

PLATFORMS = ("cpu", "cuda", "tpu")
MODULE, WEIGHTS, CLASSES, SIGNATURE = "detect.stablehlo", "weights.npz", "classes.json", "signature.json"
OUTPUTS = ("boxes_xyxy", "scores", "category_ids")

Detect = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


def make_detect(model: DetectionTransformer, classes: ClassTable, top_k: int) -> Callable[..., dict[str, Array]]:
    """The function that is exported, see above, with the model's variables as its first argument.

    Logits that stand for nothing are left out before the best are chosen, so that K may be less than `top_k` only where
    there are fewer candidates. With the softmax loss they count as "no object".
    Raises: ValueError, if no logit stands for anything, or a category id does not fit into int32.
    """
    model = model.clone(attention="einsum")  # each of the kernels is for one platform alone
    known = [i for i, category in enumerate(classes) if category is not None]
    id_of_logit = np.array([0 if category is None else category.id for category in classes], np.int64)
    if not known:
        raise ValueError("none of the detector's logits stands for a class, so there is nothing that it could find")
    if (id_of_logit != id_of_logit.astype(np.int32)).any():
        raise ValueError(
            f"the category ids go up to {id_of_logit[abs(id_of_logit).argmax()]}; an exported detector gives them as "
            "int32"
        )

    def detect_known(variables: Any, images: UInt8[Array, "B H W 3"], sizes_hw: Int[Array, "B 2"]) -> dict[str, Array]:
        # Of a picture of one pixel, boxes in pixels are fractions.
        one_pixel = jnp.ones_like(sizes_hw)
        found = detect(model, variables, images, sizes_hw, one_pixel, top_k=top_k, known=tuple(known))
        category_ids = jnp.array(id_of_logit, jnp.int32)[found.labels]
        boxes_xyxy = jnp.clip(found.boxes_xyxy_px, 0, 1)
        return dict(zip(OUTPUTS, (boxes_xyxy, found.scores, category_ids), strict=True))

    return detect_known


def export_stablehlo(
    weights: Weights, path: str | os.PathLike, *, shape_hw: tuple[int, int], batch: int | None, top_k: int
) -> None:
    """Writes a zip with the function, its weights, `classes.json` and `signature.json`, for CPU, CUDA and TPU.

    The weights lie beside the function: as its constants they would make XLA's compilation three to four times as long.
    Args:
      path: of the file; either all of it is written or nothing.
      shape_hw: H and W in pixels.
      batch: B; None: any.
      top_k: K.
    Raises: ValueError, see `make_detect`; OSError.
    """
    detect_known = make_detect(weights.make_model(), weights.classes, top_k)
    flat = {name: np.asarray(x) for name, x in traverse_util.flatten_dict(weights.variables, sep="/").items()}

    def detect_with(flat: dict[str, Array], images: Array, sizes_hw: Array) -> dict[str, Array]:
        return detect_known(traverse_util.unflatten_dict(flat, sep="/"), images, sizes_hw)

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()}
    with _without_source_paths():
        exported = jax.export.export(jax.jit(detect_with), platforms=PLATFORMS)(
            shapes, *_inputs(shape_hw, batch).values()
        )
    arrays = io.BytesIO()
    np.savez(arrays, **flat)
    signature = _signature(weights, exported.out_avals[0].shape[1], shape_hw, batch)
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
        file.writestr(MODULE, exported.serialize())
        file.writestr(WEIGHTS, arrays.getbuffer())
        file.writestr(CLASSES, _class_list(weights.classes))
        file.writestr(SIGNATURE, json.dumps(signature | {"jax": jax.__version__, "platforms": PLATFORMS}, indent=2))


def export_onnx(
    weights: Weights, path: str | os.PathLike, *, shape_hw: tuple[int, int], batch: int | None, top_k: int
) -> None:
    """Writes an ONNX model with `classes` and `signature` in its metadata. It computes in float32.

    Args, Raises: as `export_stablehlo`; ModuleNotFoundError, without the onnx package.
    """
    _require("onnx")
    detect_known = make_detect(weights.make_model().clone(dtype=jnp.float32), weights.classes, top_k)
    variables = jax.tree.map(jnp.asarray, weights.variables)
    model = to_onnx(lambda *inputs: detect_known(variables, *inputs), _inputs(shape_hw, batch))
    signature = _signature(weights, model.graph.output[0].type.tensor_type.shape.dim[1].dim_value, shape_hw, batch)
    model.producer_name, model.producer_version = "cdetr_jax", signature["version"]
    for key, value in (("classes", _class_list(weights.classes)), ("signature", json.dumps(signature))):
        model.metadata_props.add(key=key, value=value)
    with whole_file(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def load_stablehlo(path: str | os.PathLike) -> Detect:
    """The function of a file, compiled at its first call.

    Raises: FileNotFoundError; ValueError, if the file is not whole.
    """
    try:
        with zipfile.ZipFile(path) as file:
            detect = jax.jit(jax.export.deserialize(bytearray(file.read(MODULE))).call)
            weights = jax.device_put(dict(np.load(io.BytesIO(file.read(WEIGHTS)))))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path} is not a whole detector ({error}); write it again with `cdetr export`") from error
    return lambda images, sizes_hw: jax.tree.map(np.asarray, detect(weights, images, sizes_hw))


def load_onnx(path: str | os.PathLike) -> Detect:
    """The function of a file, on the CPU.

    Raises: FileNotFoundError; ModuleNotFoundError, without onnxruntime; ValueError, if the file is not whole.
    """
    onnxruntime = _require("onnxruntime")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    broken = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    except (broken.InvalidProtobuf, broken.InvalidGraph, broken.Fail) as error:
        raise ValueError(f"{path} is not a whole detector ({error}); write it again with `cdetr export`") from error

    def detect(images: np.ndarray, sizes_hw: np.ndarray) -> dict[str, np.ndarray]:
        found = session.run(OUTPUTS, {"images": images, "sizes_hw": sizes_hw})
        return dict(zip(OUTPUTS, found, strict=True))

    return detect


def _inputs(shape_hw: tuple[int, int], batch: int | None) -> dict[str, jax.ShapeDtypeStruct]:
    (size,) = jax.export.symbolic_shape("B") if batch is None else (batch,)
    return {
        "images": jax.ShapeDtypeStruct((size, *shape_hw, 3), np.uint8),
        "sizes_hw": jax.ShapeDtypeStruct((size, 2), np.int32),
    }


def _signature(weights: Weights, top_k: int, shape_hw: tuple[int, int], batch: int | None) -> dict[str, Any]:
    """What a user has to know beside the weights; B stands for any batch."""
    size, sides = "B" if batch is None else batch, weights.preprocessing
    return {
        "version": metadata.version("cdetr_jax"),
        "inputs": {
            "images": {"dtype": "uint8", "shape": [size, *shape_hw, 3], "channels": "RGB"},
            "sizes_hw": {"dtype": "int32", "shape": [size, 2]},
        },
        "outputs": {
            "boxes_xyxy": {"dtype": "float32", "shape": [size, top_k, 4]},
            "scores": {"dtype": "float32", "shape": [size, top_k]},
            "category_ids": {"dtype": "int32", "shape": [size, top_k]},
        },
        "preprocessing": {
            "resize": "bilinear; the short side to short_side_px, or to the nearest pixel of what makes the long side "
            "long_side_max_px; the long side rounded down; then down to H and W, where it is larger",
            "short_side_px": sides.short_side_px,
            "long_side_max_px": sides.long_side_max_px,
            "padding": "zeros to the right and below",
        },
    }


def _class_list(classes: ClassTable) -> str:
    known = [{"id": category.id, "name": category.name} for category in classes if category is not None]
    return json.dumps(known, ensure_ascii=False)


def _require(package: str) -> Any:
    try:
        return __import__(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"ONNX needs the {package} package: pip install 'cdetr_jax[onnx]'") from error


@contextmanager
def _without_source_paths() -> Iterator[None]:
    """StableHLO keeps where each operation was written; the folders of this machine are nobody's business."""
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, ".*/")
    try:
        yield
    finally:
        jax.config.update(option, before)
