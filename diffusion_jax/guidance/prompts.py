"""Unsupervised classifier-free guidance of masked models (SMDM, arXiv 2410.18514, section 4).

A masked model knows what it would say without its prompt: mask the prompt too. So guidance needs neither
labels nor conditions dropped in training:
  (1) p(x0 | prompt, x_t)^(1 + w) / p(x0 | masks, x_t)^w, normalised at each position
  (2) logits = unconditional + (1 + w) (conditional - unconditional)
What has been generated so far stands in both; only the prompt is hidden.

(2) also lifts tokens that both predictions call impossible, if the unconditional one says so louder; a
large w then picks them. `plausible` leaves out what the conditional prediction holds for unlikely, the
constraint of contrastive decoding (arXiv 2210.15097, eq. 2); it is not in SMDM, and off by default.

Equivalences: w = 0 is the plain model, bit for bit; w = -1 is the model that never saw the prompt.
Deviations: none from the formula. The network's logits are mixed as they are: those of (2) in
log-probabilities differ from them by a constant a position, and no sampler sees it.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import expand, pytree_dataclass, static


@pytree_dataclass
class guide_prompt:
    """A masked model that listens more to its prompt: `conditional + weight (conditional - unconditional)`.

    Both predictions come from one call of the inner denoiser on twice the sequences, the conditional ones
    first: conditions that it closes over must be given twice. `calls` says what a call costs: the network
    calls of a guided sample are twice the sampler's `nfe`.

    Args:
      denoise: `(tokens, t) -> logits [2 B, L, V]`.
      prompt: bool `[B, L]` or `[L]`, True where a token is given; any positions.
      mask_id: id that hides a token.
      weight: w >= 0, a number or one for each sequence `[B]` (SMDM: 0.6 to 0.8 typically, 1.6 for
        questions of yes and no, 0.1 on sums).
      plausible: leaves out tokens whose conditional probability is below this share of the likeliest
        token's; None: leaves out none.
    Raises:
      ValueError: a prompt that is not boolean or of another shape than the tokens.
    """

    calls: ClassVar[int] = 2

    denoise: Any
    prompt: Any
    mask_id: int = static()
    weight: Any = 0.0
    plausible: float | None = None

    def __call__(self, tokens, t):
        """Logits `[B, L, V]` at the time t, scalar or `[B]`."""
        return self.at(tokens, {"t": t})

    def at(self, tokens, point, cache=None):
        """Logits `[B, L, V]` of the guided model, at least float32.

        With a cache (of twice the sequences) the inner denoiser takes and returns it:
        `(logits, cache)`.
        """
        prompt = jnp.asarray(self.prompt)
        if prompt.dtype != bool or prompt.shape not in (tokens.shape, tokens.shape[1:]):
            raise ValueError(
                f"prompt must be bool {tokens.shape} or {tokens.shape[1:]}, True at given tokens; got "
                f"{prompt.dtype} {prompt.shape}"
            )
        hidden = jnp.where(prompt, jnp.asarray(self.mask_id, tokens.dtype), tokens)
        twice = lambda v: jnp.concatenate([v, v]) if getattr(v, "ndim", 0) else v
        sequences, point = jnp.concatenate([tokens, hidden]), jax.tree.map(twice, point)
        if (
            len(point) == 1 and cache is None
        ):  # only t is known: the rest is the inner one's to derive
            both, cache_after = self.denoise(sequences, point["t"]), None
        else:
            both, cache_after = evaluate(self.denoise, sequences, point, cache)
        both = both.astype(jnp.promote_types(both.dtype, jnp.float32))
        conditional, unconditional = jnp.split(both, 2)
        # tokens that either prediction excludes have no ratio: what the prompt says of them stands
        known = jnp.isfinite(conditional) & jnp.isfinite(unconditional)
        push = jnp.where(known, conditional - unconditional, 0.0)
        logits = conditional + expand(self.weight, push) * push
        if self.plausible is not None:
            least = conditional.max(axis=-1, keepdims=True) + jnp.log(self.plausible)
            logits = jnp.where(conditional >= least, logits, -jnp.inf)
        return logits if cache is None else (logits, cache_after)
