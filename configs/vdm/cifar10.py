"""VDM on CIFAR-10 without augmentation (Kingma et al., arXiv 2107.00630), at the paper's scale.

    python -m diffusion_jax train --config=configs/vdm/cifar10.py --workdir=runs/vdm_cifar10

Hardware: 8 accelerators, 10M steps of batch 128. The official code reports 2.637 bits per dimension on
the test set. Small twin: configs/digits/vdm.py. Deviations: this library's U-Net at one resolution (32
blocks on the way down, 33 up, attention in the middle), gradients clipped at norm 1.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "tfds", "dataset": "cifar10"},
        process={"name": "linear_log_snr", "gamma_min": -13.3, "gamma_max": 5.0},
        network={
            "name": "unet",
            "channels": 128,
            "channel_mults": (1,),
            "num_res_blocks": 32,
            "attention_resolutions": (),
            "heads": 1,
            "dropout": 0.1,
            "num_classes": 0,
            "out_channels": 3,
        },
        method={
            "name": "vdm",
            "levels": 256,
            "fourier": (6, 7),
            "schedule": "fixed",
            "schedule_options": {},
            "schedule_loss": "bound",
            "sampler": "ddpm",
            "nfe": 1000,
        },
        train=common.train(
            steps=10_000_000,
            batch_size=128,
            learning_rate=2e-4,
            optimizer="adamw",
            b2=0.99,
            weight_decay=0.01,
            ema=(0.9999,),
            every=50_000,
        ),
        evaluate={"num": 50_000, "draws": 1},
    )
