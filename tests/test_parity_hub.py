"""The hub's layout against transformers: a folder of files in, by its name alone, and the port's raw outputs out.

`reference/hf_*.npz` holds what transformers gave, on a CPU in float32, for the weights and pictures of
`reference/formula.py`. Its models were made with `auxiliary_loss`, with which the port also normalises between the
decoder's layers.
"""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from cdetr_jax.data.coco_categories import COCO_CATEGORIES
from cdetr_jax.models.detector import padding_mask
from cdetr_jax.weights.load import load_weights

REFERENCE = pathlib.Path(__file__).parent / "reference"
sys.path.insert(0, str(REFERENCE))
import formula  # noqa: E402

# Both sides are float32 and add up in different orders; measured: below 3e-6.
FORWARD = 1e-4

NAMES = ["N/A"] * 91
for category in COCO_CATEGORIES:
    NAMES[category.id] = category.name


def config_of(kind, num_queries):
    """As the hub's `config.json` of these models."""
    return {
        "model_type": kind,
        "activation_function": "relu",
        "auxiliary_loss": True,
        "backbone": "resnet50",
        "d_model": 256,
        "decoder_attention_heads": 8,
        "decoder_ffn_dim": 2048,
        "decoder_layers": 6,
        "dilation": False,
        "dropout": 0.1,
        "encoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
        "encoder_layers": 6,
        "id2label": {str(i): name for i, name in enumerate(NAMES)},
        "num_queries": num_queries,
        "position_embedding_type": "sine",
        "use_timm_backbone": True,
    }


@pytest.mark.parametrize("kind", ["conditional_detr", "detr"])
def test_a_folder_of_the_hub_gives_what_transformers_gives(kind, tmp_path):
    expected = dict(np.load(REFERENCE / f"hf_{kind}_r50.npz"))
    meta = json.loads(str(expected["meta"]))
    manifest = json.loads((REFERENCE / f"manifest_hf_{kind}_r50.json").read_text())
    state_dict = formula.state_dict(manifest, meta["seed"])
    save_file(state_dict, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config_of(kind, expected["logits"].shape[1])))
    del state_dict

    weights = load_weights(tmp_path)
    shutil.rmtree(tmp_path)  # 170 MB
    assert weights.classes[1].name == "person"
    assert [i for i, category in enumerate(weights.classes) if category is None] == [
        0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83,
    ]  # fmt: skip
    assert (weights.preprocessing.short_side_px, weights.preprocessing.long_side_max_px) == (800, 1333)

    sizes = np.array([[int(side) for side in size.split("x")] for size in meta["sizes"].split(",")], np.int32)
    shape_hw = tuple(sizes.max(axis=0).tolist())
    images = np.zeros((len(sizes), *shape_hw, 3), np.float32)
    for row, (height, width), picture in zip(images, sizes, formula.images(sizes, meta["seed"]), strict=True):
        row[:height, :width] = picture.transpose(1, 2, 0)
    model = weights.make_model()
    run = jax.jit(lambda variables, images, is_pad: model.apply(variables, images, is_pad, method="stages"))
    stages = run(weights.variables, images, padding_mask(sizes, shape_hw))
    found = {
        "logits": stages.predictions.logits[-1],
        "pred_boxes": stages.predictions.boxes_cxcywh[-1],
        "last_hidden_state": stages.decoder_output[-1][:, :, ::16],
    }
    errors = {name: np.abs(x - expected[name]).max() / np.abs(expected[name]).max() for name, x in found.items()}
    assert {name: error for name, error in errors.items() if not error <= FORWARD} == {}
