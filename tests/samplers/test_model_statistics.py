"""Model statistics: stored ones, closed forms of Gaussian data, the normal equations, files, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from solver_checks import affine_gaussian, mixture_mean

from diffusion_jax import guidance, processes, registry
from diffusion_jax.numerics import pytree_dataclass, split_traced
from diffusion_jax.samplers import ModelStatistics, model_statistics
from diffusion_jax.samplers.model_statistics import _chunk_pass, describe

MODEL = golden("solvers_model")
PROCESSES = {"vp": processes.VP(), "edm": processes.EDM()}
KEY = jax.random.key(3)


@pytree_dataclass
class SmoothMixture:
    """`mixture_mean` with JAX's own softmax: the derivative of a maximum is 0 / 0 where it is recomputed."""

    weights: object
    means: object
    covariances: object

    def at(self, x, point):
        covariances = point["alpha"] ** 2 * self.covariances
        xx, yy = (covariances[:, i, i] + point["sigma"] ** 2 for i in (0, 1))
        xy = covariances[:, 0, 1]
        det = xx * yy - xy**2
        d0, d1 = jnp.moveaxis(x[:, None, :] - point["alpha"] * self.means, -1, 0)
        pulled = jnp.stack([yy * d0 - xy * d1, xx * d1 - xy * d0], -1) / det[:, None]
        logits = jnp.log(self.weights) - 0.5 * (
            jnp.log(det) + d0 * pulled[..., 0] + d1 * pulled[..., 1]
        )
        each = self.means + point["alpha"] * jnp.einsum("kij,bkj->bki", self.covariances, pulled)
        return (jax.nn.softmax(logits, axis=1)[..., None] * each).sum(1)

    def __call__(self, x, t):
        raise AssertionError


MIXTURE = SmoothMixture(MODEL["w"], MODEL["means"], MODEL["covs"])


def mixture_points(num, seed=0):
    rng = np.random.default_rng(seed)
    roots = np.linalg.cholesky(MODEL["covs"])
    k = rng.choice(3, num, p=MODEL["w"])
    return MODEL["means"][k] + (roots[k] @ rng.standard_normal((num, 2, 1)))[..., 0]


@pytest.mark.parametrize("name", PROCESSES)
def test_stored_statistics(name, x64):
    stored = golden(f"solvers_v3_{name}")
    given = {"intervals": 240, "noise": stored["ems_noise"], "t_end": PROCESSES[name].t_min}
    found = model_statistics(
        PROCESSES[name],
        MIXTURE,
        KEY,
        stored["ems_x0"],
        exact_diagonal=True,
        batch_size=100,
        **given,
    )
    assert found.num == 512 and found.shape == (2,) and found.intervals == 240
    np.testing.assert_allclose(found.lam, stored["ems_lam"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.l, stored["ems_l"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.s, stored["ems_s"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.b, stored["ems_b"], rtol=0, atol=1e-9)
    probes = stored["ems_rademacher"][None].astype(float)
    found = model_statistics(
        PROCESSES[name], MIXTURE, KEY, stored["ems_x0"], probe_vectors=probes, **given
    )
    np.testing.assert_allclose(found.l, stored["ems_l_hutchinson"], rtol=0, atol=1e-12)


def test_float32_stays_close():
    stored = golden("solvers_v3_vp")
    found = model_statistics(
        processes.VP(),
        MIXTURE,
        KEY,
        stored["ems_x0"].astype(np.float32),
        intervals=240,
        noise=stored["ems_noise"],
        exact_diagonal=True,
    )
    for name, tolerance in (("l", 1e-6), ("s", 2e-2), ("b", 5e-5)):
        np.testing.assert_allclose(
            getattr(found, name), stored[f"ems_{name}"], rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("name", ("vp", "sub_vp", "cosine", "ve", "edm", "rectified_flow"))
def test_gaussian_data_in_closed_form(name, x64):
    """From any draws l = sigma^2 / (alpha^2 c + sigma^2) and f = -l mean, a constant: s = 0, b = df/dlam.

    That is -l' mean, and what a central difference has in place of l' goes with the mean of x / alpha.
    """
    process = registry.get("process", name)()
    mean, c = np.array([0.6, -0.4, 0.0]), np.array([0.30, 0.02, 1.0])
    model = affine_gaussian(mean, np.diag(c))
    x0, z = np.random.default_rng(0).standard_normal((2, 20, 3))
    found = model_statistics(process, model, KEY, x0, intervals=40, batch_size=8, noise=z)
    t = process.t_of_lam(found.lam)
    exact = process.sigma(t)[:, None] ** 2
    exact = exact / (process.alpha(t)[:, None] ** 2 * c + exact)
    np.testing.assert_allclose(found.l, exact, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(found.s, 0.0)
    slope = -2.0 * exact * (1.0 - exact)
    scaled = x0.mean(axis=0) + np.exp(-found.lam)[:, None] * z.mean(axis=0)
    rest = (np.gradient(found.l, found.lam, axis=0) - slope) * scaled
    np.testing.assert_allclose(found.b, -slope * mean - rest, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ("sub_vp", "rectified_flow", "cosine"))
def test_least_squares_along_the_flow(name, x64):
    """f1 from states carried along the flow by another method: its residual is orthogonal to 1 and f."""
    process = registry.get("process", name)()
    rng = np.random.default_rng(1)
    x0, z = mixture_points(60), rng.standard_normal((60, 2))
    start, end = (float(process.t_of_lam(v)) for v in (-2.0, 3.0))
    found = model_statistics(
        process,
        MIXTURE,
        KEY,
        x0,
        intervals=50,
        noise=z,
        t_start=start,
        t_end=end,
        exact_diagonal=True,
    )
    slope = np.gradient(found.l, found.lam, axis=0)

    def noise_term(y, lam):
        """e^-lam eps at x = alpha y."""
        point = process.point(np.asarray(process.t_of_lam(lam)))
        d = mixture_mean(point["alpha"] * y, point, MODEL["w"], MODEL["means"], MODEL["covs"])
        return y - d

    def carried(y, lam, h):
        k1 = -noise_term(y, lam)
        k2 = -noise_term(y + 0.5 * h * k1, lam + 0.5 * h)
        k3 = -noise_term(y + 0.5 * h * k2, lam + 0.5 * h)
        k4 = -noise_term(y + h * k3, lam + h)
        return y + h / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)

    def f(i, shift):
        lam, y = found.lam[i], x0 + np.exp(-found.lam[i]) * z
        y = carried(y, lam, shift) if shift else y
        return noise_term(y, lam + shift) - (found.l[i] + shift * slope[i]) * y

    for i in (3, 20, 44):
        rate = (f(i, 1e-3) - f(i, -1e-3)) / 2e-3
        rest = rate - found.s[i] * f(i, 0.0) - found.b[i]
        size, other = (np.sqrt((v**2).mean(axis=0)) for v in (rest, f(i, 0.0)))
        assert size.min() > 1e-3  # there is something left to be orthogonal
        assert (np.abs(rest.mean(axis=0)) < 2e-3 * size).all()
        assert (np.abs((rest * f(i, 0.0)).mean(axis=0)) < 2e-3 * size * other).all()


def test_l_is_one_at_the_noise_and_nothing_at_the_data():
    found = model_statistics(processes.VP(), MIXTURE, KEY, mixture_points(256).astype(np.float32))
    assert found.l[0].min() > 0.999 and np.abs(found.l[-1]).max() < 0.01
    assert found.intervals == 120 and (found.t_start, found.t_end) == (1.0, 1e-3)


def test_chunks_and_their_size_change_nothing(x64):
    x0 = mixture_points(41)
    options = {"intervals": 12, "probes": 2}
    whole = model_statistics(processes.VP(), MIXTURE, KEY, x0, batch_size=64, **options)
    steps = []
    parts = model_statistics(
        processes.VP(),
        MIXTURE,
        KEY,
        x0,
        batch_size=9,
        progress=lambda done, num: steps.append((done, num)),
        **options,
    )
    assert steps == [(9, 41), (18, 41), (27, 41), (36, 41), (41, 41)]
    for name in "lsb":
        np.testing.assert_allclose(
            getattr(parts, name), getattr(whole, name), rtol=1e-8, atol=1e-10
        )
    other = model_statistics(processes.VP(), MIXTURE, jax.random.key(4), x0, **options)
    assert np.abs(other.l - whole.l).max() > 1e-3


def test_conditions_go_with_their_samples(x64):
    """Chunks get their own labels: the same as one chunk with all of them closed over."""
    model = affine_gaussian(np.array([0.5, -0.2]), np.diag([0.3, 0.1]))
    labels, vp, told = np.arange(30) % 3, processes.VP(), []
    x0 = mixture_points(30) + labels[:, None]

    def of(chunk):
        told.append(np.asarray(chunk["label"]))
        return Shifted(model, chunk["label"])

    found = model_statistics(
        vp, of, KEY, x0, conditions={"label": labels}, intervals=10, batch_size=8
    )
    np.testing.assert_array_equal(np.concatenate(told)[:30], labels)
    whole = model_statistics(vp, Shifted(model, labels), KEY, x0, intervals=10, batch_size=30)
    for name in "lsb":
        np.testing.assert_allclose(
            getattr(found, name), getattr(whole, name), rtol=1e-8, atol=1e-10
        )
    other = model_statistics(vp, Shifted(model, labels[::-1]), KEY, x0, intervals=10, batch_size=30)
    assert np.abs(other.b - whole.b).max() > 0.01


@dataclasses.dataclass
class Shifted:
    model: object
    label: object

    def at(self, x, point):
        shift = jnp.asarray(self.label, x.dtype)[:, None]
        return self.model.at(x - point["alpha"] * shift, point) + shift

    def __call__(self, x, t):
        raise AssertionError


jax.tree_util.register_dataclass(Shifted, ["model", "label"], [])


def test_pixels_that_never_change_have_s_zero():
    """The second coordinate is constant in the data, and the model knows it; clipping makes it exact."""

    def model(x, t):
        return jnp.concatenate([jnp.tanh(x[:, :1]), jnp.full_like(x[:, 1:], -1.3)], axis=1)

    x0 = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32).clip(-1, 1)
    x0[:, 1] = -1.0
    found = model_statistics(processes.VP(), guidance.clip(model), KEY, x0, intervals=20)
    np.testing.assert_array_equal(found.l[:, 1], 1.0)
    np.testing.assert_array_equal(found.s[:, 1], 0.0)
    np.testing.assert_allclose(found.b[:, 1], 0.0, atol=1e-6)
    assert np.abs(found.s[:, 0]).max() <= 5.0


def largest_array(jaxpr):
    """Elements of the largest array anywhere in a program."""
    largest = 0
    for equation in jaxpr.eqns:
        largest = max([largest, *(int(np.prod(v.aval.shape)) for v in equation.outvars)])
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    largest = max(largest, largest_array(inner))
    return largest


def test_no_array_has_both_levels_and_samples():
    """The walk over lam keeps moments only; one program serves all chunks."""
    levels, batch, shape = 40, 16, (8, 8)
    traces = []

    def model(x, t):
        traces.append(1)
        return jnp.tanh(x) * (1 - t)

    arrays, static = split_traced(model)
    table = {"t": 0.5, "alpha": 0.8, "sigma": 0.6, "dalpha": 1.0, "dsigma": 1.0}
    table = {k: np.full(levels, v, np.float32) for k, v in table.items()}
    x = np.zeros((batch, *shape), np.float32)
    program = jax.make_jaxpr(_chunk_pass, static_argnums=1)(
        arrays, static, x, x, x[None], np.ones(batch, np.float32), table, table
    )
    biggest = max(levels, batch) * 64
    assert largest_array(program.jaxpr) <= biggest < levels * batch * 64
    counts = []
    for num in (32, 160):
        before = len(traces)
        x0 = np.random.default_rng(0).standard_normal((num, *shape)).astype(np.float32)
        model_statistics(processes.VP(), model, KEY, x0, intervals=4, batch_size=32)
        counts.append(len(traces) - before)
    assert counts[0] == counts[1]


def some(shape=(2, 3), process=None):
    lam = np.linspace(-5.0, 4.0, 7)
    values = np.random.default_rng(0).standard_normal((3, 7, *shape))
    about = describe(process or processes.VP())
    return ModelStatistics(lam, *values, about, 1.0, 1e-3, 99, "abc")


def test_files_hold_everything(tmp_path):
    path, statistics = tmp_path / "statistics.npz", some()
    statistics.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.npz"]
    read = ModelStatistics.load(path)
    for field in dataclasses.fields(statistics):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(statistics, field.name))
    with np.load(path, allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored)


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "statistics.npz"
    some((1,)).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    contents = [b"", b"not a file of ours", whole[: len(whole) // 2], whole[:-1]]
    for _ in range(60):  # one byte changed: an error, or nothing that matters
        at = int(rng.integers(len(whole)))
        contents.append(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            read = ModelStatistics.load(path)
        except ValueError as error:
            refused += 1
            assert "statistics.npz" in str(error) and "\n" not in str(error)
        else:
            np.testing.assert_array_equal(read.l, some((1,)).l)
    assert refused > 30
    np.savez(path, lam=np.arange(3.0))
    with pytest.raises(ValueError, match="another kind or version"):
        ModelStatistics.load(path)
    np.savez(path, format=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="no model statistics"):
        ModelStatistics.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ModelStatistics.load(tmp_path / "nowhere.npz")


def test_another_process_or_shape_is_refused():
    statistics = some()
    statistics.check(processes.VP(), (2, 3))
    statistics.check(processes.VP(t_min=1e-4))  # the same schedule
    with pytest.raises(ValueError, match=r"beta_max=20.0.*beta_max=12.0"):
        statistics.check(processes.VP(beta_max=12.0))
    with pytest.raises(ValueError, match=r"VP.*EDM"):
        statistics.check(processes.EDM())
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4,\)"):
        statistics.check(processes.VP(), (4,))
    with pytest.raises(ValueError, match="VPBridge"):
        statistics.check(processes.VPBridge())
    ModelStatistics.data_prediction(processes.VP()).check(processes.VP(), (4,))


def test_mistakes():
    vp, x0 = processes.VP(), mixture_points(8).astype(np.float32)

    def ask(match, data=x0, model=MIXTURE, process=vp, **options):
        with pytest.raises(ValueError, match=match):
            model_statistics(process, model, KEY, data, **options)

    ask("intervals", intervals=0)
    ask("batch_size", batch_size=0)
    ask("probes", probes=0)
    ask("t_start", t_start=0.1, t_end=0.2)
    ask("two floating-point samples", data=x0[:1])
    ask("two floating-point samples", data=np.zeros((4, 2), int))
    ask("noise", noise=np.zeros((7, 2)))
    ask("probe_vectors", probe_vectors=np.zeros((8, 2)))
    ask("VPBridge", process=processes.VPBridge())
    ask("not finite at lam", model=lambda x, t: jnp.log(x - 100.0), intervals=4)
    with pytest.raises(ValueError, match="increase"):
        dataclasses.replace(some(), lam=np.linspace(4.0, -5.0, 7))
    with pytest.raises(ValueError, match="N \\+ 1"):
        dataclasses.replace(some(), l=np.zeros((6, 2, 3)))
    with pytest.raises(ValueError, match="finite"):
        dataclasses.replace(some(), b=np.full((7, 2, 3), np.nan))
