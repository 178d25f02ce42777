"""Weights of EDM2's preconditioned model: `unet.` and the uncertainty (arXiv 2312.02696, NVlabs/edm2)."""

from typing import Any

from diffusion_jax.interop.mapping import CONV, Leaf, Weights, linear
from diffusion_jax.registry import register


@register("weights", "edm2_unet")
def edm2_unet(module: Any, resolution: int = 64) -> Weights:
    """The layout of an `EDM2UNet`.

    Args:
      module: the network.
      resolution: shorter side of the images or latents: the official names hold it.
    Raises:
      ValueError: a network with a source, which official ones have not.
    """
    if module.source_channels:
        raise ValueError(
            "edm2_unet: official weights have no source image; source_channels must be 0, got"
            f" {module.source_channels}"
        )
    leaves: list[Leaf] = []
    channels = [module.channels * m for m in module.channel_mults]
    levels, depth = len(channels), module.num_res_blocks

    def fourier(ours, theirs):
        leaves.append(Leaf(f"{ours}/frequencies", f"{theirs}.freqs"))
        leaves.append(Leaf(f"{ours}/phases", f"{theirs}.phases"))

    def layer(ours, theirs, **kind):
        leaves.extend(linear(ours, theirs, bias=False, **kind))

    def block(ours, theirs, inputs, outputs, attends=False):
        leaves.append(Leaf(f"{ours}/gain", f"{theirs}.emb_gain"))
        layer(f"{ours}/modulation", f"{theirs}.emb_linear")
        names = {"conv_in": "conv_res0", "conv_out": "conv_res1"}
        if inputs != outputs:
            names["skip"] = "conv_skip"
        if attends and outputs >= module.head_channels:
            names |= {"qkv": "attn_qkv", "attention_out": "attn_proj"}
        for name, official in names.items():
            layer(f"{ours}/{name}", f"{theirs}.{official}", kind=CONV)

    fourier("uncertainty/features", "logvar_fourier")
    layer("uncertainty/linear", "logvar_linear")
    fourier("time_features", "unet.emb_fourier")
    layer("time", "unet.emb_noise")
    if module.num_classes:
        layer("label", "unet.emb_label")

    sides = [resolution >> level for level in range(levels)]
    attending = [side in module.attention_resolutions for side in sides]
    names = [f"{side}x{side}" for side in sides]
    layer("input", f"unet.enc.{names[0]}_conv", kind=CONV)
    width, skips = channels[0], [channels[0]]
    for level in range(levels):
        if level:
            block(f"down_{level}_resample", f"unet.enc.{names[level]}_down", width, width)
            skips.append(width)
        for i in range(depth):
            ours, theirs = f"down_{level}_block_{i}", f"unet.enc.{names[level]}_block{i}"
            block(ours, theirs, width, channels[level], attending[level])
            width = channels[level]
            skips.append(width)

    block("middle_block_0", f"unet.dec.{names[-1]}_in0", width, width, True)
    block("middle_block_1", f"unet.dec.{names[-1]}_in1", width, width)
    for level in reversed(range(levels)):
        if level < levels - 1:
            block(f"up_{level}_resample", f"unet.dec.{names[level]}_up", width, width)
        for i in range(depth + 1):
            ours, theirs = f"up_{level}_block_{i}", f"unet.dec.{names[level]}_block{i}"
            block(ours, theirs, width + skips.pop(), channels[level], attending[level])
            width = channels[level]
    layer("output", "unet.out_conv", kind=CONV)
    leaves.append(Leaf("output_gain", "unet.out_gain"))
    return Weights(tuple(leaves))
