"""The probability-flow ODE: ends, likelihoods and costs against closed forms and stored numbers."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax import oracles, processes, samplers
from diffusion_jax.numerics import pytree_dataclass
from diffusion_jax.samplers import decode, encode, log_prob, ode_solve
from diffusion_jax.samplers.probability_flow import SOLVERS

STORED = golden("solvers_likelihood")
MEAN, COVARIANCE = np.array([0.5, -1.0]), np.array([[0.3, 0.1], [0.1, 0.2]])
POINTS = np.random.default_rng(0).normal(size=(6, 2))
TIGHT = {"rtol": 1e-8, "atol": 1e-8}


def mixture(process):
    return oracles.GaussianMixture(process, STORED["w"], STORED["means"], STORED["covs"])


@pytree_dataclass
class Shifted:
    """E[x0 | x] for data N(shift, variance I) with a shift for every example: x `[B, D]`, t `[B]`."""

    process: object
    shift: object
    variance: object = 0.25

    def __call__(self, x, t):
        alpha, sigma = self.process.alpha(t)[:, None], self.process.sigma(t)[:, None]
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return self.shift + gain * (x - alpha * self.shift)


def counting(denoise, calls):
    def counted(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return denoise(x, t)

    return counted


@pytest.mark.parametrize(
    "name, process",
    [
        ("vp", "VP"),
        ("ve", "VE"),
        pytest.param("subvp", "SubVP", marks=pytest.mark.slow),
    ],
)
def test_likelihood_agrees_with_score_sde(name, process, x64):
    process = getattr(processes, process)()
    stored = {k.removeprefix(f"lik_{name}_"): v for k, v in STORED.items() if f"_{name}_" in k}
    ends = {"t_from": float(STORED["lik_eps"]), "t_to": 1.0}
    got, z, _ = log_prob(
        process, mixture(process), STORED["lik_data"], divergence="exact", **ends, **TIGHT
    )
    np.testing.assert_allclose(got, stored["logp_pf"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(z, stored["z_exact"], rtol=0, atol=1e-7 * process.prior_std)
    bits = samplers.probability_flow.normal_log_prob(z, process.prior_std)
    np.testing.assert_allclose(bits, stored["prior_logp"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(got - bits, stored["delta_exact"], rtol=0, atol=1e-7)
    # with the law of the latents itself as the prior, the flow gives the law of the data itself
    through = got - bits + stored["logp_T_analytic"]
    np.testing.assert_allclose(through, stored["logp_eps_analytic"], rtol=0, atol=1e-7)

    got, z, _ = log_prob(
        process, mixture(process), STORED["lik_data"], probe=STORED["lik_rademacher"], **ends
    )
    np.testing.assert_allclose(z, stored["z"], rtol=0, atol=1e-4 * process.prior_std)
    bits = -got / (2 * np.log(2)) + 7
    np.testing.assert_allclose(bits, stored["bpd_hutchinson"], rtol=0, atol=5e-4)


@pytest.mark.parametrize("solver", ["dopri5", pytest.param("tsit5", marks=pytest.mark.slow)])
def test_adaptive_sampling_reaches_the_exact_ends(solver, x64):
    process = processes.VP()
    end, info = decode(
        process,
        mixture(process),
        STORED["z16"],
        t_to=float(STORED["vp_t_end"]),
        solver=solver,
        **TIGHT,
    )
    np.testing.assert_allclose(end, STORED["vp_exact_t_end"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(end, STORED["adaptive_2"], rtol=0, atol=2e-2)
    np.testing.assert_allclose(end, STORED["adaptive_3"], rtol=0, atol=2e-3)
    assert info.nfe < 300


def test_edm_from_noise_to_the_smallest_sigma_and_to_clean_data(x64):
    process = processes.EDM()
    run = (process, mixture(process), STORED["edm_xT"])
    end, info = decode(*run, t_to=process.t_min, **TIGHT)
    np.testing.assert_allclose(end, STORED["edm_exact_sigma_min"], rtol=0, atol=1e-6)
    clean, longer = decode(*run, t_to=process.t_min, denoise_to_zero=True, **TIGHT)
    assert longer.nfe == info.nfe + 1
    # one step of first order from sigma_min: within sigma_min^2 / variance of the exact end
    np.testing.assert_allclose(clean, STORED["edm_exact_0"], rtol=0, atol=5e-4)
    frozen, _ = decode(*run, **TIGHT)
    np.testing.assert_allclose(frozen, STORED["edm_exact_0"], rtol=0, atol=5e-4)


FLOWS = [
    ("EDM", 2e-4),
    ("RectifiedFlow", 2e-4),
    ("VE", 1e-7),
    pytest.param("VP", 1e-7, marks=pytest.mark.slow),
    pytest.param("SubVP", 1e-7, marks=pytest.mark.slow),
    pytest.param("Cosine", 1e-7, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, error", FLOWS)
def test_gaussian_flow_both_ways(name, error, x64):
    """EDM and rectified flow start at sigma = 0, where the field is frozen: an error of order u_min^2."""
    process = getattr(processes, name)()
    denoise = oracles.Gaussian(process, MEAN, COVARIANCE)
    start, end = process.sampling_range
    latent, info = encode(process, denoise, POINTS, **TIGHT)
    exact = oracles.gaussian_flow(process, MEAN, COVARIANCE, POINTS, end, start)
    np.testing.assert_allclose(latent, exact, rtol=0, atol=error * process.prior_std)
    again, _ = decode(process, denoise, latent, **TIGHT)
    np.testing.assert_allclose(again, POINTS, rtol=0, atol=1e-5)
    assert info.accepted.min() > 5 and info.success.all()


def test_float32_at_default_tolerances_for_a_schedule_without_finite_noise_level():
    process = processes.RectifiedFlow()
    denoise = oracles.Gaussian(process, MEAN, COVARIANCE)
    x = np.float32(POINTS)
    prior = lambda z: denoise.log_prob(z, 1.0)
    got, latent, info = log_prob(
        process, denoise, x, divergence="exact", prior_log_prob=prior, t_to=1.0
    )
    assert got.dtype == latent.dtype == jnp.float32 and latent.shape == x.shape
    np.testing.assert_allclose(got, denoise.log_prob(x, process.t_min), rtol=0, atol=1e-4)
    assert info.nfe < 150


@pytest.mark.slow
def test_one_rademacher_probe_is_exact_in_one_dimension_and_all_signs_in_two(x64):
    process = processes.VP()
    line = oracles.GaussianMixture(process, [0.4, 0.6], [[-1.0], [0.8]], [[[0.05]], [[0.1]]])
    x = np.linspace(-1.5, 1.5, 5)[:, None]
    prior = lambda z: line.log_prob(z, 1.0)
    got, _, _ = log_prob(process, line, x, jax.random.key(0), prior_log_prob=prior, **TIGHT)
    np.testing.assert_allclose(got, line.log_prob(x, process.t_min), rtol=0, atol=1e-6)

    plane = mixture(process)
    signs = np.stack([np.ones((4, 2)), np.tile([1.0, -1.0], (4, 1))])
    prior = lambda z: plane.log_prob(z, 1.0)
    got, _, _ = log_prob(
        process, plane, STORED["lik_data"][:4], probe=signs, prior_log_prob=prior, **TIGHT
    )
    expected = plane.log_prob(STORED["lik_data"][:4], process.t_min)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


COUNTED = [("dopri5", "example"), ("dopri5", "batch"), ("heun", "example")]
COUNTED += [
    pytest.param(solver, control, marks=pytest.mark.slow)
    for solver in SOLVERS
    for control in ("example", "batch")
    if (solver, control) not in COUNTED
]


@pytest.mark.parametrize("solver, control", COUNTED)
def test_calls_are_counted(solver, control):
    """Starts of very different size make examples reject steps at different times."""
    process, calls = processes.VP(), []
    denoise = counting(mixture(process), calls)
    x = np.float32(POINTS * np.array([0.01, 0.1, 1.0, 1.0, 5.0, 20.0])[:, None])
    _, info = decode(process, denoise, x, solver=solver, control=control, rtol=1e-3, atol=1e-3)
    jax.effects_barrier()
    assert len(calls) == info.nfe
    assert (info.nfe_each <= info.nfe).all() and info.nfe_each.max() > 0.9 * info.nfe
    if control == "batch":
        assert (info.nfe_each == info.nfe).all()


def test_an_example_depends_on_itself_alone(x64):
    """Conditions closed over for the batch stay with their examples; probes follow the index."""
    process, key = processes.VP(), jax.random.key(3)
    shift = np.array([-1.0, 0.0, 2.0, 5.0])[:, None]
    x = POINTS[:4]
    index = np.arange(4)
    whole = log_prob(process, Shifted(process, shift), x, key, index=index)
    for rows in ([2], [0, 3]):
        part = log_prob(process, Shifted(process, shift[rows]), x[rows], key, index=index[rows])
        np.testing.assert_allclose(part[0], whole[0][jnp.array(rows)], rtol=1e-11)
        np.testing.assert_allclose(part[1], whole[1][jnp.array(rows)], rtol=1e-11)
        assert (part[2].nfe_each == whole[2].nfe_each[jnp.array(rows)]).all()
    a, s = process.alpha(1e-3), process.sigma(1e-3)
    b, u = process.alpha(1.0), process.sigma(1.0)
    exact = b * shift + (x - a * shift) * np.sqrt((b**2 / 4 + u**2) / (a**2 / 4 + s**2))
    np.testing.assert_allclose(whole[1], exact, rtol=0, atol=1e-4)


def test_processes_of_equal_fields_do_not_share_a_program(x64):
    """VP, SubVP and VE have four numbers each; the denoiser reads the time."""
    shift = np.full((6, 1), 0.5)
    for process in (processes.VP(), processes.SubVP(), processes.VE(t_min=1e-3)):
        latent, _ = encode(process, Shifted(process, shift), POINTS, rtol=1e-6, atol=1e-6)
        (a, s), (b, u) = ((process.alpha(t), process.sigma(t)) for t in (1e-3, 1.0))
        exact = b * shift + (POINTS - a * shift) * np.sqrt((b**2 / 4 + u**2) / (a**2 / 4 + s**2))
        np.testing.assert_allclose(latent, exact, rtol=0, atol=1e-4 * process.prior_std)


@pytest.mark.slow
def test_jit_vmap_and_gradient_through_closed_over_parameters(x64):
    process, x = processes.VP(), POINTS[:3]

    def end(shift, rtol, **options):
        def denoise(x, t):
            return Shifted(process, shift)(x, jnp.broadcast_to(t, x.shape[:1]))

        return ode_solve(process, denoise, x, 1.0, 1e-3, rtol=rtol, atol=1e-7, **options)[0]

    shifts = jnp.asarray([[0.5, -0.5], [1.0, 2.0]])
    together = jax.jit(jax.vmap(end, (0, None)))(shifts, 1e-7)
    a, s = process.alpha(1e-3), process.sigma(1e-3)
    b, u = process.alpha(1.0), process.sigma(1.0)
    scale = np.sqrt((a**2 / 4 + s**2) / (b**2 / 4 + u**2))
    for shift, found in zip(shifts, together):
        expected = a * shift + (x - b * shift) * scale
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    slope = jax.grad(lambda shift: end(shift, 1e-7, control="batch").sum())(shifts[0])
    np.testing.assert_allclose(slope, np.full(2, 3 * (a - b * scale)), rtol=0, atol=1e-5)


def test_what_cannot_be_asked_is_refused():
    vp, x = processes.VP(), np.zeros((2, 3), np.float32)
    zero = lambda x, t: x * 0.0
    bridge = processes.VPBridge()
    cases = [
        (lambda: log_prob(bridge, zero, x), ["VPBridge", "valid", "rectified_flow"]),
        (lambda: encode(bridge, zero, x), ["VPBridge"]),
        (lambda: log_prob(vp, zero, x), ["hutchinson", "key"]),
        (lambda: log_prob(vp, zero, x, 3), ["jax.random.key"]),
        (lambda: log_prob(vp, zero, x, divergence="exakt"), ["'exakt'", "exact", "hutchinson"]),
        (lambda: log_prob(vp, zero, x, jax.random.key(0), noise="sign"), ["'sign'", "rademacher"]),
        (lambda: log_prob(vp, zero, x, jax.random.key(0), probes=0), ["probes", "0"]),
        (lambda: log_prob(vp, zero, x, probe=np.zeros((2, 2))), ["(2, 2)", "(2, 3)"]),
        (lambda: log_prob(vp, zero, x, jax.random.key(0), index=[1]), ["index", "(1,)", "2"]),
        (lambda: log_prob(vp, zero, x, divergence="exact", t_from=1.0), ["t_from", "1.0"]),
        (lambda: log_prob(vp, zero, x, solver="ddpm"), ["'ddpm'", "stochastic", "dopri5"]),
        (lambda: ode_solve(vp, zero, x, 1.0, 0.1, solver="rk45"), ["'rk45'", "dopri5"]),
        (lambda: ode_solve(vp, zero, x, 1.0, 0.1, control="each"), ["'each'", "example"]),
        (lambda: ode_solve(vp, zero, x, 1.0, 0.1, rtol=0.0), ["rtol", "0.0"]),
        (lambda: ode_solve(vp, zero, x, 1.0, 0.1, max_steps=0), ["max_steps", "0"]),
        (lambda: ode_solve(vp, zero, x, 1.5, 0.1), ["t_from", "1.5"]),
        (lambda: ode_solve(vp, zero, np.zeros(3), 1.0, 0.1), ["[B, ...]", "(3,)"]),
        (lambda: ode_solve(vp, zero, np.zeros((2, 2), int), 1.0, 0.1), ["int"]),
    ]
    for run, parts in cases:
        with pytest.raises(ValueError) as error:
            run()
        message = str(error.value)
        assert "\n" not in message and all(part in message for part in parts), message


def test_giving_up_is_an_error():
    process = processes.VP()
    for denoise, options in (
        (lambda x, t: x * jnp.nan, {}),
        (Shifted(process, jnp.zeros(2)), {"max_steps": 3}),
    ):
        with pytest.raises(ValueError, match=r"gave up on 6 of 6.*max_steps"):
            decode(process, denoise, np.float32(POINTS), **options)


def test_diffrax_is_imported_on_first_use():
    code = (
        "import sys, diffusion_jax.samplers, diffusion_jax.evaluation.likelihood as l;"
        "print(sorted({'diffrax', 'equinox'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
