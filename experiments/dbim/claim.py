"""DBIM (arXiv 2405.15885): a trained bridge sampled with far fewer calls than DDBM's Heun sampler.

Three bridges, each trained once and sampled by every solver from the same sources: digits with a hole of 24
pixels (the yardstick), by a small transformer and by a smaller MLP, and Fashion-MNIST from its edges (left
out where that set is not prepared). Figures are means over the sampling seeds. "25 times" compares numbers
of calls at one Frechet distance: DBIM's at one of its points, and where Heun's curve, log-linear between
its points, first comes down to it; the largest ratio counts.

With the transformer every solver ends on digits within a fifth of held-out data: there is little left to
win, and eta = 1, which is closer to the truth in PSNR too, seems to mend some of the network's error by the
noise it draws on the way. With the MLP, whose errors show, Heun's sampler does not come down to order 2 at 20
calls in 500 of its own.

The second table is of codes: held-out images are encoded to their booting noise and decoded again, by the
explicit encoder with as many calls as the decoder, and by the implicit one.
"""

import dataclasses
import importlib

from diffusion_jax.builder import ConfigError
from experiments.dbim.bridges import (
    Case,
    draw_comparison,
    draw_interpolation,
    judge_of,
    on_pairs,
    reconstructions,
)
from experiments.reproduce import run_name, trained
from experiments.solvers.comparison import equal_error_calls, select

TITLE = "DBIM (arXiv 2405.15885)"
CLAIM = (
    "DBIM at 20 calls is no worse than DDBM's hybrid Heun sampler at 100 to 500, up to 25 times faster; orders"
    " 2 and 3 help at 5 to 10 calls; eta = 0 is best at few"
)
CONFIGS = {"cpu": "configs.digits.inpaint", "full": "configs.ddbm.edges2handbags"}
_LARGER = "configs.images.fashion_mnist_bridge"

_ETAS, _ORDERS, _FEW = (0.3, 0.8, 1.0), (2, 3), (5, 10, 20)
_HEUN = (11, 20, 50, 101, 200)
CASES = (
    *(Case("DDBM Heun", n, {"name": "ddbm_heun"}) for n in _HEUN),
    *(Case("DBIM", n, {"name": "dbim"}) for n in (2, *_FEW)),
    *(Case(f"DBIM order {r}", n, {"name": "dbim", "order": r}) for r in _ORDERS for n in _FEW),
    *(Case(f"DBIM eta={e}", n, {"name": "dbim", "eta": e}) for e in _ETAS for n in _FEW),
)
_WEAKER = (*CASES, Case("DDBM Heun", 500, {"name": "ddbm_heun"}))
_SHOWN = (
    *(Case("Heun", n, {"name": "ddbm_heun"}) for n in (11, 20, 200)),
    *(Case("DBIM", n, {"name": "dbim"}) for n in (2, 5, 20)),
    Case("DBIM order 2", 5, {"name": "dbim", "order": 2}),
)
# (label, calls of the decoder, options of `dbim_encode`, order of the decoder)
_CODES = (
    *(("explicit", n, {}, 1) for n in (5, 10, 20, 50, 100)),
    *(("explicit, order 2", n, {"order": 2}, 2) for n in (5, 10, 20, 50, 100)),
    *(("implicit, 1e-2", n, {"tolerance": 1e-2}, 1) for n in (5, 10, 20)),
    *(("implicit, 1e-4", n, {"tolerance": 1e-4}, 1) for n in (5, 10, 20)),
)


def _problems(options):
    """`(model, config, name of the run)` of each bridge that can be trained here."""
    module = CONFIGS[options.scale]
    if options.scale != "cpu":
        yield "edges2handbags", options.config, run_name(module)
        return
    yield "digits", options.config, run_name(module)
    weaker = importlib.import_module(module).get_config("mlp")
    yield "digits, MLP", weaker, run_name(module) + "_mlp"
    yield "fashion_mnist", importlib.import_module(_LARGER).get_config(), run_name(_LARGER)


def measure(options):
    """Rows of every bridge: samplers, and codes; writes two pictures of each."""
    rows = []
    for model, config, name in _problems(options):
        if options.num:
            config.evaluate.num = options.num
        own = dataclasses.replace(options, config=config)
        try:
            run = trained(config, own.workdir, name)
        except ConfigError as error:
            if model != "fashion_mnist":
                raise
            print(f"{model} is left out: {error}", flush=True)
            continue
        quality = judge_of(run, own.classifier)
        num = options.num or run.config["evaluate"].get("num") or 600
        cases = _WEAKER if model == "digits, MLP" else CASES
        rows += on_pairs(run, model, cases, quality, seeds=range(options.seeds), num=num)
        rows += reconstructions(run, model, _CODES, min(num, 200))
        draw_comparison(
            run, _SHOWN, options.home / f"{_file(model)}.png", title=f"{model}: restored"
        )
        draw_interpolation(
            run,
            options.home / f"{_file(model)}_interpolation.png",
            {"tolerance": 1e-4},
            nfe=20,
            title="from the truth (encoded, decoded) to another answer",
        )
    return rows


def _file(model):
    return model.replace(", ", "_").lower()


def speed_up(fast, slow):
    """`(times, calls)`: how many times more calls the slow curve needs for a distance of the fast one, at
    most, and the fast one's calls there; where the slow one never comes down to it, all of its calls count.
    """
    most = max(slow)
    return max(
        (min(equal_error_calls(slow, distance), most) / n, n) for n, distance in fast.items()
    )


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    out = []

    def at_most(statement, measured, most):
        out.append((f"{statement}, at most {most:g}", measured, measured <= most))

    for model in dict.fromkeys(row["model"] for row in rows):
        curves = select(rows, model, "frechet")
        dbim, heun = curves["DBIM"], curves["DDBM Heun"]
        for few, many in ((20, 101), (20, 200), (5, 50), (5, 200)):
            ratio = dbim[few] / heun[many]
            at_most(f"{model}: Frechet distance, DBIM at {few} over Heun at {many}", ratio, 1.05)
        curves["DBIM order 2"] |= {2: dbim[2]}  # two calls make no step of order 2
        for name in ("DBIM", "DBIM order 2"):
            times, calls = speed_up(curves[name], heun)
            statement = f"{model}: Heun's calls over those of {name} at one distance, up to 25"
            out.append((f"{statement} (at {calls})", times, times >= 25.0))
        for n in (5, 10):
            best = min(curves[f"DBIM order {r}"][n] for r in _ORDERS)
            statement = f"{model}: best of orders 2 and 3 over order 1 at {n} calls, below 1"
            out.append((statement, best / dbim[n], best < dbim[n]))
        for n in (5, 10):
            other = min(curves[f"DBIM eta={e}"][n] for e in _ETAS)
            at_most(
                f"{model}: eta=0 over the best of 0.3, 0.8, 1 at {n} calls", dbim[n] / other, 1.0
            )
        codes = select(rows, model, "rms")
        explicit, implicit = codes["explicit"], codes["implicit, 1e-4"]
        error = f"{model}: reconstruction error"
        at_most(f"{error}, explicit at 100 calls over 10", explicit[100] / explicit[10], 0.5)
        at_most(f"{error} at 20 calls, implicit over explicit", implicit[20] / explicit[20], 0.01)
    return tuple(out)


def report(rows):
    """The two tables."""
    from diffusion_jax.evaluation import markdown_table

    codes = [row for row in rows if "rms" in row]
    drawn = [{k: v for k, v in row.items() if k != "source"} for row in rows if "rms" not in row]
    columns = ["model", "sampler", "nfe", "frechet", "frechet_std", "texture", "psnr"]
    made = markdown_table(drawn, columns)
    columns = ["model", "sampler", "nfe", "encoder_nfe", "rms", "rms_worst", "noise_std"]
    return (
        made
        + "\nCodes: encoded to the booting noise and decoded again.\n\n"
        + markdown_table(codes, columns)
    )
