"""Monotonic alignment of symbols with frames, and the way back from durations to frames.

With log p_tj the log-likelihood of frame t under symbol j, a path gives each frame a symbol, starts at the
first, ends at the last, and goes on by none or one at a time (Glow-TTS, arXiv 2005.11129, sec. 3.2):
  (1) Q_tj = log p_tj + max(Q_(t-1)j, Q_(t-1)(j-1))
  (2) the best path is read back from Q at the last frame and the last symbol
A symbol's duration is the number of its frames; `regulate` repeats symbols by their durations (FastSpeech,
arXiv 1905.09263). L symbols and T frames are padded lengths; an example's own are `text_length` and
`frames`, int `[B]`. A tie in (1) stays on the symbol.
"""

import functools

import jax
import jax.numpy as jnp


def valid(lengths: jax.Array, size: int) -> jax.Array:
    """bool `[B, size]`, True before each length: int `[B]`."""
    return jnp.arange(size)[None] < lengths[:, None]


def unit_gaussian_scores(mean: jax.Array, x: jax.Array) -> jax.Array:
    """log N(x_t; mean_j, I) up to a term of t alone, which no alignment depends on.

    Args:
      mean: float `[B, L, M]`, one a symbol.
      x: float `[B, T, M]`.
    Returns:
      float32 `[B, T, L]`.
    """
    mean, x = (v.astype(jnp.float32) for v in (mean, x))
    return jnp.einsum("btm,blm->btl", x, mean) - 0.5 * jnp.square(mean).sum(axis=-1)[:, None]


def monotonic_alignment(
    scores: jax.Array, text_length: jax.Array, frames: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The best monotonic path, exactly: (1) as a scan over frames, (2) as a second one backwards.

    Args:
      scores: float `[B, T, L]`, log p of frame t under symbol j.
      text_length: int `[B]`, 1..L.
      frames: int `[B]`, 1..T. Where there are fewer frames than symbols, the symbols beyond get none.
    Returns:
      `(index, durations)`: int32 `[B, T]`, the symbol of each frame, L from `frames` on; and int32
      `[B, L]`, frames of each symbol, which sum to `frames`. Both are constants to differentiation.
    Raises:
      ValueError: shapes that do not fit.
    """
    size, _, symbols = scores.shape if scores.ndim == 3 else (None, None, None)
    if scores.ndim != 3 or text_length.shape != (size,) or frames.shape != (size,):
        raise ValueError(
            "scores must be [B, T, L] with text_length and frames [B], got shapes "
            f"{scores.shape}, {text_length.shape} and {frames.shape}"
        )
    index = jax.vmap(_best_path)(jax.lax.stop_gradient(scores), text_length, frames)
    return index, durations_of(index, symbols)


def _best_path(scores, text_length, frames):
    """Symbol of each frame, int32 `[T]`, for scores `[T, L]`."""
    size, symbols = scores.shape

    def forward(best, inputs):
        t, score = inputs
        moved = jnp.concatenate([jnp.array([-jnp.inf]), best[:-1]])
        moves = (moved > best) & (t > 0)
        best = jnp.where(moves, moved, best) + score
        return best, moves

    start = jnp.where(jnp.arange(symbols) == 0, 0.0, -jnp.inf)
    times = jnp.arange(size)
    _, moves = jax.lax.scan(forward, start, (times, scores.astype(jnp.float32)))

    def backward(symbol, inputs):
        t, moves = inputs
        inside = t < frames
        before = symbol - (inside & moves[symbol]).astype(jnp.int32)
        return before, jnp.where(inside, symbol, symbols)

    last = jnp.minimum(text_length, frames).astype(jnp.int32) - 1
    return jax.lax.scan(backward, last, (times, moves), reverse=True)[1]


def durations_of(index: jax.Array, symbols: int) -> jax.Array:
    """Frames of each symbol: int `[B, T]` with values 0..symbols -> int32 `[B, symbols]`."""
    counts = functools.partial(jnp.bincount, length=symbols + 1)
    return jax.vmap(counts)(index)[:, :symbols].astype(jnp.int32)


def index_of(durations: jax.Array, size: int) -> jax.Array:
    """The symbol of each frame: int `[B, L]` -> int32 `[B, size]`, L beyond the end of the durations."""
    ends = jnp.cumsum(durations, axis=1)
    return (ends[:, None, :] <= jnp.arange(size)[None, :, None]).sum(axis=-1, dtype=jnp.int32)


def at_symbols(values: jax.Array, index: jax.Array) -> jax.Array:
    """`values[index]`, zero where the index is L: `[B, L, C]`, int `[B, T]` -> `[B, T, C]`."""
    rows = jnp.minimum(index, values.shape[1] - 1)[..., None]
    taken = jnp.take_along_axis(values, rows, axis=1)
    return jnp.where((index < values.shape[1])[..., None], taken, 0)


def regulate(values: jax.Array, durations: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Repeats each symbol's vector for its duration.

    Args:
      values: `[B, L, C]`.
      durations: int `[B, L]`, zero at padding.
      size: T; what goes beyond is cut off.
    Returns:
      `([B, T, C], frames int32 [B])`, zero from `frames` on.
    """
    frames = jnp.minimum(durations.sum(axis=1), size).astype(jnp.int32)
    return at_symbols(values, index_of(durations, size)), frames


def even_durations(text_length: jax.Array, frames: jax.Array, symbols: int) -> jax.Array:
    """Durations as equal as can be: int `[B]`, int `[B]` -> int32 `[B, symbols]` that sum to `frames`."""
    weights = valid(text_length, symbols).astype(jnp.float32)
    return fit_durations(weights, frames)


def fit_durations(weights: jax.Array, frames: jax.Array) -> jax.Array:
    """Durations in proportion to `weights`, rounded so that they sum to `frames`.

    Args:
      weights: non-negative `[B, L]`, zero at padding, not all zero.
      frames: int `[B]`.
    Returns:
      int32 `[B, L]`.
    """
    ends = jnp.cumsum(weights.astype(jnp.float32), axis=1)
    ends = jnp.round(ends * (frames[:, None] / ends[:, -1:])).astype(jnp.int32)
    return jnp.diff(ends, axis=1, prepend=0)
