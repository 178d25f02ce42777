import gzip

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data.text import clean_text8

TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 🙂\r\n" * 20


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode("utf-8"))
    return file


def joined(source):
    return "".join(source.spec.decode(source.take(np.arange(len(source)))["tokens"]))


@pytest.mark.parametrize("length", [1, 7, 64])
def test_characters_round_trip(path, length):
    source = data.text(path, length, split="all")
    whole = len(TEXT) // length * length
    assert joined(source) == TEXT[:whole]
    assert source.spec.symbols == tuple(sorted(set(TEXT)))
    assert source.spec.vocab_size == len(set(TEXT))
    assert source[0]["tokens"].dtype == np.int32


def test_bytes_round_trip(path):
    source = data.text(path, 10, split="all", unit="bytes")
    raw = TEXT.encode("utf-8")
    tokens = source.take(np.arange(len(source)))["tokens"]
    assert bytes(tokens.astype(np.uint8).ravel()) == raw[: len(raw) // 10 * 10]
    assert source.spec.vocab_size == 256
    one = data.text(path, len(raw), split="all", unit="bytes")
    assert one.spec.decode(one[0]["tokens"]) == TEXT


def test_split_is_the_end_of_the_file_and_shares_the_vocabulary(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 90 + "b" * 10)
    train, test = (data.text(path, 5, split=split) for split in ("train", "test"))
    assert joined(train) == "a" * 90 and joined(test) == "b" * 10
    assert train.spec == test.spec


def test_stride(path):
    every = data.text(path, 8, split="all", stride=1)
    assert len(every) == len(TEXT) - 7
    assert every.spec.decode(every[3]["tokens"]) == TEXT[3:11]
    assert every.spec.decode(every[-1]["tokens"]) == TEXT[-8:]
    third = data.text(path, 8, split="all", stride=3)
    assert third.spec.decode(third[2]["tokens"]) == TEXT[6:14]


def test_gzip(path, tmp_path):
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    a, b = data.text(path, 16), data.text(packed, 16)
    np.testing.assert_array_equal(a[3]["tokens"], b[3]["tokens"])
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot read"):
        data.text(packed, 16)
    packed.write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(ValueError, match="larger than max_bytes=1000"):
        data.text(packed, 16, max_bytes=1000)


def test_alphabet(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abca" * 10)
    source = data.text(path, 4, alphabet="cxba")
    assert source[0]["tokens"].tolist() == [3, 2, 0, 3] and source.spec.vocab_size == 4
    again = data.text(path, 4, alphabet="".join(data.text(path, 4).spec.symbols))
    assert again.spec == data.text(path, 4).spec
    with pytest.raises(ValueError, match="character 'c' at position 2"):
        data.text(path, 4, alphabet="ab")
    with pytest.raises(ValueError, match="'a' occurs twice"):
        data.text(path, 4, alphabet="abca")


def test_vocabulary():
    vocabulary = data.Vocabulary.of("hello")
    assert vocabulary.symbols == ("e", "h", "l", "o")
    assert vocabulary.encode("hole").tolist() == [1, 3, 2, 0]
    assert vocabulary.decode(np.array([1, 3, 4, 0])) == "ho_e"
    assert vocabulary.encode("").shape == (0,)
    for unknown in ("a", "m", "z", "\x00"):
        with pytest.raises(ValueError, match="position 1"):
            vocabulary.encode("h" + unknown)
    with pytest.raises(ValueError, match="single characters"):
        data.Vocabulary(("ab",))
    with pytest.raises(ValueError, match="single characters"):
        data.Vocabulary(())


def test_text8_symbols(tmp_path):
    cleaned = "in one nine six nine naive caf s didn t say a b"
    assert clean_text8("In 1969,  naive café's\n\ndidn't say <A&B>!") == cleaned
    path = tmp_path / "text.txt"
    path.write_text("The 3 Ships! " * 20)
    source = data.text(path, 16, split="all", clean="text8")
    assert source.spec.vocab_size == 27 and source.spec.symbols[:3] == (" ", "a", "b")
    assert joined(source).startswith("the three ships the three")


def test_not_utf8(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"good \xff bad" * 10)
    with pytest.raises(ValueError, match=r"not UTF-8: byte 0xff at offset 5; use unit='bytes'"):
        data.text(path, 4)
    assert data.text(path, 4, unit="bytes")[1]["tokens"].tolist() == [32, 255, 32, 98]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(length=0), "length=0"),
        (dict(length=2.5), "length=2.5"),
        (dict(stride=0), "stride=0"),
        (dict(length=10_000), "fewer than length=10000"),
        (dict(unit="words"), "unit must be one of characters, bytes, tokens; got 'words'"),
        (dict(clean="text9"), "unknown clean 'text9'"),
        (dict(unit="bytes", clean="text8"), "unit='characters'"),
        (dict(split="tset"), "unknown split 'tset'"),
        (dict(test_fraction=1.5), "test_fraction=1.5"),
        (dict(path="nowhere.txt"), "'nowhere.txt' is not a file"),
        (dict(max_bytes=100), "max_bytes=100"),
    ],
)
def test_bad_arguments(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.text(**{"path": path, "length": 8, **arguments})
