"""Inputs that a tiny model takes: found by trying, because no two families ask for the same.

What `forward` takes by name says what may be given; sizes come from the configuration, and what else is asked for from
the error that transformers raises.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

#: Words of a text, and pictures, seconds and boxes in a batch of one.
LENGTH = 8

_FEATURES = re.compile(r"(image|video|audio)\D*tokens?\D*\d+\D*features?\D*?(\d+)", re.IGNORECASE)


def inputs(model: Any) -> tuple[dict[str, Any], Any] | None:
    """Arguments that the model's `forward` takes, and what it returns for them; None where none were found."""
    for arguments in _candidates(model):
        if "use_cache" in inspect.signature(model.forward).parameters:  # tiny models lack layers that caches ask for
            arguments["use_cache"] = False
        for _ in range(3):
            try:
                return arguments, outputs(model, arguments)
            except Exception as error:
                more = _amended(model, arguments, str(error))
                if more is None:
                    break
                arguments = more
    return None


def outputs(model: Any, arguments: dict[str, Any]) -> list[Any]:
    """All floating-point tensors that a model returns, in one order; random draws in `forward` are the same each time.

    Raises:
        ValueError: it returns none, or one that is not finite.
        Exception: whatever `forward` raises.
    """
    import torch

    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        found = list(_floats(model(**arguments)))
    if not found or not all(bool(torch.isfinite(value).all()) for value in found):
        raise ValueError("no finite output")
    return found


def _floats(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield value.float()
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _floats(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _floats(entry)


def _candidates(model: Any) -> Iterator[dict[str, Any]]:
    """What may be tried, the most of it first."""
    parameters = inspect.signature(model.forward).parameters
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    known = {name: list(makers(model)) for name, makers in _MAKERS.items() if name in parameters}
    texts = [name for name in known if name in _TEXT]
    media = [name for name in known if name not in (*_TEXT, "inputs_embeds")]
    grids = [name for name in known if name.endswith("grid_thw")]
    orders = [
        *([[*texts, "pixel_values", *grids[:1]], media[:1] + grids[:1]] if grids else ()),
        [*texts, *media[:1]], texts, media[:1], [name for name in known if name in required],
        [model.main_input_name], [model.main_input_name, *texts[-1:]], ["input_ids"], ["inputs_embeds"],
    ]  # fmt: skip
    seen: list[list[str]] = []
    for order in orders:
        names = list(dict.fromkeys([*(name for name in order if name in known), *(n for n in required if n in known)]))
        if not names or names in seen:
            continue
        seen.append(names)
        most = max(len(known[name]) for name in names)
        for number in range(most):
            yield {name: known[name][min(number, len(known[name]) - 1)] for name in names}


def _amended(model: Any, arguments: dict[str, Any], error: str) -> dict[str, Any] | None:
    """The arguments with as many words that stand for pictures as the error says there are pictures' features."""
    import torch

    found = _FEATURES.search(error)
    if found is None or "input_ids" not in arguments:
        return None
    kind, count = found[1].lower(), int(found[2])
    token = _number(model.config, f"{kind}_token_id", f"{kind}_token_index")
    if token is None or not 0 < count < 2000:
        return None
    words = torch.arange(2, 6)
    words = words[words != token]
    return {**arguments, "input_ids": torch.cat([words, torch.full((count,), token), words])[None]}


def _number(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these that the configuration, or one inside it, has."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, bool):
            return value
    for inner in vars(config).values():
        if hasattr(inner, "model_type"):
            value = _number(inner, *names)
            if value is not None:
                return value
    return default


def _words(model: Any) -> Iterator[Any]:
    import torch

    size = _number(model.config, "vocab_size", "n_vocab", default=32)
    size = size if isinstance(size, int) else 32
    special = {
        value
        for config in (model.config, *(one for one in vars(model.config).values() if hasattr(one, "model_type")))
        for name, value in vars(config).items()
        if "token" in name and isinstance(value, int)
    }
    plain = [word for word in range(3, max(size, 4)) if word not in special][:LENGTH] or [1]
    end = _number(model.config, "eos_token_id")
    for length in (LENGTH, 16, 64, 1):
        words = (plain * length)[:length]
        yield torch.tensor([words])
        if isinstance(end, int) and end < size:  # some read the last word's vector alone, and look for it
            yield torch.tensor([[*words[:-1], end]])


def _pictures(model: Any) -> Iterator[Any]:
    import torch

    side = _number(model.config, "image_size", "img_size", "input_size", default=32)
    high, wide = side if isinstance(side, list | tuple) and len(side) == 2 else (side, side)
    if isinstance(high, list | tuple | dict):
        high = wide = 32
    channels = _number(model.config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
    generator = torch.Generator().manual_seed(2)
    for height, width in dict.fromkeys(((high, wide), (32, 32), (64, 64), (224, 224))):
        yield torch.randn(1, channels, height, width, generator=generator)
    frames = _number(model.config, "num_frames", "frames_per_clip", "tubelet_size", default=2)
    frames = frames if isinstance(frames, int) else 2
    yield torch.randn(1, frames, channels, high, wide, generator=generator)
    yield torch.randn(1, 1, channels, high, wide, generator=generator)
    patch = _number(model.config, "patch_size", "spatial_patch_size", default=14)
    patch = patch if isinstance(patch, int) else 14
    yield torch.randn(1, 16, channels * patch * patch, generator=generator)
    for times in (_number(model.config, "temporal_patch_size", default=1), 1):
        yield torch.randn(16, channels * times * patch * patch, generator=generator)


def _sounds(model: Any) -> Iterator[Any]:
    import torch

    generator = torch.Generator().manual_seed(3)
    for length in (2000, 16000, 400):
        yield torch.randn(1, length, generator=generator)
    bins = _number(model.config, "num_mel_bins", "n_mels", "input_feat_per_channel", default=80)
    yield torch.randn(1, _number(model.config, "max_length", default=100), bins, generator=generator)
    yield torch.randn(1, 1, 2000, generator=generator)


def _spectra(model: Any) -> Iterator[Any]:
    import torch

    generator = torch.Generator().manual_seed(4)
    bins = _number(
        model.config,
        "num_mel_bins",
        "n_mels",
        "feature_projection_input_dim",
        "input_feat_per_channel",
        "input_dim",
        default=80,
    )
    frames = 2 * _number(model.config, "max_source_positions", default=32)
    for shape in ((bins, frames), (64, bins), (bins, 64), (bins, 3000), (1, 1001, 64)):
        yield torch.randn(1, *shape, generator=generator)


def _boxes(model: Any) -> Iterator[Any]:
    import torch

    for length in (LENGTH, 16, 64, 1):
        yield torch.tensor([[[1, 2, 3, 4]] * length])
        yield torch.tensor([[[1, 2, 3, 4]] * length])


def _vectors(model: Any) -> Iterator[Any]:
    import torch

    width = _number(model.config, "hidden_size", "d_model", "n_embd", default=32)
    yield torch.randn(1, LENGTH, width, generator=torch.Generator().manual_seed(5))


def _series(model: Any) -> Iterator[Any]:
    import torch

    length = _number(model.config, "context_length", default=8)
    lags = _number(model.config, "lags_sequence", default=[0])
    channels = _number(model.config, "num_input_channels", default=1)
    generator = torch.Generator().manual_seed(6)
    yield torch.randn(1, length + max(lags), generator=generator)
    yield torch.randn(1, length, channels, generator=generator)


def _times(model: Any) -> Iterator[Any]:
    import torch

    length = _number(model.config, "context_length", default=8) + max(
        _number(model.config, "lags_sequence", default=[0])
    )
    yield torch.zeros(1, length, _number(model.config, "num_time_features", default=0))


def _future(model: Any) -> Iterator[Any]:
    import torch

    length = _number(model.config, "prediction_length", default=4)
    yield torch.zeros(1, length, _number(model.config, "num_time_features", default=0))


def _observed(model: Any) -> Iterator[Any]:
    import torch

    for values in _series(model):
        yield torch.ones_like(values)


def _grid(model: Any) -> Iterator[Any]:
    import torch

    yield torch.tensor([[1, 4, 4]])


def _languages(model: Any) -> Iterator[Any]:
    import torch

    yield torch.tensor([0])


_TEXT = ("input_ids", "decoder_input_ids", "bbox", "lang_ids")
_MAKERS = {
    "input_ids": _words,
    "decoder_input_ids": _words,
    "bbox": _boxes,
    "pixel_values": _pictures,
    "pixel_values_videos": _pictures,
    "input_features": _spectra,
    "input_values": _sounds,
    "inputs": _words,
    "lang_ids": _languages,
    "inputs_embeds": _vectors,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "past_values": _series,
    "past_time_features": _times,
    "past_observed_mask": _observed,
    "future_time_features": _future,
}
