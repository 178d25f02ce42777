"""What samplers of tokens share: their state, what they start from, what they refuse."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.processes import Absorbing


class TokenState(NamedTuple):
    """Scan state of samplers that need nothing beside the tokens `[B, L]`."""

    x: Any


def result(state):
    """`Sampler.finish`: the tokens."""
    return state.x


class MaskedPrepare(NamedTuple):
    """`Sampler.prepare`: a number of sequences, or tokens `[B, L]` in which masks are to be filled."""

    vocab_size: int
    length: int | None

    def __call__(self, x_init):
        process = Absorbing(self.vocab_size)
        if isinstance(x_init, int | np.integer) and not isinstance(x_init, bool):
            if self.length is None:
                raise ValueError(
                    "the number of sequences alone does not say their length: pass length"
                )
            if x_init < 1:
                raise ValueError(f"the number of sequences must be positive, got {x_init}")
            return jnp.full((int(x_init), self.length), process.mask_id, jnp.int32)
        tokens = jnp.asarray(x_init)
        process.check_tokens(tokens, process.mask_id)
        if self.length is not None and tokens.shape[1] != self.length:
            raise ValueError(
                f"tokens have length {tokens.shape[1]}, the sampler was built for {self.length}"
            )
        return tokens


def check_absorbing(process):
    """Raises ValueError unless the process masks tokens."""
    if not isinstance(process, Absorbing):
        raise ValueError(f"this sampler needs an Absorbing process, got {type(process).__name__}")


def check_ends_masked(process):
    """Raises ValueError unless nearly all tokens are masked at t = 1, where sampling starts."""
    rate = process.mask_rate(1.0)
    if not isinstance(rate, jax.core.Tracer) and rate < 0.99:
        raise ValueError(
            f"{type(process.schedule).__name__} masks only {float(rate):.4g} of the tokens at t = 1: "
            "sampling cannot start from masks; it needs at least 0.99"
        )


def check_length(length):
    """Raises ValueError unless `length` is None or a positive int."""
    if length is not None and (not isinstance(length, int | np.integer) or length < 1):
        raise ValueError(f"length must be a positive int, got {length!r}")


def check_logits(logits, tokens, vocab_size):
    """Raises ValueError unless a denoiser's output has shape `[B, L, V]`."""
    if logits.shape != (*tokens.shape, vocab_size):
        raise ValueError(
            f"denoise returned logits of shape {tuple(logits.shape)}; tokens {tuple(tokens.shape)} with "
            f"{vocab_size} clean tokens need {(*tokens.shape, vocab_size)} (no mask class)"
        )


class CountedCalls:
    """A denoiser that counts how often it is really run, in compiled programs too.

    A `Call.when` that skips the network does not count. Programs compiled with it live as long as it does.

    Args:
      denoise: a denoiser without a cache.
    """

    def __init__(self, denoise):
        self.denoise = denoise
        self._calls = 0

    def _count(self):
        self._calls += 1

    def __call__(self, x, t):
        jax.debug.callback(self._count)
        return self.denoise(x, t)

    @property
    def calls(self) -> int:
        """Runs so far; waits for those under way."""
        jax.effects_barrier()
        return self._calls
