"""EVODiff: a multistep solver whose coefficients come from dot products of predictions (arXiv 2509.26096).

In y = x / alpha and u = sigma / alpha, from u to u' with the prediction m0 = x0_hat at u and m1 at the
grid point before, u_-; s is the logistic function, cl clips to [-2, 2], and <a, b> sums over the data
axes of an example (see `evodiff`):
  (1) e = 1 - u'/u, r = log(u_-/u) / log(u/u'), q = sqrt((u'/u) / (u/u_-)),
      w = (1 - tau^2) / 2 with tau = (u' + u_end) / (u_start + u_end)
  (2) D1 = m0 - a1 m1, a1 = (1-w) q + w cl(<m0,m1>/<m1,m1>)
  (3) probe   y^ = (u'/u) y + e m0 + e/2 D1/r_i, r_i = r s(|a1|/4) within [r/4, 3r/2]; m = x0_hat(y^, u')
  (4) D2 = m - a2 m0 as in (2); P = D1/r, N = r D2, g = s(|cl(<N+P,N-P>/<N-P,N-P>)|/2) / 2;
      B = (1-g) N - g P
  (5) final   y' = (u'/u) y + e m0 + e/2 B/zeta with
      z = |cl(e/(2 r_i) <D1-B,D1>/<D1,D1>)| / e - 1/2, zeta = s(z) for at most 20 steps, and beyond
      zeta = s(-z s(cl(h <m0,m0-m1>/|m0-m1|^2) (2 - (u'/u)^2))), h = 1/u' - 1/u
  (6) last step   y' = (1 - sqrt(u' u)) ((u'/u) y + e m0) + e/2 (m0 - rho m1), rho = 1 - sqrt(k)/2,
      k = u'/u, less 1/2 where that is 1/2 or more.
The call at a probe is the call of the next step: the history keeps m, and n steps cost n calls.

Equivalences: where the predictions are zero, every step but the last is DDIM; one step is DDIM.
Deviations: released for alpha = 1 only, here on any Gaussian process; 0/0 counts as 0; a last step into
sigma = 0 and the two steps after alpha = 0 (where u is infinite) have order 1, as in the tables.
Cautions: formally of first order, and (6) is not scale invariant: it supposes an end near clean data.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.registry import register
from diffusion_jax.samplers.first_order import ddim_step
from diffusion_jax.samplers.gaussian_path import gaussian_path
from diffusion_jax.samplers.linear import D, Rows, Y
from diffusion_jax.samplers.scan import Sampler

LATE = 20  # beyond this number of steps the released code weighs its last coefficient differently


class EVODiffState(NamedTuple):
    """Scan state.

    Attributes:
      x: where the network is called next, a probe of the next grid point.
      output: the newest x0_hat (m0).
      slope: D1 of the probe.
      ratio: r_i of the probe, for each dot product.
      bend: its factor s(cl(...) (2 - (u'/u)^2)) in (5), used beyond 20 steps.
    """

    x: Any
    output: Any
    slope: Any
    ratio: Any
    bend: Any


def _dot(a, b):
    """Sum over the data axes; from three axes on the last is the channel and stays: `[B, 1, 1, C]`."""
    last = a.ndim - 1 if a.ndim > 2 else a.ndim
    return (a * b).sum(tuple(range(1, last)), keepdims=True)


def _quotient(a, b):
    """`clip(a / b, -2, 2)`, 0 where b is 0, with finite gradients."""
    return jnp.where(b == 0, 0.0, jnp.clip(a / jnp.where(b == 0, 1.0, b), -2.0, 2.0))


def _difference(new, old, w, q):
    """Equation (2): `new - a old`, and a."""
    a = (1.0 - w) * q + w * _quotient(_dot(new, old), _dot(old, old))
    return new - a * old, a


def _correction(late, m, m0, d1, ratio, bend, c):
    """What (5) adds to a probe to make it the point itself, without the factor alpha' e / 2."""
    d2, _ = _difference(m, m0, c["w"], c["q"])
    n, p = c["r"] * d2, d1 / c["r"]
    g = 0.5 * jax.nn.sigmoid(jnp.abs(0.5 * _quotient(_dot(n + p, n - p), _dot(n - p, n - p))))
    b = (1.0 - g) * n - g * p
    half = 0.5 * c["e"] / ratio
    z = jnp.abs(_quotient(half * _dot(d1 - b, d1), _dot(d1, d1))) / c["e"] - 0.5
    zeta = jax.nn.sigmoid(-z * bend if late else z)
    return b / zeta - d1 / ratio


def _probe(m, m0, c):
    """D1, r_i and the factor of the late branch for the interval ahead."""
    d1, a = _difference(m, m0, c["w"], c["q"])
    ratio = c["r"] * jnp.clip(jax.nn.sigmoid(0.25 * jnp.abs(a)), 0.25, 1.5)
    change = m - m0
    bend = _quotient(c["h"] * _dot(m, change), _dot(change, change))
    return d1, ratio, jax.nn.sigmoid(bend * c["curve"])


def _init(rng: Callable, start, x) -> EVODiffState:
    def ones(leaf):
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return jnp.ones_like(_dot(leaf, leaf), dtype)

    zeros = jax.tree.map(jnp.zeros_like, x)
    return EVODiffState(x, zeros, zeros, jax.tree.map(ones, x), jax.tree.map(ones, x))


@dataclasses.dataclass(frozen=True)
class EVODiffStep:
    """`Sampler.step`: one network call, the correction of its point, the move to the next probe."""

    late: bool

    def _leaf(self, x, m, m0, d1, ratio, bend, inputs):
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        wide = [v.astype(dtype) for v in (x, m, m0, d1)]
        here, ahead, move = (
            {name: jnp.asarray(v, dtype) for name, v in inputs[part].items()}
            for part in ("here", "ahead", "move")
        )
        x_, m_, m0_, d1_ = wide
        x_ = x_ + here["gain"] * _correction(self.late, m_, m0_, d1_, ratio, bend, here)
        slope, ratio, bend = _probe(m_, m0_, ahead)
        x_ = move["x"] * x_ + move["m"] * m_ + move["m0"] * m0_ + ahead["gain"] / ratio * slope
        return x_.astype(x.dtype), m.astype(x.dtype), slope.astype(x.dtype), ratio, bend

    def __call__(self, call: Callable, rng: Callable, state: EVODiffState, inputs):
        x0_hat = call(state.x, inputs["point"])
        got, need = (jax.tree.map(jnp.shape, v) for v in (x0_hat, state.x))
        if got != need:
            raise ValueError(f"denoise returned {got} for x of {need}")
        columns = [jax.tree.leaves(part) for part in (state.x, x0_hat, *state[1:])]
        leaves = [self._leaf(*leaf, inputs) for leaf in zip(*columns, strict=True)]
        tree = jax.tree.structure(state.x)
        return EVODiffState(*(tree.unflatten(part) for part in zip(*leaves))), x0_hat


NEUTRAL = {"gain": 0.0, "r": 1.0, "w": 0.0, "q": 1.0, "e": 1.0, "h": 1.0, "curve": 1.0}


def _interval(p, u, widest, i):
    """Numbers of the probe from grid point i to i + 1, in the names of the module's equations."""
    shrink = u[i + 1] / u[i]
    tau = (u[i + 1] + u[-1]) / (widest + u[-1])
    e = 1.0 - shrink
    return {
        "gain": 0.5 * p.alpha[i + 1] * e,
        "r": np.log(u[i - 1] / u[i]) / -np.log(shrink),
        "w": 0.5 * (1.0 - tau**2),
        "q": np.sqrt(shrink / (u[i] / u[i - 1])),
        "e": e,
        "h": 1.0 / u[i + 1] - 1.0 / u[i],
        "curve": 2.0 - shrink**2,
    }


def _first_order(p, i):
    form = ddim_step(Y, p.point(i), p.point(i + 1))
    return {"x": form["y"], "m": form["D"], "m0": 0.0}


def _last_step(p, u):
    """Equation (6)."""
    shrink = u[-1] / u[-2]
    rho = 1.0 - 0.5 * np.sqrt(shrink if shrink < 0.5 else shrink - 0.5)
    kept, half = 1.0 - np.sqrt(u[-1] * u[-2]), 0.5 * p.alpha[-1] * (1.0 - shrink)
    if kept <= 0.0:
        raise ValueError(
            "evodiff's last step needs sigma / alpha below 1 at its end: the grid ends "
            f"{u[-2]:.3g} -> {u[-1]:.3g}; let t_end lie nearer to the data"
        )
    move = {name: kept * value for name, value in _first_order(p, p.steps - 1).items()}
    return {"x": move["x"], "m": move["m"] + half, "m0": -half * rho}


@register("sampler", "evodiff", family="gaussian", paper="2509.26096", table=False)
def evodiff(
    process,
    num_steps: int | None = None,
    *,
    grid="log_snr",
    t_start=None,
    t_end=None,
    denoise_to_zero: bool = False,
) -> Sampler:
    """EVODiff of order 2 (arXiv 2509.26096), for any Gaussian process.

    The dot products run over all axes of an example but its last, the channels, so that each channel
    has coefficients of its own, as in the released code; over all of a vector `[B, D]`, which has no
    channels; leaf by leaf for a pytree. `state.x` is the probe at the next grid point: what a hook
    changes there is carried on.

    Args:
      process: a Gaussian process.
      num_steps: steps and network calls, default 10.
      grid, t_start, t_end: see `time_grids.build_times`.
      denoise_to_zero: one more call at the last time, whose x0_hat is returned.
    Raises:
      ValueError: a bad grid, or one that ends far from the data.
    """
    p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=10)
    n = p.steps
    with np.errstate(divide="ignore"):
        u = np.where(p.alpha > 0, p.sigma / p.alpha, np.inf)
    finite = np.isfinite(u)
    known = int(finite.argmax()) + 1  # the first grid point at which two finite u are behind a step
    rows, moves, probes = Rows(), [], []
    for i in range(n):
        probes.append(NEUTRAL)
        if i < n - 1:
            moves.append(_first_order(p, i))
            if i >= known:
                probes[-1] = _interval(p, u, u[known - 1], i)
        elif i >= known and u[-1] > 0:
            moves.append(_last_step(p, u))
        else:
            moves.append(_first_order(p, i))
        rows.add(p.point(i), Y)
    end = p.point(n)
    if denoise_to_zero:
        probes.append(NEUTRAL)
        moves.append({"x": 0.0, "m": 1.0, "m0": 0.0})
        rows.add(p.point(n), D)
        end = p.clean_point()
    plain = rows.sampler(end)

    def stacked(parts):
        return {name: np.array([part[name] for part in parts]) for name in parts[0]}

    return dataclasses.replace(
        plain,
        init=_init,
        step=EVODiffStep(late=n > LATE),
        xs={
            "point": plain.xs["point"],
            "next": plain.xs["next"],
            "here": stacked([NEUTRAL, *probes[:-1]]),
            "ahead": stacked(probes),
            "move": stacked(moves),
        },
        name="evodiff",
    )
