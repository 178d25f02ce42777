"""BD3LM on OpenWebText with GPT-2's tokens (arXiv 2503.09573), at the paper's scale.

    python -m diffusion_jax train --config=configs/mdlm/openwebtext.py --workdir=runs/mdlm \\
        --config.data.path=data/openwebtext --config.train.steps=850_000
    python -m diffusion_jax train --config=configs/bd3lm/openwebtext.py --workdir=runs/bd3lm \\
        --config.data.path=data/openwebtext --config.train.init_from=runs/mdlm

The data are made as that config says. As in the paper each block size continues a masked model: the
network has its fields, but for `attention`, `block_size` and `dropout`.
`--config=configs/bd3lm/openwebtext.py:16` is the block size, of 4, 8 and 16. `clip`, the mask rates that are
drawn, is a place to start: those of least variance are found by `objectives.search_clip` on the run at hand.

Hardware: 8 accelerators with 80 GB. Perplexity of blocks of 4: 20.7, masked model: 23.2, autoregressive:
17.5. Small twin: configs/text/block_diffusion.py.
"""

from configs import common

# block size -> mask rates
CLIPS = {4: (0.45, 0.95), 8: (0.4, 0.9), 16: (0.3, 0.8)}


def get_config(block_size: str = "4"):
    """The config of a block size; override with `--config.section.field=value`.

    Raises:
      ValueError: another size than 4, 8 and 16.
    """
    if block_size not in map(str, CLIPS):
        raise ValueError(f"unknown block size {block_size!r}; valid: 4, 8, 16")
    size = int(block_size)
    return common.config(
        data={"name": "documents", "path": "data/openwebtext", "length": 1024},
        process={"name": "absorbing", "schedule": "linear"},
        network=common.official_token_transformer(
            "mdlm-small", dropout=0.0, attention="block", block_size=size
        ),
        method={
            "name": "block_diffusion",
            "objective": "continuous",
            "clip": CLIPS[size],
            "label_dropout": 0.0,
            "sampler": "block_decoding",
            "sampler_options": {"order": "random", "nucleus": 0.9},
        },
        train=common.text_train(steps=150_000),
        evaluate={"draws": 16, "num": 256},
    )
