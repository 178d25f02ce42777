"""CDBM (arXiv 2410.22637): a bridge fine-tuned into a consistency function answers in two calls.

The base bridge is that of `experiments/dbim`; both objectives begin from its averaged parameters and are
sampled with theirs. Figures are means over the sampling seeds; all samplers answer the same sources.

Found on the digits (1500 steps at batch 64): two calls are as good as the base with 20 calls of DBIM and, within
the spread of the seeds, with 101 of DDBM's sampler; four calls are better than either. The raw ratio to DBIM
with two calls cannot come down to 0.65: the base is good at two calls already, and held-out data themselves
are at 0.56 of it. What is above held-out data does come down, to 0.29.

Why more calls may make it worse, and what each costs ("variants" change one thing of the config each):
- gap: every gap between the data and t hands on the errors of the function at r. With a gap of 0.05 there are
  twenty of them, h at the middle times that h is noised to is worst, and every further call adds its error;
  with 0.3 there are four, and further calls help (eight are no better than four).
- student not clipped: a target that is clipped to [-1, 1] pulls saturated pixels of a student that is not
  inwards at every gap.
- boot at 0.999, where DBIM's sampler boots: the noise is a tenth of its largest, uniform times hardly come
  there, and the network has to enlarge it. At 0.95 the boot's own error is 1 % of the standard deviation.
"""

import importlib
import json

import jax

from diffusion_jax import evaluation
from diffusion_jax import run as runs
from diffusion_jax.samplers import build_sampler
from experiments.dbim.bridges import Case, judge_of, on_pairs
from experiments.reproduce import pick, run_name, trained

TITLE = "CDBM (arXiv 2410.22637)"
CLAIM = (
    "two calls of a consistency bridge are no worse than DBIM or DDBM's sampler with 8 to 100 on the model it "
    "was made from, and more calls improve it"
)
CONFIGS = {"cpu": "configs.digits.cdbm", "full": "configs.cdbm.edges2handbags"}
BASES = {"cpu": "configs.digits.inpaint", "full": "configs.ddbm.edges2handbags"}
OBJECTIVES = {"CBT": {}, "CBD": {"method": {"objective": "distillation"}}}
VARIANTS = {
    "student not clipped": {"method": {"saturation": "none"}},
    "boot at 0.999": {"method": {"t_start": 0.999}},
    "gap 0.05": {"method": {"gap_options": {"dt": 0.05}}},
}

_CALLS, _HEUN = (2, 3, 4, 8), (8, 20, 101)
_OF_BASE = (
    *(Case("DBIM", n, {"name": "dbim"}) for n in (2, 3, 4, 5, 8, 10, 20)),
    *(Case("DBIM order 2", n, {"name": "dbim", "order": 2}) for n in (5, 10)),
    *(Case("DDBM Heun", n, {"name": "ddbm_heun"}) for n in _HEUN),
)
_REFERENCES = 2  # rows of `on_pairs` that are the same for every model
_COLUMNS = ("model", "sampler", "nfe", "frechet", "frechet_std", "texture", "psnr")


def _tuned(options, base, label, changes):
    """The run of the config with changes in its sections, begun from the base."""
    config = options.config.copy_and_resolve_references()
    with config.unlocked():
        for section, fields in changes.items():
            config[section].update(fields)
    config.train.init_from = str(base.workdir)
    return trained(config, options.workdir, f"{run_name(CONFIGS[options.scale])}_{label}")


def _cases(run, label):
    options = {"t_start": float(run.method.default_sampler.times[1])}
    return tuple(Case(label, n, {"name": "consistency_bridge", **options}) for n in _CALLS)


def _memory(run, label):
    """What the training step of a run holds: copies of the parameters, and bytes as compiled."""
    report = json.loads((run.workdir / "report.json").read_text())
    return {
        "model": "memory",
        "sampler": label,
        "copies": report["state_bytes"] / (4.0 * report["parameters"]),
        "state_mb": report["state_bytes"] / 1e6,
        "temporary_mb": report["temporary_bytes"] / 1e6,
    }


def _draw(base, shown, path):
    """Writes a picture: the source, the base, both consistency models by number of calls, the truth."""
    batch = runs.conditions(base, 12)
    few = [(base, (Case("DBIM", n, {"name": "dbim"}) for n in (2, 5, 20)))]
    sets = {"source": batch["source"]}
    for run, cases in (*few, *shown):
        for label, nfe, options in cases:
            sampler = build_sampler(run.method.process, nfe=nfe, **options)
            drawn = runs.draw(run, batch, jax.random.key(0), sampler=sampler)
            sets[f"{label}, {nfe} calls"] = drawn
    grid = evaluation.comparison_grid(sets | {"truth": batch["image"]}, title=TITLE)
    evaluation.save_png(path, grid)


def measure(options):
    """Rows of the base, of both objectives, of memory and of the variants; writes a picture."""
    module = BASES[options.scale]
    base = trained(importlib.import_module(module).get_config(), options.workdir, run_name(module))
    quality = judge_of(base, options.classifier)
    num = options.num or base.config["evaluate"].get("num") or 300
    judge = {"seeds": range(options.seeds), "num": num}
    model = base.config["data"].get("data", base.config["data"]["name"])
    rows = on_pairs(base, model, _OF_BASE, quality, **judge)
    memory, shown = [_memory(base, "DDBM")], []
    for label, changes in OBJECTIVES.items():
        run = _tuned(options, base, label, changes)
        cases = _cases(run, label)
        rows += on_pairs(run, model, cases, quality, **judge)[_REFERENCES:]
        memory.append(_memory(run, label))
        shown.append((run, cases))
    for label, changes in VARIANTS.items() if options.scale == "cpu" else ():
        run = _tuned(options, base, label.replace(" ", "_"), changes)
        rows += on_pairs(run, "variants", _cases(run, label), quality, **judge)[_REFERENCES:]
    _draw(base, shown, options.home / f"{model}.png")
    return rows + memory


def report(rows):
    """Two tables: figures, and memory."""
    figures = [row for row in rows if row["model"] != "memory"]
    memory = [row for row in rows if row["model"] == "memory"]
    return "\n".join(
        (
            evaluation.markdown_table([{k: r.get(k) for k in _COLUMNS} for r in figures], _COLUMNS),
            evaluation.markdown_table(memory, list(memory[0])),
        )
    )


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    rows = [row for row in rows if row["model"] not in ("memory", "variants")]
    two, four, distilled = pick(rows, "CBT", 2), pick(rows, "CBT", 4), pick(rows, "CBD", 2)
    compared = [
        ("CBT at 2 over DBIM at 2, at most 0.65", two / pick(rows, "DBIM", 2), 0.65),
        ("CBD at 2 over DBIM at 2, at most 0.65", distilled / pick(rows, "DBIM", 2), 0.65),
        ("CBT at 2 over DBIM at 5, at most 1.1", two / pick(rows, "DBIM", 5), 1.1),
        ("CBD at 2 over DBIM at 5, at most 1.1", distilled / pick(rows, "DBIM", 5), 1.1),
        ("CBT at 2 over DBIM at 8, at most 1", two / pick(rows, "DBIM", 8), 1.0),
    ]
    for n in _HEUN:
        heun = pick(rows, "DDBM Heun", n)
        compared.append((f"CBT at 2 over DDBM's sampler at {n}, at most 1", two / heun, 1.0))
    floor = pick(rows, "held-out data", 0)
    above = lambda value: (value - floor) / (pick(rows, "DBIM", 2) - floor)
    compared += [
        ("CBT at 2 over DBIM at 2, both less held-out data's, at most 0.65", above(two), 0.65),
        (
            "CBD at 2 over DBIM at 2, both less held-out data's, at most 0.65",
            above(distilled),
            0.65,
        ),
        (
            "CBT at 4 over DDBM's sampler at 101, at most 1",
            four / pick(rows, "DDBM Heun", 101),
            1.0,
        ),
        ("CBT at 3 over CBT at 2, at most 1", pick(rows, "CBT", 3) / two, 1.0),
        ("CBT at 4 over CBT at 3, at most 1", four / pick(rows, "CBT", 3), 1.0),
        ("CBD at 4 over CBD at 2, at most 1", pick(rows, "CBD", 4) / distilled, 1.0),
        ("CBT at 4 over DBIM at 10, at most 1", four / pick(rows, "DBIM", 10), 1.0),
    ]
    return tuple(
        (f"Frechet distance, {what}", measured, measured <= most)
        for what, measured, most in compared
    )
