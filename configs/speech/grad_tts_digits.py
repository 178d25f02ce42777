"""Grad-TTS (arXiv 2105.06337) on spoken digits, the diffusion counterpart of `bridge_tts_digits`.

    python -m diffusion_jax train --config=configs/speech/bridge_tts_digits.py:encoder \
        --workdir=runs/tts_encoder --config.data.root=FOLDER
    python -m diffusion_jax train --config=configs/speech/grad_tts_digits.py \
        --workdir=runs/grad_tts --config.data.root=FOLDER

The same data, network, encoder and budget: what differs is the path (noise around the encoder's output),
what is predicted (the score), and the solver. The paper trains encoder and decoder together
(`--config.method.trains=together --config.train.init_from=`).

Hardware: 2 CPU cores. Time: one minute, then 2 of one core. Expected: experiments/bridge_tts.
"""

from configs import common
from configs.speech import bridge_tts_digits


def get_config():
    """The config; override with `--config.section.field=value`."""
    base = bridge_tts_digits.get_config()
    return common.config(
        data=base.data,
        process={"name": "vp", "beta_min": 0.05, "beta_max": 20.0, "t_min": 1e-5},
        network=base.network,
        method={
            "name": "grad_tts",
            "parameterization": "score",
            "weighting": "eps",
            "temperature": 1.5,
            "trains": base.method.trains,
            "flat_start": base.method.flat_start,
            "length_scale": 1.0,
            "sampler": "euler",
            "nfe": 10,
            "sampler_options": {"grid": "uniform", "offset": 0.5},
        },
        train=base.train,
        evaluate={
            "samplers": tuple(
                {"name": "euler", "nfe": nfe, "grid": "uniform", "offset": 0.5}
                for nfe in (2, 4, 50)
            )
        },
    )
