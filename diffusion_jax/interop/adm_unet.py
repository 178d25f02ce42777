"""Official weights of ADM's U-Net, in the names of guided-diffusion (openai/guided-diffusion, and what descends
from it: DDBM, DBIM, I2SB) or of EDM (NVlabs/edm), for the network `adm_unet`."""

from diffusion_jax.interop.mapping import CONV, LINEAR, Leaf, Weights, linear
from diffusion_jax.interop.unet_leaves import EDMLayers, norm, pointwise, resolution_of
from diffusion_jax.networks.adm_unet import ADMUNet
from diffusion_jax.registry import register


@register("weights", "adm_unet")
def adm_unet(
    module: ADMUNet, *, image_size: int | None = None, prefix: str = "", attention_axes: int = 1
) -> Weights:
    """The layout of an `ADMUNet`, in the names of its `origin`.

    Args:
      module: the network.
      image_size: side of the images, for a network that does not name one.
      prefix: before the names of theirs: "model." for EDM's state dict of the preconditioned network.
      attention_axes: how many axes of length 1 export writes behind the attention's kernels of
        guided-diffusion's form; its own have 1, those of code that attends over images 2. Any number is read.

    Raises:
      ValueError: no image size is known, or it does not fit the levels; a network with parts that no
        official one of its origin has.
    """
    resolutions = resolution_of(module, image_size, len(module.channel_mults))
    attending = [int(name.split("x")[0]) in module.attention_resolutions for name in resolutions]
    if module.origin == "edm":
        if not (module.scale_shift and module.resblock_updown):
            raise ValueError("adm_unet: EDM's form has scale_shift and resblock_updown")
        return _edm(module, resolutions, attending, prefix)
    if module.augment_dim:
        raise ValueError("adm_unet: guided-diffusion's form has no augment_dim")
    return _guided(module, attending, prefix, attention_axes)


def _edm(module: ADMUNet, names, attending, prefix) -> Weights:
    net, widths = EDMLayers(prefix, (1, 1)), module.widths
    if module.augment_dim:
        net.layer("augment", "map_augment", bias=False)
    net.layer("time_in", "map_layer0")
    net.layer("time_out", "map_layer1")
    if module.num_classes:
        net.leaf("label/table", "map_label.weight", LINEAR)

    def attends(level):
        return attending[level] and module.heads_of(widths[level]) > 0

    net.layer("input", f"enc.{names[0]}_conv", kind=CONV)
    width, skips = widths[0], [widths[0]]
    for level, name in enumerate(names):
        if level:
            ours = f"down_{level}_resample"
            net.block(ours, f"enc.{name}_down", width, width, resamples=True)
            skips.append(width)
        for i in range(module.num_res_blocks):
            ours, theirs = f"down_{level}_block_{i}", f"enc.{name}_block{i}"
            net.block(ours, theirs, width, widths[level], attends=attends(level))
            width = widths[level]
            skips.append(width)
    middle = module.heads_of(width) > 0
    net.block("middle_block_0", f"dec.{names[-1]}_in0", width, width, attends=middle)
    net.block("middle_block_1", f"dec.{names[-1]}_in1", width, width)
    for level in reversed(range(len(widths))):
        name = names[level]
        if level < len(widths) - 1:
            net.block(f"up_{level}_resample", f"dec.{name}_up", width, width, resamples=True)
        for i in range(module.num_res_blocks + 1):
            ours, theirs = f"up_{level}_block_{i}", f"dec.{name}_block{i}"
            net.block(ours, theirs, width + skips.pop(), widths[level], attends=attends(level))
            width = widths[level]
    net.norm("output_norm", "out_norm")
    net.layer("output", "out_conv", kind=CONV)
    return Weights(tuple(net.leaves), (net.ignored,), lambda: net.filters)


def _guided(module: ADMUNet, attending, prefix, attention_axes) -> Weights:
    leaves, widths = [], module.widths
    single = pointwise(attention_axes)

    def layer(ours, theirs, **kind):
        leaves.extend(linear(ours, prefix + theirs, **kind))

    def normed(ours, theirs):
        leaves.extend(norm(ours, prefix + theirs))

    def block(ours, theirs, inputs, outputs):
        normed(f"{ours}/norm_in", f"{theirs}.in_layers.0")
        layer(f"{ours}/conv_in", f"{theirs}.in_layers.2", kind=CONV)
        layer(f"{ours}/modulation", f"{theirs}.emb_layers.1")
        normed(f"{ours}/norm_out", f"{theirs}.out_layers.0")
        layer(f"{ours}/conv_out", f"{theirs}.out_layers.3", kind=CONV)
        if inputs != outputs:
            layer(f"{ours}/skip", f"{theirs}.skip_connection", kind=pointwise(2))

    def attention(ours, theirs):
        normed(f"{ours}/attention/norm", f"{theirs}.norm")
        layer(f"{ours}/attention/qkv", f"{theirs}.qkv", kind=single)
        layer(f"{ours}/attention/out", f"{theirs}.proj_out", kind=single)

    def between(ours, theirs, conv, width):
        if module.resblock_updown:
            block(ours, theirs, width, width)
        elif module.conv_resample:
            layer(f"{ours}/conv", f"{theirs}.{conv}", kind=CONV)

    layer("time_in", "time_embed.0")
    layer("time_out", "time_embed.2")
    if module.num_classes:
        leaves.append(Leaf("label/table", f"{prefix}label_emb.weight"))
    layer("input", "input_blocks.0.0", kind=CONV)
    width, skips = widths[0], [widths[0]]
    for level in range(len(widths)):
        if level:
            between(f"down_{level}_resample", f"input_blocks.{len(skips)}.0", "op", width)
            skips.append(width)
        for i in range(module.num_res_blocks):
            ours, theirs = f"down_{level}_block_{i}", f"input_blocks.{len(skips)}"
            block(ours, f"{theirs}.0", width, widths[level])
            if attending[level]:
                attention(ours, f"{theirs}.1")
            width = widths[level]
            skips.append(width)
    block("middle_block_0", "middle_block.0", width, width)
    attention("middle_block_0", "middle_block.1")
    block("middle_block_1", "middle_block.2", width, width)
    count = 0
    for level in reversed(range(len(widths))):
        for i in range(module.num_res_blocks + 1):
            ours, theirs = f"up_{level}_block_{i}", f"output_blocks.{count}"
            count += 1
            block(ours, f"{theirs}.0", width + skips.pop(), widths[level])
            if attending[level]:
                attention(ours, f"{theirs}.1")
            width = widths[level]
        if level:
            last = f"{theirs}.{1 + attending[level]}"
            between(f"up_{level - 1}_resample", last, "conv", width)
    normed("output_norm", "out.0")
    layer("output", "out.2", kind=CONV)
    return Weights(tuple(leaves))
