"""Pictures beside each other, and PNG files. Images are float tensors with values in 0..1, channels last."""

import io
import os
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..atomic import write_bytes
from .metrics import image_pair

_BACKGROUND = 0.16
_CAPTION_INK = (235, 235, 235)


def side_by_side(
    reference: Tensor, candidate: Tensor, amplify: float = 8.0, captions: Sequence[str] | None = None
) -> Tensor:
    """Reference | candidate | absolute difference times `amplify`, clipped to 0..1.

    Takes two [B, H, W, C] (or [H, W, C]) of the same shape with C of 1, 3 or 4 (alpha is dropped); returns float32
    [B, H, 3 W + 2 gap, 3] on the CPU, gap as `gap(W)`. With `captions` (three texts) a strip with them is set on top,
    which adds to the height (what is not ASCII is replaced); without PIL the strip is left out.
    Raises ValueError as `metrics.psnr` does, for another number of channels or captions, and for `amplify` <= 0.
    """
    if not amplify > 0:
        raise ValueError(f"amplify is {amplify}: give a factor above 0 for the difference, such as 8.")
    first, second = (_rgb(image) for image in image_pair(reference, candidate))
    count, height, width, _ = first.shape
    space = first.new_full((count, height, gap(width), 3), _BACKGROUND)
    difference = ((second - first).abs() * amplify).clamp(0, 1)
    sheet = torch.cat([first, space, second, space, difference], dim=2)
    if captions is None:
        return sheet
    if len(captions) != 3:
        raise ValueError(f"{len(captions)} captions for the three pictures of a sheet: give one for each.")
    strip = _caption_strip(captions, width, gap(width))
    return sheet if strip is None else torch.cat([strip.expand(count, -1, -1, -1), sheet], dim=1)


def grid(images: Tensor, columns: int) -> Tensor:
    """Lay [B, H, W, C] out in rows of `columns`, in order; float32 [H', W', 3], gap as `gap(W)` between neighbours.

    A last row that is not full is filled with the background. Raises ValueError for another shape or columns < 1.
    """
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"The images have shape {list(images.shape)}: give [batch, height, width, channels].")
    if columns < 1:
        raise ValueError(f"A grid of {columns} columns holds nothing: give at least 1.")
    images = _rgb(images.detach().to("cpu"))
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    step_y, step_x = height + gap(width), width + gap(width)
    out = images.new_full((rows * step_y - gap(width), columns * step_x - gap(width), 3), _BACKGROUND)
    for index, image in enumerate(images):
        top, left = index // columns * step_y, index % columns * step_x
        out[top : top + height, left : left + width] = image
    return out


def gap(width: int) -> int:
    """Pixels between two pictures of this width."""
    return max(2, width // 64)


def save_png(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write one image [H, W, C] (or [1, H, W, C]), C of 1, 3 or 4, as an 8-bit RGB PNG.

    Values are clipped to 0..1 and rounded to the nearest level. The file is written whole or not at all.
    Raises ValueError for another shape or NaN values, OSError where the file cannot be written.
    """
    from PIL import Image

    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.numel() == 0:
        raise ValueError(f"{path} cannot be written from shape {list(image.shape)}: give one image, [H, W, channels].")
    image = _rgb(image.detach().to("cpu"))
    if image.isnan().any():
        raise ValueError(f"{path} was not written because the image holds NaN values: the sampling has failed.")
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    buffer = io.BytesIO()
    Image.fromarray(levels.numpy()).save(buffer, format="PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def _rgb(image: Tensor) -> Tensor:
    channels = image.shape[-1]
    if channels not in (1, 3, 4) or not image.is_floating_point():
        raise ValueError(
            f"An image of {channels} channels and type {image.dtype} cannot be drawn: give floating-point grey, RGB or "
            f"RGBA with values in 0..1."
        )
    return image.float().expand(*image.shape[:-1], 3) if channels == 1 else image.float()[..., :3]


def _caption_strip(captions: Sequence[str], width: int, space: int) -> Tensor | None:
    """[height, 3 width + 2 space, 3]; the largest type up to 1/16 of the width in which all three texts fit."""
    try:
        import numpy
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        return None
    texts = [_ascii(text) for text in captions]
    try:
        fonts: list[Any] = [ImageFont.load_default(size) for size in range(max(9, width // 16), 8, -1)]
    except (TypeError, ImportError, OSError):  # an old or bare PIL has only its bitmap font
        fonts = [ImageFont.load_default()]
    font = next((f for f in fonts if all(f.getlength(text) <= width for text in texts)), fonts[-1])
    left, top, _, bottom = font.getbbox("Ag|")
    margin = max(2, (bottom - top) // 3)
    level = round(_BACKGROUND * 255)
    image = Image.new("RGB", (3 * width + 2 * space, int(bottom - top) + 2 * margin), (level, level, level))
    draw = ImageDraw.Draw(image)
    for index, text in enumerate(texts):
        while text and font.getlength(text) > width:
            text = text[:-2] + "." if len(text) > 2 else ""
        x = index * (width + space) + (width - font.getlength(text)) / 2
        draw.text((x - left, margin - top), text, font=font, fill=_CAPTION_INK)
    return torch.from_numpy(numpy.asarray(image).copy()).float() / 255


def _ascii(text: str) -> str:
    """One line with what PIL's own font can draw."""
    text = " ".join(text.split()).translate(str.maketrans("×–—−", "x---"))
    return unicodedata.normalize("NFKD", text).encode("ascii", "replace").decode("ascii")
