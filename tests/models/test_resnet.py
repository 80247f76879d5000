"""The backbone: its convolution, its architecture, and what is frozen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax import lax

from cdetr_jax.models import resnet
from cdetr_jax.models.resnet import ResNet, frozen_modules


def reference_conv(x, kernel, stride, dilation):
    pad = dilation * (kernel.shape[0] // 2)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@pytest.mark.parametrize(
    ("size", "stride", "dilation", "h", "w"),
    # Even sides leave a last row or column that no window reaches at stride 2.
    [(3, 1, 1, 7, 11), (3, 2, 1, 7, 11), (3, 2, 1, 8, 6), (3, 1, 2, 7, 11), (3, 2, 2, 8, 13), (7, 2, 1, 11, 14)],
)
def test_conv2d_and_its_gradients(size, stride, dilation, h, w):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, h, w, 3)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 3, 5)).astype(np.float32)
    expected, expected_pullback = jax.vjp(lambda x, k: reference_conv(x, k, stride, dilation), x, kernel)
    ct = rng.normal(size=expected.shape).astype(np.float32)
    x_ct, kernel_ct = expected_pullback(ct)

    @jax.jit
    def run(x, kernel, ct):
        value, pullback = jax.vjp(lambda x, k: resnet.conv2d(x, k, stride, dilation), x, kernel)
        paths = (resnet._kernel_gradient_by_taps, resnet._kernel_gradient_by_conv)
        return value, pullback(ct), [path(x, kernel, ct, stride=stride, dilation=dilation) for path in paths]

    actual, cotangents, by_path = run(x, kernel, ct)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    # The two ways add up to 300 products of size 1 in different orders.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    close(cotangents[0], x_ct)
    for actual_ct in (cotangents[1], *by_path):
        close(actual_ct, kernel_ct)


def test_conv2d_of_one_window_by_hand():
    x = jnp.arange(9, dtype=jnp.float32).reshape(1, 3, 3, 1)
    kernel = jnp.arange(1, 10, dtype=jnp.float32).reshape(3, 3, 1, 1)
    centre = (np.arange(9) * np.arange(1, 10)).sum()
    corner = 5 * 0 + 6 * 1 + 8 * 3 + 9 * 4  # the window over the upper left pixel sees rows and columns 0 and 1
    out = np.asarray(resnet.conv2d(x, kernel, 1, 1))[0, :, :, 0]
    assert out[1, 1] == centre
    assert out[0, 0] == corner
    assert np.asarray(resnet.conv2d(x, kernel, 2, 1))[0, 0, 0, 0] == corner


def shapes(**settings):
    model = ResNet(**settings)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 96, 3)))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def literal_counts(variant):
    """Convolution weights and normalised channels, from the architecture's table alone."""
    bottleneck, blocks = {
        "resnet18": (False, (2, 2, 2, 2)),
        "resnet34": (False, (3, 4, 6, 3)),
        "resnet50": (True, (3, 4, 6, 3)),
        "resnet101": (True, (3, 4, 23, 3)),
    }[variant]
    weights, channels, inputs = 7 * 7 * 3 * 64, 64, 64
    for stage, number in enumerate(blocks):
        features = 64 * 2**stage
        outputs = 4 * features if bottleneck else features
        for _ in range(number):
            if bottleneck:
                weights += inputs * features + 9 * features**2 + features * outputs
                channels += 2 * features + outputs
            else:
                weights += 9 * inputs * features + 9 * features * outputs
                channels += features + outputs
            if inputs != outputs:
                weights += inputs * outputs
                channels += outputs
            inputs = outputs
    return weights, channels


# torchvision's published counts without the final linear layer: convolutions and batch norm's weight and bias.
TORCHVISION = {
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
}


@pytest.mark.parametrize("variant", TORCHVISION)
def test_parameter_counts(variant):
    variables = shapes(variant=variant)
    weights, channels = literal_counts(variant)
    assert weights + 2 * channels == TORCHVISION[variant]
    assert count(variables["params"]) == weights
    assert count(variables["constants"]) == 4 * channels  # weight, bias, mean, variance


def test_resnet34_and_resnet50_have_the_same_blocks():
    names = [set(shapes(variant=variant)["params"]) for variant in ("resnet34", "resnet50")]
    assert names[0] == names[1]


def test_dc5_doubles_the_resolution_with_the_same_parameters():
    images = jnp.zeros((1, 96, 160, 3))
    outputs, trees = [], []
    for dc5 in (False, True):
        model = ResNet("resnet50", width=4, dc5=dc5)
        outputs.append(jax.eval_shape(lambda m=model: m.init_with_output(jax.random.key(0), images)[0]).shape)
        trees.append(jax.tree.map(lambda x: x.shape, shapes(variant="resnet50", width=4, dc5=dc5)))
    assert outputs == [(1, 3, 5, 128), (1, 6, 10, 128)]
    assert trees[0] == trees[1]


def test_dc5_dilates_from_the_second_block_on(monkeypatch):
    used = []
    plain = resnet.conv2d

    def conv2d(x, kernel, stride, dilation):
        used.append((kernel.shape[0], stride, dilation))
        return plain(x, kernel, stride, dilation)

    monkeypatch.setattr(resnet, "conv2d", conv2d)
    shapes(variant="resnet50", width=4, dc5=True)
    threes = [(stride, dilation) for size, stride, dilation in used if size == 3]
    blocks = 3 + 4 + 6
    assert threes[blocks:] == [(1, 1), (1, 2), (1, 2)]
    assert threes[:blocks] == [(1, 1)] * 3 + [(2, 1)] + [(1, 1)] * 3 + [(2, 1)] + [(1, 1)] * 5


def numbers(tree, seed=0):
    """Random values in the tree's shapes, small enough that no activation explodes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.array(rng.normal(scale=0.2, size=s.shape), s.dtype), tree)


@pytest.fixture
def short(monkeypatch):
    """A variant with one block per stage: everything that a stage does, at the least compile time."""
    monkeypatch.setitem(resnet.STAGE_SIZES, "short", (1, 1, 1, 1))
    monkeypatch.setitem(resnet.BOTTLENECK, "short", False)
    return "short"


@pytest.mark.parametrize("frozen", [0, 1, 2, 4])
def test_no_gradient_reaches_frozen_stages(frozen, short, monkeypatch):
    model = ResNet(short, width=4, frozen_stages=frozen)
    variables = shapes(variant=short, width=4)
    params = numbers(variables["params"])
    constants = jax.tree.map(lambda s: jnp.ones(s.shape), variables["constants"])
    images = jnp.array(np.random.default_rng(1).normal(size=(1, 32, 32, 3)), jnp.float32)
    names = frozen_modules(short, frozen)
    # Which gradients vanish is asked here, not what they are: leave out the compile time of the taps.
    monkeypatch.setattr(resnet, "conv2d", resnet._plain_conv)
    grads = jax.grad(lambda p: (model.apply({"params": p, "constants": constants}, images) ** 2).sum())(params)
    for path, grad in traverse_util.flatten_dict(grads).items():
        assert (np.abs(grad).max() == 0) == (path[0] in names), path


@pytest.mark.parametrize("variant", TORCHVISION)
@pytest.mark.parametrize("norm", ["frozen_batch", "group"])
def test_frozen_modules_exist(variant, norm):
    names = set(shapes(variant=variant, norm=norm)["params"])
    assert frozen_modules(variant, 0) == ()
    bn1 = {"bn1"} if norm == "group" else set()  # frozen batch norm has no parameters
    for stages in range(1, 6):
        frozen = set(frozen_modules(variant, stages))
        assert frozen - {"bn1"} <= names
        kept = {name for name in names if name.startswith("layer") and int(name[5]) >= stages}
        assert names - frozen == kept
        assert bn1 <= frozen & names
    assert frozen_modules("resnet50", 2) == ("conv1", "bn1", "layer1_0", "layer1_1", "layer1_2")


def test_group_norm_has_no_constants(short):
    variables = shapes(variant=short, width=8, norm="group")
    assert "constants" not in variables
    batch = shapes(variant=short, width=8)
    channels = count(batch["constants"]) // 4
    assert count(variables["params"]) == count(batch["params"]) + 2 * channels


def test_frozen_batch_norm_is_the_affine_map():
    x = jnp.array([[[[3.0, -2.0]]]])
    constants = {
        "scale": jnp.array([2.0, 0.5]),
        "bias": jnp.array([1.0, -1.0]),
        "mean": jnp.array([1.0, 4.0]),
        "var": jnp.array([4.0, 0.0]),
    }
    actual = resnet.FrozenBatchNorm().apply({"constants": constants}, x)
    expected = [(3 - 1) / np.sqrt(4 + 1e-5) * 2 + 1, (-2 - 4) / np.sqrt(1e-5) * 0.5 - 1]
    np.testing.assert_allclose(np.asarray(actual).ravel(), expected, rtol=1e-6)


def test_frozen_batch_norm_does_not_round_its_constants_to_bfloat16():
    constants = {name: jnp.array([value]) for name, value in (("scale", 1.001), ("bias", 100.3), ("mean", 100.2))}
    constants["var"] = jnp.array([1.0 - 1e-5])
    x = jnp.full((1, 1, 1, 1), 100.0, jnp.bfloat16)
    actual = resnet.FrozenBatchNorm().apply({"constants": constants}, x)
    assert actual.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits, which would make 1.0 of the scale.
    assert float(actual[0, 0, 0, 0]) == float(jnp.bfloat16(100 * 1.001 + (100.3 - 100.2 * 1.001)))
