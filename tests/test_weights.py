"""The ladder from which the judges learn, the list of photographs, a small autoencoder."""

import photographs
import pytest
import torch
import train_autoencoder
import train_judge

import model
from data import degrade_sr
from reward import luma, psnr
from utils import UserError, read_image


@pytest.fixture
def hq(photo_folder):
    return read_image(photo_folder / "train/suit.png")[:, :64, :64]


def test_quality_is_the_share_of_rungs_that_are_farther():
    scale = torch.tensor([[0.1, 4.0], [0.2, 1.0], [0.3, 2.0], [0.4, 3.0]]).sort(0).values
    far = torch.tensor([[0.0, 0.0], [0.25, 2.5], [0.9, 9.0], [0.9, 0.0]])
    got = train_judge.quality(far, scale)
    assert torch.allclose(got, torch.tensor([1.0, 0.5, 0.0, 0.5]))


def test_soft_labels_have_the_quality_as_their_mean():
    values, quality = torch.linspace(1, 0, 5), torch.tensor([0.0, 0.1, 0.6, 0.75, 1.0])
    labels = train_judge.soft_label(quality, values)
    assert torch.allclose(labels @ values, quality) and torch.allclose(labels.sum(1), torch.ones(5))
    assert ((labels > 0).sum(1) <= 2).all()


@pytest.mark.parametrize("kind", train_judge.DAMAGE)
def test_damage_grows_with_its_severity(kind, hq):
    def mean_psnr(severity):
        images = [train_judge.DAMAGE[kind](hq, severity, torch.Generator().manual_seed(i))
                  for i in range(8)]
        assert all(x.shape == hq.shape and x.isfinite().all() for x in images)
        return psnr(torch.stack(images).clamp(-1, 1), hq.expand(8, -1, -1, -1)).mean()
    assert mean_psnr(0.1) > mean_psnr(0.5) > mean_psnr(1.0)


def test_color_noise_leaves_the_brightness(hq, gen):
    noisy = train_judge.color_noise(hq * 0.5, 0.5, gen)
    assert (luma(noisy[None]) - luma(hq[None] * 0.5)).abs().mean() < 0.004
    assert (noisy - hq * 0.5).abs().mean() > 0.02


def test_a_ladder_begins_with_hq_and_lq_and_is_of_8_bits(hq, gen, tiny_restorer):
    lq = degrade_sr(hq[None])[0]
    rungs = train_judge.ladder(hq[None], lq, tiny_restorer(), gen)
    assert rungs.shape == (1, train_judge.RUNGS, 3, 64, 64)
    assert torch.allclose(rungs[0, :2], torch.cat([hq[None], lq]), atol=1 / 254)
    assert len({tuple(x.flatten()[:99].tolist()) for x in rungs[0]}) == train_judge.RUNGS
    levels = (rungs + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-3)


def test_faint_noise_is_below_what_is_seen_and_film_stays_an_image(hq, gen):
    images = torch.full((64, 3, 64, 64), 100, dtype=torch.uint8)
    change = train_judge.faint(images, gen).float() - 100
    strength = change.std((1, 2, 3))
    assert change.mean().abs() < 0.05 and strength.max() < 3.5 and strength.max() > 1
    assert strength.min() < 0.5 and (change - change[:, :1]).abs().max() >= 1  # in color, too
    filmed = [train_judge.filmed(hq, gen) for _ in range(4)]
    assert all(x.shape == hq.shape and x.abs().max() <= 1 for x in filmed)
    assert len({x.mean().item() for x in filmed}) == 4


def test_the_photographs_for_validation_are_in_the_list():
    names = [photographs.name_of(package, entry.rsplit("/", 1)[0])
             for package, (_, _, files) in photographs.PACKAGES.items() for entry in files.split()]
    assert len(set(names)) == len(names) and set(photographs.VAL) <= set(names)


@pytest.mark.parametrize("name", train_judge.BUILD)
def test_whitened_patches_have_unit_variance_and_a_fresh_judge_scores(name, gen):
    judge = train_judge.build_judge(train_judge.BUILD[name])
    images = torch.randint(0, 256, (16, 3, 64, 64), generator=gen).to(torch.uint8)
    train_judge.whiten_patches(judge, images)
    projection = judge.model.model.visual.patch_embed.proj
    patches = judge.inputs(images)["pixel_values"]
    out = patches @ projection.weight.flatten(1).T[:, :48] + (
        projection.bias[:48] if projection.bias is not None else 0)
    assert torch.allclose(out.std(0), torch.ones(48), atol=0.02)
    score = judge(images[:2].float() / 127.5 - 1)
    assert score.shape == (2,) and ((score > 0) & (score < 1)).all()
    view = train_judge.turned(torch.arange(72 * 72).view(1, 1, 72, 72), 5, gen)
    assert view.shape == (1, 1, 64, 64) and len(view.unique()) == 64 * 64


def test_an_autoencoder_learns_inside_a_restorer_that_loads(photo_folder, tmp_path):
    cfg = train_autoencoder.Config(data=str(photo_folder), out=str(tmp_path / "latent"), steps=80,
                                   batch=2, size=32)
    hq = read_image(photo_folder / "test/cat.png")[None, :, :64, :64]
    train_autoencoder.train(cfg)
    trained = model.load(str(tmp_path / "latent/model"))
    assert trained.latent_shape(hq) == trained.encode(hq, None).shape == (1, 3, 32, 32)
    restored = trained.decode(trained.encode(hq, None), None)
    assert (restored - hq).square().mean() < 0.7 * hq.var()  # it sees more than a mean color
    assert (tmp_path / "latent/config.json").exists()


@pytest.mark.parametrize("flags, text", [({"model": str(model.shipped("sr"))}, "is no ldm-sr"),
                                         ({"size": 36}, "--size 36: must be a multiple of 8"),
                                         ({"lr": 1e30}, "the gradient is not finite")])
def test_an_autoencoder_refuses_what_it_cannot_learn(flags, text, photo_folder, tmp_path):
    cfg = train_autoencoder.Config(data=str(photo_folder), out=str(tmp_path / "latent"), batch=2,
                                   **{"size": 32, "steps": 20} | flags)
    with pytest.raises(UserError, match=text):
        train_autoencoder.train(cfg)
    assert not (tmp_path / "latent/model").exists()
