"""ReDiff (arXiv 2510.19871) on OpenWebText with GPT-2's tokens: both stages, at the scale of a language model.

    python -m diffusion_jax train --config=configs/rediff/openwebtext.py --workdir=runs/rediff1 \\
        --config.data.path=data/openwebtext --config.train.init_from=runs/openwebtext
    python -m diffusion_jax train --config=configs/rediff/openwebtext.py:2 --workdir=runs/rediff2 \\
        --config.data.path=data/openwebtext --config.train.init_from=runs/rediff1

The argument is the stage. The paper fine-tunes LLaDA-V (8 billion parameters, images and text) for one epoch
of 260 thousand captions at a learning rate of 5e-6, with corrections by a larger model; here the model is that
of configs/mdlm/openwebtext.py and the text is its own correction. Its substitutions (5 % of the tokens that
are not masked), mask rates (.999 t + .001), equal weights of the three parts and drafts of 128 tokens are
kept. Hardware: 8 accelerators with 80 GB; stage 1 takes hours, stage 2 as long: every step writes drafts.
Small twin: configs/rediff/characters.py.
"""

from configs import common


def get_config(stage: str = "1"):
    """The config of a stage, "1" or "2"; override with `--config.section.field=value`."""
    first = stage == "1"
    return common.config(
        data={"name": "documents", "path": "data/openwebtext", "length": 128},
        process={"name": "absorbing", "schedule": "linear"},
        network=common.official_token_transformer("mdlm-small"),
        method={
            "name": "refine",
            "stage": int(stage),
            "replace": 0.05,
            "draft_steps": 16,
            "draft_rate": 0.5,
            "label_dropout": 0.0,
            "nfe": 32,
        },
        train=common.train(
            steps=20_000 if first else 5_000,
            batch_size=512,
            optimizer="adamw",
            learning_rate=5e-5 if first else 5e-6,
            schedule={"name": "warmup", "warmup_steps": 500},
            every=1000,
            init_from="runs/openwebtext" if first else "runs/rediff1",
        ),
        evaluate={
            "draws": 16,
            "num": 1024,
            "samplers": (
                {"name": "llada", "nfe": 32, "temperature": 1.0},
                {"name": "confidence", "nfe": 32, "order": "sampled", "revise": 1.0},
            ),
        },
    )
