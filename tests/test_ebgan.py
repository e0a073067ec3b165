"""ebgan.py: the energy, the hinge of every image, the squared pull-away term on codes."""

import pytest
import torch
from conftest import HERE, call, cartoons, load, run_train

ebgan = load(HERE / "ebgan.py")


def test_the_autoencoder_has_the_papers_size():
    D = ebgan.Discriminator(3, 64)
    assert sum(p.numel() for p in D.encoder.parameters()) == 659_648
    assert sum(p.numel() for p in D.decoder.parameters()) == 659_011
    energies, codes = D(torch.rand(2, 3, 64, 64))
    assert energies.shape == (2,) and codes.shape == (2, 256 * 8 * 8)


def test_energy_is_the_mean_square_of_each_image():
    D = ebgan.Discriminator(1, 4)
    images = torch.rand(3, 1, 16, 16)
    error = torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1, 1)
    for factor in (1, 2):
        D.decoder.forward = lambda codes, k=factor: images + k * error
        assert D(images)[0].tolist() == pytest.approx(
            [0, 0.01 * factor**2, 0.04 * factor**2], abs=1e-7)


def test_the_papers_margin_of_20_as_a_mean_square(monkeypatch):
    run = run_train(ebgan, monkeypatch, ["--data", "celeba"], cartoons(ebgan, 8, 16), 0)
    assert run.args.margin == pytest.approx(20**2 / (64 * 64 * 3), abs=1e-3)


def test_the_hinge_is_taken_image_by_image():
    m = 2.0
    fake = torch.tensor([m - 1, m + 5], requires_grad=True)
    loss = ebgan.d_loss(torch.zeros(2), fake, m)
    loss.backward()
    assert loss.item() == 0.5 and fake.grad.tolist() == [-0.5, 0]  # a mean first would give 0
    assert ebgan.d_loss(torch.tensor([0.3, 0.5]), torch.full((2,), 9.0), m).item() == \
        pytest.approx(0.4)


def test_pull_away_is_the_mean_squared_cosine():
    torch.manual_seed(0)
    row = torch.randn(1, 50)
    assert ebgan.pull_away(row.repeat(4, 1)).item() == pytest.approx(1, abs=1e-5)
    assert ebgan.pull_away(torch.eye(6)).item() == pytest.approx(0, abs=1e-7)
    assert ebgan.pull_away(torch.cat([row, -row])).item() == pytest.approx(1, abs=1e-5)  # squared
    many = torch.randn(64, 1000)
    assert ebgan.pull_away(many).item() == pytest.approx(1 / 1000, rel=0.1)
    scaled = ebgan.pull_away(5 * many).item()
    assert scaled == pytest.approx(ebgan.pull_away(many).item(), rel=1e-4)
    cos = torch.nn.functional.cosine_similarity(many[:3, None], many[None, :3], dim=2)
    by_hand = sum(cos[i, j].item() ** 2 for i in range(3) for j in range(3) if i != j) / 6
    assert ebgan.pull_away(many[:3]).item() == pytest.approx(by_hand, rel=1e-4)


def test_repeating_the_batch_changes_no_energy_term():
    real, fake = torch.rand(4), torch.rand(4)
    again = ebgan.d_loss(real.repeat(2), fake.repeat(2), 0.5)
    assert again.item() == pytest.approx(ebgan.d_loss(real, fake, 0.5).item())
    codes = torch.randn(4, 9)
    assert ebgan.g_loss(fake.repeat(2), codes, 0).item() == pytest.approx(fake.mean().item())
    assert ebgan.g_loss(fake, codes, 0.1).item() == pytest.approx(
        (fake.mean() + 0.1 * ebgan.pull_away(codes)).item())


def test_the_gradient_runs_through_both_sides_of_the_reconstruction():
    """Against finite differences; a detached target fails this."""
    torch.manual_seed(0)
    D = ebgan.Discriminator(1, 2).double().eval()
    image = torch.rand(1, 1, 8, 8, dtype=torch.double, requires_grad=True)
    energy = D(image)[0].sum()
    (gradient,) = torch.autograd.grad(energy, image)
    for place in [(0, 0, 0, 0), (0, 0, 3, 5)]:
        bump = torch.zeros_like(image)
        bump[place] = 1e-5
        with torch.no_grad():
            slope = (D(image + bump)[0].sum() - D(image - bump)[0].sum()) / 2e-5
        assert gradient[place].item() == pytest.approx(slope.item(), rel=1e-4)


def test_the_step_uses_codes_and_energies_of_the_fakes(monkeypatch):
    """D sees real images, then fakes, then, improved, the same fakes again for G's step."""
    inputs, outputs, grads = [], [], []

    def watch(run):
        if run.logs:
            return
        G, D, opt_D = (run.to_save[name] for name in ("G", "D", "opt_D"))
        G.register_forward_hook(lambda net, _, fakes: inputs.append(fakes))
        D.register_forward_pre_hook(lambda net, images: inputs.append(images[0]))
        D.register_forward_hook(lambda net, _, output: outputs.append(output))
        opt_D.step = lambda f=opt_D.step: (grads.extend(p.grad for p in G.parameters()), f())

    flags = ["--size", 16, "--batch", 4, "--width", 4]
    run = run_train(ebgan, monkeypatch, flags, cartoons(ebgan, 16, 16), watch=watch)
    (real, _), (fake, _), (energies, codes) = outputs
    (fakes, _, detached, again), log = inputs, run.logs[0]
    assert grads and all(grad is None for grad in grads)  # D's step left no gradient in G
    assert again is fakes and torch.equal(detached, fakes) and detached.grad_fn is None
    assert codes.shape == (4, 16 * 2 * 2)
    assert log["loss_D"].item() == pytest.approx(ebgan.d_loss(real, fake, 0.033).item(), rel=1e-5)
    assert log["loss_G"].item() == pytest.approx(
        (energies.mean() + 0.1 * log["pull_away"]).item(), rel=1e-5)
    assert log["pull_away"].item() == pytest.approx(ebgan.pull_away(codes).item(), rel=1e-5)
    assert all(p.grad is not None for p in run.to_save["G"].parameters())


def test_biases_start_at_zero():
    D = ebgan.Discriminator(3, 4).apply(ebgan.init_weights_and_biases)
    assert not D.encoder[0].bias.any() and not D.decoder[-2].bias.any()
    assert 0.01 < D.encoder[2].weight.std() < 0.03


@pytest.mark.parametrize("flags", ["--margin x", "--pull-away"])
def test_own_flags_refuse_what_is_no_number(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(ebgan, *flags.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not any(tmp_path.iterdir())
