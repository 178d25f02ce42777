"""Pixels to numbers, and files of strangers to pixels (Pillow, imported on first use).

Images are float32 in [-1, 1], channels last: x = pixel / 127.5 - 1.

A file is decoded only after its header passed: known format, at most `MAX_PIXELS` pixels and
`MAX_BYTES` bytes. So neither an exotic decoder nor a decompression bomb is reached.
"""

import io
import pathlib

import numpy as np

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm")
RESIZES = ("crop", "stretch")
MAX_PIXELS = 50_000_000
MAX_BYTES = 256 * 2**20

_READABLE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_LEVELS = (np.arange(256, dtype=np.float64) / 127.5 - 1).astype(np.float32)


class ImageError(ValueError):
    """An image that is corrupt, oversized or of an unsupported kind; the message names it."""


def to_float(pixels: np.ndarray) -> np.ndarray:
    """uint8 0..255 -> float32 in [-1, 1], any shape."""
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, got {pixels.dtype}")
    return np.take(_LEVELS, pixels)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """float in [-1, 1] -> uint8 0..255, any shape; rounds, clips, and turns NaN into 0."""
    scaled = np.nan_to_num((np.asarray(values, np.float32) + 1) * 127.5, nan=0.0)
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def pillow():
    """The package `PIL`, with what this file uses of it. Raises ImportError with the command that installs it."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError("reading image files needs Pillow: pip install pillow") from error
    return PIL


def check_channels(channels: int) -> int:
    """Raises ValueError unless 1, 3 or 4."""
    if channels not in _MODES:
        raise ValueError(f"channels={channels!r} is not supported; valid: 1, 3, 4")
    return channels


def parse_size(size) -> tuple[int, int] | None:
    """`size` as (height, width): None stays None, an integer is a square. Raises ValueError."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and 0 < side <= 16_384 for side in pair):
        raise ValueError(f"size={size!r} must be a positive integer or (height, width)")
    return pair


def read(path: pathlib.Path) -> bytes:
    """The bytes of a file of at most `MAX_BYTES`. Raises ValueError naming the file."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{str(path)!r} is larger than {MAX_BYTES} bytes")
    return content


def decode(
    content: bytes,
    name: str,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    resize: str = "crop",
    background: int = 128,
    smooth: bool = True,
) -> np.ndarray:
    """The pixels of an encoded image.

    Args:
      content: the bytes of a PNG, JPEG, WebP, BMP or PPM file of one frame, 8 bits a channel.
      name: what error messages call it.
      size: (height, width) of the result; None keeps the image's own.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).
      resize: "crop" scales the image to cover `size` and cuts the centre, "stretch" ignores its
        proportions. Both use an antialiased bicubic filter.
      background: grey level under transparent pixels when the result has no alpha channel.
      smooth: False scales by taking the nearest pixels instead: for masks, whose levels mean something.

    Returns:
      uint8 [H, W, channels].

    Raises:
      ImageError: corrupt, unsupported, animated or oversized content, in one line with `name`.
      ValueError: an unknown `resize`.
    """
    if resize not in RESIZES:
        raise ValueError(f"unknown resize {resize!r}; valid: {', '.join(RESIZES)}")
    PIL = pillow()
    try:
        with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"{name}: {image.width} x {image.height} pixels; the limit is {MAX_PIXELS}"
                )
            if getattr(image, "n_frames", 1) != 1:
                raise ImageError(f"{name}: animated images are not supported")
            if image.mode not in _READABLE_MODES:
                raise ImageError(f"{name}: mode {image.mode} is not supported; use 8-bit channels")
            image.load()
            image = PIL.ImageOps.exif_transpose(image)
            return _finish(PIL, image, size, channels, resize, background, smooth)
    except ImageError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image of a supported format {FORMATS}") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too many pixels; the limit is {MAX_PIXELS}") from error
    # Broken bytes reach almost any exception in the decoders.
    except Exception as error:
        raise ImageError(f"{name}: not a readable image ({error})") from error


def _finish(PIL, image, size, channels, resize, background, smooth) -> np.ndarray:
    has_alpha = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    if has_alpha and channels != 4:
        image = image.convert("RGBA")
        canvas = PIL.Image.new("RGBA", image.size, (background,) * 3 + (255,))
        image = PIL.Image.alpha_composite(canvas, image)
    image = image.convert("RGB" if image.mode == "RGBA" and channels == 3 else _MODES[channels])
    fitted = fit(image, size, resize, smooth)
    return np.asarray(fitted).reshape(*(size or image.size[::-1]), channels)


def fit(image, size: tuple[int, int] | None, resize: str = "crop", smooth: bool = True):
    """A Pillow image scaled to (height, width); see `decode`."""
    PIL = pillow()
    if size is None or (image.height, image.width) == size:
        return image
    height, width = size
    box = None
    if resize == "crop":
        scale = min(image.width / width, image.height / height)
        box_w, box_h = width * scale, height * scale
        left, top = (image.width - box_w) / 2, (image.height - box_h) / 2
        box = (left, top, min(left + box_w, image.width), min(top + box_h, image.height))
    kinds = PIL.Image.Resampling
    return image.resize((width, height), kinds.BICUBIC if smooth else kinds.NEAREST, box=box)
