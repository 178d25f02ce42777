"""Judging samples: distribution distances, image and text figures, pictures, tables, timings.

Everything here runs on the host after training and looks only at samples and at real data. The
names below are loaded on first use, so that importing this package costs nothing.
"""

import importlib

_HOMES = {
    "classifier": ("Classifier", "load_or_train", "train_classifier"),
    "feature_statistics": ("FeatureStatistics", "collect", "figures"),
    "files": ("write_atomically",),
    "filter_bank": ("FilterBank",),
    "frechet": (
        "Moments",
        "frechet_distance",
        "frechet_extrapolated",
        "gaussian_distance",
        "merge",
        "moments",
        "psd_sqrt",
        "stream_moments",
    ),
    "generative": (),
    "grids": (
        "comparison_grid",
        "image_grid",
        "save_png",
        "text_image",
        "tokens_to_images",
        "trajectory_strip",
    ),
    "image_metrics": ("mse", "psnr", "restoration", "ssim"),
    "likelihood": (
        "Likelihood",
        "bits_per_dim",
        "dequantise",
        "held_out_likelihood",
        "importance_bound",
        "infer_levels",
        "score_run",
    ),
    "kernel": ("kernel_distance", "kernel_distance_subsets"),
    "mask_sets": (),
    "neighbours": ("nearest_distance", "precision_recall"),
    "perplexity": (
        "Perplexity",
        "TextSet",
        "any_order_nats",
        "count_bound",
        "estimate_bound",
        "order_nats",
        "read_text_set",
        "score_sets",
        "summarise",
    ),
    "ngram": ("NGramJudge",),
    "piano_roll": ("piano_rolls",),
    "plots": ("error_versus_nfe", "line_plot"),
    "quality": ("ImageQuality", "noise_images"),
    "reference_files": ("Reference", "read_reference", "reference_of", "write_reference"),
    "report": ("format_number", "markdown_table", "read_json", "write_json"),
    "scaling": (
        "PowerLaw",
        "best_size",
        "fit_power_law",
        "loss_at",
        "slope_ratio",
    ),
    "sharded": ("ShardedFunction",),
    "speech": (
        "cepstral_distortion",
        "mel_distances",
        "mel_images",
        "spectrogram_grid",
        "utterance_features",
        "utterance_frechet",
        "valid_frames",
        "write_waves",
    ),
    "text_metrics": (
        "bigram_baseline",
        "distinct_ngrams",
        "entropy",
        "histogram_baseline",
        "ngram_divergence",
        "ngram_overlap",
        "position_baseline",
        "token_counts",
        "unique_fraction",
    ),
    "timing": ("Timing", "seconds_per_thousand", "time_call"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name in _HOMES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; has: {', '.join(__all__)}"
    )


def __dir__():
    return sorted([*__all__, *_HOMES])
