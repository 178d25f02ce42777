"""Weights of the transformers of SEDD, MDLM and RADD, for the network `ddit`.

The three code bases name the layers alike. Checkpoints of MDLM and of what descends from it hold the network
beside other things, as `backbone.`; RADD's have neither a noise map nor modulations, and norms with a bias.
"""

import numpy as np

from diffusion_jax.interop.mapping import Leaf, Weights, linear, stacked
from diffusion_jax.registry import register


@register("weights", "ddit")
def ddit(module, *, prefix: str = "") -> Weights:
    """The layout of a `networks.DDiT`.

    The queries', keys' and values' rows come in this order, each head by head, in both; the noise level is fed
    to 256 features, cosines first, in both. Tables of rotary positions hold no weights: they are ignored in
    reading, and the one of inverse frequencies is written.

    Args:
      module: a `DDiT` with rotary positions and without labels.
      prefix: before the names of theirs: "" for SEDD and RADD, "backbone." for MDLM.

    Raises:
      ValueError: a module with labels or other positions, which no such checkpoint has.
    """
    if module.num_classes or module.positions != "rotary":
        raise ValueError(
            "weights of ddit are those of a network without labels and with rotary positions, got "
            f"num_classes = {module.num_classes}, positions = {module.positions!r}"
        )
    layers = lambda name: stacked(f"{prefix}blocks.{{i}}.{name}", module.depth)
    block = "blocks/block"
    leaves = [
        Leaf("tokens/table", f"{prefix}vocab_embed.embedding"),
        *linear(f"{block}/attention/qkv", layers("attn_qkv"), bias=False),
        *linear(f"{block}/attention/out", layers("attn_out"), bias=False),
        *linear(f"{block}/mlp_in", layers("mlp.0")),
        *linear(f"{block}/mlp_out", layers("mlp.2")),
        *linear("output", f"{prefix}output_layer.linear"),
    ]
    norms = {
        f"{block}/attention_norm/norm": layers("norm1"),
        f"{block}/mlp_norm/norm": layers("norm2"),
        "output_norm/norm": f"{prefix}output_layer.norm_final",
    }
    for ours, theirs in norms.items():
        leaves.append(Leaf(f"{ours}/scale", _of(theirs, ".weight")))
        if module.has_norm_bias:
            leaves.append(Leaf(f"{ours}/bias", _of(theirs, ".bias")))
    if module.modulated:
        modulation = "adaLN_modulation"
        leaves += [
            *linear("condition/time_in", f"{prefix}sigma_map.mlp.0"),
            *linear("condition/time_out", f"{prefix}sigma_map.mlp.2"),
            *linear(f"{block}/modulation/linear", layers(modulation)),
            *linear("output_modulation/linear", f"{prefix}output_layer.{modulation}"),
        ]
    rotary = f"{prefix}rotary_emb."

    def buffers():
        size = module.width // module.heads
        frequencies = 10_000.0 ** (-np.arange(0, size, 2) / size)
        return {f"{rotary}inv_freq": frequencies.astype(np.float32)}

    ignored = rotary.replace(".", r"\.") + r"(inv_freq|cos_cached|sin_cached)"
    return Weights(tuple(leaves), (ignored,), buffers)


def _of(theirs, suffix):
    return theirs + suffix if isinstance(theirs, str) else tuple(name + suffix for name in theirs)
