"""RADD on OpenWebText with GPT-2's tokens (arXiv 2406.03736), at the paper's scale.

    python -m diffusion_jax.data.prepare_text --input=openwebtext.jsonl.gz --out=data/openwebtext \\
        --tokenizer=gpt2/tokenizer.json
    python -m diffusion_jax train --config=configs/radd/openwebtext.py --workdir=runs/radd \\
        --config.data.path=data/openwebtext

`--config=configs/radd/openwebtext.py:medium` is the larger model (24 x 1024, 16 heads). Hardware: 8
accelerators with 80 GB, 400,000 steps of batch 512 at length 1024, as the released models. The small one's
zero-shot perplexities on LAMBADA, WikiText2, PTB, WikiText103 and 1BW are 51.70, 39.98, 107.85, 37.98 and
72.99 (lambda-DCE); the medium's 44.10, 30.60, 82.08, 29.29 and 60.32. Any of the four losses is one
field: `--config.method.objective=count` is the any-order one. Small twin: configs/text/radd.py.
"""

from configs import common

SIZES = ("small", "medium")


def get_config(size: str = "small"):
    """The config of a size; override with `--config.section.field=value`.

    Raises:
      ValueError: another size than "small" and "medium".
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; valid: {', '.join(SIZES)}")
    return common.config(
        data={"name": "documents", "path": "data/openwebtext", "length": 1024},
        process={"name": "absorbing", "schedule": "linear"},
        network=common.official_token_transformer(f"radd-{size}"),
        method={
            "name": "masked",
            "objective": "lambda",
            "label_dropout": 0.0,
            "sampler": "masked_ancestral",
            "nfe": 1024,
        },
        train=common.text_train(steps=400_000),
        evaluate={"draws": 16, "num": 256},
    )
