"""The losses of ReDiff: their parts, what they agree with, what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.objectives import (
    correcting_cross_entropy,
    masked_cross_entropy,
    refining_cross_entropy,
)
from diffusion_jax.objectives.refine import replace_tokens
from diffusion_jax.processes import Absorbing

V, L, B = 5, 12, 64
PROCESS = Absorbing(V)
KEY = jax.random.key(0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, L)), jnp.int32)


def bent(tokens, t):
    """Logits that depend on the token that is seen, the position and the neighbour."""
    place = jnp.arange(L * V, dtype=jnp.float32).reshape(L, V)
    return jnp.sin(place + 1.3 * tokens[..., None] + jnp.roll(tokens, 1, axis=1)[..., None])


def log_probs(x):
    logits = np.asarray(bent(x, 0.0), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_without_replacement_the_masked_part_is_the_usual_loss_bit_for_bit():
    options = {"masking": "lambda", "eps": 1e-3}
    expected, aux = masked_cross_entropy(PROCESS, bent, KEY, TOKENS, **options)
    got, own = refining_cross_entropy(
        PROCESS, bent, KEY, TOKENS, replace=0.0, parts=(1, 0, 0), average="sum", **options
    )
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(own["cross_entropy"], aux["cross_entropy"], rtol=1e-6)


def test_parts_count_alike_however_many_positions_they_have():
    """Recomputed from what the network was shown."""
    seen = {}

    def denoise(x, t):
        seen.update(x=np.asarray(x), t=np.asarray(t))
        return bent(x, t)

    where = jnp.arange(L)[None, :] >= jnp.arange(B)[:, None] % 4  # the first tokens are a prompt
    weights = (1.0, 0.5, 0.25)
    losses, aux = refining_cross_entropy(
        PROCESS, denoise, KEY, TOKENS, replace=0.4, parts=weights, where=where, eps=1e-3
    )
    x, tokens, where = seen["x"], np.asarray(TOKENS), np.asarray(where)
    np.testing.assert_array_equal(x[~where], tokens[~where])
    each = -np.take_along_axis(log_probs(x), tokens[..., None], axis=-1)[..., 0]
    masked, replaced = x == V, (x != V) & (x != tokens)
    parts = (masked, replaced, where & ~masked & ~replaced)
    expected = np.zeros(B)
    for name, weight, part in zip(("cross_entropy", "replaced", "untouched"), weights, parts):
        mean = np.where(part, each, 0).sum(axis=1) / np.maximum(part.sum(axis=1), 1)
        np.testing.assert_allclose(aux[name], mean, rtol=1e-5)
        expected += weight * mean / seen["t"]
    np.testing.assert_allclose(losses, np.where(masked.any(axis=1), expected, 0.0), rtol=1e-5)
    share = replaced.sum() / (where & ~masked).sum()
    assert abs(share - 0.4) < 4 * np.sqrt(0.24 / (where & ~masked).sum())
    # rates are spread over (0, 1]: (1 - eps) u + eps
    rates = np.sort(seen["t"])
    assert np.diff(rates).max() < 1.01 / B and rates[0] >= 1e-3


def test_a_replacement_is_uniform_over_the_other_tokens():
    num = 4000
    tokens = jnp.full((num, 2), 3, jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(num))
    where = jnp.array([True, False])[None, :] & jnp.ones((num, 1), bool)
    x, replaced = (np.asarray(v) for v in replace_tokens(keys, tokens, 1.0, where, V))
    assert (x[:, 1] == 3).all() and replaced[:, 0].all() and not replaced[:, 1].any()
    counts = np.bincount(x[:, 0], minlength=V)
    assert counts[3] == 0
    np.testing.assert_allclose(counts[[0, 1, 2, 4]], num / 4, atol=4 * np.sqrt(num * 3 / 16))


def test_only_wrong_positions_of_a_draft_are_corrected():
    drafts = TOKENS.at[:, 3].set((TOKENS[:, 3] + 1) % V).at[5].set(TOKENS[5])
    drafts = drafts.at[7, 8].set((TOKENS[7, 8] + 2) % V)
    losses, aux = correcting_cross_entropy(PROCESS, bent, drafts, TOKENS)
    each = -np.take_along_axis(log_probs(drafts), np.asarray(TOKENS)[..., None], axis=-1)[..., 0]
    expected = each[:, 3].copy()
    expected[5], expected[7] = 0.0, (each[7, 3] + each[7, 8]) / 2
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(
        aux["wrong"] * L, np.bincount([5], [-1], B) + 1 + np.bincount([7], [1], B)
    )
    open_places = jnp.zeros((B, L), bool).at[:, :6].set(True)
    part, _ = correcting_cross_entropy(PROCESS, bent, drafts, TOKENS, where=open_places)
    np.testing.assert_allclose(part[7], each[7, 3], rtol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"replace": 1.5}, r"replace must lie in \[0, 1\], got 1.5"),
        ({"parts": (1.0, 1.0)}, "parts must be weights of the masked, replaced and untouched part"),
        ({"average": "mean"}, "average must be one of count, sum; got 'mean'"),
        ({"masking": "lamda"}, "did you mean 'lambda'"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        refining_cross_entropy(PROCESS, bent, KEY, TOKENS, **options)
    with pytest.raises(ValueError, match="drafts have shape"):
        correcting_cross_entropy(PROCESS, bent, TOKENS[:, 1:], TOKENS)
