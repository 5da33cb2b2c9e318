"""From an image file to 8-bit RGB: depth, transparency, orientation."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dit_fast.errors import DataError
from dit_fast.preparation.images import read_image

RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def png(depth, color, rows, *chunks):
    """A PNG as a camera or scanner writes it, where Pillow cannot: any depth, any extra chunk."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = len(rows), len(rows[0]) * 8 // depth // {0: 1, 2: 3, 4: 2}[color]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [header, *(chunk(kind, value) for kind, value in chunks), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def big_endian(array):
    return [row.astype(">u2").tobytes() for row in array]


DEEP = {
    "grey16.png": png(16, 0, big_endian(RAMP)),
    "alpha16.png": png(16, 4, big_endian(np.stack([RAMP, np.full_like(RAMP, 65535)], -1).reshape(16, 32))),
    "rgb16.png": png(16, 2, big_endian(np.repeat(RAMP[..., None], 3, 2).reshape(16, 48))),
    "grey16.tif": saved(Image.fromarray(RAMP), "TIFF"),
    "white_is_zero.tif": saved(Image.fromarray(65535 - RAMP), "TIFF", tiffinfo={262: 0}),
    "big_endian.tif": saved(Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "TIFF"),
    "grey16.pgm": b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes(),
    "ten_bits.pgm": b"P5 16 16 1020\n" + (GREY * np.uint16(4)).astype(">u2").tobytes(),
    "grey8.jpg": saved(Image.fromarray(GREY), "JPEG", quality=100, subsampling=0),
    "palette.gif": saved(Image.fromarray(GREY).convert("P"), "GIF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_a_ramp_stays_a_ramp_at_every_depth(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(DEEP[name])
    pixels = read_image(path, 16)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - GREY[..., None]).max() <= 2  # JPEG rounds, Pillow drops the low byte of colour


@pytest.mark.parametrize(
    ("depth", "row", "key", "grey"),
    [
        (16, struct.pack(">3H", 0, 32768, 65535), 32768, (0, 128, 255)),
        (16, struct.pack(">3H", 0, 257, 65535), 65535, (0, 1, 255)),
        (4, bytes([0x05, 0xF0]), 5, (0, 85, 255, 0)),
        (2, bytes([0b00011011]), 2, (0, 85, 170, 255)),
        (8, bytes([0, 7, 255]), 7, (0, 7, 255)),
    ],
)
def test_grey_with_a_transparent_value_is_put_on_white(tmp_path, depth, row, key, grey):
    width, unit = len(grey), {16: 257, 8: 1, 4: 17, 2: 85}[depth]
    path = tmp_path / "key.png"
    path.write_bytes(png(depth, 0, [row] * width, (b"tRNS", struct.pack(">H", key))))
    expected = [255 if value == round(key * (unit if depth < 16 else 1 / unit)) else value for value in grey]
    assert read_image(path, width)[0].tolist() == [[value] * 3 for value in expected]


def tiff(samples, tags):
    """An uncompressed little-endian TIFF, where Pillow cannot write one. tags: number -> values, as 16-bit."""
    tags = {256: [4], 257: [4], 259: [1], **tags, 273: [0], 279: [len(samples)]}
    extra, entries, start = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}H", *values)
        place = struct.pack("<I", start + len(extra)) if len(packed) > 4 else packed.ljust(4, b"\0")
        extra += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, 3, len(values)) + place
    first = struct.pack("<HHII", 273, 4, 1, start + len(extra))
    entries = entries.replace(struct.pack("<HHII", 273, 3, 1, 0), first)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + extra + samples


PLANES = tiff(bytes(96), {258: [16, 16, 16], 262: [2], 277: [3], 284: [2]})
SIGNED = tiff(bytes(range(248, 256)) + bytes(8), {258: [8], 262: [1], 277: [1], 339: [2]})
FLIPPED = bytearray(png(8, 0, [bytes(16)] * 16))
FLIPPED[-13] ^= 16  # the checksum of its pixels, at which Pillow does not look


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("planes.tif", PLANES, "channels of more than 8 bits, one after the other"),
        ("signed.tif", SIGNED, "signed 8-bit values"),
        ("flipped.png", FLIPPED, "not a readable image"),
        ("int.tif", saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "32-bit integer values, whose range"),
        ("float.tif", saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "float values, whose range"),
        ("key.png", png(16, 2, [bytes(6)], (b"tRNS", bytes(6))), "16-bit colour with a transparent colour"),
        ("strip.png", saved(Image.new("L", (20_000, 1)), "PNG"), "would be 5120000 x 256"),
        ("icon.png", saved(Image.new("RGB", (32, 32)), "ICO"), "not a readable image .none of PNG, JPEG"),
    ],
)
def test_what_has_no_known_range_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: .*{message}") as caught:
        read_image(tmp_path / name, 256)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_as_their_tag_says(tmp_path, kind):
    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:16] = 200  # light above, dark below
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its left side: to be turned clockwise
    stored = Image.fromarray(np.rot90(upright).copy())
    path = tmp_path / "photo"
    options = {"tiffinfo": exif} if kind == "TIFF" else {"exif": exif.tobytes()}
    path.write_bytes(saved(stored, kind, **options))
    top, bottom = read_image(path, 16)[[0, -1], 8].astype(int)
    assert abs(top - 200).max() < 4
    assert bottom.max() < 4
    if kind != "TIFF":  # which Pillow itself turns on loading, in ADM's script too
        left, right = read_image(path, 16, exif=False)[8, [0, -1]].astype(int)
        assert abs(left - 200).max() < 4
        assert right.max() < 4


@pytest.mark.parametrize(
    "damage", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12", b"Exif\0\0x"]
)
def test_damaged_exif_counts_as_none(tmp_path, damage):
    plain, path = saved(Image.fromarray(GREY), "JPEG"), tmp_path / "photo.jpg"
    path.write_bytes(plain[:2] + b"\xff\xe1" + struct.pack(">H", len(damage) + 2) + damage + plain[2:])
    turned = read_image(path, 16)
    path.write_bytes(plain)
    assert np.array_equal(turned, read_image(path, 16))
