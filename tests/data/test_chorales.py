import numpy as np
import pytest

from diffusion_jax import data, evaluation
from diffusion_jax.data.chorales import note_name, note_symbols, pitches


def write(path, lengths=(9, 4, 6), **changed):
    rng = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "valid", "test"):
        notes = rng.integers(48, 80, (sum(lengths), 4)).astype(np.int16)
        notes[rng.random(notes.shape) < 0.1] = -1
        arrays[f"{part}_notes"] = notes
        arrays[f"{part}_offsets"] = np.cumsum([0, *lengths])
    arrays |= changed
    np.savez(path, **{name: values for name, values in arrays.items() if values is not None})
    return arrays


def test_windows_stay_within_pieces(tmp_path):
    arrays = write(tmp_path / "a.npz")
    source = data.chorales(tmp_path / "a.npz", 4, stride=2)
    found = pitches(source.take(np.arange(len(source)))["tokens"], source.spec.symbols)
    notes = arrays["train_notes"]
    # pieces begin at 0, 9 and 13
    expected = [notes[at : at + 4] for at in (0, 2, 4, 9, 13, 15)]
    np.testing.assert_array_equal(found, expected)
    assert source.spec.shape == (16,) and source.spec.vocab_size == 1 + 81 - 36 + 1
    assert len(data.chorales(tmp_path / "a.npz", 4, stride=2, split="all")) == 18


def test_interleaving_and_names(tmp_path):
    notes = np.array([[69, 64, 61, 45], [69, 64, -1, 45], [71, 64, -1, 45]], np.int16)
    write(tmp_path / "a.npz", train_notes=notes, train_offsets=np.array([0, 3]))
    source = data.chorales(tmp_path / "a.npz", 3)
    assert source.spec.decode(source[0]["tokens"]) == "A4E4C#4A2A4E4-A2B4E4-A2"
    held = data.chorales(tmp_path / "a.npz", 3, hold=True)
    tokens = held[0]["tokens"]
    assert held.spec.decode(tokens) == "A4E4C#4A2..-.B4.-."
    np.testing.assert_array_equal(pitches(tokens, held.spec.symbols), notes)
    from diffusion_jax.data.codecs import encode_prompt

    prompt = encode_prompt(source.spec, "A4E4__A4E4__B4E4__")  # tenor and bass to fill
    assert source.spec.decode(prompt) == "A4E4__A4E4__B4E4__"
    assert (pitches(prompt, source.spec.symbols)[:, 2:] == -1).all()


def test_symbols_are_names_of_all_pitches():
    assert note_name(60) == "C4" and note_name(69) == "A4" and note_name(36) == "C2"
    symbols = note_symbols(0, 127, hold=True)
    assert symbols[:3] == ("-", ".", "C-1") and len(set(symbols)) == 130


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(train_notes=None), "split='train' is not in .*valid, test"),
        (dict(train_offsets=None), "must rise from 0 to 19"),
        (dict(train_offsets=np.array([0, 5])), "must rise"),
        (dict(train_notes=np.zeros((19, 3), int)), r"integers \[T, 4\]"),
        (dict(train_notes=np.full((19, 4), 60.0)), r"integers \[T, 4\]"),
        (dict(train_notes=np.full((19, 4), 20)), r"pitch 20 is outside 36\.\.81"),
        (dict(train_notes=np.full((19, 4), -2)), "pitch -2"),
    ],
)
def test_bad_files(tmp_path, changed, message):
    write(tmp_path / "a.npz", **changed)
    with pytest.raises(ValueError, match=message):
        data.chorales(tmp_path / "a.npz", 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(steps=0), "steps=0"),
        (dict(steps=10), "no piece of 10 steps"),
        (dict(stride=0), "stride=0"),
        (dict(lowest=90), "lowest=90"),
        (dict(split="tset"), "unknown split 'tset'"),
        (dict(path="nowhere.npz"), "'nowhere.npz' is not a file"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    write(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=message):
        data.chorales(**{"path": tmp_path / "a.npz", "steps": 4, **arguments})


def test_piano_rolls(tmp_path):
    symbols = note_symbols(36, 81)
    number = {symbol: i for i, symbol in enumerate(symbols)}
    tokens = np.array([[number[s] for s in ("C5", "-", "C4", "-")] + [len(symbols)] * 4])
    roll = evaluation.piano_rolls(tokens, symbols, scale=(1, 1))
    assert roll.shape == (1, 15, 2, 3) and roll.dtype == np.uint8
    coloured = (roll[0] != 255).any(axis=-1)
    assert np.flatnonzero(coloured[:, 0]).tolist() == [1, 13]  # an octave apart
    assert coloured[:, 1].all()  # masks
    assert evaluation.piano_rolls(tokens, symbols).shape == (1, 45, 8, 3)
    with pytest.raises(ValueError, match="no whole steps"):
        evaluation.piano_rolls(tokens[:, :3], symbols)
