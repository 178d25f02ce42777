"""SEDD-absorb on OpenWebText with GPT-2's tokens (arXiv 2310.16834), at the paper's scale.

    python -m diffusion_jax.data.prepare_text --input=openwebtext.jsonl.gz --out=data/openwebtext \\
        --tokenizer=gpt2/tokenizer.json --separator="<|endoftext|>"
    python -m diffusion_jax train --config=configs/sedd/openwebtext.py --workdir=runs/sedd \\
        --config.data.path=data/openwebtext

`configs/sedd/openwebtext.py:uniform` is the uniform graph on the geometric schedule. Hardware: 8
accelerators of 80 GB, 1.3M steps of batch 512 at length 1024. The paper's small model has a zero-shot
perplexity of at most 40.6 on WikiText103 (400k steps). Small twin: configs/digits/score_entropy.py.
"""

from configs import common


def get_config(graph: str = "absorb"):
    """The config; override with `--config.section.field=value`.

    Raises:
      ValueError: a graph other than "absorb" or "uniform".
    """
    if graph not in ("absorb", "uniform"):
        raise ValueError(f"the graph must be 'absorb' or 'uniform', got {graph!r}")
    process = {"name": "absorbing", "schedule": {"name": "linear", "eps_end": 1e-3}}
    if graph == "uniform":
        process = {
            "name": "uniform",
            "schedule": {"name": "geometric", "sigma_min": 1e-4, "sigma_max": 20.0},
        }
    return common.config(
        data={"name": "documents", "path": "data/openwebtext", "length": 1024},
        process=process,
        network=common.base_token_transformer(time_conditioned=True, dropout=0.1, max_length=1024),
        method={
            "name": "score_entropy",
            "label_dropout": 0.0,
            "sampler": "score_analytic",
            "nfe": 129,
        },
        train=common.text_train(steps=1_300_000),
        evaluate={"draws": 16},
    )
