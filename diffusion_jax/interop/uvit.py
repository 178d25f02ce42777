"""Official weights of U-ViT (baofff/U-ViT)."""

from diffusion_jax.interop.dit import block_leaves, patch_embedding
from diffusion_jax.interop.mapping import CONV, Kind, Leaf, Weights, linear, stacked
from diffusion_jax.networks.uvit import UViT
from diffusion_jax.registry import register

_FIRST = Kind(lambda table: table[0], lambda table: table[None])  # [1, L, D] and [L, D]


def _block(ours, theirs, qkv_bias):
    norms = [
        Leaf(f"{ours}/{name}/norm/{part}", theirs(f"{norm}.{suffix}"))
        for name, norm in (("attention_norm", "norm1"), ("mlp_norm", "norm2"))
        for part, suffix in (("scale", "weight"), ("bias", "bias"))
    ]
    return [*norms, *block_leaves(ours, theirs, qkv_bias)]


@register("weights", "uvit")
def uvit(module: UViT) -> Weights:
    """The layout of a `UViT`.

    Args:
      module: the network, without a source.
    Raises:
      ValueError: a network with a source.
    """
    if module.source_channels:
        raise ValueError("uvit: official weights have no source image; source_channels must be 0")
    half = module.depth // 2

    def of_half(name, backwards=False):
        def theirs(layer):
            layers = stacked(f"{name}.{{i}}.{layer}", half)
            return layers[::-1] if backwards else layers

        return theirs

    def of_middle(layer):
        return f"mid_block.{layer}"

    out = of_half("out_blocks", backwards=True)
    leaves = [
        Leaf("positions", "pos_embed", _FIRST),
        *linear("input", "patch_embed.proj", kind=patch_embedding(module.patch_size)),
        *_block("in_blocks", of_half("in_blocks"), module.qkv_bias),
        *_block("mid_block", of_middle, module.qkv_bias),
        *_block("out_blocks/block", out, module.qkv_bias),
        *linear("out_blocks/skip", out("skip_linear")),
        Leaf("norm/norm/scale", "norm.weight"),
        Leaf("norm/norm/bias", "norm.bias"),
        *linear("output", "decoder_pred"),
    ]
    if module.mlp_time_embed:
        leaves += [*linear("time_in", "time_embed.0"), *linear("time_out", "time_embed.2")]
    if module.num_classes:
        leaves.append(Leaf("label/table", "label_emb.weight"))
    if module.text_channels:
        leaves += linear("text", "context_embed")
    if module.conv:
        leaves += linear("conv", "final_layer", kind=CONV)
    return Weights(tuple(leaves))
