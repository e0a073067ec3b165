"""FID and KID: how far generated images are from real ones.

FID: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium", 2017, arXiv 1706.08500. KID: Binkowski et al., "Demystifying MMD GANs", 2018, arXiv
1801.01401. The quality index: Espis and Potrimba, "Deep Learning Project", Bologna, 2020.

A network trained to name what is in a photograph (Inception) turns every image into 2048 numbers,
its features. FID treats the features of the real images as one Gaussian N(mu1, S1), those of the
fakes as another, and gives their Frechet distance. KID (maximum mean discrepancy) compares the
features pair by pair, without that assumption. 0 is best for both.

    FID = |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))          Eq. 6 of Heusel et al.
    KID = E[k(x, x')] + E[k(y, y')] - 2 E[k(x, y)]               x, x' two real images,
          k(x, y) = (x . y / 2048 + 1)^3                         y, y' two fakes

FID is biased: fewer images, larger FID. Compare only scores of equal n. KID is not biased, and may
fall below 0 by chance. Its mean and standard deviation are over 100 random subsets of 1,000.

--quality-index is another idea, and did not work: a network learns to tell real images from the
same images elastically deformed, and its mean output on the fakes (0 like real ones, 1 like
deformed ones) should say how good they are. In the report it did not follow FID over training; a
GAN's mistakes are not elastic deformations. It is here to be seen failing.

Differs from pytorch-fid (same network, weights and resizing, so the numbers agree):
  - no scipy.linalg.sqrtm, which is slow, may turn complex, and lost the option that pytorch-fid
    calls in SciPy 1.18; the trace comes from symmetric matrices (see frechet_distance)
  - images of any mix of sizes, in sub-folders too; transparent ones are put on white, rotated ones
    turned upright, 16-bit ones scaled, as the training scripts do it; unreadable files are counted
Differs from clean-fid's own mode: that one resizes with an antialiased bicubic filter, which gives
other numbers. Differs from torch-fidelity: no TensorFlow-1 resizing, whose pixel grid is shifted.
Differs from the report: its 97 % accuracy of the quality network were on deformed images only,
since the data was split before it was shuffled; here both classes are held out and reported. One
displacement is shared by the three colours, so that no colour fringes give deformed images away.

    python fid.py celeba runs/dcgan-celeba/generated --split test
    python fid.py folder/of/real --save real.npz ; python fid.py real.npz folder/of/fakes
    python fid.py cartoon runs/dcgan-cartoon/generated --quality-index
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import deque, namedtuple
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
from torchvision.models import inception

# --- the distances --------------------------------------------------------------------------------

Statistics = namedtuple("Statistics", "n mu sigma features weights")  # None where not known


def statistics(batches, weights=None, keep=False):
    """Batches of features (B, d) -> n, mean (d,) and covariance (d, d) in float64.

    The batches are merged one by one (Chan et al. 1979), about their own means, so that nothing
    large is ever subtracted from something large, and none has to be kept. KID needs them: keep.
    """
    n, mu, squares, kept = 0, 0, 0, []
    for features in batches:
        x = features.double()
        m, mean = len(x), x.mean(0)
        away = mean - mu
        # One more row, for how far the means are apart, and a single product does it all.
        rows = torch.cat([x - mean, away[None] * (n * m / (n + m)) ** 0.5])
        squares = squares.addmm_(rows.T, rows) if n else rows.T @ rows
        mu = mu + away * (m / (n + m))
        n += m
        kept += [features] if keep else []
    if n < 2:
        refuse(f"{n} usable images: a covariance needs two at the very least")
    sigma = squares.cpu() / (n - 1)
    return Statistics(n, mu.cpu(), sigma, torch.cat(kept) if keep else None, weights)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Eq. 6, of float64 tensors.

    Write S1 = A A^T and S2 = B B^T. Then S1 S2 has the eigenvalues of C C^T with C = A^T B (besides
    zeros), which is symmetric: they are real, not negative, and quickly found.
    """
    A, B = sorted((square_root(sigma1), square_root(sigma2)), key=lambda root: root.shape[1])
    C = A.T @ B  # (rank of S1, rank of S2), the smaller rank first
    roots = torch.linalg.eigvalsh(C @ C.T).clamp(min=0).sqrt()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * roots.sum()
    if not -1e-3 < distance < math.inf:  # false for NaN, too
        refuse(f"the distance is {distance.item()}: weights or statistics cannot be right")
    return max(0.0, distance.item())  # rounding can make -1e-13 of 0


def square_root(sigma):
    """A (d, rank) with A A^T = sigma, by Cholesky's method with pivoting.

    It stops at the rank of sigma: n images span n - 1 directions at most, and the roots of the
    rounding errors in all the others would add up.
    """
    upper, order, rank, _ = lapack.dpstrf(sigma.numpy())
    A = np.empty((len(sigma), rank))
    A[order - 1] = np.tril(upper.T[:, :rank])
    return torch.from_numpy(A)


def kid_subsets(n1, n2):
    """How many subsets KID is the mean of, and their size: less than 100 of 1,000 if n is small."""
    size = min(1000, n1, n2)
    return (1 if size == n1 == n2 else 100), size


def kid(x, y):
    """Features (n1, d) and (n2, d) -> mean and standard deviation of MMD^2 over the subsets."""
    subsets, size = kid_subsets(len(x), len(y))
    generator = torch.Generator().manual_seed(0)

    def subset(features):
        chosen = torch.randperm(len(features), generator=generator)[:size]
        return features[chosen.to(features.device)].double()

    values = torch.stack([mmd(subset(x), subset(y)) for _ in range(subsets)])
    return values.mean().item(), values.std(correction=0).item()


def mmd(x, y):
    """The unbiased estimate of MMD^2 from m features of either kind: no x is paired with itself."""
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    same = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return same / (m * (m - 1)) - 2 * xy.mean()


# --- the network ----------------------------------------------------------------------------------
# torchvision's Inception, changed to what the graph inception-2015-12-05 does: averages at the
# border do not count the padding, and the last block takes maxima.

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
PUBLISHED = "6726825d"  # how the SHA-256 of that file begins


def average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(inception.InceptionA):
    def forward(self, x):
        b = self.branch5x5_2(self.branch5x5_1(x))
        c = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), b, c, self.branch_pool(average(x))], 1)


class BlockC(inception.InceptionC):
    def forward(self, x):
        b = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        c = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        c = self.branch7x7dbl_5(self.branch7x7dbl_4(c))
        return torch.cat([self.branch1x1(x), b, c, self.branch_pool(average(x))], 1)


class BlockE(inception.InceptionE):
    def __init__(self, in_channels, conv_block):
        super().__init__(in_channels, conv_block)
        self.pool = maximum if in_channels == 2048 else average  # the last block, or the one before

    def forward(self, x):
        b, c = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        b = [self.branch3x3_2a(b), self.branch3x3_2b(b)]
        c = [self.branch3x3dbl_3a(c), self.branch3x3dbl_3b(c)]
        return torch.cat([self.branch1x1(x), *b, *c, self.branch_pool(self.pool(x))], 1)


def build_inception(state):
    """The network with these weights, in eval mode: images (B, 3, 299, 299) -> (B, 2048)."""
    blocks = BlockA, inception.InceptionB, BlockC, inception.InceptionD, BlockE
    conv = inception.BasicConv2d
    blocks = [conv, *(functools.partial(block, conv_block=conv) for block in blocks), None]
    net = inception.inception_v3(weights=None, init_weights=False, aux_logits=False,
                                 inception_blocks=blocks)
    net.fc = nn.Identity()
    wanted = [name for name in net.state_dict() if "num_batches" not in name]
    net.load_state_dict({name: state[name] for name in wanted}, strict=False)
    # Channels last suits convolutions on CPUs and GPUs alike.
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def load_inception(path, device):
    """-> the network, and how the SHA-256 of its weights begins.

    Without a path: the published weights, from torch's hub cache or else from the net.
    """
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name
        if not path.exists():
            try:
                with contextlib.redirect_stderr(sys.stdout):  # its progress
                    torch.hub.load_state_dict_from_url(
                        URL, map_location="cpu", check_hash=True, weights_only=True)
            except (OSError, RuntimeError) as error:
                refuse(f"{URL} cannot be downloaded ({error}); get that file and put it into "
                       f"{path.parent}, or name it by --weights")
    if not Path(path).is_file():
        refuse(f"--weights {path}: there is no such file")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    state = load_file(path)
    try:
        return build_inception(state).to(device), digest
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        refuse(f"{path} does not hold the weights of this network: {error!r}")


# --- from images to features ----------------------------------------------------------------------


def to_input(images, device):
    """uint8 (C, H, W), a list or a tensor of them -> (B, 3, 299, 299) in [-1, 1].

    Bilinear, not antialiased. Different sizes are resized one by one, and so are photographs: a
    batch of them as floats fills gigabytes.
    """
    if len(images) > 1 and (len({x.shape for x in images}) > 1 or images[0].numel() > 1_000_000):
        return torch.cat([to_input([image], device) for image in images])
    x = images if torch.is_tensor(images) else torch.stack(images)
    x = x.to(device).expand(-1, 3, -1, -1) / 255
    x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    return (2 * x - 1).contiguous(memory_format=torch.channels_last)


def read_picture(path, size=None):
    """An image file -> uint8 (3, H, W); the path itself if it cannot be read.

    At its own size, or scaled and cropped to size x size as the training scripts do it.
    """
    try:
        image = open_image(path)
        if size:
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception:  # Pillow raises almost anything at a broken file
        return path


def read_ahead(files, size, batch):
    """Lists of pictures, in order. Threads decode the next batches, two and no more."""
    waiting, read = deque(), functools.partial(read_picture, size=size)
    with ThreadPool() as pool:
        for i in range(0, len(files), batch):
            waiting.append(pool.map_async(read, files[i : i + batch]))
            if len(waiting) > 2:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


Source = namedtuple("Source", "name total batches size")  # what a REAL or a FAKE stands for


def open_source(name, args, n=None, usual=None):
    """-> a Source; its batches are read when they are needed. n: that many random images, no more.

    A data set's images have args.size, or else the usual size of its own or of the fakes. A
    folder's have args.size, or else their own; size then is that of the first one.
    """
    if name.endswith(".npz"):
        return Source(name, None, load_statistics(name), None)
    if name in SETS:
        size = args.size or usual or SETS[name]
        images = load_images(name, size, args.root, args.split).images[:n]
        return Source(f"{name} ({args.split})", len(images), images.split(args.batch), (size, size))
    files = list_images(name)
    files = random.Random(0).sample(files, min(n, len(files))) if n else files
    read = (read_picture(file, args.size) for file in files)
    first = next((picture for picture in read if torch.is_tensor(picture)), None)
    if first is None or len(files) < 2:
        refuse(f"{name} is no data set, and has not two images that can be read")
    return Source(name, len(files), read_ahead(files, args.size, args.batch), first.shape[:0:-1])


def measure(source, args, net, weights, keep=False):
    """-> the Statistics of a source, by way of the network; progress is told."""
    if isinstance(source.batches, Statistics):
        return source.batches
    home = "cpu" if args.device.type == "mps" else args.device  # MPS has no float64
    broken, start = [], time.perf_counter()

    def features():
        done = 0
        for images in source.batches:
            before, done = done, done + len(images)
            broken.extend(image for image in images if not torch.is_tensor(image))
            images = [image for image in images if torch.is_tensor(image)]
            if images:
                with torch.no_grad():
                    yield net(to_input(images, args.device)).to(home)
            if 10 * before // source.total < 10 * done // source.total:
                rate = done / (time.perf_counter() - start)
                print(f"{source.name}: {done:,} of {source.total:,} images, {rate:.1f}/s")

    found = statistics(features(), weights, keep)
    if broken:
        print(f"left out: {len(broken)} unreadable {broken[:1]}")
    return found


# Statistics in files, with the keys mu and sigma: pytorch-fid reads and writes the same.


def load_statistics(path):
    try:
        with np.load(path) as saved:
            mu, sigma = (torch.from_numpy(np.float64(saved[key])) for key in ("mu", "sigma"))
            n = int(saved["n"]) if "n" in saved else None
            weights = str(saved["weights"]) if "weights" in saved else None
    except Exception as error:  # as in load_file()
        refuse(f"{path} is not a .npz file with mu and sigma: {error!r}")
    if mu.shape != (2048,) or sigma.shape != (2048, 2048):
        refuse(f"{path}: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)} should be (2048,) and "
               "(2048, 2048)")
    finite = mu.isfinite().all() and sigma.isfinite().all()
    if not finite or not torch.allclose(sigma, sigma.T) or sigma.diagonal().min() < 0:
        refuse(f"{path}: not finite, or sigma is no covariance")
    return Statistics(n, mu, sigma, None, weights)


def save_statistics(found, path):
    """Under a temporary name first: at no moment is there half a file."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, mu=found.mu, sigma=found.sigma, n=found.n,
                     weights=found.weights, mode="bilinear 299")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- the quality index ----------------------------------------------------------------------------


class QualityNet(nn.Sequential):
    """Images (B, 3, 64, 64) in [-1, 1] -> logits (B,): above 0 for deformed ones."""

    def __init__(self):
        def conv(channels, stride):
            layer = nn.Conv2d(channels, 128, 4, stride)
            nn.init.normal_(layer.weight, std=0.02)
            return [nn.utils.parametrizations.spectral_norm(layer), nn.LeakyReLU(0.2),
                    nn.Dropout(0.5)]

        border = nn.ZeroPad2d((1, 2, 1, 2))  # the last two see a single pixel
        super().__init__(
            *conv(3, 4), *conv(128, 4), *conv(128, 4),  # (B, 128, 1, 1)
            border, *conv(128, 2), border, *conv(128, 2),  # (B, 128, 1, 1)
            nn.Flatten(), nn.Linear(128, 1), nn.Flatten(0),  # (B,)
        )


def deform(image, rng, alpha=5, sigma=0.9):
    """Elastic deformation (Simard et al. 2003) of one image (C, H, W) uint8.

    Every pixel is fetched from a place nearby: uniform noise, blurred, times alpha, gives the
    distances. Their standard deviation is 0.91 pixels.
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

    Shuffled before they are split; and no image is in one part as it is, deformed in the other.
    """
    real = real[torch.from_numpy(rng.permutation(len(real))[:10_000])].expand(-1, 3, -1, -1)
    deformed = torch.from_numpy(np.stack([deform(image, rng) for image in real.numpy()]))
    cut = len(real) * 3 // 4
    return (real[:cut], deformed[:cut]), (real[cut:], deformed[cut:])


def train_quality(real, epochs, device):
    """uint8 (N, C, 64, 64) -> the network as a function: uint8 images -> its logits, in eval mode;
    and its accuracy on held-out images, real and deformed.
    """
    torch.manual_seed(0)
    train, test = quality_parts(real, np.random.default_rng(0))
    images = torch.cat(train)
    labels = torch.arange(len(images)).ge(len(train[0])).float()  # 1 for deformed
    net = QualityNet().to(device)
    opt = torch.optim.Adam(net.parameters(), lr=1e-5)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(images)).split(32):
            logits = net(images[batch].to(device) / 127.5 - 1)
            loss = F.binary_cross_entropy_with_logits(logits, labels[batch].to(device))
            opt.zero_grad()
            loss.backward()
            opt.step()
        print(f"quality index: epoch {epoch}/{epochs}  loss {loss.item():.3f}", flush=True)
    net.eval()

    @torch.no_grad()
    def logits(images):
        return torch.cat([net(x.to(device).expand(-1, 3, -1, -1) / 127.5 - 1)
                          for x in images.split(500)])

    on_real, on_deformed = (logits(part) for part in test)
    return logits, (on_real < 0).float().mean().item(), (on_deformed > 0).float().mean().item()


def all_pictures(source):
    """-> uint8 (N, C, H, W) of a source whose images are of one size; copies stay."""
    return torch.stack([x for batch in source.batches for x in batch if torch.is_tensor(x)])


def report_quality(args):
    """-> for every FAKE what is known of it, and the line that tells it."""
    args.size = 64
    sources = [open_source(name, args, args.n) for name in (args.real, *args.fake)]
    real = all_pictures(sources[0])
    logits, accuracy_real, accuracy_deformed = train_quality(real, args.epochs, args.device)
    for source in sources[1:]:
        fake = all_pictures(source)
        index, n = logits(fake).sigmoid().mean().item(), min(len(real), 10_000)
        result = {"fake": source.name, "quality_index": index, "accuracy_real": accuracy_real,
                  "accuracy_deformed": accuracy_deformed, "n_real": n, "n_fake": len(fake)}
        yield result, (
            f"quality index {index:.3f}   held out: {accuracy_real:.1%} of real and "
            f"{accuracy_deformed:.1%} of deformed images told right   "
            f"(64 px, {args.epochs} epochs, {n} of {args.real} vs {len(fake)} of {source.name})")


# --- the command line -----------------------------------------------------------------------------


def report_score(args):
    """-> for every FAKE what is known of it, and the line that tells it. REAL is measured once."""
    fakes = [open_source(name, args) for name in args.fake]
    usual = min(fakes[0].size or [0]) if fakes else None
    real = open_source(args.real, args, args.n, usual)
    saved = [s.batches for s in (real, *fakes) if isinstance(s.batches, Statistics)]
    net = weights = None
    if len(saved) < 1 + len(fakes):
        net, weights = load_inception(args.weights, args.device)
    marks = {weights, *(s.weights for s in saved)} - {None}
    if len(marks) > 1:
        refuse(f"statistics of different weights: {' and '.join(sorted(marks))}")
    found = measure(real, args, net, weights, args.kid and fakes)
    if args.save:
        save_statistics(found, args.save)
        print(f"{found.n} images -> {args.save}")
    for source in fakes:
        if source.size and real.size and source.size != real.size:
            print(f"{SCRIPT}.py: warning: {real.name} is of {real.size[0]} x {real.size[1]} pixels,"
                  f" {source.name} of {source.size[0]} x {source.size[1]}; --size makes them equal",
                  file=sys.stderr)
        keep = args.kid and found.features is not None
        yield compare(real, found, source, measure(source, args, net, weights, keep),
                      min(marks, default=PUBLISHED))


def compare(real, of_real, fake, of_fake, weights):
    """Two Sources and their Statistics -> the scores, and the line that tells them."""
    if min(s.n or 2048 for s in (of_real, of_fake)) < 2048:
        print(f"{SCRIPT}.py: warning: below 2,048 images FID comes out much too large; compare it "
              "only with one of as many images", file=sys.stderr)
    published = weights == PUBLISHED
    network = "inception-2015-12-05" if published else f"weights {weights}"
    fid_name, kid_name = ("FID", "KID") if published else ("FD", "KD")
    distance = frechet_distance(of_real.mu, of_real.sigma, of_fake.mu, of_fake.sigma)
    size = "x".join(map(str, fake.size or real.size or "?"))
    result = {"real": real.name, "fake": fake.name, "n_real": of_real.n, "n_fake": of_fake.n,
              "size": size, "network": network, "resize": "bilinear 299", fid_name: distance}
    line = f"{fid_name}{'' if published else f' ({network})'} {distance:.2f}"
    details = (f"{network}, bilinear 299, {size} px, {of_real.n or '?'} of {real.name} vs "
               f"{of_fake.n or '?'} of {fake.name}")
    if of_real.features is not None and of_fake.features is not None:
        subsets, n = kid_subsets(of_real.n, of_fake.n)
        mean, std = kid(of_real.features, of_fake.features)
        result |= {kid_name: mean, f"{kid_name}_std": std, "subsets": subsets, "subset_size": n}
        line += f"   {kid_name} {mean:.4f} +- {std:.4f}"
        if n < 1000:
            details += f", {kid_name} of {subsets} subset{'s' * (subsets > 1)} of {n}"
    return result, f"{line}   ({details})"


def read_arguments(argv):
    """-> the settings, checked before anything is computed."""
    parser = argparse.ArgumentParser(
        f"{SCRIPT}.py", argparse.SUPPRESS, __doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    sets = ", ".join(SETS)
    add("real", metavar="REAL", help=f"a folder of images, statistics (.npz), or one of {sets}")
    add("fake", metavar="FAKE", nargs="*", help="the same, one or more; --save can do without")
    add("--root", default="data", help="where data sets are, or are downloaded to (data)")
    add("--split", choices=["train", "test"], default="train", help="part of a data set (train)")
    add("--size", type=int, help="scale and crop all images to this, as for training (their own)")
    add("--n", type=int, help="take only N images of REAL, at random")
    add("--weights", metavar="FILE", help="the network's weights (downloaded if not there)")
    add("--batch", type=int, default=32, help="images at a time (32)")
    add("--device", default=torch.accelerator.current_accelerator(check_available=True) or "cpu",
        help="cuda, mps or cpu; by default the first of them that is there")
    add("--no-kid", dest="kid", action="store_false",
        help="FID alone: memory then does not grow with the number of images")
    add("--save", metavar="FILE.npz", help="keep the statistics of REAL, also for pytorch-fid")
    add("--json", action="store_true", help="print the result as JSON, all else on stderr")
    add("--quality-index", action="store_true", help="that, instead of FID (see above)")
    add("--epochs", type=int, default=100, help="of the quality index's training (100)")
    args = parser.parse_args(argv)
    for name in ("size", "n", "batch", "epochs"):
        if (getattr(args, name) or 1) < 1 or getattr(args, name) == 0:
            refuse(f"--{name} {getattr(args, name)}: not a number from 1 on")
    if not args.fake and (args.quality_index or not args.save):
        refuse("FAKE is missing: what shall REAL be compared with?")
    if args.quality_index and (args.save or args.weights):
        refuse("--quality-index has no use for --save and --weights")
    for name in (args.real, *args.fake):
        if name not in SETS and not os.path.exists(name):
            refuse(f"{name} is not there, and none of {sets}")
        if os.path.isfile(name) and (args.quality_index or not name.endswith(".npz")):
            refuse(f"{name} is a file; give a folder of images or, for FID, statistics (.npz)")
    if args.save:
        home = Path(args.save).absolute().parent
        if args.real.endswith(".npz") or not args.save.endswith(".npz"):
            refuse(f"--save {args.save}: images become a file that ends in .npz")
        if not home.is_dir() or not os.access(home, os.W_OK):
            refuse(f"--save {args.save}: cannot write to {home}")
    try:
        args.device = torch.device(args.device)
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        refuse(f"--device {args.device} cannot be used: {error}")
    return args


def main(argv=None):
    """Run with these arguments; None means those of the shell."""
    try:
        args = read_arguments(argv)
        torch.backends.cudnn.allow_tf32 = False  # float32, not TF32, on a GPU too
        torch.backends.cudnn.benchmark = True
        stdout, report = sys.stdout, report_quality if args.quality_index else report_score
        with contextlib.redirect_stdout(sys.stderr if args.json else stdout):
            for result, line in report(args):
                print(json.dumps(result) if args.json else line, file=stdout, flush=True)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # torch's error for too little memory is no other
        refuse(str(error) or "too little memory")
    except KeyboardInterrupt:
        sys.exit(130)


# --- data: the same text as in every training script from here on ---------------------------------

SCRIPT = Path(__file__).stem


def refuse(message):
    """For what the user can mend: one line on stderr, exit status 2. Raises SystemExit."""
    print(f"{SCRIPT}.py: {message}".splitlines()[0], file=sys.stderr)
    sys.exit(2)


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


if __name__ == "__main__":
    main()
