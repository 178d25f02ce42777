"""Bridges `x_t = a(t) x1 + b(t) x0 + c(t) eps` between data x0 (t = 0) and a source x1 (t = 1).

Any such path is a `BridgeProcess`. Most are h-transforms of a linear SDE with
`x_t = alpha x0 + alpha rho eps` (`SDEBridge`; arXiv 2309.16948; notation of DBIM, arXiv 2405.15885). With
rho_bar^2 = rho_T^2 - rho^2 and alpha_bar = alpha / alpha_T:
  (1) a = alpha_bar rho^2 / rho_T^2, b = alpha rho_bar^2 / rho_T^2, c = alpha rho rho_bar / rho_T
  (2) lam = log(b / c) rises from -inf at the source to +inf at the data
  (3) score of x_t given x1: s = -(x - a x1 - b x0_hat) / c^2
  (4) h = grad log q(x1 | x_t) = -(x - alpha_bar x1) / (alpha^2 rho_bar^2)
  (5) reverse SDE drift f x - g^2 (s - h); probability-flow ODE f x - g^2 (s / 2 - h)
  (6) the same ODE for any a, b, c: a' x1 + b' x0_hat - c c' s
A schedule (`bridge_schedules`) gives alpha, rho^2, rho_bar^2 (never as a difference of the first two), f
and g^2; an interpolant (`interpolants`) gives a, b, c and their slopes.
"""

import numpy as np

from diffusion_jax.numerics import as_time, expand, namespace


class BridgeProcess:
    """What every path between two ends shares; a subclass gives `a, b, c, slopes, diffusion_squared`.

    In `score` and `velocity` x, x0 and x1 are arrays `[B, ...]` (t scalar or `[B]`) or, for the tables of
    samplers, linear forms with a scalar t.

    Attributes:
      t_min, t_max: interval of training; c vanishes at both 0 and 1.
      clock_scale: the paper's own clock is `clock_scale * t` (DDBM's VE runs in sigma).
      default_grid: name of the time grid that suits the process.
    """

    t_min: float
    t_max: float
    clock_scale = 1.0
    default_grid = "uniform"

    @property
    def sampling_range(self):
        return self.t_max, self.t_min

    def lam(self, t):
        """`log(b / c)`, the bridge's half log signal-to-noise ratio."""
        b, c = self.b(t), self.c(t)
        with np.errstate(divide="ignore", invalid="ignore"):
            return namespace(b, c).log(b) - namespace(b, c).log(c)

    def noise_level(self, t):
        """The clock in which Karras grids are laid out: the paper's own time, up to a factor."""
        return as_time(t)[1]

    def t_of_noise_level(self, u):
        """Inverse of `noise_level`."""
        return as_time(u)[1]

    def point(self, t):
        """The schedule at `t` as a dictionary `t, a, b, c`."""
        _, t = as_time(t)
        return {"t": t, "a": self.a(t), "b": self.b(t), "c": self.c(t)}

    def corrupt(self, x0, x1, eps, t):
        """A draw of `q(x_t | x0, x1)`; `x0, x1, eps` `[B, ...]`, `t` scalar or `[B]`."""
        a, b, c = (expand(f(t), x0) for f in (self.a, self.b, self.c))
        return a * x1 + b * x0 + c * eps

    def score(self, x, x0, x1, t):
        """grad log q(x_t | x1) where x0 is E[x0 | x_t, x1] (eq. 3)."""
        a, b, c = (expand(f(t), x) for f in (self.a, self.b, self.c))
        return (x - a * x1 - b * x0) * (-1.0 / c**2)

    def velocity(self, x, x0, x1, t):
        """dx/dt of the probability-flow ODE where x0 is E[x0 | x_t, x1] (eq. 6)."""
        slopes = {name: expand(v, x) for name, v in self.slopes(t).items()}
        return slopes["a"] * x1 + slopes["b"] * x0 - slopes["cc"] * self.score(x, x0, x1, t)


class SDEBridge(BridgeProcess):
    """The h-transform of a linear SDE; a subclass gives `rho2, rho_bar2, rho2_T, t_of_rho2`, and g^2.

    `alpha` and `drift` are those of an SDE without a drift unless it gives them too.
    """

    def alpha(self, t):
        """Signal coefficient of the base diffusion, the shape of `t`."""
        xp, t = as_time(t, self.t_min)
        return xp.ones_like(t)

    def alpha_T(self):
        """alpha at t = 1."""
        return self.alpha(1.0)

    def rho2_T(self, t):
        """`rho^2 + rho_bar^2`, constant in t for a bridge of an SDE."""
        return self.rho2(t) + self.rho_bar2(t)

    def drift(self, t):
        """f(t) of the base SDE, per unit of t."""
        xp, t = as_time(t, self.t_min)
        return xp.zeros_like(t)

    def a(self, t):
        """Coefficient of the source x1."""
        return self.alpha(t) / self.alpha_T() * self.rho2(t) / self.rho2_T(t)

    def b(self, t):
        """Coefficient of the data x0."""
        return self.alpha(t) * self.rho_bar2(t) / self.rho2_T(t)

    def c(self, t):
        """Standard deviation of the bridge."""
        product = self.rho2(t) * self.rho_bar2(t) / self.rho2_T(t)
        return self.alpha(t) * namespace(product).sqrt(product)

    def slopes(self, t):
        """da/dt, db/dt and c dc/dt as a dictionary `a, b, cc`: all three finite at both ends."""
        f, g2, total = self.drift(t), self.diffusion_squared(t), self.rho2_T(t)
        alpha = self.alpha(t)
        return {
            "a": f * self.a(t) + g2 / (alpha * self.alpha_T() * total),
            "b": f * self.b(t) - g2 / (alpha * total),
            "cc": f * self.c(t) ** 2 + 0.5 * g2 * (self.rho_bar2(t) - self.rho2(t)) / total,
        }

    def lam(self, t):
        """`log(b / c)`, the bridge's half log signal-to-noise ratio."""
        with np.errstate(divide="ignore"):
            ratio = self.rho_bar2(t) / (self.rho2(t) * self.rho2_T(t))
            return 0.5 * namespace(ratio).log(ratio)

    def t_of_lam(self, lam):
        """Inverse of `lam` through rho^2 = rho_T^2 / (1 + rho_T^2 exp(2 lam))."""
        total = self.rho2_T(0.0)
        xp, lam = as_time(lam, total)
        # exp(-logaddexp) is the ratio without overflow
        return self.t_of_rho2(total * xp.exp(-xp.logaddexp(0.0, 2.0 * lam + xp.log(total))))

    def point(self, t):
        """The schedule at `t` as a dictionary `t, a, b, c`, and `alpha, sigma` of the base diffusion."""
        _, t = as_time(t)
        rho2 = self.rho2(t)
        alpha = self.alpha(t)
        base = {"alpha": alpha, "sigma": alpha * namespace(rho2).sqrt(rho2)}
        return {"t": t, "a": self.a(t), "b": self.b(t), "c": self.c(t), **base}

    def kernel_score(self, x, x1, t):
        """h = grad log q(x1 | x_t), the score of the base diffusion's transition to its end (eq. 4)."""
        alpha = expand(self.alpha(t), x)
        variance = expand(self.alpha(t) ** 2 * self.rho_bar2(t), x)
        return (x - alpha / self.alpha_T() * x1) * (-1.0 / variance)
