"""Rewards: the contract, agreement with other implementations, the MLLM scorer and its training data."""

import json
import logging
import math
import shutil
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT

import reward
from data import degrade_sr, grid_crops, photographs
from reward import (JUDGES, MODELS, RATE, WeightedSum, build_judge, expected_level, ladder, level_tokens, load,
                    parse_rating, soft_label, symmetric, terms)
from utils import UserError, generator, read_image, write_image

QWEN35 = dict(  # the architecture of Q-ReAlign, hybrid attention and all, with random weights
    model_type="qwen3_5", processor="Qwen3VLProcessor", video="Qwen3VLVideoProcessor", seed=3, tie=True,
    vision=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=128,
                num_position_embeddings=64, initializer_range=0.1),
    text=dict(head_dim=32, initializer_range=0.1, num_hidden_layers=4, linear_key_head_dim=16, linear_value_head_dim=16,
              linear_num_key_heads=4, linear_num_value_heads=8,
              layer_types=["linear_attention"] * 3 + ["full_attention"],
              rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5,
                                   mrope_section=[3, 3, 2], mrope_interleaved=True)))


@pytest.fixture(scope="module")
def pairs():
    hq = grid_crops(photographs("val"), 6, 64, generator(0))[0]
    return degrade_sr(hq)[0], hq


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random models as users have them, one folder each: Qwen3.5 for level words, Qwen2.5-VL for answers."""
    result = {}
    for name, recipe in (("levels", QWEN35), ("answers", JUDGES["judge2"])):
        judge, result[name] = build_judge(recipe), tmp_path_factory.mktemp("judges") / name
        judge.processor.chat_template = judge.processor.chat_template.replace(  # as Qwen2.5-VL has it
            "<|vision_start|>", "{% if add_vision_id %}Picture 1: {% endif %}<|vision_start|>")
        judge.model.save_pretrained(result[name]), judge.processor.save_pretrained(result[name])
    return result


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def random_images(count, height, width, seed=0):
    """Images on the 8-bit grid, as files hold them."""
    levels = torch.randint(256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels / 127.5 - 1


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


def test_level_words_must_be_single_different_tokens(folders):
    tokenizer = reward.build_tokenizer()
    assert level_tokens(tokenizer) == [tokenizer(" " + word)["input_ids"][0] for word in reward.LEVELS]
    assert len(set(level_tokens(tokenizer))) == 5
    for levels in (("splendid", "good"), ("good", "good"), ("good",)):
        with pytest.raises(UserError, match="single, different") as error:
            load(f"mllm:{folders['levels']}", levels=levels)
        assert "\n" not in str(error.value) and str(folders["levels"]) in str(error.value)
    with pytest.raises(UserError, match="unlike splendid;"):
        level_tokens(tokenizer, ("splendid", "good"))


@pytest.mark.parametrize("size", ((64, 64), (80, 100), (30, 200)))
def test_equals_the_qrealign_of_pyiqa_on_the_same_folder(size, folders):
    """pyiqa truncates to 8 bits, so it gets the middle of each level."""
    pyiqa = pytest.importorskip("pyiqa")
    theirs = pyiqa.create_metric("qrealign", model=str(folders["levels"]), dtype=torch.float32,
                                 device=torch.device("cpu"))
    images = random_images(3, *size)
    expected = theirs((((images + 1) * 127.5).round() + 0.5).div(255).clamp(max=1))
    ours = load(f"qrealign-mini:{folders['levels']}")(images)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert ours.std() > 1e-4


def test_two_sizes_in_one_batch_score_as_alone(folders):
    judge = load(f"mllm:{folders['levels']}?batch=2")
    images = [*random_images(3, 64, 64), *random_images(2, 48, 112, seed=1)]
    images = [images[i] for i in (0, 3, 1, 4, 2)]
    scores = judge(images)
    assert scores.shape == (5,) and not scores.requires_grad and judge.model.training is False
    torch.testing.assert_close(scores, torch.cat([judge(x[None]) for x in images]), rtol=0, atol=1e-6)
    both = symmetric(judge, 2)(images)
    torch.testing.assert_close(both[1], symmetric(judge, 2)(images[1][None])[0], rtol=0, atol=1e-6)


def test_other_families_are_judges_too(tmp_path):
    """Gemma 3: one fixed size, an image token of its own, another layout of the chat."""
    import transformers as tf
    plain = json.loads(reward.build_tokenizer().backend_tokenizer.to_str())["model"]
    tokenizer = tf.Qwen2Tokenizer(
        vocab=plain["vocab"], merges=[tuple(m) for m in plain["merges"]], eos_token="<|im_end|>",
        pad_token="<|endoftext|>", extra_special_tokens={
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"})
    tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3)
    model = tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(
        mm_tokens_per_image=4, image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id, initializer_range=0.3, vision_config=dict(
            image_size=56, patch_size=14, **tiny), text_config=dict(
            vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16, pad_token_id=0, **tiny)))
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # it starts at zero
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessor(size=dict(height=56, width=56)), tokenizer, image_seq_length=4,
        chat_template="{% for c in messages[0].content %}{{ '<start_of_image>' if c.type == 'image' else c.text }}"
                      "{% endfor %} model: ")
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    judge, images = load(f"mllm:{tmp_path}"), [*random_images(2, 64, 80), *random_images(2, 90, 40)]
    scores = judge(images)
    assert scores.shape == (4,) and scores.std() > 0
    torch.testing.assert_close(scores, torch.cat([judge(x[None]) for x in images]), rtol=0, atol=1e-6)


def test_prompt_stem_levels_and_values_are_options(folders):
    images, source = random_images(2, 64, 64), f"mllm:{folders['levels']}"
    plain, asked = load(source), load(source + "?prompt=Rate it, please%26thanks&stem=The quality is")
    assert "Rate it, please&thanks" in asked.text and asked.text.endswith("The quality is")
    assert (plain(images) != asked(images)).all()
    swapped = load(source, levels="bad,poor,fair,good,excellent", values="0,.25,.5,.75,1")
    torch.testing.assert_close(swapped(images), plain(images))
    two = load(source, levels=("good", "bad"))
    assert two.values == (1.0, 0.0) and load(source + "?stem=&levels=a,b").text.endswith("assistant\n")
    assert load(source + "?dtype=bfloat16").model.dtype == torch.bfloat16
    torch.testing.assert_close(load(source, dtype="bfloat16")(images), plain(images), rtol=0, atol=0.05)
    for bad in ("?values=1,0", "?levels=good,bad&values=a,b", "?colour=red", "?dtype=int8", "?batch=x"):
        with pytest.raises(UserError):
            load(source + bad)
    with pytest.raises(UserError, match="takes no prompt"):
        load("psnr", prompt="How good?")


def test_a_judge_can_be_pinned_to_a_revision(monkeypatch):
    import transformers
    asked = []

    def from_pretrained(source, **options):
        asked.append((source, options["revision"]))
        raise OSError("stop here")
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", from_pretrained)
    for name in ("mllm:someone/judge?revision=abc", "mllm:someone/judge"):
        with pytest.raises(UserError, match="stop here"):
            load(name)
    assert asked == [("someone/judge", "abc"), ("someone/judge", "main")]


THINK = "<think>The {sky} is 2 of 5 <answer>1</answer></think>"


@pytest.mark.parametrize("form, text, rating", (
    ("json", THINK + '<answer>{"rating": 3.25}</answer>', 3.25), ("json", '```json\n{"rating": 4}\n```', 4),
    ("json", '{"rating": 5.01}', None), ("json", '{"rating": "good"}', None), ("json", '{"rating": NaN}', None),
    ("json", '{"rating": true}', None), ("json", '{"score": 3}', None), ("json", '{"rating": 3} {"rating": 4}', None),
    ("json", "3.5", None), ("json", '<think>{"rating": 3}', None), ("json", "", None), ("json", '{"rating": 3', None),
    ("answer", THINK + "\n<answer> 4.5 </answer>", 4.5), ("answer", "<answer>1</answer>", 1),
    ("answer", "<answer>0.5</answer>", None), ("answer", "<answer>4/5</answer>", None), ("answer", "4.5", None),
    ("answer", "<answer>-3</answer>", None), ("answer", "<answer>3</answer><answer>4</answer>", None),
    ("answer", "<answer>3</answer> or <answer>poor</answer>", None), ("answer", "<think><answer>3</answer>", None)))
def test_ratings_are_parsed_strictly(form, text, rating):
    value = parse_rating(text, form)
    assert math.isnan(value) if rating is None else value == rating


@pytest.mark.parametrize("name", ("q-insight", "visualquality-r1"))
def test_rating_judges_generate_greedily_and_report_what_they_cannot_parse(name, folders, caplog):
    judge = load(f"{name}:{folders['answers']}", tokens=6)
    images = [*random_images(2, 64, 64), *random_images(1, 48, 112, seed=1)]
    texts = judge.answers(torch.stack(images[:2]))
    assert texts == judge.answers(torch.stack(images[:2])) == [judge.answers(x[None])[0] for x in images[:2]]
    assert judge.model.generation_config.do_sample is False and RATE in judge.text
    with caplog.at_level(logging.WARNING):
        scores = judge(images)  # random weights write nonsense
    assert scores.shape == (3,) and scores.isnan().all() and judge.unparsed == 3
    assert "3 of 3 answers" in caplog.text and repr(texts[0][-200:]) in caplog.text


@pytest.mark.parametrize("name, answers", (
    ("q-insight", ('<think>good</think>{"rating": 4.5}', '{"rating": 2}', "no idea")),
    ("visualquality-r1", ("<think>good</think><answer>4.5</answer>", "<answer>2.00</answer>", "4.5"))))
def test_rating_judges_read_the_new_tokens_only(name, answers, folders, monkeypatch, caplog):
    judge = load(f"{name}:{folders['answers']}")
    tokens = iter([judge.processor.tokenizer(text)["input_ids"] for text in answers])

    def generate(input_ids, **inputs):
        return torch.cat([input_ids, torch.tensor([next(tokens)])], 1)
    monkeypatch.setattr(judge.model, "generate", generate)
    judge.batch = 1
    scores = judge(random_images(3, 64, 64))
    assert scores[:2].tolist() == [4.5, 2.0] and scores[2].isnan() and judge.unparsed == 1
    assert f"first image 2: ...{answers[2]!r}" in caplog.text
    image_first = judge.text.index(RATE) > judge.text.index("image_pad")
    assert image_first == ("Picture 1: <|vision_start|>" in judge.text) == (name == "visualquality-r1")


def test_q_insight_lies_in_a_subfolder(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["answers"], tmp_path / "score_degradation")
    monkeypatch.setitem(MODELS["q-insight"], "source", str(tmp_path))
    assert load("q-insight").text.startswith("<|im_start|>system")


def test_names_are_split_at_the_plus_of_a_sum_only():
    assert terms("qrealign-mini+0.5*pyiqa:musiq") == [(1, "qrealign-mini"), (0.5, "pyiqa:musiq")]
    assert terms("pyiqa:clipiqa+") == [(1, "pyiqa:clipiqa+")]
    assert terms("pyiqa:clipiqa++.25*pyiqa:clipiqa+_rn50_512+2*psnr") == [
        (1, "pyiqa:clipiqa+"), (0.25, "pyiqa:clipiqa+_rn50_512"), (2, "psnr")]
    assert terms("mllm:/a+b?prompt=good+psnr value+judge2") == [(1, "mllm:/a+b?prompt=good+psnr value"), (1, "judge2")]


def toy_sum():
    """Two terms on scales far apart; the second gives NaN for dark images."""
    def second(images, refs=None):
        x = 1000 + 50 * images.std((1, 2, 3))
        return torch.where(images.mean((1, 2, 3)) < -0.5, math.nan, x)
    return WeightedSum([(1.0, "mean", lambda images, refs=None: images.mean((1, 2, 3))), (0.5, "std", second)])


def test_sum_z_scores_its_terms_with_statistics_that_calls_do_not_change(gen):
    total, images = toy_sum(), torch.rand(12, 3, 8, 8, generator=gen)
    raw = total.observe(images)
    total.update()
    z = (raw - raw.mean(1, keepdim=True)) / (raw.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(total(images), z[0] + 0.5 * z[1], rtol=1e-3, atol=1e-3)
    scores = total(images)
    torch.testing.assert_close(torch.cat([total(x[None]) for x in images.flip(0)]).flip(0), scores, rtol=0, atol=0)
    total.update()  # seen again in between, and one by one
    torch.testing.assert_close(total(images), scores, rtol=0, atol=0.3)
    assert total.known[0, 0] == 48 and not torch.equal(total(images), scores)
    total.freeze()
    fixed = total(images)
    total.observe(-images), total.update()
    torch.testing.assert_close(total(images[:5]), fixed[:5], rtol=0, atol=0)


def test_first_call_of_a_sum_sets_the_scale_and_stays(gen):
    total, images = toy_sum(), torch.rand(6, 3, 8, 8, generator=gen)
    with pytest.raises(ValueError, match="two images"):
        toy_sum()(images[:1])
    first = total(images)
    assert first.mean().abs() < 1e-5 and total.known[0, 0] == 6
    torch.testing.assert_close(total(images[2:4]), first[2:4], rtol=0, atol=0)


def test_sum_keeps_nan_out_of_its_statistics_and_in_its_scores(gen):
    total, images = toy_sum(), torch.rand(6, 3, 8, 8, generator=gen)
    images[2] = -1
    scores = total(images)
    assert scores.isnan().tolist() == [i == 2 for i in range(6)]
    assert total.known[:, 0].tolist() == [6, 5] and total.known.isfinite().all()


def test_sum_is_restored_from_json_and_adds_up_over_processes(gen):
    images = torch.rand(8, 3, 8, 8, generator=gen)
    whole, parts = toy_sum(), (toy_sum(), toy_sum())
    whole.observe(images), whole.update()
    for part, x in zip(parts, images.split(5)):
        part.observe(x)
    pending = parts[0].pending + parts[1].pending
    for part in parts:
        part.update(lambda own: pending)
        torch.testing.assert_close(part(images), whole(images))
    whole.freeze()
    again = toy_sum()
    again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert again.frozen and torch.equal(again(images), whole(images))
    with pytest.raises(UserError, match="not of this sum"):
        WeightedSum([(1.0, "mean", None)]).load_state_dict(whole.state_dict())


def test_load_makes_sums(pairs, folders):
    lq, hq = pairs
    total = load(f"judge+.5*mllm:{folders['levels']}?levels=good,bad+2*psnr")
    assert total.weights == (1, 0.5, 2) and total.rewards[1].values == (1, 0)
    scores = total(torch.cat([lq, hq]), torch.cat([hq, hq]))
    assert scores.shape == (12,) and scores[:6].mean() < scores[6:].mean()
    with pytest.raises(UserError, match="behind their term"):
        load("judge+psnr", prompt="How good?")


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
    images, quality = ladder(hq, (hq + lq) / 2, lq, torch.ones(24), gen)
    assert images.shape == hq.shape and images.abs().max() <= 1 and 0.1 <= quality.min() and quality.max() <= 1
    error = (images - hq).flatten(1).std(1)
    assert torch.corrcoef(torch.stack([error.log(), quality]))[0, 1] < -0.3


def test_mild_damage_stands_higher_on_the_ladder(gen):
    hq = grid_crops(photographs("val"), 24, 64, generator(0))[0]
    lq = degrade_sr(hq)[0]
    worst, mild = (ladder(hq, (hq + lq) / 2, lq, torch.full((24,), s), generator(5)) for s in (1.0, 0.0))
    assert torch.equal(worst[0], mild[0])  # the same images
    assert (mild[1] >= worst[1]).all() and (mild[1] > worst[1]).any()


def test_a_restoration_stands_as_high_on_the_ladder_as_its_ssim_says(gen):
    hq = grid_crops(photographs("val"), 64, 64, generator(0))[0]
    lq, rungs, qualities = degrade_sr(hq)[0], {}, {}
    for name, restored in (("perfect", hq), ("bad", hq.flip(0))):
        rungs[name], qualities[name] = ladder(hq, restored, lq, torch.ones(64), generator(5))
    same = (rungs["perfect"] == hq).flatten(1).all(1)  # rungs between hq and a perfect restoration
    assert same.sum() >= 8 and (qualities["perfect"][same] == 1).all()
    assert (qualities["bad"][same] < 1).all() and 0.5 <= qualities["bad"][same].min() < 0.6
    damaged = rungs["perfect"] != rungs["bad"]
    worse = damaged.flatten(1).any(1) & ~same  # rungs between a restoration and lq
    assert worse.sum() >= 8 and (qualities["bad"][worse] < qualities["perfect"][worse]).all()
    assert qualities["perfect"][worse].min() >= 0.1


def test_judge_data_shares_crops_out_among_tasks_and_a_judge_trains_on_them(tmp_path, tiny_restorer, gen):
    tiny_restorer().save(tmp_path / "restorer")
    common = dict(tasks=["sr", "denoise50", "derain"], model=str(tmp_path / "restorer"))
    hq, restored, lq, severity = reward.judge_data("train", 9, 64, gen, **common)
    assert restored.shape == lq.shape == hq.shape == (9, 3, 64, 64) and not torch.equal(restored, lq)
    assert (severity[0::3] == 1).all()
    torch.testing.assert_close(severity[1::3], torch.full((3,), 45 / 70))
    torch.testing.assert_close(lq[0::3], degrade_sr(hq[0::3])[0])
    noise = (lq - hq)[1::3].flatten(1).std(1) / 2 * 255
    assert ((noise > 35) & (noise < 55)).all()
    start = reward.TrainConfig(start=str(ROOT / "weights/judge"), out=str(tmp_path / "judge"), steps=2, batch=4, pool=6,
                               **common)
    reward.train_judge(start)
    before, after = (load(f"mllm:{folder}")(hq) for folder in (ROOT / "weights/judge", tmp_path / "judge"))
    assert 0 < (after - before).abs().max() < 0.2


def test_pyiqa_metrics_direction_and_batch(pairs):
    pytest.importorskip("pyiqa")
    lq, hq = pairs
    for name in ("ssim", "gmsd"):  # higher is better, lower is better
        metric = load(f"pyiqa:{name}")
        scores = metric(lq, hq)
        assert scores.shape == (6,) and (metric((lq + hq) / 2, hq) > scores).all()
    with pytest.raises(ValueError, match="reference"):
        metric(lq)


def damage(folder, tmp_path, name):
    """A copy of a judge's folder with one thing wrong."""
    from safetensors.torch import load_file, save_file
    copy = tmp_path / name
    shutil.copytree(folder, copy)
    if name == "key":
        weights = load_file(copy / "model.safetensors")
        save_file({k: v for k, v in weights.items() if "norm1" not in k}, copy / "model.safetensors", {"format": "pt"})
    elif name == "truncated":
        (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    elif name == "template":
        (copy / "chat_template.jinja").unlink()
    else:
        (copy / name).unlink()
    return copy


@pytest.mark.parametrize("name", ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json",
                                  "key", "truncated", "template"))
def test_incomplete_folders_are_one_line_errors(name, folders, tmp_path, offline):
    copy = damage(folders["levels"], tmp_path, name)
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load(f"mllm:{copy}")
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_models_that_are_no_judges_are_one_line_errors(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, GPT2Config, GPT2LMHeadModel
    tokenizer = reward.build_tokenizer()
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=512)).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    tiny = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    CLIPModel(CLIPConfig(text_config=tiny, vision_config=tiny)).save_pretrained(tmp_path / "clip")
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(tmp_path / "clip")
    for name in ("text", "clip"):
        with pytest.raises(UserError, match="no image-text model") as error:
            load(f"mllm:{tmp_path / name}")
        assert "\n" not in str(error.value)


def test_unknown_rewards_are_one_line_errors(tmp_path, offline):
    for name, words in (("nope", "unknown"), ("judge+nope", "unknown"), ("mllm", "unknown"), ("pyiqa:", "unknown"),
                        ("pyiqa:nope", "list_models"), (f"mllm:{tmp_path}", "cannot be loaded"),
                        ("mllm:/no/where", "no such folder"), ("mllm:~/no/where", "no such folder"),
                        ("mllm:some/model", "machine with network"), ("qrealign-mini", "machine with network"),
                        ("q-insight", "machine with network")):
        with pytest.raises(UserError, match=words) as error:
            load(name)
        assert "\n" not in str(error.value)


def test_qalign_says_all_that_it_lacks(monkeypatch):
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="trust-remote-code.*icecream.*network.*16 GB"):
        load("qalign")
    with pytest.raises(UserError, match="needs pip install icecream"):
        load("pyiqa:qalign_4bit", trust_remote_code=True)


def test_too_little_memory_is_a_one_line_error(folders, monkeypatch):
    def no_room(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    monkeypatch.setattr(torch.nn.Module, "to", no_room)
    with pytest.raises(UserError, match="not enough memory on cpu"):
        load(f"mllm:{folders['levels']}")
    with pytest.raises(UserError, match="not enough memory"):
        load("pyiqa:ssim")


def test_code_of_a_model_runs_only_when_allowed(folders, tmp_path, monkeypatch, capsys):
    import transformers.dynamic_module_utils
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "cache"), *sys.path])
    folder = tmp_path / "own"
    shutil.copytree(folders["levels"], folder)
    (folder / "own.py").write_text(
        "from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class OwnConfig(Qwen3_5Config):\n    model_type = 'own_vl'\n"
        "class OwnModel(Qwen3_5ForConditionalGeneration):\n    config_class = OwnConfig\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_vl", "auto_map": {"AutoConfig": "own.OwnConfig",
                                                    "AutoModelForImageTextToText": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--trust-remote-code"):
        load(f"mllm:{folder}")
    assert not (tmp_path / "ran").exists()
    judge = load(f"mllm:{folder}", trust_remote_code=True)
    assert "warning: --trust-remote-code" in capsys.readouterr().err and (tmp_path / "ran").exists()
    images = random_images(2, 64, 64)
    torch.testing.assert_close(judge(images), load(f"mllm:{folders['levels']}")(images))


def test_score_takes_its_flags_and_sums(tmp_path, folders, capsys):
    from utils import parse
    for index, image in enumerate([*random_images(2, 64, 64), *random_images(1, 48, 80, seed=2)]):
        write_image(tmp_path / f"{index}.png", image)
    files = [str(tmp_path / f"{index}.png") for index in range(3)]

    def table(*flags, files=files):
        reward.score(*parse(reward.ScoreConfig, [*files, "--device", "cpu", *flags], positional="image files"))
        return [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[1:]]
    source, images = f"mllm:{folders['levels']}", [read_image(file) for file in files]
    flags = ("--prompt", "How good?", "--stem", "It is", "--levels", "good,bad", "--values", "3,1")
    expected = load(source, prompt="How good?", stem="It is", levels="good,bad", values="3,1")(images)
    assert table("--metric", source, *flags, "--dtype", "float32") == pytest.approx(expected.tolist(), abs=1e-4)
    assert "s an image" not in capsys.readouterr().out  # the time is no row of the table
    total = table("--metric", f"judge+0.5*{source}")
    assert sum(total) == pytest.approx(0, abs=1e-3) and max(total) > 0
    assert math.isnan(table("--metric", f"q-insight:{folders['answers']}?tokens=2", files=files[:1])[0])
    with pytest.raises(UserError, match="needs --ref"):
        table("--metric", "judge+psnr")
    with pytest.raises(UserError, match="two or more"):
        table("--metric", f"judge+{source}", files=files[:1])


@pytest.mark.parametrize("name", ("judge", "judge2"))
def test_the_gradient_of_a_judge_is_that_of_a_finite_difference(name, gen):
    """On an image without details smaller than a patch, whose scores without and with rounding agree."""
    judge = load(name)
    judge.model.requires_grad_(False)
    images = torch.nn.functional.interpolate(torch.rand(2, 3, 16, 16, generator=gen) * 1.6 - 0.8, size=(64, 64))
    images.requires_grad_()
    scores = judge.differentiable(images)
    torch.testing.assert_close(scores.detach(), judge(images.detach()), atol=3e-3, rtol=0)
    gradient, = torch.autograd.grad(scores.sum(), images)
    step = 0.004 * gradient / gradient.norm()
    with torch.no_grad():
        gained = judge.differentiable(images + step) - judge.differentiable(images - step)
    assert gained.sum() == pytest.approx(0.008 * gradient.norm().item(), rel=0.1) and (gained > 0).all()


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
