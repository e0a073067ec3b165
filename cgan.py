# SPDX-License-Identifier: MIT
"""CGAN: Mirza and Osindero, "Conditional Generative Adversarial Nets", 2014, arXiv 1411.1784. The
networks are after Marchiori, "GAN on Fashion MNIST and DeepFashion Datasets", course project in
Digital Forensics, 2021.

G is told by labels y what to draw, and D is told the same labels: both are conditional. A good
picture of the wrong thing is then a fake like any other: D learns to ask "is this a real 7?", not
just "is this real?". y becomes one more feature map, beside G's first maps and beside D's image.

    L_D = -E[log D(x|y)] - E[log(1 - D(G(z|y)|y))]    Eq. 2
    L_G = -E[log D(G(z|y)|y)]                         non-saturating, as in dcgan.py

y is a row of K numbers, 0 or 1. If labels are classes, a row has one 1 (it is one-hot); if they are
attributes, it has a 1 for each attribute of the image. The row goes through a linear layer without
bias. A single 1 picks one column of its matrix, which is called the embedding of that class;
several 1s give the sum of their embeddings. Another linear layer turns this into a map.

Changes from dcgan.py:
  - G(z, y) and D(images, y): labels -> embedding of 100 numbers -> one feature map
  - the networks: 5x5 kernels, and two doublings whatever the size is (28 px: from 7x7 maps).
    LeakyReLU in both; in D no BatchNorm, but biases and dropout 0.3; PyTorch's initial weights
  - the fakes of a step get the labels of its real images, so labels are as frequent as in the data
  - pictures: one z per row. Classes: one per column. Attributes: the first column has the labels
    of a real image. Each further column flips one label, and exaggerates to make it visible: 0
    becomes 2, and 1 becomes -1
  - --generate N draws N images of each class, generated/CLASS/00000.png and so on, which --data can
    read. --labels A,B chooses classes. Attributes come from random real images; --labels A,-B
    sets A to 1 and B to 0. generated/labels.csv lists them as 1 and -1, as CelebA's table does
  - learning rate 5e-4, batches of 256 (at least 2, for BatchNorm), 150 epochs; sizes up to 64;
    no --width, --g-steps, --init-std
  - --no-labels leaves labels and their maps out, which is Marchiori's unconditional GAN. The same
    happens if the data has none; the run then begins with "labels: none"

Differs from the paper:
  - the networks are convolutional, as Marchiori's; the paper's are MLPs, with maxout in D
  - Marchiori's report does not give all sizes. Kernels, channels (256, 128, 64 in G; 64, 128 in D),
    dropout's rate and LeakyReLU's slope (0.2; Keras, which he uses, has 0.3) are a reconstruction.
    His G has two convolutions; ours has a third, of stride 1, before them, and BatchNorm. His D has
    one dropout, before its last layer; ours has one after each convolution
  - z is from N(0, 1); the paper's is uniform in [0, 1]
  - the paper has SGD with momentum. Marchiori has Adam with 1e-4, and, it seems, Keras' beta1 of
    0.9 (--lr 1e-4 --beta1 0.9). He reports ten epochs of noise; 5e-4 and 0.5 give clothes sooner
  - batches are drawn with replacement; the report's epochs go through all images once

Try (README.md says what happens):
  - 0 * self.label(y) in D alone: does G still draw what it is told? Compare the columns
  - --no-labels: what can G no longer be asked for?
  - --data mnist, and then --data mnist --generate 8 --labels "7 - seven": how many are sevens?

    python cgan.py                                     # cartoon faces, on a CPU, no download
    python cgan.py --data fashion_mnist                # Marchiori's cGAN
    python cgan.py --data fashion_mnist --no-labels --out runs/gan    # his first experiment
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
from torch.nn.functional import softplus
from torch.optim.optimizer import register_optimizer_step_pre_hook  # for several GPUs
from torchvision.utils import save_image

# --- networks -------------------------------------------------------------------------------------

SIZES = [16, 28, 32, 64]  # the networks can be built for images of these sizes
Z = 100  # how many numbers z has


def label_map(classes, side):
    """A network: labels (B, K) -> one feature map (B, 1, side, side); no map if K is 0."""
    if classes == 0:
        return nn.Unflatten(1, (0, side, side))  # (B, 0) -> (B, 0, side, side)
    return nn.Sequential(
        nn.Linear(classes, 100, bias=False),  # the embedding
        nn.Linear(100, side * side),
        nn.Unflatten(1, (1, side, side)),
    )


class Generator(nn.Module):
    """z (B, 100), labels y (B, K) -> images (B, C, size, size) in [-1, 1]. Shapes are for 28 px."""

    def __init__(self, channels, size, classes):
        super().__init__()
        side = size // 4
        self.noise = nn.Sequential(
            nn.Linear(Z, 256 * side * side, bias=False),
            nn.BatchNorm1d(256 * side * side),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Unflatten(1, (256, side, side)),  # (B, 256, 7, 7)
        )
        self.label = label_map(classes, side)  # (B, 1, 7, 7)
        self.image = nn.Sequential(
            nn.ConvTranspose2d(256 + (classes > 0), 128, 5, stride=1, padding=2, bias=False),
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2, inplace=True),  # (B, 128, 7, 7)
            nn.ConvTranspose2d(128, 64, 5, stride=2, padding=2, output_padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2, inplace=True),  # (B, 64, 14, 14)
            nn.ConvTranspose2d(64, channels, 5, stride=2, padding=2, output_padding=1, bias=False),
            nn.Tanh(),  # (B, C, 28, 28)
        )

    def forward(self, z, y):
        return self.image(torch.cat([self.noise(z), self.label(y)], dim=1))


class Discriminator(nn.Module):
    """Images (B, C, size, size) in [-1, 1], labels y (B, K) -> logits (B,), high for real.

    Shapes are for 28 px.
    """

    def __init__(self, channels, size, classes):
        super().__init__()
        self.label = label_map(classes, size)  # (B, 1, 28, 28)
        self.logit = nn.Sequential(
            nn.Conv2d(channels + (classes > 0), 64, 5, stride=2, padding=2),  # (B, 64, 14, 14)
            nn.LeakyReLU(0.2, inplace=True),
            nn.Dropout(0.3),
            nn.Conv2d(64, 128, 5, stride=2, padding=2),  # (B, 128, 7, 7)
            nn.LeakyReLU(0.2, inplace=True),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(128 * (size // 4) ** 2, 1),
            nn.Flatten(0),  # (B,)
        )

    def forward(self, images, y):
        return self.logit(torch.cat([images, self.label(y)], dim=1))


# --- losses ---------------------------------------------------------------------------------------
# softplus(a) = log(1 + exp(a)), so -log D = softplus(-logit) and -log(1 - D) = softplus(logit).


def d_loss(real_logits, fake_logits):
    """L_D = -E[log D(x|y)] - E[log(1 - D(G(z|y)|y))]; 2 log 2 = 1.386 if D always says 1/2."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def g_loss(fake_logits):
    """L_G = -E[log D(G(z|y)|y)]; log 2 = 0.693 if D says 1/2 to everything."""
    return softplus(-fake_logits).mean()


# --- training -------------------------------------------------------------------------------------


def add_arguments(parser):
    """Set this script's defaults and flags. Return the defaults that differ on cartoon faces."""
    parser.set_defaults(lr=5e-4, batch=256, epochs=150)
    parser.epilog = "--batch and --epochs are Marchiori's (2021), --lr is ours."
    add = parser.add_argument
    add("--no-labels", action="store_true", help="a GAN without conditions")
    add("--labels", metavar="A,B", help="what --generate draws; A,-B: A, not B; --labels=-B: not B")
    add("--beta1", type=float, default=0.5, help="Adam's beta1, its momentum (0.5; 0.9 in Keras)")
    return {"batch": 16, "lr": 1e-3, "epochs": 24}  # small batches: more steps for the same time


def train(args, data):
    """Build the networks and their optimisers, and run the training loop."""
    if not 0 <= args.beta1 < 1:
        user_error(f"--beta1 {args.beta1}: it must be at least 0, and below 1")
    if args.batch == 1:
        user_error("--batch 1: the BatchNorm in G needs at least two images")
    channels, classes = data.images.shape[1], 0 if args.no_labels else len(data.names)
    if args.labels and not (args.generate and classes):
        user_error("--labels is for --generate, and for a run with labels")
    to_device = {"device": args.device, "memory_format": LAYOUT}  # for faster convolutions
    G = Generator(channels, args.size, classes).to(**to_device)
    D = Discriminator(channels, args.size, classes).to(**to_device)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=(args.beta1, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=(args.beta1, 0.999))

    def sample_z(n):
        return torch.randn(n, Z, device=args.device)

    def draw(n):
        return G(sample_z(n), sample_labels(data, n, args.device)[:, :classes])  # all, or none

    def grid():
        return label_grid(G, sample_z(8), data)

    draws = label_draws(args, G, sample_z, data) if args.generate and classes else draw
    to_save = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D}
    for log in steps(args, data, draws, to_save, grid if classes else None):
        real, y = sample_batch(data, args.batch, args.device)
        y = y[:, :classes]
        fake = G(sample_z(args.batch), y)

        # D's step. detach() keeps its gradient out of G. A fake comes with the labels that G was
        # given, so that a good image of something else does not pass.
        real_logits, fake_logits = D(real, y), D(fake.detach(), y)
        loss_D = d_loss(real_logits, fake_logits)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()

        # G's step. D has just changed, so D(fake) is computed anew. The gradient flows back through
        # D into G; with inputs=, none is computed for D's weights.
        loss_G = g_loss(D(fake, y))
        opt_G.zero_grad()
        loss_G.backward(inputs=list(G.parameters()))
        opt_G.step()

        # Tensors, not floats: .item() would make Python wait for the GPU in every step.
        log.update({"loss_D": loss_D, "loss_G": loss_G, "D(x)": real_logits.sigmoid().mean(),
                    "D(G(z))": fake_logits.sigmoid().mean()})


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


SCRIPT = Path(globals().get("__file__", "cgan.py")).stem  # a notebook's cell has no file

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
