"""Tables: linear forms, the structure rule, and the kernel on random tables against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_checks import plain_run

from diffusion_jax import processes, samplers
from diffusion_jax.samplers import Form, Pinned, Rows, dpm_solver_pp, sample, with_noise
from diffusion_jax.samplers.linear import ONE, SRC, A, D, H, X, Y, Z, register_form

POINT = {"t": 0.5}


def test_forms_are_vectors():
    form = 2.0 * Y - D / 4.0 + np.float64(3.0) * (Z - Y)
    assert form == {"y": -1.0, "D": -0.25, "z": 3.0}
    assert sum([Y, 2 * Y, D]) == {"y": 3.0, "D": 1.0}
    assert -H(2) == {"h2": -1.0}
    assert isinstance(np.float64(2.0) * Y, Form)
    vector = np.array([1.0, 2.0]) * D
    np.testing.assert_array_equal(vector["D"], [1.0, 2.0])
    with pytest.raises(TypeError):
        1 + Y


def test_zero_columns_vanish_and_ones_are_copies():
    rows = Rows()
    rows.add(POINT, Y + 0.0 * D - 2.0 * H(1), anchor=Y, push=D)
    rows.add(POINT, Y + 0.0 * D + 1.0 * A, anchor=Y, push=D)
    sampler = rows.sampler(POINT)
    structure = sampler.step.structure
    assert structure.rows == (
        ("y", (("y", "1"), ("anchor", "s"), ("h1", "s"))),
        ("anchor", (("y", "1"),)),
        ("push", (("D", "1"),)),
    )
    assert structure.history == 1 and structure.noise is None and not sampler.stochastic
    np.testing.assert_array_equal(sampler.xs["scalars"], [[0.0, -2.0], [1.0, 0.0]])


def test_what_no_row_reads_is_not_kept():
    rows = Rows()
    rows.add(POINT, D, anchor=Y, push=D)
    structure = rows.sampler(POINT).step.structure
    assert structure.rows == (("y", (("D", "1"),)),) and structure.history == 0


def test_noise_is_none_some_or_all():
    kinds = {}
    for kind, draws in (("none", (0, 0)), ("some", (1, 0)), ("all", (1, 2))):
        rows = Rows()
        for weight in draws:
            rows.add(POINT, Y + D + weight * Z)
        kinds[kind] = rows.sampler(POINT)
    assert [kinds[k].step.structure.noise for k in kinds] == [None, "some", "all"]
    assert kinds["some"].xs["draw"].tolist() == [True, False] and "draw" not in kinds["all"].xs
    assert [s.stochastic for s in kinds.values()] == [False, True, True]
    x, key = np.ones((2, 3), np.float32), jax.random.key(0)
    for kind, sampler in kinds.items():
        program = str(jax.make_jaxpr(lambda s, k: sample(s, lambda x, t: x, k, x))(sampler, key))
        assert ("cond[" in program) == (kind == "some")  # rows that do not draw cost nothing
        assert ("random_bits" in program) == (kind != "none")
    rows = Rows(init={"y": X + 0.5 * Z})
    rows.add(POINT, Y + D)
    assert rows.sampler(POINT).stochastic  # a draw before the first call counts


def random_table(seed, steps=5, size=3):
    """Everything at once: a register of its own, history of 3, coefficients over data axes, an init row."""
    rng = np.random.default_rng(seed)
    memo = register_form("memo")
    basis = [Y, A, memo, SRC, ONE, H(1), H(2), H(3), D, Z]

    def mix(draws):
        form = sum((0.3 * rng.standard_normal() * term for term in basis[:-1]), Form())
        form = form + rng.standard_normal(size) * D
        return form + rng.standard_normal() * Z if draws else form

    rows = Rows(
        init={"y": 0.7 * X + 0.2 * Z + 0.1 * ONE, "anchor": 2.0 * X, "memo": 0.5 * SRC + Z},
        source=True,
    )
    for i in range(steps):
        draws = i % 2 == 0
        point = {"t": 1.0 - i / steps}
        rows.add(point, mix(draws), anchor=mix(False), push=mix(draws), memo=mix(False))
    return rows.sampler({"t": 0.0})


@pytest.mark.parametrize("seed", (0, 1))
def test_kernel_on_random_tables(seed, x64):
    sampler = random_table(seed)
    rng = np.random.default_rng(seed)
    x, noise = rng.standard_normal((2, 3)), rng.standard_normal((6, 2, 3))
    assert sampler.step.structure.history == 3
    assert {"s", "v"} <= {k for _, columns in sampler.step.structure.rows for _, k in columns}
    expected = plain_run(sampler, lambda x, point: np.tanh(x) * point["t"], x, noise)
    end, path = sample(
        with_noise(sampler, noise),
        lambda x, t: jax.numpy.tanh(x) * t,
        None,
        x,
        trajectory=True,
    )
    np.testing.assert_allclose(path, expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_array_equal(end, path[-1])


def test_centred_columns_say_the_same():
    """`c_y y + c_s src` is `c_y (y - src) + (c_y + c_s) src`; the structure does not depend on rounding."""

    def table(centre, rest):
        rows = Rows(source=True, centre=centre)
        rows.add(POINT, 400.0 * Y - (400.0 - rest) * SRC + 0.1 * D, anchor=Y)
        rows.add(POINT, 3.0 * Y + 2.0 * A + rest * SRC + D, anchor=Y)
        return rows.sampler(POINT)

    x = np.array([[0.3, -0.8]])
    plain, centred = table(False, 0.25), table(True, 0.25)
    ends = [plain_run(s, lambda x, p: np.tanh(x), x)[-1] for s in (plain, centred)]
    np.testing.assert_allclose(*ends, rtol=1e-12)
    columns = dict(centred.step.structure.rows)["y"]
    assert {name for name, _ in columns} == {"y-src", "anchor-src", "src", "D"}
    assert table(True, 0.0).step == centred.step  # a source that cancels keeps its column


def test_float32_is_enough_for_centred_columns():
    """Coefficients of 1e6 that cancel: plain columns lose the answer in float32, centred ones keep it."""
    big, x = 1e6, np.full((1, 2), 0.37, np.float32)
    ends = {}
    for centre in (False, True):
        rows = Rows(source=True, centre=centre)
        rows.add(POINT, Y + 1e-3 * D)
        rows.add(POINT, big * Y - (big - 1.0) * SRC)
        ends[centre] = float(sample(rows.sampler(POINT), lambda x, t: x, None, x)[0, 0])
    exact = 0.37 + big * 1e-3 * 0.37
    assert abs(ends[True] / exact - 1) < 1e-4


def test_options_of_one_structure_are_one_tree():
    one, other = (
        dpm_solver_pp(processes.VP(), 6),
        dpm_solver_pp(processes.Cosine(), 6, kind="taylor"),
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.structure(one) != jax.tree.structure(dpm_solver_pp(processes.VP(), 6, order=3))
    leaves, tree = jax.tree.flatten(one)
    again = tree.unflatten(leaves)
    assert again.nfe == 6 and again.stochastic is False and again.step == one.step


def test_coincident_points_are_named():
    with pytest.raises(ValueError, match=r"not finite at step 2 of 3.*grid points coincide"):
        rows = Rows()
        for weight in (1.0, 2.0, np.inf):
            rows.add(POINT, weight * Y)
        rows.sampler(POINT)


def test_with_noise_checks_what_it_is_given():
    sampler = samplers.ddim(processes.VP(), 3, eta=1.0)
    x = np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match="noise holds 3 entries; 3 steps need 4"):
        with_noise(sampler, np.zeros((3, 2, 4)))
    with pytest.raises(ValueError, match="not a table"):
        with_noise(samplers.first_hitting(processes.Absorbing(4), 3), np.zeros((4, 2, 3)))
    for wrong in ((4, 1, 4), (4,), (4, 2, 5)):
        with pytest.raises(ValueError, match="noise"):
            sample(with_noise(sampler, np.zeros(wrong)), lambda x, t: x, None, x)


def test_with_noise_takes_a_tree():
    sampler = samplers.ddim(processes.VP(), 3, eta=1.0)
    x = {"a": np.ones((2, 4), np.float32), "b": np.ones((2, 1), np.float32)}
    noise = jax.tree.map(lambda v: np.ones((4, *v.shape), np.float32), x)
    ends = sample(with_noise(sampler, noise), lambda x, t: x, None, x)
    alone = sample(with_noise(sampler, noise["a"]), lambda x, t: x, None, x["a"])
    np.testing.assert_allclose(ends["a"], alone, rtol=1e-6)
    assert ends["b"].shape == (2, 1)
    with pytest.raises(ValueError, match="noise holds"):
        with_noise(sampler, jax.tree.map(lambda v: v[1:], noise))


def test_a_bridge_table_takes_the_source_and_another_start():
    source, x = np.ones((2, 3), np.float32), np.full((2, 3), 5.0, np.float32)
    rows = Rows(source=True)
    rows.add({"t": 0.5}, 2.0 * Y + 10.0 * SRC + 0.0 * D)
    table = rows.sampler({"t": 0.0})
    drift = jax.tree_util.Partial(lambda x, t: jnp.zeros_like(x))
    np.testing.assert_array_equal(sample(table, drift, None, Pinned(source, x)), 20.0)
    np.testing.assert_array_equal(sample(table, drift, None, source), 12.0)
    with pytest.raises(ValueError, match="Pinned: x has shape"):
        sample(table, drift, None, Pinned(source, x[:, :2]))
    unpinned = Rows()
    unpinned.add({"t": 0.5}, 2.0 * Y + 0.0 * D)
    with pytest.raises(ValueError, match="for bridges"):
        sample(unpinned.sampler({"t": 0.0}), drift, None, Pinned(source, x))
