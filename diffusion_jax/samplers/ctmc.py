"""Samplers for any discrete process: ancestral, tau-leaping, Euler, and SEDD's two for score networks.

All tokens move by themselves in a step t -> s, from probabilities over the S states (see
`processes.token_kernels`), and are drawn by the inverse distribution function of one uniform each. All are of
first order: the total variation to the model's law halves when the steps double.

Clipping. A frozen rate over a finite step may say that a token leaves with a probability above 1. Euler then
cuts the probability to stay at 0 and normalises; tau-leaping leaves with probability 1 - exp(-rate dt),
which is always one. Tweedie's step of scores that are none of a distribution may give negative numbers:
they are cut at 0. Where alpha(1) = 0 the uniform process forgets infinitely fast at t = 1 and the rates are
infinite: a uniform token replaces each.

Prompts. `x_init = Prompt(tokens, given)` keeps what is given: it is written over the state before every
step (SEDD's projection) and at the end. An absorbing process keeps unmasked tokens by itself.
"""

import itertools

import jax
import numpy as np

from diffusion_jax.processes import DiscreteProcess, scores
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.categorical import build_draw
from diffusion_jax.samplers.chain_steps import (
    HUGE,
    ChainInit,
    ChainPrepare,
    PosteriorStep,
    ScoreStep,
)
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times
from diffusion_jax.samplers.token_states import check_length, result

LAST_STEPS = ("chain", "network")
_NEARLY_ALL = 0.999  # SEDD's mask rate at t = 1


def _stacked(rows):
    return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}


def _times(process, num_steps, grid, t_start, t_end):
    """The times of a sampler; those of a finite chain are of the form k / T."""
    total = getattr(process, "num_train_steps", None)
    times = build_times(process, num_steps, grid, t_start, t_end, default_steps=total or 64)
    if total is None:
        return times
    times = np.round(times * total) / total
    if (np.diff(times) >= 0).any():
        raise ValueError(
            f"the chain has {total} steps: {len(times) - 1} between t = {times[0]:g} and "
            f"{times[-1]:g} on this grid do not fall on different ones"
        )
    return times


def _built(process, step, times, calls, inputs, drawing, length, name):
    """A `Sampler` whose calls are at `times[:calls]`."""
    points = [process.point(t) for t in times]
    points += points[-1:]
    stacked = _stacked(points)
    kernel = step.kernel
    xs = {
        "point": {k: v[:calls] for k, v in stacked.items()},
        "next": {k: v[1 : calls + 1] for k, v in stacked.items()},
        "last": np.arange(calls) == calls - 1,
        "draw": jax.tree.map(lambda v: np.full(calls, v), build_draw(**drawing)),
        **inputs,
    }
    prior = getattr(process, "prior_probs", None)
    return Sampler(
        init=ChainInit(kernel),
        step=step,
        finish=result,
        xs=xs,
        start=() if prior is None else {"prior": np.asarray(prior)},
        nfe=calls,
        prepare=ChainPrepare(kernel.num_states, length),
        stochastic=True,
        name=name,
    )


def check_discrete(process, length, continuous=False):
    """Raises ValueError unless the process is discrete, has rates where asked for, and length is good."""
    if not isinstance(process, DiscreteProcess):
        raise ValueError(f"this sampler needs a discrete process, got {type(process).__name__}")
    if continuous and not hasattr(process, "rate_row"):
        raise ValueError(
            f"this sampler needs a process in continuous time, got {type(process).__name__}: "
            "discrete_ancestral takes every discrete process"
        )
    check_length(length)


def _filters(drawing):
    return any(name != "precision" for name in drawing)


def _from_posteriors(
    name, rule, process, num_steps, parameterization, last_step, length, grid, ends, drawing
):
    check_discrete(process, length, continuous=rule != "ancestral")
    check_choice("parameterization", parameterization, scores.PARAMETERIZATIONS)
    check_choice("last_step", last_step, LAST_STEPS)
    times = _times(process, num_steps, grid, *ends)
    kernel, steps = process.kernel, list(itertools.pairwise(times))
    masks = kernel.num_states > kernel.vocab_size
    inputs = {}
    if rule == "ancestral" or masks:
        # with a mask the last step goes to clean data, wherever it is said to end
        inputs["reverse"] = _stacked(
            [
                process.reverse_row(t, None if masks and i == len(steps) - 1 else s)
                for i, (t, s) in enumerate(steps)
            ]
        )
    if rule != "ancestral":
        rows = [process.rate_row(t, t - s) for t, s in steps]
        inputs["rates"] = {k: np.minimum(v, HUGE) for k, v in _stacked(rows).items()}
    if parameterization == "posterior":
        rows = [process.likelihood_row(t) for t, _ in steps]
        inputs["seen"] = _stacked(rows)
    step = PosteriorStep(kernel, rule, parameterization, _filters(drawing), last_step)
    return _built(process, step, times, len(steps), inputs, drawing, length, name)


@register("sampler", "discrete_ancestral", family="discrete", paper="2107.03006")
def discrete_ancestral(
    process,
    num_steps: int | None = None,
    *,
    parameterization: str = "leave_one_out",
    last_step: str = "chain",
    length: int | None = None,
    grid=None,
    t_start=None,
    t_end=None,
    **drawing,
) -> Sampler:
    """Ancestral sampling of any discrete process: p(x_s | x_t) with the network's x0 plugged in.

    D3PM (arXiv 2107.03006), UDLM (2412.10193), VQ-Diffusion (2111.14822, `parameterization="posterior"`).

    Equivalences: on an `Absorbing` process the law of `masked_ancestral`.

    Args:
      process: any discrete process.
      num_steps: network calls, default 64, of a finite chain its T.
      parameterization: what the logits are of, "leave_one_out" or "posterior" (`processes.scores`). The
        wrong one does not converge; a masked model's are both.
      last_step: "chain", or "network": the last step draws from the network's softmax itself, D3PM's
        p(x0 | x_1).
      length: sequence length, needed where `x_init` is a number of sequences. Tokens `[B, L]` are where
        to start; see `Prompt`.
      grid, t_start, t_end: see `time_grids.build_times`; a finite chain's steps are entries k / T.
      drawing: temperature, nucleus, top_k of the network's tokens, precision, see
        `categorical.build_draw`. A step still adds the chain's own noise at temperature 0.
    Raises:
      ValueError: not a discrete process, a bad length or grid, an unknown or bad option.
    """
    ends = (t_start, t_end)
    return _from_posteriors(
        "discrete_ancestral",
        "ancestral",
        process,
        num_steps,
        parameterization,
        last_step,
        length,
        grid,
        ends,
        drawing,
    )


@register("sampler", "tau_leaping", family="discrete", paper="2205.14987")
def tau_leaping(
    process,
    num_steps: int | None = None,
    *,
    parameterization: str = "leave_one_out",
    length: int | None = None,
    grid=None,
    t_start=None,
    t_end=None,
    **drawing,
) -> Sampler:
    """Tau-leaping with the reverse rates frozen over a step (Campbell et al., arXiv 2205.14987).

    A token leaves with probability 1 - exp(-dt sum of its rates) and goes where they say, at most one
    jump a step: categories have no order in which jumps could add up. Where masks remain the last step
    is the ancestral one.

    Args:
      process: a discrete process in continuous time.
      others: as `discrete_ancestral`.
    Raises:
      ValueError: another process, a bad length or grid, an unknown or bad option.
    """
    ends = (t_start, t_end)
    return _from_posteriors(
        "tau_leaping",
        "tau_leaping",
        process,
        num_steps,
        parameterization,
        "chain",
        length,
        grid,
        ends,
        drawing,
    )


@register("sampler", "discrete_euler", family="discrete", paper="2205.14987")
def discrete_euler(
    process,
    num_steps: int | None = None,
    *,
    parameterization: str = "leave_one_out",
    length: int | None = None,
    grid=None,
    t_start=None,
    t_end=None,
    **drawing,
) -> Sampler:
    """Euler steps of the reverse chain: a token goes to j with probability dt times the rate to j.

    Equivalences: on an `Absorbing` process with the linear schedule `masked_ancestral`. Where masks
    remain the last step is the ancestral one. Clipping: see the module.

    Args:
      process: a discrete process in continuous time.
      others: as `discrete_ancestral`.
    Raises:
      ValueError: another process, a bad length or grid, an unknown or bad option.
    """
    ends = (t_start, t_end)
    return _from_posteriors(
        "discrete_euler",
        "euler",
        process,
        num_steps,
        parameterization,
        "chain",
        length,
        grid,
        ends,
        drawing,
    )


def _score_ends(process, t_start, t_end):
    """SEDD's ends: where noise is infinite, the time with a mask rate of 0.999; and t = 1e-5."""
    if t_start is None:
        finite = np.isfinite(process.sigma_bar(1.0))
        t_start = 1.0 if finite else float(process.t_of_mask_rate(_NEARLY_ALL))
    return t_start, 1e-5 if t_end is None else t_end


def _from_scores(name, rule, process, num_steps, denoise, length, grid, ends, drawing):
    check_discrete(process, length, continuous=True)
    kernel = process.kernel
    masks = kernel.num_states > kernel.vocab_size
    if masks and not denoise:
        raise ValueError(
            "without the denoising step masks would be left over: denoise must be True"
        )
    times = _times(process, num_steps, grid, *_score_ends(process, *ends))
    if not np.isfinite(process.sigma_bar(times[0])):
        raise ValueError(
            f"{name} needs finite noise at its first time {times[0]:g}: start earlier, or give the "
            "schedule an eps_end"
        )
    steps = list(itertools.pairwise(times))
    calls, inputs = len(steps) + bool(denoise), {}
    last = [process.analytic_row(times[-1], None)] if denoise else []
    if rule == "analytic":
        inputs["analytic"] = _stacked([process.analytic_row(t, s) for t, s in steps] + last)
    else:
        rows = [process.rate_row(t, t - s) for t, s in steps]
        inputs["rates"] = _stacked(rows + rows[-1:] * bool(denoise))
        if denoise:
            inputs["analytic"] = _stacked(last * calls)
    step = ScoreStep(kernel, rule, _filters(drawing), denoise)
    return _built(process, step, times, calls, inputs, drawing, length, name)


@register(
    "sampler", "score_euler", family="discrete", paper="2310.16834", calls="n+1", output="score"
)
def score_euler(
    process,
    num_steps: int | None = None,
    *,
    denoise: bool = True,
    length: int | None = None,
    grid=None,
    t_start=None,
    t_end=None,
    **drawing,
) -> Sampler:
    """Euler steps of the reverse chain of a score network (SEDD, arXiv 2310.16834, algorithm 2).

    Args:
      process: a discrete process in continuous time; the denoiser returns log concrete scores, `[B, L, V]`
        (a `CTMC`: `[B, L, S]`), see `processes.scores`.
      num_steps: steps, default 64; with the denoising step one call more.
      denoise: end with Tweedie's step to the clean data, without the mask class.
      length: sequence length, needed where `x_init` is a number of sequences; see also `Prompt`.
      grid, t_start, t_end: see `time_grids.build_times`; ends by default 1 (with infinite noise the time
        of mask rate 0.999) and 1e-5.
      drawing: precision, and temperature, nucleus and top_k of where a token goes when it moves, see
        `categorical.build_draw`.
    Raises:
      ValueError: another process, infinite noise at the start, masks and no denoising step, a bad length
        or grid, an unknown or bad option.
    """
    ends = (t_start, t_end)
    return _from_scores(
        "score_euler", "euler", process, num_steps, denoise, length, grid, ends, drawing
    )


@register(
    "sampler", "score_analytic", family="discrete", paper="2310.16834", calls="n+1", output="score"
)
def score_analytic(
    process,
    num_steps: int | None = None,
    *,
    denoise: bool = True,
    length: int | None = None,
    grid=None,
    t_start=None,
    t_end=None,
    **drawing,
) -> Sampler:
    """Tweedie tau-leaping of a score network (SEDD, arXiv 2310.16834, theorem 4.2): analytic steps.

    Arguments, result and errors as `score_euler`; of a `CTMC` a step may not undo more noise than float64
    can.

    Equivalences: with exact scores, `discrete_ancestral` with exact leave-one-out posteriors.
    """
    ends = (t_start, t_end)
    return _from_scores(
        "score_analytic", "analytic", process, num_steps, denoise, length, grid, ends, drawing
    )
