"""Statistics of two real processes with two virtual devices each are those of one process."""

import numpy as np
from training.toy import finish_together, start_together

from diffusion_jax.evaluation import feature_statistics as stats
from diffusion_jax.evaluation.sharded import ShardedFunction

SETUP = """
import numpy as np
import jax, jax.numpy as jnp
from diffusion_jax.evaluation import feature_statistics as stats
from diffusion_jax.evaluation.sharded import ShardedFunction, over_processes, rows_of_process
from diffusion_jax.training.parallel import make_layout

def images(rows):
    return np.stack([np.random.default_rng(row).random((4, 4, 1)) for row in rows])

def function(params, x):
    flat = x.reshape(x.shape[0], -1) @ params
    return {"pool": flat[:, :5], "spatial": flat[:, 5:8], "unbiased": flat[:, 8:]}

params = np.random.default_rng(0).random((16, 12)).astype(np.float32)
"""

CODE = (
    SETUP
    + """
assert len(jax.local_devices()) == 2 and jax.process_count() == 2
layout = make_layout({}, jax.local_devices())
call = ShardedFunction(
    function, params, batch_size=3, sharding=layout.batch_sharding, replicated=layout.replicated
)
assert call.batch_size == 4
rows = rows_of_process(23)
assert len(rows) == 12 - PROCESS
mine = stats.collect(
    lambda parts: call.stream((x,) for x in parts), images, 23, rows=rows, batch_size=4, keep=9
)
total = None
for arrays in over_processes(stats.to_arrays(mine)):
    part = stats.from_arrays(arrays)
    total = part if total is None else stats.merge(total, part)
np.savez(f"FOLDER/{PROCESS}.npz", **stats.to_arrays(total))
"""
)


def test_two_processes_find_what_one_does(tmp_path):
    finish_together(
        start_together(CODE.replace("FOLDER", str(tmp_path)), 2, devices=2, heartbeat=60)
    )
    names = {}
    exec(SETUP, names)
    call = ShardedFunction(names["function"], names["params"], batch_size=23)
    alone = stats.collect(
        lambda parts: call.stream((x,) for x in parts), names["images"], 23, batch_size=23, keep=9
    )
    found = [dict(np.load(tmp_path / f"{n}.npz")) for n in (0, 1)]
    for name, value in stats.to_arrays(alone).items():
        np.testing.assert_array_equal(found[0][name], found[1][name])
        np.testing.assert_allclose(found[0][name], value, rtol=1e-6, atol=1e-6)
