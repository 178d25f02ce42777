"""Grad-TTS (arXiv 2105.06337) on LJ Speech with the network, data and budget of Bridge-TTS.

    python -m diffusion_jax train --config=configs/grad_tts/ljspeech.py \
        --workdir=runs/grad_tts_ljspeech --config.data.root=LJSpeech-1.1

Encoder and decoder learn together, as published. Data: see configs/bridge_tts/ljspeech.py.

Hardware: one GPU. Time: about 2.5 days. Expected: MOS 3.98 at 1000 steps, 3.99 at 50, as the Bridge-TTS
paper found it.
"""

from configs import common
from configs.bridge_tts import ljspeech


def get_config():
    """The config; override with `--config.section.field=value`."""
    base = ljspeech.get_config()
    base.train.init_from = ""
    return common.config(
        data=base.data,
        process={"name": "vp", "beta_min": 0.05, "beta_max": 20.0, "t_min": 1e-5},
        network=base.network,
        method={
            "name": "grad_tts",
            "parameterization": "score",
            "weighting": "eps",
            "temperature": 1.5,
            "trains": "together",
            "segment_frames": base.method.segment_frames,
            "length_scale": 1.0,
            "sampler": "euler",
            "nfe": 10,
            "sampler_options": {"grid": "uniform", "offset": 0.5},
        },
        train=base.train,
        evaluate={
            "num": 100,
            "batch_size": 10,
            "samplers": tuple(
                {"name": "euler", "nfe": nfe, "grid": "uniform", "offset": 0.5}
                for nfe in (2, 4, 50, 1000)
            ),
        },
    )
