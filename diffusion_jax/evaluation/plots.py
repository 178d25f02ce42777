"""Line plots as images. matplotlib is imported on first use and without its global state."""

from collections.abc import Mapping

import numpy as np

# With more curves than this the legend stands beside the axes, not over the curves.
_MOST_INSIDE = 6
_MARKERS = "osD^vP*X<>"
# Up to so many different x are written out on a logarithmic axis; powers of ten hide an NFE of 20.
_MOST_TICKS = 10


def _check_curve(name: str, curve) -> list[np.ndarray]:
    parts = [np.asarray(part, np.float64) for part in curve]
    if len(parts) not in (2, 3) or any(p.ndim != 1 or p.shape != parts[0].shape for p in parts):
        shapes = [part.shape for part in parts]
        raise ValueError(f"curve {name!r} must be (x, y) or (x, y, spread), each [n]; got {shapes}")
    return parts


def line_plot(
    curves: Mapping[str, tuple],
    *,
    x_label: str = "",
    y_label: str = "",
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[float, float] = (6.0, 4.0),
    dpi: int = 120,
) -> np.ndarray:
    """Curves in one plot.

    Args:
      curves: name -> (x, y) or (x, y, spread), arrays [n]; the spread is drawn as error bars.
        Points that are not finite, or not positive on a logarithmic axis, are left out.
      x_label, y_label, title: captions.
      log_x, log_y: logarithmic axes.
      size: inches; with many curves the legend beside them takes more.
      dpi: dots per inch.

    Returns:
      uint8 [H, W, 3], for `grids.save_png`.

    Raises:
      ValueError: no curves, or arrays whose shapes differ.
      ModuleNotFoundError: matplotlib is not installed.
    """
    if not curves:
        raise ValueError("a plot needs at least one curve")
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    beside = len(curves) > _MOST_INSIDE
    size = (1.35 * size[0], 1.15 * size[1]) if beside else size
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps["tab20" if len(curves) > 10 else "tab10"].colors
    for i, (name, curve) in enumerate(curves.items()):
        parts = _check_curve(name, curve)
        keep = np.all([np.isfinite(part) for part in parts], axis=0)
        keep &= (parts[0] > 0) if log_x else True
        keep &= (parts[1] > 0) if log_y else True
        x, y, *spread = [part[keep] for part in parts]
        style = {"color": colours[i % len(colours)], "marker": _MARKERS[i % len(_MARKERS)]}
        axes.errorbar(x, y, yerr=spread[0] if spread else None, ms=4, lw=1.2, label=name, **style)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if log_x:
        axes.set_xscale("log")
        at = np.unique(
            np.concatenate([np.asarray(curve[0], np.float64) for curve in curves.values()])
        )
        at = at[np.isfinite(at) & (at > 0)]
        if 0 < len(at) <= _MOST_TICKS:
            axes.set_xticks(at, [f"{x:g}" for x in at])
            axes.set_xticks([], minor=True)
    if log_y:
        axes.set_yscale("log")
    axes.grid(True, which="both", alpha=0.25)
    if beside:
        figure.legend(loc="outside right upper", fontsize="small")
    else:
        axes.legend(fontsize="small")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def error_versus_nfe(
    curves: Mapping[str, tuple],
    *,
    title: str = "",
    y_label: str = "error",
    slopes: bool = True,
) -> np.ndarray:
    """Error against network calls on logarithmic axes, uint8 [H, W, 3].

    Args:
      curves: name -> (nfe, error) or (nfe, error, spread).
      title, y_label: captions.
      slopes: write each curve's fitted slope, the observed order of the solver, into the legend.

    Raises:
      ValueError: as `line_plot`.
    """
    named = {}
    for name, curve in curves.items():
        nfe, error, *_ = parts = _check_curve(name, curve)
        keep = np.isfinite(error) & (error > 0) & (nfe > 0)
        if slopes and len(set(nfe[keep])) > 1:
            slope = np.polyfit(np.log(nfe[keep]), np.log(error[keep]), 1)[0]
            name = f"{name} (slope {slope:.1f})"
        named[name] = parts
    return line_plot(
        named, x_label="network calls", y_label=y_label, title=title, log_x=True, log_y=True
    )
