"""DiT and DDiT in PyTorch, for `accelerator`: it times runs of sampling on request.

The networks of ours, layer for layer, written from the papers (DiT, arXiv 2212.09748; SEDD, arXiv 2310.16834):
compiled by `torch.compile` and in bfloat16 on a GPU, attention through `scaled_dot_product_attention`. Runs in
a process, and if need be a Python, of its own.

Reads one JSON line with the case, answers with its version and number of parameters; then a line a run, each
answered with its seconds; `error ...` if there is no torch, or none with CUDA where the case asks for it.
"""

import itertools
import json
import math
import sys
import time


def networks(torch):
    """`(DiT, DDiT)`, the module classes."""
    nn, functional = torch.nn, torch.nn.functional

    def features(t, count):
        half = count // 2
        w = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device) / half)
        angles = t.float()[:, None] * w[None]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def rotated(x, cosine, sine):
        first, second = x.float().chunk(2, dim=-1)
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return torch.cat(turned, dim=-1).to(x.dtype)

    def film(x, shift, scale):
        return x * (1 + scale[:, None]) + shift[:, None]

    class Block(nn.Module):
        def __init__(self, width, heads, condition, bias, affine):
            super().__init__()
            self.heads = heads
            norm = {"elementwise_affine": affine, "bias": False, "eps": 1e-6}
            self.norms = nn.ModuleList([nn.LayerNorm(width, **norm) for _ in range(2)])
            self.qkv = nn.Linear(width, 3 * width, bias=bias)
            self.out = nn.Linear(width, width, bias=bias)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.modulation = nn.Linear(condition, 6 * width)

        def forward(self, x, c, turn):
            batch, length, width = x.shape
            parts = self.modulation(c).chunk(6, dim=-1)
            h = film(self.norms[0](x), parts[0], parts[1])
            qkv = self.qkv(h).view(batch, length, 3, self.heads, -1).transpose(1, 3)
            query, key, value = qkv.unbind(2)
            if turn is not None:
                query, key = rotated(query, *turn), rotated(key, *turn)
            h = functional.scaled_dot_product_attention(query, key, value)
            h = self.out(h.transpose(1, 2).reshape(batch, length, width))
            x = x + parts[2][:, None] * h
            h = film(self.norms[1](x), parts[3], parts[4])
            h = self.down(functional.gelu(self.up(h), approximate="tanh"))
            return x + parts[5][:, None] * h

    class DiT(nn.Module):
        def __init__(self, width, depth, heads, patch_size, channels, side, num_classes):
            super().__init__()
            self.patch, self.side = patch_size, side
            self.input = nn.Linear(patch_size**2 * channels, width)
            self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
            self.label = nn.Embedding(num_classes + 1, width)
            blocks = [Block(width, heads, width, True, False) for _ in range(depth)]
            self.blocks = nn.ModuleList(blocks)
            self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.modulation = nn.Linear(width, 2 * width)
            self.output = nn.Linear(width, patch_size**2 * channels)
            positions = torch.randn((side // patch_size) ** 2, width)  # their values cost nothing
            self.register_buffer("positions", positions)

        def forward(self, x, t, label):
            batch, height, width, channels = x.shape
            p, rows, columns = self.patch, height // self.patch, width // self.patch
            h = x.view(batch, rows, p, columns, p, channels).transpose(2, 3)
            h = self.input(h.reshape(batch, rows * columns, -1)) + self.positions
            time = features(t, 256).to(h.dtype)
            c = functional.silu(self.time(time) + self.label(label))
            for block in self.blocks:
                h = block(h, c, None)
            h = self.output(film(self.norm(h), *self.modulation(c).chunk(2, dim=-1)))
            h = h.view(batch, rows, columns, p, p, channels).transpose(2, 3)
            return h.reshape(batch, height, width, channels)

    class DDiT(nn.Module):
        def __init__(self, width, depth, heads, vocab_size, length):
            super().__init__()
            self.tokens = nn.Embedding(vocab_size + 1, width)
            self.time = nn.Sequential(nn.Linear(256, 128), nn.SiLU(), nn.Linear(128, 128))
            blocks = [Block(width, heads, 128, False, True) for _ in range(depth)]
            self.blocks = nn.ModuleList(blocks)
            self.norm = nn.LayerNorm(width, bias=False, eps=1e-6)
            self.modulation = nn.Linear(128, 2 * width)
            self.output = nn.Linear(width, vocab_size + 1)
            half = width // heads // 2
            angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
            self.register_buffer("cosine", angles.cos(), persistent=False)
            self.register_buffer("sine", angles.sin(), persistent=False)

        def forward(self, x, t):
            h = self.tokens(x)
            c = functional.silu(self.time(features(t, 256).to(h.dtype)))
            for block in self.blocks:
                h = block(h, c, (self.cosine, self.sine))
            return self.output(film(self.norm(h), *self.modulation(c).chunk(2, dim=-1)))

    return DiT, DDiT


def sample_images(torch, model, case, dtype, device):
    """DDIM (arXiv 2010.02502) of a model that predicts the noise."""
    side, channels, batch = case["side"], case["channels"], case["batch"]
    x = torch.randn(batch, side, side, channels, device=device)
    label = torch.zeros(batch, dtype=torch.long, device=device)
    times = [(case["steps"] - i) / case["steps"] for i in range(case["steps"] + 1)]
    place = lambda t: (math.cos(math.pi / 2 * t * 0.999), math.sin(math.pi / 2 * t * 0.999))
    for now, following in itertools.pairwise(times):
        (alpha, sigma), (alpha_next, sigma_next) = place(now), place(following)
        t = torch.full((batch,), 1000.0 * now, device=device)
        eps = model(x.to(dtype), t, label).float()
        x = alpha_next * (x - sigma * eps) / alpha + sigma_next * eps
    return x


def sample_tokens(torch, model, case, device):
    """Ancestral steps, a categorical over V tokens and the mask at every position of each (2406.07524)."""
    mask, batch = case["vocab_size"], case["batch"]
    x = torch.full((batch, case["length"]), mask, device=device)
    for step in range(case["steps"], 0, -1):
        now, following = step / case["steps"], (step - 1) / case["steps"]
        t = torch.full((batch,), now, device=device)
        logits = model(x, t).float()
        logits[..., mask] = -torch.inf
        probs = logits.log_softmax(dim=-1).exp() * (now - following)
        probs[..., mask] = following
        noise = 1e-10 - (torch.rand_like(probs) + 1e-10).log()
        x = torch.where(x == mask, (probs / noise).argmax(dim=-1), x)
    return x


def main():
    """Serves until its input ends."""
    case = json.loads(sys.stdin.readline())
    try:
        import torch

        if case["gpu"] and not torch.cuda.is_available():
            raise ImportError("torch sees no GPU")
    except ImportError as error:
        print(f"error {error}", flush=True)
        return
    torch.manual_seed(0)
    device = "cuda" if case["gpu"] else "cpu"
    dtype = torch.bfloat16 if case["gpu"] else torch.float32
    names = ("width", "depth", "heads")
    tokens = case["network"] == "ddit"
    names += (
        ("vocab_size", "length") if tokens else ("patch_size", "channels", "side", "num_classes")
    )
    model = networks(torch)[tokens](**{n: case[n] for n in names}).to(device, dtype).eval()
    count = sum(p.numel() for p in model.parameters())
    print(json.dumps({"version": torch.__version__, "parameters": count}), flush=True)
    if case["gpu"]:
        model = torch.compile(model)
    for _ in sys.stdin:
        with torch.inference_mode():
            begin = time.perf_counter()
            if tokens:
                x = sample_tokens(torch, model, case, device)
            else:
                x = sample_images(torch, model, case, dtype, device)
            total = float(x.float().sum())  # waits for the device
            spent = time.perf_counter() - begin
        assert math.isfinite(total)
        print(spent, flush=True)


if __name__ == "__main__":
    main()
