"""One clear line for each user's mistake: what was wrong and what is valid."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_checks import least_steps, required

from diffusion_jax import processes, registry
from diffusion_jax.samplers import (
    build_sampler,
    dbim,
    ddbm_heun,
    ddim,
    ddpm,
    deis,
    dpm_solver,
    dpm_solver_pp,
    edm_heun,
    first_hitting,
    masked_ancestral,
    midpoint,
    sample,
    sde_dpm_solver_pp,
    unipc,
)

VP, EDM, FLOW = processes.VP(), processes.EDM(), processes.RectifiedFlow()
BRIDGE, MASKED = processes.VPBridge(), processes.Absorbing(5)
PROCESS_OF = {
    "gaussian": VP,
    "bridge": BRIDGE,
    "discrete": MASKED,
    "bayesian_flow": processes.DiscreteBFN(5),
}
X = np.ones((2, 3), np.float32)
KEY = jax.random.key(0)


def half(x, t):
    return 0.5 * x


def logits(tokens, t):
    return jnp.zeros((*tokens.shape, 5))


CONSTRUCTORS = {
    "eta below": (lambda: ddim(VP, 5, eta=-0.1), r"eta must lie in \[0, 1\], got -0.1"),
    "eta above": (lambda: ddim(VP, 5, eta=1.5), r"eta must lie in \[0, 1\], got 1.5"),
    "dbim eta": (lambda: dbim(BRIDGE, 5, eta=2.0), r"eta must lie in \[0, 1\], got 2.0"),
    "sde eta": (lambda: sde_dpm_solver_pp(VP, 5, eta=-1.0), "eta must not be negative, got -1.0"),
    "churn": (lambda: edm_heun(EDM, 5, s_churn=-1.0), "s_churn must not be negative"),
    "bridge churn": (
        lambda: ddbm_heun(BRIDGE, 5, churn=1.0),
        r"churn must lie in \[0, 1\), got 1.0",
    ),
    "steps": (lambda: ddim(VP, 0), "num_steps must be a positive int, got 0"),
    "steps of 2.5": (lambda: dpm_solver_pp(VP, 2.5), "num_steps must be a positive int, got 2.5"),
    "one dbim step": (lambda: dbim(BRIDGE, 1), "at least 2 network calls, got num_steps=1"),
    "order": (lambda: dpm_solver_pp(VP, 5, order=4), "order must be one of 1, 2, 3; got 4"),
    "kind": (
        lambda: dpm_solver_pp(VP, 5, kind="heun"),
        "kind must be one of midpoint, taylor; got 'heun'",
    ),
    "sde kind": (
        lambda: sde_dpm_solver_pp(VP, 5, kind="taylor"),
        "kind must be one of midpoint, heun; got 'taylor'",
    ),
    "prediction": (
        lambda: dpm_solver(VP, 5, prediction="v"),
        "prediction must be one of x0, eps; got 'v'",
    ),
    "variant": (lambda: dpm_solver(VP, 5, variant="fast"), "multistep, singlestep; got 'fast'"),
    "variance": (
        lambda: ddpm(VP, 5, variance="mid"),
        "variance must be one of small, large, learned; got 'mid'",
    ),
    "multistep only": (
        lambda: dpm_solver(VP, 5, variant="singlestep", denoise_to_zero=True),
        "belong to the multistep variant",
    ),
    "times for single steps": (
        lambda: dpm_solver(VP, 2, variant="singlestep", grid=[1.0, 0.5, 0.1]),
        "grid must be a name or a callable",
    ),
    "grid name": (
        lambda: ddim(VP, 5, grid="karas"),
        "unknown time_grid 'karas'; did you mean 'karras'",
    ),
    "times up": (lambda: ddim(VP, grid=[0.0, 1.0]), "times must decrease strictly"),
    "infinite start": (
        lambda: edm_heun(FLOW, 5, t_start=1.0),
        "edm_heun needs alpha > 0 at its start",
    ),
    "bridge for gaussian": (lambda: ddim(BRIDGE, 5), "needs a Gaussian process, got VPBridge"),
    "bridge for edm_heun": (lambda: edm_heun(BRIDGE, 5), "needs a Gaussian process, got VPBridge"),
    "masked for midpoint": (lambda: midpoint(MASKED, 5), "needs a Gaussian process, got Absorbing"),
    "gaussian for dbim": (lambda: dbim(VP, 5), "needs a bridge process, got VP"),
    "gaussian for ddbm": (lambda: ddbm_heun(VP, 5), "needs a bridge process, got VP"),
    "uniform for masked": (
        lambda: masked_ancestral(processes.Uniform(5), 5),
        "needs an Absorbing process, got Uniform",
    ),
    "gaussian for first_hitting": (
        lambda: first_hitting(VP, 5),
        "needs an Absorbing process, got VP",
    ),
    "length": (lambda: first_hitting(MASKED, 0), "length must be a positive int, got 0"),
    "no length": (lambda: first_hitting(MASKED, None), "needs the sequence length"),
    "nucleus": (
        lambda: masked_ancestral(MASKED, 5, nucleus=0.0),
        "nucleus must lie in",
    ),
    "cold": (
        lambda: first_hitting(MASKED, 5, temperature=-1.0),
        "temperature must be 0 or positive, got -1",
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_constructors(case):
    build, message = CONSTRUCTORS[case]
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", registry.names("sampler"))
def test_every_sampler_refuses_the_other_families(name):
    family, build = registry.entry("sampler", name).meta["family"], registry.get("sampler", name)
    asked = inspect.signature(build).parameters
    needs = {
        n: v
        for n, v in required(name, PROCESS_OF[family]).items()
        if n in asked and asked[n].default is asked[n].empty
    }
    for other, process in PROCESS_OF.items():
        if other == family:
            continue
        with pytest.raises(ValueError, match="process, got"):
            build(process, 5, **needs)
        with pytest.raises(ValueError, match=f"is not for a {other} process.*valid: "):
            build_sampler(process, name, 5)


RUNS = {
    "whole numbers": (
        lambda: sample(ddim(VP, 3), half, None, np.ones((2, 3), int)),
        r"x_init must be floating-point arrays \[B, ...\]; got int64",
    ),
    "a number": (lambda: sample(ddim(VP, 3), half, None, 1.0), "x_init must be floating-point"),
    "nothing": (lambda: sample(ddim(VP, 3), half, None, {}), "x_init holds no array"),
    "no batch axis": (
        lambda: sample(ddim(VP, 3), half, None, jnp.float32(1.0)),
        "must share a leading batch axis",
    ),
    "ragged batch": (
        lambda: sample(ddim(VP, 3), half, None, {"a": X, "b": X[:1]}),
        "must share a leading batch axis",
    ),
    "no key": (
        lambda: sample(ddim(VP, 3, eta=1.0), half, None, X),
        "sampler 'ddim' draws random numbers: it needs a key, got None",
    ),
    "no key for the first row": (
        lambda: sample(edm_heun(EDM, 1, s_churn=1.0), half, None, X),
        "'edm_heun' draws random numbers",
    ),
    "a seed for a key": (
        lambda: sample(ddim(VP, 3, eta=1.0), half, 0, X),
        r"key must be made by jax.random.key\(seed\); got int 0",
    ),
    "a key for each example": (
        lambda: sample(ddim(VP, 3, eta=1.0), half, jax.random.split(KEY, 2), X),
        r"key must be a single key; got keys of shape \(2,\)",
    ),
    "index": (
        lambda: sample(ddim(VP, 3), half, None, X, index=jnp.arange(3)),
        r"index has shape \(3,\); x_init holds 2 examples",
    ),
    "shape of x0_hat": (
        lambda: sample(ddim(VP, 3), lambda x, t: x[:, :2], None, X),
        r"denoise returned \(2, 2\) for x of \(2, 3\)",
    ),
    "x0_hat that would broadcast": (
        lambda: sample(ddim(VP, 3), lambda x, t: x[:1], None, X),
        r"denoise returned \(1, 3\) for x of \(2, 3\)",
    ),
    "x0_hat of another tree": (
        lambda: sample(ddim(VP, 3), lambda x, t: (x, x), None, X),
        "denoise returned",
    ),
    "tokens out of range": (
        lambda: sample(masked_ancestral(MASKED, 3), logits, KEY, jnp.array([[0, 6]])),
        r"tokens must lie in 0..5; got 0..6",
    ),
    "negative tokens": (
        lambda: sample(first_hitting(MASKED, 2), logits, KEY, jnp.array([[-1, 5]])),
        r"tokens must lie in 0..5; got -1..5",
    ),
    "float tokens": (
        lambda: sample(masked_ancestral(MASKED, 3), logits, KEY, X),
        "tokens must be an integer array",
    ),
    "flat tokens": (
        lambda: sample(masked_ancestral(MASKED, 3), logits, KEY, jnp.array([5, 5])),
        "tokens must be an integer array",
    ),
    "number without length": (
        lambda: sample(masked_ancestral(MASKED, 3), logits, KEY, 4),
        "pass length",
    ),
    "no sequences": (
        lambda: sample(first_hitting(MASKED, 3), logits, KEY, 0),
        "number of sequences must be positive, got 0",
    ),
    "another length": (
        lambda: sample(first_hitting(MASKED, 3), logits, KEY, jnp.full((2, 4), 5)),
        "tokens have length 4, the sampler was built for 3",
    ),
    "logits with a mask class": (
        lambda: sample(first_hitting(MASKED, 3), lambda x, t: jnp.zeros((*x.shape, 6)), KEY, 2),
        r"logits of shape \(2, 3, 6\).*need \(2, 3, 5\) \(no mask class\)",
    ),
    "logits without positions": (
        lambda: sample(
            masked_ancestral(MASKED, 3, length=3), lambda x, t: jnp.zeros((2, 5)), KEY, 2
        ),
        r"logits of shape \(2, 5\)",
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_runs(case):
    run, message = RUNS[case]
    with pytest.raises(ValueError, match=message):
        run()


def test_wrong_kinds_of_objects():
    with pytest.raises(TypeError, match=r"must be a diffusion_jax\.samplers\.Sampler"):
        sample(ddim, half, None, X)
    with pytest.raises(TypeError, match="denoise must be callable"):
        sample(ddim(VP, 3), X, None, X)


def test_an_error_of_the_network_surfaces_as_itself():
    def broken(x, t):
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        sample(ddim(VP, 3), broken, None, X)


BUILDS = {
    "unknown": (lambda: build_sampler(VP, "dpmpp2m", 5), "unknown sampler 'dpmpp2m'; did you mean"),
    "family": (
        lambda: build_sampler(BRIDGE, "ddim", 5),
        "sampler 'ddim' is not for a bridge process.*valid: .*dbim, .*ddbm_heun",
    ),
    "nfe of 0": (lambda: build_sampler(VP, "ddim", 0), "nfe must be a positive int, got 0"),
    "nfe of 1.5": (lambda: build_sampler(VP, "ddim", 1.5), "nfe must be a positive int, got 1.5"),
    "too few": (
        lambda: build_sampler(VP, "midpoint", 1),
        "'midpoint' costs 2n calls for n steps: nfe=1 is too few",
    ),
    "too few for a bridge": (lambda: build_sampler(BRIDGE, "ddbm_heun", 1), "nfe=1 is too few"),
    "option": (lambda: build_sampler(VP, "euler", 5, eta=1.0), "sampler 'euler': .*'eta'"),
    "option of a named solver": (
        lambda: build_sampler(VP, "dpmpp_2m", 5, eta=1.0),
        "sampler 'dpmpp_2m': .*'eta'",
    ),
    "length against nfe": (
        lambda: build_sampler(MASKED, "first_hitting", 7, length=5),
        "nfe is the length 5, not 7",
    ),
    "no length": (lambda: build_sampler(MASKED, "first_hitting"), "'first_hitting': .*'length'"),
    "not a process": (lambda: build_sampler("vp", "ddim", 5), "str is not a process"),
}


@pytest.mark.parametrize("case", BUILDS)
def test_build_sampler(case):
    build, message = BUILDS[case]
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", registry.names("sampler"))
def test_build_sampler_spends_what_it_is_given(name):
    """As many steps as fit, never a call more; an odd call may be left over where a step costs two."""
    meta = registry.entry("sampler", name).meta
    process = PROCESS_OF[meta["family"]]
    options = {"length": 6} if meta["family"] == "discrete" else {}
    options |= required(name, process)
    # one block: every number of steps can be shared out
    options |= {n: 6 for n in ("block_size", "window", "stride") if n in options}
    calls = meta.get("calls", "n")
    cost = int(calls[0]) if calls[0].isdigit() else 1
    for nfe in (6,) if calls == "length" else (2, 5, 6, 11, 20):
        if nfe >= max(cost, least_steps(name)):
            sampler = build_sampler(process, name, nfe, **options)
            cut = meta.get("skips") or {"block_size", "window"} & set(options)
            most = min(nfe, 6) if cut else nfe  # no more calls than there are tokens
            assert most - max(cost, 2) <= sampler.nfe <= nfe
    default = build_sampler(process, name, **options)
    assert default.nfe >= 2 and default.name == name


def test_an_order_above_the_steps_is_refused():
    for build in (
        lambda: dpm_solver_pp(VP, 2, order=3),
        lambda: dpm_solver_pp(VP, 2, order=3, variant="singlestep"),
        lambda: sde_dpm_solver_pp(VP, 2, order=3),
        lambda: unipc(VP, 2, order=3),
        lambda: deis(VP, 2, order=3),
        lambda: build_sampler(VP, "dualfast_unipc_2", 2, order=3),
        lambda: build_sampler(VP, "dpmpp_3m", 2),
    ):
        with pytest.raises(ValueError, match="order 3 needs at least 3 steps, got 2: take more"):
            build()


def test_non_finite_grids_are_refused():
    """A process that is not defined at a grid point says so before anything runs."""

    def with_nan(process, n, first, last):
        times = np.linspace(first, last, n + 1)
        times[1] = np.nan
        return times

    with pytest.raises(ValueError, match="decrease strictly"):
        ddim(VP, 5, grid=with_nan)
    # two times so close that they coincide in the log-SNR
    close = [1.0, np.nextafter(1e-5, 1.0), 1e-5, 1e-6, 0.0]
    with pytest.raises(ValueError, match="not finite at step 2 of 4: two grid points coincide"):
        with np.errstate(all="ignore"):
            dpm_solver_pp(FLOW, grid=close, lower_order_final=False)
    assert ddim(FLOW, grid=close).nfe == 4  # a first-order step over nothing does no harm


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in registry.names("sampler")
        if registry.entry("sampler", n).meta.get("calls") != "length"
        and not n.endswith(("2s", "3s"))
        and registry.entry("sampler", n).meta.get("grid", True)
    ],
)
def test_times_of_ones_own_need_no_count(name):
    meta = registry.entry("sampler", name).meta
    process = PROCESS_OF[meta["family"]]
    options = required(name, process)
    sampler = registry.get("sampler", name)(process, grid=[0.9, 0.6, 0.3, 0.1], **options)
    assert set(np.round(sampler.times, 12)) >= {0.9, 0.6, 0.3}
    assert sampler.xs["next"]["t"][-1] == 0.1


def test_messages_name_the_fix():
    with pytest.raises(registry.UnknownName) as caught:
        build_sampler(VP, "dpm_pp_2m", 5)
    assert re.search(r"did you mean 'dpmpp_2m'\?", str(caught.value))
    assert "ddim" in str(caught.value)
