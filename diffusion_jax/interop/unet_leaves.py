"""What the layouts of the published U-Nets share: `networks.unet_blocks` in EDM's names, and 1x1 layers."""

import numpy as np

from diffusion_jax.interop.mapping import CONV, Kind, Leaf, linear
from diffusion_jax.networks.unet_blocks import filter_table


def pointwise(axes: int) -> Kind:
    """A convolution of one pixel, `[out, in, 1, ...]` with `axes` ones (any number is read), as `[in, out]`."""

    def to_ours(weight):
        if weight.ndim < 2 or set(weight.shape[2:]) - {1}:
            raise ValueError("a layer of single pixels is wanted")
        return weight.reshape(weight.shape[:2]).T

    return Kind(to_ours, lambda kernel: kernel.T.reshape(*kernel.shape[::-1], *(1,) * axes))


def norm(ours: str, theirs: str) -> list[Leaf]:
    """A group norm."""
    return [
        Leaf(f"{ours}/norm/scale", f"{theirs}.weight"),
        Leaf(f"{ours}/norm/bias", f"{theirs}.bias"),
    ]


class EDMLayers:
    """Collects the leaves of a network of EDM's code base, and its filters.

    Attributes:
      leaves: so far.
      filters: `name -> array` of the filters that the official code keeps in its state dict.
      ignored: the pattern of their names.
    """

    ignored = r".*\.resample_filter"

    def __init__(self, prefix, taps):
        self.leaves: list[Leaf] = []
        self.filters: dict[str, np.ndarray] = {}
        self._prefix, self._taps = prefix, taps

    def layer(self, ours, theirs, bias=True, **kind):
        """A linear layer, or a convolution (`kind=`)."""
        self.leaves.extend(linear(ours, self._prefix + theirs, bias=bias, **kind))

    def leaf(self, ours, theirs, *kind):
        """One array."""
        self.leaves.append(Leaf(ours, self._prefix + theirs, *kind))

    def norm(self, ours, theirs):
        """A group norm."""
        self.leaves.extend(norm(ours, self._prefix + theirs))

    def filter(self, theirs):
        """The filter of a layer that resamples."""
        self.filters[f"{self._prefix}{theirs}.resample_filter"] = filter_table(self._taps)

    def block(
        self, ours, theirs, inputs, outputs, *, attends=False, resamples=False, project=False
    ):
        """A block of `networks.unet_blocks`; `project` as its style has it."""
        self.norm(f"{ours}/norm_in", f"{theirs}.norm0")
        self.layer(f"{ours}/conv_in", f"{theirs}.conv0", kind=CONV)
        self.layer(f"{ours}/modulation", f"{theirs}.affine")
        self.norm(f"{ours}/norm_out", f"{theirs}.norm1")
        self.layer(f"{ours}/conv_out", f"{theirs}.conv1", kind=CONV)
        if inputs != outputs or (project and resamples):
            self.layer(f"{ours}/skip", f"{theirs}.skip", kind=pointwise(2))
        if resamples:
            self.filter(f"{theirs}.conv0")
            self.filter(f"{theirs}.skip")
        if attends:
            self.norm(f"{ours}/attention/norm", f"{theirs}.norm2")
            self.layer(f"{ours}/attention/qkv", f"{theirs}.qkv", kind=pointwise(2))
            self.layer(f"{ours}/attention/out", f"{theirs}.proj", kind=pointwise(2))


def resolution_of(network, image_size, levels: int) -> list[str]:
    """The `32x32` in the names of each level, of a network or of the `image_size` given instead.

    Raises:
      ValueError: neither knows a size, or it cannot be halved for every level.
    """
    side = image_size or network.image_size
    name = type(network).__name__
    if side is None:
        raise ValueError(
            f"the official names of {name} hold the size of the images: pass image_size=..., or build the"
            " network with it"
        )
    if side % 2 ** (levels - 1):
        raise ValueError(
            f"image_size = {side} must be divisible by 2**(levels - 1) = {2 ** (levels - 1)}"
        )
    return [f"{side >> level}x{side >> level}" for level in range(levels)]
