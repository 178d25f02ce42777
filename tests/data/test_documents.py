import gzip
import json
import tracemalloc

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data import prepare_text
from diffusion_jax.data.documents import split_documents
from diffusion_jax.data.token_files import make_corpus, read_corpus, write_corpus

LINES = ["one", "", "two and", "three", "x" * 12]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + "\n")
    return tmp_path / "lines.txt"


def rows(source):
    return source.take(np.arange(len(source)))


def test_boundaries():
    lines = "a\r\nb\n\n\nc\n\n".split("\n")
    assert list(split_documents(lines, "lines")) == ["a", "b", "c"]
    assert list(split_documents(lines, "paragraphs")) == ["a\nb", "c"]
    assert list(split_documents(lines, "file")) == ["a\nb\n\n\nc\n\n"]
    found = split_documents(['{"text": "a\\nb"}', "", '{"text": "c", "id": 3}'], "jsonl")
    assert list(found) == ["a\nb", "c"]
    for line in ("{", "3", "{}", '{"text": 3}', "[" * 100_000):
        with pytest.raises(ValueError, match="'f', line 1: "):
            list(split_documents([line], "jsonl", "text", "f"))


def test_packed_rows_go_over_the_ends_of_documents(path):
    source = data.documents(path, 8, split="all")
    text = "one\ntwo and\nthree\n" + "x" * 12 + "\n"
    assert source.spec.decode(rows(source)["tokens"]) == [text[i : i + 8] for i in (0, 8, 16)]
    assert source.spec.symbols == tuple(sorted(set(text)))
    every = data.documents(path, 8, split="all", stride=1)
    assert len(every) == len(text) - 7


def test_padded_rows_are_documents(path):
    source = data.documents(path, 8, split="all", layout="padded")
    # cut, or filled up with the separator
    texts = ["one\n\n\n\n\n", "two and\n", "three\n\n\n", "x" * 8]
    assert source.spec.decode(rows(source)["tokens"]) == texts
    other = data.documents(path, 8, split="all", layout="padded", pad=" ", pad_given=True)
    found = rows(other)
    assert other.spec.decode(found["tokens"][0]) == "one\n    "
    assert other.spec.decode(found["prompt"]) == ["____    ", "________", "______  ", "________"]
    shuffled = other.take([2, 0, 2])
    np.testing.assert_array_equal(shuffled["tokens"], found["tokens"][[2, 0, 2]])


def test_splits_share_nothing_but_the_vocabulary(tmp_path):
    texts = [f"{i:04d}" for i in range(200)]
    (tmp_path / "n.txt").write_text("\n".join(texts))
    parts = [data.documents(tmp_path / "n.txt", 5, split=s) for s in ("train", "test")]
    found = [{t.strip() for t in p.spec.decode(rows(p)["tokens"])} for p in parts]
    assert [len(f) for f in found] == [180, 20] and found[0] | found[1] == set(texts)
    assert parts[0].spec == parts[1].spec


def test_units(path, tiny_tokenizer, tmp_path):
    source = data.documents(path, 4, split="all", unit="bytes", separator="\x00")
    assert (rows(source)["tokens"] == 0).sum() == 3  # the last is in no whole row
    file = tiny_tokenizer(tmp_path, " ".join(LINES) * 20)
    source = data.documents(path, 4, split="all", unit="tokens", tokenizer=file, layout="padded")
    assert rows(source)["tokens"][0, -1] == 0 and source.spec.vocab_size > 256
    assert source.spec.decode(rows(source)["tokens"])[0].startswith("one<|endoftext|>")
    clean = data.documents(path, 6, split="all", clean="text8")
    assert clean.spec.vocab_size == 27
    assert "".join(clean.spec.decode(rows(clean)["tokens"])) == "one two and three " + "x" * 12


@pytest.fixture
def corpus(path):
    return lambda **options: data.documents(path, 4, split="all", unit="bytes", **options)


def write(folder, unit="bytes", **options):
    return prepare_text.prepare_text(
        folder,
        {"train": lambda: iter(LINES[:4]), "test": lambda: iter(LINES[4:])},
        unit=unit,
        **options,
    )


def test_token_files_say_the_same_as_memory(tmp_path, corpus):
    sizes = write(tmp_path / "tokens")
    assert sizes == {"train": (18, 3), "test": (13, 1)}
    for options in (dict(), dict(layout="padded"), dict(stride=2)):
        held = corpus(**options)
        found = data.documents(tmp_path / "tokens", 4, split="all", **options)
        np.testing.assert_array_equal(rows(found)["tokens"], rows(held)["tokens"])
        assert found.spec == held.spec
    assert (tmp_path / "tokens" / "train.npy").stat().st_size == 128 + 18
    mapped = read_corpus(tmp_path / "tokens", "train")
    assert isinstance(mapped.tokens, np.memmap) and mapped.tokens.dtype == np.uint8
    with pytest.raises(ValueError, match="split='tset' is not in"):
        data.documents(tmp_path / "tokens", 4, split="tset")
    with pytest.raises(ValueError, match="holds token files already"):
        write(tmp_path / "tokens")


def test_characters_and_tokenizers_in_token_files(tmp_path, tiny_tokenizer):
    write(tmp_path / "characters", unit="characters")
    symbols = read_corpus(tmp_path / "characters", "test").codec.symbols
    assert symbols == tuple(sorted(set("".join(LINES)) | {"\n"}))
    file = tiny_tokenizer(tmp_path, " ".join(LINES) * 20)
    write(tmp_path / "tokens", unit="tokens", tokenizer=str(file))
    file.unlink()  # the folder keeps its own
    source = data.documents(tmp_path / "tokens", 3)
    assert source.spec.decode(rows(source)["tokens"])[0].startswith("one<|endoftext|>")
    assert read_corpus(tmp_path / "tokens", "train").tokens.dtype == np.uint16
    tiny_tokenizer(tmp_path / "tokens", "other words " * 40)
    with pytest.raises(ValueError, match="is not the file that this was made with"):
        data.documents(tmp_path / "tokens", 3)


def test_damaged_token_files(tmp_path):
    folder = tmp_path / "tokens"
    write(folder)
    meta = json.loads((folder / "meta.json").read_text())
    tokens, ends = (folder / "train.npy").read_bytes(), np.load(folder / "train_ends.npy")

    def refused(message):
        with pytest.raises(ValueError, match=message):
            data.documents(folder, 4)

    for changed, message in (
        ({"format": 2}, "has format 2"),
        ({"vocab_size": 255}, "damaged: 255 tokens"),
        ({"separator": 256}, "separator 256"),
        ({"separator": "a"}, "no folder of token files"),
        ({"splits": 3}, "no folder of token files"),
        ({"splits": {"train": {"tokens": 17, "documents": 3}}}, r"says uint8 \(17,\)"),
    ):
        (folder / "meta.json").write_text(json.dumps(meta | changed))
        refused(message)
    (folder / "meta.json").write_text("{")
    refused("no folder of token files")
    (folder / "meta.json").write_text(json.dumps(meta))
    for content in (tokens[:-4], b"", b"\x93NUMPY"):
        (folder / "train.npy").write_bytes(content)
        refused("cannot be read")
    np.save(folder / "train.npy", np.zeros(18, np.int64))
    refused("holds int64")
    (folder / "train.npy").write_bytes(tokens)
    np.save(folder / "train_ends.npy", ends[::-1].copy())
    refused("ends of documents are damaged")
    (folder / "train_ends.npy").unlink()
    refused("cannot be read")
    (folder / "meta.json").unlink()
    refused("no folder of token files")


def test_tokens_out_of_range_are_named(tmp_path):
    folder = tmp_path / "tokens"
    write(folder, unit="characters", alphabet="\nadehnortwx ")
    np.save(folder / "train.npy", np.full(18, 12, np.uint8))
    for layout in ("packed", "padded"):
        with pytest.raises(ValueError, match=r"token 12, outside 0\.\.11"):
            data.documents(folder, 4, layout=layout).take([0])


def test_an_unfinished_folder_is_no_corpus(tmp_path):
    with pytest.raises(ValueError, match="character 'a' at position 4"):
        write(tmp_path / "tokens", unit="characters", alphabet="\none tw")
    with pytest.raises(ValueError, match="no folder of token files"):
        data.documents(tmp_path / "tokens", 4)


def test_memory_does_not_hold_the_corpus(tmp_path):
    codec = make_corpus((), *prepare_text.document_codec("bytes", ())).codec
    texts = (chr(97 + i % 26) * 5000 for i in range(3000))
    tracemalloc.start()
    sizes = write_corpus(tmp_path / "tokens", {"train": texts}, codec, 10)
    source = data.documents(tmp_path / "tokens", 64)
    source.take([0, len(source) - 1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes["train"] == (15_003_000, 3000)
    assert peak < 40e6  # a batch of 1,000 documents as int32, of 15 million tokens


def test_the_command(tmp_path, capsys):
    lines = "\n".join(json.dumps({"text": f"document {i}"}) for i in range(300))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    out = tmp_path / "tokens"
    arguments = [f"--input={tmp_path / 'a.jsonl.gz'}", f"--out={out}", "--test_fraction=0.2"]
    assert prepare_text.main(arguments) == 0
    assert "documents" in capsys.readouterr().out
    parts = [read_corpus(out, split) for split in ("train", "test")]
    assert sum(len(part.ends) for part in parts) == 300 and 30 < len(parts[1].ends) < 90
    texts = []
    for part in parts:
        texts += part.codec.spec(len(part.tokens)).decode(np.array(part.tokens)).split("\n")[:-1]
    assert sorted(texts) == sorted(f"document {i}" for i in range(300))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either --input=FILE or --tfds=NAME"),
        (["--input=nowhere.txt"], "'nowhere.txt' is not a file"),
        (["--input=FILE", "--tokenizer=nowhere.json"], "'nowhere.json' is not a file"),
        (["--input=FILE", "--unit=tokens"], "needs tokenizer="),
        (["--input=FILE", "--boundary=jsonl"], "line 1: not JSON"),
        (["--input=FILE", "--alphabet=abc"], "'\\n' at position 0 is not among"),
        (["--tfds=no_such_set"], "'no_such_set' is not prepared"),
    ],
)
def test_mistakes_of_the_command(path, tmp_path, arguments, message, capsys):
    given = [a.replace("FILE", str(path)) for a in arguments]
    given += [f"--out={tmp_path / 'out'}", f"--data_dir={tmp_path}"]
    assert prepare_text.main(given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_not_utf8(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"good\nb\xffd\n")
    with pytest.raises(ValueError, match="is not UTF-8: byte 0xff at offset 6"):
        data.documents(tmp_path / "a.txt", 4)
    assert prepare_text.main([f"--input={tmp_path / 'a.txt'}", f"--out={tmp_path / 'o'}"]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(length=0), "length=0"),
        (dict(stride=0), "stride=0"),
        (dict(split="tset"), "unknown split 'tset'"),
        (dict(layout="loose"), "got 'loose'"),
        (dict(boundary="pages"), "got 'pages'"),
        (dict(unit="words"), "got 'words'"),
        (dict(clean="text9"), "got 'text9'"),
        (dict(unit="bytes", clean="text8"), "unit='characters'"),
        (dict(pad="x"), "layout='padded'"),
        (dict(layout="padded", pad="??"), "character '\\?'"),
        (dict(separator="ab"), "is 2 tokens, not one"),
        (dict(length=1000), "fewer than length=1000"),
        (dict(path="nowhere.txt"), "'nowhere.txt' is not a file"),
    ],
)
def test_bad_arguments(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.documents(**{"path": path, "length": 4, **arguments})


def test_tfds_by_name(tmp_path, tiny_text, tiny_tokenizer):
    folder = tiny_text(tmp_path, ["One!", "two and three", ""])
    source = data.tfds_text("tiny_text", 8, data_dir=folder, unit="bytes")
    assert source.spec.decode(rows(source)["tokens"]) == ["One!" + "\n" * 4, "two and ", "\n" * 8]
    clean = data.tfds_text("tiny_text", 6, data_dir=folder, unit="characters", clean="text8")
    assert clean.spec.decode(rows(clean)["tokens"])[:2] == ["one   ", "two an"]
    packed = data.tfds_text("tiny_text", 5, data_dir=folder, unit="bytes", layout="packed")
    assert packed.spec.decode(rows(packed)["tokens"]) == ["One!\n", "two a", "nd th"]
    file = tiny_tokenizer(tmp_path, "one two and three " * 20)
    tokens = data.tfds_text("tiny_text", 8, data_dir=folder, tokenizer=file)
    assert tokens.spec.decode(tokens[1]["tokens"]).startswith("two and three<|endoftext|>")
    arguments = ["--tfds=tiny_text", f"--data_dir={folder}", "--splits=train", "--unit=bytes"]
    assert prepare_text.main([*arguments, f"--out={tmp_path / 'out'}"]) == 0
    again = data.documents(tmp_path / "out", 5)
    np.testing.assert_array_equal(rows(again)["tokens"], rows(packed)["tokens"])


def test_tfds_mistakes(tmp_path, tiny_text):
    with pytest.raises(ValueError, match=r"'lm1b' is not prepared .*--name=lm1b"):
        data.tfds_text("lm1b", 8, data_dir=tmp_path, unit="bytes")
    folder = tiny_text(tmp_path, ["one"])
    options = dict(data_dir=folder, unit="bytes")
    for arguments, message in (
        (dict(text_key="txt"), "no feature 'txt'.*did you mean 'text'"),
        (dict(text_key="label"), "is not text"),
        (dict(split="test"), "no split 'test'"),
        (dict(unit="characters"), "needs alphabet="),
        (dict(layout="packed", length=50), "fewer than 50 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            data.tfds_text(**{"dataset": "tiny_text", "length": 4, **options, **arguments})
