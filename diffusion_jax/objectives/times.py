"""Which times a loss is evaluated at: `(process, key, index, total) -> (t, inverse_density)`, both `[B]`.

`index` are the examples' positions in the global batch of `total` examples, so that stratified times
come out the same however the batch is laid over devices. `inverse_density` is 1 / p(t): weightings
that are integrals over t (ELBO, sigmoid) multiply by it and stay unbiased for any choice here: the normal
distributions are truncated to [t_min, t_max], not clipped, which would pile their tails up at the ends.
"""

import functools

import jax
import jax.numpy as jnp
import jax.scipy.stats as stats

from diffusion_jax.registry import get, register


def stratified(key, index, total):
    """Low-discrepancy numbers in [0, 1): one uniform shift of the grid i / total (VDM, arXiv 2107.00630)."""
    return (jax.random.uniform(key) + index.astype(jnp.float32) / total) % 1.0


@register("times", "uniform")
def uniform(process, key, index, total):
    """Stratified uniform times on [t_min, t_max]: one random shift of an even grid for the batch."""
    span = process.t_max - process.t_min
    t = process.t_min + span * stratified(key, index, total)
    return t, jnp.full_like(t, span)


@register("times", "labels", paper="2006.11239", discrete=True)
def labels(process, key, index, total):
    """Stratified times among the N noise levels of a process that is a list: t = (n + 1) / N, n < N."""
    steps = getattr(process, "num_train_steps", None)
    if steps is None:
        raise ValueError(
            f"times 'labels' need a list of noise levels (discrete_vp), got {type(process).__name__}"
        )
    n = jnp.minimum(jnp.floor(steps * stratified(key, index, total)), steps - 1)
    return (n + 1.0) / steps, jnp.ones_like(n)


@register("times", "independent")
def independent(process, key, index, total):
    """Independent uniform times on [t_min, t_max]."""
    span = process.t_max - process.t_min
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    t = process.t_min + span * jax.vmap(jax.random.uniform)(keys)
    return t, jnp.full_like(t, span)


def _truncated_normal(fractions, mean, std, low, high):
    """Quantiles of `N(mean, std^2)` on [low, high], and the probability of that interval."""
    below, above = (jax.scipy.special.ndtr((jnp.asarray(v) - mean) / std) for v in (low, high))
    quantile = jnp.clip(below + (above - below) * fractions, 1e-6, 1.0 - 1e-6)
    return mean + std * jax.scipy.special.ndtri(quantile), above - below


@register("times", "log_normal", paper="2206.00364")
def log_normal(process, key, index, total, mean=-1.2, std=1.2):
    """log(sigma / alpha) normal, stratified, truncated to [t_min, t_max] (EDM, arXiv 2206.00364)."""
    low, high = -process.lam(process.t_min), -process.lam(process.t_max)
    log_u, mass = _truncated_normal(stratified(key, index, total), mean, std, low, high)
    t = jnp.clip(process.t_of_lam(-log_u), process.t_min, process.t_max)
    # p(t) = p(log u) |d log u / dt|
    slope = jax.vmap(jax.grad(lambda s: -process.lam(s)))(t)
    density = stats.norm.pdf(-process.lam(t), mean, std) * jnp.abs(slope)
    return t, mass / density


@register("times", "logit_normal", paper="2403.03206")
def logit_normal(process, key, index, total, mean=0.0, std=1.0):
    """logit(t) normal, stratified, truncated to [t_min, t_max] (arXiv 2403.03206)."""
    low, high = jax.scipy.special.logit(jnp.asarray([process.t_min, process.t_max], float))
    logit, mass = _truncated_normal(stratified(key, index, total), mean, std, low, high)
    t = jnp.clip(jax.nn.sigmoid(logit), process.t_min, process.t_max)
    return t, mass * t * (1.0 - t) / stats.norm.pdf(logit, mean, std)


def build_times(times, **options):
    """A time sampler from a name or a callable, with its options bound.

    Raises:
      UnknownName: no such name.
    """
    made = times if callable(times) else get("times", times)
    return functools.partial(made, **options) if options else made
