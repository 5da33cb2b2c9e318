"""Image grids: row by row, or one row per class with real images beside samples and class names on the left."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dit_fast import files
from dit_fast.errors import UserError

if TYPE_CHECKING:
    from PIL import Image, ImageFont

INK, PAPER = (59, 64, 72), (255, 255, 255)
CELL = 64  # pixels that a small image is enlarged to
GAP, HEADER, GUTTER = 2, 26, 18
LONGEST_NAME = 40  # characters of a class name


def class_grid(
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]],
    classes: Sequence[int],
    class_names: Sequence[str],
    caption: str = "",
) -> "Image.Image":
    """One row per class of `classes`, one group of columns per entry of `columns`, with its title above; the caption
    below them all.

    columns: title -> (images uint8 [N, H, W, 3], labels int64 [N]); every group shows as many images per class as its
    rarest class has. Images smaller than 64 pixels are enlarged by a whole factor, so single pixels stay visible.
    Long names are cut. Raises UserError when a group has no image of one of the classes, or images of another size than
    the first group, or when a class has no name.
    """
    from PIL import Image, ImageDraw

    unknown = [label for label in classes if not 0 <= label < len(class_names)]
    if unknown:
        raise UserError(f"class {unknown[0]} is not in this data set; labels are 0..{len(class_names) - 1}")
    groups = {title: _by_class(title, images, labels, classes) for title, (images, labels) in columns.items()}
    height, width = next(iter(columns.values()))[0].shape[1:3]
    for title, group in groups.items():
        if group.shape[2:] != (height, width, 3):
            raise UserError(f"'{title}' has images of {group.shape[2:]}, the first group of {(height, width, 3)}")
    factor = _factor(height, width)
    step_x, step_y = width * factor + GAP, height * factor + GAP
    names = [_shown(class_names[label]) for label in classes]
    margin = 16 + max(int(_font(14).getlength(name)) for name in names)
    titles = [_line(title) for title in groups]  # a caption is never cut, though its pictures be few
    widths = [
        max(group.shape[1] * step_x, int(_font(14).getlength(title)) + 1)
        for title, group in zip(titles, groups.values(), strict=True)
    ]
    total = margin + sum(widths) + GUTTER * (len(groups) - 1) + 8
    total = max(total, 16 + int(_font(14).getlength(_line(caption))))
    bottom = HEADER + len(names) * step_y
    canvas = Image.new("RGB", (total, bottom + (HEADER if caption else 8)), PAPER)
    draw, x = ImageDraw.Draw(canvas), margin
    draw.text((8, bottom + HEADER // 2), _line(caption), fill=INK, font=_font(14), anchor="lm")
    for row, name in enumerate(names):
        draw.text((8, HEADER + row * step_y + step_y // 2), name, fill=INK, font=_font(14), anchor="lm")
    for title, width_of_group, group in zip(titles, widths, groups.values(), strict=True):
        draw.text((x, HEADER // 2), title, fill=INK, font=_font(14), anchor="lm")
        for row, column in np.ndindex(group.shape[:2]):
            picture = Image.fromarray(group[row, column])
            picture = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            canvas.paste(picture, (x + column * step_x, HEADER + row * step_y))
        x += width_of_group + GUTTER
    return canvas


def plain_grid(images: np.ndarray) -> "Image.Image":
    """uint8 [N, H, W, 3] row by row, about as wide as high; small images are enlarged as in `class_grid`."""
    from PIL import Image

    count, height, width = images.shape[:3]
    columns = math.ceil(count**0.5)
    rows = math.ceil(count / columns)
    sheet = np.full((rows * columns, height, width, 3), 255, np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    picture = Image.fromarray(sheet.reshape(rows * height, columns * width, 3))
    factor = _factor(height, width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def save_png(image: "Image.Image", path: Path) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        image.save(file, format="PNG")


def _factor(height: int, width: int) -> int:
    return max(CELL // max(height, width), 1)


def _by_class(title: str, images: np.ndarray, labels: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """uint8 [classes, images per class, H, W, 3]."""
    found = [images[labels == label] for label in classes]
    count = min(len(group) for group in found)
    if count == 0:
        missing = [label for label, group in zip(classes, found, strict=True) if not len(group)]
        raise UserError(f"'{title}' has no image of class {missing[0]}; draw samples of every class shown")
    return np.stack([group[:count] for group in found])


def _shown(name: str) -> str:
    """A class name as one line that leaves room for pictures."""
    line = _line(name)
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…"


def _line(text: str) -> str:
    return " ".join(text.encode(errors="replace").decode().split())


def _font(size: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size)
