import sys

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data.codecs import Codec, codec_of, encode_prompt, make_codec
from diffusion_jax.data.source import DataSpec
from diffusion_jax.data.tokenizer import load_tokenizer

TEXT = "To be, or not to be: that is the question. Übermut tut selten gut! " * 30


@pytest.fixture
def file(tiny_tokenizer, tmp_path):
    return tiny_tokenizer(tmp_path, TEXT)


def test_round_trip_and_size(file):
    tokenizer = load_tokenizer(file)
    tokens = tokenizer.encode("to be or nöt")
    assert tokens.dtype == np.int32 and tokenizer.decode(tokens) == "to be or nöt"
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.size == 280 and tokens.max() < 280
    assert tokenizer.separator() == tokenizer.id_of("<|endoftext|>") == 0
    for one, text in zip(tokenizer.encode_all(["to be", "", "or"]), ("to be", "", "or")):
        np.testing.assert_array_equal(one, tokenizer.encode(text))
    assert load_tokenizer(file.parent).sha256 == tokenizer.sha256  # the folder that holds it
    with pytest.raises(ValueError, match=r"no token '<pad>'"):
        tokenizer.id_of("<pad>")


def test_the_size_is_the_largest_id_and_one(tmp_path):
    library = pytest.importorskip("tokenizers")
    words = {"a": 0, "b": 50_256}  # numbered with gaps
    made = library.Tokenizer(library.models.WordLevel(words, unk_token="a"))
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.size == 50_257
    with pytest.raises(ValueError, match="separator="):
        tokenizer.separator()


def test_text_in_tokens(file, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    source = data.text(path, 16, unit="tokens", tokenizer=file, split="all")
    tokens = source.take(np.arange(len(source)))["tokens"]
    assert source.spec.vocab_size == 280 and tokens.dtype == np.int32
    whole = load_tokenizer(file).encode(TEXT)
    np.testing.assert_array_equal(tokens.ravel(), whole[: len(whole) // 16 * 16])
    assert "".join(source.spec.decode(tokens))[:100] == TEXT[:100]
    holes = tokens[0].copy()
    holes[[3, 4, 15]] = 280
    assert source.spec.decode(holes).count("_") == 3
    again = DataSpec.from_json(source.spec.to_json())
    assert again == source.spec and again.decode(tokens[:2]) == source.spec.decode(tokens[:2])


def test_a_changed_file_is_noticed(file, tmp_path, tiny_tokenizer):
    spec = make_codec("tokens", tokenizer=file).spec(4)
    assert spec.decode(np.array([5, 6, 7, 8]))
    tiny_tokenizer(tmp_path, "entirely other words " * 30)
    with pytest.raises(ValueError, match="is not the file that this was made with: SHA-256"):
        spec.decode(np.array([5, 6, 7, 8]))
    file.unlink()
    with pytest.raises(ValueError, match="is not a file"):
        spec.decode(np.array([5, 6, 7, 8]))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1, 2", b"\xff\xfe", b'{"model": {"type": "BPE"}}']
)
def test_files_that_are_no_tokenizer(tmp_path, content):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json: ") as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_without_the_library(file, monkeypatch):
    from diffusion_jax.data import tokenizer

    tokenizer._open.cache_clear()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer(file)


def test_units_and_tokenizers_go_together(file, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    with pytest.raises(ValueError, match="needs tokenizer="):
        data.text(path, 8, unit="tokens")
    with pytest.raises(ValueError, match="takes no tokenizer"):
        data.text(path, 8, tokenizer=file)
    with pytest.raises(ValueError, match="alphabet need unit='characters'"):
        data.text(path, 8, unit="tokens", tokenizer=file, alphabet="abc")


def test_symbols_of_several_characters():
    codec = Codec(symbols=("C", "Cl", "c", "l", "[nH]"))
    assert codec.encode("CClc[nH]l").tolist() == [0, 1, 2, 4, 3]
    assert codec.spec(3).decode(np.array([1, 5, 4])) == "Cl_[nH]"
    with pytest.raises(ValueError, match=r"character '\[' at position 1"):
        codec.encode("C[nX]")
    assert codec.token("Cl") == 1
    with pytest.raises(ValueError, match="2 tokens"):
        codec.token("CC")


def test_dtypes():
    assert make_codec("bytes").dtype == np.uint8 and make_codec("bytes").size == 256
    assert make_codec("characters", symbols="ab").dtype == np.uint8
    symbols = tuple(chr(1000 + i) for i in range(257))
    assert make_codec("characters", symbols=symbols).dtype == np.uint16


def prompts():
    characters = make_codec("characters", symbols=tuple(" ,Tbeor")).spec(12)
    return characters, make_codec("bytes").spec(12)


def test_prompts_of_characters():
    spec, _ = prompts()
    prompt = encode_prompt(spec, "To be, _ or")
    assert prompt.shape == (12,) and prompt.dtype == np.int32
    assert spec.decode(prompt) == "To be, _ or_"
    assert (prompt == 7).sum() == 2
    assert spec.decode(encode_prompt(spec, "")) == "_" * 12
    np.testing.assert_array_equal(encode_prompt(spec, "?o??", "?")[:4], [7, 5, 7, 7])


def test_prompts_of_bytes_and_files(file):
    _, spec = prompts()
    assert encode_prompt(spec, "é_").tolist() == [195, 169] + [256] * 10
    spec = make_codec("tokens", tokenizer=file).spec(12)
    prompt = encode_prompt(spec, "to be, _ or")
    tokens = load_tokenizer(file)
    expected = [*tokens.encode("to be, "), 280, *tokens.encode(" or")]
    assert prompt.tolist() == expected + [280] * (12 - len(expected))


@pytest.mark.parametrize(
    "text, symbol, message",
    [
        ("To be or not", "_", "character 'n' at position 9"),
        ("T" * 13, "_", "has 13 tokens, more than the model's length 12"),
        ("_" * 13, "_", "has 13 tokens"),
        ("To", "__", "single character"),
    ],
)
def test_prompts_that_do_not_fit(text, symbol, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(prompts()[0], text, symbol)


def test_no_prompts_for_pixels():
    with pytest.raises(ValueError, match="spell no text"):
        codec_of(data.digits_tokens().spec)
