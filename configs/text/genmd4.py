"""GenMD4 on the characters of any text file: every character learns its own masking schedule.

    python -m diffusion_jax train --config=configs/text/genmd4.py --workdir=runs/genmd4 \\
        --config.data.path=some.txt

Hardware: 2 CPU cores, about 20 minutes for 2,000 steps of two network calls. Full scale:
configs/genmd4/text8.py. The powers start at 1, where it is MD4 with the linear schedule; the metrics
`power_min` and `power_max` show how far they move.
"""

from configs import common
from configs.text import characters


def get_config():
    """The config; override with `--config.section.field=value`."""
    config = characters.get_config()
    config.process = {"name": "state_masking", "powers": 1.0, "eps": 1e-4, "t_min": 1e-3}
    config.network.time_conditioned = True
    config.method = {"name": "genmd4", "sampler": "state_masked_ancestral", "nfe": 64}
    return common.config(**config)
