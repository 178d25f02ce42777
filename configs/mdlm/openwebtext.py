"""Masked diffusion on OpenWebText with GPT-2's tokens, MDLM (arXiv 2406.07524), at the paper's scale.

    python -m diffusion_jax.data.prepare_text --input=openwebtext.jsonl.gz --out=data/openwebtext \\
        --tokenizer=gpt2/tokenizer.json
    python -m diffusion_jax train --config=configs/mdlm/openwebtext.py --workdir=runs/openwebtext \\
        --config.data.path=data/openwebtext

Hardware: 8 accelerators with 80 GB, 1M steps of batch 512 at length 1024 (50,257 tokens and the mask). The
network is the paper's, which is told no noise. The paper reports a perplexity of at most 23.21. Small twin:
configs/text/characters.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "documents", "path": "data/openwebtext", "length": 1024},
        process={"name": "absorbing", "schedule": "linear"},
        network=common.official_token_transformer("mdlm-small"),
        method={
            "name": "masked",
            "objective": "continuous",
            "label_dropout": 0.0,
            "sampler": "masked_ancestral",
            "nfe": 128,
        },
        train=common.text_train(steps=1_000_000),
        evaluate={"draws": 16, "num": 256},
    )
