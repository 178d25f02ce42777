"""Vector fields of stochastic interpolants, made of what a network learned (arXiv 2303.08797).

`x_t = a(t) x1 + b(t) x0 + c(t) z` with data x0 at t = 0 and a source x1 at t = 1. The paper's clock runs
the other way, s = 1 - t, so its drift b(s, x) is minus the velocity u here; scores and denoisers do
not know the clock.

  (1) velocity              u(x, t) = E[a' x1 + b' x0 + c' z | x_t = x], the ODE is dx/dt = u
  (2) conditional velocity  v(x, t) = E[a' x1 + b' x0 | x_t = x]
  (3) denoiser              eta(x, t) = E[z | x_t = x]  (minus that of the authors' program)
  (4) score                 s = -eta / c, and u = v + c' eta = v - c c' s
  (5) for any eps(t) >= 0   dx = (u - eps s) dt + sqrt(2 eps) dW backwards in time has the same marginals,
                            dx = (u + eps s) dt + sqrt(2 eps) dW forwards
"""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.numerics import expand, pytree_dataclass, static

_NO_VELOCITY = "an interpolant field needs a velocity or a conditional_velocity; it has {}"
PARTS = ("velocity", "conditional_velocity", "denoiser", "score")


@pytree_dataclass
class InterpolantField:
    """The drift of an interpolant's ODE and SDEs from learned parts.

    Called as `field(x, t)` it is the velocity u. `at(x, point)` is the drift `u - point["epsilon"] s` of
    the SDE that runs from source to data, where the point has an "epsilon" (negative: from data to
    source), and u where it has none.

    Args:
      process: the interpolant, any `BridgeProcess` with `slopes`.
      velocity, conditional_velocity, denoiser, score: functions `(x, t) -> [B, ...]`, those that were
        learned: a velocity or a conditional velocity, and for SDEs a denoiser or a score.
      joint: instead of those, or beside them, one function `(x, t) -> {part: [B, ...]}`: one network
        with several heads is called once.
      one_sided: the source is a standard normal, independent of the data, and c = 0: the score then
        follows from the velocity, `s = -E[x1 | x] / a`.
    Raises:
      ValueError: neither a velocity nor a conditional velocity; at a call, an SDE without a score.
    """

    process: Any
    velocity: Any = None
    denoiser: Any = None
    score: Any = None
    conditional_velocity: Any = None
    joint: Any = None
    one_sided: bool = static(False)

    def __post_init__(self):
        given = [p for p in PARTS if getattr(self, p) is not None]
        # all are None too where JAX takes the pytree apart
        if given and self.joint is None and not {"velocity", "conditional_velocity"} & set(given):
            raise ValueError(_NO_VELOCITY.format(", ".join(given)))

    def __call__(self, x, t):
        """The velocity u, `[B, ...]`."""
        return self.at(x, self.process.point(t))

    def parts(self, x, t) -> dict[str, Any]:
        """What was learned, evaluated at x `[B, ...]`: part name -> `[B, ...]`."""
        found = {} if self.joint is None else dict(self.joint(x, t))
        return found | {p: getattr(self, p)(x, t) for p in PARTS if getattr(self, p) is not None}

    def at(self, x, point):
        """The drift at a `Point`, `[B, ...]`."""
        return self._drift(self.parts(x, point["t"]), x, point, point.get("epsilon"))

    def score_at(self, x, point):
        """The score s, `[B, ...]`."""
        return self._score(self.parts(x, point["t"]), x, point)

    def denoiser_at(self, x, point):
        """eta = E[z | x_t = x], `[B, ...]`."""
        parts = self.parts(x, point["t"])
        if "denoiser" in parts:
            return parts["denoiser"]
        return -expand(point["c"], x) * self._score(parts, x, point)

    def _score(self, parts, x, point):
        if "score" in parts:
            return parts["score"]
        if "denoiser" in parts:
            return -parts["denoiser"] / expand(point["c"], x)
        if not self.one_sided:
            raise ValueError(
                "an SDE (epsilon > 0) needs a score or a denoiser; this field has "
                f"{', '.join(sorted(parts))} alone: use epsilon = 0, the ODE"
            )
        slopes = self.process.slopes(point["t"])
        a, b, da, db = (expand(v, x) for v in (point["a"], point["b"], slopes["a"], slopes["b"]))
        u = parts["velocity"] if "velocity" in parts else parts["conditional_velocity"]
        return -(db * x - b * u) / (a * (a * db - b * da))

    def _drift(self, parts, x, point, epsilon):
        if "velocity" in parts:
            u = parts["velocity"]
            return u if epsilon is None else u - expand(epsilon, x) * self._score(parts, x, point)
        if "conditional_velocity" not in parts:
            raise ValueError(_NO_VELOCITY.format(", ".join(sorted(parts)) or "nothing"))
        v, cc = parts["conditional_velocity"], self.process.slopes(point["t"])["cc"]
        if self.one_sided and "score" not in parts and "denoiser" not in parts:
            return v if epsilon is None else v - expand(epsilon, x) * self._score(parts, x, point)
        weight = cc if epsilon is None else cc + epsilon
        return v - expand(weight, x) * self._score(parts, x, point)


def split_heads(network, targets):
    """`(x, t) -> {target: [B, ...]}` of a network whose last axis holds one head after another.

    A pytree wherever `network` is one.
    """
    return _Heads(network, tuple(targets))


@pytree_dataclass
class _Heads:
    network: Any
    targets: tuple[str, ...] = static()

    def __call__(self, x, t) -> Mapping[str, Any]:
        output, width = self.network(x, t), x.shape[-1]
        if output.shape != (*x.shape[:-1], width * len(self.targets)):
            raise ValueError(
                f"the network returned shape {output.shape} for x of {x.shape}; the heads "
                f"{', '.join(self.targets)} need {width * len(self.targets)} channels"
            )
        return {
            target: output[..., i * width : (i + 1) * width]
            for i, target in enumerate(self.targets)
        }
