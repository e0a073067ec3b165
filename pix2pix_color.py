"""pix2pix: Isola, Zhu, Zhou and Efros, "Image-to-Image Translation with Conditional Adversarial
Networks", 2016, arXiv 1611.07004; for colouring photos, with four adversarial losses to compare, as
in Fabbri (2017).

G sees the lightness x of a photo and predicts its colours y: the channel L of CIELAB, and a and b.
A blue shirt and a red one can look alike in grey. To be near the truth on average, G would paint
both in the brown between them. D, which sees x and y together, knows brown shirts to be rare: it
makes G decide.

    L_G = gan * A_G + l1 * E[|y - y'|] + l2 * E[(y - y')^2]      y' = G(x); Eq. 4, l2 is Fabbri's

            L_D                                                A_G, by --adversarial
    gan     -1/2 E[log D(x, y)] - 1/2 E[log(1 - D(x, y'))]     -E[log D(x, y')]          Eq. 1
    lsgan   1/2 E[(D(x, y) - 1)^2] + 1/2 E[D(x, y')^2]         1/2 E[(D(x, y') - 1)^2]   1611.04076
    wgan    E[D(x, y')] - E[D(x, y)]                           -E[D(x, y')]              1701.07875
    ebgan   E[D(x, y)] + E[max(0, m - D(x, y'))]               E[D(x, y')]               1609.03126

Changes from dcgan.py:
  - G is a U-Net, from image to image: every layer on the way up also sees the map of its size from
    the way down (Sec. 3.2.1). Its only noise is dropout (Sec. 3.1); there is no z
  - D sees x and y. It judges patches of 70x70 pixels, each by itself (Sec. 3.2.2); for ebgan it is
    an autoencoder, and its error the energy of the image
  - the losses above: L_D is halved (Sec. 3.3), L_G has the distances to the true colours too.
    WGAN comes with RMSprop, 5e-5, several D steps and clipped weights (--critic, --clip)
  - layers without BatchNorm have a bias, the autoencoder's others too; no --g-steps; batches of 16,
    8 epochs
  - RGB becomes Lab and back; a training image is mirrored half of the time
  - at most 64 images are held out, evenly spread, and never trained on. Pictures show them in
    triples, grey, coloured, true; --generate N writes the first N of them, coloured
  - --colorize FILE... colours photos of any size: they keep their size and their lightness
  - losses.csv: D(y) and D(G(x)) are D's mean outputs. On the held-out images, L1 is the mean error
    of a and b in units of Lab; L1/grey is L1 divided by that of no colour at all; PSNR is in dB,
    from the mean square error of RGB over all of them; chroma is the mean strength of the colours,
    sqrt(a^2 + b^2), divided by the true one: near 0 all is grey, as Fabbri's EBGAN with L1 was.
    The spread comes from x for the most part, and says little

Differs from the paper:
  - pictures are made without dropout and with BatchNorm's running averages (eval mode), so that a
    photo gets the same colours every time; the paper keeps the dropout and the batch's statistics
  - the paper has 256 px, ImageNet, batches of 4 and about 6 epochs for colour. --size may be 64 or
    128 too, with 6 or 7 levels in the U-Net in place of 8; patches stay 70x70, more than an image
    of 64 has. Batches of 16 keep a GPU busy. 8 epochs are Fabbri's, also in batches of 4; he has
    random crops, the paper mirrors only
  - the fakes of D's last step serve G's step too, as in the paper's code; WGAN's Alg. 1 draws new
    ones. WGAN's scores are means over patches, so -L_D estimates a mean of distances of patches
  - D returns logits; their losses stay exact where log(sigmoid) would overflow
  - Fabbri prints E[log(1 - D)] for A_G; his code, like the paper's, has -E[log D]. He does not
    halve L_D, and ran gan at a learning rate of 1e-4. His U-Net lacks the skip of the first layer
  - Fabbri's L2 is half the sum of squares over a batch (4 x 256 x 256 x 2 numbers). As the mean
    that it is here, his "L2 = 1" is --l2 262144, which leaves the adversarial loss no say
  - Fabbri's autoencoder sees a and b alone and adds the same L to both sides, so that the energy
    knows nothing of L. Here it sees L too. His margin of 80 is for an energy that is one number for
    a batch. Here it is a mean square for each image: about 0.013 for photos if a and b are
    reconstructed as 0, and the margin has to be less. Neither has the EBGAN paper's pull-away term
  - Fabbri leaves grey photos out of the training data; here they stay in

    python pix2pix_color.py                                        # cartoon faces, on a CPU
    python pix2pix_color.py --data celeba --size 128               # nearly as Fabbri
    python pix2pix_color.py --data celeba --colorize old/*.jpg     # your photos, by that run
    python pix2pix_color.py --adversarial ebgan --out runs/energy  # another adversarial loss
"""

import argparse
import contextlib
import functools
import hashlib
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image

# --- colours --------------------------------------------------------------------------------------
# CIELAB separates lightness from colour. L is 0 (black) to 100 (white); a runs from green (-86) to
# red (98), b from blue (-108) to yellow (94), and both are 0 for every grey. sRGB, white point D65.

RGB_TO_XYZ = [[0.412453, 0.357580, 0.180423],
              [0.212671, 0.715160, 0.072169],
              [0.019334, 0.119193, 0.950227]]
XYZ_TO_RGB = np.linalg.inv(RGB_TO_XYZ).tolist()  # printed tables of it are rounded
WHITE = [sum(row) for row in RGB_TO_XYZ]  # XYZ of white
DELTA = 6 / 29  # below DELTA^3 the cube root becomes a straight line


def rgb_to_lab(rgb):
    """(B, 3, h, w) in [0, 1] -> L, a, b (B, 3, h, w)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = [t / white for t, white in zip(mix(RGB_TO_XYZ, linear), WHITE)]
    fx, fy, fz = (torch.where(t > DELTA**3, t ** (1 / 3), t / (3 * DELTA**2) + 4 / 29) for t in xyz)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], 1)


def lab_to_rgb(lab):
    """L, a, b (B, 3, h, w) -> (B, 3, h, w) in [0, 1]; clips colours that no screen can show."""
    lightness, a, b = lab.unbind(1)
    fy = (lightness + 16) / 116
    xyz = [white * torch.where(f > DELTA, f**3, 3 * DELTA**2 * (f - 4 / 29))
           for f, white in zip((fy + a / 500, fy, fy - b / 200), WHITE)]
    linear = torch.stack(mix(XYZ_TO_RGB, torch.stack(xyz, 1)), 1).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def mix(matrix, planes):
    """A 3 x 3 matrix times the three channels of (B, 3, h, w) -> three times (B, h, w)."""
    return [sum(k * plane for k, plane in zip(row, planes.unbind(1))) for row in matrix]


def to_network(rgb):
    """(B, 3, h, w) in [0, 1] -> x (B, 1, h, w) and y (B, 2, h, w), in [-1, 1].

    110 is just above the largest |a| or |b| of any RGB, so tanh can reach all colours.
    """
    lab = rgb_to_lab(rgb)
    return lab[:, :1] / 50 - 1, lab[:, 1:] / 110


def to_rgb(x, y):
    """x (B, 1, h, w), y (B, 2, h, w), in [-1, 1] -> (B, 3, h, w) in [0, 1]."""
    return lab_to_rgb(torch.cat([50 * (x + 1), 110 * y], 1))


# --- networks -------------------------------------------------------------------------------------

SIZES = [64, 128, 256]  # image sizes that the networks can be built for


class Generator(nn.Module):
    """The U-Net. Lightness (B, 1, size, size) -> colours (B, 2, size, size), both in [-1, 1].

    Down to one pixel and up again. Shapes are for 256 px and width 64.
    """

    def __init__(self, size, width):
        super().__init__()
        n = [width * min(2**i, 8) for i in range(size.bit_length() - 1)]  # 64, 128, 256, 512, 512..
        last = len(n) - 1
        down = [nn.Conv2d(1, n[0], 4, stride=2, padding=1)]  # (B, 64, 128, 128)
        for i in range(1, last):  # (B, 128, 64, 64) ... (B, 512, 2, 2)
            down.append(nn.Sequential(
                nn.LeakyReLU(0.2),
                nn.Conv2d(n[i - 1], n[i], 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(n[i]),
            ))
        down.append(nn.Sequential(  # BatchNorm over one pixel would leave nothing, in a batch of 1
            nn.LeakyReLU(0.2),
            nn.Conv2d(n[-1], n[-1], 4, stride=2, padding=1),  # (B, 512, 1, 1)
        ))
        up = []
        for i in range(last, 0, -1):  # (B, 512, 2, 2) ... (B, 64, 128, 128)
            up.append(nn.Sequential(
                nn.ReLU(inplace=True),
                nn.ConvTranspose2d(n[i] if i == last else 2 * n[i], n[i - 1], 4, stride=2,
                                   padding=1, bias=False),
                nn.BatchNorm2d(n[i - 1]),
                nn.Dropout(0.5 if i > last - 3 else 0),  # the first three: Sec. 6.1.1
            ))
        up.append(nn.Sequential(
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * n[0], 2, 4, stride=2, padding=1),  # (B, 2, 256, 256)
            nn.Tanh(),
        ))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x):
        maps = []
        for layer in self.down:
            x = layer(x)
            maps.append(x)
        y = self.up[0](maps.pop())
        for layer in self.up[1:]:
            y = layer(torch.cat([y, maps.pop()], 1))  # a skip: twice the channels
        return y


class Discriminator(nn.Module):
    """The 70x70 PatchGAN. Lightness and colours -> logits or scores (B, 1, size/8 - 2, size/8 - 2).

    Each output sees a patch of 70x70 pixels. Shapes are for 256 px and width 64.
    """

    def __init__(self, width):
        super().__init__()
        layers = [
            nn.Conv2d(3, width, 4, stride=2, padding=1),  # (B, 64, 128, 128)
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for n, stride in [(width, 2), (2 * width, 2), (4 * width, 1)]:
            layers += [  # (B, 128, 64, 64), (B, 256, 32, 32), (B, 512, 31, 31)
                nn.Conv2d(n, 2 * n, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(2 * n),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers += [nn.Conv2d(8 * width, 1, 4, stride=1, padding=1)]  # (B, 1, 30, 30)
        self.layers = nn.Sequential(*layers)

    def forward(self, x, y):
        return self.layers(torch.cat([x, y], 1))


class Autoencoder(nn.Module):
    """D of EBGAN. Lightness and colours -> energies (B,): how badly the colours are reconstructed.

    Shapes are for 256 px and width 64.
    """

    def __init__(self, width):
        super().__init__()
        layers = [
            nn.Conv2d(3, width, 4, stride=2, padding=1),  # (B, 64, 128, 128)
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for n in (width, 2 * width, 4 * width):
            layers += [  # (B, 128, 64, 64), (B, 256, 32, 32), (B, 512, 16, 16)
                nn.Conv2d(n, 2 * n, 4, stride=2, padding=1),
                nn.BatchNorm2d(2 * n),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        for n in (8 * width, 4 * width, 2 * width):
            layers += [  # (B, 256, 32, 32), (B, 128, 64, 64), (B, 64, 128, 128)
                nn.ConvTranspose2d(n, n // 2, 4, stride=2, padding=1),
                nn.BatchNorm2d(n // 2),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers += [
            nn.ConvTranspose2d(width, 2, 4, stride=2, padding=1),  # (B, 2, 256, 256)
            nn.Tanh(),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x, y):
        return (self.layers(torch.cat([x, y], 1)) - y).square().mean((1, 2, 3))


def init_weights_and_biases(module):
    """As in dcgan.py: weights from N(0, 0.02^2), BatchNorm's scales around 1; biases at 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, mean=0, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1, std=0.02)


# --- losses ---------------------------------------------------------------------------------------
# real and fake are what D returns for (x, y) and (x, G(x)): for gan logits and for lsgan and wgan
# scores, of every patch of every image; for ebgan energies, one for each image.


def d_loss(real, fake, adversarial, margin):
    """L_D, halved where Isola et al. and Mao et al. halve it."""
    match adversarial:
        case "gan":  # log 2 = 0.693 if D says 1/2 to everything
            return (nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()) / 2
        case "lsgan":
            return ((real - 1).square().mean() + fake.square().mean()) / 2
        case "wgan":
            return fake.mean() - real.mean()
        case "ebgan":  # the hinge is taken image by image
            return real.mean() + nn.functional.relu(margin - fake).mean()


def a_loss(fake, adversarial):
    """A_G, the adversarial part of L_G."""
    match adversarial:
        case "gan":
            return nn.functional.softplus(-fake).mean()
        case "lsgan":
            return (fake - 1).square().mean() / 2
        case "wgan":
            return -fake.mean()
        case "ebgan":
            return fake.mean()


def g_loss(fake, adversarial, error, gan, l1, l2):
    """L_G, with error = G(x) - y."""
    a_g = a_loss(fake, adversarial)
    return gan * a_g + l1 * error.abs().mean() + l2 * error.square().mean()


# --- training -------------------------------------------------------------------------------------


class Colorize(argparse.Action):
    """--colorize FILE... counts as --generate: what lies below then wants a checkpoint, no data."""

    def __call__(self, parser, args, files, option):
        args.colorize, args.generate = files, len(files)


def options(parser):
    """This paper's defaults and own flags. Returns what is different on the cartoon faces."""
    parser.set_defaults(batch=16, epochs=8)
    parser.epilog = ("--lr is 2e-4 by default, with wgan 5e-5. --lr, --gan, --l1 are the paper's, "
                     "--clip, --critic, wgan's --lr the WGAN paper's, --epochs Fabbri's (2017).")
    add = parser.add_argument
    add("--width", type=number(int, 1), default=64, help="channels at half size (64, the paper's)")
    add("--adversarial", choices=["gan", "lsgan", "ebgan", "wgan"], default="gan",
        help="form of L_D and A_G (gan)")
    add("--gan", type=number(float, 0), default=1, help="weight of A_G in L_G (1)")
    add("--l1", type=number(float, 0), default=100, help="weight of E[|y - G(x)|] (100)")
    add("--l2", type=number(float, 0), default=0, help="weight of E[(y - G(x))^2] (0)")
    add("--margin", type=number(float, 1e-9), default=0.005, help="m of ebgan (0.005)")
    add("--clip", type=number(float, 1e-9), default=0.01, help="largest weight of wgan's D (0.01)")
    add("--critic", type=number(int, 1), default=5, help="D steps per G step of wgan (5)")
    add("--colorize", nargs="+", metavar="FILE", action=Colorize,
        help="colour these photos with the checkpoint")
    return {"batch": 16, "epochs": 5, "width": 32}


def train(args, data):
    """Build the networks, define the training step, hand over to fit()."""
    G = Generator(args.size, args.width).apply(init_weights_and_biases).to(args.device)
    if args.colorize:
        return colorize(args, G)
    held_out = every_nth(data.images, 64).to(args.device)
    if (held_out == held_out[:, :1]).all():
        raise UserError(f"{args.data} has no colour to learn")
    if len(data.images) == len(held_out) and not args.generate:
        raise UserError(f"{args.data} has {len(held_out)} usable images; 64 are held out, so 65 "
                        "are needed")
    if (args.generate or 0) > len(held_out):
        raise UserError(f"--generate: the checkpoint has {len(held_out)} images to colour, not "
                        f"{args.generate}; --colorize takes any photo")

    wgan = args.adversarial == "wgan"
    D = (Autoencoder if args.adversarial == "ebgan" else Discriminator)(args.width)
    D = D.apply(init_weights_and_biases).to(args.device)
    args.lr = args.lr or (5e-5 if wgan else 2e-4)  # in args, so that the checkpoint knows it
    optimiser = functools.partial(torch.optim.Adam, betas=(0.5, 0.999), fused=True)
    if wgan:
        optimiser = torch.optim.RMSprop
    opt_G, opt_D = (optimiser(net.parameters(), lr=args.lr) for net in (G, D))

    def step():
        """D's step, or several for wgan; then G's."""
        for _ in range(args.critic if wgan else 1):
            x, y = sample_colours(data.images, args.batch, args.device)
            fake = G(x)

            # D's step. detach(): no gradient goes back into G. Two passes: BatchNorm normalises
            # real and fake each by themselves.
            d_real, d_fake = D(x, y), D(x, fake.detach())
            loss_D = d_loss(d_real, d_fake, args.adversarial, args.margin)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()
            if wgan:
                with torch.no_grad():
                    for p in D.parameters():
                        p.clamp_(-args.clip, args.clip)

        # G's step, against the improved D. The gradient passes through D but stays in G alone.
        loss_G = g_loss(D(x, fake), args.adversarial, fake - y, args.gan, args.l1, args.l2)
        opt_G.zero_grad()
        loss_G.backward(inputs=list(G.parameters()))
        opt_G.step()

        return {"loss_D": loss_D, "loss_G": loss_G,
                "D(y)": d_real.mean(), "D(G(x))": d_fake.mean()}

    draw, grid, measure = views(held_out, G)
    parts = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D}
    fit(args, data, step, draw, parts, grid, measure)


def sample_colours(images, n, device):
    """n random images, with replacement, none of them held out, half of them mirrored -> x, y."""
    nth = math.ceil(len(images) / 64)
    i = torch.randint(len(images) - len(every_nth(images, 64)), (n,), device=images.device)
    i = i + i // (nth - 1) + 1  # the numbers that nth does not divide: every_nth() takes the others
    rgb = images[i].to(device) / 255
    mirrored = torch.rand(n, 1, 1, 1, device=device) < 0.5
    return to_network(torch.where(mirrored, rgb.flip(3), rgb))


def views(held_out, G):
    """What fit() shows of the held-out images: its draw(), grid() and measure()."""
    true = held_out / 255
    x, y = to_network(true)

    def draw(n):
        return 2 * to_rgb(x[:n], G(x[:n])) - 1

    def grid():
        i = torch.linspace(0, len(x) - 1, 24).long()  # of all that there are, 33 at the least
        triples = to_rgb(x[i], 0 * y[i]), to_rgb(x[i], G(x[i])), true[i]
        return 2 * torch.stack(triples, 1).reshape(8, 9, *true.shape[1:]) - 1

    def measure():
        fake = G(x)
        error = (fake - y).abs().mean()
        noise = (to_rgb(x, fake) - true).square().mean().clamp(min=1e-10)  # at most 100 dB
        return {"L1": float(110 * error), "L1/grey": float(error / y.abs().mean()),
                "PSNR": float(-10 * noise.log10()),
                "chroma": float(fake.norm(dim=1).mean() / y.norm(dim=1).mean())}

    return draw, grid, measure


def colorize(args, G):
    """--colorize: colours for every photo that can be read, into the folder colorized."""
    load_checkpoint(args, {"G": G})
    names, unread = [], []
    for path in args.colorize:
        try:
            photo = np.array(open_image(path).convert("RGB"))
        except Exception as error:  # Pillow raises almost anything at a broken file
            unread.append(f"{path} ({error})")
            continue
        name, k = Path(path).stem, 2
        while name.lower() in names:  # a/me.jpg and b/me.png become me.png and me-2.png
            name, k = f"{Path(path).stem}-{k}", k + 1
        names.append(name.lower())
        file = Path(args.out) / "colorized" / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        with preview(args, {"G": G}):
            to_pil_image(colour_photo(photo, G, args)).save(file)
        progress(f"{path} -> {file}", last=True)
    if unread:
        raise UserError(f"{len(unread)} of {len(args.colorize)} photos could not be read: "
                        + ", ".join(unread))


def colour_photo(photo, G, args):
    """(h, w, 3) -> (3, h, w), both uint8: the photo's own lightness, with colours by G.

    Colours may be coarse: the eye takes its detail from lightness.
    """
    strips = torch.from_numpy(photo).permute(2, 0, 1)[None].split(256, dim=2)  # to save memory
    x = torch.cat([to_network(strip / 255)[0] for strip in strips], 2)  # (1, 1, h, w)
    small = nn.functional.interpolate(x, (args.size, args.size), mode="bilinear", antialias=True)
    y = G(small.to(args.device)).cpu()  # (1, 2, size, size)
    y = nn.functional.interpolate(y, x.shape[2:], mode="bicubic")  # (1, 2, h, w)
    strips = zip(x.split(256, dim=2), y.split(256, dim=2))
    return torch.cat([(255 * to_rgb(*strip)[0]).round().byte() for strip in strips], 1)


# --- the same in every script from here on --------------------------------------------------------
# What a run does (fit), its pictures, checkpoints and data; at the end the command line (main).

SCRIPT = Path(__file__).stem


class UserError(Exception):
    """Something the user can mend: main() prints its first line and exits with status 2."""


def fit(args, data, step, draw, parts, grid=None, measure=dict):
    """Train, log, draw and save; with --generate, only draw.

    step()     makes one training step -> {column of losses.csv: 0-dimensional tensor}
    draw(n)    draws n new images -> (n, C, size, size) in [-1, 1]
    parts      every network and optimiser by name: what a checkpoint keeps
    grid()     what pictures show -> (rows, columns, C, size, size); by default 8 x 8 of draw()
    measure()  further columns -> {column: number}; by default none
    """
    out, done, rows = Path(args.out), 0, []
    grid = grid or (lambda: draw(64).unflatten(0, (8, 8)))
    if args.resume or args.generate:
        done, rows = load_checkpoint(args, parts)
    if args.generate:
        return generate(args, draw, parts)
    total = args.steps or max(1, round(args.epochs * len(data.images) / args.batch))
    args.epochs = total * args.batch / len(data.images)  # the checkpoint keeps it for --resume
    if done >= total:
        raise UserError(f"this run has made its {done} steps: ask for more by --epochs or --steps")
    log_every = min(100, math.ceil(total / 100))
    picture_every = 5 * log_every

    (out / "samples").mkdir(parents=True, exist_ok=True)
    real = to_float(every_nth(data.images, 64).to(args.device))
    save_grid(real.unflatten(0, (-1, 8 if len(real) % 8 == 0 else 1)), out / "real.png")
    for name, net in networks(parts):
        print(f"{name}: {sum(p.numel() for p in net.parameters()):,} parameters on {args.device}")
    print(f"{total} steps of {args.batch} from {len(data.images):,} images -> {out}", flush=True)

    sums, since, start = 0, done, time.perf_counter()
    with catch_signals() as signals:
        for now in range(done + 1, total + 1):
            values = step()
            sums = sums + torch.stack(list(values.values())).detach()
            stop = len(signals) > 0
            last = now == total or stop
            if now % log_every == 0 or last:
                means = (sums / (now - since)).tolist()  # over the steps since the last row
                row = {"step": now, **dict(zip(values, means))}
                with preview(args, parts):
                    row["spread"] = (draw(64).std(0).mean() / real.std(0).mean()).item()
                    row.update(measure())
                row["images/s"] = (now - done) * args.batch / (time.perf_counter() - start)
                sums, since = 0, now
                report(row, rows, parts, (total - now) * args.batch, f"step {now}/{total}", last)
                lines = [",".join(row), *(",".join(map(str, row.values())) for row in rows)]
                (out / "losses.csv").write_text("\n".join(lines) + "\n")
            if now % picture_every == 0 or last:
                with preview(args, parts):
                    save_grid(grid(), out / "samples" / f"{now:06}.png")
                draw_curves(rows, out / "curves.png")
                save_checkpoint(args, data, parts, now, rows)
            if stop:
                print(f"stopped at step {now}; to go on: python {SCRIPT}.py --resume --out {out}")
                sys.exit(128 + signals[0])
    animate(out / "samples", out / "training.gif")


def report(row, rows, parts, images_left, where, last):
    """Print a row of losses.csv and add it to the others.

    Raises UserError if a number in it or a weight is NaN or infinite: the checkpoint is written
    after this, so the last good one stays.
    """
    bad = [name for name, value in row.items() if not math.isfinite(value)]
    for name, net in networks(parts):
        bad += [name] * any(not p.isfinite().all() for p in net.parameters())
    if bad:
        raise UserError(f"{bad[0]} is no longer finite at {where}; a smaller --lr may help. "
                        "The last good checkpoint, if there is one, is kept.")
    left = timedelta(seconds=round(images_left / row["images/s"]))
    numbers = "  ".join(f"{name} {value:.3g}" for name, value in list(row.items())[1:])
    progress(f"{where}  {left} left  {numbers}", last)  # a narrow terminal cuts the end off
    rows.append({name: round(value, 5) for name, value in row.items()})
    if [r["step"] for r in rows if r["step"] >= 500 and r["spread"] < 0.1] == [row["step"]]:
        progress("MODE COLLAPSE: all images look alike (their spread is below 0.1)", last=True)


@contextlib.contextmanager
def catch_signals():
    """Ctrl-C and kill go into a list, so that no step is cut in half. The second time they cut."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def catch(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = [signal.signal(number, catch) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


@contextlib.contextmanager
def preview(args, parts):
    """Inside: eval mode, no gradients, every time the same random numbers. Outside, no trace."""
    modes = [(net, net.training) for _, net in networks(parts)]
    states = [(source, source.get_rng_state()) for source in random_sources(args.device)]
    torch.manual_seed(args.seed)
    for net, _ in modes:
        net.eval()
    with torch.no_grad():
        yield
    for net, mode in modes:
        net.train(mode)
    for source, state in states:
        source.set_rng_state(state)


def random_sources(device):
    """The modules that keep a random state: torch for the CPU, torch.cuda or torch.mps."""
    return [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]


def networks(parts):
    return [(name, part) for name, part in parts.items() if isinstance(part, nn.Module)]


def progress(line, last=False):
    """On a terminal, a line that takes the place of the one before; elsewhere a line of its own."""
    if sys.stdout.isatty():
        line = "\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1]
    print(line, end="\n" if last or not sys.stdout.isatty() else "", flush=True)


# Pictures: pixels by one fixed rule from [-1, 1], never by a picture's own minimum and maximum.


def save_grid(images, path):
    """(rows, columns, C, size, size) in [-1, 1] -> one picture."""
    columns = images.shape[1]
    save_image(images.flatten(0, 1), path, nrow=columns, normalize=True, value_range=(-1, 1))


def generate(args, draw, parts):
    """--generate: numbered images, in place of those of an earlier call."""
    folder = Path(args.out) / "generated"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    with preview(args, parts):
        for first in range(0, args.generate, 64):
            images = draw(min(64, args.generate - first))
            done = first + len(images)
            pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().cpu()
            for i, image in enumerate(pixels, first):
                to_pil_image(image).save(folder / f"{i:05}.png")
            progress(f"{done} of {args.generate} images in {folder}", last=done == args.generate)


def draw_curves(rows, path):
    """The columns of losses.csv over the steps, each in a chart from its lowest to its highest."""
    names, steps = list(rows[0])[1:], [row["step"] for row in rows]
    w, h, gap = 400, 120, 24
    picture = Image.new("RGB", (2 * (w + gap) + gap, -(-len(names) // 2) * (h + 2 * gap)), "white")
    pen = ImageDraw.Draw(picture)
    for i, name in enumerate(names):
        left, top = gap + i % 2 * (w + gap), gap + i // 2 * (h + 2 * gap)
        values = [row[name] for row in rows]
        low, high = min(values), max(values)
        x = [left + w * (s - steps[0]) / max(1, steps[-1] - steps[0]) for s in steps]
        y = [top + h * (high - value) / ((high - low) or 1) for value in values]
        title = f"{name}: {low:.3g} to {high:.3g}, now {values[-1]:.3g}"
        pen.rectangle((left, top, left + w, top + h), outline="lightgrey")
        pen.line(list(zip(x, y)), fill="navy", width=2)
        pen.text((left, top - 13), title, fill="black")
        pen.text((left, top + h + 2), f"step {steps[0]} to {steps[-1]}", fill="grey")
    picture.save(path)


def animate(folder, path):
    """The pictures of the run as a GIF of at most 50 frames, the last one held."""
    files = sorted(folder.glob("*.png"), key=lambda file: int(file.stem))
    frames = [Image.open(file) for file in files[:: -math.ceil(len(files) / 50)][::-1]]
    for frame in frames:
        frame.thumbnail((640, 640))
    milliseconds = [150] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


# Checkpoints: tensors, numbers and strings, nothing else, so that torch.load's safe default works.


def save_checkpoint(args, data, parts, done, rows):
    """All that it takes to go on. And a few images and labels: --generate then needs no data."""
    passing = ("resume", "generate", "device", "out", "steps")
    content = {
        "script": SCRIPT,
        "settings": {k: v for k, v in vars(args).items() if k not in passing},
        "step": done,
        "rows": rows,
        "random": [source.get_rng_state() for source in random_sources(args.device)],
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "data": (every_nth(data.images, 64).cpu().clone(),
                 every_nth(data.labels, 50_000).cpu().clone(), data.names),
    }
    save_file(content, Path(args.out) / "checkpoint.pt")


def load_checkpoint(args, parts):
    """Put everything back as save_checkpoint() found it -> steps done, rows of losses.csv."""
    saved = load_file(Path(args.out) / "checkpoint.pt")
    try:
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"checkpoint.pt does not fit these networks: {error}") from error
    for source, state in zip(random_sources(args.device), saved["random"]):
        source.set_rng_state(state)
    return saved["step"], saved["rows"]


def save_file(content, path):
    """torch.save to a temporary name, then rename: at no moment is there half a file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        raise UserError(f"cannot write {path} (disk full?): {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path, mmap=False):
    """torch.load to the CPU; raises UserError if the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # there is nothing that a damaged file cannot raise
        raise UserError(f"{path} is damaged: {error!r}") from error


# Data: every data set becomes one uint8 tensor, prepared once, kept in --root/prepared, and read
# from there by memory-mapping.

Data = namedtuple("Data", "images labels names")  # (N, C, size, size) uint8; (N, K) 0 or 1; K names
CARTOON = ["Blond_Hair", "Eyeglasses", "Mouth_Slightly_Open", "Smiling", "Wearing_Lipstick"]


def sample_batch(data, n, device):
    """n random rows, with replacement -> images (n, C, size, size) in [-1, 1], labels (n, K)."""
    i = torch.randint(len(data.images), (n,), device=data.images.device)
    return to_float(data.images[i].to(device)), data.labels[i].to(device).float()


def to_float(pixels):
    """[0, 255] -> [-1, 1]."""
    return pixels / 127.5 - 1


def every_nth(rows, most):
    """At most that many rows, evenly spread: a folder's are sorted by class."""
    return rows[:: math.ceil(len(rows) / most)]


def load_images(name, size, root="data", split="train", at_least=1):
    """A data set by name, or a folder of images -> Data: size x size pixels, 1 or 3 channels.

    split is "train" or "test"; a folder is always taken whole. Raises UserError if the data is not
    found, cannot be used, or has fewer than at_least images.
    """
    cache = stamp = None
    if name == "cartoon":
        data = draw_cartoons(2560, size, seed=split)
    else:
        key, stamp = (name, "") if name in READERS else describe_folder(name)
        cache = Path(root) / "prepared" / f"{key}-{size}-{split}.pt"
        saved = load_file(cache, mmap=True) if cache.exists() else {"stamp": None}
        if saved["stamp"] == stamp:
            data, cache = Data(*saved["data"]), None
        else:
            reader = READERS.get(name, read_folder)
            data = prepare(name, size, *reader(name, size, Path(root), split))
    if len(data.images) < at_least:
        raise UserError(f"{name} has {len(data.images)} usable images; {at_least} are needed")
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"stamp": stamp, "data": tuple(data)}, cache)
    return data


def prepare(name, size, items, open_item, labels, names):
    """Open, crop and scale all items on all cores, into one tensor -> Data. Tells what it skips."""
    images = torch.empty(len(items), 3, size, size, dtype=torch.uint8)
    kept, seen, unreadable, colour = [], set(), [], False
    quiet = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    with multiprocessing.Pool(initializer=signal.signal, initargs=quiet) as pool:
        decoded = pool.imap(functools.partial(decode, open_item, size), items, chunksize=32)
        for i, pixels in enumerate(decoded):
            if (i + 1) % (1000 if sys.stdout.isatty() else 50_000) == 0 or i + 1 == len(items):
                progress(f"preparing {name}: {i + 1:,} of {len(items):,}", i + 1 == len(items))
            if pixels is None:
                unreadable.append(items[i])
                continue
            digest = i if name in READERS else hashlib.sha1(pixels).digest()  # published: keep all
            if digest not in seen:
                images.numpy()[len(kept)] = np.atleast_3d(pixels).transpose(2, 0, 1)
                colour = colour or pixels.ndim == 3
                kept.append(i)
                seen.add(digest)
    if unreadable:
        print(f"left out, unreadable: {len(unreadable)}, the first is {unreadable[0]}")
    if len(kept) + len(unreadable) < len(items):
        print(f"left out, there already: {len(items) - len(kept) - len(unreadable)}")
    images = images[: len(kept)] if colour else images[: len(kept), :1].clone()
    return Data(images, torch.from_numpy(labels[kept]), names)


def decode(open_item, size, item):
    """One item as (size, size) or (size, size, 3) uint8; None if it cannot be read."""
    try:
        return np.array(ImageOps.fit(open_item(item), (size, size), Image.Resampling.BILINEAR))
    except Exception:  # Pillow raises almost anything at a broken file; prepare() counts them
        return None


def open_image(path):
    """An image file as 8-bit grey ("L") or "RGB": upright, on white where it is transparent."""
    with Image.open(path) as image:
        grey = image.mode in ("1", "L", "LA") or image.mode[0] == "I"
        image = ImageOps.exif_transpose(image)
        if image.mode[0] == "I":  # 16 bits, which convert() would clip
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("L" if grey else "RGB")


# Readers: what prepare() needs of a data set, (items, function that opens one, labels, names).


def read_torchvision(name, size, root, split):
    """MNIST, Fashion-MNIST or CIFAR-10; torchvision downloads what is missing."""
    kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}[name]
    try:
        found = getattr(torchvision.datasets, kind)(root, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name} is not in {root} and cannot be downloaded: {error}") from error
    pixels = np.asarray(found.data)
    if name != "cifar10" and size != 28:  # 28 px in a frame of 32: sharper than scaled
        pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    labels = np.eye(10, dtype=np.uint8)[np.asarray(found.targets)]
    return pixels, Image.fromarray, labels, found.classes


def find_celeba(root):
    """-> (folder of faces, attribute table), in any of the layouts that CelebA comes in."""
    places = [root, root / "celeba", root / "CelebA"]
    nests = ["img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba"]
    files = ["list_attr_celeba.txt", "list_attr_celeba.csv", "Anno/list_attr_celeba.txt"]
    problem = ""
    for attempt in ("what is here", "what was downloaded"):
        faces = [place / nest for place in places for nest in nests if (place / nest).is_dir()]
        table = [place / file for place in places for file in files if (place / file).is_file()]
        if faces and table:
            return faces[0], table[0]
        if not faces and not table and attempt == "what is here":
            try:
                torchvision.datasets.CelebA(root, split="all", download=True)
            except Exception as error:  # gdown, urllib and zipfile fail in ways of their own
                problem = f"; downloading it failed: {str(error).splitlines()[0]}"
    raise UserError(
        f"CelebA needs a folder img_align_celeba ({faces[0] if faces else 'not found'}) and "
        f"list_attr_celeba.txt or .csv ({table[0] if table else 'not found'}) in {places[0]} or "
        f"{places[1]}{problem}. Both are at https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    )


def read_celeba(name, size, root, split):
    """The centred 128x128 of the 178x218 faces (rows 45-173, columns 25-153), and 40 attributes.

    Reads CelebA's .txt (a count, the names, then rows of -1 and 1) and Kaggle's .csv. "test" is
    the official test part: the images from number 182,638 on.
    """
    faces, table = find_celeba(root)
    with open(table, errors="replace") as file:
        lines = filter(None, (line.replace(",", " ").split() for line in file))
        names, rows = next(lines, [""]), {}
        if len(names) == 1:
            names = next(lines, [""])
        names = names[1:] if names[0] == "image_id" else names
        for image, *values in lines:
            if len(values) != len(names) or not {"-1", "0", "1"}.issuperset(values):
                raise UserError(f"{table}: the row of {image} is not {len(names)} times -1 or 1")
            rows[image] = [value == "1" for value in values]
    files = sorted(file for file in os.listdir(faces) if file.endswith((".jpg", ".png")))
    if files != sorted(rows):
        odd = min(set(files) ^ set(rows))
        raise UserError(f"{len(files)} images in {faces}, {len(rows)} rows in {table}: see {odd}")
    files = files[:182_637] if split == "train" else files[182_637:]
    labels = np.array([rows[file] for file in files], dtype=np.uint8).reshape(-1, len(names))
    return [faces / file for file in files], open_celeba, labels, names


def open_celeba(path):
    return open_image(path).crop((25, 45, 153, 173))


def read_lsun(name, size, root, split):
    """LSUN's church_outdoor: a folder of exported images, or the database (through lmdb)."""
    name = "church_outdoor_" + ("train" if split == "train" else "val")
    if (root / name).is_dir():
        items, open_item = list_images(root / name), open_image
    elif (root / f"{name}_lmdb").is_dir():
        items, open_item = range(len(lsun(root, name))), functools.partial(open_lsun, root, name)
        lsun.cache_clear()  # every process has to open the database by itself
    else:
        raise UserError(f"LSUN is not in {root}: unzip {name}_lmdb.zip (http://dl.yf.io/lsun) "
                        f"there, or make a folder {name} of its images")
    return items, open_item, np.zeros((len(items), 0), np.uint8), []


@functools.cache
def lsun(root, name):
    try:
        return torchvision.datasets.LSUN(str(root), classes=[name])
    except ImportError as error:
        raise UserError(f"{root}/{name}_lmdb can be read after: pip install lmdb") from error


def open_lsun(root, name, i):
    return lsun(root, name)[i][0]


def describe_folder(name):
    """-> what the prepared file is called, and a stamp that changes when any file does."""
    folder = Path(name).resolve()
    if not folder.is_dir():
        what = "is a file; give a folder" if folder.exists() else "is no folder and no data set"
        raise UserError(f"{name} {what}. Data sets: cartoon, {', '.join(READERS)}")
    facts = [(file, os.stat(file).st_size, os.stat(file).st_mtime) for file in list_images(name)]
    path, stamp = (hashlib.sha1(repr(x).encode()).hexdigest() for x in (folder, facts))
    return f"{folder.name}-{path[:8]}", stamp


def list_images(folder):
    """All files below the folder with an ending that Pillow can open, sorted."""
    ours = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = (os.path.join(top, file) for top, _, files in os.walk(folder) for file in files)
    return sorted(file for file in found if os.path.splitext(file)[1].lower() in ours)


def read_folder(name, size, root, split):
    """A folder's images; the sub-folders right below it, if there are any, are the classes."""
    files = list_images(name)
    tops = [Path(file).relative_to(name).parts[:-1][:1] for file in files]  # ("cat",) or ()
    names = sorted({top[0] for top in tops if top})
    labels = np.array([[top == (label,) for label in names] for top in tops], dtype=np.uint8)
    return files, open_image, labels.reshape(len(files), len(names)), names


def draw_cartoons(n, size, seed):
    """n cartoon faces -> Data. One seed draws the same faces at any size."""
    rng = random.Random(seed)
    faces, labels = zip(*(draw_face(rng, size) for _ in range(n)))
    images = torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2).contiguous()
    return Data(images, torch.tensor(labels, dtype=torch.uint8), CARTOON)


def draw_face(rng, size):
    """One face (size, size, 3) uint8, drawn at four times the size, and its CARTOON attributes."""
    blond, glasses, open_mouth, smiling, lipstick = has = [rng.random() < 0.5 for _ in CARTOON]
    image = Image.new("RGB", (4 * size, 4 * size), tuple(rng.randrange(256) for _ in "RGB"))
    pen, vary = ImageDraw.Draw(image), rng.uniform
    x, y, w, h = vary(0.46, 0.54), vary(0.5, 0.56), vary(0.27, 0.32), vary(0.34, 0.39)

    def oval(u, v, ru, rv, fill, shape=pen.ellipse, **how):  # in units of the face
        box = x + w * (u - ru), y + h * (v - rv), x + w * (u + ru), y + h * (v + rv)
        shape([4 * size * side for side in box], fill=fill, **how)

    def shade(colour, factor):
        return tuple(int(c * factor) for c in colour)

    tan, line = rng.random(), 4 * size // 50
    skin = (int(248 - 110 * tan), int(212 - 120 * tan), int(180 - 125 * tan))
    hair = shade((225, 180, 75) if blond else (60, 42, 32), vary(0.8, 1.1))
    lips, lip = ((200, 20, 50), 0.1) if lipstick else (shade(skin, 0.65), 0.05)
    oval(0, -0.15, 1.22, vary(1.08, 1.2), hair)
    oval(0, 0.45, 1.22, vary(0.5, 0.9), hair)
    oval(0, 0, 1, 1, skin)
    oval(0, 0, 1, 1, hair, pen.chord, start=210, end=330)  # a fringe
    for side in (-0.42, 0.42):
        oval(side, -0.12, 0.2, 0.13, "white")
        oval(side, -0.12, 0.1, 0.11, "black")
        if glasses:
            oval(side, -0.12, 0.34, 0.27, None, outline="black", width=line)
    oval(0, 0.18, 0.08, 0.1, shade(skin, 0.8))
    if open_mouth:
        half = {"shape": pen.chord, "start": 0, "end": 180} if smiling else {}
        v, ru, rv = (0.42, 0.42, 0.3) if smiling else (0.56, 0.3, 0.2)
        oval(0, v, ru + lip, rv + lip, lips, **half)
        oval(0, v, ru, rv, (60, 10, 20), **half)
    elif smiling:
        oval(0, 0.3, 0.48, 0.34, lips, pen.arc, start=20, end=160, width=line * (1 + lipstick))
    else:
        oval(0, 0.57, 0.34, lip, lips)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)), has


READERS = {"mnist": read_torchvision, "fashion_mnist": read_torchvision,
           "cifar10": read_torchvision, "celeba": read_celeba, "lsun_church": read_lsun}
USUAL_SIZE = {"cartoon": 32, "mnist": 28, "fashion_mnist": 28, "cifar10": 32, "lsun_church": 128}


# The command line.


def number(kind, low, high=10**9):
    """An argparse type: an int or float from low to high."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low} to {high}")

    return parse


def refuse(message):
    """In place of argparse's own way out, which prints the usage too."""
    raise UserError(message)


def command_line(argv):
    """-> the settings, checked, and the checkpoint they go on from (None for a new run)."""
    parser = argparse.ArgumentParser(
        f"{SCRIPT}.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    add = parser.add_argument
    add("--data", default="cartoon", help=f"cartoon, {', '.join(READERS)}, or a folder of images")
    add("--root", default="data", help="where data sets are, or are downloaded to (data)")
    add("--size", type=number(int, 1), help="side of the images in pixels")
    add("--epochs", type=number(float, 1e-9), help="passes over the data (%(default)s)")
    add("--steps", type=number(int, 1), help="training steps, instead of --epochs")
    add("--batch", type=number(int, 2), help="images in a step (%(default)s)")
    add("--lr", type=number(float, 1e-12), help="learning rate (%(default)s)")
    add("--seed", type=number(int, 0), default=0, help="where all random numbers start")
    add("--device", help="cuda, mps or cpu; by default the first of them that is there")
    add("--out", help="folder of the run, by default runs/SCRIPT-DATA")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--generate", type=number(int, 1), metavar="N", help="draw N images from the checkpoint")
    cartoon = options(parser)
    parser.epilog += " On cartoon:" + "".join(f" --{k} {v}" for k, v in cartoon.items())

    args = parser.parse_args(argv)
    if args.data == "cartoon":
        parser.set_defaults(**cartoon)
    out = Path(args.out or f"runs/{SCRIPT}-{Path(args.data).resolve().name}")
    checkpoint, saved = out / "checkpoint.pt", None
    if args.resume or args.generate:
        if not checkpoint.is_file():
            raise UserError(f"there is no checkpoint {checkpoint}; --out names the folder of a run")
        saved = load_file(checkpoint)
        if not isinstance(saved, dict) or saved.get("script") != SCRIPT:
            raise UserError(f"{checkpoint} was not written by {SCRIPT}.py")
        parser.set_defaults(**saved["settings"])
    elif checkpoint.exists():
        raise UserError(f"{out} holds a run already: --resume it, or choose another --out")
    parser.set_defaults(out=str(out))
    args = parser.parse_args(argv)
    return args, saved


def check(args, saved):
    """Fill in what was left open, and refuse what cannot work, before anything is written."""
    if saved:
        free = {"root", "epochs", *(["seed"] if args.generate else [])}
        for name, value in saved["settings"].items():
            if name not in free and value is not None and getattr(args, name) != value:
                raise UserError(f"this run has --{name} {value}; for another, start another --out")
    if args.size is None:
        usual = USUAL_SIZE.get(args.data, 64)
        args.size = min(SIZES, key=lambda size: abs(size - usual))
    if args.size not in SIZES:
        raise UserError(f"--size {args.size}: this script makes images of {SIZES} pixels")
    out = Path(args.out).absolute()
    home = next(place for place in (out, *out.parents) if place.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise UserError(f"--out {args.out}: cannot write to {home}")
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    try:
        args.device = torch.device(args.device or best)
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} cannot be used: {error}") from error


def main(argv=None):
    """Run with these arguments; None means those of the shell."""
    try:
        args, saved = command_line(argv)
        check(args, saved)
        torch.manual_seed(args.seed)
        if args.generate:
            data = Data(*saved["data"])
        else:
            data = load_images(args.data, args.size, args.root, at_least=args.batch)
        if args.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            if data.images.nbytes < torch.cuda.mem_get_info(args.device)[0] / 2:
                data = Data(data.images.to(args.device), data.labels.to(args.device), data.names)
        train(args, data)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        print(f"{SCRIPT}.py: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"{SCRIPT}.py: interrupted")


if __name__ == "__main__":
    main()
