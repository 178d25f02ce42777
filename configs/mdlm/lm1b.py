"""Masked diffusion on the One Billion Words benchmark, MDLM (arXiv 2406.07524), at the paper's scale.

    python -m diffusion_jax.data.prepare --name=lm1b
    python -m diffusion_jax train --config=configs/mdlm/lm1b.py --workdir=runs/lm1b \\
        --config.data.tokenizer=bert/tokenizer.json

Hardware: 8 accelerators, 1M steps of batch 512 at length 128. A sentence a row, filled up with "[SEP]"
(the paper's: bert-base-uncased). The paper reports a perplexity of at most 27.04 after 33 billion tokens
(this run) and 23.00 after 327 billion; D3PM's absorbing model 76.90. Deviation: the mask is a token of its
own, where the paper's is "[MASK]" of the vocabulary. Small twin: configs/text/characters.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={
            "name": "tfds_text",
            "dataset": "lm1b",
            "length": 128,
            "tokenizer": "tokenizer.json",
            "layout": "padded",
        },
        process={"name": "absorbing", "schedule": "linear"},
        network=common.official_token_transformer("mdlm-small", max_length=128),
        method={
            "name": "masked",
            "objective": "continuous",
            "label_dropout": 0.0,
            "sampler": "masked_ancestral",
            "nfe": 128,
        },
        train=common.text_train(steps=1_000_000),
        evaluate={"draws": 16, "num": 1024},
    )
