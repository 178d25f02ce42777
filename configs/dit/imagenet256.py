"""DiT on ImageNet of 256x256 in latents (Peebles and Xie, arXiv 2212.09748), at the paper's scale.

    python -m diffusion_jax train --config=configs/dit/imagenet256.py --workdir=runs/dit \\
        --config.data.path=latents/train.npz

`--config=configs/dit/imagenet256.py:B/4` is another size: S, B, L or XL with patches of 2, 4 or 8. The data
are arrays "image" [N, 32, 32, 4], latents of Stable Diffusion's VAE times 0.18215, and "label" [N] of 1000
classes; each host holds them in float32 (21 GB).

The network, its learned variance and its time labels are the official ones, so that official weights
continue here. FID of 50,000 samples with 250 network calls and no guidance, by the authors: XL/2 19.5
after 400k steps, B/4 68.4, the cheapest full reproduction; XL/2 with guidance 1.5 after 7M steps 2.27
(two calls a step, three of four channels guided). Hardware: 8 accelerators
(built and shape-checked here, not run). Small twin: configs/digits/dit.py. Deviations: latents are made
once, one draw and no flips; stratified time labels.
"""

from configs import common


def get_config(size: str = "XL/2"):
    """The config of a size; override with `--config.section.field=value`."""
    return common.config(
        data=common.image_latents(),
        process={"name": "discrete_vp", "schedule": "linear"},
        network={
            "name": "dit",
            "size": size,
            "out_channels": 8,
            "time_input": "index",
            "time_scale": 1.0,
            "dtype": "bfloat16",
            "remat": "dots",
        },
        method={
            "name": "score",
            "parameterization": "eps",
            "weighting": "eps",
            "times": "labels",
            "learned_variance": True,
            "label_dropout": 0.1,
            "guidance": 1.0,
            "guided_channels": 3,
            "clip": False,
            "sampler": "ddpm",
            "nfe": 250,
            "sampler_options": {"variance": "learned", "grid": "respaced"},
        },
        train=common.train(
            steps=7_000_000 if size == "XL/2" else 400_000,
            batch_size=256,
            optimizer="adamw",
            learning_rate=1e-4,
            weight_decay=0.0,
            clip_norm=0.0,
            every=50_000,
        ),
        evaluate={"num": 50_000},
    )
