"""Planned reveals: cached and uncached sampling, its calls, its rates, infilling, sharded batches."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax.processes import Absorbing, CosineSchedule, GeometricSchedule, LinearSchedule
from diffusion_jax.samplers import (
    CountedCalls,
    build_times,
    expected_nfe,
    first_hitting,
    masked_ancestral,
    radd,
    sample,
)
from diffusion_jax.samplers.masked_ancestral import reveal_masses, reveal_probabilities

V, L = 5, 12
KEY = jax.random.key(0)


def table(seed=0, time=0.0):
    """Logits that look at all tokens, and at the time if told to."""
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(L, V + 1, L, V)), jnp.float32)

    def network(tokens, t):
        logits = jnp.einsum("blv,lvmw->bmw", jax.nn.one_hot(tokens, V + 1), kernel)
        pull = time * jnp.broadcast_to(jnp.asarray(t, jnp.float32), tokens.shape[:1])
        return logits + pull[:, None, None] * jnp.arange(V, dtype=jnp.float32)

    return network


@pytest.mark.parametrize(("steps", "time"), ((1, 0.0), (5, 2.0), (40, 0.0), (40, 2.0)))
def test_cached_samples_are_the_uncached_ones(steps, time):
    """Bit for bit, a network that looks at the time included: only calls that reveal nothing are left out."""
    network, process = table(time=time), Absorbing(V, CosineSchedule())
    prompt = np.random.default_rng(1).integers(0, V + 4, (16, L)).clip(0, V)
    for x_init in (16, prompt, np.minimum(prompt, V - 1)):
        plain = sample(masked_ancestral(process, steps, length=L), network, KEY, x_init)
        cached = masked_ancestral(process, steps, length=L, cached=True)
        assert cached.nfe == min(steps, L)
        np.testing.assert_array_equal(sample(cached, network, KEY, x_init), plain)
        assert np.asarray(plain).max() < V
        if x_init is not prompt:
            continue
        given = prompt < V
        np.testing.assert_array_equal(np.asarray(plain)[given], prompt[given])
        no_length = masked_ancestral(process, steps, cached=True)
        np.testing.assert_array_equal(sample(no_length, network, KEY, x_init), plain)


def distinct_steps(steps, batch, process, key=KEY):
    """Steps in which each sequence changes, counted in the trajectory of the uncached sampler."""
    _, path = sample(
        masked_ancestral(process, steps, length=L), table(), key, batch, trajectory=True
    )
    return (np.diff(np.asarray(path), axis=0) != 0).any(axis=2).sum(axis=0)


@pytest.mark.parametrize(("steps", "batch"), ((4, 8), (60, 1), (60, 8)))
def test_executed_calls_are_those_of_the_busiest_sequence(steps, batch):
    """Not the union over the batch, which is what a cache for all sequences would run."""
    process, counted = Absorbing(V), CountedCalls(table())
    need = distinct_steps(steps, batch, process)
    sample(radd(process, steps, length=L), counted, KEY, batch)
    assert counted.calls == need.max()
    sample(radd(process, steps, length=L), counted, KEY, np.zeros((batch, L), np.int32))
    assert counted.calls == need.max()  # nothing masked, no call


def test_the_uncached_sampler_makes_every_call():
    counted = CountedCalls(table())
    sample(masked_ancestral(Absorbing(V), 60, length=L), counted, KEY, 2)
    assert counted.calls == 60


def test_a_network_counts_its_calls_in_its_cache():
    """The second honest count: a stateful denoiser, whose cache a skipped call does not touch."""
    seen = []

    def network(tokens, t, cache):
        jax.debug.callback(lambda c: seen.append(int(c)), cache + 1)
        return table()(tokens, t), cache + 1

    need = distinct_steps(60, 4, Absorbing(V))
    sample(radd(Absorbing(V), 60, length=L), network, KEY, 4, cache=jnp.zeros((), jnp.int32))
    jax.effects_barrier()
    assert sorted(seen) == list(range(1, need.max() + 1))


@pytest.mark.parametrize("grid", ("uniform", "cosine"))
def test_mean_calls_of_a_sequence(grid):
    """Within 4 standard errors of the closed form, whose variance the counts themselves give."""
    process, num = Absorbing(V), 4000
    _, path = sample(
        masked_ancestral(process, 16, length=L, grid=grid),
        lambda x, t: jnp.zeros((*x.shape, V)),
        KEY,
        num,
        trajectory=True,
    )
    need = (np.diff(np.asarray(path), axis=0) != 0).any(axis=2).sum(axis=0)
    expected = expected_nfe(process, 16, L, grid=grid)
    assert abs(need.mean() - expected) < 4 * need.std() / np.sqrt(num)


def test_expected_nfe_is_the_closed_form():
    """All stored sizes and grids; 1024 tokens in 1024 steps need 647.48 calls, in 4096 steps 906.13."""
    stored = golden("discrete_nfe")
    columns = [str(c) for c in stored["columns"]]
    process = Absorbing(V)
    for row in stored["values"]:
        row = dict(zip(columns, row))
        steps, length = int(row["N"]), int(row["L"])
        clipped = np.linspace(1.0, 1e-5, steps + 1)
        for name, got in (
            ("closed_form", expected_nfe(process, steps, length)),
            ("changed_steps_eps0", expected_nfe(process, steps, length)),
            ("changed_steps_eps1e-5", expected_nfe(process, None, length, grid=clipped)),
            ("changed_steps_cosine_grid", expected_nfe(process, steps, length, grid="cosine")),
            ("changed_steps_batch8_shared_cache", expected_nfe(process, steps, 8 * length)),
        ):
            assert got == pytest.approx(row[name], rel=1e-9), (name, steps, length)
        # RADD looks afterwards: one call at first, then one for each change before the last step
        times = build_times(process, steps)
        masses = reveal_masses(reveal_probabilities(process, times))
        last = 1.0 - (1.0 - masses[-1]) ** length
        assert 1.0 + row["closed_form"] - last == pytest.approx(row["network_calls_eps0"], rel=1e-9)
    assert expected_nfe(process, 1024, 1024) == pytest.approx(647.48, abs=0.005)


SCHEDULES = (
    LinearSchedule(),
    LinearSchedule(eps_end=1e-3),
    CosineSchedule(),
    GeometricSchedule(1e-4, 20.0),
)


@pytest.mark.parametrize("rate", ("analytic", "euler"))
def test_reveal_probabilities_of_one_step(rate):
    """Against the stored transitions; Euler's probabilities above 1 are 1 here."""
    stored = golden("discrete_steps")
    kind = {"analytic": "ancestral", "euler": "euler"}[rate]
    for name, schedule, transitions in zip(
        stored["names"], SCHEDULES, stored[f"oracle_{kind}"], strict=True
    ):
        for t, s, row in zip(stored["t"], stored["s"], transitions):
            mask = row[0, 0, -1]  # all masked: the chance of staying so
            got = reveal_probabilities(Absorbing(4, schedule), [t, s, 0.0], rate)
            assert got[0] == pytest.approx(min(1.0 - mask, 1.0), abs=1e-12), (name, t, s)
            assert got[-1] == 1.0
    if rate == "euler":
        assert (stored["oracle_euler"][3][:, 0, 0, -1] < 0).any()  # clipping was exercised


def test_masses_sum_to_one_and_compose():
    process = Absorbing(V, CosineSchedule())
    times = build_times(process, 9, "quadratic")
    masses = reveal_masses(reveal_probabilities(process, times))
    np.testing.assert_allclose(masses, -np.diff(process.mask_rate(times)), atol=1e-12)


def test_first_hitting_is_the_limit_of_many_steps():
    """Both draw the same times: with steps finer than any two of them, the same samples."""
    process, network = Absorbing(V), table()
    exact = sample(first_hitting(process, L), network, KEY, 32)
    steps = 60_000
    cached = radd(process, steps, length=L)
    same = np.asarray(sample(cached, network, KEY, 32) == exact).all(axis=1)
    assert same.mean() > 0.95  # two of 12 reveals fall into one of 60,000 steps with chance 0.001
    coarse = np.asarray(sample(radd(process, 8, length=L), network, KEY, 32) == exact).all(axis=1)
    assert coarse.mean() < 0.5


def test_euler_differs_where_the_schedule_bends():
    network = table()
    for process, equal in ((Absorbing(V), True), (Absorbing(V, CosineSchedule()), False)):
        each = [
            sample(masked_ancestral(process, 6, length=L, rate=rate), network, KEY, 16)
            for rate in ("analytic", "euler")
        ]
        assert bool((each[0] == each[1]).all()) == equal


def test_hooks_see_states_and_may_fill_in():
    """A hook that writes tokens leaves fewer to reveal; what it wrote stays."""
    network, seen = table(), []

    def fill(state, info):
        jax.debug.callback(lambda *v: seen.append([np.asarray(a) for a in v]), info.step, state.at)
        return state._replace(x=state.x.at[:, 3].set(2))

    out = sample(radd(Absorbing(V), 30, length=L), network, KEY, 6, hook=fill)
    jax.effects_barrier()
    assert (out[:, 3] == 2).all() and out.max() < V
    at = np.stack([at for _, at in sorted(seen, key=lambda v: int(v[0]))])
    assert (np.diff(at, axis=0) >= 0).all() and at.max() < 30
    logits = []

    def look(state, info):
        logits.append(info.x0_hat.shape)
        return state

    sample(masked_ancestral(Absorbing(V), 3, length=L), network, KEY, 6, hook=look)
    assert set(logits) == {(6, L, V)}


ERRORS = {
    "rate": ({"rate": "tweedie"}, "rate must be one of analytic, euler; got 'tweedie'"),
    "categorical": ({"categorical": "gumbl"}, "did you mean 'gumbel'"),
    "bits without gumbel": ({"bits": 12}, "bits = 12 is an option of categorical='gumbel'"),
    "cached gumbel": ({"categorical": "gumbel", "cached": True}, "cannot be cached"),
    "bits": ({"categorical": "gumbel", "bits": 0}, "bits must be an int from 1 to 53, got 0"),
    "wide bits": ({"categorical": "gumbel", "bits": 53}, "bits = 53 does not fit into float32"),
    "float64": ({"precision": "float64"}, "precision='float64' needs jax.config.update"),
    "cached": ({"cached": "yes"}, "cached must be one of True, False; got 'yes'"),
    "option": ({"topk": 3}, "did you mean 'top_k'"),
    "length": ({"length": 0}, "length must be a positive int, got 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_options_are_named(case):
    options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        masked_ancestral(Absorbing(V), 4, **options)


def test_a_schedule_that_does_not_end_fully_masked():
    process = Absorbing(V, GeometricSchedule(1e-4, 3.0))
    message = "GeometricSchedule masks only 0.9502 of the tokens at t = 1"
    for build in (lambda: masked_ancestral(process, 4), lambda: first_hitting(process, 4)):
        with pytest.raises(ValueError, match=message):
            build()
    # tokens of one's own at a time of one's own are no start from masks
    assert masked_ancestral(process, 4, t_start=0.9).times[0] == 0.9


def test_wrong_tokens_and_logits():
    sampler = radd(Absorbing(V), 4, length=L)
    for x_init, message in (
        (np.full((2, L + 1), V), f"tokens have length {L + 1}, the sampler was built for {L}"),
        (np.full((2, L), V + 1), r"tokens must lie in 0\.\.5; got 6\.\.6"),
        (np.zeros((2, L)), "tokens must be an integer array"),
        (0, "the number of sequences must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(sampler, table(), KEY, x_init)
    with pytest.raises(ValueError, match="no mask class"):
        sample(sampler, lambda x, t: jnp.zeros((*x.shape, V + 1)), KEY, 2)


def test_a_sharded_batch_keeps_its_logits_where_they_are():
    """Compiled for 8 devices: the only thing they tell each other is whether any has work left."""
    program = """
        import re
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from diffusion_jax.processes import Absorbing
        from diffusion_jax.samplers import first_hitting, masked_ancestral, radd, sample

        V, L, B = 31, 6, 16
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        batch = NamedSharding(mesh, P("data"))
        kernel = jnp.asarray(np.random.default_rng(0).normal(size=(V + 1, V)), jnp.float32)
        tokens = jnp.full((B, L), V, jnp.int32)

        def network(x, t):
            return jnp.roll(kernel[x], 1, axis=1)

        for sampler in (
            masked_ancestral(Absorbing(V), 4, length=L),
            radd(Absorbing(V), 9, length=L),
            first_hitting(Absorbing(V), L, 3, order=2),
        ):
            run = jax.jit(
                lambda x: sample(sampler, network, jax.random.key(0), x),
                in_shardings=batch,
                out_shardings=batch,
            )
            compiled = run.lower(tokens).compile()
            moved = re.findall(r"(\\S+) (all-gather|all-reduce|all-to-all|collective-permute)\\(",
                               compiled.as_text())
            sizes = [int(np.prod([int(d) for d in re.findall(r"\\d+", s.split("[")[1].split("]")[0])]
                                 or [1])) for s, _ in moved]
            assert max(sizes, default=0) <= B * L, moved
            alone = jax.jit(lambda x: sample(sampler, network, jax.random.key(0), x))(tokens)
            np.testing.assert_array_equal(compiled(jax.device_put(tokens, batch)), alone)
            print(sampler.name, sorted(set(moved)))
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
