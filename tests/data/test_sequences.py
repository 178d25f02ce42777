import gzip

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data.sequences import ALPHABETS


def decoded(source):
    return source.spec.decode(source.take(np.arange(len(source)))["tokens"])


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "molecules.smi.gz"
    rows = ["CCO ethanol", "ClCCBr two", "", "c1cc[nH]c1 pyrrole", "C[C@@H](N)C(=O)O alanine"]
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    return path


def test_lines_are_padded_and_cut(lines):
    source = data.sequences(lines, 10, split="all")
    assert decoded(source) == ["CCO       ", "ClCCBr    ", "c1cc[nH]c1", "C[C@@H](N)"]
    # sorted symbols of the whole file, also of what was cut; the padding is the last
    assert source.spec.symbols == (*sorted(set("CCOClCCBrc1cc[nH]c1C[C@@H](N)C(=O)O")), " ")
    assert data.sequences(lines, 10, split="all", long="drop").spec == source.spec
    assert len(data.sequences(lines, 10, split="all", long="drop")) == 3
    short = data.sequences(lines, 3, split="all")
    assert " " not in short.spec.symbols and decoded(short)[1] == "ClC"
    with pytest.raises(ValueError, match="sequence 3 has 16 symbols, more than 10"):
        data.sequences(lines, 10, long="error")


def test_atoms(lines):
    source = data.sequences(lines, 8, split="all", unit="atoms", long="drop")
    assert {"Cl", "Br", "[nH]", "[C@@H]"} <= set(source.spec.symbols)
    tokens = source.take(np.arange(3))["tokens"]
    pad = source.spec.vocab_size - 1
    assert (tokens != pad).sum(axis=1).tolist() == [3, 4, 7]
    assert [text.rstrip() for text in decoded(source)] == ["CCO", "ClCCBr", "c1cc[nH]c1"]
    from diffusion_jax.data.codecs import encode_prompt

    prompt = encode_prompt(source.spec, "Cl_[nH]")
    assert source.spec.decode(prompt) == "Cl_[nH]_____"[: len("Cl_[nH]") + 5]
    with pytest.raises(ValueError, match="alphabet='file'"):
        data.sequences(lines, 8, unit="atoms", alphabet="smiles")
    lines.with_name("open.smi").write_text("C[nH\n")
    with pytest.raises(ValueError, match=r"'C\[nH' is not SMILES"):
        data.sequences(lines.with_name("open.smi"), 8, unit="atoms")


def test_fasta(tmp_path):
    path = tmp_path / "genes.fa"
    path.write_text(">one\nACGT\nacg\n\n>two\nTTTT\n;comment\nT\n>three\nACNT*\n")
    source = data.sequences(path, 7, split="all", alphabet="dna_n")
    assert decoded(source) == ["ACGTACG", "TTTTT  ", "ACNT   "]
    assert source.spec.symbols == tuple("ACGTN ")
    with pytest.raises(ValueError, match=r"sequence 2: 'N' at position 2 is none of the 4 symbols"):
        data.sequences(path, 7, alphabet="dna")
    kept = data.sequences(path, 7, split="all", alphabet="dna", unknown="drop", pad="~")
    assert decoded(kept) == ["ACGTACG", "TTTTT~~"]
    path.write_text("ACGT\n>one\n")
    with pytest.raises(ValueError, match="line 1: FASTA begins with '>'"):
        data.sequences(path, 7)


def test_tables_with_labels(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('id,sequence,kind\n1,ACDE,beta\n2,"GHIK",alpha\n3,LM,beta\n')
    source = data.sequences(
        path, 4, split="all", alphabet="protein", column="sequence", label="kind"
    )
    assert decoded(source) == ["ACDE", "GHIK", "LM  "]
    assert source.spec.class_names == ("alpha", "beta") and source.spec.num_classes == 2
    assert source.take([0, 1, 2])["label"].tolist() == [1, 0, 1]
    path.with_suffix(".tsv").write_text(path.read_text().replace(",", "\t"))
    again = data.sequences(
        path.with_suffix(".tsv"),
        4,
        split="all",
        alphabet="protein",
        column="sequence",
        label="kind",
    )
    assert again.spec == source.spec and decoded(again) == decoded(source)
    with pytest.raises(ValueError, match=r"no column 'sequenze'.*did you mean 'sequence'"):
        data.sequences(path, 4, column="sequenze")
    path.write_text("a,b\nACG,1\nACG\n")
    with pytest.raises(ValueError, match="row 2: 1 fields, the header has 2"):
        data.sequences(path, 4)
    path.write_text('a\n"ACG\n')
    with pytest.raises(ValueError, match="not a table"):
        data.sequences(path, 4)


def test_arrays(tmp_path):
    rng = np.random.default_rng(0)
    numbers = {
        part: rng.integers(0, 4, (n, 6)).astype(np.uint8) for part, n in (("train", 9), ("test", 3))
    }
    np.savez(tmp_path / "numbers.npz", **numbers)
    for part, values in numbers.items():
        source = data.sequences(tmp_path / "numbers.npz", 6, split=part, alphabet="dna")
        np.testing.assert_array_equal(source.take(np.arange(len(values)))["tokens"], values)
        assert source.spec.vocab_size == 4
    assert len(data.sequences(tmp_path / "numbers.npz", 6, split="all", alphabet="dna")) == 12
    letters = np.frombuffer(b"ACDEFGHIK", np.uint8)
    arrays = {"train_seq": letters, "train_offsets": [0, 4, 9], "train_ss3": letters}
    arrays |= {"test_seq": letters, "test_offsets": [0, 9], "test_ss3": letters}
    np.savez(tmp_path / "ragged.npz", **arrays)
    source = data.sequences(tmp_path / "ragged.npz", 5, alphabet="protein", column="seq")
    assert decoded(source) == ["ACDE ", "FGHIK"]
    with pytest.raises(ValueError, match="name one with column="):
        data.sequences(tmp_path / "ragged.npz", 5, alphabet="protein")
    with pytest.raises(ValueError, match="no array 'train_sek'"):
        data.sequences(tmp_path / "ragged.npz", 5, alphabet="protein", column="sek")
    variants = rng.integers(0, 20, (50, 4)).astype(np.uint8)
    kinds = rng.integers(0, 3, 50)
    np.savez(tmp_path / "plain.npz", variants=variants, kinds=kinds)
    plain = dict(alphabet="protein", label="kinds")
    parts = [data.sequences(tmp_path / "plain.npz", 4, split=s, **plain) for s in ("train", "test")]
    assert [len(p) for p in parts] == [45, 5] and parts[0].spec == parts[1].spec
    both = data.sequences(tmp_path / "plain.npz", 4, split="all", **plain).take(np.arange(50))
    np.testing.assert_array_equal(both["tokens"], variants)
    np.testing.assert_array_equal(both["label"], kinds)


def test_bad_arrays(tmp_path):
    letters = np.frombuffer(b"ACDE", np.uint8)
    cases = (
        (dict(seq=letters), "have offsets"),
        (dict(seq=letters, offsets=[0, 3]), "offsets must rise from 0 to 4"),
        (dict(seq=letters, offsets=[0, 5, 4]), "offsets must rise"),
        (dict(seq=letters.astype(int), offsets=[0, 4]), "must be uint8"),
        (dict(seq=np.zeros((2, 3))), "must be integers"),
        (dict(seq=np.full((2, 3), 20)), "20 at position 0 is none of the 20 symbols"),
        (dict(seq=np.full((2, 3), -1)), "-1 at position 0"),
    )
    for arrays, message in cases:
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            data.sequences(tmp_path / "bad.npz", 3, alphabet="protein", column="seq")
    np.savez(tmp_path / "bad.npz", seq=np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="need an alphabet"):
        data.sequences(tmp_path / "bad.npz", 3)


def test_two_files_are_one_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("aab\nab\n")
    (tmp_path / "b.txt").write_text("cab\n")
    options = dict(test_path=tmp_path / "b.txt", length=3)
    train, test = (
        data.sequences(tmp_path / "a.txt", split=s, **options) for s in ("train", "test")
    )
    assert train.spec == test.spec and train.spec.symbols == ("a", "b", "c", " ")
    assert decoded(train) == ["aab", "ab "] and decoded(test) == ["cab"]


def test_presets():
    sizes = {name: len(set(symbols)) for name, symbols in ALPHABETS.items()}
    assert sizes == {"dna": 4, "dna_n": 5, "rna": 4, "protein": 20, "smiles": 33}
    assert all(" " not in symbols and "_" not in symbols for symbols in ALPHABETS.values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(length=0), "length=0"),
        (dict(split="tset"), "unknown split 'tset'"),
        (dict(unit="words"), "got 'words'"),
        (dict(long="wrap"), "got 'wrap'"),
        (dict(unknown="skip"), "got 'skip'"),
        (dict(pad="  "), "single character"),
        (dict(pad="C"), "'C' is a symbol of the alphabet"),
        (dict(alphabet="CC"), "'C' occurs twice"),
        (dict(column="a"), "has no columns"),
        (dict(path="nowhere.txt"), "'nowhere.txt' is not a file"),
        (dict(path="nowhere.npz"), "'nowhere.npz' is not a file"),
        (dict(test_path="nowhere.txt"), "'nowhere.txt' is not a file"),
        (dict(max_bytes=10), "max_bytes=10"),
        (dict(length=1, long="drop"), "holds no sequences"),
    ],
)
def test_bad_arguments(lines, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.sequences(**{"path": lines, "length": 8, **arguments})


def test_not_text(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"AC\xffGT\n")
    with pytest.raises(ValueError, match="not UTF-8: byte 0xff at offset 2"):
        data.sequences(tmp_path / "bad.txt", 4)
