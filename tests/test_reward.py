"""Rewards: agreement with other implementations, judges of three model classes, errors."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
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


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def noise(count, height, width):
    """Images on the 8-bit grid, as files hold them."""
    gen = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, height, width), generator=gen) / 127.5 - 1


def fails(name, words):
    with pytest.raises(UserError, match=words) as error:
        load(name)
    assert "\n" not in str(error.value) and name.partition(":")[2] in str(error.value)


def test_psnr_and_ssim_equal_scikit_image(pairs):
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    ours = torch.stack([function(*pairs) for function in (reward.psnr, reward.psnr_y, reward.ssim)])
    for i in range(6):
        x, y = (((v[i] + 1) / 2).permute(1, 2, 0).double().numpy() for v in pairs)
        luma_x, luma_y = (rgb2ycbcr(v)[..., 0] / 255 for v in (x, y))
        _, full = structural_similarity(x, y, channel_axis=2, data_range=1, gaussian_weights=True,
                                        sigma=1.5, use_sample_covariance=False, full=True)
        theirs = [peak_signal_noise_ratio(y, x, data_range=1),
                  peak_signal_noise_ratio(luma_y, luma_x, data_range=1), np.mean(full[5:-5, 5:-5])]
        assert ours[:, i].tolist() == pytest.approx(theirs, abs=1e-3)
    assert reward.psnr(pairs[1], pairs[1]).tolist() == [100] * 6
    ends = reward.luma(torch.tensor([-1.0, 1]).view(2, 1, 1, 1).expand(2, 3, 1, 1)).flatten()
    torch.testing.assert_close(ends * 255, torch.tensor([16.0, 235]))


def test_views_do_not_depend_on_how_the_image_is_turned(gen):
    def corner(images, refs=None):
        return images[..., 0, 0].mean(1) + (0 if refs is None else refs[..., 0, 0].mean(1))
    images = torch.rand(2, 3, 8, 8, generator=gen)
    whole = views(corner, 8)
    for turned in (images.flip(3), torch.rot90(images, 1, (2, 3)), images.transpose(2, 3)):
        torch.testing.assert_close(whole(turned), whole(images))
    corners = torch.stack([images[..., y, x].mean(1) for y in (0, -1) for x in (0, -1)])
    torch.testing.assert_close(whole(images), corners.mean(0))
    torch.testing.assert_close(views(corner, 1)(images), corners[0])
    torch.testing.assert_close(views(corner, 2)(images, images), corners[0] + corners[1])
    shy = views(lambda x, refs: torch.where(x[:, 0, 0, 0] < 0, math.nan, x[:, 0, 0, 0]), 8)
    images[0, 0, 0, -1] = -1  # a corner whose views score NaN
    kept = images[:, 0, [0, -1, -1], [0, 0, -1]].mean(1)
    torch.testing.assert_close(shy(images)[0], kept[0])
    assert shy(-images.abs()).isnan().all()


@pytest.mark.parametrize("name", ("judge", "judge2"))
def test_shipped_judges_keep_the_contract_and_have_a_gradient(name, pairs, tmp_path, gen):
    judge, images = load(name), torch.cat(pairs)
    scores = judge(images)
    assert scores.shape == (12,) and 0 <= scores.min() and scores.max() <= 1
    assert not scores.requires_grad and not judge.model.training
    assert scores[:6].mean() < scores[6:].mean() - 0.2
    judge.batch = 5
    torch.testing.assert_close(judge(images), scores, rtol=0, atol=1e-5)
    write_image(tmp_path / "x.png", images[0])
    torch.testing.assert_close(judge(read_image(tmp_path / "x.png")[None]), judge(images[:1]))
    coarse = torch.rand(2, 3, 16, 16, generator=gen) * 1.6 - 0.8
    images = to_uint8(F.interpolate(coarse, size=(64, 64))) / 127.5 - 1
    images.requires_grad_()
    scores = judge.scores(images)
    torch.testing.assert_close(scores.detach(), judge(images), atol=1e-4, rtol=0)
    gradient, = torch.autograd.grad(scores.sum(), images)
    step = 0.004 * gradient / gradient.norm()
    gained = (judge.scores(images + step) - judge.scores(images - step)).detach()
    assert gained.sum().item() == pytest.approx(0.008 * gradient.norm().item(), rel=0.1)
    assert (gained > 0).all() and views(judge.scores, 2)(images).requires_grad


@pytest.mark.parametrize("size", ((64, 64), (80, 100), (30, 200)))
def test_equals_the_qrealign_of_pyiqa_on_the_same_folder(size):
    """pyiqa truncates to 8 bits, so it gets the middle of each level."""
    import pyiqa
    theirs = pyiqa.create_metric("qrealign", model=str(WEIGHTS / "judge"), dtype=torch.float32,
                                 device=torch.device("cpu"))
    images = noise(3, *size)
    expected = theirs((to_uint8(images) + 0.5).div(255).clamp(max=1))
    ours = load(f"qrealign-mini:{WEIGHTS / 'judge'}")(images)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert ours.std() > 1e-4


def test_q_sit_scores_as_its_authors_do(tmp_path):
    """A tiny LLaVA-OneVision: level words behind a stem that ends with a space, the image last."""
    import transformers as tf
    own = tf.AutoProcessor.from_pretrained(WEIGHTS / "judge")
    words = [*JUDGES["q-sit"]["levels"], "<image>", "<video>"]
    own.tokenizer.add_tokens(words, special_tokens=True)
    ids = own.tokenizer.convert_tokens_to_ids(words)
    size = {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": [[28, 28], [56, 56]]}
    tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(**size), own.tokenizer, tf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4, chat_template=own.chat_template.replace("<|image_pad|>", "<image>"),
        vision_feature_select_strategy="full").save_pretrained(tmp_path)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    eye = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    tf.LlavaOnevisionForConditionalGeneration(tf.LlavaOnevisionConfig(
        vision_config=tiny | eye | {"vision_use_head": False}, video_token_index=ids[6],
        text_config=tiny | {"model_type": "qwen2", "vocab_size": len(own.tokenizer)},
        image_token_index=ids[5], image_grid_pinpoints=[[28, 28], [56, 56]],
    )).save_pretrained(tmp_path)
    judge, images, expected = load(f"q-sit:{tmp_path}"), noise(3, 64, 90), []
    assert "image?<|vision_start|><image>" in judge.text and judge.text.endswith("this image is ")
    for image in images:  # each on its own
        inputs = judge.processor(images=to_uint8(image), text=judge.text, return_tensors="pt")
        p = judge.model(**inputs).logits[0, -1, ids[:5]].softmax(0)
        expected.append((p[0] + 0.75 * p[1] + 0.5 * p[2] + 0.25 * p[3]).detach())
    torch.testing.assert_close(judge(images), torch.stack(expected), rtol=0, atol=1e-5)
    assert judge(images).std() > 1e-6


THINK = "<think>The {sky} is 2 of 5 <answer>1</answer></think>"


@pytest.mark.parametrize("form, rating, texts", (
    ("json", 3.25, [THINK + '<answer>{"rating": 3.25}</answer>', '{\n "rating": 3.25\n}']),
    ("json", None, ['{"rating": 5.01}', '{"rating": "good"}', "3.5", '{"rating": true}', "",
                    '{"score": 3}', '{"rating": 3', '<think>{"rating": 3}', '{"rating": -3}',
                    '{"rating": 3} {"rating": 3}', '{"rating": 3} {"rating": "x"}']),
    ("answer", 5, [THINK + "\n<answer> 5.0 </answer>"]), ("answer", 1, ["<answer>1</answer>"]),
    ("answer", None, ["<answer>0.5</answer>", "<answer>4/5</answer>", "4.5", "<answer>-3</answer>",
                      "<answer>3</answer> or <answer>poor</answer>", "<think><answer>3</answer>",
                      "<answer>3</answer><answer>3</answer>"])))
def test_ratings_are_parsed_strictly(form, rating, texts):
    for text in texts:
        value = parse_rating(text, form)
        assert math.isnan(value) if rating is None else value == rating, text


@pytest.mark.parametrize("name, answers", (
    ("q-insight", ('<think>good</think>{"rating": 4.5}', '{"rating": 2}', "no idea")),
    ("visualquality-r1", ("<think>x</think><answer>4.5</answer>", "<answer>2.0</answer>", "4.5"))))
def test_rating_judges(name, answers, tmp_path, monkeypatch, capsys):
    folder = tmp_path / JUDGES[name].get("subfolder", "")
    shutil.copytree(WEIGHTS / "judge2", folder, dirs_exist_ok=True)
    chat = folder / "chat_template.jinja"
    chat.write_text("{% if add_vision_id %}Picture 1: {% endif %}" + chat.read_text())
    monkeypatch.setitem(JUDGES[name], "source", str(tmp_path))
    judge, images = load(name), noise(3, 64, 64)
    settings = judge.model.generation_config
    assert settings.do_sample is False and settings.max_new_tokens == 1024
    settings.max_new_tokens = 4
    assert judge(images).isnan().all() and capsys.readouterr().err.count("no rating") == 3
    image_first = judge.text.index(RATE) > judge.text.index("image_pad")
    assert image_first == ("Picture 1: " in judge.text) == (name == "visualquality-r1")
    assert ("A conversation between" in judge.text) == (name == "q-insight")
    tokens = iter([judge.processor.tokenizer(text)["input_ids"] for text in answers])
    judge.batch, judge.model.generate = 1, lambda input_ids, **inputs: torch.cat(
        [input_ids, torch.tensor([next(tokens)])], 1)
    scores = judge(images)  # of the new tokens only
    assert scores[:2].tolist() == [4.5, 2.0] and scores[2].isnan()
    assert repr(answers[2]) in capsys.readouterr().err


def test_rewards_and_judges_of_ones_own(monkeypatch):
    monkeypatch.setitem(reward.REWARDS, "mine", reward.luma)
    monkeypatch.setitem(JUDGES, "shop", {"source": str(WEIGHTS / "judge"), "prompt": "How good?",
                                         "stem": "It is", "levels": ("good", "bad")})
    shop, images = load("shop"), noise(2, 64, 64)
    assert load("mine") is reward.luma and shop.values.tolist() == [1, 0]
    assert "How good?" in shop.text and shop.text.endswith("\nIt is")
    assert (load(f"mllm:{WEIGHTS / 'judge'}")(images) != shop(images)).all()
    assert load("shop", dtype="bfloat16").model.dtype == torch.bfloat16
    assert shop.model.dtype == load("judge", dtype="bfloat16").model.dtype == torch.float32
    for levels in (("splendid", "good"), ("good", "good")):
        JUDGES["shop"]["levels"] = levels
        fails("shop", "single, different")


@pytest.mark.parametrize("fault", (
    "model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "key", "pickle",
    "chat_template.jinja", "code"))
def test_incomplete_folders_are_one_line_errors(fault, tmp_path, offline):
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(WEIGHTS / "judge", tmp_path / "judge")
    weights = folder / "model.safetensors"
    if fault == "key":
        kept = {key: x for key, x in load_file(weights).items() if "norm1" not in key}
        save_file(kept, weights, {"format": "pt"})
    elif fault == "pickle":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif fault == "code":
        own = {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"}
        (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    else:
        (folder / fault).unlink()
    fails(f"mllm:{folder}", "its weights lack" if fault == "key" else "cannot be used")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, words", (
    ("nope", "unknown"), ("mllm", "cannot be used"), ("mllm:/no/where", "cannot be used"),
    ("qrealign-mini", "a network"), ("pyiqa:nope", "list_models"), ("pyiqa:piqe", "noise"),
    ("pyiqa:entropy", "noise"), ("pyiqa:qalign_4bit", "qrealign"), ("pyiqa:compare2score", "code")))
def test_unknown_and_unsafe_rewards_are_one_line_errors(name, words, offline):
    fails(name, words)


def test_pyiqa_metrics_rise_with_quality(pairs):
    lq, hq = pairs
    for name, sign in (("ssim", 1), ("gmsd", -1)):
        metric = load(f"pyiqa:{name}")
        scores = metric(lq, hq)
        assert metric.sign == sign and (scores * sign > 0).all()
        assert (metric((lq + hq) / 2, hq) > scores).all()
        torch.testing.assert_close(metric(lq[2:3], hq[2:3]), scores[2:3])
    torch.testing.assert_close(load("pyiqa:psnr")(lq, hq), reward.psnr(lq, hq), atol=1e-3, rtol=0)
    with pytest.raises(UserError, match="give references"):
        metric(lq)


def test_ready_says_whether_weights_are_there(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for name, files in reward.FILES.items():
        for file in files:
            assert not reward.ready(name)
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        assert reward.ready(name)


def test_the_script_prints_a_table(tmp_path, pairs, monkeypatch, capsys):
    files = [str(tmp_path / f"{index}.png") for index in range(4)]
    for file, image in zip(files, torch.cat([pairs[0][:2], pairs[1][:2]])):
        write_image(file, image)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["reward.py", *words])
        reward.main()
        return [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[1:]]
    psnr = reward.psnr(pairs[0][:2], pairs[1][:2]).tolist()
    assert run(*files[:2], "--metric", "psnr", "--ref", *files[2:]) == pytest.approx(psnr, abs=0.1)
    assert run(files[3]) == pytest.approx(load("judge")(pairs[1][1:2]).tolist(), abs=1e-4)
    for words in ((), (files[0], "--metric", "psnr"), (*files[:2], "--ref", files[2])):
        with pytest.raises(UserError, match="references needed"):
            run(*words)


def test_a_judge_of_a_large_image_is_the_mean_over_its_centred_tiles(gen):
    judge, images = reward.load("judge"), torch.rand(2, 3, 130, 200, generator=gen) * 2 - 1
    tiles = [images[:, :, y:y + 64, x:x + 64] for y in (1, 65) for x in (4, 68, 132)]
    expected = torch.stack([judge(tile) for tile in tiles]).mean(0)
    torch.testing.assert_close(judge(images), expected)
    assert reward.tiles_of(images, 300).shape == (2, 1, 3, 130, 200)
