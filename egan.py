"""EGAN, here Extractor GAN (not Evolutionary GAN): Zhou, "A Study of Generative Adversarial
Networks and Possible Extensions of GANs", thesis, UT Austin, 2017, Ch. 3 and 4; on DCGAN, arXiv
1511.06434.

G gets one number c besides z, and an extractor F reads a number off the finished picture: how
bright it is, how sharp, or whether the mouth is open. G is trained so that F reads c. Labels are
not needed for what a formula can measure; for the rest, F is a small CNN that learns from labels.
After training, turning c alone changes that one attribute.

    w = [z, c], c is 0 or 1
    L_D = -E[log D(x)] - E[log(1 - D(G(w)))]        as in dcgan.py
    L_G = l_fool + rep l_rep
    l_fool = -E[log D(G(w))]
    l_rep = -E[c log F(G(w)) + (1 - c) log(1 - F(G(w)))]
    L_F = -E[t log F(x) + (1 - t) log(1 - F(x))]    t is 0.9 or 0.1, on real images alone

    brightness: the mean over all pixels of Y = 0.2126 R + 0.7152 G + 0.0722 B, from 0 to 1
    sharpness:  the mean over all pixels of n / max(n), n = sqrt(Y_x^2 + Y_y^2)

Sharpness divides by the image's own maximum: it says how evenly the edges are spread, not how crisp
they are. A linear ramp has 1, noise about 0.27, one hard edge in an empty picture 0.03.

Changes from dcgan.py:
  - c is one more input of G; z is uniform in [-1, 1]
  - l_rep in G's loss, weighted by --rep; --attribute brightness, sharpness, or a label's name
  - the CNN of a label: --extractor pretrain trains it first, for as many steps as D and G then get,
    and freezes it; joint trains it along with them
  - two steps of G for one of D, by --g-steps
  - pictures: one z a row, c from 0 to --sweep over the columns; the last row is grey as bright as
    what F reads, on average over the column. losses.csv has that for c = 0, 1 and --sweep

Differs from the paper:
  - the thesis prints L_D with the signs of a D that says "fake", to be maximised, and calls it a
    loss; with a D that says "real" it is what stands above
  - z is uniform in [-1, 1], as in the code that the thesis builds on; it says [0, 1]. There each
    number is mostly its mean, BatchNorm passes that on, and on cartoon G drew one face for all z
  - sums over the batch there are means here; with l_rep and l_fool alike, the ratio is the same
  - --rep is 1, as in the thesis, but 20 for formulas on cartoon: there l_fool's gradient on G is 45
    times that of l_rep, and with 1 brightness followed c for some hundred steps, and turned round
    in the next; with 10, in one of two runs, it depended on z as much as on c. For labels it is 5
    there: with 20, G fooled the CNN, and another one saw eyeglasses where c was 0
  - it calls n a geometric mean; n is the Euclidean norm. n is 0 where the picture is flat: a
    constant of 1e-12 below the root keeps its slope finite there
  - F's width (64 and 128 channels, 4x4 kernels) is ours, the thesis says only "3 layers"
  - two steps of G for one of D are the thesis' setting for DCGAN; for EGAN it does not say
  - --sweep is 2; the thesis shows sweeps to 1, 2 and 5. Above 1, c was never trained

    python egan.py                                               # brightness of cartoon faces
    python egan.py --attribute Eyeglasses --extractor joint --out runs/glasses
    python egan.py --data celeba --attribute Mouth_Slightly_Open    # the thesis' mouths
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

# --- networks -------------------------------------------------------------------------------------

SIZES = [2**k for k in range(4, 11)]  # image sizes that the networks can be built for: 16 ... 1024
Z = 101  # how many numbers w = [z, c] has


class Generator(nn.Sequential):
    """w (B, 101) -> images (B, C, size, size) in [-1, 1].

    Each stage doubles the maps' sides and halves their number. Shapes are for 64 px and width 64.
    """

    def __init__(self, channels, size, width):
        n = width * size // 8
        layers = [
            nn.Unflatten(1, (Z, 1, 1)),  # (B, 101, 1, 1)
            nn.ConvTranspose2d(Z, n, 4, stride=1, padding=0, bias=False),  # (B, 512, 4, 4)
            nn.BatchNorm2d(n),
            nn.ReLU(inplace=True),
        ]
        while n > width:
            layers += [
                nn.ConvTranspose2d(n, n // 2, 4, stride=2, padding=1, bias=False),  # (B, 256, 8, 8)
                nn.BatchNorm2d(n // 2),
                nn.ReLU(inplace=True),
            ]
            n //= 2
        layers += [
            nn.ConvTranspose2d(n, channels, 4, stride=2, padding=1, bias=False),  # (B, C, 64, 64)
            nn.Tanh(),
        ]
        super().__init__(*layers)


class Discriminator(nn.Sequential):
    """Images (B, C, size, size) in [-1, 1] -> logits (B,); D(x) = sigmoid(logit), near 1 for real.

    Each stage halves the maps' sides and doubles their number, down to 4x4.
    """

    def __init__(self, channels, size, width):
        n = width
        layers = [
            nn.Conv2d(channels, n, 4, stride=2, padding=1, bias=False),  # (B, 64, 32, 32)
            nn.LeakyReLU(0.2, inplace=True),
        ]
        while n < width * size // 8:
            layers += [
                nn.Conv2d(n, 2 * n, 4, stride=2, padding=1, bias=False),  # (B, 128, 16, 16)
                nn.BatchNorm2d(2 * n),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            n *= 2
        layers += [
            nn.Conv2d(n, 1, 4, stride=1, padding=0, bias=False),  # (B, 1, 1, 1)
            nn.Flatten(0),  # (B,)
        ]
        super().__init__(*layers)


class Extractor(nn.Sequential):
    """F. Images (B, C, size, size) in [-1, 1] -> logits (B,); F(x) = sigmoid(logit)."""

    def __init__(self, channels, size):
        super().__init__(
            nn.Conv2d(channels, 64, 4, stride=2, padding=1),  # (B, 64, 32, 32)
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, 128, 4, stride=2, padding=1),  # (B, 128, 16, 16)
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Flatten(),
            nn.Linear(128 * (size // 4) ** 2, 1),
            nn.Flatten(0),  # (B,)
        )


def init_weights(module):
    """Sec. 4: weights from N(0, 0.02^2). BatchNorm's scales start around 1, its shifts at 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, mean=0, std=0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1, std=0.02)


# --- extractors by formula ------------------------------------------------------------------------


def luma(images):
    """Images (B, C, size, size) in [-1, 1] -> Y (B, size, size) in [0, 1]; grey ones: as is."""
    if images.shape[1] == 1:
        return (images[:, 0] + 1) / 2
    red, green, blue = ((images + 1) / 2).unbind(dim=1)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def brightness(images):
    """(B, C, size, size) in [-1, 1] -> (B,) from 0 (black) to 1 (white)."""
    return luma(images).mean((1, 2))


def sharpness(images):
    """(B, C, size, size) in [-1, 1] -> (B,) from 0 (flat) to 1 (the same slope everywhere).

    Slopes are central differences, one-sided at the borders, as numpy.gradient has them.
    """
    y_rows, y_columns = torch.gradient(luma(images), dim=(1, 2))
    n = (y_rows.square() + y_columns.square() + 1e-12).sqrt() - 1e-6  # exactly 0 where it is flat
    return n.mean((1, 2)) / (n.amax((1, 2)) + 1e-8)


FORMULAS = {"brightness": brightness, "sharpness": sharpness}

# --- losses ---------------------------------------------------------------------------------------
# With D = sigmoid(logit): softplus(-logit) = -log D and softplus(logit) = -log(1 - D).


def d_loss(real_logits, fake_logits):
    """L_D = -E[log D(x)] - E[log(1 - D(G(z)))]; 2 log 2 = 1.386 if D says 1/2 to everything."""
    return nn.functional.softplus(-real_logits).mean() + nn.functional.softplus(fake_logits).mean()


def g_loss(fake_logits, readings, c, rep):
    """L_G = l_fool + rep l_rep. readings are F's logits."""
    return nn.functional.softplus(-fake_logits).mean() + rep * rep_loss(readings, c)


def rep_loss(readings, c):
    """l_rep = -E[c log F + (1 - c) log(1 - F)], F = sigmoid(readings)."""
    return nn.functional.binary_cross_entropy_with_logits(readings, c)


def f_loss(readings, labels):
    """L_F: the same with targets 0.1 and 0.9, so that F does not become too sure of itself."""
    return rep_loss(readings, 0.1 + 0.8 * labels)


# --- training -------------------------------------------------------------------------------------


def options(parser):
    """This paper's defaults and own flags. Returns what is different on the cartoon faces."""
    parser.set_defaults(lr=2e-4, batch=64, epochs=25)
    parser.epilog = "The defaults are Zhou's (2017). A pretrained F gets as many epochs, before."
    add = parser.add_argument
    add("--width", type=number(int, 1), default=64, help="channels at half size (64; paper: 128)")
    add("--g-steps", type=number(int, 1), default=2, help="G steps per D step (2)")
    add("--attribute", default="brightness", help="brightness, sharpness, or a label of the data")
    add("--extractor", choices=["pretrain", "joint"], default="pretrain", help="F, for labels")
    add("--rep", type=number(float, 0), help="weight of l_rep (1; on cartoon 5, for formulas 20)")
    add("--sweep", type=number(float, 1e-9), default=2.0, help="pictures go from c = 0 to here (2)")
    return {"batch": 16, "epochs": 25}  # small batches: more steps for the same time


def train(args, data):
    """Build the networks, define the training step, hand over to fit()."""
    channels = data.images.shape[1]
    G = Generator(channels, args.size, args.width).apply(init_weights).to(args.device)
    D = Discriminator(channels, args.size, args.width).apply(init_weights).to(args.device)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=(0.5, 0.999), fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=(0.5, 0.999), fused=True)
    F, step_F, parts_F = build_extractor(args, data)
    if args.rep is None:  # flat drawings need more: see "Differs from the paper"
        usual = 20.0 if args.attribute in FORMULAS else 5.0
        args.rep = usual if args.data == "cartoon" else 1.0

    def step():
        """One round of Alg. 1 of Goodfellow et al. 2014, with F."""
        logged_F = step_F() if args.extractor == "joint" else {}
        real, _ = sample_batch(data, args.batch, args.device)
        w = sample_w(args.batch, args.device)
        fake = G(w)

        # D's step. detach(): no gradient goes back into G. Two passes: BatchNorm normalises real
        # and fake each by themselves.
        real_logits, fake_logits = D(real), D(fake.detach())
        loss_D = d_loss(real_logits, fake_logits)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()

        # G's step, against the improved D. The gradient passes through D and F, but stays in G.
        for k in range(args.g_steps):
            w = sample_w(args.batch, args.device) if k > 0 else w
            fake = G(w) if k > 0 else fake
            readings = F(fake)
            loss_G = g_loss(D(fake), readings, w[:, -1], args.rep)
            opt_G.zero_grad()
            loss_G.backward(inputs=list(G.parameters()))
            opt_G.step()

        d_real, d_fake = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
        return {"loss_D": loss_D, "loss_G": loss_G, "D(x)": d_real, "D(G(w))": d_fake,
                "l_rep": rep_loss(readings, w[:, -1]), **logged_F}

    def draw(n):
        return G(sample_w(n, args.device))

    def grid():
        """One z a row, one c a column; the last row is as bright as F's mean reading above it."""
        images = sweep(G, 8, torch.linspace(0, args.sweep, 9, device=args.device))
        readings = F(images.flatten(0, 1)).sigmoid().unflatten(0, (8, 9)).mean(0)
        grey = (2 * readings - 1).view(1, 9, 1, 1, 1)
        return torch.cat([images, grey.expand_as(images[:1])])

    def measure():
        values = torch.tensor(sorted({0.0, 1.0, args.sweep}), device=args.device)
        images = sweep(G, 64, values)
        readings = F(images.flatten(0, 1)).sigmoid().unflatten(0, (64, -1)).mean(0)
        return {f"F(c={c:g})": r for c, r in zip(values.tolist(), readings.tolist())}

    parts = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, **parts_F}
    fit(args, data, step, draw, parts, grid, measure)


def sample_w(n, device):
    """n random w = [z, c] (n, 101): z uniform in [-1, 1], c is 0 or 1, equally often."""
    c = torch.randint(2, (n, 1), device=device)
    return torch.cat([2 * torch.rand(n, Z - 1, device=device) - 1, c], dim=1)


def sweep(G, rows, values):
    """Images (rows, len(values), C, size, size): one z a row, one value of c a column."""
    z = 2 * torch.rand(rows, 1, Z - 1, device=values.device).expand(-1, len(values), -1) - 1
    c = values.view(1, -1, 1).expand(rows, -1, 1)
    return G(torch.cat([z, c], dim=2).flatten(0, 1)).unflatten(0, (rows, len(values)))


def build_extractor(args, data):
    """-> F: images to logits (B,); a training step for it; its parts for the checkpoint.

    A formula's reading becomes the logit of itself, so that all F are alike, and has no step. The
    CNN's step returns {"loss_F": loss}; F is in eval mode outside it, so that BatchNorm reads
    every fake by itself. Unless it is trained jointly, the CNN comes back trained.
    """
    if args.attribute in FORMULAS:
        formula = FORMULAS[args.attribute]
        return lambda images: torch.logit(formula(images), eps=1e-6), dict, {}
    if args.attribute not in data.names:
        known = ", ".join([*FORMULAS, *data.names])
        raise UserError(f"--attribute {args.attribute}: {args.data} has {known}")
    column = data.names.index(args.attribute)
    F = Extractor(data.images.shape[1], args.size).apply(init_weights).to(args.device).eval()
    opt_F = torch.optim.Adam(F.parameters(), lr=args.lr, betas=(0.5, 0.999), fused=True)

    def step():
        """On real images alone: what F learns from, no G can bend."""
        real, labels = sample_batch(data, args.batch, args.device)
        F.train()
        loss = f_loss(F(real), labels[:, column])
        opt_F.zero_grad()
        loss.backward()
        opt_F.step()
        F.eval()
        return {"loss_F": loss.detach()}

    if args.extractor == "pretrain" and not args.resume and not args.generate:
        total = args.steps or max(1, round(args.epochs * len(data.images) / args.batch))
        for now in range(1, total + 1):
            loss = step()["loss_F"]
            if now % 500 == 0 or now == total:
                progress(f"F: step {now}/{total}  loss_F {float(loss):.3g}", now == total)
    return F, step, {"F": F, "opt_F": opt_F}


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
