"""Official weights of EDM's DDPM++ and NCSN++ (NVlabs/edm), for the network `song_unet`."""

from diffusion_jax.interop.mapping import CONV, LINEAR, Weights
from diffusion_jax.interop.unet_leaves import EDMLayers, pointwise, resolution_of
from diffusion_jax.networks.song_unet import SongUNet
from diffusion_jax.registry import register


@register("weights", "song_unet")
def song_unet(module: SongUNet, *, image_size: int | None = None, prefix: str = "") -> Weights:
    """The layout of a `SongUNet`.

    Args:
      module: the network.
      image_size: side of the images, which the official names hold; None for the network's.
      prefix: before the names of theirs: "model." for the state dict of the preconditioned network.

    Raises:
      ValueError: no image size is known, or it does not fit the levels.
    """
    levels, channels = len(module.channel_mults), module.channels
    names = resolution_of(module, image_size, levels)
    attending = [int(name.split("x")[0]) in module.attention_resolutions for name in names]
    widths = [channels * mult for mult in module.channel_mults]
    net = EDMLayers(prefix, module.resample_filter)

    def block(ours, theirs, inputs, outputs, **kind):
        net.block(ours, theirs, inputs, outputs, project=True, **kind)

    if module.embedding == "fourier":
        net.leaf("time_features/frequencies", "map_noise.freqs")
    if module.num_classes:
        net.leaf("label/table", "map_label.weight", LINEAR)
        net.leaf("label_bias", "map_label.bias")
    if module.augment_dim:
        net.layer("augment", "map_augment", bias=False)
    net.layer("time_in", "map_layer0")
    net.layer("time_out", "map_layer1")

    net.layer("input", f"enc.{names[0]}_conv", kind=CONV)
    width, skips = channels, [channels]
    for level, name in enumerate(names):
        if level:
            block(f"down_{level}_resample", f"enc.{name}_down", width, width, resamples=True)
            if module.encoder == "residual":
                net.layer(f"down_{level}_aux", f"enc.{name}_aux_residual", kind=CONV)
                net.filter(f"enc.{name}_aux_residual")
            elif module.encoder == "skip":
                net.layer(f"down_{level}_aux", f"enc.{name}_aux_skip", kind=pointwise(2))
                net.filter(f"enc.{name}_aux_down")
            skips.append(width)
        for i in range(module.num_res_blocks):
            ours = f"down_{level}_block_{i}"
            theirs = f"enc.{name}_block{i}"
            block(ours, theirs, width, widths[level], attends=attending[level])
            width = widths[level]
            skips.append(width)

    block("middle_block_0", f"dec.{names[-1]}_in0", width, width, attends=True)
    block("middle_block_1", f"dec.{names[-1]}_in1", width, width)
    for level in reversed(range(levels)):
        name = names[level]
        if level < levels - 1:
            block(f"up_{level}_resample", f"dec.{name}_up", width, width, resamples=True)
        for i in range(module.num_res_blocks + 1):
            attends = attending[level] and i == module.num_res_blocks
            ours = f"up_{level}_block_{i}"
            theirs = f"dec.{name}_block{i}"
            block(ours, theirs, width + skips.pop(), widths[level], attends=attends)
            width = widths[level]
        if module.decoder == "skip" or level == 0:
            ours = f"up_{level}_output" if level else "output"
            net.norm(f"{ours}_norm", f"dec.{name}_aux_norm")
            net.layer(ours, f"dec.{name}_aux_conv", kind=CONV)
            if module.decoder == "skip" and level < levels - 1:
                net.filter(f"dec.{name}_aux_up")
    return Weights(tuple(net.leaves), (net.ignored,), lambda: net.filters)
