"""pix2pix_color.py: Lab, the networks, four pairs of losses, held-out images, photos."""

import math

import numpy as np
import pytest
import torch
from conftest import HERE, call, cartoons, load, step_of
from PIL import Image
from torch import nn

pix = load(HERE / "pix2pix_color.py")
FORMS = ["gan", "lsgan", "ebgan", "wgan"]
FLAGS = ["--size", 64, "--batch", 4, "--width", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def faces():
    return cartoons(pix, 100, 64)


class Settings:
    """Of the command line, what colour_photo() needs."""

    size, device = 64, torch.device("cpu")


def build(monkeypatch, data, *flags):
    return step_of(pix, monkeypatch, [*FLAGS, *flags], data)


def discriminator(form, width=4):
    return (pix.Autoencoder if form == "ebgan" else pix.Discriminator)(width)


def count(net):
    return sum(p.numel() for p in net.parameters())


def colour(*rgb):
    return torch.tensor(rgb, dtype=torch.float).view(1, 3, 1, 1)


# Lab.


@pytest.mark.parametrize("rgb, lab", [
    ((1, 1, 1), (100, 0, 0)),
    ((0, 0, 0), (0, 0, 0)),
    ((0.5, 0.5, 0.5), (53.389, 0, 0)),
    ((1, 0, 0), (53.2406, 80.0942, 67.2015)),
    ((0, 1, 0), (87.7351, -86.1813, 83.1775)),
    ((0, 0, 1), (32.2957, 79.1870, -107.8617)),
])
def test_lab_of_known_colours(rgb, lab):
    assert pix.rgb_to_lab(colour(*rgb)).flatten().tolist() == pytest.approx(lab, abs=1e-3)
    assert pix.lab_to_rgb(colour(*lab)).flatten().tolist() == pytest.approx(rgb, abs=1e-3)


@pytest.mark.parametrize("kind, most", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_lab_and_back_over_the_whole_cube(kind, most):
    side = torch.linspace(0, 1, 52, dtype=kind)
    rgb = torch.cartesian_prod(side, side, side).T.reshape(1, 3, 52, 52 * 52)
    lab = pix.rgb_to_lab(rgb)
    assert (pix.lab_to_rgb(lab) - rgb).abs().max() < most
    x, y = pix.to_network(rgb)
    assert 0.97 < y.abs().max() < 0.99 and x.min() >= -1 - 1e-6 and x.max() <= 1 + 1e-6
    assert (pix.to_rgb(x, y) - rgb).abs().max() < most


def test_greys_have_no_colour_and_lightness_rises():
    lab = pix.rgb_to_lab(torch.linspace(0, 1, 1001).expand(1, 3, 1, 1001))[0, :, 0]
    assert lab[1:].abs().max() < 1e-4 and (lab[0].diff() > 0).all()


def test_colours_that_no_screen_can_show_are_clipped():
    rgb = pix.lab_to_rgb(torch.stack([colour(50, 110, -110), colour(0, 50, 0), colour(100, 9, 9)]
                                     ).flatten(0, 1))
    assert rgb.isfinite().all() and rgb.min() >= 0 and rgb.max() <= 1


# The networks.


def test_parameter_counts():
    with torch.device("meta"):
        counts = [count(pix.Generator(size, 64)) for size in (256, 128, 64)]
        assert counts == [54_410_434, 41_825_474, 29_240_514]
        assert count(pix.Discriminator(64)) == 2_765_633
        assert count(pix.Autoencoder(64)) == 5_514_242


@pytest.mark.parametrize("size, patches", [(64, 6), (128, 14), (256, 30)])
def test_shapes(size, patches):
    torch.manual_seed(0)
    x, G = 2 * torch.rand(2, 1, size, size) - 1, pix.Generator(size, 2)
    y = G(x)
    assert y.shape == (2, 2, size, size) and y.abs().max() <= 1
    assert pix.Discriminator(2)(x, y).shape == (2, 1, patches, patches)
    assert pix.Autoencoder(2)(x, y).shape == (2,)
    bottom = G.down[-1](torch.zeros(2, G.down[-1][1].in_channels, 2, 2))
    assert bottom.shape[2:] == (1, 1)


@pytest.mark.parametrize("level", range(5))
def test_every_skip_counts(level):
    """With the map of one level set to zero on its way across, and only there, y changes."""
    torch.manual_seed(0)
    G, x = pix.Generator(64, 2).eval(), torch.randn(2, 1, 64, 64)
    before, layer = G(x), G.up[5 - level]

    def cut(net, inputs):
        wide = inputs[0].shape[1]
        return (inputs[0] * (torch.arange(wide) < wide // 2).view(1, -1, 1, 1),)

    with layer.register_forward_pre_hook(cut):
        assert not torch.allclose(G(x), before)
    assert torch.equal(G(x), before)


def test_dropout_in_three_layers_when_training_only():
    torch.manual_seed(0)
    G, x = pix.Generator(64, 4), torch.randn(2, 1, 64, 64)
    assert not torch.equal(G(x), G(x))
    dropped = [module.p for module in G.modules() if isinstance(module, nn.Dropout)]
    assert dropped == [0.5, 0.5, 0.5, 0, 0]
    G.eval()
    assert torch.equal(G(x), G(x))


def test_a_patch_is_70_by_70():
    torch.manual_seed(0)
    D = pix.Discriminator(4).eval()
    x, y = torch.randn(1, 1, 256, 256, requires_grad=True), torch.randn(1, 2, 256, 256)
    D(x, y)[0, 0, 15, 15].backward()
    rows, columns = (x.grad[0, 0].abs().sum(side).nonzero() for side in (1, 0))
    assert len(rows) == len(columns) == 70
    assert rows[-1] - rows[0] == columns[-1] - columns[0] == 69


@pytest.mark.parametrize("form", FORMS)
def test_d_sees_the_lightness(form):
    torch.manual_seed(0)
    D = discriminator(form).apply(pix.init_weights_and_biases).eval()
    x, y = torch.randn(2, 2, 1, 64, 64), torch.rand(2, 2, 64, 64)
    assert not torch.equal(D(x[0], y), D(x[1], y))


def test_the_energy_is_the_mean_square_of_each_image(monkeypatch):
    D, y = pix.Autoencoder(2), torch.rand(3, 2, 16, 16)
    error = torch.tensor([0, 0.1, 0.2]).view(3, 1, 1, 1)
    monkeypatch.setattr(D.layers, "forward", lambda inputs: y + error)
    assert D(torch.zeros(3, 1, 16, 16), y).tolist() == pytest.approx([0, 0.01, 0.04], abs=1e-7)


def test_the_gradient_runs_through_both_sides_of_the_reconstruction():
    """Against finite differences; a detached target fails this."""
    torch.manual_seed(0)
    D, x = pix.Autoencoder(2).double().eval(), torch.rand(1, 1, 16, 16).double()
    y = torch.rand(1, 2, 16, 16).double().requires_grad_()
    (gradient,) = torch.autograd.grad(D(x, y).sum(), y)
    for place in [(0, 0, 0, 0), (0, 1, 3, 5)]:
        bump = torch.zeros_like(y)
        bump[place] = 1e-5
        with torch.no_grad():
            slope = (D(x, y + bump).sum() - D(x, y - bump).sum()) / 2e-5
        assert gradient[place].item() == pytest.approx(slope.item(), rel=1e-4)


# The losses.


def test_losses_by_hand():
    real, fake = torch.tensor([[3.0], [5.0]]), torch.tensor([[1.0], [-2.0]])

    def s(value):
        return math.log(1 + math.exp(value))

    expected = {
        "gan": ((s(-3) + s(-5)) / 4 + (s(1) + s(-2)) / 4, (s(-1) + s(2)) / 2),
        "lsgan": ((4 + 16) / 4 + (1 + 4) / 4, (0 + 9) / 4),
        "wgan": (-0.5 - 4, 0.5),
        "ebgan": (4 + (0.5 + 3.5) / 2, -0.5),
    }
    for form in FORMS:
        L_D, A_G = expected[form]
        assert pix.d_loss(real, fake, form, 1.5).item() == pytest.approx(L_D)
        assert pix.a_loss(fake, form).item() == pytest.approx(A_G)
    zero = torch.zeros(2, 1, 6, 6)
    assert pix.d_loss(zero, zero, "gan", 0).item() == pytest.approx(math.log(2))


def test_the_hinge_is_per_image():
    fake = torch.tensor([1.0, 7.0], requires_grad=True)
    loss = pix.d_loss(torch.zeros(2), fake, "ebgan", 2.0)
    loss.backward()
    assert loss.item() == 0.5 and fake.grad.tolist() == [-0.5, 0]  # a mean first would give 0


def test_the_three_parts_of_l_g():
    fake, error = torch.tensor([0.3, 0.5]), torch.tensor([[1.0, -3.0]])
    parts = [pix.g_loss(fake, "ebgan", error, *weights).item()
             for weights in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 4)]]
    assert parts == pytest.approx([0.4, 2, 5, 2 * 0.4 + 3 * 2 + 4 * 5])


# The step.


@pytest.mark.parametrize("form", FORMS)
def test_signs_in_the_step(monkeypatch, faces, form):
    """D's step lowers L_D; G's, which has no distance here, lowers A_G. Each moves one net."""
    run = build(monkeypatch, faces, "--adversarial", form, "--l1", 0, "--critic", 1, "--clip", 1,
                "--lr", 1e-4)
    G, D = (run["parts"][name] for name in "GD")
    losses = {"opt_D": [], "opt_G": []}
    batch = pix.sample_colours(faces.images, 4, torch.device("cpu"))
    monkeypatch.setattr(pix, "sample_colours", lambda *args: batch)
    monkeypatch.setattr(pix, "d_loss", lambda *args, f=pix.d_loss: keep("opt_D", f(*args)))
    monkeypatch.setattr(pix, "g_loss", lambda *args, f=pix.g_loss: keep("opt_G", f(*args)))
    for module in G.modules():  # the same fakes every time
        if isinstance(module, nn.Dropout):
            module.p = 0

    def keep(name, loss):
        losses[name].append(loss.item())
        return loss

    for name, net, other in [("opt_D", D, G), ("opt_G", G, D)]:
        f = run["parts"][name].step

        def watched(f=f, net=net, other=other):
            before = [[p.detach().clone() for p in part.parameters()] for part in (net, other)]
            f()
            same = [all(map(torch.equal, old, part.parameters()))
                    for old, part in zip(before, (net, other), strict=True)]
            assert same == [False, True]

        monkeypatch.setattr(run["parts"][name], "step", watched)
    for name, other in [("opt_D", "opt_G"), ("opt_G", "opt_D")]:
        with monkeypatch.context() as still:
            still.setattr(run["parts"][other], "step", lambda: None)
            run["step"]()  # the first clip is a jump
            losses[name].clear()
            for _ in range(4):
                run["step"]()
            assert losses[name][-1] < losses[name][0]


def test_without_gan_it_is_regression(monkeypatch, faces):
    """G learns the same whatever D is."""
    weights = []
    for form in FORMS[:3]:
        run = build(monkeypatch, faces, "--adversarial", form, "--gan", 0)
        G = run["parts"]["G"]
        torch.manual_seed(0)
        G.apply(pix.init_weights_and_biases)
        run["step"]()
        weights.append([p.detach().clone() for p in G.parameters()])
    for other in weights[1:]:
        assert all(map(torch.equal, weights[0], other))


@pytest.mark.parametrize("form", FORMS)
def test_gs_step_gives_d_no_gradient(monkeypatch, faces, form):
    run = build(monkeypatch, faces, "--adversarial", form)
    seen = []
    for name in ("opt_D", "opt_G"):
        monkeypatch.setattr(run["parts"][name], "step", lambda: seen.append(
            [p.grad.clone() for p in run["parts"]["D"].parameters()]))
    run["step"]()
    assert all(map(torch.equal, *seen[-2:]))


def test_wgan_clips_after_every_critic_step(monkeypatch, faces):
    """At each pass through D but the very first; five critic steps on new images, one of G."""
    run = build(monkeypatch, faces, "--adversarial", "wgan", "--clip", 0.02)
    D, largest, calls = run["parts"]["D"], [], []
    D.register_forward_pre_hook(
        lambda *_: largest.append(max(p.abs().max().item() for p in D.parameters())))
    for name in ("opt_G", "opt_D"):
        optimiser = run["parts"][name]
        assert type(optimiser) is torch.optim.RMSprop
        group = optimiser.param_groups[0]
        assert (group["lr"], group["alpha"], group["momentum"]) == (5e-5, 0.99, 0)
        monkeypatch.setattr(
            optimiser, "step", lambda f=optimiser.step, name=name: (calls.append(name), f()))
    sample = pix.sample_colours
    monkeypatch.setattr(
        pix, "sample_colours", lambda *args: (calls.append("sample"), sample(*args))[1])
    run["step"]()
    assert calls == ["sample", "opt_D"] * 5 + ["opt_G"]
    assert largest[0] > 0.02 and len(largest) == 2 * 5 + 1
    assert max(largest[2:]) <= 0.02 + 1e-9
    assert max(p.abs().max() for p in D.parameters()) <= 0.02 + 1e-9


@pytest.mark.parametrize("form", ["gan", "lsgan", "ebgan"])
def test_the_others_use_adam_and_do_not_clip(monkeypatch, faces, form):
    run = build(monkeypatch, faces, "--adversarial", form)
    assert run["args"].lr == 2e-4
    for name in ("opt_G", "opt_D"):
        group = run["parts"][name].param_groups[0]
        assert type(run["parts"][name]) is torch.optim.Adam
        assert (group["lr"], group["betas"]) == (2e-4, (0.5, 0.999))
    sample, calls = pix.sample_colours, []
    monkeypatch.setattr(pix, "sample_colours", lambda *args: (calls.append(1), sample(*args))[1])
    run["step"]()
    assert len(calls) == 1 and max(p.abs().max() for p in run["parts"]["D"].parameters()) > 0.5


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", FORMS)
def test_learns(monkeypatch, faces, form, sign):
    """After 60 small steps the held-out faces are nearer to the truth than grey ones are."""
    run = build(monkeypatch, faces, "--adversarial", form, "--critic", 1, "--width", 8,
                "--lr", 1e-3)
    monkeypatch.setattr(pix, "g_loss", lambda *args, f=pix.g_loss: sign * f(*args))
    for _ in range(60):
        run["step"]()
    with pix.preview(run["args"], run["parts"]["G"]):
        found = run["measure"]()
    print(form, sign, found)
    assert (found["L1/grey"] < 0.85) == (sign == 1)


# What is held out, and shown.


def test_the_first_64_are_never_sampled_and_all_others_are():
    i = torch.arange(100)
    images = torch.stack([i, 0 * i, 0 * i + 77], 1).byte().view(100, 3, 1, 1)
    x, y = pix.sample_colours(images, 3000, torch.device("cpu"))
    found = (255 * pix.to_rgb(x, y)).round().long()[:, 0].unique()
    assert torch.equal(found, i[64:])


def test_half_of_a_batch_is_mirrored():
    images = torch.zeros(65, 3, 4, 4, dtype=torch.uint8)
    images[..., 0] = torch.tensor([200, 30, 90]).view(3, 1)
    torch.manual_seed(0)
    x, y = pix.sample_colours(images, 1000, torch.device("cpu"))
    left, right = (x[:, 0, 0, side] > -0.9 for side in (0, 3))
    assert torch.equal(left, ~right) and 420 < left.sum() < 580
    assert torch.equal(left, y[:, 0, 0, 0] > 0.1)  # lightness and colours together


def test_measures_of_the_truth_and_of_grey(faces):
    held_out = faces.images[:64]
    _, y = pix.to_network(held_out / 255)
    truth = pix.views(held_out, lambda x: y)[2]()
    assert truth == pytest.approx({"L1": 0, "L1/grey": 0, "PSNR": 100, "chroma": 1}, abs=1e-4)
    grey = pix.views(held_out, lambda x: 0 * y)[2]()
    assert grey["L1/grey"] == pytest.approx(1) and grey["chroma"] == 0
    assert grey["L1"] == pytest.approx(110 * y.abs().mean().item(), rel=1e-5)
    half = pix.views(held_out, lambda x: y / 2)[2]()
    assert half["chroma"] == pytest.approx(0.5) and half["L1/grey"] == pytest.approx(0.5)
    assert grey["PSNR"] < half["PSNR"] < 60


def test_psnr_by_hand():
    """One grey level too light by 10 % of white: 20 dB."""
    held_out = torch.full((64, 3, 2, 2), 102, dtype=torch.uint8)
    held_out[:, 1:] = torch.tensor([51, 204]).view(2, 1, 1).byte()
    _, y = pix.to_network((held_out / 255 + 0.1).float())
    x, _ = pix.to_network(held_out / 255)
    brighter = pix.to_rgb(x, y) - held_out / 255
    expected = -10 * math.log10(brighter.square().mean().item())
    assert pix.views(held_out, lambda x: y)[2]()["PSNR"] == pytest.approx(expected, abs=1e-3)


def test_the_grid_shows_grey_coloured_true(faces):
    held_out = faces.images[:64]
    draw, grid, _ = pix.views(held_out, lambda x: torch.full((len(x), 2, 64, 64), 0.1))
    picture = grid()
    assert picture.shape == (8, 9, 3, 64, 64) and picture.abs().max() <= 1 + 1e-6
    grey, coloured, true = picture.view(24, 3, 3, 64, 64).unbind(1)
    assert (grey - grey[:, :1]).abs().max() < 1e-4
    assert not (coloured - coloured[:, :1]).abs().max() < 0.1
    shown = ((true + 1) * 127.5).round().byte()
    order = [next(i for i, image in enumerate(held_out) if torch.equal(image, one))
             for one in shown]
    assert order == sorted(set(order)) and order[0] == 0 and order[-1] == len(held_out) - 1
    for lightness in (grey, coloured):
        x, _ = pix.to_network((lightness + 1) / 2)
        assert (x - pix.to_network((true + 1) / 2)[0]).abs().median() < 1e-3
    assert draw(3).shape == (3, 3, 64, 64) and draw(64).shape == (len(held_out), 3, 64, 64)


# Runs and photos, by the command line.


def photos(folder, n=70):
    """A folder of n colourful photos."""
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 70)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run whose data is gone."""
    home = tmp_path_factory.mktemp("pix")
    flags = [*FLAGS, "--root", home, "--out", home / "run"]
    assert call(pix, "--data", photos(home / "mine"), "--steps", 3, *flags) == 0
    (home / "mine").rename(home / "gone")
    return home / "run"


@pytest.fixture
def album(tmp_path, monkeypatch):
    """Photos of every kind, as the current directory."""
    monkeypatch.chdir(tmp_path)
    image = Image.effect_mandelbrot((151, 203), (-2, -1.5, 1, 1.5), 50)
    image = Image.merge("RGB", [image, image.rotate(180), image.transpose(0)])
    image.save("rgb.jpg", quality=95)
    image.convert("L").save("grey.png")
    sideways = image.getexif()
    sideways[0x0112] = 6  # to be turned by 90 degrees
    image.save("phone.jpg", exif=sideways)
    image.putalpha(image.getchannel(0))
    image.save("clear.png")
    image.convert("LA").save("la.png")
    image.convert("P").save("palette.gif", transparency=3)
    deep = np.linspace(0, 65535, 50 * 40).astype(np.uint16).reshape(50, 40)
    Image.fromarray(deep).save("deep.png")
    image.convert("RGB").resize((1, 1)).save("dot.bmp")
    image.convert("RGB").resize((700, 3)).save("strip.webp")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "rgb.jpg").read_bytes()[:2000])
    (tmp_path / "words.png").write_text("no photo")
    return tmp_path


GOOD = ["rgb.jpg", "grey.png", "phone.jpg", "clear.png", "la.png", "palette.gif", "deep.png",
        "dot.bmp", "strip.webp"]


def test_colorize_keeps_size_and_lightness(trained, album, capsys):
    assert call(pix, "--out", trained, "--colorize", *GOOD) == 0
    assert capsys.readouterr().out.count("\n") == len(GOOD)
    for name in GOOD:
        photo = pix.open_image(name)
        made = Image.open(trained / "colorized" / (name.split(".")[0] + ".png"))
        assert made.mode == "RGB" and made.size == photo.size
        before, after = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
                         for image in (photo, made))
        error = (pix.rgb_to_lab(before) - pix.rgb_to_lab(after))[:, 0].abs()
        shown = (after.amin(1) > 0.005) & (after.amax(1) < 0.995)  # not clipped
        assert (error[shown] < 1).all(), name
    assert Image.open(trained / "colorized" / "phone.png").size == (203, 151)


def test_colorize_twice_gives_the_same_colours_of_the_trained_g(trained, album):
    made = []
    for _ in range(2):
        assert call(pix, "--out", trained, "--colorize", "rgb.jpg") == 0
        made.append((trained / "colorized" / "rgb.png").read_bytes())
    assert made[0] == made[1]

    G = pix.Generator(64, 4).eval()
    G.load_state_dict(torch.load(trained / "checkpoint.pt")["parts"]["G"])
    with torch.no_grad():
        expected = pix.colour_photo(np.array(Image.open("rgb.jpg")), G, Settings)
    found = np.array(Image.open(trained / "colorized" / "rgb.png"))
    assert np.array_equal(found, expected)


def test_colorize_goes_on_after_a_bad_photo(trained, album, capsys):
    for old in trained.glob("colorized/*"):
        old.unlink()
    names = ["broken.jpg", "rgb.jpg", "missing.jpg", "words.png", ".", "grey.png"]
    assert call(pix, "--out", trained, "--colorize", *names) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "4 of 6" in error
    assert all(name in error for name in ("broken.jpg", "missing.jpg", "words.png"))
    assert {path.name for path in trained.glob("colorized/*")} == {"rgb.png", "grey.png"}


def test_colorize_gives_every_photo_a_name_of_its_own(trained, album):
    for folder in "ab":
        (album / folder).mkdir()
    for old in trained.glob("colorized/*"):
        old.unlink()
    places = ["a/me.png", "b/me.bmp", "b/ME.png", "me-2.png", "b/me.png"]
    for i, place in enumerate(places):
        Image.new("L", (10 + i, 10)).save(place)
    assert call(pix, "--out", trained, "--colorize", *places) == 0
    made = {path.name: Image.open(path).size[0] for path in trained.glob("colorized/*")}
    assert made == {"me.png": 10, "me-2.png": 11, "ME-3.png": 12, "me-2-2.png": 13, "me-4.png": 14}


def test_more_photos_than_are_held_out(trained, album):
    assert call(pix, "--out", trained, "--colorize", *["dot.bmp"] * 66) == 0
    assert (trained / "colorized" / "dot-66.png").is_file()


def test_a_photo_is_coloured_by_g(album, monkeypatch):
    """G gets the whole photo, at its own size, and its colours get into the picture."""
    seen = []

    def paint(x):
        seen.append(x)
        return torch.stack([x[:, 0] * 0 + 0.2, x[:, 0] * 0 - 0.1], 1)

    photo = np.full((600, 31, 3), 120, dtype=np.uint8)  # more than one strip
    photo[:300] = 30
    made = pix.colour_photo(photo, paint, Settings)
    assert made.shape == (600, 31, 3) and made.dtype == np.uint8
    lab = pix.rgb_to_lab(torch.from_numpy(made).permute(2, 0, 1)[None] / 255)
    assert (lab[:, 1] - 22).abs().max() < 1 and (lab[:, 2] + 11).abs().max() < 1
    assert seen[0].shape == (1, 1, 64, 64) and (seen[0][0, 0].diff(dim=1).abs() < 1e-5).all()
    assert seen[0][0, 0, 0, 0] < -0.7 and seen[0][0, 0, -1, 0] > -0.1
    stripes = np.zeros((576, 576, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    pix.colour_photo(stripes, paint, Settings)
    assert seen[1][..., 5:-5].abs().max() < 0.1  # in between, not one of the two


def test_generate_colours_held_out_images_only(trained, capsys):
    n = len(torch.load(trained / "checkpoint.pt")["data"][0])
    assert n == 64
    assert call(pix, "--out", trained, "--generate", n) == 0
    assert len(list((trained / "generated").iterdir())) == n
    capsys.readouterr()
    assert call(pix, "--out", trained, "--generate", n + 1) == 2
    error = capsys.readouterr().err
    assert "--colorize" in error and error.count("\n") == 1
    assert len(list((trained / "generated").iterdir())) == n


def test_the_checkpoint_knows_the_learning_rate(trained, capsys):
    assert torch.load(trained / "checkpoint.pt")["settings"]["lr"] == 2e-4
    before = (trained / "checkpoint.pt").read_bytes()
    flags = ["--out", trained, "--resume", "--steps", 9]
    for other in (["--lr", 1e-3], ["--adversarial", "wgan"], ["--l1", 10]):
        assert call(pix, *flags, *other) == 2
        assert f"this run has {other[0]}" in capsys.readouterr().err
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_the_log_has_the_measures(trained):
    columns = (trained / "losses.csv").read_text().splitlines()[0].split(",")
    assert columns == ["step", "loss_D", "loss_G", "D(y)", "D(G(x))", "spread",
                       "L1", "L1/grey", "PSNR", "chroma", "images/s"]


@pytest.mark.parametrize("kind", ["L", "RGB"])
def test_grey_data_has_no_colour(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    for i in range(70):
        image = Image.linear_gradient("L").rotate(i)
        (tmp_path / "old").mkdir(exist_ok=True)
        image.convert(kind).save(tmp_path / "old" / f"{i}.png")
    assert call(pix, "--data", "old", *FLAGS) == 2
    error = capsys.readouterr().err
    assert "old has no colour to learn" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_too_few_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "few", 64)
    assert call(pix, "--data", "few", *FLAGS) == 2
    error = capsys.readouterr().err
    assert "few has 64 images" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags, expected", [
    ("--size 32", "64, 128, 256"),
    ("--size 512", "64, 128, 256"),
    ("--gan -1", "--gan"),
    ("--l1 -1", "--l1"),
    ("--l2 x", "--l2"),
    ("--margin -1", "--margin"),
    ("--clip -1", "--clip"),
    ("--critic 0", "--critic"),
    ("--width 0", "--width"),
    ("--adversarial foo", "foo"),
    ("--colorize a.jpg", "checkpoint.pt cannot be read"),
    ("--colorize", "--colorize"),
])
def test_own_flags_refuse_nonsense(flags, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(pix, *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error and not any(tmp_path.iterdir())
