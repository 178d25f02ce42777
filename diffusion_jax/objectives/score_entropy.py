"""Score entropy: what continuous-time chains on tokens learn (SEDD, arXiv 2310.16834).

With z = x_t^i, Q(j, z) the rate from j to z, r_j = q(x_t = j | x0) / q(x_t = z | x0) the true ratio and s_j
the model's:
  (1) DSE = sum over j != z of Q(j, z) (s_j - r_j log s_j + r_j (log r_j - 1)) >= 0       [eq. 9]
  (2) -log p(x0) <= integral of sigma'(t) E[sum over positions of DSE] dt + KL(q(x_1 | x0) || prior)
Each term is written r (exp(d) - 1 - d), d = log s - log r, which does not cancel where s is near r (in
float32 the written form loses 1e-5).

Equivalences, with s made of a posterior x by `processes.scores.concrete_score`:
- uniform, x leave-one-out: UDLM's continuous-time bound (arXiv 2412.10193);
- absorbing, x normalised: sigma' DSE is MDLM's integrand -alpha' / (1 - alpha) CE, RADD's DSE
  (arXiv 2406.03736, theorem 2).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import example_keys, expand, namespace
from diffusion_jax.objectives.per_example import global_index
from diffusion_jax.objectives.times import build_times
from diffusion_jax.processes import scores
from diffusion_jax.processes.matrix_process import on_host
from diffusion_jax.processes.token_kernels import one_hot

_IMPOSSIBLE = -80.0  # a log-ratio below which r (exp(d) - 1 - d) is s in float32


def score_entropy(process, log_score, tokens, xt, t):
    """Denoising score entropy (1) of each token, without sigma'.

    Args:
      process: a discrete process in continuous time.
      log_score: `[..., V]` (a `CTMC`: `[..., S]`), log of the model's ratios. The entry of the present
        token does not count; of an absorbing process unmasked positions do not.
      tokens: int `[...]`, clean.
      xt: int `[...]`, noisy.
      t: scalar or `[B]`.
    Returns:
      `[...]`, non-negative, NumPy or JAX as the arguments are.
    Raises:
      ValueError: log_score of another shape.
    """
    rates = process.rates_into(xt, log_score.dtype)
    width = rates.shape[-1] if rates.shape[-1] > 1 else process.vocab_size
    if log_score.shape != (*tokens.shape, width):
        raise ValueError(
            f"log_score of shape {tuple(log_score.shape)} does not fit tokens {tuple(tokens.shape)} "
            f"with {width} scores each"
        )
    xp = namespace(log_score, tokens)
    clean = xp.where(one_hot(tokens, process.vocab_size, bool), 0.0, -np.inf)
    log_ratio = process.log_score(clean.astype(log_score.dtype), xt, t)
    possible = log_ratio > _IMPOSSIBLE
    gap = xp.where(possible, log_score - log_ratio, 0.0)
    near = xp.exp(log_ratio) * (xp.expm1(gap) - gap)
    return (rates * xp.where(possible, near, xp.exp(log_score))).sum(axis=-1)


def prior_kl(process, tokens, t=1.0):
    """KL(q(x_t | x0) || prior) of each token, `[...]`, the last term of (2); host times only.

    An absorbing process has none: a mask tells nothing, and what is not masked at t is ignored.

    Raises:
      ValueError: another process.
    """
    if hasattr(process, "prior_probs"):
        seen = process.likelihood(np.arange(process.num_states), float(t)).T  # [V, S]
        prior = np.asarray(process.prior_probs)
    elif hasattr(process, "mask_id") or not hasattr(process, "alpha"):
        raise ValueError(f"no prior term for {type(process).__name__}")
    else:  # one token stands for all
        alpha, size = float(process.alpha(t)), process.vocab_size
        kept, other = alpha + (1.0 - alpha) / size, (1.0 - alpha) / size
        value = kept * np.log(kept * size)
        value += (size - 1) * other * np.log(other * size) if other > 0 else 0.0
        return namespace(tokens).full(tokens.shape, value)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(seen > 0, seen * (np.log(seen) - np.log(prior)), 0.0).sum(axis=1)
    return terms[tokens] if isinstance(tokens, np.ndarray) else jnp.asarray(terms)[tokens]


def check_total_noise(process):
    """Raises ValueError where sigma_bar(t_max) is infinite: scores vanish there and rates explode."""
    if not hasattr(process, "sigma_bar"):
        raise ValueError(
            f"score entropy needs a process in continuous time, got {type(process).__name__}"
        )
    if on_host(process.t_max):
        noise = process.sigma_bar(process.t_max)
        if on_host(noise) and not np.isfinite(noise):
            raise ValueError(
                "a score network needs finite total noise, but alpha(1) = 0: give the schedule an "
                "eps_end (SEDD: 1e-3), or take the geometric one"
            )


def _evaluated(process, network, key, tokens, times, index, total):
    """Times, noisy tokens and the network's output of a batch."""
    process.check_tokens(tokens, process.vocab_size - 1)
    index, total = global_index(tokens, index, total)
    t_key, noise_key = jax.random.split(key)
    t, inverse_density = build_times(times)(process, t_key, index, total)
    t = jnp.minimum(t, 1.0 - 1e-6)  # at alpha = 0 the value 0 is a limit, infinity times 0
    xt = process.corrupt(example_keys(noise_key, index), tokens, t)
    output, _ = evaluate(network, xt, process.point(t))
    output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
    return t, inverse_density, xt, output


def _weighted(process, log_score, tokens, xt, t, inverse_density):
    per_token = score_entropy(process, log_score, tokens, xt, t)
    losses = inverse_density * process.rate(t) * per_token.sum(axis=1)
    changed = (xt != tokens).mean(axis=1)
    return losses, {
        "t": t,
        "changed": changed,
        "per_token": expand(process.rate(t), per_token) * per_token,
    }


def denoising_score_entropy(
    process,
    score: Callable,
    key,
    tokens,
    *,
    times: str | Callable = "uniform",
    index=None,
    total: int | None = None,
):
    """One-sample estimate of the integral in (2) for a score network, nats a sequence.

    Times are drawn on [t_min, 1].

    Args:
      process: a discrete process in continuous time with finite total noise.
      score: `(x_t int [B, L], t [B]) -> log-scores`, see `score_entropy`.
      key: split into times and noise; example i's is folded with `index[i]`.
      tokens: int `[B, L]`, clean.
      times: a registered name or a time sampler; "uniform" is low-discrepancy.
      index, total: positions in, and size of, the global batch.
    Returns:
      `(losses [B], aux)`; aux holds `t` and `changed` (the fraction of tokens changed), `[B]`, and
      `per_token [B, L]`.
    Raises:
      ValueError: infinite total noise, tokens that are not clean integers `[B, L]`, a wrong shape.
    """
    check_total_noise(process)
    t, density, xt, log_score = _evaluated(process, score, key, tokens, times, index, total)
    return _weighted(process, log_score, tokens, xt, t, density)


def leave_one_out_bound(
    process,
    denoise: Callable,
    key,
    tokens,
    *,
    parameterization: str = "leave_one_out",
    times: str | Callable = "uniform",
    index=None,
    total: int | None = None,
):
    """One-sample estimate of the integral in (2) for a network of posteriors, nats a sequence.

    For a uniform process UDLM's bound (arXiv 2412.10193, eq. 13), for an absorbing one MDLM's, and the same
    for any `CTMC`: the scores are those of the posteriors.

    Args:
      denoise: `(x_t, t) -> logits [B, L, V]` over clean tokens.
      parameterization: what the logits are of: "leave_one_out", p(x0^i | x_t without i), which is what
        this loss teaches a network without further ado, or "posterior", p(x0^i | x_t).
      process, key, tokens, times, index, total: as `denoising_score_entropy`, alpha(1) = 0 allowed.
    Returns:
      as `denoising_score_entropy`.
    """
    t, density, xt, logits = _evaluated(process, denoise, key, tokens, times, index, total)
    if logits.shape != (*tokens.shape, process.vocab_size):
        raise ValueError(
            f"logits of shape {logits.shape} do not fit tokens of shape {tokens.shape} and "
            f"{process.vocab_size} values"
        )
    log_score = scores.concrete_score(process, logits, xt, t, parameterization)
    return _weighted(process, log_score, tokens, xt, t, density)
