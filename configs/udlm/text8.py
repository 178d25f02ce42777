"""UDLM on text8 characters (arXiv 2412.10193), at the paper's scale.

    python -m diffusion_jax train --config=configs/udlm/text8.py --workdir=runs/udlm \\
        --config.data.path=/path/to/text8

The network is MDLM's, told the noise. Hardware: 8 accelerators, 1M steps of batch 512 at length 256. Small
twin: configs/digits/uniform.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "text", "path": "text8", "length": 256, "clean": "text8"},
        process={"name": "uniform", "schedule": {"name": "linear", "eps_end": 1e-3}},
        network=common.official_token_transformer(
            "mdlm-small", time_conditioned=True, mask_token=False, max_length=256
        ),
        method={
            "name": "uniform",
            "parameterization": "leave_one_out",
            "label_dropout": 0.0,
            "sampler": "discrete_ancestral",
            "nfe": 128,
        },
        train=common.text_train(steps=1_000_000),
        evaluate={"draws": 16},
    )
