"""A bridge between your own pairs of images (DDBM), from files or arrays.

    python -m diffusion_jax train --config=configs/bridges/own.py --workdir=runs/own \\
        --config.data.root=/path/to/pairs --config.data.size=64

`root` holds two folders, `source` (what one has) and `image` (what one wants), whose files have the same
names; `train` and `test` folders above them are a split. Other ways to keep pairs are named behind the
file:

    own.py:side_by_side  one file a pair, the source on the left (--config.data.layout=source_right if not)
    own.py:arrays        an .npz file (--config.data.path) with "image" and "source" uint8 [N, H, W, C]

Hardware: at 64x64 one GPU and some hours (an estimate); two CPU cores at 32x32 with
--config.network.channels=16 --config.train.steps=2000.
"""

from configs import common

_DATA = {
    "folders": {
        "name": "pair_folders",
        "root": "pairs",
        "image": "image",
        "source": "source",
        "size": 64,
        "channels": 3,
    },
    "side_by_side": {
        "name": "image_folder",
        "root": "pairs",
        "layout": "source_left",
        "size": 64,
        "channels": 3,
    },
    "arrays": {"name": "arrays", "path": "pairs.npz", "test_fraction": 0.1},
}


def get_config(kind="folders"):
    """The config; override with `--config.section.field=value`."""
    if kind not in _DATA:
        raise ValueError(f"unknown kind of pairs {kind!r}; valid: {', '.join(_DATA)}")
    return common.config(
        data=_DATA[kind],
        process={"name": "vp_bridge"},
        network={
            "name": "unet",
            "channels": 64,
            "channel_mults": (1, 2, 3),
            "num_res_blocks": 2,
            "attention_resolutions": (16,),
            "heads": 4,
            "num_classes": 0,
        },
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
            steps=50_000,
            batch_size=64,
            learning_rate=2e-4,
            schedule={"name": "warmup", "warmup_steps": 1000},
            ema=(0.999,),
            every=5000,
            augment=(),
        ),
        evaluate={"samplers": ({"name": "dbim", "nfe": 5}, {"name": "dbim", "nfe": 20})},
    )
