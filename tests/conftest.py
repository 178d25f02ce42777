"""Shared by all tests."""

import pathlib

import jax
import pytest


@pytest.fixture
def x64():
    """64-bit JAX for one test; its neighbours in the same process stay in 32 bits."""
    with jax.enable_x64(True):
        yield


def _tiny_tokenizer(folder, text):
    """Trains a byte-level BPE of 280 entries on a text; the path of its file."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text], trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture
def tiny_tokenizer():
    return _tiny_tokenizer


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops compiled programs before a process runs out of memory maps (65,530), which crashes XLA."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
