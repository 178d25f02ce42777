"""Bridge-TTS (arXiv 2312.03491) on digits from a formant synthesiser: no file is needed.

    python -m diffusion_jax train --config=configs/speech/bridge_tts_formants.py --workdir=runs/formants

For notebooks and tests: encoder and decoder learn in one run, the decoder's gradient stopping at the
encoder's output. `configs/speech/bridge_tts_digits.py` is the same on recordings, in the paper's two stages.

Hardware: 2 CPU cores. Time: 3 minutes of one core. Expected: words that can be told apart at 4 steps.
"""

from configs import common
from configs.speech import bridge_tts_digits


def get_config():
    """The config; override with `--config.section.field=value`."""
    base = bridge_tts_digits.get_config("apart")
    return common.config(
        data={"name": "formants", "train_count": 1000, "max_frames": 56},
        process=base.process,
        network=base.network,
        method=base.method,
        train=common.small_train(
            steps=600,
            every=300,
            batch_size=16,
            learning_rate=2e-3,
            ema=(0.99,),
        ),
        evaluate=base.evaluate,
    )
