"""Points in the plane drawn from a density that is known exactly, for models whose law can be checked."""

import numpy as np

from diffusion_jax.data.source import ArraySource, DataSpec, Element, Source, check_split
from diffusion_jax.registry import register

CELLS = 4
HALF_WIDTH = 4.0


def checkerboard_density(points: np.ndarray) -> np.ndarray:
    """Density of the checkerboard at `[N, 2]`, float64 `[N]`: 1 / 32 on every other square of side 2."""
    points = np.asarray(points, np.float64)
    cell = np.floor((points + HALF_WIDTH) * CELLS / (2.0 * HALF_WIDTH))
    inside = ((cell >= 0) & (cell < CELLS)).all(axis=1)
    return np.where(inside & (cell.sum(axis=1) % 2 == 0), 2.0 / (2.0 * HALF_WIDTH) ** 2, 0.0)


@register("data", "checkerboard", kinds=("points",))
def checkerboard(
    split: str = "train", train_count: int = 100_000, test_count: int = 10_000, seed: int = 0
) -> Source:
    """The checkerboard: uniform on the 8 squares of one colour of a 4 x 4 board on [-4, 4]^2.

    Args:
      split: "train", "test" or "all" (train, then test): independent draws.
      train_count, test_count: points of each split.
      seed: of the draws.
    Returns:
      A source of "points" float32 [2].
    Raises:
      ValueError: an unknown split, or a count below 1.
    """
    check_split(split)
    if min(train_count, test_count) < 1:
        raise ValueError(
            f"train_count and test_count must be positive, got {train_count} and {test_count}"
        )
    parts = {"train": [train_count], "test": [test_count], "all": [train_count, test_count]}[split]
    streams = [1] if split == "test" else [0, 1]
    drawn = []
    for stream, count in zip(streams, parts):
        rng = np.random.default_rng([seed, stream])
        row = rng.integers(CELLS, size=count)
        column = 2 * rng.integers(CELLS // 2, size=count) + row % 2
        corner = np.stack([row, column], axis=1) + rng.random((count, 2))
        drawn.append(corner * (2.0 * HALF_WIDTH / CELLS) - HALF_WIDTH)
    spec = DataSpec(kind="points", elements={"points": Element((2,), "float32")})
    return ArraySource({"points": np.concatenate(drawn).astype(np.float32)}, spec)
