"""Rewards: the contract, agreement with other implementations, the MLLM scorer and its training data."""

import numpy as np
import pytest
import torch

import reward
from data import degrade_sr, grid_crops, photographs
from reward import JUDGES, MLLMJudge, build_judge, expected_level, ladder, level_tokens, load, soft_label, symmetric
from utils import UserError, generator, read_image, write_image


@pytest.fixture(scope="module")
def pairs():
    hq = grid_crops(photographs("val"), 6, 64, generator(0))[0]
    return degrade_sr(hq)[0], hq


def test_psnr_and_ssim_equal_scikit_image(pairs):
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    for x, y, a, b, c in zip(*pairs, reward.psnr(*pairs), reward.psnr_y(*pairs), reward.ssim(*pairs)):
        x, y = (((v + 1) / 2).permute(1, 2, 0).double().numpy() for v in (x, y))
        assert a.item() == pytest.approx(peak_signal_noise_ratio(y, x, data_range=1), abs=1e-3)
        luma = [rgb2ycbcr(v)[..., 0] / 255 for v in (y, x)]
        assert b.item() == pytest.approx(peak_signal_noise_ratio(*luma, data_range=1), abs=1e-3)
        _, full = structural_similarity(x, y, channel_axis=2, data_range=1, gaussian_weights=True, sigma=1.5,
                                        use_sample_covariance=False, full=True)
        assert c.item() == pytest.approx(np.mean(full[5:-5, 5:-5]), abs=1e-3)


def test_expected_level_and_soft_label():
    sure = torch.full((5, 5), -50.0).fill_diagonal_(50.0)
    torch.testing.assert_close(expected_level(sure), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    quality = torch.linspace(0, 1, 41)
    label = soft_label(quality)
    torch.testing.assert_close(label.sum(1), torch.ones(41))
    torch.testing.assert_close(expected_level((label + 1e-12).log()), quality, rtol=1e-4, atol=1e-4)
    assert (label > 0).sum(1).max() == 2


@pytest.mark.parametrize("name", ("judge", "judge2"))
def test_shipped_judges_score_the_contract(name, pairs):
    judge = load(name)
    lq, hq = pairs
    scores = judge(torch.cat([lq, hq]))
    assert scores.shape == (12,) and 0 <= scores.min() and scores.max() <= 1
    alone = torch.cat([judge(x[None]) for x in torch.cat([lq, hq])])
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)  # independent of the batch
    assert scores[:6].mean() < scores[6:].mean()
    assert not scores.requires_grad


def test_a_tensor_and_its_png_score_the_same(tmp_path, pairs):
    judge, image = load("judge"), pairs[0][0]
    write_image(tmp_path / "x.png", image)
    assert judge(image[None]).item() == pytest.approx(judge(read_image(tmp_path / "x.png")[None]).item(), abs=1e-6)


@pytest.mark.parametrize("size", ((40, 50), (64, 96), (130, 70)))
def test_judge_takes_any_size(size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert load("judge")(images).shape == (2,)


@pytest.mark.parametrize("name", list(JUDGES))
def test_built_judge_loads_by_from_pretrained_with_the_same_scores(name, tmp_path, pairs):
    judge = build_judge(JUDGES[name])
    judge.model.save_pretrained(tmp_path), judge.processor.save_pretrained(tmp_path)
    again = load(f"mllm:{tmp_path}")
    torch.testing.assert_close(judge(pairs[1]), again(pairs[1]), rtol=0, atol=1e-6)
    assert type(again.model).__module__.startswith("transformers.models")
    assert any(f.suffix == ".safetensors" for f in tmp_path.iterdir())


def test_level_words_must_be_single_tokens():
    tokenizer = reward.build_tokenizer()
    assert len(set(level_tokens(tokenizer))) == 5
    with pytest.raises(UserError, match="single"):
        level_tokens(tokenizer, ("splendid", "good"))


def test_scorer_reads_the_token_after_the_stem(pairs):
    judge = build_judge(JUDGES["judge"])
    assert judge.text.endswith("assistant\n" + reward.STEM) and reward.PROMPT in judge.text
    full = judge.model(**judge.inputs(pairs[1])).logits[:, -1]
    torch.testing.assert_close(judge.logits(pairs[1]), full, rtol=1e-5, atol=1e-5)


def test_whitened_patches_have_unit_variance(pairs):
    judge = build_judge(JUDGES["judge"])
    hq = grid_crops(photographs("train"), 64, 64, generator(0))[0]
    reward.whiten_patches(judge, hq)
    projection = judge.model.model.visual.patch_embed.proj
    patches = judge.inputs(hq)["pixel_values"]
    out = patches @ projection.weight.flatten(1).T + projection.bias
    covariance = torch.cov(out.T)
    top = covariance.diagonal()[:16]
    assert ((top - 1).abs() < 0.1).all() and (covariance - covariance.diagonal().diag()).abs().max() < 0.1


def test_ladder_falls_with_severity(gen):
    hq = grid_crops(photographs("val"), 24, 64, generator(0))[0]
    lq = degrade_sr(hq)[0]
    images, quality = ladder(hq, (hq + lq) / 2, lq, gen)
    assert images.shape == hq.shape and images.abs().max() <= 1 and 0.1 <= quality.min() and quality.max() <= 1
    error = (images - hq).flatten(1).std(1)
    assert torch.corrcoef(torch.stack([error.log(), quality]))[0, 1] < -0.3


def test_pyiqa_metrics_direction_and_batch(pairs):
    pytest.importorskip("pyiqa")
    lq, hq = pairs
    for name in ("ssim", "gmsd"):  # higher is better, lower is better
        metric = load(f"pyiqa:{name}")
        scores = metric(lq, hq)
        assert scores.shape == (6,) and (metric((lq + hq) / 2, hq) > scores).all()
    with pytest.raises(ValueError, match="reference"):
        metric(lq)


def test_unknown_rewards_are_one_line_errors(tmp_path):
    for name, words in (("nope", "unknown"), ("pyiqa:nope", "cannot be made"), (f"mllm:{tmp_path}", "cannot be loaded")):
        with pytest.raises(UserError, match=words) as error:
            load(name)
        assert "\n" not in str(error.value)


def test_symmetric_reward_does_not_depend_on_how_the_image_is_turned(gen):
    """Over all eight views: any turn of the image scores the same; a reward without reference gets none."""
    def corner(images, refs=None):
        return images[..., 0, 0].mean(1) + (0 if refs is None else refs[..., 0, 0].mean(1))
    images = torch.rand(2, 3, 8, 8, generator=gen)
    whole = symmetric(corner, 8)
    for turned in (images.flip(3), torch.rot90(images, 1, (2, 3)), torch.rot90(images.flip(2), 3, (2, 3))):
        torch.testing.assert_close(whole(turned), whole(images))
    corners = torch.stack([images[..., y, x].mean(1) for y in (0, -1) for x in (0, -1)]).mean(0)
    torch.testing.assert_close(whole(images), corners)
    torch.testing.assert_close(symmetric(corner, 2)(images, images), 2 * images[..., 0, [0, -1]].mean((1, 2)))
    assert symmetric(corner, 1) is corner
