"""How far a candidate picture is from its reference: PSNR, SSIM, LPIPS.

Images are tensors [H, W, C] or [B, H, W, C] of a floating dtype with values in 0..1 (ComfyUI's IMAGE). Everything is
computed on the CPU in float64, except LPIPS (float32, as its network was trained). All three are *paired* measures:
image i of the candidate is judged against image i of the reference, same prompt and same seed.
"""

import math
import os
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW = 11
_SIGMA = 1.5
# AlexNet's strides and poolings leave nothing of an image narrower than this.
_LPIPS_SMALLEST = 31


class _LpipsUnavailable(Exception):
    """Carries the one-sentence reason."""


def psnr(reference: Tensor, candidate: Tensor, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(data_range^2 / mean squared error); `inf` for identical images.

    A batch gives the mean of its images' values in dB. Images that are identical to their reference have no finite
    value and are left out of that mean (which only lowers it); `inf` if all are identical.
    Raises ValueError for different shapes, a non-floating dtype, or NaN and infinite values.
    """
    return _mean_psnr(_psnr_each(*image_pair(reference, candidate), data_range))


def ssim(reference: Tensor, candidate: Tensor, data_range: float = 1.0) -> float:
    """Structural similarity, at most 1 (identical): the mean SSIM index of Wang, Bovik, Sheikh and Simoncelli,
    "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, section III-B/C.

    11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, per channel, only where the window lies inside the
    image, then the mean over positions, channels and images. A side shorter than 11 pixels shrinks the window to that
    side. Errors as in `psnr`.
    """
    return _mean(_ssim_each(*image_pair(reference, candidate), data_range))


def lpips_unavailable_reason() -> str | None:
    """One sentence on why there is no LPIPS on this machine and what would bring it; None where there is."""
    try:
        _lpips_network()
    except _LpipsUnavailable as reason:
        return str(reason)
    return None


def compare(reference: Tensor, candidate: Tensor) -> dict[str, Any]:
    """All metrics of two image batches of the same shape, data range 1.

    Returns `psnr_db`, `ssim`: means as the single functions give them. `lpips`: mean learned perceptual distance (Zhang
    et al. 2018, version 0.1, AlexNet), never downloaded; None where `lpips_unavailable_reason` has a reason, and under
    31 pixels on a side, which the network cannot take. `images`: their number. `identical`: how many are equal to
    their reference to the last bit (left out of the mean of `psnr_db`). `per_image`: a list with `psnr_db`, `ssim`,
    `lpips` of each. `psnr_db` is `inf` for identical images, which strict JSON cannot hold. Errors as in `psnr`.
    """
    first, second = image_pair(reference, candidate)
    psnrs = _psnr_each(first, second, 1.0)
    ssims = _ssim_each(first, second, 1.0)
    distances = _lpips_each(first, second)
    per_image = [
        {"psnr_db": psnrs[i], "ssim": ssims[i], "lpips": None if distances is None else distances[i]}
        for i in range(len(psnrs))
    ]
    return {
        "psnr_db": _mean_psnr(psnrs),
        "ssim": _mean(ssims),
        "lpips": None if distances is None else _mean(distances),
        "images": len(psnrs),
        "identical": sum(map(math.isinf, psnrs)),
        "per_image": per_image,
    }


def image_pair(reference: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Both as checked [B, H, W, C] CPU tensors of their own dtype; ValueError as in `psnr`."""
    first, second = _batch("reference", reference), _batch("candidate", candidate)
    if first.shape != second.shape:
        raise ValueError(
            f"The reference is {_describe(first)}, the candidate {_describe(second)}: give as many images of the same "
            f"size and channels on both sides."
        )
    return first, second


def _batch(name: str, image: Tensor) -> Tensor:
    if image.ndim not in (3, 4) or image.numel() == 0:
        raise ValueError(
            f"The {name} has shape {list(image.shape)}: give images as [height, width, channels] or "
            f"[batch, height, width, channels], none of them 0."
        )
    if not image.is_floating_point():
        raise ValueError(f"The {name} is of type {image.dtype}: give floating-point images with values in 0..1.")
    image = image.detach().to("cpu")
    if image.ndim == 3:
        image = image.unsqueeze(0)
    for index, one in enumerate(image):
        if not torch.isfinite(one).all():
            raise ValueError(
                f"Image {index} of the {name} holds NaN or infinite values: the sampling that made it has failed, "
                f"so there is nothing to compare."
            )
    return image


def _describe(image: Tensor) -> str:
    count, height, width, channels = image.shape
    return (
        f"{count} {'image' if count == 1 else 'images'} of {width} x {height} pixels with {channels} "
        f"{'channel' if channels == 1 else 'channels'}"
    )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_psnr(values: list[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return _mean(finite) if finite else math.inf


def _check_range(data_range: float) -> None:
    if not (data_range > 0 and math.isfinite(data_range)):
        raise ValueError(f"data_range is {data_range}: give the distance from black to white, 1.0 for images in 0..1.")


def _psnr_each(reference: Tensor, candidate: Tensor, data_range: float) -> list[float]:
    _check_range(data_range)
    values = []
    for a, b in zip(reference, candidate, strict=True):
        mse = (a.double() - b.double()).square().mean().item()
        values.append(math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse))
    return values


def _ssim_each(reference: Tensor, candidate: Tensor, data_range: float) -> list[float]:
    _check_range(data_range)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for one, other in zip(reference, candidate, strict=True):  # one at a time: five float64 maps of each
        a, b = one.double().movedim(-1, 0), other.double().movedim(-1, 0)
        # The index needs local means, variances and the covariance: E[xy] - E[x] E[y].
        mean_a, mean_b, aa, bb, ab = _blur(torch.stack([a, b, a * a, b * b, a * b]))
        aa, bb, ab = aa - mean_a * mean_a, bb - mean_b * mean_b, ab - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
        structure = (2 * ab + c2) / (aa + bb + c2)
        values.append((luminance * structure).mean().item())
    return values


def _blur(maps: Tensor) -> Tensor:
    """Gaussian-weighted local mean over the last two axes, valid positions only; [..., H, W] -> [..., H', W']."""
    for axis in (-2, -1):
        size = min(_WINDOW, maps.shape[axis])
        offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        weights = F.normalize(torch.exp(-offsets.square() / (2 * _SIGMA**2)), p=1, dim=0).tolist()
        valid = maps.shape[axis] - size + 1
        total = weights[0] * maps.narrow(axis, 0, valid)
        for start, weight in enumerate(weights[1:], 1):
            total = total.add_(maps.narrow(axis, start, valid), alpha=weight)
        maps = total
    return maps


def _lpips_each(reference: Tensor, candidate: Tensor) -> list[float] | None:
    if min(reference.shape[1:3]) < _LPIPS_SMALLEST:
        return None
    try:
        network = _lpips_network()
    except _LpipsUnavailable:
        return None
    values = []
    with torch.no_grad():
        for a, b in zip(reference, candidate, strict=True):
            values.append(float(network(_lpips_input(a), _lpips_input(b)).item()))
    return values


def _lpips_input(image: Tensor) -> Tensor:
    colour = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(-1, -1, 3)
    return colour.float().movedim(-1, 0).unsqueeze(0) * 2 - 1  # the network wants -1..1


@lru_cache(maxsize=1)  # an exception is not cached: weights that arrive later are found
def _lpips_network() -> torch.nn.Module:
    try:
        import lpips
        from torchvision.models import AlexNet_Weights
    except ModuleNotFoundError as error:
        raise _LpipsUnavailable(
            f"LPIPS is not measured because the Python package {error.name!r} is not installed; "
            f"install lpips and torchvision to have it."
        ) from None
    except Exception as error:  # an optional package that is broken must not cost the other metrics
        raise _LpipsUnavailable(
            f"LPIPS is not measured because lpips or torchvision does not import here ({_first_line(error)}); "
            f"install versions that match torch {torch.__version__}."
        ) from None
    url = AlexNet_Weights.IMAGENET1K_V1.url
    file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    # lpips would download a missing file; a report must never reach out to the network.
    if not os.path.isfile(file):
        raise _LpipsUnavailable(
            f"LPIPS is not measured because AlexNet's weights are not on this machine; put {url} at {file} to have it."
        )
    try:
        return lpips.LPIPS(net="alex", version="0.1", verbose=False).eval()
    except Exception as error:
        raise _LpipsUnavailable(
            f"LPIPS is not measured because its network cannot be built ({_first_line(error)}); "
            f"if {file} is damaged, replace it from {url}."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
