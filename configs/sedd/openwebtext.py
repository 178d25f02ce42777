"""SEDD-absorb on OpenWebText with GPT-2's tokens (arXiv 2310.16834), at the paper's scale.

    python -m diffusion_jax.data.prepare_text --input=openwebtext.jsonl.gz --out=data/openwebtext \\
        --tokenizer=gpt2/tokenizer.json --separator="<|endoftext|>"
    python -m diffusion_jax train --config=configs/sedd/openwebtext.py --workdir=runs/sedd \\
        --config.data.path=data/openwebtext

The small model; `configs/sedd/openwebtext.py:medium` is the medium one, `:uniform` the small one on the
uniform graph with the geometric schedule. Hardware: 8 accelerators of 80 GB, 1.3M steps of batch 512 at length
1024. The paper's small model has a zero-shot perplexity of at most 40.6 on WikiText103 (400k steps), the
medium one 29.98. Small twin: configs/digits/score_entropy.py.
"""

from configs import common

MODELS = {"small": "sedd-small", "medium": "sedd-medium", "uniform": "sedd-small-uniform"}


def get_config(model: str = "small"):
    """The config of a model; override with `--config.section.field=value`.

    Raises:
      ValueError: another model than "small", "medium" and "uniform".
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; valid: {', '.join(MODELS)}")
    process = {"name": "absorbing", "schedule": {"name": "linear", "eps_end": 1e-3}}
    if model == "uniform":
        process = {
            "name": "uniform",
            "schedule": {"name": "geometric", "sigma_min": 1e-4, "sigma_max": 20.0},
        }
    return common.config(
        data={"name": "documents", "path": "data/openwebtext", "length": 1024},
        process=process,
        network=common.official_token_transformer(MODELS[model]),
        method={
            "name": "score_entropy",
            "label_dropout": 0.0,
            "sampler": "score_analytic",
            "nfe": 129,
        },
        train=common.text_train(steps=1_300_000),
        evaluate={"draws": 16},
    )
