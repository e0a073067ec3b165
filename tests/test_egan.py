"""egan.py: what the extractors read, that G listens to them, and that they do not listen to G."""

import numpy as np
import pytest
import torch
from conftest import HERE, call, cartoons, load, nets, step_of

egan = load(HERE / "egan.py")
TINY = ["--size", 16, "--batch", 8, "--width", 8, "--device", "cpu"]
CNN = ["--attribute", "Smiling", "--extractor"]


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts():
    assert count(egan.Generator(3, 64, 64)) == 3_584_896
    assert count(egan.Discriminator(3, 64, 64)) == 2_765_568
    assert count(egan.Extractor(3, 64)) == 167_361
    assert egan.Extractor(1, 16)(torch.zeros(3, 1, 16, 16)).shape == (3,)


def test_brightness_by_hand():
    def of(*colour):
        pixels = torch.tensor(colour).view(1, -1, 1, 1).expand(1, -1, 4, 4)
        return egan.brightness(pixels).item()

    assert of(1.0, 1, 1) == pytest.approx(1) and of(-1.0, -1, -1) == 0
    assert of(-1.0, 1, -1) == pytest.approx(0.7152) and of(0.0, 0, 0) == pytest.approx(0.5)
    assert of(1.0, -1, -1) == pytest.approx(0.2126) and of(0.5) == pytest.approx(0.75)


def test_sharpness_by_hand():
    ramp = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16)
    assert egan.sharpness(ramp).item() == pytest.approx(1, abs=1e-3)
    flat = torch.full((1, 3, 16, 16), 0.3, requires_grad=True)
    reading = egan.sharpness(flat)
    (gradient,) = torch.autograd.grad(reading.sum(), flat)
    assert reading.item() == pytest.approx(0, abs=1e-6) and gradient.isfinite().all()
    torch.manual_seed(0)
    noise = torch.rand(4, 1, 32, 32) * 2 - 1
    readings = egan.sharpness(noise)
    assert 0.2 < readings.min() and readings.max() < 0.35
    torch.testing.assert_close(egan.sharpness(0.3 * noise - 0.5), readings, atol=1e-4, rtol=0)
    edge = torch.ones(1, 1, 64, 64)
    edge[..., 32:] = -1
    assert egan.sharpness(edge).item() == pytest.approx(2 / 64, abs=1e-3)


def test_sharpness_is_numpys_gradient():
    rng = np.random.default_rng(0)
    picture = rng.random((7, 9))
    down, right = np.gradient(picture)
    n = np.sqrt(down**2 + right**2)
    mine = egan.sharpness(torch.tensor(2 * picture - 1).view(1, 1, 7, 9)).item()
    assert mine == pytest.approx((n / n.max()).mean(), abs=1e-4)


def test_losses_by_hand():
    """logits of 1/4 and 3/4 against c = 1 and 0; the extractor's own targets are 0.9 and 0.1."""
    readings, c = torch.tensor([1 / 4, 3 / 4]).logit(), torch.tensor([1.0, 0.0])
    assert egan.rep_loss(readings, c).item() == pytest.approx(-np.log(1 / 4))
    for rep in (0, 1, 10):
        loss = egan.g_loss(torch.zeros(2), readings, c, rep).item()
        assert loss == pytest.approx(np.log(2) + rep * np.log(4))
    for label, target in ((0.0, 0.1), (1.0, 0.9)):
        x = torch.zeros(1, requires_grad=True)
        egan.f_loss(x, torch.tensor([label])).backward()
        assert x.grad.item() == pytest.approx(0.5 - target)


@pytest.mark.parametrize("flags", [["--attribute", "sharpness"], [*CNN, "pretrain"],
                                   [*CNN, "joint"]])
def test_who_changes_when(monkeypatch, flags):
    """G's steps reach G through F. F changes in its own step alone, and only on real images."""
    data = cartoons(egan, 16, 16)
    caught = step_of(egan, monkeypatch, [*TINY, "--steps", 2, *flags], data)
    parts, seen = caught["parts"], []
    assert ("F" in parts) == (flags[0:2] == CNN[0:2])
    if "F" in parts:
        parts["F"].register_forward_hook(
            lambda net, images, out: seen.append((net.training, images[0].detach().clone())))
    before = {name: [p.clone() for p in net.parameters()] for name, net in nets(parts)}
    counts = {name: 0 for name in ("opt_G", "opt_D", "opt_F")}
    for name in counts.keys() & parts.keys():
        parts[name].register_step_post_hook(
            lambda *_, name=name: counts.update({name: counts[name] + 1}))
    logged = caught["step"]()
    moved = {name: any(not torch.equal(a, b) for a, b in zip(before[name], net.parameters()))
             for name, net in nets(parts)}
    joint = flags[-1] == "joint"
    assert counts == {"opt_G": 2, "opt_D": 1, "opt_F": int(joint)}
    assert moved["G"] and moved["D"] and moved.get("F", False) == joint
    assert ("loss_F" in logged) == joint
    if "F" in parts:
        real = {row.tobytes() for row in (data.images / 127.5 - 1).numpy()}
        for training, images in seen:
            assert training == all(image.tobytes() in real for image in images.numpy())
        assert [training for training, _ in seen] == [True] * joint + [False] * 2


def test_pretraining_teaches_the_extractor(monkeypatch):
    data = cartoons(egan, 256, 16)
    flags = [*TINY, "--lr", 1e-3, "--steps", 200, "--attribute", "Blond_Hair"]
    caught = step_of(egan, monkeypatch, flags, data)
    F = caught["parts"]["F"]
    assert not F.training
    readings = F(data.images / 127.5 - 1).sigmoid()
    assert ((readings > 0.5) == (data.labels[:, 0] > 0)).float().mean() > 0.95
    assert readings.max() < 0.99  # the targets are 0.9 and 0.1


def test_g_feels_the_extractor(monkeypatch):
    """With little but l_rep in L_G, a hundred steps make c = 1 much brighter than c = 0."""
    data = cartoons(egan, 64, 16)
    caught = step_of(egan, monkeypatch, [*TINY, "--lr", 1e-3, "--rep", 1000], data)
    for _ in range(100):
        caught["step"]()
    with egan.preview(caught["args"], caught["parts"]["G"]):
        numbers = caught["measure"]()
    assert list(numbers) == ["F(c=0)", "F(c=1)", "F(c=2)"]
    assert numbers["F(c=1)"] > numbers["F(c=0)"] + 0.2


@pytest.mark.parametrize(("flags", "rep"), [
    ([], 20), ([*CNN, "joint"], 5), (["--rep", 3], 3), (["--data", "faces"], 1)])
def test_rep_depends_on_data_and_attribute(monkeypatch, flags, rep):
    data = cartoons(egan, 16, 16)
    assert step_of(egan, monkeypatch, [*TINY, *flags], data)["args"].rep == rep


def test_grid_sweeps_c_alone_and_draws_the_readings(monkeypatch):
    data = cartoons(egan, 16, 16)
    caught = step_of(egan, monkeypatch, [*TINY, "--sweep", 4], data)
    seen = []
    caught["parts"]["G"].register_forward_hook(lambda net, given, made: seen.append(given[0]))
    with egan.preview(caught["args"], caught["parts"]["G"]):
        images = caught["grid"]()
    assert images.shape == (9, 9, 3, 16, 16)
    w = seen[0].unflatten(0, (8, 9))
    assert torch.equal(w[..., -1], torch.linspace(0, 4, 9).expand(8, 9))
    assert torch.equal(w[..., :-1], w[:, :1, :-1].expand(8, 9, 100))
    assert -1 <= w[..., :-1].min() < -0.9 and 0.9 < w[..., :-1].max() <= 1
    by_hand = egan.brightness(images[:8].flatten(0, 1)).unflatten(0, (8, 9)).mean(0)
    torch.testing.assert_close((images[8, :, 0, 0, 0] + 1) / 2, by_hand, atol=1e-4, rtol=0)


def test_c_is_zero_or_one_in_training(monkeypatch):
    data = cartoons(egan, 16, 16)
    caught = step_of(egan, monkeypatch, [*TINY, "--batch", 64], data)
    seen = []
    caught["parts"]["G"].register_forward_hook(lambda net, given, made: seen.append(given[0]))
    caught["step"]()
    for w in seen:
        assert set(w[:, -1].tolist()) == {0.0, 1.0} and 10 < w[:, -1].sum() < 54


@pytest.mark.parametrize(("flags", "expected"), [
    (["--attribute", "Sad"], "brightness, sharpness, Blond_Hair"),
    (["--attribute", "smiling"], "--attribute smiling: cartoon has"),
    (["--extractor", "none"], "--extractor"),
    (["--sweep", "-1"], "--sweep"),
    (["--g-steps", "0"], "--g-steps"),
    (["--rep", "-1"], "--rep"),
])
def test_bad_input(tmp_path, monkeypatch, capsys, flags, expected):
    monkeypatch.chdir(tmp_path)
    assert call(egan, *TINY, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error and not list(tmp_path.glob("runs*"))


def test_a_label_survives_resume_and_generate(tmp_path, monkeypatch):
    """The CNN comes from the checkpoint; neither trains it again before it starts."""
    monkeypatch.chdir(tmp_path)
    assert call(egan, *TINY, *CNN, "pretrain", "--steps", 1, "--out", "run") == 0
    before = torch.load("run/checkpoint.pt")["parts"]["F"]
    assert call(egan, "--out", "run", "--resume", "--steps", 2) == 0
    assert call(egan, "--out", "run", "--generate", 2) == 0
    after = torch.load("run/checkpoint.pt")["parts"]["F"]
    assert all(torch.equal(before[name], after[name]) for name in before)
