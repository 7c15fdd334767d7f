"""Rewards: the score of an image quality model built on a multimodal language model, and others.

  reward(images, refs=None) -> (B,)    images, refs: (B, 3, H, W) in [-1, 1]; higher is better; no
                                       gradient; does not depend on the batch; NaN: no score

Level words, after Q-Align (Wu et al. 2023, arXiv 2312.17090, eq. 4 and 5):
  p_j   = softmax over the next-token logits of the level words behind "The quality of the image is"
  score = sum_j v_j p_j,  v = 1, 0.75, 0.5, 0.25, 0 for excellent, good, fair, poor, bad

`load` takes a key of REWARDS or JUDGES (you may add a function or recipe of your own there),
NAME:SOURCE (judge NAME with other weights: a folder or hub id), mllm:SOURCE (level words on any
image-text model of transformers) or pyiqa:NAME (whose licence is non-commercial).

Chosen here
 1. An image is rounded to 8 bits before it is judged, so a tensor and its PNG score the same.
 2. Judges that reason decode greedily (their authors sample): the same image, the same answer.
 3. No code from a hub is run, only safetensors are read, and incomplete weights are refused.

    python reward.py photo.png                                              # laptop
    python reward.py out/*.png --metric qrealign-mini                       # GPU
"""

import contextlib
import math
import os
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

from utils import UserError, one_line, option, parse, pick_device, read_image, run_main, to_uint8

# ---- against a reference: (B, 3, H, W) in [-1, 1] twice -> (B,) ----

def psnr(images, refs):
    """Peak signal-to-noise ratio over RGB in dB, at most 100; (B, 3, H, W) in [-1, 1] -> (B,)."""
    error = ((images - refs) / 2).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def luma(images):
    """Y of ITU-R BT.601, as MATLAB's rgb2ycbcr; -> (B, 1, H, W) in [16, 235] / 255."""
    weights = torch.tensor([65.481, 128.553, 24.966], device=images.device).view(1, 3, 1, 1)
    return (16 + ((images + 1) / 2 * weights).sum(1, keepdim=True)) / 255


def psnr_y(images, refs):
    """PSNR on Y in dB, as super-resolution papers print it, at most 100; -> (B,)."""
    return psnr(2 * luma(images), 2 * luma(refs))  # psnr takes 2 as the range


def ssim(images, refs):
    """Structural similarity in [-1, 1], mean over RGB and pixels (Wang et al. 2004); -> (B,)."""
    if min(images.shape[2:]) < 11:
        raise UserError("ssim: needs 11 x 11 pixels within a border; give larger images")
    x, y = (images + 1) / 2, (refs + 1) / 2  # eq. 13, window 11, sigma 1.5, no border
    line = torch.exp(-torch.arange(-5, 6, device=x.device, dtype=x.dtype) ** 2 / (2 * 1.5 ** 2))
    window = torch.outer(line, line).expand(3, 1, 11, 11) / line.sum() ** 2

    def blur(v):
        return F.conv2d(v, window, groups=3)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x ** 2, blur(y * y) - mean_y ** 2
    top = (2 * mean_x * mean_y + 1e-4) * (2 * (blur(x * y) - mean_x * mean_y) + 9e-4)
    bottom = (mean_x ** 2 + mean_y ** 2 + 1e-4) * (var_x + var_y + 9e-4)
    return (top / bottom).flatten(1).mean(1)


REWARDS = {"psnr": psnr, "psnr_y": psnr_y, "ssim": ssim}


def views(reward, count):
    """The mean of a reward over `count` (1 to 8) symmetries of a square, NaN and inf left out."""
    def turned(x, view):  # mirror first, then the half turn, then the quarter turns
        if x is not None:
            return torch.rot90(x.flip(-1) if view % 2 else x, (0, 2, 1, 3)[view // 2], (-2, -1))

    def mean(images, refs=None):
        scores = [reward(turned(images, view), turned(refs, view)) for view in range(count)]
        scores = torch.stack(scores)
        if scores.shape != (count, len(images)):
            raise UserError("a reward must be one number for each image, (B,)")
        return scores.where(scores.isfinite(), math.nan).nanmean(0)
    return mean


# ---- judges ----

LEVELS = ("excellent", "good", "fair", "poor", "bad")
PROMPT, STEM = "Can you rate the quality of this picture?", "The quality of the image is"
RATE = ("What is your overall rating on the quality of this picture? The rating should be a float "
        "between 1 and 5, rounded to two decimal places, with 1 representing very poor quality and "
        "5 representing excellent quality.")
WEIGHTS = Path(__file__).parent / "weights"
JUDGES = {  # arguments of load_judge; the questions are those of the authors, word for word
    "judge": {"source": str(WEIGHTS / "judge"), "dtype": "float32", "tile": 64},
    "judge2": {"source": str(WEIGHTS / "judge2"), "dtype": "float32", "tile": 64},  # to check it
    "mllm": {"source": ""},
    "qrealign-mini": {"source": "q-future/Q-ReAlign-Mini-0.8B"},
    "qrealign-lite": {"source": "q-future/Q-ReAlign-Lite-4B"},
    "qrealign-pro": {"source": "q-future/Q-ReAlign-Pro-9B"},
    "q-sit": {  # Zhang et al. 2025, arXiv 2503.09197
        "source": "zhangzicheng/q-sit-mini", "image_last": True,
        "levels": ("Excellent", "Good", "Fair", "Poor", "Bad"), "prompt": "Assume you are an image "
        "quality evaluator. \nYour rating should be chosen from the following five categories: "
        "Excellent, Good, Fair, Poor, and Bad (from high to low). \nHow would you rate the quality "
        "of this image?", "stem": "The quality of this image is "},
    "q-insight": {  # Li et al. 2025, arXiv 2503.22679
        "source": "ByteDance/Q-Insight", "subfolder": "score_degradation", "form": "json",
        "image_last": True, "prompt": RATE + " Return the final answer in JSON format with the "
        'following keys: "rating": The score.', "system": "A conversation between User "
        "and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
        "thinks about the reasoning process in the mind and then provides the user with the "
        "answer. The reasoning process and answer are enclosed within <think> </think> and "
        "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>"
        "<answer> answer here </answer>"},
    "visualquality-r1": {  # Wu et al. 2025, arXiv 2505.14460
        "source": "TianheWu/VisualQuality-R1-7B", "form": "answer", "vision_id": True,
        "prompt": "You are doing the image quality assessment task. Here is the question: " + RATE +
        " First output the thinking process in <think> </think> tags and then output the final "
        "answer with only one score in <answer> </answer> tags."}}
FORMS = {  # how an answer begins, and the whole of it
    "json": ("{", r'\{\s*"rating":\s*(\d+(?:\.\d+)?)\s*\}'),
    "answer": ("<answer>", r"<answer>\s*(\d+(?:\.\d+)?)\s*</answer>")}


def level_tokens(tokenizer, levels, stem):
    """The token of each level word behind the stem; an error unless they are single and differ."""
    space = "" if stem.endswith(" ") else " "  # else a space in front is part of the token
    words = [tokenizer(space + word, add_special_tokens=False)["input_ids"] for word in levels]
    ids = sum(words, [])
    if not len(ids) == len(set(ids)) == len(levels):
        raise UserError(f"{', '.join(levels)} are not single, different tokens")
    return ids


def parse_rating(text, form):
    """The rating in [1, 5] of an answer, NaN unless there is exactly one behind the reasoning."""
    start, pattern = FORMS[form]
    text = text.rpartition("</think>")[2]
    found = re.findall(pattern, text)
    if not found or text.count(start) > 1 or "<think>" in text:
        return math.nan
    return float(found[0]) if 1 <= float(found[0]) <= 5 else math.nan


def tiles_of(images, side):
    """(B, 3, H, W) -> its disjoint tiles (B, n, 3, side, side), centred; if smaller, the whole."""
    high, wide = (min(side, length) for length in images.shape[2:])
    top, left = images.shape[2] % high // 2, images.shape[3] % wide // 2
    x = images[..., top:, left:].unfold(2, high, high).unfold(3, wide, wide)
    return x.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


class MLLMJudge:
    """Scores by level words, of values that fall evenly from 1 to 0, in one forward pass.

    tile: side of the crops that a judge has learned; larger images score the mean over such tiles.
    """
    def __init__(self, model, processor, prompt=PROMPT, stem=STEM, levels=LEVELS, system="",
                 image_last=False, vision_id=False, tile=0):  # vision_id: images are numbered
        self.model, self.processor, self.batch, self.tile = model.eval(), processor, 32, tile
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        turns = [{"role": "user", "content": parts[::-1] if image_last else parts}]
        if system:
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        more = {"add_vision_id": True} if vision_id else {}
        self.text = processor.apply_chat_template(turns, add_generation_prompt=True, **more) + stem
        self.tokens = {}  # of the text, by the shape of a batch
        self.ids = level_tokens(processor.tokenizer, levels, stem)
        self.values = torch.linspace(1, 0, len(levels), device=model.device)

    def inputs(self, pixels):
        """(B, 3, H, W) in [0, 255] -> the processor's tensors (it also resizes)."""
        in_torch = getattr(self.processor.image_processor, "backend", "") == "torchvision"
        pixels = pixels if in_torch else pixels.cpu()
        images = [[image] for image in pixels]  # nested, a form that all processors take
        inputs = self.processor.image_processor(images=images, return_tensors="pt")
        tokens = self.tokens.get(pixels.shape)
        if tokens is None:  # four fifths of the time, the same for every batch of this shape
            text = [self.text] * len(images)
            both = self.processor(text=text, images=images, return_tensors="pt")
            tokens = {key: x for key, x in both.items() if key not in inputs}
            if all(key in both and x.equal(both[key]) for key, x in inputs.items()):
                self.tokens[pixels.shape] = tokens
            inputs = both
        inputs.update(tokens)
        return inputs.to(self.model.device, self.model.dtype)

    def score(self, pixels):
        """(B, 3, H, W) in [0, 255] -> (B,)."""
        output = self.model(**self.inputs(pixels), use_cache=False, logits_to_keep=1)
        return output.logits[:, -1, self.ids].float().softmax(-1) @ self.values

    def mean_score(self, pixels):
        """(B, 3, H, W) in [0, 255] -> (B,), the mean over tiles."""
        parts = tiles_of(pixels, self.tile or max(pixels.shape[2:])).flatten(0, 1).split(self.batch)
        return torch.cat([self.score(part) for part in parts]).view(len(pixels), -1).nanmean(1)

    def scores(self, images, refs=None):
        """As a call, but not rounded, and with a gradient if the processor stays in torch."""
        return self.mean_score((images + 1) * 127.5)

    @torch.no_grad()
    def __call__(self, images, refs=None):
        return self.mean_score(to_uint8(images))


class RatingJudge(MLLMJudge):
    """Lets the model reason, up to 1024 tokens; its rating, 1 to 5, or NaN is the score."""
    def __init__(self, model, processor, form, **options):
        super().__init__(model, processor, stem="", levels=(), **options)
        self.form, own = form, model.generation_config  # which may hold a temperature and more
        ends = {"eos_token_id": own.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
        model.generation_config = type(own)(do_sample=False, max_new_tokens=1024, **ends)

    def score(self, pixels):
        inputs = self.inputs(pixels)
        answers = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        ratings = [parse_rating(text, self.form) for text in texts]
        for text, rating in zip(texts, ratings):
            if math.isnan(rating):
                print(f"note: no rating in the answer ...{text[-200:]!r}", file=sys.stderr)
        return torch.tensor(ratings, device=pixels.device)


def load_judge(source, device="cpu", dtype="auto", subfolder="", **options):
    """A judge from a folder or hub id; dtype auto: float32 on a CPU, else that of the weights."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    if dtype == "auto" and torch.device(device).type == "cpu":
        dtype = "float32"
    where = {"subfolder": subfolder, "trust_remote_code": False}
    folder = os.path.expanduser(source)
    with one_line(f"judge {source}", "give a complete folder, or a hub id and a network"):
        processor = transformers.AutoProcessor.from_pretrained(folder, **where)
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **where)
        if info["missing_keys"]:
            raise OSError(f"its weights lack {sorted(info['missing_keys'])[0]}")
        kind = RatingJudge if "form" in options else MLLMJudge
        return kind(model.to(device), processor, **options)


CODE = "runs code that comes with its weights; take qrealign-mini"
UNSAFE = {"piqe": "prefers noise", "entropy": "likes noise", "qalign": CODE, "compare2score": CODE}
FILES = {  # what pyiqa downloads for some metrics, in torch.hub.get_dir()
    "lpips": ["checkpoints/alexnet-owt-7be5be79.pth", "pyiqa/LPIPS_v0.1_alex-df73285e.pth"],
    "brisque": ["pyiqa/brisque_svm_weights.pth"]}


def ready(name):
    """False for a metric of FILES if pyiqa or they are not there: it would have to be fetched."""
    files = [Path(torch.hub.get_dir(), file) for file in FILES.get(name, [])]
    return not files or bool(find_spec("pyiqa")) and all(file.exists() for file in files)


class PyiqaReward:
    """A metric of pyiqa; sign: -1 where lower is better, turned here only."""
    def __init__(self, name, device):
        if name.split("_")[0] in UNSAFE:
            raise UserError(f"pyiqa:{name} is no reward: it {UNSAFE[name.split('_')[0]]}")
        self.device = torch.device(device)
        with one_line(f"pyiqa:{name}", "pyiqa.list_models() has the names, a network the weights"):
            import pyiqa
            with contextlib.redirect_stdout(sys.stderr):
                self.metric = pyiqa.create_metric(name, device=self.device)
        self.name, self.sign = name, -1 if self.metric.lower_better else 1
        self.full = self.metric.metric_mode == "FR"  # needs a reference

    @torch.no_grad()
    def __call__(self, images, refs=None):
        pair = (images, refs) if self.full else (images,)
        with one_line(f"pyiqa:{self.name}", "give references if it needs them, or larger images"):
            pair = [((x.to(self.device).float() + 1) / 2).clamp(0, 1) for x in pair]
            scores = self.metric.net(*pair)  # in pyiqa's wrapper TF32 is on: BRISQUE 60 for 57
        return self.sign * scores.reshape(len(images)).float().to(images.device)


def load(name, device="cpu"):
    """A reward by its name, see the top; UserError for one that is unknown or cannot be loaded."""
    head, _, source = name.partition(":")
    if name in REWARDS:
        return REWARDS[name]
    if head == "pyiqa":
        return PyiqaReward(source, device)
    if head not in JUDGES or not (source or JUDGES[head]["source"]):
        known = ", ".join([*REWARDS, *JUDGES])
        raise UserError(f"reward {name}: unknown; choose one of {known} (mllm:FOLDER), pyiqa:NAME")
    other = {"source": source, "subfolder": ""} if source else {}
    return load_judge(**{"device": device} | JUDGES[head] | other)


@dataclass
class Config:
    """Scores image files."""
    metric: str = option("judge", "name of a reward, see the top of reward.py")
    ref: list = option([], "reference files, one for each image, in the same order")


def main():
    cfg, files = parse(Config, positional="image files")
    device = pick_device()
    reward = load(cfg.metric, device)
    full = reward in (psnr, psnr_y, ssim) or getattr(reward, "full", False)
    if len(cfg.ref) != len(files) and (full or cfg.ref):
        raise UserError(f"--ref: give a reference for each of {len(files)} images, in their order")
    sign = getattr(reward, "sign", 1)  # printed as the metric defines it
    print(f"{cfg.metric:>12s}{' ↓' if sign < 0 else ''}  file")
    for file, ref_file in zip(files, cfg.ref or files):
        image, ref = (read_image(path)[None].to(device) for path in (file, ref_file))
        if image.shape != ref.shape:
            raise UserError(f"{file}, {ref_file}: sizes differ; a reference has its image's size")
        print(f"{sign * reward(image, ref if cfg.ref else None).item():12.4f}  {file}")


if __name__ == "__main__":
    run_main(main)
