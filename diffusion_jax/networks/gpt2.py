"""GPT-2 (Radford et al. 2019): the language model under which generated text is judged.

Pre-norm blocks with biases everywhere, learned positions, tanh-GELU, norms with epsilon 1e-5, and an
output that shares the token table. Matrix products are in full float32 unless `dtype` says otherwise:
perplexities are compared over devices.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.nn.initializers import normal

from diffusion_jax.networks.checks import check_divides, check_dtype, check_positive

SIZES = {
    "gpt2": {"width": 768, "depth": 12, "heads": 12},
    "gpt2-medium": {"width": 1024, "depth": 24, "heads": 16},
    "gpt2-large": {"width": 1280, "depth": 36, "heads": 20},
    "gpt2-xl": {"width": 1600, "depth": 48, "heads": 25},
}

_STDDEV = 0.02
_CHUNK = 128


class Block(nn.Module):
    """Attention over what stands before, then an MLP: [B, L, C] -> [B, L, C].

    Args:
      heads: attention heads.
      inner: width of the MLP.
      residual: standard deviation of the weights that write into the stream, at initialisation.
      epsilon: of the norms.
      implementation: of `jax.nn.dot_product_attention`.
      dtype: compute dtype.
    """

    heads: int
    inner: int
    residual: float
    epsilon: float
    implementation: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, features = x.shape
        precision = Precision.HIGHEST

        def dense(h, width, name, stddev=_STDDEV):
            return nn.Dense(
                width, kernel_init=normal(stddev), precision=precision, dtype=self.dtype, name=name
            )(h)

        def normed(h, name):
            return nn.LayerNorm(self.epsilon, dtype=self.dtype, use_fast_variance=False, name=name)(
                h
            )

        h = dense(normed(x, "ln_1"), 3 * features, "c_attn")
        h = h.reshape(batch, length, 3, self.heads, features // self.heads)
        with jax.default_matmul_precision("highest"):
            h = jax.nn.dot_product_attention(
                h[:, :, 0],
                h[:, :, 1],
                h[:, :, 2],
                is_causal=True,
                implementation=self.implementation,
            )
        h = h.reshape(batch, length, features)
        x = x + dense(h, features, "attn_proj", self.residual)
        h = nn.gelu(dense(normed(x, "ln_2"), self.inner, "c_fc"), approximate=True)
        return x + dense(h, features, "mlp_proj", self.residual)


class GPT2(nn.Module):
    """Tokens to the logits of the next ones, or to the nats of the given ones.

    Args:
      vocab_size: V.
      width: C, divisible by `heads`.
      depth: blocks, run as one scan over stacked parameters.
      heads: attention heads.
      max_length: positions.
      inner: width of the MLPs; None is 4 C.
      epsilon: of the norms.
      attention_implementation: of `jax.nn.dot_product_attention`: None, "xla" or "cudnn" (16 bit, GPU).
      dtype: compute dtype; parameters, logits and nats are float32.
    Shapes: tokens int [B, L], L <= max_length -> hidden states after the last norm [B, L, C]. A token
      outside 0..V-1 gives NaN. `SIZES` holds the published sizes.
    Raises:
      ValueError: fields or tokens that do not fit.
    """

    vocab_size: int = 50257
    width: int = 768
    depth: int = 12
    heads: int = 12
    max_length: int = 1024
    inner: int | None = None
    epsilon: float = 1e-5
    attention_implementation: str | None = None
    dtype: Any = jnp.float32

    def setup(self):
        check_positive(
            "gpt2",
            vocab_size=self.vocab_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            max_length=self.max_length,
        )
        check_divides("gpt2", "heads", self.heads, "width", self.width)
        dtype = check_dtype("gpt2", self.dtype)
        table = (self.vocab_size, self.width)
        self.wte = self.param("wte", normal(_STDDEV), table, jnp.float32)
        self.wpe = self.param("wpe", normal(0.01), (self.max_length, self.width), jnp.float32)
        scanned = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        self.h = Block(
            self.heads,
            self.inner or 4 * self.width,
            _STDDEV / (2 * self.depth) ** 0.5,
            self.epsilon,
            self.attention_implementation,
            dtype,
        )
        self.scanned = lambda x: scanned(self.h, x, None)[0]
        self.ln_f = nn.LayerNorm(self.epsilon, dtype=dtype, use_fast_variance=False)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Hidden states [B, L, C] after the last norm, float32."""
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"gpt2: tokens must be integers [B, L], got {tokens.dtype} {tokens.shape}"
            )
        if tokens.shape[1] > self.max_length:
            raise ValueError(
                f"gpt2: {tokens.shape[1]} tokens exceed max_length = {self.max_length}"
            )
        rows = jnp.asarray(self.wte).at[tokens]
        x = rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        x = x + jnp.asarray(self.wpe)[None, : tokens.shape[1]]
        return self.ln_f(self.scanned(x.astype(check_dtype("gpt2", self.dtype)))).astype(
            jnp.float32
        )

    def logits(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next token at every position, float32 [B, L, V]."""
        return jnp.matmul(self(tokens), jnp.asarray(self.wte).T, precision=Precision.HIGHEST)

    def nats(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`-log p` of each token given those before it, and the hidden states.

        Logits exist for 128 positions at a time.

        Returns:
          float32 [B, L], 0 at the first token, which nothing stands before; float32 [B, L, C].
        """
        hidden = self(tokens)
        table = jnp.asarray(self.wte).T
        batch, length = tokens.shape
        chunk = min(_CHUNK, length)
        fill = -length % chunk
        followers = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1 + fill)))
        padded = jnp.pad(hidden, ((0, 0), (0, fill), (0, 0)))

        def one(part):
            h, token = part
            logits = jnp.matmul(h, table, precision=Precision.HIGHEST)
            chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(logits, axis=-1) - chosen

        split = lambda a: jnp.moveaxis(a.reshape(batch, -1, chunk, *a.shape[2:]), 1, 0)
        found = jax.lax.map(one, (split(padded), split(followers)))
        found = jnp.moveaxis(found, 0, 1).reshape(batch, -1)[:, : length - 1]
        return jnp.pad(found, ((0, 0), (1, 0))), hidden
