"""What share of an accelerator's arithmetic a training step uses, and how fast sampling is beside PyTorch.

    python -m experiments.benchmarks.accelerator [--scale=cpu] [--torch /path/to/python] [--out FILE]

  training   DiT-L/2 (latents 32 x 32 x 4) and DDiT-medium (1,024 tokens of 50,257) in bfloat16, the step as
             `training.Trainer` compiles it, all devices: FLOPs a second over those of the devices' data
             sheets (`PEAKS`, or `--peak`), by three counts of the FLOPs of a step
               model    6 N T, N parameters that multiply a token (2 N forward, 4 N backward) and T tokens, and
                        12 C L a token and layer for attention over L tokens of width C: what is usually
                        meant by model FLOPs utilisation; recomputed operations do not count
               traced   all matrix products of the step as it is traced, recomputation included
               XLA      what the compiler says of its program; backends differ in whether they count the body of
                        a loop once
             goal on Hopper: 45 % by the first
  sampling   examples and tokens a second with the same networks, and of the same networks in PyTorch
             (`torch_transformers`: torch.compile, bfloat16, scaled_dot_product_attention), in turns in one run,
             where the Python of `--torch` has a PyTorch that sees the GPU

`--scale=cpu`, the default without an accelerator, runs tiny networks in float32: it shows that the script
works, its figures mean nothing.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time

os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
)  # PyTorch needs a part of the memory

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.builder import build_method
from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.evaluation import markdown_table
from diffusion_jax.training import TrainConfig, Trainer

# Dense bfloat16 FLOPs a second of one device, by a part of JAX's name for it; the first that is found.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61.5e12,  # a core, which JAX shows as a device
    "TPU v2": 22.5e12,
}
NETWORKS = {"dit": {"name": "dit", "size": "L/2"}, "ddit": {"name": "ddit", "size": "sedd-medium"}}
TINY = {"width": 64, "depth": 2, "heads": 2}
_IMAGE = {"side": 32, "channels": 4, "num_classes": 1000, "patch_size": 2}
_TOKENS = {"vocab_size": 50257, "length": 1024}
# Examples of a device in training (by its parts, one after the other) and in sampling; steps of sampling.
SCALES = {
    "gpu": {
        "dit": {**_IMAGE, "train": 64, "batch": 32, "steps": 50},
        "ddit": {**_TOKENS, "train": 32, "batch": 16, "steps": 64},
    },
    "cpu": {
        "dit": {**_IMAGE, "side": 8, "num_classes": 10, "train": 4, "batch": 2, "steps": 3},
        "ddit": {"vocab_size": 63, "length": 16, "train": 4, "batch": 2, "steps": 3},
    },
}


def peak_flops(kind, given=None):
    """FLOPs a second of a device of this kind in bfloat16; None for an unknown one."""
    if given is not None:
        return given
    return next((flops for part, flops in PEAKS.items() if part.lower() in kind.lower()), None)


def attention():
    """The implementation of attention: cuDNN's on NVIDIA GPUs."""
    gpu = jax.default_backend() == "gpu" and "nvidia" in jax.devices()[0].device_kind.lower()
    return "cudnn" if gpu else None


def build(network, case, scale, remat):
    """`(method, module, spec)` of a network at a scale."""
    fields = dict(NETWORKS[network]) if scale == "gpu" else {"name": network, **TINY}
    fields |= {"dtype": "bfloat16" if scale == "gpu" else "float32", "remat": remat}
    fields["attention_implementation"] = attention()
    if network == "ddit":
        spec = DataSpec(
            "tokens",
            {"tokens": Element((case["length"],), "int32")},
            vocab_size=case["vocab_size"],
        )
        config = {
            "process": {"name": "absorbing", "schedule": {"name": "linear", "eps_end": 1e-3}},
            "network": {**fields, "dropout": 0.0},
            "method": {"name": "masked", "sampler": "masked_ancestral"},
        }
    else:
        shape = (case["side"], case["side"], case["channels"])
        elements = {"image": Element(shape, "float32"), "label": Element((), "int32")}
        spec = DataSpec("image", elements, num_classes=case["num_classes"])
        fields["patch_size"] = case["patch_size"]
        config = {
            "process": {"name": "vp"},
            "network": fields,
            "method": {"name": "score", "sampler": "ddim"},
        }
    built = build_method(config, spec)
    return built.method, built.module, spec


def batch_of(spec, size):
    """A batch of noise, NumPy."""
    draw, batch = np.random.default_rng(0), {"index": np.arange(size, dtype=np.int32)}
    for name, element in spec.elements.items():
        shape = (size, *element.shape)
        if element.dtype == "float32":
            batch[name] = draw.standard_normal(shape).astype(np.float32)
        else:
            values = spec.vocab_size if name == "tokens" else spec.num_classes
            batch[name] = draw.integers(0, values, shape).astype(np.int32)
    return batch


def model_flops(params, module, tokens, examples):
    """FLOPs of a training step by the rule at the top of this file.

    Tables that are looked up multiply nothing; what reads the time and the label multiplies an example, not
    a token.

    Args:
      params: the parameters, anything with shapes.
      module: the network.
      tokens: of an example.
      examples: in the global batch.
    """
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("table"):
            continue
        each = 1 if "modulation" in name or "condition" in name else tokens
        total += 6.0 * math.prod(leaf.shape) * each
    total += 12.0 * module.width * tokens * tokens * module.depth
    return total * examples


def train_row(network, case, scale, remat, steps, peak):
    """A row of the training table."""
    method, module, spec = build(network, case, scale, remat)
    devices = jax.device_count()
    batch = batch_of(spec, case["train"] * devices)
    trainer = Trainer(method, batch, TrainConfig(batch_size=len(batch["index"]), steps=steps))
    state = trainer.layout.to_device(trainer.create(batch))
    seconds = []
    for step in range(3 + steps):
        begin = time.perf_counter()
        state, metrics = trainer.step(state, batch)
        loss = float(np.asarray(metrics)[trainer.names.index("loss")])
        seconds += [time.perf_counter() - begin] if step >= 3 else []
    if not math.isfinite(loss):
        raise FloatingPointError(f"{network}: the loss is {loss}")
    spent = statistics.median(seconds)
    tokens = case.get("length") or (case["side"] // case["patch_size"]) ** 2
    model = model_flops(trainer.abstract.params, module, tokens, len(batch["index"]))
    cost = trainer.compiled.cost_analysis() or {}
    counts = {
        "model": model,
        "traced": trainer.report["flops_per_step"],
        "XLA": cost.get("flops", math.nan) * devices,
    }
    available = None if peak is None else peak * devices
    share = lambda flops: "?" if available is None else f"{100 * flops / spent / available:.1f} %"
    return {
        "network": network,
        "parameters": trainer.report["parameters"],
        "batch": len(batch["index"]),
        "remat": str(remat),
        "ms a step": 1e3 * spent,
        "examples/s": len(batch["index"]) / spent,
        "TFLOP/s (model)": model / spent / 1e12,
        **{f"of the peak ({name})": share(flops) for name, flops in counts.items()},
        "GB a device": (trainer.report["bytes_per_device"] or 0) / 1e9,
    }


class Torch:
    """The worker process: `run()` gives the seconds of one run of sampling."""

    def __init__(self, python, case):
        worker = pathlib.Path(__file__).with_name("torch_transformers.py")
        self.process = subprocess.Popen(
            [python, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answer = self.ask(json.dumps(case))

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def run(self):
        return float(self.ask("run"))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def sampling_rows(network, case, scale, python, repeats):
    """Rows of the sampling table: ours, and PyTorch's where it can be had."""
    method, module, spec = build(network, case, scale, False)
    batch = {k: jnp.asarray(v) for k, v in batch_of(spec, case["batch"]).items()}
    params = jax.jit(method.init)(jax.random.key(0), batch)
    parameters = sum(x.size for x in jax.tree.leaves(params))
    if scale == "gpu":  # rounded once, not in every step
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, params)
    sampler = method.build_sampler(nfe=case["steps"])
    run = jax.jit(lambda params, key: method.sample(params, key, batch, sampler))

    def ours():
        begin = time.perf_counter()
        jax.block_until_ready(run(params, jax.random.key(1)))
        return time.perf_counter() - begin

    shape = {n: getattr(module, n) for n in ("width", "depth", "heads")}
    torch = Torch(python, {**case, **shape, "network": network, "gpu": scale == "gpu"})
    sides = {"diffusion_jax": ours}
    about = torch.answer or "error no answer"
    if not about.startswith("error"):
        about = json.loads(about)
        sides[f"PyTorch {about['version']}"] = torch.run
        if about["parameters"] != parameters:
            raise ValueError(
                f"{network}: {parameters} parameters, in PyTorch {about['parameters']}"
            )
    spent = {name: [] for name in sides}
    for run_once in sides.values():
        run_once()  # compiles
    for _ in range(repeats):
        for name, run_once in sides.items():
            spent[name].append(run_once())
    torch.close()
    first = statistics.median(spent["diffusion_jax"])
    each = case.get("length", 1)
    return [
        {
            "network": network,
            "side": name,
            "batch": case["batch"],
            "steps": case["steps"],
            "seconds": statistics.median(seconds),
            "unit": "tokens/s" if "length" in case else "images/s",
            "speed": case["batch"] * each / statistics.median(seconds),
            "ours is faster by": statistics.median(seconds) / first,
        }
        for name, seconds in spent.items()
    ] + ([{"network": network, "side": about}] if isinstance(about, str) else [])


def measure(scale, networks, python, remat, steps, repeats, peak):
    """`{"training": rows, "sampling": rows}`."""
    cases = SCALES[scale]
    return {
        "training": [train_row(n, cases[n], scale, remat, steps, peak) for n in networks],
        "sampling": [
            row for n in networks for row in sampling_rows(n, cases[n], scale, python, repeats)
        ],
    }


def main(argv=None) -> int:
    """Prints the tables; writes them as JSON with `--out`."""
    parser = argparse.ArgumentParser(
        "python -m experiments.benchmarks.accelerator", description=__doc__.split("\n")[0]
    )
    accelerated = jax.default_backend() != "cpu"
    parser.add_argument("--scale", choices=SCALES, default="gpu" if accelerated else "cpu")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--peak", type=float, help="bfloat16 FLOPs a second of a device")
    parser.add_argument("--remat", default="dots_no_batch", help="a policy, none: without")
    parser.add_argument("--batch", type=int, help="examples of a device in training")
    parser.add_argument("--steps", type=int, help="timed training steps")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--out", help="JSON file for the rows")
    arguments = parser.parse_args(argv)
    scale = arguments.scale
    if arguments.batch:
        for case in SCALES[scale].values():
            case["train"] = arguments.batch
    kind = jax.devices()[0].device_kind
    found = measure(
        scale,
        arguments.network,
        arguments.torch,
        arguments.remat,
        arguments.steps or (20 if scale == "gpu" else 2),
        5 if scale == "gpu" else 1,
        peak_flops(kind, arguments.peak),
    )
    for rows in found.values():
        columns = tuple(dict.fromkeys(name for row in rows for name in row))
        print(markdown_table([{c: row.get(c, "") for c in columns} for row in rows], columns))
        print()
    print(f"jax {jax.__version__}, {jax.device_count()} x {kind}, scale {scale}")
    if arguments.out:
        about = {"jax": jax.__version__, "device": kind, "devices": jax.device_count()}
        text = json.dumps({"scale": scale, **about, **found}, indent=2)
        pathlib.Path(arguments.out).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
