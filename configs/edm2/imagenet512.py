"""EDM2 on ImageNet of 512x512 in latents (Karras et al., arXiv 2312.02696), at the paper's scale.

    python -m diffusion_jax train --config=configs/edm2/imagenet512.py --workdir=runs/edm2 \\
        --config.data.path=latents/train.npz

`--config=configs/edm2/imagenet512.py:XXL` is another size: XXS, XS, S (here), M, L, XL or XXL. The data
are arrays "image" [N, 64, 64, 4], Stable Diffusion's VAE latents brought to mean 0 and standard deviation
0.5 in each channel, and "label" [N] of 1000 classes; each host holds them in float32 (84 GB). The same
network on images 64x64x3 is that of ImageNet-64; there log(sigma) has mean -0.8 and standard deviation
1.6, and the learning rate decays from 35,000 batches on.

The paper (FID of 50,000 samples, 63 network calls, the best width of the average): XS 3.53, S 2.56, M 2.25,
L 2.06, XL 1.96, XXL 1.91; with guidance by an unconditional XS, XXL 1.81. Hardware: 32 accelerators with
80 GB. Small twin: configs/digits/edm2.py. Deviations: bfloat16 instead of float16 and its loss scaling;
stratified noise levels.
"""

from configs import common

BATCH = 2048
# Peak learning rate, and millions (2^20) of images seen.
SIZES = {
    "XXS": (0.0170, 2048),
    "XS": (0.0120, 2048),
    "S": (0.0100, 2048),
    "M": (0.0090, 2048),
    "L": (0.0080, 1792),
    "XL": (0.0070, 1280),
    "XXL": (0.0065, 896),
}


def get_config(size: str = "S"):
    """The config of a size; override with `--config.section.field=value`.

    Raises:
      ValueError: another size than those of `SIZES`.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; valid: {', '.join(SIZES)}")
    learning_rate, images = SIZES[size]
    return common.config(
        data={
            "name": "arrays",
            "path": "latents/train.npz",
            "num_classes": 1000,
            "test_fraction": 0.01,
            "bounded": False,
            "max_bytes": 2**37,
        },
        process={"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0},
        network={"name": "edm2_unet", "size": size, "dtype": "bfloat16", "remat": "full"},
        method={
            "name": "score",
            "parameterization": "edm",
            "weighting": "edm",
            "times": "log_normal",
            "times_options": {"mean": -0.4, "std": 1.0},
            "sigma_data": 0.5,
            "uncertainty": True,
            "label_dropout": 0.0,
            "clip": False,
            "sampler": "edm_heun",
            "nfe": 63,
        },
        train=common.train(
            steps=images * 2**20 // BATCH,
            batch_size=BATCH,
            learning_rate=learning_rate,
            b2=0.99,
            schedule={"name": "rsqrt", "warmup_steps": 10e6 / BATCH, "timescale": 70_000},
            clip_norm=0.0,
            ema=(0.05, 0.1),
            every=8192,
        )
        | {"ema_warmup": "power", "keep": 128},
        evaluate={"num": 50_000},
    )
