"""How a network's parameters are laid out in its authors' PyTorch state dict, and both ways between them.

A network's layout is `Weights`: one `Leaf` for each parameter of ours, with the names of theirs and a
`Kind` of rearrangement that has an inverse. What is read is compared name by name and shape by shape
before anything is made of it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = np.ndarray


class WeightsError(ValueError):
    """A state dict that is not one of this network; the message lists the names at fault."""


class Kind(NamedTuple):
    """A rearrangement of one array: `to_ours` from PyTorch's layout, `to_theirs` back."""

    to_ours: Callable[[Array], Array]
    to_theirs: Callable[[Array], Array]


def transposed(*axes: int) -> Kind:
    """The kind that permutes axes: ours[...] = theirs.transpose(axes)."""
    back = tuple(np.argsort(axes))
    return Kind(lambda w: w.transpose(axes), lambda w: w.transpose(back))


SAME = Kind(lambda w: w, lambda w: w)
LINEAR = transposed(1, 0)  # [out, in] -> [in, out]
CONV = transposed(2, 3, 1, 0)  # [out, in, h, w] -> [h, w, in, out]


class Leaf(NamedTuple):
    """One parameter of ours.

    Attributes:
      ours: its name in the parameter tree, `blocks/block/attention/qkv/kernel`.
      theirs: name in the state dict; several: one a layer, stacked on a leading axis of ours.
      kind: how each of theirs is rearranged.
    """

    ours: str
    theirs: str | tuple[str, ...]
    kind: Kind = SAME


class Weights(NamedTuple):
    """The layout of a network.

    Attributes:
      leaves: one for each parameter.
      ignored: patterns (whole names) of entries of theirs that hold no weights: fixed position tables,
        filters, buffers.
      buffers: `() -> name -> array` of those that export writes all the same, because their loader
        asks for them.
    """

    leaves: tuple[Leaf, ...]
    ignored: tuple[str, ...] = ()
    buffers: Callable[[], Mapping[str, Array]] = dict

    def names(self) -> tuple[str, ...]:
        """All names of theirs that are read."""
        return tuple(name for leaf in self.leaves for name in _names(leaf))


def linear(ours: str, theirs: Any, bias: bool = True, kind: Kind = LINEAR) -> list[Leaf]:
    """The leaves of a dense layer or, with `kind=CONV`, of a convolution.

    Args:
      ours: the name of the module, "blocks/block/mlp_in".
      theirs: its name, or one a layer ("blocks.0.mlp.fc1", ...).
      bias: whether it has one.
      kind: of the kernel.
    """
    leaves = [Leaf(f"{ours}/kernel", _suffixed(theirs, ".weight"), kind)]
    return leaves + [Leaf(f"{ours}/bias", _suffixed(theirs, ".bias"))] if bias else leaves


def stacked(pattern: str, depth: int) -> tuple[str, ...]:
    """`pattern` with `{i}` counted through the layers of a stack."""
    return tuple(pattern.format(i=i) for i in range(depth))


def import_state(weights: Weights, state: Mapping[str, Array], abstract: Any) -> Any:
    """Parameters like `abstract`, float32 NumPy arrays, from a state dict.

    Args:
      weights: the layout.
      state: name -> array, in PyTorch's layout.
      abstract: the parameter tree of our network (anything with shapes).

    Raises:
      WeightsError: names that are missing or unknown, or arrays of another shape; all are listed.
    """
    wanted = {
        _path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    _check_layout(weights, wanted)
    known = set(weights.names())
    missing = sorted(known - set(state))
    unknown = sorted(
        name
        for name in set(state) - known
        if not any(re.fullmatch(pattern, name) for pattern in weights.ignored)
    )
    if missing or unknown:
        raise WeightsError(
            "the weights are of another network or size:"
            + _listed(missing, "missing")
            + _listed(unknown, "unknown")
        )
    made, wrong = {}, []
    for leaf in weights.leaves:
        parts = [np.asarray(state[name]) for name in _names(leaf)]
        if len({part.shape for part in parts}) > 1:
            shown = ", ".join(f"{n} {p.shape}" for n, p in zip(_names(leaf), parts))
            wrong.append(f"{leaf.ours}: layers of different shapes ({shown})")
            continue
        try:
            parts = [np.asarray(leaf.kind.to_ours(part), np.float32) for part in parts]
        except ValueError as error:
            wrong.append(f"{_names(leaf)[0]} has shape {parts[0].shape}: {error}")
            continue
        value = parts[0] if isinstance(leaf.theirs, str) else np.stack(parts)
        if value.shape != wanted[leaf.ours]:
            wrong.append(
                f"{_names(leaf)[0]} has shape {tuple(np.shape(state[_names(leaf)[0]]))}, which is"
                f" {value.shape} here where {leaf.ours} has {wanted[leaf.ours]}"
            )
        made[leaf.ours] = value
    if wrong:
        raise WeightsError("the weights are of another size:" + _listed(wrong, "different"))
    return jax.tree_util.tree_map_with_path(lambda path, _: made[_path(path)], abstract)


def export_state(weights: Weights, params: Any) -> dict[str, Array]:
    """The state dict of parameters of ours: the inverse of `import_state`, float32.

    Raises:
      WeightsError: parameters of another network.
    """
    ours = {_path(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(params)}
    _check_layout(weights, ours)
    state = {name: np.asarray(value, np.float32) for name, value in weights.buffers().items()}
    for leaf in weights.leaves:
        value = ours[leaf.ours]
        parts = [value] if isinstance(leaf.theirs, str) else value
        for name, part in zip(_names(leaf), parts, strict=True):
            state[name] = np.asarray(leaf.kind.to_theirs(part), np.float32, order="C")
    return state


def _check_layout(weights: Weights, ours: Mapping[str, Any]) -> None:
    laid_out = {leaf.ours for leaf in weights.leaves}
    missing, unknown = sorted(laid_out - set(ours)), sorted(set(ours) - laid_out)
    if missing or unknown:
        raise WeightsError(
            "the parameters are of another network:"
            + _listed(missing, "missing")
            + _listed(unknown, "unknown")
        )


def _names(leaf: Leaf) -> tuple[str, ...]:
    return (leaf.theirs,) if isinstance(leaf.theirs, str) else leaf.theirs


def _suffixed(theirs: Any, suffix: str) -> Any:
    return theirs + suffix if isinstance(theirs, str) else tuple(name + suffix for name in theirs)


def _path(path: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _listed(names: Iterable[str], what: str, most: int = 20) -> str:
    names = list(names)
    if not names:
        return ""
    more = f"\n    and {len(names) - most} more" if len(names) > most else ""
    return f"\n  {what}: {len(names)}\n    " + "\n    ".join(names[:most]) + more
