"""Exact models: closed-form denoisers for data whose law is known.

They serve tests (every solver and loss is measured against them) and notebooks (no training needed).
All are denoisers `(x, t)` with `at(x, point)`, work in the dtype of x, and are pytrees.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import expand, namespace, pytree_dataclass, static


def _solve(covariance, x):
    """`covariance^-1 x` for x `[..., D]` and a covariance `[..., D, D]`."""
    return jnp.linalg.solve(covariance, x[..., None])[..., 0]


@pytree_dataclass
class GaussianMixture:
    """Data `sum_k weights_k N(means_k, covariances_k)` in D dimensions under a Gaussian process.

    With S_k = alpha^2 C_k + sigma^2 I and r the posterior of the component,
    `x0_hat = sum_k r_k (m_k + alpha C_k S_k^-1 (x - alpha m_k))`.

    Args:
      process: a Gaussian process.
      weights: `[K]`, positive, summing to 1.
      means: `[K, D]`.
      covariances: `[K, D, D]`, symmetric positive semi-definite.
    """

    process: Any
    weights: Any
    means: Any
    covariances: Any

    def __call__(self, x, t):
        return self.at(x, self.process.point(t))

    def _components(self, x, point):
        """Component log-densities `[B, K]` and `S_k^-1 (x - alpha m_k)` `[B, K, D]`."""
        alpha, sigma = (
            expand(jnp.asarray(point[n], x.dtype), x)[..., None] for n in ("alpha", "sigma")
        )
        means, covariances = (
            jnp.asarray(self.means, x.dtype),
            jnp.asarray(self.covariances, x.dtype),
        )
        eye = jnp.eye(x.shape[-1], dtype=x.dtype)
        s = alpha[..., None] ** 2 * covariances + sigma[..., None] ** 2 * eye
        d = x[:, None, :] - alpha * means
        s = jnp.broadcast_to(s, (*d.shape, d.shape[-1]))
        solved = _solve(s, d)
        log_det = jnp.linalg.slogdet(s)[1]
        constant = x.shape[-1] * np.log(2.0 * np.pi)
        log_prob = jnp.log(jnp.asarray(self.weights, x.dtype)) - 0.5 * (
            (d * solved).sum(-1) + log_det + constant
        )
        return log_prob, solved, alpha

    def at(self, x, point):
        """E[x0 | x_t = x], `[B, D]`."""
        log_prob, solved, alpha = self._components(x, point)
        means, covariances = (
            jnp.asarray(self.means, x.dtype),
            jnp.asarray(self.covariances, x.dtype),
        )
        each = means + alpha * jnp.einsum("kij,bkj->bki", covariances, solved)
        return (jax.nn.softmax(log_prob, axis=1)[..., None] * each).sum(axis=1)

    def log_prob(self, x, t):
        """log p_t(x), `[B]`."""
        return jax.nn.logsumexp(self._components(x, self.process.point(t))[0], axis=1)

    def score(self, x, t):
        """grad log p_t(x), `[B, D]`."""
        log_prob, solved, _ = self._components(x, self.process.point(t))
        return -(jax.nn.softmax(log_prob, axis=1)[..., None] * solved).sum(axis=1)

    def sample(self, key, num):
        """`num` draws of the data, `[num, D]`."""
        pick, noise = jax.random.split(key)
        k = jax.random.choice(pick, len(self.weights), (num,), p=jnp.asarray(self.weights))
        z = jax.random.normal(noise, (num, np.shape(self.means)[1]))
        # not Cholesky: a covariance may be singular
        eigenvalues, basis = jnp.linalg.eigh(jnp.asarray(self.covariances))
        root = basis * jnp.sqrt(jnp.maximum(eigenvalues, 0.0))[:, None, :]
        return jnp.asarray(self.means)[k] + jnp.einsum("bij,bj->bi", root[k], z)


def Gaussian(process, mean, covariance) -> GaussianMixture:
    """Data `N(mean [D], covariance [D, D])`: a mixture of one."""
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    return GaussianMixture(process, np.ones(1), mean[None], covariance[None])


def gaussian_flow(process, mean, covariance, x, t, s):
    """Where the probability-flow ODE carries x from time t to time s for Gaussian data, exactly.

    Along each eigenvector of the covariance with eigenvalue l the centred coordinate scales by
    `sqrt((alpha_s^2 l + sigma_s^2) / (alpha_t^2 l + sigma_t^2))`.

    Args:
      mean, covariance: of the data, `[D]`, `[D, D]`.
      x: `[B, D]`, NumPy or JAX.
    Returns:
      `[B, D]`.
    """
    eigenvalues, basis = np.linalg.eigh(np.asarray(covariance, np.float64))
    a, b = (process.alpha(v) ** 2 * eigenvalues + process.sigma(v) ** 2 for v in (t, s))
    return (
        process.alpha(s) * mean + ((x - process.alpha(t) * mean) @ basis * np.sqrt(b / a)) @ basis.T
    )


@pytree_dataclass
class GaussianBridge:
    """Joint Gaussian (x0, x1) under a bridge process: E[x0 | x_t, x1], affine in x_t.

    With mu = mean0 + G (x1 - mean1), G = cov01 cov11^-1 and S = cov00 - G cov01^T:
    `x0_hat = mu + b S (b^2 S + c^2 I)^-1 (x - a x1 - b mu)`.

    Args:
      process: a bridge process.
      source: x1 `[B, D]`.
      mean0, mean1: `[D]`; cov00, cov01, cov11: `[D, D]`, cov01 = Cov(x0, x1).
    """

    process: Any
    source: Any
    mean0: Any
    mean1: Any
    cov00: Any
    cov01: Any
    cov11: Any

    def __call__(self, x, t):
        return self.at(x, self.process.point(t))

    def conditional(self):
        """Mean `[B, D]` and covariance `[D, D]` of x0 given the source."""
        gain = jnp.linalg.solve(jnp.asarray(self.cov11).T, jnp.asarray(self.cov01).T).T
        mean = self.mean0 + (jnp.asarray(self.source) - self.mean1) @ gain.T
        return mean, self.cov00 - gain @ jnp.asarray(self.cov01).T

    def at(self, x, point):
        """E[x0 | x_t = x, x1], `[B, D]`; the conditional mean where b = c = 0 (the source itself)."""
        mean, covariance = self.conditional()
        a, b, c = (expand(jnp.asarray(point[n], x.dtype), x) for n in "abc")
        eigenvalues, basis = jnp.linalg.eigh(covariance)
        variance = b**2 * eigenvalues + c**2
        gain = jnp.where(
            variance > 0, b * eigenvalues / jnp.where(variance > 0, variance, 1.0), 0.0
        )
        return mean + ((x - a * self.source - b * mean) @ basis * gain) @ basis.T

    def flow(self, x, t, s):
        """Where the bridge's probability-flow ODE carries x from time t to time s, `[B, D]`."""
        mean, covariance = self.conditional()
        eigenvalues, basis = jnp.linalg.eigh(covariance)
        p, q = self.process.point(t), self.process.point(s)
        ratio = (q["b"] ** 2 * eigenvalues + q["c"] ** 2) / (
            p["b"] ** 2 * eigenvalues + p["c"] ** 2
        )
        centred = (x - p["a"] * self.source - p["b"] * mean) @ basis
        return q["a"] * self.source + q["b"] * mean + (centred * jnp.sqrt(ratio)) @ basis.T


@pytree_dataclass
class GaussianPairs:
    """Pairs `(x0, x1)` from a mixture of joint Gaussians under an interpolant: its exact field.

    A pair of component k has a joint normal law, so that `x_t ~ sum_k w_k N(m_k, V_k)` with
    `m = a mean1 + b mean0` and `V = a^2 cov11 + b^2 cov00 + a b (cov01 + cov01^T) + c^2 I`. Given x and the
    component, x0, x1 and z are affine in x. Called as `fields.InterpolantField` is: the velocity as
    `oracle(x, t)`, the drift of an SDE as `oracle.at(x, point)` where the point has an "epsilon".

    Args:
      process: an interpolant, any bridge process with `slopes`.
      weights: `[K]`, positive, summing to 1.
      mean0, mean1: `[K, D]`; cov00, cov01, cov11: `[K, D, D]`, cov01 = Cov(x0, x1).
    """

    process: Any
    weights: Any
    mean0: Any
    mean1: Any
    cov00: Any
    cov01: Any
    cov11: Any

    def __call__(self, x, t):
        return self.at(x, self.process.point(t))

    def _posterior(self, x, point):
        """Weights of the components `[B, K]` and, given each, `V^-1 (x - m)`, E[x0], E[x1] `[B, K, D]`."""
        a, b, c = (expand(jnp.asarray(point[n], x.dtype), x)[..., None] for n in "abc")
        mean0, mean1 = (jnp.asarray(v, x.dtype) for v in (self.mean0, self.mean1))
        c00, c01, c11 = (jnp.asarray(v, x.dtype) for v in (self.cov00, self.cov01, self.cov11))
        c10 = jnp.swapaxes(c01, -1, -2)
        d = x[..., None, :] - a * mean1 - b * mean0
        a, b, c = (v[..., None] for v in (a, b, c))
        eye = jnp.eye(x.shape[-1], dtype=x.dtype)
        total = a**2 * c11 + b**2 * c00 + a * b * (c01 + c10) + c**2 * eye
        total = jnp.broadcast_to(total, (*d.shape, d.shape[-1]))
        solved = _solve(total, d)
        log_prob = jnp.log(jnp.asarray(self.weights, x.dtype)) - 0.5 * (
            (d * solved).sum(-1) + jnp.linalg.slogdet(total)[1]
        )

        def pull(covariance):
            return (jnp.broadcast_to(covariance, total.shape) @ solved[..., None])[..., 0]

        return (
            jax.nn.softmax(log_prob, axis=-1),
            solved,
            mean0 + pull(a * c01 + b * c00),
            mean1 + pull(a * c11 + b * c10),
        )

    def parts(self, x, point):
        """Exact expectations at x `[B, D]`: {part: `[B, D]`}.

        The names are those of `fields.PARTS`, and "x0" and "x1".
        """
        weights, *each = self._posterior(x, point)
        solved, x0, x1 = ((weights[..., None] * v).sum(-2) for v in each)
        slopes = self.process.slopes(point["t"])
        da, db, cc = (expand(jnp.asarray(slopes[n], x.dtype), x) for n in ("a", "b", "cc"))
        mean_slope = da * x1 + db * x0
        return {
            "velocity": mean_slope + cc * solved,
            "conditional_velocity": mean_slope,
            "denoiser": expand(jnp.asarray(point["c"], x.dtype), x) * solved,
            "score": -solved,
            "x0": x0,
            "x1": x1,
        }

    def at(self, x, point):
        """The velocity u, or the drift `u - epsilon s` where the point has an "epsilon", `[B, D]`."""
        parts, epsilon = self.parts(x, point), point.get("epsilon")
        if epsilon is None:
            return parts["velocity"]
        return parts["velocity"] - expand(jnp.asarray(epsilon, x.dtype), x) * parts["score"]

    def sample(self, key, num):
        """`num` pairs: x0 and x1, each `[num, D]`."""
        pick, noise = jax.random.split(key)
        k = jax.random.choice(pick, len(self.weights), (num,), p=jnp.asarray(self.weights))
        dim = np.shape(self.mean0)[1]
        joint = np.block(
            [
                [np.asarray(self.cov00), np.asarray(self.cov01)],
                [np.swapaxes(self.cov01, -1, -2), np.asarray(self.cov11)],
            ]
        )
        eigenvalues, basis = jnp.linalg.eigh(jnp.asarray(joint))
        root = basis * jnp.sqrt(jnp.maximum(eigenvalues, 0.0))[:, None, :]
        z = jnp.einsum("bij,bj->bi", root[k], jax.random.normal(noise, (num, 2 * dim)))
        return jnp.asarray(self.mean0)[k] + z[:, :dim], jnp.asarray(self.mean1)[k] + z[:, dim:]


def GaussianInterpolant(process, mean0, cov00, mean1, cov11, cov01=None) -> GaussianPairs:
    """The exact field of an interpolant between N(mean0, cov00) and N(mean1, cov11).

    Args:
      mean0, mean1: `[D]`; cov00, cov11, cov01: `[D, D]`; cov01 = Cov(x0, x1), None: independent ends.
    """
    mean0, mean1, cov00, cov11 = (np.asarray(v)[None] for v in (mean0, mean1, cov00, cov11))
    cov01 = np.zeros_like(cov00) if cov01 is None else np.asarray(cov01)[None]
    return GaussianPairs(process, np.ones(1), mean0, mean1, cov00, cov01, cov11)


def MixtureInterpolant(process, data, source) -> GaussianPairs:
    """The exact field of an interpolant between two Gaussian mixtures, independently coupled.

    Args:
      data, source: `(weights [K], means [K, D], covariances [K, D, D])` of x0 and of x1; each pair of
        components is one of the result's.
    """
    (w0, m0, c0), (w1, m1, c1) = (
        tuple(np.asarray(v, np.float64) for v in mixture) for mixture in (data, source)
    )
    i, j = (v.ravel() for v in np.indices((len(w0), len(w1))))
    zero = np.zeros_like(c0[i])
    return GaussianPairs(process, w0[i] * w1[j], m0[i], m1[j], c0[i], zero, c1[j])


@pytree_dataclass
class TokenTable:
    """Sequences of length L over V tokens with an explicit joint table: exact masked conditionals.

    Args:
      probs: `[V] * L`, non-negative, summing to 1.
    """

    probs: Any
    vocab_size: int = static()
    length: int = static()

    def _joint(self, tokens):
        """p(unmasked tokens, x0 = v at each position), for one sequence `[L]` -> `[L, V]`."""
        v, n = self.vocab_size, self.length
        grid = jnp.moveaxis(jnp.indices((v,) * n), 0, -1).reshape(-1, n)
        agrees = ((grid == tokens) | (tokens == v)).all(axis=1)
        weight = jnp.where(agrees, jnp.asarray(self.probs).reshape(-1), 0.0)
        return jnp.einsum("s,slv->lv", weight, jax.nn.one_hot(grid, v, dtype=weight.dtype))

    def __call__(self, tokens, t):
        """Logits `log p(x0_i = v | unmasked tokens)`, int `[B, L]` (mask id V) -> `[B, L, V]`."""
        joint = jax.vmap(self._joint)(tokens)
        return jnp.log(joint) - jnp.log(joint.sum(axis=-1, keepdims=True))

    def log_prob(self, tokens):
        """log p of clean sequences, int `[B, L]` -> `[B]`."""
        return jnp.log(jnp.asarray(self.probs)[tuple(jnp.moveaxis(tokens, 1, 0))])


def token_table(probs) -> TokenTable:
    """A `TokenTable` from its joint table.

    Raises:
      ValueError: axes of different length, negative entries, or a sum other than 1.
    """
    probs = np.asarray(probs, np.float64)
    if len(set(probs.shape)) != 1:
        raise ValueError(f"the table must have one axis of V entries a position; got {probs.shape}")
    if probs.min() < 0 or not np.isclose(probs.sum(), 1.0):
        raise ValueError(f"the table must be a probability: min {probs.min()}, sum {probs.sum()}")
    return TokenTable(probs, vocab_size=probs.shape[0], length=probs.ndim)


@pytree_dataclass
class SequenceList:
    """A finite list of sequences under a Bayesian flow: exact class probabilities for logits z.

    `p(sequence | z)` is proportional to `p(sequence) exp(sum over positions of z at its token)`, whatever
    the time (arXiv 2308.07037: every position's flow is Gaussian with one covariance for all classes).

    Args:
      sequences: int `[M, L]`, tokens in 0..K-1.
      probs: `[M]`, positive, summing to 1.
      vocab_size: K.
    """

    sequences: Any
    probs: Any
    vocab_size: int = static()

    def __call__(self, z, t):
        """E[one-hot x0 | z], `[B, L, K]`; z NumPy or JAX."""
        xp = namespace(z, self.sequences, self.probs)
        one_hot = xp.eye(self.vocab_size, dtype=z.dtype)[xp.asarray(self.sequences)]
        logits = xp.log(xp.asarray(self.probs)) + xp.einsum("mlk,blk->bm", one_hot, z)
        weights = xp.exp(logits - logits.max(axis=1, keepdims=True))
        weights = weights / weights.sum(axis=1, keepdims=True)
        return xp.einsum("bm,mlk->blk", weights, one_hot)
