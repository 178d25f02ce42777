"""U-ViT on ImageNet, class-conditional (Bao et al., arXiv 2209.12152), at the paper's scale.

    python -m diffusion_jax train --config=configs/uvit/imagenet.py --workdir=runs/uvit \\
        --config.data.path=latents/train.npz

The argument names resolution and size: `configs/uvit/imagenet.py:256-L` (here), 256-H, 512-L, 512-H, 64-M or
64-L. 256 and 512 are trained on arrays "image" [N, 32, 32, 4] or [N, 64, 64, 4], latents of Stable
Diffusion's VAE times 0.18215, and "label" [N]; 64 on image files in folders `train` and `test` of
`--config.data.root`, a subfolder a class.

FID of 50,000 samples with 50 network calls by DPM-Solver, by the authors: 64-M 5.85 and 64-L 4.26 (no guidance);
256-L 3.40, 256-H 2.29, 512-L 4.67, 512-H 4.05 with guidance, for which `guidance` is 1 + s in their terms;
without it 256-L has 9.3. Hardware: 8 accelerators or more, batch 1024 (not run here). The network is the official one, so
that official weights continue here. Small twin: configs/digits/uvit.py. Deviations: stratified times;
latents are made once, one draw and no flips; DPM-Solver++ of order 2.
"""

from configs import common

_LATENTS = {
    "name": "discrete_vp",
    "schedule": "scaled_linear",
    "beta_min": 8.5e-4,
    "beta_max": 0.012,
}
# Training steps, learning rate, chance of a dropped label, guidance.
SIZES = {
    "64-M": ("ImageNet-64 M/4", 300_000, 3e-4, 0.0, 1.0),
    "64-L": ("ImageNet-64 L/4", 300_000, 3e-4, 0.0, 1.0),
    "256-L": ("ImageNet-256 L/2", 300_000, 2e-4, 0.15, 1.4),
    "256-H": ("ImageNet-256 H/2", 500_000, 2e-4, 0.1, 1.4),
    "512-L": ("ImageNet-512 L/4", 500_000, 2e-4, 0.15, 1.7),
    "512-H": ("ImageNet-512 H/4", 500_000, 2e-4, 0.1, 1.7),
}


def get_config(size: str = "256-L"):
    """The config of a size; override with `--config.section.field=value`.

    Raises:
      ValueError: another size than those of `SIZES`.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; valid: {', '.join(SIZES)}")
    name, steps, learning_rate, label_dropout, guidance = SIZES[size]
    pixels = size.startswith("64-")
    discrete = size.endswith("-H")  # the others were trained in continuous time
    time = {"time_input": "step", "time_scale": 1.0} if discrete else {"time_scale": 999.0}
    return common.config(
        data={"name": "image_folder", "root": "imagenet", "size": 64}
        if pixels
        else common.image_latents(),
        process=_LATENTS if discrete else {"name": "vp", "beta_min": 0.1, "beta_max": 20.0},
        network={"name": "uvit", "size": name, "dtype": "bfloat16", "remat": "dots"} | time,
        method={
            "name": "score",
            "parameterization": "eps",
            "weighting": "eps",
            "times": "labels" if discrete else "uniform",
            "label_dropout": label_dropout,
            "guidance": guidance,
            "clip": pixels,
            "sampler": "dpmpp_2m",
            "nfe": 50,
        },
        train=common.train(
            steps=steps,
            batch_size=1024,
            optimizer="adamw",
            learning_rate=learning_rate,
            weight_decay=0.03,
            b1=0.99,
            b2=0.99,
            schedule={"name": "warmup", "warmup_steps": 5000},
            clip_norm=0.0,
            every=25_000,
            augment=("flip",) if pixels else (),
        ),
        evaluate={"num": 50_000},
    )
