"""DiDi-Instruct (arXiv 2509.25035): a masked model distilled into 8 to 16 steps against its own many.

The small twin draws countdown sequences (`experiments.lsd.countdown`), whose wrong neighbours can be counted.
"error" is the share of them; "entropy" is that of the tokens of one sequence; "diversity" that of the tokens
at one place over all sequences: a student that draws one good sequence again and again has a low one.
"extra" counts the calls of the discriminator that reward-guided sampling makes beside the `nfe` calls of the
network: those with a gradient, and those without.

The claim does not hold at this scale. In 350 steps the discriminator learns to tell the student's two-step
samples apart (cross-entropy .39 of at least .325), but the student does not follow: its errors are 5 to 10 %
above the teacher's at equal calls, at the teacher's entropy, which the bonus of .05 keeps up. Pushed harder
(learning rate 2e-4 instead of 5e-5, divergences .01, bonus .02, 500 steps) it collapsed: entropy 2.5 instead
of 3.0 with 8 calls, and more errors, .42. The paper's student takes 10,000 steps at 1e-6 from a discriminator
that begins as a language model of 131M parameters. On 8x8 digits (the model of configs/digits/masked.py) the
discriminator itself learned nothing in 300 steps: the teacher's two-step samples are too close to the data.
Reward-guided sampling gains 1 to 2 %, well inside the spread of the seeds.
"""

import jax
import numpy as np

from diffusion_jax import builder
from diffusion_jax import run as runs
from diffusion_jax.methods import critic_of
from diffusion_jax.samplers import build_sampler, reward_calls, reward_guided, sequence_entropy
from diffusion_jax.training import restore_params
from experiments.lsd import countdown
from experiments.reproduce import run_name, trained

TITLE = "DiDi-Instruct (arXiv 2509.25035)"
CLAIM = "a student of 8 to 16 calls is as good as its masked teacher with 128 or more"
CONFIGS = {"cpu": "configs.text.didi_countdown", "full": "configs.didi_instruct.openwebtext"}
TEACHERS = {"cpu": "configs.text.countdown_masked", "full": "configs.mdlm.openwebtext"}
_FEW, _MANY = (8, 16), 128
_GUIDANCE = {"cpu": {"strength": (3.0, 4.0), "candidates": 4}, "full": {}}


def _figures(tokens, options, vocab_size):
    tokens = np.asarray(tokens)
    figures = {
        "entropy": sequence_entropy(tokens, vocab_size),
        "diversity": sequence_entropy(tokens.T, vocab_size),
    }
    return {"error": countdown.error_rate(tokens), **figures} if options.scale == "cpu" else figures


def _row(model, sampler, nfe, extra, found):
    row = {"model": model, "sampler": sampler, "nfe": nfe, "extra": extra}
    for figure in found[0]:
        values = [f[figure] for f in found]
        row[figure] = float(np.mean(values))
        row[f"{figure}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    print(row, flush=True)
    return row


def measure(options):
    """Rows of teacher and student; trains what does not stand."""
    module = TEACHERS[options.scale]
    teacher_config, config = options.load(module), options.config.copy_and_resolve_references()
    if options.scale == "cpu":
        file = options.workdir / "countdown.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        countdown.write(file)
        teacher_config.data.path = config.data.path = str(file)
    teacher = trained(teacher_config, options.workdir, run_name(module))
    config.train.init_from = str(teacher.workdir)
    student = trained(config, options.workdir, run_name(CONFIGS[options.scale]))
    num, vocab_size = options.num or 128, teacher.spec.vocab_size
    batch, length = runs.conditions(teacher, num), teacher.spec.shape[0]
    process = teacher.method.process

    def of(run, model, sampler, name, extra=None):
        found = []
        for seed in range(options.seeds):
            tokens = run.method.sample(run.params, jax.random.key(seed), batch, sampler)
            found.append(_figures(tokens, options, vocab_size))
        return _row(model, name, sampler.nfe, extra, found)

    held_out = teacher.source("test")
    data = held_out.take(np.arange(min(num, len(held_out))))["tokens"]
    rows = [_row("held-out data", "", 0, None, [_figures(data, options, vocab_size)])]
    for run, model, calls in ((teacher, "teacher", (*_FEW, _MANY)), (student, "student", _FEW)):
        for nfe in calls:
            sampler = build_sampler(process, "masked_ancestral", nfe, length=length)
            rows.append(of(run, model, sampler, "ancestral"))
    # what a temperature alone does: the same entropy for nothing
    for nfe in _FEW:
        sampler = build_sampler(process, "masked_ancestral", nfe, length=length, temperature=0.7)
        rows.append(of(teacher, "teacher", sampler, "ancestral, temperature 0.7"))
    made = builder.build_method(student.config, student.spec)
    like = jax.eval_shape(
        student.method.init_state, jax.random.key(0), student.params, student.spec.zeros(2)
    )
    critic = restore_params(student.workdir, "method", target=like)["critic"]
    reward = critic_of(made.module, student.spec).log_odds(critic, batch)
    for run, model in ((student, "student"), (teacher, "teacher")):
        for nfe in _FEW:
            guidance = _GUIDANCE[options.scale]
            guided = reward_guided(process, nfe, reward=reward, length=length, **guidance)
            extra = "{} + {}".format(*reward_calls(guided))
            rows.append(of(run, model, guided, "reward-guided", extra))
    return rows


def _pick(rows, model, nfe, figure, sampler="ancestral"):
    return next(
        r[figure] for r in rows if (r["model"], r["sampler"], r["nfe"]) == (model, sampler, nfe)
    )


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    figure = "error" if any("error" in row for row in rows) else "entropy"
    out = []
    for ours, theirs in ((8, 8), (16, 16), (8, _MANY), (16, _MANY)):
        ratio = _pick(rows, "student", ours, figure) / _pick(rows, "teacher", theirs, figure)
        what = f"{figure}, student at {ours} over teacher at {theirs}, at most 1"
        out.append((what, ratio, ratio <= 1.0))
    for name in ("entropy", "diversity"):
        for nfe in _FEW:
            lost = _pick(rows, "teacher", _MANY, name) - _pick(rows, "student", nfe, name)
            what = f"{name} that the student at {nfe} lacks of the teacher's at {_MANY}, nats, at most 0.1"
            out.append((what, lost, lost <= 0.1))
    for model in ("student", "teacher"):
        for nfe in _FEW:
            guided = _pick(rows, model, nfe, figure, "reward-guided")
            ratio = guided / _pick(rows, model, nfe, figure)
            what = f"{figure}, {model} at {nfe}, reward-guided over ancestral, below 1"
            out.append((what, ratio, ratio < 1.0))
    return tuple(out)
