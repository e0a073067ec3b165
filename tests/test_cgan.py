"""cgan.py: labels go into both networks, and a fake keeps the label that it was drawn for."""

import pytest
import torch
from conftest import HERE, call, cartoons, load, run_train
from PIL import Image

cgan = load(HERE / "cgan.py")
TINY = ["--size", 16, "--batch", 8, "--device", "cpu"]


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts_are_those_of_the_reconstruction():
    G, D = cgan.Generator(1, 28, 10), cgan.Discriminator(1, 28, 10)
    assert (count(G), count(D)) == (2_314_621, 294_649)
    assert (count(cgan.Generator(3, 64, 15)), count(cgan.Discriminator(3, 64, 15))) == (
        7_744_412, 659_357)
    y = torch.eye(10)[:3]
    assert G.label(y).shape == (3, 1, 7, 7) and D.label(y).shape == (3, 1, 28, 28)
    images = G(torch.randn(3, cgan.Z), y)
    assert images.shape == (3, 1, 28, 28) and images.abs().max() <= 1
    assert D(images, y).shape == (3,)


def test_a_row_of_several_ones_is_the_sum_of_embeddings():
    """And a row with one 1 picks one row of a table."""
    embed = cgan.label_map(4, 7)[0]
    rows = embed(torch.eye(4))
    assert torch.equal(rows, embed.weight.T)
    torch.testing.assert_close(embed(torch.tensor([[1.0, 0, 1, 0]]))[0], rows[0] + rows[2])


def test_the_label_changes_what_both_networks_say():
    torch.manual_seed(0)
    G, D = cgan.Generator(1, 16, 3).eval(), cgan.Discriminator(1, 16, 3).eval()
    z, y = torch.randn(1, cgan.Z), torch.eye(3)
    images = G(z.expand(3, -1), y)
    assert (images[0] - images[1]).abs().max() > 1e-3
    logits = D(images[:1].expand(3, -1, -1, -1), y)
    assert logits.std() > 1e-3


def test_every_image_goes_with_its_label(monkeypatch):
    """Image i of the data is all i; its label is row i. G's labels are those that D gets."""
    labels = torch.eye(16, dtype=torch.uint8)
    pixels = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 1, 16, 16)
    data = cgan.Data(pixels, labels, [str(i) for i in range(16)])
    drawn, judged = [], []

    def watch(run):
        G, D = run.to_save["G"], run.to_save["D"]
        if not run.logs:
            G.register_forward_hook(lambda net, given, made: drawn.append((*given, made.detach())))
            D.register_forward_hook(lambda net, given, made: judged.append(given))

    run_train(cgan, monkeypatch, TINY, data, watch=watch)
    ((_, drawn_for, fake),) = drawn
    (images, y), *fakes = judged
    assert torch.equal(((images[:, 0, 0, 0] + 1) * 127.5).round().long(), y.argmax(1))
    assert len(fakes) == 2  # in D's step, and in G's
    for images, y in fakes:
        assert torch.equal(images.detach(), fake) and torch.equal(y, drawn_for)


@pytest.mark.parametrize("kind", ["classes", "attributes"])
def test_the_picture_has_one_z_per_row_and_columns_of_labels(monkeypatch, kind):
    data = cartoons(cgan, 16, 16)
    if kind == "classes":
        data = data._replace(labels=torch.eye(5, dtype=torch.uint8)[torch.arange(16) % 5])
    run, seen = run_train(cgan, monkeypatch, TINY, data, n=0), []
    run.to_save["G"].register_forward_hook(lambda net, given, made: seen.append(given))
    with cgan.preview(run.args, run.to_save["G"]):
        images = run.grid()
    columns = 5 if kind == "classes" else 6
    z, y = (x.unflatten(0, (8, columns)) for x in seen[0])
    assert images.shape == (8, columns, 3, 16, 16)
    assert torch.equal(z, z[:, :1].expand_as(z)) and not torch.equal(z[0], z[1])
    if kind == "classes":
        assert torch.equal(y, torch.eye(5).expand(8, 5, 5))
    else:
        turned = torch.eye(6)[:, 1:] * (1 - 2 * y[:, :1])  # up if it was 0, down if it was 1
        assert torch.equal(y - y[:, :1], 2 * turned)


def test_labels_drawn_are_rows_of_the_data():
    data = cartoons(cgan, 6, 16)
    rows = {tuple(row.tolist()) for row in data.labels}
    drawn = cgan.sample_labels(data, 50, "cpu")
    assert drawn.dtype == torch.float32 and {tuple(row.int().tolist()) for row in drawn} == rows


def test_without_labels_it_is_a_gan(monkeypatch):
    """Marchiori's first experiment: no maps, the counts of the table, labels never looked at."""
    G, D = cgan.Generator(1, 28, 0), cgan.Discriminator(1, 28, 0)
    assert (count(G), count(D)) == (2_305_472, 212_865)
    assert (count(cgan.Generator(3, 64, 0)), count(cgan.Discriminator(3, 64, 0))) == (
        7_713_856, 242_561)
    losses = []
    for flip in (0, 1):
        data = cartoons(cgan, 16, 16)
        data = data._replace(labels=data.labels ^ flip)
        run = run_train(cgan, monkeypatch, [*TINY, "--no-labels"], data,
                        watch=lambda run: torch.manual_seed(1))
        losses.append(run.logs[0]["loss_G"].item())
        assert run.grid is None and run.draw(3).shape == (3, 3, 16, 16)
    assert losses[0] == losses[1]


def test_a_flat_folder_trains_without_conditions_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20), (30 * i, 0, 0)).save(tmp_path / "flat" / f"{i}.png")
    assert call(cgan, "--data", "flat", "--size", 16, "--batch", 8, "--steps", 1) == 0
    assert "labels: none\n" in capsys.readouterr().out
    assert call(cgan, "--out", "runs/cgan-flat", "--generate", 2) == 0
    assert len(list((tmp_path / "runs/cgan-flat/generated").iterdir())) == 2
