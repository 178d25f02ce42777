"""Losses of Bayesian flow networks (Graves et al., arXiv 2308.07037): continuous, discretised, discrete.

With the paper's s = 1 - t, v the last variance and C = -log(v) / 2:
  (1) continuous, any number of steps   C (x0 - x0_hat)^2 / v^s
      n steps, step i at s = (i - 1)/n  n a_i (x0 - x0_hat)^2 / 2,  a_i = v^(-i/n) (1 - v^(1/n))
  (2) discretised: the network gives a normal law of each dimension, summed over the bins of [-1, 1]
      and with the tails given to the end bins; (1) with x0_hat the expected bin centre, or n steps
      n E_y [log N(y; x0, 1/a_i) - log sum_k p_k N(y; centre_k, 1/a_i)]
  (3) discrete                          K beta1 s |e_x - e_hat|^2
      n steps                           n E_y [log N(y | e_x) - log sum_k e_hat_k N(y | e_k)],
      N(y | e_k) = N(a_i (K e_k - 1), a_i K I),  a_i = beta1 (2 i - 1) / n^2
All are nats. The functions of (1) to (3) give one value a dimension (a token); `*_flow_loss` give one
an example: `reduce="sum"` nats an example, whose expectation bounds -log p up to the
reconstruction of x0 from the state at t = 0; `reduce="mean"` nats a dimension, as the authors report.

Equivalence: (1) is the continuous-time diffusion loss of VDM with snr = v^-s - 1, the weighting "elbo".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import example_keys, expand, fold_all, namespace, normal_per_example
from diffusion_jax.objectives.per_example import global_index
from diffusion_jax.objectives.times import build_times

_TINY = 1e-30  # under a logarithm of a probability in float32


# ------------------------------------------------------------ one value a dimension
def continuous_accuracy(process, step, steps):
    """a_i of step i = 1..n of a continuous flow: `v^(-i/n) (1 - v^(1/n))`."""
    xp = namespace(step, process.min_variance)
    log_v = namespace(process.min_variance).log(process.min_variance)
    return -xp.exp(-step / steps * log_v) * namespace(log_v).expm1(log_v / steps)


def discrete_accuracy(process, step, steps):
    """a_i of step i = 1..n of a discrete flow: `beta1 (2 i - 1) / n^2`."""
    return process.beta1 * (2.0 * step - 1.0) / steps**2


def continuous_weight(process, t, steps: int | None = None):
    """Weight of the squared error in (1) at t, or with `steps` at the step that begins at t."""
    if steps is None:
        log_v = namespace(process.min_variance).log(process.min_variance)
        return -0.5 * log_v * namespace(t, log_v).exp(-(1.0 - t) * log_v)
    return 0.5 * steps * continuous_accuracy(process, steps * (1.0 - t) + 1.0, steps)


def discrete_weight(process, t):
    """Weight of `|e_x - e_hat|^2` in (3): `K beta1 (1 - t)`."""
    return -0.5 * process.vocab_size * process.dbeta(t)


def bin_centres(bins: int):
    """Centres of `bins` equal bins of [-1, 1], `[bins]`."""
    return (2.0 * jnp.arange(bins) + 1.0) / bins - 1.0


def bin_probabilities(mean, deviation, bins: int):
    """Probabilities of the bins under `N(mean, deviation^2)`, the tails in the end bins.

    Args:
      mean, deviation: `[...]`.
      bins: number of equal bins of [-1, 1].
    Returns:
      `[..., bins]`.
    """
    mean, deviation = jnp.broadcast_arrays(mean, deviation)
    edges = 2.0 * jnp.arange(1, bins) / bins - 1.0
    below = jax.scipy.special.ndtr((edges - mean[..., None]) / deviation[..., None])
    ends = [(0, 0)] * mean.ndim
    below = jnp.pad(below, [*ends, (1, 0)])
    return jnp.diff(jnp.pad(below, [*ends, (0, 1)], constant_values=1.0), axis=-1)


def _log(probs):
    return jnp.log(jnp.maximum(probs, _TINY))


def discretised_step_loss(x0, probs, accuracy, noise):
    """Inside of (2) for n steps, without the factor n: log sender - log receiver, mean over draws.

    Args:
      x0: data `[...]`.
      probs: bin probabilities `[..., bins]`.
      accuracy: a_i, broadcasts against x0.
      noise: standard normal `[S, ...]`, S draws of the sender.
    Returns:
      `[...]`.
    """
    y = x0 + noise / jnp.sqrt(accuracy)
    distance = (y[..., None] - bin_centres(probs.shape[-1])) ** 2
    accuracy = jnp.broadcast_to(jnp.asarray(accuracy), x0.shape)
    receiver = jax.nn.logsumexp(_log(probs) - 0.5 * accuracy[..., None] * distance, axis=-1)
    return (-0.5 * accuracy * (y - x0) ** 2 - receiver).mean(axis=0)


def discrete_step_loss(tokens, probs, accuracy, noise):
    """Inside of (3) for n steps, without the factor n: log sender - log receiver, mean over draws.

    All classes' laws of y have one covariance, so log N(y | e_k) is y_k up to what they share.

    Args:
      tokens: int `[...]`.
      probs: class probabilities `[..., K]`.
      accuracy: a_i, broadcasts against tokens.
      noise: standard normal `[S, ..., K]`.
    Returns:
      `[...]`.
    """
    size = probs.shape[-1]
    a = jnp.broadcast_to(jnp.asarray(accuracy), tokens.shape)[..., None]
    y = a * (size * jax.nn.one_hot(tokens, size) - 1.0) + jnp.sqrt(size * a) * noise
    own = jnp.take_along_axis(y, jnp.broadcast_to(tokens, y.shape[:-1])[..., None], axis=-1)[..., 0]
    return (own - jax.nn.logsumexp(_log(probs) + y, axis=-1)).mean(axis=0)


def reconstruction_loss(tokens, probs):
    """`-log p` of tokens int `[...]` under probabilities `[..., K]`: nats a token, `[...]`."""
    chosen = jnp.take_along_axis(probs, tokens[..., None].astype(jnp.int32), axis=-1)[..., 0]
    return -_log(chosen)


# ------------------------------------------------------------ one value an example
def _draw_times(process, key, index, total, times, steps):
    """Times `[B]`, the inverse of their density, and per-example keys; with `steps`, a step's start."""
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be a positive int or None, got {steps!r}")
    t_key, noise_key = jax.random.split(key)
    t, inverse_density = build_times(times)(process, t_key, index, total)
    if steps is not None:
        begun = jnp.clip(jnp.floor(steps * (1.0 - t)), 0, steps - 1)
        t = 1.0 - begun / steps
    return t, inverse_density, example_keys(noise_key, index)


def _noise(keys, stream, like, draws=None):
    """Standard normal like `like`, with a leading axis of `draws` if given."""
    own = fold_all(keys, stream)
    if draws is None:
        return normal_per_example(own, like)
    each = lambda i: normal_per_example(fold_all(own, i), like)
    return jax.vmap(each)(jnp.arange(draws))


def _reduced(values, reduce):
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}")
    flat = values.reshape(values.shape[0], -1)
    return flat.mean(axis=1) if reduce == "mean" else flat.sum(axis=1)


def continuous_flow_loss(
    process,
    denoise: Callable,
    key,
    x0,
    *,
    steps: int | None = None,
    draws: int = 20,
    times: str | Callable = "uniform",
    reduce: str = "mean",
    index=None,
    total: int | None = None,
):
    """Losses (1) and (2), one value an example.

    Args:
      process: a `ContinuousBFN`.
      denoise: `(x_t, t [B]) -> x0_hat`; one with a method `probabilities(x, point) -> [B, ..., bins]`
        is discretised, see (2).
      key: split into times and noise; example i's noise is folded with `index[i]`.
      x0: data `[B, ...]` in [-1, 1].
      steps: None for any number of steps, else n of the n-step loss.
      draws: of the sender in the n-step loss of (2).
      times: a registered name or a time sampler; times are those of the process' [t_min, t_max].
      reduce: "mean" (nats a dimension) or "sum" (nats an example).
      index, total: positions in, and size of, the global batch.
    Returns:
      `(losses [B], aux)`; aux holds `t` and the mean `x0_error`, both `[B]`.
    Raises:
      ValueError: shapes that do not fit, unknown names, bad steps.
    """
    index, total = global_index(x0, index, total)
    t, inverse_density, keys = _draw_times(process, key, index, total, times, steps)
    point = process.point(t)
    xt = process.corrupt(x0, _noise(keys, 0, x0), t)
    by_bins = steps is not None and hasattr(denoise, "probabilities")
    if by_bins:
        probs = denoise.probabilities(xt, point)
        x0_hat = (probs * bin_centres(probs.shape[-1])).sum(axis=-1)
    else:
        x0_hat, _ = evaluate(denoise, xt, point)
    if x0_hat.shape != x0.shape:
        raise ValueError(f"denoise returned shape {x0_hat.shape} for data of shape {x0.shape}")
    error = jnp.square(x0_hat.astype(jnp.promote_types(x0_hat.dtype, jnp.float32)) - x0)
    if by_bins:
        accuracy = expand(continuous_accuracy(process, steps * (1.0 - t) + 1.0, steps), x0)
        noise = _noise(keys, 1, x0, draws)
        values = steps * discretised_step_loss(x0, probs, accuracy, noise)
    else:
        values = expand(continuous_weight(process, t, steps), x0) * error
    losses = (inverse_density if steps is None else 1.0) * _reduced(values, reduce)
    return losses, {"t": t, "x0_error": _reduced(error, "mean")}


def discrete_flow_loss(
    process,
    denoise: Callable,
    key,
    tokens,
    *,
    steps: int | None = None,
    draws: int = 10,
    times: str | Callable = "uniform",
    reduce: str = "mean",
    index=None,
    total: int | None = None,
):
    """Loss (3), one value an example.

    Args:
      process: a `DiscreteBFN`.
      denoise: `(z [B, L, K], t [B]) -> class probabilities [B, L, K]`.
      tokens: int `[B, L]`.
      draws: of the sender in the n-step loss.
      key, steps, times, reduce, index, total: as in `continuous_flow_loss`.
    Returns:
      `(losses [B], aux)`; aux holds `t` and the mean `cross_entropy` of the tokens, both `[B]`.
    Raises:
      ValueError: tokens that are not integers `[B, L]`, shapes that do not fit, bad steps.
    """
    process.check_tokens(tokens)
    index, total = global_index(tokens, index, total)
    t, inverse_density, keys = _draw_times(process, key, index, total, times, steps)
    like = jax.ShapeDtypeStruct((*tokens.shape, process.vocab_size), jnp.float32)
    z = process.corrupt(tokens, _noise(keys, 0, like), t)
    probs, _ = evaluate(denoise, z, process.point(t))
    if probs.shape != z.shape:
        raise ValueError(f"denoise returned shape {probs.shape} for logits of shape {z.shape}")
    probs = probs.astype(jnp.promote_types(probs.dtype, jnp.float32))
    if steps is None:
        error = jnp.square(probs - jax.nn.one_hot(tokens, process.vocab_size)).sum(axis=-1)
        values = expand(discrete_weight(process, t) * inverse_density, error) * error
    else:
        accuracy = discrete_accuracy(process, steps * (1.0 - t) + 1.0, steps)
        noise = _noise(keys, 1, like, draws)
        values = steps * discrete_step_loss(tokens, probs, expand(accuracy, tokens), noise)
    cross_entropy = reconstruction_loss(tokens, probs)
    return _reduced(values, reduce), {"t": t, "cross_entropy": _reduced(cross_entropy, "mean")}


def discrete_reconstruction(process, denoise, key, tokens, *, reduce="mean", index=None):
    """`-log p(tokens | z)` at t = 0, one draw of z an example: what the bound adds to loss (3).

    Arguments and units as `discrete_flow_loss`; returns `[B]`.
    """
    process.check_tokens(tokens)
    index, _ = global_index(tokens, index, None)
    like = jax.ShapeDtypeStruct((*tokens.shape, process.vocab_size), jnp.float32)
    t = jnp.zeros(tokens.shape[:1])
    z = process.corrupt(tokens, _noise(example_keys(key, index), 0, like), t)
    probs, _ = evaluate(denoise, z, process.point(t))
    probs = probs.astype(jnp.promote_types(probs.dtype, jnp.float32))
    return _reduced(reconstruction_loss(tokens, probs), reduce)


def discretised_reconstruction(process, denoise, key, x0, *, reduce="mean", index=None):
    """`-log p(bin of x0 | x)` at t = 0, one draw of x an example: what the bound adds to loss (2).

    `denoise` has `probabilities`, x0 lies on bin centres; units as `continuous_flow_loss`; `[B]`.
    """
    index, _ = global_index(x0, index, None)
    t = jnp.zeros(x0.shape[:1])
    x = process.corrupt(x0, _noise(example_keys(key, index), 0, x0), t)
    probs = denoise.probabilities(x, process.point(t))
    bins = probs.shape[-1]
    level = jnp.clip(jnp.floor(0.5 * bins * (x0 + 1.0)), 0, bins - 1).astype(jnp.int32)
    return _reduced(reconstruction_loss(level, probs), reduce)
