"""Pictures of samples: grids, trajectory strips, rendered text. Arrays in, uint8 arrays out.

Small images are enlarged by whole factors with nearest neighbours, so every pixel of a sample stays
a visible square. Pixels that are not finite are drawn in magenta: a diverged sampler shows, instead
of turning black. Captions use the font that comes with Pillow; grids without captions need NumPy
only.

Geometry of a grid, in pixels of the result, with H, W the enlarged size of an image:
  cell (r, c) starts at row  top + pad + r (H + strip + pad),  strip = CAPTION_HEIGHT with `labels`
                   column    left + pad + c (W + pad)
  top = CAPTION_HEIGHT per line of the title and for the column captions; left = width of the widest
  row caption + 2 pad; both are 0 without captions.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.evaluation.files import write_atomically

CAPTION_HEIGHT = 16
_FONT_SIZE = 12
_SMALLEST_CELL = 48
_PAPER = 255
_NOT_FINITE = (255, 0, 255)
_MASK_COLOUR = (-0.55, 0.1, 0.75)


def _font():
    from PIL import ImageFont

    return ImageFont.load_default(_FONT_SIZE)


def _width(text: str) -> int:
    return int(np.ceil(_font().getlength(text)))


def _fit(text: str, width: int) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    if _width(text) <= width:
        return text
    while text and _width(text + "...") > width:
        text = text[:-1]
    return text + "..." if text else ""


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken after the last space that fits, else anywhere."""
    font, lines = _font(), []
    for paragraph in text.split("\n"):
        while font.getlength(paragraph) > width:
            low, high = 1, len(paragraph)
            while low < high:
                middle = (low + high + 1) // 2
                fits = font.getlength(paragraph[:middle]) <= width
                low, high = (middle, high) if fits else (low, middle - 1)
            space = paragraph.rfind(" ", 1, low + 1)
            cut = space + 1 if space > 0 else low
            lines.append(paragraph[:cut].rstrip(" "))
            paragraph = paragraph[cut:]
        lines.append(paragraph)
    return lines


def _draw(canvas: np.ndarray, texts: Sequence[tuple[float, float, str, str]]) -> np.ndarray:
    """Writes (x, y, anchor, text) in black; returns a new array."""
    if not texts:
        return canvas
    from PIL import Image, ImageDraw

    picture = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(picture), _font()
    for x, y, anchor, text in texts:
        draw.text((x, y), text, fill=(0, 0, 0), font=font, anchor=anchor)
    return np.array(picture)


def _to_rgb(images, value_range: tuple[float, float]) -> np.ndarray:
    """[N, H, W, C] as uint8 [N, H, W, 3]; bytes pass through, floats are mapped from the range."""
    images = np.asarray(images)
    if images.ndim != 4 or 0 in images.shape or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be a non-empty [N, H, W, 1 or 3], got {images.shape}")
    if images.dtype != np.uint8:
        low, high = value_range
        if not high > low:
            raise ValueError(f"value_range must be (low, high) with high > low, got {value_range}")
        values = images.astype(np.float32)
        finite = np.isfinite(values).all(axis=-1)
        unit = np.clip((np.nan_to_num(values) - low) / (high - low), 0.0, 1.0)
        images = np.round(255.0 * unit).astype(np.uint8)
    else:
        finite = np.ones(images.shape[:-1], bool)
    rgb = np.repeat(images, 3 // images.shape[-1], axis=-1)
    rgb[~finite] = _NOT_FINITE
    return rgb


def _check_captions(name: str, captions, count: int) -> list[str]:
    captions = [] if captions is None else [str(caption) for caption in captions]
    if captions and len(captions) != count:
        raise ValueError(f"{name}: expected {count} captions, got {len(captions)}")
    return captions


def image_grid(
    images,
    columns: int | None = None,
    scale: int | None = None,
    *,
    labels: Sequence[Any] | None = None,
    row_labels: Sequence[Any] | None = None,
    column_labels: Sequence[Any] | None = None,
    title: str = "",
    value_range: tuple[float, float] = (-1.0, 1.0),
    pad: int = 2,
) -> np.ndarray:
    """Images in rows, with captions.

    Args:
      images: [N, H, W, C], C = 1 or 3; floats in `value_range` (clipped) or uint8.
      columns: images per row; None is the square root of N, rounded up.
      scale: whole factor of enlargement; None makes a cell 48 pixels or a little more.
      labels: a caption below each image, N of them.
      row_labels: a caption left of each row.
      column_labels: a caption above each column, cut where it is wider than the column.
      title: above everything, wrapped.
      value_range: the values drawn black and white.
      pad: pixels between the cells and around them.

    Returns:
      uint8 [height, width, 3]; the module's text gives the geometry. Cells without an image are
      white.

    Raises:
      ValueError: a shape, a range, a number of captions or a size that does not fit.
    """
    cells = _to_rgb(images, value_range)
    count, height, width, _ = cells.shape
    columns = int(np.ceil(np.sqrt(count))) if columns is None else columns
    scale = max(1, -(-_SMALLEST_CELL // max(height, width))) if scale is None else scale
    if columns < 1 or scale < 1 or pad < 0:
        raise ValueError(f"need columns >= 1, scale >= 1, pad >= 0: got {columns}, {scale}, {pad}")
    rows = -(-count // columns)
    labels = _check_captions("labels", labels, count)
    row_labels = _check_captions("row_labels", row_labels, rows)
    column_labels = _check_captions("column_labels", column_labels, columns)

    height, width = height * scale, width * scale
    left = max(map(_width, row_labels)) + 2 * pad if row_labels else 0
    step_y = height + (CAPTION_HEIGHT if labels else 0) + pad
    total_width = left + pad + columns * (width + pad)
    title_lines = _wrap(title, total_width - 2 * pad) if title else []
    top = CAPTION_HEIGHT * (len(title_lines) + bool(column_labels))
    canvas = np.full((top + pad + rows * step_y, total_width, 3), _PAPER, np.uint8)

    texts = [(pad, CAPTION_HEIGHT * (i + 0.5), "lm", t) for i, t in enumerate(title_lines)]
    for c, text in enumerate(column_labels):
        x = left + pad + c * (width + pad) + width / 2
        texts.append((x, top - CAPTION_HEIGHT / 2, "mm", _fit(text, width + pad)))
    for r, text in enumerate(row_labels):
        texts.append((pad, top + pad + r * step_y + height / 2, "lm", text))
    enlarged = cells.repeat(scale, axis=1).repeat(scale, axis=2)
    for i, cell in enumerate(enlarged):
        y = top + pad + (i // columns) * step_y
        x = left + pad + (i % columns) * (width + pad)
        canvas[y : y + height, x : x + width] = cell
        if labels:
            middle = (x + width / 2, y + height + CAPTION_HEIGHT / 2)
            texts.append((*middle, "mm", _fit(labels[i], width + pad)))
    return _draw(canvas, texts)


def comparison_grid(sets: Mapping[str, Any], **options: Any) -> np.ndarray:
    """One captioned row per set, such as {"degraded": ..., "restored": ..., "truth": ...}.

    Args:
      sets: name -> images [N, H, W, C], all of one shape; column i shows one example.
      **options: as `image_grid`, without `columns` and `row_labels`.

    Raises:
      ValueError: no sets, or shapes that differ.
    """
    shapes = {name: np.shape(images) for name, images in sets.items()}
    if not sets or len(set(shapes.values())) != 1:
        raise ValueError(f"sets must be non-empty and of one shape, got {shapes}")
    count = next(iter(shapes.values()))[0]
    stacked = np.concatenate([np.asarray(images) for images in sets.values()])
    return image_grid(stacked, columns=count, row_labels=list(sets), **options)


def trajectory_strip(
    trajectory,
    *,
    columns: int = 9,
    rows: int | None = None,
    times: Sequence[float] | None = None,
    column_labels: Sequence[Any] | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    rescale: bool = False,
    **options: Any,
) -> np.ndarray:
    """How samples come into being: one row per example, time from left to right.

    Args:
      trajectory: [S, B, H, W, C], states in the order in which they were visited.
      columns: states shown, spread evenly over S, the first and the last included.
      rows: examples shown, the first of the batch; None shows at most 8.
      times: [S], written above the columns as "t=0.50".
      column_labels: [S] captions instead of `times`; with neither the state's index is written.
      value_range: the values drawn black and white.
      rescale: shrink every column that leaves the range so that its 99th percentile of |value|
        just fits: shows the structure under large noise (VE, EDM).
      **options: `scale`, `row_labels`, `title`, `pad`, as in `image_grid`.

    Returns:
      uint8 [height, width, 3].

    Raises:
      ValueError: a wrong rank, or captions whose number is not S.
    """
    trajectory = np.asarray(trajectory)
    if trajectory.ndim != 5 or 0 in trajectory.shape:
        raise ValueError(f"trajectory must be a non-empty [S, B, H, W, C], got {trajectory.shape}")
    states, batch = trajectory.shape[:2]
    if columns < 1 or (rows is not None and rows < 1):
        raise ValueError(f"need columns >= 1 and rows >= 1, got {columns} and {rows}")
    if column_labels is None and times is not None:
        column_labels = [f"t={float(t):.2f}" for t in times]
    captions = _check_captions("times", column_labels, states) or [str(i) for i in range(states)]
    picked = np.unique(np.round(np.linspace(0, states - 1, min(columns, states))).astype(int))
    if columns == 1:
        picked = np.array([states - 1])
    rows = min(batch, 8 if rows is None else rows)
    shown = trajectory[picked, :rows]
    if rescale and shown.dtype != np.uint8:
        low, high = value_range
        centre, half = (low + high) / 2, (high - low) / 2
        offsets = shown.astype(np.float32) - centre
        sizes = np.where(np.isfinite(offsets), np.abs(offsets), 0.0).reshape(len(picked), -1)
        excess = np.maximum(np.percentile(sizes, 99, axis=1) / half, 1.0)
        shown = centre + offsets / excess[:, None, None, None, None]
    cells = np.swapaxes(shown, 0, 1).reshape(rows * len(picked), *trajectory.shape[2:])
    labels = [captions[i] for i in picked]
    return image_grid(
        cells, columns=len(picked), column_labels=labels, value_range=value_range, **options
    )


def tokens_to_images(
    tokens,
    vocab_size: int,
    shape: tuple[int, int],
    *,
    mask_colour: tuple[float, float, float] = _MASK_COLOUR,
) -> np.ndarray:
    """Token images as RGB: token v is the grey value 2 v / (V - 1) - 1, the mask id V a colour.

    Args:
      tokens: integers [..., H * W] in 0 .. V, row by row.
      vocab_size: V, at least 2.
      shape: (H, W).
      mask_colour: RGB in [-1, 1] of a masked pixel.

    Returns:
      float32 [..., H, W, 3] in [-1, 1].

    Raises:
      ValueError: tokens out of range, not integers, or not H * W of them.
    """
    tokens = np.asarray(tokens)
    height, width = shape
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.ndim < 1 or tokens.shape[-1] != height * width or tokens.size == 0:
        raise ValueError(f"tokens must be [..., {height * width}], got shape {tokens.shape}")
    if vocab_size < 2 or tokens.min() < 0 or tokens.max() > vocab_size:
        raise ValueError(
            f"tokens must be in 0 .. {vocab_size} (the mask) with vocab_size >= 2, "
            f"got {tokens.min()} .. {tokens.max()}"
        )
    grey = 2.0 * np.arange(vocab_size) / (vocab_size - 1) - 1.0
    palette = np.concatenate([np.repeat(grey[:, None], 3, axis=1), np.array([mask_colour])])
    return palette.astype(np.float32)[tokens].reshape(*tokens.shape[:-1], height, width, 3)


def text_image(texts: Sequence[str], *, width: int = 720, title: str = "") -> np.ndarray:
    """Numbered text samples, one below the other, wrapped.

    Line breaks in a sample are kept; other control characters are shown as a middle dot, and
    characters that Pillow's font lacks (most beyond ASCII) as boxes.

    Args:
      texts: the samples.
      width: of the result, in pixels; at least 100.
      title: first line.

    Returns:
      uint8 [height, width, 3], black on white.

    Raises:
      ValueError: no texts, or a width below 100.
    """
    if isinstance(texts, str) or len(texts) == 0 or width < 100:
        raise ValueError("text_image needs a non-empty list of texts and a width of 100 or more")
    numbers = [f"{i + 1}." for i in range(len(texts))]
    indent = max(map(_width, numbers)) + 14
    lines = [(6, line) for line in _wrap(title, width - 12)] if title else []
    placed = [(x, 4 + CAPTION_HEIGHT * (i + 0.5), "lm", t) for i, (x, t) in enumerate(lines)]
    y = 4 + CAPTION_HEIGHT * len(lines) + (6 if lines else 0)
    for number, text in zip(numbers, texts):
        text = "".join(c if c.isprintable() or c == "\n" else "\u00b7" for c in str(text))
        placed.append((6, y + CAPTION_HEIGHT / 2, "lm", number))
        for line in _wrap(text, width - indent - 6):
            placed.append((indent, y + CAPTION_HEIGHT / 2, "lm", line))
            y += CAPTION_HEIGHT
        y += 6
    return _draw(np.full((y, width, 3), _PAPER, np.uint8), placed)


def save_png(path: str | os.PathLike, array, *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes an image as PNG, atomically.

    Args:
      path: the file; parent folders are made.
      array: uint8 [H, W, 3] or [H, W].
      metadata: written into the file as PNG text (sampler, NFE, checksum ...).

    Raises:
      ValueError: not uint8, or a shape that is no image.
    """
    array = np.asarray(array)
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)
    if array.dtype != np.uint8 or not shaped or 0 in array.shape:
        raise ValueError(f"need uint8 [H, W] or [H, W, 3], got {array.dtype} {array.shape}")
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(str(key), str(value))
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", pnginfo=info, optimize=True)
    return write_atomically(path, buffer.getvalue())
