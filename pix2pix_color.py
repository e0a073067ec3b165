# SPDX-License-Identifier: MIT
"""pix2pix: Isola, Zhu, Zhou and Efros, "Image-to-Image Translation with Conditional Adversarial
Networks", 2016, arXiv 1611.07004. Here it colours grey photos, with four adversarial losses to
compare, as in C. Fabbri, "A Comparative Study of GANs Towards Automatic Image Colorization", 2017.

G sees the lightness x of a photo and predicts its colours y (of CIELAB: x is L, y is a and b). A
blue shirt and a red one can look alike in grey. The guess with the smallest error on average lies
between them: brown. D sees x and y together, learns that brown shirts are rare, and makes G decide.

    L_G = w * L_A + l1 * E[|y - y'|] + l2 * E[(y - y')^2]      y' = G(x); Eq. 4, l2 is Fabbri's

            L_D                                                L_A
    gan     -1/2 E[log D(x, y)] - 1/2 E[log(1 - D(x, y'))]     -E[log D(x, y')]          Eq. 1
    lsgan   1/2 E[(D(x, y) - 1)^2] + 1/2 E[D(x, y')^2]         1/2 E[(D(x, y') - 1)^2]   1611.04076
    wgan    E[D(x, y')] - E[D(x, y)]                           -E[D(x, y')]              1701.07875
    ebgan   E[D(x, y)] + E[max(0, m - D(x, y'))]               E[D(x, y')]               1609.03126

--adversarial chooses L_D and the adversarial loss L_A; --adversarial-weight is w. The larger w is,
the more colour there is, and the more error: a bold guess is further from the truth, on average,
than a pale one. The losses differ in scale: on photographs (CIFAR-10), G's gradient of w * L_A was
a quarter to a half of that of 100 * E[|y - y'|] with w = 1 for gan, 3 for lsgan, 40 for wgan, 100
for ebgan. With w = 1, wgan and ebgan add almost nothing to the distances.

Changes from dcgan.py:
  - G is a U-Net, from image to image: on the way up, every layer also sees the maps of its size
    from the way down (Sec. 3.2.1). There is no z; dropout is the only noise (Sec. 3.1)
  - D judges patches of 70x70 pixels, each by itself (Sec. 3.2.2). For ebgan it is an autoencoder,
    and its error is the energy: low for colours like those of the data
  - the losses. L_D is halved (Sec. 3.3). wgan has RMSprop, several D steps for one of G, and clips
    D's weights, as wgan.py does. Layers without BatchNorm have a bias, the autoencoder's others too
  - RGB becomes Lab and back, and half of the training images are mirrored
  - 64 images are never trained on. Pictures show them in triples: grey, coloured, true. In
    losses.csv, L1 is their mean error of a and b; L1/grey divides it by that of no colour at all;
    PSNR is of RGB, in dB; chroma is the mean of sqrt(a^2 + b^2) over the true one, near 0 if all is
    grey. D(y) and D(G(x)) are D's mean outputs. --generate N writes the first N, coloured
  - --colorize colours photos. G sees a photo with its short side at --size, continued by mirror
    images until both sides are multiples of --size. The photo keeps its shape, and its lightness
    wherever a screen can show the colour

Differs from the paper:
  - it has ImageNet at 256 px, in batches of 4. Here --size is 128, or 64 with fewer layers
  - it draws with dropout and the batch's statistics; here a photo always gets the same colours
  - D returns logits, and batches are drawn with replacement, as in dcgan.py
  - the fakes of D's last step serve G, as in the paper's code, for wgan too. Its scores are means
    over patches. ebgan has no pull-away term
  - Fabbri does not halve L_D. His code has beta1 = 0.9, random crops, resize-convolutions by
    default, no skip of the first layer; for wgan a gradient penalty, and a LeakyReLU on D's output
  - with L1 and L2, he trained gan at 1e-4 and 2e-5 (8 epochs), lsgan at 1e-4 (4 and 6), ebgan at
    1e-3 (1), wgan at 5e-5 (2 and 3). His L2 = 1 is --l2 262144 here, which leaves L_A no say
  - his autoencoder does not see x, and his margin of 80 is for another energy. Here it is a mean
    square: about 0.013 for CIFAR-10's photos and 0.02 for CelebA's, if reconstructed as grey. The
    margin has to be less
  - he leaves out grey photos of one data set, Places2; here they stay in

    python pix2pix_color.py                                       # cartoon faces, on a CPU
    python pix2pix_color.py --data celeba                         # photographs of faces
    python pix2pix_color.py --data celeba --colorize old/*.jpg    # your photos, by that run
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
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.utils import save_image

# --- colours --------------------------------------------------------------------------------------
# CIELAB separates lightness from colour. L is 0 (black) to 100 (white); a runs from green (-86) to
# red (98), b from blue (-108) to yellow (94), and both are 0 for every grey. sRGB, white point D65.
# The networks have x = L / 50 - 1 and y = (a, b) / 110, in [-1, 1], so tanh can reach all colours.

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
    """Lightness and colours -> a logit or a score for each patch of 70x70 pixels."""

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
        case "ebgan":  # the hinge is taken image by image
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
    """This paper's defaults and its own flags. Returns the defaults that differ on cartoon."""
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
    add("--colorize", nargs="+", metavar="FILE", dest="generate",
        help="colour photos, or all photos in a folder, with the checkpoint in --out")
    return {"size": 64, "epochs": 3, "width": 32}


def train(args, data):
    """Build the networks and their optimisers, and run the training loop."""
    if isinstance(args.generate, list):  # of --colorize
        return colorize(args)
    if data.images.shape[1] == 1:
        user_error(f"{args.data} has no colour to learn")
    if len(data.images) < (args.generate or 65):  # 64 are held out
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

            # D's step. detach() keeps its gradient out of G. D sees reals and fakes separately: in
            # one batch, BatchNorm would average over both and hide from D how they differ.
            d_real, d_fake = D(x, y), D(x, fake.detach())
            loss_D = d_loss(d_real, d_fake, args.adversarial, args.margin)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()
            if wgan:
                clip(D, args.clip)

        # G's step, against the improved D. The gradient flows back through D into G; with inputs=,
        # none is computed for D's weights.
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
        return 2 * torch.stack(triples, 1).reshape(8, 9, *truth.shape[1:]) - 1

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
    # The U-Net halves its maps down to one pixel, so both sides must be multiples of the size.
    y = G(pad(x, (0, -w % size, 0, -h % size), mode="reflect"))[:, :, :h, :w].cpu()
    y = interpolate(y, photo.size[::-1], mode="bicubic")  # coarse: the eye needs no more of colours
    rgb = torch.tensor(np.asarray(photo)).permute(2, 0, 1)[None]
    for strip, colours in zip(rgb.split(256, dim=2), y.split(256, dim=2)):  # to save memory
        x, _ = rgb_to_lab(strip / 255)
        strip.copy_((255 * lab_to_rgb(x, colours)).round())
    return Image.fromarray(rgb[0].permute(1, 2, 0).numpy())


# --- the same in every script from here on --------------------------------------------------------

SCRIPT = Path(__file__).stem
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}  # of several processes,
RANK, RANKS = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))  # this is RANK


def user_error(message):
    """For mistakes that the user can fix: one line on stderr, exit status 2."""
    print(f"{SCRIPT}.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def steps(args, data, draw, to_save, grid=None, measure=lambda: {}):
    """What train()'s loop runs over. Each turn gets an empty dict, to fill with numbers (tensors).

    After every 1 % of the run they are averaged, and all is drawn and saved. --generate only draws.
    draw(n): n images (n, C, size, size) in [-1, 1]. to_save: {name: network or optimiser}.
    grid(): the picture's images (rows, columns, C, size, size), by default 8 x 8 of draw().
    measure(): further columns of losses.csv, {name: number}, by default none.
    """
    saved, out, batch = args.checkpoint, Path(args.out), args.batch * RANKS
    for name, state in saved.get("state", {}).items():
        if name.startswith("opt"):
            state["param_groups"][0]["lr"] = to_save[name].defaults["lr"]  # --lr may be another now
        to_save[name].load_state_dict(state)
    if args.generate:
        return generate(args, draw, to_save["G"])  # and yield nothing: train()'s loop ends
    total = args.steps or max(1, round(args.epochs * len(data.images) / batch))
    done, rows = saved.get("step", 0), saved.get("rows", [])
    if done >= total:
        user_error(f"this run has made its {done} steps; for more, give --steps")
    real = data.images[:64].to(args.device) / 127.5 - 1
    if RANK == 0:
        (out / "samples").mkdir(parents=True, exist_ok=args.resume)  # two runs must not mix
        save_image(real / 2 + 0.5, out / "real.png")
    print(f"{total} steps of {batch} from {len(data.images):,} images on {args.device} -> {out}")

    every, numbers, start = math.ceil(total / 100), [], time.perf_counter()
    for step in range(done + 1, total + 1):
        # A seed for each step (hash() of ints never changes): a resumed run draws the same numbers.
        torch.manual_seed(hash((args.seed, step, RANK)))
        log = {}
        yield log
        numbers.append(torch.stack(list(log.values())).detach())
        if step % every == 0 or step == total:
            means = dict(zip(log, torch.stack(numbers).mean(0).tolist()))
            numbers.clear()
            if RANK == 0:
                with preview(args, to_save["G"]):
                    fakes = draw(64)
                    means["spread"] = float(fakes.std(0).mean() / real.std(0).mean())
                    means |= measure()
                    picture = grid() if grid else fakes.unflatten(0, (8, 8))
                rows.append({"step": step, **means})
                rate = (step - done) / (time.perf_counter() - start)  # steps per second
                speed = f"{(total - step) / rate / 60:.1f} min left  {batch * rate:.0f} images/s"
                print(f"step {step}/{total}  {speed}",
                      *(f"{k} {v:.3g}" for k, v in means.items()), sep="  ", flush=True)
                if step >= 500 and means["spread"] < 0.1:
                    print("MODE COLLAPSE: all images look alike")
                record(args, data, to_save, rows, picture, step == total)


def record(args, data, to_save, rows, picture, last):
    """Write losses.csv, curves.png, a picture, the checkpoint and, at the end, training.gif."""
    out, names, table = Path(args.out), list(rows[0]), np.array([list(r.values()) for r in rows])
    if not np.isfinite(table).all():
        user_error("a number is not finite; a smaller --lr may help")
    np.savetxt(out / "losses.csv", table, "%.8g", ",", header=",".join(names), comments="")
    curves = Image.new("RGB", (640, 120 * len(names)), "white")
    pen, x = ImageDraw.Draw(curves), np.interp(table[:, 0], table[[0, -1], 0], (5, 635))
    for top, name, values in zip(range(0, curves.height, 120), names, table.T):
        low, high = values.min(), values.max()
        y = np.interp(values, (low, high), (top + 115, top + 25))
        pen.line(list(zip(x, y)), "navy", 2)
        pen.text((5, top + 8), f"{name}: {low:.3g} to {high:.3g}, now {values[-1]:.3g}", "black")
    curves.save(out / "curves.png")
    samples, step = out / "samples", rows[-1]["step"]
    save_image(picture.flatten(0, 1) / 2 + 0.5, out / "new.png", nrow=picture.shape[1])
    os.replace(out / "new.png", samples / f"{step:06}.png")  # so samples has whole pictures only
    if last:
        files = sorted(samples.glob("[0-9]*.png"))
        frames = [Image.open(file) for file in [*files[:-1:4], files[-1]]]  # each fourth, the last
        first, *others = [frame.reduce(math.ceil(max(frame.size) / 300)) for frame in frames]
        first.save(out / "training.gif", append_images=others, save_all=True, duration=200, loop=0)
    settings = {**vars(args), "checkpoint": None, "device": None}  # these two are not kept
    state = {name: part.state_dict() for name, part in to_save.items()}
    # --generate needs no more of the data. (Without clone(), a slice is saved as the whole tensor.)
    some_data = data.images[:64].cpu().clone(), data.labels[:50_000].cpu().clone(), data.names
    torch.save({"script": SCRIPT, "step": step, "rows": rows, "settings": settings,
                "state": state, "data": some_data}, out / "checkpoint.tmp")
    os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")  # there is never half a checkpoint


@contextlib.contextmanager
def preview(args, G):
    """For drawing: G in eval mode, no gradients, the same random numbers every time."""
    torch.manual_seed(args.seed)
    G.eval()
    with torch.no_grad():
        yield
    G.train()


def generate(args, draw, G):
    """--generate N: N numbered images, in place of those of an earlier call."""
    folder = Path(args.out) / "generated"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9]*.png"):
        old.unlink()
    with preview(args, G):
        for first in range(0, args.generate, 64):
            for i, image in enumerate(draw(min(64, args.generate - first)), first):
                save_image(image / 2 + 0.5, folder / f"{i:05}.png")
    print(f"{args.generate} images in {folder}")


def average_gradients(optimiser, *_):
    """Before an optimiser's step: gradients become their means over torchrun's processes."""
    for group in optimiser.param_groups:
        for p in group["params"]:
            distributed.all_reduce(p.grad.div_(RANKS))


# Data: every set becomes one uint8 tensor.
Data = namedtuple("Data", "images labels names")  # (N, C, size, size) uint8; (N, K) 0 or 1; K names
SETS = {"cartoon": 32, "mnist": 28, "fashion_mnist": 28, "cifar10": 32, "celeba": 64}  # their sizes
FACE = ["Blond_Hair", "Eyeglasses", "Mouth_Slightly_Open", "Smiling", "Wearing_Lipstick"]


def sample_batch(data, n, device):
    """n random rows, with replacement -> images (n, C, size, size) in [-1, 1], labels (n, K)."""
    i = torch.randint(len(data.images), (n,), device=data.images.device)
    return data.images[i].to(device) / 127.5 - 1, data.labels[i].to(device).float()


def load_images(name, size, root="data", split="train"):
    """A set by name (split "train" or "test"), or a folder -> Data. Kept in root/prepared."""
    items, open_item, labels, names = find_images(name, size, Path(root), split)
    facts = [(os.path.getsize(x), os.path.getmtime(x)) for x in items if isinstance(x, Path)]
    key = hashlib.sha1(repr((items, facts, names, labels.tobytes())).encode()).hexdigest()[:16]
    file = Path(root) / "prepared" / f"{Path(name).name[:40]}-{size}-{split}-{key}.pt"
    if not file.exists():  # the key is another one if any image or label has changed
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent) as pixels:
            data = prepare_images(name, size, items, open_item, labels, names, pixels)
            torch.save(tuple(data), f"{file}.{os.getpid()}")
        os.replace(f"{file}.{os.getpid()}", file)
    data = Data(*torch.load(file, mmap=True, weights_only=True))
    print("labels:", dict(zip(data.names, data.labels.sum(0).tolist())) or "none")
    return data


def prepare_images(name, size, items, open_item, labels, names, file):
    """-> Data, its pixels in a file, not in memory. Copies and unreadable files are left out."""
    order = random.Random(0).sample(range(len(items)), len(items))  # random, always the same
    kept, contents, broken = [], set(), []

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
                if len(kept) % 10_000 == 0:
                    print(f"preparing {name}: {len(kept):,} of {len(items):,} images", flush=True)
    copies = len(items) - len(kept) - len(broken)
    several = len(contents) - len({pixels for pixels, _ in contents})
    if copies or broken:
        print(f"left out: {copies} copies, {len(broken)} unreadable files", *broken[:1], sep=": ")
    if several and name not in SETS:
        print(f"{several} images are in more than one sub-folder")
    if len(kept) < 2:
        user_error(f"--data {name}: no image that can be read, or only one")
    images = np.memmap(file, np.uint8, "r+", shape=(len(kept), 3, size, size))
    grey = all((image == image[0]).all() for image in images)
    images = np.ascontiguousarray(images[:, :1] if grey else images)
    used = np.flatnonzero(labels[kept].any(0))  # without labels that no image has
    labels = torch.from_numpy(labels[kept][:, used])
    return Data(torch.from_numpy(images), labels, [names[k] for k in used])


def find_images(name, size, root, split):
    """-> items, a function that opens one of them, their labels (N, K) of 0 and 1, K names."""
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
    except (RuntimeError, OSError) as error:
        user_error(f"{name} is not in {root}, and could not be downloaded: {error}")
    pixels, labels = np.asarray(found.data), np.eye(10, dtype=np.uint8)[list(found.targets)]
    if name != "cifar10" and size != 28:  # a frame around 28 px: sharper than scaling
        pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    return range(len(pixels)), lambda i: Image.fromarray(pixels[i]), labels, found.classes


def find_celeba(root, split):
    """CelebA or a part of it, anywhere below root. "train" is the published parts train and val."""
    paths = list_files(root)
    images = {int(path.stem): path for path in paths
              if "img_align_celeba" in path.parts and path.stem.isdecimal()}
    if not images:
        user_error(f"no img_align_celeba with images below {root}. It and list_attr_celeba.txt are "
                   "at https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and on Kaggle")
    tables = [p for p in paths if p.name in ("list_attr_celeba.txt", "list_attr_celeba.csv")]
    text = tables[-1].read_text("utf-8-sig") if tables else ""  # then there are no labels
    # A row is "000001.jpg -1 1 ...", or that with commas. The longest line above has the names.
    rows = {int(n): re.findall(r"-?\d", row) for n, row in re.findall(r"(\d+)\.\w+(.*)", text)}
    header = max(re.split(r"\d+\.", text)[0].splitlines(), key=len, default="")
    names = re.findall(r'[^\s,;"]+', header.split("image_id")[-1])
    published = range(1, 182638) if split == "train" else range(182638, 202600)
    part = [n for n in published if n in images and (n in rows or not rows)]
    print(f"celeba: {len(part):,} of the {len(published):,} images of the {split} part")
    labels = np.array([rows.get(n, []) for n in part]).reshape(len(part), len(names)) == "1"

    def open_face(file):  # the centre, 128 x 128 pixels, of a published image
        image = open_image(file)
        return image.crop((25, 45, 153, 173)) if image.size == (178, 218) else image
    return [images[n] for n in part], open_face, labels.astype(np.uint8), names


def find_folder(name):
    """All images below a folder, at any depth. Its sub-folders, if there are any, are labels."""
    if not os.path.isdir(name):
        user_error(f"--data {name!r} is neither a folder nor one of {', '.join(SETS)}")
    folder, known = os.path.abspath(name), Image.registered_extensions()
    parts = {file: file.relative_to(folder).parts for file in list_files(folder)}
    names = sorted({p[0] for p in parts.values() if p[1:] and Path(p[-1]).suffix.lower() in known})
    for top, *rest in sorted(parts.values(), key=lambda p: p[0].lower() != "train"):  # train first
        of_a_set = top.lower() in ("train", "test", "val", "valid", "validation")
        if len(rest) > 1 and (of_a_set or names == [top]):
            user_error(f"--data {name}: the labels are one folder deeper; give {name}/{top}")
    files = [file for file in parts if parts[file][0] in names or not names]
    if len(files) < len(parts):
        print(f"left out: {len(parts) - len(files)} files that are in no label's folder")
    labels = np.array([[parts[file][0] == label for label in names] for file in files], np.uint8)
    return files, open_image, labels.reshape(len(files), len(names)), names


def list_files(folder):
    """All files below a folder but hidden ones, prepared sets, and runs. Links are followed."""
    found, visited = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited or ("samples" in folders and "real.png" in files):  # a circle; a run
            folders[:], files = [], []  # os.walk() goes on with what is left in folders
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [Path(parent, name) for name in files if name[0] != "." and name[-3:] != ".pt"]
    return sorted(filter(os.path.isfile, found), key=str)


def open_image(path):
    """An image file as RGB: upright, 8 bits, on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":  # more than 8 bits, or fractions: convert() would clip them
        values = np.asarray(image, np.float64)
        low, high = values.min(), values.max()
        white = 1 if high <= 1 else 255 if high <= 255 or image.mode == "F" else 65535
        if not 0 <= low <= high <= white or 1 < high < 2:
            raise ValueError(f"its values, {low:g} to {high:g}, may mean anything")
        image = Image.fromarray((255 / white * values).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def draw_face(seed, side, labels):
    """A cartoon face with the labels of FACE (five of 0 and 1); all the rest is random."""
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
    add = parser.add_argument
    add("--data", default="cartoon", help=f"{', '.join(SETS)}, or a folder of images (cartoon)")
    add("--root", default="data", help="where the data sets are, or are downloaded to (data)")
    add("--size", type=int, choices=SIZES, help="side of the images in pixels")
    add("--epochs", type=float, help="makes epochs x images / batch training steps (%(default)s)")
    add("--steps", type=int, help="number of training steps, instead of --epochs")
    add("--batch", type=int, help="images in a step (%(default)s)")
    add("--lr", type=float, help="learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="another one gives another run (0)")
    add("--device", help="cuda, mps or cpu; by default the first of them that is there")
    add("--out", help="folder of the run (runs/SCRIPT-DATA)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--generate", type=int, metavar="N", help="draw N images with the checkpoint in --out")
    cartoon = add_arguments(parser)
    parser.epilog += " On cartoon:" + "".join(f" --{k} {v}" for k, v in cartoon.items())

    args = parser.parse_args(argv)  # for now: the defaults depend on some of them
    out, checkpoint = Path(args.out or f"runs/{SCRIPT}-{Path(args.data).resolve().name}"), {}
    if args.data == "cartoon":
        parser.set_defaults(**cartoon)
    if args.resume or args.generate:
        checkpoint = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        if checkpoint.get("script") != SCRIPT:
            user_error(f"{out} is a run of another script, or of an earlier version")
        parser.set_defaults(**checkpoint["settings"])
    elif (out / "samples").exists():
        user_error(f"{out} holds a run already: --resume it, delete it, or choose another --out")
    args = parser.parse_args(argv)
    args.out, args.checkpoint, usual = str(out), checkpoint, SETS.get(args.data, 64)
    args.size = args.size or min(SIZES, key=lambda size: abs(size - usual))
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    args.device = torch.device(args.device or best)
    if args.device.type == "cuda":
        torch.cuda.set_device(int(TORCHRUN.get("LOCAL_RANK", args.device.index or 0)))
        torch.backends.cudnn.benchmark = True
    return args


def get_data(args):
    """-> Data, on the GPU if it fits there. For --generate, what the checkpoint has of it."""
    if args.generate:
        return Data(*args.checkpoint["data"])
    data = load_images(args.data, args.size, args.root)
    if args.resume and data.names != Data(*args.checkpoint["data"]).names:
        user_error(f"{args.data} has other labels than this run")
    if args.device.type == "cuda" and data.images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        return Data(data.images.to(args.device), data.labels.to(args.device), data.names)
    return data


def main(argv=None):
    """Run with these arguments; by default, with those of the command line."""
    try:
        args = parse_arguments(argv)
        data = get_data(args) if RANK == 0 else None  # torchrun's first process prepares the data
        if RANKS > 1:
            kinds = "cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo"
            distributed.init_process_group(kinds)  # where the others wait for it
            register_optimizer_step_pre_hook(average_gradients)
        data = data or get_data(args)
        torch.manual_seed(args.seed)  # the same first weights in all processes
        train(args, data)
        if RANKS > 1:
            distributed.destroy_process_group()  # without it, a process may crash as it ends
    except OSError as error:
        user_error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    main()
