"""Gumbel-max sampling with uniforms of few bits: the artefact of float32 sampling, to be looked at.

argmax_i log w_i + G_i draws i with probability w_i / sum w if G = -log(-log U), U uniform. A U of b bits is
at most 1 - 2^-b, so that no G exceeds M = -log(-log(1 - 2^-b)): 15.9 for the 23 bits of JAX's float32, 16.6
for torch's 24, 4.8 for bfloat16, 36.7 in float64. A class can then win only against others that are not
more than e^(M - G) times as heavy: heavy classes gain, light ones lose. That is a lower temperature than
the model's (arXiv 2409.02908, section 5). It is mild for V classes alone; but the authors' samplers make
the mask one more class, of weight 1 - u where a step reveals with probability u, and all tokens are light.
Measures of quality that reward little diversity then improve with the number of steps.

Laws, weights w ascending, S_i = sum_{j>=i} w_j, w_{-1} = 0, K classes, h = e^-M:
  (1) all G <= M:  P(n) = w_n sum_{i<=n} e^{(K-i) h} (e^{-S_i h / w_i} - e^{-S_i h / w_{i-1}}) / S_i,  i = 0, ...
  (2) U on the grid {0, 1, ..., 2^b - 1} / 2^b:  P(n) = sum_k h (1 - k h)^{1/w_n - 1} = h / (e^{h/w_n} - 1) up
      to O(h), h = 2^-b, sum w = 1: what is really drawn. Milder than (1), which gives w e^{-h/w} to a small
      class beside one that has nearly all.

Nothing else in the library draws this way; `categorical` is the right one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.samplers.categorical import Draw, filtered_log_probs


def check_bits(bits: int | None) -> int:
    """The number of bits, default 23. Raises ValueError unless 1..24, or up to 53 with 64-bit JAX."""
    bits = 23 if bits is None else bits
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 53:
        raise ValueError(f"bits must be an int from 1 to 53, got {bits!r}")
    if bits > 24 and not jax.config.jax_enable_x64:
        raise ValueError(
            f"bits = {bits} does not fit into float32 (at most 24): it needs "
            "jax.config.update('jax_enable_x64', True)"
        )
    return bits


def gumbel_max(bits: int) -> float:
    """The largest Gumbel number M that a uniform of so many bits can give."""
    return -math.log(-math.log1p(-(2.0**-bits)))


def gumbel_noise(key, shape, bits: int) -> jax.Array:
    """Gumbel numbers from uniforms k / 2^bits, k = 0, ...; float32, or float64 above 24 bits.

    As in JAX, the uniform 0 is replaced by the smallest positive number.
    """
    wide = bits > 24
    dtype = jnp.float64 if wide else jnp.float32
    drawn = jax.random.bits(key, shape, jnp.uint64 if wide else jnp.uint32)
    drawn = drawn >> jnp.asarray((64 if wide else 32) - bits, drawn.dtype)
    uniform = jnp.maximum(drawn.astype(dtype) * 2.0**-bits, jnp.finfo(dtype).tiny)
    return -jnp.log(-jnp.log(uniform))


def draw_joint(keys, logits, reveal, draw: Draw, bits: int) -> jax.Array:
    """One categorical over V tokens and the mask (id V) at every position, as the papers' code draws it.

    Takes V + 1 random numbers a position, and memory for as many.

    Args:
      keys: one an example, `[B]`.
      logits: `[B, L, V]`.
      reveal: scalar, probability u that a masked token is revealed; at 1 the mask does not occur.
      draw: temperature, nucleus, top_k of the tokens.
      bits: of the uniforms.
    Returns:
      int32 `[B, L]`, 0..V.
    """
    tokens = filtered_log_probs(logits, draw)
    tokens = tokens.astype(jnp.float64 if bits > 24 else jnp.float32)
    reveal = jnp.asarray(reveal, tokens.dtype)
    mask = jnp.full((*tokens.shape[:-1], 1), jnp.log1p(-reveal))
    joint = jnp.concatenate([jnp.log(reveal) + tokens, mask], axis=-1)
    noise = jax.vmap(lambda key: gumbel_noise(key, joint.shape[1:], bits))(keys)
    return jnp.argmax(joint + noise, axis=-1).astype(jnp.int32)


def truncated_law(weights, bits: int) -> np.ndarray:
    """Eq. (1): which class wins when no Gumbel number exceeds `gumbel_max(bits)`, `[K]` float64.

    Args:
      weights: `[K]`, non-negative, not all zero; they need not sum to 1.
    """
    weights = np.asarray(weights, np.float64)
    order = np.argsort(weights, kind="stable")
    order = order[weights[order] > 0]  # a class without weight takes no part
    w = weights[order] / weights.sum()
    h = -math.log1p(-(2.0**-bits))
    tail = np.cumsum(w[::-1])[::-1]
    count = len(w) - np.arange(len(w))
    with np.errstate(divide="ignore"):
        below = np.append(np.inf, tail[1:] * h / w[:-1])
    # e^{count h} is taken into the exponents, where it cancels
    terms = (np.exp(count * h - tail * h / w) - np.exp(count * h - below)) / tail
    law = np.zeros_like(weights)
    law[order] = w * np.cumsum(terms)
    return law


def quantised_law(weights, bits: int) -> np.ndarray:
    """Eq. (2): which class wins with uniforms of so many bits, `[K]` float64; the heaviest has the rest.

    Args:
      weights: `[K]`, non-negative, not all zero; they need not sum to 1.
    """
    weights = np.asarray(weights, np.float64)
    h = 2.0**-bits
    with np.errstate(divide="ignore", over="ignore"):
        law = h / np.expm1(h * weights.sum() / weights)
    heaviest = np.argmax(weights)
    law[heaviest] = 0.0
    law[heaviest] = 1.0 - law.sum()
    return law


def unigram_law(probs, reveal, bits: int) -> np.ndarray:
    """What a token of law `probs` comes out as after steps that draw jointly with the mask, `[V]`.

    By eq. (2): rare tokens are missing, and more of them the more steps there are.

    Args:
      probs: `[V]`, summing to 1.
      reveal: `[N]`, `reveal_probabilities` of a sampler, the last 1.
      bits: of the uniforms.
    """
    probs = np.asarray(probs, np.float64)
    out, left = np.zeros(len(probs)), 1.0
    for u in np.asarray(reveal, np.float64):
        law = quantised_law(np.append(u * probs, 1.0 - u), bits)
        out += left * law[:-1]
        left *= law[-1]
    return out
