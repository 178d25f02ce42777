"""`python -m diffusion_jax`: train, sample, evaluate, likelihood, statistics, inspect, list, doctor.

Mistakes of the user end in one line on standard error and exit status 2; `--debug` shows the traceback.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from diffusion_jax import commands, evaluate_commands

_DESCRIPTION = "Score, bridge and discrete diffusion models in JAX."
_EPILOG = """examples:
  python -m diffusion_jax train    --config=configs/digits/score.py --workdir=runs/score
  python -m diffusion_jax train    --config=configs/digits/score.py --workdir=runs/short \\
                                   --config.train.steps=200 --config.method.sampler=ddim
  python -m diffusion_jax sample   --workdir=runs/score --num=64 --sampler=dpmpp_2m --nfe=10 --out=grid.png
  python -m diffusion_jax evaluate --workdir=runs/score
  python -m diffusion_jax evaluate --features=inception --weights=pt_inception.pth --workdir=runs/cifar \
                                   --num=50000 --reference=cifar10-32x32.npz
  python -m diffusion_jax evaluate --text_model=gpt2 --workdir=runs/text
  python -m diffusion_jax likelihood --workdir=runs/score --num=100
  python -m diffusion_jax likelihood --workdir=runs/text --text news=a.txt --text books=b.txt --clean=text8
  python -m diffusion_jax statistics --workdir=runs/score
  python -m diffusion_jax inspect  --config=configs/digits/score.py
  python -m diffusion_jax list     samplers
  python -m diffusion_jax doctor
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m diffusion_jax",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    chosen = parser.add_subparsers(dest="command", metavar="command", required=True)

    def add(name, run, text):
        made = chosen.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.add_argument("--debug", action="store_true", help="show tracebacks")
        made.set_defaults(run=run)
        return made

    def add_checkpoint(made):
        made.add_argument(
            "--weights", help='"params" or "ema_<decay>" (default: the first average)'
        )
        made.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")

    def add_sampling(made):
        made.add_argument(
            "--sampler", help="a registered name (see: list samplers), or a table .npz"
        )
        made.add_argument("--nfe", type=int, help="network calls to spend at most")
        made.add_argument(
            "--option",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="an argument of the sampler, such as eta=0.5 or grid=karras; may be repeated",
        )
        add_checkpoint(made)

    def add_judges(made):
        made.add_argument(
            "--features",
            help="inception: FID, sFID, KID, precision, recall, Inception score; --weights=FILE is then the "
            "network's (.pth, .safetensors, .npz)",
        )
        made.add_argument(
            "--feature_weights",
            "--feature-weights",
            help="of --features, beside --weights of the run",
        )
        made.add_argument(
            "--preparation",
            default="pytorch_fid",
            help="of images for --features: pytorch_fid (default), or tensorflow (EDM, guided-diffusion)",
        )
        made.add_argument("--images", help="a folder or .npz to judge instead of a run's samples")
        made.add_argument(
            "--reference",
            help="statistics .npz (ours, EDM's, guided-diffusion's), a folder or .npz of images, or a text "
            "(default: the run's data)",
        )
        made.add_argument(
            "--statistics", help="write the statistics of the judged images to this .npz"
        )
        made.add_argument("--seed", type=int, help="of the samples (default 0)")
        made.add_argument(
            "--batch_size",
            type=int,
            help="samples; with --features images (64), with --text_model windows (8) at a time",
        )
        made.add_argument(
            "--text_model",
            "--text-model",
            help="folder of a GPT-2 (config.json, *.safetensors, tokenizer.json): generative perplexity, "
            "entropy, MAUVE",
        )
        made.add_argument("--texts", help="a file of texts, one a line, instead of a run's samples")
        made.add_argument(
            "--mauve", action="store_true", help="MAUVE against --reference or held-out data"
        )
        made.add_argument(
            "--window", type=int, help="tokens of a window (default: the model's most)"
        )
        made.add_argument("--stride", type=int, help="between windows (default: no overlap)")

    def add_processes(made):
        text = "several processes, found by JAX (SLURM, TPU pods, ...); see docs/launch.md"
        made.add_argument("--distributed", action="store_true", help=text)
        made.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
        made.add_argument("--num_processes", type=int, help="with --coordinator: how many")
        made.add_argument("--process_id", type=int, help="with --coordinator: which one this is")
        made.add_argument(
            "--heartbeat", type=int, help="seconds of silence that end a run (default 60)"
        )

    configured = "--config=FILE is required; override fields with --config.section.field=value"
    train = add("train", commands.command_train, f"train a config, or go on. {configured}")
    train.add_argument("--workdir", required=True, help="run folder; an existing run goes on")
    add_processes(train)
    train.add_argument(
        "--accept_changes", action="store_true", help="resume although the config changed"
    )
    train.add_argument(
        "--fallback", action="store_true", help="resume from an older checkpoint if damaged"
    )
    sample = add(
        "sample", commands.command_sample, "draw samples from a run folder into a picture or file"
    )
    sample.add_argument("--workdir", required=True, help="run folder")
    add_processes(sample)
    sample.add_argument("--num", type=int, default=64, help="number of samples (default 64)")
    sample.add_argument("--seed", type=int, default=0, help="sample i depends on seed and i alone")
    sample.add_argument("--label", type=int, help="one class for all (default: all in turn)")
    sample.add_argument(
        "--prompt", help='text to complete, "_" a token to fill, such as "To be, _ or"'
    )
    sample.add_argument("--prompt_file", "--prompt-file", help="a file of prompts, one a line")
    sample.add_argument(
        "--mask_symbol", "--mask-symbol", default="_", help="character to fill in prompts"
    )
    sample.add_argument("--batch_size", type=int, default=256, help="samples at a time")
    sample.add_argument("--out", required=True, help="file: .png, .npz, or .txt for text")
    sample.add_argument("--trajectory", action="store_true", help="draw how 8 samples come about")
    add_sampling(sample)
    evaluate = add(
        "evaluate",
        evaluate_commands.command_evaluate,
        "judge a run against held-out data and noise",
    )
    evaluate.add_argument("--workdir", help="run folder")
    evaluate.add_argument("--num", type=int, help="samples (default: as many as held-out examples)")
    add_sampling(evaluate)
    add_processes(evaluate)
    add_judges(evaluate)
    likelihood = add(
        "likelihood",
        commands.command_likelihood,
        "bits per dimension of held-out images by the probability-flow ODE; perplexity of token models, "
        "of held-out data or of any texts",
    )
    likelihood.add_argument("--workdir", required=True, help="run folder")
    likelihood.add_argument("--num", type=int, help="examples of a set (default: all)")
    likelihood.add_argument("--divergence", default="hutchinson", help="hutchinson or exact")
    likelihood.add_argument("--probes", type=int, default=1, help="of hutchinson, an example")
    likelihood.add_argument("--noise", default="rademacher", help="probes: rademacher or gaussian")
    likelihood.add_argument(
        "--dequantisation", default="centred", help="centred, tiled (arXiv 2011.13456) or none"
    )
    likelihood.add_argument(
        "--draws", type=int, help="images: dequantisations (default 1); tokens: of the bound (16)"
    )
    likelihood.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="tokens: a text in the run's own vocabulary; may be repeated (default: held-out data)",
    )
    likelihood.add_argument("--clean", help="of --text: text8 reduces it to a-z and single spaces")
    likelihood.add_argument(
        "--unknown",
        default="error",
        help="characters of --text outside the vocabulary: error, drop, or a symbol to put instead",
    )
    likelihood.add_argument("--levels", type=int, help="grey levels (default: found in the data)")
    likelihood.add_argument("--solver", default="dopri5", help="adaptive ODE solver")
    likelihood.add_argument("--rtol", type=float, default=1e-5, help="relative tolerance")
    likelihood.add_argument("--atol", type=float, default=1e-5, help="absolute tolerance")
    likelihood.add_argument("--max_steps", type=int, default=4096, help="steps tried at most")
    likelihood.add_argument("--seed", type=int, default=0, help="of noise and probes")
    likelihood.add_argument("--batch_size", type=int, default=100, help="examples at a time")
    likelihood.add_argument("--out", help="file .npz for latents and log densities")
    likelihood.add_argument("--sampler", help=argparse.SUPPRESS)
    add_checkpoint(likelihood)
    statistics = add(
        "statistics",
        commands.command_statistics,
        "measure the statistics of a run's model that --sampler=dpm_solver_v3 needs",
    )
    statistics.add_argument("--workdir", required=True, help="run folder")
    statistics.add_argument(
        "--num", type=int, default=512, help="training examples (default 512; papers: to 4096)"
    )
    statistics.add_argument("--intervals", type=int, default=120, help="of lam (default 120)")
    statistics.add_argument("--seed", type=int, default=0, help="of examples, noise and probes")
    statistics.add_argument("--batch_size", type=int, default=64, help="examples at a time")
    statistics.add_argument("--probes", type=int, default=1, help="random vectors an example")
    statistics.add_argument("--t_start", type=float, help="first time (default: the samplers')")
    statistics.add_argument("--t_end", type=float, help="last time (default: the samplers')")
    statistics.add_argument("--out", help="file .npz (default: statistics.npz in the run folder)")
    add_checkpoint(statistics)
    add(
        "inspect",
        commands.command_inspect,
        f"resolved config, shapes, cost; trains nothing. {configured}",
    )
    lists = add("list", commands.command_list, "names that configs and command lines take")
    lists.add_argument(
        "what", nargs="?", help=f"one of {', '.join([*commands.LISTS, *commands.MORE_LISTS])}"
    )
    add(
        "doctor",
        commands.command_doctor,
        "versions, devices, optional packages, a self-test of seconds",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("diffusion_jax").setLevel(logging.INFO)
    try:
        return commands.run_command(arguments, rest)
    except (ValueError, ImportError, OSError) as error:
        if arguments.debug:
            raise
        print(f"diffusion_jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
