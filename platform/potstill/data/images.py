"""One image: the bytes of a file -> checked RGB uint8, or the reason why not.

What every format becomes: grey, 1-bit and palette images become RGB; 16-bit grey is scaled by 257 (PIL
reads 16-bit colour as its high byte, at most one level away from that); CMYK goes through PIL's plain
conversion, without ICC profiles; transparency is laid on white; an animation gives its first frame; the
EXIF orientation is applied. Resampling is antialiased bicubic.
"""

from __future__ import annotations

import functools
import io
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from potstill.config import Decode

REASONS = ("empty", "truncated", "not an image", "over the pixel limit", "unreadable")

# formats that are pixels and nothing else: PIL would start Ghostscript for an EPS
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "MPO", "PPM", "JPEG2000", "AVIF")
_SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"RIFF",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
_REDUCING_GAP = 2  # a cheap reduction may go down to twice the final size; bicubic does the rest


class BadImage(Exception):
    """A file that gives no image. `reason` is one of REASONS, `detail` says what was seen."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def decode_image(data: bytes, decode: Decode) -> np.ndarray:
    """Decode a file's bytes to uint8 `[px, px, 3]`, px = `decode.image_px`.

    Raises BadImage.
    """
    return decode_with_size(data, decode)[0]


def decode_with_size(data: bytes, decode: Decode) -> tuple[np.ndarray, tuple[int, int]]:
    """As decode_image, and the width and height of the whole image as it is seen, in pixels."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadImage("empty", "0 bytes")
    # the limit is decode.max_megapixels; PIL's own would warn or raise first
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as im:
            width, height = im.size
            if width * height > decode.max_megapixels * 1e6:
                raise BadImage(
                    "over the pixel limit",
                    f"{width}x{height} = {width * height / 1e6:.1f} megapixels, "
                    f"data.decode.max_megapixels={decode.max_megapixels:g}",
                )
            if decode.fit != "native":
                wide, high = _target_size(im.size, decode)
                im.draft(
                    None, (_REDUCING_GAP * wide, _REDUCING_GAP * high)
                )  # a JPEG is decoded at 1/2, 1/4 or 1/8: no effect on others
            if im.format == "PNG":
                _check_png(data)
            im.load()
            orientation = _orientation(im)
            size = (width, height) if orientation < 5 else (height, width)
            return _fit(_to_rgb(im), orientation, decode), size
    except BadImage:
        raise
    except UnidentifiedImageError:
        start = data[:12]
        if not data.startswith(_SIGNATURES):
            raise BadImage("not an image", f"{len(data)} bytes that begin with {start!r}") from None
        reason = "truncated" if _ends_early(data) else "unreadable"
        raise BadImage(reason, f"no readable header in {len(data)} bytes") from None
    except MemoryError:
        raise
    except Exception as error:  # PIL's readers raise whatever a broken file leads them to
        detail = f"{type(error).__name__}: {error}"
        cut = "truncat" in detail.lower() or _ends_early(data)
        raise BadImage("truncated" if cut else "unreadable", detail) from error


def as_file(im: Image.Image) -> bytes:
    """A PNG of pixels in memory, from which `decode_image` makes what it would make of the image's own file.

    That includes the EXIF orientation, which PIL keeps beside the pixels. Raises BadImage.
    """
    from PIL import ExifTags, Image

    buffer = io.BytesIO()
    try:
        im.load()  # PIL opens a file without reading its pixels
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = _orientation(im)
        _to_rgb(im).save(buffer, "PNG", compress_level=1, exif=exif, icc_profile=None)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # as above
        raise BadImage("unreadable", f"{type(error).__name__}: {error}") from error
    return buffer.getvalue()


@functools.cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _ends_early(data: bytes) -> bool:
    if data.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in data
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return data.startswith(b"GIF8") and not data.endswith(b";")


def _check_png(data: bytes) -> None:
    """Compare the pixel data's checksums: PIL does not, and draws noise where a download was never filled in."""
    start = 8
    while start + 12 <= len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        kind, end = data[start + 4 : start + 8], start + 8 + size
        whole = kind == b"IDAT" and end + 4 <= len(data)
        if whole and zlib.crc32(data[start + 4 : end]) != int.from_bytes(
            data[end : end + 4], "big"
        ):
            raise BadImage(
                "unreadable", f"damaged: the checksum of the pixels at byte {start} does not match"
            )
        start = end + 4


def _orientation(im: Image.Image) -> int:
    """EXIF's 1 to 8; from 5 on, width and height change places."""
    from PIL import ExifTags

    try:
        orientation = im.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block is no reason to lose the image
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


def _upright(im: Image.Image, orientation: int) -> Image.Image:
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return im.transpose(turns[orientation]) if orientation in turns else im


def _to_rgb(im: Image.Image) -> Image.Image:
    from PIL import Image

    if im.mode.startswith("I"):
        values = np.asarray(im).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(
                "unreadable",
                f"32-bit integers from {values.min()} to {values.max()} have no known range",
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if im.mode == "F":
        raise BadImage("unreadable", "32-bit floating point pixels have no known range")
    if im.has_transparency_data:
        rgba = im.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return im if im.mode == "RGB" else im.convert("RGB")


def _target_size(size: tuple[int, int], decode: Decode) -> tuple[int, int]:
    """Width and height that the part of the image which is kept is resampled to."""
    px = decode.image_px
    if decode.fit == "pad":
        longer = max(size)
        return max(1, round(px * size[0] / longer)), max(1, round(px * size[1] / longer))
    return px, px


def _fit(im: Image.Image, orientation: int, decode: Decode) -> np.ndarray:
    from PIL import Image

    if decode.fit == "native":
        im = _upright(im, orientation)
    else:
        box = (0, 0, *im.size)
        if decode.fit == "shorter_side":
            # only the centre square is resampled: a strip of 1 x 50,000 pixels must not become 224 x 11,200,000
            side = min(im.size)
            left, top = (im.width - side) // 2, (im.height - side) // 2
            box = (left, top, left + side, top + side)
        im = im.resize(
            _target_size(im.size, decode),
            Image.Resampling.BICUBIC,
            box=box,
            reducing_gap=_REDUCING_GAP,
        )
        im = _upright(im, orientation)  # only now: there is less to turn
    px = decode.image_px
    if im.size != (px, px):  # crop or zero padding, centred
        left, top = int((im.width - px) / 2), int((im.height - px) / 2)  # to zero, not down
        im = im.crop((left, top, left + px, top + px))
    return np.array(im)
