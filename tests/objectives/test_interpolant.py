"""Interpolant losses against the authors' program, and their minima by exact integration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax import oracles
from diffusion_jax.fields import PARTS
from diffusion_jax.objectives import interpolant_losses
from diffusion_jax.processes import BrownianBridge, Interpolant

STORED = golden("bridges_si")
LINEAR = Interpolant(t_min=0.0, t_max=1.0)


def at(t):
    """A time sampler that gives these times."""
    return lambda process, key, index, total: (jnp.asarray(t), jnp.ones_like(t))


def authors_network(x, t):
    """W [x; time], in the paper's clock."""
    return jnp.concatenate([x, 1.0 - t[:, None]], axis=1) @ STORED["loss_W"].T


CASES = {  # name here -> name there, sign of the network, antithetic
    "velocity": ("b", -1.0, True),
    "conditional_velocity": ("v", -1.0, False),
    "score": ("s", 1.0, True),
    "denoiser": ("eta", -1.0, False),
}


@pytest.mark.parametrize("target", CASES)
def test_losses_of_the_authors(target, x64):
    """Drifts change sign with the clock; their eta is -E[z | x]; pairs are summed there, averaged here."""
    name, sign, antithetic = CASES[target]
    losses, aux = interpolant_losses(
        LINEAR,
        lambda x, t: sign * authors_network(x, t),
        jax.random.key(0),
        jnp.asarray(STORED["loss_x1"]),
        jnp.asarray(STORED["loss_x0"]),
        targets=target,
        antithetic=antithetic,
        times=at(1.0 - STORED["loss_t"]),
        reduce="sum",
        noise=jnp.asarray(STORED["loss_z"]),
    )
    expected = STORED[f"loss_{name}"] / (2.0 if antithetic else 1.0)
    np.testing.assert_allclose(losses[target], expected, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(aux["t"], 1.0 - STORED["loss_t"])


@functools.cache
def nodes():
    """Gauss-Hermite nodes for (x0, x1, z) in one dimension, exact for the quartic integrands below."""
    v, w = np.polynomial.hermite_e.hermegauss(4)
    weights = np.einsum("i,j,k->ijk", w, w, w).ravel()
    return np.stack(
        [g.ravel() for g in np.meshgrid(v, v, v, indexing="ij")]
    ), weights / weights.sum()


PROCESSES = (Interpolant(), Interpolant("trig", "quadratic"), BrownianBridge(0.6))


@pytest.mark.parametrize("antithetic", (True, False))
@pytest.mark.parametrize("process", PROCESSES)
def test_the_exact_part_is_the_minimum(process, antithetic, x64):
    """Coupled ends: loss of f + d less that of the exact f is E|d|^2 / 2, and the minimum -E|f|^2 / 2."""
    (u, v, z), weights = nodes()
    x0, x1 = 0.3 + 0.8 * u, -0.5 + 0.4 * u + 0.7 * v
    oracle = oracles.GaussianInterpolant(
        process, [0.3], [[0.64]], [-0.5], [[0.65]], cov01=[[0.8 * 0.4]]
    )
    x0, x1, z = (jnp.asarray(s)[:, None] for s in (x0, x1, z))
    t = jnp.full(len(z), 0.3)
    extra = lambda x: 0.2 + 0.1 * x

    def expected_losses(shift):
        def predict(x, t):
            exact = oracle.parts(x, process.point(t))
            return {p: exact[p] + shift * extra(x) for p in PARTS}

        losses, _ = interpolant_losses(
            process, predict, jax.random.key(0), x0, x1,
            targets=PARTS, antithetic=antithetic, times=at(t), noise=z,
        )  # fmt: skip
        return {p: float(weights @ losses[p]) for p in PARTS}

    point = process.point(t)
    xt = process.corrupt(x0, x1, z, t)
    least, above = expected_losses(0.0), expected_losses(1.0)
    exact = oracle.parts(xt, point)
    cost = 0.5 * float(weights @ (extra(xt) ** 2)[:, 0])
    for part in PARTS:
        minimum = -0.5 * float(weights @ (exact[part] ** 2)[:, 0])
        np.testing.assert_allclose(least[part], minimum, rtol=1e-10, err_msg=part)
        np.testing.assert_allclose(above[part] - least[part], cost, rtol=1e-9, err_msg=part)


def test_antithetic_pairs_bound_the_variance_at_the_ends():
    """Where c' is infinite: the spread of the velocity loss with pairs stays, without them it grows."""
    rng = np.random.default_rng(0)
    x0, x1 = (jnp.asarray(rng.standard_normal((4000, 2)), jnp.float32) for _ in range(2))

    def spread(t, antithetic):
        losses, _ = interpolant_losses(
            LINEAR,
            lambda x, t: {"velocity": jnp.tanh(x), "score": jnp.tanh(x)},
            jax.random.key(1),
            x0,
            x1,
            targets=("velocity", "score"),
            antithetic=antithetic,
            times=at(jnp.full(4000, t)),
        )
        return {name: float(v.std()) for name, v in losses.items()}

    for t in (1e-5, 1.0 - 1e-5):
        paired, single = spread(t, True), spread(t, False)
        for name in ("velocity", "score"):
            assert paired[name] < 2.0 * spread(0.5, True)[name]
            assert single[name] > 30.0 * paired[name]
    for t in (0.0, 1.0):  # both examples of a pair are one
        assert np.isfinite(list(spread(t, True).values())).all()


def test_any_sharding_has_the_same_losses():
    rng = np.random.default_rng(1)
    x0, x1 = (jnp.asarray(rng.standard_normal((8, 3)), jnp.float32) for _ in range(2))
    run = lambda rows: interpolant_losses(
        Interpolant(), lambda x, t: {"velocity": jnp.sin(x), "denoiser": jnp.cos(x)},
        jax.random.key(3), x0[rows], x1[rows], index=rows, total=8,
    )[0]  # fmt: skip
    whole = run(jnp.arange(8))
    for rows in (jnp.array([1, 4, 6]), jnp.array([7, 0])):
        for name, values in run(rows).items():
            np.testing.assert_allclose(values, whole[name][rows], rtol=1e-6)
    assert len(set(np.asarray(whole["velocity"]).tolist())) == 8


def test_mistakes_are_named():
    x = jnp.ones((2, 3))
    lose = functools.partial(interpolant_losses, LINEAR, lambda x, t: x, jax.random.key(0))
    with pytest.raises(ValueError, match=r"target must be one of .*got 'velocty'.*'velocity'"):
        lose(x, x, targets="velocty")
    with pytest.raises(ValueError, match="each once"):
        lose(x, x, targets=("score", "score"))
    with pytest.raises(ValueError, match="differ in shape"):
        lose(x, x[:1], targets="velocity")
    with pytest.raises(ValueError, match="reduce must be one of"):
        lose(x, x, targets="velocity", reduce="max")
    with pytest.raises(ValueError, match="but not 'denoiser'"):
        lose(x, x)
    quiet = Interpolant(gamma="none")
    with pytest.raises(ValueError, match="'denoiser' needs latent noise"):
        interpolant_losses(quiet, lambda x, t: x, jax.random.key(0), x, x, targets="denoiser")
    with pytest.raises(ValueError, match="has shape"):
        interpolant_losses(
            LINEAR, lambda x, t: x[:, :1], jax.random.key(0), x, x, targets="velocity"
        )
