"""Published checkpoints: where their files come from, and the config that goes with each.

A preset has everything but the weights: network by size, process, what the network is told and gives, the
sampler and its network calls as its paper reports them. Nothing is downloaded: licences are the authors'.

NVIDIA's files are pickles of whole objects, which nothing here opens. With their repository on the path, and
torch:

    python -c "import pickle, torch; \\
        torch.save(pickle.load(open('edm-cifar10-32x32-cond-vp.pkl', 'rb'))['ema'].state_dict(), 'edm.pt')"
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_jax.data import described
from diffusion_jax.data.source import DataSpec
from diffusion_jax.registry import closest


class Preset(NamedTuple):
    """A published checkpoint.

    Attributes:
      what: data and model, in a few words.
      repository: of the authors, whose README names the file.
      file: its name there, as it is imported (a pickle: before it is converted).
      data: arguments of `data.described`: what the model learned.
      process, network, method: sections of a config.
      source: section `data` of a set to judge samples against, or to take sources from; None: described.
      key: where in the file the weights lie; None: it is found.
      note: what differs from the authors' sampling, or is to be known of the samples.
    """

    what: str
    repository: str
    file: str
    data: Mapping[str, Any]
    process: Mapping[str, Any]
    network: Mapping[str, Any]
    method: Mapping[str, Any]
    source: Mapping[str, Any] | None = None
    key: str | None = None
    note: str = ""

    def config(self) -> dict[str, Any]:
        """The config, plain dicts."""
        data = self.source or {"name": "described", **self.data}
        sections = {"data": data, "process": self.process}
        sections |= {"network": self.network, "method": self.method}
        return {name: dict(section) for name, section in sections.items()}

    def spec(self, tokenizer: str | None = None) -> DataSpec:
        """The data's spec; `tokenizer` is the file that numbered the tokens of text.

        Raises:
          ValueError: a tokenizer for what is no text, or one that does not fit.
        """
        if tokenizer and self.data["kind"] != "tokens":
            raise ValueError("a tokenizer is for text; the preset's data are images")
        return described(**self.data, tokenizer=tokenizer or "").spec


def _image(side: int, classes: int | None = None, **more: Any) -> dict[str, Any]:
    shape = [side, side, 3]
    return {"kind": "image", "shape": shape, "num_classes": classes, "show": "image"} | more


def _latents(side: int) -> dict[str, Any]:
    """Latents of Stable Diffusion's autoencoder for images of 8 times the side, 1000 classes."""
    return {"kind": "image", "shape": [side, side, 4], "num_classes": 1000}


_LATENTS = "samples are latents of Stable Diffusion's autoencoder"
_EDM = {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0}
_VP = {"name": "vp", "beta_min": 0.1, "beta_max": 20.0}
_DDPM = {"name": "discrete_vp", "schedule": "linear", "beta_min": 1e-4, "beta_max": 0.02}
_STABLE = {
    "name": "discrete_vp",
    "schedule": "scaled_linear",
    "beta_min": 8.5e-4,
    "beta_max": 0.012,
}


def _edm_method(nfe: int, mean: float = -1.2, std: float = 1.2, **more: Any) -> dict[str, Any]:
    return {
        "name": "score",
        "parameterization": "edm",
        "weighting": "edm",
        "times": "log_normal",
        "times_options": {"mean": mean, "std": std},
        "sigma_data": 0.5,
        "label_dropout": 0.0,
        "clip": False,
        "sampler": "edm_heun",
        "nfe": nfe,
    } | more


def _eps_method(sampler: str, nfe: int, **more: Any) -> dict[str, Any]:
    return {
        "name": "score",
        "parameterization": "eps",
        "weighting": "eps",
        "clip": False,
        "sampler": sampler,
        "nfe": nfe,
    } | more


def _edm(what: str, name: str, side: int, classes: int | None, nfe: int, **more: Any) -> Preset:
    network = "adm_unet" if name.endswith("adm") else "song_unet"
    size = name if network == "song_unet" else "edm-imagenet-64x64-cond"
    method = {k: more.pop(k) for k in ("sampler_options",) if k in more}
    return Preset(
        what=what,
        repository="NVlabs/edm",
        file=f"edm-{name}.pkl",
        data=_image(side, classes),
        process=_EDM,
        network={"name": network, "size": size},
        method=_edm_method(nfe, **method),
        **more,
    )


def _edm2(size: str, latents: bool) -> Preset:
    method = _edm_method(63, -0.4, 1.0) if latents else _edm_method(63, -0.8, 1.6)
    images = 512 if latents else 64
    return Preset(
        what=f"ImageNet {images}x{images}, EDM2-{size}",
        repository="NVlabs/edm2",
        file=f"edm2-img{images}-{size.lower()}-*.pkl",
        data=_latents(64) if latents else _image(64, 1000),
        process=_EDM,
        network={"name": "edm2_unet", "size": size},
        method=method | {"uncertainty": True},
        note=f"{_LATENTS}, brought to standard deviation 0.5" if latents else "",
    )


def _adm(images: int, file: str, classes: int | None = 1000) -> Preset:
    size = f"{images}x{images}" + ("" if classes else "-uncond")
    cosine = {"name": "discrete_vp", "schedule": "cosine"}
    return Preset(
        what=f"ImageNet {images}x{images}, ADM{'' if classes else ', unconditional'}",
        repository="openai/guided-diffusion",
        file=file,
        data=_image(images, classes),
        process=cosine if images == 64 else _DDPM,
        network={"name": "adm_unet", "size": size, "time_input": "index"},
        method=_eps_method(
            "ddpm",
            250,
            clip=True,
            label_dropout=0.0,
            learned_variance=True,
            sampler_options={"grid": "respaced", "variance": "learned"},
        ),
        note="without a classifier",
    )


def _bridge(what: str, repository: str, file: str, side: int, size: str, **more: Any) -> Preset:
    """A bridge: it starts from the sources of a data set."""
    sections = {
        "network": {"name": "adm_unet", "size": size},
        "process": {"name": "vp_bridge", "beta_d": 2.0, "beta_min": 0.1},
        "method": {
            "name": "bridge",
            "parameterization": "ddbm",
            "sigma_data": 0.5,
            "sigma_source": 0.5,
            "covariance": 0.0,
            "sampler": "ddbm_heun",
            "nfe": 119,
        },
        "data": _image(side, source=True),
    }
    return Preset(
        what=what,
        repository=repository,
        file=file,
        **{**sections, **more},
    )


def _dit(images: int) -> Preset:
    return Preset(
        what=f"ImageNet {images}x{images}, DiT-XL/2",
        repository="facebookresearch/DiT",
        file=f"DiT-XL-2-{images}x{images}.pt",
        data=_latents(images // 8),
        process=_DDPM,
        network={
            "name": "dit",
            "size": "XL/2",
            "out_channels": 8,
            "time_input": "index",
            "time_scale": 1.0,
        },
        method=_eps_method(
            "ddpm",
            250,
            learned_variance=True,
            guidance=1.5,
            guided_channels=3,
            sampler_options={"grid": "respaced", "variance": "learned"},
        ),
        note=f"{_LATENTS}, times 0.18215",
    )


def _uvit(size: str, file: str, side: int, scale: float | None = None) -> Preset:
    """`scale`: of guidance as U-ViT counts it, c + s (c - u), in latents; None: pixels, no null label."""
    discrete = " H/" in size  # the other models were trained in continuous time
    guided = {"label_dropout": 0.0} if scale is None else {"guidance": 1.0 + scale}
    time = {"time_input": "step", "time_scale": 1.0} if discrete else {"time_scale": 999.0}
    return Preset(
        what=size.replace(" ", ", U-ViT-"),
        repository="baofff/U-ViT",
        file=file,
        data=_image(side, 1000) if scale is None else _latents(side),
        process=_STABLE if discrete else _VP,
        network={"name": "uvit", "size": size} | time,
        method=_eps_method("dpmpp_2m", 50, **guided),
        note="" if scale is None else f"{_LATENTS}, times 0.18215",
    )


def _uvit_unconditional(
    size: str, file: str, side: int, source: Mapping[str, Any] | None
) -> Preset:
    return Preset(
        what=f"{size.replace(' ', ', U-ViT-')}, unconditional",
        repository="baofff/U-ViT",
        file=file,
        data=_image(side),
        process=_VP,
        network={"name": "uvit", "size": size, "time_scale": 999.0},
        method=_eps_method("euler_maruyama", 1000),
        source=source,
    )


_GPT2 = {"kind": "tokens", "shape": [1024], "vocab_size": 50_257}
_TOKENS = "text needs --tokenizer=FILE, GPT-2's tokenizer.json; token numbers without it"
_DOCUMENTS = {"name": "documents", "path": "data/openwebtext", "length": 1024}


def _sedd(size: str) -> Preset:
    return Preset(
        what=f"OpenWebText, SEDD {size}, absorbing",
        repository="louaaron/Score-Entropy-Discrete-Diffusion",
        file=f"louaaron/sedd-{size}: model.safetensors",
        data=_GPT2,
        process={"name": "absorbing", "schedule": {"name": "linear", "eps_end": 1e-3}},
        network={"name": "ddit", "size": f"sedd-{size}"},
        method={
            "name": "score_entropy",
            "label_dropout": 0.0,
            "sampler": "score_analytic",
            "nfe": 1025,
        },
        source=_DOCUMENTS,
        note=_TOKENS,
    )


def _masked(what: str, repository: str, file: str, size: str, **method: Any) -> Preset:
    return Preset(
        what=what,
        repository=repository,
        file=file,
        data=_GPT2,
        process={"name": "absorbing", "schedule": "linear"},
        network={"name": "ddit", "size": size},
        method={
            "name": "masked",
            "label_dropout": 0.0,
            "sampler": "masked_ancestral",
            "nfe": 1024,
        }
        | method,
        source=_DOCUMENTS,
        note=_TOKENS,
    )


def _radd(size: str) -> Preset:
    return _masked(
        f"OpenWebText, RADD {size}",
        "ML-GSAI/RADD",
        f"the {size} model of any of the four losses",
        f"radd-{size}",
        objective="lambda",
    )


_CIFAR = {"name": "tfds", "dataset": "cifar10"}
_CHURN = {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}  # EDM, ImageNet-64


def _cifar(labels: str, code: str) -> Preset:
    names = {"uncond": (None, "unconditional"), "cond": (10, "class-conditional")}
    network = {"vp": "DDPM++", "ve": "NCSN++"}[code]
    classes, words = names[labels]
    what = f"CIFAR-10, EDM {network}, {words}"
    return _edm(what, f"cifar10-32x32-{labels}-{code}", 32, classes, 35, source=_CIFAR)


def _faces(data: str, name: str, code: str) -> Preset:
    network = {"vp": "DDPM++", "ve": "NCSN++"}[code]
    return _edm(f"{data} 64x64, EDM {network}", f"{name}-64x64-uncond-{code}", 64, None, 79)


def _pairs(root: str, side: int) -> dict[str, Any]:
    return {"name": "image_folder", "root": root, "layout": "source_left", "size": side}


_INPAINT = {
    "name": "paired",
    "data": "image_folder",
    "root": "imagenet",
    "size": 256,
    "corruption": "inpaint",
    "options": {"size": 128, "fill": 0.0},
}

PRESETS: dict[str, Preset] = {
    **{
        f"edm-cifar10-32x32-{labels}-{code}": _cifar(labels, code)
        for labels in ("uncond", "cond")
        for code in ("vp", "ve")
    },
    **{f"edm-ffhq-64x64-uncond-{code}": _faces("FFHQ", "ffhq", code) for code in ("vp", "ve")},
    **{
        f"edm-afhqv2-64x64-uncond-{code}": _faces("AFHQv2", "afhqv2", code) for code in ("vp", "ve")
    },
    "edm-imagenet-64x64-cond-adm": _edm(
        "ImageNet 64x64, EDM ADM", "imagenet-64x64-cond-adm", 64, 1000, 511, sampler_options=_CHURN
    ),
    "ddbm-edges2handbags": _bridge(
        "edges to handbags 64x64, DDBM",
        "alexzhou907/DDBM",
        "e2h_ema_0.9999_420000.pt",
        64,
        "ddbm-edges2handbags-64x64",
        source=_pairs("edges2handbags", 64),
    ),
    "ddbm-diode": _bridge(
        "DIODE 256x256, normals to photographs, DDBM",
        "alexzhou907/DDBM",
        "diode_ema_0.9999_440000.pt",
        256,
        "ddbm-diode-256x256",
        source=_pairs("diode", 256),
    ),
    "dbim-imagenet-inpainting": _bridge(
        "ImageNet 256x256, centre inpainting, DBIM",
        "thu-ml/DiffusionBridge",
        "the ImageNet inpainting model of its README",
        256,
        "dbim-imagenet-256x256",
        network={"name": "adm_unet", "size": "dbim-imagenet-256x256", "time_scale": 1000.0},
        data=_image(256, 1000, source=True, mask=True),
        process={"name": "i2sb", "beta_min": 0.1, "beta_max": 1.0, "rho_T_excludes_overlap": True},
        method={
            "name": "bridge",
            "parameterization": "i2sb",
            "masked": True,
            "sampler": "dbim",
            "nfe": 10,
        },
        source=_INPAINT,
    ),
    "ADM-64x64": _adm(64, "64x64_diffusion.pt"),
    "ADM-128x128": _adm(128, "128x128_diffusion.pt"),
    "ADM-256x256": _adm(256, "256x256_diffusion.pt"),
    "ADM-256x256-uncond": _adm(256, "256x256_diffusion_uncond.pt", None),
    "ADM-512x512": _adm(512, "512x512_diffusion.pt"),
    "DiT-XL-2-256x256": _dit(256),
    "DiT-XL-2-512x512": _dit(512),
    "uvit-cifar10-S-2": _uvit_unconditional("CIFAR-10 S/2", "cifar10_uvit_small.pth", 32, _CIFAR),
    "uvit-celeba64-S-4": _uvit_unconditional("CelebA-64 S/4", "celeba_uvit_small.pth", 64, None),
    "uvit-imagenet64-M-4": _uvit("ImageNet-64 M/4", "imagenet64_uvit_mid.pth", 64),
    "uvit-imagenet64-L-4": _uvit("ImageNet-64 L/4", "imagenet64_uvit_large.pth", 64),
    "uvit-imagenet256-L-2": _uvit("ImageNet-256 L/2", "imagenet256_uvit_large.pth", 32, 0.4),
    "uvit-imagenet256-H-2": _uvit("ImageNet-256 H/2", "imagenet256_uvit_huge.pth", 32, 0.4),
    "uvit-imagenet512-L-4": _uvit("ImageNet-512 L/4", "imagenet512_uvit_large.pth", 64, 0.7),
    "uvit-imagenet512-H-4": _uvit("ImageNet-512 H/4", "imagenet512_uvit_huge.pth", 64, 0.7),
    **{f"edm2-img512-{s.lower()}": _edm2(s, True) for s in ("XS", "S", "M", "L", "XL", "XXL")},
    **{f"edm2-img64-{s.lower()}": _edm2(s, False) for s in ("S", "M", "L", "XL")},
    "sedd-small": _sedd("small"),
    "sedd-medium": _sedd("medium"),
    "mdlm-owt": _masked(
        "OpenWebText, MDLM",
        "kuleshov-group/mdlm",
        "kuleshov-group/mdlm-owt: model.safetensors",
        "mdlm-small",
        objective="continuous",
        nfe=1000,
    ),
    "radd-small": _radd("small"),
    "radd-medium": _radd("medium"),
}


def get(name: str) -> Preset:
    """The preset of a name. Raises ValueError with the nearest match and the list."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{closest(name, PRESETS)}")
    return PRESETS[name]


def table() -> str:
    """The presets for people: what each is, its file, its network and sampler."""
    lines = []
    for name, preset in PRESETS.items():
        network, method = preset.network, preset.method
        lines += [
            f"{name}",
            f"    {preset.what}; {network['name']} {network.get('size', '')}".rstrip(),
            f"    file: {preset.file} ({preset.repository})",
            f"    {method['sampler']}, {method['nfe']} network calls",
        ]
        lines += [f"    {preset.note}"] if preset.note else []
    return "\n".join(lines)
