import numpy as np
import pytest

from diffusion_jax.data import Pipeline, described
from diffusion_jax.data.source import DataSpec


def test_a_spec_without_examples():
    source = described("image", (8, 4, 3), num_classes=5, source=True, mask=True, show="image")
    shapes = {name: (e.shape, e.dtype) for name, e in source.spec.elements.items()}
    assert shapes == {
        "image": ((8, 4, 3), "float32"),
        "label": ((), "int32"),
        "source": ((8, 4, 3), "float32"),
        "mask": ((8, 4, 1), "float32"),
    }
    assert len(source) == 0 and source.spec.num_classes == 5
    assert DataSpec.from_json(source.spec.to_json()) == source.spec
    assert {k: v.shape for k, v in source.take([]).items()}["image"] == (0, 8, 4, 3)
    for ask in (lambda: source.take([0]), lambda: source.take(np.zeros(3, int))):
        with pytest.raises(ValueError, match="'described', shapes without examples"):
            ask()
    with pytest.raises(ValueError, match="'described', shapes without examples"):
        Pipeline(source, 4)


def test_text_with_its_tokenizer(tiny_tokenizer, tmp_path):
    file = tiny_tokenizer(tmp_path, "to be or not to be")
    spec = described("tokens", (8,), tokenizer=file).spec
    size = spec.vocab_size
    assert 256 < size <= 280 and spec.show == "tokenizer"
    assert described("tokens", (8,), vocab_size=300, tokenizer=file).spec.vocab_size == 300
    assert described("tokens", (8,), vocab_size=300).spec.show is None
    with pytest.raises(ValueError, match=f"{size} tokens, the model's are 28"):
        described("tokens", (8,), vocab_size=28, tokenizer=file)


def test_errors():
    with pytest.raises(ValueError, match=r"split.*'tset'"):
        described("image", (8, 8, 3), split="tset")
    with pytest.raises(ValueError, match="unknown kind 'img'"):
        described("img", (8, 8, 3))
    with pytest.raises(ValueError, match="needs vocab_size"):
        described("tokens", (8,))
