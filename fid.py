# SPDX-License-Identifier: MIT
"""FID and KID: how far generated images are from real ones.

FID: Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter, "GANs Trained by a Two Time-Scale Update
Rule Converge to a Local Nash Equilibrium", 2017, arXiv 1706.08500.
KID: Binkowski, Sutherland, Arbel and Gretton, "Demystifying MMD GANs", 2018, arXiv 1801.01401.

A network that was trained to name what is in a photograph (Inception) turns every image into 2048
numbers, its features. FID (Frechet Inception distance) treats the features of the real images as
normally distributed with mean mu1 and covariance S1, those of the fakes with mu2 and S2, and tells
how far apart the two distributions are. KID (kernel Inception distance) compares the features pair
by pair and assumes no distribution. For both, 0 is best.

    FID = |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))          Eq. 6 of Heusel et al.
    KID = E[k(x, x')] + E[k(y, y')] - 2 E[k(x, y)]               x, x' two real images,
          k(x, y) = (x . y / 2048 + 1)^3                         y, y' two fakes

Tr(M) is the sum of M's diagonal, M^(1/2) the matrix whose square is M, E the mean over all pairs.

FID is biased: fewer images give a larger FID. Compare only scores of equally many images, and of
the same weights and resizing. (Espis and Potrimba, see below, give none of the three for the fakes
behind their FIDs of 11.21 and 19.42.) KID is not biased, and may fall below 0 by chance. Between a
set and itself, or copies of its images, it is below 0 on average: pairs of equal images count in
the last term alone. KID is given as mean +- standard deviation over 100 random subsets of 1,000
images, or of as many as the smaller set has. (Two of one size, at most 1,000: once, as a whole.)

--quality-index is an idea of Espis and Potrimba ("Deep Learning Project", University of Bologna,
2020) that did not work. A network learns to tell real images from elastically deformed copies of
them. Its mean output on the fakes (0: like real ones, 1: like deformed ones) should say how good
they are. In the report it did not follow FID over training: a GAN makes other mistakes.

Differs from pytorch-fid (same network, weights and resizing, so the numbers agree):
  - the trace comes from symmetric matrices (see frechet_distance), not from scipy's slow sqrtm
  - images of any size, in sub-folders too, are read as for training (see open_image)
Differs from clean-fid's own mode: that one resizes with an antialiased bicubic filter.
Differs from Espis and Potrimba:
  - their network learns from CelebA's training images, this one from REAL, whatever that is
  - the report says 20,000 images to learn from and names no optimiser. Here, as in their notebook,
    it is 15,000 (10,000 and their deformed copies, less a quarter), Adam at 1e-5, batches of 32
  - their accuracy of 97 % is that on deformed images alone: their split is not shuffled. Here both
    kinds are held out. On CelebA it was right on 53 % after 10 epochs, 77 after 50, 87 after 100
  - all colours are deformed alike; in the notebook each by itself, half as far (70 % after 100)

    python fid.py celeba runs/dcgan-celeba --split test --n 10000    # after --generate 10000
    python fid.py pets/dog runs/cgan-pets/generated/dog --size 64    # one class alone
    python fid.py folder/of/real --save real.npz ; python fid.py real.npz folder/of/fakes
    python fid.py celeba runs/dcgan-celeba --quality-index
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import sys
import tempfile
from collections import namedtuple
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from scipy.linalg import lapack
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

# --- the distances --------------------------------------------------------------------------------

Statistics = namedtuple("Statistics", "n mu sigma features weights")  # None where not known


def statistics(batches, weights=None):
    """Batches of features (B, d) -> n, their mean (d,) and covariance (d, d) in float64."""
    features = torch.cat(list(batches))
    n, mu = len(features), features.mean(0, dtype=torch.float64)
    if n < 2:
        user_error(f"{n} usable images: a covariance needs at least two")
    away = (part - mu for part in features.split(10_000))  # by parts: float64 takes much memory
    sigma = sum(x.T @ x for x in away) / (n - 1)
    return Statistics(n, mu.cpu(), sigma.cpu(), features, weights)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Eq. 6, of float64 tensors. Its last trace sums the roots of the eigenvalues of S1 S2.

    Write S1 = A A^T and S2 = B B^T. Then S1 S2 has the same eigenvalues as C C^T with C = A^T B,
    apart from zeros. Those of C C^T are never negative, and quickly found.
    """
    A, B = square_root(sigma1), square_root(sigma2)
    C = A.T @ B if A.shape[1] <= B.shape[1] else B.T @ A  # the smaller rank first
    roots = torch.linalg.eigvalsh(C @ C.T).clamp(min=0).sqrt()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * roots.sum()
    if not distance.isfinite():
        user_error(f"the distance is {distance}: the statistics or the weights must be wrong")
    return max(0.0, distance.item())  # rounding can turn 0 into -1e-13


def square_root(sigma):
    """A (d, rank) with A A^T = sigma, by Cholesky's method with pivoting.

    It stops at the rank of sigma. The features of n images have a rank of n - 1 at most; beyond it
    there are only rounding errors, and their roots would add up.
    """
    upper, order, rank, _ = lapack.dpstrf(sigma.numpy())
    A = np.empty((len(sigma), rank))
    A[order - 1] = np.tril(upper.T[:, :rank])
    return torch.from_numpy(A)


def kid(x, y):
    """Features (n1, d), (n2, d) -> mean and standard deviation; number and size of the subsets."""
    size = min(1000, len(x), len(y))
    subsets = 1 if len(x) == len(y) == size else 100
    generator = torch.Generator().manual_seed(0)

    def subset(features):
        chosen = torch.randperm(len(features), generator=generator)[:size]
        return features[chosen.to(features.device)].double()

    values = torch.stack([mmd(subset(x), subset(y)) for _ in range(subsets)])
    return values.mean().item(), values.std(correction=0).item(), subsets, size


def mmd(x, y):
    """The formula of KID for m features of each kind (the square of a maximum mean discrepancy)."""
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    same = xx.sum() - xx.trace() + yy.sum() - yy.trace()  # no image is paired with itself
    return same / (m * (m - 1)) - 2 * xy.mean()


# --- the network ----------------------------------------------------------------------------------

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
PUBLISHED = "6726825d"  # how the SHA-256 of that file begins


def repool(block, inputs, outputs, last):
    """A hook: it does a block's pooling again, as in the published network. There, averages do not
    count the padding, and the last block takes maxima in place of averages.
    """
    x = (F.max_pool2d(*inputs, 3, stride=1, padding=1) if last else
         F.avg_pool2d(*inputs, 3, stride=1, padding=1, count_include_pad=False))
    outputs[:, -block.branch_pool.conv.out_channels :] = block.branch_pool(x)


def build_inception(state):
    """The network with these weights, in eval mode: images (B, 3, 299, 299) -> (B, 2048)."""
    net = torchvision.models.inception_v3(weights=None, init_weights=False, aux_logits=False)
    for name, block in net.named_children():
        if hasattr(block, "branch_pool"):
            block.register_forward_hook(functools.partial(repool, last=name == "Mixed_7c"))
    net.fc = nn.Identity()
    wanted = [name for name in net.state_dict() if "num_batches" not in name]
    net.load_state_dict({name: state[name] for name in wanted}, strict=False)
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # faster


def load_inception(path, device):
    """-> the network, and how the SHA-256 of its weights begins. No path: the published weights."""
    file = Path(path or f"{torch.hub.get_dir()}/checkpoints/{Path(URL).name}")
    try:
        if not path and not file.exists():
            torch.hub.load_state_dict_from_url(URL, check_hash=True, weights_only=True)
        net = build_inception(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # another file can make torch.load raise anything
        user_error(f"no weights of this network in {file}: {error!r:.120}. "
                   f"They are at {URL}; put them there, or name their file by --weights")
    return net.to(device), hashlib.sha256(file.read_bytes()).hexdigest()[:8]


# --- from images to features ----------------------------------------------------------------------


def to_input(images, device):
    """uint8 images (C, H, W), a list or a tensor of them -> (B, 3, 299, 299) in [-1, 1]: bilinear,
    not antialiased. Images of different sizes are resized one by one, and so are large
    photographs, because a batch of them as floats fills gigabytes.
    """
    if len(images) > 1 and (len({x.shape for x in images}) > 1 or images[0].numel() > 1_000_000):
        return torch.cat([to_input([image], device) for image in images])
    x = images if torch.is_tensor(images) else torch.stack(images)
    x = x.to(device).expand(-1, 3, -1, -1) / 255
    x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    return (2 * x - 1).contiguous(memory_format=torch.channels_last)


def read_picture(path, size=None):
    """An image file -> uint8 (3, H, W), with a size (3, size, size); or why it cannot be read."""
    try:
        image = open_image(path)
        if size:
            image = ImageOps.fit(image, (size, size), Image.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:  # a broken file can make Pillow raise anything
        return f"{path}: {error}"


def read_batches(files, size, batch):
    """Yields lists of the pictures in these files, in order. Several threads decode them."""
    broken = []
    with ThreadPool() as pool:
        for i in range(0, len(files), batch):
            found = pool.map(functools.partial(read_picture, size=size), files[i : i + batch])
            broken += [reason for reason in found if isinstance(reason, str)]
            pictures = [picture for picture in found if torch.is_tensor(picture)]
            if pictures:
                yield pictures
    if broken:
        print(f"left out: {len(broken)} unreadable files", broken[0])


# What a REAL or a FAKE stands for: images in batches, or the statistics that were saved of them.
Source = namedtuple("Source", "name total size batches known", defaults=[None] * 4)


def open_source(name, args, n=None, usual_size=None):
    """A data set's name, a folder or a file of statistics -> a Source. n: take n random images.
    A data set's images have args.size, or else usual_size, or else that of SETS. A folder's have
    args.size, or else their own; the size of the Source is then the first image's.
    """
    if os.path.isfile(name):
        known, size = load_statistics(name)
        return Source(name, size=size and tuple(size), known=known)
    if name in SETS:
        size = args.size or usual_size or SETS[name]
        images = load_images(name, size, args.root, args.split).images[:n]
        return Source(f"{name} ({args.split})", len(images), (size, size), images.split(args.batch))
    if os.path.exists(f"{name}/checkpoint.pt"):  # the folder of a run
        name = f"{name}/generated"
        if not os.path.exists(name):
            user_error(f"there is no {name}; run the training script with --generate N first")
    files = list_files(name) if os.path.isdir(name) else []
    checkpoint = Path(name.rsplit("generated", 1)[0], "checkpoint.pt")
    if files and checkpoint.exists() and os.path.getmtime(files[0]) < checkpoint.stat().st_mtime:
        print(f"{SCRIPT}.py: warning: {name}: the checkpoint is newer than these images: "
              "--generate draws new ones", file=sys.stderr)
    files = random.Random(0).sample(files, min(n, len(files))) if n else files
    pictures = (read_picture(file, args.size) for file in files)
    first = next((picture for picture in pictures if torch.is_tensor(picture)), None)
    if first is None:
        reason = read_picture(files[0]) if files else f"It is none of {', '.join(SETS)} either"
        user_error(f"{name}: no image that can be read. {reason}")
    size = first.shape[2], first.shape[1]
    return Source(name, len(files), size, read_batches(files, args.size, args.batch))


def feature_batches(source, net, device):
    """Yields the features of a source's images, (B, 2048) at a time, and tells how far it is."""
    home = "cpu" if device.type == "mps" else device  # statistics() needs float64; MPS has none
    done = 0
    for images in source.batches:
        yield net(to_input(images, device)).to(home)
        before, done = done, done + len(images)
        if 10 * before // source.total < 10 * done // source.total:  # one tenth more
            print(f"{source.name}: {done:,} of {source.total:,} images")


def load_statistics(path):
    """A .npz file -> Statistics, size of the images. pytorch-fid's have mu and sigma alone."""
    try:
        with np.load(path) as saved:
            mu, sigma = (torch.from_numpy(saved[key].astype(np.float64, casting="same_kind"))
                         for key in ("mu", "sigma"))  # complex numbers are refused
            n, weights, size = (saved[key].tolist() if key in saved else None
                                for key in ("n", "weights", "size"))
    except Exception as error:  # another file can make numpy raise anything
        user_error(f"{path} is not a .npz file with mu and sigma: {error!r:.200}")
    if mu.shape != (2048,) or sigma.shape != (2048, 2048):
        user_error(f"{path}: mu and sigma are not those of 2048 features")
    # A covariance is symmetric and, but for rounding, has no eigenvalue below 0.
    right = all(x.isfinite().all() for x in (mu, sigma)) and torch.allclose(sigma, sigma.T)
    if not right or torch.linalg.eigvalsh(sigma).min() < -1e-6 * sigma.trace():
        user_error(f"{path}: mu and sigma are not a mean and a covariance")
    return Statistics(n, mu, sigma, None, weights), size


# --- the quality index ----------------------------------------------------------------------------


class QualityNet(nn.Module):
    """uint8 images (B, 3, 64, 64) -> logits (B,), above 0 for deformed ones."""

    def __init__(self):
        super().__init__()
        shapes = [(3, 4, 0), (128, 4, 0), (128, 4, 0), (128, 2, 2), (128, 2, 2)]
        convs = [nn.Conv2d(n, 128, 4, stride, padding) for n, stride, padding in shapes]
        for conv in convs:
            nn.init.normal_(conv.weight, std=0.02)
        self.convs = nn.ModuleList(spectral_norm(conv) for conv in convs)
        self.last = nn.Linear(128, 1)

    def forward(self, images):
        x = images / 127.5 - 1
        for conv in self.convs:  # (B, 128, 16, 16), then 4 x 4, and three times a single pixel
            x = F.dropout(F.leaky_relu(conv(x), 0.2), 0.5, self.training)
        return self.last(x.flatten(1)).flatten()


def deform(image, rng, alpha=5, sigma=0.9):
    """Elastic deformation of one image (C, H, W) uint8, by Simard, Steinkraus and Platt, "Best
    Practices for Convolutional Neural Networks Applied to Visual Document Analysis", 2003.

    Every pixel is fetched from a place nearby: uniform noise, blurred, times alpha, gives the
    distances. Along each axis, their standard deviation is 0.91 pixels.
    """
    shape = image.shape[1:]
    away = [ndimage.gaussian_filter(rng.uniform(-1, 1, shape), sigma, mode="constant")
            for _ in range(2)]
    places = np.indices(shape) + alpha * np.stack(away)
    fetched = [ndimage.map_coordinates(np.float64(channel), places, order=1, mode="reflect")
               for channel in image]
    return np.rint(fetched).astype(np.uint8)


def quality_parts(real, rng):
    """Shuffled images, three quarters to train on and a quarter held out, each real and deformed.
    An image and its deformed copy are in one part.
    """
    real = real[torch.from_numpy(rng.permutation(len(real))[:10_000])]
    deformed = torch.from_numpy(np.stack([deform(image, rng) for image in real.numpy()]))
    cut = len(real) * 3 // 4
    return (real[:cut], deformed[:cut]), (real[cut:], deformed[cut:])


def train_quality(real, epochs, device):
    """uint8 images (N, 3, 64, 64) -> the network; how often it is right on real, deformed ones."""
    torch.manual_seed(0)
    train, test = quality_parts(real, np.random.default_rng(0))
    images = torch.cat(train)
    labels = torch.arange(len(images)).ge(len(train[0])).float()  # 1 for deformed
    net = QualityNet().to(device)
    opt = torch.optim.Adam(net.parameters(), lr=1e-5)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(images)).split(32):
            logits = net(images[batch].to(device))
            loss = F.binary_cross_entropy_with_logits(logits, labels[batch].to(device))
            opt.zero_grad()
            loss.backward()
            opt.step()
        print(f"quality index: epoch {epoch}/{epochs}  loss {loss.item():.3f}", flush=True)
    net.eval()
    on_real, on_deformed = (quality_logits(net, part, device) for part in test)
    return net, (on_real < 0).float().mean().item(), (on_deformed > 0).float().mean().item()


@torch.no_grad()
def quality_logits(net, images, device):
    return torch.cat([net(batch.to(device)) for batch in images.split(500)])


def report_quality(args):
    """Yields for every FAKE its quality index, and the line that tells it."""
    def pictures(source):
        if source.known:
            user_error(f"{source.name}: the quality index needs images, not their statistics")
        images = [image for batch in source.batches for image in batch]
        return torch.stack(images).expand(-1, 3, -1, -1)  # grey ones, too, get three channels

    real, *fakes = [open_source(name, args, args.n) for name in (args.real, *args.fake)]
    real_images = pictures(real)
    net, accuracy_real, accuracy_deformed = train_quality(real_images, args.epochs, args.device)
    for fake in fakes:
        images, n = pictures(fake), min(len(real_images), 10_000)
        index = quality_logits(net, images, args.device).sigmoid().mean().item()
        result = {"fake": fake.name, "quality_index": index, "accuracy_real": accuracy_real,
                  "accuracy_deformed": accuracy_deformed, "n_real": n, "n_fake": len(images)}
        yield result, (
            f"quality index {index:.3f}   right on held-out images: {accuracy_real:.1%} of real, "
            f"{accuracy_deformed:.1%} of deformed ones   (64 px, {args.epochs} epochs, "
            f"{n} of {real.name} vs {len(images)} of {fake.name})")


# --- the command line -----------------------------------------------------------------------------


def report_scores(args):
    """Yields for every FAKE its scores, and the line that tells them. REAL is measured once."""
    fakes = [open_source(name, args) for name in args.fake]
    usual_size = min(fakes[0].size) if fakes and fakes[0].size else None
    real = open_source(args.real, args, args.n, usual_size)
    known = [source.known for source in (real, *fakes) if source.known]
    net = weights = None
    if len(known) < 1 + len(fakes):
        net, weights = load_inception(args.weights, args.device)
    all_weights = {weights, *(s.weights for s in known)} - {None}
    if len(all_weights) > 1:
        user_error(f"statistics of different weights: {' and '.join(sorted(all_weights))}")

    def measure(source):
        found = source.known or statistics(feature_batches(source, net, args.device), weights)
        return found if args.kid else found._replace(features=None)

    of_real = measure(real)
    if args.save:
        with open(args.save, "wb") as file:  # by its name alone, savez() would add an .npz to it
            np.savez(file, mu=of_real.mu, sigma=of_real.sigma, n=of_real.n, weights=weights,
                     size=real.size)
        print(f"{of_real.n} images -> {args.save}")
    for fake in fakes:
        yield compare(real, of_real, fake, measure(fake), min(all_weights, default=PUBLISHED))


def compare(real, of_real, fake, of_fake, weights):
    """Two Sources and their Statistics -> the scores, and the line that tells them."""
    if min(of_real.n or 2048, of_fake.n or 2048) < 2048:
        print(f"{SCRIPT}.py: warning: below 2,048 images FID comes out much too large; compare it "
              "only with one of as many images", file=sys.stderr)
    if real.size and fake.size and real.size != fake.size:
        print(f"{SCRIPT}.py: warning: the images of {real.name} are of {real.size} pixels, those "
              f"of {fake.name} of {fake.size}; --size makes them equal", file=sys.stderr)
    published = weights == PUBLISHED
    network = "inception-2015-12-05" if published else f"weights {weights}"
    fid_name, kid_name = ("FID", "KID") if published else ("FD", "KD")
    width, height = fake.size or real.size or ("?", "?")
    distance = frechet_distance(of_real.mu, of_real.sigma, of_fake.mu, of_fake.sigma)
    result = {"real": real.name, "fake": fake.name, "n_real": of_real.n, "n_fake": of_fake.n,
              "size": f"{width}x{height}", "network": network, "resize": "bilinear 299",
              fid_name: distance}
    line = f"{fid_name} {distance:.2f}"
    if of_real.features is not None and of_fake.features is not None:
        mean, std, subsets, n = kid(of_real.features, of_fake.features)
        result |= {kid_name: mean, f"{kid_name}_std": std, "subsets": subsets, "subset_size": n}
        line += f"   {kid_name} {mean:.4f} +- {std:.4f} (subsets: {subsets} of {n})"
    return result, (f"{line}   ({network}, bilinear 299, {result['size']} px, "
                    f"{of_real.n or '?'} of {real.name} vs {of_fake.n or '?'} of {fake.name})")


def read_arguments(argv):
    """-> the settings."""
    parser = argparse.ArgumentParser(  # without a usage text, so that an error is one line
        prog=f"{SCRIPT}.py", usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add, devices = parser.add_argument, ["cuda"] * torch.cuda.is_available()
    devices += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    add("real", metavar="REAL", help=f"a folder, saved statistics, or one of {', '.join(SETS)}")
    add("fake", metavar="FAKE", nargs="*", help="the same, or the folder of a run; one or more")
    add("--root", default="data", help="where the data sets are, or are downloaded to (data)")
    add("--split", choices=["train", "test"], default="train", help="part of a data set (train)")
    add("--size", type=int, help="scale and crop all images to this, as for training")
    add("--n", type=int, help="take only N images, at random, of REAL (--quality-index: of each)")
    add("--weights", metavar="FILE", help="the network's weights, instead of the published ones")
    add("--batch", type=int, default=32, help="images at a time (32)")
    add("--device", choices=devices, help="by default the first of cuda, mps, cpu that is there")
    add("--no-kid", dest="kid", action="store_false", help="FID alone, which is faster")
    add("--save", metavar="FILE.npz", help="keep the statistics of REAL; pytorch-fid reads them")
    add("--json", action="store_true", help="print the result as JSON, all else on stderr")
    add("--quality-index", action="store_true", help="give that instead of FID (see above)")
    add("--epochs", type=int, default=100, help="of the quality index's training (100)")
    args = parser.parse_args(argv)
    for flag, value in vars(args).items():
        if type(value) is int and value < 1:
            user_error(f"--{flag} {value}: it must be above 0")
    if not args.fake and (args.quality_index or not args.save):
        user_error("FAKE is missing: what is REAL to be compared with?")
    if args.save and (args.quality_index or os.path.isfile(args.real)
                      or not Path(args.save).absolute().parent.is_dir()):
        user_error(f"--save {args.save}: for FID, with images as REAL, in a folder that exists")
    args.size = 64 if args.quality_index else args.size  # its network is built for no other
    args.device = torch.device(args.device or devices[0])
    return args


def main(argv=None):
    """Run with these arguments; by default, with those that this script was started with."""
    if argv is None:  # in a notebook, sys.argv is the notebook's
        argv = sys.argv[1:] if Path(sys.argv[0]).stem == SCRIPT else []
    try:
        args = read_arguments(argv)
        torch.backends.cudnn.allow_tf32 = False  # float32, not TF32, on a GPU too
        torch.backends.cudnn.benchmark = True
        stdout, report = sys.stdout, report_quality if args.quality_index else report_scores
        with contextlib.redirect_stdout(sys.stderr if args.json else stdout):
            for result, line in report(args):
                print(json.dumps(result) if args.json else line, file=stdout, flush=True)
    except OSError as error:
        user_error(error)
    except KeyboardInterrupt:
        sys.exit(130)


# --- data: the same text as in every training script ----------------------------------------------
SCRIPT = Path(globals().get("__file__", "fid.py")).stem  # a notebook's cell has no file


def user_error(message):
    """For mistakes that the user can fix: one line on stderr, exit status 2."""
    print(f"{SCRIPT}.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


# Data: every set becomes one tensor of images (N, C, size, size), uint8. Its labels are (N, K),
# each 0 or 1, with K names. digest is a text that changes with any of it.
Data = namedtuple("Data", "images labels names digest", defaults=[""])
SETS = {"cartoon": 32, "mnist": 28, "fashion_mnist": 28, "cifar10": 32, "celeba": 64}  # their sizes
FACE = ["Blond_Hair", "Eyeglasses", "Mouth_Slightly_Open", "Smiling", "Wearing_Lipstick"]
YES_NO = {"1": 1, "1.0": 1, "True": 1, "0": 0, "0.0": 0, "False": 0, "-1": 0, "-1.0": 0}


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


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # for names that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
