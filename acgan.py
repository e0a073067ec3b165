# SPDX-License-Identifier: MIT
"""ACGAN: Odena, Olah and Shlens, "Conditional Image Synthesis with Auxiliary Classifier GANs",
2016, arXiv 1610.09585. The networks are nearly those of Espis and Potrimba, "Deep Learning
Project", University of Bologna, 2020.

G is conditional: labels tell it what to draw. D gets another output layer (a head), an auxiliary
classifier: it learns to read the labels y off real images. G is rewarded when D reads off its fake
the labels y' that G was given, so it draws what can be recognised.

    L_S = E[log D(x)] + E[log(1 - D(G(z, y')))]                         Eq. 2: source, real or fake?
    L_C = E[log P(y|x)] + E[log P(y'|G(z, y'))]                         Eq. 3: which labels?
    L_D = -L_S - aux E[log P(y|x)] - aux_fakes E[log P(y'|G(z, y'))]    aux_fakes is 0 by default
    L_G = -E[log D(G(z, y'))] - aux E[log P(y'|G(z, y'))]               non-saturating

If every image has one label, its class, P is a softmax over the classes. Attributes (CelebA has 40:
smiling, young, ...) do not exclude each other: each has a sigmoid, and log P is the mean over them.

Watch acc(x) and acc(G(z)), how often the second head is right on real and fake images; acc(guess)
is for always guessing the more frequent value. acc(x) above it shows that D has learned labels.

In the networks, spectral norm (arXiv 1802.05957) divides a convolution's weights, as a matrix, by
the largest singular value, the most that it stretches any vector: this limits D's slope. Pixel norm
(arXiv 1710.10196) divides a pixel's features by their root mean square. The minibatch deviation
(same paper) tells D how much the images of a batch differ, so that D can see a mode collapse.

Changes from sngan.py:
  - G(z, y): the labels are appended to z. D has a second head on the same features, and no dropout
  - the losses of that head, weighted by --aux, on fakes in L_D by --aux-fakes (0)
  - pictures: one z per row. Classes: one per column. Attributes: the first column has the labels
    of a real image. Each further column flips one label, and exaggerates to make it visible: 0
    becomes 2, and 1 becomes -1. --attributes A,B chooses the columns
  - --generate N draws N images of each class, generated/CLASS/00000.png and so on, which --data can
    read. --labels A,B chooses classes. Attributes come from random real images; --labels A,-B
    sets A to 1 and B to 0. generated/labels.csv lists them as 1 and -1, as CelebA's table does.
    labels.png is the picture above, with N rows, at most 16

Differs from the papers:
  - the paper has BatchNorm, and a G and a D for each 10 of ImageNet's classes
  - as in sngan.py, D's features are doubled after each LeakyReLU (GAIN). Otherwise D's outputs stay
    nearly 0, and G learns slowly. (sngan.py says more of spectral norm and linear layers.)
  - the report's D has one convolution less, and its G no spectral norm in the third doubling. It
    does not say which Inception weights gave its FID of 19.42 (see fid.py)
  - the report prints a softmax over the 40 attributes. It sums to 1, and can say at most 1/k to
    each of k attributes of a face. The report's code has sigmoids
  - in the paper, and as the report prints it, D learns the labels y' of fakes, too: --aux 1
    --aux-fakes 1 is Eq. 3. A fake may not show its labels, and then G and D can agree on a secret
    mark for each. With fakes' labels in L_D, faces were less clear at 64 px (at 32 px as clear)
  - --aux is 10, not 1: a mean over 40 attributes leaves little to each
  - fakes' attributes are independent, each as frequent as in the data. The report does not tell
    how it draws them; its code flips fair coins, which give 20 of 40 (a face has about 9). With
    whole rows of real labels, men hardly ever have lipstick, and flipping Male changed less
  - D makes one step on 64 real and 64 fake images, drawn with replacement; the report's code makes
    two, on 32 of each, and its epochs go through all images once

Try (README.md says what happens):
  - --aux 0: what are acc(x) and acc(G(z))? Do the columns still differ?
  - --aux 1 --aux-fakes 1: which acc rises faster, and do the pictures show the labels?
  - --generate 16 --labels Smiling,Eyeglasses,-Blond_Hair: how many obey? See labels.csv

    python acgan.py                                   # cartoon faces, on a CPU, no download
    python acgan.py --data celeba                     # photographs of faces, as in the report
    python acgan.py --data celeba --generate 16 --attributes Male,Smiling,Blond_Hair
"""

import argparse
import contextlib
import functools
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
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.optimizer import register_optimizer_step_pre_hook  # for several GPUs
from torchvision.utils import save_image

# --- networks -------------------------------------------------------------------------------------

SIZES = [16, 32, 64, 128, 256, 512, 1024]  # the networks can be built for images of these sizes
Z = 128  # how many numbers z has
GAIN = 2  # drew better faces than the usual 1.4 = nn.init.calculate_gain("leaky_relu", 0.2)


class PixelNorm(nn.Module):
    """(B, C, H, W) -> the same, with mean square 1 over the channels of every pixel."""

    def forward(self, x):
        return x / (x.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()


class MinibatchStddev(nn.Module):
    """(B, C, H, W) -> (B, C + 1, H, W): one channel more, the batch's mean standard deviation."""

    def forward(self, x):
        stddev = (x.var(dim=0, unbiased=False) + 1e-8).sqrt().mean()  # over channels and pixels
        return torch.cat([x, stddev.expand(len(x), 1, *x.shape[2:])], dim=1)


class GainedLeakyReLU(nn.LeakyReLU):
    """LeakyReLU, times GAIN: spectral norm and LeakyReLU about halve a layer's typical features."""

    def forward(self, x):
        return GAIN * super().forward(x)


def normed(conv):
    """A convolution with orthogonal initial weights, biases of 0, and spectral norm.

    Multiplying a vector by W and W^T in turn makes it point where W stretches most. This power
    iteration gives sigma, W's largest singular value. One step of it per forward pass is enough,
    as W changes slowly.
    """
    nn.init.orthogonal_(conv.weight)
    nn.init.zeros_(conv.bias)
    return spectral_norm(conv)  # it knows which axis is "out", also of a transposed convolution


class Generator(nn.Sequential):
    """z (B, 128), labels y (B, K) -> images (B, C, size, size) in [-1, 1].

    Shapes are for 64 px and width 128.
    """

    def __init__(self, channels, size, width, classes):
        layers = [
            nn.Linear(Z + classes, width * 4 * 4),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Unflatten(1, (width, 4, 4)),  # (B, 128, 4, 4)
        ]
        for _ in range(int(math.log2(size)) - 2):
            layers += [
                normed(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)),
                PixelNorm(),
                nn.LeakyReLU(0.2, inplace=True),
            ]  # (B, 128, 8, 8), (B, 128, 16, 16), (B, 128, 32, 32), (B, 128, 64, 64)
        layers += [
            nn.ZeroPad2d((1, 2, 1, 2)),  # a 4x4 kernel needs three rows more to keep the size
            normed(nn.Conv2d(width, channels, 4)),
            nn.Tanh(),
        ]  # (B, C, 64, 64)
        super().__init__(*layers)

    def forward(self, z, y):
        return super().forward(torch.cat([z, y], dim=1))


class Discriminator(nn.Module):
    """Images (B, C, size, size) in [-1, 1] -> logits (B,), high for real, and label logits (B, K).

    Shapes are for 64 px and width 128.
    """

    def __init__(self, channels, size, width, classes):
        super().__init__()
        n = [channels] + [width] * (int(math.log2(size)) - 1)  # 3, 128, 128, 128, 128, 128
        layers = []
        for n_in, n_out in zip(n, n[1:]):
            layers += [
                normed(nn.Conv2d(n_in, n_out, 4, stride=2, padding=1)),
                GainedLeakyReLU(0.2, inplace=True),
            ]  # (B, 128, 32, 32), (B, 128, 16, 16), ... (B, 128, 2, 2)
        layers += [
            MinibatchStddev(),  # (B, 129, 2, 2)
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),  # (B, 129)
        ]
        self.features = nn.Sequential(*layers)
        self.source = nn.Linear(width + 1, 1)
        self.labels = nn.Linear(width + 1, classes)

    def forward(self, images):
        features = self.features(images)
        return self.source(features).flatten(0), self.labels(features)


# --- losses ---------------------------------------------------------------------------------------
# softplus(a) = log(1 + exp(a)), so -log D = softplus(-logit) and -log(1 - D) = softplus(logit).


def d_loss(real_logits, fake_logits):
    """-L_S, L_D's first part; 2 log 2 = 1.386 if D says 1/2 to everything."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def g_loss(fake_logits):
    """-E[log D(G(z, y'))], L_G's first part; log 2 = 0.693 if D says 1/2 to everything."""
    return softplus(-fake_logits).mean()


def label_loss(label_logits, y, one_hot):
    """-E[log P(y|image)], of label logits (B, K) and labels y (B, K) of 0 and 1.

    Classes: softmax and cross-entropy, log K for a blind guess. Attributes: the mean of the
    cross-entropies of K sigmoids, log 2 for a blind guess.
    """
    if one_hot:
        return cross_entropy(label_logits, y)
    return binary_cross_entropy_with_logits(label_logits, y)


def accuracy(label_logits, y, one_hot):
    """The share of the labels that the head has right: of B classes, or of B * K attributes."""
    if one_hot:
        return (label_logits.argmax(1) == y.argmax(1)).float().mean()
    return ((label_logits > 0) == (y > 0)).float().mean()


# --- training -------------------------------------------------------------------------------------


def add_arguments(parser):
    """Set this script's defaults and flags. Return the defaults that differ on cartoon faces."""
    parser.set_defaults(lr=2e-4, batch=64, epochs=100)
    parser.epilog = "--lr, --batch and --epochs are those of Espis and Potrimba (2020)."
    add = parser.add_argument
    add("--width", type=int, default=128, help="feature maps of every layer (128)")
    add("--aux", type=float, default=10, help="weight of the labels' losses (10; the papers' is 1)")
    add("--aux-fakes", type=float, default=0, help="weight of fakes' labels in L_D (0; 1 in Eq. 3)")
    add("--attributes", metavar="A,B", help="labels that the pictures show, one per column")
    add("--labels", metavar="A,B", help="what --generate draws; A,-B: A, not B; --labels=-B: not B")
    return {"batch": 16, "epochs": 25, "width": 48, "lr": 1e-3}  # minutes on a CPU


def train(args, data):
    """Build the networks and their optimisers, and run the training loop."""
    if args.labels and not args.generate:
        user_error("--labels is for --generate")
    channels, classes = data.images.shape[1], len(data.names)
    one_hot, columns, guess = look_at_labels(args, data)
    to_device = {"device": args.device, "memory_format": LAYOUT}  # for faster convolutions
    G = Generator(channels, args.size, args.width, classes).to(**to_device)
    D = Discriminator(channels, args.size, args.width, classes).to(**to_device)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=(0.5, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=(0.5, 0.999))

    def sample_z(n):
        return torch.randn(n, Z, device=args.device)

    def draw(n):
        return G(sample_z(n), sample_labels(data, n, args.device))

    def grid(rows=8):
        return label_grid(G, sample_z(rows), data, columns)

    draws = label_draws(args, G, sample_z, data) if args.generate else draw
    to_save = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D}
    for log in steps(args, data, draws, to_save, grid, lambda: {"acc(guess)": guess}):
        real, y = sample_batch(data, args.batch, args.device)
        fake_y = fake_labels(data, args.batch, args.device, one_hot)
        fake = G(sample_z(args.batch), fake_y)

        # D's step. detach() keeps its gradient out of G. Real and fake images are separate batches:
        # in a mixed one, MinibatchStddev would give both the same number.
        real_logits, real_label_logits = D(real)
        fake_logits, fake_label_logits = D(fake.detach())
        loss_D = d_loss(real_logits, fake_logits)
        loss_D = loss_D + args.aux * label_loss(real_label_logits, y, one_hot)
        loss_D = loss_D + args.aux_fakes * label_loss(fake_label_logits, fake_y, one_hot)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()

        # G's step. D has just changed, so D(fake) is computed anew. The gradient flows back through
        # D into G; with inputs=, none is computed for D's weights.
        logits, label_logits = D(fake)
        loss_G = g_loss(logits) + args.aux * label_loss(label_logits, fake_y, one_hot)
        opt_G.zero_grad()
        loss_G.backward(inputs=list(G.parameters()))
        opt_G.step()

        # Tensors, not floats: .item() would make Python wait for the GPU in every step.
        log.update({"loss_D": loss_D, "loss_G": loss_G, "D(x)": real_logits.sigmoid().mean(),
                    "D(G(z))": fake_logits.sigmoid().mean(),
                    "acc(x)": accuracy(real_label_logits, y, one_hot),
                    "acc(G(z))": accuracy(fake_label_logits, fake_y, one_hot)})

    if args.generate:  # the loop made no step: steps() has drawn images instead
        save_labels(args, G, grid)


def look_at_labels(args, data):
    """-> whether they are classes; the indices of --attributes, or None; the accuracy of a guess,
    which is always the more frequent value of an attribute, or the largest class.
    """
    if not data.names:
        user_error(f"{args.data} has no labels. A folder needs one sub-folder per class, CelebA "
                   "list_attr_celeba.txt (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)")
    one_hot = bool((data.labels.sum(1) == 1).all())
    columns = list(parse_labels(args.attributes, data.names)) if args.attributes else None
    guess_logits = (data.labels.float().mean(0) - 0.5).expand_as(data.labels)
    return one_hot, columns, float(accuracy(guess_logits, data.labels, one_hot))


def fake_labels(data, n, device, one_hot):
    """Labels (n, K) for fakes: random classes, or attributes that are independent of each other."""
    if one_hot:
        return sample_labels(data, n, device)
    i = torch.randint(len(data.labels), (n, len(data.names)), device=data.labels.device)
    return data.labels.gather(0, i).to(device).float()  # each attribute is that of another image


def sample_labels(data, n, device):
    """n random rows of the data's labels (n, K): combinations that exist, as often as they do."""
    i = torch.randint(len(data.labels), (n,), device=data.labels.device)
    return data.labels[i].to(device).float()


def parse_labels(text, names):
    """A,-B -> {index of A: 1, index of B: 0}. (The name of a class may be "A,B".)"""
    chosen = {}
    for part in [text] if text in names else map(str.strip, text.split(",")):
        if part.removeprefix("-") not in names:
            user_error(f"there is no label {part}, but {', '.join(names)}")
        chosen[names.index(part.removeprefix("-"))] = int(not part.startswith("-"))
    return chosen


def label_draws(args, G, sample_z, data):
    """What --generate draws. Of classes: {class: draw(n)}, for those in --labels, or else for all.

    Of attributes: draw(n), with the labels of random real images, except those that --labels sets
    to 1 or 0. generated/labels.csv lists them as 1 and -1, as CelebA's table does.
    """
    names = data.names
    chosen = parse_labels(args.labels, names) if args.labels else {}

    def draw_class(k, n):
        return G(sample_z(n), torch.eye(len(names), device=args.device)[[k] * n])

    if (data.labels.sum(1) == 1).all():
        if not all(chosen.values()):
            user_error("--labels: name the classes to draw, without a minus")
        return {names[k].replace("/", "-"): functools.partial(draw_class, k)
                for k in chosen or range(len(names))}
    y = sample_labels(data, args.generate, args.device)
    for k, value in chosen.items():
        y[:, k] = value
    folder, rows = Path(args.out) / "generated", iter(y)
    folder.mkdir(exist_ok=True)
    with open(folder / "labels.csv", "w") as table:
        print("image_id", *names, sep=",", file=table)
        for i, row in enumerate(y.tolist()):
            print(f"{i:05}.png", *(1 if label else -1 for label in row), sep=",", file=table)
    return lambda n: G(sample_z(n), torch.stack([next(rows) for _ in range(n)]))  # the next n rows


def label_grid(G, z, data, columns=None):
    """A picture of what the labels do: (rows, columns, C, size, size), with one z per row.

    Classes: one per column, at most 16. Attributes: the first column has labels of real images. In
    each further column one attribute is flipped and exaggerated: 0 becomes 2, and 1 becomes -1.
    columns says which, by default the eight whose frequency is nearest to 1/2: G learns little of
    rare ones. y holds the labels of all these images (rows, columns, K).
    """
    classes = len(data.names)
    if (data.labels.sum(1) == 1).all():
        y = torch.eye(classes)[columns or list(range(min(classes, 16)))].expand(len(z), -1, -1)
    else:
        frequency = data.labels.float().mean(0)
        columns = columns or sorted((frequency - 0.5).abs().argsort()[:8].tolist())
        y = sample_labels(data, len(z), z.device)[:, None].repeat(1, 1 + len(columns), 1)
        for column, label in enumerate(columns, 1):
            y[:, column, label] = 2 - 3 * y[:, column, label]  # 1 becomes -1, 0 becomes 2
    z = z.repeat_interleave(y.shape[1], dim=0)
    return G(z, y.flatten(0, 1).to(z.device)).unflatten(0, y.shape[:2])


def save_labels(args, G, grid):
    """--generate N: beside the single images, N rows of the picture in labels.png, at most 16."""
    with preview(args, G):
        picture = grid(min(args.generate, 16))
    file = Path(args.out) / "labels.png"
    save_image(picture.flatten(0, 1) / 2 + 0.5, file, nrow=picture.shape[1])


SCRIPT = Path(globals().get("__file__", "acgan.py")).stem  # a notebook's cell has no file

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
