"""Trains the small judges of weights/ on a ladder of damage whose similarity to hq is measured.

A rung's target is what metrics with a reference say of it, so that a judge without one learns to
predict them, as RankIQA (arXiv 1707.08347) and LEAF learn from such pseudo-labels:
  q = mean over the metrics of the share of all rungs that are at least as far from their hq,
so that q is 1 for hq, uniform in [0, 1] for one metric, and on one scale for all kinds of damage.

Loss: cross entropy of the next token behind the stem with soft labels, as in DeQA-Score (You et al.
2025, arXiv 2501.11561): quality q lies between two neighbouring levels of values v_j > v_k, and
  p_j = (q - v_k) / (v_j - v_k),  p_k = 1 - p_j,  so that the expected value sum_j v_j p_j is q.

Chosen here
 1. judge learns LPIPS (alex) and DISTS, on every second training photograph; judge2, of another
    class, FSIM on the others. LPIPS (vgg), GMSD and VIF are left for the check.
    Shipped are judge2 and, hardened, judge as weights/broad; weights/judge is of an older recipe.
 2. The patch embedding starts as a PCA whitening of patches: quality is in high frequencies.
 3. Photographs differ in softness and grain (filmed), and every image that is learned from has a
    little noise (faint): without, one level of color noise took 0.08 off the score of hq.
 4. Hardening: a judge learns on, with the output of restorers that RL drove against it (--hacked).

    python weights/photographs.py --out photos                              # what --data holds
    python weights/train_judge.py --name judge --data photos                # laptop, an hour
    python weights/train_judge.py --name judge --data photos --start runs/judge \\
        --hacked runs/hacked/model --out runs/judge-1                       # a round of hardening
    python weights/train_judge.py --check weights/judge weights/judge2      # held-out quality
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import (Source, fine_detail, get_task, held_out, jpeg, open_split, pool,  # noqa: E402
                  resize)
from model import load as load_restorer  # noqa: E402
from reward import LEVELS, PROMPT, STEM, MLLMJudge, load_judge  # noqa: E402
from reward import load as load_reward  # noqa: E402
from sample import restore  # noqa: E402
from utils import (atomic, generator, load_checkpoint, new_run, one_line, option,  # noqa: E402
                   parse, run_main, save_checkpoint, to_uint8)


def rescale(image, s):
    """(3, H, W) shrunk by 1 + 3 s and enlarged again, bicubic with antialias."""
    height, width = image.shape[-2:]
    small = resize(image[None], [round(side / (1 + 3 * s)) for side in (height, width)])
    return resize(small, [height, width])[0]


def stripes(image, s, gen):
    """A sine of period 2 to 8 pixels in a random direction, grey or colored, up to 0.15."""
    period, angle, phase = (torch.rand(3, generator=gen) * torch.tensor([6, math.pi, 6.3])).tolist()
    rows, columns = (torch.arange(side) for side in image.shape[1:])
    place = rows[:, None] * math.sin(angle) + columns * math.cos(angle)
    wave = torch.sin(2 * math.pi * place / (2 + period) + phase)
    return image + 0.3 * s ** 2 * wave * uneven(gen)


def checker(image, s, gen):
    """A checkerboard of 1 or 2 pixels, grey or colored, up to 0.15 of the range."""
    side = int(torch.randint(1, 3, (), generator=gen))
    rows, columns = (torch.arange(length) // side for length in image.shape[1:])
    return image + 0.3 * s ** 2 * ((rows[:, None] + columns) % 2 * 2 - 1) * uneven(gen)


def uneven(gen):
    """Strength of a pattern in each channel, (3, 1, 1): as often grey as colored."""
    color = torch.rand(3, 1, 1, generator=gen) * 2 - 1
    return color if torch.rand((), generator=gen) < 0.5 else torch.ones(3, 1, 1)


def color_noise(image, s, gen):
    """Noise that leaves the brightness, of 1 or 2 pixels, of standard deviation up to 24 of 255."""
    side = int(torch.randint(1, 3, (), generator=gen))
    noise = torch.randn(3, *(-(-length // side) for length in image.shape[1:]), generator=gen)
    noise = noise.repeat_interleave(side, 1).repeat_interleave(side, 2)
    noise = noise - (noise * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    return image + (0.008 + 0.18 * s ** 2) * noise[:, :image.shape[1], :image.shape[2]]


def ring(image, s):
    """Frequencies above a share 1 - 0.8 s of the highest are cut off sharply (Gibbs' ringing)."""
    rows, columns = (torch.fft.fftfreq(side).abs() * 2 for side in image.shape[1:])
    keep = torch.maximum(rows[:, None], columns) <= 1 - 0.8 * s
    return torch.fft.ifft2(torch.fft.fft2(image) * keep).real


def smooth(image, s):
    """A guided filter (He et al. 2010) of the image by itself: flat where it was almost flat."""
    def box(x):
        return F.avg_pool2d(F.pad(x, (2,) * 4, mode="reflect"), 5, 1)
    mean = box(image)
    slope = 1 - 1 / (1 + (box(image * image) - mean ** 2) / (0.3 * s ** 2 + 1e-6))
    return box(slope) * image + box(mean - slope * mean)


def tone(image, s, gen):
    """Gamma, contrast and brightness, all channels or each by itself (a color cast)."""
    shape = (3, 3, 1, 1) if torch.rand((), generator=gen) < 0.5 else (3, 1, 1, 1)
    gamma, contrast, shift = s * (torch.rand(shape, generator=gen) * 2 - 1)
    x = ((image + 1) / 2).clamp(0, 1) ** (1.5 * gamma).exp() * 2 - 1
    return x * (0.7 * contrast).exp() + 0.5 * shift


DAMAGE = {  # (3, H, W) in [-1, 1], severity in [0, 1], generator -> (3, H, W)
    "blur": lambda x, s, gen: gaussian_blur(x, [13, 13], [0.35 + 2.4 * s] * 2),
    "noise": lambda x, s, gen: x + 0.02 * (20 ** s - 1) * torch.randn(x.shape, generator=gen),
    "jpeg": lambda x, s, gen: jpeg(x, int(95 * (6 / 95) ** s)),
    "rescale": lambda x, s, gen: rescale(x, s),
    "color noise": color_noise, "stripes": stripes, "checker": checker, "tone": tone,
    "sharpen": lambda x, s, gen: x + 4 * s * (x - gaussian_blur(x, [7, 7], [1.0, 1.0])),
    "ring": lambda x, s, gen: ring(x, s), "smooth": lambda x, s, gen: smooth(x, s)}
LOOKS = ((1, -1), (1, 1.0), (1.5, -1), (0.6, 0.0))  # share of the steps, eta; -1: as trained
KINDS = ("sr", "sr2", "denoise", "deblur", "jpeg", "derain", "real", "dehaze", "lowlight")
RUNGS = 12
SIDE = 72  # pixels of a rung; training sees any 64 x 64 of it, so that no grid is learned


def damaged(hq, gen):
    """(3, H, W) by one random entry of DAMAGE, or by two."""
    x = hq
    for _ in range(1 if torch.rand((), generator=gen) < 0.75 else 2):
        kind = list(DAMAGE)[int(torch.randint(len(DAMAGE), (), generator=gen))]
        x = DAMAGE[kind](x, torch.rand((), generator=gen).item(), gen).clamp(-1, 1)
    return x


def restored(restorer, lq, gen, share=1, eta=-1):
    """What a restorer makes of lq (B, 3, H, W), with a share of the steps that it learned."""
    steps = max(2, round(share * restorer.defaults["steps"]))
    bar = tqdm(lq.split(32), restorer.defaults["task"], leave=False, delay=2)
    return torch.cat([restore(restorer, part, steps, eta, gen) for part in bar])


def ladder(hq, lq, restorer, gen):
    """RUNGS rungs for each of hq, lq (B, 3, H, W) -> (B, RUNGS, 3, H, W) in [-1, 1], of 8 bits.

    hq; lq; three of LOOKS of the restorer; two mixtures of these (beyond lq - restored - hq, too);
    five kinds of DAMAGE.
    """
    looks = torch.stack([restored(restorer, lq, gen, *look) for look in LOOKS])
    rungs = []
    for i in range(len(hq)):
        some = looks[torch.randperm(len(LOOKS), generator=gen)[:3], i]
        s, beyond = torch.rand(2, generator=gen) * torch.tensor([1.0, 1.4])
        mixed = [torch.lerp(hq[i], some[0], s), torch.lerp(lq[i], some[1], beyond)]
        rungs.append(torch.stack([hq[i], lq[i], *some, *mixed,
                                  *(damaged(hq[i], gen) for _ in range(5))]))
    return to_uint8(torch.stack(rungs).clamp(-1, 1)).float() / 127.5 - 1


def distances(images, hq, metrics):
    """(B, R, 3, H, W), hq (B, 3, H, W) -> (B, R, M): how far they are by each metric, 0 for hq."""
    values = []
    for name in metrics:
        metric = load_reward(f"pyiqa:{name}")
        values.append(torch.stack([metric(y[None], y[None]) - metric(x, y.expand_as(x))
                                   for x, y in zip(tqdm(images, name, leave=False), hq)]))
    return torch.stack(values, 2).clamp(min=0)


def quality(distance, scale):
    """(..., M) -> (...): 1 minus the share of the values in `scale` (n, M), sorted, below them."""
    shares = [torch.searchsorted(scale[:, m].contiguous(), distance[..., m].contiguous())
              for m in range(scale.shape[1])]
    return 1 - torch.stack(shares).float().mean(0) / len(scale)


def soft_label(quality, values):
    """(B,) in [0, 1] -> (B, 5) probabilities of two neighbouring levels, of mean `quality`."""
    return (1 - (quality[:, None] - values).abs() / (values[0] - values[1])).clamp(min=0)


def recolor(images, gen):
    """A little gamma and contrast, colors in another order and strength; (B, 3, H, W)."""
    count = len(images)
    gamma, contrast, color = torch.rand(3, count, 1, 1, 1, generator=gen)
    order = torch.rand(count, 3, generator=gen).argsort(1)[:, :, None, None]
    x = (((images + 1) / 2) ** (0.9 + 0.2 * gamma) * 2 - 1) * (0.9 + 0.1 * contrast)
    x = x.gather(1, order.expand_as(x))  # channels in another order
    return torch.lerp(x.mean(1, keepdim=True), x, (1.4 * color).clamp(0.2, 1)).clamp(-1, 1)


def filmed(image, gen):
    """(3, S, S) as softer lenses and grainier films show it: enlarged by up to 1.5, with grain of
    standard deviation up to 4 of 255, a quarter of it color."""
    enlarge, strength = torch.rand(2, generator=gen).tolist()
    side = round(image.shape[-1] / (1 + enlarge / 2))
    grain = [torch.randn(count, side, side, generator=gen) for count in (1, 3)]
    x = image[:, :side, :side] + strength ** 2 * 4 / 127.5 * (grain[0] + grain[1] / 4)
    return resize(x[None], list(image.shape[-2:]))[0].clamp(-1, 1)


ROPE = {"rope_type": "default", "rope_theta": 1e4}
PATCH = {"patch_size": 4, "temporal_patch_size": 1}  # 48 numbers: none is lost in 64 dimensions
MERGE = 4  # 4 x 4 patches are one token of the language model
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "bos_token_id": None,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
        "initializer_range": 0.1}
BUILD = {  # judge2 differs in class, size, seed, photographs (half: which) and labels
    "judge": {
        "seed": 1, "half": 0, "metrics": ["lpips", "dists"],
        "model_type": "qwen3_vl", "processor": "Qwen3VLProcessor",
        "vision": {"depth": 2, "hidden_size": 64, "intermediate_size": 192, "num_heads": 4,
                   "out_hidden_size": 128, "num_position_embeddings": 256,
                   "deepstack_visual_indexes": []},
        "text": {"head_dim": 32, "rope_parameters": ROPE | {
            "mrope_section": [6, 5, 5], "mrope_interleaved": True}}},
    "judge2": {
        "seed": 2, "half": 1, "metrics": ["fsim"],
        "model_type": "qwen2_5_vl", "processor": "Qwen2_5_VLProcessor",
        "vision": {"depth": 2, "hidden_size": 64, "intermediate_size": 192, "num_heads": 4,
                   "out_hidden_size": 96, "window_size": 64, "fullatt_block_indexes": [0, 1]},
        "text": {"hidden_size": 96, "rope_parameters": ROPE | {"mrope_section": [4, 4, 4]}}}}
NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL = [f"<|{name}|>" for name in NAMES]


def build_tokenizer():
    """A byte-level BPE tokenizer of the Qwen class that holds each level word as one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [f"user\n{PROMPT}", f"assistant\n{STEM}", *[f"{STEM} {word}" for word in LEVELS]]
    bpe.train_from_iterator(texts * 4, trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    learned = json.loads(bpe.to_str())["model"]
    return transformers.Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]],
        additional_special_tokens=SPECIAL[1:], eos_token=SPECIAL[2], pad_token=SPECIAL[0])


def build_judge(recipe):
    """A judge with random weights from an entry of BUILD; the same random numbers every time."""
    tokenizer = build_tokenizer()
    names = ("vision_start", "vision_end", "image", "video")
    ids = zip(names, tokenizer.convert_tokens_to_ids(SPECIAL[3:]))
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = transformers.AutoConfig.for_model(
        recipe["model_type"], tie_word_embeddings=True, text_config=TEXT | recipe["text"] | sizes,
        vision_config=PATCH | {"initializer_range": 0.1, "spatial_merge_size": MERGE}
        | recipe["vision"],
        **{f"{name}_token_id": token for name, token in ids})
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator only
        torch.manual_seed(recipe["seed"])
        model = transformers.AutoModelForImageTextToText.from_config(config)
    pixels = transformers.Qwen2VLImageProcessor(
        **PATCH, merge_size=MERGE, size={"shortest_edge": 64 * 64, "longest_edge": 2048 * 2048})
    return MLLMJudge(model, getattr(transformers, recipe["processor"])(
        image_processor=pixels, tokenizer=tokenizer,
        chat_template=(ROOT / "weights/judge/chat_template.jinja").read_text(encoding="utf-8"),
        video_processor=transformers.Qwen2VLVideoProcessor(**PATCH)))  # never used, but asked for


@torch.no_grad()
def whiten_patches(judge, images):
    """Sets the patch embedding to the PCA whitening of the patches of uint8 (B, 3, H, W).

    What varies by less than about 2 of 255 is not enlarged: a judge would see what nobody sees."""
    projection = judge.model.model.visual.patch_embed.proj
    patches = judge.inputs(images)["pixel_values"].double()  # (patches, 3 * 4 * 4)
    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean) / len(patches)
    variance, directions = torch.linalg.eigh(covariance)
    rows = (directions / (variance + 1e-3).sqrt()).flip(1).T[:len(projection.weight)]
    projection.weight[:len(rows)] = rows.view(-1, *projection.weight.shape[1:]).float()
    if projection.bias is not None:
        projection.bias[:len(rows)] = -(rows @ mean).float()


def crops(data, part, task, count, seed):
    """(lq, hq) of a task, (count, 3, SIDE, SIDE). part 0 or 1: random crops with fine detail of one
    half of the training photographs, most filmed, half recolored; val, test: held-out ones."""
    cfg, degrade = SimpleNamespace(data=data, lq="", hq=""), get_task(task)
    if part in ("val", "test"):
        return held_out(open_split(cfg, part), degrade, SIDE, count)[:2]
    source = open_split(cfg, "train")
    names = [name for name in source.names if "motorcycle_right" not in name]  # as the left one
    files = dict(zip(source.names, source.paths))
    source = Source([(name, *files[name]) for name in names[part::2]])
    gen = generator(seed, 13)
    with one_line(f"--data {data}", f"two photographs of {SIDE} pixels and with detail are needed"):
        hq = pool(source, get_task("sr"), SIDE, seed, 3 * count)[1]
        hq = torch.stack([x for x in hq if fine_detail(to_uint8(x)) >= 0.03][:count])
    hq = torch.stack([filmed(x, gen) if i % 3 else x for i, x in enumerate(hq)])
    hq[::2] = recolor(hq[::2], gen)
    return degrade(hq, gen)[0], hq


def turned(images, view, gen):
    """A random 64 x 64 of images (B, 3, SIDE, SIDE) in one of eight views."""
    top, left = torch.randint(SIDE - 63, (2,), generator=gen).tolist()
    x = images[:, :, top:top + 64, left:left + 64]
    return torch.rot90(x.flip(3) if view % 2 else x, view // 2, (2, 3))


def faint(images, gen):
    """uint8 (B, 3, S, S) with noise that nobody sees, of a standard deviation of about 2 levels at
    most, grey and color, of 1 and 2 pixels: else a judge learns traces of a level that tell a rung,
    and not how it looks."""
    noise, every = 0, torch.rand(len(images), 1, 1, 1, generator=gen)
    for side, channels in ((1, 1), (1, 3), (2, 1), (2, 3)):
        shape = len(images), channels, *(length // side for length in images.shape[2:])
        fine = torch.randn(shape, generator=gen) * torch.rand(shape[0], 1, 1, 1, generator=gen)
        noise = noise + 1.5 * every * fine.repeat_interleave(side, 2).repeat_interleave(side, 3)
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def build_ladder(cfg, recipe):
    """{"images": uint8 (n, 3, SIDE, SIDE), "distance": (n, M)} of cfg.pool crops of every task."""
    images, distance = [], []
    for number, task in enumerate(tqdm(KINDS, "ladder")):
        seed = 100 * recipe["seed"] + number
        lq, hq = crops(cfg.data, recipe["half"], task, cfg.pool, seed)
        restorer = load_restorer("", task, dtype="bfloat16")
        rungs = ladder(hq, lq, restorer, generator(seed, 10))
        images.append(to_uint8(rungs).flatten(0, 1))
        distance.append(distances(rungs, rungs[:, 0], recipe["metrics"]).flatten(0, 1))
    return {"images": torch.cat(images), "distance": torch.cat(distance)}


def hacked_rungs(cfg, recipe):
    """The same of the output of the restorers cfg.hacked, and of its mixtures with hq."""
    images, distance = [], []
    for number, folder in enumerate(cfg.hacked):
        seed = 1000 * recipe["seed"] + number
        restorer = load_restorer(folder, dtype="bfloat16")
        task = restorer.defaults["task"].partition("+")[0]  # of several the first
        lq, hq = crops(cfg.data, recipe["half"], task, cfg.pool, seed)
        output = restored(restorer, lq, generator(seed, 10))
        share = torch.rand(len(hq), 1, 1, 1, generator=generator(seed, 11))
        rungs = torch.stack([output, torch.lerp(hq, output, share)], 1)
        images.append(to_uint8(rungs).flatten(0, 1))
        distance.append(distances(rungs, hq, recipe["metrics"]).flatten(0, 1))
    return {"images": torch.cat(images), "distance": torch.cat(distance)}


def train(cfg):
    """Trains BUILD[cfg.name]; leaves judge/, in float16, and ladder.safetensors in cfg.out."""
    recipe, out = BUILD[cfg.name], new_run(cfg.out or f"runs/{cfg.name}")
    gen = generator(recipe["seed"], 12)
    if cfg.start:
        judge = load_judge(f"{cfg.start}/judge")
        rungs, info = load_checkpoint(f"{cfg.start}/ladder.safetensors")
    else:
        judge, rungs, info = build_judge(recipe), build_ladder(cfg, recipe), {}
        whiten_patches(judge, rungs["images"][::RUNGS][:1024, :, :64, :64])
        info["base"] = len(rungs["images"])  # whose distances make the scale, in every round
    if cfg.hacked:
        more = hacked_rungs(cfg, recipe)
        rungs = {key: torch.cat([value, more[key]]) for key, value in rungs.items()}
    save_checkpoint(out / "ladder.safetensors", rungs, info)
    base = rungs["distance"][:info["base"]]
    target = quality(rungs["distance"], base[(base > 0).all(1)].sort(0).values)
    model, rate = judge.model.train(), 0.3 if cfg.start else 1.0
    matrices, others = [], []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "embed" not in name else others).append(weight)
    optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.02),
                  torch.optim.AdamW(others, lr=1e-3, weight_decay=0.05)]
    schedules = [OneCycleLR(optimizer, peak * rate, cfg.steps, pct_start=0.1, cycle_momentum=False)
                 for optimizer, peak in zip(optimizers, (0.02, 1e-3))]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    bar, smooth_loss = tqdm(range(cfg.steps), cfg.name), 1.6
    for _ in bar:
        pick = torch.randint(len(target), (48,), generator=gen)
        images = [turned(part, view, gen)
                  for view, part in enumerate(rungs["images"][pick].split(6))]
        logits = model(**judge.inputs(faint(torch.cat(images), gen))).logits[:, -1]
        log_p = logits.log_softmax(-1)[:, judge.ids]  # over the whole vocabulary
        loss = -(soft_label(target[pick], judge.values) * log_p).sum(1).mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in optimizers + schedules:
            part.step()
        average.update_parameters(model)
        smooth_loss += 0.01 * (loss.item() - smooth_loss)
        bar.set_postfix(loss=f"{smooth_loss:.3f}")
    with atomic(out / "judge") as folder:
        average.module.half().save_pretrained(folder)
        judge.processor.save_pretrained(folder)
    print(f"wrote {out}/judge")


def check(folders, data, split, count=64):
    """Prints how well judges predict metrics that they never saw, on held-out crops of all tasks.

    Rank: Spearman's correlation of score and similarity over the ladder of a task.
    """
    judges = {folder: load_judge(folder, tile=64) for folder in folders}
    seen = ["lpips-vgg", "gmsd", "vif"]
    print(f"| task | judge | {' | '.join(seen)} | lq | restored | hq | hq over restored |")
    print("|---" * 9 + "|")
    for number, task in enumerate(KINDS):
        lq, hq = crops(data, split, task, count, 0)
        rungs = ladder(hq, lq, load_restorer("", task, dtype="bfloat16"), generator(number, 14))
        far = distances(rungs, rungs[:, 0], seen).flatten(0, 1)
        for name, judge in judges.items():
            scores = judge(rungs.flatten(0, 1))
            ranks = [-spearmanr(scores, far[:, m]).statistic for m in range(len(seen))]
            of_hq, of_lq, *looks = scores.view(len(hq), RUNGS)[:, :5].T
            looks = torch.stack(looks)
            over = (of_hq > looks).float().mean()
            cells = [*ranks, of_lq.mean(), looks.mean(), of_hq.mean(), over]
            row = " | ".join(f"{cell:.3f}" for cell in cells)
            print(f"| {task} | {name} | {row} |", flush=True)
    grain = torch.randn(hq.shape, generator=generator(0, 15))
    grain = grain - grain.mean(1, keepdim=True)  # leaves the grey value
    grain = 4 / 127.5 * grain / grain.std()
    print("\n| judge | color noise of std 4 lowers | spread over 8 views | ms per image |")
    print("|---" * 4 + "|")
    for name, judge in judges.items():
        lower = (judge(hq + grain) < judge(hq)).float().mean()
        start = time.time()
        views_of = torch.stack([judge(torch.rot90(x, turn, (2, 3))) for turn in range(4)
                                for x in (rungs[:, 2], rungs[:, 2].flip(3))])
        cost = 1000 * (time.time() - start) / views_of.numel()
        print(f"| {name} | {lower:.3f} | {views_of.std(0).mean():.4f} | {cost:.1f} |")


@dataclass
class Config:
    """Trains a small judge, or checks judges."""
    name: str = option("judge", "which judge", choices=sorted(BUILD))
    data: str = option("photos", "folder of photographs, see photographs.py")
    out: str = option("", "folder to write; empty: runs/NAME")
    steps: int = option(6000, "optimizer steps", least=11)
    pool: int = option(240, "crops for each task, and for each restorer in --hacked", least=1)
    start: str = option("", "folder of an earlier run, to go on from its judge and ladder")
    hacked: list = option([], "folders of restorers whose output joins the ladder")
    check: list = option([], "measure these judges instead")
    split: str = option("test", "photographs on which they are measured", ["val", "test"])


def main():
    cfg = parse(Config)
    check(cfg.check, cfg.data, cfg.split) if cfg.check else train(cfg)


if __name__ == "__main__":
    run_main(main)
