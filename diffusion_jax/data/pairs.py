"""Pairs for a bridge, made from any set of images by a corruption; see `corruptions.py`."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.data import holes
from diffusion_jax.data.corruptions import CORRUPTIONS
from diffusion_jax.data.source import DataSpec, Element, Source
from diffusion_jax.registry import closest, entry, register

_MADE = ("source", "mask")


class Paired(Source):
    """Adds "source", the corrupted "image", to the examples of an image source.

    Args:
      source: a source of kind "image" without a "source" of its own.
      corruption: `(images, rows) -> sources` [N, H, W, C]; or a dict of "source" and "mask"
        [N, H, W, 1], 1 where the image is unknown, and then the examples have a "mask" too.

    Raises:
      ValueError: the source has another kind, or pairs already; or the corruption does not give
        sources of the images' shape, or gives a mask that is not of 0 and 1.
    """

    def __init__(self, source: Source, corruption: Callable[..., Any]) -> None:
        spec = source.spec
        if spec.kind != "image" or not {*_MADE}.isdisjoint(spec.elements):
            raise ValueError(
                f"pairs are made from images; got kind {spec.kind!r}"
                f" with {', '.join(sorted(spec.elements))}"
            )
        self._source, self._corruption = source, corruption
        self._shapes = {"source": spec.shape, "mask": (*spec.shape[:2], 1)}
        # A bad value of an option is reported here rather than in a reading thread.
        made = self._make(source.take([0])["image"], np.zeros(1, np.int64))
        added = {name: Element(self._shapes[name], "float32") for name in made}
        self.spec = DataSpec(**(vars(spec) | {"elements": {**spec.elements, **added}}))

    def __len__(self) -> int:
        return len(self._source)

    def _make(self, images: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        made = self._corruption(images, rows)
        made = made if isinstance(made, Mapping) else {"source": made}
        if set(made) not in ({"source"}, {*_MADE}):
            raise ValueError(
                f"a corruption gives 'source', and 'mask' if it likes; got {', '.join(map(repr, made))}"
            )
        made = {name: np.asarray(made[name]) for name in _MADE if name in made}
        for name, values in made.items():
            expected = (len(rows), *self._shapes[name])
            if values.shape != expected:
                raise ValueError(
                    f"the corruption gave a {name} of shape {values.shape}, expected {expected}"
                )
        if "mask" in made:
            made["mask"] = holes.check_mask(made["mask"], "the corruption's mask")
        return made | {"source": made["source"].astype(np.float32, copy=False)}

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        taken = self._source.take(rows)
        if not len(rows):
            empty = self.spec.zeros(0)
            return {name: empty[name] for name in self.spec.elements}
        return taken | self._make(taken["image"], rows)


@register("data", "paired", kinds=("image",))
def paired(
    data: str | Source = "digits",
    corruption: str | Callable[..., Any] = "blur_mask",
    *,
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Paired:
    """Pairs for a bridge, from any image data set.

    Args:
      data: a registered data set of images, or a source.
      corruption: "blur", "blur_mask", "edges", "grey", "inpaint", "jpeg", "low_resolution",
        "noise_free", or such a function (see `corruptions`).
      options: further arguments of the corruption.
      arguments: of the data set (`split` and so on).

    Returns:
      A source of "image" (the target), "source" (the corrupted image), with "inpaint" also "mask"
      float32 [H, W, 1] (1 = unknown), and the other entries.

    Raises:
      ValueError: unknown names or options; a data set without images, or with pairs of its own.
    """
    if isinstance(corruption, str):
        if corruption not in CORRUPTIONS:
            raise ValueError(f"unknown corruption {corruption!r}{closest(corruption, CORRUPTIONS)}")
        corruption = CORRUPTIONS[corruption]
    if isinstance(data, Source):
        if arguments:
            raise ValueError(f"{', '.join(arguments)}: only with the name of a data set")
        source = data
    else:
        source = entry("data", data).build(**arguments)
    function = functools.partial(corruption, **(options or {}))
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"options={dict(options or {})} do not fit the corruption: {error}"
        ) from error
    return Paired(source, function)
