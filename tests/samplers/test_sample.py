"""`sample`, the one loop: kinds of denoisers, what is compiled when, hooks and caches."""

import dataclasses
import functools
import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_checks import plain_run

from diffusion_jax import processes
from diffusion_jax.numerics import pytree_dataclass
from diffusion_jax.samplers import (
    ddim,
    dpm_solver_pp,
    first_hitting,
    sample,
)

VP = processes.VP()
X = jax.random.normal(jax.random.key(1), (4, 3))
KEY = jax.random.key(5)


def model(scale, x, t):
    return scale * jnp.tanh(x) * (1.0 - 0.5 * t)


def denoise(x, t):
    return model(0.8, x, t)


def expected():
    """The two-step DDIM result, written out."""
    a, s = (np.asarray(f(np.array([1.0, 0.5, 0.1]))) for f in (VP.alpha, VP.sigma))
    x = np.asarray(X, np.float64)
    for i, t in enumerate((1.0, 0.5)):
        x0 = 0.8 * np.tanh(x) * (1 - 0.5 * t)
        eps = (x - a[i] * x0) / s[i]
        x = a[i + 1] * x0 + s[i + 1] * eps
    return x


def two_steps():
    return ddim(VP, grid=[1.0, 0.5, 0.1])


# ------------------------------------------------------------------------------ kinds of denoisers


@dataclasses.dataclass
class Callable_:
    """A plain object; not hashable, being a dataclass with equality."""

    scale: float

    def __call__(self, x, t):
        return model(self.scale, x, t)


class WithAt:
    def at(self, x, point):
        assert set(point) == {"t", "alpha", "sigma", "dalpha", "dsigma"}
        return model(0.8, x, point["t"])

    def __call__(self, x, t):
        raise AssertionError("at is preferred")


class Bound:
    def predict(self, x, t):
        return model(0.8, x, t)


@pytree_dataclass
class Module:
    """What an Equinox module looks like."""

    scale: object

    def __call__(self, x, t):
        return model(self.scale, x, t)


KINDS = {
    "function": denoise,
    "lambda": lambda x, t: model(0.8, x, t),
    "jitted": jax.jit(denoise),
    "partial": functools.partial(model, 0.8),
    "tree partial": jax.tree_util.Partial(model, jnp.float32(0.8)),
    "tree partial of a float": jax.tree_util.Partial(model, 0.8),
    "object": Callable_(0.8),
    "object with at": WithAt(),
    "bound method": Bound().predict,
    "pytree": Module(jnp.float32(0.8)),
    "numpy scalar leaf": Module(np.float64(0.8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_callable_is_a_denoiser(kind):
    for _ in range(2):  # the second call finds what the first has compiled
        np.testing.assert_allclose(sample(two_steps(), KINDS[kind], None, X), expected(), atol=2e-6)


def test_parameters_of_a_pytree_are_not_compiled_in():
    traces = []

    def network(params, x, t):
        traces.append(None)
        return params["scale"] * jnp.tanh(x)

    ends = [
        sample(two_steps(), jax.tree_util.Partial(network, {"scale": scale}), None, X)
        for scale in (0.1, 0.5, np.float32(0.7), jnp.float32(0.9))
    ]
    assert len(traces) <= 2  # strong and weak types
    assert all((a != b).any() for a, b in itertools.pairwise(ends))


def test_one_program_for_solvers_of_one_structure():
    """Midpoint and Taylor forms, schedules, ranges and grids differ in numbers only, jitted or not."""
    traces = []

    def counted(x, t):
        traces.append(None)
        return denoise(x, t)

    variants = [
        dpm_solver_pp(VP, 6),
        dpm_solver_pp(VP, 6, kind="taylor"),
        dpm_solver_pp(processes.VP(beta_max=12.0), 6),
        dpm_solver_pp(processes.Cosine(), 6, grid="quadratic"),
        dpm_solver_pp(processes.VE(), 6),
    ]
    plain = [sample(s, counted, None, X) for s in variants]
    assert len(traces) == 1
    program = jax.jit(lambda s, k, x: sample(s, counted, k, x))
    jitted = [program(s, KEY, X) for s in variants]
    assert program._cache_size() == 1 and len(traces) <= 2
    for a, b in zip(plain, jitted):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert len({float(v.sum()) for v in plain}) == len(variants)


def test_stochastic_variants_share_a_program():
    traces = []

    def counted(x, t):
        traces.append(None)
        return denoise(x, t)

    for eta, process in ((0.5, VP), (1.0, VP), (0.7, processes.VP(beta_min=0.2))):
        sample(ddim(process, 5, eta=eta), counted, KEY, X)
    assert len(traces) == 1


def test_a_dead_function_takes_its_program_with_it():
    """Sampling with a fresh closure in each round does not pile up programs or what they close over."""

    class Weights:
        value = 0.5

    def make():
        weights = Weights()

        def closure(x, t):
            return weights.value * x

        return closure, weakref.ref(weights)

    closure, weights = make()
    sample(two_steps(), closure, None, X)
    reference = weakref.ref(closure)
    del closure
    gc.collect()
    assert reference() is None and weights() is None


def test_closures_over_traced_values():
    """The denoiser and the hook may close over what is being differentiated or jitted."""

    def loss(scale, shift):
        end = sample(
            two_steps(),
            lambda x, t: model(scale, x, t),
            None,
            X,
            hook=lambda state, info: state._replace(x=state.x + shift),
        )
        return (end**2).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    step = 1e-2
    for point in ((0.8, 0.1), (0.3, 0.2)):
        for k, g in enumerate(gradient(*point)):
            up, down = list(point), list(point)
            up[k] += step
            down[k] -= step
            numeric = (loss(*up) - loss(*down)) / (2 * step)
            assert g == pytest.approx(float(numeric), rel=1e-2)


# ------------------------------------------------------------------------------ hooks and caches


def test_hook_sees_each_step_and_can_overwrite():
    known = jnp.array([True, False, False])
    sampler = dpm_solver_pp(VP, 5)
    seen = []

    def keep(state, info):
        jax.debug.callback(lambda *v: seen.append(v), info.step, info.point["t"], info.x0_hat)
        assert info.keys is None
        return state._replace(x=jnp.where(known, 7.0, state.x))

    end, path = sample(sampler, denoise, None, X, hook=keep, trajectory=True)
    jax.effects_barrier()
    assert (np.asarray(end)[:, 0] == 7.0).all() and (np.asarray(path)[1:, :, 0] == 7.0).all()
    steps, times, predictions = zip(*sorted(seen, key=lambda v: int(v[0])))
    assert [int(s) for s in steps] == list(range(5))
    np.testing.assert_allclose(times, sampler.xs["next"]["t"], rtol=1e-6)
    for i, prediction in enumerate(predictions):
        np.testing.assert_allclose(
            prediction, denoise(path[i], sampler.times[i].astype(np.float32)), atol=1e-5
        )


def test_hook_keys_are_per_example_and_apart_from_the_samplers():
    sampler = ddim(VP, 3, eta=1.0)
    drawn = []

    def spy(state, info):
        z = jax.vmap(lambda k: jax.random.normal(k, (3,)))(info.keys)
        jax.debug.callback(lambda v: drawn.append(np.array(v)), z)
        return state

    sample(sampler, denoise, KEY, X, hook=spy)
    reordered = jnp.array([3, 1, 0, 2])
    sample(sampler, denoise, KEY, X, hook=spy, index=reordered)
    jax.effects_barrier()
    first, second = np.sort(np.stack(drawn[:3]), axis=0), np.sort(np.stack(drawn[3:]), axis=0)
    np.testing.assert_array_equal(first[:, reordered], second)
    own = [
        jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, 0), row), (3,))
        for row in range(4)
    ]
    every = np.stack([z[0] for z in drawn[:3]] + own)
    assert len(np.unique(every[:, 0])) == 7


def test_hook_may_move_examples_with_their_history():
    """Resampling particles: history and registers move along with the iterate."""
    order = jnp.array([2, 0, 3, 1])

    def permute(state, info):
        return jax.tree.map(lambda v: v[order], state)

    end = sample(dpm_solver_pp(VP, 6, order=3), denoise, None, X, hook=permute)
    straight = sample(dpm_solver_pp(VP, 6, order=3), denoise, None, X)
    composed = functools.reduce(lambda p, _: p[order], range(6), jnp.arange(4))
    np.testing.assert_allclose(end, straight[composed], atol=1e-6)


def test_stateful_denoiser_rides_in_the_scan():
    """Self-conditioning: each call sees the last prediction; the cache may be any pytree."""

    def conditioned(x, t, cache):
        x0 = 0.5 * model(0.8, x, t) + 0.5 * cache["last"]
        return x0, {"last": x0, "calls": cache["calls"] + 1}

    class At:
        def at(self, x, point, cache):
            return conditioned(x, point["t"], cache)

        def __call__(self, x, t, cache):
            raise AssertionError

    sampler = ddim(VP, 4)
    last = np.zeros_like(X)

    def by_hand(x, point):
        nonlocal last
        last = 0.5 * np.asarray(model(0.8, x, point["t"])) + 0.5 * last
        return last

    reference = plain_run(sampler, by_hand, X)[-1]
    cache = {"last": jnp.zeros_like(X), "calls": jnp.int32(0)}
    for kind in (conditioned, At()):
        end = sample(sampler, kind, None, X, cache=cache)
        np.testing.assert_allclose(end, reference, atol=1e-5)


def test_discrete_denoiser_sees_the_time_of_each_example():
    """First hitting: t is [B] and belongs to the mask rate of the sequence, whatever the schedule."""
    process = processes.Absorbing(4, processes.CosineSchedule())
    seen = []

    class Spy:
        def at(self, tokens, point):
            jax.debug.callback(lambda **p: seen.append(p), **point)
            return jnp.zeros((*tokens.shape, 4))

        def __call__(self, tokens, t):
            raise AssertionError

    sample(first_hitting(process, 3), Spy(), KEY, 5)
    jax.effects_barrier()
    assert len(seen) == 3
    for point in seen:
        assert point["t"].shape == (5,) and len(np.unique(point["t"])) == 5
        np.testing.assert_allclose(process.mask_rate(point["t"]), point["mask_rate"], atol=1e-6)
        np.testing.assert_allclose(1 - point["alpha"], point["mask_rate"], atol=1e-6)


def test_denoisers_of_equal_fields_are_told_apart():
    """JAX compares the tree structures of two registered dataclasses of equal fields as equal."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Plus:
        shift: float

        def __call__(self, x, t):
            return 0.0 * x + self.shift

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Minus:
        shift: float

        def __call__(self, x, t):
            return 0.0 * x - self.shift

    assert jax.tree.structure(Plus(1.0)) == jax.tree.structure(Minus(1.0))
    sampler = ddim(VP, 2, grid=[1.0, 0.5, 0.0])
    ends = [
        float(sample(sampler, make(1.0), None, jnp.ones((1, 1)))[0, 0]) for make in (Plus, Minus)
    ]
    assert ends == [1.0, -1.0]
