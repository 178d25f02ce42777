"""What the configs of image-to-image bridges share; `configs/bridges` are the small ones, `configs/i2sb`
I2SB's own scale."""

from typing import Any

from ml_collections import ConfigDict

from configs import common

SAMPLERS = (
    {"name": "dbim", "nfe": 5},
    {"name": "dbim", "nfe": 20},
    {"name": "i2sb", "nfe": 20},
)

# Patches of 4x4 leave their borders in photographs; convolutions do not.
_SMALL_UNET = {
    "name": "unet",
    "channels": 16,
    "channel_mults": (1, 2, 4),
    "num_res_blocks": 1,
    "heads": 2,
    "num_classes": 0,
}


def pairs(data: str, corruption: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """The section `data`: pairs made from "photos", the bundled patches, or from a set of TFDS by name."""
    source = {"data": "photos", "size": 32}
    if data != "photos":
        source = {"data": "tfds", "dataset": data}
    return {"name": "paired", **source, "corruption": corruption, "options": options or {}}


def ddbm(data: dict[str, Any], *, sigma_source: float, covariance: float) -> ConfigDict:
    """Translation by DDBM (arXiv 2309.16948) on 32x32 pictures: VP bridge, preconditioned.

    `sigma_source` and `covariance` are second moments of the pairs; 0.6 is that of the photographs.
    """
    method = {
        "name": "bridge",
        "parameterization": "ddbm",
        "sigma_data": 0.6,
        "sigma_source": sigma_source,
        "covariance": covariance,
        "sampler": "dbim",
        "nfe": 20,
    }
    return _small(data, {"name": "vp_bridge"}, method)


def i2sb(data: dict[str, Any], *, beta_max: float, **method: Any) -> ConfigDict:
    """Restoration by I2SB (arXiv 2302.05872) on 32x32 pictures; `method` are further fields of it."""
    section = {"name": "bridge", "parameterization": "i2sb", "sampler": "dbim", "nfe": 20} | method
    return _small(data, {"name": "i2sb", "beta_max": beta_max}, section)


def _small(data, process, method) -> ConfigDict:
    return common.config(
        data=data,
        process=process,
        network=_blind(_SMALL_UNET, method),
        method=method,
        train=common.small_train(steps=700, every=700, batch_size=16, augment=("flip",)),
        evaluate={"samplers": SAMPLERS},
    )


def _blind(network: dict[str, Any], method: dict[str, Any]) -> dict[str, Any]:
    """Without input channels for a source that the network is not told."""
    return network if method.get("source_input", True) else network | {"source_channels": 0}


def imagenet_i2sb(
    corruption: str, options: dict[str, Any], *, beta_max: float, **fields: Any
) -> ConfigDict:
    """I2SB's restoration of ImageNet at 256x256: its schedule, optimiser and network.

    The network is ADM's for 256x256 (arXiv 2105.05233), trained unconditionally, with a fixed-sigma
    head. The authors begin at its weights; here the run begins anew, or with `train.init_from`.
    `fields` are further ones of the method.
    """
    process = {"name": "i2sb", "beta_max": beta_max, "intervals": 1000}
    if fields.pop("ot_ode", False):
        process["ot_ode"] = True
    method = {
        "name": "bridge",
        "parameterization": "i2sb",
        "source_input": False,
        "sampler": "i2sb",
        "nfe": 100,
    } | fields
    network = common.adm("i2sb-imagenet-256x256")
    return common.config(
        data={
            "name": "paired",
            "data": "image_folder",
            "root": "imagenet",
            "size": 256,
            "corruption": corruption,
            "options": options,
        },
        process=process,
        network=_blind(network, method),
        method=method,
        train=common.train(
            steps=200_000,
            batch_size=256,
            learning_rate=5e-5,
            optimizer="adamw",
            schedule={"name": "step", "every": 1000, "factor": 0.99},
            weight_decay=0.0,
            clip_norm=0.0,
            ema=(0.99,),
            every=5000,
        ),
        evaluate={"num": 10_000, "samplers": ({"name": "i2sb", "nfe": 100},)},
    )
