# SPDX-License-Identifier: MIT
"""pix2pix: Isola, Zhu, Zhou and Efros, "Image-to-Image Translation with Conditional Adversarial
Networks", 2016, arXiv 1611.07004. Here it colours grey photos, with four adversarial losses to
compare, as in C. Fabbri, "A Comparative Study of GANs Towards Automatic Image Colorization", 2017.

CIELAB writes a colour as lightness L and two numbers a and b: green to red, blue to yellow. G sees
x, the L of a photo, and predicts y, its a and b. Green shirts and red ones can look alike in grey.
The guess with the smallest error on average lies between them: brown. D sees x and y together: it
is conditional. It learns that brown shirts are rare, and makes G decide.

    L_G = w * L_A + l1 * E[|y - y'|] + l2 * E[(y - y')^2]      y' = G(x); Eq. 4, l2 is Fabbri's

            L_D                                                L_A
    gan     -1/2 E[log D(x, y)] - 1/2 E[log(1 - D(x, y'))]     -E[log D(x, y')]          Eq. 1
    lsgan   1/2 E[(D(x, y) - 1)^2] + 1/2 E[D(x, y')^2]         1/2 E[(D(x, y') - 1)^2]   1611.04076
    wgan    E[D(x, y')] - E[D(x, y)]                           -E[D(x, y')]              1701.07875
    ebgan   E[D(x, y)] + E[max(0, m - D(x, y'))]               E[D(x, y')]               1609.03126

--adversarial chooses L_D and the adversarial loss L_A. In lsgan and wgan D gives scores, high for
real; in ebgan an energy, low for real, and D raises that of fakes up to the margin m. w is
--adversarial-weight. The larger it is, the more colour there is, and the more error: a bold guess
is further from the truth, on average, than a pale one. The four L_A differ in scale. On CIFAR-10,
w * L_A gave G a gradient a quarter to a half as large as 100 * E[|y - y'|] did, with w = 1 for gan,
3 for lsgan, 40 for wgan, 100 for ebgan. With w = 1, wgan and ebgan add almost nothing to l1 and l2.

Changes from dcgan.py:
  - G is a U-Net, from image to image: an encoder halves the maps, a decoder doubles them again. A
    skip connection shows each decoder layer the encoder's maps of its size, too (Sec. 3.2.1). There
    is no z; dropout is the only noise (Sec. 3.1)
  - D is a PatchGAN (Sec. 3.2.2): each of its outputs judges a patch, its receptive field of 70x70
    pixels. For ebgan D is an autoencoder, and its error is the energy: low for the data's colours
  - the losses. gan halves L_D (Sec. 3.3). wgan has RMSprop, several D steps for one of G, and clips
    D's weights, as wgan.py does. Layers without BatchNorm, and all of the autoencoder, have biases
  - RGB becomes Lab and back, and half of the training images are mirrored
  - no --g-steps, --init-std, --beta1
  - 64 images are never trained on. Pictures show 24, in triples: grey, coloured, true. losses.csv
    measures all. L1 is the mean error of a and b, and L1/grey divides it by that of a grey guess.
    PSNR tells how small the error of RGB is, in dB: more is better. chroma, the mean of
    sqrt(a^2 + b^2), is relative to that of the true colours, near 0 for grey. D(y) and D(G(x)) are
    D's mean outputs. --generate N writes the first N, coloured
  - --colorize colours photos. G sees a photo with its short side at --size, continued by mirror
    images until both sides are multiples of --size. The photo keeps its shape, and its lightness,
    except where no screen can show the colour

Differs from the paper:
  - it has ImageNet at 256 px, in batches of 4. Here --size is 128 by default, so G is less deep
  - it keeps dropout and BatchNorm's batch statistics when it draws. Here both are off (eval mode),
    so that a photo always gets the same colours
  - D returns logits, and batches are drawn with replacement, as in dcgan.py
  - the fakes of D's last step serve G, as in the paper's code, for wgan too. wgan's score of an
    image is the mean over its patches. ebgan.py's pull-away term is left out
  - Fabbri's report prints G's saturating loss, log(1 - D), and 8 epochs. What follows is from his
    code: it halves L_D for lsgan alone, beta1 is 0.9, photos are cropped at random. G enlarges
    maps by resizing, except with wgan. G's first layer has no skip connection. On D's output lsgan
    has a sigmoid, wgan a LeakyReLU; wgan clips at 0.005. Grey photos of one set are left out
  - his code trains gan and lsgan at 1e-4, wgan at 5e-5. Its weight 1 of L2 is on half a sum, and
    drowns L_A: that is --l2 batch * size^2, or 262144 for batches of 4 at 256 px
  - its autoencoder does not see x, and its margin of 80 is for another energy. Ours is a mean
    square: 0.013 (CIFAR-10) or 0.02 (CelebA) for a photo that comes back grey. m must be less: else
    D loses nothing by copying all as grey

Try (README.md says what happens):
  - --adversarial-weight 0: which of L1/grey, PSNR and chroma gets better, which worse?
  - --adversarial-weight 20: L1/grey above 1 is worse than grey. What about chroma?
  - 0 * maps.pop() in the loop, no skips: why are the edges still sharp? What is lost?

    python pix2pix_color.py                                       # cartoon faces, on a CPU
    python pix2pix_color.py --data celeba                         # photographs of faces
    python pix2pix_color.py --data celeba --colorize "old/*.jpg"  # your photos, by that run
    python pix2pix_color.py --adversarial lsgan --adversarial-weight 3 --out runs/lsgan-colours
"""

import argparse
import contextlib
import glob
import hashlib
import math
import os
import random
import re
import sys
import tempfile
import time
from collections import namedtuple
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import distributed, nn
from torch.nn.functional import interpolate, pad, relu, softplus
from torch.optim.optimizer import register_optimizer_step_pre_hook  # for several GPUs
from torchvision.utils import save_image

# --- colours --------------------------------------------------------------------------------------
# CIELAB separates lightness from colour. L is 0 (black) to 100 (white); a runs from green (-86) to
# red (98), b from blue (-108) to yellow (94), and both are 0 for every grey. sRGB, white point D65.
# The networks have x = L / 50 - 1 and y = (a, b) / 110, in [-1, 1], so tanh can reach all colours.
# The steps and constants are those of the standards: sRGB's values become amounts of light
# ("linear"), these become XYZ, relative to white, and cube roots of XYZ become L, a and b.

RGB_TO_XYZ = [[0.412453, 0.357580, 0.180423],
              [0.212671, 0.715160, 0.072169],
              [0.019334, 0.119193, 0.950227]]
XYZ_TO_RGB = np.linalg.inv(RGB_TO_XYZ).tolist()  # printed tables of it are rounded
WHITE = [sum(row) for row in RGB_TO_XYZ]  # XYZ of white
DELTA = 6 / 29  # below DELTA^3 the cube root becomes a straight line


def rgb_to_lab(rgb):
    """(B, 3, h, w) in [0, 1] -> x (B, 1, h, w) and y (B, 2, h, w)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = [t / white for t, white in zip(mix(RGB_TO_XYZ, linear), WHITE)]
    fx, fy, fz = (torch.where(t > DELTA**3, t ** (1 / 3), t / (3 * DELTA**2) + 4 / 29) for t in xyz)
    lab = torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], 1)
    return lab[:, :1] / 50 - 1, lab[:, 1:] / 110


def lab_to_rgb(x, y):
    """The way back, to (B, 3, h, w) in [0, 1]. Colours that no screen can show are clipped."""
    lightness, a, b = torch.cat([50 * (x + 1), 110 * y], 1).unbind(1)
    fy = (lightness + 16) / 116
    xyz = [white * torch.where(f > DELTA, f**3, 3 * DELTA**2 * (f - 4 / 29))
           for f, white in zip((fy + a / 500, fy, fy - b / 200), WHITE)]
    linear = torch.stack(mix(XYZ_TO_RGB, torch.stack(xyz, 1)), 1).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def mix(matrix, planes):
    """A 3 x 3 matrix times the three channels of (B, 3, h, w) -> three times (B, h, w)."""
    return [sum(k * plane for k, plane in zip(row, planes.unbind(1))) for row in matrix]


# --- networks -------------------------------------------------------------------------------------
# Shapes in comments are for 256 px and width 64.

SIZES = [64, 128, 256]  # the networks can be built for images of these sizes


class Generator(nn.Module):
    """The U-Net. Lightness (B, 1, size, size) -> colours (B, 2, size, size), both in [-1, 1]."""

    def __init__(self, size, width):
        super().__init__()
        n = [width * min(2**i, 8) for i in range(int(math.log2(size)))]  # 64, 128, 256, 512, 512...
        down = [nn.Conv2d(1, n[0], 4, stride=2, padding=1)]  # (B, 64, 128, 128)
        for n_in, n_out in zip(n, n[1:-1]):
            down += [nn.Sequential(
                nn.LeakyReLU(0.2),  # not in place: the skip needs its input
                nn.Conv2d(n_in, n_out, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(n_out),
            )]  # (B, 128, 64, 64), (B, 256, 32, 32), (B, 512, 16, 16) ... (B, 512, 2, 2)
        down += [nn.Sequential(  # BatchNorm over one pixel would leave nothing, in a batch of 1
            nn.LeakyReLU(0.2),
            nn.Conv2d(n[-2], n[-1], 4, stride=2, padding=1),
        )]  # (B, 512, 1, 1)
        n, up = n[::-1], []
        for i in range(len(n) - 1):
            n_in = n[i] if i == 0 else 2 * n[i]  # the maps from below, and those of the skip
            up += [nn.Sequential(
                nn.ReLU(inplace=True),
                nn.ConvTranspose2d(n_in, n[i + 1], 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(n[i + 1]),
                nn.Dropout(0.5 if i < 3 else 0),  # Sec. 6.1.1
            )]  # (B, 512, 2, 2) ... (B, 256, 32, 32), (B, 128, 64, 64), (B, 64, 128, 128)
        up += [nn.Sequential(
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * n[-1], 2, 4, stride=2, padding=1),
            nn.Tanh(),
        )]  # (B, 2, 256, 256)
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x):
        maps = []
        for layer in self.down:
            x = layer(x)
            maps.append(x)
        y = self.up[0](maps.pop())
        for layer in self.up[1:]:
            y = layer(torch.cat([y, maps.pop()], 1))  # the skip
        return y


class Discriminator(nn.Sequential):
    """A PatchGAN. Lightness and colours -> a logit or a score for each patch of 70x70 pixels."""

    def __init__(self, width):
        n = [width, 2 * width, 4 * width, 8 * width]
        layers = [
            nn.Conv2d(3, n[0], 4, stride=2, padding=1),  # (B, 64, 128, 128)
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for n_in, n_out, stride in zip(n, n[1:], (2, 2, 1)):
            layers += [
                nn.Conv2d(n_in, n_out, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(n_out),
                nn.LeakyReLU(0.2, inplace=True),
            ]  # (B, 128, 64, 64), (B, 256, 32, 32), (B, 512, 31, 31)
        layers += [nn.Conv2d(n[-1], 1, 4, stride=1, padding=1)]  # (B, 1, 30, 30)
        super().__init__(*layers)

    def forward(self, x, y):
        return super().forward(torch.cat([x, y], 1))


class Autoencoder(nn.Sequential):
    """D of ebgan. Lightness and colours -> energies (B,): how badly it reconstructs the colours."""

    def __init__(self, width):
        n = [width, 2 * width, 4 * width, 8 * width]
        layers = [
            nn.Conv2d(3, n[0], 4, stride=2, padding=1),  # (B, 64, 128, 128)
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for n_in, n_out in zip(n, n[1:]):
            layers += [
                nn.Conv2d(n_in, n_out, 4, stride=2, padding=1),
                nn.BatchNorm2d(n_out),
                nn.LeakyReLU(0.2, inplace=True),
            ]  # (B, 128, 64, 64), (B, 256, 32, 32), (B, 512, 16, 16)
        n = n[::-1]
        for n_in, n_out in zip(n, n[1:]):
            layers += [
                nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1),
                nn.BatchNorm2d(n_out),
                nn.LeakyReLU(0.2, inplace=True),
            ]  # (B, 256, 32, 32), (B, 128, 64, 64), (B, 64, 128, 128)
        layers += [nn.ConvTranspose2d(n[-1], 2, 4, stride=2, padding=1), nn.Tanh()]
        super().__init__(*layers)

    def forward(self, x, y):
        return (super().forward(torch.cat([x, y], 1)) - y).square().mean((1, 2, 3))


def init_weights_and_biases(module):
    """As in dcgan.py: weights from N(0, 0.02^2), BatchNorm's scales around 1; biases at 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, mean=0, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1, std=0.02)


# --- losses ---------------------------------------------------------------------------------------
# real and fake are what D returns for (x, y) and (x, y'): logits of all patches for gan, scores of
# all patches for lsgan and wgan, energies of whole images for ebgan.
# softplus(a) = log(1 + exp(a)), so -log D = softplus(-logit) and -log(1 - D) = softplus(logit).


def d_loss(real, fake, adversarial, margin):
    """L_D, halved where Isola et al. and Mao et al. halve it."""
    match adversarial:
        case "gan":  # log 2 = 0.693 if D says 1/2 to everything
            return (softplus(-real).mean() + softplus(fake).mean()) / 2
        case "lsgan":
            return ((real - 1).square().mean() + fake.square().mean()) / 2
        case "wgan":
            return fake.mean() - real.mean()
        case "ebgan":  # the hinge of each image: a fake with an energy above m adds nothing
            return real.mean() + relu(margin - fake).mean()


def adversarial_loss(fake, adversarial):
    """L_A, the part of L_G that comes from D."""
    match adversarial:
        case "gan":
            return softplus(-fake).mean()
        case "lsgan":
            return (fake - 1).square().mean() / 2
        case "wgan":
            return -fake.mean()
        case "ebgan":
            return fake.mean()


def g_loss(loss_A, error, adversarial_weight, l1, l2):
    """L_G, where error = G(x) - y."""
    return adversarial_weight * loss_A + l1 * error.abs().mean() + l2 * error.square().mean()


def clip(D, c):
    """WGAN, Alg. 1, line 7: all of D's weights to [-c, c], also BatchNorm's scales and shifts."""
    with torch.no_grad():
        for p in D.parameters():
            p.clamp_(-c, c)


# --- training -------------------------------------------------------------------------------------


def add_arguments(parser):
    """Set this script's defaults and flags. Return the defaults that differ on cartoon faces."""
    parser.set_defaults(size=128, batch=16, epochs=8)
    parser.epilog = ("--lr is 2e-4, with wgan 5e-5. These, --clip, --critic-steps, --l1 and (for "
                     "gan) --adversarial-weight are the papers'; --epochs is Fabbri's.")
    add = parser.add_argument
    add("--width", type=int, default=64, help="feature maps at half the image's size (64)")
    add("--adversarial", choices=["gan", "lsgan", "ebgan", "wgan"], default="gan",
        help="the adversarial loss, L_D and L_A (gan)")
    add("--adversarial-weight", type=float, default=1.0, help="w, weight of L_A in L_G (1)")
    add("--l1", type=float, default=100.0, help="weight of E[|y - G(x)|] in L_G (100)")
    add("--l2", type=float, default=0.0, help="weight of E[(y - G(x))^2] in L_G (0)")
    add("--margin", type=float, default=0.005, help="m of ebgan (0.005)")
    add("--clip", type=float, default=0.01, help="largest weight of wgan's D (0.01)")
    add("--critic-steps", type=int, default=5, help="D's steps for each step of G in wgan (5)")
    # Under --generate's name, since both draw with a checkpoint. This one gives a list of files.
    add("--colorize", nargs="+", metavar="FILE", dest="generate",
        help="colour photos, or all photos in a folder, with the checkpoint in --out")
    return {"size": 64, "epochs": 3, "width": 32}


def train(args, data):
    """Build the networks and their optimisers, and run the training loop."""
    if isinstance(args.generate, list):  # files, of --colorize
        return colorize(args)
    if data.images.shape[1] == 1:
        user_error(f"{args.data} has no colour to learn")
    if len(data.images) < (args.generate or 65):  # 64 are held out, and drawn
        user_error(f"there are {len(data.images)} images, not the {args.generate or 65} needed")
    wgan = args.adversarial == "wgan"
    G = Generator(args.size, args.width).apply(init_weights_and_biases).to(args.device)
    D = (Autoencoder if args.adversarial == "ebgan" else Discriminator)(args.width)
    D = D.apply(init_weights_and_biases).to(args.device)
    if wgan:
        opt_G = torch.optim.RMSprop(G.parameters(), lr=args.lr or 5e-5)
        opt_D = torch.optim.RMSprop(D.parameters(), lr=args.lr or 5e-5)
        clip(D, args.clip)
    else:
        opt_G = torch.optim.Adam(G.parameters(), lr=args.lr or 2e-4, betas=(0.5, 0.999))
        opt_D = torch.optim.Adam(D.parameters(), lr=args.lr or 2e-4, betas=(0.5, 0.999))

    draw, grid, measure = views(data.images[:64].to(args.device), G)
    to_save = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D}
    for log in steps(args, data, draw, to_save, grid, measure):
        for _ in range(args.critic_steps if wgan else 1):
            x, y = sample_colours(data.images, args.batch, args.device)
            fake = G(x)

            # D's step. detach() keeps its gradient out of G. Reals and fakes are separate batches:
            # in a mixed one, BatchNorm gives other values than in G's step, where all are fakes.
            d_real, d_fake = D(x, y), D(x, fake.detach())
            loss_D = d_loss(d_real, d_fake, args.adversarial, args.margin)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()
            if wgan:
                clip(D, args.clip)

        # G's step. D has just changed, so D(fake) is computed anew. The gradient flows back through
        # D into G; with inputs=, none is computed for D's weights.
        loss_A = adversarial_loss(D(x, fake), args.adversarial)
        loss_G = g_loss(loss_A, fake - y, args.adversarial_weight, args.l1, args.l2)
        opt_G.zero_grad()
        loss_G.backward(inputs=list(G.parameters()))
        opt_G.step()

        # Tensors, not floats: .item() would make Python wait for the GPU in every step.
        log.update({"loss_D": loss_D, "loss_G": loss_G,
                    "D(y)": d_real.mean(), "D(G(x))": d_fake.mean()})


def sample_colours(images, n, device):
    """n random images, but none of the first 64, half of them mirrored -> x, y."""
    i = torch.randint(64, len(images), (n,), device=images.device)
    rgb = images[i].to(device) / 255
    mirrored = torch.rand(n, 1, 1, 1, device=device) < 0.5
    return rgb_to_lab(torch.where(mirrored, rgb.flip(3), rgb))


def views(held_out, G):
    """What steps() shows of the 64 images that are never trained on: draw(), grid(), measure()."""
    truth = held_out / 255
    x, y = rgb_to_lab(truth)

    def draw(n):
        return 2 * lab_to_rgb(x[:n], G(x[:n])) - 1

    def grid():  # 24 of them, each as grey, coloured, true
        i = torch.linspace(0, len(x) - 1, 24).long()
        triples = lab_to_rgb(x[i], 0 * y[i]), lab_to_rgb(x[i], G(x[i])), truth[i]
        return 2 * torch.stack(triples, 1).reshape(8, 9, *truth.shape[1:]) - 1  # 3 triples a row

    def measure():
        fake = G(x)
        error = (fake - y).abs().mean()
        mse = (lab_to_rgb(x, fake) - truth).square().mean().clamp(min=1e-10)  # at most 100 dB
        return {"L1": float(110 * error), "L1/grey": float(error / y.abs().mean()),
                "PSNR": float(-10 * mse.log10()),
                "chroma": float(fake.norm(dim=1).mean() / y.norm(dim=1).mean())}

    return draw, grid, measure


def colorize(args):
    """--colorize: colour every photo that can be read, into the run's folder colorized."""
    settings, photos, unread = args.checkpoint["settings"], [], []
    for name in args.generate:
        found = list_files(name) if os.path.isdir(name) else [name]
        if "*" in name:  # Windows' shells leave old/*.jpg as it is
            found = sorted(glob.glob(name))
        photos += found or [name]
    G = Generator(settings["size"], settings["width"]).to(args.device)
    G.load_state_dict(args.checkpoint["state"]["G"])
    folder = Path(args.out) / "colorized"
    folder.mkdir(exist_ok=True)
    for i, path in enumerate(photos):
        try:
            photo = open_image(path)
        except Exception as error:  # a broken file can make Pillow raise anything
            unread.append(f"{path} ({error})")
            continue
        file = folder / f"{i:03}-{Path(path).stem}.png"  # a/me.jpg and b/me.jpg are two files
        with preview(args, G):
            colour_photo(photo, G, settings["size"], args.device).save(file)
        print(f"{path} -> {file}")
    if unread:
        user_error(f"{len(unread)} of {len(photos)} photos could not be read: {', '.join(unread)}")


def colour_photo(photo, G, size, device):
    """A photo, as an RGB image of Pillow -> its own lightness with colours by G, as another one."""
    w, h = (round(size * side / min(photo.size)) for side in photo.size)
    small = np.asarray(photo.resize((w, h), Image.BILINEAR))
    x, _ = rgb_to_lab(torch.tensor(small, device=device).permute(2, 0, 1)[None] / 255)
    # The U-Net halves its maps down to one pixel, so both sides must be multiples of the size. The
    # -w % size missing columns are added as a mirror image, and cut off again. So are rows.
    y = G(pad(x, (0, -w % size, 0, -h % size), mode="reflect"))[:, :, :h, :w].cpu()
    y = interpolate(y, photo.size[::-1], mode="bicubic")  # coarse: the eye needs no more of colours
    rgb = torch.tensor(np.asarray(photo)).permute(2, 0, 1)[None]
    for strip, colours in zip(rgb.split(256, dim=2), y.split(256, dim=2)):  # to save memory
        x, _ = rgb_to_lab(strip / 255)
        strip.copy_((255 * lab_to_rgb(x, colours)).round())
    return Image.fromarray(rgb[0].permute(1, 2, 0).numpy())


SCRIPT = Path(globals().get("__file__", "pix2pix_color.py")).stem  # a notebook's cell has no file

# --- the same in every script from here on --------------------------------------------------------

# channels_last, a pixel's channels side by side in memory, makes convolutions faster. On Apple's
# GPUs it broke BatchNorm until mid-2026.
LAYOUT = torch.contiguous_format if torch.backends.mps.is_available() else torch.channels_last
# torchrun starts several processes, one for each GPU. This is process RANK of RANKS; else 0 of 1.
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, RANKS = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))


def user_error(message):
    """For mistakes that the user can fix: one line on stderr, exit status 2."""
    print(f"{SCRIPT}.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def steps(args, data, draw, to_save, grid=None, measure=lambda: {}):
    """What train()'s loop runs over. Each turn gets an empty dict, to fill with numbers (tensors).

    Every 1 % of the run it logs their averages, draws and saves. --generate only draws, no step.
    draw(n): n images (n, C, size, size) in [-1, 1], while to_save["G"], no other, is in eval mode.
    to_save: {name: network or optimiser}. grid(): the picture's images (rows, columns, C, size,
    size), by default 8 x 8 of draw(). measure(): further columns of losses.csv, {name: number}.
    """
    saved, out, batch, total = args.checkpoint, Path(args.out), args.batch * RANKS, args.steps
    for name, state in saved.get("state", {}).items():
        if name.startswith("opt") and args.lr != saved["settings"]["lr"]:  # a new --lr counts
            state["param_groups"][0]["lr"] = to_save[name].defaults["lr"]
        to_save[name].load_state_dict(state)
    if args.generate:
        if RANK == 0:
            generate(args, draw, to_save["G"])
        return
    done, rows = saved.get("step", 0), saved.get("rows", [])
    real = data.images[:64].to(args.device) / 127.5 - 1

    def look():  # columns of losses.csv (spread: do fakes differ?), and the picture
        with preview(args, to_save["G"]):
            fakes = draw(64)
            columns = {"spread": fakes.std(0).mean() / real.std(0).mean(), **measure()}
            return columns, grid() if grid else fakes.unflatten(0, (8, 8))

    if RANK == 0:
        (out / "samples").mkdir(parents=True, exist_ok=args.resume)  # two runs must not mix
        save_image(real / 2 + 0.5, out / "real.png")
        if done == 0:
            record(args, data, to_save, rows, 0, look()[1], last=False)  # the untrained G
    print(f"{total} steps of {batch} from {len(data.images):,} images on {args.device} -> {out}")

    every, numbers, start = math.ceil(total / 100), [], time.perf_counter()
    for step in range(done + 1, total + 1):
        # A seed for each step: a resumed run draws the same numbers. hash() of ints never varies.
        torch.manual_seed(hash((args.seed, step, RANK)))
        log = {}
        yield log
        numbers.append(torch.stack(list(log.values())).detach())
        if step % every == 0 or step == total:
            means = dict(zip(log, torch.stack(numbers).mean(0).tolist()))
            numbers.clear()
            if RANK == 0:
                columns, picture = look()
                means |= {name: float(value) for name, value in columns.items()}
                rows.append({"step": step, **means})
                rate = (step - done) / (time.perf_counter() - start)  # steps per second
                speed = f"{(total - step) / rate / 60:.1f} min left  {batch * rate:.0f} images/s"
                print(f"step {step}/{total}  {speed}",
                      *(f"{k} {v:.3g}" for k, v in means.items()), sep="  ", flush=True)
                if step >= 500 and means["spread"] < 0.1:
                    print("MODE COLLAPSE: all images look alike")
                record(args, data, to_save, rows, step, picture, last=step == total)


def record(args, data, to_save, rows, step, picture, last):
    """Write a picture, curves.png, losses.csv, at the end training.gif, and the checkpoint."""
    out, table = Path(args.out), np.array([list(row.values()) for row in rows])
    if not np.isfinite(table).all():
        hint = "; a smaller --lr may help" if len(rows) > 1 else ""  # it was finite before
        user_error(f"a number is not finite{hint}")
    try:
        save_image(picture.flatten(0, 1) / 2 + 0.5, out / "new.png", nrow=picture.shape[1])
        os.replace(out / "new.png", out / "samples" / f"{step:06}.png")  # never half a picture
        if last:
            files = sorted(out.glob("samples/[0-9]*.png"))
            frames = [Image.open(file) for file in [*files[:-1:4], files[-1]]]  # each fourth
            head, *tail = [frame.reduce(math.ceil(max(frame.size) / 300)) for frame in frames]
            head.save(out / "training.gif", append_images=tail, save_all=True, duration=200, loop=0)
        if rows:
            names = list(rows[0])
            draw_curves(names, table.T).save(out / "curves.png")
            np.savetxt(out / "losses.csv", table, "%.8g", ",", header=",".join(names), comments="")
    except OSError as error:  # on Windows, a table that is open in Excel cannot be written
        print(f"not written: {error}")
    settings = {**vars(args), "checkpoint": None, "device": None}  # these two are not kept
    state = {name: part.state_dict() for name, part in to_save.items()}
    # --generate needs no more of the data: images for their shape, labels to draw from. Without
    # clone(), a slice is saved as the whole tensor.
    some = data.images[:64].cpu().clone(), data.labels[:50_000].cpu().clone(), *data[2:]
    save({"script": SCRIPT, "step": step, "rows": rows, "settings": settings, "state": state,
          "data": some}, out / "checkpoint.pt")


def save(content, file):
    """torch.save(), under a hidden name until it is whole: there is never half a file."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        torch.save(content, part)
        os.replace(part, file)
    except (OSError, RuntimeError) as error:  # torch calls a full disk a RuntimeError
        user_error(f"{file} cannot be written (is the disk full?): {error}")
    finally:
        part.unlink(missing_ok=True)  # it is still there after an error, or Ctrl-C


def draw_curves(names, columns):
    """The columns of losses.csv as curves over the first one, the steps."""
    image = Image.new("RGB", (640, 120 * (len(names) - 1) + 15), "white")
    pen, ends = ImageDraw.Draw(image), columns[0][[0, -1]]
    x = np.interp(columns[0], ends, (5, 635))
    for top, name, values in zip(range(0, image.height, 120), names[1:], columns[1:]):
        low, high = values.min(), values.max()
        y = np.interp(values, (low, high), (top + 115, top + 25))  # a larger value is further up
        pen.line(list(zip(x, y)), "navy", 2)
        pen.text((5, top + 8), f"{name}: {low:.3g} to {high:.3g}, now {values[-1]:.3g}", "black")
    for left, step in zip((5, 595), ends):
        pen.text((left, image.height - 13), f"{step:.0f}", "black")
    return image


@contextlib.contextmanager
def preview(args, G):
    """For drawing: G in eval mode, no gradients, the same random numbers every time."""
    torch.manual_seed(hash(args.seed))
    G.eval()
    with torch.no_grad():
        yield
    G.train()


def generate(args, draw, G):
    """--generate N: N numbered images, in place of earlier ones. draw may be {folder: draw}."""
    folder = Path(args.out) / "generated"
    for old in folder.glob("*/[0-9]*.png" if isinstance(draw, dict) else "[0-9]*.png"):
        old.unlink()
    with preview(args, G):
        for name, draw_some in (draw if isinstance(draw, dict) else {".": draw}).items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for first in range(0, args.generate, 64):
                for i, image in enumerate(draw_some(min(64, args.generate - first)), first):
                    save_image(image / 2 + 0.5, folder / name / f"{i:05}.png")
            print(f"{args.generate} images in {folder / name}")


def average_gradients(optimiser, *_):
    """Before an optimiser's step: gradients become their means over torchrun's processes."""
    for group in optimiser.param_groups:
        for p in group["params"]:
            distributed.all_reduce(p.grad.div_(RANKS))  # the sum of everyone's share


# Data: every set becomes one tensor of images (N, C, size, size), uint8. Its labels are (N, K),
# each 0 or 1, with K names. digest is a text that changes with any of it.
Data = namedtuple("Data", "images labels names digest", defaults=[""])
SETS = {"cartoon": 32, "mnist": 28, "fashion_mnist": 28, "cifar10": 32, "celeba": 64}  # their sizes
FACE = ["Blond_Hair", "Eyeglasses", "Mouth_Slightly_Open", "Smiling", "Wearing_Lipstick"]
YES_NO = {"1": 1, "1.0": 1, "True": 1, "0": 0, "0.0": 0, "False": 0, "-1": 0, "-1.0": 0}
# Above: how a table writes a label. Below: flags that must be above 0; that --resume must keep.
ABOVE_0 = "batch clip critic_steps epochs g_steps generate init_std lr margin steps width".split()
FIXED = "adversarial attribute beta1 extractor init_std no_labels size width".split()


def sample_batch(data, n, device):
    """n random rows, with replacement -> images (n, C, size, size) in [-1, 1], labels (n, K)."""
    i = torch.randint(len(data.images), (n,), device=data.images.device)
    return data.images[i].to(device) / 127.5 - 1, data.labels[i].to(device).float()


def load_images(name, size, root="data", split="train"):
    """A set by name (split "train" or "test"), or a folder -> Data. Kept in root/prepared."""
    items, open_item, labels, names = find_images(name, size, root, split)
    files = items if type(items) is list else []  # items may also be a range of numbers
    facts = [(info.st_size, info.st_mtime) for info in map(os.stat, files)]
    known = Data._fields, items, facts, names, labels.tobytes()  # _fields: the file's format
    key = hashlib.sha1(repr(known).encode()).hexdigest()[:16]
    if os.path.exists(root) and not os.access(root, os.W_OK):  # as Kaggle's input
        root = "data"
    file = Path(root) / "prepared" / f"{Path(name).name[:40]}-{size}-{split}-{key}.pt"
    try:  # a changed image has another key. Changed code has not: then delete the file
        saved = torch.load(file, mmap=True, weights_only=True)  # mmap: read from disk when needed
    except Exception:  # there is no such file yet, or it is damaged
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent) as pixels:
            data = prepare_images(name, size, items, open_item, labels, names, pixels)
            save(tuple(data), file)
        saved = torch.load(file, mmap=True, weights_only=True)
    data = Data(*saved)
    counts = dict(zip(data.names[:40], data.labels.sum(0).tolist()))
    more = f" and {len(data.names) - 40} more" if len(data.names) > 40 else ""
    print(f"labels: {counts or 'none'}{more}")
    return data


def prepare_images(name, size, items, open_item, labels, names, file):
    """-> Data, its pixels in a file, not in memory. Copies and unreadable files are left out."""
    order = random.Random(0).sample(range(len(items)), len(items))  # mixed: images[:64] are varied
    kept, contents, broken, digest = [], set(), [], hashlib.sha1()

    def decode(i):
        try:
            image = ImageOps.fit(open_item(items[i]), (size, size), Image.BILINEAR)
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes()  # (3, size, size)
        except Exception as error:  # a broken file can make Pillow raise anything
            broken.append(f"{items[i]}: {error}")

    with ThreadPool() as pool:
        for i, pixels in zip(order, pool.imap(decode, order, chunksize=16)):
            content = hash(pixels), labels[i].tobytes()  # copies have the same one
            if pixels and (content not in contents or name in SETS):  # published sets keep copies
                contents.add(content)
                kept.append(i)
                file.write(pixels)
                digest.update(pixels)
                if len(kept) % 10_000 == 0:
                    print(f"preparing {name}: {len(kept):,} of {len(items):,} images", flush=True)
    copies = len(items) - len(kept) - len(broken)
    if copies or broken:
        print(f"left out: {copies} copies, {len(broken)} unreadable files", *broken[:1], sep=": ")
    if len(kept) < 2:
        user_error(f"--data {name}: no image that can be read, or only one")
    images = np.memmap(file, np.uint8, "r+", shape=(len(kept), 3, size, size))
    if images.max() < 64:
        print(f"these images are dark: the brightest value is {images.max()} of 255")
    grey = all((image == image[0]).all() for image in images)
    images = np.ascontiguousarray(images[:, :1] if grey else images)
    used = np.flatnonzero(labels[kept].any(0))  # without labels that no image has
    labels, names = labels[kept][:, used], [names[k] for k in used]
    digest.update(repr((names, labels.tobytes())).encode())
    return Data(torch.from_numpy(images), torch.from_numpy(labels), names, digest.hexdigest())


def find_images(name, size, root, split):
    """-> items, a function that opens one of them, their labels (N, K) of 0 and 1, K names."""
    if name in SETS and os.path.isdir(name):
        print(f"{name} is the built-in set; for the folder of that name, give ./{name}")
    if name == "cartoon":
        labels = np.random.RandomState(int(split == "test")).randint(0, 2, (2560, 5), np.uint8)
        return range(2560), lambda i: draw_face(f"{split} {i}", 4 * size, labels[i]), labels, FACE
    if name == "celeba":
        return find_celeba(root, split)
    if name not in SETS:
        return find_folder(name)
    kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}[name]
    try:
        found = getattr(torchvision.datasets, kind)(root, train=split == "train", download=True)
    except Exception as error:  # a damaged file can make torchvision raise anything
        user_error(f"{name} is missing in {root}, or damaged (delete it); no download: {error!r}")
    pixels, labels = np.asarray(found.data), np.eye(10, dtype=np.uint8)[list(found.targets)]
    if name != "cifar10" and size != 28:  # a frame makes 28 px 32: sharper than scaling
        pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    return range(len(pixels)), lambda i: Image.fromarray(pixels[i]), labels, found.classes


def find_celeba(root, split):
    """CelebA or a part of it, anywhere below root. "train" is the published parts train and val."""
    images, rows, names = {}, {}, []
    for file in list_files(root):
        name, ending = os.path.splitext(os.path.basename(file))
        if name.isdecimal() and "img_align_celeba" in file.split(os.sep):
            images[int(name)] = file
        elif name == "list_attr_celeba" and ending in (".txt", ".csv"):
            try:
                rows, names = read_table(file)
            except ValueError as error:
                print(f"{file} is not read: {error}")
    if not images:
        user_error(f"no img_align_celeba with images below {root}. It and list_attr_celeba.txt are "
                   "at https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and on Kaggle")
    published = range(1, 182638) if split == "train" else range(182638, 202600)
    part = [n for n in published if n in images and (n in rows or not rows)]
    print(f"celeba: {len(part):,} of the {len(published):,} images of the {split} part")
    labels = np.frombuffer(b"".join(rows.get(n, b"") for n in part), np.uint8)  # one after another

    def open_face(file):  # the centre, 128 x 128 pixels, of a published image
        image = open_image(file)
        return image.crop((25, 45, 153, 173)) if image.size == (178, 218) else image
    return [images[n] for n in part], open_face, labels.reshape(len(part), len(names)), names


def read_table(file):
    """CelebA's table -> {number of an image: bytes, 0 or 1 for each of K attributes}, K names."""
    text = Path(file).read_text("utf-8-sig").translate({ord(c): " " for c in ',;"'})
    lines = text.strip().splitlines()  # words with blanks between them
    start = 1 if lines and lines[0].split()[1:] else 2  # line 1 of the authors' is the row count
    names, rows = "".join(lines[start - 1 : start]).replace("image_id", "").split(), {}
    for i, line in enumerate(lines[start:], start + 1):  # 000001.jpg -1 1, or 7 000001.jpg -1 1
        image, *values = line.split()[-1 - len(names) :] or [""]
        number = re.fullmatch(r"(\d+)\.[a-zA-Z]+", image)
        wrong = not number or len(values) < len(names) or not set(values) <= YES_NO.keys()
        if wrong or int(number[1]) in rows:
            raise ValueError(f"line {i} is not a new image and {len(names)} times -1, 0 or 1")
        rows[int(number[1])] = bytes(map(YES_NO.get, values))
    if not rows:
        raise ValueError("it has no rows")
    return rows, names


def find_folder(name):
    """All files below a folder, at any depth. If most are in sub-folders, these are the labels."""
    if not os.path.isdir(name):
        user_error(f"--data {name!r} is neither a folder nor one of {', '.join(SETS)}")
    parts = {file: os.path.relpath(file, name).split(os.sep) for file in list_files(name)}
    inside = [p[0] for p in parts.values() if p[1:]]
    names = sorted(set(inside))
    if names and (len(inside) <= len(parts) / 2 or len(names) > 1000):
        print(f"no labels: {len(names)} sub-folders have {len(inside)} of the {len(parts)} files")
        names = []
    # train and test are no labels, and a single folder with sub-folders is none. (train first)
    splits = {"train", "test", "val", "valid", "validation"}
    for top, *rest in sorted(parts.values(), key=lambda p: p[0].lower() != "train"):
        deeper = len(rest) > 1 and (top.lower() in splits or names == [top])
        if deeper or names and rest and splits.issuperset(map(str.lower, names)):
            user_error(f"--data {name}: the images are one folder deeper; give {name}/{top}")
    column = {label: k for k, label in enumerate(names)}
    files = [file for file in parts if parts[file][0] in column or not names]
    if len(files) < len(parts):
        print(f"left out: {len(parts) - len(files)} files that are in no label's folder")
    labels = np.eye(len(names), dtype=np.uint8)[[column[parts[f][0]] for f in files if names]]
    return files, open_image, labels.reshape(len(files), len(names)), names


def list_files(folder):
    """All files below a folder but hidden ones, prepared sets, and runs. Links are followed."""
    found, visited = [], set()
    for parent, folders, files in os.walk(Path(folder), onerror=print, followlinks=True):
        real, is_a_run = os.path.realpath(parent), "samples" in folders and "real.png" in files
        if real in visited:
            print(f"left out: {parent}, since it is {real}, which is read already")
        if real in visited or is_a_run:
            folders[:], files = [], []  # os.walk() goes on with what is left in folders
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [os.path.join(parent, name) for name in files
                  if name[0] != "." and name[-3:] != ".pt" and name != "labels.csv"]
    return sorted(filter(os.path.isfile, found))


def open_image(path):
    """An image file as RGB: upright, 8 bits, on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":  # 16 bits, or fractions: convert() would clip them
        values = np.asarray(image, np.float64)
        white = 65535 if image.mode[0] == "I" else 255 if values.max() > 1 else 1  # white's value
        if not 0 <= values.min() <= values.max() <= white:
            raise ValueError(f"its values, {values.min():g} to {values.max():g}, may mean anything")
        image = Image.fromarray((255 / white * values).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def draw_face(seed, side, labels):
    """A cartoon face with the labels of FACE (five numbers, 0 or 1); all the rest is random."""
    blond, glasses, open_mouth, smile, lipstick = labels
    rng = random.Random(seed)
    vary, tan = rng.uniform, rng.random()
    image = Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in "RGB"))
    pen = ImageDraw.Draw(image)
    x, y, w, h = vary(0.46, 0.54), vary(0.5, 0.56), vary(0.27, 0.32), vary(0.34, 0.39)

    def oval(u, v, ru, rv, fill, start=0, end=360, outline=None):  # in units of the face's radii
        box = x + w * (u - ru), y + h * (v - rv), x + w * (u + ru), y + h * (v + rv)
        pen.chord([side * edge for edge in box], start, end, fill, outline, side // 50)

    skin = (int(248 - 110 * tan), int(212 - 120 * tan), int(180 - 125 * tan))
    hair = (rng.randint(190, 250), 180, 75) if blond else (rng.randint(40, 70), 42, 32)
    shadow = tuple(int(0.7 * c) for c in skin)
    oval(0, -0.15, 1.22, vary(1.08, 1.2), hair)
    oval(0, 0.45, 1.22, vary(0.5, 0.9), hair)
    oval(0, 0, 1, 1, skin)
    oval(0, 0, 1, 1, hair, 210, 330)  # a fringe
    oval(0, 0.18, 0.08, 0.1, shadow)  # a nose
    for u in (-0.42, 0.42):
        oval(u, -0.12, 0.2, 0.13, "white")
        oval(u, -0.12, 0.1, 0.11, "black")
        if glasses:
            oval(u, -0.12, 0.34, 0.27, None, outline="black")
    v, ru, rv, end = (0.42, 0.42, 0.3, 180) if smile else (0.56, 0.3, 0.2, 360)
    lips, lip = ((200, 20, 50), 0.1) if lipstick else (shadow, 0.05)
    oval(0, v, ru + lip * open_mouth, lip + (rv if open_mouth else 0.1 * smile), lips, 0, end)
    if open_mouth:
        oval(0, v, ru, rv, (60, 10, 20), 0, end)
    return image


def parse_arguments(argv):
    """-> the settings. args.checkpoint is what --resume or --generate needs, or else empty."""
    parser = argparse.ArgumentParser(  # without a usage text, so that an error is one line
        prog=f"{SCRIPT}.py", usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add, devices = parser.add_argument, ["cuda"] * torch.cuda.is_available()
    devices += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    add("--data", default="cartoon", help=f"{', '.join(SETS)}, or a folder of images (cartoon)")
    add("--root", default="data", help="where the data sets are, or are downloaded to (data)")
    add("--size", type=int, choices=SIZES, help="side of the images in pixels")
    add("--epochs", type=float, help="steps are epochs x images / batch (%(default)s)")
    add("--steps", type=int, help="number of training steps, instead of --epochs")
    add("--batch", type=int, help="images in a step (%(default)s)")
    add("--lr", type=float, help="learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="another one gives another run (0)")
    add("--device", choices=devices, help="by default the first of cuda, mps, cpu that is there")
    add("--out", help="folder of the run (runs/SCRIPT-DATA)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--generate", type=int, metavar="N", help="draw N images with the checkpoint in --out")
    cartoon = add_arguments(parser)
    parser.epilog += " On cartoon:" + "".join(f" --{k} {v}" for k, v in cartoon.items())

    args = parser.parse_args(argv)  # a first look: the defaults depend on some of them
    for flag, value in vars(args).items():
        if flag in ABOVE_0 and type(value) in (int, float) and not 0 < value < math.inf:
            user_error(f"--{flag.replace('_', '-')} {value}: it must be above 0 and finite")
    name, checkpoint = Path(args.data).resolve().name, {}
    name += "-folder" * (name in SETS and name != args.data)  # cartoon and ./cartoon are two
    out = Path(args.out or f"runs/{SCRIPT}-{name}")
    if args.data == "cartoon":
        parser.set_defaults(**cartoon)
    if args.resume or args.generate:
        try:
            checkpoint = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
            script = checkpoint.get("script")
        except Exception as error:  # a damaged file can make torch raise anything
            user_error(f"{out / 'checkpoint.pt'}: {str(error)[:200] or 'it is empty'}")
        if script != SCRIPT:
            user_error(f"{out} is a run of another script, or of an earlier version")
        parser.set_defaults(**checkpoint["settings"])
    elif RANK == 0 and any((out / name).exists() for name in ("samples", "checkpoint.pt")):
        user_error(f"{out} holds a run already: --resume it, delete it, or choose another --out")
    args = parser.parse_args(argv)
    for flag, value in checkpoint.get("settings", {}).items():
        if flag in FIXED and vars(args)[flag] != value:
            user_error(f"--{flag.replace('_', '-')} {vars(args)[flag]}: this run has {value}")
    if args.epochs and args.steps == checkpoint.get("settings", {}).get("steps"):
        args.steps = None  # checkpoints have epochs None, so --epochs was given just now
    args.out, args.checkpoint, usual = str(out), checkpoint, SETS.get(args.data, 64)
    args.size = args.size or min(SIZES, key=lambda size: abs(size - usual))
    args.device = torch.device(args.device or devices[0])
    if args.device.type == "cuda":
        torch.cuda.set_device(int(TORCHRUN.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True  # try which convolution is fastest
    return args


def get_data(args):
    """-> Data, on the GPU if it fits there. For --generate, what the checkpoint has of it."""
    before = Data(*args.checkpoint["data"]) if args.checkpoint else None
    if args.generate:
        return before
    data = load_images(args.data, args.size, args.root)
    if before and (data.names, data.images.shape[1]) != (before.names, before.images.shape[1]):
        user_error(f"{args.data} has other labels or channels than this run")
    if before and data.digest != before.digest:
        print(f"{args.data} is not the data that this run began with: some of it has changed")
    if not args.steps:
        args.steps = max(1, round(args.epochs * len(data.images) / args.batch / RANKS))
    done, args.epochs = args.checkpoint.get("step", 0), None
    if done >= args.steps:
        user_error(f"this run has made its {done} steps; for more, give --steps")
    if args.device.type == "cuda" and data.images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        return data._replace(images=data.images.to(args.device), labels=data.labels.to(args.device))
    return data


def main(argv=None):
    """Run with these arguments; by default, with those that this script was started with."""
    if argv is None:  # in a notebook, sys.argv is the notebook's
        argv = sys.argv[1:] if Path(sys.argv[0]).stem == SCRIPT else []

    def begin():
        args = parse_arguments(argv)
        return args, get_data(args)

    try:
        begun = begin() if RANK == 0 else None  # the first of torchrun's processes reports mistakes
        if RANKS > 1:  # and prepares the data, while the others wait here
            kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(kinds)  # gloo connects CPUs, nccl GPUs
            register_optimizer_step_pre_hook(average_gradients)
        args, data = begun or begin()
        torch.manual_seed(hash(args.seed))  # the same first weights in all processes
        train(args, data)
        if RANKS > 1:
            distributed.destroy_process_group()  # without it, a process may crash as it ends
    except OSError as error:
        user_error(error)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells have it after Ctrl-C


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # for names that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
