"""DiDi-Instruct: rollouts, the discriminator that learns beside the student, and what is kept as state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax import methods
from diffusion_jax.data import arrays, digits, digits_tokens
from diffusion_jax.methods import Context, critic_of
from diffusion_jax.methods.didi_instruct import two_steps
from diffusion_jax.networks import TokenTransformer
from diffusion_jax.objectives import divergence_instruct as pieces
from diffusion_jax.processes import Absorbing, CosineSchedule
from diffusion_jax.samplers.categorical import build_draw

V, LENGTH = 17, 16
DATA = arrays(
    {
        k: v[..., :LENGTH] if k == "tokens" else v
        for k, v in digits_tokens("train").take(np.arange(64)).items()
    },
    vocab_size=V,
    num_classes=10,
)


def build(**options):
    module = TokenTransformer(vocab_size=V, width=16, depth=2, heads=1, num_classes=10)
    options = {"group": 2, "critic_blocks": 1, "critic_learning_rate": 1e-2, **options}
    return module, methods.didi_instruct(Absorbing(V), module, DATA.spec, **options)


def batch_of(size):
    rows = DATA.take(np.arange(size)) | {"index": np.arange(size, dtype=np.int32)}
    return {k: jnp.asarray(v) for k, v in rows.items()}


@functools.cache
def started(size=8):
    module, method = build()
    batch = batch_of(size)
    leaves, tree = jax.tree.flatten(jax.eval_shape(method.init, jax.random.key(0), batch))
    rng = np.random.default_rng(0)
    params = tree.unflatten(
        [jnp.asarray(0.1 * rng.standard_normal(v.shape), v.dtype) for v in leaves]
    )
    return module, method, batch, params, method.init_state(jax.random.key(1), params, batch)


@quick_jit
def measured(state, key):
    """Metrics of the untrained student, the next state among them."""
    _, method, batch, params, _ = started()
    return method.loss(params, key, batch, Context(state=state, train=False))[1]


@pytest.mark.parametrize("schedule", (None, CosineSchedule()))
def test_a_rollout_passes_an_intermediate_state(schedule):
    """How much is shown at tau, what the tokens are drawn from, and what the log-probability sums up."""
    process = Absorbing(3) if schedule is None else Absorbing(3, schedule)
    num, length, tau = 6000, 4, 0.4
    table = np.array([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]], np.float32)

    def denoise(tokens, t):  # another law at the second call
        first = (tokens == 3).all(axis=1)[:, None, None]
        return jnp.where(first, jnp.log(table[0]), jnp.log(table[1])) * jnp.ones((num, length, 1))

    keys = jax.random.split(jax.random.key(0), num)
    middle, end, first, second, begin = two_steps(
        process, denoise, keys, jnp.full(num, tau), length, build_draw()
    )
    middle, end = np.asarray(middle), np.asarray(end)
    shown = middle != 3
    rate = float(process.mask_rate(tau))
    assert (1 - shown.mean()) == pytest.approx(rate, abs=4 * 0.5 / np.sqrt(num * length))
    np.testing.assert_array_equal(end[shown], middle[shown])
    some = shown.any(axis=1)[:, None]  # where nothing is shown the second law is the first
    late = ~shown & some
    for row, drawn in ((table[0], end[shown]), (table[1], end[late])):
        found = np.bincount(drawn, minlength=3) / len(drawn)
        np.testing.assert_allclose(found, row, atol=4 * 0.5 / np.sqrt(len(drawn)))
    got = pieces.log_prob_of_reveals(first, begin, middle, 3) + pieces.log_prob_of_reveals(
        second, middle, end, 3
    )
    laws = np.where((shown | ~some)[..., None], table[0], table[1])
    expected = np.log(np.take_along_axis(laws, end[..., None], axis=-1)).sum(axis=(1, 2))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_student_begins_as_the_teacher():
    """No divergence at first; parameters are those of a masked model, so that it can begin from one."""
    module, method, batch, _, state = started()
    plain = methods.masked(Absorbing(V), module, DATA.spec)
    shapes = lambda m: jax.tree.map(jnp.shape, jax.eval_shape(m.init, jax.random.key(0), batch))
    assert shapes(plain) == shapes(method)
    metrics = measured(state, jax.random.key(0))
    assert metrics["divergence"] == pytest.approx(0.0, abs=1e-6)
    assert 0.5 * np.log(V) < metrics["entropy"] <= np.log(V) + 1e-5
    assert metrics["reward_spread"] > 0


def test_the_discriminator_learns_and_its_other_blocks_rest():
    """Digits are not the noise of an untrained student; its reward falls while it is told apart."""
    state = started()[-1]
    first, begun = None, state
    for i in range(80):
        metrics = measured(state, jax.random.key(i))
        state = metrics["method_state"]
        first = first or metrics
    assert metrics["critic"] < 0.85 * first["critic"]
    assert metrics["reward"] < first["reward"] - 0.2
    same = lambda a, b: jax.tree.all(jax.tree.map(lambda u, v: bool((u == v).all()), a, b))
    assert same(begun["teacher"], state["teacher"])
    old, new = begun["critic"], state["critic"]
    assert not same(old["head"], new["head"])
    blocks = lambda critic, i: jax.tree.map(lambda v: v[i], critic["backbone"]["blocks"])
    assert same(blocks(old, 0), blocks(new, 0)) and not same(blocks(old, 1), blocks(new, 1))
    rest = lambda critic: {k: v for k, v in critic["backbone"].items() if k != "blocks"}
    assert same(rest(old), rest(new))


def test_log_odds_of_weights_are_those_of_tokens():
    module, _, batch, _, state = started()
    odds = critic_of(module, DATA.spec).log_odds(state["critic"], batch)
    tokens = batch["tokens"].at[:, 6:].set(V)
    plain = odds(tokens, jnp.full(8, 0.5))
    assert plain.shape == tokens.shape and plain.dtype == jnp.float32
    soft = odds(jax.nn.one_hot(tokens, V + 1), jnp.full(8, 0.5))
    np.testing.assert_allclose(soft, plain, rtol=1e-4, atol=1e-5)


def test_times_are_spread_over_the_global_batch_and_no_key_is_used_twice():
    _, method, batch, params, state = started()

    @quick_jit
    def losses(key):
        contexts = [Context(batch_size=n, state=state) for n in (None, 8, 16)]
        return [method.loss(params, key, batch, c)[0] for c in contexts]

    with jax.debug_key_reuse(True):
        alone, whole, shard = losses(jax.random.key(0))
    np.testing.assert_allclose(alone, whole, rtol=1e-5)
    assert abs(shard - whole) > 1e-4 * abs(whole)


@pytest.mark.slow
def test_another_law_of_tau():
    _, _, batch, params, state = started()
    _, method = build(tau_shape=(2.0, 3.0), over_density=True)
    slope, metrics = quick_jit(jax.grad(method.loss, has_aux=True))(
        params, jax.random.key(3), batch, Context(state=state)
    )
    norms = [float(jnp.abs(v).max()) for v in jax.tree.leaves(slope)]
    assert np.isfinite(norms).all() and max(norms) > 0
    assert all(np.isfinite(v).all() for k, v in metrics.items() if k != "method_state")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: build(group=1), "group must be an int of at least 2, got 1"),
        (lambda: build(tau_range=(0.5, 0.2)), r"tau_range must lie inside \(0, 1\)"),
        (lambda: build(smoothing=0.5), r"smoothing must lie in \[0, 0.5\), got 0.5"),
        (lambda: build(entropy=-1.0), "entropy must not be negative, got -1.0"),
        (lambda: build(critic_learning_rate=0.0), "critic_learning_rate must be positive"),
        (
            lambda: methods.didi_instruct(Absorbing(V), started()[0], digits("train").spec),
            "a masked model needs tokens",
        ),
        (
            lambda: started()[1].loss(started()[3], jax.random.key(0), started()[2], Context()),
            "needs its teacher and discriminator: see init_state",
        ),
    ],
)
def test_what_does_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()
