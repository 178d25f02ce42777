"""Explicit solvers as tables, and the kernel that runs every one of them.

A solver is a *general linear method*: at each network call the next point, the next value of each
register and the entry pushed on the history are linear combinations of what is known. A builder runs
its solver once on symbolic linear forms (`Form`), so it reads like the paper; `Rows.sampler` turns the
recorded rows into a static structure (which columns exist) and float64 coefficients (what they hold).

Basis of row i: `Y` the point where the network is called; registers (`A`, the anchor, is almost the
only one); `SRC` the source of a bridge; `ONE`; `H(k)` the k-th newest history entry; `D` the network's
x0_hat; `Z` fresh noise. The result is y after the last row. An optional init row, without a call,
makes the first y from `X` (the x handed in), `SRC`, `ONE` and `Z`. A bridge is handed its source, which
then is `X` too, or `Pinned(source, x)`.

Structure rule: a column that is zero in every row is dropped, one that is 1 in every row is a copy,
the rest are traced. Solvers of one structure, length, shape and dtype share one compiled program, and
XLA never multiplies by a zero it cannot see.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import batch_size, normal_per_example
from diffusion_jax.samplers.scan import Sampler


class Form(dict):
    """A linear combination of basis names: name -> coefficient (float, or array over data axes)."""

    __array_ufunc__ = None  # a NumPy scalar on the left defers to __rmul__

    def __add__(self, other):
        total = Form(self)
        for name, value in other.items():
            total[name] = total[name] + value if name in total else value
        return total

    def __radd__(self, other):  # lets sum() start from 0
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor):
        return Form({name: factor * value for name, value in self.items()})

    __rmul__ = __mul__

    def __truediv__(self, factor):
        return Form({name: value / factor for name, value in self.items()})

    def __neg__(self):
        return -1.0 * self

    def __sub__(self, other):
        return self + -1.0 * other


def H(k: int) -> Form:
    """The k-th newest history entry, k = 1, 2, ..."""
    return Form({f"h{k}": 1.0})


def register_form(name: str) -> Form:
    """The value of a register of one's own (`Rows.add(..., name=form)` writes it)."""
    return Form({name: 1.0})


Y, A, SRC, ONE, D, Z, X = (Form({n: 1.0}) for n in ("y", "anchor", "src", "one", "D", "z", "x"))


class Structure(NamedTuple):
    """The static part of a table.

    Attributes:
      rows: for each output (y, registers, push) the columns it reads, each ("name", kind) with kind
        "1" a copy, "s" a scalar coefficient, "v" a coefficient with data axes.
      history: number of history entries.
      noise: None, "some" or "all" rows draw.
      init: for each output of the init row its columns, empty without one.
      source: whether x_init is a source that stays available.
    """

    rows: tuple
    history: int
    noise: str | None
    init: tuple
    source: bool


class Pinned(NamedTuple):
    """x_init of a bridge sampler that needs more than the source: both `[B, ...]`, of one shape.

    Attributes:
      source: x1, the end where the bridge is pinned.
      x: the point to start from, or what the sampler says (DBIM: its booting noise).
    """

    source: Any
    x: Any


class LinearState(NamedTuple):
    """Scan state of a table: the iterate, registers by name, history (newest first), the source."""

    x: Any
    registers: dict[str, Any]
    history: tuple
    source: Any


class Rows:
    """Collects the rows of a table.

    Args:
      init: forms of the init row by output name, e.g. `{"y": X + s * Z}`.
      source: whether x_init is the source of a bridge.
      centre: write `c_y y + c_s src` as `c_y (y - src) + (c_y + c_s) src` with the bracket summed in
        float64; for solvers whose coefficients are huge and cancel (DDBM near the source).
    """

    def __init__(self, init=None, source: bool = False, centre: bool = False):
        self.rows: list[dict[str, Form]] = []
        self.points: list[dict] = []
        self.init, self.source, self.centre = init or {}, source, centre

    def add(
        self, point, y: Form, anchor: Form | None = None, push: Form | None = None, **registers
    ):
        """One network call: where (`point`), and what is written afterwards."""
        row = {"y": y, "anchor": anchor or Form(), **registers, "push": push or Form()}
        if self.centre:
            row = {output: _centred(form) for output, form in row.items()}
        self.rows.append(row)
        self.points.append(point)

    def sampler(self, end, *, order: int | None = None, name: str = "") -> Sampler:
        """The finished sampler; `end` is the point of the result."""
        structure, scalars, arrays, draws = _compress(self)
        points = _stack_points([*self.points, end])
        xs = {
            "scalars": scalars,
            "arrays": arrays,
            "point": {k: v[:-1] for k, v in points.items()},
            "next": {k: v[1:] for k, v in points.items()},
        }
        if structure.noise == "some":
            xs["draw"] = draws
        start = {output: dict(form) for output, form in self.init.items()}
        drawn_at_start = any("z" in form for form in self.init.values())
        return Sampler(
            init=LinearInit(structure),
            step=LinearStep(structure),
            finish=_result,
            xs=xs,
            start=start,
            nfe=len(self.rows),
            prepare=check_x_init,
            stochastic=structure.noise is not None or drawn_at_start,
            order=order,
            name=name,
        )


def _centred(form: Form) -> Form:
    if "src" not in form:  # by name, not by value: whether a bracket cancels exactly is rounding
        return form
    out = Form(form)
    for name in ("y", "anchor"):
        if name in out:
            value = out.pop(name)
            out["src"] = out["src"] + value
            out[f"{name}-src"] = value
    return out


def _stack_points(points: Sequence[dict]) -> dict[str, np.ndarray]:
    shared = set.intersection(*(set(p) for p in points))
    return {k: np.asarray([np.asarray(p[k], np.float64) for p in points]) for k in sorted(shared)}


def _compress(rows: Rows):
    """Static structure and float64 coefficients of the recorded rows."""
    recorded = rows.rows
    used = {
        name
        for row in recorded
        for form in row.values()
        for name, value in form.items()
        if np.any(np.asarray(value) != 0)
    }
    history = max(
        (int(name[1:]) for name in used if name[0] == "h" and name[1:].isdigit()), default=0
    )
    registers = [
        output
        for output in recorded[0]
        if output not in ("y", "push") and used & {output, f"{output}-src"}
    ]
    outputs = ["y", *registers, *(["push"] if history else [])]
    columns = ["y", "y-src", *registers, "anchor-src", "src", "one"]
    columns += [f"h{k + 1}" for k in range(history)] + ["D", "z"]
    pattern, scalars, arrays = [], [], []
    for output in outputs:
        kinds = []
        for column in columns:
            values = [np.asarray(row[output].get(column, 0.0), np.float64) for row in recorded]
            if not any(np.any(v != 0) for v in values):
                continue
            if all(np.all(v == 1) for v in values):
                kinds.append((column, "1"))
            elif all(v.ndim == 0 for v in values):
                kinds.append((column, "s"))
                scalars.append(np.stack(values))
            else:
                kinds.append((column, "v"))
                arrays.append(np.stack(np.broadcast_arrays(*values)))
        pattern.append((output, tuple(kinds)))
    scalars = np.stack(scalars, axis=1) if scalars else np.zeros((len(recorded), 0))
    for kind, table in (("scalars", scalars), *(("arrays", a) for a in arrays)):
        bad = ~np.isfinite(table.reshape(len(recorded), -1)).all(axis=1)
        if bad.any():
            raise ValueError(
                f"the solver's {kind} are not finite at step {int(bad.argmax())} of {len(recorded)}: "
                "two grid points coincide, or the grid reaches a time where the log-SNR is infinite"
            )
    draws = np.array(
        [any(np.any(np.asarray(row[o].get("z", 0.0)) != 0) for o in outputs) for row in recorded]
    )
    noise = None if not draws.any() else "all" if draws.all() else "some"
    init = tuple((output, tuple(form)) for output, form in rows.init.items())
    structure = Structure(tuple(pattern), history, noise, init, rows.source)
    return structure, scalars, tuple(arrays), draws


def check_x_init(x):
    """x_init as JAX arrays. Raises ValueError unless it holds floats, of one shape in a `Pinned`."""
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise ValueError("x_init holds no array")
    for leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"x_init must be floating-point arrays [B, ...]; got {dtype or type(leaf).__name__}"
            )
    if isinstance(x, Pinned) and not _same_shapes(x.source, x.x):
        got, need = jax.tree.map(jnp.shape, x.x), jax.tree.map(jnp.shape, x.source)
        raise ValueError(f"Pinned: x has shape {got}, the source {need}")
    return jax.tree.map(jnp.asarray, x)


def _result(state: LinearState):
    return state.x


def _combine(columns, coefficients, basis, like):
    """Sum of coefficient * basis entry, leaf by leaf, in float32 or better."""
    terms = [basis[name] for name, _ in columns]

    def leaf_sum(leaf, *values):
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        total = None
        for coefficient, value in zip(coefficients, values, strict=True):
            value = jnp.asarray(value).astype(dtype)
            term = value if coefficient is None else jnp.asarray(coefficient, dtype) * value
            total = term if total is None else total + term
        if total is None:
            return jnp.zeros_like(leaf)
        return jnp.broadcast_to(total, leaf.shape).astype(leaf.dtype)

    whole = jax.tree.structure(like)
    terms = [
        t if jax.tree.structure(t) == whole else jax.tree.map(lambda _, t=t: t, like) for t in terms
    ]
    return jax.tree.map(leaf_sum, like, *terms)


def _add(value, coefficient, z):
    """`value + coefficient * z` leaf by leaf; a coefficient of None is 1."""

    def leaf(v, noise):
        dtype = jnp.promote_types(v.dtype, jnp.float32)
        noise = noise.astype(dtype)
        term = noise if coefficient is None else jnp.asarray(coefficient, dtype) * noise
        return (v.astype(dtype) + term).astype(v.dtype)

    return jax.tree.map(leaf, value, z)


def _same_shapes(value, x) -> bool:
    (a, tree), (b, whole) = jax.tree.flatten(value), jax.tree.flatten(x)
    return tree == whole and [jnp.shape(v) for v in a] == [jnp.shape(v) for v in b]


def _given_noise(noise, x):
    """Noise of `with_noise` for one row; a broadcast would give examples the same draw."""
    if not _same_shapes(noise, x):
        got, need = jax.tree.map(jnp.shape, noise), jax.tree.map(jnp.shape, x)
        raise ValueError(f"with_noise: the noise of a row has shape {got}, x has {need}")
    return noise


def _subtract(x, y):
    return jax.tree.map(jnp.subtract, x, y)


@dataclasses.dataclass(frozen=True)
class LinearInit:
    """`Sampler.init` of a table."""

    structure: Structure

    def __call__(self, rng: Callable, start, x) -> LinearState:
        source, x = x if isinstance(x, Pinned) else (x, x)
        if source is not x and not self.structure.source:
            raise ValueError("Pinned(source, x) is for bridges: this sampler takes x alone")
        values = {}
        if self.structure.init:
            basis = {"x": x, "src": source, "one": 1.0}
            if any("z" in columns for _, columns in self.structure.init):
                given = "z" in start
                basis["z"] = _given_noise(start["z"], x) if given else normal_per_example(rng(), x)
            for output, columns in self.structure.init:
                names = [(name, "s") for name in columns]
                coefficients = [start[output][name] for name in columns]
                values[output] = _combine(names, coefficients, basis, x)
        y = values.get("y", x)
        registers = [o for o, _ in self.structure.rows if o not in ("y", "push")]
        zeros = jax.tree.map(jnp.zeros_like, x)
        return LinearState(
            x=y,
            registers={name: values.get(name, y) for name in registers},
            history=(zeros,) * self.structure.history,
            source=source if self.structure.source else None,
        )


@dataclasses.dataclass(frozen=True)
class LinearStep:
    """`Sampler.step` of a table: one network call, then one linear combination for each output."""

    structure: Structure

    def _add_noise(self, drawn, rng, inputs, x):
        """`drawn` is (values, coefficients) of the outputs that draw: values + coefficients * z.

        Where only some rows draw, the others pass their values on untouched.
        """

        def add(values):
            z = _given_noise(inputs["z"], x) if "z" in inputs else normal_per_example(rng(), x)
            return [_add(value, c, z) for value, c in zip(values, drawn[1], strict=True)]

        if "z" in inputs or self.structure.noise == "all":
            return add(drawn[0])
        return jax.lax.cond(inputs["draw"], add, lambda values: values, drawn[0])

    def __call__(self, call: Callable, rng: Callable, state: LinearState, inputs):
        x = state.x
        x0_hat = call(x, inputs["point"])
        if not _same_shapes(x0_hat, x):
            got = jax.tree.map(jnp.shape, x0_hat)
            raise ValueError(f"denoise returned {got} for x of {jax.tree.map(jnp.shape, x)}")
        basis = {"y": x, **state.registers, "src": state.source, "one": 1.0, "D": x0_hat}
        basis |= {f"h{k + 1}": entry for k, entry in enumerate(state.history)}
        for _, columns in self.structure.rows:
            for name, _ in columns:
                if name.endswith("-src") and name not in basis:
                    basis[name] = _subtract(basis[name[:-4]], state.source)
        scalars, arrays, written, noisy, i, j = inputs["scalars"], inputs["arrays"], {}, {}, 0, 0
        for output, columns in self.structure.rows:
            coefficients = []
            for _, kind in columns:
                if kind == "1":
                    coefficients.append(None)
                elif kind == "s":
                    coefficients.append(scalars[i])
                    i += 1
                else:
                    coefficients.append(arrays[j])
                    j += 1
            if columns and columns[-1][0] == "z":  # the last column where it occurs
                noisy[output] = coefficients.pop()
                columns = columns[:-1]
            written[output] = _combine(columns, coefficients, basis, x)
        if noisy:
            values = [written[output] for output in noisy]
            values = self._add_noise((values, list(noisy.values())), rng, inputs, x)
            written |= dict(zip(noisy, values, strict=True))
        pushed = (written["push"],) if self.structure.history else ()
        state = LinearState(
            x=written["y"],
            registers={name: written[name] for name in state.registers},
            history=(pushed + state.history)[: self.structure.history],
            source=state.source,
        )
        return state, x0_hat


def with_noise(sampler: Sampler, noise: Any) -> Sampler:
    """The same table with its random draws replaced by given ones (common random numbers, tests).

    Args:
      sampler: a table sampler.
      noise: `[1 + N, B, ...]` for N steps, a pytree like x; entry 0 belongs to the init row, entry
        i + 1 to step i.
    Raises:
      ValueError: another number of entries; when sampling, an entry of another shape than x.
    """
    if not isinstance(sampler.step, LinearStep):
        raise ValueError(
            f"sampler {sampler.name!r} is not a table: its draws are not additive noise"
        )
    entries = batch_size(noise)
    if entries != sampler.nfe + 1:
        raise ValueError(
            f"noise holds {entries} entries; {sampler.nfe} steps need {sampler.nfe + 1}"
        )
    xs, start = dict(sampler.xs), dict(sampler.start)
    if sampler.step.structure.noise is not None:
        xs["z"] = jax.tree.map(lambda leaf: leaf[1:], noise)
    if any("z" in columns for _, columns in sampler.init.structure.init):
        start["z"] = jax.tree.map(lambda leaf: leaf[0], noise)
    return dataclasses.replace(sampler, xs=xs, start=start, stochastic=False)
