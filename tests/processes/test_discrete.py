"""Discrete processes against enumeration, autodiff and the authors' schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax import registry
from diffusion_jax.numerics import example_keys
from diffusion_jax.processes import (
    Absorbing,
    CosineAlphaSchedule,
    CosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    PolynomialSchedule,
    Uniform,
)

# In the order and with the names of the golden file.
SCHEDULES = {
    "linear": LinearSchedule(),
    "loglinear": LinearSchedule(eps_end=1e-3),
    "cosine": CosineSchedule(),
    "md4_linear": LinearSchedule(1e-4, 1e-4),
    "md4_cosine": CosineSchedule(1e-4, 1e-4),
    "md4_poly3": PolynomialSchedule(3.0, 1e-4, 1e-4),
    "geometric": GeometricSchedule(1e-4, 20.0),
    "mdlm_cosine": CosineAlphaSchedule(eps_end=1e-3),
}
each_schedule = pytest.mark.parametrize("name", SCHEDULES)
each_process = pytest.mark.parametrize("build", [Absorbing, Uniform])


def test_every_schedule_is_covered():
    covered = {type(schedule) for schedule in SCHEDULES.values()}
    assert covered == {registry.get("schedule", name) for name in registry.names("schedule")}


@each_schedule
def test_schedules_of_the_official_codes(name):
    g = golden("processes_discrete")
    row, schedule, t = list(g["schedule_names"]).index(name), SCHEDULES[name], g["schedule_t"]
    np.testing.assert_allclose(schedule.alpha(t), g["schedule_alpha"][row], atol=1e-12)
    np.testing.assert_allclose(-schedule.mask_rate_slope(t), g["schedule_dalpha"][row], atol=1e-11)
    np.testing.assert_allclose(schedule.sigma_bar(t), g["schedule_sigma_bar"][row], rtol=1e-9)
    np.testing.assert_allclose(schedule.weight(t), g["schedule_weight"][row], rtol=1e-9)
    # sigma = d sigma_bar / dt = -alpha' / alpha
    rate = schedule.mask_rate_slope(t) / schedule.alpha(t)
    np.testing.assert_allclose(rate, g["schedule_dsigma"][row], rtol=1e-9)


@each_schedule
def test_slope_and_weight_by_autodiff(name, x64):
    schedule, t = SCHEDULES[name], jnp.linspace(0.003, 0.995, 40)
    slope = jax.jit(jax.vmap(jax.grad(schedule.mask_rate)))(t)
    np.testing.assert_allclose(schedule.mask_rate_slope(t), slope, rtol=1e-9, atol=1e-14)
    log_slope = jax.jit(jax.vmap(jax.grad(lambda s: jnp.log(schedule.mask_rate(s)))))(t)
    np.testing.assert_allclose(schedule.weight(t), log_slope, rtol=1e-9, atol=1e-14)


@each_schedule
def test_inverse(name):
    schedule, t = SCHEDULES[name], np.linspace(0.002, 0.9, 50)
    np.testing.assert_allclose(schedule.t_of_mask_rate(schedule.mask_rate(t)), t, rtol=1e-9)
    assert (np.diff(schedule.mask_rate(t)) > 0).all()
    assert schedule.t_of_mask_rate(0.0) == 0.0 and schedule.t_of_mask_rate(1.0) == 1.0


@each_schedule
def test_ends(name):
    schedule = SCHEDULES[name]
    if name == "geometric":
        assert schedule.alpha(0.0) == pytest.approx(np.exp(-1e-4))
        assert schedule.alpha(1.0) == pytest.approx(np.exp(-20.0))
        return
    assert schedule.mask_rate(0.0) == pytest.approx(schedule.eps_start, abs=1e-15)
    assert schedule.mask_rate(1.0) == pytest.approx(1.0 - schedule.eps_end, abs=1e-15)


@each_schedule
def test_numpy_is_float64_and_float32_keeps_its_digits(name):
    schedule = SCHEDULES[name]
    t = np.float32(np.concatenate([np.geomspace(1e-6, 0.5, 30), np.linspace(0.5, 0.999, 30)]))
    functions = ("mask_rate", "mask_rate_slope", "weight", "sigma_bar")
    device = jax.jit(lambda t: {f: getattr(schedule, f)(t) for f in functions})(jnp.asarray(t))
    for function, got in device.items():
        exact = getattr(schedule, function)(t)
        assert exact.dtype == np.float64 and got.dtype == jnp.float32
        # log(1 - rate) loses digits as the rate nears 1
        early = t < (0.9 if function == "sigma_bar" else 1.0)
        np.testing.assert_allclose(got[early], exact[early], rtol=1e-5, err_msg=function)
    assert GeometricSchedule().sigma_bar(jnp.float32(1.0)) == pytest.approx(20.0, rel=1e-5)


@each_schedule
def test_numpy_equals_jax_in_64_bits(name, x64):
    schedule, t = SCHEDULES[name], np.linspace(0.0, 1.0, 21)[1:]
    functions = ("alpha", "mask_rate", "weight", "t_of_mask_rate")
    device = jax.jit(lambda t: {f: getattr(schedule, f)(t) for f in functions})(jnp.asarray(t))
    for function, got in device.items():
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, getattr(schedule, function)(t), rtol=1e-12, atol=1e-15)


# Corruption


def corrupt(process, tokens, t, seed=0):
    keys = example_keys(jax.random.key(seed), jnp.arange(len(tokens)))
    return np.asarray(jax.jit(process.corrupt)(keys, tokens, t))


def test_absorbing_masks_each_token_with_the_mask_rate():
    process = Absorbing(5, CosineSchedule())
    count, length = 4000, 6
    tokens = jnp.tile(jnp.arange(length) % 5, (count, 1))
    t = np.where(np.arange(count) % 2, 0.25, 0.8).astype(np.float32)
    x = corrupt(process, tokens, t)
    masked = x == process.mask_id
    assert (masked | (x == tokens)).all() and x.dtype == tokens.dtype
    for half, at in ((masked[::2], 0.8), (masked[1::2], 0.25)):
        rate = process.mask_rate(at)
        error = 4 * np.sqrt(rate * (1 - rate) / len(half))
        np.testing.assert_allclose(half.mean(0), rate, atol=error)
        # positions are independent: no covariance between any two
        cov = np.cov(half.T)
        off = cov[~np.eye(length, dtype=bool)]
        assert np.abs(off).max() < 5 * rate * (1 - rate) / np.sqrt(len(half))


def test_uniform_replaces_tokens_by_any_token():
    process = Uniform(4, LinearSchedule())
    tokens = jnp.full((8000, 3), 2)
    x = corrupt(process, tokens, 0.6)
    law = np.full(4, 0.6 / 4)
    law[2] += 0.4
    for position in range(3):
        seen = np.bincount(x[:, position], minlength=4) / len(x)
        np.testing.assert_allclose(seen, law, atol=4 * np.sqrt(0.25 / len(x)))


@each_process
def test_an_example_depends_on_its_own_key_alone(build):
    process = build(7)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (6, 11)))
    t = jnp.linspace(0.2, 0.9, 6)

    @jax.jit
    def run(tokens, index, t):
        return process.corrupt(example_keys(jax.random.key(5), index), tokens, t)

    index, rows = jnp.arange(6), np.array([4, 1, 5, 0, 2, 3])
    with jax.debug_key_reuse(True):
        whole = np.asarray(run(tokens, index, t))
    np.testing.assert_array_equal(run(tokens[rows], index[rows], t[rows]), whole[rows])
    assert (run(tokens, index, jnp.zeros(6)) == tokens).all()
    if build is Absorbing:
        assert (run(tokens, index, jnp.ones(6)) == process.mask_id).all()


# Reverse steps


def transition(process, t, s=None):
    """q(x_t | x_s) of one token as a matrix, rows = from; s = None is the data."""
    ratio = process.alpha(t) / (1.0 if s is None else process.alpha(s))
    v = process.vocab_size
    if isinstance(process, Absorbing):
        matrix = np.zeros((v + 1, v + 1))
        matrix[np.arange(v), np.arange(v)] = ratio
        matrix[:v, v] = 1.0 - ratio
        matrix[v, v] = 1.0
        return matrix
    return ratio * np.eye(v) + (1.0 - ratio) / v


@each_process
@pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric", "loglinear"])
def test_reverse_step_is_bayes(build, schedule):
    """One token with a known prior: p(x_s | x_t) from the joint of (x0, x_s, x_t)."""
    process = build(3, SCHEDULES[schedule])
    prior = np.array([0.5, 0.2, 0.3])
    states = 3 + (build is Absorbing)
    padded = np.concatenate([prior, np.zeros(states - 3)])
    for t, s in ((0.9, 0.6), (0.5, 0.1), (0.31, 0.3)):
        p_s = padded @ transition(process, s)
        joint = p_s[:, None] * transition(process, t, s)
        np.testing.assert_allclose(joint.sum(0), padded @ transition(process, t), rtol=1e-12)
        exact = joint / joint.sum(0)
        for token in range(states):
            got = process.reverse_probs(prior[None], np.array([token]), t, s)[0]
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, exact[:, token], atol=1e-14)


def test_reverse_step_to_the_data_leaves_no_mask():
    process = Absorbing(3)
    got = process.reverse_probs(np.array([[0.5, 0.2, 0.3]]), np.array([3]), 0.4, 0.0)
    np.testing.assert_allclose(got, [[0.5, 0.2, 0.3, 0.0]], atol=1e-15)
    assert process.reveal_probability(0.4, 0.0) == 1.0


@pytest.mark.parametrize("network", ["oracle", "model"])
def test_reverse_steps_of_the_official_codes(network):
    g = golden("processes_discrete")
    x0_probs = g["step_cond"] if network == "oracle" else g["step_model_probs"]
    for row, name in enumerate(g["step_names"]):
        process = Absorbing(4, SCHEDULES[str(name)])
        for pair, (t, s) in enumerate(zip(g["step_t"], g["step_s"])):
            got = process.reverse_probs(x0_probs, g["step_x_t"], t, s)
            np.testing.assert_allclose(got, g[f"step_{network}"][row, pair], atol=1e-9)


def test_uniform_reverse_step_wants_the_leave_one_out_posterior():
    g = golden("processes_discrete")
    # the file is written in sigma = -log alpha; the linear schedule has t = 1 - alpha
    process = Uniform(4, LinearSchedule())
    tokens = np.stack(np.unravel_index(g["uniform_x_t_index"], (4,) * 5), axis=-1)
    for i, (sigma, sigma_s) in enumerate(zip(g["uniform_sigma"], g["uniform_sigma_s"])):
        t, s = -np.expm1(-sigma), -np.expm1(-sigma_s)
        right = process.reverse_probs(g["uniform_posterior_leave_one_out"][i], tokens, t, s)
        np.testing.assert_allclose(right, g["uniform_reverse_plugin_leave_one_out"][i], atol=1e-9)
        wrong = process.reverse_probs(g["uniform_posterior_full"][i], tokens, t, s)
        np.testing.assert_allclose(wrong, g["uniform_reverse_plugin_full_wrong"][i], atol=1e-9)
        assert np.abs(wrong - right).max() > 1e-3


@each_process
def test_reverse_probs_on_device(build):
    process = build(3)
    probs, tokens = np.array([[0.5, 0.2, 0.3]] * 3), np.array([0, 2, 1])
    host = process.reverse_probs(probs, tokens, 0.7, 0.2)
    device = jax.jit(process.reverse_probs)(jnp.asarray(probs), jnp.asarray(tokens), 0.7, 0.2)
    np.testing.assert_allclose(device, host, rtol=1e-5)


# As pytrees


@each_schedule
def test_sweeping_a_schedule_traces_once(name):
    traces = []

    @jax.jit
    def summary(process):
        traces.append(1)
        return process.point(0.5), process.weight(0.5), process.t_of_mask_rate(0.4)

    process = Absorbing(6, SCHEDULES[name])
    leaves, tree = jax.tree.flatten(process)
    assert all(isinstance(v, float) for v in leaves)
    for p in (process, tree.unflatten([0.9 * v for v in leaves])):
        exact = p.point(0.5), p.weight(0.5), p.t_of_mask_rate(0.4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), summary(p), exact)
    assert len(traces) == 1
    # one traced number, all else on the host
    for i, value in enumerate(leaves):

        def one(v, i=i):
            return tree.unflatten([*leaves[:i], v, *leaves[i + 1 :]]).weight(0.5)

        np.testing.assert_allclose(jax.jit(one)(value), process.weight(0.5), rtol=1e-5)


def test_schedules_by_name():
    assert Absorbing(5, "cosine").schedule == CosineSchedule()
    assert Uniform(5, schedule="geometric").schedule == GeometricSchedule()
    assert Absorbing(5).mask_id == 5
    assert Absorbing(5).sampling_range == (1.0, 0.0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Absorbing(1), "vocab_size = 1 must be an int of at least 2"),
        (lambda: Absorbing(8.0), "vocab_size = 8.0"),
        (lambda: Absorbing(8, "cosinus"), "unknown schedule 'cosinus'; did you mean 'cosine'"),
        (lambda: Uniform(8, "nope"), "valid: cosine, cosine_alpha, geometric, linear, polynomial"),
        (lambda: Absorbing(8, t_min=-0.1), "t_min = -0.1"),
        (lambda: Absorbing(8, t_min=1.0), "t_min = 1.0"),
        (lambda: LinearSchedule(eps_start=-0.1), "eps_start = -0.1"),
        (lambda: CosineSchedule(eps_end=0.5), "eps_end = 0.5"),
        (lambda: PolynomialSchedule(power=0.0), "power = 0.0"),
        (lambda: GeometricSchedule(sigma_min=30.0), "sigma_min = 30.0"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "tokens, words",
    [
        (np.zeros((2, 3)), r"integer array \[B, L\]; got shape \(2, 3\), dtype float64"),
        (np.zeros(3, int), r"shape \(3,\)"),
        (np.array([[0, 5]]), r"must lie in 0..4; got 0..5"),
        (np.array([[-1, 2]]), r"got -1..2"),
    ],
)
def test_bad_tokens_are_refused(tokens, words):
    with pytest.raises(ValueError, match=words):
        Absorbing(5).check_tokens(tokens, 4)
