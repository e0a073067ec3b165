"""What the adversarial loss does in finished runs of pix2pix_color.py.

    python tests/measure_colour.py runs/colour-gan runs/colour-ebgan ...

ratio is the norm of the gradient that gan * A_G gives G's weights, divided by that of the distances
(l1 and l2), at the end of the run, over eight batches: far below 1, the row is plain regression
with a bystander. The other columns are means of the last ten rows of losses.csv.
"""

import argparse

import torch
from measure_control import open_run


def norm(loss, net):
    gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    return sum(gradient.square().sum() for gradient in gradients).sqrt().item()


def ratio(module, args, images, parts):
    """Of the two gradients; G and D are in train mode, as in a training step."""
    G, D = parts["G"].train(), parts["D"].train()
    torch.manual_seed(0)
    sums = [0, 0]
    for _ in range(8):
        x, y = module.sample_colours(images, args.batch, args.device)
        fake = G(x)
        losses = [module.g_loss(D(x, fake), args.adversarial, fake - y, *weights)
                  for weights in ((args.gan, 0, 0), (0, args.l1, args.l2))]
        sums = [total + norm(loss, G) for total, loss in zip(sums, losses)]
    return sums[0] / sums[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--root", default="data")
    asked = parser.parse_args()
    print("| --adversarial | --gan | --l1 | --l2 | steps | ratio | L1/grey | PSNR | chroma |")
    print("|---|---|---|---|---|---|---|---|---|")
    for out in asked.runs:
        module, args, _, caught = open_run(out)
        images = module.load_images(args.data, args.size, asked.root).images
        rows = args.saved["rows"][-10:]
        means = [sum(row[name] for row in rows) / len(rows)
                 for name in ("L1/grey", "PSNR", "chroma")]
        print(f"| {args.adversarial} | {args.gan:g} | {args.l1:g} | {args.l2:g} | "
              f"{args.saved['step']:,} | {ratio(module, args, images, caught['parts']):.3g} | "
              + " | ".join(f"{mean:.2f}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    main()
