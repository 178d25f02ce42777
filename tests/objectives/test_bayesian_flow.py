"""Losses of Bayesian flows against the authors' numbers, closed forms and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit
from scipy.integrate import quad
from scipy.stats import norm

from diffusion_jax import objectives, oracles
from diffusion_jax.methods.bayesian_flow import BinnedDenoiser, FlowDenoiser
from diffusion_jax.objectives import bayesian_flow as flow
from diffusion_jax.processes import ContinuousBFN, DiscreteBFN

CTS, DIS = golden("solvers_bfn_cts"), golden("solvers_bfn_dis")
PROCESS = ContinuousBFN(float(CTS["min_variance"]))
TOKENS = DiscreteBFN(int(DIS["K"]), float(DIS["max_sqrt_beta"]) ** 2)
MODEL = oracles.SequenceList(DIS["sequences"], DIS["probs"], TOKENS.vocab_size)


def test_continuous_losses_are_the_authors(x64):
    x0, eps, t = CTS["bfn_loss_data"], CTS["bfn_loss_noise"], 1.0 - CTS["bfn_loss_t"]
    mean = PROCESS.corrupt(x0, eps, t)
    np.testing.assert_allclose(mean, CTS["bfn_flow_mean"], rtol=0, atol=1e-12)
    network = lambda x, t: CTS["bfn_loss_net_out"][..., 0]
    x0_hat = FlowDenoiser(network, PROCESS)(jnp.asarray(mean), jnp.asarray(t))
    value = flow.continuous_weight(PROCESS, t) * (x0 - x0_hat) ** 2
    np.testing.assert_allclose(value, CTS["bfn_cts_time_loss"], rtol=1e-10)


def test_the_n_step_continuous_loss_is_the_authors(x64):
    """Their state is drawn at s; head and accuracy are those of the step that s lies in."""
    x0, eps, s = CTS["bfn_loss_data"], CTS["bfn_loss_noise"], CTS["bfn_loss_t"]
    begun = jnp.asarray(1.0 - np.floor(10 * s) / 10)
    mean = jnp.asarray(PROCESS.corrupt(x0, eps, 1.0 - s))
    x0_hat = FlowDenoiser(lambda x, t: CTS["bfn_loss_net_out"][..., 0], PROCESS)(mean, begun)
    value = flow.continuous_weight(PROCESS, begun, 10) * (x0 - x0_hat) ** 2
    np.testing.assert_allclose(value, CTS["bfn_discrete_time_loss_n10"], rtol=1e-10)


def test_discrete_flow_and_loss_are_the_authors(x64):
    tokens, eps, t = DIS["bfn_data"], DIS["bfn_noise"], 1.0 - DIS["bfn_t"]
    z = TOKENS.corrupt(tokens, eps, t[:, 0])
    np.testing.assert_allclose(z, DIS["bfn_logits"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(jax.nn.softmax(z), DIS["bfn_theta"], rtol=0, atol=1e-12)
    error = ((np.eye(5)[tokens] - MODEL(z, None)) ** 2).sum(-1)
    value = flow.discrete_weight(TOKENS, t) * error
    np.testing.assert_allclose(value, DIS["bfn_cts_time_loss"], rtol=1e-9, atol=1e-12)
    alphas = flow.discrete_accuracy(TOKENS, np.arange(1, 11), 10)
    np.testing.assert_allclose(alphas, DIS["bfn_alpha_n10"], rtol=1e-12)


def test_the_continuous_weight_is_the_diffusion_loss_of_vdm():
    """-1/2 d snr / dt with snr = v^-s - 1, differentiated apart; and the library's own "elbo"."""
    t = np.linspace(0.05, 0.95, 7)
    snr = lambda t: 1e-3 ** (t - 1.0) - 1.0
    slope = (snr(t - 1e-6) - snr(t + 1e-6)) / 2e-6
    process = ContinuousBFN(1e-3)
    np.testing.assert_allclose(flow.continuous_weight(process, t), 0.5 * slope, rtol=1e-7)
    elbo = objectives.weightings.elbo(process, jnp.asarray(t))
    np.testing.assert_allclose(flow.continuous_weight(process, t), elbo, rtol=1e-5)


def test_loss_of_gaussian_data_is_its_information():
    """With data N(0, c) and the exact model, 1/2 log(1 + c (1/v - 1)) nats a dimension."""
    c, process = 0.3, ContinuousBFN(1e-3)
    variance = lambda t: c / (1.0 + c * np.expm1(-(1.0 - t) * np.log(1e-3)))
    integral, _ = quad(lambda t: flow.continuous_weight(process, t) * variance(t), 0.0, 1.0)
    exact = 0.5 * np.log1p(c * (1e3 - 1.0))
    assert integral == pytest.approx(exact, rel=1e-8)
    steps = [
        np.mean(
            [flow.continuous_weight(process, 1 - i / n, n) * variance(1 - i / n) for i in range(n)]
        )
        for n in (10, 100, 1000)
    ]
    assert steps[0] > steps[1] > steps[2] > exact  # fewer steps cost more
    assert steps[2] == pytest.approx(exact, rel=0.01)

    def model(x, t):  # c alpha / (c alpha^2 + sigma^2), alpha cancelled
        g = process.alpha(t)[:, None]
        return c * x / (c * g + 1.0 - g)

    x0 = np.sqrt(c) * jax.random.normal(jax.random.key(0), (20_000, 2))
    for n, expected in ((None, exact), (10, steps[0])):
        losses, aux = objectives.continuous_flow_loss(
            process, model, jax.random.key(1), x0, steps=n, reduce="sum"
        )
        error = 4 * float(losses.std()) / np.sqrt(len(losses))
        assert float(losses.mean()) == pytest.approx(2 * expected, abs=error)
        mean, _ = objectives.continuous_flow_loss(process, model, jax.random.key(1), x0, steps=n)
        np.testing.assert_allclose(mean, losses / 2, rtol=1e-5)
    assert set(np.unique(np.round(10 * (1 - np.asarray(aux["t"])), 4))) == set(range(10))


def test_bins_hold_the_normal_law_and_its_tails():
    mean, dev = np.array([-0.9, 0.1, 1.0]), np.array([0.5, 0.02, 0.3])
    probs = np.asarray(flow.bin_probabilities(jnp.asarray(mean), jnp.asarray(dev), 16))
    edges = np.linspace(-1, 1, 17)
    for i in range(3):
        below = norm.cdf(edges, mean[i], dev[i])
        below[0], below[-1] = 0.0, 1.0
        np.testing.assert_allclose(probs[i], np.diff(below), atol=2e-7)
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(flow.bin_centres(16), 0.5 * (edges[1:] + edges[:-1]), atol=1e-7)


def test_the_discretised_step_loss_by_quadrature():
    """E_y [log N(y; x0, 1/a) - log sum_k p_k N(y; c_k, 1/a)], SciPy's densities against 200,000 draws."""
    probs, accuracy, x0 = np.array([0.2, 0.5, 0.3]), 1.7, 2 / 3
    centres = np.array([-2 / 3, 0.0, 2 / 3])
    width = accuracy**-0.5

    def inside(y):
        receiver = (probs * norm.pdf(y, centres, width)).sum()
        return norm.pdf(y, x0, width) * (norm.logpdf(y, x0, width) - np.log(receiver))

    exact, _ = quad(inside, x0 - 10 * width, x0 + 10 * width)
    noise = jax.random.normal(jax.random.key(0), (200_000, 1))
    got = flow.discretised_step_loss(jnp.array([x0]), jnp.asarray(probs)[None], accuracy, noise)
    assert float(got[0]) == pytest.approx(exact, abs=0.01)
    certain = jnp.array([[0.0, 0.0, 1.0]])
    np.testing.assert_allclose(
        flow.discretised_step_loss(jnp.array([x0]), certain, accuracy, noise[:7]), 0.0, atol=1e-5
    )


def test_the_discrete_step_loss_is_the_log_ratio_of_the_densities(x64):
    rng = np.random.default_rng(0)
    probs, noise, a = rng.dirichlet(np.ones(4), (3,)), rng.standard_normal((6, 3, 4)), 0.4
    tokens = np.array([2, 0, 3])
    means = a * (4 * np.eye(4) - 1.0)
    y = means[tokens] + np.sqrt(4 * a) * noise
    log_density = norm.logpdf(y[:, :, None, :], means, np.sqrt(4 * a)).sum(-1)
    sender = np.take_along_axis(log_density, tokens[None, :, None], -1)[..., 0]
    receiver = np.log((probs * np.exp(log_density)).sum(-1))
    got = flow.discrete_step_loss(jnp.asarray(tokens), jnp.asarray(probs), a, jnp.asarray(noise))
    np.testing.assert_allclose(got, (sender - receiver).mean(0), rtol=1e-9)


def test_the_discrete_n_step_loss_tends_to_the_continuous_one():
    """For two classes by quadrature: y_x - y_other is N(2 a, 4 a)."""
    process, p, s = DiscreteBFN(2, beta1=1.3), np.array([0.3, 0.7]), 0.6
    limit = flow.discrete_weight(process, 1 - s) * 2 * (1 - p[0]) ** 2

    def by_steps(n):
        a = flow.discrete_accuracy(process, s * n + 1, n)
        inside = lambda d: -np.log(p[0] + p[1] * np.exp(-d)) * norm.pdf(d, 2 * a, 2 * np.sqrt(a))
        return n * quad(inside, 2 * a - 20 * np.sqrt(a), 2 * a + 20 * np.sqrt(a), limit=200)[0]

    errors = [abs(by_steps(n) - limit) for n in (100, 400, 1600)]
    assert errors[2] < 0.3 * errors[1] < 0.1 * errors[0] + 1e-9 and errors[2] < 2e-3 * limit
    noise = jax.random.normal(jax.random.key(0), (100_000, 1, 2))
    a = flow.discrete_accuracy(process, s * 5 + 1, 5)
    drawn = 5 * flow.discrete_step_loss(jnp.array([0]), jnp.asarray(p)[None], a, noise)
    assert float(drawn[0]) == pytest.approx(by_steps(5), abs=0.03)


@pytest.mark.slow
def test_the_bound_of_the_exact_model_is_the_entropy_of_the_data():
    """The loss is the information of z about the sequence; with much accuracy nothing is left over."""
    process, count = DiscreteBFN(5, beta1=8.0), 40_000
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(DIS["sequences"][rng.choice(7, count, p=DIS["probs"])])
    losses, aux = objectives.discrete_flow_loss(
        process, MODEL, jax.random.key(0), tokens, reduce="sum"
    )
    last = objectives.discrete_reconstruction(
        process, MODEL, jax.random.key(1), tokens, reduce="sum"
    )
    entropy = -(DIS["probs"] * np.log(DIS["probs"])).sum()
    error = 4 * float(losses.std()) / np.sqrt(count)
    assert float(last.mean()) < 0.01
    assert float((losses + last).mean()) == pytest.approx(entropy, abs=error)
    assert error < 0.1 and (np.asarray(aux["cross_entropy"]) >= -1e-5).all()
    few, _ = objectives.discrete_flow_loss(
        process, MODEL, jax.random.key(2), tokens[:4000], reduce="sum", steps=5
    )
    assert float(few.mean()) > entropy  # few steps cost more
    less = DiscreteBFN(5, beta1=0.5)  # at low accuracy the rest is in the last term
    part = objectives.discrete_flow_loss(less, MODEL, jax.random.key(0), tokens, reduce="sum")[0]
    rest = objectives.discrete_reconstruction(less, MODEL, jax.random.key(1), tokens, reduce="sum")
    assert float(rest.mean()) > 0.05
    assert float((part + rest).mean()) > entropy - 4 * float(part.std()) / np.sqrt(count)


def test_heads_at_the_ends_of_time():
    """Nothing known: 0, whatever the network says, with finite gradients; else clipped to [-1, 1]."""
    process = ContinuousBFN(1e-3)
    wild = lambda x, t: 30.0 * jnp.ones_like(x)
    denoise = FlowDenoiser(wild, process)
    x, t = jnp.full((3, 2), 0.4), jnp.array([1.0, 0.99, 0.0])
    got = denoise(x, t)
    np.testing.assert_array_equal(got[0], 0.0)
    np.testing.assert_array_equal(got[1], -1.0)
    assert np.isfinite(jax.grad(lambda x: denoise(x, t).sum())(x)).all()
    free = FlowDenoiser(wild, process, clip=False)(x, t)
    g = 1 - 1e-3**0.01
    np.testing.assert_allclose(free[1], 0.4 / g - np.sqrt((1 - g) / g) * 30, rtol=1e-4)

    two = lambda x, t: jnp.concatenate([0.3 * x, 0.1 + 0 * x], -1)
    binned = BinnedDenoiser(two, process, 9)
    probs = binned.probabilities(x[..., None], process.point(t))
    assert probs.shape == (3, 2, 1, 9)
    np.testing.assert_allclose(probs[0, 0, 0], flow.bin_probabilities(0.0, 1.0, 9), atol=1e-6)
    for row, time in ((1, 0.99), (2, 0.0)):
        g = 1 - 1e-3 ** (1 - time)
        u = np.sqrt((1 - g) / g)
        mean, dev = np.clip(0.4 / g - u * 0.12, -1, 1), u * np.exp(0.1)
        expected = np.diff(np.r_[0, norm.cdf(np.linspace(-1, 1, 10)[1:-1], mean, dev), 1])
        np.testing.assert_allclose(probs[row, 0, 0], expected, atol=2e-5)
    centres = np.linspace(-8 / 9, 8 / 9, 9)
    np.testing.assert_allclose(binned(x[..., None], t), (probs * centres).sum(-1), atol=1e-6)
    with pytest.raises(ValueError, match="an output of 2 channels"):
        BinnedDenoiser(wild, process, 9)(x[..., None], t)


def test_discretised_losses_of_a_certain_network():
    """All mass on the right bin: no loss by steps; in the limit the squared distance alone counts."""
    process = ContinuousBFN(1e-3)

    class Certain:
        def __init__(self, level):
            self.level = level

        def probabilities(self, x, point):
            return jax.nn.one_hot(jnp.full(x.shape, self.level), 5)

        def __call__(self, x, t):
            return jnp.full(x.shape, -0.8 + 0.4 * self.level)

    x0 = jnp.full((64, 3), 0.4)
    for level, distance in ((3, 0.0), (4, 0.4)):
        given = process, Certain(level), jax.random.key(0), x0
        any_number, six = (objectives.continuous_flow_loss(*given, steps=n)[0] for n in (None, 6))
        weight = 0.5 * (1e3 - 1.0)  # the integral of C v^-s
        if distance:
            np.testing.assert_allclose(any_number.mean(), weight * distance**2, rtol=0.1)
        else:
            np.testing.assert_allclose(any_number, 0.0, atol=1e-4)
            np.testing.assert_allclose(six, 0.0, atol=1e-3)
        kept = objectives.discretised_reconstruction(*given, reduce="sum")
        assert (np.asarray(kept) < 1e-5).all() if level == 3 else (np.asarray(kept) > 100).all()


def test_an_example_of_any_shard_has_the_loss_it_has_in_the_batch():
    tokens = jnp.asarray(DIS["bfn_data"][:8])
    key = jax.random.key(3)
    order = jnp.array([6, 1, 3])
    options = {"steps": 4, "draws": 2}

    @quick_jit
    def losses(tokens, index):
        return objectives.discrete_flow_loss(
            TOKENS, MODEL, key, tokens, index=index, total=8, **options
        )[0]

    whole, part = losses(tokens, jnp.arange(8)), losses(tokens[order], order)
    np.testing.assert_allclose(part, whole[order], rtol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda f: f(steps=0), "steps must be a positive int or None, got 0"),
        (lambda f: f(reduce="all"), "reduce must be 'mean' or 'sum', got 'all'"),
        (lambda f: f(tokens=jnp.full((2, 3), 5)), "must lie in 0..4"),
        (lambda f: f(tokens=jnp.ones((2, 3))), "integer array"),
        (lambda f: f(denoise=lambda z, t: z[..., :2]), "denoise returned shape"),
    ),
)
def test_errors_name_the_value(call, message):
    def run(tokens=None, denoise=MODEL, **options):
        tokens = jnp.zeros((2, 3), int) if tokens is None else tokens
        return objectives.discrete_flow_loss(TOKENS, denoise, jax.random.key(0), tokens, **options)

    with pytest.raises(ValueError, match=message):
        call(run)
