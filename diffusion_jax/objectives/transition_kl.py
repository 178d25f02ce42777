"""Bounds of discrete-time chains on tokens: D3PM, VQ-Diffusion, and CDCD's contrastive term.

  (1) L_k = KL(q(x_{k-1} | x_k, x0) || p(x_{k-1} | x_k)), k = 2..T; L_1 = -log p(x0 | x_1);
      -log p(x0) <= sum of L_k + KL(q(x_T | x0) || prior)              [D3PM, arXiv 2107.03006, eq. 1]
  (2) hybrid loss L_k + lambda CE(x0, p(x0 | x_k)), k uniform           [eq. 5]
  (3) CDCD (arXiv 2206.07771): minus lambda_c (1 + (k - 1) / T) times the mean over negatives x' of
      L_k with x' in the place of x0 (step-wise), or of -log p(x0 = x' | x_k) (sample-wise)
D3PM's p(x_{k-1} | x_k) is the plug-in, whose network is a leave-one-out posterior; VQ-Diffusion's is the true
mixture, whose network is the posterior: `parameterization` says which, see `processes.scores`.

Deviations: L_1 of a leave-one-out network is by default the cross-entropy of its output, as D3PM has it;
VQ-Diffusion draws k by a running mean of squared losses, here k is uniform and stratified.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import example_keys, expand, fold_all, namespace
from diffusion_jax.objectives.per_example import global_index
from diffusion_jax.objectives.times import build_times
from diffusion_jax.processes import scores
from diffusion_jax.processes.token_kernels import log_or_low, one_hot
from diffusion_jax.registry import check_choice

NEGATIVES = ("step", "sample")
FIRST_STEPS = ("network", "chain")
AUXILIARY = ("constant", "falling")
CONTRAST = ("rising", "constant")


def cross_entropy(logits, tokens):
    """-log softmax(logits) at the tokens: `[..., V]`, int `[...]` -> `[...]`."""
    xp = namespace(logits, tokens)
    log_probs = scores.log_softmax(logits)
    return -xp.take_along_axis(log_probs, tokens[..., None].astype(int), axis=-1)[..., 0]


def transition_kl(process, logits, tokens, xt, t, s, *, parameterization="leave_one_out"):
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)) of each token.

    Args:
      process: a discrete process with a reverse step t -> s (`CTMC`: host times only).
      logits: `[..., V]`, or of all states `[..., S]` for a leave-one-out network that may put mass on
        the mask.
      tokens, xt: int `[...]`, x0 (or a negative in its place) and x_t.
      t, s: s < t, scalars or one an example; of a finite chain neighbours, or host numbers.
      parameterization: "leave_one_out" or "posterior".
    Returns:
      `[...]`, NumPy or JAX as the arguments are.
    """
    xp = namespace(logits, tokens)
    row = process.reverse_row(t, s)
    log_probs = scores.leave_one_out(process, logits, xt, t, parameterization)
    model = process.kernel.reverse(row, xp.exp(log_probs), xt)
    clean = one_hot(tokens, process.vocab_size, log_probs.dtype)
    true = process.kernel.reverse(row, clean, xt)
    return (true * (log_or_low(true) - log_or_low(model))).sum(axis=-1)


def chain_losses(
    process, logits, tokens, xt, t, s, *, parameterization="leave_one_out", first_step="network"
):
    """L_k (1) of each token, `[...]`: `transition_kl`, and into s = 0 the cross-entropy of x0.

    Args:
      first_step: where s is 0, "network": -log softmax(logits) of x0; "chain": that of the chain's last
        step. A posterior network's are the same.
    Raises:
      ValueError: another first_step or parameterization.
    """
    check_choice("first_step", first_step, FIRST_STEPS)
    losses = transition_kl(process, logits, tokens, xt, t, s, parameterization=parameterization)
    if first_step == "chain" or parameterization == "posterior":
        return losses
    xp = namespace(logits, tokens)
    last = expand(xp.asarray(s) < 1e-9, losses)
    return xp.where(last, cross_entropy(logits, tokens), losses)


def contrastive_losses(
    process, logits, negatives, xt, t, s, *, wise="step", parameterization="posterior"
):
    """The mean over negatives in (3), of each token, without its weight.

    Args:
      negatives: int `[N, ...]`, each in the place of x0.
      wise: "step" or "sample".
      process, logits, xt, t, s, parameterization: as `transition_kl`.
    Returns:
      `[...]`.
    Raises:
      ValueError: another `wise`.
    """
    check_choice("wise", wise, NEGATIVES)

    def one(negative):
        if wise == "sample":
            return cross_entropy(logits, negative)
        return chain_losses(process, logits, negative, xt, t, s, parameterization=parameterization)

    if namespace(logits, negatives) is np:
        return np.mean([one(negative) for negative in negatives], axis=0)
    return jax.lax.map(one, negatives).mean(axis=0)


def shuffled_chunks(keys, tokens, num: int, chunks: int = 8):
    """Intra negatives: each example's own tokens cut into equal chunks and put together in random order.

    Args:
      keys: one key an example, `[B]`.
      tokens: int `[B, L]`, 2 <= chunks <= L; what is left over at the end stays there.
      num: negatives N.
    Returns:
      int `[N, B, L]`.
    Raises:
      ValueError: more chunks than tokens, or fewer than 2.
    """
    length = tokens.shape[1]
    if not 2 <= chunks <= length:
        raise ValueError(f"chunks must lie in 2..{length}, the length; got {chunks}")
    size = length // chunks

    def shuffle(key, row):
        order = jax.random.permutation(key, chunks)
        mixed = row[: size * chunks].reshape(chunks, size)[order].reshape(-1)
        return jnp.concatenate([mixed, row[size * chunks :]])

    return jnp.stack([jax.vmap(shuffle)(fold_all(keys, n), tokens) for n in range(num)])


def other_examples(tokens, num: int):
    """Inter negatives: the batch rolled by 1..N, `[B, L]` -> `[N, B, L]`.

    The examples of this very array are taken: on several devices, those of the same shard.

    Raises:
      ValueError: as many negatives as examples, or more.
    """
    if not num < tokens.shape[0]:
        raise ValueError(f"{tokens.shape[0]} examples have no {num} others")
    return jnp.stack([jnp.roll(tokens, n, axis=0) for n in range(1, num + 1)])


def hybrid_loss(
    process,
    denoise: Callable,
    key,
    tokens,
    *,
    num_steps: int | None = None,
    auxiliary: float = 0.001,
    auxiliary_weight: str = "constant",
    parameterization: str = "leave_one_out",
    first_step: str = "network",
    contrast: float = 0.0,
    contrast_weight: str = "rising",
    negatives: str | Callable = "intra",
    num_negatives: int = 10,
    wise: str = "step",
    chunks: int = 8,
    times: str | Callable = "uniform",
    index=None,
    total: int | None = None,
):
    """One-sample estimate of the hybrid loss (2), and of CDCD's (3), nats a sequence.

    Args:
      process: `D3PM` or `MaskReplace`; or `Absorbing` or `Uniform` at times k / T.
      denoise: `(x_k int [B, L], t [B]) -> logits [B, L, V]`, t = k / T.
      key: split into times, noise and negatives, folded per example.
      tokens: int `[B, L]`, clean.
      num_steps: T, for a process that has none of its own.
      auxiliary: lambda of (2), against a single L_k as in the authors' code (D3PM: 0.001 pixels, 0.01
        text; VQ-Diffusion: 5e-4).
      auxiliary_weight: "constant", or VQ-Diffusion's "falling", 2 - (k - 1) / T.
      parameterization, first_step: see `chain_losses`.
      contrast: lambda_c of (3) (CDCD: 5e-5 intra, 5e-6 inter); 0 is VQ-Diffusion or D3PM. The loss is not
        bounded below in it: keep it tiny.
      contrast_weight: "rising", 1 + (k - 1) / T as CDCD's code, or "constant".
      negatives: "intra" (`shuffled_chunks`), "inter" (`other_examples`), or `(keys, tokens) -> [N, B, L]`.
      num_negatives, wise, chunks: N, "step" or "sample", chunks of intra negatives.
      times: of k: a time t on [t_min, 1) belongs to k = floor(t T) + 1.
      index, total: positions in, and size of, the global batch.
    Returns:
      `(losses [B], aux)`; aux holds `t`, `bound` (T L_k, whose mean over k is the sum of (1) without the
      prior's term), `cross_entropy` and `contrast`, all `[B]`, summed over tokens.
    Raises:
      ValueError: no number of steps, an unknown option, tokens that are not clean integers `[B, L]`.
    """
    steps = getattr(process, "num_train_steps", num_steps)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"{type(process).__name__} has no number of steps of its own: pass num_steps, a positive "
            f"int, got {num_steps!r}"
        )
    if num_steps not in (None, steps):
        raise ValueError(f"the process has {steps} steps, num_steps says {num_steps}")
    check_choice("auxiliary_weight", auxiliary_weight, AUXILIARY)
    check_choice("contrast_weight", contrast_weight, CONTRAST)
    if not callable(negatives):
        check_choice("negatives", negatives, ("intra", "inter"))
    process.check_tokens(tokens, process.vocab_size - 1)
    index, total = global_index(tokens, index, total)
    t_key, noise_key, negative_key = jax.random.split(key, 3)
    drawn, inverse_density = build_times(times)(process, t_key, index, total)
    k = jnp.clip(jnp.floor(drawn * steps), 0, steps - 1) + 1.0
    t, s = k / steps, (k - 1.0) / steps
    xt = process.corrupt(example_keys(noise_key, index), tokens, t)
    logits, _ = evaluate(denoise, xt, process.point(t))
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits of shape {logits.shape} do not fit tokens {tokens.shape}")
    options = {"parameterization": parameterization, "first_step": first_step}
    terms = chain_losses(process, logits, tokens, xt, t, s, **options).sum(axis=1)
    entropy = cross_entropy(logits, tokens).sum(axis=1)
    weight = 2.0 - s if auxiliary_weight == "falling" else 1.0
    losses = terms + auxiliary * weight * entropy
    aux = {"t": t, "bound": steps * terms, "cross_entropy": entropy}
    if contrast:
        keys = example_keys(negative_key, index)
        if negatives == "intra":
            other = shuffled_chunks(keys, tokens, num_negatives, chunks)
        else:
            other = (
                other_examples(tokens, num_negatives)
                if negatives == "inter"
                else negatives(keys, tokens)
            )
        pushed = contrastive_losses(
            process, logits, other, xt, t, s, wise=wise, parameterization=parameterization
        ).sum(axis=1)
        aux["contrast"] = pushed
        losses = losses - contrast * (1.0 + s if contrast_weight == "rising" else 1.0) * pushed
    return inverse_density * losses, aux | {"bound": inverse_density * aux["bound"]}
