"""Guidance by the prompt: enumerated probabilities, both calls as one, every sampler."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax import guidance, oracles, samplers
from diffusion_jax.processes import Absorbing

V, L = 4, 5
STORED = golden("discrete_prompts")
EXACT = oracles.token_table(golden("discrete_table")["p"])
WEIGHTS = {0.5: "ucfg_w0.5", 1.0: "ucfg_w1.0", 2.0: "ucfg_w2.0"}
PREFIX = np.arange(L) < STORED["ucfg_prompt_len"]


def table(x, t, output="model_logp"):
    """The crooked network of the goldens at the stored states; 0 and -inf at unmasked positions."""
    same = (jnp.asarray(x)[:, None] == STORED["states"]).all(axis=2)
    return jnp.asarray(STORED[output])[jnp.argmax(same, axis=1)]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("output", ["model_logp", "model_logits"])
def test_the_enumerated_probabilities(weight, output):
    """Raw logits, with shifts of their own at every state, give the same at masked positions."""
    x = STORED["ucfg_x"]
    where = x == V if output == "model_logits" else np.full(x.shape, True)
    with jax.enable_x64(True):
        network = functools.partial(table, output=output)
        denoise = guidance.guide_prompt(network, PREFIX, V, weight)
        got = np.asarray(jax.nn.softmax(denoise(jnp.asarray(x), 0.5)))
    np.testing.assert_allclose(got[where], STORED[WEIGHTS[weight]][where], rtol=0, atol=1e-12)


def test_prompts_at_any_positions():
    """Each sequence has its own prompt; Bayes' rule on the exact table says what hiding it means."""
    rng = np.random.default_rng(0)
    joint = rng.dirichlet(np.ones(V**3)).reshape((V,) * 3)
    exact = oracles.token_table(joint)
    x = jnp.array([[2, V, 1], [V, 3, V]])
    prompt = jnp.array([[False, False, True], [False, True, False]])
    got = jax.nn.softmax(guidance.guide_prompt(exact, prompt, V, 1.5)(x, 0.3))
    told = [joint[2, :, 1], joint[:, 3, :].sum(1), joint[:, 3, :].sum(0)]
    hidden = [joint[2].sum(1), joint.sum((1, 2)), joint.sum((0, 1))]
    places = [(0, 1), (1, 0), (1, 2)]
    for c, u, (row, column) in zip(told, hidden, places, strict=True):
        tilted = (c / c.sum()) ** 2.5 / (u / u.sum()) ** 1.5
        np.testing.assert_allclose(got[row, column], tilted / tilted.sum(), rtol=2e-5)


def test_weight_zero_is_the_plain_model_and_minus_one_forgets_the_prompt():
    x = jnp.asarray(STORED["ucfg_x"])
    plain = guidance.guide_prompt(table, PREFIX, V)(x, 0.5)
    np.testing.assert_array_equal(plain, table(x, 0.5).astype(plain.dtype))
    forgets = guidance.guide_prompt(table, PREFIX, V, -1.0)(x, 0.5)
    without = table(jnp.where(PREFIX, V, x), 0.5)
    masked = np.asarray(x) == V
    np.testing.assert_allclose(forgets[masked], without[masked], rtol=1e-5)


def test_one_weight_for_each_sequence():
    x, weights = jnp.asarray(STORED["ucfg_x"][:3]), jnp.array([0.5, 1.0, 2.0])
    each = guidance.guide_prompt(table, PREFIX, V, weights)(x, 0.5)
    for i, name in enumerate(WEIGHTS.values()):
        np.testing.assert_allclose(jax.nn.softmax(each[i]), STORED[name][i], atol=2e-6)


def test_what_the_prompt_excludes_is_not_lifted():
    """The unconditional model excludes token 2 louder than the conditional one: w = 3 would pick it."""
    told, free = np.array([0.6, 0.39, 0.01]), np.array([0.7, 0.3 - 1e-6, 1e-6])
    network = lambda x, t: jnp.log(jnp.where((x == 0).any(1)[:, None, None], told, free))
    x, prompt = jnp.array([[0, 3]]), np.array([True, False])
    guided = guidance.guide_prompt(network, prompt, 3, 3.0)(x, 0.5)
    assert guided[0, 0].argmax() == 2
    kept = guidance.guide_prompt(network, prompt, 3, 3.0, plausible=0.05)(x, 0.5)
    assert kept[0, 0].argmax() == 1 and kept[0, 0, 2] == -np.inf
    np.testing.assert_array_equal(kept[..., :2], guided[..., :2])
    np.testing.assert_array_equal(
        guidance.guide_prompt(network, prompt, 3, 3.0, plausible=0.01)(x, 0.5), guided
    )


class Recorder:
    """Counts sequences and keeps the points that reach the network; with a cache, the calls too."""

    def __init__(self):
        self.rows, self.points = [], []

    def at(self, x, point, cache=None):
        self.rows.append(x.shape[0])
        self.points.append(point)
        logits = jnp.zeros((*x.shape, V))
        return logits if cache is None else (logits, cache + 1)

    def __call__(self, x, t):
        return self.at(x, {"t": t})


def test_times_of_each_sequence_and_caches_reach_the_inner_model():
    inner, x = Recorder(), jnp.asarray(STORED["ucfg_x"][:2])
    guided = guidance.guide_prompt(inner, PREFIX, V, 1.0)
    t = jnp.array([0.25, 0.75])
    guided.at(x, {"t": t, "alpha": 0.5})
    np.testing.assert_array_equal(inner.points[0]["t"], [0.25, 0.75, 0.25, 0.75])
    assert inner.points[0]["alpha"] == 0.5 and inner.rows == [4]
    logits, cache = guided.at(x, {"t": 0.5}, jnp.zeros(4))
    np.testing.assert_array_equal(cache, np.ones(4))
    assert logits.shape == (2, L, V)


@pytest.mark.parametrize("name", ["masked_ancestral", "first_hitting"])
def test_a_sampler_calls_the_network_on_twice_the_sequences(name):
    process, inner = Absorbing(V), Recorder()
    make = {
        "masked_ancestral": lambda: samplers.masked_ancestral(process, 3, length=L),
        "first_hitting": lambda: samplers.first_hitting(process, L),
    }
    sampler = make[name]()
    start = jnp.full((2, L), V).at[:, 1].set(3)
    denoise = guidance.guide_prompt(inner, start != V, V, 0.8)
    with jax.disable_jit():
        drawn = samplers.sample(sampler, denoise, jax.random.key(0), start)
        plain = Recorder()
        np.testing.assert_array_equal(
            samplers.sample(sampler, plain, jax.random.key(0), start), drawn
        )
    assert set(inner.rows) == {4} and len(inner.rows) == len(plain.rows) <= sampler.nfe
    assert sum(inner.rows) == denoise.calls * sum(plain.rows)
    assert (drawn[:, 1] == 3).all() and (drawn < V).all()


def test_a_guided_sampler_follows_the_tilted_law():
    """One free position: the law is the tilted one, within four standard errors."""
    exact = oracles.token_table(np.array([[0.30, 0.10], [0.15, 0.45]]))
    start = jnp.full((4000, 2), 2).at[:, 0].set(0)
    denoise = guidance.guide_prompt(exact, start != 2, 2, 1.0)
    drawn = samplers.sample(
        samplers.masked_ancestral(Absorbing(2), 2, length=2), denoise, jax.random.key(1), start
    )
    tilted = (np.array([0.30, 0.10]) / 0.4) ** 2 / np.array([0.45, 0.55])
    expected = tilted[1] / tilted.sum()
    error = np.sqrt(expected * (1 - expected) / 4000)
    assert abs(np.mean(drawn[:, 1] == 1) - expected) < 4 * error


def test_sweeping_the_weight_does_not_trace_again():
    traces = []

    def inner(x, t):
        traces.append(1)
        return EXACT(x, t)

    inner = jax.tree_util.Partial(inner)
    sampler = samplers.masked_ancestral(Absorbing(V), 3, length=L)
    start = jnp.full((2, L), V)
    for weight in (0.0, 0.4, 1.6):
        denoise = guidance.guide_prompt(inner, start != V, V, weight)
        samplers.sample(sampler, denoise, jax.random.key(0), start)
    assert len(traces) <= 2  # one trace of the loop's body may be abstract


@pytest.mark.parametrize(
    "prompt", [np.zeros((2, L), int), np.zeros(L + 1, bool), np.zeros((3, L), bool)]
)
def test_prompts_that_do_not_fit(prompt):
    with pytest.raises(ValueError, match="prompt must be bool"):
        guidance.guide_prompt(table, prompt, V, 1.0)(jnp.full((2, L), V), 0.5)


def test_the_order_of_prompt_positions_does_not_matter():
    """Permuting positions of table and prompt permutes the guided logits."""
    joint = np.random.default_rng(2).dirichlet(np.ones(V**3)).reshape((V,) * 3)
    x = jnp.array([[2, V, 1]])
    prompt = np.array([True, False, False])
    for order in itertools.permutations(range(3)):
        turned = oracles.token_table(joint.transpose(order))
        got = guidance.guide_prompt(turned, prompt[list(order)], V, 0.7)(x[:, list(order)], 0.1)
        plain = guidance.guide_prompt(oracles.token_table(joint), prompt, V, 0.7)(x, 0.1)
        np.testing.assert_allclose(got, plain[:, list(order)], rtol=1e-4, atol=1e-5)
