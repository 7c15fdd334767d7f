"""Rewards: the score of an image-quality model built on a multimodal language model (MLLM), and others, one contract.

  reward(images, refs=None) -> (B,)     images, refs: (B, 3, H, W) in [-1, 1]; higher is better; no gradient;
                                        an image gets the same score in any batch (to float rounding)

MLLM judge, the way of Q-Align (Wu et al. 2023, arXiv 2312.17090, eq. 4 and 5):
  p_j = softmax over the next-token logits of the five level words after "The quality of the image is"
  score = sum_j v_j p_j,   v = 1, 0.75, 0.5, 0.25, 0 for excellent, good, fair, poor, bad

Names that `load` knows
  judge, judge2     the small judges in weights/; judge2 is only ever used to check judge
  mllm:FOLDER       any transformers image-text-to-text model with its processor, same scorer
  psnr, psnr_y, ssim      against the reference; dB, dB, [-1, 1]
  pyiqa:NAME        any metric of pyiqa (non-commercial licence); lower-is-better ones are negated, here only

Chosen here:
 1. An image is rounded to 8 bits before it is judged, so a tensor and its PNG score the same and no reward hides
    below the precision of a file. Resizing is the processor's own: the shipped judges take 64 x 64 and more in
    multiples of 16, anything else is resized to them bicubically; nothing is compressed.
 2. The shipped judges learn a ladder of degradations whose severity is known, soft labels over two neighbouring
    levels as DeQA-Score has them (You et al. 2025, arXiv 2501.11561), so that the expected value is the target.
 3. Their patch embedding starts as a PCA whitening of training patches. Natural images put nearly all variance
    into low frequencies, quality is in the high ones: from a random start the loss stays on a plateau.

    python reward.py score photo.png --metric judge            # laptop
    python reward.py score out/*.png --ref hq/*.png --metric pyiqa:lpips --device cuda
    python reward.py train --name judge                        # makes weights/judge; then: python reward.py check
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F

PROMPT, STEM = "Can you rate the quality of this picture?", "The quality of the image is"
LEVELS, VALUES = ("excellent", "good", "fair", "poor", "bad"), (1.0, 0.75, 0.5, 0.25, 0.0)
UNSAFE = {"pyiqa:piqe": "it prefers noise to a clean image and is NaN on black",
          "pyiqa:entropy": "it rises with noise"}


# ---- references: (B, 3, H, W) in [-1, 1] twice -> (B,) ----

def psnr(images, refs):
    """Peak signal-to-noise ratio in dB over RGB; (B, 3, H, W) in [-1, 1] -> (B,), at most 100 dB."""
    return -10 * (((images - refs) / 2) ** 2).flatten(1).mean(1).clamp(min=1e-10).log10()


def luma(images):
    """(B, 3, H, W) in [-1, 1] -> Y of ITU-R BT.601, (B, 1, H, W) in [16, 235] / 255, as MATLAB's rgb2ycbcr."""
    weights = torch.tensor([65.481, 128.553, 24.966], device=images.device).view(1, 3, 1, 1)
    return (16 + ((images + 1) / 2 * weights).sum(1, keepdim=True)) / 255


def psnr_y(images, refs):
    """PSNR in dB on Y, as super-resolution papers print it; (B, 3, H, W) in [-1, 1] -> (B,), at most 100."""
    return -10 * ((luma(images) - luma(refs)) ** 2).flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(images, refs):
    """Structural similarity, mean over RGB and pixels; (B, 3, H, W) in [-1, 1] -> (B,) in [-1, 1].

    Wang et al. 2004, eq. 13: Gaussian window of 11, sigma 1.5, C1 = 0.01^2, C2 = 0.03^2, no padding.
    """
    x, y = (images + 1) / 2, (refs + 1) / 2
    line = torch.exp(-torch.arange(-5, 6, device=x.device, dtype=x.dtype) ** 2 / (2 * 1.5 ** 2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def blur(v):
        return F.conv2d(v, window.expand(3, 1, 11, 11), groups=3)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    score = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4))
    return score.flatten(1).mean(1)


# ---- MLLM judges ----

def expected_level(logits, values=VALUES):
    """(B, 5) next-token logits of the level words, best first -> (B,) expected value of the levels."""
    return logits.float().softmax(-1) @ torch.tensor(values, device=logits.device)


def level_tokens(tokenizer, words=LEVELS):
    """Token id of " " + word for each level word. Raises UserError unless each is one token, all different."""
    ids = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in words]
    if any(len(i) != 1 for i in ids) or len({i[0] for i in ids}) < len(words):
        from utils import UserError
        raise UserError(f"the judge's tokenizer does not hold {', '.join(words)} as single, different tokens; "
                        "choose other level words or another judge")
    return [i[0] for i in ids]


class MLLMJudge:
    """Scores images with any stock vision-language model, one forward pass per image, batched."""

    def __init__(self, model, processor, prompt=PROMPT, stem=STEM, words=LEVELS, values=VALUES, batch=64):
        self.model, self.processor, self.values, self.batch = model.eval(), processor, values, batch
        processor.tokenizer.padding_side = "left"  # the last position must be the one after the stem
        self.ids = level_tokens(processor.tokenizer, words)
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        self.text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) + stem

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32, **options):
        """source: a folder or hub id with model, tokenizer and processor. Raises UserError if it cannot be loaded."""
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        from utils import UserError
        logging.disable_progress_bar()  # "Loading weights" for a single small file
        try:
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, use_safetensors=True)
            processor = AutoProcessor.from_pretrained(source)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"judge {source}: cannot be loaded ({str(error).strip().splitlines()[0]}); give a complete "
                            "folder, or a hub id on a machine with network") from None
        return cls(model.to(device), processor, **options)

    def inputs(self, images):
        """(B, 3, H, W) in [-1, 1] -> the processor's tensors on the model's device."""
        from utils import to_uint8
        pixels = list(to_uint8(images).cpu())
        return self.processor(text=[self.text] * len(pixels), images=pixels, padding=True,
                              return_tensors="pt").to(self.model.device)

    def logits(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, vocabulary) next-token logits after the stem."""
        return self.model(**self.inputs(images), logits_to_keep=1, use_cache=False).logits[:, -1]

    @torch.no_grad()
    def __call__(self, images, refs=None):
        scores = [expected_level(self.logits(part)[:, self.ids], self.values) for part in images.split(self.batch)]
        return torch.cat(scores).to(images.device)


class PyiqaReward:
    """A metric of pyiqa as a reward; (B, 3, H, W) in [-1, 1] -> (B,), sign turned where lower is better."""

    def __init__(self, name, device):
        from utils import UserError
        try:
            import pyiqa
            self.metric = pyiqa.create_metric(name, device=torch.device(device))
        except Exception as error:  # pyiqa raises bare assertions and the errors of many download back ends
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"pyiqa:{name}: cannot be made ({first}); see pyiqa.list_models(), and note that most "
                            "metrics download their weights at first use") from None
        self.name, self.sign = name, -1.0 if self.metric.lower_better else 1.0

    @torch.no_grad()
    def __call__(self, images, refs=None):
        to_unit = [None if x is None else ((x.float() + 1) / 2).clamp(0, 1) for x in (images, refs)]
        if self.metric.metric_mode == "FR" and refs is None:
            raise ValueError(f"pyiqa:{self.name} needs reference images")
        score = self.metric(to_unit[0], to_unit[1]) if self.metric.metric_mode == "FR" else self.metric(to_unit[0])
        return self.sign * score.float().reshape(len(images))


def symmetric(reward, views):
    """The mean of a reward over the first `views` of the eight symmetries of a square, again a reward.

    Quality does not depend on how a picture is turned, a judge's score does: most of the difference that one view sees
    among restorations of one input is gone in the mirrored view (figures in the README). That part is noise to the
    policy gradient and room for reward hacking; the mean over views has less of it.
    """
    def turned(x, view):  # mirror first, then the half turn, then the quarter turns
        return None if x is None else torch.rot90(x.flip(3) if view % 2 else x, (0, 2, 1, 3)[view // 2], (2, 3))

    def mean(images, refs=None):
        return sum(reward(turned(images, view), turned(refs, view)) for view in range(views)) / views
    return mean if views > 1 else reward


def load(name, device="cpu"):
    """A reward by its name (see the top of this file). Raises UserError for an unknown one."""
    from utils import UserError
    references = {"psnr": psnr, "psnr_y": psnr_y, "ssim": ssim}
    if name in references:
        return references[name]
    if name in JUDGES:
        folder = Path(__file__).parent / "weights" / name
        return MLLMJudge.from_pretrained(str(folder), device)
    if name.startswith("mllm:"):
        return MLLMJudge.from_pretrained(name[len("mllm:"):], device)
    if name.startswith("pyiqa:"):
        return PyiqaReward(name[len("pyiqa:"):], device)
    raise UserError(f"reward {name}: unknown; choose judge, mllm:FOLDER, psnr, psnr_y, ssim or pyiqa:NAME")


# ---- the degradation ladder: severity s in [0, 1] (B,) -> image and its target quality in [0, 1] ----

def blur(images, sigma):
    """Gaussian blur, sigma (B,) in pixels, window 13, reflected border; (B, 3, H, W) -> the same."""
    grid = torch.arange(-6.0, 7.0)
    line = torch.exp(-grid ** 2 / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))
    line = (line / line.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (3 B, 13)
    x = F.pad(images.flatten(0, 1)[None], (6, 6, 6, 6), mode="reflect")
    x = F.conv2d(F.conv2d(x, line[:, None, None, :], groups=len(line)), line[:, None, :, None], groups=len(line))
    return x.view_as(images)


def jpeg(image, quality):
    """(3, H, W) in [-1, 1] -> the same after JPEG compression with PIL; quality 1 to 95."""
    import io

    import numpy as np
    from PIL import Image

    from utils import to_uint8
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=int(quality))
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 127.5 - 1


def rescale(image, factor):
    """(3, H, W) shrunk by `factor` >= 1 and enlarged again, bicubic with antialias."""
    from data import resize
    size = image.shape[-2:]
    return resize(resize(image[None], [max(4, round(side / factor)) for side in size]), size)[0]


FAMILIES = ("blur", "noise", "jpeg", "rescale", "restored", "lq")
RESTORED_QUALITY, WORST_QUALITY = 0.5, 0.1


def ladder(hq, restored, lq, generator):
    """A random rung for each image: hq, restored, lq (B, 3, H, W) -> (images (B, 3, H, W), quality (B,)).

    blur sigma 0.35 + 2.4 s; noise std 0.01 (20^s - 1) of the full range; JPEG quality 95 (6 / 95)^s; rescaling by
    1 + 3 s; the blends (1 - s) hq + s restored and (1 - s) restored + s lq. Quality falls linearly in s: from 1 (hq)
    to 0.1 (worst, as lq), and the restorer's own outputs stand at 0.5.
    """
    count = len(hq)
    s = torch.rand(count, generator=generator)
    family = torch.randint(len(FAMILIES), (count,), generator=generator).tolist()
    noise = torch.randn(hq.shape, generator=generator)
    blurred = blur(hq, 0.35 + 2.4 * s)
    images, quality = [], 1 - (1 - WORST_QUALITY) * s
    for i, name in enumerate(FAMILIES[f] for f in family):
        if name == "blur":
            x = blurred[i]
        elif name == "noise":
            x = hq[i] + 0.02 * (20 ** s[i] - 1) * noise[i]
        elif name == "jpeg":
            x = jpeg(hq[i], 95 * (6 / 95) ** s[i])
        elif name == "rescale":
            x = rescale(hq[i], 1 + 3 * s[i].item())
        elif name == "restored":
            x, quality[i] = torch.lerp(hq[i], restored[i], s[i]), 1 - (1 - RESTORED_QUALITY) * s[i]
        else:
            x, quality[i] = (torch.lerp(restored[i], lq[i], s[i]),
                             RESTORED_QUALITY - (RESTORED_QUALITY - WORST_QUALITY) * s[i])
        images.append(x)
    return torch.stack(images).clamp(-1, 1), quality


def recolor(images, generator):
    """Random gamma, contrast, order and strength of colors, one draw per image and the same for each of `images`, a
    list of (B, 3, H, W) in [-1, 1]: eleven photographs show few colors, and quality is not a matter of color."""
    count = len(images[0])
    gamma, contrast, color = (torch.rand(3, count, 1, 1, 1, generator=generator) * torch.tensor(
        [0.8, 0.5, 1.4]).view(3, 1, 1, 1, 1) + torch.tensor([0.7, 0.6, -0.2]).view(3, 1, 1, 1, 1)).unbind()
    order = torch.rand(count, 3, generator=generator).argsort(1)[:, :, None, None].expand_as(images[0])
    result = []
    for x in images:
        x = (((x + 1) / 2) ** gamma * contrast * 2 - contrast).gather(1, order)  # channels in another order
        result.append(torch.lerp(x.mean(1, keepdim=True), x, color.clamp(0, 1)).clamp(-1, 1))
    return result


def soft_label(quality, values=VALUES):
    """(B,) in [0, 1] -> (B, 5) probabilities on the two neighbouring levels, whose expected value is `quality`."""
    v = torch.tensor(values, device=quality.device)
    return (1 - (quality[:, None] - v).abs() / (v[0] - v[1])).clamp(min=0)


# ---- building and training the small judges ----

TEXT = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=8192)
JUDGES = {  # judge2 differs in class, size, patch order, training crops and seed, and is never a reward
    "judge": dict(
        model_type="qwen3_vl", processor="Qwen3VLProcessor", video="Qwen3VLVideoProcessor", seed=1, tie=True,
        vision=dict(depth=3, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=128,
                    num_position_embeddings=64, deepstack_visual_indexes=[], initializer_range=0.1),
        text=dict(head_dim=32, initializer_range=0.1, rope_parameters=dict(
            rope_type="default", rope_theta=1e4, mrope_section=[6, 5, 5], mrope_interleaved=True))),
    "judge2": dict(
        model_type="qwen2_5_vl", processor="Qwen2_5_VLProcessor", video="Qwen2VLVideoProcessor", seed=2, tie=True,
        vision=dict(depth=4, hidden_size=112, intermediate_size=256, num_heads=4, out_hidden_size=96, window_size=64,
                    fullatt_block_indexes=[0, 1, 2, 3], initializer_range=0.1),
        text=dict(hidden_size=96, initializer_range=0.1, rope_parameters=dict(
            rope_type="default", rope_theta=1e4, mrope_section=[4, 4, 4]))),
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer():
    """A byte-level BPE tokenizer of the Qwen class that holds each level word as one token."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [f"user\n{PROMPT}", f"assistant\n{STEM}"] + [f"{STEM} {word}" for word in LEVELS]
    bpe.train_from_iterator(texts * 4, trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    learned = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]],
                          additional_special_tokens=list(SPECIAL[1:]), eos_token="<|im_end|>", pad_token=SPECIAL[0])


def build_judge(recipe, patch=8):
    """A judge with random weights from an entry of JUDGES; same random numbers every time."""
    import transformers as tf
    tf.utils.logging.disable_progress_bar()  # "Writing model shards" for a file of 2 MB
    tokenizer = build_tokenizer()
    special = {key: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for key, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"), ("vision_start_token_id", "vision_start"),
        ("vision_end_token_id", "vision_end"))}
    shape = dict(patch_size=patch, temporal_patch_size=1)
    config = tf.AutoConfig.for_model(
        recipe["model_type"], **special, tie_word_embeddings=recipe["tie"],
        vision_config={**shape, "spatial_merge_size": 2, **recipe["vision"]},
        text_config={**TEXT, "vocab_size": len(tokenizer), "bos_token_id": None,
                     "eos_token_id": tokenizer.eos_token_id, **recipe["text"]})
    with torch.random.fork_rng(devices=[]):  # transformers initializes from the global generator only
        torch.manual_seed(recipe["seed"])
        model = tf.AutoModelForImageTextToText.from_config(config)
    pixels = tf.Qwen2VLImageProcessor(**shape, merge_size=2,
                                      size={"shortest_edge": 64 * 64, "longest_edge": 2048 * 2048})
    processor = getattr(tf, recipe["processor"])(
        image_processor=pixels, tokenizer=tokenizer, chat_template=CHAT,
        video_processor=getattr(tf, recipe["video"])(**shape))  # never used, but the class asks for one
    return MLLMJudge(model, processor)


@torch.no_grad()
def whiten_patches(judge, images):
    """Sets the patch embedding to the PCA whitening of the patches of images (B, 3, H, W), one direction a channel."""
    projection = judge.model.model.visual.patch_embed.proj
    patches = judge.inputs(images)["pixel_values"].double()  # (patches, 3 T p p), laid out as the weights are
    mean = patches.mean(0)
    variance, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    keep = min(projection.weight.shape[0], len(variance))
    rows = (directions / (variance + 1e-4).sqrt()).flip(1).T[:keep]
    projection.weight[:keep] = rows.view(keep, *projection.weight.shape[1:]).float()
    if projection.bias is not None:
        projection.bias[:keep] = -(rows @ mean).float()


def judge_data(split, count, size, gen, restorer_name, task="sr"):
    """Crops of a split with the SFT restorer's outputs: (hq, restored, lq), (count, 3, size, size) each."""
    from tqdm import tqdm

    from data import get_task, grid_crops, photographs, random_crops
    from model import load as load_restorer
    from sample import rollout
    restorer = load_restorer(restorer_name, dtype="bfloat16", task=task)
    photos = photographs(split)
    hq = (random_crops(photos, count, size, gen) if split == "train" else grid_crops(photos, count, size, gen)[0])
    lq, restored = get_task(task)(hq, gen)[0], []
    for index, part in enumerate(tqdm(lq.split(32), desc="restore", leave=False)):
        # a third without sampling noise, so that the judge knows more than one look of a restored image
        eta = restorer.defaults["eta"] * (index % 3 > 0) if split == "train" else restorer.defaults["eta"]
        z = rollout(restorer, part, restorer.defaults["steps"], eta, gen, keep=False).z[-1]
        restored.append(restorer.decode(z, part))
    return hq, torch.cat(restored), lq


@torch.no_grad()
def check_judge(judge, hq, restored, lq, gen, rounds=8):
    """Held-out quality of a judge: Spearman's rank correlation with the ladder, mean scores, and pairs in order."""
    from scipy.stats import spearmanr
    rungs = [ladder(hq, restored, lq, gen) for _ in range(rounds)]
    images, quality = (torch.cat(x) for x in zip(*rungs))
    scores = {name: judge(x) for name, x in (("lq", lq), ("restored", restored), ("hq", hq))}
    return {"rank_correlation": float(spearmanr(judge(images).cpu(), quality).statistic), "crops": len(hq),
            **{name: x.mean().item() for name, x in scores.items()},
            "hq_over_restored": (scores["hq"] > scores["restored"]).float().mean().item()}


@dataclass
class TrainConfig:
    name: Annotated[str, "which judge: judge or judge2"] = "judge"
    model: Annotated[str, "restorer whose outputs stand on the ladder; empty: the shipped one"] = ""
    out: Annotated[str, "folder to write; empty: weights/NAME"] = ""
    steps: Annotated[int, "optimizer steps"] = 6000
    batch: Annotated[int, "images per step"] = 48
    pool: Annotated[int, "training crops, restored once"] = 2048
    size: Annotated[int, "side of a crop in pixels"] = 64
    lr: Annotated[float, "peak learning rate of AdamW: embeddings, norms, biases"] = 1e-3
    matrix_lr: Annotated[float, "peak learning rate of Muon: matrices"] = 0.02


def judge_optimizers(model, lr, matrix_lr):
    """[(peak learning rate, optimizer)]: Muon for the matrices of the layers (Jordan 2024; measured here: rank
    correlation 0.71 after 400 steps where AdamW alone has 0.66), AdamW for embeddings, norms, biases."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and "embed" not in name else others).append(p)
    return [(matrix_lr, torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.02)),
            (lr, torch.optim.AdamW(others, lr=lr, weight_decay=0.05))]


def train_judge(cfg):
    """Trains a small judge on the ladder and saves it the transformers way; weights float16, half the size."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from tqdm import tqdm

    from sft import one_cycle
    from utils import UserError, generator
    if cfg.name not in JUDGES:
        raise UserError(f"--name {cfg.name}: unknown; choose one of {', '.join(JUDGES)}")
    recipe = JUDGES[cfg.name]
    gen = generator(recipe["seed"], 10)
    hq, restored, lq = judge_data("train", cfg.pool, cfg.size, gen, cfg.model)
    judge = build_judge(recipe)
    whiten_patches(judge, hq[:1024])
    optimizers = judge_optimizers(judge.model, cfg.lr, cfg.matrix_lr)
    average = AveragedModel(judge.model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    judge.model.train()
    for step in (bar := tqdm(range(cfg.steps), desc=cfg.name)):
        pick = torch.randint(len(hq), (cfg.batch,), generator=gen)
        turn, mirror = torch.randint(4, (2,), generator=gen).tolist()  # the same for the three versions of a crop
        triple = [torch.rot90(x[pick], turn, (2, 3)) for x in (hq, restored, lq)]
        images, quality = ladder(*recolor([x.flip(3) for x in triple] if mirror % 2 else triple, gen), gen)
        log_p = judge.logits(images).float().log_softmax(-1)[:, judge.ids]  # over the whole vocabulary, as a language
        loss = -(soft_label(quality) * log_p).sum(1).mean()                 # model learns its next token
        judge.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.model.parameters(), 1.0)
        for peak, optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = one_cycle(step, cfg.steps, peak)
            optimizer.step()
        average.update_parameters(judge.model)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    judge.model.load_state_dict(average.module.state_dict())
    judge.model.eval()
    out = Path(cfg.out or Path(__file__).parent / "weights" / cfg.name)
    judge.model.half().save_pretrained(out)
    judge.processor.save_pretrained(out)
    print(f"wrote {out}; python reward.py check --judges {cfg.name} measures it")


@dataclass
class CheckConfig:
    judges: Annotated[list, "rewards without reference to measure"] = field(default_factory=lambda: ["judge", "judge2"])
    split: Annotated[str, "test (for tables) or val (for tuning)"] = "test"
    count: Annotated[int, "held-out crops at most"] = 128
    model: Annotated[str, "restorer whose outputs stand on the ladder; empty: the shipped one"] = ""
    seed: Annotated[int, "seed of the ladder and the sampler"] = 0


def check(cfg):
    """Prints the held-out quality of judges."""
    from utils import generator
    data = judge_data(cfg.split, cfg.count, 64, generator(cfg.seed, 11), cfg.model)
    for name in cfg.judges:
        result = check_judge(load(name), *data, generator(cfg.seed, 12))
        print(f"{name:8s} {cfg.split}: " + "   ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
                                                     for k, v in result.items()))


@dataclass
class ScoreConfig:
    ref: Annotated[list, "reference files, as many as images, in the same order"] = field(default_factory=list)
    metric: Annotated[str, "judge, judge2, mllm:FOLDER, psnr, psnr_y, ssim, pyiqa:NAME"] = "judge"
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"


def score(cfg, files):
    """Prints a table of scores, a line per file."""
    from utils import UserError, pick_device, read_image
    if not files:
        raise UserError("no images: python reward.py score IMG ... [--ref IMG ...] [--metric NAME]")
    if cfg.ref and len(cfg.ref) != len(files):
        raise UserError(f"--ref: {len(cfg.ref)} references for {len(files)} images; give one for each")
    if cfg.metric in ("psnr", "psnr_y", "ssim") and not cfg.ref:
        raise UserError(f"--metric {cfg.metric}: needs --ref")
    device = pick_device(cfg.device)
    metric = load(cfg.metric, device)
    print(f"{cfg.metric:>12s}  file")
    for index, file in enumerate(files):
        image = read_image(file)[None].to(device)
        ref = read_image(cfg.ref[index])[None].to(device) if cfg.ref else None
        if ref is not None and ref.shape != image.shape:
            raise UserError(f"{file} and {cfg.ref[index]}: sizes differ; references must match their images")
        try:
            print(f"{metric(image, ref).item():12.4f}  {file}")
        except (ValueError, RuntimeError, AssertionError) as error:  # too small for a window, a reference missing
            raise UserError(f"{file}: {cfg.metric} cannot score it ({str(error).splitlines()[0]})") from None


def main():
    import sys

    from utils import UserError, parse
    command, rest = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if command == "train":
        train_judge(parse(TrainConfig, rest, "Trains a small MLLM judge on the degradation ladder."))
    elif command == "check":
        check(parse(CheckConfig, rest, "Measures judges on held-out photographs."))
    elif command == "score":
        score(*parse(ScoreConfig, rest, "Scores image files.", positional="image files"))
    else:
        raise UserError("usage: python reward.py score | check | train, each with --help")


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
