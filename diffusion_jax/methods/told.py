"""A network that is told the time in the units of its authors, as every method takes it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from diffusion_jax.processes import preconditioning
from diffusion_jax.registry import check_choice


@dataclasses.dataclass(frozen=True, eq=False)
class Told:
    """A network module whose t is `preconditioning.time_input` of the method's t; otherwise the module.

    Args:
      module: the network, called as `apply(variables, x, t, ...)`.
      process: the process that t belongs to.
      kind: one of `preconditioning.TIME_INPUTS`.
    Raises:
      ValueError: an unknown kind, or one that the process does not have.
    """

    module: Any
    process: Any
    kind: str

    time_input = "time"  # what is still to be done

    def __post_init__(self):
        check_choice("time_input", self.kind, preconditioning.TIME_INPUTS)
        self._own(0.5)

    def _own(self, t):
        return None if t is None else preconditioning.time_input(self.kind, self.process, t)

    def __getattr__(self, name):
        if name.startswith("__") or name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)

    def init(self, key, x, t, **options):
        """The module's `init`."""
        return self.module.init(key, x, self._own(t), **options)

    def apply(self, variables, *inputs, **options):
        """The module's `apply`; another method of it (`method=`) is called as it is."""
        if "method" not in options:
            x, t, *rest = inputs
            inputs = (x, self._own(t), *rest)
        return self.module.apply(variables, *inputs, **options)

    def clone(self, **fields):
        """The module with other fields, told the same."""
        return dataclasses.replace(self, module=self.module.clone(**fields))

    def __hash__(self):
        return hash((self.module, self.kind, type(self.process)))

    def __eq__(self, other):
        if not isinstance(other, Told) or (self.module, self.kind) != (other.module, other.kind):
            return False
        mine, theirs = (jax.tree.flatten(told.process) for told in (self, other))
        return mine[1] == theirs[1] and all(map(np.array_equal, mine[0], theirs[0]))
