"""Conversion of published state dicts: what is refused and how, packed projections, and the layouts of arrays."""

import jax
import numpy as np
import pytest

from cdetr_jax.weights.torch_convert import OFFICIAL, from_torch, torch_name


def shape(*sides):
    return jax.ShapeDtypeStruct(sides, np.float32)


def numbers(*sides, start=0):
    return np.arange(start, start + np.prod(sides), dtype=np.float32).reshape(sides)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("query_embed", ("query_embed.weight", None)),
        ("input_proj/kernel", ("input_proj.weight", None)),
        ("class_embed/bias", ("class_embed.bias", None)),
        ("bbox_embed/layers_2/kernel", ("bbox_embed.layers.2.weight", None)),
        ("backbone/conv1/kernel", ("backbone.0.body.conv1.weight", None)),
        ("backbone/bn1/scale", ("backbone.0.body.bn1.weight", None)),
        ("backbone/bn1/mean", ("backbone.0.body.bn1.running_mean", None)),
        ("backbone/layer3_22/bn2/var", ("backbone.0.body.layer3.22.bn2.running_var", None)),
        ("backbone/layer1_0/downsample_conv/kernel", ("backbone.0.body.layer1.0.downsample.0.weight", None)),
        ("backbone/layer1_0/downsample_bn/bias", ("backbone.0.body.layer1.0.downsample.1.bias", None)),
        ("transformer/decoder_norm/scale", ("transformer.decoder.norm.weight", None)),
        ("transformer/ref_point_head/layers_1/bias", ("transformer.decoder.ref_point_head.layers.1.bias", None)),
        ("transformer/query_scale/layers_0/kernel", ("transformer.decoder.query_scale.layers.0.weight", None)),
        ("transformer/encoder_layers_5/norm1/bias", ("transformer.encoder.layers.5.norm1.bias", None)),
        (
            "transformer/encoder_layers_0/self_attn/k_proj/kernel",
            ("transformer.encoder.layers.0.self_attn.in_proj_weight", 1),
        ),
        (
            "transformer/encoder_layers_0/self_attn/v_proj/bias",
            ("transformer.encoder.layers.0.self_attn.in_proj_bias", 2),
        ),
        (
            "transformer/decoder_layers_3/ca_qpos_proj/kernel",
            ("transformer.decoder.layers.3.ca_qpos_proj.weight", None),
        ),
    ],
)
def test_names(path, expected):
    assert torch_name(path, OFFICIAL) == expected


def test_a_matrix_is_transposed():
    weight = numbers(5, 3)
    variables = {"params": {"class_embed": {"kernel": shape(3, 5), "bias": shape(5)}}}
    found = from_torch({"class_embed.weight": weight, "class_embed.bias": numbers(5, start=70)}, variables, OFFICIAL)
    np.testing.assert_array_equal(found["params"]["class_embed"]["kernel"], weight.T)
    np.testing.assert_array_equal(found["params"]["class_embed"]["bias"], [70, 71, 72, 73, 74])


def test_a_square_matrix_is_transposed_too():
    variables = {"params": {"class_embed": {"kernel": shape(2, 2)}}}
    found = from_torch({"class_embed.weight": np.array([[1, 2], [3, 4]])}, variables, OFFICIAL)
    assert found["params"]["class_embed"]["kernel"].tolist() == [[1, 3], [2, 4]]


def test_a_convolution_goes_from_oihw_to_hwio():
    weight = numbers(7, 3, 2, 5)  # out, in, height, width
    variables = {"params": {"backbone": {"conv1": {"kernel": shape(2, 5, 3, 7)}}}}
    found = from_torch({"backbone.0.body.conv1.weight": weight}, variables, OFFICIAL)
    found = found["params"]["backbone"]["conv1"]["kernel"]
    assert found.shape == (2, 5, 3, 7)
    for o, i, h, w in ((0, 0, 0, 0), (6, 2, 1, 4), (3, 1, 0, 2)):
        assert found[h, w, i, o] == weight[o, i, h, w]


def test_the_input_projection_becomes_a_matrix():
    weight = numbers(3, 5, 1, 1)
    found = from_torch({"input_proj.weight": weight}, {"params": {"input_proj": {"kernel": shape(5, 3)}}}, OFFICIAL)
    np.testing.assert_array_equal(found["params"]["input_proj"]["kernel"], weight[:, :, 0, 0].T)


def test_embeddings_and_statistics_stay_as_they_are():
    variables = {
        "params": {"query_embed": shape(5, 3)},
        "constants": {"backbone": {"bn1": {"mean": shape(3), "var": shape(3), "scale": shape(3), "bias": shape(3)}}},
    }
    names = ("running_mean", "running_var", "weight", "bias")
    state_dict = {f"backbone.0.body.bn1.{name}": numbers(3, start=10 * i) for i, name in enumerate(names)}
    state_dict["backbone.0.body.bn1.num_batches_tracked"] = np.array(3)  # ignored
    found = from_torch(state_dict | {"query_embed.weight": numbers(5, 3)}, variables, OFFICIAL)
    np.testing.assert_array_equal(found["params"]["query_embed"], numbers(5, 3))
    norm = found["constants"]["backbone"]["bn1"]
    assert {name: norm[name].tolist() for name in norm} == {
        "mean": [0, 1, 2],
        "var": [10, 11, 12],
        "scale": [20, 21, 22],
        "bias": [30, 31, 32],
    }


def test_a_packed_projection_is_split_in_the_order_query_key_value():
    prefix = "transformer.encoder.layers.0.self_attn"
    weight, bias = numbers(6, 2), numbers(6)
    attention = {f"{name}_proj": {"kernel": shape(2, 2), "bias": shape(2)} for name in "qkv"}
    variables = {"params": {"transformer": {"encoder_layers_0": {"self_attn": attention}}}}
    found = from_torch({f"{prefix}.in_proj_weight": weight, f"{prefix}.in_proj_bias": bias}, variables, OFFICIAL)
    found = found["params"]["transformer"]["encoder_layers_0"]["self_attn"]
    assert found["q_proj"]["kernel"].tolist() == [[0, 2], [1, 3]]
    assert found["k_proj"]["kernel"].tolist() == [[4, 6], [5, 7]]
    assert found["v_proj"]["kernel"].tolist() == [[8, 10], [9, 11]]
    assert [found[f"{name}_proj"]["bias"].tolist() for name in "qkv"] == [[0, 1], [2, 3], [4, 5]]


def test_everything_that_does_not_fit_is_listed():
    variables = {
        "params": {
            "class_embed": {"kernel": shape(3, 5), "bias": shape(5)},
            "input_proj": {"bias": shape(3)},
            "query_embed": shape(7, 3),
        }
    }
    state_dict = {
        "class_embed.weight": numbers(11, 3),
        "class_embed.bias": numbers(5),
        "query_embed.weight": numbers(13, 3),
        "optimizer_step": numbers(1),
        "label_enc.weight": numbers(2, 2),
    }
    with pytest.raises(ValueError, match="the weights do not fit the model") as error:
        from_torch(state_dict, variables, OFFICIAL)
    message = str(error.value)
    assert "missing input_proj.bias;" in message
    assert "unused optimizer_step, label_enc.weight;" in message
    assert "class_embed.weight (3, 11), expected (3, 5)" in message
    assert "query_embed.weight (13, 3), expected (7, 3)" in message
    assert "class_embed.bias" not in message


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({}, r"missing query_embed.weight; unused none; mis-shaped none"),
        (
            {"query_embed.weight": numbers(7, 3), "extra": numbers(1)},
            r"missing none; unused extra; mis-shaped none",
        ),
        ({"query_embed.weight": numbers(3, 7)}, r"unused none; mis-shaped query_embed.weight \(3, 7\), expected"),
    ],
)
def test_each_single_misfit_is_refused(state_dict, message):
    with pytest.raises(ValueError, match=message):
        from_torch(state_dict, {"params": {"query_embed": shape(7, 3)}}, OFFICIAL)


def test_a_missing_packed_projection_is_listed_once():
    attention = {f"{name}_proj": {"bias": shape(2)} for name in "qkv"}
    variables = {"params": {"transformer": {"encoder_layers_0": {"self_attn": attention}}}}
    with pytest.raises(ValueError, match="do not fit") as error:
        from_torch({}, variables, OFFICIAL)
    assert str(error.value).count("in_proj_bias") == 1


def test_a_packed_projection_of_the_wrong_length_is_mis_shaped():
    variables = {"params": {"transformer": {"encoder_layers_0": {"self_attn": {"q_proj": {"bias": shape(2)}}}}}}
    name = "transformer.encoder.layers.0.self_attn.in_proj_bias"
    for wrong in (numbers(7), numbers(9)):
        with pytest.raises(ValueError, match=rf"mis-shaped {name} "):
            from_torch({name: wrong}, variables, OFFICIAL)


def test_a_wider_input_projection_is_not_cut_to_a_matrix():
    with pytest.raises(ValueError, match=r"input_proj.weight \(3, 3, 5, 3\), expected \(5, 3\)"):
        from_torch(
            {"input_proj.weight": numbers(3, 5, 3, 3)}, {"params": {"input_proj": {"kernel": shape(5, 3)}}}, OFFICIAL
        )
