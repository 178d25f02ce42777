import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.training import make_optimizer, make_schedule, optimizer_names

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([1.0, -1.0])}
GRADS = {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "bias": jnp.array([0.0, 4.0])}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 2.0, 99: 2.0}),
        ({"name": "warmup", "warmup_steps": 4}, {0: 0.0, 1: 0.5, 4: 2.0, 50: 2.0}),
        ({"name": "linear", "steps": 10}, {0: 2.0, 5: 1.0, 10: 0.0, 20: 0.0}),
        (
            {"name": "cosine", "warmup_steps": 10, "steps": 30, "end_factor": 0.1},
            {
                0: 0.0,
                5: 1.0,
                10: 2.0,
                20: 1.1,
                30: 0.2,
                15: 2 * (0.1 + 0.45 * (1 + math.sqrt(0.5))),
            },
        ),
        ({"name": "rsqrt", "warmup_steps": 4}, {2: 1.0, 4: 2.0, 16: 1.0, 64: 0.5}),
        ({"name": "rsqrt", "timescale": 100}, {0: 2.0, 100: 2.0, 400: 1.0}),
        (
            {"name": "rsqrt", "warmup_steps": 64.5, "timescale": 16},
            {0: 0.0, 43: 2 * (43 / 64.5) * math.sqrt(16 / 43), 64: 64 / 64.5, 144: 2 / 3},
        ),
        ({"name": "step", "every": 10, "factor": 0.4}, {0: 2.0, 9: 2.0, 10: 0.8, 25: 0.32}),
    ],
)
def test_schedule_values(schedule, expected):
    rate = make_schedule(2.0, schedule, total_steps=1000)
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)
        assert float(jax.jit(rate)(jnp.int32(step))) == pytest.approx(value, abs=1e-6)


def test_schedules_decay_to_the_end_of_the_run():
    assert float(make_schedule(1.0, "linear", total_steps=40)(20)) == pytest.approx(0.5)
    optimizer = make_optimizer(
        {"learning_rate": 1.0, "schedule": "linear", "accumulate": 4}, total_steps=40
    )
    assert float(optimizer.learning_rate(5)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="needs steps > warmup_steps"):
        make_schedule(1.0, "cosine")


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_steps_and_reports(name):
    optimizer = make_optimizer({"name": name, "learning_rate": 1e-3, "clip_norm": 1.0})
    params, opt_state, largest = PARAMS, optimizer.init(PARAMS), 0.0
    update = jax.jit(optimizer.update)
    for _ in range(3):  # some only look at their first gradient
        updates, opt_state = update(GRADS, opt_state, params)
        params = optax.apply_updates(params, updates)
        largest = max(largest, *(float(jnp.abs(x).max()) for x in jax.tree.leaves(updates)))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
    assert largest > 0
    assert float(optimizer.learning_rate(0)) == pytest.approx(1e-3)


def test_the_expected_names_are_there():
    wanted = {"adam", "adamw", "sgd", "radam", "lion", "adafactor", "rmsprop", "contrib.muon"}
    assert wanted <= set(optimizer_names())


@pytest.mark.parametrize("given", [False, True])
def test_clipping_scales_to_the_norm(given):
    optimizer = make_optimizer({"name": "sgd", "learning_rate": 1.0, "clip_norm": 2.0})
    known = {"grad_norm": jnp.float32(5.0)} if given else {}
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, **known)
    np.testing.assert_allclose(updates["kernel"][0, 0], -3.0 * 2 / 5, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"][1], -4.0 * 2 / 5, rtol=1e-6)
    small = jax.tree.map(lambda g: g / 10, GRADS)
    updates, _ = optimizer.update(small, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["bias"], -small["bias"])


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_weight_decay_spares_vectors(name):
    still = jax.tree.map(jnp.zeros_like, GRADS)
    optimizer = make_optimizer({"name": name, "learning_rate": 0.1, "weight_decay": 0.5})
    updates, _ = optimizer.update(still, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["bias"], 0.0)
    assert np.abs(updates["kernel"]).min() > 0
    if name != "adafactor":
        np.testing.assert_allclose(updates["kernel"], -0.05 * PARAMS["kernel"], rtol=1e-6)


def test_accumulation_is_the_step_of_the_mean_gradient():
    config = {"name": "adam", "learning_rate": 0.1, "clip_norm": 1.0}
    several, once = make_optimizer(config | {"accumulate": 3}), make_optimizer(config)
    parts = [jax.tree.map(lambda g, k=k: g * k, GRADS) for k in (0.5, 1.0, 4.5)]
    opt_state = several.init(PARAMS)
    for part in parts:
        updates, opt_state = several.update(part, opt_state, PARAMS)
        if part is not parts[-1]:
            np.testing.assert_array_equal(updates["bias"], 0.0)
    mean = jax.tree.map(lambda g: g * 2.0, GRADS)
    expected, _ = once.update(mean, once.init(PARAMS), PARAMS)
    for name in PARAMS:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "adamm", "learning_rate": 1.0},
            "optimizer must be one of .*; got 'adamm'; did you mean 'adam",
        ),
        (
            {"name": "adam", "learning_rate": 1.0, "beta1": 0.9},
            "option of optimizer 'adam' 'beta1'",
        ),
        ({"name": "adam"}, "needs a learning_rate"),
        ({"learning_rate": 1.0, "weight_decay": 0.1}, "takes no weight_decay; these do: .*adamw"),
        (
            {"learning_rate": 1.0, "schedule": "cosin"},
            "schedule must be one of .*; got 'cosin'; did you mean 'cosi",
        ),
        (
            {"learning_rate": 1.0, "schedule": {"name": "cosine", "timescale": 3}},
            "option of schedule 'cosine' 'timescale'",
        ),
    ],
)
def test_mistakes_are_answered(config, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(config, total_steps=100)


def test_options_reach_optax():
    config = {"name": "adam", "learning_rate": 0.1, "b1": 0.0, "b2": 0.0, "eps": 1.0}
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["kernel"][0, 0], -0.1 * 3 / (3 + 1), rtol=1e-6)
