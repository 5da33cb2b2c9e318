"""One image file to one crop: depth, transparency, orientation, and the centre crop of ADM (guided-diffusion)."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from dit_fast.data.files import reason, shown
from dit_fast.errors import DataError

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff",
}  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF")  # judged by content, not by suffix
MAX_PIXELS = 1 << 28  # of the image resized for the crop: a strip of 1 x 100000 would take gigabytes
ORIENTATION = 0x0112  # the tag of EXIF and TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339  # tags of TIFF
MIN_IS_WHITE, SEPARATE, SIGNED = 0, 2, 2
GREY_STEPS = {"L;2": 85, "L;4": 17}  # PNG grey of few bits: Pillow spreads the pixels over 0..255, not the colour key


def read_image(path: Path, size: int, exif: bool = True) -> np.ndarray:
    """The crop of an image file, uint8 [size, size, 3]; of several frames the first.

    exif: turn the image as its orientation tag says (damaged EXIF counts as none). Raises DataError naming the file
    when it is no readable image or its range of values is unknown.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            if image.format == "PNG":  # Pillow decodes without looking at the checksums of the pixels
                with Image.open(path, formats=("PNG",)) as checked:
                    checked.verify()
            pixels = to_rgb(image)
            turn = TURNS.get(_orientation(image)) if exif else None
        return center_crop(pixels if turn is None else pixels.transpose(turn), size)
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{shown(path)}: not a readable image (none of {', '.join(FORMATS)}); replace or remove it"
        ) from None
    except Exception as error:  # damaged files raise many kinds
        raise DataError(f"{shown(path)}: not a readable image ({reason(error)}); replace or remove it") from None


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop of ADM (guided-diffusion): uint8 [size, size, 3].

    Halves with a box filter while the shorter side is at least twice `size`, resizes the shorter side to `size`
    (bicubic), cuts the middle. Raises DataError for strips so long that the resized image would not fit in memory.
    """
    image = to_rgb(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise DataError(f"resized for the crop it would be {width} x {height}; crop or remove it")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: transparency on white, grey of more than 8 bits scaled by its range.

    Raises DataError where that range is unknown (32-bit integers, floats). Pillow itself reads 16-bit colour as the
    high byte of each value; its own conversion of 16-bit grey would clip at 255.
    """
    image, key = _eight_bits(image)
    if key is not None:
        image.putalpha(key)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The image with 8 bits a channel, and the opacity (mode L) where Pillow's own colour key would go wrong."""
    # how the file stores its values; gone once they are loaded
    codec, raw = (image.tile[0][0], str(image.tile[0][3])) if isinstance(image, ImageFile) and image.tile else ("", "")
    tags = getattr(image, "tag_v2", {})
    bits, photometric = tags.get(BITS_PER_SAMPLE, (16,)), tags.get(PHOTOMETRIC)
    if tags.get(PLANAR) == SEPARATE and max(bits) > 8 and codec == "raw":  # Pillow takes each byte for a value
        raise DataError("uncompressed channels of more than 8 bits, one after the other; save them interleaved")
    image.load()
    key = image.info.get("transparency")
    if image.mode == "RGB" and key is not None and raw.startswith("RGB;16"):
        raise DataError("16-bit colour with a transparent colour, whose low bits are lost; save it as 8-bit RGBA")
    if image.mode == "L" and raw in GREY_STEPS and key is not None:
        opacity = np.asarray(image) != key * GREY_STEPS[raw]
        image = Image.fromarray(np.asarray(image))
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        values = np.asarray(image)
        opacity = values != key
        largest = (1 << int(bits[0])) - 1  # Pillow scales a PGM's own maximum to 65535
        if values.min() < 0 or values.max() > largest:
            raise DataError(f"has values outside 0..{largest}; save it as 8-bit or full-range 16-bit")
        grey = ((values.astype(np.uint32) * 255 + largest // 2) // largest).astype(np.uint8)
        image = Image.fromarray(255 - grey if photometric == MIN_IS_WHITE else grey)
    elif image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "float"
        raise DataError(f"{kind} values, whose range no one can know; save it as 8-bit or 16-bit PNG")
    elif image.mode == "L" and SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise DataError("signed 8-bit values, whose range no one can know; save it as unsigned 8-bit")
    else:
        return image, None
    return image, Image.fromarray((opacity * 255).astype(np.uint8)) if key is not None else None


def _orientation(image: Image.Image) -> int:
    """1 to 8, 1 where there is none. Reads EXIF of JPEG, PNG, WebP and XMP; Pillow turns TIFF itself on loading."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged block raises many kinds, and says nothing about the pixels
        return 1
