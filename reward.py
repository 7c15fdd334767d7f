"""Rewards: the score of an image-quality model built on a multimodal language model (MLLM), and others, one contract.

  reward(images, refs=None) -> (B,)     images, refs: (B, 3, H, W) in [-1, 1]; higher is better; no gradient
                                        (some have reward.differentiable(images) with one);
                                        an image gets the same score in any batch (to the rounding of the dtype)
  Judges and pyiqa also take lists of (3, H, W) of several sizes; only images of one size share a batch, so no padding
  enters a model. NaN: this judge gave no score; a number is never made up in its place.

MLLM judge, the way of Q-Align (Wu et al. 2023, arXiv 2312.17090, eq. 4 and 5):
  p_j = softmax over the next-token logits of the five level words after "The quality of the image is"
  score = sum_j v_j p_j,   v = 1, 0.75, 0.5, 0.25, 0 for excellent, good, fair, poor, bad

Names that `load` knows
  judge, judge2           the small judges in weights/; judge2 is only ever used to check judge
  qrealign-mini | qrealign-lite | qrealign-pro | mllm:SOURCE       level words; SOURCE is a folder or hub id
  q-insight | visualquality-r1     reason first, then answer with a rating from 1 to 5: slow
  NAME:SOURCE             the recipe of one of these with other weights, as in q-insight:/models/q-insight
  psnr, psnr_y, ssim      against the reference; dB, dB, [-1, 1]
  pyiqa:NAME, qalign      any metric of pyiqa (non-commercial licence); lower-is-better ones are negated, here only
  A+0.5*B                 a weighted sum, each term z-scored first: class WeightedSum
Options of a judge stand behind a question mark as in a web address (%26 is an &), inside a sum too:
  mllm:/models/x?prompt=How good is it?&stem=It is&levels=good,bad&values=1,0&batch=8&dtype=bfloat16&device=cuda:1

Chosen here:
 1. An image is rounded to 8 bits before it is judged, so a tensor and its PNG score the same and no reward hides
    below the precision of a file (pyiqa's qrealign truncates). Nothing is compressed; resizing is the processor's own.
    Qwen's keep the aspect ratio, resize bicubically with antialias to multiples of a patch and enlarge small images:
    areas under 64 x 64 for the shipped judges, under 256 x 256 for Q-ReAlign.
 2. The shipped judges learned a ladder of degradations whose severity is known, with the lq of sr and what its SFT
    restorer makes of it, by soft labels over two neighbouring levels as DeQA-Score has them (You et al. 2025, arXiv
    2501.11561), so that the expected value is the target. `train --tasks` takes others, `check` measures eight.
 3. Their patch embedding starts as a PCA whitening of training patches. Natural images put nearly all variance
    into low frequencies, quality is in the high ones: from a random start the loss stays on a plateau.
 4. Judges that reason decode greedily, where their authors sample: the same image, the same answer.
 5. dtype auto is float32 on a CPU and for the shipped judges, elsewhere what the weights are stored in.

    python reward.py score photo.png --metric judge            # laptop
    python reward.py score out/*.png --metric qrealign-mini+0.5*pyiqa:musiq --device cuda
    python reward.py train --name judge                        # makes weights/judge; then: python reward.py check
"""

import json
import logging
import math
import re
import sys
import time
from dataclasses import dataclass, field
from inspect import signature
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

RATE = ("What is your overall rating on the quality of this picture? The rating should be a float between 1 and 5, "
        "rounded to two decimal places, with 1 representing very poor quality and 5 representing excellent quality.")
MODELS = {
    **{name: {"source": str(Path(__file__).parent / "weights" / name), "dtype": "float32"}
       for name in ("judge", "judge2")},
    "mllm": {},
    "qrealign-mini": {"source": "q-future/Q-ReAlign-Mini-0.8B"},
    "qrealign-lite": {"source": "q-future/Q-ReAlign-Lite-4B"},
    "qrealign-pro": {"source": "q-future/Q-ReAlign-Pro-9B"},
    # The questions that these two were trained on, word for word: Li et al. 2025, arXiv 2503.22679, and Wu et al. 2025,
    # arXiv 2505.14460.
    "q-insight": {
        "source": "ByteDance/Q-Insight", "subfolder": "score_degradation", "form": "json", "image_last": True,
        "prompt": RATE + ' Return the final answer in JSON format with the following keys: "rating": The score.',
        "system": "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
        "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think><answer> answer here </answer>"},
    "visualquality-r1": {
        "source": "TianheWu/VisualQuality-R1-7B", "form": "answer", "vision_id": True,
        "prompt": f"You are doing the image quality assessment task. Here is the question: {RATE} First output the "
        "thinking process in <think> </think> tags and then output the final answer with only one score in <answer> "
        "</answer> tags."},
}


def fail(message):
    """Raises utils.UserError, imported here so that this file works alone."""
    from utils import UserError
    raise UserError(message) from None


def reason(error, device, remedy="give a complete folder, or a hub id on a machine with network"):
    """What stopped a model from loading and what to do, in one line."""
    from utils import out_of_memory
    text = str(error).strip() or type(error).__name__
    if out_of_memory(error):
        return f"not enough memory on {device}; take a smaller model, --dtype bfloat16 or another device"
    if "trust_remote_code" in text:
        return "it brings code of its own; read that code, then allow it with --trust-remote-code"
    if "Unrecognized configuration class" in text:
        return "no image-text model of transformers; choose another"
    return f"cannot be loaded ({text.splitlines()[0][:200]}); {remedy}"


def by_size(function, batch, images, refs=None):
    """function(images, refs) of stacks (b, 3, H, W) of one size, b <= batch -> its results as a list, one per image."""
    groups, results = {}, {}
    for index, image in enumerate(images):
        groups.setdefault(image.shape, []).append(index)
    for part in (group[i:i + batch] for group in groups.values() for i in range(0, len(group), batch)):
        stacks = [torch.stack([x[i] for i in part]) for x in (images, refs) if x is not None]
        results |= zip(part, function(*stacks))
    return [results[i] for i in range(len(images))]


def expected_level(logits, values=VALUES):
    """(B, 5) next-token logits of the level words, best first -> (B,) expected value of the levels."""
    return logits.float().softmax(-1) @ torch.tensor(values, device=logits.device)


def level_tokens(tokenizer, levels=LEVELS, stem=STEM):
    """The token that each level word adds behind the stem. Raises UserError unless each is one, all different."""
    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    start, gap = encode(stem) if stem else [], " " if stem and not stem[-1].isspace() else ""
    added = [encode(stem + gap + word) for word in levels]
    bad = [word for word, ids in zip(levels, added) if len(ids) != len(start) + 1 or ids[:-1] != start]
    if bad or len(levels) < 2 or len({ids[-1] for ids in added}) < len(levels):
        fail(f"level words {', '.join(levels)}: must be two or more single, different tokens of this judge"
             + (f", unlike {', '.join(bad)}" if bad else "") + "; choose others with --levels, or another judge")
    return [ids[-1] for ids in added]


def parse_rating(text, form):
    """The rating in [1, 5] of an answer; NaN unless there is exactly one, in the form that the model was told.

    form "json": one {"rating": number} behind the reasoning; "answer": one <answer>number</answer> there.
    """
    text = text.rpartition("</think>")[2]
    found = re.findall(r"\{[^{}]*\}" if form == "json" else r"<answer>\s*(\d+(?:\.\d+)?)\s*</answer>", text)
    if len(found) != 1 or text.count("<answer>") > 1 or "<think>" in text:
        return math.nan
    try:
        rating = json.loads(found[0])["rating"] if form == "json" else float(found[0])
    except (ValueError, KeyError):
        return math.nan
    return float(rating) if type(rating) in (int, float) and 1 <= rating <= 5 else math.nan


class MLLM:
    """A stock vision-language model with its processor and one question for every image; the judges build on it.

    image_last: the image stands behind the prompt; vision_id: the chat template numbers the images (Qwen2.5-VL).
    """

    def __init__(self, model, processor, prompt, system="", image_last=False, vision_id=False, batch=64):
        self.model, self.processor, self.batch = model.eval(), processor, batch
        processor.tokenizer.padding_side = "left"  # the last position must be the one after the stem
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        turns = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        turns.append({"role": "user", "content": parts[::-1] if image_last else parts})
        self.text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False,
                                                  **({"add_vision_id": True} if vision_id else {}))

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype="auto", trust_remote_code=False, subfolder="", revision=None,
                        **options):
        """source: a folder or hub id with model, tokenizer and processor. Raises UserError if it cannot be loaded."""
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging as transformers_logging

        from utils import UserError
        transformers_logging.disable_progress_bar()  # "Loading weights" for a single small file
        if source.startswith(("/", ".", "~")) and not Path(source := str(Path(source).expanduser())).is_dir():
            fail(f"judge {source}: no such folder")
        where = dict(subfolder=subfolder, trust_remote_code=trust_remote_code, revision=revision or "main")
        try:
            processor = AutoProcessor.from_pretrained(source, **where)
            if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
                fail("no image-text model, its processor takes no images; choose another")
            if not processor.tokenizer("a", add_special_tokens=False)["input_ids"]:  # made of nothing, without a word
                raise OSError("its tokenizer is empty")
            if dtype == "auto" and str(device) == "cpu":
                dtype = "float32"
            model, info = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True, **where)
            if info["missing_keys"]:  # transformers would fill them with random numbers
                raise OSError(f"its weights lack {sorted(info['missing_keys'])[0]}")
            return cls(model.to(device), processor, **options)
        except UserError as error:
            fail(f"judge {source}: {error}")
        except Exception as error:  # of transformers, safetensors, the hub, jinja, the device: many kinds
            fail(f"judge {source}: {reason(error, device)}")

    def inputs(self, images, rounded=True):
        """(B, 3, H, W) in [-1, 1] -> the processor's tensors on the model's device and in its dtype.

        rounded: to 8 bits, as a file would hold them; not so where a gradient has to pass."""
        from utils import to_uint8
        images = to_uint8(images) if rounded else (images + 1) * 127.5
        pixels = [[image] for image in images.cpu()]  # nested, as only that form is the same for all
        return self.processor(text=[self.text] * len(pixels), images=pixels, padding=True,
                              return_tensors="pt").to(self.model.device, self.model.dtype)


class MLLMJudge(MLLM):
    """Scores images by the level words, one forward pass per image, batched."""

    OPTIONS = {"prompt": str, "stem": str, "batch": int, "revision": str, "levels": lambda text: tuple(text.split(",")),
               "values": lambda text: tuple(map(float, text.split(",")))}

    def __init__(self, model, processor, prompt=PROMPT, stem=STEM, levels=LEVELS, values=None, **options):
        """values: of the levels; evenly from 1 down to 0 where None, which is VALUES for five."""
        super().__init__(model, processor, prompt, **options)
        self.ids, self.text = level_tokens(processor.tokenizer, levels, stem), self.text + stem
        can_keep = "logits_to_keep" in signature(model.forward).parameters
        self.last = {"logits_to_keep": 1} if can_keep else {}  # a large vocabulary for every position is much memory
        self.values = values or tuple(1 - i / (len(levels) - 1) for i in range(len(levels)))
        if len(self.values) != len(levels):
            fail(f"{len(self.values)} values for {len(levels)} level words; give one for each with --values")

    def logits(self, images, rounded=True):
        """(B, 3, H, W) in [-1, 1] -> (B, vocabulary) next-token logits after the stem."""
        return self.model(**self.inputs(images, rounded), **self.last, use_cache=False).logits[:, -1]

    def scores(self, images, rounded=True):
        return expected_level(self.logits(images, rounded)[:, self.ids], self.values)

    def differentiable(self, images, refs=None):
        """Scores with a gradient, of images of one size, (B, 3, H, W) -> (B,): without rounding to 8 bits; where the
        processor resizes, without clamping. No gradient if the processor leaves torch, as some do."""
        return self.scores(images, rounded=False).to(images.device)

    @torch.no_grad()
    def __call__(self, images, refs=None):
        return torch.stack(by_size(self.scores, self.batch, images)).to(images[0].device)


class RatingJudge(MLLM):
    """Lets the model reason and reads the rating, 1 to 5, out of its answer; greedy, batched.

    An answer that holds no rating scores NaN. It is logged with its text and counted in `unparsed`; the caller gives
    such a sample no weight, or stops. A number in its place would be a reward for confusing the judge.
    """

    OPTIONS = {"prompt": str, "batch": int, "revision": str, "tokens": int}

    def __init__(self, model, processor, prompt, form, tokens=1024, **options):
        from transformers import GenerationConfig
        super().__init__(model, processor, prompt, **options)
        self.form, self.unparsed, own = form, 0, model.generation_config
        # not the model's own settings: they add a temperature and a penalty for repetition
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=tokens, bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id if own.pad_token_id is not None else processor.tokenizer.pad_token_id)

    def answers(self, images):
        """(B, 3, H, W) in [-1, 1] -> B texts."""
        inputs = self.inputs(images)
        ids = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
        return self.processor.batch_decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def __call__(self, images, refs=None):
        texts = by_size(self.answers, self.batch, images)
        scores = torch.tensor([parse_rating(text, self.form) for text in texts], device=images[0].device)
        bad = scores.isnan().nonzero().flatten().tolist()
        self.unparsed += len(bad)
        if bad:
            logging.getLogger(__name__).warning("%d of %d answers hold no rating and score NaN, first image %d: ...%r",
                                                len(bad), len(images), bad[0], texts[bad[0]][-200:])
        return scores


class PyiqaReward:
    """A metric of pyiqa as a reward; (B, 3, H, W) in [-1, 1] -> (B,), sign turned where lower is better."""

    def __init__(self, name, device, trust_remote_code=False):
        from importlib.util import find_spec
        self.name, self.batch = name, 64
        if name.startswith(("qalign", "compare2score")):
            self.batch = 1  # more they cannot
            lack = [] if trust_remote_code else ["--trust-remote-code (pyiqa loads the weights with it)"]
            if name.startswith("qalign") and not find_spec("icecream"):
                lack += ["pip install icecream (pyiqa imports it, but does not declare it)"]
            if lack:
                fail(f"{name}: needs {' and '.join(lack)}, a network at its first use and 16 GB of memory "
                     "(pyiqa:qalign_8bit 9, pyiqa:qalign_4bit 6)")
        try:
            import pyiqa
            self.metric = pyiqa.create_metric(name, device=torch.device(device))
        except Exception as error:  # pyiqa raises bare assertions and the errors of many download back ends
            remedy = "pyiqa.list_models() has the names, and most metrics download their weights at first use"
            fail(f"pyiqa:{name}: {reason(error, device, remedy)}")
        self.sign = -1.0 if self.metric.lower_better else 1.0

    @torch.no_grad()
    def __call__(self, images, refs=None):
        full = self.metric.metric_mode == "FR"
        if full and refs is None:
            raise ValueError(f"pyiqa:{self.name} needs reference images")

        def metric(*stacks):
            return self.metric(*(((x.float() + 1) / 2).clamp(0, 1) for x in stacks)).reshape(len(stacks[0]))
        try:
            scores = by_size(metric, self.batch, images, refs if full else None)
        except (AssertionError, RuntimeError) as error:  # some metrics need larger images than they say
            from utils import out_of_memory
            if out_of_memory(error):
                raise
            height, width = images[0].shape[-2:]
            fail(f"pyiqa:{self.name}: cannot score {width} x {height} pixels ({' '.join(str(error).split())[:120]}); "
                 "try larger images")
        return self.sign * torch.stack(scores).detach().float().to(images[0].device)


def symmetric(reward, views):
    """The mean of a reward over the first `views` of the eight symmetries of a square, again a reward.

    Quality does not depend on how a picture is turned, a judge's score does: most of the difference that one view sees
    among restorations of one input is gone in the mirrored view (figures in the README). That part is noise to the
    policy gradient and room for reward hacking; the mean over views has less of it. NaN in a view makes the mean NaN.
    """
    def turned(x, view):  # mirror first, then the half turn, then the quarter turns
        if x is None or isinstance(x, list):
            return x and [turned(image, view) for image in x]
        return torch.rot90(x.flip(-1) if view % 2 else x, (0, 2, 1, 3)[view // 2], (-2, -1))

    def mean(images, refs=None):
        return sum(reward(turned(images, view), turned(refs, view)) for view in range(views)) / views
    return mean if views > 1 else reward


# ---- sums ----

def moments(scores):
    """(K, B) -> (K, 3) float64: number, sum and sum of squares of the finite scores of each row. They add up."""
    valid, scores = scores.isfinite().double().cpu(), scores.double().cpu().nan_to_num(0, 0, 0)
    return torch.stack([valid.sum(1), scores.sum(1), (scores ** 2).sum(1)], 1)


class WeightedSum:
    """score = sum_k w_k (s_k - mean_k) / (std_k + 1e-4), a reward made of rewards; NaN where a term is NaN.

    mean and std are those of all scores seen, but change only in `update`, between calls. Within a call they are
    constants: an image's score does not depend on the images beside it. Between two updates, and for good after
    `freeze`, it is the same in any call. Where nothing is known yet, the first call updates before it scores: its own
    images, two or more, set the scale, and any later call scores them the same.
    A training loop observes some hundred restorations of the start model, updates and freezes, because what remembers
    rewards needs one scale from first to last. With several processes, `update` takes a function that sums over them.
    """

    def __init__(self, terms):
        """terms: [(weight, name, reward)]."""
        self.weights, self.names, self.rewards = zip(*terms)
        self.known, self.pending = torch.zeros(2, len(terms), 3, dtype=torch.float64)
        self.frozen = False

    @torch.no_grad()
    def observe(self, images, refs=None):
        """The terms' own scores, (K, B); unless frozen, they count in the next `update`."""
        raw = torch.stack([reward(images, refs) for reward in self.rewards])
        if not self.frozen:
            self.pending = self.pending + moments(raw)
        return raw

    def update(self, total=lambda pending: pending):
        """Takes what was observed into mean and std. total: (K, 3) of this process -> their sum over all processes."""
        if not self.frozen:
            self.known, self.pending = self.known + total(self.pending).cpu(), torch.zeros_like(self.pending)

    def freeze(self):
        """From here on mean and std stay as they are."""
        self.frozen = True

    def combine(self, raw):
        """(K, B) scores of the terms -> (B,) with the present mean and std."""
        count, total, squares = self.known.unbind(1)
        if count.min() < 2:
            raise ValueError("a sum needs two images or more that every term could score, to know their scale")
        mean, weights = total / count, torch.tensor(self.weights, dtype=torch.float64)
        std = ((squares / count - mean ** 2).clamp(min=0) * count / (count - 1)).sqrt()
        return (weights / (std + 1e-4) @ (raw.double().cpu() - mean[:, None])).float().to(raw.device)

    def __call__(self, images, refs=None):
        raw = self.observe(images, refs)
        if self.known[:, 0].min() < 2:
            self.update()
        return self.combine(raw)

    def state_dict(self):
        """The statistics, as values that JSON holds exactly."""
        return {"names": list(self.names), "weights": list(self.weights), "known": self.known.tolist(),
                "pending": self.pending.tolist(), "frozen": self.frozen}

    def load_state_dict(self, state):
        if [list(self.names), list(self.weights)] != [state["names"], state["weights"]]:
            fail(f"reward: the statistics are those of {state['weights']} * {state['names']}, not of this sum")
        self.known, self.pending = (torch.tensor(state[key], dtype=torch.float64) for key in ("known", "pending"))
        self.frozen = state["frozen"]


# ---- names ----

REFERENCES = {"psnr": psnr, "psnr_y": psnr_y, "ssim": ssim}


def terms(name):
    """"a+0.5*b" -> [(1.0, "a"), (0.5, "b")]. A plus that no known name follows belongs to its term: pyiqa:clipiqa+."""
    heads = "|".join([*REFERENCES, *MODELS, "pyiqa", "qalign"])
    parts = re.split(rf"\+(?=(?:[\d.]+\*)?(?:{heads})(?:[:?+]|$))", name)
    pairs = [re.fullmatch(r"(?:(\d+\.?\d*|\.\d+)\*)?(.*)", part, re.DOTALL).groups() for part in parts]
    return [(float(weight or 1), part) for weight, part in pairs]


def load(name, device="cpu", dtype="auto", trust_remote_code=False, **options):
    """A reward by its name (see the top of this file). Raises UserError for an unknown one, or one that cannot load.

    dtype: auto, float32, bfloat16 or float16. options: prompt, stem, levels, values, batch, revision, tokens of one
    judge, as strings or as Python values; in a sum they stand in the name.
    """
    parts = terms(name)
    if trust_remote_code:
        print(f"warning: --trust-remote-code lets {name} run code that comes with its weights", file=sys.stderr)
    if len(parts) == 1 and parts[0][0] == 1:
        return load_term(parts[0][1], device, dtype, trust_remote_code, options)
    if options:
        fail(f"reward {name}: in a sum, options stand behind their term: mllm:FOLDER?prompt=...&levels=...")
    return WeightedSum([(w, part, load_term(part, device, dtype, trust_remote_code, {})) for w, part in parts])


def load_term(name, device, dtype, trust_remote_code, options):
    """A reward that is no sum."""
    from urllib.parse import parse_qsl
    plain, _, query = name.partition("?")
    head, _, source = plain.partition(":")
    recipe = MODELS.get(head, {}) | ({"source": source, "subfolder": ""} if source else {})
    options = options | dict(parse_qsl(query, keep_blank_values=True))
    device, dtype = options.pop("device", device), options.pop("dtype", dtype)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        fail(f"reward {name}: dtype {dtype} is unknown; choose auto, float32, bfloat16 or float16")
    if head in MODELS and "source" in recipe:
        kind = RatingJudge if "form" in recipe else MLLMJudge
        try:
            recipe |= {key: kind.OPTIONS[key](v) if isinstance(v, str) else v for key, v in options.items()}
        except (KeyError, ValueError) as error:
            fail(f"reward {name}: {error} is no valid option; it takes {', '.join(kind.OPTIONS)}, device and dtype")
        recipe |= {"dtype": recipe.get("dtype", "auto") if dtype == "auto" else dtype}
        return kind.from_pretrained(device=device, trust_remote_code=trust_remote_code, **recipe)
    if options:
        fail(f"reward {name}: takes no {', '.join(options)}")
    if plain in REFERENCES:
        return REFERENCES[plain]
    if plain == "qalign" or head == "pyiqa" and source:
        return PyiqaReward(source or plain, device, trust_remote_code)
    fail(f"reward {name}: unknown; choose one of {', '.join((*REFERENCES, *MODELS))} (mllm:FOLDER), qalign, "
         "pyiqa:NAME, or a sum as judge+0.5*pyiqa:musiq")


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


FAMILIES = ("blur", "noise", "jpeg", "rescale", "restored", "restored", "lq", "lq")
RESTORED_QUALITY, WORST_QUALITY = 0.5, 0.1  # at their worst
TONE = 0.3  # of data.recolor: an eye for haze and darkness needs crops whose own contrast can be trusted
JUDGED = ("sr", "denoise", "deblur", "jpeg", "derain", "dehaze", "lowlight", "real")  # tasks that `check` measures


def ladder(hq, restored, lq, severity, generator):
    """A random rung for each image: hq, restored, lq (B, 3, H, W), severity of lq (B,) in [0, 1] -> (images, quality).

    blur sigma 0.35 + 2.4 s; noise std 0.01 (20^s - 1) of the full range; JPEG quality 95 (6 / 95)^s; rescaling by
    1 + 3 s; the blends (1 - s) hq + s restored and (1 - s) restored + s lq. Quality falls linearly in s, from 1 (hq)
    to 0.1 (the worst rung, and lq of severity 1). A milder lq is nearer to 1, in proportion to 0.3 + 0.7 severity: what
    is hardly damaged is not bad. A restoration stands at 0.5 where its SSIM is 2 / 3 or less, and rises linearly to 1.
    """
    count = len(hq)
    of_lq = 1 - (1 - WORST_QUALITY) * (0.3 + 0.7 * severity)
    of_restored = 1 - (1 - RESTORED_QUALITY) * (3 * (1 - ssim(restored, hq))).clamp(0, 1)
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
            x, quality[i] = torch.lerp(hq[i], restored[i], s[i]), 1 - (1 - of_restored[i]) * s[i]
        else:
            x, quality[i] = torch.lerp(restored[i], lq[i], s[i]), torch.lerp(of_restored[i], of_lq[i], s[i])
        images.append(x)
    return torch.stack(images).clamp(-1, 1), quality


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


def judge_data(split, count, size, gen, tasks, model=""):
    """Crops of a split, shared out among tasks, with outputs of an SFT restorer (`model`; "": the one in weights/ of
    each task): (hq, restored, lq, severity), images (count, 3, size, size), severity (count,)."""
    from tqdm import tqdm

    from data import get_task, grid_crops, photographs, random_crops
    from model import load as load_restorer
    from sample import rollout
    photos = photographs(split)
    hq = (random_crops(photos, count, size, gen) if split == "train" else grid_crops(photos, count, size, gen)[0])
    lq, restored, severity = torch.empty_like(hq), torch.empty_like(hq), torch.empty(len(hq))
    for number, task in enumerate(bar := tqdm(tasks, desc="restore", leave=False)):
        bar.set_postfix_str(task)
        restorer = load_restorer(model, dtype="bfloat16", task=task)
        for index, own in enumerate(torch.arange(number, len(hq), len(tasks)).split(32)):
            lq[own], severity[own] = get_task(task)(hq[own], gen)
            # a third without sampling noise, so that the judge knows more than one look of a restored image
            eta = restorer.defaults["eta"] * (index % 3 > 0) if split == "train" else restorer.defaults["eta"]
            z = rollout(restorer, lq[own], restorer.defaults["steps"], eta, gen, keep=False).z[-1]
            restored[own] = restorer.decode(z, lq[own])
    return hq, restored, lq, severity


@torch.no_grad()
def check_judge(judge, hq, restored, lq, severity, gen, rounds=8):
    """Held-out quality of a judge: Spearman's rank correlation with the ladder, mean scores, and pairs in order."""
    from scipy.stats import spearmanr
    rungs = [ladder(hq, restored, lq, severity, gen) for _ in range(rounds)]
    images, quality = (torch.cat(x) for x in zip(*rungs))
    scores = {name: judge(x) for name, x in (("lq", lq), ("restored", restored), ("hq", hq))}
    return {"rank_correlation": float(spearmanr(judge(images).cpu(), quality).statistic),
            **{name: x.mean().item() for name, x in scores.items()},
            "hq_over_restored": (scores["hq"] > scores["restored"]).float().mean().item()}


@dataclass
class TrainConfig:
    name: Annotated[str, "which judge: judge or judge2"] = "judge"
    start: Annotated[str, "folder of a judge to start from; empty: random weights"] = ""
    tasks: Annotated[list, "whose lq and restorations stand on the ladder"] = field(default_factory=lambda: ["sr"])
    model: Annotated[str, "restorer of them all; empty: the shipped one of each task"] = ""
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

    from data import recolor
    from sft import one_cycle
    from utils import generator
    if cfg.name not in JUDGES:
        fail(f"--name {cfg.name}: unknown; choose one of {', '.join(JUDGES)}")
    recipe = JUDGES[cfg.name]
    gen = generator(recipe["seed"], 10)
    hq, restored, lq, severity = judge_data("train", cfg.pool, cfg.size, gen, cfg.tasks, cfg.model)
    judge = MLLMJudge.from_pretrained(cfg.start, dtype="float32") if cfg.start else build_judge(recipe)
    if not cfg.start:
        whiten_patches(judge, hq[:1024])
    optimizers = judge_optimizers(judge.model, cfg.lr, cfg.matrix_lr)
    average = AveragedModel(judge.model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    judge.model.train()
    for step in (bar := tqdm(range(cfg.steps), desc=cfg.name)):
        pick = torch.randint(len(hq), (cfg.batch,), generator=gen)
        turn, mirror = torch.randint(4, (2,), generator=gen).tolist()  # the same for the three versions of a crop
        triple = [torch.rot90(x[pick], turn, (2, 3)) for x in (hq, restored, lq)]
        triple = recolor([x.flip(3) for x in triple] if mirror % 2 else triple, gen, TONE)
        images, quality = ladder(*triple, severity[pick], gen)
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
    tasks: Annotated[list, "whose lq and restorations stand on the ladder"] = field(default_factory=lambda: [*JUDGED])
    count: Annotated[int, "held-out crops at most, the same for each task"] = 128
    model: Annotated[str, "restorer of all tasks; empty: the shipped one of each"] = ""
    seed: Annotated[int, "seed of the ladder and the sampler"] = 0


def check(cfg):
    """Prints the held-out quality of judges, a row per task and judge."""
    from utils import generator
    judges = {name: load(name) for name in cfg.judges}
    print("| task | judge | rank correlation | lq | restored | hq | hq over restored |\n|---|---|---|---|---|---|---|")
    for task in cfg.tasks:
        data = judge_data(cfg.split, cfg.count, 64, generator(cfg.seed, 11), [task], cfg.model)
        for name, judge in judges.items():
            row = check_judge(judge, *data, generator(cfg.seed, 12))
            print(f"| {task} | {name} | " + " | ".join(f"{row[key]:.3f}" for key in (
                "rank_correlation", "lq", "restored", "hq")) + f" | {row['hq_over_restored']:.1%} |", flush=True)
    print(f"{cfg.split} split, {len(data[0])} crops with 8 random rungs each")


@dataclass
class ScoreConfig:
    ref: Annotated[list, "reference files, as many as images, in the same order"] = field(default_factory=list)
    metric: Annotated[str, "name of a reward or a sum of them, see the top of reward.py"] = "judge"
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[str, "auto, float32, bfloat16 or float16: the judge's weights and arithmetic"] = "auto"
    prompt: Annotated[str, "question to a judge; empty: the judge's own"] = ""
    stem: Annotated[str, "start of its answer, which the level word continues; empty: the judge's own"] = ""
    levels: Annotated[str, "level words, best first, with commas; empty: excellent,good,fair,poor,bad"] = ""
    values: Annotated[str, "their values, with commas; empty: evenly from 1 to 0"] = ""
    trust_remote_code: Annotated[bool, "run Python code that comes with a model; read it before"] = False


def score(cfg, files):
    """Prints a table of scores, a line per file; a sum takes its scale from these files."""
    from utils import pick_device, read_image
    if not files:
        fail("no images: python reward.py score IMG ... [--ref IMG ...] [--metric NAME]")
    if cfg.ref and len(cfg.ref) != len(files):
        fail(f"--ref: {len(cfg.ref)} references for {len(files)} images; give one for each")
    if not cfg.ref and any(part in REFERENCES for _, part in terms(cfg.metric)):
        fail(f"--metric {cfg.metric}: needs --ref")
    device = pick_device(cfg.device)
    options = {key: getattr(cfg, key) for key in ("prompt", "stem", "levels", "values") if getattr(cfg, key)}
    metric = load(cfg.metric, device, cfg.dtype, cfg.trust_remote_code, **options)
    is_sum = isinstance(metric, WeightedSum)

    def scored(file, ref_file):
        image, ref = (None if path is None else read_image(path)[None].to(device) for path in (file, ref_file))
        if ref is not None and ref.shape != image.shape:
            fail(f"{file} and {ref_file}: sizes differ; references must match their images")
        try:
            return metric.observe(image, ref) if is_sum else metric(image, ref)
        except (ValueError, RuntimeError, AssertionError) as error:  # too small for a window, memory, no reference
            fail(f"{file}: {cfg.metric} cannot score it ({str(error).splitlines()[0]})")
    rows = map(scored, files, cfg.ref or [None] * len(files))  # one after the other, as they are printed
    if is_sum:
        raw = torch.cat(list(rows), 1)
        metric.update()
        if metric.known[:, 0].min() < 2:
            fail(f"--metric {cfg.metric}: a sum takes its scale from the files, so give two or more that it can score")
        rows = metric.combine(raw)
    print(f"{cfg.metric:>12s}  file")
    seconds = [time.perf_counter()]
    for file, row in zip(files, rows):
        print(f"{row.item():12.4f}  {file}")
        seconds.append(time.perf_counter())
    if len(files) > 2 and not is_sum:  # the first one warms up
        peak = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most" if device.startswith("cuda") else ""
        print(f"{(seconds[-1] - seconds[1]) / (len(files) - 1):.3f} s an image, one by one{peak}", file=sys.stderr)


def main():
    from utils import parse
    command, rest = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if command == "train":
        train_judge(parse(TrainConfig, rest, "Trains a small MLLM judge on the degradation ladder."))
    elif command == "check":
        check(parse(CheckConfig, rest, "Measures judges on held-out photographs."))
    elif command == "score":
        score(*parse(ScoreConfig, rest, "Scores image files.", positional="image files"))
    else:
        fail("usage: python reward.py score | check | train, each with --help")


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
