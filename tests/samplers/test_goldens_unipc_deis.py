"""UniPC and DEIS against the authors' programs, and what their formulas promise (`goldens/PROVENANCE_unipc_deis.md`)."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from scipy.integrate import quad
from solver_checks import Mixture, mixture_mean, plain_run

from diffusion_jax import processes
from diffusion_jax.samplers import build_sampler, ddim, deis, dpm_solver_pp, dualfast, sample, unipc
from diffusion_jax.samplers.deis import (
    RUNGE_KUTTA,
    _multistep,
    polynomial_coefficients,
    pseudo_coefficients,
)
from diffusion_jax.samplers.gaussian_path import gaussian_path

MODEL = golden("solvers_model")
Z16 = MODEL["z16"]
UNIPC, DEIS = golden("solvers_unipc"), golden("solvers_deis")
VP, EDM, FLOW = processes.VP(), processes.EDM(), processes.RectifiedFlow()
SPAN = {"t_start": 1.0, "t_end": 1e-3}
GRIDS = {
    "logSNR": "log_snr",
    "time_uniform": "uniform",
    "time_quadratic": "quadratic",
    "edm": "karras",
}
PHASES = {"t": "quadratic", "rho": "karras", "log": "log_snr"}
NFES = (5, 6, 8, 10, 15, 20, 50)


def mixture(x, point):
    return mixture_mean(x, point, MODEL["w"], MODEL["means"], MODEL["covs"])


def end_of(sampler, start):
    return plain_run(sampler, mixture, start)[-1]


def same_table(one, other):
    assert one.step == other.step
    np.testing.assert_allclose(one.xs["scalars"], other.xs["scalars"], rtol=1e-12, atol=1e-13)


def unipc_case(key):
    family, name, grid, nfe = key.split("__")
    variant, order, eps = re.fullmatch(r"unipc_(bh\d)_(\d)(_eps)?", name).groups()
    prediction = "eps" if eps else "x0"
    options = {"order": int(order), "variant": variant, "prediction": prediction}
    ends = {"t_end": EDM.t_min} if family == "edm" else SPAN
    process = EDM if family == "edm" else VP
    return unipc(process, int(nfe[3:]), grid=GRIDS[grid], **options, **ends)


@pytest.mark.parametrize(
    "group", sorted({k.rsplit("__", 2)[0] for k in UNIPC if not k.startswith("vp_path")})
)
def test_unipc(group):
    """Orders 1 to 4, both functions B, both predictions, on the VP and the EDM schedule."""
    keys = [k for k in UNIPC if k.startswith(f"{group}__")]
    assert len(keys) >= 2 * len(NFES)
    for key in keys:
        sampler = unipc_case(key)
        assert sampler.nfe == int(key.rsplit("nfe", 1)[1])
        start = Z16 * sampler.xs["point"]["sigma"][0] if group.startswith("edm") else Z16
        np.testing.assert_allclose(end_of(sampler, start), UNIPC[key], atol=1e-11, err_msg=key)


def test_corrected_states_of_unipc(x64):
    """The program's path holds the corrected states: the anchors of our rows, not the points called at."""
    expected = UNIPC["vp_path__unipc_bh2_3__logSNR__nfe10"]
    sampler = unipc(VP, 10, grid="log_snr", **SPAN)
    model = Mixture(MODEL["w"], MODEL["means"], MODEL["covs"])
    state = sampler.init(None, sampler.start, jnp.asarray(Z16))
    for i in range(10):
        assert i == 0 or np.abs(state.x - expected[i]).max() > 1e-6
        inputs = jax.tree.map(lambda v, i=i: v[i], sampler.xs)
        state, _ = sampler.step(model.at, None, state, inputs)
        np.testing.assert_allclose(state.registers["anchor"], expected[i], rtol=0, atol=1e-11)
    np.testing.assert_allclose(state.x, expected[-1], rtol=0, atol=1e-11)
    end = sample(sampler, model, None, Z16)
    np.testing.assert_allclose(end, expected[-1], rtol=0, atol=1e-11)


def test_unipc_without_corrector_is_a_known_solver():
    for process, grid in itertools.product((VP, EDM, FLOW), ("log_snr", "uniform")):
        same_table(
            unipc(process, 7, order=1, corrector=False, grid=grid, lower_order_final=False),
            dpm_solver_pp(process, 7, order=1, grid=grid),
        )
        start = process.prior_std * Z16
        one = end_of(unipc(process, 7, order=1, corrector=False, grid=grid), start)
        np.testing.assert_allclose(one, end_of(ddim(process, 7, grid=grid), start), atol=1e-11)
    for n in (2, 7):
        same_table(
            unipc(VP, n, order=2, corrector=False, grid="quadratic"),
            dpm_solver_pp(VP, n, order=2, grid="quadratic"),
        )


def test_correctors_switched_off_by_step():
    """A step that is not corrected differs from the full table in the row of its result alone."""
    full, n = unipc(VP, 8), 8
    same_table(unipc(VP, n, corrector_off=range(n)), unipc(VP, n, corrector=False))
    for step in (0, 3, 6):
        scalars = unipc(VP, n, corrector_off=[step]).xs["scalars"]
        changed = (scalars != full.xs["scalars"]).any(axis=1)
        assert np.flatnonzero(changed).tolist() == [step + 1]
    same_table(unipc(VP, n, corrector_off=[n - 1]), full)  # the last step has no corrector
    reached = [unipc(VP, n, order=2, **kw).order for kw in ({}, {"corrector": False})]
    assert reached == [3, 2] and unipc(VP, n, corrector_off=(1,)).order == 3


@pytest.mark.parametrize("prediction", ("x0", "eps"))
@pytest.mark.parametrize("variant", ("bh1", "bh2"))
def test_unipc_is_exact_for_polynomials_in_lam(variant, prediction):
    """Predictions that are lam^k, k below the order: each step is the integral, by adaptive quadrature."""
    for order, k in ((3, 0), (3, 1), (3, 2), (4, 3)):
        sampler = unipc(
            VP, 8, order=order, variant=variant, prediction=prediction, lower_order_final=False
        )

        def model(x, point, k=k):
            m = np.log(point["alpha"] / point["sigma"]) ** k + 0 * x
            return m if prediction == "x0" else (x - point["sigma"] * m) / point["alpha"]

        path = plain_run(sampler, model, np.array([[0.3]]))[:, 0, 0]
        here, there = sampler.xs["point"], sampler.xs["next"]
        sign, scale = (1, "sigma") if prediction == "x0" else (-1, "alpha")
        for i in range(order, 8):
            lam = [np.log(q["alpha"][i] / q["sigma"][i]) for q in (here, there)]
            integrand = lambda v, k=k, sign=sign: np.exp(sign * v) * v**k
            integral = quad(integrand, *lam, epsabs=0, epsrel=1e-13)[0]
            new, old = there[scale][i], here[scale][i]
            exact = new / old * path[i] + sign * new * integral
            assert path[i + 1] == pytest.approx(exact, rel=1e-9, abs=1e-9), (order, k, i)


@pytest.mark.parametrize("phase", PHASES)
def test_deis_tables_and_ends(phase):
    """Our exact coefficients, the ends they give, and the authors' rounded ones through the same rows."""
    for n in NFES:
        p = gaussian_path(VP, n, PHASES[phase], **SPAN)
        np.testing.assert_allclose(p.t, DEIS[f"ts__{phase}__n{n}"], rtol=1e-11)
        for r in (1, 2, 3):
            case = f"{phase}__nfe{n}"
            sampler = deis(VP, n, order=r, grid=PHASES[phase], **SPAN)
            end = end_of(sampler, DEIS["xT"])
            np.testing.assert_allclose(end, DEIS[f"tabx{r}__{case}"], rtol=0, atol=1e-11)
            np.testing.assert_allclose(end, DEIS[f"tab{r}__{case}"], rtol=0, atol=1e-2)
            rho = deis(VP, n, method="rho_ab", order=r, grid=PHASES[phase], **SPAN)
            end = end_of(rho, DEIS["xT"])
            np.testing.assert_allclose(end, DEIS[f"rhoab{r}__{case}"], rtol=0, atol=1e-4)
            if f"tab{r}_coef__{case}" in DEIS:
                exact = polynomial_coefficients(p, r)
                np.testing.assert_allclose(exact, DEIS[f"tab{r}_coefexact__{case}"], atol=1e-11)
                official = _multistep(p, DEIS[f"tab{r}_coef__{case}"]).sampler(p.point(n))
                end = end_of(official, DEIS["xT"])
                np.testing.assert_allclose(end, DEIS[f"tab{r}__{case}"], rtol=0, atol=1e-11)


def test_deis_runge_kutta_and_ipndm():
    rules = {"1euler": "euler", "2heun": "heun", "3kutta": "kutta3", "4rk": "rk4"}
    tested = 0
    for key in DEIS:
        name, _, rest = key.partition("__")
        if name == "ipndm":
            n = int(rest.rsplit("nfe", 1)[1])
            sampler = deis(VP, n, method="ipndm", **SPAN)
        elif name.startswith("rhork"):
            phase, n = rest.split("__")[0], int(rest.rsplit("nfe", 1)[1])
            stages, rule = int(name[6]), rules[name[6:]]
            grid = PHASES[phase]
            sampler = deis(VP, n // stages, method="rho_rk", rk=rule, grid=grid, **SPAN)
        else:
            continue
        tested += 1
        assert sampler.nfe == n
        end = end_of(sampler, DEIS["xT"])
        np.testing.assert_allclose(end, DEIS[key], rtol=0, atol=1e-10, err_msg=key)
    assert tested == 55


def test_deis_of_degree_zero_is_ddim():
    for process, grid in itertools.product((VP, EDM, FLOW), ("log_snr", "quadratic")):
        start = process.prior_std * Z16
        reference = end_of(ddim(process, 6, grid=grid), start)
        for options in (
            {"method": "t_ab", "order": 0},
            {"method": "rho_ab", "order": 0},
            {"method": "ipndm", "order": 0},
            {"method": "rho_rk", "rk": "euler"},
        ):
            end = end_of(deis(process, 6, grid=grid, **options), start)
            np.testing.assert_allclose(end, reference, rtol=0, atol=1e-11, err_msg=str(options))


@pytest.mark.parametrize(
    "process", (VP, processes.Cosine(), EDM, FLOW), ids=lambda p: type(p).__name__
)
def test_coefficients_of_deis_share_out_the_step_of_order_one(process):
    for grid in ("log_snr", "karras", "uniform"):
        p = gaussian_path(process, 9, grid)
        inner = np.isfinite(p.lam[:-1]) & np.isfinite(p.lam[1:])
        ratio = p.alpha[1:][inner] / p.alpha[:-1][inner]
        whole = p.sigma[1:][inner] - ratio * p.sigma[:-1][inner]
        tables = [polynomial_coefficients(p, r, v) for r in (0, 1, 2, 3) for v in "tu"]
        for table in (*tables, pseudo_coefficients(p, 3)):
            np.testing.assert_allclose(table[inner, 0], ratio, rtol=1e-12)
            np.testing.assert_allclose(table[inner, 1:].sum(1), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("clock", ("t", "u"))
def test_deis_is_exact_for_polynomials(clock):
    """eps a polynomial in t ("t_ab") or u ("rho_ab") of the degree: each step is the integral over u."""
    method = {"t": "t_ab", "u": "rho_ab"}[clock]
    for r in (1, 2, 3):
        sampler = deis(VP, 7, method=method, order=r, grid="karras")
        here, there = sampler.xs["point"], sampler.xs["next"]

        def eps(t, r=r):
            v = t if clock == "t" else VP.noise_level(t)
            return 0.4 - 0.7 * v + v**r

        def model(x, point):
            return (x - point["sigma"] * eps(point["t"])) / point["alpha"]

        def rate(t):  # du / dt
            q = VP.point(t)
            return (q["dsigma"] * q["alpha"] - q["sigma"] * q["dalpha"]) / q["alpha"] ** 2

        path = plain_run(sampler, model, np.array([[0.3]]))[:, 0, 0]
        for i in range(r, 7):
            t, s = here["t"][i], there["t"][i]
            integral = quad(lambda v: rate(v) * eps(v), t, s, epsabs=0, epsrel=1e-12)[0]
            exact = there["alpha"][i] * (path[i] / here["alpha"][i] + integral)
            assert path[i + 1] == pytest.approx(exact, rel=1e-9, abs=1e-9), (r, i)


@pytest.mark.parametrize("name", RUNGE_KUTTA)
def test_runge_kutta_rules(name):
    """Order conditions of the table, and the sampler against the rule run on v = x / alpha in u."""
    rule = RUNGE_KUTTA[name]
    b, c = np.array(rule.weights), np.array(rule.nodes)
    a = np.zeros((len(b), len(b)))
    for j, row in enumerate(rule.stages):
        a[j + 1, : j + 1] = row
    np.testing.assert_allclose(a.sum(1), c, atol=1e-15)
    conditions = [(1, b.sum(), 1), (2, b @ c, 1 / 2), (3, b @ c**2, 1 / 3), (3, b @ a @ c, 1 / 6)]
    conditions += [(4, b @ c**3, 1 / 4), (4, b @ (c * (a @ c)), 1 / 8)]
    conditions += [(4, b @ a @ c**2, 1 / 12), (4, b @ a @ a @ c, 1 / 24)]
    for order, value, exact in conditions:
        assert (abs(value - exact) < 1e-14) or order > rule.order
    sampler = deis(VP, 4, method="rho_rk", rk=name, grid="log_snr", t_start=0.8, t_end=0.05)
    assert sampler.nfe == 4 * len(b) and sampler.order == rule.order
    levels = np.exp(np.linspace(*np.log(VP.noise_level(np.array([0.8, 0.05]))), 5))

    def slope(v, u):
        point = VP.point(VP.t_of_noise_level(u))
        return (v - mixture(point["alpha"] * v, point)) / u

    v = Z16 / VP.alpha(0.8)
    for u, u1 in itertools.pairwise(levels):
        slopes = []
        for j in range(len(b)):
            moved = v + (u1 - u) * sum(w * k for w, k in zip(a[j], slopes))
            slopes.append(slope(moved, u + c[j] * (u1 - u)))
        v = v + (u1 - u) * sum(w * k for w, k in zip(b, slopes))
    np.testing.assert_allclose(end_of(sampler, Z16), VP.alpha(0.05) * v, rtol=1e-8, atol=1e-9)


def test_calls_of_runge_kutta_samplers():
    for name, stages in (("heun", 2), ("kutta3", 3), ("rk4", 4)):
        for nfe in (4, 5, 12, 15):
            sampler = build_sampler(VP, f"deis_rhork_{name}", nfe)
            assert sampler.nfe == nfe // stages * stages
    with pytest.raises(ValueError, match="costs 4n calls for n steps: nfe=3 is too few"):
        build_sampler(VP, "deis_rhork_rk4", 3)
    assert deis(EDM, 5, method="rho_rk", rk="rk4").nfe == 4 * 4 + 1  # one call into sigma = 0
    assert deis(FLOW, 5, method="rho_rk", rk="rk4").nfe == 3 * 4 + 2  # and one from alpha = 0


@pytest.mark.parametrize(
    "build, steps",
    (
        (lambda n, **kw: unipc(VP, n, lower_order_final=False, **kw), 644),
        (lambda n, **kw: unipc(VP, n, variant="bh1", lower_order_final=False, **kw), 644),
        (lambda n, **kw: unipc(VP, n, corrector=False, lower_order_final=False, **kw), 644),
        (lambda n, **kw: deis(VP, n, **kw), 320),
        (lambda n, **kw: deis(VP, n, method="rho_rk", rk="ralston3", **kw), 80),
        (lambda n, **kw: deis(VP, n, method="ipndm", order=2, **kw), 320),
    ),
    ids=("unipc_3", "unipc_3_bh1", "unip_3", "deis_tab3", "ralston3", "ipndm_2"),
)
def test_order_of_what_the_registry_does_not_declare(build, steps):
    """Fourth orders near their limit; that of "t_ab" is 3.8 before its first, DDIM step takes over."""
    errors = []
    for n in (steps, 2 * steps):
        end = end_of(build(n, grid="log_snr", **SPAN), Z16)
        errors.append(np.sqrt(np.mean((end - MODEL["vp_exact_t_end"]) ** 2)))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(build(10).order, abs=0.2)


@pytest.mark.parametrize(
    "build",
    (
        lambda p, n, **kw: unipc(p, n, order=4, prediction="eps", **kw),
        lambda p, n, **kw: unipc(p, n, order=4, variant="bh1", lower_order_final=False, **kw),
        lambda p, n, **kw: deis(p, n, order=3, **kw),
        lambda p, n, **kw: deis(p, n, method="rho_ab", **kw),
        lambda p, n, **kw: deis(p, n, method="rho_rk", rk="ssp3", **kw),
        lambda p, n, **kw: dualfast(p, n, solver="unipc", order=3, c=0.3, **kw),
    ),
    ids=("unipc_4_eps", "unipc_4_bh1", "tab3", "rhoab3", "ssp3", "dualfast_unipc_3"),
)
@pytest.mark.parametrize("process", (EDM, FLOW), ids=("edm", "rectified_flow"))
def test_infinite_log_snr_at_the_ends(build, process):
    """From alpha = 0 and into sigma = 0: a single data point is exact, and the end is a prediction."""
    for n, grid in itertools.product((4, 6), ("log_snr", "uniform", "karras")):
        sampler, seen = build(process, n, grid=grid), []
        assert sampler.xs["next"]["sigma"][-1] == 0
        end = plain_run(sampler, lambda x, point: np.full_like(x, 0.7), process.prior_std * Z16)[-1]
        np.testing.assert_allclose(end, 0.7, rtol=0, atol=1e-9)

        def spy(x, point, seen=seen):
            seen.append(mixture(x, point))
            return seen[-1]

        end = plain_run(sampler, spy, process.prior_std * Z16)[-1]
        assert np.isfinite(end).all()
        np.testing.assert_allclose(end, seen[-1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ("unipc_2", "unipc_3", "unipc_3_bh1", "deis_tab3"))
def test_float32_state_stays_close(name):
    model = Mixture(*(MODEL[k].astype(np.float32) for k in ("w", "means", "covs")))
    for n in (5, 20):
        sampler = build_sampler(VP, name, n, grid="log_snr")
        end = sample(sampler, model, None, Z16.astype(np.float32))
        assert end.dtype == np.float32
        np.testing.assert_allclose(end, end_of(sampler, Z16), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "build, message",
    (
        (lambda: unipc(VP, 5, order=5), "order must be one of 1, 2, 3, 4; got 5"),
        (lambda: unipc(VP, 5, variant="bh3"), "variant must be one of bh1, bh2; got 'bh3'"),
        (lambda: unipc(VP, 5, variant="vary_coeff"), "variant must be one of"),
        (lambda: unipc(VP, 5, prediction="v"), "prediction must be one of x0, eps; got 'v'"),
        (lambda: unipc(VP, 5, corrector_off=[5]), "step indices 0 to 4; got 5"),
        (lambda: unipc(VP, 5, corrector_off=[0.5]), "step indices 0 to 4; got 0.5"),
        (lambda: unipc(processes.VPBridge(), 5), "needs a Gaussian process, got VPBridge"),
        (lambda: deis(VP, 5, method="tab"), "method must be one of t_ab, .*; got 'tab'"),
        (lambda: deis(VP, 5, order=4), "order must be one of 0, 1, 2, 3; got 4"),
        (
            lambda: deis(VP, 5, method="rho_rk", rk="rk5"),
            "rk must be one of .*rk4; got 'rk5'; did you mean 'rk4'",
        ),
    ),
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
