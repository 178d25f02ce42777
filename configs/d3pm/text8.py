"""D3PM on text8 characters, 1,000 steps (arXiv 2107.03006), at the paper's scale.

    python -m diffusion_jax train --config=configs/d3pm/text8.py --workdir=runs/d3pm \\
        --config.data.path=/path/to/text8

`configs/d3pm/text8.py:uniform` and `:nearest_neighbour` are its other kernels. Hardware: 8 accelerators, 1M
steps of batch 512 at length 256. The paper reports at most 1.45 bits per character for absorbing noise.
Small twin: configs/digits/d3pm.py. The paper's pixel models (a U-Net over 256 grey levels, the Gaussian
kernel, a logistic head) have no network here; their kernel and losses do.
"""

from configs import common


def get_config(kernel: str = "absorbing"):
    """The config; override with `--config.section.field=value`.

    Raises:
      ValueError: a kernel other than "absorbing", "uniform" or "nearest_neighbour".
    """
    if kernel not in ("absorbing", "uniform", "nearest_neighbour"):
        raise ValueError(
            f"the kernel must be 'absorbing', 'uniform' or 'nearest_neighbour', got {kernel!r}"
        )
    return common.config(
        data={"name": "text", "path": "text8", "length": 256, "clean": "text8"},
        process={"name": "d3pm", "kernel": kernel, "num_steps": 1000},
        network=common.base_token_transformer(time_conditioned=True, max_length=256),
        method={
            "name": "d3pm",
            "auxiliary": 0.01,
            "first_step": "network",
            "label_dropout": 0.0,
            "sampler": "discrete_ancestral",
            "nfe": 1000,
        },
        train=common.text_train(steps=1_000_000),
        evaluate={"draws": 16},
    )
