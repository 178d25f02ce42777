"""Facts about invented people: unique, one form in training, the other held out."""

import numpy as np
import pytest

from diffusion_jax.data.descriptions import (
    LENGTH,
    MOST_PEOPLE,
    SYMBOLS,
    descriptions,
    draw_people,
    people_of,
)

MASK = len(SYMBOLS)


def test_sentences_read_as_they_should():
    source = descriptions(people=3)
    words = source.spec.decode(source.take([0])["tokens"])[0].split()
    assert len(words) == LENGTH and words[2:4] == ["is", "the"] and words[-1] == "."
    turned = descriptions("test", people=3)
    again = turned.spec.decode(turned.take([0])["tokens"])[0].split()
    assert again == [*words[3:11], "is", *words[:2], "."]


def test_nobody_shares_a_name_or_a_description():
    people = draw_people(MOST_PEOPLE)
    for part in people:
        assert len(np.unique(part, axis=0)) == MOST_PEOPLE
    assert len(np.unique(people.names[:, 1])) == MOST_PEOPLE


def test_training_never_shows_the_held_out_form():
    train, test = (descriptions(split, people=50, both=20) for split in ("train", "test"))
    assert len(train) == 50 + 2 * 20 and len(test) == 50
    seen = {tuple(row) for row in train.take(np.arange(len(train)))["tokens"]}
    held = {tuple(row) for row in test.take(np.arange(len(test)))["tokens"]}
    assert not seen & held
    everything = descriptions("all", people=50, both=20)
    rows = {tuple(row) for row in everything.take(np.arange(len(everything)))["tokens"]}
    assert rows == seen | held
    once, twice = people_of(50, 20)
    assert {tuple(row) for row in once.sentences("description_first")} == held
    for form in ("name_first", "description_first"):
        assert {tuple(row) for row in twice.sentences(form)} <= seen


def test_the_other_direction_swaps_the_splits():
    a = descriptions("train", people=9, form="name_first").take(np.arange(9))["tokens"]
    b = descriptions("test", people=9, form="description_first").take(np.arange(9))["tokens"]
    np.testing.assert_array_equal(a, b)


def test_the_people_are_a_function_of_the_seed():
    few, many = draw_people(5, seed=3), draw_people(400, seed=3)
    np.testing.assert_array_equal(few.names, many.names[:5])
    np.testing.assert_array_equal(few.descriptions, many.descriptions[:5])
    assert not np.array_equal(few.names, draw_people(5, seed=4).names)


@pytest.mark.parametrize(
    "form, asked, hidden",
    [
        ("name_first", "name", [0, 1]),
        ("name_first", "description", range(3, 11)),
        ("description_first", "name", [9, 10]),
        ("description_first", "description", range(8)),
    ],
)
def test_queries_hide_what_is_asked(form, asked, hidden):
    people = draw_people(7)
    prompt, answer = people.queries(form, asked)
    np.testing.assert_array_equal(answer, people.sentences(form))
    expected = np.isin(np.arange(LENGTH), list(hidden))
    np.testing.assert_array_equal(prompt == MASK, np.broadcast_to(expected, prompt.shape))
    np.testing.assert_array_equal(prompt[:, ~expected], answer[:, ~expected])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"people": 0}, "people must be positive"),
        ({"both": -1}, "both not negative"),
        ({"people": MOST_PEOPLE, "both": 1}, f"must be in 1..{MOST_PEOPLE}"),
        ({"form": "name_last"}, "form must be one of name_first"),
        ({"split": "dev"}, "unknown split 'dev'"),
    ],
)
def test_arguments_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        descriptions(**arguments)


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="asked must be one of name, description; got 'place'"):
        draw_people(2).queries("name_first", "place")
