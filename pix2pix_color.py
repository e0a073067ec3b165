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
  - 64 images are held out, and never trained on. Pictures show them in triples, grey, coloured,
    true; --generate N writes the first N of them, coloured
  - --colorize FILE... colours photos of any size: they keep their size and their lightness
  - losses.csv: D(y) and D(G(x)) are D's mean outputs. On the held-out images, L1 is the mean error
    of a and b in units of Lab; L1/grey is L1 divided by that of no colour at all; PSNR is in dB,
    from the mean square error of RGB over all of them; chroma is the mean strength of the colours,
    sqrt(a^2 + b^2), divided by the true one: near 0 all is grey, as Fabbri's EBGAN with L1 was.
    The spread comes from x for the most part, and says little

Differs from the paper:
  - pictures are made without dropout and with BatchNorm's running averages (eval mode), so that a
    photo gets the same colours every time; the paper keeps the dropout and the batch's statistics
  - the paper has 256 px, ImageNet, batches of 4 and about 6 epochs for colour. --size is 128
    here, and may be 64 or 256, with 7, 6 or 8 levels in the U-Net; patches stay 70x70, which is
    more than an image of 64 has. Batches of 16 keep a GPU busy. 8 epochs are Fabbri's, also in
    batches of 4; he has random crops, the paper mirrors only
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

Which --gan makes the forms comparable? The ratio is the norm of the gradient that gan * A_G gives G
over that of the L1 term, at the end of a run (tests/measure_colour.py). On photographs (CIFAR-10 as
a folder, 64 px, --width 32, batches of 8, --l1 100):

    --adversarial   --gan   steps   ratio   L1/grey   PSNR   chroma
    (none)              0     600   0          0.94   22.3     0.39
    gan                 1     600   0.45       1.13   21.0     0.81
    gan                 1   1,800   0.46       1.25   20.5     0.95
    lsgan               1     600   0.18       0.99   22.1     0.49
    lsgan               3   1,800   0.26       1.18   20.8     0.85
    ebgan               1     600   0.003      0.94   22.3     0.39
    ebgan             100   1,800   0.30       1.05   21.7     0.71
    wgan                1     600   0.01       0.94   22.2     0.40
    wgan               20   1,800   0.01       0.94   22.2     0.47
    wgan               40     600   1.9        1.31   19.7     1.04
    wgan               40   1,800   1.6        1.28   20.3     1.02

With 1, ebgan and wgan are regression with a bystander. D adds colour, and that costs accuracy:
a bold guess is further from the truth, on average, than a pale one.

    python pix2pix_color.py                                        # cartoon faces, on a CPU
    python pix2pix_color.py --data celeba                          # nearly as Fabbri
    python pix2pix_color.py --data celeba --colorize old/*.jpg     # your photos, by that run
    python pix2pix_color.py --adversarial ebgan --out runs/energy  # another adversarial loss
"""

import argparse
import contextlib
import functools
import hashlib
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import namedtuple
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import distributed, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
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
    parser.set_defaults(size=128, batch=16, epochs=8)
    parser.epilog = ("--lr is 2e-4 by default, with wgan 5e-5. --lr, --gan, --l1 are the paper's, "
                     "--clip, --critic, wgan's --lr the WGAN paper's, --epochs Fabbri's (2017).")
    add = parser.add_argument
    add("--width", type=int, default=64, help="channels at half size (64, the paper's)")
    add("--adversarial", choices=["gan", "lsgan", "ebgan", "wgan"], default="gan",
        help="form of L_D and A_G (gan)")
    add("--gan", type=float, default=1.0, help="weight of A_G in L_G (1)")
    add("--l1", type=float, default=100.0, help="weight of E[|y - G(x)|] (100)")
    add("--l2", type=float, default=0.0, help="weight of E[(y - G(x))^2] (0)")
    add("--margin", type=float, default=0.005, help="m of ebgan (0.005)")
    add("--clip", type=float, default=0.01, help="largest weight of wgan's D (0.01)")
    add("--critic", type=int, default=5, help="D steps per G step of wgan (5)")
    add("--colorize", nargs="+", metavar="FILE", action=Colorize,
        help="colour these photos with the checkpoint")
    return {"size": 64, "batch": 16, "epochs": 3, "width": 32}


def train(args, data):
    """Build the networks, define the training step, hand over to fit()."""
    G = Generator(args.size, args.width).apply(init_weights_and_biases).to(args.device)
    if args.colorize:
        return colorize(args, G)
    held_out = data.images[:64].to(args.device)
    if data.images.shape[1] == 1:
        refuse(f"{args.data} has no colour to learn")
    if len(data.images) <= 64 and not args.generate:
        refuse(f"{args.data} has {len(data.images)} images; 64 are held out, so 65 are needed")
    if (args.generate or 0) > len(held_out):
        refuse(f"--generate: the checkpoint has {len(held_out)} images to colour, not "
               f"{args.generate}; --colorize takes any photo")

    wgan = args.adversarial == "wgan"
    D = (Autoencoder if args.adversarial == "ebgan" else Discriminator)(args.width)
    D = D.apply(init_weights_and_biases).to(args.device)
    args.lr = args.lr or (5e-5 if wgan else 2e-4)  # in args, so that the checkpoint knows it
    optimiser = functools.partial(torch.optim.Adam, betas=(0.5, 0.999))
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
    """n random images, but none of the first 64, half of them mirrored -> x, y."""
    i = torch.randint(64, len(images), (n,), device=images.device)
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
        i = torch.linspace(0, len(x) - 1, 24).long()
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
    G.load_state_dict(args.saved["parts"]["G"])
    names, unread = [], []
    for path in args.colorize:
        try:
            photo = np.array(open_image(path))
        except Exception as error:  # Pillow raises almost anything at a broken file
            unread.append(f"{path} ({error})")
            continue
        name, k = Path(path).stem, 2
        while name.lower() in names:  # a/me.jpg and b/me.png become me.png and me-2.png
            name, k = f"{Path(path).stem}-{k}", k + 1
        names.append(name.lower())
        file = Path(args.out) / "colorized" / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        with preview(args, G):
            Image.fromarray(colour_photo(photo, G, args)).save(file)
        print(f"{path} -> {file}")
    if unread:
        refuse(f"{len(unread)} of {len(args.colorize)} photos could not be read: "
               + ", ".join(unread))


def colour_photo(photo, G, args):
    """(h, w, 3) uint8 -> the same: the photo's own lightness, with colours by G.

    Colours may be coarse: the eye takes its detail from lightness.
    """
    strips = torch.from_numpy(photo).permute(2, 0, 1)[None].split(256, dim=2)  # to save memory
    x = torch.cat([to_network(strip / 255)[0] for strip in strips], 2)  # (1, 1, h, w)
    small = nn.functional.interpolate(x, (args.size, args.size), mode="bilinear", antialias=True)
    y = G(small.to(args.device)).cpu()  # (1, 2, size, size)
    y = nn.functional.interpolate(y, x.shape[2:], mode="bicubic")  # (1, 2, h, w)
    strips = zip(x.split(256, dim=2), y.split(256, dim=2))
    rgb = torch.cat([(255 * to_rgb(*strip)[0]).round().byte() for strip in strips], 1)
    return rgb.permute(1, 2, 0).numpy()


# --- the same in every script from here on --------------------------------------------------------
# What a run does and leaves (fit), its files, the data, and the command line (main).

SCRIPT = Path(__file__).stem
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


def refuse(message):
    """For what the user can mend: one line on stderr, exit status 2. Raises SystemExit."""
    print(f"{SCRIPT}.py: {message}".splitlines()[0], file=sys.stderr)
    sys.exit(2)


def fit(args, data, step, draw, parts, grid=None, measure=dict):
    """Train, log, draw and save; with --generate, only draw.

    step()     makes one training step -> {column of losses.csv: 0-dimensional tensor}
    draw(n)    draws n new images -> (n, C, size, size) in [-1, 1]
    parts      every network and optimiser by name: what a checkpoint keeps
    grid()     what pictures show -> (rows, columns, C, size, size); by default 8 x 8 of draw()
    measure()  further columns -> {column: number}; by default none
    """
    try:
        for name, state in args.saved.get("parts", {}).items():
            parts[name].load_state_dict(state)
    except Exception as error:  # there is nothing that foreign content cannot raise
        refuse(f"the checkpoint does not fit these networks: {error}")
    if args.generate:
        return generate(args, draw, parts["G"])
    batch, out = args.batch * RANKS, Path(args.out)  # batch: the images of all processes
    done, rows = args.saved.get("step", 0), args.saved.get("rows", [])
    total = args.steps or max(1, round(args.epochs * len(data.images) / batch))
    args.epochs = total * batch / len(data.images)  # what --resume goes on to
    if done >= total:
        refuse(f"this run has made its {done} steps: ask for more by --epochs or --steps")
    real = data.images[:64].to(args.device) / 127.5 - 1
    if RANK == 0:
        (out / "samples").mkdir(parents=True, exist_ok=bool(args.saved))  # nobody else's from now
        save_image(real / 2 + 0.5, out / "real.png")
    print(f"{total} steps of {batch} from {len(data.images):,} images on {args.device} -> {out}")

    signals, handlers = [], {}  # Ctrl-C and kill are noted, so that no step is cut in half
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores a closed terminal
            handlers[number] = signal.signal(number, lambda n, frame: signals.append(n))
    every, since, sums, start = math.ceil(total / 100), done, 0, time.perf_counter()
    for now in range(done + 1, total + 1):
        # A step's random numbers follow from its number alone: --resume need not restore any.
        torch.manual_seed(hash((args.seed, now, RANK)))
        values = step()
        sums = sums + torch.stack(list(values.values())).detach()
        stop = on_any_process(max(signals, default=0))
        if now % every == 0 or now == total or stop:
            means = (sums / (now - since)).tolist()  # over the steps since the last row
            sums, since = 0, now
            with preview(args, parts["G"]):
                fakes = draw(64)
                spread = float(fakes.std(0).mean() / real.std(0).mean())
                row = {"step": now, **dict(zip(values, means)), "spread": spread, **measure()}
                picture = grid() if grid else fakes.unflatten(0, (8, 8))
            rows.append(row | {"images/s": (now - done) * batch / (time.perf_counter() - start)})
            if RANK == 0:
                record(args, data, parts, rows, picture, total)
        if stop:
            print(f"stopped; to go on: python {SCRIPT}.py --resume --out {args.out!r}")
            sys.exit(128 + stop)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def record(args, data, parts, rows, picture, total):
    """Write what a run leaves: losses.csv, its curves, a picture, the GIF, the checkpoint.

    If a number is NaN or infinite, the run ends before, and the last good checkpoint stays.
    """
    out, names, row, now = Path(args.out), list(rows[-1]), rows[-1], rows[-1]["step"]
    left = timedelta(seconds=round((total - now) * args.batch * RANKS / row["images/s"]))
    line = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "step")
    table = np.array([list(row.values()) for row in rows])
    if not np.isfinite(table).all():
        refuse(f"not finite at step {now}: {line}. A smaller --lr may help")
    np.savetxt(out / "losses.csv", table, "%.8g", ",", header=",".join(names), comments="")
    curves = Image.new("RGB", (640, 120 * len(names)), "white")
    pen, x = ImageDraw.Draw(curves), np.interp(table[:, 0], table[[0, -1], 0], (5, 635))
    for top, name, values in zip(range(0, curves.height, 120), names, table.T):
        low, high = values.min(), values.max()
        y = np.interp(values, (low, high), (top + 115, top + 25))
        pen.line(np.stack((x, y), 1).ravel().tolist(), "navy", 2)
        pen.text((5, top + 8), f"{name}: {low:.3g} to {high:.3g}, now {values[-1]:.3g}", "black")
    curves.save(out / "curves.png")
    file = out / "samples" / f"{now:06}.png"
    save_image(picture.flatten(0, 1) / 2 + 0.5, file, nrow=picture.shape[1])
    if now == total:
        files = sorted(file.parent.glob("[0-9]*.png"))[::-2][::-1]  # every second, and the last
        images = map(Image.open, files)
        first, *others = (image.reduce(math.ceil(max(image.size) / 600)) for image in images)
        first.save(out / "training.gif", save_all=True, append_images=others, loop=0, duration=150)
    passing = {"resume", "generate", "device", "out", "steps", "saved"}
    save_file({
        "form": f"{SCRIPT} 2", "step": now, "rows": rows, "facts": (len(data.images), data.names),
        "settings": {name: x for name, x in vars(args).items() if name not in passing},
        "parts": {name: part.state_dict() for name, part in parts.items()},
        # A few images and labels, so that --generate needs no data.
        "data": (data.images[:64].cpu().clone(), data.labels[:50_000].cpu().clone(), data.names),
    }, out / "checkpoint.pt")
    print(f"step {now}/{total}  {left} left  {line}", flush=True)  # a closed pipe loses nothing now
    collapsed = [row["step"] for row in rows if row["step"] >= 500 and row["spread"] < 0.1]
    if collapsed == [now]:  # it is told once
        print("MODE COLLAPSE: all images look alike (their spread is below 0.1)", flush=True)


@contextlib.contextmanager
def preview(args, G):
    """Inside: G in eval mode, no gradients, the same random numbers every time."""
    torch.manual_seed(args.seed)
    G.eval()
    with torch.no_grad():
        yield
    G.train()


def generate(args, draw, G):
    """--generate: numbered images, in place of those of an earlier call."""
    folder = Path(args.out) / "generated"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9][0-9][0-9]*.png"):
        old.unlink(missing_ok=True)
    with preview(args, G):
        for first in range(0, args.generate, 64):
            for i, image in enumerate(draw(min(64, args.generate - first)) / 2 + 0.5, first):
                save_image(image, folder / f"{i:05}.png")
    print(f"{args.generate} images in {folder}")


def average_gradients(optimiser, *_):
    """Before an optimiser's step: its gradients become their mean over torchrun's processes."""
    for group in optimiser.param_groups:
        for p in group["params"]:
            distributed.all_reduce(p.grad.div_(RANKS))


def on_any_process(number=0):
    """Wait for all processes -> the largest of their numbers."""
    number = torch.tensor(number)
    if distributed.is_initialized():
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
    return number.item()


def save_file(content, path):
    """torch.save to a temporary name, then rename: at no moment is there half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        refuse(f"cannot write {path} (disk full?): {error}")
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path, mmap=False):
    """torch.load to the CPU, of tensors, numbers and strings alone; refuses damaged files."""
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # there is nothing that a damaged file cannot raise
        refuse(f"{path} cannot be read: {error!r}")


# Data: every set becomes one uint8 tensor, shuffled, kept in --root/prepared, read memory-mapped.

Data = namedtuple("Data", "images labels names")  # (N, C, size, size) uint8; (N, K) 0 or 1; K names
SETS = {"cartoon": 32, "mnist": 28, "fashion_mnist": 28, "cifar10": 32, "celeba": 64,
        "lsun_church": 128}  # those with a name, and their usual sizes
NEEDED = {
    "celeba": "img_align_celeba.zip, unzipped below --root, and list_attr_celeba.txt or .csv "
              "(https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)",
    "lsun_church": "church_outdoor_train_lmdb.zip, unzipped in --root (http://dl.yf.io/lsun)"}


def sample_batch(data, n, device):
    """n random rows, with replacement -> images (n, C, size, size) in [-1, 1], labels (n, K)."""
    i = torch.randint(len(data.images), (n,), device=data.images.device)
    return data.images[i].to(device) / 127.5 - 1, data.labels[i].to(device).float()


def load_images(name, size, root="data", split="train"):
    """A data set by name, or a folder of images -> Data: size x size pixels, 1 or 3 channels.

    split is "train" or "test"; a folder is always taken whole. The order is random, but always the
    same; unreadable files and exact copies are left out, and counted.
    """
    try:
        items, open_item, labels, names = find_images(name, size, Path(root), split)
        times = [os.path.getmtime(item) for item in items if isinstance(item, str)]
    except Exception as error:  # a damaged file or a download can raise anything
        usual = f"an undamaged copy, or a folder of images, or one of {', '.join(SETS)}"
        refuse(f"--data {name}: {error!r}. What is needed: {NEEDED.get(name, usual)}")
    stamp = hashlib.sha1(repr((items, names, times)).encode() + labels.tobytes()).hexdigest()
    key = name if name in SETS else hashlib.sha1(bytes(Path(name).resolve())).hexdigest()[:16]
    cache = Path(root) / "prepared" / f"{key}-{size}-{split}.pt"
    if cache.exists() and load_file(cache, mmap=True)["stamp"] == stamp:
        return Data(*load_file(cache, mmap=True)["data"])

    def decode(i):
        with contextlib.suppress(Exception):  # Pillow raises almost anything at a broken file
            image = ImageOps.fit(open_item(items[i]), (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)  # (3, size, size)

    order = random.Random(0).sample(range(len(items)), len(items))  # the first 64: a fair sample
    kept, seen, broken, channels, room = [], set(), [], 1, 6 * size**2 * len(items) / 1e9
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache.parent) as file, ThreadPool() as pool:
        for n, (i, pixels) in enumerate(zip(order, pool.imap(decode, order, chunksize=16))):
            if n % 10_000 == 0:
                print(f"preparing {name}: {n:,} of {len(items):,}, {room:.2f} GB", flush=True)
            if pixels is None:
                broken.append(items[i])
                continue
            key = i if name in SETS else hash(pixels.tobytes())  # published sets keep their copies
            if key not in seen:
                seen.add(key)
                kept.append(i)
                file.write(pixels.tobytes())  # memory may be too small for all
                channels = 3 if (pixels != pixels[:1]).any() else channels  # 1: all were grey
        if len(kept) < len(items):
            copies = len(items) - len(kept) - len(broken)
            print(f"left out: {copies} copies, {len(broken)} unreadable {broken[:1]}")
        if len(kept) < 2:
            refuse(f"{name} has {len(kept)} images that can be used")
        images = np.memmap(file, np.uint8, "r+", shape=(len(kept), 3, size, size))[:, :channels]
        data = torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels[kept]), names
        save_file({"stamp": stamp, "data": data}, cache)
    return Data(*load_file(cache, mmap=True)["data"])


def open_image(path):
    """An image file as RGB: upright, on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] == "I":  # 16 bits, which convert() would clip
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def find_images(name, size, root, split):
    """-> items, a function that opens one, their labels (N, K) of 0 and 1, the K labels' names."""
    if name == "cartoon":
        names = ["Blond_Hair", "Eyeglasses", "Mouth_Slightly_Open", "Smiling", "Wearing_Lipstick"]
        labels = np.random.RandomState(split == "test").randint(0, 2, (2560, 5), np.uint8)
        return range(2560), lambda i: draw_face(f"{split} {i}", 4 * size, *labels[i]), labels, names
    if name in ("mnist", "fashion_mnist", "cifar10"):
        kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}[name]
        found = getattr(torchvision.datasets, kind)(root, train=split == "train", download=True)
        pixels, labels = np.asarray(found.data), np.eye(10, dtype=np.uint8)[list(found.targets)]
        if name != "cifar10" and size != 28:  # 28 px in a frame of 32: sharper than scaled
            pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
        return range(len(pixels)), lambda i: Image.fromarray(pixels[i]), labels, found.classes
    if name == "celeba":
        if not any(root.rglob("list_attr_celeba.*")) and not any(root.rglob("img_align_celeba")):
            torchvision.datasets.CelebA(root, split="all", download=True)
        table = next(root.rglob("list_attr_celeba.*"))  # .txt: a count, names, rows; .csv: no count
        text = table.read_text("utf-8-sig").replace(",", " ")
        lines = [line.split() for line in text.splitlines()]
        names = [name for name in max(lines[:2], key=len) if name != "image_id"]
        rows = {line[0]: line[1:] for line in lines if line and line[0].endswith(".jpg")}
        files = {Path(file).name: file for file in list_images(root) if "img_align_celeba" in file}
        if files.keys() != rows.keys():
            refuse(f"{len(files)} images in img_align_celeba, but {len(rows)} rows in {table}")
        part = [file for file in sorted(rows) if (file < "182638") == (split == "train")]
        labels = np.array([rows[file] for file in part], int).reshape(len(part), len(names)) == 1
        face = (25, 45, 153, 173)  # the centred 128x128 of 178x218 pixels
        return ([files[file] for file in part], lambda file: open_image(file).crop(face),
                labels.astype(np.uint8), names)
    folder = Path(name).resolve()
    if name == "lsun_church":
        folder = root.resolve() / f"church_outdoor_{'train' if split == 'train' else 'val'}"
        if Path(f"{folder}_lmdb").exists():
            found = torchvision.datasets.LSUN(str(root), classes=[folder.name])
            return range(len(found)), lambda i: found[i][0], np.zeros((len(found), 0), np.uint8), []
    files = list_images(folder)
    tops = [file.split(os.sep)[len(folder.parts) : -1][:1] for file in files]  # ["cat"], or []
    names = sorted({top[0] for top in tops if top and name not in SETS})
    if names and [] in tops:
        print(f"labels: {len(names)} sub-folders; {tops.count([])} images are in none of them")
    labels = np.array([[top == [label] for label in names] for top in tops], np.uint8)
    return files, open_image, labels.reshape(len(files), len(names)), names


def list_images(folder):
    """All files below it that Pillow may open, sorted; not those of hidden folders and of runs."""
    found = []
    for top, folders, files in os.walk(os.path.realpath(folder, strict=True), onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))
                      and not os.path.exists(os.path.join(top, name, "checkpoint.pt"))]
        found += [os.path.join(top, name) for name in files if not name.startswith(".")
                  and os.path.splitext(name)[1].lower() in Image.registered_extensions()]
    return sorted(filter(os.path.isfile, found))  # a link may dangle


def draw_face(seed, side, blond, glasses, open_mouth, smiling, lipstick):
    """A cartoon face with these attributes; place, shape and colours are random."""
    rng = random.Random(seed)
    vary, tan = rng.uniform, rng.random()
    image = Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in "RGB"))
    pen = ImageDraw.Draw(image)
    x, y, w, h = vary(0.46, 0.54), vary(0.5, 0.56), vary(0.27, 0.32), vary(0.34, 0.39)

    def oval(u, v, ru, rv, fill, start=0, end=360, outline=None):  # in units of the face
        box = x + w * (u - ru), y + h * (v - rv), x + w * (u + ru), y + h * (v + rv)
        pen.chord([side * edge for edge in box], start, end, fill, outline, side // 50)

    skin = (int(248 - 110 * tan), int(212 - 120 * tan), int(180 - 125 * tan))
    shadow = tuple(int(0.7 * c) for c in skin)
    hair = (rng.randint(190, 250), 180, 75) if blond else (rng.randint(40, 70), 42, 32)
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
    v, ru, rv, end = (0.42, 0.42, 0.3, 180) if smiling else (0.56, 0.3, 0.2, 360)
    lips, lip = ((200, 20, 50), 0.1) if lipstick else (shadow, 0.05)
    oval(0, v, ru + lip * open_mouth, lip + (rv if open_mouth else 0.1 * smiling), lips, 0, end)
    if open_mouth:
        oval(0, v, ru, rv, (60, 10, 20), 0, end)
    return image


def command_line(argv):
    """-> the settings, checked; args.saved is the checkpoint to go on from, empty for a new run."""
    parser = argparse.ArgumentParser(
        f"{SCRIPT}.py", argparse.SUPPRESS, __doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="cartoon", help=f"{', '.join(SETS)}, or a folder of images (cartoon)")
    add("--root", default="data", help="where data sets are, or are downloaded to (data)")
    add("--size", type=int, choices=SIZES, help="side of the images in pixels")
    add("--epochs", type=float, help="passes over the data (%(default)s)")
    add("--steps", type=int, help="training steps, instead of --epochs")
    add("--batch", type=int, help="images in a step (%(default)s)")
    add("--lr", type=float, help="learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="where all random numbers start")
    add("--device", help="cuda, mps or cpu; by default the first of them that is there")
    add("--out", help="folder of the run, by default runs/SCRIPT-DATA")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--generate", type=int, metavar="N", help="draw N images from the checkpoint")
    cartoon = options(parser)
    parser.epilog += " On cartoon:" + "".join(f" --{k} {v}" for k, v in cartoon.items())

    args = parser.parse_args(argv)
    if args.data == "cartoon":
        parser.set_defaults(**cartoon)
    out, saved = Path(args.out or f"runs/{SCRIPT}-{Path(args.data).resolve().name}"), {}
    if args.resume or args.generate is not None:
        saved = load_file(out / "checkpoint.pt")
        if not isinstance(saved, dict) or saved.get("form") != f"{SCRIPT} 2":
            refuse(f"{out} is a run of another script, or of an earlier version")
        parser.set_defaults(**saved["settings"])
    elif (out / "samples").exists():
        refuse(f"{out} holds a run already: --resume it, or choose another --out")
    parser.set_defaults(out=str(out), saved=saved, processes=RANKS)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        usual = 1 if type(value) is int else 0
        low = {"batch": 2, "seed": 0, "lr": 1e-12, "epochs": 1e-9}.get(name, usual)
        if type(value) in (int, float) and not low <= value < math.inf:
            refuse(f"{flag} {value}: not a number from {low:g} on")
        before = saved.get("settings", {}).get(name, value)
        if args.resume and value != before and name not in ("data", "root", "epochs"):
            refuse(f"this run has {flag} {before}; for another, start another --out")
    args.size = args.size or min(SIZES, key=lambda size: abs(size - SETS.get(args.data, 64)))
    try:
        best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        args.device = torch.device(args.device or best)
        if args.device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", args.device.index or 0)))
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        refuse(f"--device {args.device} cannot be used: {error}")
    return args


def get_data(args):
    """Join the other processes, if torchrun started several -> the data, on the GPU if it fits."""
    if RANKS > 1:
        kinds = "cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo"
        distributed.init_process_group(kinds, timeout=timedelta(hours=2))
        register_optimizer_step_pre_hook(average_gradients)
    for turn in (True, False):  # the first process prepares the data, the others find them prepared
        if turn == (RANK == 0):
            data = load_images(args.data, args.size, args.root)
        on_any_process()
    if args.resume and (len(data.images), data.names) != args.saved["facts"]:
        refuse(f"{args.data} has not the images, or not the labels, of this run")
    if args.device.type == "cuda" and data.images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        data = Data(data.images.to(args.device), data.labels.to(args.device), data.names)
    return data


def main(argv=None):
    """Run with these arguments; None means those of the shell."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        args = command_line(argv)
        data = Data(*args.saved["data"]) if args.generate else get_data(args)
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(hash(args.seed))  # the same first weights in all processes
        train(args, data)
    except (OSError, MemoryError, RuntimeError) as error:
        # Of torch's own errors, too little memory and a lost process are not ours to mend.
        if isinstance(error, RuntimeError) and "allocate" not in str(error) and RANKS == 1:
            raise
        refuse(str(error) or "too little memory")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
