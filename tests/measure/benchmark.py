"""How fast a script is: its bare steps, a whole run, and the same steps fed and read the usual way.

    python tests/measure/benchmark.py dcgan --data celeba
    python tests/measure/benchmark.py gan_mlp --data my_images --size 32
    python tests/measure/benchmark.py wgan --processes 2

Not collected by pytest. Further flags go to the script. Three things make the same training steps,
in one process, in turn, so that what else the machine does hits them alike:

    step     the steps alone
    run      with a row, a picture, the curves and a checkpoint after every 1 % of them, and a
             picture and a checkpoint before the first
    loader   the steps alone, but images come from the data set's own files by a DataLoader with two
             workers, and every step prints its losses, as in pytorch/examples' dcgan

Before that it times how fast images alone arrive: by that DataLoader, and by sample_batch().
(pix2pix_color has no loader.)

A run here is 100 steps, so that every step of it is also recorded: the last line says what that
costs, and what part of a default run it is. --processes N trains by torchrun with 1 and with N
processes.
"""

import argparse
import importlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torchvision import transforms

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))


class Files(torch.utils.data.Dataset):
    """The data set's own files, each decoded, cut and scaled as in pytorch/examples' dcgan."""

    def __init__(self, found, size):
        self.items, self.open_item, self.labels, _ = found
        self.scale = transforms.Compose([
            transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.scale(self.open_item(self.items[i])), self.labels[i].astype("float32")


def forever(loader):
    while True:
        yield from loader


def compare(name, flags, rounds, folder):
    module = importlib.import_module(name)
    args = module.parse_arguments([*flags, "--out", str(folder / "run"), "--steps", "100"])
    data, speeds = module.get_data(args), {"step": [], "run": [], "loader": []}
    steps, sample_batch, screen = module.steps, module.sample_batch, sys.stdout
    files = Files(module.find_images(args.data, args.size, args.root, "train"), args.size)
    loader = torch.utils.data.DataLoader(
        files, args.batch, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)
    batches, quiet = forever(loader), open(os.devnull, "w")

    def now():
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def bare():
        for _ in range(100):
            yield {}

    def usual():
        for _ in range(100):
            log = {}
            yield log
            print(*(value.item() for value in log.values()), file=quiet, flush=True)

    def timed(kind, turns):
        start = now()
        yield from turns
        speeds[kind].append(100 * args.batch / (now() - start))

    def in_turn(args, *others):
        """In place of steps(): the loop of train() makes all steps of all three kinds."""
        yield from bare()  # to warm up
        for number in range(rounds):
            yield from timed("step", bare())
            args.out, sys.stdout = str(folder / f"run{number}"), quiet
            yield from timed("run", steps(args, *others))
            sys.stdout = screen
            if name != "pix2pix_color":
                module.sample_batch = lambda *_: [x.to(args.device) for x in next(batches)]
                next(batches)  # workers are there
                yield from timed("loader", usual())
                module.sample_batch = sample_batch

    if name != "pix2pix_color":
        alone = {"the DataLoader": lambda: next(batches)[0].to(args.device),
                 "sample_batch()": lambda: sample_batch(data, args.batch, args.device)}
        for what, read in alone.items():
            read()  # workers are there
            start = now()
            for _ in range(50):
                read()
            print(f"images alone, by {what}: {50 * args.batch / (now() - start):.0f} a second")
    module.steps = in_turn
    torch.manual_seed(args.seed)
    module.train(args, data)
    print(f"{name}.py {' '.join(flags)}: {args.size} px, batches of {args.batch}, {args.device}, "
          f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, {rounds} rounds\n")
    print("| | images/s: median (quartiles) | of step's, paired |\n|---|---|---|")
    for kind, found in speeds.items():
        if found:
            low, middle, high = statistics.quantiles(found, n=4)
            ratio = statistics.median(a / b for a, b in zip(found, speeds["step"]))
            print(f"| {kind} | {middle:.0f} ({low:.0f} to {high:.0f}) | {ratio:.2f} |")
    record = statistics.median((args.batch / b - args.batch / a) * 100 / 101
                               for a, b in zip(speeds["step"], speeds["run"]))
    defaults = module.parse_arguments([*flags, "--out", str(folder / "default")])
    count = defaults.steps or defaults.epochs * len(data.images) / args.batch
    whole = count * args.batch / statistics.median(speeds["step"])
    print(f"\none record: {1000 * record:.0f} ms; 101 of them are {101 * record / whole:.1%} of "
          f"the {whole / 60:.1f} minutes that the steps of this run take without --steps")


def scale(name, flags, processes, folder):
    print(f"{name}.py {' '.join(flags)}, 100 steps, one thread a process\n")
    print("| processes | images/s | of one's |\n|---|---|---|")
    speeds = {}
    for n in (1, processes):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", str(n), HERE / f"{name}.py", *flags,
                   "--steps", "100", "--out", folder / f"run{n}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        speeds[n] = float(re.findall(r"(\d+) images/s", done.stdout)[-1])
        print(f"| {n} | {speeds[n]:.0f} | {speeds[n] / speeds[1]:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.processes:
            scale(args.script, flags, args.processes, Path(folder))
        else:
            compare(args.script, flags, args.rounds, Path(folder))


if __name__ == "__main__":
    main()
