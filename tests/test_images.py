"""One image: what every kind of file becomes, and why a bad one is none."""

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from potstill.config import Decode
from potstill.data.images import REASONS, BadImage, decode_image, decode_with_size

RNG = np.random.default_rng(0)


def encode(im, format="PNG", **options):
    buffer = io.BytesIO()
    im.save(buffer, format, **options)
    return buffer.getvalue()


def native(px, **options):
    return Decode(image_px=px, fit="native", **options)


def png_chunks(width, height, depth, color_type, rows):
    """A PNG by hand: PIL writes no 16-bit colour and no image that is too large."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def photo(width=320, height=240):
    """Smooth content, so that resampling can be compared."""
    y, x = np.mgrid[:height, :width]
    planes = [
        127 + 120 * np.sin(x / 17),
        127 + 120 * np.cos(y / 23),
        (x + y) * 255 / (width + height),
    ]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


# --------------------------------------------------------------------------------------- conversions
def test_rgb_and_grey_are_kept_as_they_are():
    rgb = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    assert np.array_equal(decode_image(encode(Image.fromarray(rgb)), native(8)), rgb)
    grey = rgb[..., 0]
    assert np.array_equal(
        decode_image(encode(Image.fromarray(grey)), native(8)), np.repeat(grey[..., None], 3, 2)
    )


def test_one_bit_images_become_black_and_white():
    bits = RNG.integers(0, 2, (8, 8)).astype(bool)
    pixels = decode_image(encode(Image.fromarray(bits)), native(8))
    assert np.array_equal(pixels, np.repeat(bits[..., None], 3, 2) * np.uint8(255))


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_16_bit_grey_is_scaled_not_clipped(byte_order):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    if byte_order == "<":
        data = encode(Image.fromarray(values))
    else:
        data = encode(Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes()), "TIFF")
    assert np.array_equal(decode_image(data, native(16))[..., 0].ravel(), np.arange(256))


def test_16_bit_colour_is_scaled_not_clipped():
    rows = b"".join(
        b"\0" + (np.arange(48, dtype=np.uint16) * 257 + 1000 * r).astype(">u2").tobytes()
        for r in range(4)
    )
    data = png_chunks(16, 4, 16, 2, rows)
    pixels = decode_image(data, native(4)).astype(int)
    values = np.stack([np.arange(48).reshape(16, 3)[6:10] * 257 + 1000 * r for r in range(4)])
    assert abs(pixels - values / 257).max() <= 1


def test_cmyk_jpegs_come_out_in_their_colours():
    inks = {(0, 255, 255, 0): (255, 0, 0), (255, 0, 255, 0): (0, 255, 0), (0, 0, 0, 255): (0, 0, 0)}
    for ink, colour in inks.items():
        data = encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
        assert abs(decode_image(data, native(16)).astype(int) - colour).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L+key"])
def test_transparency_is_laid_on_white(mode):
    if mode == "RGBA":
        im = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
        im.putpixel((0, 0), (1, 2, 3, 0))
        expected = [255 - 128 / 255 * 55, 255 * (1 - 128 / 255), 255 * (1 - 128 / 255)]
        data = encode(im)
    elif mode == "LA":
        im = Image.new("LA", (4, 4), (100, 255))
        im.putpixel((0, 0), (7, 0))
        expected, data = [100, 100, 100], encode(im)
    elif mode == "P":
        im = Image.new("P", (4, 4), 1)
        im.putpalette([0, 0, 0, 10, 20, 30])
        im.putpixel((0, 0), 0)
        expected, data = [10, 20, 30], encode(im, transparency=0)
    else:
        im = Image.new("L", (4, 4), 50)
        im.putpixel((0, 0), 9)
        expected, data = [50, 50, 50], encode(im, transparency=9)
    pixels = decode_image(data, native(4))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert abs(pixels[2, 2] - np.array(expected)).max() <= 1


def test_palette_without_transparency():
    im = Image.new("P", (4, 4), 1)
    im.putpalette([0, 0, 0, 10, 20, 30])
    assert (decode_image(encode(im), native(4)) == [10, 20, 30]).all()


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(data, native(8)) == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    im = Image.fromarray(RNG.integers(0, 256, (4, 6, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(im, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    pixels, size = decode_with_size(data, native(6))
    assert size == (upright.shape[1], upright.shape[0])
    top, left = (6 - upright.shape[0]) // 2, (6 - upright.shape[1]) // 2
    assert np.array_equal(
        pixels[top : top + upright.shape[0], left : left + upright.shape[1]], upright
    )


def test_orientation_6_by_hand():
    # the camera lay on its side: the top of what is seen is the left of what is stored
    stored = np.zeros((2, 2, 3), np.uint8)
    stored[1, 0] = 255  # bottom left -> top left after a quarter turn clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    for fit in ("native", "squash"):
        pixels = decode_image(
            encode(Image.fromarray(stored), exif=exif), Decode(image_px=2, fit=fit)
        )
        assert pixels[0, 0].tolist() == [255, 255, 255]
        assert pixels.sum() == 255 * 3


def test_a_broken_exif_block_does_not_cost_the_image():
    im = photo(32, 32)
    data = encode(im, "JPEG", exif=b"Exif\0\0 this is no TIFF header")
    assert decode_image(data, native(32)).shape == (32, 32, 3)


# ---------------------------------------------------------------------------------------------- fits
def test_native_is_pixel_exact():
    rgb = RNG.integers(0, 256, (9, 12, 3), np.uint8)
    pixels = decode_image(encode(Image.fromarray(rgb)), native(10))
    assert np.array_equal(pixels[0:9], rgb[:, 1:11])
    assert not pixels[9].any()


def test_native_reads_a_jpeg_at_its_full_size():
    data = encode(photo(1200, 1000), "JPEG", quality=90)
    full = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data, native(64)), full[468:532, 568:632])


def test_shorter_side_keeps_the_centre():
    im = Image.new("RGB", (40, 20), "red")
    im.paste((0, 255, 0), (10, 0, 30, 20))
    pixels = decode_image(encode(im), Decode(image_px=20, fit="shorter_side"))
    assert (pixels == [0, 255, 0]).all()
    small = decode_image(encode(im), Decode(image_px=8, fit="shorter_side"))
    assert (small[:, 2:-2] == [0, 255, 0]).all()


def test_squash_takes_all_of_it():
    im = Image.new("RGB", (40, 20), "red")
    im.paste((0, 0, 255), (20, 0, 40, 20))
    pixels = decode_image(encode(im), Decode(image_px=10, fit="squash"))
    assert (pixels[:, :4] == [255, 0, 0]).all()
    assert (pixels[:, 6:] == [0, 0, 255]).all()


def test_pad_fills_with_black():
    pixels = decode_image(encode(Image.new("RGB", (40, 20), "red")), Decode(image_px=20, fit="pad"))
    assert (pixels[5:15] == [255, 0, 0]).all()
    assert not pixels[:5].any()
    assert not pixels[15:].any()


@pytest.mark.parametrize("fit", ["shorter_side", "squash", "pad", "native"])
@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1), (3, 500)])
def test_extreme_shapes_give_the_same_square(fit, size):
    data = encode(Image.new("RGB", size, "red"))
    pixels, original = decode_with_size(data, Decode(image_px=32, fit=fit))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert original == size


@pytest.mark.parametrize("fit", ["shorter_side", "squash", "pad"])
def test_the_fast_way_down_is_close_to_the_slow_one(fit):
    im = photo(1600, 1200)
    slow = decode_image(encode(im), Decode(image_px=64, fit=fit))
    fast = decode_image(encode(im, "JPEG", quality=95), Decode(image_px=64, fit=fit))
    assert abs(slow.astype(int) - fast).mean() < 1.0


# ----------------------------------------------------------------------------------------------- bad
def bad(data, decode=None):
    with pytest.raises(BadImage) as caught:
        decode_image(data, decode or Decode(image_px=32))
    assert caught.value.reason in REASONS
    return caught.value.reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated(format, share):
    data = encode(photo(), format)
    assert bad(data[: int(share * len(data))]) == "truncated"


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_cut_in_the_header(format):
    assert bad(encode(photo(), format)[:24]) == "truncated"


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_download_that_was_never_filled_in(format):
    data = encode(photo(), format)
    half = len(data) // 2
    bad(data[:half] + b"\0" * (len(data) - half))


def test_empty_and_no_image():
    assert bad(b"") == "empty"
    assert bad(b"hello, this is text") == "not an image"
    assert bad(b"\0" * 5000) == "not an image"
    assert bad(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image"


def test_pixels_without_a_range_are_not_guessed():
    assert bad(encode(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF")) == "unreadable"
    assert bad(encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")) == "unreadable"


def test_the_pixel_limit_is_ours_alone():
    bomb = png_chunks(30_000, 30_000, 8, 0, b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bad(bomb) == "over the pixel limit"
        # PIL alone would refuse this many
        assert bad(bomb, Decode(image_px=8, max_megapixels=1000.0)) == "truncated"
    assert (
        bad(encode(photo(101, 100)), Decode(image_px=8, max_megapixels=0.01))
        == "over the pixel limit"
    )
    assert decode_image(encode(photo(100, 100)), Decode(image_px=8, max_megapixels=0.01)).shape == (
        8,
        8,
        3,
    )


def test_the_reason_travels_between_processes():
    error = pickle.loads(pickle.dumps(BadImage("empty", "0 bytes")))
    assert (error.reason, error.detail) == ("empty", "0 bytes")
