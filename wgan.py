"""WGAN: Arjovsky, Chintala and Bottou, "Wasserstein GAN", 2017, arXiv 1701.07875.

D becomes a critic: it does not say how probable "real" is, it gives a score, and the gap between
its mean scores of real and of fake images measures how far apart the two distributions are. For a
critic whose slope is bounded by K that gap is at most K times the Wasserstein-1 distance, and the
best such critic attains it. The bound comes from clipping every weight of the critic. The distance
has a useful gradient everywhere, so the critic may be trained hard; and it can be watched falling.

    L_D = E[D(G(z))] - E[D(x)]      W = -L_D, the estimate of the distance (Eq. 2 and 3)
    L_G = -E[D(G(z))]               Alg. 1, line 10

Changes from dcgan.py:
  - the losses: means of D's outputs, which are scores without a sigmoid
  - several critic steps, each on new images, for one G step, which also draws new z (--critic)
  - after every critic step, all its weights are clipped to [-c, c] (--clip)
  - RMSprop with learning rate 5e-5, no momentum (the paper saw Adam's make training unstable)
  - --g-steps is gone, and losses.csv has W in place of D(x) and D(G(z))

Differs from the paper:
  - its code clips before the critic's step, which lets weights overshoot by one update; here it is
    after, as in Alg. 1. BatchNorm's scales and shifts are clipped with the rest
  - its code makes 100 critic steps for each of the first 25 G steps, and for every 500th. Alg. 1
    does not, and neither does this
  - Fabbri (2017) quotes the paper's clip as 0.1 and found 0.05 better; his code has 0.005. The
    paper has 0.01. His critic ends in a LeakyReLU, which the paper's does not
  - an epoch is counted in G steps: the critic sees five times as many images. The 25 epochs of the
    paper's code count the critic's images, and are about five of ours
  - Fabbri's faces are the central 60 % of CelebA's images; here they are the central 128x128 pixels

    python wgan.py                                                  # cartoon faces, on a CPU
    python wgan.py --data celeba                                    # as Fabbri
    python wgan.py --data celeba --clip 0.05 --out runs/clip05      # what he found better
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
Z = 100  # how many numbers z has (DCGAN, Sec. 4)


class Generator(nn.Sequential):
    """z (B, 100) -> images (B, C, size, size) in [-1, 1].

    Each stage doubles the maps' sides and halves their number. Shapes are for 64 px and width 64.
    """

    def __init__(self, channels, size, width):
        n = width * size // 8
        layers = [
            nn.Unflatten(1, (Z, 1, 1)),  # (B, 100, 1, 1)
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
    """The critic. Images (B, C, size, size) in [-1, 1] -> scores (B,), any number, high for real.

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


def init_weights(module):
    """DCGAN, Sec. 4: weights from N(0, 0.02^2). BatchNorm: scales around 1, shifts at 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, mean=0, std=0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1, std=0.02)


# --- losses ---------------------------------------------------------------------------------------
# Only differences of scores matter: a constant added to all of them changes nothing in L_D.


def d_loss(real_scores, fake_scores):
    """L_D = E[D(G(z))] - E[D(x)]."""
    return fake_scores.mean() - real_scores.mean()


def g_loss(fake_scores):
    """L_G = -E[D(G(z))]."""
    return -fake_scores.mean()


# --- training -------------------------------------------------------------------------------------


def options(parser):
    """This paper's defaults and own flags. Returns what is different on the cartoon faces."""
    parser.set_defaults(lr=5e-5, batch=64, epochs=25)
    parser.epilog = "--lr, --batch, --clip and --critic are the paper's, --epochs its code's."
    add = parser.add_argument
    add("--width", type=int, default=64, help="channels at half size (64)")
    add("--clip", type=float, default=0.01, help="c, the largest weight (0.01)")
    add("--critic", type=int, default=5, help="critic steps per G step (5)")
    return {"width": 32, "batch": 32, "lr": 2e-4, "epochs": 15}  # faces within minutes on a CPU


def train(args, data):
    """Build the networks, define the training step, hand over to fit()."""
    channels = data.images.shape[1]
    place = {"device": args.device, "memory_format": torch.channels_last}  # faster convolutions
    G = Generator(channels, args.size, args.width).apply(init_weights).to(**place)
    D = Discriminator(channels, args.size, args.width).apply(init_weights).to(**place)
    opt_G = torch.optim.RMSprop(G.parameters(), lr=args.lr)
    opt_D = torch.optim.RMSprop(D.parameters(), lr=args.lr)

    def sample_z(n):
        return torch.randn(n, Z, device=args.device)

    def step():
        """One round of Alg. 1."""
        for _ in range(args.critic):
            real, _ = sample_batch(data, args.batch, args.device)
            fake = G(sample_z(args.batch))

            # The critic's step (lines 3 to 7). detach(): no gradient goes back into G. Two passes:
            # BatchNorm normalises real and fake each by themselves.
            loss_D = d_loss(D(real), D(fake.detach()))
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()
            with torch.no_grad():
                for p in D.parameters():
                    p.clamp_(-args.clip, args.clip)

        # G's step (lines 9 to 11). The gradient passes through D but stays in G alone.
        loss_G = g_loss(D(G(sample_z(args.batch))))
        opt_G.zero_grad()
        loss_G.backward(inputs=list(G.parameters()))
        opt_G.step()

        return {"loss_D": loss_D, "loss_G": loss_G, "W": -loss_D}

    def draw(n):
        return G(sample_z(n))

    fit(args, data, step, draw, {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D})


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
