"""Key-value caches for sampling from left to right, in the form of a stateful denoiser.

The cache holds the keys and values of the slots that the network has read (`networks.visibility` says
what a slot is): arrays `[depth, B, slots, heads, n]`, written from the first slot of a call on. Clean
tokens never see later ones, so what is written stays valid: the logits are those without a cache.

A call on a block reads the block; its first call also the block before, which is complete by then, and
writes that one. What a block full of masks leaves behind in its own slots is not kept. So there are as
many network calls as without a cache, those of a block's begin on two blocks instead of one; authors'
code makes one more a block. A prompt is read in one pass beforehand (`start`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.methods.base import Method, assemble
from diffusion_jax.numerics import pytree_dataclass, static
from diffusion_jax.registry import check_choice, names
from diffusion_jax.samplers.scan import sample as run_sampler

READINGS = ("causal", "block", "segments")


@pytree_dataclass
class Decoder:
    """Networks that read from left to right, as a denoiser with a cache.

    Attributes:
      networks: bound networks `(x, t, cache=, begin=, limit=) -> (logits, cache)`: one, or the conditional
        and the unconditional one.
      guidance: weight of the first of two (classifier-free guidance on log-probabilities).
      module: the network's module, for `init_cache`.
      reading: "causal" (autoregressive, one token a call), "block" (BD3LM) or "segments" (DiDA: clean
        tokens causally, the segment in progress both ways).
      mask_id: of the tokens, and the beginning of a causal reading.
      block_size: tokens in a block or segment.
    """

    networks: tuple
    guidance: Any
    module: Any = static()
    reading: str = static()
    mask_id: int = static()
    block_size: int = static(1)

    def __post_init__(self):
        check_choice("reading", self.reading, READINGS)

    def __call__(self, x, t):
        """Logits `[B, L, V]` without a cache: right for the first block that has masks."""
        if self.reading == "segments":
            outputs = [network(x, t, clean=x)[:, : x.shape[1]] for network in self.networks]
        else:
            outputs = [network(x, t) for network in self.networks]
        return self._guided(outputs)

    def start(self, tokens):
        """The cache for sequences that begin with `tokens` `[B, L]`, read in one pass."""
        batch, length = tokens.shape
        slots = jnp.arange(length)
        limit, x = self._limits(slots, length, length), tokens
        if self.reading != "block":
            x = jnp.concatenate([jnp.full_like(tokens[:, :1], self.mask_id), tokens[:, :-1]], 1)
        extra = int(self.reading == "segments")
        empty = tuple(self.module.init_cache(batch, length + extra) for _ in self.networks)

        def read(count):
            return lambda: self._read(empty, x[:, :count], 0, limit[:count])[1]

        nothing = read(1) if self.reading == "segments" else lambda: empty
        return jax.lax.cond((tokens != self.mask_id).any(), read(length), nothing)

    def at(self, x, point, cache=None):
        """`(logits [B, block_size, V], cache)` of the block at `point["begin"]`."""
        if cache is None:
            return self(x, point["t"])
        begin, length = point["begin"], x.shape[1]
        if self.reading == "causal":
            before = jax.lax.dynamic_slice_in_dim(x, jnp.maximum(begin - 1, 0), 1, axis=1)
            token = jnp.where(begin > 0, before, self.mask_id)
            return self._read(cache, token, begin, begin[None])
        shift = int(self.reading == "segments")
        size = min(self.block_size, length)
        own = jnp.minimum(begin, length - size)

        def read(width):
            first = jnp.clip(begin + size - width, 0, length - width)
            tokens = jax.lax.dynamic_slice_in_dim(x, first, width, axis=1)
            limit = self._limits(first + shift + jnp.arange(width), length, begin)
            logits, after = self._read(cache, tokens, first + shift, limit)
            return jax.lax.dynamic_slice_in_dim(logits, own - first, size, axis=1), after

        if size == length:
            return read(size)[0], cache
        return jax.lax.cond(
            point["first"] & (begin > 0),
            lambda: read(min(2 * size, length)),
            lambda: (read(size)[0], cache),
        )

    def _limits(self, slots, length, begin):
        """The last slot that each slot sees, while the block at `begin` is in progress."""
        if self.reading == "causal":
            return slots
        if self.reading == "segments":  # slots are a place later than their tokens
            end = jnp.minimum(begin + self.block_size, length)
            return jnp.where(slots > begin, end, slots)
        return jnp.minimum((slots // self.block_size + 1) * self.block_size, length) - 1

    def _read(self, cache, tokens, begin, limit):
        t = jnp.zeros(tokens.shape[:1])
        found = [
            network(tokens, t, cache=own, begin=begin, limit=limit)
            for network, own in zip(self.networks, cache)
        ]
        return self._guided([logits for logits, _ in found]), tuple(after for _, after in found)

    def _guided(self, logits):
        if len(logits) == 1:
            return logits[0]
        given, free = (jax.nn.log_softmax(v.astype(jnp.float32), axis=-1) for v in logits)
        return free + self.guidance * (given - free)


def decoder_of(net, params, batch, guidance: float, **fields) -> Decoder:
    """The `Decoder` of a bound network, guided by its null label where `guidance` is not 1."""
    networks = (net.bind(params, batch),)
    if guidance != 1.0:
        networks += (net.bind(params, net.unconditional(batch)),)
    return Decoder(networks, guidance, net.module, **fields)


def only_samplers(make: Callable, valid, **fixed) -> Callable:
    """`Method.build_sampler` of a family that knows some samplers only, with options that it decides.

    Raises (from the result):
      ValueError: another registered sampler, an option that contradicts a fixed one.
    """

    def build(name=valid[0], nfe=None, **options):
        if name in names("sampler"):
            check_choice("sampler of this model", name, valid)
        for option, value in fixed.items():
            if options.get(option, value) != value:
                raise ValueError(
                    f"the model has {option} = {value}, the sampler was asked for {options[option]}"
                )
        return make(name, nfe, **options)

    return build


def sample_with_cache(default, decoder: Callable) -> Callable:
    """`Method.sample` through `decoder(params, batch) -> Decoder`; a batch may hold a "prompt" `[B, n]`.

    Raises (from the result):
      ValueError: a sampler that does not go from left to right, a prompt that is too long.
    """

    def draw(params, key, batch, sampler=None, **options):
        sampler = default if sampler is None else sampler
        if "begin" not in sampler.xs["point"]:
            raise ValueError(f"sampler {sampler.name!r} does not decode from left to right")
        prompt = batch.get("prompt", batch["index"].shape[0])
        x = sampler.prepare(prompt)
        denoise = decoder(params, batch)
        return run_sampler(
            sampler,
            denoise,
            jax.random.split(key)[1],
            x,
            index=batch["index"],
            cache=denoise.start(x),
            **options,
        )

    return draw


def left_to_right_method(
    process,
    net,
    init,
    loss,
    bound,
    *,
    reading: str,
    guidance: float,
    samplers,
    sampler: str,
    nfe,
    sampler_options,
    length: int,
    **sizes,
) -> Method:
    """The `Method` of a family that samples from left to right through a `Decoder`.

    Args:
      net: the `methods.base.Network`.
      init, loss, bound: as in `Method`.
      reading, guidance: of the `Decoder`.
      samplers: names of the samplers that fit.
      sampler, nfe, sampler_options: the default sampler.
      length: of the sequences.
      sizes: what the network decides (`block_size`), for the decoder and every sampler.
    """

    def denoiser(params, batch, train=False, key=None, raw=False):
        if train:
            return net.bind(params, batch, train, key)
        fields = {"reading": reading, "mask_id": process.mask_id, **sizes}
        return decoder_of(net, params, batch, guidance, **fields)

    made = assemble(
        process,
        init,
        loss,
        denoiser,
        None,
        sampler,
        nfe,
        sampler_options,
        every_sampler={"length": length, **sizes},
    )
    return made._replace(
        bound=bound,
        build_sampler=only_samplers(made.build_sampler, samplers, **sizes),
        sample=sample_with_cache(made.default_sampler, denoiser),
    )
