"""Consistency fine-tuning of bridges: what its loss is made of, its teacher, its memory, its refusals."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax import methods
from diffusion_jax.data import digits, paired
from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.guidance import bridge_ode_map, clip
from diffusion_jax.methods import Context
from diffusion_jax.methods.base import OBJECTIVE
from diffusion_jax.numerics import example_keys, normal_per_example
from diffusion_jax.processes import I2SB, VP, VPBridge
from diffusion_jax.samplers import Pinned, interpolate_latents, sample
from diffusion_jax.training import make_optimizer
from diffusion_jax.training.state import create_state
from diffusion_jax.training.step import make_train_step

B = 12
POINTS = DataSpec(
    kind="points",
    elements={"points": Element((2,), "float32"), "source": Element((2,), "float32")},
)


@dataclasses.dataclass(frozen=True)
class Net:
    """`gain tanh(x + source / 2) + shift t`, for points."""

    num_classes: int | None = None

    def init(self, key, x, t, *, source=None):
        return {"params": {"gain": jnp.float32(1.4), "shift": jnp.float32(0.3)}}

    def apply(self, variables, x, t, *, source=None, train=False, rngs=None):
        p = variables["params"]
        return p["gain"] * jnp.tanh(x + 0.5 * source) + p["shift"] * t[:, None]


PARAMS = {"gain": jnp.float32(1.4), "shift": jnp.float32(0.3)}
OTHER = {"gain": jnp.float32(0.8), "shift": jnp.float32(-0.2)}


def batch_of(num=B, seed=0):
    x0, x1 = np.random.default_rng(seed).normal(size=(2, num, 2)).astype(np.float32) * 0.6
    index = jnp.arange(num, dtype=jnp.int32)
    return {"points": jnp.asarray(x0), "source": jnp.asarray(x1), "index": index}


def make(process=None, **options):
    options = {
        "parameterization": "x0",
        "gap": "constant",
        "gap_options": {"dt": 0.2},
        "weight": "constant",
        **options,
    }
    return methods.consistency_bridge(process or VPBridge(), Net(), POINTS, **options)


def net(params, x, t, source):
    return Net().apply({"params": params}, x, jnp.broadcast_to(t, x.shape[:1]), source=source)


def by_hand(params, target, teacher, key, batch, order=1):
    """The loss written out for uniform times, x0_hat clipped, pseudo-Huber."""
    process, n = VPBridge(), len(batch["index"])
    t_key, noise_key = jax.random.split(jax.random.fold_in(key, OBJECTIVE))
    shares = (jax.random.uniform(t_key) + batch["index"] / n) % 1.0
    t = jnp.minimum(process.t_min + (1.0 - process.t_min) * shares, 0.999)
    r = jnp.maximum(t - 0.2, process.t_min)
    x0, x1 = batch["points"], batch["source"]
    eps = normal_per_example(example_keys(noise_key, batch["index"]), x0)

    def parts(t):
        return tuple(v[:, None] for v in (process.a(t), process.b(t), process.c(t)))

    def noised(t):
        a, b, c = parts(t)
        return a * x1 + b * x0 + c * eps

    def function(p, x, t):
        (a, b, c), (a_e, b_e, c_e) = parts(t), parts(jnp.full(n, process.t_min))
        k = c_e / c
        x0_hat = jnp.clip(net(p, x, t, x1), -1.0, 1.0)
        return k * x + (b_e - k * b) * x0_hat + (a_e - k * a) * x1

    x_r = noised(r)
    if teacher is not None:
        denoise = clip(lambda x, t: net(teacher, x, t, x1))
        x_r = bridge_ode_map(denoise, process, x1, order)(noised(t), t, r)
    difference = function(params, noised(t), t) - function(target, x_r, r)
    c2 = 0.03**2 * 2
    return (jnp.sqrt((difference**2).sum(axis=1) + c2) - np.sqrt(c2)).mean()


@pytest.mark.parametrize("order", [None, 1, 2])
def test_the_loss_and_what_it_takes_from_where(order):
    """Student, target and teacher are three sets of parameters here."""
    distils = order is not None
    options = {"objective": "distillation", "solver_order": order} if distils else {}
    method, batch, key = make(target="ema", **options), batch_of(), jax.random.key(3)
    teacher = {"gain": jnp.float32(1.1), "shift": jnp.float32(0.1)} if distils else None
    context = Context(ema=OTHER, state=teacher, batch_size=B)
    loss, metrics = method.loss(PARAMS, key, batch, context)
    wanted = by_hand(PARAMS, OTHER, teacher, key, batch, order)
    np.testing.assert_allclose(loss, wanted, rtol=2e-5)
    assert sorted(metrics) == ["consistency_mse", "distance", "gap"]
    assert 0.15 < metrics["gap"] <= 0.2
    # the default target is the student, without a gradient of its own
    tied = make(**options)
    value = lambda p: tied.loss(p, key, batch, context)[0]
    np.testing.assert_allclose(
        value(PARAMS), by_hand(PARAMS, PARAMS, teacher, key, batch, order), rtol=2e-5
    )
    slope = jax.grad(value)(PARAMS)
    held = jax.grad(
        lambda p: method.loss(p, key, batch, dataclasses.replace(context, ema=PARAMS))[0]
    )
    expected = held(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), slope, expected)


def test_saturated_predictions_are_equal_and_pass_their_gradient():
    """Where student and target are both beyond 1 there is no loss; where one is, a gradient calls it back."""
    method, batch = make(target="ema"), batch_of()
    high, higher = ({"gain": jnp.float32(0.0), "shift": jnp.float32(s)} for s in (90.0, 99.0))
    key = jax.random.key(0)
    value = lambda p, e: method.loss(p, key, batch, Context(ema=e, batch_size=B))[0]
    loss, slope = jax.value_and_grad(value)(high, OTHER)
    assert loss > 0.1 and slope["shift"] > 0
    hard = make(target="ema", saturation="hard")
    own = lambda p: hard.loss(p, key, batch, Context(ema=OTHER, batch_size=B))[0]
    held, stuck = jax.value_and_grad(own)(high)
    np.testing.assert_allclose(held, loss, rtol=1e-6)
    assert stuck["shift"] == 0
    free = make(target="ema", clip=False)
    apart = free.loss(high, key, batch, Context(ema=higher, batch_size=B))[0]
    assert value(high, higher) < 0.2 * apart


def test_the_teacher_is_the_initial_model():
    method, batch = make(objective="distillation"), batch_of()
    optimizer = make_optimizer({"name": "adam", "learning_rate": 1e-2}, 10)
    state = create_state(method, optimizer, (0.9,), jax.random.key(0), batch, PARAMS)
    step = quick_jit(make_train_step(method, optimizer, batch_size=B, decays=(0.9,)))
    for _ in range(3):
        state, metrics = step(state, batch, jax.random.key(1))
    assert np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, state.method_state, PARAMS)
    assert abs(state.params["gain"] - PARAMS["gain"]) > 1e-3
    assert make().init_state is None


def test_parameter_copies():
    """Training: parameters, average, two moments. Distillation: the teacher too. The target: none."""
    optimizer = make_optimizer({"name": "radam", "learning_rate": 1e-2}, 10)
    count = lambda tree: sum(np.size(v) for v in jax.tree.leaves(tree))
    copies = {}
    for objective in ("training", "distillation"):
        for target in ("student", "ema"):
            method = make(objective=objective, target=target)
            state = create_state(method, optimizer, (0.9,), jax.random.key(0), batch_of(), PARAMS)
            trees = state.params, state.ema, state.opt_state, state.method_state
            copies[objective, target] = count(trees) // count(PARAMS)
    assert copies == {
        ("training", "student"): 4,
        ("training", "ema"): 4,
        ("distillation", "student"): 5,
        ("distillation", "ema"): 5,
    }


@dataclasses.dataclass(frozen=True)
class Grey:
    """A network for images."""

    num_classes: int | None = None

    def init(self, key, x, t, *, source=None):
        return {"params": {"v": jnp.float32(0.1)}}

    def apply(self, variables, x, t, *, source=None, train=False, rngs=None):
        return variables["params"]["v"] * jnp.tanh(x)


def test_the_default_is_two_calls_of_the_network():
    data = paired(digits("train"), "low_resolution")
    method = methods.consistency_bridge(VPBridge(), Grey(), data.spec)
    assert method.default_sampler.nfe == 2
    assert method.default_sampler.name == "consistency_bridge"
    batch = data.take(np.arange(4)) | {"index": np.arange(4, dtype=np.int32)}
    params = method.init(jax.random.key(0), batch)
    drawn = method.sample(params, jax.random.key(1), batch)
    assert drawn.shape == (4, 8, 8, 1) and np.isfinite(drawn).all()
    # a path between two booting noises is a path between their images
    given = method.build_sampler("consistency_bridge", 2, booting="given")
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8, 1)).astype(np.float32)
    denoise = method.denoiser(params, batch)
    ends = [
        sample(given, denoise, None, Pinned(batch["source"], z))
        for z in interpolate_latents(*noise, np.linspace(0.0, 1.0, 5))
    ]
    jumps = [float(np.abs(b - a).mean()) for a, b in itertools.pairwise(ends)]
    assert min(jumps) > 0 and max(jumps) < 3 * min(jumps)


def test_guidance_is_the_teachers():
    """Its weight changes what is distilled, and nothing of how the student is sampled."""
    spec = DataSpec(kind="points", elements={**POINTS.elements}, num_classes=3)

    @dataclasses.dataclass(frozen=True)
    class Labelled(Net):
        num_classes: int | None = 3

        def apply(self, variables, x, t, *, source=None, label=None, train=False, rngs=None):
            p = variables["params"]
            return p["gain"] * 0.3 * jnp.tanh(x) + p["shift"] * label[:, None] * 0.1

        def init(self, key, x, t, *, source=None, label=None):
            return {"params": PARAMS}

    batch = {**batch_of(), "label": jnp.arange(B) % 3}
    context = Context(state=PARAMS, batch_size=B)
    losses, drawn = [], []
    for weight in (1.0, 2.0):
        method = methods.consistency_bridge(
            VPBridge(),
            Labelled(),
            spec,
            objective="distillation",
            guidance=weight,
            parameterization="x0",
            gap="constant",
        )
        losses.append(float(method.loss(PARAMS, jax.random.key(0), batch, context)[0]))
        drawn.append(method.sample(PARAMS, jax.random.key(0), batch))
    assert abs(losses[0] - losses[1]) > 1e-4
    np.testing.assert_array_equal(*drawn)


def test_inpainting_keeps_what_is_known():
    data = paired(digits("train"), "inpaint", options={"size": (4, 6)})

    method = methods.consistency_bridge(
        VPBridge(), Grey(), data.spec, masked=True, parameterization="x0", gap="constant"
    )
    batch = data.take(np.arange(6)) | {"index": np.arange(6, dtype=np.int32)}
    batch = {k: jnp.asarray(v) for k, v in batch.items()}
    drawn = method.sample({"v": jnp.float32(0.1)}, jax.random.key(0), batch)
    known = np.broadcast_to(batch["mask"] == 0, drawn.shape)
    np.testing.assert_allclose(drawn[known], batch["image"][known], atol=0.02)
    # the loss is of the hole alone: known pixels are equal for student and target
    loss = method.loss({"v": jnp.float32(0.1)}, jax.random.key(0), batch, Context(batch_size=6))[0]
    assert np.isfinite(loss) and loss > 0


def test_where_it_boots():
    """The method's own sampler starts where training does; samplers that leave the source do not."""
    method = make(t_start=0.9)
    assert method.default_sampler.times[1] == 0.9
    assert method.build_sampler("consistency_bridge", 3).times[1] == 0.9
    assert method.build_sampler("ddbm_heun", 5).times[0] > 0.99
    context = Context(batch_size=B)
    _, metrics = make(t_start=0.9, start_share=0.99, gap_options={"dt": 0.3}).loss(
        PARAMS, jax.random.key(0), batch_of(), context
    )
    np.testing.assert_allclose(metrics["gap"], 0.3, rtol=1e-5)  # every time is 0.9, every r 0.6


def test_errors():
    def refused(message, **options):
        with pytest.raises(ValueError, match=re.escape(message)):
            make(**options)

    refused(
        "objective must be one of training, distillation; got 'distilation'",
        objective="distilation",
    )
    refused("target must be one of student, ema; got 'teacher'", target="teacher")
    refused("saturation must be one of straight_through, hard, none; got 'soft'", saturation="soft")
    refused("solver_order must be one of 1, 2; got 3", solver_order=3)
    refused("gap must be one of", gap="cosine")
    refused("distance must be one of", distance="lpips")
    refused("weight must be one of", weight="snr")
    refused("guidance=2.0 is the teacher's", guidance=2.0)
    refused("a bridge needs a bridge process, got VP", process=VP())
    refused("noise: c(t) is 0", process=I2SB(ot_ode=True))
    refused("unknown times", times="cosine")
    refused("t_start must lie between 0.0001 and 1.0, got 1.0", t_start=1.0)
    refused("start_share must lie in [0, 1), got 1.5", start_share=1.5)
    batch = batch_of()
    with pytest.raises(
        ValueError, match=r"target 'ema' needs an average of the parameters: set train\.ema"
    ):
        make(target="ema").loss(PARAMS, jax.random.key(0), batch, Context(batch_size=B))
    with pytest.raises(ValueError, match="distillation needs its teacher"):
        make(objective="distillation").loss(PARAMS, jax.random.key(0), batch, Context(batch_size=B))
    lacking = {k: v for k, v in batch.items() if k != "source"}
    with pytest.raises(ValueError, match="the batch has"):
        make(source_input=False).sample(PARAMS, jax.random.key(0), lacking)
