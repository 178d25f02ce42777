"""Drawing tokens by inverse distribution function, filters, and the float32 Gumbel artefact beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax.denoisers import LogitRows
from diffusion_jax.processes import Absorbing
from diffusion_jax.samplers import masked_ancestral, sample
from diffusion_jax.samplers.categorical import (
    build_draw,
    draw_tokens,
    draw_where,
    filtered_log_probs,
    inverse_cdf,
)
from diffusion_jax.samplers.gumbel import (
    draw_joint,
    gumbel_max,
    gumbel_noise,
    quantised_law,
    truncated_law,
    unigram_law,
)


def entropy(law):
    law = law[law > 0] / law.sum()
    return -(law * np.log(law)).sum()


@pytest.mark.parametrize("size", (3, 64, 65, 1000))
def test_shares_of_an_even_grid_of_uniforms(size):
    """Of n uniforms at equal distances each category gets n p, up to the two at its ends; none of weight 0."""
    rng, n = np.random.default_rng(size), 200_000
    weights = rng.random(size) ** 4
    weights[rng.random(size) < 0.3] = 0.0
    weights[0] = weights[-1] = 0.0
    weights[1] = 1.0
    uniform = jnp.asarray((np.arange(n) + 0.5) / n, jnp.float32)
    draw = jax.jit(lambda u: inverse_cdf(jnp.asarray(weights, jnp.float32), u))
    drawn = np.asarray(jax.lax.map(draw, uniform, batch_size=10_000))
    counts = np.bincount(drawn, minlength=size)
    assert (counts[weights == 0] == 0).all()
    assert np.abs(counts - n * weights / weights.sum()).max() <= 2.0
    assert (np.diff(drawn) >= 0).all()


def test_the_ends_of_the_uniform():
    """0 and the largest number below 1 give the first and the last category that has any weight."""
    ends = jnp.asarray([0.0, np.nextafter(np.float32(1), np.float32(0))], jnp.float32)
    for size in (5, 50_257):
        weights = np.zeros(size, np.float32)
        weights[[2, size - 2]] = 1e-3, 1e-6
        assert inverse_cdf(jnp.asarray(weights)[None], ends[:1])[0] == 2
        weights[[2, size - 2]] = 1e-6, 1e-3
        assert inverse_cdf(jnp.asarray(weights)[None], ends[1:])[0] == size - 2


def test_the_tail_of_a_large_vocabulary_is_there():
    """50,257 tokens: every block of 500 tokens by rank has its mass, down to 1e-6 a token."""
    weights = 1.0 / (np.arange(50_257) + 3.7) ** 1.1
    probs, n = weights / weights.sum(), 100_000
    logits = jnp.asarray(np.log(weights), jnp.float32)[None]
    uniform = jnp.asarray((np.random.default_rng(0).permutation(n) + 0.5) / n, jnp.float32)
    drawn = jax.lax.map(
        lambda u: draw_tokens(u[None], logits, build_draw())[0], uniform, batch_size=200
    )
    counts = np.bincount(np.asarray(drawn) // 500, minlength=101)
    expected = n * np.add.reduceat(probs, np.arange(0, 50_257, 500))
    assert np.abs(counts - expected).max() < 3.0
    assert expected[50] < 150


LOGITS = np.log([0.0625, 0.375, 0.125, 0.25, 0.1875])  # sorted: 1, 3, 4, 2, 0; sums are exact
KEPT = {
    ("cover", 0.625): [1, 3],
    ("crossing", 0.625): [1, 3, 4],
    ("below", 0.625): [1, 3],
    ("cover", 0.7): [1, 3, 4],
    ("crossing", 0.7): [1, 3, 4],
    ("below", 0.7): [1, 3],
    ("cover", 0.3): [1],
    ("crossing", 0.3): [1],
    ("below", 0.3): [1],
    ("cover", 1.0): [0, 1, 2, 3, 4],
}


def restricted(kept):
    law = np.zeros(5)
    law[kept] = np.exp(LOGITS[kept]) / np.exp(LOGITS[kept]).sum()
    return law


@pytest.mark.parametrize(("rule", "mass"), KEPT)
def test_nucleus_rules(rule, mass):
    """The three definitions of the literature, at the crossing itself and off it."""
    # in float32 the sums of these probabilities may be off by a grain: ask a grain off the crossing
    nudge = {"cover": -1e-6, "crossing": 1e-6, "below": 1e-6}[rule] if mass == 0.625 else 0.0
    draw = build_draw(nucleus=mass + nudge, nucleus_rule=rule)
    found = np.exp(filtered_log_probs(jnp.asarray(LOGITS, jnp.float32), draw))
    np.testing.assert_allclose(found, restricted(KEPT[rule, mass]), atol=1e-6)


def test_temperature_top_k_and_their_order():
    """Temperature first, then top-k, then the nucleus of what the temperature left."""
    logits = jnp.asarray(LOGITS, jnp.float32)
    np.testing.assert_allclose(
        np.exp(filtered_log_probs(logits, build_draw(top_k=3))), restricted([1, 3, 4]), atol=1e-6
    )
    found = np.exp(filtered_log_probs(logits, build_draw(temperature=0.5)))
    squares = np.exp(2 * LOGITS)
    np.testing.assert_allclose(found, squares / squares.sum(), atol=1e-6)
    # squares sorted: .5294, .2353, .1324, ...: a nucleus of 0.7 now needs two
    found = np.exp(filtered_log_probs(logits, build_draw(temperature=0.5, nucleus=0.7)))
    np.testing.assert_allclose(
        found, np.where(squares > 0.05, squares, 0) / squares[[1, 3]].sum(), atol=1e-6
    )
    # top_k larger than the vocabulary keeps all; ties keep the first
    found = np.exp(filtered_log_probs(jnp.zeros(4), build_draw(top_k=2)))
    np.testing.assert_allclose(found, [0.5, 0.5, 0.0, 0.0], atol=1e-6)
    found = np.exp(filtered_log_probs(logits, build_draw(top_k=99)))
    np.testing.assert_allclose(found, np.exp(LOGITS), atol=1e-6)


def test_no_temperature_is_the_most_probable_token():
    uniform = jnp.linspace(0.0, 0.999, 50)
    logits = jnp.asarray(np.tile(LOGITS, (50, 1)), jnp.float32)
    for options in ({}, {"nucleus": 0.5}, {"top_k": 2}):
        draw = build_draw(temperature=0.0, **options)
        assert (draw_tokens(uniform, logits, draw) == 1).all()
        np.testing.assert_array_equal(np.exp(filtered_log_probs(logits[0], draw)), np.eye(5)[1])
    # one program whether warm or cold
    program = jax.jit(lambda t: draw_tokens(uniform, logits, build_draw(temperature=t)))
    assert (program(0.0) == 1).all() and len(np.unique(program(1.0))) == 5


def test_bfloat16_logits_are_drawn_in_float32():
    """p = 1e-4 in half precision logits comes up; jax.random.categorical would have it 7e-7 of the time."""
    logits = jnp.log(jnp.asarray([1e-4, 1.0 - 1e-4])).astype(jnp.bfloat16)[None]
    uniform = jnp.linspace(0.0, 1.0, 100_000, endpoint=False)
    drawn = draw_tokens(uniform, jnp.broadcast_to(logits, (100_000, 2)), build_draw())
    exact = np.exp(np.asarray(logits[0], np.float64))
    assert (drawn == 0).sum() == pytest.approx(1e5 * exact[0] / exact.sum(), abs=2)


@pytest.mark.parametrize("most", (1, 3, 16))
@pytest.mark.parametrize("as_rows", (False, True))
def test_draws_where_asked_and_nowhere_else(most, as_rows):
    rng = np.random.default_rng(0)
    batch, length, vocab = 4, 16, 70
    where = rng.random((batch, length)) < np.array([0.0, 0.1, 0.5, 1.0])[:, None]
    hidden = jnp.asarray(rng.normal(size=(batch, length, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(8, vocab)), jnp.float32)
    uniform = jnp.asarray(rng.random((batch, length)), jnp.float32)
    tokens = jnp.full((batch, length), vocab, jnp.int32)
    logits = LogitRows(hidden, lambda h: h @ kernel)
    whole, draw = logits.all(), build_draw()
    assert logits.shape == whole.shape and logits.dtype == whole.dtype
    given = logits if as_rows else whole
    found = jax.jit(lambda w: draw_where(uniform, given, w, draw, tokens, most))(jnp.asarray(where))
    everywhere = draw_tokens(uniform, whole, draw)
    np.testing.assert_array_equal(found, np.where(where, everywhere, vocab))


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"temperature": -0.1}, "temperature must be 0 or positive, got -0.1"),
        (
            {"temprature": 1.0},
            "option of a token sampler must be one of .*; did you mean 'temperature'",
        ),
        ({"nucleus": 1.5}, r"nucleus must lie in \(0, 1\], got 1.5"),
        ({"top_k": 0}, "top_k must be a positive int or None, got 0"),
        (
            {"nucleus": 0.9, "nucleus_rule": "above"},
            "nucleus_rule must be one of cover, crossing, below",
        ),
        ({"precision": "float16"}, "precision must be one of float32, float64"),
        ({"precision": "float64"}, "precision='float64' needs jax.config.update"),
    ),
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_draw(**options)


def test_float64_draws(x64):
    """Uniforms and probabilities of 64 bits resolve what float32 cannot."""
    draw = build_draw(precision="float64")
    assert draw.uniforms(jax.random.split(jax.random.key(0), 2), (3,)).dtype == jnp.float64
    logits = jnp.log(jnp.asarray([1e-12, 1.0], jnp.float64))[None]
    assert draw_tokens(jnp.asarray([0.9e-12]), logits, draw)[0] == 0
    assert draw_tokens(jnp.asarray([1.1e-12]), logits, draw)[0] == 1


# The artefact.


def test_truncated_gumbel_laws():
    """Eq. (1) of `gumbel` against the stored enumeration: every format, with and without the mask."""
    stored = golden("discrete_gumbel")
    for bits, largest, rows, entropies in zip(
        stored["bits"], stored["gumbel_max"], stored["truncated_probs"], stored["token_entropy"]
    ):
        assert gumbel_max(int(bits)) == pytest.approx(largest, abs=1e-9)
        for u, row, expected in zip(stored["unmask_prob"], rows, entropies):
            law = truncated_law(np.append(u * stored["p"], 1.0 - u), int(bits))
            np.testing.assert_allclose(law, row, rtol=0, atol=1e-12)
            assert entropy(law[:-1]) == pytest.approx(expected, abs=1e-9)
    assert entropy(stored["p"]) == pytest.approx(float(stored["exact_entropy"]), abs=1e-12)


@pytest.mark.parametrize(("bits", "reveal"), ((10, 0.125), (12, 1 / 64), (10, 1.0)))
def test_drawn_law_of_few_bits(bits, reveal):
    """200,000 draws follow the law of uniforms on a grid, enumerated class by class and grain by grain."""
    p, num = golden("discrete_gumbel")["p"], 200_000
    weights = np.append(reveal * p, 1.0 - reveal)
    # exact: class n wins with u_n = k h where all others stay below u_n^(w_j / w_n)
    k = np.arange(1, 2**bits) * 2.0**-bits
    law = np.zeros(len(weights))
    for n in np.flatnonzero(weights):
        others = np.delete(weights, n)
        others = others[others > 0]
        below = np.ceil(k[:, None] ** (others / weights[n]) * 2.0**bits) * 2.0**-bits
        law[n] = 2.0**-bits * np.prod(below, axis=1).sum()
    assert abs(law.sum() - 1.0) < 0.01
    quick = quantised_law(weights, bits)
    small = weights < 0.02 * weights.max()
    np.testing.assert_allclose(quick[small], law[small], rtol=0.1, atol=1e-6)

    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (1000, num // 1000, len(p)))
    keys = jax.random.split(jax.random.key(0), 1000)
    drawn = jax.jit(draw_joint, static_argnums=4)(keys, logits, reveal, build_draw(), bits)
    counts = np.bincount(np.asarray(drawn).ravel(), minlength=len(weights))
    law /= law.sum()
    deviation = np.sqrt(num * law + 1.0)
    assert (np.abs(counts - num * law) < 5 * deviation + 0.002 * num * law).all()
    # and the artefact is there: tails are missing, as the truncated law says in the extreme
    if reveal < 1:
        cold = entropy(truncated_law(weights, bits)[:-1])
        assert cold < entropy(counts[:-1]) + 0.02 < entropy(p) - 0.05


def test_noise_of_few_bits():
    noise = np.asarray(gumbel_noise(jax.random.key(0), (100_000,), 10))
    assert noise.max() == pytest.approx(gumbel_max(10), abs=1e-4)
    assert len(np.unique(noise)) == 1024
    noise = np.asarray(gumbel_noise(jax.random.key(1), (400_000,), 23))
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=4 * np.pi / np.sqrt(6 * 400_000))


def test_float64_noise_needs_64_bits(x64):
    noise = np.asarray(gumbel_noise(jax.random.key(0), (1000,), 53))
    assert noise.dtype == np.float64 and gumbel_max(53) > 36.7
    assert masked_ancestral(Absorbing(4), 4, length=3, categorical="gumbel", bits=53).nfe == 4


def test_rare_tokens_of_a_large_vocabulary_go_missing():
    """Unigram entropy under N steps with the mask as a class: 7.46 becomes 7.09, 6.66, ... at 23 bits."""
    stored = golden("discrete_gumbel")
    columns = [str(c) for c in stored["zipf_columns"]]
    shift, exponent = stored["zipf_shift_exponent"]
    p = (np.arange(1, 50_258) + shift) ** -exponent
    p /= p.sum()
    assert entropy(p) == pytest.approx(float(stored["zipf_exact_entropy"]), abs=1e-9)
    for row in stored["zipf"]:
        row = dict(zip(columns, row))
        if row["N"] not in (64, 256):
            continue
        reveal = 1.0 / np.arange(row["N"], 0, -1)
        law = unigram_law(p, reveal, int(row["bits"]))
        assert law.sum() == pytest.approx(1.0, abs=1e-9)
        # the stored law takes eq. (1) for the last few steps, where u is large
        assert entropy(law) == pytest.approx(row["entropy"], abs=0.006)
        tail = law[p < 1e-5].sum()
        assert tail == pytest.approx(row["mass_of_tokens_below_1e-5"], rel=0.01)


def test_the_sampler_with_few_bits_is_colder():
    """Ten bits, 16 steps: the entropy falls as foretold; in two stages it does not, nor by 23 bits."""
    probs = 1.0 / (np.arange(100) + 1.0)
    probs /= probs.sum()
    logits = jnp.asarray(np.log(probs), jnp.float32)

    def network(tokens, t):
        return jnp.broadcast_to(logits, (*tokens.shape, 100))

    def found(steps, **options):
        sampler = masked_ancestral(Absorbing(100), steps, length=50, **options)
        tokens = np.asarray(sample(sampler, network, jax.random.key(5), 100))
        assert tokens.max() < 100  # the last step leaves no mask
        return entropy(np.bincount(tokens.ravel(), minlength=100))

    exact = entropy(probs)
    noise = 4 * np.sqrt((probs * np.log(probs) ** 2).sum() - exact**2) / np.sqrt(5000)
    assert abs(found(16) - exact) < noise + 0.01  # and the bias of counts
    assert abs(found(16, categorical="gumbel") - exact) < noise + 0.01
    cold = entropy(unigram_law(probs, 1.0 / np.arange(16, 0, -1), 10))
    assert cold < exact - 0.3
    assert abs(found(16, categorical="gumbel", bits=10) - cold) < noise + 0.02
