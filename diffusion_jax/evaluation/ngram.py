"""An n-gram model as a judge of generated text: nats a token that owe nothing to any network.

Counts of training sequences, interpolated with a Dirichlet prior from the next shorter context (MacKay and
Peto 1995):
  (1) p_n(v | c) = (count(c v) + s p_{n-1}(v | c')) / (count(c) + s),   c' = c without its first token,
  (2) p_0(v) = 1 / V.
Low nats alone are no praise: samples that repeat what is common score better than text does. Beside them
stands the entropy of the samples' tokens, and the figures of held-out text say what to expect.
"""

import numpy as np

from diffusion_jax.evaluation.text_metrics import check_tokens


class NGramJudge:
    """An n-gram model with counts of training sequences.

    Args:
      train: integers [N, L].
      vocab_size: V; V^order must stay below 2^63.
      order: length n of the longest n-grams, at most L.
      strength: s, the weight of the shorter context in counts.

    Raises:
      ValueError: tokens that are not integers [N, L] in 0 .. V-1, an order or strength out of range.
    """

    def __init__(self, train, vocab_size: int, order: int = 5, strength: float = 4.0) -> None:
        train = check_tokens(train, vocab_size, "train")
        if not 1 <= order <= train.shape[1]:
            raise ValueError(f"order must be in 1 .. {train.shape[1]}, got {order}")
        if vocab_size**order >= 2**63:
            raise ValueError(f"{vocab_size} tokens to the power {order} do not fit into 63 bits")
        if not strength > 0:
            raise ValueError(f"strength must be positive, got {strength}")
        self.vocab_size, self.order, self.strength = vocab_size, order, strength
        self._grams, self._contexts = [], []
        for n in range(1, order + 1):
            grams = self._numbers(train, n)
            self._grams.append(np.unique(grams, return_counts=True))
            self._contexts.append(np.unique(grams // vocab_size, return_counts=True))

    def _numbers(self, tokens: np.ndarray, n: int) -> np.ndarray:
        """Every n-gram of the rows as one integer, [N, L - n + 1]."""
        windows = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1)
        return windows @ (self.vocab_size ** np.arange(n - 1, -1, -1, dtype=np.int64))

    def token_nats(self, tokens) -> np.ndarray:
        """-log p of every token given those before it, float64 [N, L].

        The first tokens of a row have shorter contexts.

        Raises:
          ValueError: tokens that are not integers [N, L] in 0 .. V-1.
        """
        tokens = check_tokens(tokens, self.vocab_size)
        p = np.full(tokens.shape, 1.0 / self.vocab_size)
        for n in range(1, min(self.order, tokens.shape[1]) + 1):
            grams = self._numbers(tokens, n)
            seen = _count(self._grams[n - 1], grams)
            context = _count(self._contexts[n - 1], grams // self.vocab_size)
            here = p[:, n - 1 :]
            p[:, n - 1 :] = (seen + self.strength * here) / (context + self.strength)
        return -np.log(p)

    def nats(self, tokens) -> float:
        """Mean nats a token. Raises as `token_nats`."""
        return float(self.token_nats(tokens).mean())


def _count(table: tuple[np.ndarray, np.ndarray], wanted: np.ndarray) -> np.ndarray:
    values, counts = table
    slot = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where(values[slot] == wanted, counts[slot], 0)
