"""Rewards: agreement with other implementations, judges of two model classes, errors."""

import math
import shutil
from pathlib import Path

import pytest
import skimage
import torch
import torch.nn.functional as F

import reward
from reward import JUDGES, RATE, WEIGHTS, load, parse_rating, views
from utils import UserError, read_image, to_uint8, write_image


@pytest.fixture(scope="module")
def pairs():
    """(lq, hq): six crops of a photograph, 64 x 64, and the same shrunk by 4."""
    photo = read_image(Path(skimage.__file__).parent / "data/chelsea.png")
    hq = torch.stack([photo[:, y:y + 64, x:x + 64] for y in (60, 124) for x in (100, 164, 228)])
    small = F.interpolate(hq, scale_factor=0.25, mode="area")
    return F.interpolate(small, scale_factor=4, mode="bicubic").clamp(-1, 1), hq


def fails(name, words):
    with pytest.raises(UserError, match=words) as error:
        load(name)
    assert "\n" not in str(error.value) and name.partition(":")[2] in str(error.value)


def test_psnr_and_ssim_equal_scikit_image(pairs):
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    x, y = (((images[1] + 1) / 2).permute(1, 2, 0).double().numpy() for images in pairs)
    luma_x, luma_y = (rgb2ycbcr(image)[..., 0] / 255 for image in (x, y))
    _, full = structural_similarity(x, y, channel_axis=2, data_range=1, gaussian_weights=True,
                                    sigma=1.5, use_sample_covariance=False, full=True)
    theirs = [peak_signal_noise_ratio(y, x, data_range=1),
              peak_signal_noise_ratio(luma_y, luma_x, data_range=1), full[5:-5, 5:-5].mean()]
    ours = [function(*pairs)[1].item() for function in (reward.psnr, reward.psnr_y, reward.ssim)]
    assert ours == pytest.approx(theirs, abs=1e-3)
    luma = reward.luma(pairs[0])[1, 0]  # with its offset of 16
    torch.testing.assert_close(luma, torch.from_numpy(luma_x).float(), atol=1e-5, rtol=0)
    assert reward.psnr(pairs[1], pairs[1]).tolist() == [100] * 6
    with pytest.raises(UserError, match="ssim: needs 11 x 11"):
        reward.ssim(pairs[0][..., :10], pairs[1][..., :10])


def test_views_are_the_symmetries_of_a_square_and_leave_out_nan(gen):
    def pixel(images, refs=None):
        return images[..., 0, 1].mean(1) + (0 if refs is None else refs[..., 0, 1].mean(1))
    images = torch.rand(2, 3, 8, 8, generator=gen)
    rows, columns = [0, 0, 1, 1, -2, -2, -1, -1], [1, -2, 0, -1, 0, -1, 1, -2]
    turned = images.mean(1)[:, rows, columns]  # (2, 8): where the symmetries put that pixel
    torch.testing.assert_close(views(pixel, 8)(images), turned.mean(1))
    torch.testing.assert_close(views(pixel, 2)(images, images), turned[:, 0] + turned[:, 1])
    images[0, :, 0, -2] = math.nan
    torch.testing.assert_close(views(pixel, 8)(images)[0], turned[0, [0, *range(2, 8)]].mean())
    images[0, :, 0, -2] = -math.inf  # no score either
    torch.testing.assert_close(views(pixel, 8)(images)[0], turned[0, [0, *range(2, 8)]].mean())
    with pytest.raises(UserError, match="one number for each image"):
        views(lambda x, refs: x.mean((1, 2)), 1)(images)


@pytest.mark.parametrize("name", ("judge", "judge2"))
def test_shipped_judges_keep_the_contract_and_have_a_gradient(name, pairs, tmp_path, gen):
    judge, images = load(name), torch.cat(pairs)
    scores = judge(images)
    assert scores.shape == (12,) and 0 <= scores.min() and scores.max() <= 1
    assert not scores.requires_grad and not judge.model.training
    assert scores[:6].mean() < scores[6:].mean() - 0.1
    judge.batch = 5
    torch.testing.assert_close(judge(images), scores, rtol=0, atol=1e-5)
    write_image(tmp_path / "x.png", images[0])
    torch.testing.assert_close(judge(read_image(tmp_path / "x.png")[None]), judge(images[:1]))
    pixels = to_uint8(images[:5])  # their tokens are known
    assert pixels.shape in judge.tokens
    expected = judge.processor(text=[judge.text] * 5, images=[[x] for x in pixels],
                               return_tensors="pt")
    assert all(x.equal(expected[key]) for key, x in judge.inputs(pixels).items())
    large = torch.rand(2, 3, 130, 200, generator=gen) * 2 - 1  # the mean over centred tiles
    tiles = [large[:, :, y:y + 64, x:x + 64] for y in (1, 65) for x in (4, 68, 132)]
    torch.testing.assert_close(judge(large), torch.stack([judge(tile) for tile in tiles]).mean(0))
    torch.testing.assert_close(judge.scores(large), judge(large), atol=0.03, rtol=0)
    images = images[:2].requires_grad_()
    scores = views(judge.scores, 2)(images)
    torch.testing.assert_close(scores.detach(), views(judge, 2)(images), atol=0.03, rtol=0)
    gradient, = torch.autograd.grad(scores.sum(), images)
    step = 0.004 * gradient / gradient.norm()
    assert (views(judge.scores, 2)(images + step) > scores).all()


def test_equals_the_qrealign_of_pyiqa_on_the_same_folder(gen):
    """pyiqa truncates to 8 bits, so it gets the middle of each level."""
    import pyiqa
    theirs = pyiqa.create_metric("qrealign", model=str(WEIGHTS / "judge"), dtype=torch.float32,
                                 device=torch.device("cpu"))
    images = torch.rand(3, 3, 80, 100, generator=gen) * 2 - 1
    expected = theirs((to_uint8(images) + 0.5).div(255).clamp(max=1))
    ours = load(f"qrealign-mini:{WEIGHTS / 'judge'}")(images)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert ours.std() > 1e-4


def test_q_sit_scores_as_its_authors_do(tmp_path, gen):
    """A tiny LLaVA-OneVision: level words behind a stem that ends with a space, the image last."""
    import transformers as tf
    own = tf.AutoProcessor.from_pretrained(WEIGHTS / "judge")
    words = [*JUDGES["q-sit"]["levels"], "<image>", "<video>"]
    own.tokenizer.add_tokens(words, special_tokens=True)
    ids = own.tokenizer.convert_tokens_to_ids(words)
    grid = {"image_grid_pinpoints": [[28, 28], [56, 56]]}
    tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, **grid), own.tokenizer,
        tf.LlavaOnevisionVideoProcessor(), num_image_tokens=4,
        chat_template=own.chat_template.replace("<|image_pad|>", "<image>"),
        vision_feature_select_strategy="full").save_pretrained(tmp_path)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    eye = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    tf.LlavaOnevisionForConditionalGeneration(tf.LlavaOnevisionConfig(
        vision_config=tiny | eye | {"vision_use_head": False}, video_token_index=ids[6], **grid,
        text_config=tiny | {"model_type": "qwen2", "vocab_size": len(own.tokenizer)},
        image_token_index=ids[5])).save_pretrained(tmp_path)
    judge, images = load(f"q-sit:{tmp_path}"), torch.rand(2, 3, 64, 90, generator=gen) * 2 - 1
    assert "image?<|vision_start|><image>" in judge.text and judge.text.endswith("this image is ")
    expected = []
    for image in images:  # each on its own
        inputs = judge.processor(images=to_uint8(image), text=judge.text, return_tensors="pt")
        p = judge.model(**inputs).logits[0, -1, ids[:5]].softmax(0).detach()
        expected.append(p[0] + 0.75 * p[1] + 0.5 * p[2] + 0.25 * p[3])
    expected = torch.stack(expected)
    torch.testing.assert_close(judge(images), expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-6 and judge.tokens  # which the next batch of this shape uses
    torch.testing.assert_close(judge(images.flip(0)), expected.flip(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form, rating, texts", (
    ("json", 3.25, ['<think>{2 of 5}</think>{"rating": 3.25}', '{\n "rating": 3.25\n}']),
    ("json", None, ['{"rating": 5.01}', '{"rating": "good"}', "3.5", '{"score": 3}',
                    '<think>{"rating": 3}', '{"rating": 3} {"rating": "x"}']),
    ("answer", 5, ["<think><answer>1</answer></think>\n<answer> 5.0 </answer>"]),
    ("answer", None, ["<answer>0.5</answer>", "<answer>4/5</answer>", "<answer>-3</answer>"])))
def test_ratings_are_parsed_strictly(form, rating, texts):
    for text in texts:
        value = parse_rating(text, form)
        assert math.isnan(value) if rating is None else value == rating, text


def test_a_judge_that_reasons(tmp_path, monkeypatch, capsys):
    shutil.copytree(WEIGHTS / "judge2", tmp_path / JUDGES["q-insight"]["subfolder"])
    monkeypatch.setitem(JUDGES["q-insight"], "source", str(tmp_path))
    judge, images = load("q-insight"), torch.zeros(3, 3, 64, 64)
    assert judge.text.index(RATE) < judge.text.index("image_pad")
    settings = judge.model.generation_config
    assert settings.do_sample is False and settings.max_new_tokens == 1024
    settings.max_new_tokens = 4
    assert judge(images).isnan().all() and capsys.readouterr().err.count("no rating") == 3
    answers = '<think>good</think>{"rating": 4.5}', '{"rating": 2}', "no idea"
    tokens = iter([judge.processor.tokenizer(text)["input_ids"] for text in answers])
    judge.batch, judge.model.generate = 1, lambda input_ids, **inputs: torch.cat(
        [input_ids, torch.tensor([next(tokens)])], 1)
    scores = judge(images)  # of the new tokens only
    assert scores[:2].tolist() == [4.5, 2.0] and scores[2].isnan()
    assert "no idea" in capsys.readouterr().err


def test_broken_folders_and_unsafe_names_are_one_line_errors(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = shutil.copytree(WEIGHTS / "judge", tmp_path / "judge")
    whole = load_file(folder / "model.safetensors")
    kept = {key: x for key, x in whole.items() if "norm1" not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    fails(f"mllm:{folder}", "its weights lack")
    (folder / "model.safetensors").unlink()
    torch.save(whole, folder / "pytorch_model.bin")  # complete, but refused
    fails(f"mllm:{folder}", "cannot be used")
    for name, words in (("nope", "unknown"), ("nope:x", "unknown"), ("mllm", "mllm:FOLDER"),
                        ("qrealign-mini", "a network"),
                        ("pyiqa:nope", "list_models"), ("pyiqa:piqe", "noise")):
        fails(name, words)
    monkeypatch.setitem(JUDGES["judge"], "levels", ("splendid", "good"))
    fails("judge", "single, different")


def test_pyiqa_metrics_rise_with_quality_and_are_ready_with_weights(pairs, monkeypatch, tmp_path):
    lq, hq = pairs
    for name, sign in (("ssim", 1), ("gmsd", -1)):
        metric = load(f"pyiqa:{name}")
        scores = metric(lq, hq)
        assert metric.sign == sign and (scores * sign > 0).all()
        assert (metric((lq + hq) / 2, hq) > scores).all()
    with pytest.raises(UserError, match="give references"):
        metric(lq)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for file in reward.FILES["lpips"]:
        assert not reward.ready("lpips")
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    assert reward.ready("lpips") and reward.ready("psnr")


def test_pyiqa_metrics_compute_without_tf32(pairs, monkeypatch):
    metric, seen = load("pyiqa:gmsd"), []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    metric.metric.net.register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    expected = -metric.metric(*[(x + 1) / 2 for x in pairs])
    torch.testing.assert_close(metric(*pairs), expected)
    assert seen == [True, False]  # by pyiqa's wrapper it is switched on


def test_the_script_prints_a_table(tmp_path, pairs, command, capsys):
    files = tmp_path / "lq.png", tmp_path / "hq.png"
    for file, images in zip(files, pairs):
        write_image(file, images[0])
    command(reward, files[0], "--metric", "psnr", "--ref", files[1])
    score = float(capsys.readouterr().out.split()[2])
    assert score == pytest.approx(reward.psnr(*pairs)[0].item(), abs=0.1)
