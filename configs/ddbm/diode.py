"""DDBM on DIODE at 256x256, normals to photographs (Zhou et al., arXiv 2309.16948), at the paper's scale.

    python -m diffusion_jax train --config=configs/ddbm/diode.py --workdir=runs/diode \\
        --config.data.root=/path/to/diode

`root` holds the pairs side by side, the normal map left and the photograph right, in folders `train` and
`test`. Hardware: 8 accelerators, 440k steps (built and shape-checked here, not run). The paper reports FID
4.43 at 118 network calls; DBIM (arXiv 2405.15885) 4.99 at 20 and 2.57 at 100. Small twin:
configs/images/fashion_mnist_bridge.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "image_folder", "root": "diode", "layout": "source_left", "size": 256},
        process={"name": "vp_bridge", "beta_d": 2.0, "beta_min": 0.1},
        network=common.adm("ddbm-diode-256x256"),
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
            steps=440_000, batch_size=128, optimizer="radam", learning_rate=1e-4, every=10_000
        ),
        evaluate={
            "samplers": (
                {"name": "dbim", "nfe": 20},
                {"name": "dbim", "nfe": 100},
                {"name": "ddbm_heun", "nfe": 119},
            )
        },
    )
