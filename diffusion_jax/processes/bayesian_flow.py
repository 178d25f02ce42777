"""Bayesian flow networks (Graves et al., arXiv 2308.07037) as processes in the library's time.

The papers' clock s runs from the prior (0) to the data (1); here t = 1 - s.
Continuous data: the posterior mean mu of each dimension after noisy observations of x0 obeys
  (1) mu = g x0 + sqrt(g (1 - g)) eps,  g = 1 - v^s,  v the last variance
which is a Gaussian process with alpha = g, sigma^2 = g (1 - g), snr = v^-s - 1; at t = 1 both are 0:
nothing is known, and the state is 0 for certain.
Discrete data with K classes: the logits z of the class probabilities softmax(z) obey
  (2) z ~ N(beta (K e_x - 1), K beta I),  beta = beta1 s^2
so that p(x | z) of one position, for a uniform prior, is softmax(z) whatever the time.
Both are linear SDEs (Xue et al., arXiv 2404.15766): forward f and g^2 of (1) are those of
`GaussianProcess`; those of (2) are f = -2 / s and g^2 = 2 K beta1 s.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import (
    as_time,
    check_times,
    example_keys,
    expand,
    is_concrete,
    namespace,
    normal_per_example,
    pytree_dataclass,
    static,
)
from diffusion_jax.processes.gaussian import GaussianProcess, check_range
from diffusion_jax.registry import register


def _check_eta(process):
    if is_concrete(process.eta) and not 0.0 <= process.eta < 1.0:
        raise ValueError(f"{type(process).__name__}: eta = {process.eta} must lie in [0, 1)")


@register("process", "bfn_continuous", family="gaussian", paper="2308.07037")
@pytree_dataclass
class ContinuousBFN(GaussianProcess):
    """The Bayesian flow of continuous data: alpha = g, sigma = sqrt(g (1 - g)), g = 1 - v^(1 - t).

    Not variance preserving. sigma(0) = sqrt(v (1 - v)) is small but not 0. Solvers start at
    t = 1 - eta, where the ODE is regular; the BFN's own sampler starts at t = 1 from the state 0.

    Args:
      min_variance: v, the variance left at t = 0; the papers take 1e-6 for 256 grey levels and 1e-3
        for 16.
      eta: solvers start at t = 1 - eta.
      data_mean, data_std: of the data, where the starting noise is to have the moments of x at
        t = 1 - eta; 0 and 0 start as if all data were 0, as the papers do.
      t_min, t_max: interval of training.
    """

    min_variance: float = 1e-6
    eta: float = 0.01
    data_mean: float = 0.0
    data_std: float = 0.0
    t_min: float = 1e-5
    t_max: float = 1.0 - 1e-5
    default_grid = "uniform"

    def __post_init__(self):
        check_range(self, min_variance=(self.min_variance, 0.0, 1.0))
        _check_eta(self)
        check_times(self)

    @property
    def sampling_range(self):
        return 1.0 - self.eta, 0.0

    @property
    def prior_std(self):
        t = self.sampling_range[0]
        variance = self.sigma(t) ** 2 + (self.alpha(t) * self.data_std) ** 2
        return namespace(variance).sqrt(variance)

    def prior(self, key, shape, dtype=np.float32, index=None):
        """Starting noise `[B, ...]` at t = 1 - eta; arguments as `GaussianProcess.prior`."""
        noise = super().prior(key, shape, dtype, index)
        return noise + jnp.asarray(self.alpha(self.sampling_range[0]) * self.data_mean, dtype)

    def _exponent(self, t):
        """`(xp, (1 - t) log v)`: the logarithm of 1 - g."""
        xp, t = as_time(t, self.min_variance)
        return xp, (1.0 - t) * namespace(self.min_variance).log(self.min_variance)

    def log_alpha(self, t):
        # log(1 - exp(e)): through expm1 near the noise, through log1p near the data
        xp, e = self._exponent(t)
        late = e > -0.5
        with np.errstate(divide="ignore"):
            return xp.where(
                late,
                xp.log(-xp.expm1(xp.where(late, e, -0.5))),
                xp.log1p(-xp.exp(xp.where(late, -0.5, e))),
            )

    def alpha(self, t):
        xp, e = self._exponent(t)
        return -xp.expm1(e)

    def sigma(self, t):
        xp, e = self._exponent(t)
        return xp.sqrt(-xp.expm1(e)) * xp.exp(0.5 * e)

    def lam(self, t):
        """Half log-SNR, `log(v^(t-1) - 1) / 2`; -infinity at t = 1."""
        _, e = self._exponent(t)
        return 0.5 * (self.log_alpha(t) - e)

    def noise_level(self, t):
        """`sigma / alpha`; infinite at t = 1."""
        lam = self.lam(t)
        return namespace(lam).exp(-lam)

    def dalpha(self, t):
        return -self.diffusion_squared(t)

    def dsigma(self, t):
        # (sigma^2)' = g' (1 - 2 g), and 1 - 2 g = 2 v^s - 1
        xp, e = self._exponent(t)
        with np.errstate(divide="ignore"):
            return 0.5 * self.dalpha(t) * xp.expm1(e + np.log(2.0)) / self.sigma(t)

    def diffusion_squared(self, t):
        """g(t)^2 = -log(v) v^(1 - t)."""
        xp, e = self._exponent(t)
        return -namespace(self.min_variance).log(self.min_variance) * xp.exp(e)

    def t_of_lam(self, lam):
        """Inverse of `lam`: snr = v^-(1-t) - 1."""
        xp, lam = as_time(lam, self.min_variance)
        return 1.0 + xp.logaddexp(0.0, 2.0 * lam) / namespace(self.min_variance).log(
            self.min_variance
        )


@register("process", "bfn_discrete", family="bayesian_flow", paper="2308.07037")
@pytree_dataclass
class DiscreteBFN:
    """The Bayesian flow of tokens: logits z `[B, L, K]`, z ~ N(beta (K e_x - 1), K beta I).

    beta(t) = beta1 (1 - t)^2. A denoiser of this process is `denoise(z, t) -> [B, L, K]`, the
    probabilities of the classes, E[one-hot x0 | z].

    Args:
      vocab_size: number of classes K.
      beta1: accuracy at t = 0 (text8 with K = 27: 0.75^2; MNIST with K = 2: 9).
      eta: solvers start at t = 1 - eta; the ODE is singular at t = 1.
      t_min, t_max: interval of training.
    """

    vocab_size: int = static()
    beta1: float = 0.75**2
    eta: float = 1e-3
    t_min: float = 0.0
    t_max: float = 1.0

    default_grid = "uniform"

    def __post_init__(self):
        if not isinstance(self.vocab_size, int) or self.vocab_size < 2:
            raise ValueError(
                f"DiscreteBFN: vocab_size = {self.vocab_size!r} must be an int of at least 2"
            )
        check_range(self, beta1=(self.beta1, 0.0, float("inf")))
        _check_eta(self)
        check_times(self)

    @property
    def sampling_range(self):
        return 1.0 - self.eta, 0.0

    def beta(self, t):
        """Accuracy collected by time t, `beta1 (1 - t)^2`."""
        _, t = as_time(t, self.beta1)
        return self.beta1 * (1.0 - t) ** 2

    def dbeta(self, t):
        """`d beta / dt = -2 beta1 (1 - t)`."""
        _, t = as_time(t, self.beta1)
        return -2.0 * self.beta1 * (1.0 - t)

    def point(self, t):
        """The schedule at `t` as a dictionary `t, beta`."""
        _, t = as_time(t)
        return {"t": t, "beta": self.beta(t)}

    def check_tokens(self, tokens):
        """Raises ValueError unless `tokens` is an int array `[B, L]`, in 0..K-1 where it can be seen."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be an integer array [B, L]; got shape {tuple(tokens.shape)}, "
                f"dtype {tokens.dtype}"
            )
        if not isinstance(tokens, jax.core.Tracer) and tokens.size:
            values = np.asarray(tokens)
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"tokens must lie in 0..{self.vocab_size - 1}; got {low}..{high}")

    def corrupt(self, tokens, eps, t):
        """A draw of `q(z_t | x0)`.

        Args:
          tokens: int `[B, L]`.
          eps: standard normal `[B, L, K]`.
          t: scalar or `[B]`.
        Returns:
          logits z `[B, L, K]`.
        """
        xp = namespace(eps, t, tokens)
        one_hot = xp.eye(self.vocab_size, dtype=eps.dtype)[tokens]
        beta = expand(self.beta(t), eps)
        return beta * (self.vocab_size * one_hot - 1.0) + xp.sqrt(self.vocab_size * beta) * eps

    def prior(self, key, shape, dtype=np.float32, index=None):
        """Starting logits at t = 1 - eta, `N(0, K beta)`.

        Args:
          shape: `[B, L]`, or `[B, L, K]`.
          index: int `[B]`; example i depends on `key` and `index[i]` (default i) alone.
        Returns:
          `[B, L, K]`.
        """
        shape = tuple(shape) if len(shape) == 3 else (*shape, self.vocab_size)
        index = np.arange(shape[0]) if index is None else index
        like = jax.ShapeDtypeStruct(shape, np.dtype(dtype))
        variance = self.vocab_size * self.beta(self.sampling_range[0])
        width = namespace(variance).sqrt(variance)
        return width * normal_per_example(example_keys(key, index), like)
