"""Pictures inside of a page."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

_WIDE = 1.8  # width over height from which a picture takes two columns
_LARGE = 700  # pixels of width from which it takes the whole row, ...
_FEW_LARGE = 4  # ... as long as there are no more than this
_ENLARGED = 400  # pixels of width under which the page shows the pixels, not a blur
_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


def gallery(images: Sequence[tuple[str, Path]]) -> str:
    """HTML of the pictures (caption, file), their files within it. Raises ValueError for one that cannot be read."""
    if not images:
        return ""
    pictures = [(caption, *_read(Path(path))) for caption, path in images]
    few_large = sum(width >= _LARGE for _, _, width, _ in pictures) <= _FEW_LARGE
    figures = []
    for caption, source, width, height in pictures:
        classes = ["pixels"] if width < _ENLARGED else []
        if width >= _LARGE and few_large:
            classes.append("full")
        elif width >= _WIDE * height:
            classes.append("wide")
        text = escape(caption)
        # The check box is the whole of the enlarging: no script.
        figures.append(
            f'<figure class="{" ".join(classes)}" style="--w:{width}px;--a:{width / height:.4f}">'
            f'<label><input type="checkbox" aria-label="Enlarge {text}"><span>'
            f'<img src="{source}" width="{width}" height="{height}" alt="{text}"></span></label>'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return f'<section><h2>Pictures</h2><div class="gallery">{"".join(figures)}</div></section>'


def _read(path: Path) -> tuple[str, int, int]:
    """Data URI, width, height."""
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=list(_MIME)) as image:
            image.load()  # a truncated file fails here, not in the reader's browser
            kind, (width, height) = _MIME[str(image.format)], image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"The picture {path} cannot be put into the report ({error}): give a whole PNG, JPEG, WebP or GIF file."
        ) from error
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}", width, height
