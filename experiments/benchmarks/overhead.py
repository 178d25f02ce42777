"""What the library costs on top of the network and the arithmetic, as ratios of CPU seconds in one run.

    python -m experiments.benchmarks.overhead [--quick]

The process pins itself to one core and XLA to one thread; the two sides of each ratio are run in turns
and the medians of their CPU seconds are compared, so that a drifting machine does not matter.

  sampler   a sampler over the bare network chained NFE times in a scan          goal 1.05
  step      a sampler's own arithmetic at state (64, 32, 32, 3) over a scan
            of the same recurrence written by hand                               goal 1.10
  train     the train step over a minimal loop, same network and optimiser       goal 1.02
  compile   compile time of a sampler over that of the bare scan                 goal 1.30
  programs  compilations when floats, schedules or kinds of one structure change goal 0
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time

if __name__ == "__main__":  # before jax starts its threads
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )

import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffusion_jax as dj
from diffusion_jax.data.pipeline import Pipeline
from diffusion_jax.data.source import ArraySource, DataSpec, Element
from diffusion_jax.evaluation import markdown_table
from diffusion_jax.methods import Context, bridge, score
from diffusion_jax.training import TrainConfig, Trainer


def paired(first, second, repeats):
    """Median CPU seconds of two functions run in turns, and the median ratio first / second."""
    for run in (first, second):
        jax.block_until_ready(run())
    times = ([], [])
    for _ in range(repeats):
        for spent, run in zip(times, (first, second)):
            begin = time.process_time()
            jax.block_until_ready(run())
            spent.append(time.process_time() - begin)
    ratio = statistics.median(a / b for a, b in zip(*times))
    return statistics.median(times[0]), statistics.median(times[1]), ratio


def network(shape=(16, 16, 3), depth=4, pairs=False):
    """A DiT of about 0.7M parameters a block, its method, and parameters for images of `shape`.

    The method is a score model, for `pairs` a bridge.
    """
    images = np.random.default_rng(0).uniform(-1, 1, (256, *shape)).astype(np.float32)
    names = ("image", "source") if pairs else ("image",)
    spec = DataSpec("image", {name: Element(shape, "float32") for name in names}, show="image")
    source = ArraySource({name: images for name in names}, spec)
    module = dj.networks.DiT(
        patch_size=4, width=192, depth=depth, heads=4, source_channels=shape[-1] if pairs else 0
    )
    if pairs:
        method = bridge(dj.processes.VPBridge(), module, source.spec, clip=False)
    else:
        method = score(
            dj.processes.VP(),
            module,
            source.spec,
            parameterization="eps",
            weighting="eps",
            clip=False,
        )
    params = jax.jit(method.init)(jax.random.key(0), source.spec.zeros(2))
    return module, method, params, source


SAMPLERS = (
    "ddim",
    "dpmpp_2m",
    "dpmpp_3m",
    "unipc_3",
    "deis_tab3",
    "dpm_solver_v3",
    "evodiff",
    "edm_heun",
    "sde_dpmpp_2m",
)
BRIDGE_SAMPLERS = (
    "dbim",
    "dbim_2",
    "dbim_3",
    "bridge_tts",
    "bridge_tts_ode",
    "i2sb",
    "bridge_euler",
    "bridge_ode",
    "consistency_bridge",
)


def sampler_cost(repeats, pairs=False, batch=16, nfe=10):
    """Each sampler of score models, or of bridges, over the bare network chained in a scan."""
    module, method, params, source = network(depth=8, pairs=pairs)
    x = jax.random.normal(jax.random.key(1), (batch, *source.spec.shape))
    key = jax.random.key(2)
    times = jnp.linspace(1.0, 0.01, nfe)
    given = {"source": x} if pairs else {}

    @jax.jit
    def bare(params, x, given):
        def body(x, t):
            return module.apply({"params": params}, x, t, **given), None

        return jax.lax.scan(body, x, times)[0]

    count = sum(v.size for v in jax.tree.leaves(params))
    rows, extra = [], {"edm_heun": {"t_end": None}}
    if not pairs:
        extra["dpm_solver_v3"] = {"statistics": some_statistics(method, source.spec.shape)}
    for name in BRIDGE_SAMPLERS if pairs else SAMPLERS:
        options = extra.get(name, {})
        sampler = method.build_sampler(name, nfe, **options)
        denoise = method.denoiser(params, given)
        if sampler.nfe != nfe:
            raise AssertionError(f"{name} makes {sampler.nfe} calls, not {nfe}")
        ours, floor, ratio = paired(
            lambda s=sampler, d=denoise: dj.sample(s, d, key, x),
            lambda: bare(params, x, given),
            repeats,
        )
        rows.append(("sampler", f"{name}, {count / 1e6:.1f}M parameters", ours, floor, ratio, 1.05))
    return rows


def some_statistics(method, shape):
    """Statistics with a coefficient for each pixel, as a trained model has them."""
    constant = dj.samplers.ModelStatistics.data_prediction(method.process, intervals=60)
    wide = np.ones((61, *shape)) * np.linspace(1.0, 0.9, 61)[:, None, None, None]
    return dataclasses.replace(constant, l=wide, s=0.0 * wide, b=0.0 * wide)


def hand_written(name):
    """`(sampler, denoise, scan)` of a recurrence, the scan's coefficients derived here on their own."""
    n = 50
    t = np.linspace(1.0, 1e-3, n + 1)
    barrier = jax.lax.optimization_barrier
    f32 = lambda *arrays: tuple(jnp.asarray(a, jnp.float32) for a in arrays)
    if name.startswith("dbim"):
        order = int(name[5:] or 1)
        sampler = dj.samplers.dbim(dj.processes.VPBridge(), n, eta=0.0, order=order)
        s = np.linspace(1.0 - 1e-3, 1e-4, n)
        integral = lambda t: 0.1 * t + t * t
        alpha, rho2 = np.exp(-integral(s) / 2), np.expm1(integral(s))
        total, alpha1 = np.expm1(integral(1.0)), np.exp(-integral(1.0) / 2)
        a, b = alpha / alpha1 * rho2 / total, alpha * (total - rho2) / total
        c = alpha * np.sqrt(rho2 * (total - rho2) / total)
        k = c[1:] / c[:-1]
        past = np.zeros((order, n - 1))  # weights of the last predictions, newest first
        past[0] = b[1:] - k * b[:-1]
        lam = np.log(b / c)
        for i in range(1, n - 2):  # Newton's polynomial through them; first and last step: order 1
            if order == 1:
                break
            h, count = lam[i + 1] - lam[i], min(order, i + 1)
            nodes = lam[i - count + 1 : i + 1][::-1]
            for j, unit in enumerate(np.eye(count)):
                slope = np.diff(unit) / np.diff(nodes)
                bend = (slope[1] - slope[0]) / (nodes[2] - nodes[0]) if count == 3 else 0.0
                first_derivative = slope[0] + bend * (nodes[0] - nodes[1])
                past[j, i] += b[i + 1] * (
                    first_derivative * (np.exp(-h) + h - 1.0)
                    + 2.0 * bend * (0.5 * h * h - h + 1.0 - np.exp(-h))
                )
        table = f32(k, a[1:] - k * a[:-1], s[:-1], past.T)
        first = f32(a[0], b[0], c[0])

        class Denoise:
            def at(self, x, point):
                return barrier(point["t"] * x)

            def __call__(self, x, t):
                return barrier(t * x)

        def scan(x, key):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[0]))
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
            z = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)
            y = first[0] * x + first[1] * barrier(1.0 * x) + first[2] * z

            def body(carry, row):
                y, *old = carry
                k, source, t, weights = row
                known = [barrier(t * y), *old]
                mixed = sum(w * value for w, value in zip(weights, known, strict=True))
                return (k * y + mixed + source * x, *known[: order - 1]), None

            zeros = (jnp.zeros_like(x),) * (order - 1)
            return jax.lax.scan(body, (y, *zeros), table)[0][0]

        return sampler, Denoise(), scan
    log_alpha = -0.25 * 19.9 * t**2 - 0.05 * t
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    lam = np.log(alpha / sigma)
    h = np.diff(lam)
    process = dj.processes.VP()
    linear, direct = sigma[1:] / sigma[:-1], -alpha[1:] * np.expm1(-h)

    class Denoise:
        def at(self, x, point):
            return barrier(point["sigma"] * x)

        def __call__(self, x, t):
            return barrier(process.sigma(t) * x)

    if name == "ddim":
        table = f32(linear, direct, sigma[:-1])

        def scan(x, key):
            def body(y, row):
                k, d, s = row
                return k * y + d * barrier(s * y), None

            return jax.lax.scan(body, x, table)[0]

        return dj.samplers.ddim(process, n, grid=t), Denoise(), scan
    ratio = np.append(np.inf, h[:-1]) / h
    extra = np.where(np.isfinite(ratio), 0.5 * direct / ratio, 0.0)
    extra[-1] = 0.0  # the last step has order 1
    table = f32(linear, direct + extra, -extra, sigma[:-1])

    def scan(x, key):
        def body(carry, row):
            y, previous = carry
            k, d, old, s = row
            x0 = barrier(s * y)
            return (k * y + d * x0 + old * previous, x0), None

        return jax.lax.scan(body, (x, jnp.zeros_like(x)), table)[0][0]

    return dj.samplers.dpm_solver_pp(process, n, grid=t), Denoise(), scan


def step_cost(repeats, shape=(64, 32, 32, 3)):
    """A sampler's own arithmetic over the same recurrence by hand, with a trivial model."""
    x, key = jax.random.normal(jax.random.key(0), shape), jax.random.key(1)
    rows = []
    for name in ("ddim", "dpmpp_2m", "dbim", "dbim_2", "dbim_3"):
        sampler, denoise, scan = hand_written(name)
        scan = jax.jit(scan)
        difference = float(jnp.abs(dj.sample(sampler, denoise, key, x) - scan(x, key)).max())
        if not difference < 1e-4:
            raise AssertionError(f"{name}: the hand-written scan differs by {difference}")
        ours, floor, ratio = paired(
            lambda s=sampler, d=denoise: dj.sample(s, d, key, x),
            lambda scan=scan: scan(x, key),
            repeats,
        )
        rows.append(("step", f"{name}, {shape}", ours, floor, ratio, 1.10))
    return rows


def train_cost(repeats, batch=32, steps=4):
    """The train step over a minimal loop with the same loss, network and optimiser."""
    _, method, params, source = network()
    config = TrainConfig(batch_size=batch, steps=1000, progress=False, tensorboard=False)
    pipeline = Pipeline(source, batch)
    trainer = Trainer(method, pipeline.batch(0), config)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    key = jax.random.key(0)

    def minimal(params, opt_state, batch, key, step):
        def loss(params):
            return method.loss(params, jax.random.fold_in(key, step), batch, Context())[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    fast = jax.jit(minimal, donate_argnums=(0, 1))
    held = {
        "ours": trainer.layout.to_device(trainer.create(pipeline.batch(0))),
        "hand": (params, optimizer.init(params)),
    }
    batches = [trainer.layout.put_step_batch(pipeline.batch(i)) for i in range(steps)]

    def ours():
        for b in batches:
            held["ours"], metrics = trainer.step(held["ours"], b)
        return metrics

    def hand():
        for i, b in enumerate(batches):
            params, opt_state, value = fast(*held["hand"], b, key, i)
            held["hand"] = params, opt_state
        return value

    mine, floor, ratio = paired(ours, hand, repeats)
    count = sum(v.size for v in jax.tree.leaves(held["hand"][0]))
    return [("train", f"adam, clipping; {count / 1e6:.1f}M parameters", mine, floor, ratio, 1.02)]


def compile_cost(repeats, nfe=10):
    """Compile time of a sampler over that of a bare scan of the network."""
    module, method, params, source = network()
    x = jnp.zeros((4, *source.spec.shape))

    def bare(params, x, times):
        def body(x, t):
            return module.apply({"params": params}, x, t), None

        return jax.lax.scan(body, x, times)[0]

    sampler = method.build_sampler("dpmpp_2m", nfe)
    denoise = method.denoiser(params, {})
    walk = lambda sampler, denoise, x: dj.sample(sampler, denoise, None, x)

    def seconds(function, *arguments):
        # a fresh jit object each time; lowering is part of what a user waits for
        begin = time.process_time()
        jax.jit(lambda *a: function(*a)).lower(*arguments).compile()
        return time.process_time() - begin

    times = jnp.linspace(1.0, 0.01, nfe)
    ours, floor = [], []
    for _ in range(max(3, repeats // 3)):
        jax.clear_caches()
        floor.append(seconds(bare, params, x, times))
        jax.clear_caches()
        ours.append(seconds(walk, sampler, denoise, x))
    ratio = statistics.median(a / b for a, b in zip(ours, floor))
    return [("compile", "dpmpp_2m", statistics.median(ours), statistics.median(floor), ratio, 1.3)]


def programs():
    """Compilations caused by what should not cause any."""
    traces = []

    def denoise(x, t):
        traces.append(1)
        return 0.5 * x

    x, key = jnp.zeros((4, 2)), jax.random.key(0)
    make = dj.samplers
    groups = {
        "schedule floats": [make.ddim(dj.processes.VP(beta_max=b), 8) for b in (20.0, 18.0, 16.0)],
        "schedules": [make.ddim(p, 8) for p in (dj.processes.VP(), dj.processes.Cosine())],
        "grids": [make.ddim(dj.processes.VP(), 8, grid=g) for g in ("uniform", "quadratic")],
        "eta": [make.ddim(dj.processes.VP(), 8, eta=e) for e in (0.5, 0.7, 0.9)],
        "2M kinds": [
            make.dpm_solver_pp(dj.processes.VP(), 8, kind=k) for k in ("midpoint", "taylor")
        ],
        "3M released and exact": [
            make.dpm_solver_pp(dj.processes.VP(), 8, order=3, exact_d2=e) for e in (False, True)
        ],
        "bridge floats": [make.dbim(dj.processes.VPBridge(beta_d=b), 8) for b in (2.0, 1.5)],
        "bridges": [make.dbim(p, 8) for p in (dj.processes.VPBridge(), dj.processes.GmaxBridge())],
        "bridge eta": [make.dbim(dj.processes.VPBridge(), 8, eta=e) for e in (0.3, 0.6)],
        "third-order bridge floats": [
            make.dbim(dj.processes.VPBridge(beta_d=b), 8, order=3) for b in (2.0, 1.5)
        ],
        "bridge diffusion": [
            make.bridge_euler(dj.processes.VPBridge(), 8, kappa=k) for k in (1.5, 2.0)
        ],
        "bridge temperature": [
            make.bridge_tts(dj.processes.GmaxBridge(), 8, temperature=t) for t in (1.0, 2.0)
        ],
    }
    rows = []
    for what, solvers in groups.items():
        dj.sample(solvers[0], denoise, key, x).block_until_ready()
        before = len(traces)
        for solver in solvers[1:]:
            dj.sample(solver, denoise, key, x).block_until_ready()
        rows.append(("programs", what, None, None, len(traces) - before, 0))
    return rows


def measure(quick=False):
    """All rows: dictionaries with what, case, ours, floor, measured, goal and verdict."""
    repeats = 3 if quick else 9
    shape = (8, 16, 16, 3) if quick else (64, 32, 32, 3)
    rows = programs() + step_cost(repeats, shape)
    rows += sampler_cost(repeats) + sampler_cost(repeats, pairs=True)
    rows += train_cost(repeats) + compile_cost(repeats)
    names = ("what", "case", "ours", "floor", "measured", "goal")
    table = [dict(zip(names, row)) for row in rows]
    for row in table:
        row["verdict"] = "reached" if row["measured"] <= row["goal"] else "missed"
    return table


def main(argv=None) -> int:
    """Prints the table; writes it as JSON with `--out`."""
    parser = argparse.ArgumentParser(
        "python -m experiments.benchmarks.overhead", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run at all?")
    parser.add_argument("--out", help="JSON file for the rows")
    arguments = parser.parse_args(argv)
    rows = measure(arguments.quick)
    columns = ("what", "case", "ours", "floor", "measured", "goal", "verdict")
    print(markdown_table(rows, columns))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, CPU seconds")
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(rows, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
