"""What the adversarial loss does in finished runs of pix2pix_color.py.

    python tests/measure/colour.py runs/colour-gan runs/colour-ebgan ...
    python tests/measure/colour.py runs/colour-* --picture columns.png
    python tests/measure/colour.py runs/colour-* --picture columns.png --photos old/*.jpg

The first prints a table. ratio compares two gradients that G's weights get, at the end of the run
and over eight batches: the norm of that of the weighted adversarial loss, divided by the norm of
that of the distances (l1 and l2). If it is far below 1, the adversarial loss hardly matters. The
other columns are means of the last ten rows of losses.csv.

The others draw a picture, as Fabbri's Fig. 6: a row for each photo, with the grey photo, then one
column for each run, then the photo itself. The photos are --rows of the 64 images that the first
run was never trained on, evenly spaced, or those of --photos.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import pix2pix_color as pix  # noqa: E402

CPU = torch.device("cpu")


def norm(loss, net):
    gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    return sum(gradient.square().sum() for gradient in gradients).sqrt().item()


def ratio(args, images):
    """Of the two gradients; G and D are in train mode, as in a training step."""
    G = pix.Generator(args.size, args.width).to(args.device)
    D = pix.Autoencoder if args.adversarial == "ebgan" else pix.Discriminator
    D = D(args.width).to(args.device)
    G.load_state_dict(args.checkpoint["state"]["G"])
    D.load_state_dict(args.checkpoint["state"]["D"])
    torch.manual_seed(0)
    sums = [0, 0]
    for _ in range(8):
        x, y = pix.sample_colours(images, args.batch, args.device)
        fake = G(x)
        loss_A = pix.adversarial_loss(D(x, fake), args.adversarial)
        losses = [pix.g_loss(loss_A, fake - y, *weights)
                  for weights in ((args.adversarial_weight, 0, 0), (0, args.l1, args.l2))]
        sums = [total + norm(loss, G) for total, loss in zip(sums, losses)]
    return sums[0] / sums[1]


def print_table(runs, root):
    names = "run --adversarial weight --l1 --l2 steps ratio L1/grey PSNR chroma".split()
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for args in runs:
        images = pix.load_images(args.data, args.size, root).images
        rows = args.checkpoint["rows"][-10:]
        means = [sum(row[name] for row in rows) / len(rows)
                 for name in ("L1/grey", "PSNR", "chroma")]
        print(f"| {Path(args.out).name} | {args.adversarial} | {args.adversarial_weight:g} | "
              f"{args.l1:g} | {args.l2:g} | {args.checkpoint['step']:,} | "
              f"{ratio(args, images):.3g} | "
              + " | ".join(f"{mean:.2f}" for mean in means) + " |", flush=True)


def grey(x):
    """In place of G: no colour at all."""
    return torch.cat([0 * x, 0 * x], 1)


@torch.no_grad()
def draw_columns(runs, photos, side=128):
    """-> the picture; every column is `side` pixels wide, and a photo keeps its shape."""
    columns = [("grey", grey, 64)]
    for args in runs:
        G = pix.Generator(args.size, args.width).eval()
        G.load_state_dict(args.checkpoint["state"]["G"])
        columns.append((Path(args.out).name, G, args.size))
    heights = [round(side * photo.height / photo.width) for photo in photos]
    sheet = Image.new("RGB", ((side + 2) * (len(columns) + 1), 16 + sum(heights) + 2 * len(photos)),
                      "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate([*(name for name, _, _ in columns), "true"]):
        pen.text(((side + 2) * column + 2, 2), name, "black")
    top = 16
    for photo, height in zip(photos, heights):
        if photo.width > side:
            photo = photo.resize((side, height), Image.LANCZOS)
        row = [*(pix.colour_photo(photo, G, size, CPU) for _, G, size in columns), photo]
        for column, image in enumerate(row):
            sheet.paste(image.resize((side, height), Image.BICUBIC), ((side + 2) * column, top))
        top += height + 2
    return sheet


def held_out(args, rows):
    images = args.checkpoint["data"][0]  # the first 64, which no run is trained on
    chosen = np.linspace(0, len(images) - 1, rows).round().astype(int)
    return [Image.fromarray(images[i].permute(1, 2, 0).numpy()) for i in chosen]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--root", default="data")
    parser.add_argument("--picture", metavar="FILE", help="draw it, in place of the table")
    parser.add_argument("--photos", nargs="+", metavar="PHOTO")
    parser.add_argument("--rows", type=int, default=8)
    asked = parser.parse_args()
    runs = [pix.parse_arguments(["--out", out, "--generate", "1"]) for out in asked.runs]
    if asked.picture:
        photos = [pix.open_image(file) for file in asked.photos or []]
        draw_columns(runs, photos or held_out(runs[0], asked.rows)).save(asked.picture)
    else:
        print_table(runs, asked.root)


if __name__ == "__main__":
    main()
