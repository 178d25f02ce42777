"""`sample` under transformations: parts of a batch, vmap, trees, gradients, dtypes, keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, samplers
from diffusion_jax.samplers import (
    dbim,
    ddim,
    dpm_solver_pp,
    edm_heun,
    first_hitting,
    heun,
    masked_ancestral,
    sample,
    sde_dpm_solver_pp,
    with_noise,
)
from diffusion_jax.samplers.linear import D, Rows, Y

VP = processes.VP()
X = jax.random.normal(jax.random.key(1), (4, 3))
KEY = jax.random.key(5)


def model(scale, x, t):
    return scale * jnp.tanh(x) * (1.0 - 0.5 * t)


def denoise(x, t):
    return model(0.8, x, t)


@pytest.mark.parametrize("name", ("edm_heun", "first_hitting"))
def test_a_batch_is_its_parts(name):
    """64 examples are 24 and 40: the same draws, in the first row (churn before any call) and later."""
    if name == "edm_heun":
        sampler = edm_heun(processes.EDM(), 4, s_churn=4.0)
        x, network = 80.0 * jax.random.normal(KEY, (64, 2)), denoise
    else:
        sampler = first_hitting(processes.Absorbing(4), 6)
        x = jnp.full((64, 6), 4)

        def network(tokens, t):
            return jax.nn.one_hot(jnp.roll(tokens, 1, axis=1), 4)

    index = jnp.arange(64)
    whole = sample(sampler, network, KEY, x)
    for part in (slice(0, 24), slice(24, 64)):
        end = sample(sampler, network, KEY, x[part], index=index[part])
        np.testing.assert_allclose(end, whole[part], rtol=1e-5, atol=1e-5)


def test_vmap_over_keys_and_starts():
    sampler = sde_dpm_solver_pp(VP, 4)
    keys, x = jax.random.split(KEY, 3), jnp.stack([X, -X, 2 * X])
    together = jax.vmap(lambda k, x: sample(sampler, denoise, k, x))(keys, x)
    for k, start, end in zip(keys, x, together):
        np.testing.assert_allclose(sample(sampler, denoise, k, start), end, atol=1e-5)


@pytest.mark.parametrize("build", (ddim, dpm_solver_pp, heun))
def test_vmap_over_samplers_gives_each_example_its_own_times(build):
    each = [build(VP, 4, t_start=t, t_end=0.01, grid="uniform") for t in (1.0, 0.7, 0.5, 0.3)]
    stacked = jax.tree.map(lambda *v: np.stack(v), *each)
    together = jax.vmap(lambda s, x: sample(s, denoise, None, x[None])[0])(stacked, X)
    for i, sampler in enumerate(each):
        np.testing.assert_allclose(sample(sampler, denoise, None, X)[i], together[i], atol=2e-6)


def test_vmap_over_masked_samplers():
    process, logits = processes.Absorbing(4), jnp.arange(4.0)

    def network(tokens, t):
        return jnp.broadcast_to(logits, (*tokens.shape, 4)) + t

    each = [masked_ancestral(process, 3, temperature=v, length=5) for v in (0.5, 1.0)]
    stacked = jax.tree.map(lambda *v: np.stack(v), *each)
    together = jax.vmap(lambda s: sample(s, network, KEY, 6))(stacked)
    assert together.shape == (2, 6, 5)
    for sampler, tokens in zip(each, together):
        np.testing.assert_array_equal(sample(sampler, network, KEY, 6), tokens)


def test_state_may_be_a_pytree():
    """Two modalities of different rank; each follows its own solver path, noise included."""
    state = {"image": jnp.ones((4, 2, 2, 1)), "pose": X}

    def both(x, t):
        return {"image": 0.5 * x["image"], "pose": denoise(x["pose"], t)}

    end = sample(dpm_solver_pp(VP, 5), both, None, state)
    np.testing.assert_allclose(
        end["pose"], sample(dpm_solver_pp(VP, 5), denoise, None, X), atol=1e-6
    )
    noisy = sample(ddim(VP, 5, eta=1.0), both, KEY, state)
    assert noisy["image"].shape == (4, 2, 2, 1)
    assert not np.allclose(noisy["image"][0].ravel()[:3], noisy["pose"][0])
    source = sample(dbim(processes.VPBridge(), 4), both, KEY, state)
    assert jax.tree.map(jnp.shape, source) == jax.tree.map(jnp.shape, state)


def test_start_anywhere():
    """A run from T to 0 is a run from T to t and one from t to 0: editing starts from any x at any t."""
    times = np.array([1.0, 0.8, 0.5, 0.3, 0.1])
    whole = sample(ddim(VP, grid=times), denoise, None, X)
    first = sample(ddim(VP, grid=times[:3]), denoise, None, X)
    np.testing.assert_allclose(
        sample(ddim(VP, grid=times[2:]), denoise, None, first), whole, atol=1e-6
    )
    named = ddim(VP, 2, grid="uniform", t_start=0.5, t_end=0.1)
    np.testing.assert_allclose(named.times, times[2:4], rtol=1e-12)
    inside = masked_ancestral(processes.Absorbing(4), 4, t_start=0.5)
    assert inside.times[0] == 0.5 and inside.xs["reveal"][0] == pytest.approx(0.25)


def test_gradient_through_the_sampler_and_rematerialisation():
    sampler = sde_dpm_solver_pp(VP, 6)

    def loss(params, x, remat):
        network = jax.tree_util.Partial(model, params)
        return (sample(sampler, network, KEY, x, remat=remat) ** 2).sum()

    plain = jax.grad(loss, argnums=(0, 1))(0.8, X, False)
    assert all(np.isfinite(g).all() and (np.asarray(g) != 0).any() for g in plain)
    for remat in (True, jax.checkpoint_policies.dots_saveable):
        for a, b in zip(plain, jax.grad(loss, argnums=(0, 1))(0.8, X, remat)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    step = 1e-2
    numeric = (loss(0.8 + step, X, False) - loss(0.8 - step, X, False)) / (2 * step)
    assert plain[0] == pytest.approx(float(numeric), rel=1e-2)


def test_a_solver_can_be_fitted(x64):
    """Gradients with respect to a table's coefficients, against differences."""
    sampler, x = dpm_solver_pp(VP, 5, order=3), np.asarray(X, np.float64)

    def loss(scalars):
        fitted = dataclasses.replace(sampler, xs={**sampler.xs, "scalars": scalars})
        return (sample(fitted, denoise, None, x) ** 2).sum()

    table = sampler.xs["scalars"]
    gradient = np.asarray(jax.grad(loss)(table))
    assert gradient.shape == table.shape and np.isfinite(gradient).all()
    for row, column in ((0, 0), (2, 1), (4, 0)):
        bump = np.zeros_like(table)
        bump[row, column] = 1e-6
        numeric = (loss(table + bump) - loss(table - bump)) / 2e-6
        assert gradient[row, column] == pytest.approx(float(numeric), rel=1e-5, abs=1e-7)


def test_bfloat16_state_keeps_float32_coefficients():
    """1.001 y - D with D = y is 0.001 y; a bfloat16 coefficient would make it 0."""
    rows = Rows()
    rows.add({"t": 0.5}, 1.001 * Y - D)
    x, dtypes = jnp.ones((2, 3), jnp.bfloat16), set()

    def identity(x, t):
        dtypes.add((x.dtype.name, t.dtype.name))
        return x

    end = sample(rows.sampler({"t": 0.1}), identity, None, x)
    assert end.dtype == jnp.bfloat16 and dtypes == {("bfloat16", "float32")}
    np.testing.assert_allclose(end.astype(np.float32), 0.001, rtol=1e-2)


@pytest.mark.parametrize("build", (ddim, dpm_solver_pp, heun))
def test_bfloat16_result_is_near_the_float32_one(build):
    half = sample(build(VP, 20), denoise, None, X.astype(jnp.bfloat16))
    full = sample(build(VP, 20), denoise, None, X)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), full, atol=0.1)


@pytest.mark.parametrize(
    "sampler",
    (ddim(VP, 3, eta=1.0), edm_heun(VP, 3, s_churn=3.0), first_hitting(processes.Absorbing(4), 3)),
    ids=lambda s: s.name,
)
def test_no_key_is_used_twice(sampler):
    """JAX's own checker, which sees typed keys at trace time."""
    x = 4 if sampler.name == "first_hitting" else X
    with jax.debug_key_reuse(True):
        if sampler.name == "first_hitting":
            sample(sampler, lambda v, t: jnp.zeros((*v.shape, 4)), jax.random.key(0), x)
        else:
            sample(sampler, lambda v, t: 0.5 * v, jax.random.key(0), x)

            def careless(state, info):
                twice = [jax.vmap(lambda k: jax.random.normal(k, (3,)))(info.keys) for _ in "ab"]
                return state._replace(x=state.x + twice[0] + twice[1])

            with pytest.raises(jax.errors.KeyReuseError):  # the checker does look inside
                sample(sampler, lambda v, t: 0.5 * v, jax.random.key(0), x, hook=careless)


def test_with_noise_takes_the_place_of_the_samplers_draws():
    sampler = edm_heun(VP, 3, s_churn=3.0)
    keys = [jax.random.fold_in(KEY, i) for i in range(4)]
    noise = jnp.stack(
        [
            jnp.stack([jax.random.normal(jax.random.fold_in(k, row), (3,)) for k in keys])
            for row in range(sampler.nfe + 1)
        ]
    )
    fixed = with_noise(sampler, noise)
    assert sampler.stochastic and not fixed.stochastic
    np.testing.assert_allclose(
        sample(fixed, denoise, None, X), sample(sampler, denoise, KEY, X), rtol=1e-5, atol=1e-5
    )
    quiet = samplers.ddim(VP, 3)
    np.testing.assert_array_equal(
        sample(with_noise(quiet, np.ones((4, 4, 3))), denoise, None, X),
        sample(quiet, denoise, None, X),
    )
