"""CDCD on the codes of a vector-quantised autoencoder (arXiv 2206.07771), at the paper's scale.

    python -m diffusion_jax train --config=configs/cdcd/codes.py --workdir=runs/cdcd \\
        --config.data.path=codes/train.npz

The data are an array "tokens" int [N, 1024], codes of images of 256 x 256 at an eighth of the resolution, and
"label", in an .npz file. VQ-Diffusion: `--config.method.contrast=0.0`. Hardware: 8 accelerators. The paper
reports over 35 % fewer diffusion steps at equal quality on two benchmarks. Deviations: a label in the place
of text or music as the condition; steps are drawn uniformly. Small twin: configs/digits/cdcd.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "arrays", "path": "codes/train.npz"},
        process={"name": "mask_replace", "num_steps": 80},
        network=common.base_token_transformer(
            width=192, depth=18, heads=16, time_conditioned=True, max_length=1024
        ),
        method={
            "name": "d3pm",
            "auxiliary": 5e-4,
            "auxiliary_weight": "falling",
            "contrast": 5e-5,
            "contrast_options": {"negatives": "intra", "num_negatives": 10, "wise": "step"},
            "label_dropout": 0.1,
            "sampler": "discrete_ancestral",
            "nfe": 80,
        },
        train=common.train(
            steps=500_000,
            batch_size=128,
            optimizer="adamw",
            learning_rate=4.5e-4,
            b2=0.96,
            weight_decay=4.5e-2,
            schedule={"name": "warmup", "warmup_steps": 5000},
            every=10_000,
        ),
        evaluate={"draws": 16},
    )
