"""Averages of weights whose length can be chosen after the run (arXiv 2312.02696, section 3).

The profile of the average at time t is a power of the time tau <= t of the averaged weights,
p(tau) = (g + 1) tau^g / t^(g + 1): it begins at zero and its length grows with the run.

  (1) recursion     average += (1 - (1 - 1/t)^(g + 1)) (weights - average)     after update t = 1, 2, ...
  (2) its width     the standard deviation of p over t, sqrt(g + 1) / ((g + 2) sqrt(g + 3))
  (3) overlap       <p, q> = (g + 1)(h + 1) min(s, t)^(g + h + 1) / ((g + h + 1) s^(g + 1) t^(h + 1))
  (4) any other     sum_i x_i p_i nearest to it in the mean square: <p_j, p_i> x_i = <p_j, p>

A run stores averages of two widths (`train.ema = (0.05, 0.1)`, `train.ema_warmup = "power"`) at several
times, `train.keep` large enough; `reconstruct_run` makes an average of any width out of them.
"""

import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_WIDTH = 12**-0.5  # the uniform average, g = 0


def exponent(width: float) -> float:
    """The power g whose profile has this width: the root g >= 0 of (2).

    Raises:
      ValueError: a width outside (0, 12**-0.5], the second of which is the uniform average.
    """
    if not 0.0 < width <= MAX_WIDTH * (1.0 + 1e-12):
        raise ValueError(
            f"the width of an average lies in (0, {MAX_WIDTH:.4f}], which is uniform; got {width}"
        )
    v = float(width) ** -2
    roots = np.roots([1.0, 7.0, 16.0 - v, 12.0 - v])
    return max(float(roots.real.max()), 0.0)


def width(exponent: float) -> float:
    """(2): the width of the profile of a power."""
    g = exponent
    return float(np.sqrt(g + 1.0) / ((g + 2.0) * np.sqrt(g + 3.0)))


def power_rate(width: float, count: Any) -> Any:
    """Weight of the new parameters in the update (1) that follows `count` others; 1 for the first.

    Args:
      width: of the profile (Python number).
      count: int scalar.
    Raises:
      ValueError: see `exponent`.
    """
    t = jnp.asarray(count, jnp.float32) + 1.0
    return -jnp.expm1((exponent(width) + 1.0) * jnp.log1p(-1.0 / t))


def overlap(exponents: Any, times: Any, other_exponents: Any, other_times: Any) -> np.ndarray:
    """(3) of profiles of these powers and ends, which broadcast; float64."""
    g, s, h, t = (
        np.asarray(v, np.float64) for v in (exponents, times, other_exponents, other_times)
    )
    low = np.minimum(s, t)
    shape = (low / s) ** (g + 1.0) * (low / t) ** (h + 1.0) / low
    return (g + 1.0) * (h + 1.0) / (g + h + 1.0) * shape


def combination(
    stored: Sequence[tuple[float, float]], width: float, time: float | None = None
) -> np.ndarray:
    """The weights x (4) of stored averages in that of another width.

    Args:
      stored: `(width, time)` of each; time in any unit, counted from the beginning of the run.
      width: the wanted one.
      time: at which; None: the last of the stored ones.
    Returns:
      float64 [len(stored)]; they add up to about 1, some are negative.
    Raises:
      ValueError: nothing stored, a width outside the range of `exponent`, a time before the first.
    """
    if not stored:
        raise ValueError("no stored averages to combine")
    g = np.array([exponent(w) for w, _ in stored])
    s = np.array([t for _, t in stored], np.float64)
    end = float(s.max() if time is None else time)
    if s.min() <= 0.0 or end <= 0.0:
        raise ValueError(f"times of averages are positive; got {min(float(s.min()), end)}")
    gram = overlap(g[:, None], s[:, None], g[None], s[None])
    wanted = overlap(g, s, exponent(width), end)
    # Divided by the norms of the profiles, which differ by orders of magnitude.
    norm = np.sqrt(np.diagonal(gram))
    scaled = gram / (norm[:, None] * norm[None])
    return np.linalg.lstsq(scaled, wanted / norm, rcond=1e-13)[0] / norm


def combine(averages: Iterable[Any], weights: Sequence[float]) -> Any:
    """`sum_i weights[i] averages[i]` of pytrees, summed in float64: float32 NumPy arrays.

    Leaves that are not floating are those of the last one. `averages` may be lazy: one is held at a time.
    """

    def add(new: Any, total: Any, weight: float) -> np.ndarray:
        new = np.asarray(new)
        return total + weight * new if np.issubdtype(new.dtype, np.floating) else new

    total, kinds = None, None
    for tree, weight in zip(averages, weights, strict=True):
        kinds = jax.tree.map(lambda v: v.dtype, tree)
        total = jax.tree.map(lambda v: np.zeros(v.shape), tree) if total is None else total
        total = jax.tree.map(functools.partial(add, weight=np.float64(weight)), tree, total)
    return jax.tree.map(lambda v, dtype: v.astype(dtype), total, kinds)


def reconstruct_run(
    workdir: str | pathlib.Path, width: float, step: int | None = None, target: Any = None
) -> Any:
    """The average of any width at a step of a run, of the averages in its checkpoints.

    Args:
      workdir: folder of a run with `train.ema_warmup = "power"`.
      width: the wanted one.
      step: with a checkpoint; None: the last. Later checkpoints are not used.
      target: as in `restore_params`.
    Returns:
      parameters, NumPy arrays.
    Raises:
      CheckpointError: no checkpoints, or a damaged one.
      ValueError: a run whose averages are of constant decay, or without any up to that step.
    """
    # Orbax takes long to import; the formulas should not pay for it.
    from diffusion_jax.training.checkpoints import Checkpoints
    from diffusion_jax.training.runfolder import read_config

    config = read_config(workdir)["train"]
    if config.get("ema_warmup") != "power":
        raise ValueError(
            f"the averages of {workdir} have no power-function profile (train.ema_warmup is"
            f" {config.get('ema_warmup')!r}, not 'power')"
        )
    updates = int(config["optimizer"].get("accumulate") or 1)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        end = steps[-1] if step is None and steps else step
        kept = [(w, n) for n in steps if n >= updates and n <= (end or 0) for w in config["ema"]]
        if not kept:
            raise ValueError(f"{workdir} has no averages up to step {end}")
        stored = [(w, n // updates) for w, n in kept]
        weights = combination(stored, width, end // updates)
        read = (checkpoints.restore_item(f"ema_{float(w)}", target, n) for w, n in kept)
        return combine(read, weights)
