"""What a training step costs on many devices, read from the program that is compiled for them.

    python -m experiments.benchmarks.sharding [--devices 8 64 256] [--network dit ddit] [--out FILE]

Nothing runs and no parameter is made: for each mesh a process with that many virtual CPU devices compiles
the step as `training.Trainer` would run it, for DiT-L/2 (latents 32 x 32 x 4) and DDiT-medium (1,024 tokens)
at their full width and depth, and the program that XLA's partitioner makes of it is read: what every device
sends in a step (`hlo_traffic`), against the least that this way of splitting needs; the memory that is
planned; what lies whole on every device although a mesh axis could split it.

  least traffic, p bytes of parameters, n devices on the axis
    data     one all-reduce of the gradients                              2 (n - 1) / n p
    fsdp     all-gather for the forward pass, again for the backward pass of what is rematerialised,
             reduce-scatter of the gradients                        (2 to 3) (n - 1) / n p
    model    a layer sums its two branches over the devices: forward, backward, and again where it is
             rematerialised (the gradient of its gates needs them), each   2 (n - 1) / n a,
             a bytes of activations [batch, length, width] on a device

Compute is float32, so that bytes are those of the parameters; `--dtype=bfloat16` halves nearly all of
them (the CPU backend computes in float32 all the same, after the program that is read). Programs of a TPU
or GPU compiler differ in what is fused and overlapped, not in what is sent, but for the pair all-reduce
and slice, see `hlo_traffic`.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from experiments.benchmarks import hlo_traffic

NETWORKS = {
    "dit": {"name": "dit", "size": "L/2"},
    "ddit": {"name": "ddit", "size": "sedd-medium"},
    "uvit": {"name": "uvit", "size": "ImageNet-256 L/2"},
    "adm": {"name": "adm_unet", "size": "edm-imagenet-64x64-cond"},
    "edm2": {"name": "edm2_unet", "size": "S"},
    "tiny_dit": {"name": "dit", "width": 128, "depth": 3, "heads": 4},
    "tiny_ddit": {"name": "ddit", "width": 128, "depth": 3, "heads": 4},
    "tiny_unet": {"name": "unet", "channels": 64},
}
MESHES = {
    8: [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "model": 2}],
    64: [{"data": 64}, {"fsdp": 64}, {"data": 8, "fsdp": 8}, {"fsdp": 32, "model": 2}],
    256: [{"data": 256}, {"data": 16, "fsdp": 16}, {"data": 4, "fsdp": 32, "model": 2}],
}
ROWS = 5  # examples on a device: the global batch is then a number that no axis of a network has
_LARGE = 2**20
_BLOCKS = ("block", "resample", "attention")  # in names of what is rematerialised


def problem(network, batch_size, remat, dtype):
    """`(method, network, batch of zeros)` of a network of `NETWORKS`."""
    import numpy as np

    from diffusion_jax.builder import build_method
    from diffusion_jax.data.source import DataSpec, Element

    index, tiny = np.arange(batch_size, dtype=np.int32), network.startswith("tiny")
    config = {"network": {**NETWORKS[network], "remat": remat, "dtype": dtype}}
    if network.endswith("ddit"):
        length, vocab_size = (32, 1023) if tiny else (1024, 50257)
        spec = DataSpec("tokens", {"tokens": Element((length,), "int32")}, vocab_size=vocab_size)
        config["process"] = {"name": "absorbing", "schedule": {"name": "linear", "eps_end": 1e-3}}
        config["method"] = {"name": "masked"}
        batch = {"tokens": np.zeros((batch_size, length), np.int32), "index": index}
    else:
        side, channels = (8, 3) if tiny else (64, 3) if network == "adm" else (32, 4)
        image, label = Element((side, side, channels), "float32"), Element((), "int32")
        spec = DataSpec("image", {"image": image, "label": label}, num_classes=1000)
        config |= {"process": {"name": "vp"}, "method": {"name": "score"}}
        if network in ("adm", "edm2"):
            config["process"] = {"name": "edm"}
            config["method"] |= {"parameterization": "edm", "uncertainty": network == "edm2"}
        images = np.zeros((batch_size, *image.shape), np.float32)
        batch = {"image": images, "label": np.zeros(batch_size, np.int32), "index": index}
    built = build_method(config, spec)
    return built.method, built.module, batch


def compile_step(case):
    """A case in this process, which has its devices: the numbers that are in no program text."""
    import jax
    import numpy as np

    from diffusion_jax.training import TrainConfig, Trainer
    from diffusion_jax.training.parallel import leaf_names

    mesh = {"data": 1, "fsdp": 1, "model": 1, **case["mesh"]}
    batch_size = ROWS * mesh["data"] * mesh["fsdp"] * case["microbatches"]
    fields = (case["remat"], case["dtype"])
    method, module, batch = problem(case["network"], batch_size, *fields)
    config = TrainConfig(
        batch_size=batch_size,
        microbatches=case["microbatches"],
        parallel={**case["mesh"], "min_size": case["min_size"]},
    )
    trainer = Trainer(method, batch, config)
    memory = trainer.compiled.memory_analysis()
    size = lambda x, shape: math.prod(shape) * x.dtype.itemsize
    leaves = list(zip(leaf_names(trainer.abstract), jax.tree.leaves(trainer.abstract)))
    whole = collections.defaultdict(int)
    for name, leaf in leaves:
        if name.startswith("params/") and mesh["fsdp"] * mesh["model"] > 1:
            own = leaf.sharding.shard_shape(leaf.shape)
            if own == leaf.shape and size(leaf, leaf.shape) >= case["large"]:
                whole[name.removeprefix("params/")] = size(leaf, leaf.shape)
    params = [(n.removeprefix("params/"), x) for n, x in leaves if n.startswith("params/")]
    split = {
        name: (size(x, x.shape), size(x, x.sharding.shard_shape(x.shape))) for name, x in params
    }
    print(
        "RESULT"
        + json.dumps(
            {
                "mesh": mesh,
                "batch_size": batch_size,
                "parameters": trainer.report["parameters"],
                "split": split,
                "fsdp": {n: "fsdp" in str(x.sharding.spec) for n, x in params},
                "state": sum(size(x, x.sharding.shard_shape(x.shape)) for _, x in leaves),
                "batch": sum(np.asarray(x).nbytes for x in batch.values()) // batch_size * ROWS,
                "arguments": memory.argument_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
                "flops": trainer.report["flops_per_step"],
                "compile_seconds": trainer.report["compile_seconds"],
                "whole": whole,
                "activation": _activation(module, batch),
                "depth": getattr(module, "depth", 0),
            }
        )
    )


def _activation(module, batch):
    """Bytes of the residual stream of a transformer on one device, in float32; 0 for other networks."""
    width = getattr(module, "width", 0)
    if "tokens" in batch:
        return 4 * ROWS * batch["tokens"].shape[1] * width
    pixels = math.prod(batch["image"].shape[1:3])
    return 4 * ROWS * pixels // getattr(module, "patch_size", 1) ** 2 * width


def run(
    network,
    mesh,
    remat="full",
    dtype="float32",
    microbatches=1,
    min_size=2**14,
    large=_LARGE,
    dump=None,
):
    """A case in a process of its own: `(what compile_step prints, the partitioned program)`.

    Raises:
      RuntimeError: it failed; the message ends with what it wrote.
    """
    case = {
        "network": network,
        "mesh": mesh,
        "remat": remat,
        "dtype": dtype,
        "microbatches": microbatches,
        "min_size": min_size,
        "large": large,
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(dump or folder)
        flags = [
            f"--xla_force_host_platform_device_count={math.prod(mesh.values())}",
            f"--xla_dump_to={folder}",
            "--xla_dump_hlo_pass_re=spmd-partition.*",
            "--xla_backend_optimization_level=0",  # of the machine code, which is not looked at
            "--xla_llvm_disable_expensive_passes=true",
        ]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
        command = [sys.executable, "-m", "experiments.benchmarks.sharding", "--case"]
        done = subprocess.run(
            [*command, json.dumps(case)], env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        files = list(folder.glob("*after_spmd-partitioning*"))
        program = max(files, key=lambda path: path.stat().st_size).read_text()
    return json.loads(done.stdout.split("RESULT")[1]), program


def least(found, remat):
    """The least bytes a device has to send in a step, by mesh axis, see the top of this file."""
    mesh = found["mesh"]
    share = lambda axis: (mesh[axis] - 1) / mesh[axis]
    remat = remat not in (False, "none")
    wire = {"data": 0.0, "fsdp": 0.0, "model": 0.0}
    for name, (_, own) in found["split"].items():
        split = found["fsdp"][name]
        part = own * mesh["fsdp"] if split else own  # what this device's part of `model` has
        again = remat and any(part in name for part in _BLOCKS)
        if split:
            wire["fsdp"] += (3 if again else 2) * share("fsdp") * part
            wire["data"] += 2 * share("data") * own
        else:
            wire["fsdp"] += 2 * share("fsdp") * part
            wire["data"] += 2 * share("data") * part
    sums = found["depth"] * (6 if remat else 4)
    wire["model"] = sums * 2 * share("model") * found["activation"]
    return wire


def measure(network, mesh, remat="full", **options):
    """A row of the tables, plain data."""
    begin = time.perf_counter()
    found, program = run(network, mesh, remat, **options)
    traffic = hlo_traffic.collectives(program, found["mesh"])
    kinds = collections.defaultdict(lambda: {"ops": 0, "runs": 0, "bytes": 0, "wire": 0.0})
    for c in traffic:
        size = "scalars" if c.size < 2**10 else "arrays"
        row = kinds[c.kind, c.axes or f"{c.group} devices", size]
        row["ops"] += 1
        row["runs"] += c.times
        row["bytes"] += c.times * c.size
        row["wire"] += c.wire
    needed = least(found, remat)
    needed["fsdp"] *= options.get("microbatches", 1)  # each is gathered for and scattered from
    batch_split = found["mesh"]["data"] * found["mesh"]["fsdp"] > 1
    limit = options.get("large", _LARGE)
    whole = hlo_traffic.with_dimension(program, found["batch_size"], limit) if batch_split else []
    return {
        "network": network,
        "remat": remat,
        "dtype": options.get("dtype", "float32"),
        "microbatches": options.get("microbatches", 1),
        **{k: v for k, v in found.items() if k not in ("split", "fsdp", "whole")},
        "collectives": [
            {"kind": k, "axes": a, "size": s, **v} for (k, a, s), v in sorted(kinds.items())
        ],
        "largest_gather": max((c.size for c in traffic if c.kind == "all-gather"), default=0),
        "wire": sum(c.wire for c in traffic),
        "least": needed,
        "factor": sum(c.wire for c in traffic) / max(sum(needed.values()), 1.0),
        "whole_parameters": found["whole"],
        "whole_activations": [f"{o} {t} {n}" for o, t, n in whole[:10]],
        "seconds": time.perf_counter() - begin,
    }


def tables(rows):
    """The rows as text: a table of all cases, one of their collectives, and what lies whole."""
    from diffusion_jax.evaluation import markdown_table

    mega = lambda n: f"{n / 1e6:,.1f}"
    name = lambda row: " ".join(f"{a}={n}" for a, n in row["mesh"].items() if n > 1)
    cases = [
        {
            "network": row["network"],
            "mesh": name(row),
            "state MB": mega(row["state"]),
            "arguments MB": mega(row["arguments"]),
            "temporary MB": mega(row["temporary"]),
            "sent MB": mega(row["wire"]),
            "least MB": mega(sum(row["least"].values())),
            "factor": f"{row['factor']:.2f}",
            "largest gather MB": mega(row["largest_gather"]),
            "whole": len(row["whole_parameters"]) + len(row["whole_activations"]),
            "compile s": f"{row['compile_seconds']:.0f}",
        }
        for row in rows
    ]
    text = [markdown_table(cases, tuple(cases[0]))]
    kinds = [
        {
            "network": row["network"],
            "mesh": name(row),
            "collective": f"{c['kind']} ({c['size']})",
            "over": c["axes"],
            "in the program": c["ops"],
            "runs a step": c["runs"],
            "MB": mega(c["bytes"]),
            "sent MB": mega(c["wire"]),
        }
        for row in rows
        for c in row["collectives"]
    ]
    text.append(markdown_table(kinds, tuple(kinds[0])))
    for row in rows:
        for parameter, size in row["whole_parameters"].items():
            text.append(f"{row['network']} {name(row)}: {parameter} whole, {mega(size)} MB")
        for activation in row["whole_activations"]:
            text.append(f"{row['network']} {name(row)}: the whole batch in {activation}")
    return "\n\n".join(text)


def main(argv=None) -> int:
    """Prints the tables; writes the rows as JSON with `--out`."""
    parser = argparse.ArgumentParser(
        "python -m experiments.benchmarks.sharding", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 256], choices=MESHES)
    parser.add_argument("--network", nargs="+", default=["dit", "ddit"], choices=NETWORKS)
    parser.add_argument("--mesh", help='one mesh instead, "data=2,fsdp=4"')
    parser.add_argument("--remat", default="full", help="a policy, none: without")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--out", help="JSON file for the rows")
    parser.add_argument("--dump", help="folder that keeps the programs")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.case:
        compile_step(json.loads(arguments.case))
        return 0
    meshes = [mesh for n in arguments.devices for mesh in MESHES[n]]
    if arguments.mesh:
        parts = (part.split("=") for part in arguments.mesh.split(","))
        meshes = [{axis: int(size) for axis, size in parts}]
    rows = []
    for network in arguments.network:
        for mesh in meshes:
            rows.append(
                measure(
                    network,
                    mesh,
                    arguments.remat,
                    dtype=arguments.dtype,
                    microbatches=arguments.microbatches,
                    dump=arguments.dump,
                )
            )
            if arguments.out:  # what is there so far
                pathlib.Path(arguments.out).write_text(json.dumps(rows, indent=2) + "\n")
    print(tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
