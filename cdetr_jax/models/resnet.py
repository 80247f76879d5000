"""ResNet-18/34/50/101 (arXiv:1512.03385, torchvision's v1.5) with frozen batch norm and the DC5 option."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cdetr_jax.models.attention import along_last, compute_dtype
from cdetr_jax.models.elementwise import relu
from cdetr_jax.structs import AnyArray

STAGE_SIZES = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
BOTTLENECK = {"resnet18": False, "resnet34": False, "resnet50": True, "resnet101": True}

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _plain_conv(x, kernel, stride: int, dilation: int, precision: str | None = None):
    pad = dilation * (kernel.shape[0] // 2)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def conv2d(
    x: Float[AnyArray, "B H W I"], kernel: Float[AnyArray, "K K I O"], stride: int, dilation: int
) -> Float[AnyArray, "B h w O"]:
    """Convolution with PyTorch's symmetric padding, `dilation * (K // 2)` on every side.

    The kernel's gradient is a sum over pixels for each of the `K*K` taps. XLA's CPU backend runs the convolution that
    differentiation gives for it several times slower than it runs the same sum as `K*K` matrix products, so on a CPU
    it is written that way, unless there are so few channels that the products are thin.
    """
    # Handed on by name: the backward pass is traced later, when the default precision may be another.
    return _conv2d(x, kernel, stride, dilation, jax.config.jax_default_matmul_precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv2d(x, kernel, stride, dilation, precision):
    return _plain_conv(x, kernel.astype(x.dtype), stride, dilation, precision)


def _conv2d_fwd(x, kernel, stride, dilation, precision):
    return _conv2d(x, kernel, stride, dilation, precision), (x, kernel)


def _kernel_gradient_by_taps(x, kernel, ct, *, stride: int, dilation: int, precision: str | None = None):
    del precision  # runs on CPUs, which compute in full
    size, _, features_in, features_out = kernel.shape
    _, h, w, _ = ct.shape
    pad = dilation * (size // 2)
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = ct.reshape(-1, features_out)
    taps = []
    for i in range(size):
        for j in range(size):
            top, left = i * dilation, j * dilation
            tap = padded[:, top : top + (h - 1) * stride + 1 : stride, left : left + (w - 1) * stride + 1 : stride]
            taps.append(tap.reshape(-1, features_in).T @ rows)
    return jnp.stack(taps).reshape(kernel.shape)


def _kernel_gradient_by_conv(x, kernel, ct, *, stride: int, dilation: int, precision: str | None = None):
    return jax.vjp(lambda k: _plain_conv(x, k, stride, dilation, precision), kernel)[1](ct)[0]


def _conv2d_bwd(stride, dilation, precision, residuals, ct):
    x, parameter = residuals
    kernel = parameter.astype(x.dtype)
    (x_ct,) = jax.vjp(lambda x: _plain_conv(x, kernel, stride, dilation, precision), x)[1](ct)
    settings = {"stride": stride, "dilation": dilation, "precision": precision}
    by_conv = functools.partial(_kernel_gradient_by_conv, **settings)
    if min(kernel.shape[2:]) < 64:
        return x_ct, by_conv(x, kernel, ct).astype(parameter.dtype)
    by_taps = functools.partial(_kernel_gradient_by_taps, **settings)
    kernel_ct = lax.platform_dependent(x, kernel, ct, cpu=by_taps, default=by_conv)
    return x_ct, kernel_ct.astype(parameter.dtype)


_conv2d.defvjp(_conv2d_fwd, _conv2d_bwd)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _product(x, kernel):
    """A 1x1 convolution. The backward pass keeps x and the parameter itself."""
    return x @ kernel[0, 0].astype(x.dtype)


class Conv(nn.Module):
    """A square convolution without bias; a 1x1 one is a matrix product over the channels."""

    features: int
    size: int = 1
    stride: int = 1
    dilation: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal, shape)
        dtype = compute_dtype(self.dtype, kernel)
        x = x.astype(dtype)
        if self.size == 1:
            return _product(x[:, :: self.stride, :: self.stride], kernel)
        return conv2d(x, kernel, self.stride, self.dilation)


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine parameters are constants (collection `constants`), eps 1e-5.

    Computed in at least float32: a scale and shift rounded to bfloat16 would add to the error of every block.

    Attributes:
      scale_init: the scale of a network that has not been loaded from a checkpoint.
    """

    scale_init: float = 1.0
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        shape = (x.shape[-1],)
        scale = self.variable("constants", "scale", jnp.full, shape, self.scale_init).value
        bias = self.variable("constants", "bias", jnp.zeros, shape).value
        mean = self.variable("constants", "mean", jnp.zeros, shape).value
        var = self.variable("constants", "var", jnp.ones, shape).value
        return _normalized(x, scale, bias, mean, var, self.eps)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=5)
def _normalized(x, scale, bias, mean, var, eps):
    """The backward pass keeps the constants themselves."""
    scale = scale * lax.rsqrt(var + eps)
    return (x * along_last(scale, x) + along_last(bias - mean * scale, x)).astype(x.dtype)


class GroupNorm(nn.Module):
    """Group norm with trained affine parameters, for a backbone that starts without ImageNet weights."""

    scale_init: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        most = max(1, min(32, x.shape[-1] // 4))
        groups = next(count for count in range(most, 0, -1) if x.shape[-1] % count == 0)
        scale_init = nn.initializers.constant(self.scale_init)
        return nn.GroupNorm(num_groups=groups, dtype=x.dtype, scale_init=scale_init, name="group_norm")(x)


NORMS = {"frozen_batch": FrozenBatchNorm, "group": GroupNorm}

# Scale of a residual branch's last norm before training. With frozen batch norm nothing else would keep the
# activations of an unloaded network from doubling at every block; published weights overwrite it.
RESIDUAL_SCALE = 0.25


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the stride sits in the first."""

    features: int
    norm: type[nn.Module]
    stride: int = 1
    dilation: int = 1
    first_dilation: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = Conv(self.features, 3, self.stride, self.first_dilation, self.dtype, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = Conv(self.features, 3, 1, self.dilation, self.dtype, name="conv2")(y)
        y = self.norm(scale_init=RESIDUAL_SCALE, name="bn2")(y)
        return relu(y + _shortcut(self, x, self.features))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride sits in the 3x3 (v1.5); 4 times as many channels out."""

    features: int
    norm: type[nn.Module]
    stride: int = 1
    dilation: int = 1
    first_dilation: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = Conv(self.features, dtype=self.dtype, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = Conv(self.features, 3, self.stride, self.first_dilation, self.dtype, name="conv2")(y)
        y = relu(self.norm(name="bn2")(y))
        y = Conv(4 * self.features, dtype=self.dtype, name="conv3")(y)
        y = self.norm(scale_init=RESIDUAL_SCALE, name="bn3")(y)
        return relu(y + _shortcut(self, x, 4 * self.features))


def _shortcut(block: BasicBlock | Bottleneck, x: Array, features: int) -> Array:
    """The identity, or a 1x1 projection where the shape changes. Called inside `block`'s compact method."""
    if block.stride == 1 and x.shape[-1] == features:
        return x
    x = Conv(features, 1, block.stride, dtype=block.dtype, name="downsample_conv")(x)
    return block.norm(name="downsample_bn")(x)


class ResNet(nn.Module):
    """The last stage's features: stride 32, or 16 with `dc5`.

    Attributes:
      variant: a key of `STAGE_SIZES`.
      width: channels of the stem.
      norm: a key of `NORMS`.
      frozen_stages: no gradient flows below this stage; 0 = all trained, 1 = stem frozen, 2 = stem and layer1.
      dc5: layer4 keeps its input's resolution: stride 1, and dilation 2 from its second block on.
      dtype: of the computation.
    """

    variant: str = "resnet50"
    width: int = 64
    norm: str = "frozen_batch"
    frozen_stages: int = 2
    dc5: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        norm = NORMS[self.norm]
        block = Bottleneck if BOTTLENECK[self.variant] else BasicBlock
        x = Conv(self.width, 7, 2, dtype=self.dtype, name="conv1")(images)
        x = relu(norm(name="bn1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        if self.frozen_stages == 1:
            x = lax.stop_gradient(x)
        for stage, num_blocks in enumerate(STAGE_SIZES[self.variant], start=1):
            dilate = self.dc5 and stage == 4
            for i in range(num_blocks):
                x = block(
                    features=self.width * 2 ** (stage - 1),
                    norm=norm,
                    stride=2 if i == 0 and stage > 1 and not dilate else 1,
                    dilation=2 if dilate else 1,
                    first_dilation=2 if dilate and i > 0 else 1,
                    dtype=self.dtype,
                    name=f"layer{stage}_{i}",
                )(x)
            if self.frozen_stages == stage + 1:
                x = lax.stop_gradient(x)
        return x


def frozen_modules(variant: str, frozen_stages: int) -> tuple[str, ...]:
    """Names of the backbone's submodules below the `frozen_stages` boundary, which the optimiser leaves alone."""
    names = ["conv1", "bn1"] if frozen_stages > 0 else []
    for stage, num_blocks in enumerate(STAGE_SIZES[variant], start=1):
        if frozen_stages > stage:
            names += [f"layer{stage}_{i}" for i in range(num_blocks)]
    return tuple(names)
