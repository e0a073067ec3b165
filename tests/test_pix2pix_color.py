"""pix2pix_color.py: Lab, the networks, four pairs of losses, held-out images, photos."""

import math

import numpy as np
import pytest
import torch
from conftest import HERE, call, cartoons, load, run_train
from PIL import Image
from torch import nn

pix = load(HERE / "pix2pix_color.py")
FORMS = ["gan", "lsgan", "ebgan", "wgan"]
FLAGS = ["--size", 64, "--batch", 4, "--width", 4, "--device", "cpu"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def faces():
    return cartoons(pix, 100, 64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def once(prepare):
    """A watch() that acts before the first step alone."""
    return lambda run: None if run.logs else prepare(run)


def discriminator(form, width=4):
    return (pix.Autoencoder if form == "ebgan" else pix.Discriminator)(width)


def count(net):
    return sum(p.numel() for p in net.parameters())


def largest(net):
    return max(p.abs().max().item() for p in net.parameters())


def colour(*rgb):
    return torch.tensor(rgb, dtype=torch.float).view(1, 3, 1, 1)


def to_lab(rgb):
    x, y = pix.rgb_to_lab(rgb)
    return torch.cat([50 * (x + 1), 110 * y], 1)


def from_lab(lab):
    return pix.lab_to_rgb(lab[:, :1] / 50 - 1, lab[:, 1:] / 110)


def tensor(image):
    """(h, w, 3) uint8, or such an image -> (1, 3, h, w) in [0, 1]."""
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255


# --- Lab ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rgb, lab", [
    ((1, 1, 1), (100, 0, 0)),
    ((0, 0, 0), (0, 0, 0)),
    ((0.5, 0.5, 0.5), (53.389, 0, 0)),
    ((1, 0, 0), (53.2406, 80.0942, 67.2015)),
    ((0, 1, 0), (87.7351, -86.1813, 83.1775)),
    ((0, 0, 1), (32.2957, 79.1870, -107.8617)),
])
def test_known_colours_have_their_published_lab(rgb, lab):
    assert to_lab(colour(*rgb)).flatten().tolist() == pytest.approx(lab, abs=1e-3)
    assert from_lab(colour(*lab)).flatten().tolist() == pytest.approx(rgb, abs=1e-3)


@pytest.mark.parametrize("kind, most", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_every_colour_comes_back_from_lab_and_is_within_reach_of_tanh(kind, most):
    side = torch.linspace(0, 1, 52, dtype=kind)
    rgb = torch.cartesian_prod(side, side, side).T.reshape(1, 3, 52, 52 * 52)
    x, y = pix.rgb_to_lab(rgb)
    assert 0.97 < y.abs().max() < 0.99 and x.min() >= -1 - 1e-6 and x.max() <= 1 + 1e-6
    assert (pix.lab_to_rgb(x, y) - rgb).abs().max() < most


def test_greys_have_no_colour_and_their_lightness_rises():
    lab = to_lab(torch.linspace(0, 1, 1001).expand(1, 3, 1, 1001))[0, :, 0]
    assert lab[1:].abs().max() < 1e-4 and (lab[0].diff() > 0).all()


def test_colours_that_no_screen_can_show_are_clipped():
    rgb = from_lab(torch.cat([colour(50, 110, -110), colour(0, 50, 0), colour(100, 9, 9)]))
    assert rgb.isfinite().all() and rgb.min() >= 0 and rgb.max() <= 1


# --- the networks ---------------------------------------------------------------------------------


def test_the_networks_have_the_published_sizes():
    with torch.device("meta"):
        counts = [count(pix.Generator(size, 64)) for size in (256, 128, 64)]
        assert counts == [54_410_434, 41_825_474, 29_240_514]
        assert count(pix.Discriminator(64)) == 2_765_633
        assert count(pix.Autoencoder(64)) == 5_514_242


@pytest.mark.parametrize("size, patches", [(64, 6), (128, 14), (256, 30)])
def test_outputs_have_their_shapes_and_range(size, patches):
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
    G, x = pix.Generator(64, 2).eval(), torch.randn(2, 1, 64, 64)
    before, layer = G(x), G.up[5 - level]

    def cut(net, inputs):
        wide = inputs[0].shape[1]
        return (inputs[0] * (torch.arange(wide) < wide // 2).view(1, -1, 1, 1),)

    with layer.register_forward_pre_hook(cut):
        assert not torch.allclose(G(x), before)
    assert torch.equal(G(x), before)


def test_the_first_three_layers_up_have_dropout_in_training_only():
    G, x = pix.Generator(64, 4), torch.randn(2, 1, 64, 64)
    assert not torch.equal(G(x), G(x))
    dropped = [module.p for module in G.modules() if isinstance(module, nn.Dropout)]
    assert dropped == [0.5, 0.5, 0.5, 0, 0]
    G.eval()
    assert torch.equal(G(x), G(x))


def test_an_output_of_d_sees_a_patch_of_70_by_70():
    D = pix.Discriminator(4).eval()
    x, y = torch.randn(1, 1, 256, 256, requires_grad=True), torch.randn(1, 2, 256, 256)
    D(x, y)[0, 0, 15, 15].backward()
    rows, columns = (x.grad[0, 0].abs().sum(side).nonzero() for side in (1, 0))
    assert len(rows) == len(columns) == 70
    assert rows[-1] - rows[0] == columns[-1] - columns[0] == 69


@pytest.mark.parametrize("form", FORMS)
def test_d_sees_the_lightness_and_the_colours(form):
    D = discriminator(form).eval()
    x, y = torch.randn(2, 2, 1, 64, 64), torch.rand(2, 2, 2, 64, 64)
    assert not torch.equal(D(x[0], y[0]), D(x[1], y[0]))
    assert not torch.equal(D(x[0], y[0]), D(x[0], y[1]))


def test_the_energy_is_the_mean_square_error_of_each_image(monkeypatch):
    D, y = pix.Autoencoder(2), torch.rand(3, 2, 16, 16)
    error = torch.tensor([0, 0.1, 0.2]).view(3, 1, 1, 1)
    monkeypatch.setattr(nn.Sequential, "forward", lambda net, inputs: y + error)
    assert D(torch.zeros(3, 1, 16, 16), y).tolist() == pytest.approx([0, 0.01, 0.04], abs=1e-7)


def test_the_gradient_of_the_energy_takes_both_ways():
    """Against finite differences: through the reconstruction, and through what it is compared with;
    a detached target fails this.
    """
    D, x = pix.Autoencoder(2).double().eval(), torch.rand(1, 1, 16, 16).double()
    y = torch.rand(1, 2, 16, 16).double().requires_grad_()
    (gradient,) = torch.autograd.grad(D(x, y).sum(), y)
    for place in [(0, 0, 0, 0), (0, 1, 3, 5)]:
        bump = torch.zeros_like(y)
        bump[place] = 1e-5
        with torch.no_grad():
            slope = (D(x, y + bump).sum() - D(x, y - bump).sum()) / 2e-5
        assert gradient[place].item() == pytest.approx(slope.item(), rel=1e-4)


# --- the losses -----------------------------------------------------------------------------------


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
        L_D, L_A = expected[form]
        assert pix.d_loss(real, fake, form, 1.5).item() == pytest.approx(L_D)
        assert pix.adversarial_loss(fake, form).item() == pytest.approx(L_A)
    zero = torch.zeros(2, 1, 6, 6)
    assert pix.d_loss(zero, zero, "gan", 0).item() == pytest.approx(math.log(2))


def test_the_hinge_is_taken_image_by_image():
    fake = torch.tensor([1.0, 7.0], requires_grad=True)
    loss = pix.d_loss(torch.zeros(2), fake, "ebgan", 2.0)
    loss.backward()
    assert loss.item() == 0.5 and fake.grad.tolist() == [-0.5, 0]  # a mean first would give 0


def test_the_loss_of_g_has_three_parts_each_with_its_weight():
    loss_A, error = torch.tensor(0.4), torch.tensor([[1.0, -3.0]])
    parts = [pix.g_loss(loss_A, error, *weights).item()
             for weights in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 4)]]
    assert parts == pytest.approx([0.4, 2, 5, 2 * 0.4 + 3 * 2 + 4 * 5])


# --- the steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_each_step_lowers_its_loss_and_moves_its_own_network_only(monkeypatch, faces, form):
    """L_G has no distance here. On the same batch, without dropout, with the other net held still,
    four steps lower the loss.
    """
    flags = [*FLAGS, "--adversarial", form, "--l1", 0, "--critic-steps", 1, "--clip", 1,
             "--lr", 1e-4]
    batch = pix.sample_colours(faces.images, 4, CPU)
    monkeypatch.setattr(pix, "sample_colours", lambda *args: batch)
    for moving, own, still, other in [("opt_D", "D", "opt_G", "G"), ("opt_G", "G", "opt_D", "D")]:

        def prepare(run):
            G, own_net, other_net = (run.to_save[name] for name in ("G", own, other))
            for module in G.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0
            run.to_save[still].step = lambda: None

            def watched(f=run.to_save[moving].step):
                before = [[p.detach().clone() for p in net.parameters()]
                          for net in (own_net, other_net)]
                f()
                assert not all(map(torch.equal, before[0], own_net.parameters()))
                assert all(map(torch.equal, before[1], other_net.parameters()))

            run.to_save[moving].step = watched

        run = run_train(pix, monkeypatch, flags, faces, n=5, watch=once(prepare))
        losses = [log[f"loss_{own}"].item() for log in run.logs]
        assert losses[-1] < losses[0]


def test_without_adversarial_weight_it_is_regression(monkeypatch, faces):
    """G learns the same whatever D is."""
    weights = []
    for form in FORMS[:3]:

        def prepare(run):
            torch.manual_seed(0)
            run.to_save["G"].apply(pix.init_weights_and_biases)

        flags = [*FLAGS, "--adversarial", form, "--adversarial-weight", 0]
        run = run_train(pix, monkeypatch, flags, faces, watch=once(prepare))
        weights.append(list(run.to_save["G"].parameters()))
    for other in weights[1:]:
        assert all(map(torch.equal, weights[0], other))


@pytest.mark.parametrize("form", FORMS)
def test_the_step_of_g_leaves_no_gradient_in_d(monkeypatch, faces, form):
    seen = []

    def prepare(run):
        D = run.to_save["D"]
        for name in ("opt_D", "opt_G"):
            run.to_save[name].step = lambda: seen.append([p.grad.clone() for p in D.parameters()])

    run_train(pix, monkeypatch, [*FLAGS, "--adversarial", form], faces, watch=once(prepare))
    assert all(map(torch.equal, *seen[-2:]))


def test_wgan_clips_d_at_every_pass_and_makes_five_steps_of_d_on_new_images(monkeypatch, faces):
    found, calls, sample = [], [], pix.sample_colours

    def prepare(run):
        D = run.to_save["D"]
        D.register_forward_pre_hook(lambda *_: found.append(largest(D)))
        for name in ("opt_G", "opt_D"):
            optimiser = run.to_save[name]
            assert type(optimiser) is torch.optim.RMSprop
            group = optimiser.param_groups[0]
            assert (group["lr"], group["alpha"], group["momentum"]) == (5e-5, 0.99, 0)
            optimiser.step = lambda f=optimiser.step, name=name: (calls.append(name), f())

    monkeypatch.setattr(
        pix, "sample_colours", lambda *args: (calls.append("sample"), sample(*args))[1])
    flags = [*FLAGS, "--adversarial", "wgan", "--clip", 0.02]
    run = run_train(pix, monkeypatch, flags, faces, watch=once(prepare))
    assert calls == ["sample", "opt_D"] * 5 + ["opt_G"]
    assert len(found) == 2 * 5 + 1 and max(found) <= 0.02 + 1e-9  # before the first step, too
    assert largest(run.to_save["D"]) <= 0.02 + 1e-9 < largest(run.to_save["G"])


@pytest.mark.parametrize("form", ["gan", "lsgan", "ebgan"])
def test_the_others_use_adam_and_one_unclipped_step_of_d(monkeypatch, faces, form):
    calls, sample = [], pix.sample_colours
    monkeypatch.setattr(pix, "sample_colours", lambda *args: (calls.append(1), sample(*args))[1])
    run = run_train(pix, monkeypatch, [*FLAGS, "--adversarial", form], faces)
    for name in ("opt_G", "opt_D"):
        group = run.to_save[name].param_groups[0]
        assert type(run.to_save[name]) is torch.optim.Adam
        assert (group["lr"], group["betas"]) == (2e-4, (0.5, 0.999))
    assert len(calls) == 1 and largest(run.to_save["D"]) > 0.5


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", FORMS)
def test_held_out_faces_get_nearer_to_the_truth_unless_a_sign_is_wrong(
        monkeypatch, faces, form, sign):
    """After 60 small steps, nearer than grey ones are."""
    found = {}

    def watch(run):
        if len(run.logs) == 60:
            with pix.preview(run.args, run.to_save["G"]):
                found.update(run.measure())

    flags = [*FLAGS, "--adversarial", form, "--critic-steps", 1, "--width", 8, "--lr", 1e-3]
    monkeypatch.setattr(pix, "g_loss", lambda *args, f=pix.g_loss: sign * f(*args))
    run_train(pix, monkeypatch, flags, faces, n=60, watch=watch)
    print(form, sign, found)
    assert (found["L1/grey"] < 0.85) == (sign == 1)


# --- what is held out, and shown ------------------------------------------------------------------


def test_the_first_64_images_are_never_sampled_and_all_others_are():
    i = torch.arange(100)
    images = torch.stack([i, 0 * i, 0 * i + 77], 1).byte().view(100, 3, 1, 1)
    x, y = pix.sample_colours(images, 3000, CPU)
    found = (255 * pix.lab_to_rgb(x, y)).round().long()[:, 0].unique()
    assert torch.equal(found, i[64:])


def test_half_of_a_batch_is_mirrored_lightness_and_colours_together():
    images = torch.zeros(65, 3, 4, 4, dtype=torch.uint8)
    images[..., 0] = torch.tensor([200, 30, 90]).view(3, 1)
    x, y = pix.sample_colours(images, 1000, CPU)
    left, right = (x[:, 0, 0, side] > -0.9 for side in (0, 3))
    assert torch.equal(left, ~right) and 420 < left.sum() < 580
    assert torch.equal(left, y[:, 0, 0, 0] > 0.1)


def test_measures_of_the_truth_and_of_grey(faces):
    held_out = faces.images[:64]
    _, y = pix.rgb_to_lab(held_out / 255)
    truth, grey, half = (pix.views(held_out, lambda x, k=k: k * y)[2]() for k in (1, 0, 0.5))
    assert truth == pytest.approx({"L1": 0, "L1/grey": 0, "PSNR": 100, "chroma": 1}, abs=1e-4)
    assert grey["L1/grey"] == pytest.approx(1) and grey["chroma"] == 0
    assert grey["L1"] == pytest.approx(110 * y.abs().mean().item(), rel=1e-5)
    assert half["chroma"] == pytest.approx(0.5) and half["L1/grey"] == pytest.approx(0.5)
    assert grey["PSNR"] < half["PSNR"] < 60


def test_psnr_by_hand():
    held_out = torch.full((64, 3, 2, 2), 102, dtype=torch.uint8)
    held_out[:, 1:] = torch.tensor([51, 204]).view(2, 1, 1).byte()
    x, _ = pix.rgb_to_lab(held_out / 255)
    _, y = pix.rgb_to_lab(held_out / 255 + 0.1)  # the colours of one that is too light
    error = pix.lab_to_rgb(x, y) - held_out / 255
    expected = -10 * math.log10(error.square().mean().item())
    assert pix.views(held_out, lambda x: y)[2]()["PSNR"] == pytest.approx(expected, abs=1e-3)


def test_the_grid_shows_grey_coloured_and_true_images_side_by_side(faces):
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
    assert order == sorted(set(order)) and order[0] == 0 and order[-1] == 63
    for lightness in (grey, coloured):
        x, _ = pix.rgb_to_lab((lightness + 1) / 2)
        assert (x - pix.rgb_to_lab((true + 1) / 2)[0]).abs().median() < 1e-3
    assert draw(3).shape == (3, 3, 64, 64) and draw(64).shape == (64, 3, 64, 64)


# --- runs and photos, by the command line ---------------------------------------------------------


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
def colorized(trained):
    """What --colorize writes, without that of earlier tests -> a function: {name: image}."""
    for old in trained.glob("colorized/*"):
        old.unlink()
    return lambda: {path.name: Image.open(path) for path in trained.glob("colorized/*")}


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
    image.convert("P").save("palette.gif", transparency=3)
    deep = np.linspace(0, 65535, 50 * 40).astype(np.uint16).reshape(50, 40)
    Image.fromarray(deep).save("deep.png")
    image.convert("RGB").resize((1, 1)).save("dot.bmp")
    image.convert("RGB").resize((300, 3)).save("strip.webp")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "rgb.jpg").read_bytes()[:2000])
    (tmp_path / "words.png").write_text("no photo")
    return tmp_path


GOOD = ["rgb.jpg", "grey.png", "phone.jpg", "clear.png", "palette.gif", "deep.png", "dot.bmp",
        "strip.webp"]


def test_colorize_keeps_size_and_lightness(trained, album, colorized, capsys):
    assert call(pix, "--out", trained, "--colorize", *GOOD) == 0
    assert capsys.readouterr().out.count("\n") == len(GOOD)
    made = colorized()
    assert len(made) == len(GOOD)
    for i, name in enumerate(GOOD):
        photo, after = pix.open_image(name), made[f"{i:03}-{name.split('.')[0]}.png"]
        assert after.mode == "RGB" and after.size == photo.size
        before, after = tensor(photo), tensor(after)
        error = (to_lab(before) - to_lab(after))[:, 0].abs()
        shown = (after.amin(1) > 0.005) & (after.amax(1) < 0.995)  # not clipped
        assert (error[shown] < 1).all(), name
    assert made["002-phone.png"].size == (203, 151)


def test_colorize_uses_the_trained_g_and_the_checkpoints_size_and_width(
        trained, album, colorized):
    made = []
    for flags in ([], ["--seed", 3]):
        assert call(pix, "--out", trained, *flags, "--colorize", "rgb.jpg") == 0
        made.append(np.asarray(colorized()["000-rgb.png"]))
    G = pix.Generator(64, 4).eval()
    G.load_state_dict(torch.load(trained / "checkpoint.pt")["state"]["G"])
    with torch.no_grad():
        expected = np.asarray(pix.colour_photo(pix.open_image("rgb.jpg"), G, 64, CPU))
    assert np.array_equal(made[0], expected) and np.array_equal(made[1], expected)


def test_colorize_tells_which_photos_it_cannot_read_and_colours_the_others(
        trained, album, colorized, capsys):
    names = ["broken.jpg", "rgb.jpg", "missing.jpg", "words.png", "grey.png"]
    assert call(pix, "--out", trained, "--colorize", *names) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3 of 5" in error
    assert all(text in error for text in ("broken.jpg (", "missing.jpg (", "words.png (cannot id"))
    assert set(colorized()) == {"001-rgb.png", "004-grey.png"}


def test_colorize_expands_folders_and_patterns(trained, album, colorized, capsys):
    """A pattern as it stands, where no shell has expanded it."""
    for name in ("old/b/me.png", "old/me.png", "old/me.bmp", "old/.hidden.png", "x[1].png"):
        (album / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 10), "red").save(album / name)
    assert call(pix, "--out", trained, "--colorize", "old", "old/*.bmp", "x[1].png") == 0
    assert sorted(colorized()) == ["000-me.png", "001-me.png", "002-me.png", "003-me.png",
                                   "004-x[1].png"]
    (album / "empty").mkdir()
    assert call(pix, "--out", trained, "--colorize", "none*.jpg", "empty") == 2
    error = capsys.readouterr().err
    assert "2 of 2" in error and "none*.jpg" in error and "empty" in error


def paint(seen):
    """A G whose colour a is the lightness, so that one can see where the colours land."""
    def G(x):
        seen.append(x)
        return torch.cat([0.3 * x, 0 * x - 0.1], 1)
    return G


@pytest.mark.parametrize("w, h", [(200, 100), (100, 200), (96, 96), (40, 17), (170, 600)])
def test_a_photo_keeps_its_shape_and_its_colours_stay_in_place(w, h):
    """G sees a round spot round, on sides that are multiples of its size, and paints it there."""
    row, column = np.mgrid[:h, :w]
    r = min(w, h) / 4
    spot = (row - h / 2) ** 2 + (column - w / 2) ** 2 < r**2
    photo = np.where(spot[..., None], 160, 90).astype(np.uint8).repeat(3, 2)
    seen = []
    made = pix.colour_photo(Image.fromarray(photo), paint(seen), 64, CPU)
    assert made.size == (w, h)
    x = seen[0][0, 0]
    assert seen[0].shape[:2] == (1, 1) and x.shape[0] % 64 == x.shape[1] % 64 == 0
    assert min(x.shape) == 64
    scale = 64 / min(w, h)
    inside = (x > 0)[:round(h * scale), :round(w * scale)]
    rows, columns = (inside.any(side).sum().item() for side in (1, 0))
    assert abs(rows - 32) <= 3 and abs(columns - 32) <= 3  # neither wide nor tall
    lab = to_lab(tensor(made))[0]
    expected = 110 * 0.3 * (to_lab(tensor(photo))[0, 0] / 50 - 1)
    error = (lab[1] - expected).abs()
    assert error.median() < 0.5 and (error > 4).float().mean() < 0.04  # only at the spot's edge
    assert (lab[2] + 11).abs().max() < 1.5


def test_g_sees_a_photo_scaled_with_antialiasing():
    stripes, seen = np.zeros((576, 576, 3), dtype=np.uint8), []
    stripes[:, ::2] = 255
    pix.colour_photo(Image.fromarray(stripes), paint(seen), 64, CPU)
    grey, _ = pix.rgb_to_lab(torch.full((1, 3, 1, 1), 0.5))
    assert (seen[0][..., 5:-5] - grey).abs().max() < 0.1  # in between, not one of the two


def test_generate_colours_held_out_images_only(trained, capsys):
    assert len(torch.load(trained / "checkpoint.pt")["data"][0]) == 64
    assert call(pix, "--out", trained, "--generate", 64) == 0
    assert len(list((trained / "generated").iterdir())) == 64
    capsys.readouterr()
    assert call(pix, "--out", trained, "--generate", 65) == 2
    error = capsys.readouterr().err
    assert "64 images, not the 65" in error and error.count("\n") == 1
    assert len(list((trained / "generated").iterdir())) == 64


def test_resume_goes_on_with_the_same_loss_and_learning_rate(tmp_path, monkeypatch):
    flags = [*FLAGS, "--root", tmp_path, "--out", tmp_path / "run", "--adversarial", "wgan"]
    assert call(pix, "--data", photos(tmp_path / "mine"), "--steps", 1, *flags) == 0
    assert call(pix, "--out", tmp_path / "run", "--resume", "--steps", 2) == 0
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert saved["settings"]["adversarial"] == "wgan" and saved["step"] == 2
    assert saved["state"]["opt_D"]["param_groups"][0]["lr"] == 5e-5
    assert max(p.abs().max() for name, p in saved["state"]["D"].items()
               if name.endswith(("weight", "bias"))) <= 0.01 + 1e-9


def test_the_log_has_the_measures(trained):
    columns = (trained / "losses.csv").read_text().splitlines()[0].split(",")
    assert columns == ["step", "loss_D", "loss_G", "D(y)", "D(G(x))", "spread",
                       "L1", "L1/grey", "PSNR", "chroma"]


@pytest.mark.parametrize("kind", ["L", "RGB"])
def test_grey_data_has_no_colour_to_learn(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    for i in range(70):
        image = Image.linear_gradient("L").rotate(i)
        (tmp_path / "old").mkdir(exist_ok=True)
        image.convert(kind).save(tmp_path / "old" / f"{i}.png")
    assert call(pix, "--data", "old", *FLAGS) == 2
    error = capsys.readouterr().err
    assert "old has no colour to learn" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_64_images_are_too_few(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "few", 64)
    assert call(pix, "--data", "few", *FLAGS) == 2
    error = capsys.readouterr().err
    assert "64 images, not the 65" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags, expected", [
    ("--size 32", "64, 128, 256"),
    ("--l2 x", "--l2"),
    ("--critic-steps 2.5", "--critic-steps"),
    ("--adversarial foo", "foo"),
    ("--colorize a.jpg", "checkpoint.pt"),
    ("--colorize", "--colorize"),
])
def test_flags_that_make_no_sense_are_told_in_one_line(
        flags, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(pix, *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error and not any(tmp_path.iterdir())
