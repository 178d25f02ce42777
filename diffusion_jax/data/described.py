"""Data that are only described: shapes and classes for a model whose data set is not here.

Weights from elsewhere, and sizes that are only to be looked at, need what a data set yields, not its examples.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from diffusion_jax.data.codecs import make_codec
from diffusion_jax.data.source import DataSpec, Element, Source, check_split
from diffusion_jax.registry import register


class Described(Source):
    """A spec without examples; made by `described`."""

    why_empty = (
        "the data of this config are 'described', shapes without examples: name a data set, such as"
        " --config.data.name=image_folder"
    )

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    def __len__(self) -> int:
        return 0

    def take(self, rows):
        """Raises ValueError for whatever is asked for."""
        if np.size(rows):
            raise ValueError(self.why_empty)
        return super().take(rows)

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {n: v for n, v in self.spec.zeros(0).items() if n in self.spec.elements}


@register("data", "described", kinds=("image", "tokens", "points"), examples=False)
def described(
    kind: str,
    shape: Sequence[int],
    *,
    split: str = "train",
    num_classes: int | None = None,
    vocab_size: int | None = None,
    tokenizer: str | pathlib.Path = "",
    source: bool = False,
    mask: bool = False,
    show: str | None = None,
) -> Described:
    """No examples: what a data set would yield.

    Args:
      kind: "image", "tokens" or "points".
      shape: of one example: [H, W, C], [L], or any.
      split: "train", "test" or "all"; nothing depends on it.
      num_classes: of labels; None without.
      vocab_size: V of tokens; None takes the tokenizer's.
      tokenizer: file that numbered the tokens; "" where samples need not be read.
      source: whether an example has a source of the same shape (bridges).
      mask: whether it has a mask [H, W, 1] (inpainting).
      show: how samples are shown, of `DataSpec`: "image" for pixels; None for what is no picture, such as
        the latents of an autoencoder. Tokens with a tokenizer are shown as its text.

    Returns:
      A source of length 0.

    Raises:
      ValueError: an unknown kind or split, a shape or vocabulary that does not fit, a tokenizer of more
        tokens than there are.
      ImportError: a tokenizer file, and the tokenizers library is missing.
    """
    check_split(split)
    shape = tuple(int(n) for n in shape)
    dtype = "int32" if kind == "tokens" else "float32"
    elements = {kind: Element(shape, dtype)}
    if num_classes:
        elements["label"] = Element((), "int32")
    if source:
        elements["source"] = Element(shape, dtype)
    if mask:
        elements["mask"] = Element((*shape[:2], 1), "float32")
    file = None
    if tokenizer:
        opened = make_codec("tokens", tokenizer=tokenizer).tokenizer
        vocab_size = opened.size if vocab_size is None else vocab_size
        if opened.size > vocab_size:
            raise ValueError(f"{tokenizer} has {opened.size} tokens, the model's are {vocab_size}")
        file, show = {"path": str(opened.path), "sha256": opened.sha256}, "tokenizer"
    return Described(
        DataSpec(
            kind=kind,
            elements=elements,
            num_classes=num_classes or None,
            vocab_size=vocab_size,
            show=show,
            tokenizer=file,
        )
    )
