"""VDM's own: learned schedules, what their loss differentiates, and a denoiser that knows noise levels only."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax import builder, judge, methods
from diffusion_jax.data import digits, digits_tokens
from diffusion_jax.methods import Context
from diffusion_jax.methods.base import OBJECTIVE
from diffusion_jax.methods.vdm import bind_log_snr, build_log_snr
from diffusion_jax.networks.features import value_features
from diffusion_jax.networks.log_snr import MonotoneLogSNR, ScalarLogSNR
from diffusion_jax.objectives import variational_bound, variational_terms
from diffusion_jax.objectives.variational import level_values, variational_draws
from diffusion_jax.processes import VP, LinearLogSNR

LOW, HIGH = -7.8, 4.0
PROCESS = LinearLogSNR(LOW, HIGH)
DIGITS = digits("train")
BATCH = DIGITS.take(np.arange(16)) | {"index": np.arange(16, dtype=np.int32)}
X0 = jnp.asarray(BATCH["image"])


@dataclasses.dataclass(frozen=True)
class Curve:
    """`(a s + b) x`: what a network might make of the noise level s."""

    num_classes: int | None = None

    def init(self, key, x, t, *, label=None, source=None):
        return {"params": {"a": jnp.float32(0.4), "b": jnp.float32(-0.7)}}

    def apply(self, variables, x, t, *, label=None, source=None, train=False, rngs=None):
        p = variables["params"]
        return (p["a"] * t + p["b"]).reshape(-1, 1, 1, 1) * x


def vdm(schedule="fixed", process=PROCESS, **options):
    options = {"levels": 17, "nfe": 3, "schedule": schedule, **options}
    return methods.vdm(process, Curve(), DIGITS.spec, **options)


def learned(**options):
    """A method with a small monotone schedule away from its start, and its parameters."""
    made = {"features": 8, "hidden_scale": 2.0, **options.pop("schedule_options", {})}
    method = vdm("monotone", schedule_options=made, **options)
    params = method.init(jax.random.key(0), BATCH)
    gamma = dict(params["log_snr"])
    gamma["output_weight"] = jnp.linspace(-3.0, 4.0, 8)
    return method, params | {"log_snr": gamma}, build_log_snr(PROCESS, "monotone", **made)


# Schedules


def monotone_by_hand(p, t, bias):
    """l1(t) + l3(2 sigmoid(l2(2 t - 1)) - 1) / n with absolute weights."""
    hidden = (2 * t[:, None] - 1) * np.abs(p["hidden_weight"]) + p["hidden_bias"]
    squashed = 2 / (1 + np.exp(-hidden)) - 1
    return np.abs(p["line_slope"]) * t + bias + squashed @ np.abs(p["output_weight"]) / 8


@pytest.mark.parametrize("ends", ["fixed", "learned", "free"])
def test_the_monotone_network(ends):
    _, params, module = learned(schedule_options={"ends": ends})
    p = {k: np.asarray(v, float) for k, v in params["log_snr"].items()}
    t = np.linspace(0, 1, 41)
    if ends == "learned":
        p |= {"first_gamma": -7.0, "last_gamma": 3.0}
    given = {k: jnp.asarray(v, jnp.float32) for k, v in p.items()}
    got = module.apply({"params": given}, jnp.asarray(t, jnp.float32))
    h = monotone_by_hand(p, t, p.get("line_bias", 0.0))
    low, high = {"fixed": (LOW, HIGH), "learned": (-7.0, 3.0), "free": (h[0], h[-1])}[ends]
    np.testing.assert_allclose(got, low + (high - low) * (h - h[0]) / (h[-1] - h[0]), atol=2e-5)
    assert (np.diff(got) > 0).all()
    line = np.linspace(LOW, HIGH, 41)
    assert np.abs(np.asarray(got) - line).max() > 0.3
    # it starts as the line that the process is
    fresh = MonotoneLogSNR(LOW, HIGH, ends=ends)
    start = fresh.init(jax.random.key(1), jnp.zeros(1))
    np.testing.assert_allclose(fresh.apply(start, jnp.asarray(t, jnp.float32)), line, atol=0.1)


def test_the_scalar_schedule():
    module = ScalarLogSNR(LOW, HIGH)
    start = module.init(jax.random.key(0), jnp.zeros(1))
    t = jnp.linspace(0.0, 1.0, 5)
    np.testing.assert_allclose(module.apply(start, t), np.linspace(LOW, HIGH, 5), rtol=1e-6)
    moved = {"params": {"b": -6.0, "w": -2.0}}
    np.testing.assert_allclose(module.apply(moved, t), -6.0 + 2.0 * t, rtol=1e-6)


# Loss and bound


@pytest.mark.parametrize("steps", [0, 5])
def test_loss_is_the_bound_in_bits(steps):
    """And the bound is the objective of the network with the process, in nats."""
    method = vdm(steps=steps)
    params, key = method.init(jax.random.key(0), BATCH), jax.random.key(4)
    own = jax.random.fold_in(key, OBJECTIVE)

    def denoise(x, t):
        """eps_hat = x + F(x, t), read as x0_hat."""
        alpha, sigma = (jnp.reshape(PROCESS.point(t)[n], (-1, 1, 1, 1)) for n in ("alpha", "sigma"))
        factor = 1.0 + (0.4 * jnp.reshape(t, (-1, 1, 1, 1)) - 0.7)
        return (x - sigma * factor * x) / alpha

    @quick_jit
    def run(params):
        value, metrics = method.loss(params, key, BATCH, Context())
        terms = variational_bound(PROCESS.gamma, denoise, own, X0, levels=17, steps=steps)
        return value, metrics, method.bound(params, own, BATCH), terms

    value, metrics, nats, terms = run(params)
    np.testing.assert_allclose(nats, terms.total, rtol=1e-4)
    assert value == pytest.approx(float(nats.mean()) / (64 * np.log(2)), rel=1e-5)
    parts = [metrics[f"bits_{n}"] for n in ("reconstruction", "prior", "diffusion")]
    assert value == pytest.approx(float(sum(parts)), rel=1e-5) and min(parts) > 0
    assert nats.shape == (16,)


def test_a_learned_schedule_follows_the_bound():
    """Ends that are learned move the bound; with ends held, the loss still differentiates the shape."""
    method, params, _ = learned(schedule_options={"ends": "learned"})
    gradient = quick_jit(jax.grad(lambda p: method.loss(p, jax.random.key(1), BATCH, Context())[0]))
    slopes = gradient(params)["log_snr"]
    assert set(slopes) >= {"first_gamma", "last_gamma", "output_weight"}
    assert all(np.abs(v).max() > 1e-6 for v in jax.tree.leaves(slopes))


@pytest.mark.parametrize("ends", ["fixed", "learned"])
def test_a_schedule_trained_for_low_variance(ends):
    """The value and the network's gradient are those of the bound; the shape's is of the second moment."""
    options = {"schedule_options": {"ends": ends}}
    plain, params, module = learned(**options)
    method, _, _ = learned(schedule_loss="variance", **options)
    key = jax.random.key(2)
    draws = variational_draws(jax.random.fold_in(key, OBJECTIVE), X0, BATCH["index"], 16)

    def second_moment(log_snr):
        gamma = lambda t: module.apply({"params": log_snr}, t)
        denoise = plain.denoiser(params, BATCH)
        terms = variational_terms(gamma, denoise, X0, *draws, levels=17)
        return jnp.square(terms.diffusion / (64 * np.log(2))).mean()

    @quick_jit
    def run(params):
        both = [
            jax.value_and_grad(lambda p, m=m: m.loss(p, key, BATCH, Context())[0])(params)
            for m in (plain, method)
        ]
        return both, jax.grad(second_moment)(params["log_snr"])

    ((value, slopes), (other, own)), expected = run(params)
    assert other == pytest.approx(float(value), rel=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
    jax.tree.map(close, own["network"], slopes["network"])
    for name in own["log_snr"]:
        source = slopes["log_snr"] if name in ("first_gamma", "last_gamma") else expected
        close(own["log_snr"][name], source[name])


def test_descent_on_the_second_moment_lowers_it_and_keeps_the_bound():
    method, params, module = learned(schedule_loss="variance")
    gradient = quick_jit(jax.grad(lambda p, k: method.loss(p, k, BATCH, Context())[0]))

    @quick_jit
    def figures(log_snr):
        def one(key):
            draws = variational_draws(key, X0, BATCH["index"], 16)
            gamma = lambda t: module.apply({"params": log_snr}, t)
            denoise = method.denoiser(params, BATCH)
            return variational_terms(gamma, denoise, X0, *draws, levels=17).diffusion / 64

        draws = jax.lax.map(one, jax.random.split(jax.random.key(9), 200))
        return draws.mean(), draws.std()

    log_snr = params["log_snr"]
    for i in range(60):
        slopes = gradient(params | {"log_snr": log_snr}, jax.random.key(i))["log_snr"]
        norm = np.sqrt(sum(np.square(v).sum() for v in jax.tree.leaves(slopes)))
        log_snr = jax.tree.map(lambda v, s, norm=norm: v - 0.1 * s / norm, log_snr, slopes)
    (mean, std), (new_mean, new_std) = figures(params["log_snr"]), figures(log_snr)
    assert new_std < 0.95 * std
    assert new_mean == pytest.approx(float(mean), rel=0.03)


# Denoiser and samples


def test_the_denoiser_knows_the_noise_level_and_no_clock():
    """At equal alpha and sigma another process gives the same prediction: its samplers fit."""
    method = vdm()
    denoise = method.denoiser(method.init(jax.random.key(0), BATCH), BATCH)
    vp = VP()
    for t in (0.2, 0.6, 0.9):
        point = vp.point(vp.t_of_lam(PROCESS.lam(t)))
        eps_hat = (1.0 + 0.4 * t - 0.7) * X0
        expected = (X0 - point["sigma"] * eps_hat) / point["alpha"]
        for got in (
            denoise(X0, jnp.float32(t)),
            denoise.at(X0, {k: np.float32(v) for k, v in point.items()}),
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_learned_schedule_keeps_its_samplers():
    """The same network parameters sample alike, whatever was learned between the ends."""
    fixed = vdm()
    method, params, _ = learned()
    batch = {"index": np.arange(4, dtype=np.int32)}
    ours = method.sample(params, jax.random.key(3), batch)
    theirs = fixed.sample(params["network"], jax.random.key(3), batch)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert method.process == PROCESS


def test_beyond_a_learned_end_the_network_sees_the_end():
    method = vdm("scalar")
    params = method.init(jax.random.key(0), BATCH)
    params["log_snr"] = {"b": jnp.float32(-6.0), "w": jnp.float32(8.0)}  # -6 .. 2 in -7.8 .. 4
    gamma = bind_log_snr(PROCESS, build_log_snr(PROCESS, "scalar"), params)
    np.testing.assert_allclose(gamma(jnp.array([0.0, 1.0])), [-6.0, 2.0])
    denoise = method.denoiser(params, BATCH)
    for t, seen in ((0.0, -6.0), (0.5, None), (1.0, 2.0)):
        s = t if seen is None else (seen - LOW) / (HIGH - LOW)
        point = PROCESS.point(t)
        eps_hat = (1.0 + 0.4 * s - 0.7) * X0
        expected = (X0 - point["sigma"] * eps_hat) / point["alpha"]
        np.testing.assert_allclose(denoise(X0, jnp.float32(t)), expected, rtol=1e-3, atol=1e-4)


def test_samples_are_levels():
    method, plain = vdm(), vdm(round_samples=False)
    params = method.init(jax.random.key(0), BATCH)
    batch, key = {"index": np.arange(5, dtype=np.int32)}, jax.random.key(1)
    x, path = method.sample(params, key, batch, trajectory=True)
    raw = np.asarray(plain.sample(params, key, batch))
    np.testing.assert_allclose(path[-1], raw, atol=1e-6)
    values = level_values(17)
    nearest = values[np.abs(raw[..., None] - values).argmin(-1)]
    np.testing.assert_allclose(x, nearest, atol=1e-6)
    np.testing.assert_array_equal(method.sample(params, key, batch), x)


def test_value_features():
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 3, 3, 2)), jnp.float32)
    got = value_features(x, (2, 3))
    angle = 2 * np.pi * np.asarray(x, float)
    waves = [f(2**n * angle) for n in (2, 3) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(got, np.concatenate([x, *waves], -1), atol=2e-5)
    assert value_features(x, ()) is x
    # 17 levels: the step from one to the next is a half and a whole turn
    levels = jnp.asarray(level_values(17), jnp.float32)[:, None]
    np.testing.assert_allclose(value_features(levels, (3,))[:, 2], 1.0, atol=1e-4)
    np.testing.assert_allclose(
        value_features(levels, (2,))[:, 2], (-1.0) ** np.arange(17), atol=1e-4
    )


# Judging


def test_a_run_is_judged_by_its_bound():
    method = vdm()
    params = method.init(jax.random.key(0), BATCH)
    run = types.SimpleNamespace(method=method, params=params, spec=DIGITS.spec)
    nats, error = judge.bound(run, BATCH, 8, 0, size=9)
    one = quick_jit(method.bound)
    draws = [float(one(params, jax.random.key(i), BATCH).mean()) / 64 for i in range(60)]
    assert abs(nats - np.mean(draws)) < 4 * np.hypot(error, np.std(draws) / np.sqrt(60))
    assert 0 < error < 0.5 * nats


def test_the_configs_build():
    from configs.digits import vdm as small
    from configs.vdm import cifar10

    built = builder.build_method(small.get_config(), DIGITS.spec)
    assert built.process == LinearLogSNR(-7.8, 5.0) and built.method.bound is not None
    shapes = jax.eval_shape(built.method.init, jax.random.key(0), DIGITS.spec.zeros(2))
    assert sum(np.prod(v.shape) for v in jax.tree.leaves(shapes)) < 1e6
    spec = dataclasses.replace(
        DIGITS.spec,
        elements={
            k: v._replace(shape=(32, 32, 3)) if k == "image" else v
            for k, v in DIGITS.spec.elements.items()
        },
    )
    built = builder.build_method(cifar10.get_config(), spec)
    assert built.process == LinearLogSNR() and built.method.default_sampler.nfe == 1000


def test_mistakes_are_named():
    def refused(words, **options):
        with pytest.raises(ValueError, match=words):
            vdm(**options)

    refused("needs the process linear_log_snr, got VP", process=VP())
    refused("schedule must be one of fixed, .*; got 'line'", schedule="line")
    refused("schedule_loss must be one of bound, variance; got 'elbo'", schedule_loss="elbo")
    refused("'variance' needs schedule 'monotone'", schedule_loss="variance")
    refused(
        "takes no options, got \\['ends'\\]", schedule="scalar", schedule_options={"ends": "free"}
    )
    refused("schedule 'monotone': .*'width'", schedule="monotone", schedule_options={"width": 3})
    refused("levels must be an int", levels=1)
    free = {"schedule": "monotone", "schedule_options": {"ends": "free"}}
    refused("ends 'fixed' or 'learned'", schedule_loss="variance", **free)
    with pytest.raises(ValueError, match="got 'tokens'"):
        methods.vdm(PROCESS, Curve(), digits_tokens().spec)
    with pytest.raises(ValueError, match="out_channels = 1, got None"):
        module = types.SimpleNamespace(out_channels=None)
        methods.vdm(PROCESS, module, DIGITS.spec, levels=17, fourier=(2,))
    module = MonotoneLogSNR(ends="open")
    with pytest.raises(ValueError, match=r"ends must be one of .*free.*; got 'open'"):
        module.init(jax.random.key(0), jnp.zeros(1))
