"""Generated text under a language model: generative perplexity, entropy, MAUVE.

Generative perplexity is exp(mean nats per token) of the texts under a left-to-right model that did not
make them. It alone says little: text of low entropy (repetition, low temperature) has a low one
(arXiv 2409.02908), hence the entropy beside it, and the row of real text to read both by. The tokens are
those of the judging model, not those that the text was generated in.

Conventions, those of MDLM (arXiv 2406.07524):
  the first token of a window is not scored, for it has nothing before it;
  a text longer than a window is cut into windows; `stride` below the window lets them overlap, and a token
  is then scored once, in the first window that holds it;
  of the tokens that end a document only the first of a text is scored;
  the mean is over all tokens of all texts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.evaluation.perplexity import summarise
from diffusion_jax.evaluation.text_metrics import entropy


class Windows(NamedTuple):
    """Texts cut to one length.

    Attributes:
      tokens: int32 [W, L], filled up with 0.
      scored: bool [W, L].
      last: int32 [W], the last place that is a token.
      text: int [W], which text a window is of; windows of a text follow each other.
    """

    tokens: np.ndarray
    scored: np.ndarray
    last: np.ndarray
    text: np.ndarray


def cut(
    texts: Sequence[np.ndarray],
    window: int,
    *,
    stride: int | None = None,
    separator: int | None = None,
) -> Windows:
    """Cuts tokenised texts into windows.

    Args:
      texts: int [n_i], n_i of any size; a text without tokens has no window.
      window: tokens in a window, 2 or more.
      stride: from the beginning of one window to the next; default `window`.
      separator: token that ends a document, None for none.
    Raises:
      ValueError: a window below 2, or a stride that is not in 1..window.
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"need window >= 2 and stride in 1..window, got {window} and {stride}")
    rows = []
    for number, text in enumerate(texts):
        text = np.asarray(text, np.int32)
        scored = np.ones(len(text), bool)
        if separator is not None:
            ends = np.flatnonzero(text == separator)
            scored[ends[1:]] = False
        done = 0
        for start in range(0, len(text), stride):
            stop = min(start + window, len(text))
            fresh = np.arange(start, stop) >= done
            fresh[0] = False
            rows.append((text[start:stop], scored[start:stop] & fresh, number))
            done = stop
            if stop == len(text):
                break
    tokens = np.zeros((len(rows), window), np.int32)
    marks = np.zeros((len(rows), window), bool)
    for row, (part, mark, _) in enumerate(rows):
        tokens[row, : len(part)], marks[row, : len(part)] = part, mark
    last = np.array([len(part) - 1 for part, _, _ in rows], np.int32)
    return Windows(tokens, marks, last, np.array([number for *_, number in rows], int))


class TextScores(NamedTuple):
    """What a language model finds of each of N texts.

    Attributes:
      nats: [N], sums over the scored tokens.
      tokens: int [N], how many are scored.
      entropy: [N], of the histogram of a text's tokens, nats; NaN for a text without tokens.
      features: float32 [N, C], the hidden state at the last token of the first window; zeros for a text
        without tokens.
    """

    nats: np.ndarray
    tokens: np.ndarray
    entropy: np.ndarray
    features: np.ndarray


def score(
    judge: Callable[..., Any],
    texts: Sequence[np.ndarray],
    window: int,
    width: int,
    *,
    stride: int | None = None,
    separator: int | None = None,
) -> TextScores:
    """Scores tokenised texts.

    Args:
      judge: `(tokens [W, L], last [W]) -> {"nats": [W, L], "features": [W, C]}`, such as a
        `sharded.ShardedFunction`.
      texts, window, stride, separator: see `cut`.
      width: C.
    Raises:
      ValueError: as `cut`, or nats that are not finite.
    """
    parts = cut(texts, window, stride=stride, separator=separator)
    count = len(texts)
    nats, tokens = np.zeros(count), np.zeros(count, int)
    features = np.zeros((count, width), np.float32)
    if len(parts.text):
        found = judge(parts.tokens, parts.last)
        each = np.where(parts.scored, np.asarray(found["nats"], np.float64), 0.0).sum(axis=1)
        if not np.isfinite(each).all():
            raise ValueError("the language model gives nats that are not finite")
        np.add.at(nats, parts.text, each)
        np.add.at(tokens, parts.text, parts.scored.sum(axis=1))
        first = np.concatenate([[True], parts.text[1:] != parts.text[:-1]])
        features[parts.text[first]] = found["features"][first]
    entropies = [
        float(entropy(np.unique(text, return_counts=True)[1])) if len(text) else np.nan
        for text in texts
    ]
    return TextScores(nats, tokens, np.array(entropies), features)


def summary(scores: TextScores) -> dict[str, Any]:
    """One row of a table.

    Returns:
      {"texts", "tokens", "generative_perplexity", "nats_per_token", "standard_error" (of the nats, over
      texts), "entropy" (mean over texts, nats)}.
    Raises:
      ValueError: no token is scored.
    """
    count, total = len(scores.nats), int(scores.tokens.sum())
    if total == 0:
        raise ValueError("the texts have no token that another one stands before")
    mean = summarise(scores.nats[None], total)
    rest = scores.nats - mean.nats_per_token * scores.tokens
    error = np.sqrt((rest**2).sum() * count / max(count - 1, 1)) / total
    return {
        "texts": count,
        "tokens": total,
        "generative_perplexity": mean.perplexity,
        "nats_per_token": mean.nats_per_token,
        "standard_error": float(error) if count > 1 else None,
        "entropy": float(np.nanmean(scores.entropy)),
    }


def mauve(p_features, q_features, *, seed: int = 25, **options: Any) -> float:
    """MAUVE (arXiv 2102.01454) of two sets of text features, in (0, 1], by the authors' library.

    Args:
      p_features, q_features: [N, C] and [M, C], of real and of generated text.
      seed: of the clusters.
      options: of `mauve.compute_mauve` (`num_buckets`, `mauve_scaling_factor`, ...).
    Raises:
      ImportError: the library is missing.
      ValueError: features of different sizes, or too few for two clusters.
    """
    p_features, q_features = np.asarray(p_features), np.asarray(q_features)
    if p_features.ndim != 2 or p_features.shape[1:] != q_features.shape[1:]:
        raise ValueError(f"features differ in shape: {p_features.shape} and {q_features.shape}")
    if min(len(p_features), len(q_features)) < 20:
        raise ValueError(
            "MAUVE needs 20 texts or more of each, thousands for a number to report; got"
            f" {len(p_features)} and {len(q_features)}"
        )
    try:
        import mauve as library
    except ImportError as error:
        raise ImportError("MAUVE needs: pip install 'diffusion_jax[mauve]'") from error
    found = library.compute_mauve(
        p_features=p_features, q_features=q_features, seed=seed, verbose=False, **options
    )
    return float(found.mauve)
