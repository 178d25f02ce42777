"""Bridge models: what each parameterization learns, inpainting, models that are not told the source."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import methods
from diffusion_jax.data import digits, paired
from diffusion_jax.methods import Context
from diffusion_jax.numerics import expand
from diffusion_jax.processes import VP, BrownianBridge, GmaxBridge, Interpolant, VPBridge

COUNT = 6
DATA = paired(digits("train"), "inpaint")
BATCH = DATA.take(np.arange(COUNT)) | {"index": np.arange(COUNT, dtype=np.int32)}


@dataclasses.dataclass(frozen=True)
class Knowing:
    """A network that knows the batch's images and answers as the parameterization wants it to."""

    kind: str
    process: object
    shift: float = 0.0
    num_classes: int | None = None

    def init(self, key, x, t, **conditions):
        return {"params": {"shift": jnp.float32(self.shift)}}

    def apply(self, variables, x, t, *, source=None, label=None, train=False, rngs=None):
        point = {k: expand(v, x) for k, v in self.process.point(t).items()}
        x0, source = jnp.asarray(BATCH["image"]), jnp.asarray(BATCH["source"])
        answer = {
            "x0": lambda: x0,
            "i2sb": lambda: (x - point["alpha"] * x0) / point["sigma"],
            "eps": lambda: (x - point["a"] * source - point["b"] * x0) / point["c"],
        }[self.kind]()
        return answer + variables["params"]["shift"]


def loss_of(method, shift):
    batch = {k: jnp.asarray(v) for k, v in BATCH.items()}
    return method.loss({"shift": shift}, jax.random.key(0), batch, Context(batch_size=COUNT))[0]


@pytest.mark.parametrize("kind", ["x0", "i2sb", "eps"])
def test_the_loss_is_the_plain_error_of_the_network(kind):
    process = BrownianBridge(t_min=0.05, t_max=0.95)
    method = methods.bridge(process, Knowing(kind, process), DATA.spec, parameterization=kind)
    assert loss_of(method, 0.0) < 1e-9
    np.testing.assert_allclose(loss_of(method, 0.3), 0.09, rtol=1e-3)


def test_inpainting_keeps_what_is_known_and_learns_the_hole():
    process = VPBridge()
    options = {"parameterization": "x0", "masked": True, "nfe": 4, "clip": False}
    method = methods.bridge(process, Knowing("x0", process), DATA.spec, **options)
    hole = BATCH["mask"] * np.ones_like(BATCH["image"])
    np.testing.assert_allclose(loss_of(method, 0.3), 0.09 * hole.mean(), rtol=1e-5)
    denoise = method.denoiser({"shift": 0.3}, BATCH)
    x0_hat = denoise(jnp.zeros_like(BATCH["image"]), 0.5)
    expected = np.where(hole == 1, BATCH["image"] + 0.3, BATCH["source"])
    np.testing.assert_allclose(x0_hat, expected, atol=1e-6)
    drawn = method.sample({"shift": 0.0}, jax.random.key(1), BATCH)
    near = np.abs(drawn - BATCH["image"])[hole == 0].max()
    assert near < 0.05  # the noise of t_min


def test_a_network_that_does_not_see_the_source():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Blind(Knowing):
        def apply(self, variables, x, t, *, source=None, **rest):
            seen.append(source)
            return super().apply(variables, x, t, **rest)

    process = VPBridge()
    for source_input in (True, False):
        seen.clear()
        method = methods.bridge(
            process,
            Blind("x0", process),
            DATA.spec,
            parameterization="x0",
            source_input=source_input,
            nfe=3,
        )
        method.sample({"shift": 0.0}, jax.random.key(1), BATCH)
        assert seen and all((s is not None) == source_input for s in seen)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"process": VP()}, "needs a bridge process, got VP"),
        ({"spec": digits("train").spec}, "but no 'source'"),
        ({"spec": paired(digits("train"), "edges").spec, "masked": True}, "but no 'mask'"),
        ({"parameterization": "eps"}, "t_max = 1.0 must be below 1"),
        ({"parameterization": "v"}, "'v' is not defined for a bridge"),
        ({"process": Interpolant(), "parameterization": "i2sb"}, "the bridge of an SDE"),
    ],
)
def test_errors(change, words):
    process = change.pop("process", VPBridge())
    spec = change.pop("spec", DATA.spec)
    with pytest.raises(ValueError, match=words):
        method = methods.bridge(process, Knowing("x0", VPBridge()), spec, **change)
        method.denoiser({"shift": 0.0}, BATCH)


@pytest.mark.parametrize("missing", ["source", "mask"])
def test_what_a_batch_lacks_is_named(missing):
    process = GmaxBridge()
    options = {"parameterization": "x0", "masked": True, "source_input": False}
    method = methods.bridge(process, Knowing("x0", process), DATA.spec, **options)
    batch = {k: v for k, v in BATCH.items() if k != missing}
    with pytest.raises(ValueError, match=missing):
        method.sample({"shift": 0.0}, jax.random.key(0), batch)
