"""Bits per dimension, dequantisation, and the score of a set whose law is known."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import oracles, processes
from diffusion_jax.data.digits import digits
from diffusion_jax.evaluation import (
    bits_per_dim,
    dequantise,
    held_out_likelihood,
    importance_bound,
    infer_levels,
)
from diffusion_jax.methods.base import Method

DIGITS = digits("test")


def test_offsets_of_known_conventions():
    """A density of 1 / volume of the range is uniform over the levels: log2(levels) bits."""
    assert bits_per_dim(0.0, 10) == pytest.approx(7.0)
    assert bits_per_dim(0.0, 10, method="centred") == pytest.approx(math.log2(127.5))
    assert bits_per_dim(-3.0 * math.log(2.0), 3, 17, method="centred") == pytest.approx(4.0)
    for levels in (2, 17, 256):
        uniform = -6 * math.log(4.0)
        assert bits_per_dim(uniform, 6, levels, (0.0, 4.0)) == pytest.approx(math.log2(levels))


def test_every_level_keeps_to_its_bin_and_fills_it():
    levels = 5
    x = jnp.tile(jnp.linspace(-1.0, 1.0, levels), (4000, 1))
    for method, low, width in (("centred", -1.25, 0.5), ("tiled", -1.0, 0.4)):
        y = np.asarray(dequantise(jax.random.key(0), x, levels, method=method))
        u = (y - low) / width - np.arange(levels)
        assert u.min() > -1e-5 and u.max() < 1.0 + 1e-5
        np.testing.assert_allclose(u.mean(axis=0), 0.5, atol=4.5 / math.sqrt(12 * 4000))
        np.testing.assert_allclose(u.var(axis=0), 1 / 12, atol=0.01)
    assert (dequantise(None, x, levels, method="none") == x).all()


def test_noise_follows_the_index():
    x = jnp.zeros((4, 3))
    whole = dequantise(jax.random.key(1), x, 17, jnp.array([5, 6, 7, 8]))
    part = dequantise(jax.random.key(1), x[:2], 17, jnp.array([7, 5]))
    np.testing.assert_array_equal(part, whole[jnp.array([2, 0])])


def test_levels_are_read_from_the_data():
    assert infer_levels(DIGITS.take(np.arange(300))["image"]) == 17
    assert infer_levels((np.arange(256) / 127.5 - 1).astype(np.float32)) == 256
    assert infer_levels([-1.0, 1.0]) == 2
    for values, part in (([-1.0, 0.1234567, 1.0], "no grid"), ([0.0, 3.0], "0..3"), ([1.0], "1")):
        with pytest.raises(ValueError, match=part):
            infer_levels(values)


def test_importance_bound_is_the_log_of_a_mean():
    log_p = np.log(np.array([[1.0, 4.0], [3.0, 4.0]])) - 2000.0
    expected = np.log([2.0, 4.0]) - 2000.0
    np.testing.assert_allclose(importance_bound(log_p), expected, rtol=1e-12)
    np.testing.assert_allclose(importance_bound(jnp.asarray(log_p)), expected, rtol=1e-6)
    assert (importance_bound(log_p) >= log_p.mean(axis=0)).all()


def gaussian_method(process, variance):
    """Data N(shift of the label, variance I) as a method: exact, with a clip that `raw` takes off."""

    class Exact:
        def __init__(self, shift):
            self.shift = shift[:, None, None, None]

        def __call__(self, x, t):
            alpha, sigma = (v[:, None, None, None] for v in (process.alpha(t), process.sigma(t)))
            gain = alpha * variance / (alpha**2 * variance + sigma**2)
            return self.shift + gain * (x - alpha * self.shift)

    def denoiser(params, batch, train=False, key=None, raw=False):
        denoise = Exact(params["shift"][batch["label"]])
        return denoise if raw else (lambda x, t: jnp.clip(denoise(x, t), -0.1, 0.1))

    empty = {name: None for name in Method._fields}
    needed = {n: v for n, v in empty.items() if n not in Method._field_defaults}
    return Method(**(needed | {"denoiser": denoiser, "process": process}))


@pytest.mark.slow
def test_held_out_set_under_an_exact_conditional_model():
    """Chunks, a padded one, labels, several draws: the mean equals the closed form of the same draws."""
    process, variance = processes.VP(), 0.09
    shift = np.array([-0.5, 0.4], np.float32)
    method, params = gaussian_method(process, variance), {"shift": jnp.asarray(shift)}
    rng, count = np.random.default_rng(0), 7
    label = np.arange(count) % 2
    raw = shift[label][:, None, None, None] + 0.3 * rng.normal(size=(count, 2, 2, 1))
    image = np.clip(np.round(raw * 8), -8, 8).astype(np.float32) / 8
    data = {"image": image, "label": label, "index": np.arange(count, dtype=np.int32)}
    key = jax.random.key(4)
    found = held_out_likelihood(
        method, params, data, key, levels=17, draws=2, batch_size=3, divergence="exact"
    )
    expected = np.zeros((2, count))
    law = process.alpha(1e-3) ** 2 * variance + process.sigma(1e-3) ** 2
    for k in range(2):
        own = jax.random.fold_in(jax.random.fold_in(key, k), 0)
        x = np.asarray(dequantise(own, image, 17, data["index"], "centred"))
        gap = (x - process.alpha(1e-3) * shift[label][:, None, None, None]).reshape(count, -1)
        expected[k] = -0.5 * (gap**2 / law + np.log(2 * np.pi * law)).sum(axis=1)
    # the prior is N(0, I); the exact law of the latents differs from it by alpha(1)^2
    np.testing.assert_allclose(found.log_p, expected, rtol=0, atol=0.02)
    bits = bits_per_dim(found.log_p, 4, 17, method="centred")
    assert found.bits_per_dim == pytest.approx(bits.mean())
    assert found.importance_bits <= found.bits_per_dim
    assert found.standard_error == pytest.approx(bits.mean(axis=0).std(ddof=1) / math.sqrt(count))
    assert found.latents.shape == image.shape and found.round_trip < 1e-3
    assert 0 < found.nfe_mean <= found.nfe < 200
    whole = held_out_likelihood(
        method, params, data, key, levels=17, draws=2, batch_size=7, divergence="exact"
    )
    np.testing.assert_allclose(whole.log_p, found.log_p, rtol=0, atol=1e-4)


def test_bits_of_a_grid_law_are_bounded_from_above_by_dequantisation():
    """Discrete data of a rounded Gaussian: bound >= entropy, and the importance bound lies between."""
    process, std, levels = processes.VP(t_min=1e-5), 0.1, 17
    oracle = oracles.Gaussian(process, [0.0], [[std**2]])
    x = jnp.linspace(-0.25, 0.25, 5)[:, None]
    cells = [0.5 * (math.erf((v + w) / std / 2**0.5)) for w in (0.0625, -0.0625) for v in x[:, 0]]
    exact = -np.log2(np.array(cells[:5]) - np.array(cells[5:]))
    draws = []
    for k in range(64):
        y = dequantise(jax.random.key(k), x, levels, method="centred")
        draws.append(oracle.log_prob(y, 1e-5))
    draws = np.stack([np.asarray(d) for d in draws])
    bound = bits_per_dim(draws, 1, levels, method="centred").mean(axis=0)
    tighter = bits_per_dim(importance_bound(draws), 1, levels, method="centred")
    assert (bound > exact - 0.02).all() and (tighter <= bound).all()
    np.testing.assert_allclose(tighter, exact, rtol=0, atol=0.15)


def test_refusals():
    x = jnp.zeros((2, 3))
    cases = [
        (lambda: dequantise(jax.random.key(0), x, 17, method="even"), ["'even'", "centred"]),
        (lambda: dequantise(None, x, 17), ["key"]),
        (lambda: dequantise(jax.random.key(0), x, 1), ["levels", "1"]),
        (lambda: bits_per_dim(0.0, 0), ["dims", "0"]),
        (lambda: bits_per_dim(0.0, 1, value_range=(1.0, -1.0)), ["value_range"]),
        (lambda: held_out_likelihood(None, None, {"index": []}, None), ["no examples"]),
        (lambda: held_out_likelihood(None, None, {}, None, draws=0), ["draws", "0"]),
    ]
    for run, parts in cases:
        with pytest.raises(ValueError) as error:
            run()
        assert all(part in str(error.value) for part in parts), str(error.value)


def test_score_models_can_leave_their_denoiser_unclipped():
    from diffusion_jax.methods import score

    made = score(processes.VP(), None, DIGITS.spec)
    assert "raw" in inspect.signature(made.denoiser).parameters
