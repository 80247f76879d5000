"""Schedule, parameter groups, clipping and one AdamW step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdetr_jax.training.optimizer import make_optimizer, parameter_groups, step_schedule

FROZEN_MODULES = ("conv1", "layer1_0")


def params():
    """Four groups of numbers: frozen twice, backbone, the rest (one of whose modules has a frozen module's name)."""
    return {
        "backbone": {
            "conv1": {"kernel": jnp.array([1.0, -2.0])},
            "layer1_0": {"conv1": {"kernel": jnp.array([3.0])}},
            "layer2_0": {"conv1": {"kernel": jnp.array([0.5, -0.25, 4.0])}},
        },
        "class_embed": {"kernel": jnp.array([[2.0, -1.0]]), "bias": jnp.array([0.125])},
        "conv1": {"bias": jnp.array([-3.0])},
    }


def gradients():
    return {
        "backbone": {
            "conv1": {"kernel": jnp.zeros(2)},
            "layer1_0": {"conv1": {"kernel": jnp.zeros(1)}},
            "layer2_0": {"conv1": {"kernel": jnp.array([3.0, -4.0, 0.5])}},
        },
        "class_embed": {"kernel": jnp.array([[-2.0, 0.25]]), "bias": jnp.array([1.0])},
        "conv1": {"bias": jnp.array([-6.0])},
    }


def optimizer(lr=0.1, backbone_lr=0.01, weight_decay=0.3, clip_norm=0.0):
    return make_optimizer(
        lr=optax.constant_schedule(lr),
        backbone_lr=optax.constant_schedule(backbone_lr),
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        frozen_modules=FROZEN_MODULES,
    )


def test_schedule_drops():
    schedule = step_schedule(0.2, warmup_steps=0, drop_step=3, drop_factor=0.1)
    np.testing.assert_allclose([schedule(jnp.array(i)) for i in range(5)], [0.2, 0.2, 0.2, 0.02, 0.02], rtol=1e-6)


def test_schedule_warms_up():
    schedule = step_schedule(0.2, warmup_steps=4, drop_step=6, drop_factor=0.5)
    expected = [0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.1, 0.1]
    np.testing.assert_allclose([schedule(jnp.array(i)) for i in range(8)], expected, rtol=1e-6)


def test_groups():
    assert parameter_groups(params(), FROZEN_MODULES) == {
        "backbone": {
            "conv1": {"kernel": "frozen"},
            "layer1_0": {"conv1": {"kernel": "frozen"}},
            "layer2_0": {"conv1": {"kernel": "backbone"}},
        },
        "class_embed": {"kernel": "rest", "bias": "rest"},
        "conv1": {"bias": "rest"},
    }


def literal_adamw(params, grads, lr, weight_decay, steps=1):
    """arXiv:1711.05101, algorithm 2, with PyTorch's defaults: betas 0.9 and 0.999, eps 1e-8."""
    m, v = np.zeros_like(params), np.zeros_like(params)
    for step in range(1, steps + 1):
        m, v = 0.9 * m + 0.1 * grads, 0.999 * v + 0.001 * grads**2
        m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
        params = params - lr * weight_decay * params - lr * m_hat / (np.sqrt(v_hat) + 1e-8)
    return params


@pytest.mark.parametrize("steps", [1, 3])
def test_adamw_with_two_learning_rates_and_frozen_modules(steps):
    start, grads = params(), gradients()
    transform, current = optimizer(), start
    state = transform.init(start)
    for _ in range(steps):
        updates, state = transform.update(grads, state, current)
        current = optax.apply_updates(current, updates)
    lrs = {"frozen": 0.0, "backbone": 0.01, "rest": 0.1}

    def check(actual, start, grads, group):
        expected = literal_adamw(np.asarray(start, np.float64), np.asarray(grads, np.float64), lrs[group], 0.3, steps)
        # Adam's bias correction takes 1 - 0.999^n in float32, one bit of which is up to 6e-5, and its root 3e-5 of a
        # step of size 0.1: three times 3e-6, as CPUs round powers differently.
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-5)

    jax.tree.map(check, current, start, grads, parameter_groups(start, FROZEN_MODULES))


def test_frozen_parameters_stay_bit_for_bit():
    """Even weight decay, and even a gradient that should not be there, leaves them alone."""
    start, grads = params(), jax.tree.map(jnp.ones_like, params())
    transform = optimizer(weight_decay=0.9)
    updates, _ = transform.update(grads, transform.init(start), start)
    moved = optax.apply_updates(start, updates)
    for name in FROZEN_MODULES:
        jax.tree.map(np.testing.assert_array_equal, moved["backbone"][name], start["backbone"][name])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(updates["backbone"]["layer2_0"]))


def test_frozen_parameters_have_no_moments():
    state = jax.tree.leaves(optimizer().init(params()))
    trained = 3 + 2 + 1 + 1
    assert sum(leaf.size for leaf in state if leaf.ndim > 0) == 2 * trained  # the rest are step counters


def test_weight_decay_reaches_biases():
    start = params()
    transform = optimizer()
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, start), transform.init(start), start)
    np.testing.assert_allclose(updates["class_embed"]["bias"], -0.1 * 0.3 * start["class_embed"]["bias"], rtol=1e-6)
    kernel = start["backbone"]["layer2_0"]["conv1"]["kernel"]
    np.testing.assert_allclose(updates["backbone"]["layer2_0"]["conv1"]["kernel"], -0.01 * 0.3 * kernel, rtol=1e-6)


def first_moments(clip_norm, grads):
    """What AdamW saw: its first moment after one step is a tenth of the gradient."""
    transform = optimizer(clip_norm=clip_norm)
    _, state = transform.update(grads, transform.init(params()), params())
    moments = optax.tree.get_all_with_path(state, "mu")
    return sorted(float(x) * 10 for _, tree in moments for leaf in jax.tree.leaves(tree) for x in np.ravel(leaf))


def trained_gradients(scale=1.0):
    return sorted(scale * x for x in (3.0, -4.0, 0.5, -2.0, 0.25, 1.0, -6.0))


def test_clipping_by_the_global_norm():
    norm = np.sqrt(sum(x**2 for x in trained_gradients()))
    np.testing.assert_allclose(first_moments(0.1, gradients()), trained_gradients(0.1 / norm), rtol=1e-5)
    np.testing.assert_allclose(first_moments(2 * norm, gradients()), trained_gradients(), rtol=1e-5)
    np.testing.assert_allclose(first_moments(0.0, gradients()), trained_gradients(), rtol=1e-5)


def test_schedules_count_optimizer_steps():
    transform = make_optimizer(
        lr=step_schedule(0.1, warmup_steps=0, drop_step=2, drop_factor=0.5),
        backbone_lr=step_schedule(0.01, warmup_steps=0, drop_step=1, drop_factor=0.1),
        weight_decay=0.0,
        clip_norm=0.0,
        frozen_modules=FROZEN_MODULES,
    )
    start = params()
    state, sizes = transform.init(start), []
    for _ in range(3):
        updates, state = transform.update(gradients(), state, start)
        sizes.append(
            [-float(updates["class_embed"]["bias"][0]), -float(updates["backbone"]["layer2_0"]["conv1"]["kernel"][0])]
        )
    # A constant gradient gives Adam steps of exactly the learning rate, up to eps and float32.
    np.testing.assert_allclose(sizes, [[0.1, 0.01], [0.1, 0.001], [0.05, 0.001]], rtol=1e-4)
