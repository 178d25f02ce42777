"""Names -> constructors.

Each *kind* ("process", "sampler", "network", ...) is a namespace of its own. Modules register their
constructors on import; looking a name up imports the package of its kind first, so that nothing has
to be imported by hand before a name can be used.
"""

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

# The package whose import registers every name of the kind.
_HOMES: Mapping[str, str] = {
    "process": "diffusion_jax.processes",
    "schedule": "diffusion_jax.processes",
    "weighting": "diffusion_jax.objectives",
    "times": "diffusion_jax.objectives",
    "time_grid": "diffusion_jax.samplers",
    "sampler": "diffusion_jax.samplers",
    "network": "diffusion_jax.networks",
    "method": "diffusion_jax.methods",
    "data": "diffusion_jax.data",
    "weights": "diffusion_jax.interop",
}


class UnknownName(ValueError):
    """A name that is not registered; the message holds the nearest match and the valid names."""


class Entry(NamedTuple):
    """A registered constructor and what is declared about it (`family`, `order`, `paper`, ...)."""

    name: str
    build: Callable[..., Any]
    meta: dict[str, Any]


_ENTRIES: dict[str, dict[str, Entry]] = {}


def register(kind: str, name: str, **meta: Any) -> Callable[[Callable], Callable]:
    """Decorator: makes a constructor known under `name`. A second registration is refused.

    Raises:
      ValueError: the name is taken by another constructor, or the kind is unknown.
    """
    if kind not in _HOMES:
        raise ValueError(f"unknown kind {kind!r}; kinds: {', '.join(sorted(_HOMES))}")

    def wrap(build: Callable) -> Callable:
        names_of_kind = _ENTRIES.setdefault(kind, {})
        if name in names_of_kind and (
            names_of_kind[name].build.__module__,
            names_of_kind[name].build.__qualname__,
        ) != (build.__module__, build.__qualname__):
            raise ValueError(f"{kind} {name!r} is registered already")
        names_of_kind[name] = Entry(name, build, dict(meta))
        return build

    return wrap


def closest(value: str, valid) -> str:
    """The tail of an error message: `; did you mean 'x'? valid: a, b, x`."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(value), valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} valid: {', '.join(valid)}"


def check_choice(name: str, value: Any, valid: Iterable[Any]) -> None:
    """Raises ValueError: `<name> must be one of a, b, c; got 'x'; did you mean 'a'?` for what is none."""
    valid = list(valid)
    if any(v == value and isinstance(v, bool) == isinstance(value, bool) for v in valid):
        return  # True is no order, and 1 no flag
    near = difflib.get_close_matches(str(value), [v for v in valid if isinstance(v, str)], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(map(str, valid))
    raise ValueError(f"{name} must be one of {listed}; got {value!r}{hint}")


def entry(kind: str, name: str) -> Entry:
    """The entry of a name.

    Raises:
      UnknownName: no such name of this kind.
    """
    if kind not in _HOMES:
        raise UnknownName(f"unknown kind {kind!r}{closest(kind, _HOMES)}")
    importlib.import_module(_HOMES[kind])
    found = _ENTRIES.get(kind, {})
    if name not in found:
        raise UnknownName(f"unknown {kind} {name!r}{closest(name, found)}")
    return found[name]


def get(kind: str, name: str) -> Callable[..., Any]:
    """The constructor registered under a name. Raises `UnknownName`."""
    return entry(kind, name).build


def names(kind: str, **where: Any) -> tuple[str, ...]:
    """All names of a kind, sorted; `where` keeps those whose meta data has these values."""
    if kind not in _HOMES:
        raise UnknownName(f"unknown kind {kind!r}{closest(kind, _HOMES)}")
    importlib.import_module(_HOMES[kind])
    found = _ENTRIES.get(kind, {})
    return tuple(
        sorted(n for n, e in found.items() if all(e.meta.get(k) == v for k, v in where.items()))
    )
