"""Stochastic interpolants `x_t = a(t) x1 + b(t) x0 + c(t) z` (Albergo et al., arXiv 2303.08797).

The paper's clock runs from the base at 0 to the target at 1; here t = 1 - (paper's time), so that t = 0 is
the target x0 and t = 1 the base x1: the paper's (alpha, beta, gamma) at its time s are (a, b, c) at t = 1 - s,
and derivatives change their sign. What is conditioned on both ends is a bridge like any other; what a
network that sees neither end learns is in `objectives.interpolant`.

One-sided interpolants, without z and with a Gaussian base, are Gaussian processes: `RectifiedFlow` (linear)
and `Cosine` (trigonometric).
"""

import numpy as np

from diffusion_jax.numerics import (
    as_time,
    check_times,
    is_concrete,
    namespace,
    pytree_dataclass,
    static,
)
from diffusion_jax.processes.bridge import BridgeProcess
from diffusion_jax.registry import closest, register


def _linear(xp, t, variance, slope):
    one = xp.ones_like(t)
    return t, one, 1.0 - t, -one


def _trigonometric(xp, t, variance, slope):
    """Angles pi t / 2 on the circle of radius sqrt(1 - gamma^2); `slope` is gamma gamma'."""
    angle, rate, radius = 0.5 * np.pi * t, 0.5 * np.pi, xp.sqrt(1.0 - variance)
    sin, cos = xp.sin(angle), xp.cos(angle)
    shrink = -slope / radius
    return (
        radius * sin,
        shrink * sin + radius * rate * cos,
        radius * cos,
        shrink * cos - radius * rate * sin,
    )


def _encoder_decoder(xp, t, variance, slope):
    """The source fades into noise in the first half of the way, the data come out of it in the second."""
    value, derivative = xp.cos(np.pi * t) ** 2, -np.pi * xp.sin(2.0 * np.pi * t)
    late, zero = t > 0.5, xp.zeros_like(t)
    return (
        xp.where(late, value, zero),
        xp.where(late, derivative, zero),
        xp.where(late, zero, value),
        xp.where(late, zero, derivative),
    )


def _brownian(xp, t):
    return t * (1.0 - t), 0.5 - t


def _quadratic(xp, t):
    return (t * (1.0 - t)) ** 2, t * (1.0 - t) * (1.0 - 2.0 * t)


def _squared_sine(xp, t):
    sine = xp.sin(np.pi * t)
    return sine**4, np.pi * sine**2 * xp.sin(2.0 * np.pi * t)


def _sigmoid(xp, t):
    """A bump: the difference of two sigmoids of slope 10, less its value at the ends."""

    def logistic(v):
        return 1.0 / (1.0 + xp.exp(-v))

    up, down = logistic(10.0 * (t - 0.5) + 1.0), logistic(10.0 * (t - 0.5) - 1.0)
    floor = logistic(-4.0 * xp.ones_like(t)) - logistic(-6.0 * xp.ones_like(t))
    bump = up - down - floor
    return bump**2, 10.0 * bump * (up * (1.0 - up) - down * (1.0 - down))


def _none(xp, t):
    return xp.zeros_like(t), xp.zeros_like(t)


# (a, a', b, b') and (gamma^2, gamma gamma') in this library's clock
PATHS = {"linear": _linear, "trig": _trigonometric, "encoder_decoder": _encoder_decoder}
GAMMAS = {
    "brownian": _brownian,
    "quadratic": _quadratic,
    "sin2": _squared_sine,
    "sigmoid": _sigmoid,
    "none": _none,
}


@register("process", "interpolant", family="interpolant", paper="2303.08797")
@pytree_dataclass
class Interpolant(BridgeProcess):
    """A two-sided stochastic interpolant (arXiv 2303.08797, section 4).

    With path "linear", gamma "brownian" and scale s it is `BrownianBridge(scale=s)`.

    Args:
      path: "linear" (a = t, b = 1 - t), "trig" (sqrt(1 - c^2) times sine and cosine of pi t / 2) or
        "encoder_decoder" (cos^2 of pi t in halves: only noise in the middle).
      gamma: c = scale * gamma: "brownian" sqrt(t (1 - t)), "quadratic" t (1 - t), "sin2" sin(pi t)^2,
        "sigmoid" (a smooth bump), or "none" (deterministic given both ends).
      scale: factor of c.
      noise: g, the default noise of SDE samplers: the paper's epsilon is g^2 / 2, free after training.
    Raises:
      ValueError: an unknown path or gamma, numbers out of range, "encoder_decoder" without noise, "trig"
        with a gamma above 1.
    """

    path: str = static("linear")
    gamma: str = static("brownian")
    scale: float = 1.0
    noise: float = 1.0
    t_min: float = 1e-3
    t_max: float = 1.0 - 1e-3

    def __post_init__(self):
        for name, value, valid in (("path", self.path, PATHS), ("gamma", self.gamma, GAMMAS)):
            if value not in valid:
                raise ValueError(f"unknown {name} {value!r}{closest(value, valid)}")
        if is_concrete(self.scale, self.noise) and not (self.scale > 0 and self.noise >= 0):
            raise ValueError(
                f"Interpolant: scale = {self.scale} must be positive and noise = {self.noise} not negative"
            )
        if self.path == "encoder_decoder" and self.gamma == "none":
            raise ValueError("the path 'encoder_decoder' needs a gamma: its middle is noise alone")
        if self.path == "trig" and is_concrete(self.scale):
            largest = self.scale * float(GAMMAS[self.gamma](np, np.float64(0.5))[0]) ** 0.5
            if largest >= 1.0:
                raise ValueError(
                    f"the path 'trig' needs c < 1: scale = {self.scale} makes it {largest:.3g}"
                )
        check_times(self)

    def _evaluate(self, t):
        xp, t = as_time(t, self.scale)
        variance, slope = GAMMAS[self.gamma](xp, t)
        variance, slope = self.scale**2 * variance, self.scale**2 * slope
        return variance, slope, *PATHS[self.path](xp, t, variance, slope)

    def a(self, t):
        """Coefficient of the source x1."""
        return self._evaluate(t)[2]

    def b(self, t):
        """Coefficient of the data x0."""
        return self._evaluate(t)[4]

    def c(self, t):
        """Coefficient of the latent noise z, the paper's gamma."""
        variance = self._evaluate(t)[0]
        return namespace(variance).sqrt(variance)

    def slopes(self, t):
        """da/dt, db/dt and c dc/dt as a dictionary `a, b, cc`."""
        _, slope, _, da, _, db = self._evaluate(t)
        return {"a": da, "b": db, "cc": slope}

    def diffusion_squared(self, t):
        """g^2 = noise^2: twice the paper's epsilon."""
        xp, t = as_time(t, self.noise)
        return self.noise**2 * xp.ones_like(t)

    def t_of_lam(self, lam):
        """Inverse of `lam`, by bisection on the host (for time grids).

        Raises:
          ValueError: a path on which b / c does not fall all the way from infinity to 0.
        """
        if self.path == "encoder_decoder" or self.gamma == "none":
            raise ValueError(
                f"log(b / c) has no inverse on the path {self.path!r} with gamma {self.gamma!r}"
            )
        lam = np.asarray(lam, np.float64)
        low, high = np.zeros_like(lam), np.ones_like(lam)
        for _ in range(60):
            middle = 0.5 * (low + high)
            above = self.lam(middle) > lam
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return 0.5 * (low + high)
