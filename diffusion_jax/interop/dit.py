"""Official weights of DiT (facebookresearch/DiT), and of networks with its state dict."""

from diffusion_jax.interop.mapping import Kind, Leaf, Weights, linear, stacked
from diffusion_jax.networks.dit import DiT
from diffusion_jax.networks.features import sincos_positions
from diffusion_jax.registry import register

_TABLE = "pos_embed"


def patch_embedding(patch_size: int) -> Kind:
    """A convolution over patches, `[D, C, p, p]`, as a linear map of flat patches, `[p p C, D]`."""

    def to_theirs(kernel):
        inputs, width = kernel.shape
        shape = (patch_size, patch_size, inputs // patch_size**2, width)
        return kernel.reshape(shape).transpose(3, 2, 0, 1)

    def to_ours(weight):
        if weight.shape[2:] != (patch_size, patch_size):
            raise ValueError(f"the patches have side {patch_size} here")
        return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])

    return Kind(to_ours, to_theirs)


def block_leaves(ours: str, theirs, qkv_bias: bool = True) -> list[Leaf]:
    """The linear layers of a transformer block in timm's names.

    Args:
      ours: name of the block, "blocks/block".
      theirs: `(layer's name) -> name or names`, for "attn.qkv", "attn.proj", "mlp.fc1" and "mlp.fc2".
      qkv_bias: whether the first has a bias.
    """
    return [
        *linear(f"{ours}/attention/qkv", theirs("attn.qkv"), bias=qkv_bias),
        *linear(f"{ours}/attention/out", theirs("attn.proj")),
        *linear(f"{ours}/mlp_in", theirs("mlp.fc1")),
        *linear(f"{ours}/mlp_out", theirs("mlp.fc2")),
    ]


@register("weights", "dit")
def dit(module: DiT, image_size: int | None = None) -> Weights:
    """The layout of a `DiT`.

    Args:
      module: the network, without a source.
      image_size: side of the (latent) image: export then writes the table of positions, which the
        official loader asks for; None leaves it out.
    Raises:
      ValueError: a network with a source, an image that the patches do not divide.
    """
    if module.source_channels:
        raise ValueError("dit: official weights have no source image; source_channels must be 0")
    if image_size is not None and image_size % module.patch_size:
        raise ValueError(
            f"dit: image_size = {image_size} must be divisible by patch_size = {module.patch_size}"
        )

    def layers(name):
        return stacked(f"blocks.{{i}}.{name}", module.depth)

    leaves = [
        *linear("input", "x_embedder.proj", kind=patch_embedding(module.patch_size)),
        *linear("condition/time_in", "t_embedder.mlp.0"),
        *linear("condition/time_out", "t_embedder.mlp.2"),
        *block_leaves("blocks/block", layers),
        *linear("blocks/block/modulation/linear", layers("adaLN_modulation.1")),
        *linear("output_modulation/linear", "final_layer.adaLN_modulation.1"),
        *linear("output", "final_layer.linear"),
    ]
    if module.num_classes:
        leaves.append(Leaf("condition/label/table", "y_embedder.embedding_table.weight"))

    def table():
        side = image_size // module.patch_size
        return {_TABLE: sincos_positions(side, side, module.width)[None]}

    buffers = table if image_size is not None else dict
    return Weights(tuple(leaves), ignored=(_TABLE,), buffers=buffers)
