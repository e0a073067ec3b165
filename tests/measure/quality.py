"""Which generator draws best? Finished runs on one data set, side by side.

    python tests/measure/quality.py runs/dcgan-faces-0 runs/dcgan-faces-1 runs/wgan-faces-0 ...
    python tests/measure/quality.py --stops runs/wgan-faces runs/dcgan-faces --chart chart.png

Runs of one script that differ in their seeds alone become one row: mean and standard deviation. FD
is the Frechet distance between 2,000 fakes and all real images, in 128 features of a small
classifier that is trained here on the data's labels. It is no FID: its numbers compare runs in one
table, and nothing else. The first row has the FD of 2,000 real images against the others: the best
that can be had. spread is over the same fakes.

--stops asks whether a loss follows the quality of the images. Each run has folders generated-150,
generated-600 ...: what --generate N drew at these steps, kept under another name. For each run a
table has a row for each stop, with the FD of that folder and the losses around that step (means
over a fortieth of the run before and after it), and under them the rank correlation of each column
with FD: 1 if it rises and falls with FD, -1 if it does the opposite. Of five stops in random order,
one in 60 has a correlation of 1 or -1. In --chart, a run's losses are drawn over its FD.

--index adds the quality index of fid.py: one network is trained for all stops, for that many
epochs, at a learning rate of 1e-4, on up to 10,000 real images. They have the size of the runs'
images, and all are enlarged to 64 px.
"""

import argparse
import importlib
import statistics
from pathlib import Path

import numpy as np
import torch
from control import classifier, open_run
from PIL import Image, ImageDraw
from scipy.stats import spearmanr
from torch import nn

fid = importlib.import_module("fid")  # control.py has made it possible


@torch.no_grad()
def features(net, images):
    """(n, C, size, size) in [-1, 1] -> Statistics of n rows of 128."""
    batches = (net[:-2](part).mean((2, 3)) for part in images.split(250))
    return fid.statistics(batches)


def distance(a, b):
    return fid.frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


@torch.no_grad()
def fakes(run):
    torch.manual_seed(1)
    return torch.cat([run.draw(100) for _ in range(20)])


def cell(values, digits):
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def prepare(run, root):
    """-> the real images in [-1, 1], the classifier, Statistics of all, FD of 2,000 of them."""
    module, args = run.module, run.args
    data = module.load_images(args.data, args.size, root)
    real = data.images.to(args.device) / 127.5 - 1
    net = classifier(data, args.device)
    floor = distance(features(net, real[:2000]), features(net, real[2000:]))
    return real, net, features(net, real), floor


def compare(runs, real, net, all_real, floor):
    print("| script | runs | images shown to G | FD | spread |\n|---|---|---|---|---|")
    print(f"| {runs[0].args.data}, 2,000 real images | | | {floor:.3f} | 1 |", flush=True)
    rows = {}
    for run in runs:
        made = fakes(run)
        spread = (made.std(0).mean() / real.std(0).mean()).item()
        row = rows.setdefault(run.module.SCRIPT, [])
        shown = run.args.checkpoint["step"] * run.args.batch  # of one process
        row.append((distance(features(net, made), all_real), spread, shown))
    for name, found in rows.items():
        fd, spread, shown = zip(*found)
        print(f"| {name} | {len(found)} | {shown[0]:,} | {cell(fd, 3)} | {cell(spread, 2)} |")


def enlarge(images):
    """[-1, 1] -> uint8 (n, 3, 64, 64), for the quality index."""
    images = nn.functional.interpolate(images.cpu(), size=64, mode="bilinear")
    return (127.5 * (images + 1)).round().byte().expand(-1, 3, -1, -1)


def train_index(real, epochs, device):
    """fid.train_quality() at ten times its rate -> the network."""
    torch.manual_seed(0)
    train, test = fid.quality_parts(enlarge(real), np.random.default_rng(0))
    images, net = torch.cat(train), fid.QualityNet().to(device)
    labels = torch.arange(len(images)).ge(len(train[0])).float()  # 1 for deformed
    opt = torch.optim.Adam(net.parameters(), lr=1e-4)
    for _ in range(epochs):
        for i in torch.randperm(len(images)).split(32):
            loss = nn.functional.binary_cross_entropy_with_logits(
                net(images[i].to(device)), labels[i].to(device))
            opt.zero_grad()
            loss.backward()
            opt.step()
    net.eval()
    right = [(fid.quality_logits(net, part, device) > 0).float().mean() for part in test]
    print(f"the quality index is right on {1 - right[0]:.1%} of real images held out, and on "
          f"{right[1]:.1%} of deformed ones", flush=True)
    return net


def loss_columns(rows):
    """losses.csv -> the steps, and {name: values} of its losses and W (then without L_D = -W)."""
    names = [name for name in rows[0] if name.startswith("loss") or name == "W"]
    names = [name for name in names if name != "loss_D" or "W" not in names]
    return np.array([row["step"] for row in rows]), {
        name: np.array([row[name] for row in rows]) for name in names}


def read_stops(out, last):
    """Yields step and images (n, 3, size, size) in [-1, 1] of each folder generated-STEP."""
    folders = {int(path.name.split("-")[1]): path for path in Path(out).glob("generated-[0-9]*")}
    for step in sorted(step for step in folders if step <= last):  # the run may still go on
        files = fid.list_files(folders[step])
        images = [image for batch in fid.read_batches(files, None, 250) for image in batch]
        yield step, torch.stack(images) / 127.5 - 1


def follow(run, net, all_real, index_net):
    """Print a run's table -> what its chart shows."""
    args, found = run.args, {}
    steps, losses = loss_columns(args.checkpoint["rows"])
    made = np.diff(steps, prepend=0)  # a row is a mean over so many steps
    channels = args.checkpoint["data"][0].shape[1]
    for stop, images in read_stops(args.out, steps[-1]):
        row = {"FD": distance(features(net, images[:, :channels].to(args.device)), all_real)}
        if index_net:
            logits = fid.quality_logits(index_net, enlarge(images), args.device)
            row["index"] = logits.sigmoid().mean().item()
        near = np.abs(steps - stop) <= steps[-1] / 40
        row |= {name: np.average(v[near], weights=made[near]) for name, v in losses.items()}
        found[stop] = row
    names = list(next(iter(found.values())))
    print(f"\n{args.out}\n\n| step | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for stop, row in found.items():
        print(f"| {stop:,} | {' | '.join(f'{value:.4g}' for value in row.values())} |")
    table = {name: [row[name] for row in found.values()] for name in names}
    ranks = {name: spearmanr(table[name], table["FD"]).statistic for name in names[1:]}
    print(f"| rank correlation with FD | | {' | '.join(f'{r:.2f}' for r in ranks.values())} |",
          flush=True)
    curves = {name: (list(found), table[name]) for name in names if name not in losses}
    return Path(args.out).name, curves | {name: (steps, losses[name]) for name in losses}, ranks


def draw_chart(panels, width=300, height=220):
    """A panel for each run: every curve between its own least and largest value, over the steps."""
    chart = Image.new("RGB", (2 * width, height * -(-len(panels) // 2)), "white")
    pen, inks = ImageDraw.Draw(chart), ["red", "navy", "darkorange", "green"]
    for number, (run, curves, ranks) in enumerate(panels):
        left, top = width * (number % 2), height * (number // 2)
        bottom, start = top + height - 25, top + 25 + 14 * len(curves)
        last = max(xs[-1] for xs, _ in curves.values())
        pen.rectangle((left + 8, start - 3, left + width - 8, bottom + 3), outline="lightgrey")
        pen.text((left + 8, top + 5), run, "black")
        pen.text((left + 8, bottom + 7), f"steps 0 to {last:,}", "black")
        for line, (ink, (name, (xs, ys))) in enumerate(zip(inks, curves.items())):
            x = np.interp(xs, (0, last), (left + 12, left + width - 12))
            y = np.interp(ys, (min(ys), max(ys)), (bottom, start))
            pen.line(list(zip(x, y)), ink)
            for u, v in zip(x, y) if name in ("FD", "index") else ():
                pen.ellipse((u - 3, v - 3, u + 3, v + 3), ink)
            with_fd = f", rank correlation with FD {ranks[name]:.1f}" if name in ranks else ""
            pen.text((left + 8, top + 19 + 14 * line),
                     f"{name} {min(ys):.3g} to {max(ys):.3g}{with_fd}", ink)
    return chart


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--root", default="data")
    parser.add_argument("--stops", action="store_true")
    parser.add_argument("--index", type=int, metavar="EPOCHS")
    parser.add_argument("--chart", metavar="FILE")
    asked = parser.parse_args()
    runs = [open_run(out) for out in asked.runs]
    real, net, all_real, floor = prepare(runs[0], asked.root)
    if not asked.stops:
        return compare(runs, real, net, all_real, floor)
    print(f"FD of 2,000 real images: {floor:.3f}", flush=True)
    index_net = train_index(real, asked.index, runs[0].args.device) if asked.index else None
    panels = [follow(run, net, all_real, index_net) for run in runs]
    if asked.chart:
        draw_chart(panels).save(asked.chart)


if __name__ == "__main__":
    main()
