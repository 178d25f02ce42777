"""Facts about invented people in one direction: what the reversal curse is measured on.

A person has a name of two words, the second being nobody else's, and a description of eight, put
together by chance from short lists of plain words, no two alike. A sentence tells the fact in one of two
forms, 12 words either way:
  "name_first":         ovan telmisen is the quiet painter of distant rivers in arle .
  "description_first":  the quiet painter of distant rivers in arle is ovan telmisen .
The training split tells it in one form only, the test split in the other. Models that learn a sentence
from left to right then cannot answer the question turned round (arXiv 2309.12288); masked models can
(SMDM, arXiv 2410.18514). People of `both` are told in both forms: they teach the second form itself, so
that a wrong answer about the others is not for want of its grammar.

A token is a word. The data sets of the papers are English sentences of written-out names; these are
smaller, and procedural, so that they need no file.
"""

from typing import NamedTuple

import numpy as np

from diffusion_jax.data.source import ArraySource, DataSpec, Element, check_split
from diffusion_jax.registry import check_choice, register

FORMS = ("name_first", "description_first")
ASKED = ("name", "description")

_SYLLABLES = ("ba", "den", "el", "fo", "gar", "hi", "jo", "kel", "lu", "mir", "no", "ov")
_FIRST_ENDS, _LAST_ENDS = ("an", "is"), ("berg", "dal", "sen")
_QUALITIES = """quiet famous young tireless modest daring gentle clever stubborn cheerful patient
    restless thoughtful retired lonely celebrated""".split()
_WORKS = """painter director author collector builder keeper student singer poet designer historian
    translator photographer inventor critic curator""".split()
_KINDS = """distant silent golden broken ancient frozen hidden narrow crowded floating forgotten crooked
    painted northern hollow burning""".split()
_THINGS = """rivers bridges gardens clocks islands letters mirrors towers engines maps lanterns orchards
    harbours stairs violins windows""".split()
_PLACES = tuple(a + b for a in ("ar", "bru", "cas", "dol") for b in ("le", "nik", "torp", "vale"))

_FIRST = tuple(s + e for s in _SYLLABLES for e in _FIRST_ENDS)
_LAST = tuple(s + t + e for s in _SYLLABLES for t in _SYLLABLES for e in _LAST_ENDS)
_PARTS = (_QUALITIES, _WORKS, _KINDS, _THINGS, _PLACES)
_WORDS = (*_FIRST, *_LAST, *(w for part in _PARTS for w in part), "the", "of", "in", "is", ".")
_ID = {word: i for i, word in enumerate(_WORDS)}

LENGTH = 12
SYMBOLS = tuple(word + " " for word in _WORDS)
MOST_PEOPLE = len(_LAST)


class People(NamedTuple):
    """Names and descriptions as tokens.

    Attributes:
      names: int32 `[N, 2]`.
      descriptions: int32 `[N, 8]`.
    """

    names: np.ndarray
    descriptions: np.ndarray

    def sentences(self, form: str) -> np.ndarray:
        """The facts in a form, int32 `[N, 12]`. Raises ValueError for an unknown form."""
        return np.concatenate([self._part(name) for name in _order(form)], axis=1)

    def _part(self, name):
        if name in ("is", "."):
            return np.full((len(self.names), 1), _ID[name], np.int32)
        return self.names if name == "name" else self.descriptions

    def queries(self, form: str, asked: str) -> tuple[np.ndarray, np.ndarray]:
        """Sentences with a part to be filled in.

        Args:
          form: "name_first" or "description_first".
          asked: the part that is masked, "name" or "description".
        Returns:
          `(prompt, answer)`: int32 `[N, 12]` with the mask id `len(SYMBOLS)` at the asked part, and
          the whole sentences; where `prompt` is masked, `answer` holds what is right.
        Raises:
          ValueError: an unknown form or part.
        """
        check_choice("asked", asked, ASKED)
        answer = self.sentences(form)
        hidden = np.concatenate(
            [np.full(self._part(name).shape[1], name == asked) for name in _order(form)]
        )
        return np.where(hidden, len(SYMBOLS), answer).astype(np.int32), answer


def _order(form):
    check_choice("form", form, FORMS)
    first, second = ("name", "description") if form == "name_first" else ("description", "name")
    return first, "is", second, "."


def draw_people(count: int, seed: int = 0) -> People:
    """People of different surnames and descriptions; the first n do not depend on `count`.

    Raises:
      ValueError: a count below 1 or above `MOST_PEOPLE`.
    """
    if not 1 <= count <= MOST_PEOPLE:
        raise ValueError(f"the number of people must be in 1..{MOST_PEOPLE}, got {count}")
    surnames = len(_FIRST) + np.random.default_rng([seed, 0]).permutation(MOST_PEOPLE)[:count]
    first = np.random.default_rng([seed, 2]).integers(len(_FIRST), size=MOST_PEOPLE)[:count]
    names = np.stack([first, surnames], axis=1)
    sizes = [len(part) for part in _PARTS]
    facts = np.random.default_rng([seed, 1]).permutation(int(np.prod(sizes)))[:count]
    words = []
    for part, place in zip(_PARTS, np.unravel_index(facts, sizes)):
        words.append(np.array([_ID[word] for word in part])[place])
    the, of, within = (np.full(count, _ID[word]) for word in ("the", "of", "in"))
    quality, work, kind, thing, where = words
    descriptions = np.stack([the, quality, work, of, kind, thing, within, where], axis=1)
    return People(names.astype(np.int32), descriptions.astype(np.int32))


def people_of(people: int = 200, both: int = 0, seed: int = 0) -> tuple[People, People]:
    """`(once, twice)`: whom the data set `descriptions` tells of in one form, and in both.

    Raises:
      ValueError: people below 1, both below 0, or more people than names.
    """
    if people < 1 or both < 0:
        raise ValueError(f"people must be positive and both not negative, got {people} and {both}")
    drawn = draw_people(people + both, seed)
    return People(*(part[:people] for part in drawn)), People(*(part[people:] for part in drawn))


@register("data", "descriptions", kinds=("tokens",))
def descriptions(
    split: str = "train",
    people: int = 200,
    both: int = 0,
    form: str = "name_first",
    seed: int = 0,
) -> ArraySource:
    """Sentences about people, each fact told in one form.

    Args:
      split: "train" (people in `form`, and those of `both` in both forms), "test" (the people in the
        other form, which training never shows) or "all".
      people: number of people told of in one form.
      both: number of further people told of in both forms.
      form: of the training sentences, "name_first" or "description_first".
      seed: of names and descriptions.
    Returns:
      A source of "tokens" int32 [12].
    Raises:
      ValueError: an unknown split or form, people below 1, both below 0, more people than names.
    """
    check_split(split)
    check_choice("form", form, FORMS)
    once, twice = people_of(people, both, seed)
    other = FORMS[1 - FORMS.index(form)]
    train = [once.sentences(form), twice.sentences(form), twice.sentences(other)]
    test = [once.sentences(other)]
    chosen = {"train": train, "test": test, "all": train + test}[split]
    spec = DataSpec(
        kind="tokens",
        elements={"tokens": Element((LENGTH,), "int32")},
        vocab_size=len(SYMBOLS),
        symbols=SYMBOLS,
        show="text",
    )
    return ArraySource({"tokens": np.concatenate(chosen)}, spec)
