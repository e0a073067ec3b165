"""ebgan.py: the energy, the hinge of every image, the squared pull-away term on codes."""

import pytest
import torch
from conftest import HERE, call, cartoons, load, step_of

ebgan = load(HERE / "ebgan.py")


def test_parameter_counts_and_shapes():
    D = ebgan.Discriminator(3, 64)
    assert sum(p.numel() for p in D.encoder.parameters()) == 659_648
    assert sum(p.numel() for p in D.decoder.parameters()) == 659_011
    energies, codes = D(torch.rand(2, 3, 64, 64))
    assert energies.shape == (2,) and codes.shape == (2, 256 * 8 * 8)


def test_energy_is_the_mean_square_of_each_image(monkeypatch):
    D = ebgan.Discriminator(1, 4)
    images = torch.rand(3, 1, 16, 16)
    error = torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1, 1)
    for factor in (1, 2):
        D.decoder.forward = lambda codes, k=factor: images + k * error
        assert D(images)[0].tolist() == pytest.approx(
            [0, 0.01 * factor**2, 0.04 * factor**2], abs=1e-7)


def test_the_hinge_is_per_image():
    m = 2.0
    fake = torch.tensor([m - 1, m + 5], requires_grad=True)
    loss = ebgan.d_loss(torch.zeros(2), fake, m)
    loss.backward()
    assert loss.item() == 0.5 and fake.grad.tolist() == [-0.5, 0]  # a mean first would give 0
    assert ebgan.d_loss(torch.tensor([0.3, 0.5]), torch.full((2,), 9.0), m).item() == \
        pytest.approx(0.4)


def test_pull_away():
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


def build(monkeypatch, *flags):
    data = cartoons(ebgan, 16, 16)
    return step_of(ebgan, monkeypatch, ["--size", 16, "--batch", 4, "--width", 4, *flags], data)


def test_the_step_uses_codes_and_energies_of_the_fakes(monkeypatch):
    run, seen = build(monkeypatch), {}
    G, D = run["parts"]["G"], run["parts"]["D"]
    fakes = []
    G.register_forward_hook(lambda net, inputs, output: fakes.append(output))
    g_loss = ebgan.g_loss

    def watch(energies, codes, weight):
        seen.update(energies=energies, codes=codes, weight=weight)
        return g_loss(energies, codes, weight)

    monkeypatch.setattr(ebgan, "g_loss", watch)
    before = [p.detach().clone() for p in D.parameters()]
    log = run["step"]()
    assert len(fakes) == 1 and seen["weight"] == 0.1
    assert seen["codes"].grad_fn is not None and seen["codes"].shape == (4, 16 * 2 * 2)
    assert log["loss_G"].item() == pytest.approx(
        (seen["energies"].mean() + 0.1 * log["pull_away"]).item(), rel=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(before, D.parameters(), strict=True))
    assert all(p.grad is not None for p in G.parameters())


def test_biases_start_at_zero(monkeypatch):
    D = ebgan.Discriminator(3, 4).apply(ebgan.init_weights_and_biases)
    assert not D.encoder[0].bias.any() and not D.decoder[-2].bias.any()
    assert 0.01 < D.encoder[2].weight.std() < 0.03


@pytest.mark.parametrize("flags", ["--margin -1", "--margin x", "--pull-away -0.1"])
def test_own_flags_refuse_nonsense(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(ebgan, *flags.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not any(tmp_path.iterdir())
