"""Steps with learned coefficients and times (LSD, LSD+: arXiv 2509.19962), the student of `fit_lsd`.

A step t -> s of a discrete model moves token x_t to v != x_t with probability P(v). With a coefficient
phi_k for step k
  "rate"       phi P(v), the rest stays: the score, and with it the rate, is multiplied  [the paper]
  "log_score"  P from the network's log-probabilities times phi: a temperature 1 / phi    [released code]
In the second meaning the part of the log-score that time alone decides (absorbing graph: alpha / (1 - alpha))
is left as it is. A coefficient above 1 then lowers the entropy of the samples: report it.

Two rules give P, on the absorbing and on the uniform graph:
  "ancestral"  the prediction held through the step (Tweedie, tau-leaping)
  "euler"      (t - s) times the rate at t

Equivalences: phi = 1 and uniform times are `masked_ancestral` (rate "analytic" or "euler") on the absorbing
graph, `discrete_ancestral` and `discrete_euler` on the uniform one, bit for bit.
"""

import dataclasses
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.array_files import read_arrays, write_arrays
from diffusion_jax.numerics import namespace
from diffusion_jax.processes import Absorbing, DiscreteProcess, Uniform
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.categorical import inverse_cdf
from diffusion_jax.samplers.ctmc import discrete_ancestral, discrete_euler
from diffusion_jax.samplers.masked_ancestral import (
    masked_ancestral,
    reveal_edges,
    reveal_probabilities,
)
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times
from diffusion_jax.samplers.token_states import check_length, check_logits

COEFFICIENTS = ("rate", "log_score")
RULES = ("ancestral", "euler")
_HUGE = 1e9  # stands for an infinite rate
_FORMAT = "diffusion_jax.lsd.1"


def check_graph(process):
    """Raises ValueError unless the process is absorbing or uniform."""
    if not isinstance(process, Absorbing | Uniform):
        raise ValueError(
            f"learned steps need an Absorbing or a Uniform process, got {type(process).__name__}"
        )


def jump_rate(process, t):
    """Probability a unit of time, at t, that a token jumps: `-alpha' / (1 - alpha)` of masked ones, and
    `-alpha' / alpha` (to be spread by the ratios of probabilities) on the uniform graph."""
    if isinstance(process, Absorbing):
        return process.weight(t)
    return process.weight(t) * process.mask_rate(t) / process.alpha(t)


def step_probs(process, rule, probs, tokens, t, s, phi=None, held=None):
    """`P(x_s | x_t)` of one learned step, position by position; NumPy or JAX.

    Args:
      rule: "ancestral" or "euler".
      probs: `[..., V]`, p(x0 | the other tokens of x_t).
      tokens: int `[...]`, x_t.
      t, s: scalars, s < t.
      phi: factor on the probability of every jump; None: no factor.
      held: the time whose rates an Euler step keeps; default t.
    Returns:
      `[..., num_states]`; an Euler step without a factor is not clipped: its jumps may exceed 1.
    """
    xp = namespace(probs, tokens)
    if rule == "ancestral":
        plain = process.reverse_probs(probs, tokens, t, s)
    else:
        plain = _euler(xp, process, probs, tokens, t - s, t if held is None else held)
    return plain if phi is None else scale_jumps(plain, tokens, phi)


def scale_jumps(probs, tokens, phi):
    """Laws `[..., S]` of a step from `tokens [...]` with the probability of every jump times phi.

    Jumps that exceed 1 together are normalised, and nothing stays.
    """
    xp = namespace(probs, tokens, phi)
    stays = tokens[..., None] == xp.arange(probs.shape[-1])
    jumps = xp.where(stays, 0.0, phi * probs)
    total = jumps.sum(axis=-1, keepdims=True)
    scaled = xp.where(stays, xp.maximum(1.0 - total, 0.0), jumps / xp.maximum(total, 1.0))
    return scaled.astype(probs.dtype)


def _euler(xp, process, probs, tokens, dt, held):
    rate = dt * xp.minimum(jump_rate(process, held), _HUGE)
    if isinstance(process, Absorbing):
        masked = xp.concatenate(
            [rate * probs, xp.broadcast_to(1.0 - rate, (*probs.shape[:-1], 1))], axis=-1
        )
        stays = tokens[..., None] == xp.arange(process.num_states)
        return xp.where((tokens == process.mask_id)[..., None], masked, stays.astype(probs.dtype))
    stays = tokens[..., None] == xp.arange(process.num_states)
    size, alpha = process.vocab_size, process.alpha(held)
    marginal = alpha * probs + (1.0 - alpha) / size
    own = (marginal * stays).sum(axis=-1, keepdims=True)
    jumps = xp.where(stays, 0.0, rate / size * marginal / own)
    return xp.where(stays, xp.maximum(1.0 - jumps.sum(axis=-1, keepdims=True), 0.0), jumps)


class _ScaledStep(NamedTuple):
    """A step of `discrete_ancestral` or `discrete_euler` with a coefficient."""

    base: Any

    def __call__(self, call, rng, state, inputs):
        tokens, draw, phi = state.x, inputs["draw"], inputs["phi"]
        logits = call(tokens, inputs["point"])
        check_logits(logits, tokens, self.base.kernel.vocab_size)
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        plain = self.base.probs(wide * inputs["sharpness"], tokens, inputs)
        probs = jnp.where(phi == 1.0, plain, scale_jumps(plain, tokens, phi))
        uniforms = draw.uniforms(rng(), tokens.shape[1:])
        drawn = inverse_cdf(jnp.maximum(probs, 0.0).astype(uniforms.dtype), uniforms)
        x = drawn.astype(tokens.dtype)
        if state.prompt is not None:
            x = jnp.where(state.prompt.given, state.prompt.tokens.astype(x.dtype), x)
        return state._replace(x=x), logits


def _checked(coefficients, count):
    phi = np.ones(count) if coefficients is None else np.asarray(coefficients, np.float64)
    if phi.shape != (count,) or not (np.isfinite(phi) & (phi > 0)).all():
        raise ValueError(f"{count} steps need {count} positive coefficients, got {coefficients}")
    return phi


@register("sampler", "lsd", family="discrete", paper="2509.19962")
def lsd(
    process,
    num_steps: int | None = None,
    *,
    length: int | None = None,
    coefficients=None,
    coefficient: str = "rate",
    rule: str = "ancestral",
    grid=None,
    t_start=None,
    t_end=None,
    **drawing,
) -> Sampler:
    """Ancestral or Euler steps with a coefficient each (LSD, arXiv 2509.19962), as `fit_lsd` learns them.

    Args:
      process: an `Absorbing` or `Uniform` process; on the uniform graph the denoiser gives
        p(x0^i | x_t without position i).
      num_steps: network calls M, default that of `coefficients`, or 64.
      length: sequence length, needed where `x_init` is a number of sequences.
      coefficients: phi `[M]`, positive; default 1.
      coefficient: what they multiply: "rate" (the paper) or "log_score" (the released code: a temperature).
      rule: "ancestral" or "euler".
      grid, t_start, t_end: see `time_grids.build_times`; explicit times `[M + 1]` are those of LSD+.
      drawing: temperature, nucleus, top_k, ..., see `categorical.build_draw`.
    Raises:
      ValueError: another process, a bad length, grid or coefficient, an unknown or bad option.
    """
    check_graph(process)
    check_length(length)
    check_choice("coefficient", coefficient, COEFFICIENTS)
    check_choice("rule", rule, RULES)
    if num_steps is None and coefficients is not None:
        num_steps = len(coefficients)
    times = build_times(process, num_steps, grid, t_start, t_end, default_steps=64)
    phi = _checked(coefficients, len(times) - 1)
    return _build(process, times, phi, coefficient, rule, length, drawing)


def stretch(
    process, times, phi=None, coefficient: str = "rate", rule: str = "ancestral"
) -> Sampler:
    """Part of a walk, from `times[0]` to `times[-1]`: where that is above 0, some tokens stay noise."""
    phi, times = _checked(phi, len(times) - 1), np.asarray(times)
    return _build(process, times, phi, coefficient, rule, None, {}, finish=times[-1] <= 0.0)


def _build(process, times, phi, coefficient, rule, length, drawing, finish=True):
    rates = phi if coefficient == "rate" else np.ones(len(phi))
    sharpness = phi if coefficient == "log_score" else np.ones(len(phi))
    made = _absorbing if isinstance(process, Absorbing) else _uniform
    return made(process, times, rates, sharpness, rule, length, drawing, finish)


def _absorbing(process, times, rates, sharpness, rule, length, drawing, finish):
    rate = "analytic" if rule == "ancestral" else "euler"
    # a stretch is a walk with one more step, which reveals the rest and is not made
    walk = times if finish else np.append(times, 0.5 * times[-1])
    base = masked_ancestral(
        process,
        None,
        length=length,
        rate=rate,
        grid=walk,
        t_start=None if times[0] >= 1.0 else times[0],
        **drawing,
    )
    count = len(rates)
    reveal = reveal_probabilities(process, walk, rate)
    reveal[:count] = np.minimum(rates * reveal[:count], 1.0)
    reveal[-1] = 1.0
    xs = jax.tree.map(lambda v: v[:count], base.xs)
    draw = dataclasses.replace(xs["draw"], temperature=xs["draw"].temperature / sharpness)
    return dataclasses.replace(
        base,
        xs={**xs, "reveal": reveal[:count], "draw": draw},
        start={**base.start, "edges": reveal_edges(reveal)},
        nfe=count,
        name="lsd",
    )


def _uniform(process, times, rates, sharpness, rule, length, drawing, finish):
    build = discrete_ancestral if rule == "ancestral" else discrete_euler
    base = build(process, None, length=length, grid=times, **drawing)
    xs = {**base.xs, "phi": rates, "sharpness": sharpness}
    return dataclasses.replace(base, step=_ScaledStep(base.step), xs=xs, name="lsd")


class LearnedSteps(NamedTuple):
    """What `fit_lsd` learns: plain numbers, from which `sampler` makes a `Sampler`.

    Attributes:
      times: `[M + 1]`, decreasing.
      coefficients: `[M]`, positive.
      coefficient: "rate" or "log_score".
      rule: "ancestral" or "euler".
    """

    times: Any
    coefficients: Any
    coefficient: str
    rule: str

    def sampler(self, process, length: int | None = None, **drawing) -> Sampler:
        """`lsd` with these numbers."""
        return lsd(
            process,
            length=length,
            coefficients=self.coefficients,
            coefficient=self.coefficient,
            rule=self.rule,
            grid=np.asarray(self.times),
            **drawing,
        )


def _describe(process) -> str:
    """Graph, vocabulary and schedule; the range of training times does not count."""
    schedule = process.schedule
    fields = {f.name: float(getattr(schedule, f.name)) for f in dataclasses.fields(schedule)}
    numbers = ", ".join(f"{k}={v!r}" for k, v in fields.items())
    return f"{type(process).__name__}({process.vocab_size}, {type(schedule).__name__}({numbers}))"


def save_lsd(path: str | os.PathLike, process: DiscreteProcess, steps: LearnedSteps) -> None:
    """Writes learned steps as `.npz`, which command lines take for the name of a sampler."""
    steps.sampler(process)
    about = {"process": _describe(process), "coefficient": steps.coefficient, "rule": steps.rule}
    write_arrays(path, _FORMAT, about, {"times": steps.times, "coefficients": steps.coefficients})


def load_lsd(
    path: str | os.PathLike,
    process: DiscreteProcess,
    *,
    nfe: int | None = None,
    length: int | None = None,
    **drawing,
) -> Sampler:
    """Reads what `save_lsd` wrote, as a sampler: the same one, bit for bit.

    Args:
      path: the file.
      process: the process it must have been made for.
      nfe: the number of network calls it must make.
      length, drawing: as for `lsd`.
    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file or another kind of file, another process or `nfe`.
    """
    check_graph(process)

    def build(about, arrays):
        steps = LearnedSteps(
            arrays["times"], arrays["coefficients"], about["coefficient"], about["rule"]
        )
        _checked(steps.coefficients, len(steps.times) - 1)
        return about["process"], steps

    made_for, steps = read_arrays(path, _FORMAT, "learned steps", build)
    if made_for != _describe(process):
        raise ValueError(f"{path} was made for {made_for}, not for {_describe(process)}")
    if nfe is not None and nfe != len(steps.coefficients):
        raise ValueError(
            f"{path} makes {len(steps.coefficients)} network calls, {nfe} are asked for"
        )
    return steps.sampler(process, length, **drawing)


def sequence_entropy(tokens, vocab_size: int) -> float:
    """Mean over sequences `[N, L]` of the entropy of the tokens in one, nats: the figure that tells
    good samples from repetitive ones."""
    counts = np.stack([np.bincount(row, minlength=vocab_size) for row in np.asarray(tokens)])
    share = counts / counts.sum(axis=1, keepdims=True)
    return float(-(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1).mean())
