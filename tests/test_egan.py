"""egan.py: what the extractors read, that G listens to them, and that they do not listen to G."""

import numpy as np
import pytest
import torch
from conftest import HERE, call, cartoons, load, nets, run_train
from torch import nn

egan = load(HERE / "egan.py")
TINY = ["--size", 16, "--batch", 8, "--width", 8, "--device", "cpu"]
CNN = ["--attribute", "Smiling", "--extractor"]


def count(net):
    return sum(p.numel() for p in net.parameters())


def copies(net):
    return [p.detach().clone() for p in net.parameters()]


def inputs_of(G):
    """A list that fills with what G is given."""
    seen = []
    G.register_forward_hook(lambda net, given, made: seen.append(given[0]))
    return seen


def test_the_networks_have_as_many_parameters_as_they_should():
    assert count(egan.Generator(3, 64, 64)) == 3_584_896
    assert count(egan.Discriminator(3, 64, 64)) == 2_765_568
    assert count(egan.Extractor(3, 64)) == 167_361
    assert egan.Extractor(1, 16)(torch.zeros(3, 1, 16, 16)).shape == (3,)


def test_brightness_of_single_colours_is_as_computed_by_hand():
    def of(*colour):
        pixels = torch.tensor(colour).view(1, -1, 1, 1).expand(1, -1, 4, 4)
        return egan.brightness(pixels).item()

    assert of(1.0, 1, 1) == pytest.approx(1) and of(-1.0, -1, -1) == 0
    assert of(-1.0, 1, -1) == pytest.approx(0.7152) and of(0.0, 0, 0) == pytest.approx(0.5)
    assert of(1.0, -1, -1) == pytest.approx(0.2126) and of(0.5) == pytest.approx(0.75)


def test_sharpness_says_how_evenly_edges_are_spread():
    ramp = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16)
    assert egan.sharpness(ramp).item() == pytest.approx(1, abs=1e-3)
    torch.manual_seed(0)
    noise = torch.rand(4, 1, 32, 32) * 2 - 1
    readings = egan.sharpness(noise)
    assert 0.25 < readings.min() and readings.max() < 0.35
    torch.testing.assert_close(egan.sharpness(0.3 * noise - 0.5), readings, atol=1e-4, rtol=0)
    for size, reading in ((64, 0.03), (32, 0.06)):
        edge = torch.ones(1, 1, size, size)
        edge[..., size // 2:] = -1
        assert egan.sharpness(edge).item() == pytest.approx(reading, abs=0.005)


def test_sharpness_of_a_flat_image_is_zero_and_its_gradient_finite():
    flat = torch.full((1, 3, 16, 16), 0.3, requires_grad=True)
    reading = egan.sharpness(flat)
    (gradient,) = torch.autograd.grad(reading.sum(), flat)
    assert reading.item() == pytest.approx(0, abs=1e-6) and gradient.isfinite().all()


def test_sharpness_has_the_slopes_of_numpy():
    picture = np.random.default_rng(0).random((7, 9))
    down, right = np.gradient(picture)
    n = np.sqrt(down**2 + right**2)
    mine = egan.sharpness(torch.tensor(2 * picture - 1).view(1, 1, 7, 9)).item()
    assert mine == pytest.approx((n / n.max()).mean(), abs=1e-4)


def test_l_rep_is_the_cross_entropy_of_c_and_c_hat():
    logits, c = torch.tensor([1 / 4, 3 / 4]).logit(), torch.tensor([1.0, 0.0])
    assert egan.rep_loss(logits, c).item() == pytest.approx(-np.log(1 / 4))
    assert egan.rep_loss(logits, 1 - c).item() == pytest.approx(-np.log(3 / 4))


@pytest.mark.parametrize("rep", [0, 3])
def test_loss_G_is_l_fool_and_l_rep_times_rep(monkeypatch, rep):
    monkeypatch.setattr(egan, "g_loss", lambda fake_logits: 0 * fake_logits.sum() + 5)
    flags = [*TINY, "--rep", rep, "--g-steps", 1]
    log = run_train(egan, monkeypatch, flags, cartoons(egan, 16, 16)).logs[0]
    assert log["loss_G"].item() == pytest.approx(5 + rep * log["loss_rep"].item())


@pytest.mark.parametrize("formula", ["brightness", "sharpness"])
def test_l_rep_compares_c_with_what_the_formula_reads(monkeypatch, formula):
    passes = []

    def watch(run):
        if not passes:
            run.to_save["G"].register_forward_hook(
                lambda net, given, made: passes.append((given[0][:, -1], made.detach())))

    flags = [*TINY, "--attribute", formula]
    run = run_train(egan, monkeypatch, flags, cartoons(egan, 16, 16), watch=watch)
    c, fake = passes[-1]
    c_hat = egan.FORMULAS[formula](fake)
    by_hand = -(c * c_hat.log() + (1 - c) * (1 - c_hat).log()).mean()
    assert run.logs[0]["loss_rep"].item() == pytest.approx(by_hand.item(), abs=1e-5)


@pytest.mark.parametrize("flags", [["--attribute", "sharpness"], [*CNN, "pretrain"],
                                   [*CNN, "joint"]])
def test_the_extractor_learns_in_its_own_steps_alone_and_from_real_images(monkeypatch, flags):
    data, before, steps, seen = cartoons(egan, 16, 16), {}, [], []
    joint, cnn = flags[-1] == "joint", flags[1] == "Smiling"

    def watch(run):
        if before:
            return
        before.update({name: copies(net) for name, net in nets(run.to_save)})
        for name, part in run.to_save.items():
            if not isinstance(part, nn.Module):
                part.register_step_post_hook(lambda *_, name=name: steps.append(name))
        if cnn:
            run.to_save["extractor"].register_forward_hook(
                lambda net, images, out: seen.append((net.training, images[0].detach().clone())))

    flags = [*flags, "--steps", 2]
    run = run_train(egan, monkeypatch, [*TINY, *flags, "--batch", 32], data, watch=watch)
    moved = {name for name, net in nets(run.to_save)
             if any(not torch.equal(a, b) for a, b in zip(before[name], net.parameters()))}
    assert moved == {"G", "D"} | ({"extractor"} if joint else set())
    assert steps == ["opt_extractor"] * joint + ["opt_D", "opt_G", "opt_G"]
    assert ("loss_extractor" in run.logs[0]) == joint
    assert [training for training, _ in seen] == [True] * joint + [False] * 2 * cnn
    real = {row.tobytes() for row in (data.images[:14] / 127.5 - 1).numpy()}  # two are kept from it
    for training, images in seen:
        assert training == all(image.tobytes() in real for image in images.numpy())


def test_the_extractor_is_trained_towards_one_tenth_and_nine_tenths(monkeypatch):
    targets, original = [], egan.rep_loss
    monkeypatch.setattr(egan, "rep_loss", lambda logits, c: (targets.append(c),
                                                             original(logits, c))[1])
    data = cartoons(egan, 64, 16)
    data.labels[:, [0, 1, 2, 4]] = 0  # only Smiling is left
    run_train(egan, monkeypatch, [*TINY, *CNN, "joint"], data)
    t, *c = targets
    torch.testing.assert_close(t.unique(), torch.tensor([0.1, 0.9]))
    assert all(set(each.tolist()) <= {0.0, 1.0} for each in c) and len(c) == 2


def test_pretraining_teaches_the_extractor(monkeypatch):
    data = cartoons(egan, 128, 16)
    flags = [*TINY, "--lr", 1e-3, "--steps", 100, "--attribute", "Blond_Hair"]
    extractor = run_train(egan, monkeypatch, flags, data, n=0).to_save["extractor"]
    assert not extractor.training
    with torch.no_grad():
        c_hat = extractor(data.images / 127.5 - 1).sigmoid()
    assert ((c_hat > 0.5) == (data.labels[:, 0] > 0)).float().mean() > 0.95
    assert c_hat.max() < 0.99  # t is 0.9 and 0.1


def test_the_accuracy_is_that_on_images_that_the_extractor_never_drew(monkeypatch):
    data, drawn = cartoons(egan, 100, 16), []
    monkeypatch.setattr(egan, "pretrain", lambda args, data, *_: drawn.append(data))
    run = run_train(egan, monkeypatch, [*TINY, *CNN, "pretrain", "--steps", 1], data, n=0)
    assert torch.equal(drawn[0].images, data.images[:89]) and len(drawn[0].labels) == 89
    logits = 2 * data.labels[89:, 3].float() - 1
    logits[:3] *= -1  # three wrong answers
    unseen = data.images[89:] / 127.5 - 1
    run.to_save["extractor"].forward = lambda images: (
        logits if torch.equal(images, unseen) else torch.zeros(len(images)))
    with egan.preview(run.args, run.to_save["G"]):
        assert run.measure()["acc(extractor)"] == pytest.approx(8 / 11)


def test_g_learns_to_make_images_whose_c_hat_is_c(monkeypatch):
    """With little but l_rep in L_G, sixty steps make c = 1 much brighter than c = 0."""
    data = cartoons(egan, 64, 16)
    run = run_train(egan, monkeypatch, [*TINY, "--lr", 1e-3, "--rep", 1000], data, n=60)
    with egan.preview(run.args, run.to_save["G"]):
        numbers = run.measure()
    assert list(numbers) == ["c_hat(c=0)", "c_hat(c=1)", "c_hat(c=sweep)"]
    assert numbers["c_hat(c=1)"] > numbers["c_hat(c=0)"] + 0.2


def test_c_hat_is_measured_at_0_at_1_and_at_the_end_of_the_sweep(monkeypatch):
    run = run_train(egan, monkeypatch, [*TINY, "--sweep", 4], cartoons(egan, 16, 16), n=0)
    seen = inputs_of(run.to_save["G"])
    with egan.preview(run.args, run.to_save["G"]):
        run.measure()
    assert seen[0][:3, -1].tolist() == [0, 1, 4] and len(seen[0]) == 3 * 64


def test_a_picture_has_one_z_for_each_row_and_c_rises_along_it(monkeypatch):
    run = run_train(egan, monkeypatch, [*TINY, "--sweep", 4], cartoons(egan, 16, 16), n=0)
    seen = inputs_of(run.to_save["G"])
    with egan.preview(run.args, run.to_save["G"]):
        images = run.grid()
    assert images.shape == (8, 9, 3, 16, 16)
    w = seen[0].unflatten(0, (8, 9))
    assert torch.equal(w[..., -1], torch.linspace(0, 4, 9).expand(8, 9))
    assert torch.equal(w[..., :-1], w[:, :1, :-1].expand(8, 9, 100))
    assert len(w[:, 0].unique(dim=0)) == 8
    assert -1 <= w[..., :-1].min() < -0.9 and 0.9 < w[..., :-1].max() <= 1


def test_w_is_new_in_every_step_of_g_and_its_c_is_zero_or_one(monkeypatch):
    seen = []

    def watch(run):
        if not seen:
            seen.extend([inputs_of(run.to_save["G"])])

    flags = [*TINY, "--batch", 64]
    run = run_train(egan, monkeypatch, flags, cartoons(egan, 16, 16), watch=watch)
    run.draw(64)
    assert [w.shape for w in seen[0]] == [(64, 101)] * 3
    assert not torch.equal(seen[0][0], seen[0][1])  # G's second step has a new one
    for w in seen[0]:
        assert set(w[:, -1].tolist()) == {0.0, 1.0} and 10 < w[:, -1].sum() < 54
        assert -1 <= w[:, :-1].min() < -0.9 and 0.9 < w[:, :-1].max() <= 1


@pytest.mark.parametrize(("flags", "expected"), [
    (["--attribute", "Sad"], "--attribute Sad: cartoon has brightness, sharpness, Blond_Hair"),
    (["--attribute", "smiling"], "--attribute smiling: cartoon has"),
])
def test_an_attribute_that_the_data_lack_is_a_user_error(tmp_path, monkeypatch, capsys, flags,
                                                         expected):
    monkeypatch.chdir(tmp_path)
    assert call(egan, *TINY, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error and not list(tmp_path.glob("runs*"))


@pytest.mark.parametrize(("name", "wanted"), [("celeba", True), ("photos", False)])
def test_celeba_without_its_table_tells_what_to_get(monkeypatch, capsys, name, wanted):
    data = cartoons(egan, 16, 16)._replace(labels=torch.zeros(16, 0, dtype=torch.uint8), names=[])
    with pytest.raises(SystemExit):
        run_train(egan, monkeypatch, [*TINY, "--data", name, "--attribute", "Male"], data)
    error = capsys.readouterr().err
    assert f"--attribute Male: {name} has brightness, sharpness" in error
    assert ("list_attr_celeba.txt" in error) == wanted


def test_resume_and_generate_take_the_cnn_from_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(egan, *TINY, *CNN, "pretrain", "--steps", 1, "--out", "run") == 0
    before = torch.load("run/checkpoint.pt")["state"]["extractor"]
    monkeypatch.setattr(egan, "pretrain", None)  # it would raise
    assert call(egan, "--out", "run", "--resume", "--steps", 2) == 0
    assert call(egan, "--out", "run", "--generate", 2, "--sweep", 5) == 0
    after = torch.load("run/checkpoint.pt")["state"]["extractor"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "run/sweep-5.png").exists()
