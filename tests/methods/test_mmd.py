"""MMD fine-tuning: its gradient, its memory, what it lowers, and what it refuses."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_jit import quick_jit
from training.toy import run_python

from diffusion_jax import methods, objectives, oracles, processes, run
from diffusion_jax.data import digits
from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.evaluation import Classifier, kernel_distance, train_classifier
from diffusion_jax.evaluation.classifier import Settings
from diffusion_jax.methods import Context
from diffusion_jax.methods.base import OBJECTIVE
from diffusion_jax.networks import MLP
from diffusion_jax.objectives.features import Features
from diffusion_jax.processes import VP

B = 12
POINTS = DataSpec(kind="points", elements={"points": Element((2,), "float32")})


@dataclasses.dataclass(frozen=True)
class Shift:
    """`x0 = gain x + shift`, for points and images."""

    num_classes: int | None = None

    def init(self, key, x, t, *, label=None):
        return {"params": {"gain": jnp.float32(0.9), "shift": jnp.zeros(x.shape[1:], jnp.float32)}}

    def apply(self, variables, x, t, *, label=None, train=False, rngs=None):
        assert not train
        p = variables["params"]
        return p["gain"] * x + p["shift"][None]


def points_batch(num=B, mean=1.5, seed=0):
    x = np.random.default_rng(seed).normal(size=(num, 2)) * 0.3 + [mean, -mean]
    return {"points": jnp.asarray(x, jnp.float32), "index": jnp.arange(num, dtype=jnp.int32)}


def shift_method(**options):
    options = {"parameterization": "x0", "clip": False, "nfe": 3, **options}
    return methods.mmd(VP(), Shift(), POINTS, **options)


def by_hand(params, noise, batch, steps=3):
    """The loss written out: DDIM on the log-SNR grid, step by step, then pairs."""
    vp = VP()
    lam = np.linspace(vp.lam(1.0), vp.lam(1e-3), steps + 1)
    t = np.asarray(vp.t_of_lam(lam))
    x = noise
    for a, b in itertools.pairwise(t):
        x0 = params["gain"] * x + params["shift"]
        x = vp.alpha(b) * x0 + vp.sigma(b) * (x - vp.alpha(a) * x0) / vp.sigma(a)
    y = batch["points"]
    k = lambda u, v: (u @ v.T / 2 + 1) ** 3
    n = len(y)
    off = lambda m: (m.sum() - jnp.trace(m)) / (n * (n - 1))
    return off(k(x, x)) + off(k(y, y)) - 2 * k(x, y).mean()


@pytest.mark.slow
def test_loss_and_gradient_of_the_unrolled_sampler(x64):
    method, batch = shift_method(), points_batch()
    params = {"gain": jnp.float64(0.8), "shift": jnp.asarray([0.3, -0.2], jnp.float64)}
    key = jax.random.key(4)
    noise = VP().prior(jax.random.fold_in(key, OBJECTIVE), (B, 2)).astype(jnp.float32)
    loss = lambda p: method.loss(p, key, batch, Context(batch_size=B))[0]
    value, slope = jax.value_and_grad(loss)(params)
    wanted, expected = jax.value_and_grad(by_hand)(params, noise.astype(jnp.float64), batch)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), slope, expected)
    # rematerialised or not: the same gradient
    plain = shift_method(remat=False)
    other = jax.grad(lambda p: plain.loss(p, key, batch, Context(batch_size=B))[0])(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), slope, other)


@pytest.mark.slow
def test_fine_tuning_three_steps_of_the_exact_model_reaches_the_noise_level():
    """On a mixture the exact denoiser's 3-step samples are far from the data; tuned ones are not."""
    process = VP()
    means = np.array([[-0.8, 0.3], [0.7, 0.8], [0.2, -0.9]])
    exact = oracles.GaussianMixture(
        process, np.full(3, 1 / 3), means, np.tile(0.01 * np.eye(2), (3, 1, 1))
    )

    @dataclasses.dataclass(frozen=True)
    class Corrected:
        """The exact model and a small correction, quadratic in x, for each of the three times."""

        num_classes: int | None = None

        def init(self, key, x, t, *, label=None):
            return {"params": jnp.zeros((3, 6, 2), jnp.float32)}

        def apply(self, variables, x, t, *, label=None, train=False, rngs=None):
            u, v = x[:, :1], x[:, 1:]
            basis = jnp.concatenate([jnp.ones_like(u), u, v, u * u, u * v, v * v], axis=1)
            t = jnp.broadcast_to(t, x.shape[:1])
            at = jnp.argmin(jnp.abs(t[:, None] - jnp.asarray(TIMES)[None]), axis=1)
            c = jnp.tanh(basis)[:, :, None] * variables["params"][at]
            return exact(x, t) + c.sum(axis=1)

    method = methods.mmd(
        process, Corrected(), POINTS, parameterization="x0", clip=False, nfe=3, kernel="rbf",
        kernel_options={"gamma": 1.0}, sampler_options={"grid": "uniform"},
    )  # fmt: skip
    TIMES = np.asarray(method.default_sampler.times, np.float32)
    optimizer = optax.adam(2e-2)

    def batch_of(key, num=256):
        return {"points": exact.sample(key, num), "index": jnp.arange(num, dtype=jnp.int32)}

    @jax.jit
    def update(carry, key):
        params, state = carry
        batch = batch_of(jax.random.fold_in(key, 1))
        slope = jax.grad(lambda p: method.loss(p, key, batch, Context(batch_size=256))[0])(params)
        step, state = optimizer.update(slope, state)
        return (optax.apply_updates(params, step), state), None

    params = method.init(jax.random.key(0), batch_of(jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), 150)
    (tuned, _), _ = jax.jit(lambda c: jax.lax.scan(update, c, keys))(
        (params, optimizer.init(params))
    )

    @jax.jit
    def held_out(params):
        batch = batch_of(jax.random.key(77), 1500)
        return method.loss(params, jax.random.key(78), batch, Context(batch_size=1500))[0]

    real = [exact.sample(jax.random.key(s), 1500) for s in range(100, 112)]
    k = objectives.build_kernel("rbf", gamma=1.0)
    floor = np.std([objectives.mmd2(a, b, k) for a, b in zip(real[::2], real[1::2])])
    before, after = float(held_out(params)), float(held_out(tuned))
    assert before > 20 * floor
    assert after < 0.15 * before and after < before / 20 + 6 * floor


def temp_bytes(nfe, remat):
    module = MLP(out_features=2, width=64, depth=3)
    method = methods.mmd(VP(), module, POINTS, nfe=nfe, remat=remat, clip=False)
    batch = points_batch(MANY)
    params = jax.eval_shape(method.init, jax.random.key(0), batch)

    def loss(params, batch):
        return method.loss(params, jax.random.key(0), batch, Context(batch_size=MANY))[0]

    compiled = jax.jit(jax.grad(loss)).lower(params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


MANY = 512


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_steps():
    """Rematerialised: nine steps more cost their saved states (512 x 2 floats each) and no network."""
    few, many = temp_bytes(3, True), temp_bytes(12, True)
    state, activation = 4 * MANY * 2, 4 * MANY * 64
    assert many - few < 9 * 4 * state
    plain_few, plain_many = temp_bytes(3, False), temp_bytes(12, False)
    assert plain_many - plain_few > 9 * 3 * activation
    assert many - few < 0.1 * (plain_many - plain_few)


def test_saturated_pixels_keep_their_gradient():
    spec = DataSpec(kind="image", elements={"image": Element((1, 1, 1), "float32")})
    params = {"gain": jnp.float32(0.0), "shift": jnp.full((1, 1, 1), 1.7, jnp.float32)}
    batch = {"image": jnp.full((4, 1, 1, 1), -0.5), "index": jnp.arange(4, dtype=jnp.int32)}

    def slope(**options):
        method = methods.mmd(
            VP(), Shift(), spec, parameterization="x0", nfe=2,
            kernel_options={"degree": 1}, **options,
        )  # fmt: skip
        loss = lambda p: method.loss(p, jax.random.key(0), batch, Context(batch_size=4))[0]
        value, slope = jax.value_and_grad(loss)(params)
        return float(value), float(slope["shift"].sum())

    for clip in (True, False):
        value, kept = slope(saturation="straight_through", clip=clip)
        hard, dead = slope(saturation="hard", clip=clip)
        assert value == pytest.approx(hard, rel=1e-6) and value == pytest.approx(2.25, rel=0.02)
        # 2 (x - y) times d x / d shift, which is alpha at the end and a little from the first step
        assert kept == pytest.approx(3.0, rel=0.05) and abs(dead) < 0.1
    value, free = slope(saturation="none", clip=False)
    assert value == pytest.approx(2.2**2, rel=0.05) and free == pytest.approx(4.4, rel=0.05)


@pytest.mark.slow
def test_features_of_a_saved_classifier(tmp_path):
    data = digits("train")
    rows = data.take(np.arange(40))
    settings = Settings(features=5, channels=(3, 4), steps=2, batch_size=16)
    net = train_classifier(rows["image"], rows["label"], jax.random.key(0), settings=settings)
    path = net.save(tmp_path / "features.npz")
    assert Classifier.load(path).checksum == net.checksum
    batch = {k: jnp.asarray(v[:B]) for k, v in rows.items()}
    batch["index"] = jnp.arange(B, dtype=jnp.int32)

    def make(**options):
        return methods.mmd(VP(), Shift(), data.spec, parameterization="x0", nfe=2, **options)

    params = make().init(jax.random.key(0), batch)
    assert make().init_state(jax.random.key(1), params, batch) is None
    key = jax.random.key(3)
    noise = np.asarray(VP().prior(jax.random.fold_in(key, OBJECTIVE), (B, 8, 8, 1)))
    for layer in ("features", "texture"):
        method = make(features=str(path), feature_layer=layer)
        state = method.init_state(jax.random.key(1), params, batch)
        assert jax.tree.leaves(state)  # arrays of the training state, not constants of the program
        got = quick_jit(
            lambda p, s, m=method: m.loss(p, key, batch, Context(batch_size=B, state=s))[0]
        )(params, state)
        drawn = np.clip(two_clipped_steps(noise), -1, 1)
        x, y = (net.outputs(v)[layer] for v in (drawn, batch["image"]))
        np.testing.assert_allclose(got, kernel_distance(y, x), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"sees images \(8, 8, 1\), the data are \(28, 28, 1\)"):
        objectives.features.from_classifier(path, shape=(28, 28, 1)).load()


def two_clipped_steps(x):
    """DDIM with x0 = 0.9 x, the initial `Shift`, clipped."""
    vp = VP()
    t = np.asarray(vp.t_of_lam(np.linspace(vp.lam(1.0), vp.lam(1e-3), 3)))
    for a, b in itertools.pairwise(t):
        x0 = np.clip(0.9 * x, -1, 1)
        x = vp.alpha(b) * x0 + vp.sigma(b) * (x - vp.alpha(a) * x0) / vp.sigma(a)
    return x


def test_own_features():
    doubled = Features(lambda params, x: params * x, lambda: jnp.float32(2.0))
    method, batch = shift_method(features=doubled, kernel_options={"degree": 1}), points_batch()
    params = method.init(jax.random.key(0), batch)
    context = Context(batch_size=B, state=method.init_state(None, params, batch))
    value = method.loss(params, jax.random.key(0), batch, context)[0]
    plain = shift_method(kernel_options={"degree": 1})
    other = plain.loss(params, jax.random.key(0), batch, Context(batch_size=B))[0]
    np.testing.assert_allclose(value, 4 * other, rtol=1e-4)


def test_the_denoiser_clips_unless_it_is_to_be_raw():
    method, batch = shift_method(clip=True), points_batch()
    params = method.init(jax.random.key(0), batch)
    x, t = 5.0 * jnp.ones((B, 2)), jnp.full(B, 0.5)
    raw = method.denoiser(params, batch, raw=True)(x, t)
    np.testing.assert_allclose(raw, 4.5)
    np.testing.assert_array_equal(method.denoiser(params, batch)(x, t), 1.0)


def test_sampling_is_the_sampler_that_was_trained():
    method, batch = shift_method(), points_batch(4)
    assert method.default_sampler.nfe == 3 and not method.default_sampler.stochastic
    params = method.init(jax.random.key(0), batch)
    twin = methods.score(
        VP(), Shift(), POINTS, parameterization="x0", clip=False, sampler="ddim", nfe=3
    )
    a, b = (m.sample(params, jax.random.key(1), batch) for m in (method, twin))
    np.testing.assert_array_equal(a, b)
    assert method.build_sampler("dpmpp_2m", 5).nfe == 5


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: shift_method(sampler="ddpm"), "deterministic sampler; 'ddpm' draws noise"),
        (lambda: shift_method(kernel="cubic"), "kernel must be one of .*; got 'cubic'"),
        (lambda: shift_method(saturation="soft"), "saturation must be one of .*; got 'soft'"),
        (lambda: shift_method(features="inception"), "features are 'pixels' or the .npz file"),
        (
            lambda: shift_method(features="a.npz", feature_layer="pool"),
            "feature layer must be one of .*; got 'pool'",
        ),
        (lambda: objectives.features._layer_of("features", None, 0), "need its parameters"),
        (
            lambda: shift_method(features="no.npz").init_state(0, 0, 0),
            "no feature extractor 'no.npz'",
        ),
        (
            lambda: methods.mmd(processes.VPBridge(), Shift(), POINTS),
            "a score model needs a Gaussian process, got VPBridge",
        ),
        (
            lambda: shift_method().loss(
                {}, jax.random.key(0), points_batch(4), Context(batch_size=8)
            ),
            r"this is a part \(4 of 8 examples\); use train.microbatches=1 and parallel.mode='jit'",
        ),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# Several devices, and from a score run to a fine-tuned run

DEVICES = """
import sys, tempfile, jax, numpy as np
sys.path.insert(0, "tests")
from methods.test_mmd import points_batch, shift_method
from diffusion_jax.training import train

class Pipeline:
    def batch(self, step):
        return {k: np.asarray(v) for k, v in points_batch(8, seed=step).items()}

def losses(count, **parallel):
    config = {"steps": 3, "batch_size": 8, "ema": (), "log_every": 1, "sample_every": 0,
              "tensorboard": False, "parallel": parallel}
    with tempfile.TemporaryDirectory() as folder:
        end = train(shift_method(), Pipeline(), config, folder, devices=jax.devices()[:count])
    return [end.metrics["loss"], float(end.state.params["gain"])]

np.testing.assert_allclose(losses(2), losses(1), rtol=1e-5)
losses(1, mode="pmap")
try:
    losses(2, mode="pmap")
except ValueError as error:
    assert "this is a part (4 of 8 examples)" in str(error), error
else:
    raise AssertionError("pmap compares shards")
"""


def test_a_batch_over_two_devices_is_one_batch():
    run_python(DEVICES, devices=2)


def tiny_config(method, **train):
    return {
        "data": {"name": "digits"},
        "process": {"name": "vp"},
        "network": {"name": "dit", "width": 16, "depth": 1, "heads": 1, "patch_size": 4},
        "method": method,
        "train": {
            "steps": 2,
            "batch_size": 16,
            "sample_every": 0,
            "progress": False,
            "tensorboard": False,
            **train,
        },
    }


SCORE = {"name": "score", "sigma_data": 0.7}
MMD = {"name": "mmd", "sigma_data": 0.7, "nfe": 2}


@pytest.mark.slow
def test_a_score_run_and_its_fine_tuned_run(tmp_path):
    score = run.train_run(tiny_config(SCORE, ema=(0.9,)), tmp_path / "score")
    config = tiny_config(MMD, ema=(), init_from=str(tmp_path / "score"))
    with pytest.raises(ValueError, match="whole batches"):
        changed = {**config, "train": {**config["train"], "microbatches": 2}}
        run.train_run(changed, tmp_path / "parts")
    tuned = run.train_run(config, tmp_path / "tuned")
    near = lambda a, b: sum(
        float(jnp.abs(u - v).sum()) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )
    averages = score.state.ema["0.9"]
    assert 0 < near(tuned.state.params, averages)
    opened = run.open_run(tmp_path / "tuned")
    assert opened.method.default_sampler.nfe == 2 and opened.weights == "params"
    assert run.draw(opened, run.conditions(opened, 3), jax.random.key(0)).shape == (3, 8, 8, 1)
