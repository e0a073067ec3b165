"""Which generator draws best? Finished runs on one data set, side by side.

    python tests/measure/quality.py runs/dcgan-faces-0 runs/dcgan-faces-1 runs/wgan-faces-0 ...

Runs of one script that differ in their seeds alone become one row: mean and standard deviation. FD
is the Frechet distance between 2,000 fakes and all real images, in 128 features of a small
classifier that is trained here on the data's labels. It is no FID: its numbers compare runs in one
table, and nothing else. The first row has the FD of 2,000 real images against the others: the best
that can be had. spread is over the same fakes.
"""

import argparse
import importlib
import statistics

import torch
from control import classifier, open_run

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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--root", default="data")
    asked, net, rows = parser.parse_args(), None, {}
    for out in asked.runs:
        run = open_run(out)
        module, args = run.module, run.args
        if net is None:
            data = module.load_images(args.data, args.size, asked.root)
            real = data.images.to(args.device) / 127.5 - 1
            net = classifier(data, args.device)
            all_real = features(net, real)
            floor = distance(features(net, real[:2000]), features(net, real[2000:]))
            print("| script | runs | images shown to G | FD | spread |\n|---|---|---|---|---|")
            print(f"| {args.data}, 2,000 real images | | | {floor:.3f} | 1 |", flush=True)
        made = fakes(run)
        spread = (made.std(0).mean() / real.std(0).mean()).item()
        row = rows.setdefault(module.SCRIPT, [])
        shown = args.checkpoint["step"] * args.batch  # of one process
        row.append((distance(features(net, made), all_real), spread, shown))
    for name, found in rows.items():
        fd, spread, shown = zip(*found)
        print(f"| {name} | {len(found)} | {shown[0]:,} | {cell(fd, 3)} | {cell(spread, 2)} |")


if __name__ == "__main__":
    main()
