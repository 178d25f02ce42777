"""EVODiff: the released program, other schedules, and what its formulas imply where they are simple."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from solver_checks import Mixture, mixture_mean, plain_run

from diffusion_jax import processes, registry
from diffusion_jax.samplers import build_times, ddim, evodiff, sample

MODEL = golden("solvers_model")
MIXTURE = Mixture(MODEL["w"], MODEL["means"], MODEL["covs"])
GRIDS = {"logSNR": "log_snr", "edm": "karras"}
GAUSSIAN = {n: registry.get("process", n)() for n in registry.names("process", family="gaussian")}


def numpy_mixture(x, point):
    return mixture_mean(x, point, MODEL["w"], MODEL["means"], MODEL["covs"])


def zero(x, t):
    return jnp.zeros_like(x)


def squash(x, t):
    return 0.5 * jnp.tanh(x)


@pytest.mark.parametrize("variant", ("evodiff_2", "evodiff_2_dz"))
def test_the_released_program(variant, x64):
    """All grids and budgets: up to 20 steps and beyond, where its last coefficient changes."""
    stored, edm = golden("solvers_evodiff"), processes.EDM()
    clean = variant.endswith("dz")
    for n in stored["nfes"].tolist():
        for grid, lay in GRIDS.items():
            sampler = evodiff(edm, n - clean, grid=lay, t_end=edm.t_min, denoise_to_zero=clean)
            assert sampler.nfe == stored[f"{variant}__{grid}__nfe{n}_count"]
            end = sample(sampler, MIXTURE, None, 80 * MODEL["z16"])
            expected = stored[f"{variant}__{grid}__nfe{n}"]
            np.testing.assert_allclose(end, expected, rtol=0, atol=1e-11, err_msg=f"{grid} {n}")


def test_the_weight_of_the_last_coefficient_changes_beyond_twenty_steps():
    vp = processes.VP()
    assert [evodiff(vp, n).step.late for n in (20, 21)] == [False, True]
    assert not evodiff(vp, 20, denoise_to_zero=True).step.late


@pytest.mark.parametrize("name", ("vp", "sub_vp", "rectified_flow", "cosine"))
def test_every_schedule_walks_the_same_path_in_x_over_alpha(name, x64):
    """The exact prediction depends on x / alpha and sigma / alpha alone: EDM's path, scaled by alpha."""
    process, edm = registry.get("process", name)(), processes.EDM()
    u = np.geomspace(20.0, 0.01, 9)
    times = np.asarray(process.t_of_noise_level(u))
    x = MODEL["z16"] * u[0]
    _, expected = sample(evodiff(edm, grid=u / 80.0), MIXTURE, None, x, trajectory=True)
    alpha = np.asarray(process.alpha(times))
    _, path = sample(evodiff(process, grid=times), MIXTURE, None, alpha[0] * x, trajectory=True)
    np.testing.assert_allclose(path / alpha[:, None, None], expected, rtol=1e-9, atol=1e-9)


def test_where_predictions_vanish_every_step_but_the_last_is_ddim(x64):
    """Also: 0/0 is 0."""
    vp, x = processes.VP(), MODEL["z16"]
    for n in (2, 3, 7, 25):
        sampler = evodiff(vp, n)
        _, path = sample(sampler, zero, None, x, trajectory=True)
        plain = plain_run(ddim(vp, n, grid="log_snr"), lambda x, point: 0.0 * x, x)
        np.testing.assert_allclose(path[:-1], plain[:-1], rtol=1e-12)
        u = [float(vp.noise_level(t)) for t in (sampler.times[-1], vp.t_min)]
        kept = 1.0 - np.sqrt(u[0] * u[1])
        np.testing.assert_allclose(path[-1], kept * plain[-1], rtol=1e-12)


def test_steps_of_first_order(x64):
    """A single step, the step into sigma = 0, and the two steps after alpha = 0 are DDIM's."""
    vp, flow, x = processes.VP(), processes.RectifiedFlow(), MODEL["z16"]
    end = sample(evodiff(vp, 1), MIXTURE, None, x)
    plain = plain_run(ddim(vp, 1, grid="log_snr"), numpy_mixture, x)
    np.testing.assert_allclose(end, plain[-1], rtol=0, atol=1e-12)
    _, path = sample(evodiff(flow, 6, grid="uniform"), MIXTURE, None, x, trajectory=True)
    plain = plain_run(ddim(flow, 6, grid="uniform"), numpy_mixture, x)
    np.testing.assert_allclose(path[:3], plain[:3], rtol=0, atol=1e-12)
    assert np.abs(path[3] - plain[3]).max() > 1e-3
    last = []

    class Remember:
        def at(self, x, point):
            last.append(MIXTURE.at(x, point))
            return last[-1]

        def __call__(self, x, t):
            raise AssertionError

    with jax.disable_jit():
        end = sample(evodiff(flow, 6, grid="uniform"), Remember(), None, x)
    np.testing.assert_allclose(end, last[-1], rtol=0, atol=1e-12)


def test_channels_have_coefficients_of_their_own():
    """A model that treats channels alike: an image is its channels, each a vector without channels."""
    x = jax.random.normal(jax.random.key(0), (3, 4, 2, 5))
    vp = processes.VP()
    whole = sample(evodiff(vp, 6), squash, None, x)
    for c in range(5):
        alone = sample(evodiff(vp, 6), squash, None, x[..., c].reshape(3, 8))
        np.testing.assert_allclose(whole[..., c].reshape(3, 8), alone, rtol=1e-5, atol=1e-6)
    by_leaf = sample(
        evodiff(vp, 6), lambda x, t: jax.tree.map(lambda v: squash(v, t), x), None, {"a": x}
    )
    np.testing.assert_allclose(by_leaf["a"], whole, rtol=1e-5, atol=1e-6)


def test_finite_on_every_process_and_grid():
    """From 1 to 25 steps, default ends: those of EDM and rectified flow have an infinite log-SNR."""
    rng = np.random.default_rng(0)
    for process, grid, n in itertools.product(
        GAUSSIAN.values(), registry.names("time_grid", any_process=None), (1, 2, 3, 25)
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler = evodiff(process, n, grid=grid)
        x = rng.standard_normal((4, 2), np.float32) * np.float32(process.prior_std)
        _, path = sample(sampler, squash, None, x, trajectory=True)
        assert np.isfinite(path).all(), (process, grid, n)


def test_what_a_hook_changes_is_carried_on():
    """Where predictions vanish a shift of one state is only shrunk by the steps that follow."""
    vp, x = processes.VP(), jnp.ones((2, 3))
    sampler = evodiff(vp, 6)

    def shift(state, info):
        return state._replace(x=state.x + jnp.where(info.step == 2, 1.0, 0.0))

    _, plain = sample(sampler, zero, None, x, trajectory=True)
    moved = sample(sampler, zero, None, x, hook=shift)
    np.testing.assert_allclose(moved - plain[-1], plain[-1] / plain[3], rtol=1e-4)


def test_gradients_are_finite_where_predictions_vanish():
    denoise = jax.tree_util.Partial(lambda scale, x, t: scale * x, jnp.float32(0.0))
    for n in (5, 25):
        sampler = evodiff(processes.VP(), n)
        grad = jax.grad(lambda d, s=sampler: sample(s, d, None, jnp.ones((2, 3))).sum())(denoise)
        assert np.isfinite(grad.args[0])


def test_half_precision_state_stays_close():
    x = jax.random.normal(jax.random.key(0), (8, 16))
    sampler = evodiff(processes.VP(), 8)
    half = sample(sampler, squash, None, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, sample(sampler, squash, None, x), atol=0.05)


def test_errors():
    vp = processes.VP()
    with pytest.raises(ValueError, match="below 1 at its end"):
        evodiff(vp, 5, t_end=0.6)
    evodiff(vp, 1, t_end=0.6)
    with pytest.raises(ValueError, match="Gaussian process"):
        evodiff(processes.VPBridge(), 5)
    with pytest.raises(ValueError, match="num_steps"):
        evodiff(vp, 0)
    with pytest.raises(ValueError, match="denoise returned"):
        sample(evodiff(vp, 3), lambda x, t: x[:, :1], None, jnp.ones((2, 3)))
    assert evodiff(vp).nfe == 10 == len(build_times(vp, 10)) - 1
