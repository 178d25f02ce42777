"""DPM-Solver-v3 (arXiv 2310.13268): a multistep predictor-corrector that knows statistics of its model.

With the elementwise statistics l, s, b of `ModelStatistics`, L, S the integrals of l, s over lam and
B that of e^-S b, f = (sigma eps - l x) / alpha and g_j = e^(S_s - S_j) f_j - e^S_s (B_j - B_s):
  (1) x'/alpha' = e^(L_s - L') (x/alpha - E_0 g_s - sum_k E_k g_s^(k) - E_b)
  (2) E_k = int w (lam - lam_s)^k / k!,  E_b = int w e^S_s (B - B_s),  w = e^(L + S - L_s - S_s)
The derivatives g^(k) come from the polynomial through the last points, or are k! times its divided
differences ("pseudo", of lower order but less extrapolation). The corrector is (1) from the last point
with the new f among the nodes. (1) is exact for any l, s and b; good ones make g nearly constant.

A table: the history holds f, which the published shift of eps after a correction leaves unchanged.

Equivalences: `ModelStatistics.data_prediction` gives DPM-Solver++ ("taylor" of order 2, "exact_d2" of
order 3), `.noise_prediction` DPM-Solver; of order 1 both are DDIM. For Gaussian data with its own l,
s = 0 and b = -l' mean one step of any length is exact.
Deviations: times stay where the grid puts them, l, s and b are linear between their nodes, and the
integrals are accurate to rounding. The authors' code moves the times to the nodes and takes the
trapezoidal rule over them, an error of O(N^-2) that no number of steps removes; `snap=True` does the
same. A step at an infinite log-SNR (sigma = 0 or alpha = 0) is DDIM's, as g is not defined there.
`corrector="half"` corrects for t <= 0.5 as the paper says; the authors' code does so for t > 0.5.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.first_order import ddim_step
from diffusion_jax.samplers.gaussian_path import check_gaussian, gaussian_path
from diffusion_jax.samplers.linear import ONE, A, D, Form, H, Rows, Y
from diffusion_jax.samplers.model_statistics import ModelStatistics
from diffusion_jax.samplers.scan import Sampler

_WIDEST = 0.125  # in lam: intervals of the accurate rule


class _Rule(NamedTuple):
    """A quadrature rule on [0, 1]: `inner[q]` are the weights of the integral from 0 to `nodes[q]`."""

    nodes: np.ndarray
    weights: np.ndarray
    inner: np.ndarray


def _gauss(count: int) -> _Rule:
    nodes = 0.5 * (np.polynomial.legendre.leggauss(count)[0] + 1.0)
    weights = 0.5 * np.polynomial.legendre.leggauss(count)[1]
    powers = np.arange(count)
    to_monomials = np.linalg.inv(nodes[:, None] ** powers)
    inner = nodes[:, None] ** (powers + 1) / (powers + 1) @ to_monomials
    return _Rule(nodes, weights, inner)


_GAUSS = _gauss(3)
_TRAPEZOID = _Rule(np.array([0.0, 1.0]), np.array([0.5, 0.5]), np.array([[0.0, 0.0], [0.5, 0.5]]))


def _lead(v, like):
    """A vector with axes appended until it broadcasts against arrays with leading axes like its own."""
    return np.reshape(v, np.shape(v) + (1,) * (like.ndim - np.ndim(v)))


def _running(increments):
    """Sums of the first 0, 1, 2, ... entries."""
    return np.concatenate([np.zeros_like(increments[:1]), np.cumsum(increments, axis=0)])


class _Functions:
    """l, s, b as functions of lam, linear between nodes, with the solver's times among the nodes.

    Attributes:
      lam `[M + 1]`, l, s, b `[M + 1, *data]`: the nodes.
      index: nodes of the solver's times.
    """

    def __init__(self, lam, l, s, b, index, rule):
        self.lam, self.l, self.s, self.b, self.index, self.rule = lam, l, s, b, index, rule

    @classmethod
    def snapped(cls, statistics, index):
        return cls(*(getattr(statistics, n) for n in ("lam", "l", "s", "b")), index, _TRAPEZOID)

    @classmethod
    def through(cls, statistics, times):
        """Nodes are the times, those of the statistics between them, and more where they are far apart."""
        given = statistics.lam
        own = given[(given > times[0]) & (given < times[-1])]
        if len(own):  # a node at a time up to rounding is that time
            nearest = np.abs(own[:, None] - times).min(axis=1)
            own = own[nearest > 1e-9 * (given[-1] - given[0])]
        lam = np.sort(np.concatenate([own, times]))
        pieces = np.maximum(np.ceil(np.diff(lam) / _WIDEST), 1).astype(int)
        ends = [np.linspace(a, c, k + 1)[1:] for a, c, k in zip(lam[:-1], lam[1:], pieces)]
        lam = np.concatenate([lam[:1], *ends])
        at = np.clip(np.searchsorted(given, lam, side="right") - 1, 0, len(given) - 2)
        share = np.clip((lam - given[at]) / (given[at + 1] - given[at]), 0.0, 1.0)

        def between(values):
            part = _lead(share, values)
            return (1.0 - part) * values[at] + part * values[at + 1]

        values = (between(getattr(statistics, n)) for n in ("l", "s", "b"))
        return cls(lam, *values, np.searchsorted(lam, times), _GAUSS)

    def of_l(self, i: int):
        """l at the i-th time."""
        return self.l[self.index[i]]

    def local(self, origin: int, target: int, others, terms: int):
        """Formulas (1) and (2) for a step from time `origin` to `target`, with f known at `others` too.

        Returns:
          e^(L_s - L'), `E_0 .. E_terms`, E_b, and for each of `others` e^(S_s - S_j) and
          e^S_s (B_j - B_s).
        """
        s, to = self.index[origin], self.index[target]
        js = [self.index[j] for j in others]
        first, last = min([s, *js]), max([to, *js])
        lam, rule = self.lam[first : last + 1], self.rule
        h = np.diff(lam)

        def inside(values):
            """Values at the rule's nodes, and the integral up to them, in each interval: `[M, q, *data]`."""
            low, rise = values[first:last, None], np.diff(values[first : last + 1], axis=0)[:, None]
            q = _lead(rule.nodes, low[0])
            return low + q * rise, _lead(h, low) * (q * low + 0.5 * q * q * rise)

        def at_nodes(values):
            v = values[first : last + 1]
            return _running(_lead(h, v[1:]) * 0.5 * (v[1:] + v[:-1]))

        here = s - first
        L, S = at_nodes(self.l), at_nodes(self.s)
        L, S = L - L[here], S - S[here]
        L_in, S_in = (f[:-1, None] + inside(v)[1] for f, v in ((L, self.l), (S, self.s)))
        rate = np.exp(-S_in) * inside(self.b)[0] * _lead(h, S_in)
        B = _running(np.tensordot(rule.weights, rate, (0, 1)))
        B_in = B[:-1, None] + np.moveaxis(np.tensordot(rule.inner, rate, (1, 1)), 0, 1) - B[here]
        B = B - B[here]
        step = slice(here, to - first)
        away = (lam[:-1] - lam[here])[step, None] + h[step, None] * rule.nodes
        w = np.exp((L_in + S_in)[step]) * _lead(h[step, None] * rule.weights, L_in)
        powers = [
            (w * _lead(away**k / math.factorial(k), w)).sum(axis=(0, 1)) for k in range(terms + 1)
        ]
        shifts = [(np.exp(-S[j - first]), B[j - first]) for j in js]
        return np.exp(-L[to - first]), powers, (w * B_in[step]).sum(axis=(0, 1)), shifts


def _derivatives(g: list[Form], away, pseudo: bool) -> list[Form]:
    """g', g'', ... at the first node from values of g at nodes `away` from it."""
    k = len(g) - 1
    if pseudo:
        out, differences = [], list(g)
        for q in range(1, k + 1):
            differences = [
                (differences[m + 1] - differences[m]) / (away[m + q] - away[m])
                for m in range(k + 1 - q)
            ]
            out.append(math.factorial(q) * differences[0])
        return out
    if k == 0:
        return []
    powers = np.arange(1, k + 1)
    inverse = np.linalg.inv(away[1:, None] ** powers)
    return [
        math.factorial(q + 1) * sum((inverse[q, m] * (g[m + 1] - g[0]) for m in range(k)), Form())
        for q in range(k)
    ]


def _rows(p, functions, first, order, predictor_pseudo, corrects, corrector_pseudo, lower):
    """The table; `first` is the first time of finite log-SNR, `functions` count times from there."""

    def step(x, origin, target, others, values, pseudo):
        """(1) from time `origin` to `target` with f = values at the times (origin, *others)."""
        s, t = origin - first, target - first
        decay, powers, bias, shifts = functions.local(
            s, t, [j - first for j in others], len(values) - 1
        )
        g = [values[0]]
        g += [scale * f - shift * ONE for f, (scale, shift) in zip(values[1:], shifts)]
        away = p.lam[[origin, *others]] - p.lam[origin]
        y = x / p.alpha[origin] - powers[0] * g[0] - bias * ONE
        for power, derivative in zip(powers[1:], _derivatives(g, away, pseudo)):
            y = y - power * derivative
        return (p.alpha[target] * decay) * y

    rows, n, reached = Rows(), p.steps, 0
    for m in range(n):
        here, there = p.point(m), p.point(m + 1)
        if m < first:
            rows.add(here, ddim_step(Y, here, there))
            continue
        l, alpha = functions.of_l(m - first), p.alpha[m]
        f, x = [((1.0 - l) / alpha) * Y - D, H(1), H(2), H(3)], Y
        nodes = reached + bool(corrector_pseudo)
        if corrects(p.t[m]) and reached and nodes > 1:
            others = [m, *(m - q for q in range(2, nodes))]
            x = step(A, m - 1, m, others, [f[1], f[0], *f[2:nodes]], corrector_pseudo)
        if not np.isfinite(p.lam[m + 1]):
            rows.add(here, ddim_step(x, here, there), anchor=x, push=f[0])
            continue
        reached = min(order, m - first + 1, n - m if lower else order)
        others = [m - q for q in range(1, reached)]
        y = step(x, m, m + 1, others, f[:reached], predictor_pseudo)
        rows.add(here, y, anchor=x, push=f[0])
    return rows


@dataclasses.dataclass(frozen=True)
class _CheckedStart:
    """`Sampler.prepare` of a table whose coefficients have the shape of the data."""

    prepare: Callable
    shape: tuple[int, ...]

    def __call__(self, x):
        x = self.prepare(x)
        shapes = {leaf.shape[1:] for leaf in jax.tree.leaves(x)}
        if shapes != {self.shape}:
            raise ValueError(
                f"statistics were computed for data of shape {self.shape}, x_init holds {shapes.pop()}"
            )
        return x


def official_flags(nfe: int) -> dict[str, Any]:
    """The authors' choice by number of calls for CIFAR-10 on the VP process, as arguments of `dpm_solver_v3`.

    Up to 5 calls: pseudo predictor, corrector, no lower orders at the end; 6 to 8: corrector; 9 and 10: no
    corrector; more: corrector. Theirs go with order 3, the log-SNR grid and `snap=True`.
    """
    if nfe <= 5:
        return {"predictor_pseudo": True, "corrector": True, "lower_order_final": False}
    return {"corrector": nfe not in (9, 10)}


def _order(order, predictor_pseudo, corrector, corrector_pseudo):
    """Order of convergence: a divided difference is a derivative up to one order of the step.

    The first step is of order 1. That is not seen for statistics near those of any model: g hardly
    changes at the noise.
    """
    if corrector is True:
        return 2 if corrector_pseudo else order
    return min(order, 2) if predictor_pseudo else order


@register(
    "sampler",
    "dpm_solver_v3",
    family="gaussian",
    paper="2310.13268",
    order=None,
    needs="statistics",
)
def dpm_solver_v3(
    process: Any,
    num_steps: int | None = None,
    *,
    statistics: Any = None,
    order: int = 3,
    predictor_pseudo: bool = False,
    corrector: bool | str = True,
    corrector_pseudo: bool = False,
    lower_order_final: bool = True,
    snap: bool = False,
    grid: Any = None,
    t_start: float | None = None,
    t_end: float | None = None,
) -> Sampler:
    """DPM-Solver-v3 (arXiv 2310.13268): multistep, one network call a step, from statistics of the model.

    Args:
      process: a Gaussian process.
      num_steps: network calls, default 10.
      statistics: `ModelStatistics` of this process, or the file of some (`python -m diffusion_jax
        statistics` writes one; `sample` and `evaluate` find it by themselves). They must reach over the
        times of the solver, unless they are constant.
      order: 1, 2 or 3, of the predictor; a corrector has the same. Lower in the first steps, so that
        fewer steps than the order are steps of lower order (exact all the same where g is constant).
      predictor_pseudo, corrector_pseudo: divided differences in place of derivatives: order 2 at most where
        no true corrector follows. The pseudo corrector takes one point more.
      corrector: True, False, or "half": only for t <= 0.5 (on the EDM schedule t = sigma / sigma_max).
      lower_order_final: lower the order over the last steps.
      snap: move times to the nodes of the statistics and integrate with the trapezoidal rule over them, as
        the authors' code does.
      grid, t_start, t_end: see `time_grids.build_times`; the paper's grid is "log_snr".
    Raises:
      ValueError: no statistics, or those of another process or of too short a range; an option outside the
        values above; a bad grid; with `snap`, two times at one node. When sampling, data of another shape.
    """
    check_gaussian(process)
    check_choice("order", order, (1, 2, 3))
    for name, value in (
        ("predictor_pseudo", predictor_pseudo),
        ("corrector_pseudo", corrector_pseudo),
        ("lower_order_final", lower_order_final),
        ("snap", snap),
    ):
        check_choice(name, value, (True, False))
    check_choice("corrector", corrector, (True, False, "half"))
    if isinstance(statistics, str | os.PathLike):
        statistics = ModelStatistics.load(statistics)
    if not isinstance(statistics, ModelStatistics):
        raise ValueError(
            f"dpm_solver_v3 needs statistics of the model, got {statistics!r}: make them with "
            "samplers.model_statistics, or for a run with python -m diffusion_jax statistics --workdir=..."
        )
    statistics.check(process)
    p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=10)
    finite = np.flatnonzero(np.isfinite(p.lam))
    functions, first = None, p.steps
    if len(finite):
        first, last = int(finite[0]), int(finite[-1]) + 1
        lam = _covered(statistics, p, first, last, snap)
        if snap:
            index = _nearest_nodes(statistics, p, first, lam)
            functions = _Functions.snapped(statistics, index)
            times = np.array(p.t)
            times[first:last] = process.t_of_lam(statistics.lam[index])
            p = gaussian_path(process, None, np.clip(times, 0.0, 1.0))
        else:
            functions = _Functions.through(statistics, lam)
    rows = _rows(
        p,
        functions,
        first,
        order,
        bool(predictor_pseudo),
        lambda t: corrector is True or (corrector == "half" and t <= 0.5),
        bool(corrector_pseudo),
        lower_order_final,
    )
    reached = _order(order, predictor_pseudo, corrector, corrector_pseudo)
    sampler = rows.sampler(p.point(p.steps), order=reached, name="dpm_solver_v3")
    if statistics.shape:
        checked = _CheckedStart(sampler.prepare, statistics.shape)
        sampler = dataclasses.replace(sampler, prepare=checked)
    return sampler


def _covered(statistics, p, first, last, snap):
    """lam at the times of finite log-SNR, within the statistics' range up to rounding."""
    low, high = statistics.lam[0], statistics.lam[-1]
    lam = p.lam[first:last]
    if not snap and statistics.constant:
        return lam
    slack = 1e-6 * (high - low)
    outside = (lam < low - slack) | (lam > high + slack)
    if outside.any():
        t = p.t[first + int(outside.argmax())]
        raise ValueError(
            f"the grid reaches t = {t:.6g}, lam = {lam[outside][0]:.6g}; the statistics cover t = "
            f"{statistics.t_start:.6g} to {statistics.t_end:.6g}, lam = {low:.6g} to {high:.6g}"
        )
    return np.clip(lam, low, high)


def _nearest_nodes(statistics, p, first, lam):
    index = np.round(np.interp(lam, statistics.lam, np.arange(len(statistics.lam)))).astype(int)
    if (np.diff(index) <= 0).any():
        i = first + int((np.diff(index) <= 0).argmax())
        raise ValueError(
            f"times {p.t[i]:.6g} and {p.t[i + 1]:.6g} fall on one node of the statistics "
            f"({statistics.intervals} intervals): use fewer steps, snap=False, or more intervals"
        )
    return index
