"""A run without a training: for commands that only need an opened one."""

import jax
import numpy as np

from diffusion_jax import builder
from diffusion_jax import run as runs


def untrained_run(config, workdir, weights="params"):
    """A `Run` of a config with small random parameters."""
    spec = builder.build_data(config, "train").spec
    method = builder.build_method(config, spec).method
    shapes = jax.eval_shape(method.init, jax.random.key(0), spec.zeros(2))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), shapes)
    return runs.Run(workdir, config, spec, method, params, weights, 0)
