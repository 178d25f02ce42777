"""CDBM: a trained bridge fine-tuned into a consistency function (arXiv 2410.22637).

Begin from the bridge: `config.train.init_from`. The network, its parameterization and the process stay as
they were; `guidance.bridge_consistency` turns the denoiser into the consistency function and the sampler
"consistency_bridge" draws in two calls.

Two objectives (`objectives.consistency`):
- "training": x_r from the same data, source and noise as x_t; no teacher.
- "distillation": x_r by one step of the frozen initial model, which is the method's state.

Copies of the parameters, beside the optimiser's (two for RAdam and Adam): the student and one for each
average; "distillation" holds the teacher, one more. The target is the student itself behind a
stop-gradient, or the first average: never a copy of its own. A step runs student and target, and the
teacher once (solver order 1) or twice (2); only the student's activations are kept for the gradient.

With `clip` the x0_hat of student, target and teacher are clipped as in sampling, the student's with the
gradient of the identity. A target that is clipped where the student is not pulls saturated pixels inwards,
once for every gap on the way to the source (`experiments/cdbm` has figures).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import objectives
from diffusion_jax.guidance.consistency import bridge_consistency, bridge_ode_map
from diffusion_jax.guidance.transforms import clip as clip_transform
from diffusion_jax.methods.base import OBJECTIVE, Method, assemble
from diffusion_jax.methods.bridge import bridge, source_of
from diffusion_jax.objectives import consistency as pieces
from diffusion_jax.processes import BridgeProcess
from diffusion_jax.registry import check_choice, register

OBJECTIVES = ("training", "distillation")
TARGETS = ("student", "ema")
SATURATION = ("straight_through", "hard", "none")
_BOOT_GAP = 1e-3  # of the paper's clock


@register("method", "consistency_bridge", family="bridge", paper="2410.22637")
def consistency_bridge(
    process,
    module,
    spec,
    *,
    objective: str = "training",
    parameterization: str = "ddbm",
    sigma_data: float = 0.5,
    sigma_source: float = 0.5,
    covariance: float = 0.0,
    source_input: bool = True,
    masked: bool = False,
    label_dropout: float = 0.0,
    guidance: float = 1.0,
    gap: str = "constant",
    gap_options: Mapping[str, Any] | None = None,
    weight: str = "constant",
    distance: str = "pseudo_huber",
    distance_options: Mapping[str, Any] | None = None,
    times: str = "uniform",
    times_options: Mapping[str, Any] | None = None,
    t_start: float | None = None,
    start_share: float = 0.0,
    target: str = "student",
    solver_order: int = 1,
    clip: bool = True,
    saturation: str = "straight_through",
    sampler: str = "consistency_bridge",
    nfe: int | None = 2,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """Consistency fine-tuning of a bridge (arXiv 2410.22637), sampled in `nfe` calls.

    Args:
      process, module, spec: as for `bridge`.
      objective: "training" or "distillation".
      parameterization, sigma_data, sigma_source, covariance, source_input, masked, label_dropout: as for
        `bridge`, and as the model was trained.
      guidance: classifier-free guidance weight of the teacher; the student needs none in sampling.
      gap, gap_options: "constant", "shrinking" (with the paper's weight "inverse_gap"), see
        `objectives.consistency.build_gap`.
      weight: "constant", "inverse_gap" or "relative_gap".
      distance, distance_options: "pseudo_huber" or "squared_l2".
      times, times_options: of `objectives.times`.
      t_start: where sampling boots, and the latest time that is trained; default 1e-3 of the paper's clock
        below the source.
      start_share: share of the examples whose time is t_start, where two calls use h.
      target: "student" (the current parameters) or "ema" (the first of `train.ema`).
      solver_order: of the teacher's step, 1 or 2.
      clip: clip x0_hat to [-1, 1] in sampling, in the target and in the teacher.
      saturation: what becomes of the student's x0_hat beyond [-1, 1] under `clip`: "straight_through" clips
        and passes the gradient on as if it had not, "hard" clips, "none" does not.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: as `bridge`; unknown names, a solver order other than 1 and 2, or a bridge without noise.
      ValueError (from the loss): target "ema" without an average, or distillation without its teacher.
    """
    check_choice("objective", objective, OBJECTIVES)
    check_choice("target", target, TARGETS)
    check_choice("saturation", saturation, SATURATION)
    if not 0.0 <= start_share < 1.0:
        raise ValueError(f"start_share must lie in [0, 1), got {start_share}")
    distils = objective == "distillation"
    check_choice("solver_order", solver_order, (1, 2))
    if isinstance(process, BridgeProcess):
        middle = 0.5 * (process.t_min + process.t_max)
        if not float(process.c(middle)) > 0:
            raise ValueError("a consistency bridge needs noise: c(t) is 0 for this process")
    options = {
        "parameterization": parameterization,
        "sigma_data": sigma_data,
        "sigma_source": sigma_source,
        "covariance": covariance,
        "source_input": source_input,
        "masked": masked,
        "label_dropout": label_dropout,
        "clip": False,
    }
    base = bridge(process, module, spec, **options)
    teacher_of = bridge(process, module, spec, guidance=guidance, **options).denoiser
    if guidance != 1.0 and not distils:
        raise ValueError(f"guidance={guidance} is the teacher's: objective 'training' has none")
    draw_times = objectives.times.build_times(times, **(times_options or {}))
    gap_of = pieces.build_gap(gap, **(gap_options or {}))
    distance_of = pieces.build_distance(distance, **(distance_options or {}))
    weight_of = pieces.build_weight(weight)
    latest = process.t_max - _BOOT_GAP / process.clock_scale if t_start is None else t_start
    if not process.t_min < latest < process.t_max:
        raise ValueError(
            f"t_start must lie between {process.t_min} and {process.t_max}, got {t_start}"
        )

    def clipped(denoise, how="hard"):
        if not clip or how == "none":
            return denoise
        return clip_transform(denoise, straight_through=how == "straight_through")

    def denoiser(params, batch, train=False, key=None, raw=False):
        denoise = base.denoiser(params, batch, train, key)
        return denoise if raw else clipped(denoise)

    def loss(params, key, batch, context):
        x0, x1 = batch[spec.kind], source_of(batch)
        if target == "ema" and context.ema is None:
            raise ValueError("target 'ema' needs an average of the parameters: set train.ema")
        if distils and context.state is None:
            raise ValueError("distillation needs its teacher, the method's state: see init_state")
        held = jax.lax.stop_gradient(context.ema if target == "ema" else params)
        # the same dropout for both: their difference is the step alone
        student = base.denoiser(params, batch, context.train, key)
        student = clipped(student, saturation)
        aim = denoiser(held, batch, context.train, key)
        corrupt = lambda eps, t: process.corrupt(x0, x1, eps, t)
        pair = pieces.training_pair(corrupt)
        if distils:
            teacher = clipped(teacher_of(jax.lax.stop_gradient(context.state), batch))
            pair = pieces.distillation_pair(
                corrupt, bridge_ode_map(teacher, process, x1, solver_order)
            )
        losses, aux = pieces.consistency(
            process,
            bridge_consistency(student, process, x1),
            bridge_consistency(aim, process, x1),
            pair,
            jax.random.fold_in(key, OBJECTIVE),
            x0,
            gap=gap_of,
            weight=weight_of,
            distance=distance_of,
            times=draw_times,
            step=context.step,
            t_start=latest,
            start_share=start_share,
            index=batch["index"],
            total=context.batch_size,
        )
        metrics = {"gap": (aux["t"] - aux["r"]).mean(), "distance": aux["distance"].mean()}
        return losses.mean(), metrics | {"consistency_mse": aux["error"].mean()}

    # where this model boots; other samplers leave the source by themselves
    booted = {"t_start": latest, **(sampler_options or {})}
    start = lambda key, batch: source_of(batch)
    method = assemble(process, base.init, loss, denoiser, start, sampler, nfe, booted)
    if not distils:
        return method
    return method._replace(init_state=lambda key, params, batch: jax.tree.map(jnp.asarray, params))
