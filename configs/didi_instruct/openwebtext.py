"""DiDi-Instruct (arXiv 2509.25035) on OpenWebText at the paper's scale: MDLM's model in 8 to 128 calls.

    python -m diffusion_jax train --config=configs/mdlm/openwebtext.py --workdir=runs/openwebtext \\
        --config.data.path=data/openwebtext
    python -m diffusion_jax train --config=configs/didi_instruct/openwebtext.py \\
        --workdir=runs/didi_instruct --config.train.init_from=runs/openwebtext

Hardware: one H100 for about an hour (10,000 steps, 32 examples with 4 samples each). The paper reports a
generative perplexity of 62.2 with 8 calls and 18.4 with 128 (GPT-2 large); its teacher has 38.5 with 1,024.
Small twin: configs/text/didi_countdown.py.
"""

from configs import common
from configs.mdlm import openwebtext


def get_config():
    """The config; override with `--config.section.field=value`."""
    base = openwebtext.get_config()
    return common.config(
        data=base.data,
        process=base.process,
        network=base.network,
        method={
            "name": "didi_instruct",
            "group": 4,
            "policy": 1.0,
            "divergence": (0.01, 0.01),
            "entropy": 0.02,
            "critic_learning_rate": 1e-5,
            "critic_blocks": 4,
            "sampler": "masked_ancestral",
            "nfe": 16,
        },
        train=common.train(
            steps=10_000,
            batch_size=32,
            optimizer="adamw",
            learning_rate=1e-6,
            clip_norm=0.5,
            ema=(0.999,),
            every=1000,
            init_from="runs/openwebtext",
        ),
        evaluate={"draws": 16, "num": 256},
    )
