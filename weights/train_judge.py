"""Trains the small judges of weights/ on a ladder of damage of known severity, and checks them.

Loss: cross entropy of the next token behind the stem with soft labels, as in DeQA-Score (You et al.
2025, arXiv 2501.11561): quality q lies between two neighbouring levels of values v_j > v_k, and
  p_j = (q - v_k) / (v_j - v_k),  p_k = 1 - p_j,  so that the expected value sum_j v_j p_j is q.

Chosen here
 1. No person scored these images: quality falls linearly with the severity of damage (`ladder`).
 2. The patch embedding starts as a PCA whitening of patches: quality is in high frequencies.

    python weights/train_judge.py --name judge --out runs/judge    # laptop, 40 minutes
    python weights/train_judge.py --check                          # held-out quality of the judges
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import get_task, held_out, jpeg, open_split, pool, resize  # noqa: E402
from model import load as load_restorer  # noqa: E402
from reward import JUDGES, LEVELS, PROMPT, STEM, MLLMJudge, load_judge, ssim  # noqa: E402
from sample import draw, rollout  # noqa: E402
from utils import atomic, generator, new_run, option, parse, run_main, to_uint8  # noqa: E402


def rescale(image, factor):
    """(3, H, W) shrunk by `factor` >= 1 and enlarged again, bicubic with antialias."""
    height, width = image.shape[-2:]
    small = resize(image[None], [round(height / factor), round(width / factor)])
    return resize(small, [height, width])[0]


DAMAGE = {  # (3, H, W) in [-1, 1], severity in [0, 1], unit noise -> (3, H, W)
    "blur": lambda x, s, noise: gaussian_blur(x, [13, 13], [0.35 + 2.4 * s] * 2),
    "noise": lambda x, s, noise: x + 0.02 * (20 ** s - 1) * noise,
    "jpeg": lambda x, s, noise: jpeg(x, int(95 * (6 / 95) ** s)),
    "rescale": lambda x, s, noise: rescale(x, 1 + 3 * s)}
RUNGS = (*DAMAGE, "restored", "restored", "lq", "lq")


def ladder(hq, restored, lq, severity, gen):
    """A random rung for each image: hq, restored, lq (B, 3, H, W), severity of lq (B,) in [0, 1].

    Returns (images, quality (B,)). Rungs are DAMAGE of hq, and the blends of hq with restored, and
    of restored with lq. Quality falls linearly with s, from 1 (hq) to 0.1 (the worst rung, and lq
    of severity 1, or less damaged). restored has 0.5 up to an SSIM of 2/3, and rises linearly to 1.
    """
    of_lq = 1 - 0.9 * (0.3 + 0.7 * severity)
    of_restored = 1 - 0.5 * (3 * (1 - ssim(restored, hq))).clamp(0, 1)
    s = torch.rand(len(hq), generator=gen)
    kinds = torch.randint(len(RUNGS), (len(hq),), generator=gen).tolist()
    noise = torch.randn(hq.shape, generator=gen)
    images, quality = [], 1 - 0.9 * s
    for i, kind in enumerate(kinds):
        if RUNGS[kind] in DAMAGE:
            images.append(DAMAGE[RUNGS[kind]](hq[i], s[i].item(), noise[i]))
        elif RUNGS[kind] == "restored":
            images.append(torch.lerp(hq[i], restored[i], s[i]))
            quality[i] = 1 - (1 - of_restored[i]) * s[i]
        else:
            images.append(torch.lerp(restored[i], lq[i], s[i]))
            quality[i] = torch.lerp(of_restored[i], of_lq[i], s[i])
    return torch.stack(images).clamp(-1, 1), quality


def soft_label(quality, values):
    """(B,) in [0, 1] -> (B, 5) probabilities of two neighbouring levels, of mean `quality`."""
    return (1 - (quality[:, None] - values).abs() / (values[0] - values[1])).clamp(min=0)


def recolor(images, gen, tone=0.3):
    """Random gamma, contrast, order and strength of colors; (K, B, 3, H, W), the same for all K.

    tone: how far gamma and contrast stray; a judge that sees much of that does not see haze.
    """
    count = images.shape[1]
    high, low = torch.tensor([0.8, 0.5, 1.4]), torch.tensor([0.7, 0.6, -0.2])
    drawn = torch.rand(count, 3, generator=gen) * high + low
    gamma, contrast, color = drawn.T.view(3, count, 1, 1, 1)
    gamma, contrast = 1 + tone * (gamma - 1), 1 + tone * (contrast - 1)
    order = torch.rand(count, 3, generator=gen).argsort(1)
    x = (((images + 1) / 2) ** gamma * 2 - 1) * contrast
    x = x.gather(2, order[None, :, :, None, None].expand_as(x))  # channels in another order
    return torch.lerp(x.mean(2, keepdim=True), x, color.clamp(0, 1)).clamp(-1, 1)


ROPE = {"rope_type": "default", "rope_theta": 1e4}
PATCH = {"patch_size": 8, "temporal_patch_size": 1}
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "bos_token_id": None,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
        "initializer_range": 0.1}
BUILD = {  # judge2 differs in class, size, patch order, training crops and seed
    "judge": {
        "seed": 1, "steps": 6000, "model_type": "qwen3_vl", "processor": "Qwen3VLProcessor",
        "vision": {"depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
                   "out_hidden_size": 128, "num_position_embeddings": 64,
                   "deepstack_visual_indexes": []},
        "text": {"head_dim": 32, "rope_parameters": ROPE | {
            "mrope_section": [6, 5, 5], "mrope_interleaved": True}}},
    "judge2": {
        "seed": 2, "steps": 2000, "model_type": "qwen2_5_vl", "processor": "Qwen2_5_VLProcessor",
        "vision": {"depth": 4, "hidden_size": 112, "intermediate_size": 256, "num_heads": 4,
                   "out_hidden_size": 96, "window_size": 64, "fullatt_block_indexes": [0, 1, 2, 3]},
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
        vision_config=PATCH | {"initializer_range": 0.1} | recipe["vision"],
        **{f"{name}_token_id": token for name, token in ids})
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator only
        torch.manual_seed(recipe["seed"])
        model = transformers.AutoModelForImageTextToText.from_config(config)
    pixels = transformers.Qwen2VLImageProcessor(
        **PATCH, merge_size=2, size={"shortest_edge": 64 * 64, "longest_edge": 2048 * 2048})
    return MLLMJudge(model, getattr(transformers, recipe["processor"])(
        image_processor=pixels, tokenizer=tokenizer,
        chat_template=(ROOT / "weights/judge/chat_template.jinja").read_text(encoding="utf-8"),
        video_processor=transformers.Qwen2VLVideoProcessor(**PATCH)))  # never used, but asked for


@torch.no_grad()
def whiten_patches(judge, images):
    """Sets the patch embedding to the PCA whitening of the patches of images (B, 3, H, W)."""
    projection = judge.model.model.visual.patch_embed.proj
    patches = judge.inputs(to_uint8(images))["pixel_values"].double()  # (patches, 3 * 8 * 8)
    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean) / len(patches)
    variance, directions = torch.linalg.eigh(covariance)
    rows = (directions / (variance + 1e-4).sqrt()).flip(1).T[:len(projection.weight)]
    projection.weight[:len(rows)] = rows.view(-1, *projection.weight.shape[1:]).float()
    if projection.bias is not None:
        projection.bias[:len(rows)] = -(rows @ mean).float()


@torch.no_grad()
def crops(split, task, count, gen):
    """(hq, restored, lq, severity) of `count` crops, by the shipped restorer of the task."""
    source = open_split(SimpleNamespace(data="", lq="", hq="", match="same", task=task), split)
    degrade, seed = get_task(task), gen.initial_seed() % 2 ** 31
    hq = (pool(source, degrade, 64, seed, count) if split == "train" else
          held_out(source, degrade, 64, count))[1]
    lq, severity = degrade(hq, gen)  # again, for the severity
    restorer = load_restorer("", task, dtype="bfloat16")
    steps, eta = restorer.defaults["steps"], restorer.defaults["eta"]
    restored = []
    for number, part in enumerate(tqdm(lq.split(32), desc=task, leave=False)):
        own_eta = 0.0 if split == "train" and number % 3 == 0 else eta  # more than one look
        path = rollout(restorer, *draw(restorer, part, steps, gen), own_eta)
        restored.append(restorer.decode(path.z[-1], part))
    return hq, torch.cat(restored), lq, severity


def train(cfg):
    """Trains BUILD[cfg.name] and saves it the transformers way, in float16."""
    recipe, out = BUILD[cfg.name], new_run(cfg.out or f"runs/{cfg.name}")
    total = cfg.steps or recipe["steps"]
    gen = generator(recipe["seed"], 10)
    hq, restored, lq, severity = crops("train", "sr", cfg.pool, gen)
    judge = build_judge(recipe)
    whiten_patches(judge, hq[:1024])
    model = judge.model.train()
    matrices, others = [], []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "embed" not in name else others).append(weight)
    optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.02),
                  torch.optim.AdamW(others, lr=1e-3, weight_decay=0.05)]
    schedules = [OneCycleLR(optimizer, peak, total, pct_start=0.1, cycle_momentum=False)
                 for optimizer, peak in zip(optimizers, (0.02, 1e-3))]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for _ in tqdm(range(total), desc=cfg.name):
        pick = torch.randint(len(hq), (48,), generator=gen)
        turn, mirror = torch.randint(4, (2,), generator=gen).tolist()
        versions = torch.rot90(torch.stack([hq[pick], restored[pick], lq[pick]]), turn, (3, 4))
        versions = recolor(versions.flip(4) if mirror % 2 else versions, gen)
        images, quality = ladder(*versions, severity[pick], gen)
        logits = model(**judge.inputs(to_uint8(images))).logits[:, -1]
        log_p = logits.log_softmax(-1)[:, judge.ids]  # over the whole vocabulary
        loss = -(soft_label(quality, judge.values) * log_p).sum(1).mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in optimizers + schedules:
            part.step()
        average.update_parameters(model)
    with atomic(out) as folder:
        average.module.half().save_pretrained(folder)
        judge.processor.save_pretrained(folder)
    print(f"wrote {out}")


def check(count=128, rounds=8):
    """Prints the rank correlation of both judges with the ladder on test crops, for each task."""
    print("| task | judge | rank | lq | restored | hq | hq over restored |\n" + "|---" * 7 + "|")
    for task in ("sr", "denoise", "deblur", "jpeg", "derain", "dehaze", "lowlight", "real"):
        hq, restored, lq, severity = crops("test", task, count, generator(0, 11))
        for name in BUILD:
            judge, gen = load_judge(**JUDGES[name]), generator(0, 12)
            rungs = [ladder(hq, restored, lq, severity, gen) for _ in range(rounds)]
            scores = torch.cat([judge(images) for images, _ in rungs])
            rank = spearmanr(scores, torch.cat([quality for _, quality in rungs])).statistic
            of_lq, of_restored, of_hq = judge(lq), judge(restored), judge(hq)
            means = [scores.mean() for scores in (of_lq, of_restored, of_hq)]
            cells = [rank, *means, (of_hq > of_restored).float().mean()]
            print(f"| {task} | {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")


@dataclass
class Config:
    """Trains a small judge, or checks the shipped ones."""
    name: str = option("judge", "which judge", choices=sorted(BUILD))
    out: str = option("", "folder to write; empty: runs/NAME")
    steps: int = option(0, "optimizer steps; 0: those of the recipe", least=0)
    pool: int = option(2048, "training crops, restored once", least=48)
    check: bool = option(False, "measure the shipped judges on test photographs instead")


def main():
    cfg = parse(Config)
    check() if cfg.check else train(cfg)


if __name__ == "__main__":
    run_main(main)
