"""CDBM (arXiv 2410.22637): bridges fine-tuned into consistency functions, at the paper's scale."""

from typing import Any

from ml_collections import ConfigDict

from configs import common

# Of the config of a bridge: what the parameters mean, as against how they are trained and sampled.
_KEPT = (
    "parameterization",
    "sigma_data",
    "sigma_source",
    "covariance",
    "source_input",
    "masked",
)


def fine_tuned(base: ConfigDict, *, method: dict[str, Any], train: dict[str, Any]) -> ConfigDict:
    """The config that fine-tunes the model of `base`; `method` and `train` are what is new in them."""
    kept = {name: base.method[name] for name in _KEPT if name in base.method}
    method = {"name": "consistency_bridge", **kept, "sampler": "consistency_bridge", **method}
    steps = sorted({2, 3, 4, method["nfe"]})
    samplers = tuple({"name": "consistency_bridge", "nfe": n} for n in steps)
    return common.config(
        data=base.data,
        process=base.process,
        network=base.network,
        method=method,
        train=train,
        evaluate={"samplers": samplers},
    )


def at_scale(base: ConfigDict, *, init_from: str, nfe: int = 2) -> ConfigDict:
    """The paper's batch, optimiser and rate, with gaps that shrink in eight stages."""
    steps = 80_000
    gap = {"interval": steps // 8, "q": 2.0, "k": 8.0, "b": 1.0, "first": 2}
    return fine_tuned(
        base,
        method={
            "objective": "training",
            "gap": "shrinking",
            "gap_options": gap,
            "weight": "inverse_gap",
            "distance": "pseudo_huber",
            "nfe": nfe,
        },
        train=common.train(
            steps=steps,
            batch_size=128,
            optimizer="radam",
            learning_rate=1e-5,
            every=10_000,
            init_from=init_from,
        ),
    )
