"""Remasking: reverse processes that take back tokens they have revealed (ReMDM, arXiv 2503.00307).

In a step t -> s a revealed token is masked again with probability sigma, and a masked one revealed with
  (1) u = (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)                                [eq. 6]
which keeps the law of the masks, every token clean with probability alpha, for any sigma in
[0, min(1, (1 - alpha_s) / alpha_t)]. The strategies choose sigma (section 4):
  (2) "cap" min(eta, largest); "rescale" eta * largest.
  (3) "conf" eta * largest * softmax(-psi) over the sequence's revealed tokens, psi the probability that
      a token had when it was drawn: the doubtful ones go first.
  (4) "loop" three phases: reveal until alpha_on, hold alpha there with sigma = eta, reveal the rest.

Equivalences: sigma = 0 is masked ancestral sampling, bit for bit.
Deviations: tokens that were given are never masked; "loop" and "cap" hold for any schedule (the
authors' are linear); psi is the network's own probability, before temperature and filters. As in the
authors' code, "conf" leaves u at sigma = 0, so that more positions are masked than alpha says.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import fold_all, is_concrete, namespace
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.categorical import build_draw, draw_where
from diffusion_jax.samplers.confidence import token_log_probs
from diffusion_jax.samplers.masked_ancestral import reveal_edges
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times
from diffusion_jax.samplers.token_states import (
    MaskedPrepare,
    check_absorbing,
    check_ends_masked,
    check_length,
    check_logits,
    result,
)

STRATEGIES = ("cap", "rescale", "conf", "loop")
_ETA = {"cap": 0.008, "conf": 1.0, "loop": 0.02}  # the authors', for 1024 steps


def largest_sigma(process, t, s):
    """`min(1, (1 - alpha_s) / alpha_t)`: above it the law of the masks cannot be kept."""
    alpha = float(process.alpha(t))
    return 1.0 if alpha <= 0 else min(1.0, float(process.mask_rate(s)) / alpha)


def remasking_probs(process, x0_probs, tokens, t, s, sigma):
    """`p(x_s | x_t)` of one step t -> s with remasking, position by position; NumPy or JAX.

    Args:
      x0_probs: `[..., V]`, p(x0 | unmasked tokens).
      tokens: int `[...]`, x_t.
      t, s: scalars, s < t.
      sigma: probability of masking a revealed token, a scalar or `[...]`.
    Returns:
      `[..., V + 1]`, the mask class last.
    """
    xp = namespace(x0_probs, tokens, sigma)
    sigma = xp.asarray(sigma) + xp.zeros(tokens.shape)
    reveal = (process.reveal_probability(t, s) + sigma * _odds(process, t))[..., None]
    masked = xp.concatenate([reveal * x0_probs, 1.0 - reveal], axis=-1)
    stays = xp.eye(process.vocab_size + 1, dtype=x0_probs.dtype)
    kept = (1.0 - sigma)[..., None] * stays[tokens] + sigma[..., None] * stays[-1]
    return xp.where((tokens == process.mask_id)[..., None], masked, kept)


def _odds(process, t):
    """`alpha_t / (1 - alpha_t)`: what sigma adds to the reveal probability."""
    return process.alpha(t) / process.mask_rate(t)


class RemaskingState(NamedTuple):
    """Scan state: reveals are planned as in `masked_ancestral`, and anew for what is masked again.

    Attributes:
      x: int tokens `[B, L]`.
      given: bool `[B, L]`, tokens that were there at the start.
      step: int32 `[B, L]`, the step that reveals a masked position.
      uniform: `[B, L]`, which category it then becomes.
      left: `[N]`, the chance that a token masked at the start is masked after each step.
      psi: `[B, L]`, the probability of each revealed token when it was drawn, or None.
    """

    x: Any
    given: Any
    step: Any
    uniform: Any
    left: Any
    psi: Any


class _Start(NamedTuple):
    vocab_size: int
    confident: bool

    def __call__(self, rng, start, tokens):
        keys, shape = rng(), tokens.shape[1:]
        bits = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(fold_all(keys, 0))
        step = jnp.searchsorted(start["edges"], bits, side="right").astype(jnp.int32)
        return RemaskingState(
            tokens,
            tokens != self.vocab_size,
            jnp.minimum(step, start["left"].shape[0] - 1),
            start["draw"].uniforms(fold_all(keys, 1), shape),
            start["left"],
            jnp.ones(tokens.shape, jnp.float32) if self.confident else None,
        )


class _Step(NamedTuple):
    vocab_size: int

    def __call__(self, call, rng, state, inputs):
        tokens, draw = state.x, inputs["draw"]
        masked = tokens == self.vocab_size
        reveal = masked & (state.step <= inputs["number"])
        hide, step, uniform = self._hide(rng(), state, ~masked & ~state.given, inputs)
        hidden = jnp.where(hide, jnp.asarray(self.vocab_size, tokens.dtype), tokens)
        most = -(-tokens.shape[1] // state.left.shape[0])

        def use(logits):
            check_logits(logits, tokens, self.vocab_size)
            x = draw_where(state.uniform, logits, reveal, draw, hidden, most)
            if state.psi is None:
                return x, None
            wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            drawn = jnp.exp(token_log_probs(wide, x)).astype(state.psi.dtype)
            return x, jnp.where(reveal, drawn, state.psi)

        otherwise = (hidden, state.psi)
        x, psi = call.when(reveal.any(), tokens, inputs["point"], use, otherwise)
        return state._replace(x=x, step=step, uniform=uniform, psi=psi), None

    def _hide(self, keys, state, free, inputs):
        """Which revealed tokens are masked again, and the plan of all after that."""
        shape, draw, sigma = free.shape[1:], inputs["draw"], inputs["sigma"]
        if state.psi is not None:
            weights = jnp.where(free, jnp.exp(-state.psi), 0.0)
            sigma = sigma * weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2, *shape)))(fold_all(keys, 0))
        hide = free & (uniforms[:, 0] < sigma)
        # the first later step after which the share of masks is below a uniform share of today's
        target = uniforms[:, 1] * state.left[inputs["number"]]
        step = jnp.searchsorted(-state.left, -target, side="left").astype(jnp.int32)
        step = jnp.minimum(step, state.left.shape[0] - 1)
        fresh = draw.uniforms(fold_all(keys, 1), shape)
        return hide, jnp.where(hide, step, state.step), jnp.where(hide, fresh, state.uniform)


def _check(strategy, eta, t_on, t_off, alpha_on):
    check_choice("strategy", strategy, STRATEGIES)
    if eta is None and strategy not in _ETA:
        raise ValueError(f"strategy {strategy!r} needs eta, a share in [0, 1] of the largest sigma")
    if is_concrete(eta) and not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if not 0.0 < t_off < t_on < 1.0:
        raise ValueError(f"need 0 < t_off < t_on < 1, got t_off = {t_off}, t_on = {t_on}")
    if not 0.0 < alpha_on < 1.0:
        raise ValueError(f"alpha_on must lie in (0, 1), got {alpha_on}")


def _loop_rates(process, clock, t_on, t_off, alpha_on):
    """Mask rates at the times of the loop's clock: down to 1 - alpha_on, held, and down to the end."""
    first, last = (float(process.mask_rate(t)) for t in (clock[0], clock[-1]))
    held = 1.0 - alpha_on
    if not last < held < first:
        raise ValueError(f"alpha_on = {alpha_on} is outside of alpha in this range of times")
    return np.interp(clock, [clock[-1], t_off, t_on, clock[0]], [last, held, held, first])


@register("sampler", "remdm", family="discrete", paper="2503.00307", skips=True)
def remdm(
    process,
    num_steps: int | None = None,
    *,
    length: int | None = None,
    strategy: str = "cap",
    eta: float | None = None,
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
    grid=None,
    t_start=None,
    t_end=None,
    **drawing,
) -> Sampler:
    """Ancestral sampling that may mask revealed tokens again (Wang et al., arXiv 2503.00307).

    A model that errs can correct itself, so that more steps than tokens go on helping; with a perfect
    model remasking is no better than ancestral sampling. A step in which no sequence reveals a token
    makes no call. The authors sample with nucleus=0.9, nucleus_rule="below".

    Args:
      process: an `Absorbing` process.
      num_steps: network calls at most, default 64.
      length: sequence length, needed where `x_init` is a number of sequences. Tokens `[B, L]` as
        `x_init` are infilled: what is not the mask id stays.
      strategy: "cap", "rescale", "conf" or "loop".
      eta: size of sigma; default 0.008 ("cap"), 0.02 ("loop"), 1 ("conf"), no default for "rescale".
      t_on, t_off, alpha_on: "loop" holds alpha = alpha_on while its clock runs from t_on to t_off.
      grid, t_start, t_end: see `time_grids.build_times`; the clock of "loop".
      drawing: temperature, nucleus, top_k, ..., see `categorical.build_draw`.
    Raises:
      ValueError: not an absorbing process, or an option that does not exist or fit.
    """
    check_absorbing(process)
    check_length(length)
    if t_start is None:
        check_ends_masked(process)
    draw = build_draw(**drawing)
    _check(strategy, eta, t_on, t_off, alpha_on)
    eta = _ETA.get(strategy) if eta is None else eta
    times = clock = build_times(process, num_steps, grid, t_start, t_end, default_steps=64)
    if strategy == "loop":
        if not clock[-1] < t_off or not t_on < clock[0]:
            raise ValueError(
                f"t_off = {t_off} and t_on = {t_on} must lie within {clock[-1]}..{clock[0]}"
            )
        times = process.t_of_mask_rate(_loop_rates(process, clock, t_on, t_off, alpha_on))
        times = np.asarray(times, np.float64)
    points = [process.point(t) for t in times]
    reveal = np.array([process.reveal_probability(t, s) for t, s in itertools.pairwise(times)])
    largest = np.array([largest_sigma(process, t, s) for t, s in itertools.pairwise(times)])
    if strategy in ("rescale", "conf"):
        sigma = eta * largest
    else:
        sigma = np.minimum(eta, largest)
    if strategy == "loop":  # a step that crosses an end of the plateau remasks if it begins in it
        sigma = np.where((clock[:-1] <= t_on) & (clock[:-1] > t_off), sigma, 0.0)
    if strategy != "conf":
        reveal = reveal + sigma * np.array([_odds(process, t) for t in times[:-1]])
    reveal[-1], sigma[-1] = 1.0, 0.0
    stacked = {k: np.array([p[k] for p in points]) for k in points[0]}
    xs = {
        "point": {k: v[:-1] for k, v in stacked.items()},
        "next": {k: v[1:] for k, v in stacked.items()},
        "number": np.arange(len(reveal), dtype=np.int32),
        "reveal": reveal,
        "sigma": sigma,
        "draw": jax.tree.map(lambda v: np.full(len(reveal), v), draw),
    }
    # the plan of `masked_ancestral`, so that the same keys give the same samples where sigma is 0
    start = {"edges": reveal_edges(reveal), "left": np.cumprod(1.0 - reveal), "draw": draw}
    return Sampler(
        init=_Start(process.vocab_size, strategy == "conf"),
        step=_Step(process.vocab_size),
        finish=result,
        xs=xs,
        start=start,
        nfe=len(reveal),
        prepare=MaskedPrepare(process.vocab_size, length),
        stochastic=True,
        name="remdm",
    )
