"""acgan.py: the second head, its losses, and pictures of what labels do."""

import math

import pytest
import torch
from conftest import HERE, call, cartoons, load, run_train
from PIL import Image

acgan = load(HERE / "acgan.py")
sngan = load(HERE / "sngan.py")
TINY = ["--size", 16, "--batch", 8, "--width", 8, "--device", "cpu"]


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts_and_both_heads_read_the_same_features():
    """For 40 attributes. D has a convolution more than the report's, of 262,272 parameters."""
    G, D = acgan.Generator(3, 64, 128, 40), acgan.Discriminator(3, 64, 128, 40)
    assert (count(G), count(D)) == (1_401_347, 798_418 + 262_272)
    assert (D.source.in_features, D.source.out_features) == (129, 1)
    assert (D.labels.in_features, D.labels.out_features) == (129, 40)
    assert D.features[:10](torch.rand(2, 3, 64, 64)).shape == (2, 128, 2, 2)
    logits, labels = D(G(torch.randn(2, acgan.Z), torch.ones(2, 40)))
    assert logits.shape == (2,) and labels.shape == (2, 40)


def test_the_label_changes_the_picture():
    torch.manual_seed(0)
    G = acgan.Generator(3, 16, 8, 3)
    z = torch.randn(1, acgan.Z)
    images = G(z.expand(3, -1), torch.eye(3))
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert (images[:1] - G(-z, torch.eye(3)[:1])).abs().max() > 1e-3


@pytest.mark.parametrize("k", [5, 9, 15])
def test_sigmoids_can_be_right_and_a_softmax_cannot(k):
    """What is wrong with the softmax over 40 attributes that Espis and Potrimba print."""
    labels = torch.zeros(1, 40)
    labels[0, :k] = 1
    sure = 20 * (2 * labels - 1)
    assert acgan.label_loss(sure, labels, one_hot=False) < 0.01
    best = torch.nn.functional.binary_cross_entropy(sure.softmax(1), labels)
    floor = k * math.log(k) / 40
    assert best == pytest.approx(floor, abs=1e-3)
    assert {5: 0.20, 9: 0.49, 15: 1.02}[k] == round(floor, 2)


def test_label_loss_and_accuracy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)]])  # sigmoids 1/2, 3/4; softmax 1/4, 3/4
    labels = torch.tensor([[0.0, 1.0]])
    by_sigmoids = (math.log(2) - math.log(3 / 4)) / 2
    assert acgan.label_loss(logits, labels, one_hot=False) == pytest.approx(by_sigmoids)
    assert acgan.label_loss(logits, labels, one_hot=True) == pytest.approx(-math.log(3 / 4))
    logits = torch.tensor([[2.0, 1.0], [-1.0, -2.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert acgan.accuracy(logits, labels, one_hot=False) == 0.5
    assert acgan.accuracy(logits, labels, one_hot=True) == 0.5
    assert acgan.accuracy(logits[:1], labels[:1], one_hot=False) == 0.5
    assert acgan.accuracy(logits[:1], labels[:1], one_hot=True) == 1


def test_without_aux_the_losses_are_those_of_sngan():
    real, fake = torch.randn(7), torch.randn(7)
    assert acgan.d_loss(real, fake) == sngan.d_loss(real, fake)
    assert acgan.g_loss(fake) == sngan.g_loss(fake)


def test_aux_weighs_the_labels(monkeypatch):
    """loss_D and loss_G at --aux 0, 1, 3 lie on a line; at 0 nothing reaches the second head."""
    losses, data = {}, cartoons(acgan, 16, 16)
    for aux in (0, 1, 3):
        flags = [*TINY, "--aux", aux, "--lr", 1e-12]
        run = run_train(acgan, monkeypatch, flags, data, watch=lambda run: torch.manual_seed(0))
        losses[aux] = {name: value.item() for name, value in run.logs[0].items()}
        assert (run.to_save["D"].labels.weight.grad.abs().max() > 0) == (aux > 0)
    for name in ("loss_D", "loss_G"):
        by_one = losses[1][name] - losses[0][name]
        assert by_one > 0.3
        assert losses[3][name] - losses[0][name] == pytest.approx(3 * by_one, rel=1e-3)


def test_with_aux_and_aux_fakes_1_the_losses_are_eq_2_and_3_of_the_paper(monkeypatch):
    """L_D = -(L_S + L_C) and L_G = -log D(G(z)) - log P(y'|G(z)), written out; by default D learns
    nothing from the labels of fakes.
    """
    data, outputs = cartoons(acgan, 16, 16), []

    def watch(run):
        torch.manual_seed(0)
        outputs.clear()
        if not run.logs:
            run.to_save["D"].register_forward_hook(lambda net, images, made: outputs.append(made))
            run.to_save["G"].register_forward_hook(lambda net, z_y, made: given.append(z_y[1]))

    batch = acgan.sample_batch
    for fakes in (0, 1):
        given, steps = [], []
        monkeypatch.setattr(acgan, "sample_batch", lambda *args: (
            steps.append(batch(*args)), steps[-1])[1])
        flags = [*TINY, "--aux", 1, "--aux-fakes", fakes, "--lr", 1e-12]
        run = run_train(acgan, monkeypatch, flags, data,
                        watch=lambda run: run.logs or watch(run))
        (real, real_labels), (fake, fake_labels), (again, again_labels) = outputs
        real_y, fake_y = steps[0][1], given[0]

        def log_p(logits, y):  # the mean over attributes of log P
            p = logits.sigmoid()
            return (y * p.log() + (1 - y) * (1 - p).log()).mean()

        L_S = real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean()
        L_C = log_p(real_labels, real_y) + fakes * log_p(fake_labels, fake_y)
        losses = run.logs[0]
        assert losses["loss_D"].item() == pytest.approx(-(L_S + L_C).item(), rel=1e-4)
        L_G = -again.sigmoid().log().mean() - log_p(again_labels, fake_y)
        assert losses["loss_G"].item() == pytest.approx(L_G.item(), rel=1e-4)


def test_each_image_is_judged_by_its_own_label(monkeypatch):
    """G is compared with the labels that it was given; so is D, with --aux-fakes."""
    data, given, compared = cartoons(acgan, 16, 16), [], []
    label_loss = acgan.label_loss
    monkeypatch.setattr(acgan, "label_loss", lambda logits, y, one_hot: (
        compared.append(y), label_loss(logits, y, one_hot))[1])

    def watch(run):
        if not run.logs:
            run.to_save["G"].register_forward_hook(lambda net, z_y, made: given.append(z_y[1]))

    run_train(acgan, monkeypatch, TINY, data, watch=watch)
    (drawn_for,), (real, fake_in_D, fake_in_G) = given, compared
    assert torch.equal(fake_in_D, drawn_for) and torch.equal(fake_in_G, drawn_for)
    assert not torch.equal(real, drawn_for)
    rows = {tuple(row.tolist()) for row in data.labels}
    assert {tuple(row.int().tolist()) for row in real} <= rows


def test_a_fakes_attributes_are_as_frequent_as_the_datas_and_independent():
    data = with_labels([[1, 1, 0]] * 2 + [[0, 0, 1]] * 6, "abc")
    y = acgan.fake_labels(data, 4000, "cpu", one_hot=False)
    assert y.mean(0).tolist() == pytest.approx([0.25, 0.25, 0.75], abs=0.03)
    assert (y[:, 0] * y[:, 1]).mean() == pytest.approx(0.25 ** 2, abs=0.02)
    assert (y[:, 0] * y[:, 2]).mean() == pytest.approx(0.25 * 0.75, abs=0.03)


def test_a_fakes_class_is_one_class_and_as_frequent_as_the_datas():
    data = with_labels([[1, 0]] * 2 + [[0, 1]] * 6, "ab")
    y = acgan.fake_labels(data, 4000, "cpu", one_hot=True)
    assert (y.sum(1) == 1).all() and y.mean(0).tolist() == pytest.approx([0.25, 0.75], abs=0.03)


def with_labels(labels, names):
    labels = torch.tensor(labels, dtype=torch.uint8)
    return acgan.Data(torch.zeros(len(labels), 3, 16, 16, dtype=torch.uint8), labels, list(names))


def picture(monkeypatch, data, *flags):
    """-> z (8, columns, 128) and labels (8, columns, K) that G got for the picture; the run."""
    run, seen = run_train(acgan, monkeypatch, [*TINY, *flags], data, n=0), []
    run.to_save["G"].register_forward_hook(lambda net, given, made: seen.append(given))
    with acgan.preview(run.args, run.to_save["G"]):
        shape = run.grid().shape
    (z, y), = seen
    assert shape == (8, len(y) // 8, 3, 16, 16)
    return z.unflatten(0, shape[:2]), y.unflatten(0, shape[:2]), run


def test_the_picture_of_classes_has_one_z_per_row_and_one_class_per_column(monkeypatch):
    data = with_labels([[1, 0, 0, 0]] * 7 + [[0, 0, 1, 0]] * 9, ["a", "b, c", "b", " c"])
    z, y, run = picture(monkeypatch, data)
    assert torch.equal(z, z[:, :1].expand_as(z)) and not torch.equal(z[0], z[1])
    assert torch.equal(y, torch.eye(4).expand(8, 4, 4))
    assert run.measure() == {"acc(guess)": 9 / 16}
    for attributes, columns in (("b,a", [2, 0]), ("b, c", [1])):  # a name may hold a comma
        _, y, _ = picture(monkeypatch, data, "--attributes", attributes)
        assert torch.equal(y, torch.eye(4)[columns].expand(8, -1, -1))


def test_the_picture_of_attributes_turns_one_round_per_column(monkeypatch):
    """Rows begin with real labels. Shown are the eight with a frequency closest to 1/2."""
    labels = [[int(10 * k + 5 > i) for k in range(12)] for i in range(120)]  # 1/24, 3/24, ...
    data = with_labels(labels, "abcdefghijkl")
    z, y, run = picture(monkeypatch, data)
    assert torch.equal(z, z[:, :1].expand_as(z)) and not torch.equal(z[0], z[1])
    real = {tuple(row) for row in labels}
    assert {tuple(row.int().tolist()) for row in y[:, 0]} <= real and len(y[:, 0].unique(dim=0)) > 1
    frequency = torch.tensor(labels).float().mean(0)
    turned = torch.cat([torch.zeros(1, 12), torch.eye(12)[2:10]])
    assert torch.equal(y - y[:, :1], 2 * (turned * (1 - 2 * y[:, :1])))  # 1 to -1, 0 to 2
    guess = torch.maximum(frequency, 1 - frequency).mean().item()
    assert run.measure() == {"acc(guess)": pytest.approx(guess)}
    _, y, _ = picture(monkeypatch, data, "--attributes", "l,a")
    turned = torch.cat([torch.zeros(1, 12), torch.eye(12)[[11, 0]]])
    assert torch.equal(y - y[:, :1], 2 * (turned * (1 - 2 * y[:, :1])))


def test_generate_writes_the_picture_of_labels_too(tmp_path, monkeypatch, capsys):
    """Single images have labels of the data. --attributes is the run's until another is given."""
    monkeypatch.chdir(tmp_path)
    assert call(acgan, *TINY, "--steps", 1, "--out", "run", "--attributes", "Smiling") == 0
    seen, forward = [], acgan.Generator.forward
    monkeypatch.setattr(acgan.Generator, "forward", lambda self, z, y: (
        seen.append(y), forward(self, z, y))[1])
    two = ["--attributes", "Smiling,Blond_Hair"]
    for n, flags, rows, columns in ((5, [], 5, 2), (20, two, 16, 3)):
        seen.clear()
        assert call(acgan, "--out", "run", "--generate", n, *flags) == 0
        single, shown = seen
        assert {tuple(row.int().tolist()) for row in single} <= {
            tuple(row.tolist()) for row in cartoons(acgan, 2560, 16).labels}
        assert len(list((tmp_path / "run" / "generated").glob("*.png"))) == len(single) == n
        assert len(shown) == rows * columns
        assert Image.open("run/labels.png").size == (18 * columns + 2, 18 * rows + 2)
    capsys.readouterr()


@pytest.mark.parametrize(("flags", "expected"), [
    (["--attributes", "Smiling,Sad"], "there is no label Sad, but Blond_Hair, Eyeglasses"),
    (["--data", "flat"], "flat has no labels. A folder needs one sub-folder per class"),
    (["--data", "classes", "--attributes", "a,c"], "there is no label c, but a, b"),
])
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, flags, expected):
    monkeypatch.chdir(tmp_path)
    for i in range(16):
        for folder in (tmp_path / "flat", tmp_path / "classes" / "ab"[i % 2]):
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (15 * i, 0, 0)).save(folder / f"{i}.png")
    assert call(acgan, *TINY, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error and not (tmp_path / "runs").exists()
