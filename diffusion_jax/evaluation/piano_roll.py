"""Piano rolls: pictures of music in four voices, time to the right and pitch upwards."""

import numpy as np

from diffusion_jax.data.chorales import VOICES, pitches

# soprano, alto, tenor, bass
COLOURS = np.array([[214, 39, 40], [255, 152, 30], [44, 140, 60], [31, 98, 180]], np.uint8)
_UNKNOWN = np.array([225, 225, 225], np.uint8)


def piano_rolls(
    tokens: np.ndarray, symbols: tuple[str, ...], *, scale: tuple[int, int] = (3, 4)
) -> np.ndarray:
    """A picture of every sequence of interleaved voices, all of one range of pitches.

    Args:
      tokens: integers [N, 4 T] as `data.chorales` numbers them; masks are left grey.
      symbols: of the spec.
      scale: pixels (height, width) of a semitone and a step.

    Returns:
      uint8 [N, P * height, T * width, 3] on white. Where two voices share a pitch the lower is drawn.

    Raises:
      ValueError: tokens of another rank, or a length that four voices do not divide.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape [N, L], got {tokens.shape}")
    found = pitches(tokens, symbols)
    sounding = found[found >= 0]
    low, high = (int(sounding.min()), int(sounding.max())) if sounding.size else (60, 72)
    count, steps, _ = found.shape
    out = np.full((count, high - low + 3, steps, 3), 255, np.uint8)
    masked = (tokens == len(symbols)).reshape(count, steps, VOICES).any(axis=2)
    out[np.broadcast_to(masked[:, None], out.shape[:3])] = _UNKNOWN
    example, step = np.indices((count, steps))
    for voice, colour in enumerate(COLOURS):
        pitch = found[..., voice]
        here = pitch >= 0
        out[example[here], high + 1 - pitch[here], step[here]] = colour
    return out.repeat(scale[0], axis=1).repeat(scale[1], axis=2)
