"""DualFast: the base solver at c = 0, a plain loop, and the figures of an exact model."""

import jax
import numpy as np
import pytest
from golden_files import golden
from solver_checks import Mixture, mixture_mean, plain_run

from diffusion_jax import processes
from diffusion_jax.samplers import ddim, dpm_solver, dpm_solver_pp, dualfast, sample, unipc

MODEL = golden("solvers_model")
Z16 = MODEL["z16"]
VP, EDM, FLOW = processes.VP(), processes.EDM(), processes.RectifiedFlow()
BASES = {
    "ddim": ddim,
    "dpm_solver": lambda p, n, **kw: dpm_solver(p, n, prediction="eps", **kw),
    "dpm_solver_pp": dpm_solver_pp,
    "unipc": unipc,
}


def mixture(x, point):
    return mixture_mean(x, point, MODEL["w"], MODEL["means"], MODEL["covs"])


def end_of(sampler):
    return plain_run(sampler, mixture, Z16)[-1]


def rms(sampler):
    """Over the 16 starts, distance to the exact end of the probability-flow ODE."""
    squared = (end_of(sampler) - MODEL["vp_exact_t_end"]) ** 2
    return np.sqrt(squared.sum(1).mean())


@pytest.mark.parametrize("solver", BASES)
def test_without_mixing_it_is_the_solver_itself(solver):
    """The same program and the same bits; with mixing one register more (UniPC: two), and no more calls."""
    for process in (VP, EDM, FLOW):
        base, off = BASES[solver](process, 6), dualfast(process, 6, solver=solver, c=0)
        assert jax.tree.structure(off) == jax.tree.structure(base)
        jax.tree.map(np.testing.assert_array_equal, off, base)
        assert (off.order, off.name) == (base.order, base.name)
        on = dualfast(process, 6, solver=solver)
        assert on.nfe == base.nfe and on.order is None and on.name == f"dualfast_{base.name}"
        added = {name for name, _ in on.step.structure.rows}
        added -= {name for name, _ in base.step.structure.rows}
        assert added == ({"memo", "shift"} if solver == "unipc" else {"memo"})


def test_published_figures_on_the_mixture():
    """DDIM, equal steps in log-SNR: 10 calls, and the bias that many calls leave."""
    errors = [rms(dualfast(VP, 10, c=c, grid="log_snr")) for c in (0.0, 0.1, 0.3)]
    np.testing.assert_allclose(errors, (0.153, 0.101, 0.030), atol=5e-4)
    errors = [rms(dualfast(VP, 1000, c=c, grid="log_snr")) for c in (0.0, 0.1, 0.3)]
    np.testing.assert_allclose(errors, (0.001, 0.042, 0.116), atol=5e-4)


def test_the_bias_of_the_limit_is_linear_in_c():
    free = end_of(dualfast(VP, 400, c=0.0, grid="log_snr"))
    shifts = [end_of(dualfast(VP, 400, c=c, grid="log_snr")) - free for c in (0.005, 0.01)]
    assert np.abs(shifts[0]).max() > 1e-3
    np.testing.assert_allclose(shifts[1], 2 * shifts[0], atol=0.03 * np.abs(shifts[1]).max())


def test_the_default_strength_vanishes_with_the_step():
    for n, c in ((2, 0.3), (4, 0.25), (10, 0.1), (50, 0.02)):
        one, other = (dualfast(VP, n, **kw).xs["scalars"] for kw in ({}, {"c": c}))
        np.testing.assert_allclose(one, other, rtol=1e-13)


def loop(n, order, c, tau, corrector):
    """DDIM, DPM-Solver++(2M) and UniPC-2 (bh2) with mixing, in x0, on VP and a log-SNR grid."""
    lam = np.linspace(VP.lam(1.0), VP.lam(1e-3), n + 1)
    t = VP.t_of_lam(lam)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    x = y = Z16
    outputs, mixed, noises = [], [], []

    def advance(i, x, order, new=None):
        h = lam[i + 1] - lam[i]
        b = np.expm1(-h)
        out = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * b * mixed[i]
        r, d = [], []
        if order == 2:
            r, d = [(lam[i - 1] - lam[i]) / h], [(outputs[i - 1] - outputs[i])]
            d[0] = d[0] / r[0]
        if new is not None:
            r, d = [*r, 1.0], [*d, new - outputs[i]]
        if len(r) == 1:
            out = out - alpha[i + 1] * b * 0.5 * d[0]
        if len(r) == 2:  # phi_2(-h) and 2 phi_3(-h) in closed form
            first = (np.expm1(-h) + h) / h**2
            second = 2 * (np.expm1(-h) + h - h**2 / 2) / -(h**3)
            weights = np.linalg.solve([[1, 1], r], [-h * first / b, -h * second / b])
            out = out - alpha[i + 1] * b * (weights[0] * d[0] + weights[1] * d[1])
        return out

    for i in range(n):
        x0 = mixture(y, {"alpha": alpha[i], "sigma": sigma[i]})
        noises.append((y - alpha[i] * x0) / sigma[i])
        kept = noises[0] if tau == "first" else noises[max(i - 1, 0)]
        weight = c(t[i]) if callable(c) else c * (1 - t[i])
        blend = (1 + weight) * noises[i] - weight * kept
        orders = [min(order, j + 1, n - j) for j in range(n)]
        if corrector and i > 0:
            x = advance(i - 1, x, orders[i - 1], new=x0)
        else:
            x = y
        outputs.append(x0)
        mixed.append((y - sigma[i] * blend) / alpha[i])
        y = advance(i, x, orders[i])
    return y


@pytest.mark.parametrize("tau", ("first", "previous"))
@pytest.mark.parametrize("c", (0.25, lambda t: 0.3 * (1 - t) ** 2), ids=("number", "function"))
def test_against_a_plain_loop(tau, c):
    for solver, order, corrector in (
        ("ddim", 1, False),
        ("dpm_solver_pp", 2, False),
        ("unipc", 1, True),
        ("unipc", 2, True),
    ):
        options = {"c": c, "tau": tau, "grid": "log_snr"}
        if solver != "ddim":
            options["order"] = order
        end = end_of(dualfast(VP, 9, solver=solver, **options))
        exact = loop(9, order, c, tau, corrector)
        np.testing.assert_allclose(end, exact, rtol=0, atol=1e-10, err_msg=f"{solver} {order}")


def test_order_one_of_every_solver_is_the_ddim_variant():
    reference = end_of(dualfast(VP, 7, c=0.2))
    for solver, options in (
        ("dpm_solver", {}),
        ("dpm_solver_pp", {}),
        ("unipc", {"corrector": False}),
        ("unipc", {"corrector": False, "prediction": "eps"}),
    ):
        end = end_of(dualfast(VP, 7, solver=solver, c=0.2, order=1, **options))
        np.testing.assert_allclose(end, reference, rtol=0, atol=1e-11)


def test_a_last_call_that_returns_the_prediction():
    for solver in BASES:
        base, more = (
            dualfast(VP, 5, solver=solver, c=0.2, denoise_to_zero=flag) for flag in (False, True)
        )
        last = {name: v[-1] for name, v in base.xs["next"].items()}
        assert more.nfe == base.nfe + 1
        np.testing.assert_allclose(end_of(more), mixture(end_of(base), last), atol=1e-11)


def test_compiled_in_float64_and_float32(x64):
    sampler = dualfast(VP, 8, solver="unipc", order=2, c=0.2)
    model = Mixture(MODEL["w"], MODEL["means"], MODEL["covs"])
    np.testing.assert_allclose(sample(sampler, model, None, Z16), end_of(sampler), atol=1e-12)
    end = sample(sampler, model, None, Z16.astype(np.float32))
    np.testing.assert_allclose(end, end_of(sampler), atol=1e-5)


@pytest.mark.parametrize(
    "build, message",
    (
        (lambda: dualfast(VP, 5, solver="heun"), "solver must be one of ddim, .*; got 'heun'"),
        (lambda: dualfast(VP, 5, tau="last"), "tau must be one of first, previous; got 'last'"),
        (lambda: dualfast(VP, 5, c=-0.1), "c must be finite and not negative, got -0.1"),
        (lambda: dualfast(VP, 5, eta=0.5), "needs the deterministic DDIM, eta = 0; got eta=0.5"),
        (
            lambda: dualfast(VP, 5, solver="dpm_solver_pp", variant="singlestep"),
            "blend belong to the multistep variant",
        ),
        (lambda: dualfast(VP, 5, solver="unipc", order=5), "order must be one of 1, 2, 3, 4"),
    ),
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
