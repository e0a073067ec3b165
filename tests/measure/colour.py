"""What the adversarial loss does in finished runs of pix2pix_color.py.

    python tests/measure/colour.py runs/colour-gan runs/colour-ebgan ...

ratio compares two gradients that G's weights get, at the end of the run and over eight batches: the
norm of that of the weighted adversarial loss, divided by the norm of that of the distances (l1 and
l2). If it is far below 1, the adversarial loss hardly matters. The other columns are means of the
last ten rows of losses.csv.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import pix2pix_color as pix  # noqa: E402


def norm(loss, net):
    gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    return sum(gradient.square().sum() for gradient in gradients).sqrt().item()


def ratio(args, images):
    """Of the two gradients; G and D are in train mode, as in a training step."""
    G = pix.Generator(args.size, args.width).to(args.device)
    D = pix.Autoencoder if args.adversarial == "ebgan" else pix.Discriminator
    D = D(args.width).to(args.device)
    G.load_state_dict(args.checkpoint["state"]["G"])
    D.load_state_dict(args.checkpoint["state"]["D"])
    torch.manual_seed(0)
    sums = [0, 0]
    for _ in range(8):
        x, y = pix.sample_colours(images, args.batch, args.device)
        fake = G(x)
        loss_A = pix.adversarial_loss(D(x, fake), args.adversarial)
        losses = [pix.g_loss(loss_A, fake - y, *weights)
                  for weights in ((args.adversarial_weight, 0, 0), (0, args.l1, args.l2))]
        sums = [total + norm(loss, G) for total, loss in zip(sums, losses)]
    return sums[0] / sums[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--root", default="data")
    asked = parser.parse_args()
    print("| --adversarial | weight | --l1 | --l2 | steps | ratio | L1/grey | PSNR | chroma |")
    print("|---|---|---|---|---|---|---|---|---|")
    for out in asked.runs:
        args = pix.parse_arguments(["--out", out, "--generate", "1"])
        images = pix.load_images(args.data, args.size, asked.root).images
        rows = args.checkpoint["rows"][-10:]
        means = [sum(row[name] for row in rows) / len(rows)
                 for name in ("L1/grey", "PSNR", "chroma")]
        print(f"| {args.adversarial} | {args.adversarial_weight:g} | {args.l1:g} | {args.l2:g} | "
              f"{args.checkpoint['step']:,} | {ratio(args, images):.3g} | "
              + " | ".join(f"{mean:.2f}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    main()
