"""Likelihood of held-out data: dequantisation, bits per dimension, scores of a whole set.

Data with L grey levels have a probability P(level); a model of real numbers gives a density p. Uniform
noise u over the bin of each value joins them (Theis, van den Oord and Bethge, arXiv 1511.01844):
  (1) log P >= E_u log p(x + u) + D log(bin width)
  (2) log P >= E log (1 / K) sum_k p(x + u_k) + D log(bin width), tighter as K grows (arXiv 1509.00519).
In bits per dimension, (1) is -log p / (D log 2) - log2(bin width). Where the bins lie is a convention:
  "tiled"    the bins tile the value range: level k in 0..L-1 becomes low + (k + u) w, w = range / L. For
             256 levels in [-1, 1] the offset is the + 7 of arXiv 2011.13456.
  "centred"  the extreme levels stand at the ends of the range, as our data have them, and u is centred on
             each: w = range / (L - 1), and the offset for 256 levels is 6.994.
  "none"     the data as they are. A density of values that lie on a grid can be made arbitrarily high: the
             number is no bound. The bin width is that of "centred".
Both bounds are of the ODE's density, an estimate where the divergence is Hutchinson's; (2) is then a
bound no longer, since exp of an unbiased estimate is biased upwards.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from diffusion_jax.numerics import example_keys, namespace
from diffusion_jax.processes import GaussianProcess
from diffusion_jax.registry import check_choice

DEQUANTISATIONS = ("centred", "none", "tiled")


def _check(method, levels, value_range):
    check_choice("dequantisation", method, DEQUANTISATIONS)
    if levels < 2:
        raise ValueError(f"levels must be 2 or more, got {levels}")
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")
    return low, high


def bin_width(levels: int, value_range=(-1.0, 1.0), method: str = "tiled") -> float:
    """Width of a level's bin, see the module. Raises ValueError."""
    low, high = _check(method, levels, value_range)
    return (high - low) / (levels if method == "tiled" else levels - 1)


def bits_per_dim(
    log_p, dims: int, levels: int = 256, value_range=(-1.0, 1.0), method: str = "tiled"
):
    """Bits per dimension (1) of a log density in nats, any shape.

    Args:
      log_p: log density of the dequantised data, in the units of `value_range`.
      dims: dimensions of an example.
      levels, value_range, method: how the data were quantised, as in `dequantise`.
    Raises:
      ValueError: dims below 1, levels below 2, an unknown method, an empty range.
    """
    if dims < 1:
        raise ValueError(f"dims must be positive, got {dims}")
    return -log_p / (dims * math.log(2.0)) - math.log2(bin_width(levels, value_range, method))


def dequantise(
    key, x, levels: int, index=None, method: str = "tiled", value_range=(-1.0, 1.0)
) -> Any:
    """Uniform noise over the bin of each value.

    Args:
      key: a `jax.random.key` (None for method "none").
      x: real `[B, ...]`, levels at `low + k (high - low) / (levels - 1)`.
      levels: number of levels.
      index: int `[B]`, numbers of the examples (default 0..B-1): example i depends on `key` and
        `index[i]` alone.
      method: "tiled", "centred" or "none", see the module.
      value_range: (low, high).
    Returns:
      `[B, ...]` in the dtype of x.
    Raises:
      ValueError: an unknown method, levels below 2, a missing key.
    """
    low, high = _check(method, levels, value_range)
    x = jnp.asarray(x)
    if method == "none":
        return x
    if key is None:
        raise ValueError(f"dequantisation {method!r} draws random numbers: it needs a key")
    index = jnp.arange(x.shape[0], dtype=jnp.int32) if index is None else jnp.asarray(index)
    keys = example_keys(key, index)
    u = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype))(keys)
    width = bin_width(levels, value_range, method)
    if method == "centred":
        return x + width * (u - 0.5)
    return low + width * ((x - low) / (high - low) * (levels - 1) + u)


def infer_levels(x, value_range=(-1.0, 1.0), most: int = 65536) -> int:
    """The number of grey levels that data lie on: the coarsest grid over the range that holds all values.

    Raises:
      ValueError: values outside the range, a single value, or values on no grid of `most` levels.
    """
    low, high = _check("tiled", 2, value_range)
    values = np.unique(np.asarray(x, np.float64))
    if values[0] < low - 1e-6 or values[-1] > high + 1e-6 or len(values) < 2:
        raise ValueError(
            f"values of {values[0]:g}..{values[-1]:g} are no grey levels in {low:g}..{high:g}"
        )
    # float32 copies of one level differ by rounding
    gaps = np.diff(values)
    gaps = gaps[gaps > 0.5 * (high - low) / most]
    levels = round((high - low) / gaps.min()) + 1
    steps = (values - low) / (high - low) * (levels - 1)
    if levels > most or np.abs(steps - np.round(steps)).max() > 1e-3:
        raise ValueError(
            f"the data lie on no grid of at most {most} grey levels: state their number (levels)"
        )
    return levels


def importance_bound(log_p, axis: int = 0):
    """`log (1 / K) sum_k p_k` of log densities of K dequantisations: (2), without the bin width."""
    if namespace(log_p) is jnp:
        return jax.nn.logsumexp(log_p, axis=axis) - jnp.log(log_p.shape[axis])
    top = np.max(log_p, axis=axis, keepdims=True)
    mean = np.mean(np.exp(log_p - top), axis=axis)
    return np.log(mean) + np.squeeze(top, axis)


class Likelihood(NamedTuple):
    """Scores of a set of N examples with K dequantisations.

    Attributes:
      bits_per_dim: bound (1), mean over examples and dequantisations.
      standard_error: of `bits_per_dim`, over examples.
      importance_bits: bound (2) with K dequantisations.
      log_p: log density in nats, `[K, N]`.
      latents: where the ODE took the first dequantisation, `[N, ...]`.
      nfe: the most network calls that a chunk took.
      nfe_mean: network calls an example needed by itself, mean.
      round_trip: largest difference after encoding and decoding the first chunk.
    """

    bits_per_dim: float
    standard_error: float
    importance_bits: float
    log_p: np.ndarray
    latents: np.ndarray
    nfe: int
    nfe_mean: float
    round_trip: float


def held_out_likelihood(
    method,
    params,
    data: Mapping[str, Any],
    key,
    *,
    kind: str = "image",
    levels: int | None = None,
    dequantisation: str = "centred",
    draws: int = 1,
    batch_size: int = 100,
    progress: bool = False,
    **options: Any,
) -> Likelihood:
    """Log density of data in [-1, 1] under a score model, in chunks; chunking does not change it.

    A class-conditional model is scored given the labels in `data`.

    Args:
      method: a `Method` of a Gaussian process whose `denoiser` can leave x0_hat unclipped (`raw=True`).
      params: its parameters.
      data: `[N, ...]` arrays: `kind`, "index" and the model's conditions.
      key: of dequantisation and probes; example i depends on it and `index[i]` alone.
      kind: name of the entry to score.
      levels: grey levels of the data (default: read from the data).
      dequantisation: "centred", "tiled" or "none", see the module.
      draws: dequantisations an example.
      batch_size: examples at a time; the last chunk is padded to it.
      progress: show a progress bar when standard error is a terminal.
      options: of `samplers.log_prob` (divergence, probes, noise, rtol, atol, solver, ...).
    Raises:
      ValueError: as `samplers.log_prob`; draws or batch_size below 1; no levels found; no data.
    """
    from diffusion_jax.samplers.probability_flow import decode, log_prob

    for name, value in (("draws", draws), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    count = len(data["index"])
    if not count:
        raise ValueError("there are no examples to score")
    levels = infer_levels(data[kind]) if levels is None else levels
    _check(dequantisation, levels, (-1.0, 1.0))
    size = min(batch_size, count)
    ends = {name: options[name] for name in ("t_from", "t_to") if name in options}
    solver = {n: options[n] for n in ("rtol", "atol", "solver", "max_steps") if n in options}
    backwards = {"t_from": ends.get("t_to"), "t_to": ends.get("t_from", method.process.t_min)}

    def prepare(params, part, key):
        x = dequantise(
            jax.random.fold_in(key, 0), part[kind], levels, part["index"], dequantisation
        )
        return x, method.denoiser(params, part, raw=True)

    @jax.jit
    def score(params, part, key):
        x, denoise = prepare(params, part, key)
        probes = jax.random.fold_in(key, 1)
        return log_prob(method.process, denoise, x, probes, index=part["index"], **options)

    @jax.jit
    def round_trip(params, part, key, latents):
        x, denoise = prepare(params, part, key)
        again, _ = decode(method.process, denoise, latents, **backwards, **solver)
        return jnp.abs(again - x).max()

    log_p, latents, calls, each = np.zeros((draws, count)), [], [], []
    error = math.nan
    chunks = [(k, begin) for k in range(draws) for begin in range(0, count, size)]
    for k, begin in tqdm.tqdm(
        chunks, disable=None if progress else True, desc="likelihood", unit="chunk"
    ):
        rows = np.minimum(np.arange(begin, begin + size), count - 1)
        keep = min(size, count - begin)
        part = {name: jnp.asarray(np.asarray(v)[rows]) for name, v in data.items()}
        own = jax.random.fold_in(key, k)
        value, latent, info = score(params, part, own)
        if not bool(info.success.all()):
            raise ValueError(
                "the ODE solver gave up: the model is not finite, or it needs more steps (max_steps,"
                " rtol, atol)"
            )
        log_p[k, begin : begin + keep] = np.asarray(value)[:keep]
        calls.append(int(info.nfe))
        each.append(np.asarray(info.nfe_each)[:keep])
        if k == 0:
            latents.append(np.asarray(latent)[:keep])
        if k == begin == 0:
            error = float(round_trip(params, part, own, latent))

    dims = math.prod(np.shape(data[kind])[1:])
    bits = bits_per_dim(log_p, dims, levels, method=dequantisation).mean(axis=0)
    bound = bits_per_dim(importance_bound(log_p), dims, levels, method=dequantisation)
    return Likelihood(
        bits_per_dim=float(bits.mean()),
        standard_error=float(bits.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
        importance_bits=float(bound.mean()),
        log_p=log_p,
        latents=np.concatenate(latents),
        nfe=max(calls),
        nfe_mean=float(np.concatenate(each).mean()),
        round_trip=error,
    )


def score_run(
    run,
    key,
    *,
    num: int | None = None,
    split: str = "test",
    levels: int | None = None,
    **options: Any,
) -> tuple[Likelihood, dict[str, Any]]:
    """`held_out_likelihood` of the first `num` examples of a run's held-out images.

    Args:
      run: an open run (`run.open_run`) of method "score" on images.
      key, levels, options: as `held_out_likelihood`.
      num: default all.
      split: of the run's data.
    Returns:
      The `Likelihood`, and what to write down about it, ready for JSON.
    Raises:
      ValueError: a run of another kind; as `held_out_likelihood`.
    """
    method, kind = run.method, run.spec.kind
    if not isinstance(method.process, GaussianProcess) or kind != "image":
        raise ValueError(
            f"the run models {kind} under the process {type(method.process).__name__}; likelihood needs"
            " images under a Gaussian process"
        )
    if "raw" not in inspect.signature(method.denoiser).parameters:
        raise ValueError("the run's method has no unclipped denoiser; valid: score, vdm")
    if num is not None and num < 1:
        raise ValueError(f"num must be positive, got {num}")
    source = run.source(split)
    rows = np.arange(len(source) if num is None else min(num, len(source)))
    data = source.take(rows) | {"index": rows.astype(np.int32)}
    levels = infer_levels(data[kind]) if levels is None else levels
    found = held_out_likelihood(method, run.params, data, key, kind=kind, levels=levels, **options)
    report = {k: v for k, v in found._asdict().items() if k not in ("log_p", "latents")}
    report |= {"nats": float(found.log_p.mean()), "num": len(rows), "split": split}
    report |= {"levels": levels, "t_from": float(options.get("t_from", method.process.t_min))}
    return found, report | {k: v for k, v in options.items() if k != "progress"}
