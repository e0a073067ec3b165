"""Draws one picture of several runs, such as README.md begins with: a row of images for each.

    python tests/measure/sheet.py first.png dcgan=runs/dcgan-celeba "egan: c from 0 to 2=runs/egan"

Each argument is NAME=RUN or NAME=PICTURE, in which a name may go on in small print after a colon. A
run stands for the last picture in its folder samples. Nothing is picked: the row has the --images
first images of that picture. Its rows follow each other if it has eight columns. Otherwise a row
means something (cgan: a class in each column; egan: c rises; pix2pix_color: grey, coloured, true),
and the first row alone is shown. A picture that is no such grid is one image.

The file has at most --kilobytes. If it would have more, a .png gets 256 colours, and then images
become smaller until it fits. Its size is printed. A .jpg suits photographs: they stay larger.
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def cut(picture):
    """A grid as torchvision's save_image() makes it, with 2 black pixels between -> rows."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    for side in (1024, 512, 256, 128, 64, 32, 28, 16):
        lines = [*range(0, width, side + 2)], [*range(0, height, side + 2)]
        fits = (width - 2) % (side + 2) == 0 == (height - 2) % (side + 2)
        if fits and not pixels[:, lines[0]].any() and not pixels[lines[1]].any():
            return [[picture.crop((x + 2, y + 2, x + 2 + side, y + 2 + side))
                     for x in lines[0][:-1]] for y in lines[1][:-1]]
    return [[picture]]


def read_row(place, images):
    path = Path(place)
    if path.is_dir():
        path = max(path.glob("samples/[0-9]*.png"))
    rows = cut(Image.open(path).convert("RGB"))
    return (sum(rows, []) if len(rows[0]) == 8 else rows[0])[:images]


def scale(image, side):
    """To a height of `side`: pixels are repeated if that is a whole number of times."""
    sharp = side % image.height == 0
    size = round(side * image.width / image.height), side
    return image.resize(size, Image.NEAREST if sharp else Image.LANCZOS)


def draw_sheet(rows, side, margin):
    """[(name, images)] -> the picture, with the names in its left margin."""
    drawn = [(name, [scale(image, side) for image in images]) for name, images in rows]
    width = margin + max(sum(image.width + 2 for image in images) for _, images in drawn)
    sheet = Image.new("RGB", (width, (side + 4) * len(rows) - 4), "white")
    pen = ImageDraw.Draw(sheet)
    for top, (text, images) in zip(range(0, sheet.height, side + 4), drawn):
        name, _, more = text.partition(":")
        pen.text((0, top + 4), name, "black", ImageFont.load_default(14))
        lines = textwrap.wrap(more.strip(), margin // 6)
        pen.text((0, top + 24), "\n".join(lines), "dimgrey", ImageFont.load_default(11))
        left = margin
        for image in images:
            sheet.paste(image, (left, top))
            left += image.width + 2
    return sheet.crop((0, 0, sheet.width - 2, sheet.height))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="what to write, a .png or .jpg")
    parser.add_argument("rows", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--images", type=int, default=12, help="in a row (12)")
    parser.add_argument("--side", type=int, default=64, help="height of an image (64)")
    parser.add_argument("--margin", type=int, default=120, help="width of the names (120)")
    parser.add_argument("--kilobytes", type=int, default=150)
    asked = parser.parse_args()
    rows = [row.rpartition("=") for row in asked.rows]
    rows = [(name, read_row(place, asked.images)) for name, _, place in rows]
    for side in range(asked.side, 15, -4):
        sheet = draw_sheet(rows, side, asked.margin)
        fewer = [] if asked.file.endswith("jpg") else [sheet.quantize(256, dither=0)]
        for image in [sheet, *fewer]:
            image.save(asked.file, optimize=True, quality=90)
            size = Path(asked.file).stat().st_size / 1000
            if size <= asked.kilobytes:
                return print(f"{asked.file}: {image.width} x {image.height} pixels, images of "
                             f"{side}, {size:.0f} kB, {image.mode}")


if __name__ == "__main__":
    main()
