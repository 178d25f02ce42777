"""DDBM on edges2handbags at 64x64 (Zhou et al., arXiv 2309.16948), at the paper's scale.

    python -m diffusion_jax train --config=configs/ddbm/edges2handbags.py --workdir=runs/e2h \\
        --config.data.root=/path/to/edges2handbags

`root` holds the side-by-side pairs of pix2pix in folders `train` and `test`. Hardware: 8 accelerators,
420k steps. The paper reports FID 1.83 at 118 network calls; DBIM (arXiv 2405.15885) 1.74 at 20. Small
twin: configs/digits/bridge.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={
            "name": "image_folder",
            "root": "edges2handbags",
            "layout": "source_left",
            "size": 64,
        },
        process={"name": "vp_bridge", "beta_d": 2.0, "beta_min": 0.1},
        network=common.adm("ddbm-edges2handbags-64x64"),
        method={
            "name": "bridge",
            "parameterization": "ddbm",
            "sigma_data": 0.5,
            "sigma_source": 0.5,
            "covariance": 0.0,
            "sampler": "dbim",
            "nfe": 20,
        },
        train=common.train(
            steps=420_000, batch_size=256, optimizer="radam", learning_rate=1e-4, every=10_000
        ),
        evaluate={"samplers": ({"name": "dbim", "nfe": 20}, {"name": "ddbm_heun", "nfe": 119})},
    )
