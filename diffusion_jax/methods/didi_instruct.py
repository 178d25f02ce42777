"""DiDi-Instruct: a masked model distilled into a student of few steps (arXiv 2509.25035).

Begin from the trained model: `config.train.init_from`. It is the student's start, the frozen teacher and
the backbone of the discriminator. For each example of a batch, at one time tau of its own,
  - the student makes a group of samples in two steps, 1 -> tau -> 0, the intermediate state x_tau included;
  - data and samples are masked at rate tau; a discriminator learns to tell them apart at the masked positions;
  - its log-odds, averaged over masked positions, are the reward; normalised within the group it multiplies
    log p(x_tau | mask) + log p(x_0 | x_tau) (a policy gradient for the integral KL divergence, see
    `objectives.divergence_instruct`);
  - divergence to the teacher at both steps, and an entropy bonus, regularise.
Teacher, discriminator and the discriminator's optimiser are the method's state.

The data stand for the teacher's samples: name a data set of such samples to distil the teacher's own law.

Copies of the parameters: student and averages as always, the teacher, the discriminator with two moments. A
step costs two student calls with gradient, two of the teacher, one of the discriminator on data and one on
samples with gradient, each but one on G examples for one of the batch.

Deviations from the paper and its code (whose training step is not public):
- groups share their tau, their mask, their labels and one example of the data, so that no statistics cross examples and
  any sharding gives the same loss;
- the reward is the discriminator's before its own update in the same step, for the same reason;
- `log p` is divided by the length, as every loss here is in nats a token; the optimiser's clipping decides
  the scale anyway;
- real labels are smoothed from both ends: 1 - smoothing and smoothing;
- the mask has no logit, so that it takes no mass from the tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.methods.base import OBJECTIVE, Method, Network
from diffusion_jax.methods.masked import masked as masked_method
from diffusion_jax.numerics import example_keys, expand, fold_all
from diffusion_jax.objectives import divergence_instruct as pieces
from diffusion_jax.objectives.per_example import global_index
from diffusion_jax.objectives.times import stratified
from diffusion_jax.registry import register
from diffusion_jax.samplers.categorical import build_draw, draw_tokens

_MASK, _TAU = 0, 1  # streams of an example's key; those of its group's members follow
_FIRST_MEMBER = 2
_POWER_STEPS = 6


@dataclasses.dataclass(frozen=True)
class Critic:
    """The discriminator: a backbone of the student's architecture and a head of two layers.

    The head reads the backbone's last hidden states, or the logits of a network that does not give them. Its
    matrices are divided by their largest singular values (spectral normalisation, arXiv 1802.05957).

    Attributes:
      net: the backbone as a `Network`.
      blocks: how many of the backbone's last blocks are trained; None trains all of it.
    """

    net: Network
    blocks: int | None = None

    def _hidden(self, params, batch, x, t):
        more = {"hidden": True} if hasattr(self.net.module, "logits") else {}
        return self.net.bind(params, batch)(x, t, **more)

    def init(self, key, params, batch):
        """Parameters: the backbone `params` (the teacher's), a fresh head."""
        x = batch["tokens"]
        t = jnp.full(x.shape[:1], 0.5, jnp.float32)
        width = jax.eval_shape(lambda p: self._hidden(p, batch, x, t), params).shape[-1]
        inner = jax.random.normal(key, (width, width)) / np.sqrt(width)
        outer = jnp.full((width,), 1.0 / np.sqrt(width)) * (-1.0) ** jnp.arange(width)
        head = {"inner": inner, "bias": jnp.zeros(width), "outer": outer, "offset": jnp.zeros(())}
        return {"backbone": jax.tree.map(jnp.asarray, params), "head": head}

    def log_odds(self, critic, batch):
        """`(x, t) -> [B, L]`, the log-odds that each token of data masked like x was real; a pytree.

        x is int `[B, L]`, or weights of the V + 1 tokens `[B, L, V + 1]`.
        """
        return jax.tree_util.Partial(_log_odds, _StaticCritic(self), critic, dict(batch))

    def trained(self, slopes):
        """The gradient with that of frozen blocks set to zero."""
        if self.blocks is None:
            return slopes
        backbone = slopes["backbone"]
        depth = jax.tree.leaves(backbone["blocks"])[0].shape[0]
        kept = jnp.arange(depth) >= depth - self.blocks
        moving = jax.tree.map(lambda v: jnp.where(expand(kept, v), v, 0.0), backbone["blocks"])
        still = {k: jax.tree.map(jnp.zeros_like, v) for k, v in backbone.items() if k != "blocks"}
        return {"backbone": still | {"blocks": moving}, "head": slopes["head"]}


@jax.tree_util.register_static
class _StaticCritic:
    """A `Critic` as pytree structure."""

    def __init__(self, critic):
        self.critic = critic

    def __hash__(self):
        return hash((self.critic.net.module, self.critic.blocks))

    def __eq__(self, other):
        return isinstance(other, _StaticCritic) and self.critic == other.critic


def _log_odds(static, params, batch, x, t):
    h = static.critic._hidden(params["backbone"], batch, x, t).astype(jnp.float32)
    head = params["head"]
    h = jax.nn.silu(h @ _normalised(head["inner"]) + head["bias"])
    return h @ _normalised(head["outer"][:, None])[:, 0] + head["offset"]


def _normalised(w):
    """`w [m, n]` over its largest singular value, by power iteration from a fixed start."""
    v = jnp.ones(w.shape[1]) / np.sqrt(w.shape[1])
    for _ in range(_POWER_STEPS):
        u = w @ v
        u = u / (jnp.linalg.norm(u) + 1e-12)
        v = u @ w
        v = v / (jnp.linalg.norm(v) + 1e-12)
    u, v = jax.lax.stop_gradient((w @ v, v))
    u = u / (jnp.linalg.norm(u) + 1e-12)
    return w / (u @ w @ v + 1e-12)


def _check(group, tau_range, coefficients, learning_rate, blocks):
    if not isinstance(group, int) or group < 2:
        raise ValueError(f"group must be an int of at least 2, got {group!r}")
    low, high = tau_range
    if not 0.0 < low < high < 1.0:
        raise ValueError(f"tau_range must lie inside (0, 1) and increase, got {tuple(tau_range)}")
    for name, value in coefficients.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if not 0.0 <= coefficients["smoothing"] < 0.5:
        raise ValueError(f"smoothing must lie in [0, 0.5), got {coefficients['smoothing']}")
    if learning_rate <= 0:
        raise ValueError(f"critic_learning_rate must be positive, got {learning_rate}")
    if blocks is not None and (not isinstance(blocks, int) or blocks < 0):
        raise ValueError(f"critic_blocks must be None or an int of at least 0, got {blocks!r}")


def two_steps(process, denoise, keys, tau, length, draw):
    """Samples of the student by way of an intermediate state.

    Args:
      denoise: `(tokens [N, L], t [N]) -> logits [N, L, V]`.
      keys: `[N]`.
      tau: `[N]`, the time of the intermediate state.
      draw: a `samplers.categorical.Draw`.
    Returns:
      `(x_tau, x_0, logits at the start, logits at x_tau, masks)`, tokens int `[N, L]`; no gradient passes
      through the tokens.
    """
    begin = jnp.full((tau.shape[0], length), process.mask_id, jnp.int32)
    first = denoise(begin, jnp.ones_like(tau))

    def tokens_of(logits, stream):
        uniforms = draw.uniforms(fold_all(keys, stream), (length,))
        return draw_tokens(uniforms, jax.lax.stop_gradient(logits), draw)

    uniforms = draw.uniforms(fold_all(keys, 0), (length,))
    revealed = uniforms < process.reveal_probability(jnp.ones_like(tau), tau)[:, None]
    middle = jnp.where(revealed, tokens_of(first, 1), begin)
    second = denoise(middle, tau)
    end = jnp.where(middle == process.mask_id, tokens_of(second, 2), middle)
    return middle, end, first, second, begin


@register("method", "didi_instruct", family="discrete", paper="2509.25035")
def didi_instruct(
    process,
    module,
    spec,
    *,
    group: int = 4,
    tau_shape: tuple[float, float] = (1.0, 1.0),
    tau_range: tuple[float, float] = (0.02, 0.98),
    weight_range: tuple[float, float] = (0.1, 10.0),
    over_density: bool = False,
    reward_clip: float = 8.0,
    advantage_clip: float = 3.0,
    smoothing: float = 0.1,
    policy: float = 1.0,
    divergence: tuple[float, float] = (0.01, 0.01),
    entropy: float = 0.02,
    critic_learning_rate: float = 1e-5,
    critic_clip: float = 1.0,
    critic_blocks: int | None = 4,
    label_dropout: float = 0.0,
    guidance: float = 1.0,
    sampler: str = "masked_ancestral",
    nfe: int | None = 8,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """Distillation of a masked model into few steps (arXiv 2509.25035).

    Args:
      process, module, spec, label_dropout, guidance, sampler, nfe, sampler_options: as for `masked`, the
        first two as the teacher was trained.
      group: G, samples of the student an example.
      tau_shape: parameters of the Beta law of tau; (1, 1) is drawn with low discrepancy.
      tau_range: what tau is clipped to.
      weight_range: what omega(tau) = -alpha' / (1 - alpha) is clipped to.
      over_density: divide omega by the Beta density of tau (clipped likewise).
      reward_clip, advantage_clip: bounds on rewards, and on them normalised within their group.
      smoothing: of the discriminator's labels.
      policy: coefficient of the policy gradient.
      divergence: coefficients of KL(student || teacher), at the first step and at the second.
      entropy: coefficient of the entropy bonus.
      critic_learning_rate, critic_clip: of the discriminator's Adam.
      critic_blocks: how many of its last blocks are trained, beside the head; None: the whole backbone.
    Raises:
      ValueError: as `masked`; a number out of range, blocks to freeze in a network that has none.
      ValueError (from the loss): no method state, see `init_state`.
    """
    import optax

    coefficients = {"policy": policy, "entropy": entropy, "smoothing": smoothing}
    coefficients |= {"divergence": min(divergence), "reward_clip": reward_clip}
    _check(group, tau_range, coefficients, critic_learning_rate, critic_blocks)
    base = masked_method(
        process,
        module,
        spec,
        label_dropout=label_dropout,
        guidance=guidance,
        sampler=sampler,
        nfe=nfe,
        sampler_options=sampler_options,
    )
    length, mask = spec.shape[0], process.mask_id
    net = Network.of(module, spec, label_dropout, process=process)
    critic = critic_of(module, spec, critic_blocks, process)
    optimizer = optax.chain(
        optax.clip_by_global_norm(critic_clip), optax.adam(critic_learning_rate)
    )
    draw = build_draw()
    a, b = tau_shape

    def init_state(key, params, batch):
        made = critic.init(key, params, batch)
        if critic_blocks is not None and "blocks" not in made["backbone"]:
            raise ValueError(f"critic_blocks={critic_blocks}: the network has no stack of blocks")
        teacher = jax.tree.map(jnp.asarray, params)
        return {"teacher": teacher, "critic": made, "optimizer": optimizer.init(made)}

    def times(key, keys, index, total):
        if (a, b) == (1.0, 1.0):
            tau = stratified(key, index, total)
        else:
            tau = jax.vmap(lambda k: jax.random.beta(k, a, b))(fold_all(keys, _TAU))
        tau = jnp.clip(tau, *tau_range)
        omega = jnp.clip(process.weight(tau), *weight_range)
        if over_density:
            omega = omega / jnp.clip(jax.scipy.stats.beta.pdf(tau, a, b), *weight_range)
        return tau, omega

    def loss(params, key, batch, context):
        if context.state is None:
            raise ValueError("DiDi-Instruct needs its teacher and discriminator: see init_state")
        state = jax.lax.stop_gradient(context.state)
        time_key, keys = jax.random.split(jax.random.fold_in(key, OBJECTIVE))
        index, total = global_index(batch["tokens"], batch["index"], context.batch_size)
        keys = example_keys(keys, index)
        tau, omega = times(time_key, keys, index, total)
        many = {k: jnp.repeat(jnp.asarray(v), group, axis=0) for k, v in batch.items()}
        member = jnp.arange(_FIRST_MEMBER, _FIRST_MEMBER + group)
        own = jax.vmap(lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(member))(keys)
        own = own.reshape(-1)
        taus = jnp.repeat(tau, group)

        student = net.bind(params, many, context.train, key)
        middle, end, first, second, begin = two_steps(process, student, own, taus, length, draw)
        # one mask for the group and its example: what differs between rewards is the tokens
        real = process.corrupt(fold_all(keys, _MASK), batch["tokens"], tau)
        fake = jnp.where(jnp.repeat(real == mask, group, axis=0), mask, end)

        def told_apart(weights):
            odds_real = critic.log_odds(weights, batch)(real, tau)
            odds_fake = critic.log_odds(weights, many)(fake, taus)
            sides = (
                pieces.critic_loss(odds_real, real == mask, True, smoothing).mean(),
                pieces.critic_loss(odds_fake, fake == mask, False, smoothing).mean(),
            )
            return 0.5 * sum(sides), odds_fake

        (critic_value, odds), slopes = jax.value_and_grad(told_apart, has_aux=True)(state["critic"])
        updates, opt_state = optimizer.update(critic.trained(slopes), state["optimizer"])
        made = optax.apply_updates(state["critic"], updates)

        reward = pieces.critic_reward(odds, fake == mask, reward_clip).reshape(-1, group)
        advantage = pieces.group_advantages(reward, clip=advantage_clip)
        log_prob = pieces.log_prob_of_reveals(first, begin, middle, mask)
        log_prob = log_prob + pieces.log_prob_of_reveals(second, middle, end, mask)
        surrogate = pieces.policy_loss(
            log_prob.reshape(-1, group) / length, advantage, omega[:, None]
        )
        teacher = net.bind(state["teacher"], many)
        masked_at = (jnp.ones(begin.shape, bool), middle == mask)
        apart = [
            pieces.token_divergence(ours, theirs, where)
            for ours, theirs, where in zip(
                (first, second),
                (teacher(begin, jnp.ones_like(taus)), teacher(middle, taus)),
                masked_at,
            )
        ]
        spread = 0.5 * sum(
            pieces.token_entropy(v, where) for v, where in zip((first, second), masked_at)
        )
        losses = policy * surrogate.mean(axis=1)
        regular = sum(c * v for c, v in zip(divergence, apart)) - entropy * spread
        losses = losses + regular.reshape(-1, group).mean(axis=1)
        metrics = {
            "reward": reward.mean(),
            "reward_spread": reward.std(axis=1).mean(),
            "divergence": (apart[0] + apart[1]).mean() / 2,
            "entropy": spread.mean(),
            "critic": critic_value,
        }
        state = {"teacher": state["teacher"], "critic": made, "optimizer": opt_state}
        return losses.mean(), metrics | {"method_state": state}

    return base._replace(loss=loss, init_state=init_state)


def critic_of(module, spec, blocks: int | None = None, process=None) -> Critic:
    """The discriminator of a run, for reward-guided sampling: `log_odds` of the state's "critic".

    A module that is told the total noise needs the process.
    """
    return Critic(Network.of(module, spec, process=process), blocks)
