"""Continuous-time Markov chains on tokens with any rate matrix (arXiv 2205.14987; 2310.16834).

Every token moves by itself, from state i to j at the rate sigma'(t) Q(i, j): rows are where it comes from,
they sum to 0, and the law of x_t given x0 = i is row i of exp(sigma_bar(t) Q). With a masking schedule
sigma_bar = -log alpha, so that the absorbing and the uniform chain are `absorbing_rates` and `uniform_rates`.

On the host (samplers) exp is computed in float64. In a trace (losses: a time an example) sigma_bar is written
in base 16 in units of 1 / (16 q), q the fastest rate, and a row of probabilities is multiplied by one stored
matrix a digit; the remainder is the series of exp to order 8. All these matrices are non-negative, so small
probabilities keep their relative accuracy whatever the eigenvalues: about 2e-6 in float32 above 1e-9.
"""

import math

import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import namespace, pytree_dataclass, static
from diffusion_jax.processes.discrete import ScheduledProcess, check_vocab_size
from diffusion_jax.processes.mask_schedules import LinearSchedule, MaskSchedule
from diffusion_jax.processes.matrix_process import MatrixProcess, check_prior, on_host
from diffusion_jax.processes.token_kernels import log_or_low
from diffusion_jax.registry import check_choice, get, register

_SCHEDULE = LinearSchedule(eps_end=1e-3)
_BASE = 16
_SERIES = 8


def _powers(first, order):
    """The series of exp up to an order, for a matrix of norm at most about 1."""
    total = term = np.eye(len(first))
    for k in range(1, order + 1):
        term = term @ first / k
        total = total + term
    return total


def exponential(rates, noise) -> np.ndarray:
    """exp(noise Q), float64 `[S, S]`, by the series of a stochastic matrix and squaring: never negative."""
    turns = -np.diag(rates).min() * noise
    halvings = max(int(np.ceil(np.log2(max(turns, 1e-30)))) + 1, 0)
    turns /= 2.0**halvings
    jump = np.maximum(np.eye(len(rates)) + rates / -np.diag(rates).min(), 0.0)
    made = np.exp(-turns) * _powers(turns * jump, 20)
    for _ in range(halvings):
        made = made / made.sum(axis=1, keepdims=True)
        made = made @ made
    return made / made.sum(axis=1, keepdims=True)


def _inverse_exponential(rates, noise):
    """exp(-noise Q), which has negative entries."""
    halvings = max(int(np.ceil(np.log2(max(np.abs(rates).max() * noise, 1e-30)))) + 1, 0)
    made = _powers(-noise / 2.0**halvings * rates, 20)
    for _ in range(halvings):
        made = made @ made
    return made


def absorbing_rates(vocab_size: int) -> np.ndarray:
    """Q `[V + 1, V + 1]` of masking: rate 1 from every token to the last state."""
    rates = np.diag(np.append(-np.ones(vocab_size), 0.0))
    rates[:-1, -1] = 1.0
    return rates


def uniform_rates(vocab_size: int) -> np.ndarray:
    """Q `[V, V]` with rates 1 / V off the diagonal."""
    return np.full((vocab_size, vocab_size), 1.0 / vocab_size) - np.eye(vocab_size)


def nearest_neighbour_rates(vocab_size: int) -> np.ndarray:
    """Q `[V, V]` of ordered tokens: rate V^2 / 10 to each neighbour, so that noise 1 forgets most."""
    rate = vocab_size**2 / 10.0
    off = np.diag(np.full(vocab_size - 1, rate), 1)
    off = off + off.T
    return off - np.diag(off.sum(axis=1))


_NAMED = {
    "absorbing": absorbing_rates,
    "uniform": uniform_rates,
    "nearest_neighbour": nearest_neighbour_rates,
}


def check_rates(rates) -> np.ndarray:
    """A rate matrix as float64 `[S, S]`.

    Raises:
      ValueError: not square, not finite, a negative rate, rows that do not sum to 0, nothing moves.
    """
    rates = np.asarray(rates, np.float64)
    if rates.ndim != 2 or rates.shape[0] != rates.shape[1] or len(rates) < 2:
        raise ValueError(f"rates must be a square matrix [S, S], got shape {rates.shape}")
    if not np.isfinite(rates).all():
        raise ValueError("rates must be finite")
    off = rates - np.diag(np.diag(rates))
    if off.min() < 0:
        i, j = np.unravel_index(off.argmin(), off.shape)
        raise ValueError(f"rates[{i}, {j}] = {rates[i, j]:.6g}: rates between states cannot be < 0")
    sums = rates.sum(axis=1)
    scale = np.abs(rates).max()
    if scale == 0:
        raise ValueError("rates are all 0: nothing moves")
    if np.abs(sums).max() > 1e-8 * scale:
        i = int(np.abs(sums).argmax())
        hint = " (the columns do: transpose it)" if np.allclose(rates.sum(axis=0), 0.0) else ""
        raise ValueError(f"row {i} of rates sums to {sums[i]:.6g}, rows must sum to 0{hint}")
    return off - np.diag(off.sum(axis=1))  # exactly


def _digits(rates, most):
    """`(unit, table [levels, 16, S, S], limit)`: exp(d 16^l unit Q), and what it tends to.

    Levels reach the noise `most`, or that at which nothing changes any more.
    """
    fastest = -np.diag(rates).min()
    unit = 1.0 / (_BASE * fastest)
    base, levels, reach = exponential(rates, unit), [], unit
    while True:
        powers = [np.eye(len(rates))]
        for _ in range(_BASE - 1):
            powers.append(powers[-1] @ base)
            powers[-1] /= powers[-1].sum(axis=1, keepdims=True)
        levels.append(np.stack(powers))
        following = powers[-1] @ base
        settled = np.abs(following @ following - following).max() < 1e-12
        reach *= _BASE
        if reach > most or settled:
            return unit, np.stack(levels), following
        base = following / following.sum(axis=1, keepdims=True)


def _stationary(rates):
    """The law `[S]` that every start tends to.

    Raises:
      ValueError: there is more than one.
    """
    fastest = -np.diag(rates).min()
    jump = np.eye(len(rates)) + rates / (2.0 * fastest)
    for _ in range(80):
        jump = jump @ jump
        jump /= jump.sum(axis=1, keepdims=True)
    if np.abs(jump - jump[:1]).max() > 1e-8:
        raise ValueError(
            "rates have more than one stationary law (states that do not reach a common class): pass prior"
        )
    return np.where(jump[0] < 1e-14, 0.0, jump[0]) / jump[0].sum()


@pytree_dataclass
class CTMC(MatrixProcess, ScheduledProcess):
    """A continuous-time Markov chain; made by `ctmc`.

    Equivalences: `absorbing_rates` is `Absorbing`, `uniform_rates` is `Uniform`.

    Attributes:
      vocab_size: clean tokens V, the first of the S states.
      rates: Q `[S, S]`, float64.
      prior_probs: law of x_1, `[S]`.
      schedule: gives sigma_bar = -log alpha; alpha is no probability here unless nothing returns.
      t_min: lower end of the times drawn in training.
      unit, digits: see the module.
    """

    vocab_size: int = static()
    rates: np.ndarray
    prior_probs: np.ndarray
    schedule: MaskSchedule
    t_min: float
    unit: float
    digits: np.ndarray

    def __post_init__(self):
        pass  # `ctmc` has checked; a pytree is rebuilt with whatever leaves it is given

    def matrix(self, t, s=None):
        """exp((sigma_bar(t) - sigma_bar(s)) Q), float64 `[S, S]` or `[N, S, S]` for times `[N]`."""
        noise = np.asarray(self.noise_between(s, t))
        if noise.ndim:
            return np.stack([self._exp(v) for v in noise])
        return self._exp(noise)

    def _exp(self, noise):
        rates = np.asarray(self.rates)
        most = float(np.asarray(self.unit)) * float(_BASE ** len(self.digits))
        return exponential(rates, min(float(noise), most))

    def _advance(self, probs, noise):
        """`probs [..., S]` (float32) times exp(noise Q); noise a traced scalar or `[B]`."""
        most = jnp.asarray(self.unit * (float(_BASE) ** len(self.digits)), probs.dtype)
        scaled = jnp.minimum(noise, most * (1.0 - 1e-6)) / jnp.asarray(self.unit, probs.dtype)
        whole = jnp.floor(scaled)
        rest = (scaled - whole) * jnp.asarray(self.unit, probs.dtype)
        whole = whole.astype(jnp.int32)
        for level in range(len(self.digits)):
            digit = (whole // _BASE**level) % _BASE
            probs = probs @ jnp.asarray(self.digits[level], probs.dtype)[digit]
        fastest = 1.0 / (_BASE * self.unit)
        jump = jnp.eye(self.num_states, dtype=probs.dtype) + jnp.asarray(
            self.rates / fastest, probs.dtype
        )
        turns = jnp.asarray(rest * fastest, probs.dtype)
        turns = turns.reshape(turns.shape + (1,) * (probs.ndim - turns.ndim))
        total = term = probs
        for order in range(1, _SERIES + 1):
            term = (term @ jump) * (turns / order)
            total = total + term
        return total * jnp.exp(-turns)

    def forward_probs(self, x0_probs, t):
        """q(x_t), `[..., S]`, of x0 with probabilities `[..., V]`; t scalar or `[B]` with `[B, L, V]`."""
        probs = self.padded(x0_probs)
        if on_host(t) and np.ndim(t) == 0:
            return probs @ self.matrix(t).astype(probs.dtype)
        return self._advance(probs, self.sigma_bar(jnp.asarray(t)))

    def rows(self, tokens, t):
        """q(x_t | x0 = tokens), `[..., S]`."""
        if on_host(t) and np.ndim(t) == 0:
            return jnp.asarray(self.matrix(t), jnp.float32)[tokens]
        return self.forward_probs(self._one_hot(tokens, jnp.float32), t)

    def likelihood(self, tokens, t, dtype=None):
        """q(x_t = tokens | x0 = v), `[..., V]`."""
        if on_host(t) and np.ndim(t) == 0:
            return super().likelihood(tokens, t, dtype)
        # row v at the column `tokens`: the transposed chain's advance would need its own tables
        eye = jnp.broadcast_to(
            jnp.eye(self.num_states, dtype=jnp.float32),
            (tokens.shape[0], self.num_states, self.num_states),
        )
        seen = self._advance(eye, self.sigma_bar(jnp.asarray(t)))
        return self.kernel.likelihood({"seen": seen}, tokens, jnp.float32)

    def rate_row(self, t, dt):
        """Matrices of the reverse rates at t, times dt."""
        off = np.asarray(self.rates) - np.diag(np.diag(self.rates))
        return {"seen": self.matrix(t), "rates": dt * self.rate(t) * off}

    def analytic_row(self, t, s):
        """Matrices of Tweedie's step.

        Raises:
          ValueError: a step so long that undoing it has no accuracy left.
        """
        noise = float(self.noise_between(s, t))
        if not noise * np.abs(self.rates).max() < 30.0:
            raise ValueError(
                f"Tweedie's step undoes exp({noise:.3g} Q), which float64 cannot: take more steps, or "
                f"a schedule of less noise"
            )
        inverse = _inverse_exponential(np.asarray(self.rates), noise)
        return {"inverse": inverse, "step": self.matrix(t, s)}

    def rates_into(self, tokens, dtype=np.float32):
        """Q(j, token), `[..., S]`, and 0 at the token itself."""
        off = self.rates - np.diag(np.diag(self.rates)) if on_host(self.rates) else None
        if off is None:
            off = self.rates * (1.0 - jnp.eye(self.num_states))
        turned = off.T.astype(dtype)
        return turned[tokens] if isinstance(tokens, np.ndarray) else jnp.asarray(turned)[tokens]

    def log_score(self, log_probs, tokens, t):
        """log p_t(j) / p_t(token), `[..., S]`, from log leave-one-out posteriors `[..., V]`."""
        xp = namespace(log_probs)
        marginal = log_or_low(self.forward_probs(xp.exp(log_probs), t))
        here = xp.take_along_axis(marginal, tokens[..., None].astype(int), axis=-1)
        return marginal - here


@register("process", "ctmc", family="discrete", paper="2205.14987")
def ctmc(
    vocab_size: int,
    rates="uniform",
    schedule: MaskSchedule | str = _SCHEDULE,
    *,
    prior=None,
    t_min: float = 1e-3,
) -> CTMC:
    """A continuous-time Markov chain with any rate matrix.

    Args:
      vocab_size: clean tokens V.
      rates: Q `[S, S]`, S >= V: Q[i, j] >= 0 is the rate from i to j, rows sum to 0; or "absorbing" (S =
        V + 1), "uniform", "nearest_neighbour".
      schedule: a `MaskSchedule` or its name; the chain runs on the clock sigma_bar = -log alpha.
      prior: law of x_1, `[S]`; default the stationary law of Q.
      t_min: lower end of the times drawn in training.
    Raises:
      ValueError: a bad rate matrix (see `check_rates`), fewer states than tokens, no unique stationary
        law and no prior.
    """
    if isinstance(rates, str):
        check_choice("rates", rates, _NAMED)
        rates = _NAMED[rates](vocab_size)
    rates = check_rates(rates)
    if isinstance(schedule, str):
        schedule = get("schedule", schedule)()
    size = len(rates)
    prior = _stationary(rates) if prior is None else check_prior("ctmc", prior, size)
    most = float(schedule.sigma_bar(1.0))
    unit, digits, _ = _digits(rates, most if math.isfinite(most) else np.inf)
    made = CTMC(vocab_size, rates, prior, schedule, t_min, unit, digits.astype(np.float32))
    check_vocab_size(made)
    ScheduledProcess.__post_init__(made)
    if size < vocab_size:
        raise ValueError(f"rates have {size} states for vocab_size = {vocab_size} tokens")
    return made
