"""The interpolant method: heads, couplings, and which samplers a field may have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax import methods
from diffusion_jax.data import digits, paired
from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.fields import InterpolantField
from diffusion_jax.methods import Context
from diffusion_jax.networks import MLP, DiT
from diffusion_jax.processes import VP, Interpolant, VPBridge
from diffusion_jax.samplers import interpolant_euler

POINTS = DataSpec(kind="points", elements={"points": Element((2,), "float32")})
PAIRS = DataSpec(
    kind="points",
    elements={"points": Element((2,), "float32"), "source": Element((2,), "float32")},
)
NET = MLP(width=16, depth=1)
LINEAR = Interpolant()


def points(num, pairs=False):
    rng = np.random.default_rng(0)
    batch = {"points": rng.standard_normal((num, 2)).astype(np.float32)}
    if pairs:
        batch["source"] = 2.0 + batch["points"] + rng.standard_normal((num, 2)).astype(np.float32)
    return {k: jnp.asarray(v) for k, v in batch.items()} | {"index": jnp.arange(num)}


def some(method, batch):
    shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: jnp.asarray(0.3 * rng.standard_normal(v.shape), v.dtype), shapes)


def test_a_head_for_each_target():
    batch = points(4)
    for targets in (("velocity",), ("velocity", "denoiser"), ("conditional_velocity", "score")):
        method = methods.interpolant(LINEAR, NET, POINTS, targets=targets)
        params = some(method, batch)
        assert params["output"]["kernel"].shape[-1] == 2 * len(targets)
        field = method.denoiser(params, batch)
        assert isinstance(field, InterpolantField)
        heads = field.joint(batch["points"], jnp.full(4, 0.3))
        assert set(heads) == set(targets) and all(v.shape == (4, 2) for v in heads.values())
        _, metrics = method.loss(params, jax.random.key(0), batch, Context())
        assert set(metrics) == {f"{t}_loss" for t in targets}
    image = digits("train").spec
    net = DiT(patch_size=4, width=16, depth=1, heads=1, num_classes=10)
    batch = {"image": jnp.zeros((2, 8, 8, 1)), "label": jnp.zeros(2, int), "index": jnp.arange(2)}
    method = methods.interpolant(LINEAR, net, image)
    shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
    assert shapes["output"]["kernel"].shape[-1] == 2 * 16


def test_noise_is_the_source_where_there_are_no_pairs():
    """Sampling with a field of zero velocity returns the start: standard normal, one for each index."""
    method = methods.interpolant(LINEAR, NET, POINTS)
    batch = points(2000)
    still = jax.tree.map(jnp.zeros_like, some(method, batch))
    start = np.asarray(method.sample(still, jax.random.key(0), batch))
    np.testing.assert_allclose(start.mean(0), 0.0, atol=0.08)
    np.testing.assert_allclose(np.cov(start.T), np.eye(2), atol=0.1)
    few = method.sample(still, jax.random.key(0), points(2))
    np.testing.assert_allclose(few, start[:2], rtol=1e-6)


def test_pairs_start_from_their_source_and_train_on_it():
    method = methods.interpolant(LINEAR, NET, PAIRS)
    batch = points(16, pairs=True)
    params = some(method, batch)
    still = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(method.sample(still, jax.random.key(0), batch), batch["source"])
    value = method.loss(params, jax.random.key(0), batch, Context())[0]
    moved = method.loss(
        params, jax.random.key(0), {**batch, "source": batch["source"][::-1]}, Context()
    )[0]
    assert value != moved
    image = paired(digits("train"), "low_resolution").spec
    net = DiT(patch_size=4, width=16, depth=1, heads=1, num_classes=10, source_channels=1)
    made = methods.interpolant(LINEAR, net, image, targets="velocity")
    batch = image.zeros(2)
    shapes = jax.eval_shape(made.init, jax.random.key(0), batch)
    assert (
        shapes["input"]["kernel"].shape[0] == 16
    )  # one channel: the network is not told the source


def test_diffusion_is_chosen_when_sampling():
    method = methods.interpolant(LINEAR, NET, POINTS, nfe=8)
    batch = points(6)
    params = some(method, batch)
    draw = lambda **o: np.asarray(
        method.sample(params, jax.random.key(0), batch, method.build_sampler(**o))
    )
    ode = draw(name="interpolant_euler", nfe=6)
    sde = draw(name="interpolant_euler", nfe=6, epsilon=0.3)
    assert np.isfinite(sde).all() and (ode != sde).any()
    with pytest.raises(ValueError, match=r"'dbim' needs a model that returns x0.*interpolant_heun"):
        method.build_sampler("dbim", 5)
    bridge = methods.bridge(
        VPBridge(), MLP(width=16, depth=1, source_channels=2, time_scale=1.0), PAIRS
    )
    with pytest.raises(ValueError, match=r"'interpolant_heun' needs a model that returns drift"):
        bridge.build_sampler("interpolant_heun", 5)


def test_a_velocity_alone_has_an_ode_alone_but_for_one_sided_paths():
    batch = points(4)
    sde = interpolant_euler(LINEAR, 4, epsilon=0.2)
    two_sided = methods.interpolant(LINEAR, NET, POINTS, targets="velocity")
    params = some(two_sided, batch)
    assert np.isfinite(two_sided.sample(params, jax.random.key(0), batch)).all()
    with pytest.raises(ValueError, match="needs a score or a denoiser"):
        two_sided.sample(params, jax.random.key(0), batch, sde)
    quiet = Interpolant(gamma="none")
    one_sided = methods.interpolant(quiet, NET, POINTS)
    noisy = interpolant_euler(quiet, 4, epsilon=0.2)
    assert np.isfinite(one_sided.sample(params, jax.random.key(0), batch, noisy)).all()
    from_data = methods.interpolant(quiet, NET, PAIRS)
    with pytest.raises(ValueError, match="needs a score or a denoiser"):
        from_data.sample(params, jax.random.key(0), points(4, pairs=True), noisy)


def test_guidance_acts_on_the_drift():
    net = DiT(patch_size=4, width=16, depth=1, heads=1, num_classes=10)
    spec = digits("train").spec
    batch = {
        "image": jnp.ones((2, 8, 8, 1)),
        "label": jnp.array([3, 4]),
        "index": jnp.arange(2),
    }
    make = lambda w: methods.interpolant(LINEAR, net, spec, guidance=w, label_dropout=0.1)
    params = some(make(1.0), batch)
    null = {**batch, "label": jnp.full(2, 10)}
    point = {**LINEAR.point(0.4), "epsilon": 0.2}
    at = quick_jit(lambda made, batch: made.at(batch["image"], point))
    told, base = (at(make(1.0).denoiser(params, b), batch) for b in (batch, null))
    guided = at(make(3.0).denoiser(params, batch), batch)
    np.testing.assert_allclose(guided, base + 3.0 * (told - base), rtol=1e-4, atol=1e-5)


def test_weights_scale_the_losses():
    batch = points(8)
    plain = methods.interpolant(LINEAR, NET, POINTS)
    params = some(plain, batch)
    heavy = methods.interpolant(LINEAR, NET, POINTS, weights={"denoiser": 3.0})
    metrics = plain.loss(params, jax.random.key(0), batch, Context())[1]
    total = heavy.loss(params, jax.random.key(0), batch, Context())[0]
    expected = metrics["velocity_loss"] + 3.0 * metrics["denoiser_loss"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="needs an interpolant or bridge process, got VP"):
        methods.interpolant(VP(), NET, POINTS)
    with pytest.raises(ValueError, match="coupling must be one of data, noise; got 'pairs'"):
        methods.interpolant(LINEAR, NET, POINTS, coupling="pairs")
    with pytest.raises(ValueError, match="coupling 'data' needs pairs: the data has points"):
        methods.interpolant(LINEAR, NET, POINTS, coupling="data")
    with pytest.raises(ValueError, match=r"network.out_features = 3: .* need 4"):
        methods.interpolant(LINEAR, MLP(width=16, depth=1, out_features=3), POINTS)
    with pytest.raises(ValueError, match="'denoiser' needs latent noise"):
        methods.interpolant(Interpolant(gamma="none"), NET, POINTS, targets="denoiser")
    with pytest.raises(ValueError, match="weight's target must be one of velocity, denoiser"):
        methods.interpolant(LINEAR, NET, POINTS, weights={"score": 1.0})
