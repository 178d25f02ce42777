"""Bridge-TTS (arXiv 2312.03491) on LJ Speech, the paper's scale: 80 mels, 1.7M updates of batch 16.

    python -m diffusion_jax train --config=configs/bridge_tts/ljspeech.py:encoder \
        --workdir=runs/ljspeech_encoder --config.data.root=LJSpeech-1.1
    python -m diffusion_jax train --config=configs/bridge_tts/ljspeech.py \
        --workdir=runs/bridge_tts_ljspeech --config.data.root=LJSpeech-1.1

Texts are characters with blanks between them; with `--config.data.units=phonemes` and
`--config.data.lexicon=FILE` (CMUdict) they are the papers' phonemes. The decoder learns on random segments of
two seconds, as Grad-TTS's. The length of the first stage is ours.

Hardware: one GPU (RTX 3090 in the paper). Time: about 2.5 days. Expected: MOS 4.04 at 2 steps, 4.10 at 4,
4.07 at 1000 with a HiFi-GAN vocoder (Grad-TTS 3.98 at 1000), as published.
"""

from ml_collections.config_dict import placeholder

from configs import common


def get_config(stage: str = "decoder"):
    """The config of a stage, "encoder" or "decoder"; override with `--config.section.field=value`."""
    first = stage == "encoder"
    return common.config(
        data={
            "name": "ljspeech",
            "root": placeholder(str),
            "units": "characters",
            "lexicon": placeholder(str),
            "blank": True,
            "max_frames": 896,
        },
        process={"name": "gmax_bridge", "beta_0": 0.01, "beta_1": 50.0},
        network={
            "name": "tts",
            "patch": 1,
            "encoder": {"width": 192, "depth": 6, "heads": 2, "duration_width": 256},
            "decoder": {
                "name": "unet",
                "channels": 52,
                "channel_mults": (1, 2, 4),
                "num_res_blocks": 1,
                "heads": 4,
                "dropout": 0.0,
            },
        },
        method={
            "name": "bridge_tts",
            "parameterization": "x0",
            "trains": stage,
            "segment_frames": 172,
            "length_scale": 1.0,
            "sampler": "bridge_tts",
            "nfe": 4,
            "sampler_options": {"temperature": 2.0},
        },
        train=common.train(
            steps=200_000 if first else 1_700_000,
            batch_size=16,
            learning_rate=1e-4,
            ema=(),
            every=20_000,
            init_from="" if first else "runs/ljspeech_encoder",
        ),
        evaluate={
            "num": 100,
            "batch_size": 10,
            "samplers": tuple(
                {"name": "bridge_tts", "nfe": nfe, "temperature": 2.0} for nfe in (2, 4, 50, 1000)
            ),
        },
    )
