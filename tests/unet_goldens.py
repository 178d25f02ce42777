"""What the tests of the published U-Nets share: networks of other programs, with weights and outputs.

`networks_unet_variants` holds outputs only: its weights and inputs are drawn by name, with integers alone,
so that any program draws the same.
"""

import functools
import json
import math
import zlib

import jax
import numpy as np
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax.interop import export_state, import_state


def draw(name, shape):
    """float32 uniform numbers, from the name: SplitMix64 over the index, scaled to keep variances."""
    index = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        h = index + np.uint64(zlib.crc32(name.encode()) << 20)
        h *= np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
        h ^= h >> np.uint64(31)
    u = ((h >> np.uint64(40)).astype(np.float64) / 2**23 - 1).reshape(shape)
    if name.startswith("in/"):
        u *= 1.7
    elif len(shape) > 1:
        u *= math.sqrt(3 / math.prod(shape[1:]))
    elif name.endswith(".weight"):  # of norms
        u = 1 + 0.3 * u
    else:
        u *= 3 if name.endswith("freqs") else 0.3
    return u.astype(np.float32)


def abstract(net, x, source=None):
    """Shapes of the parameters."""
    label = np.zeros(len(x), int) if net.num_classes else None
    init = lambda key: net.init(key, x, np.float32(0.3), label=label, source=source)
    return jax.eval_shape(init, jax.random.key(0))["params"]


def count(tree):
    """Parameters without fixed frequencies, which are no parameters of the official code."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(math.prod(a.shape) for path, a in leaves if path[-1].key != "frequencies")


def recomputed(function):
    """How many parts of a function are computed again in its backward pass."""
    text = str(jax.make_jaxpr(function)())
    return text.count("remat2[") + text.count("checkpoint[")


class Case:
    """A network of another program, and ours with its weights.

    Args:
      net: ours.
      layout: of its weights.
      state: theirs.
      arrays: `x` (NCHW), `t`, and perhaps `label`, `source` (NCHW) and `augment_labels`.
      out: theirs, NCHW float64.
    """

    def __init__(self, net, layout, state, out, x, t, source=None, **given):
        images = [None if a is None else np.moveaxis(a, 1, -1) for a in (x, source)]
        self.x, self.source = images
        self.net, self.state, self.t, self.given = net, state, t, given
        self.out = np.moveaxis(out, 1, -1)
        self.weights = layout(net)
        self.shapes = abstract(net, *images)
        self.params = import_state(self.weights, state, self.shapes)

    def error(self, dtype):
        net = self.net.clone(dtype=dtype)
        y = quick_jit(net.apply)(
            {"params": self.params},
            self.x.astype(dtype),
            self.t,
            source=self.source,
            **self.given,
        )
        assert y.dtype == dtype
        return np.abs(np.asarray(y) - self.out).max()

    def assert_exported(self):
        """What was read is written again, bit by bit and name by name."""
        written = export_state(self.weights, self.params)
        assert set(written) == set(self.state)
        for name, array in self.state.items():
            np.testing.assert_array_equal(written[name], array, err_msg=name)


@functools.cache
def official(name, build, layout):
    """A case of `systems_net_<name>`; `build(config)` is our network."""
    arrays = golden(f"systems_net_{name}")
    config = json.loads(str(arrays["config"]))
    given = {}
    if config.get("label_dim"):
        given["label"] = arrays["in/class_labels"].argmax(-1)
    if "in/y" in arrays:
        given["label"] = arrays["in/y"]
    if "in/augment" in arrays:
        given["augment_labels"] = arrays["in/augment"]
    t = arrays["in/noise_labels"] if "in/noise_labels" in arrays else arrays["in/t"]
    state = {key[2:]: value for key, value in arrays.items() if key.startswith("w/")}
    case = Case(build(config), layout, state, arrays["out/f64"], arrays["in/x"], t, **given)
    assert count(case.shapes) == config["n_params"]
    return case


def variant(name, build, layout):
    """A case of `networks_unet_variants`; `build(config)` is our network."""
    arrays = {
        key.split("/")[1]: value
        for key, value in golden("networks_unet_variants").items()
        if key.startswith(f"{name}/")
    }
    config, names = (json.loads(str(arrays[key])) for key in ("config", "names"))
    net, batch = build(config), len(arrays["out"])
    filters = layout(net).buffers()
    assert set(filters) == {n for n in names if n.endswith("resample_filter")}
    state = {n: filters[n] if n in filters else draw(n, shape) for n, shape in names.items()}
    given = {}
    if config["classes"]:
        given["label"] = np.array([1, config["classes"] - 1])
    if config.get("augment"):
        given["augment_labels"] = draw("in/augment", (batch, config["augment"]))
    x = draw("in/x", (batch, config["in"], config["img"], config["img"]))
    t = np.array([3, 712.5] if "ds" in config else [-1.3, 0.7], np.float32)
    source = x[:, 3:] if net.source_channels else None
    return Case(net, layout, state, arrays["out"], x[:, :3], t, source, **given)
