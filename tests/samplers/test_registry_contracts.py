"""What every registered sampler keeps. A sampler that is registered tomorrow is tested here tomorrow."""

import collections
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_checks import bridges, least_steps, plain_run, required

from diffusion_jax import processes, registry
from diffusion_jax.samplers import (
    Sampler,
    build_sampler,
    sample,
    with_noise,
)

B, D, L, V = 6, 3, 4, 5
NAMES = registry.names("sampler")
FAMILY = {n: registry.entry("sampler", n).meta["family"] for n in NAMES}
# Samplers with a step of their own say `table=False` where they register.
TABLES = [
    n
    for n in NAMES
    if FAMILY[n] != "discrete" and registry.entry("sampler", n).meta.get("table", True)
]
OPTIONS = {"gaussian": {}, "bridge": {}, "discrete": {"length": L}, "bayesian_flow": {}}
# Two processes of each family that differ in numbers only, and another schedule of one structure.
PAIRS = {
    "gaussian": (processes.VP(), processes.VP(beta_max=12.0), processes.Cosine()),
    "bridge": (processes.VPBridge(), processes.VPBridge(beta_d=1.0), processes.VPBridge(0.5, 0.3)),
    "discrete": (processes.Absorbing(V), processes.Absorbing(V, processes.LinearSchedule(1e-3))),
    "bayesian_flow": (processes.DiscreteBFN(V), processes.DiscreteBFN(V, beta1=2.0, eta=0.01)),
}
CALLS = collections.Counter()


def shrink(x, t):
    """A denoiser for any Gaussian process; counts how often Python runs it."""
    CALLS["gaussian"] += 1
    return 0.8 * jnp.tanh(x) * (1.0 - 0.5 * t)


def pull(x, t):
    """A denoiser for bridges."""
    CALLS["bridge"] += 1
    return 0.5 * jnp.tanh(x) * (1.0 - 0.5 * t) + 0.1


def lean(tokens, t):
    """Logits that depend on the neighbours."""
    CALLS["discrete"] += 1
    return jax.nn.one_hot(jnp.roll(tokens, 1, axis=1), V) * 2.0 + jnp.arange(V) * 0.1


def guess(z, t):
    """Class probabilities that depend on the neighbours, for Bayesian flows of tokens."""
    CALLS["bayesian_flow"] += 1
    return jax.nn.softmax(z + 0.3 * jnp.roll(z, 1, axis=1) - t, axis=-1)


DENOISE = {"gaussian": shrink, "bridge": pull, "discrete": lean, "bayesian_flow": guess}


def make(name, which=0, nfe=5, **options):
    family = FAMILY[name]
    if registry.entry("sampler", name).meta.get("calls") == "length":
        nfe = None
    process = PAIRS[family][which]
    return build_sampler(
        process, name, nfe, **OPTIONS[family], **required(name, process), **options
    )


def start(name, num=B):
    if FAMILY[name] == "discrete":
        return jnp.full((num, L), V, jnp.int32)
    if FAMILY[name] == "bayesian_flow":
        return jax.random.normal(jax.random.key(7), (num, L, V))
    return jax.random.normal(jax.random.key(7), (num, D))


def run(name, sampler, **kw):
    x, key = start(name), jax.random.key(3)
    return sample(sampler, DENOISE[FAMILY[name]], key if sampler.stochastic else None, x, **kw)


@pytest.mark.parametrize("name", NAMES)
def test_calls_trajectory_and_jit(name):
    """Counted network calls, the states of the trajectory, and the compiled result against the plain one."""
    sampler = make(name)
    assert isinstance(sampler, Sampler) and sampler.name
    if name in TABLES and sampler.stochastic:  # threefry takes seconds without jit
        noise = np.random.default_rng(0).standard_normal((sampler.nfe + 1, *start(name).shape))
        sampler = with_noise(sampler, noise.astype(np.float32))
    rows = {v.shape[0] for v in jax.tree.leaves(sampler.xs)}
    assert rows == {sampler.nfe} == {len(sampler.times)}
    before = CALLS[FAMILY[name]]
    with jax.disable_jit():
        plain, path = run(name, sampler, trajectory=True)
    made = CALLS[FAMILY[name]] - before
    assert made == sampler.nfe or (registry.entry("sampler", name).meta.get("skips") and made > 0)
    assert made <= sampler.nfe
    assert path.shape == (sampler.nfe + 1, *plain.shape) and path.dtype == plain.dtype
    if sampler.start == () or not getattr(sampler.init, "structure", sampler).init:
        np.testing.assert_array_equal(path[0], start(name))
    np.testing.assert_array_equal(path[-1], plain)
    compiled = run(name, sampler)
    assert compiled.dtype == start(name).dtype
    if FAMILY[name] == "discrete":
        np.testing.assert_array_equal(compiled, plain)
    else:
        np.testing.assert_allclose(compiled, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TABLES)
def test_the_kernel_runs_the_table(name):
    """Against a plain NumPy loop over the same table, the noise drawn by the documented keys."""
    sampler = make(name)
    keys = [jax.random.fold_in(jax.random.key(3), i) for i in range(B)]
    noise = np.array(
        [
            [jax.random.normal(jax.random.fold_in(k, row), start(name).shape[1:]) for k in keys]
            for row in (range(sampler.nfe + 1) if sampler.stochastic else ())
        ]
    )
    path = plain_run(
        sampler,
        lambda x, point: DENOISE[FAMILY[name]](jnp.asarray(x), point["t"]),
        start(name),
        noise if sampler.stochastic else None,
    )
    scale = max(1.0, np.abs(path).max())
    np.testing.assert_allclose(run(name, sampler), path[-1], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_are_in_the_program_only_if_the_sampler_draws(name):
    sampler = make(name)
    program = jax.jit(lambda s, k, x: sample(s, DENOISE[FAMILY[name]], k, x))
    text = program.lower(sampler, jax.random.key(0), start(name)).as_text()
    drawn = any(word in text for word in ("threefry", "rng", "random"))
    assert drawn == sampler.stochastic


@pytest.mark.parametrize("name", NAMES)
def test_one_program_for_all_numbers(name):
    """Other schedules, grids and options of one structure neither trace the denoiser nor compile again."""
    run(name, make(name))
    before = CALLS[FAMILY[name]]
    ends = [run(name, make(name, which)) for which in range(1, len(PAIRS[FAMILY[name]]))]
    meta = registry.entry("sampler", name).meta
    if meta.get("calls", "n") != "length" and meta.get("grid", True):
        ends.append(run(name, make(name, grid="quadratic", t_start=0.9)))
    assert CALLS[FAMILY[name]] == before
    assert all(np.isfinite(end).all() for end in ends)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_depends_on_its_own_number_alone(name):
    """Reordered examples with reordered numbers are the same examples; other numbers are other draws."""
    sampler, order = make(name), jnp.array([4, 2, 0, 5, 1, 3])
    x, key = start(name), jax.random.key(3)
    denoise = DENOISE[FAMILY[name]]
    straight = np.asarray(sample(sampler, denoise, key, x))
    reordered = sample(sampler, denoise, key, x[order], index=order)
    np.testing.assert_allclose(reordered, straight[order], rtol=1e-5, atol=1e-5)
    if sampler.stochastic:
        assert (np.asarray(sample(sampler, denoise, key, x, index=order)) != straight).any()
        assert (np.asarray(sample(sampler, denoise, jax.random.key(4), x)) != straight).any()


GAUSSIAN = {n: registry.get("process", n)() for n in registry.names("process", family="gaussian")}
BRIDGES = bridges()


@pytest.mark.parametrize("name", [n for n in TABLES if FAMILY[n] == "gaussian"])
def test_finite_on_every_process_and_grid(name):
    """From 1 to 25 steps, default ends: those of EDM and rectified flow have an infinite log-SNR."""
    rng = np.random.default_rng(0)
    for process, grid, n in itertools.product(
        GAUSSIAN.values(), registry.names("time_grid", any_process=None), (1, 2, 3, 25)
    ):
        if n < least_steps(name):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build = registry.get("sampler", name)
            sampler = build(process, n, grid=grid, **required(name, process))
        x = rng.standard_normal((4, 2)) * process.prior_std
        noise = rng.standard_normal((sampler.nfe + 1, 4, 2)).astype(np.float32)
        path = plain_run(sampler, lambda x, p: 0.5 * np.tanh(x), x, noise, np.float32)
        assert np.isfinite(path).all(), (process, grid, n)


@pytest.mark.parametrize("name", [n for n in TABLES if FAMILY[n] == "bridge"])
def test_finite_on_every_bridge(name):
    """A sampler for one kind of bridge says so; the others take all of them, from few calls to many."""
    rng = np.random.default_rng(0)
    runs = 0
    for process, grid, n in itertools.product(
        [*BRIDGES.values(), processes.Interpolant()], (None, "uniform", "quadratic"), (2, 4, 25)
    ):
        if n < least_steps(name):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                sampler = registry.get("sampler", name)(process, n, grid=grid)
            except ValueError as error:
                assert "needs the bridge of an SDE, got Interpolant" in str(error)
                continue
        x = rng.standard_normal((4, 2))
        noise = rng.standard_normal((sampler.nfe + 1, 4, 2)).astype(np.float32)
        path = plain_run(sampler, lambda x, p: 0.5 * np.tanh(x), x, noise, np.float32)
        assert np.isfinite(path).all(), (process, grid, n)
        runs += 1
    assert runs > 30
