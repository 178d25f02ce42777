"""What the training loop knows of a model family: `Method(init, loss, sample)`, pure functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import placement
from diffusion_jax.denoisers import LogitRows
from diffusion_jax.guidance.transforms import clip as clip_transform
from diffusion_jax.guidance.transforms import guide
from diffusion_jax.numerics import example_keys, is_concrete, pytree_dataclass, static
from diffusion_jax.objectives.token_cross_entropy import chunked, cross_entropy
from diffusion_jax.registry import entry, names
from diffusion_jax.samplers.build import build_sampler, family_of
from diffusion_jax.samplers.scan import sample as run_sampler


@pytree_dataclass
class Context:
    """What a loss may need beside the parameters and the batch.

    Attributes:
      step: int32 scalar, the training step.
      ema: averaged parameters (a pytree like `params`) or None.
      state: the method's own state (a teacher, running statistics) or None; a loss returns the next
        one as the metric "method_state".
      batch_size: size of the global batch, of which `batch` may be one device's shard (static).
      train: whether dropout and the like are on (static).
    """

    step: Any = 0
    ema: Any = None
    state: Any = None
    batch_size: int | None = static(None)
    train: bool = static(True)


class Method(NamedTuple):
    """A model family as pure functions.

    Attributes:
      init: `(key, batch) -> params`.
      loss: `(params, key, batch, context) -> (scalar, metrics)`: the mean over the examples in
        `batch`. Randomness is folded per example with `batch["index"]`, the position in the global
        batch, so every sharding of a batch gives the same loss.
      denoiser: `(params, batch, train=False, key=None, raw=False) -> denoise`: the callable that
        samplers and objectives take, with the conditions of `batch` closed over. Where x0_hat is
        clipped for sampling, `raw=True` leaves that out: for what differentiates through it
        (likelihoods).
      sample: `(params, key, batch, sampler=None, **options) -> samples`, one for each row of `batch`
        (which holds the conditions and `index`), through `default_sampler` unless another is given;
        options are those of `samplers.sample`.
      default_sampler: the sampler used when none is named.
      build_sampler: `(name, nfe=None, **options) -> Sampler` on this method's process.
      process: the forward process.
      bound: `(params, key, batch) -> [B]`: an unbiased estimate of an upper bound on -log p(x) in
        nats, or None where the family has none.
      init_state: `(key, params, batch) -> pytree`, the method's own state before the first step (a
        teacher, a feature extractor), which losses find in `context.state`; None: it has none.
      project: `params -> params`, applied to the first parameters and after every update (weights of
        unit magnitude, say); None: they are left as the optimiser makes them.
    """

    init: Callable[..., Any]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    denoiser: Callable[..., Callable]
    sample: Callable[..., Any]
    default_sampler: Any
    build_sampler: Callable[..., Any]
    process: Any
    bound: Callable[..., jax.Array] | None = None
    init_state: Callable[..., Any] | None = None
    project: Callable[[Any], Any] | None = None


# Streams of a loss's key: what is drawn for the objective, for dropout, for dropped labels.
OBJECTIVE, _DROPOUT, _LABEL = range(3)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network module with its conditions handled the same way in every family.

    Attributes:
      module: a Linen module called as `apply({"params": p}, x, t, label=, source=, train=, rngs=)`.
      num_classes: number of labels; the null label is `num_classes`. None: labels are not used.
      label_dropout: chance in training that a label becomes the null label.
      uses_source: whether `batch["source"]` is an input.
      clock: None, or the process whose total noise sigma_bar(t) the network is told for t, as a module
        with `time_input` "total_noise" wants it.
    """

    module: Any
    num_classes: int | None = None
    label_dropout: float = 0.0
    uses_source: bool = False
    clock: Any = None

    @classmethod
    def of(cls, module, spec, label_dropout=0.0, uses_source=False, process=None):
        """The network on data of a `DataSpec`: labels are used where both of them have classes.

        Raises:
          ValueError: a network of fewer classes than the data; one that is told the total noise, where
            there is none or it is infinite.
        """
        classes = getattr(module, "num_classes", None) if spec.num_classes else None
        if classes and classes < spec.num_classes:
            raise ValueError(
                f"the network has num_classes = {classes}, the data have {spec.num_classes}"
            )
        noise = getattr(module, "time_input", "time") == "total_noise"
        if noise:
            _check_clock(module, process)
        return cls(module, classes, label_dropout, uses_source, process if noise else None)

    def __post_init__(self):
        if not 0.0 <= self.label_dropout < 1.0:
            raise ValueError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        if self.num_classes and self.label_dropout and not self._has_null():
            raise ValueError(
                f"{type(self.module).__name__} has no null class: label_dropout must be 0, got"
                f" {self.label_dropout}"
            )

    def _has_null(self):
        return getattr(self.module, "null_label", True)

    def conditions(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a batch that the network is told.

        Raises:
          ValueError: the batch lacks one.
        """
        wanted = {"label": bool(self.num_classes), "source": self.uses_source}
        for name, wants in wanted.items():
            if wants and name not in batch:
                raise ValueError(
                    f"the model is conditioned on {name!r}; the batch has {sorted(batch)}"
                )
        return {name: batch[name] for name, wants in wanted.items() if wants}

    def init(self, key, x, batch):
        """Parameters for inputs like x `[B, ...]` and the conditions of `batch`."""
        t = jnp.full(x.shape[:1], 0.5, jnp.float32)
        return self.module.init(key, x, t, **self.conditions(batch))["params"]

    def bind(self, params, batch, train=False, key=None):
        """`(x, t) -> output`, a pytree that carries parameters and conditions as leaves."""
        conditions, module = self.conditions(batch), _StaticModule(self.module)
        if not train:
            return self._bound(
                jax.tree_util.Partial(_apply, module, params, conditions, self.clock)
            )
        if self.num_classes and self.label_dropout:
            keys = example_keys(jax.random.fold_in(key, _LABEL), batch["index"])
            dropped = jax.vmap(jax.random.uniform)(keys) < self.label_dropout
            conditions["label"] = jnp.where(dropped, self.num_classes, conditions["label"])
        # under pmap each device must drop other units: its first example tells devices apart
        dropout = jax.random.fold_in(jax.random.fold_in(key, _DROPOUT), batch["index"][0])
        carried = (module, params, conditions, self.clock, dropout)
        return self._bound(jax.tree_util.Partial(_apply_train, *carried))

    def _bound(self, plain):
        return TokenNetwork(plain) if hasattr(self.module, "logits") else plain

    def unconditional(self, batch):
        """The batch with every label replaced by the null label."""
        if not self.num_classes or not self._has_null():
            raise ValueError("guidance needs a class-conditional model with a null class")
        return {**batch, "label": jnp.full_like(jnp.asarray(batch["label"]), self.num_classes)}


@jax.tree_util.register_static
class _StaticModule:
    """A Linen module as pytree structure."""

    def __init__(self, module):
        self.module = module

    def __hash__(self):
        return hash(self.module)

    def __eq__(self, other):
        return isinstance(other, _StaticModule) and self.module == other.module


def _apply(module, params, conditions, clock, x, t, **more):
    t = t if clock is None else clock.sigma_bar(t)
    variables = {"params": placement.parameters(params)}
    return module.module.apply(variables, x, t, **{**conditions, **more})


def _apply_train(module, params, conditions, clock, dropout, x, t, **more):
    more |= {"train": True, "rngs": {"dropout": dropout}}
    return _apply(module, params, conditions, clock, x, t, **more)


def _check_clock(module, process):
    """Raises ValueError unless the process has a finite total noise at every time."""
    name = type(module).__name__
    if not hasattr(process, "sigma_bar"):
        raise ValueError(
            f"{name} is told the total noise, which this method has not; take time_conditioned=False"
        )
    with np.errstate(divide="ignore"):
        most = process.sigma_bar(1.0)
    if is_concrete(most) and not np.isfinite(most):
        raise ValueError(
            f"{name} is told the total noise -log alpha, infinite at t = 1: give the schedule an eps_end "
            "(MDLM: 1e-3), or the network time_conditioned=False"
        )


@pytree_dataclass
class TokenNetwork:
    """A bound network whose module has its last layer apart (`module.logits(params, hidden)`).

    Beside `(x, t) -> logits` it gives what is made of its logits position by position, in pieces where
    they are many (`objectives.token_cross_entropy.chunked`).
    """

    plain: Any

    def __call__(self, x, t, **more):
        return self.plain(x, t, **more)

    def reduced(self, x, t, reduce, *arrays, **more):
        """`reduce(logits, *arrays)`, `[B, L, ...]`."""
        module, params = self.plain.args[:2]

        def pieces(params, hidden, *arrays):
            head = lambda part: module.module.logits(params, part)
            return chunked(head, reduce, hidden, *arrays)

        hidden = self.plain(x, t, hidden=True, **more)
        return placement.per_shard(pieces, placement.gathered(params), hidden, *arrays)

    def cross_entropy(self, x, t, targets, **more):
        """`-log p(targets_i | x)`, float32 `[B, L]`."""
        return self.reduced(x, t, cross_entropy, targets, **more)

    def logit_rows(self, x, t, **more):
        """The logits as `denoisers.LogitRows`: a sampler that reads a few has no others made."""
        module, params = self.plain.args[:2]
        head = lambda hidden: module.module.logits(params, hidden)
        return LogitRows(self.plain(x, t, hidden=True, **more), head)


def sampling_denoiser(
    plain,
    *,
    clip: bool,
    net: Network | None = None,
    guidance: float = 1.0,
    guided_channels: int | None = None,
):
    """`Method.denoiser` of a family whose network gives x0_hat.

    Args:
      plain: `(params, batch, train, key) -> denoise`, the network as a denoiser.
      clip: clip x0_hat to [-1, 1] unless `raw=True`.
      net: knows the null label; needed for guidance.
      guidance: weight of classifier-free guidance; 1 is the plain model.
      guided_channels: of `guidance.guide`.
    """

    def denoiser(params, batch, train=False, key=None, raw=False):
        denoise = plain(params, batch, train, key)
        if guidance != 1.0:
            unconditional = plain(params, net.unconditional(batch), train, key)
            denoise = guide(denoise, unconditional, guidance, guided_channels)
        return clip_transform(denoise) if clip and not raw else denoise

    return denoiser


def prior_start(process, spec):
    """`start` of `assemble` for what begins with noise: a draw of `process.prior` for each row."""

    def start(key, batch):
        index = batch["index"]
        return process.prior(key, (index.shape[0], *spec.shape), index=index)

    return start


def assemble(
    process,
    init,
    loss,
    denoiser,
    start,
    sampler,
    nfe,
    sampler_options,
    output="x0",
    every_sampler=None,
) -> Method:
    """A `Method` from its parts.

    Args:
      start: `(key, batch) -> x` that sampling begins with.
      sampler, nfe, sampler_options: the default sampler (options, of that sampler alone, may be None).
      every_sampler: options of whatever sampler is asked for (what the data decide).
      output: what the denoiser returns, "x0" or "drift": samplers are told apart by what they declare.
    """
    sampler_options = dict(sampler_options or {})

    def make(name=sampler, nfe=None, **options):
        _check_output(process, name, output)
        own = sampler_options if name == sampler else {}
        return build_sampler(process, name, nfe, **{**(every_sampler or {}), **own, **options})

    default = make(sampler, nfe)

    def draw(params, key, batch, sampler=None, **options):
        start_key, walk_key = jax.random.split(key)
        denoise = denoiser(params, batch)
        return run_sampler(
            default if sampler is None else sampler,
            denoise,
            walk_key,
            start(start_key, batch),
            index=batch["index"],
            **options,
        )

    return Method(init, loss, denoiser, draw, default, make, process)


def _check_output(process, name, output):
    """Raises ValueError for a registered sampler that takes a model of another output."""
    family = family_of(process)
    if name not in names("sampler", family=family):
        return  # a saved table; other names are answered by `build_sampler`
    meta = entry("sampler", name).meta
    if meta.get("output", "x0") != output:
        fitting = names("sampler", family=family, output=None if output == "x0" else output)
        raise ValueError(
            f"sampler {name!r} needs a model that returns {meta.get('output', 'x0')}, this one returns "
            f"{output}; valid: {', '.join(fitting)}"
        )
