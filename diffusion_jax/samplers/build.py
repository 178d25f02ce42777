"""A sampler by name and number of network calls, as command lines and configs ask for it."""

from typing import Any

from diffusion_jax.processes import BridgeProcess, DiscreteBFN, DiscreteProcess, GaussianProcess
from diffusion_jax.registry import closest, entry, names
from diffusion_jax.samplers.lsd import load_lsd
from diffusion_jax.samplers.saved_table import load_table
from diffusion_jax.samplers.scan import Sampler


def family_of(process: Any) -> str:
    """ "gaussian", "bridge", "discrete" or "bayesian_flow". Raises ValueError for anything else."""
    families = {
        GaussianProcess: "gaussian",
        BridgeProcess: "bridge",
        DiscreteProcess: "discrete",
        DiscreteBFN: "bayesian_flow",
    }
    for kind, family in families.items():
        if isinstance(process, kind):
            return family
    raise ValueError(f"{type(process).__name__} is not a process of this library")


def steps_for(calls: str, nfe: int) -> int:
    """The most steps that spend at most `nfe` network calls; `calls` says what n steps cost."""
    return {
        "n": nfe,
        "n+1": nfe - 1,
        "2n": nfe // 2,
        "2n-1": (nfe + 1) // 2,
        "3n": nfe // 3,
        "3n-1": (nfe + 1) // 3,
        "4n": nfe // 4,
    }[calls]


def _spend(build, process, options, sampler, nfe) -> Sampler:
    """The sampler with the most steps that make at most `nfe` calls.

    What `calls` declares is a guess: Heun without a last step into sigma = 0 makes one call more, an
    option may halve the calls of a step.
    """
    steps = options["num_steps"]
    while sampler.nfe > nfe and steps > 1:
        steps -= 1
        sampler = build(process, **{**options, "num_steps": steps})
    if sampler.nfe == nfe:
        return sampler  # more steps would cost more, or (finite chains) not exist
    for more in range(steps * nfe // sampler.nfe + 1, steps, -1):
        fuller = build(process, **{**options, "num_steps": more})
        if fuller.nfe <= nfe:
            return fuller
    return sampler


def build_sampler(process: Any, name: str, nfe: int | None = None, **options: Any) -> Sampler:
    """The registered sampler `name` on a process.

    Args:
      process: a process; the sampler must be of its family.
      name: registered name, or the .npz file of a saved table (`save_table`, `fit_table`) or of learned
        steps (`save_lsd`, `fit_lsd`).
      nfe: network calls to spend at most; None takes the sampler's own default. A saved table makes
        as many as it makes.
      options: arguments of the sampler.
    Raises:
      ValueError: unknown name, a sampler of another family, options it does not have, or an nfe below
        what one step costs; see `load_table` for files.
    """
    family = family_of(process)
    if name.endswith(".npz") and family == "discrete":
        return load_lsd(name, process, nfe=nfe, **options)
    if name.endswith(".npz"):
        if options:
            raise ValueError(f"a saved table takes no options, got {', '.join(options)}")
        return load_table(name, process, nfe=nfe)
    found = entry("sampler", name)
    if found.meta["family"] != family:
        fitting = names("sampler", family=family)
        raise ValueError(f"sampler {name!r} is not for a {family} process{closest(name, fitting)}")
    calls = found.meta.get("calls", "n")
    if nfe is not None and (not isinstance(nfe, int) or nfe < 1):
        raise ValueError(f"nfe must be a positive int, got {nfe!r}")
    if calls == "length":
        length = options.get("length")
        parallel = nfe is not None and length is not None and nfe < length
        if parallel and found.meta.get("parallel"):
            options["num_steps"] = nfe
        elif nfe is not None and length is not None and nfe != length:
            raise ValueError(
                f"sampler {name!r} makes one call a token: nfe is the length {length}, not {nfe}"
            )
    elif nfe is not None:
        options["num_steps"] = steps = steps_for(calls, nfe)
        if steps < 1:
            raise ValueError(
                f"sampler {name!r} costs {calls} calls for n steps: nfe={nfe} is too few"
            )
    try:
        sampler = found.build(process, **options)
        if nfe is not None and calls != "length" and not found.meta.get("skips"):
            sampler = _spend(found.build, process, options, sampler, nfe)
    except TypeError as error:
        raise ValueError(f"sampler {name!r}: {error}") from error
    return sampler
