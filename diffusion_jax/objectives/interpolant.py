"""Losses of stochastic interpolants (Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797).

`x_t = a x1 + b x0 + c z` with data x0 at t = 0 and the source x1 at t = 1, any coupling of the two. The
paper's clock is s = 1 - t: its drift is minus our velocity, so that its loss of a network f is ours of
-f; its z, gamma = c and score are ours. With I' = a' x1 + b' x0 (primes are d/dt), each loss is

  `E |f(x_t, t)|^2 / 2 - target . f(x_t, t)`,

whose minimum is the conditional expectation of the target:

  (1) velocity              I' + c' z       L_b
  (2) conditional velocity  I'              L_v
  (3) denoiser              z               L_eta, f = E[z | x_t] (the authors' program learns its negative)
  (4) score                 -z / c          L_s

c' and 1 / c may be infinite at both ends. With antithetic pairs x+-, made with +-z, their terms are
`c' z . (f(x+) - f(x-)) / 2`, bounded for a smooth f because x+ - x- = 2 c z.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from diffusion_jax.fields import PARTS
from diffusion_jax.numerics import expand, normal_per_example
from diffusion_jax.objectives.per_example import global_index, times_and_keys
from diffusion_jax.registry import check_choice


def check_targets(process, targets: Sequence[str]) -> tuple[str, ...]:
    """The targets as a tuple.

    Raises:
      ValueError: an unknown or repeated name, none at all, or a denoiser or score of an interpolant
        without latent noise (c = 0).
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    if not targets or len(set(targets)) != len(targets):
        raise ValueError(f"targets must name one part or more, each once; got {targets}")
    for target in targets:
        check_choice("target", target, PARTS)
        c = process.c(0.5)
        if target in ("denoiser", "score") and isinstance(c, np.ndarray | np.generic) and c == 0:
            raise ValueError(
                f"target {target!r} needs latent noise: c = 0 for {process}; its score follows from the "
                "velocity where the source is normal"
            )
    return targets


def interpolant_losses(
    process,
    predict: Callable,
    key,
    x0,
    x1,
    *,
    targets: Sequence[str] = ("velocity", "denoiser"),
    antithetic: bool = True,
    times: str | Callable = "uniform",
    reduce: str = "mean",
    index=None,
    total: int | None = None,
    noise=None,
):
    """The paper's losses of one network or several, one value an example.

    Args:
      process: an interpolant, any `BridgeProcess` with `slopes`.
      predict: `(x_t, t [B]) -> {target: [B, ...]}`; with one target the array itself will do.
      key: split into times and noise; example i's noise is folded with `index[i]`.
      x0, x1: data and source `[B, ...]`, float, in any coupling.
      targets: what is learned, of `fields.PARTS`.
      antithetic: average the loss over +z and -z: two evaluations an example, and a variance that stays
        bounded at both ends.
      times: a registered name or a time sampler (see `objectives.times`).
      reduce: over data dimensions, "mean" or "sum" (the paper's).
      index, total: positions in, and size of, the global batch (default: this batch is all of it).
      noise: z `[B, ...]` in place of the drawn one.
    Returns:
      `(losses, aux)`: losses {target: [B]}, which are negative where the network has learned something
      (the minimum is minus half the mean square of the exact part); aux holds `t` [B].
    Raises:
      ValueError: shapes that do not fit, unknown names, or targets that the process has not.
    """
    targets = check_targets(process, targets)
    if x0.shape != x1.shape:
        raise ValueError(f"data and source differ in shape: {x0.shape} and {x1.shape}")
    check_choice("reduce", reduce, ("mean", "sum"))
    index, total = global_index(x0, index, total)
    t, _, keys = times_and_keys(process, key, index, total, times)
    z = normal_per_example(keys, x0) if noise is None else noise
    c, slopes = process.c(t), process.slopes(t)
    mean_slope = expand(slopes["a"], x0) * x1 + expand(slopes["b"], x0) * x0
    safe = jnp.where(c > 0, c, 1.0)  # at c = 0 both examples of a pair are the same
    # target = even + odd z
    even = {"velocity": mean_slope, "conditional_velocity": mean_slope}
    odd = {"velocity": slopes["cc"] / safe, "denoiser": jnp.ones_like(c), "score": -1.0 / safe}

    def dot(u, v):
        wide = jnp.promote_types(u.dtype, jnp.float32)
        product = (u.astype(wide) * v.astype(wide)).reshape(x0.shape[0], -1)
        return product.mean(axis=1) if reduce == "mean" else product.sum(axis=1)

    def outputs(sign):
        found = predict(process.corrupt(x0, x1, sign * z, t), t)
        found = found if isinstance(found, dict) else {targets[0]: found}
        for target in targets:
            if target not in found:
                raise ValueError(f"the network gives {sorted(found)} but not {target!r}")
            if found[target].shape != x0.shape:
                raise ValueError(
                    f"the network's {target} has shape {found[target].shape} for data of {x0.shape}"
                )
        return found

    signs = (1.0, -1.0) if antithetic else (1.0,)
    evaluated = [outputs(sign) for sign in signs]
    losses = {}
    for target in targets:
        found = [f[target] for f in evaluated]
        loss = sum(0.5 * dot(f, f) for f in found)
        if target in even:
            loss = loss - sum(dot(even[target], f) for f in found)
        if target in odd:
            loss = loss - odd[target] * dot(z, found[0] - found[1] if antithetic else found[0])
        losses[target] = loss / len(signs)
    return losses, {"t": t}
