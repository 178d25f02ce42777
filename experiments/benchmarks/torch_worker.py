"""The authors' way of sampling a masked model, in PyTorch, for `masked_sampling`: it times runs on request.

A transformer of the size of ours, and ancestral steps in which one categorical over V tokens and the mask
is drawn at every position by p / Exponential noise, as MDLM (arXiv 2406.07524) and RADD (2406.03736) do,
in float32 or float64. Written from the papers; runs in a process, and if need be a Python, of its own.

Reads one JSON line with the sizes, then a dtype a line; answers each with CPU seconds, `error ...` if torch
cannot be had.
"""

import json
import sys
import time


def network(torch, sizes):
    """`tokens -> logits [B, L, V + 1]`, with rotary positions and no time."""
    width, heads = sizes["width"], sizes["heads"]
    nn, functional = torch.nn, torch.nn.functional
    half = width // heads // 2
    angles = torch.arange(sizes["length"])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]

    def rotated(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            batch, length, _ = x.shape
            qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, heads, -1)
            query, key, value = rotated(qkv[:, :, 0]), rotated(qkv[:, :, 1]), qkv[:, :, 2]
            seen = functional.scaled_dot_product_attention(
                *(v.transpose(1, 2) for v in (query, key, value))
            )
            x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
            hidden = functional.gelu(self.up(self.norms[1](x)), approximate="tanh")
            return x + self.down(hidden)

    return nn.Sequential(
        nn.Embedding(sizes["vocab"] + 1, width),
        *[Block() for _ in range(sizes["depth"])],
        nn.LayerNorm(width),
        nn.Linear(width, sizes["vocab"] + 1),
    )


def sample(torch, model, sizes, dtype):
    """One batch of sequences in `steps` ancestral steps, every step with a call of the network."""
    mask = sizes["vocab"]
    x = torch.full((sizes["batch"], sizes["length"]), mask)
    for step in range(sizes["steps"], 0, -1):
        now, following = step / sizes["steps"], (step - 1) / sizes["steps"]
        logits = model(x)
        logits[..., mask] = -torch.inf
        probs = logits.log_softmax(dim=-1).exp().to(dtype) * (now - following)
        probs[..., mask] = following
        noise = 1e-10 - (torch.rand_like(probs) + 1e-10).log()
        drawn = (probs / noise).argmax(dim=-1)
        x = torch.where(x == mask, drawn, x)
    return x


def main():
    """Serves until its input ends."""
    sizes = json.loads(sys.stdin.readline())
    try:
        import torch
    except ImportError as error:
        print(f"error {error}", flush=True)
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = network(torch, sizes).eval()
    print(f"torch {torch.__version__}, {sum(p.numel() for p in model.parameters())}", flush=True)
    for line in sys.stdin:
        with torch.inference_mode():
            begin = time.process_time()
            x = sample(torch, model, sizes, getattr(torch, line.strip()))
            spent = time.process_time() - begin
        assert x.max() < sizes["vocab"]
        print(spent, flush=True)


if __name__ == "__main__":
    main()
