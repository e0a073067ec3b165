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
    what F reads, on average over the column. losses.csv has that for c = 0, 1 and --sweep, and for
    labels how often F is right about images that it never saw
  - --generate N also draws sweep-5.png: N rows, c from 0 to --sweep, which may be a new one

Differs from the paper:
  - the thesis prints L_D with the signs of a D that says "fake", to be maximised, and calls it a
    loss; with a D that says "real" it is what stands above
  - z is uniform in [-1, 1], as in the code that the thesis builds on; it says [0, 1]. There each
    number is mostly its mean, BatchNorm passes that on, and on cartoon G drew one face for all z
  - sums over the batch there are means here; with l_rep and l_fool alike, the ratio is the same
  - --rep is 1, as in the thesis. On photographs of faces (11,845, 32 px, --width 32 --batch 32,
    1,200 steps after as many of F) that was enough for Smiling, where the thesis had failed: a
    classifier of its own read 0.04, 0.81 and 1.00 on average at c = 0, 1 and 2 (0.03, 0.72 and 0.99
    with --extractor joint), and more at each of eight steps for 64 of 64 z. For formulas on cartoon
    it is 20: there l_fool's gradient on G is 45 times that of l_rep, and with 1 brightness followed
    c for some hundred steps, and turned round in the next; with 10, in one of two runs, it depended
    on z as much as on c. For labels it is 5 there: with 20, G fooled the CNN, and another one saw
    eyeglasses where c was 0
  - it calls n a geometric mean; n is the Euclidean norm. n is 0 where the picture is flat: a
    constant of 1e-12 below the root keeps its slope finite there
  - F's width (64 and 128 channels, 4x4 kernels) is ours, the thesis says only "3 layers"
  - two steps of G for one of D are the thesis' setting for DCGAN; for EGAN it does not say
  - --sweep is 2; the thesis shows sweeps to 1, 2 and 5. Above 1, c was never trained
  - Zhou's faces are the central 108x108 pixels of CelebA's images; here 128x128

    python egan.py                                               # brightness of cartoon faces
    python egan.py --attribute Eyeglasses --extractor joint --out runs/glasses
    python egan.py --data celeba --attribute Mouth_Slightly_Open    # the thesis' mouths
    python egan.py --data celeba --generate 16 --sweep 5            # and how far they open
"""

import argparse
import contextlib
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
    """DCGAN, Sec. 4: weights from N(0, 0.02^2). BatchNorm: scales around 1, shifts at 0."""
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
    add("--width", type=int, default=64, help="channels at half size (64)")
    add("--g-steps", type=int, default=2, help="G steps per D step (2)")
    add("--attribute", default="brightness", help="brightness, sharpness, or a label of the data")
    add("--extractor", choices=["pretrain", "joint"], default="pretrain", help="F, for labels")
    add("--rep", type=float, help="weight of l_rep (1; on cartoon 5, for formulas 20)")
    add("--sweep", type=float, default=2.0, help="pictures go from c = 0 to here (2)")
    return {"width": 32, "batch": 32, "lr": 5e-4, "epochs": 20}  # faces within minutes on a CPU


def train(args, data):
    """Build the networks, define the training step, hand over to fit()."""
    channels = data.images.shape[1]
    place = {"device": args.device, "memory_format": torch.channels_last}  # faster convolutions
    G = Generator(channels, args.size, args.width).apply(init_weights).to(**place)
    D = Discriminator(channels, args.size, args.width).apply(init_weights).to(**place)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=(0.5, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=(0.5, 0.999))
    F, step_F, parts_F, measure_F = build_extractor(args, data)
    columns = torch.linspace(0, args.sweep, 9, device=args.device)  # c in pictures

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
        images = sweep(G, 8, columns)
        readings = F(images.flatten(0, 1)).sigmoid().unflatten(0, (8, 9)).mean(0)
        grey = (2 * readings - 1).view(1, 9, 1, 1, 1)
        return torch.cat([images, grey.expand_as(images[:1])])

    def measure():
        values = torch.tensor(sorted({0.0, 1.0, args.sweep}), device=args.device)
        images = sweep(G, 64, values)
        readings = F(images.flatten(0, 1)).sigmoid().unflatten(0, (64, -1)).mean(0)
        return {f"F(c={c:g})": r for c, r in zip(values.tolist(), readings.tolist())} | measure_F()

    parts = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, **parts_F}
    fit(args, data, step, draw, parts, grid, measure)
    if args.generate:
        save_sweep(args, G, columns)


def sample_w(n, device):
    """n random w = [z, c] (n, 101): z uniform in [-1, 1], c is 0 or 1, equally often."""
    c = torch.randint(2, (n, 1), device=device)
    return torch.cat([2 * torch.rand(n, Z - 1, device=device) - 1, c], dim=1)


def sweep(G, rows, values):
    """Images (rows, len(values), C, size, size): one z a row, one value of c a column."""
    z = 2 * torch.rand(rows, 1, Z - 1, device=values.device).expand(-1, len(values), -1) - 1
    c = values.view(1, -1, 1).expand(rows, -1, 1)
    return G(torch.cat([z, c], dim=2).flatten(0, 1)).unflatten(0, (rows, len(values)))


def save_sweep(args, G, columns):
    """--generate: beside the single images, for which c is 0 or 1, a picture of sweeps."""
    with preview(args, G):
        images = sweep(G, min(args.generate, 64), columns).flatten(0, 1)
    save_image(images / 2 + 0.5, Path(args.out) / f"sweep-{args.sweep:g}.png", nrow=9)


def build_extractor(args, data):
    """-> F: images to logits (B,); a training step for it; its parts; further columns of the log.

    A formula's reading becomes the logit of itself, so that all F are alike, and has no step. The
    CNN's step returns {"loss_F": loss}; F is in eval mode outside it, so that BatchNorm reads
    every fake by itself. Unless it is trained jointly, the CNN comes back trained. A tenth of the
    images, at most 500, is kept from it: acc(F) is how often it reads these right, acc(guess) how
    often one is right who always says the same.
    """
    if args.rep is None:  # flat drawings need more: see "Differs from the paper"
        usual = 20.0 if args.attribute in FORMULAS else 5.0
        args.rep = usual if args.data == "cartoon" else 1.0
    if args.attribute in FORMULAS:
        formula = FORMULAS[args.attribute]
        return lambda images: torch.logit(formula(images), eps=1e-6), dict, {}, dict
    if args.attribute not in data.names:
        known = ", ".join([*FORMULAS, *data.names])
        refuse(f"--attribute {args.attribute}: {args.data} has {known}")
    column = data.names.index(args.attribute)
    F = Extractor(data.images.shape[1], args.size).apply(init_weights).to(args.device).eval()
    opt_F = torch.optim.Adam(F.parameters(), lr=args.lr, betas=(0.5, 0.999))
    n = len(data.images) - min(500, len(data.images) // 10 + 1)
    seen, unseen = data._replace(images=data.images[:n]), data.images[n:].to(args.device)

    def step():
        """On real images alone: what F learns from, no G can bend."""
        real, labels = sample_batch(seen, args.batch, args.device)
        F.train()
        loss = f_loss(F(real), labels[:, column])
        opt_F.zero_grad()
        loss.backward()
        opt_F.step()
        F.eval()
        if distributed.is_initialized():  # one F for all processes, its running averages too
            for buffer in F.buffers():
                distributed.broadcast(buffer, 0)
        return {"loss_F": loss.detach()}

    def measure():
        truth = data.labels[n:, column].to(args.device)
        right = (F(unseen / 127.5 - 1) > 0) == truth
        guess = truth.float().mean().item()
        return {"acc(F)": right.float().mean().item(), "acc(guess)": max(guess, 1 - guess)}

    if args.extractor == "pretrain" and not args.saved:
        pretrain(args, data, F, opt_F, step)
    return F, step, {"F": F, "opt_F": opt_F}, measure


def pretrain(args, data, F, opt_F, step):
    """Train F alone. It is saved on the way: the same command goes on where it was stopped."""
    file, done = Path(args.out) / "extractor.pt", 0
    facts = [RANKS, len(data.images), *(str(getattr(args, name)) for name in
             ("data", "attribute", "size", "batch", "lr", "seed"))]
    saved = load_file(file) if file.exists() else {}
    if saved.get("facts") == facts:
        F.load_state_dict(saved["F"])
        opt_F.load_state_dict(saved["opt_F"])
        done = saved["step"]
    total = args.steps or max(1, round(args.epochs * len(data.images) / args.batch / RANKS))
    for now in range(done + 1, total + 1):
        torch.manual_seed(hash((args.seed, -now, RANK)))
        loss = step()["loss_F"]
        if now % math.ceil(total / 20) == 0 or now == total:
            print(f"F: step {now}/{total}  loss_F {float(loss):.3g}", flush=True)
            if RANK == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                save_file({"facts": facts, "step": now, "F": F.state_dict(),
                           "opt_F": opt_F.state_dict()}, file)


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
