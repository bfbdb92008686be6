"""Image files as RGB pixels of 8 bits.

JPEG files are read by simplejpeg where it is installed, which takes about half of Pillow's time
for the same bits; Pillow reads everything else, and what simplejpeg refuses.

Alpha is dropped, and orientation by EXIF is not looked at, both as torchvision's ImageFolder does.
16-bit grey is scaled to 8 bits; other pixels of more than 8 bits are refused, since what is black
and white in them is not known.
"""

from __future__ import annotations

import io
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

JPEG_START = b"\xff\xd8\xff"
REDUCTIONS = (8, 4, 2)  # of a JPEG file's sides, as its cosine transform gives them cheaply
SIMPLEJPEG_COLORS = ("YCbCr", "Gray", "RGB")


class Picture(Protocol):
    """An image file whose size is known and whose pixels are not read yet."""

    height: int
    width: int

    def pixels(self, reduction: int = 1) -> Tensor:
        """uint8 (H, W, 3), RGB; sides divided by `reduction`, rounded up, where that is cheap.

        Raises OSError or ValueError where the file is damaged.
        """


def opened(content: bytes) -> Picture:
    """The image in a file's `content`. Raises OSError or ValueError for what is no image."""
    if simplejpeg is not None and content.startswith(JPEG_START):
        try:
            return _SimpleJpeg(content)
        except ValueError:  # Pillow reads some that are not quite as they should be
            pass
    return _PillowImage(content)


def decode(content: bytes) -> Tensor:
    """An image file as uint8 (3, H, W), RGB. Raises OSError or ValueError where it is damaged."""
    return opened(content).pixels().permute(2, 0, 1)


def reduction_for(height: int, width: int, size: int) -> int:
    """The largest reduction that leaves a box of `height` and `width` at least `size` pixels."""
    return next((r for r in REDUCTIONS if min(height, width) >= r * size), 1)


class _SimpleJpeg:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.height, self.width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors not in SIMPLEJPEG_COLORS:
            raise ValueError(f"its colours are {colors}")

    def pixels(self, reduction: int = 1) -> Tensor:
        try:
            found = simplejpeg.decode_jpeg(
                self.content,
                min_height=-(-self.height // reduction),
                min_width=-(-self.width // reduction),
                min_factor=reduction,
            )
        except ValueError:
            return _PillowImage(self.content).pixels(reduction)
        return torch.from_numpy(found)


class _PillowImage:
    def __init__(self, content: bytes) -> None:
        from PIL import Image

        # Pillow's search through its formats takes longer than a small image.
        formats = ("WEBP",) if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None
        self.image = _in_plain_words(Image.open, io.BytesIO(content), "r", formats)
        self.width, self.height = self.image.size

    def pixels(self, reduction: int = 1) -> Tensor:
        def read() -> np.ndarray:
            if reduction > 1:  # a JPEG's alone; others are left as they are
                self.image.draft("RGB", (self.width // reduction, self.height // reduction))
            return np.array(_eight_bits(self.image).convert("RGB"))

        return torch.from_numpy(_in_plain_words(read))


def _eight_bits(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(
            f"its pixels are {kind} of 32 bits, expected 8 bits a channel, or 16 in grey; "
            "convert it"
        )
    return image


def _in_plain_words(read: Any, *arguments: Any) -> Any:
    """What `read` returns; Pillow raises many kinds of errors, SyntaxError for a broken PNG."""
    try:
        return read(*arguments)
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(str(error)) from error
