"""What the sampler tests share: exact models written apart from the library's, and a plain solver loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import processes, registry
from diffusion_jax.numerics import namespace, pytree_dataclass
from diffusion_jax.samplers import ModelStatistics


def _likes_neighbours(x, t):
    """A reward for `reward_guided`: tokens int `[B, L]` or weights of tokens, all 5 and the mask."""
    weights = x if jnp.issubdtype(x.dtype, jnp.floating) else jax.nn.one_hot(x, 6)
    return (weights * jnp.roll(weights, 1, axis=1)).sum(axis=-1) + 0.1 * weights[..., 0]


# Arguments without which a registered sampler cannot be built, or not with the few steps of a test.
_REQUIRED = {
    "block_decoding": lambda process: {"block_size": 2},
    "semi_autoregressive": lambda process: {"window": 2, "stride": 1},
    "predictor_corrector": lambda process: {"discretization": "chain"},
    "reverse_diffusion": lambda process: {"discretization": "chain"},
    "dpm_solver_v3": lambda process: {"statistics": ModelStatistics.data_prediction(process)},
    "reward_guided": lambda process: {
        "reward": _likes_neighbours,
        "strength": 2.0,
        "candidates": 2,
    },
}


def table_names(family):
    """Registered samplers of a family that are tables; the others say `table=False`."""
    names = registry.names("sampler", family=family)
    return [n for n in names if registry.entry("sampler", n).meta.get("table", True)]


def least_steps(name):
    """The fewest steps that the registered sampler `name` takes: those of its order."""
    return registry.entry("sampler", name).meta.get("min_steps", 1)


def required(name, process):
    """Arguments that the registered sampler `name` needs on a process."""
    return _REQUIRED[name](process) if name in _REQUIRED else {}


def bridges():
    """One process of every registered kind of bridge, by name."""
    needs = {"h_transform": {"base": processes.SubVP()}}
    names = registry.names("process", family="bridge")
    return {n: registry.get("process", n)(**needs.get(n, {})) for n in names}


def mixture_mean(x, point, weights, means, covariances):
    """E[x0 | x] of a Gaussian mixture in the plane, by Cramer's rule; NumPy or JAX, x `[B, 2]`."""
    xp = namespace(x, point["alpha"])
    alpha, sigma = point["alpha"], point["sigma"]
    scaled = alpha**2 * covariances
    xx, xy, yy = scaled[:, 0, 0] + sigma**2, scaled[:, 0, 1], scaled[:, 1, 1] + sigma**2
    det = xx * yy - xy**2
    d = x[:, None, :] - alpha * means
    px = (yy * d[..., 0] - xy * d[..., 1]) / det
    py = (xx * d[..., 1] - xy * d[..., 0]) / det
    logits = xp.log(weights) - 0.5 * (xp.log(det) + d[..., 0] * px + d[..., 1] * py)
    posterior = xp.exp(logits - logits.max(1, keepdims=True))
    posterior = posterior / posterior.sum(1, keepdims=True)
    pulled = xp.stack([px, py], -1)
    each = means + alpha * (covariances * pulled[:, :, None, :]).sum(-1)
    return (posterior[..., None] * each).sum(1)


@pytree_dataclass
class Mixture:
    """`mixture_mean` as a denoiser whose numbers are traced: all schedules share its programs."""

    weights: Any
    means: Any
    covariances: Any

    def at(self, x, point):
        return mixture_mean(x, point, self.weights, self.means, self.covariances)

    def __call__(self, x, t):
        raise AssertionError("a denoiser with `at` is called through it")


@pytree_dataclass
class AffineGaussian:
    """E[x0 | x] for data N(mean, basis diag(eigenvalues) basis^T): one gain along each eigenvector."""

    mean: Any
    eigenvalues: Any
    basis: Any

    def at(self, x, point):
        alpha, sigma = point["alpha"], point["sigma"]
        gain = alpha * self.eigenvalues / (alpha**2 * self.eigenvalues + sigma**2)
        return self.mean + ((x - alpha * self.mean) @ self.basis * gain) @ self.basis.T

    def __call__(self, x, t):
        raise AssertionError("a denoiser with `at` is called through it")


def affine_gaussian(mean, covariance) -> AffineGaussian:
    return AffineGaussian(np.asarray(mean), *np.linalg.eigh(covariance))


@pytree_dataclass
class AffineBridge:
    """E[x0 | x_t, x1] for x0 | x1 ~ N(mean, basis diag(eigenvalues) basis^T)."""

    source: Any
    mean: Any
    eigenvalues: Any
    basis: Any

    def at(self, x, point):
        a, b, c = (point[n] for n in "abc")
        total = b**2 * self.eigenvalues + c**2
        xp = namespace(x, a)
        gain = xp.where(total > 0, b * self.eigenvalues / xp.where(total > 0, total, 1.0), 0.0)
        return (
            self.mean + ((x - a * self.source - b * self.mean) @ self.basis * gain) @ self.basis.T
        )

    def __call__(self, x, t):
        raise AssertionError("a denoiser with `at` is called through it")


def mixture_bridge(stored):
    """E[x0 | x_t, x1] for x0 | x1 ~ sum_k w_k N(M_k x1 + v_k, S_k): not affine in x_t."""
    means = np.einsum("kij,bj->kbi", stored["M"], stored["xT"]) + stored["v"][:, None, :]

    def denoise(x, point):
        a, b, c = (point[n] for n in "abc")
        if c == 0:  # at the source the posterior of the component is the prior
            return np.einsum("k,kbi->bi", stored["w"], means)
        total = b**2 * stored["S"] + c**2 * np.eye(3)
        centred = x - a * stored["xT"] - b * means
        pulled = np.linalg.solve(total[:, None], centred[..., None])[..., 0]
        logits = np.log(stored["w"])[:, None] - 0.5 * (
            np.linalg.slogdet(total)[1][:, None] + (centred * pulled).sum(-1)
        )
        r = np.exp(logits - logits.max(0))
        each = means + b * np.einsum("kij,kbj->kbi", stored["S"], pulled)
        return np.einsum("kb,kbi->bi", r / r.sum(0), each)

    return denoise


def place_noise(sampler, draws, rows):
    """Draws `[n, B, ...]` laid at the given rows of a table (row -1 is the init row), zeros elsewhere."""
    noise = np.zeros((sampler.nfe + 1, *draws.shape[1:]), draws.dtype)
    for row, draw in zip(rows, draws):
        noise[row + 1] = draw
    return noise


def plain_run(sampler, denoise, x, noise=None, dtype=np.float64, source=None):
    """A table executed by a NumPy loop over dictionaries: what `samplers.linear` says, said again.

    Args:
      denoise: `(x, point) -> x0_hat`, NumPy.
      noise: `[1 + N, B, ...]`, zeros if left out.
      source: of a bridge that starts from `Pinned(source, x)`; x itself if left out.
    Returns:
      The iterates `[N + 1, B, ...]`.
    """
    structure = sampler.step.structure
    x = np.asarray(x, dtype)
    source = x if source is None else np.asarray(source, dtype)
    noise = np.zeros((sampler.nfe + 1, *x.shape), dtype) if noise is None else noise
    values = {"y": x}
    for output, columns in structure.init:
        basis = {"x": x, "src": source, "one": np.ones_like(x), "z": noise[0]}
        values[output] = sum(dtype(sampler.start[output][c]) * basis[c] for c in columns)
    y = values["y"]
    registers = {o: values.get(o, y) for o, _ in structure.rows if o not in ("y", "push")}
    history = [np.zeros_like(x)] * structure.history
    path = [y]
    for i in range(sampler.nfe):
        point = {name: dtype(v[i]) for name, v in sampler.xs["point"].items()}
        basis = {"y": y, **registers, "one": np.ones_like(x), "z": noise[i + 1]}
        basis |= {f"h{k + 1}": entry for k, entry in enumerate(history)}
        basis["D"] = np.asarray(denoise(y, point), dtype)
        if structure.source:
            basis["src"] = source
            basis |= {f"{n}-src": basis[n] - source for n in ("y", "anchor") if n in basis}
        scalars = iter(sampler.xs["scalars"][i])
        arrays = iter([a[i] for a in sampler.xs["arrays"]])
        written = {}
        for output, columns in structure.rows:
            total = np.zeros_like(x)
            for name, kind in columns:
                weight = 1.0 if kind == "1" else next(scalars if kind == "s" else arrays)
                total = total + np.asarray(weight, dtype) * basis[name]
            written[output] = total
        y = written["y"]
        registers = {name: written[name] for name in registers}
        if structure.history:
            history = [written["push"], *history[:-1]]
        path.append(y)
    return np.stack(path)


def affine_law(sampler, denoise, mean, root):
    """Mean and covariance of what a table makes of `N(mean, root root^T)` when `denoise` is affine: exact.

    One run of the mean, one for each direction of the start and one for each unit draw; `denoise` is
    NumPy. For a bridge pass `root = 0`: x_init is the source.
    """
    size = len(mean)
    count = 1 + size + size * (sampler.nfe + 1)
    start = np.tile(mean, (count, 1))
    start[1 : 1 + size] += np.asarray(root).T
    noise = np.zeros((sampler.nfe + 1, count, size))
    for row in range(sampler.nfe + 1):
        first = 1 + size * (row + 1)
        noise[row, first : first + size] = np.eye(size)
    ends = plain_run(sampler, denoise, start, noise)[-1]
    responses = ends[1:] - ends[0]
    return ends[0], responses.T @ responses
