"""Which axis of a parameter is split over the mesh axis `model`, by the names of the parameters.

  column   a layer's outputs are split: what follows works on its part alone     [in, out / n]
  row      its inputs are split: the parts of the result are summed              [in / n, out]

A column and a row in turn (Megatron-LM, arXiv 1909.08053) cost one all-reduce of the activations in the
forward pass and one in the backward pass: in attention over the heads, in an MLP over the hidden units, in
a residual block of a U-Net over the channels between its two convolutions. Embedding and output layer of a
token network are split over the vocabulary.

The projection to queries, keys and values is split over its inputs while it rests: its outputs are ordered
(3, heads, n), which a split of the columns would not cut at heads. `layers.HeadsDense` exchanges it for the
part of its own heads, 1 / n of the kernel.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec as P

from diffusion_jax.registry import check_choice

AXES = ("data", "fsdp", "model")
COLUMN, ROW = (-1,), (-2,)
_VECTORS = ("bias", "scale")  # too short to be worth a split


class Rule(NamedTuple):
    """Parameters whose name a pattern is found in, and the axes that may be split over `model`.

    Attributes:
      pattern: a regular expression.
      axes: the first of them that the mesh divides is split; none of them: the parameter is whole.
      least: an axis shorter than this is not split.
    """

    pattern: str
    axes: tuple[int, ...]
    least: int = 2


Rules = tuple[Rule | tuple[str, P | None], ...]

RULES = {
    "unet": (
        Rule(r"_block_\d+/attention/(qkv|out)/kernel$", ()),  # other orders of heads: left whole
        Rule(r"(^|/)conv_in/(kernel|weight)$", COLUMN),
        Rule(r"(^|/)conv_out/(kernel|weight)$", ROW),
        Rule(r"(^|/)modulation(/linear)?/(kernel|weight)$", COLUMN),
        Rule(r"_attention(_\d+)?/attention/(qkv|out)/kernel$", ROW),
    ),
    "transformer": (
        Rule(r"(^|/)attention/(qkv|out)/kernel$", ROW),
        Rule(r"(^|/)mlp_in/kernel$", COLUMN),
        Rule(r"(^|/)mlp_out/kernel$", ROW),
        Rule(r"(^|/)modulation/linear/kernel$", COLUMN),
        Rule(r"(^|/)tokens/table$", (-2, -1)),
        Rule(r"(^|/)output/kernel$", COLUMN, 1024),
    ),
}


def automatic(shape: Sequence[int], ways: int, min_size: int, taken: int | None = None) -> P:
    """The largest axis that `ways` divides, split over `fsdp`.

    Args:
      shape: of the array.
      ways: size of the mesh axis.
      min_size: arrays of fewer elements are not split.
      taken: an axis that is split over `model` already.
    """
    fitting = [i for i, n in enumerate(shape) if n % ways == 0 and i != taken]
    spec = [None if i != taken else "model" for i in range(len(shape))]
    if ways > 1 and math.prod(shape) >= min_size and fitting:
        spec[max(fitting, key=lambda i: shape[i])] = "fsdp"
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def spec_of(rule: Rule, shape: Sequence[int], sizes: Mapping[str, int], min_size: int) -> P:
    """How a parameter that the rule is about is split: over `model` by the rule, over `fsdp` by size."""
    ways = sizes["model"]
    fitting = [
        i % len(shape)
        for i in rule.axes
        if -i <= len(shape) and shape[i] % ways == 0 and shape[i] >= max(rule.least, ways)
    ]
    taken = fitting[0] if fitting and ways > 1 else None
    return automatic(shape, sizes["fsdp"], min_size, taken)


def param_spec(
    rules: Rules, name: str, shape: Sequence[int], sizes: Mapping[str, int], min_size: int
) -> P:
    """How a parameter is split: the first rule whose pattern is found in its name decides.

    Args:
      rules: each a `Rule`, or (regular expression, partition spec or None for `automatic`).
      name: of the parameter, its parts joined by slashes.
      shape: its shape, with the axis of a stack of layers.
      sizes: of the mesh axes.
      min_size: arrays of fewer elements are not split over `fsdp`, nor biases and scales that are shorter.

    Raises:
      ValueError: a spec that does not fit the parameter.
    """
    if name.rsplit("/", 1)[-1] in _VECTORS and math.prod(shape[-1:]) < min_size:
        min_size = math.prod(shape) + 1  # a stack of them is no larger array
    found = next((rule for rule in rules if re.search(rule[0], name)), (name, None))
    if isinstance(found, Rule):
        return spec_of(found, shape, sizes, min_size)
    pattern, spec = found
    if spec is None:
        return automatic(shape, sizes["fsdp"], min_size)
    for size, axes in zip(shape, spec):
        axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
        if size % math.prod(sizes[a] for a in axes):
            break
    else:
        if len(spec) <= len(shape):
            return spec
    raise ValueError(
        f"rule {pattern!r}: {spec} does not fit parameter {name} of shape {tuple(shape)}"
        f" on the mesh {dict(sizes)}"
    )


def parse_rules(given: Any) -> Rules:
    """Rules from the name of a set, or from a list of names and of (pattern, spec), see `make_layout`.

    Raises:
      ValueError: an unknown name, spec or mesh axis.
    """
    rules: list[Any] = []
    for item in [given] if isinstance(given, str) else given or ["auto"]:
        if isinstance(item, str):
            check_choice("parallel rules", item, ("auto", *RULES))
            chosen = RULES.values() if item == "auto" else [RULES[item]]
            rules += [rule for rule_set in chosen for rule in rule_set]
        else:
            pattern, spec = item
            rules.append((str(pattern), _parsed(spec)))
    return tuple(rules)


def _parsed(spec: Any) -> P | None:
    if spec == "replicated":
        return P()
    if spec == "fsdp":
        return None
    if isinstance(spec, str):
        raise ValueError(f"a sharding rule is 'replicated', 'fsdp' or a list; got {spec!r}")
    parts = [tuple(axes) if isinstance(axes, list | tuple) else axes for axes in spec]
    for axis in [a for axes in parts for a in (axes if isinstance(axes, tuple) else (axes,))]:
        if axis is not None and axis not in AXES:
            raise ValueError(
                f"unknown mesh axis {axis!r} in rule {list(spec)}; valid: {', '.join(AXES)}"
            )
    return P(*parts)
