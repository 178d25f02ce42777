"""Bridge-TTS (arXiv 2312.03491) on spoken digits: phonemes and a speaker to a log-mel spectrogram.

    python -m diffusion_jax train --config=configs/speech/bridge_tts_digits.py:encoder \
        --workdir=runs/tts_encoder --config.data.root=FOLDER
    python -m diffusion_jax train --config=configs/speech/bridge_tts_digits.py \
        --workdir=runs/bridge_tts --config.data.root=FOLDER

The data are the free spoken digits (wav files of 8 kHz), in `root` or in $DIFFUSION_JAX_DATA/spoken_digits;
`configs/speech/bridge_tts_formants.py` needs none. The encoder learns first, then the decoder on its fixed
output, as in the paper.

Hardware: 2 CPU cores. Time: one minute, then 2 of one core. Expected: experiments/bridge_tts.
"""

from ml_collections.config_dict import placeholder

from configs import common


def get_config(stage: str = "decoder"):
    """The config of a stage, "encoder" or "decoder"; override with `--config.section.field=value`."""
    first = stage == "encoder"
    return common.config(
        data={"name": "spoken_digits", "root": placeholder(str), "max_frames": 48},
        process={"name": "gmax_bridge", "beta_0": 0.01, "beta_1": 50.0},
        network={
            "name": "tts",
            "patch": 4,
            "encoder": {
                "width": 64,
                "depth": 2,
                "heads": 2,
                "duration_width": 64,
                "dropout": 0.1,
            },
            "decoder": {
                "name": "unet",
                "channels": 48,
                "channel_mults": (1, 2),
                "num_res_blocks": 1,
                "heads": 2,
                "dropout": 0.0,
            },
        },
        method={
            "name": "bridge_tts",
            "parameterization": "x0",
            "trains": stage,
            "flat_start": 100,
            "length_scale": 1.0,
            "sampler": "bridge_tts",
            "nfe": 4,
            "sampler_options": {"temperature": 2.0},
        },
        train=common.small_train(
            steps=600 if first else 1000,
            every=500,
            batch_size=16,
            learning_rate=2e-3 if first else 1e-3,
            ema=(0.99,) if first else (0.995,),
            init_from="" if first else "runs/tts_encoder",
        ),
        evaluate={
            "samplers": tuple(
                {"name": "bridge_tts", "nfe": nfe, "temperature": 2.0} for nfe in (2, 4, 50)
            )
        },
    )
