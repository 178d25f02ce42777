"""Predictor-corrector sampling (Song et al., arXiv 2011.13456, algorithms 1-5).

With s = -(x - alpha x0_hat) / sigma^2 the score, f and g those of the SDE, x_i = a x_{i+1} + sqrt(V) z
the forward step that is undone, and primes for values at t_{i+1}, nearer to the data:
  (1) euler_maruyama      x' = x - (f x - g^2 s) dt + g sqrt(dt) z
  (2) reverse_diffusion   x' = (2 - a) x + V s + sqrt(V) z
  (3) ancestral           x' = (x + V s) / a + w z, w^2 = V (N-step VP), or V sigma'^2 / sigma^2
  (4) langevin            x <- x + h s + sqrt(2 h) z, h = 2 a^2 (snr |z| / |s|)^2
  (5) ald                 the same with h = 2 a^2 (snr sigma)^2
The probability-flow variants of (1) and (2) halve the score's coefficient and draw nothing.
Every step runs the corrector first: it settles x into the marginal of the time it stands at, before the
predictor leaves that time. snr sets the size of the correction relative to the noise it adds.

What a and V are is the `discretization`:
  "score_sde"  the N-step chains of the paper: calls at linspace(1, t_end, N), dt = 1/N, and the index
               k = int(t (N - 1)) into beta_k = linspace(beta_min, beta_max, N) / N (VP: a^2 = 1 - beta_k,
               V = beta_k), or into N geometric sigma_k (VE: V = sigma_k^2 - sigma_{k-1}^2, sigma_{-1} = 0).
               Sub-VP: (2) is (1), there is no (3), and a^2 in (4) and (5) is that of VP.
  "chain"      the exact transitions of any Gaussian process on any time grid: a = alpha / alpha',
               V = sigma^2 - a^2 sigma'^2, dt = t - t'.

All but (4) is linear in x, x0_hat and z, and so a table. (4) is a table whose corrector rows add the
Langevin step, half |kick|^2 s + kick z with kick = 2 a snr |z| / |s|, which has no root of zero.

Equivalences: "ancestral" on a "chain" is DDIM with eta = 1; without a corrector and with
probability_flow, euler_maruyama on a "chain" is Euler on the probability-flow ODE.
Deviations: |z| and |s| are those of each example unless norms="batch" asks for the released code's
means over the batch (and all devices: means of a sharded array are global), where an example depends
on its neighbours. A step sized by its own |s| broadens the law of an example by about 1 + 4/d in d
dimensions: nothing for images, much for points in the plane, where norms="batch" or "ald" is right.
Calls are counted as made: the released code reports N (corrector_steps + 1) even where a part is
"none". The index k is taken in float64 and does not fall by one when rounding does. The corrector on
sub-VP, on which the released code fails, and a start at alpha = 0, where the first predictor draws x'
from the forward process at x0_hat, are ours.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import expand, sum_per_example
from diffusion_jax.processes import VE, VP, SubVP
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.gaussian_path import gaussian_path
from diffusion_jax.samplers.linear import D, Form, LinearStep, Rows, Y, Z
from diffusion_jax.samplers.scan import Sampler

PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral", "none")
CORRECTORS = ("langevin", "ald", "none")
DISCRETIZATIONS = ("score_sde", "chain")
NORMS = ("example", "batch")


class _Step(NamedTuple):
    """One step on the host: where it leaves from, the forward step (a, V) it undoes, where it arrives.

    `kept` is the a of the corrector, `deviation` that of the ancestral predictor. What a chain does not
    have is NaN.
    """

    point: dict
    a: float
    variance: float
    deviation: float
    kept: float
    dt: float
    there: dict


def _n_step(process, num_steps, t_end) -> list[_Step]:
    """The N-step discretisation of score_sde."""
    n = gaussian_path(process, num_steps, "uniform", 1.0, t_end, default_steps=1000).steps
    times = np.linspace(1.0, process.sampling_range[1] if t_end is None else t_end, n)
    index = np.floor(times * (n - 1) + 1e-9).astype(int)
    dt, missing = np.full(n, 1.0 / n), np.full(n, np.nan)
    if isinstance(process, VE):
        sigmas = np.exp(np.linspace(np.log(process.sigma_min), np.log(process.sigma_max), n))
        here, before = sigmas[index], np.append(0.0, sigmas)[index]
        variance, a = here**2 - before**2, np.ones(n)
        chain = a, variance, before / here * np.sqrt(variance), a
    else:
        beta = np.linspace(process.beta_min / n, process.beta_max / n, n)[index]
        kept = np.sqrt(np.where(beta < 1.0, 1.0 - beta, np.nan))
        chain = kept, beta, np.sqrt(beta), kept
        if isinstance(process, SubVP):
            f, g2 = process.drift(times), process.diffusion_squared(times)
            chain = 1.0 + f * dt, g2 * dt, missing, kept
    points = [process.point(t) for t in times]
    clean = points[-1] | {"t": 0.0, "alpha": 1.0, "sigma": 0.0}
    return [_Step(*fields) for fields in zip(points, *chain, dt, [*points[1:], clean])]


def _chain(p) -> list[_Step]:
    """The exact transitions on a time grid."""
    a = p.alpha[:-1] / p.alpha[1:]
    variance = np.maximum(p.sigma[:-1] ** 2 - (a * p.sigma[1:]) ** 2, 0.0)
    deviation = p.sigma[1:] / p.sigma[:-1] * np.sqrt(variance)
    points = [p.point(i) for i in range(p.steps + 1)]
    fields = zip(points, a, variance, deviation, a, p.t[:-1] - p.t[1:], points[1:])
    return [_Step(*values) for values in fields]


def _score(point) -> Form:
    return (point["alpha"] * D - Y) / point["sigma"] ** 2


def _predict(process, kind, step: _Step, flow: bool) -> tuple[Form, float]:
    """Mean and deviation of x'."""
    here, there = step.point, step.there
    if here["alpha"] == 0.0:  # f is infinite, a is 0: nothing of x is left in x'
        fresh = there["alpha"] * D
        if flow:
            return fresh + there["sigma"] / here["sigma"] * Y, 0.0
        return fresh, there["sigma"]
    score = (0.5 if flow else 1.0) * _score(here)
    if kind == "ancestral":
        return (Y + step.variance * score) / step.a, step.deviation
    if kind == "euler_maruyama":
        f, g2 = process.drift(here["t"]), process.diffusion_squared(here["t"])
        mean, deviation = Y - step.dt * (f * Y - g2 * score), np.sqrt(g2 * step.dt)
    else:
        mean = (2.0 - step.a) * Y + step.variance * score
        deviation = np.sqrt(step.variance)
    return mean, 0.0 if flow else deviation


def _norm(tree) -> jax.Array:
    """Euclidean norm of each example `[B]`, over all leaves; its gradient at 0 is 0."""
    total = sum(
        sum_per_example(jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))))
        for leaf in jax.tree.leaves(tree)
    )
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 0.0)


@dataclasses.dataclass(frozen=True)
class LangevinStep(LinearStep):
    """`Sampler.step`: a row of the table, and on corrector rows the Langevin step (4).

    Attributes:
      norms: "example" or "batch".
    """

    norms: str

    def _draw(self, rng, inputs, x):
        """The noise of a row: given (`with_noise`), drawn, or zeros where the row has none."""
        zeros = jax.tree.map(jnp.zeros_like, x)
        return self._add_noise(([zeros], [None]), rng, inputs, x)[0]

    def __call__(self, call: Callable, rng: Callable, state, inputs):
        z = self._draw(rng, inputs, state.x)
        after, x0_hat = super().__call__(call, rng, state, inputs | {"z": z})
        alpha, sigma = inputs["point"]["alpha"], inputs["point"]["sigma"]

        def score_of(x, x0):
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            a, b = jnp.asarray(alpha, dtype), jnp.asarray(sigma, dtype)
            return (a * x0.astype(dtype) - x.astype(dtype)) / b**2

        score = jax.tree.map(score_of, state.x, x0_hat)
        noise, pull = _norm(z), _norm(score)
        if self.norms == "batch":
            noise, pull = noise.mean(), pull.mean()
        kick = jnp.asarray(inputs["kick"], pull.dtype) * jnp.where(
            pull > 0, noise / jnp.where(pull > 0, pull, 1.0), 0.0
        )

        def moved(x, s, draw):
            k = expand(kick, s).astype(s.dtype)
            return (x + 0.5 * k**2 * s + k * draw).astype(x.dtype)

        return after._replace(x=jax.tree.map(moved, after.x, score, z)), x0_hat


def _steps(process, num_steps, discretization, grid, t_start, t_end, needs) -> list[_Step]:
    chains = isinstance(process, VP | SubVP | VE) and process.sampling_range[0] == 1.0
    plain = grid is None and t_start is None
    if discretization is None:
        discretization = "score_sde" if chains and plain else "chain"
    check_choice("discretization", discretization, DISCRETIZATIONS)
    if discretization == "chain":
        return _chain(gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=1000))
    if not chains or not plain:
        raise ValueError(
            "discretization='score_sde' is for VP, SubVP and VE from t = 1 on times of its own; with a "
            f"grid, a t_start or {type(process).__name__} use discretization='chain'"
        )
    steps = _n_step(process, num_steps, t_end)
    for field in needs:
        if np.isnan([getattr(step, field) for step in steps]).any():
            if field == "deviation":
                raise ValueError(
                    "predictor 'ancestral' is not defined on the N-step chain of SubVP; use "
                    "discretization='chain'"
                )
            raise ValueError(
                f"num_steps = {len(steps)} must exceed beta_max = {process.beta_max:g}, or beta_k "
                "reaches 1; take more steps or discretization='chain'"
            )
    return steps


@register(
    "sampler", "predictor_corrector", family="gaussian", paper="2011.13456", table=False, calls="2n"
)
def predictor_corrector(
    process,
    num_steps: int | None = None,
    *,
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    snr: float = 0.16,
    corrector_steps: int = 1,
    probability_flow: bool = False,
    denoise: bool = True,
    norms: str = "example",
    discretization: str | None = None,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """score_sde's sampler (arXiv 2011.13456): `corrector_steps` corrections, then a prediction, a step.

    Each correction and each prediction is one network call: n steps cost n (corrector_steps + 1), n
    without a corrector, n corrector_steps without a predictor.

    Args:
      process: a Gaussian process.
      num_steps: steps, default 1000 as in the paper.
      predictor: "euler_maruyama", "reverse_diffusion", "ancestral" or "none".
      corrector: "langevin", "ald" or "none".
      snr: signal-to-noise ratio of a correction, 0 or more.
      corrector_steps: corrections a step.
      probability_flow: the deterministic variant of the predictor; not of "ancestral".
      denoise: leave out the noise of the last prediction. The last correction keeps its own.
      norms: "example", or "batch" as in the released code: Langevin steps sized by means over the batch.
      discretization: "score_sde" or "chain" (above); by default "score_sde" for VP, sub-VP and VE unless
        a grid or a t_start is given.
      grid, t_start, t_end: see `time_grids.build_times`; "score_sde" has its own times and takes t_end.
    Raises:
      ValueError: an unknown name, a combination that does not exist, `num_steps` not above beta_max where
        the N-step chain of VP or sub-VP needs it, or a bad grid.
    """
    check_choice("predictor", predictor, PREDICTORS)
    check_choice("corrector", corrector, CORRECTORS)
    check_choice("norms", norms, NORMS)
    if predictor == corrector == "none":
        raise ValueError("predictor and corrector are both 'none': nothing would be done")
    if probability_flow and predictor in ("ancestral", "none"):
        raise ValueError(f"predictor {predictor!r} has no probability-flow variant")
    if snr < 0.0:
        raise ValueError(f"snr must not be negative, got {snr}")
    if not isinstance(corrector_steps, int | np.integer) or corrector_steps < 1:
        raise ValueError(f"corrector_steps must be a positive int, got {corrector_steps!r}")
    needs = {"reverse_diffusion": ("a",), "ancestral": ("deviation", "a")}.get(predictor, ())
    needs += ("kept",) if corrector != "none" else ()
    steps = _steps(process, num_steps, discretization, grid, t_start, t_end, needs)
    rows, kicks, draws = Rows(), [], []

    def add(step, form, kick=0.0):
        rows.add(step.point, form)
        kicks.append(kick)
        draws.append(kick > 0 or form.get("z", 0.0) != 0)

    for step in steps:
        for _ in range(corrector_steps if corrector != "none" else 0):
            if corrector == "langevin":
                add(step, Y, 2.0 * snr * step.kept)
            else:
                kick = 2.0 * step.kept * snr * step.point["sigma"]
                add(step, Y + 0.5 * kick**2 * _score(step.point) + kick * Z)
        if predictor != "none":
            mean, deviation = _predict(process, predictor, step, probability_flow)
            add(step, mean + (0.0 if denoise and step is steps[-1] else deviation) * Z)
    table = rows.sampler(steps[-1].there, name="predictor_corrector")
    if not any(kicks):
        return table
    noise = "all" if all(draws) else "some"
    xs = table.xs | {"kick": np.array(kicks)}
    if noise == "some":
        xs["draw"] = np.array(draws)
    structure = table.step.structure._replace(noise=noise)
    return dataclasses.replace(table, step=LangevinStep(structure, norms), xs=xs, stochastic=True)


@register("sampler", "euler_maruyama", family="gaussian", paper="2011.13456")
def euler_maruyama(
    process,
    num_steps: int | None = None,
    *,
    probability_flow: bool = False,
    denoise: bool = True,
    discretization: str | None = None,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """Euler-Maruyama on the reverse SDE: `predictor_corrector` without a corrector, n calls for n steps.

    Args and Raises: see `predictor_corrector`.
    """
    return _predictor_alone("euler_maruyama", **locals())


@register("sampler", "reverse_diffusion", family="gaussian", paper="2011.13456")
def reverse_diffusion(
    process,
    num_steps: int | None = None,
    *,
    probability_flow: bool = False,
    denoise: bool = True,
    discretization: str | None = None,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """Reverse diffusion: `predictor_corrector` without a corrector, n calls for n steps.

    Args and Raises: see `predictor_corrector`.
    """
    return _predictor_alone("reverse_diffusion", **locals())


def _predictor_alone(name, **arguments) -> Sampler:
    sampler = predictor_corrector(predictor=name, corrector="none", **arguments)
    return dataclasses.replace(sampler, name=name)
