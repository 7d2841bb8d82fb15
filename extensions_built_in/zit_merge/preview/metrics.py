"""Distances between two pictures that need no downloaded weights, and metrics from the user's own modules.

A metric takes a picture and its reference, both (3, h, w) float32 in [0, 1], sRGB. It is 0 for equal pictures and larger for more
different ones, on a scale on which a mean over pictures makes sense, and does not change its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from typing import TYPE_CHECKING

from ..algebra.parameters import paragraphs
from ..errors import SettingError, ZitMergeError, nearest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Metric = Callable[["Tensor", "Tensor"], float]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, of R'G'B'
_WINDOW, _SIGMA = 11, 1.5  # pixels; Wang et al. 2004, section III.C
_C1, _C2 = 0.01**2, 0.03**2  # there: (K1 L)^2 and (K2 L)^2 with L = 1
_SIDE = 256  # pixels to which Wang's suggested use of SSIM brings the shorter side: by round(side / 256)
_COARSEST = 32  # pixels of the shorter side, of which the window is a third: what is left is where light and dark masses lie

_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))  # sRGB, D65


def pixels(picture: Tensor, reference: Tensor) -> float:
    """How far the pixels are from each other, place by place.

    Formula: root of the mean of (p - r)^2 over all pixels and R, G, B; 1 is black against white
    Source: root mean square error

    Args:
        picture: (3, h, w) in [0, 1].
        reference: (3, h, w) in [0, 1].
    """
    return float((picture.double() - reference.double()).square().mean().sqrt())


def structure(picture: Tensor, reference: Tensor) -> float:
    """Whether the same shapes are at the same places, from the layout down to what is seen at arm's length.

    At one size alone SSIM is decided by fine texture, of which grain is as much as another scene. So coarse views are averaged
    with it, where grain is gone and only the composition is left; all count alike, since nobody has measured weights for
    generated pictures.

    Formula: mean of 1 - SSIM of luma over the views with a shorter side of about 256, 128, 64 and 32 pixels, each the means of
        2 x 2 pixels of the one before; SSIM with a Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03
    Source: SSIM (Wang et al. 2004), reduced by round(side / 256) first as its authors suggest; views as in MS-SSIM (Wang et
        al. 2003)

    Args:
        picture: (3, h, w) in [0, 1].
        reference: (3, h, w) in [0, 1].

    Raises:
        ZitMergeError: A side is shorter than the window.
    """
    _check_size("structure", picture)
    views = zip(_views(_luma(picture)), _views(_luma(reference)), strict=True)
    lost = [1 - _ssim(p, r) for p, r in views]
    return sum(lost) / len(lost)


def colour(picture: Tensor, reference: Tensor) -> float:
    """How much of which colours there is, wherever it is in the picture.

    Formula: root of the sum over L*, a*, b* of W^2, with W the 1-D Wasserstein distance of the values of that channel; in Delta E
        units, and the Delta E of the two colours where each picture has only one
    Source: CIELAB under D65 and Delta E 1976 (ISO/CIE 11664-4), sRGB (IEC 61966-2-1)

    Args:
        picture: (3, h, w) in [0, 1].
        reference: (3, h, w) in [0, 1].
    """
    channels = zip(lab(picture), lab(reference), strict=True)
    return sum(_wasserstein(p, r) ** 2 for p, r in channels) ** 0.5


def detail(picture: Tensor, reference: Tensor) -> float:
    """How much fine detail there is, wherever it is in the picture: sharpness, texture, grain.

    Formula: 1-D Wasserstein distance of the values of |Y - blurred Y|, Y luma from 0 to 1, the blur Gaussian, sigma 1.5 pixels
    Source: the amplitudes of the finest level of a Laplacian pyramid (Burt and Adelson 1983)

    Args:
        picture: (3, h, w) in [0, 1].
        reference: (3, h, w) in [0, 1].

    Raises:
        ZitMergeError: A side is shorter than the window.
    """
    _check_size("detail", picture)
    return _wasserstein(_high_pass(_luma(picture)), _high_pass(_luma(reference)))


METRICS: Mapping[str, Metric] = {f.__name__: f for f in (pixels, structure, colour, detail)}


def check_metric(name: str) -> None:
    """Raises unless there may be such a metric. Runs no code of the user's.

    Args:
        name: As of `metric`.

    Raises:
        SettingError: It is neither a built-in one nor in a module that Python finds.
    """
    if name in METRICS:
        return
    if not (form := re.fullmatch(r"(\w+)(\.\w+)*:\w+", name)):
        known = f"there are {', '.join(METRICS)}, and module:function for one of your own"
        raise SettingError(f"no such metric: {name!r}{nearest(name, METRICS)}; {known}")
    if find_spec(form[1]) is None:  # of a package the outermost: to look further, Python would import it
        raise SettingError(f"{name!r}: Python finds no {form[1]}: correct the name, or put its folder on PYTHONPATH")


def metric(name: str) -> Metric:
    """A metric by its name in a config.

    Args:
        name: A built-in one, or `module:function`, which is imported.

    Raises:
        SettingError: There is no such metric, or it can't be called.
    """
    check_metric(name)
    if name in METRICS:
        return METRICS[name]
    own, _, function = name.partition(":")
    try:
        module = import_module(own)
    except Exception as e:  # the user's own code
        raise SettingError(f"{name!r}: Python can't import {own} ({_reason(e)}): fix it, or put its folder on PYTHONPATH") from e
    if not hasattr(module, function):
        raise SettingError(f"{name!r}: {own} has no {function}{nearest(function, vars(module))}")
    if not callable(found := getattr(module, function)):
        kind = type(found).__name__
        raise SettingError(f"{name!r}: is of type {kind}, not a function: name a function of two pictures")
    return found


def described(function: Metric) -> dict[str, str]:
    """{what, formula, source} from a metric's docstring, each one line, empty where it has none."""
    parts = paragraphs(function.__doc__ or "")
    what = parts.get("", "").split("\n\n")[0]
    texts = {"what": what, "formula": parts.get("Formula", ""), "source": parts.get("Source", "")}
    return {key: " ".join(text.split()) for key, text in texts.items()}


def distance(name: str, function: Metric, picture: Tensor, reference: Tensor) -> float:
    """The distance of two pictures by a built-in metric or the user's own.

    Args:
        name: Of the metric, for messages.
        function: The metric.
        picture: (3, h, w).
        reference: (3, h, w).

    Raises:
        ZitMergeError: It fails, or does not return a finite number from 0.
    """
    import torch

    try:
        with torch.no_grad():
            found = float(function(picture, reference))
    except ZitMergeError:
        raise
    except Exception as e:  # the user's own code
        raise ZitMergeError(f"the metric {name} fails on two pictures of {_size(picture)} ({_reason(e)}): fix the metric") from e
    if not isfinite(found) or found < 0:
        raise ZitMergeError(
            f"the metric {name} gives {found:g} for two pictures: a distance is a finite number from 0: fix the metric"
        )
    return found


def tensor_of(image: Image.Image) -> Tensor:
    """(3, h, w) float32 in [0, 1] of a picture, without transparency."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1).contiguous() / 255


def lab(picture: Tensor) -> Tensor:
    """CIELAB of sRGB under D65.

    Args:
        picture: (3, h, w) in [0, 1].

    Returns:
        (3, h, w): L* from 0 to 100, a* and b*.
    """
    import torch

    linear = torch.where(picture <= 0.04045, picture / 12.92, ((picture + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(_TO_XYZ, dtype=picture.dtype)
    ratios = torch.einsum("xc,chw->xhw", to_xyz / to_xyz.sum(1, keepdim=True), linear)  # of the white point
    edge = 6 / 29
    x, y, z = torch.where(ratios > edge**3, ratios ** (1 / 3), ratios / (3 * edge**2) + 4 / 29)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _check_size(name: str, picture: Tensor) -> None:
    if min(picture.shape[1:]) < _WINDOW:
        raise ZitMergeError(
            f"the metric {name} needs {_WINDOW} pixels each way, a picture has {_size(picture)}: render larger ones"
        )


def _luma(picture: Tensor) -> Tensor:
    """(1, 1, h, w)."""
    red, green, blue = picture
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[None, None]


def _views(luma: Tensor) -> Iterator[Tensor]:
    """The picture with a shorter side of about _SIDE or as small as it is, then half as large each down to _COARSEST."""
    from torch.nn.functional import avg_pool2d

    luma = avg_pool2d(luma, max(1, round(min(luma.shape[2:]) / _SIDE))).double()  # variances are differences of squares
    yield luma
    while min(luma.shape[2:]) >= 2 * _COARSEST:
        luma = avg_pool2d(luma, 2)
        yield luma


def _ssim(p: Tensor, r: Tensor) -> float:
    """Mean SSIM of two (1, 1, h, w), over the places where the window lies in the picture."""
    mean_p, mean_r = _blurred(p), _blurred(r)
    var_p, var_r = _blurred(p * p) - mean_p * mean_p, _blurred(r * r) - mean_r * mean_r
    covariance = _blurred(p * r) - mean_p * mean_r
    light = (2 * mean_p * mean_r + _C1) / (mean_p * mean_p + mean_r * mean_r + _C1)
    return float((light * (2 * covariance + _C2) / (var_p + var_r + _C2)).mean())


def _blurred(luma: Tensor) -> Tensor:
    """(1, 1, h - 10, w - 10): the Gaussian window's mean at every place where it lies in the picture."""
    import torch
    from torch.nn.functional import conv2d

    steps = torch.arange(_WINDOW, dtype=luma.dtype) - _WINDOW // 2
    kernel = torch.exp(-(steps**2) / (2 * _SIGMA**2))
    kernel = kernel / kernel.sum()
    return conv2d(conv2d(luma, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


def _high_pass(luma: Tensor) -> Tensor:
    edge = _WINDOW // 2
    return (luma[..., edge:-edge, edge:-edge] - _blurred(luma)).abs()


def _wasserstein(x: Tensor, y: Tensor) -> float:
    """Of two sets of equally many values: the mean distance of the k-th smallest of one from the k-th smallest of the other."""
    import numpy as np

    one, other = (np.sort(values.numpy(), axis=None) for values in (x, y))  # many times as fast as torch's
    return float(np.abs(one - other).mean(dtype=np.float64))


def _size(picture: Tensor) -> str:
    return f"{picture.shape[2]} x {picture.shape[1]}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
