"""Bayesian flow networks (Graves et al., arXiv 2308.07037) for continuous, discretised and token data."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import guidance as transforms
from diffusion_jax import objectives
from diffusion_jax.denoisers import Denoiser, evaluate
from diffusion_jax.methods.base import OBJECTIVE, Method, Network, assemble, prior_start
from diffusion_jax.numerics import expand, pytree_dataclass, static
from diffusion_jax.objectives.bayesian_flow import bin_centres, bin_probabilities
from diffusion_jax.processes import ContinuousBFN, DiscreteBFN
from diffusion_jax.registry import register

# Below this s = 1 - t the state says nothing, and what a network makes of it is not used.
_NOTHING = 1e-6


def _known(point, process):
    """Where the state says nothing, and a point that is safe to divide by there."""
    nothing = 1.0 - jnp.asarray(point["t"]) < _NOTHING
    inner = process.point(0.5)
    return nothing, {k: jnp.where(nothing, inner[k], v) for k, v in point.items()}


@pytree_dataclass
class FlowDenoiser:
    """A network as the paper's head on a `ContinuousBFN`: x0_hat, 0 at s < 1e-6, clipped to [-1, 1].

    With the parameterization "eps", `x0_hat = mu / g - sqrt((1 - g) / g) eps_hat`.
    """

    network: Any
    process: Any
    parameterization: str = static("eps")
    clip: bool = static(True)
    sigma_data: float = 0.5

    def __call__(self, x, t):
        return self.at(x, self.process.point(t))

    def at(self, x, point):
        """x0_hat `[B, ...]`."""
        nothing, safe = _known(point, self.process)
        inner = Denoiser(self.network, self.process, self.parameterization, self.sigma_data)
        x0 = jnp.where(expand(nothing, x), 0.0, inner.at(x, safe))
        return jnp.clip(x0, -1.0, 1.0) if self.clip else x0


@pytree_dataclass
class BinnedDenoiser:
    """A network `(x, t) -> [B, ..., 2 C]`, noise and log deviation, as a law over bins of [-1, 1].

    Each dimension has the law N(x / g - u eps_hat, (u exp(log_dev))^2), u = sqrt((1 - g) / g), its mean
    clipped to [-1, 1]; N(0, 1) at s < 1e-6.
    """

    network: Any
    process: Any
    bins: int = static()

    def __call__(self, x, t):
        return self.at(x, self.process.point(t))

    def probabilities(self, x, point):
        """Bin probabilities `[B, ..., C, bins]` for x `[B, ..., C]`."""
        nothing, safe = _known(point, self.process)
        out = self.network(x, safe["t"])
        if out.shape != (*x.shape[:-1], 2 * x.shape[-1]):
            raise ValueError(
                f"a discretised head needs an output of {2 * x.shape[-1]} channels (mean and log "
                f"deviation of the noise) for x of {x.shape}; the network gave {out.shape}"
            )
        eps, log_dev = jnp.split(out.astype(jnp.promote_types(out.dtype, jnp.float32)), 2, axis=-1)
        unit = expand(safe["sigma"] / safe["alpha"], x)
        mean = x / expand(safe["alpha"], x) - unit * eps
        dev = unit * jnp.exp(jnp.clip(log_dev, -10.0, 10.0))
        where = expand(nothing, x)
        mean = jnp.clip(jnp.where(where, 0.0, mean), -1.0, 1.0)
        return bin_probabilities(mean, jnp.where(where, 1.0, dev), self.bins)

    def at(self, x, point):
        """The expected bin centre `[B, ..., C]`."""
        return (self.probabilities(x, point) * bin_centres(self.bins)).sum(axis=-1).astype(x.dtype)


@pytree_dataclass
class ClassLogProbs:
    """A network on class probabilities `[B, L, K]` as log-probabilities, for logits z `[B, L, K]`."""

    network: Any

    def __call__(self, z, t):
        return self.at(z, {"t": t})

    def at(self, z, point):
        """`[B, L, K]`, float32."""
        logits = self.network(jax.nn.softmax(z, axis=-1), point["t"])
        if logits.shape != z.shape:
            raise ValueError(f"the network gave logits {logits.shape} for classes {z.shape}")
        return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


@pytree_dataclass
class ClassProbs:
    """Unnormalised log-probabilities as class probabilities: what samplers of tokens take."""

    inner: Any

    def __call__(self, z, t):
        return self.at(z, {"t": t})

    def at(self, z, point):
        """`[B, L, K]`."""
        return jax.nn.softmax(evaluate(self.inner, z, point)[0], axis=-1).astype(z.dtype)


@register("method", "bayesian_flow", family="bayesian_flow", paper="2308.07037")
def bayesian_flow(
    process,
    module,
    spec,
    *,
    bins: int | None = None,
    parameterization: str = "eps",
    sigma_data: float = 0.5,
    steps: int | None = None,
    draws: int | None = None,
    times: str = "uniform",
    label_dropout: float = 0.1,
    guidance: float = 1.0,
    sampler: str | None = None,
    nfe: int | None = 20,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """Bayesian flow networks: tokens under a `DiscreteBFN`, images under a `ContinuousBFN`.

    The loss is in nats a dimension (a token). Tokens are sampled as the mode of the last probabilities.

    Args:
      process: `DiscreteBFN` for tokens, `ContinuousBFN` for images or points.
      module: tokens: network on class probabilities `(p [B, L, K], t, label=) -> logits [B, L, K]`
        ("token_transformer" takes them); images: network `(x, t, label=) -> output` of the shape of x,
        with `bins` of twice the channels.
      spec: the data's `DataSpec`.
      bins: grey levels of discretised images, whose values are k 2 / (bins - 1) - 1; None:
        continuous. Inside, images are scaled by (bins - 1) / bins, which puts them on bin centres.
      parameterization, sigma_data: of the continuous network, see `denoisers.Denoiser`.
      steps: n of the n-step loss; None trains for any number of steps.
      draws: of the sender in n-step losses (default 20, tokens 10).
      times: times of the loss.
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight in sampling (tokens: on log-probabilities).
      sampler, nfe, sampler_options: the default sampler; None: "bfn_sde2m" for tokens, else
        "bfn_solver_ode2".
    Raises:
      ValueError: data and process that do not fit, and unknown names.

    Deviations: the authors feed 2 p - 1 and 2 t - 1; a network whose first layer is linear learns the
    same functions of p. Two classes have two logits here, one there.
    """
    tokens = spec.kind == "tokens"
    if not isinstance(process, DiscreteBFN if tokens else ContinuousBFN):
        raise ValueError(
            f"a Bayesian flow of {spec.kind} needs a {'DiscreteBFN' if tokens else 'ContinuousBFN'} "
            f"process, got {type(process).__name__}"
        )
    if tokens and process.vocab_size != spec.vocab_size:
        raise ValueError(
            f"the process has vocab_size {process.vocab_size}, the data has {spec.vocab_size}"
        )
    if bins is not None and (tokens or not isinstance(bins, int) or bins < 2):
        raise ValueError(f"bins must be an int of at least 2, for images; got {bins!r}")
    net = Network.of(module, spec, label_dropout)
    parts = _TokenParts if tokens else _ImageParts
    own = parts(process, spec, bins, parameterization, sigma_data, steps, draws, times)

    def init(key, batch):
        return net.init(key, own.example(batch), batch)

    def plain(params, batch, train=False, key=None):
        return net.bind(params, batch, train, key)

    def loss(params, key, batch, context):
        denoise = own.denoiser(plain(params, batch, context.train, key))
        key = jax.random.fold_in(key, OBJECTIVE)
        losses, aux = own.losses(denoise, key, batch, "mean", total=context.batch_size)
        return losses.mean(), {own.metric: aux[own.figure].mean()}

    def bound(params, key, batch):
        walk, last = jax.random.split(key)
        denoise = own.denoiser(plain(params, batch))
        losses, _ = own.losses(denoise, walk, batch, "sum")
        return losses + own.reconstruction(denoise, last, batch)

    def denoiser(params, batch, train=False, key=None, raw=False):
        told = plain(params, batch, train, key)
        if guidance == 1.0:
            return own.denoiser(told, raw)
        untold = plain(params, net.unconditional(batch), train, key)
        return own.guided(told, untold, guidance, raw)

    chosen = sampler or ("bfn_sde2m" if tokens else "bfn_solver_ode2")
    start = prior_start(process, spec)
    made = assemble(process, init, loss, denoiser, start, chosen, nfe, sampler_options)

    def sample(params, key, batch, sampler=None, **options):
        return jax.tree.map(own.shown, made.sample(params, key, batch, sampler, **options))

    exact = tokens or bins is not None  # a density of continuous data has no reconstruction term
    return made._replace(sample=sample, bound=bound if exact else None)


class _ImageParts:
    """What continuous and discretised data decide."""

    metric, figure = "x0_mse", "x0_error"

    def __init__(self, process, spec, bins, parameterization, sigma_data, steps, draws, times):
        self.process, self.kind, self.bins = process, spec.kind, bins
        self.parameterization, self.sigma_data = parameterization, sigma_data
        self.options = {"steps": steps, "draws": draws or 20, "times": times}
        self.scale = 1.0 if bins is None else (bins - 1) / bins

    def example(self, batch):
        return batch[self.kind]

    def denoiser(self, network, raw=False):
        if self.bins is not None:
            return BinnedDenoiser(network, self.process, self.bins)
        return FlowDenoiser(
            network, self.process, self.parameterization, not raw, sigma_data=self.sigma_data
        )

    def guided(self, told, untold, weight, raw=False):
        guided = transforms.guide(self.denoiser(told, raw), self.denoiser(untold, raw), weight)
        return guided if raw else transforms.clip(guided)

    def losses(self, denoise, key, batch, reduce, total=None):
        x0 = self.scale * batch[self.kind]
        given = {**self.options, "reduce": reduce, "index": batch["index"], "total": total}
        return objectives.continuous_flow_loss(self.process, denoise, key, x0, **given)

    def reconstruction(self, denoise, key, batch):
        x0 = self.scale * batch[self.kind]
        return objectives.discretised_reconstruction(self.process, denoise, key, x0, reduce="sum")

    def shown(self, x):
        return x / self.scale


class _TokenParts:
    """What token data decide."""

    metric = figure = "cross_entropy"

    def __init__(self, process, spec, bins, parameterization, sigma_data, steps, draws, times):
        self.process = process
        self.options = {"steps": steps, "draws": draws or 10, "times": times}

    def example(self, batch):
        size = self.process.vocab_size
        return jnp.full((*batch["tokens"].shape, size), 1.0 / size)

    def denoiser(self, network, raw=False):
        return ClassProbs(ClassLogProbs(network))

    def guided(self, told, untold, weight, raw=False):
        both = ClassLogProbs(told), ClassLogProbs(untold)
        return ClassProbs(transforms.guide(*both, weight))

    def losses(self, denoise, key, batch, reduce, total=None):
        given = {**self.options, "reduce": reduce, "index": batch["index"], "total": total}
        return objectives.discrete_flow_loss(self.process, denoise, key, batch["tokens"], **given)

    def reconstruction(self, denoise, key, batch):
        return objectives.discrete_reconstruction(
            self.process, denoise, key, batch["tokens"], reduce="sum"
        )

    def shown(self, x):
        return x.argmax(axis=-1).astype(jnp.int32)
