"""Diffusion restorers behind one small interface, so that the same loop trains any of them.

A restorer turns lq into a distribution over restored images by a diffusion model over a latent z:
  z0 = encode(hq, lq),   output = predict(z_t, t, condition(lq)),   image = decode(z0, lq)
output is epsilon, z0 or v, as its scheduler says; sample.py has the steps from z_T to z0.

family          z                        network, and how it sees lq                     trains
pixel           scale (hq - lq)          UNet([z, lq]), both pixel-unshuffled            UNet
ldm-sr          VQ latent, factor 4      UNet([z, lq / 4])                               UNet
sd-controlnet   VAE latent, factor 8     Stable Diffusion's UNet, lq by a ControlNet     ControlNet
sd-x4-upscaler  VAE latent, factor 4     UNet([z, noised lq / 4], noise level a class)   UNet
"lq / 4": lq shrunk by 4. Latent diffusion: Rombach et al. 2022, arXiv 2112.10752; ControlNet: Zhang
et al. 2023, arXiv 2302.05543; guidance (Ho and Salimans 2022, arXiv 2207.12598):
  output = output_empty + guidance (output_prompt - output_empty)

Chosen here because the paper trains Stable Diffusion, which no laptop does:
 1. pixel: z is the residual at about unit variance: hq itself was 4 dB worse in the same time. No
    attention: any size works. v-prediction and squared-cosine schedule (Salimans and Ho 2022,
    Nichol and Dhariwal 2021), "trailing" steps (Lin et al. 2024, arXiv 2305.08891).
 2. lq has the size of hq. Shrinking takes the central 2 x 2 of each 4 x 4 pixels, which undoes
    bicubic enlargement almost exactly.
 3. All weights are float32; `dtype` is of the arithmetic (autocast) of the networks. Guidance is
    inside `predict`, so that rollout and update cannot differ.

    python model.py --task denoise                              # laptop: what is shipped for it
    python model.py --model sd-controlnet --out my-restorer     # GPU: from published weights
"""

import copy
import importlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from utils import UserError, atomic, option, parse, run_main, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Norms and time embeddings learn no filters; the layers a ControlNet adds to a UNet start at zero.
PARTS = {"all": ("",), "modulation": ("norm", "time_emb", "controlnet_")}


def shrink(lq, factor):
    """(B, 3, H, W) -> (B, 3, H / factor, W / factor), sampled at the centres of the blocks."""
    return F.interpolate(lq, scale_factor=1 / factor, mode="bilinear", align_corners=False)


def seeded(make, *args, **config):
    """make(...) with fixed random weights: diffusers draws them from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **config)


class Restorer:
    """What all share. One of your own inherits it, around any nn.Module, and joins FAMILIES.

    It must offer forward(z_t, t, condition) -> output, which calls self.net; encode(hq, lq) -> z0
    (B, C, h, w); decode(z, lq) -> images (B, 3, H, W) in [-1, 1]; family, its name; and, if net is
    no model of diffusers, save_parts and from_folder. Where these do not fit: channels (of z),
    factor (pixels per latent pixel), multiple (sides of lq are multiples of it), settings (with
    defaults; restorer.json keeps them), condition, prepare (called after settings change).
    """

    family, net_name, settings = "", "unet", {}
    channels, factor, multiple = 3, 1, 1

    def __init__(self, net, scheduler, frozen=None, settings=None, defaults=None):
        """scheduler: diffusers' DDIMScheduler. defaults: task, steps and eta of its training."""
        self.net = self.bare_net = net.eval()  # a trainer may wrap net; bare_net stays. No dropout.
        self.scheduler = scheduler
        self.frozen = frozen or {}
        self.settings = self.settings | (settings or {})
        self.defaults = {"task": "sr", "steps": 20, "eta": 1.0} | (defaults or {})
        self.networks = {k: x for k, x in self.frozen.items() if isinstance(x, torch.nn.Module)}
        for network in self.networks.values():
            network.requires_grad_(False).eval()
        self.train_only("all")
        self.to("cpu")
        self.prepare()

    def prepare(self):
        pass

    def latent_shape(self, lq):
        """(B, C, h, w) of z for lq (B, 3, H, W)."""
        height, width = lq.shape[-2:]
        return len(lq), self.channels, height // self.factor, width // self.factor

    def condition(self, lq, generator=None):
        """What the network sees of lq, made once per restoration; a CPU generator for noise."""
        return lq

    def predict(self, z_t, t, condition):
        """The network's output (B, C, h, w) float32 for z_t (B, C, h, w) at times t (B,) int."""
        with torch.autocast(z_t.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.forward(z_t, t.to(z_t.device), condition).float()

    def train_only(self, part):
        """part: all, modulation (PARTS), or words in names of parameters, separated by commas."""
        parameters = dict(self.bare_net.named_parameters())
        self.trainable = {}
        for word in part.split(","):
            keys = PARTS.get(word, [word])
            found = {name: p for name, p in parameters.items() if any(key in name for key in keys)}
            if not word or not found:
                raise UserError(f"--trainable {part}: no parameter has '{word}' in its name; give "
                                f"all, modulation, or parts of names as {next(iter(parameters))}")
            self.trainable |= found
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self.trainable)

    def weights(self):
        """The parameters that train, a list."""
        return list(self.trainable.values())

    def state_dict(self):
        """name -> tensor of the parameters that train: what a checkpoint needs."""
        return {name: parameter.detach() for name, parameter in self.trainable.items()}

    def load_state_dict(self, state):
        for name, parameter in self.trainable.items():
            parameter.data.copy_(state[name])

    def frozen_copy(self):
        """The same, frozen, with its own copy of what trains; call it before wrapping net."""
        shared = [p for p in self.bare_net.parameters() if not p.requires_grad]
        shared += self.frozen.values()
        other = copy.deepcopy(self, {id(x): x for x in shared})
        other.bare_net.requires_grad_(False)
        return other

    def to(self, device, dtype=torch.float32):
        """dtype: of the networks' arithmetic."""
        for network in (self.net, *self.networks.values()):
            network.to(device)
        self.device, self.dtype = torch.device(device), dtype
        return self

    @classmethod
    def from_folder(cls, folder, defaults, settings, **parts):
        """folder: a Path in diffusers' format. parts: components instead of the folder's."""
        parts = load_parts(folder) | parts
        return cls(parts.pop(cls.net_name), parts.pop("scheduler"), parts, settings, defaults)

    def save(self, folder, dtype=torch.float32):
        """Writes a folder for `load`, whole or not at all. dtype: of net's file."""
        net = self.bare_net if dtype == torch.float32 else copy.deepcopy(self.bare_net).to(dtype)
        with atomic(folder) as temporary:
            temporary.mkdir()
            self.save_parts(temporary, net)
            kept = {"family": self.family, **self.settings, "defaults": self.defaults}
            write_json(temporary / "restorer.json", kept)

    def save_parts(self, folder, net):
        net.save_pretrained(folder / self.net_name)
        self.scheduler.save_pretrained(folder / "scheduler")


class PixelRestorer(Restorer):
    """Residual diffusion in pixel space: z (B, 3, H, W) = scale (hq - lq)."""

    family, settings = "pixel", {"residual_scale": 5.0, "unshuffle": 2}

    @classmethod
    def create(cls, channels=(48, 64, 96), groups=8):
        """Random weights. channels: of the three resolutions; groups: of their normalizations."""
        from diffusers import DDIMScheduler, UNet2DModel
        net = seeded(UNet2DModel, in_channels=24, out_channels=12, block_out_channels=channels,
                     layers_per_block=1, norm_num_groups=groups, add_attention=False,
                     down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3)
        scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing",
                                  prediction_type="v_prediction", clip_sample=False)
        return cls(net, scheduler, defaults={"steps": 5})

    def prepare(self):
        halvings = len(self.bare_net.config.block_out_channels) - 1
        self.multiple = self.settings["unshuffle"] * 2 ** halvings

    def encode(self, hq, lq):
        return self.settings["residual_scale"] * (hq - lq)

    def decode(self, z, lq):
        return (lq + z / self.settings["residual_scale"]).clamp(-1, 1)

    def forward(self, z_t, t, c):
        unshuffle = self.settings["unshuffle"]
        x = F.pixel_unshuffle(torch.cat([z_t, c], dim=1), unshuffle)  # (B, 6 u^2, H / u, W / u)
        return F.pixel_shuffle(self.net(x, t).sample, unshuffle)


class LatentRestorer(Restorer):
    """On top of a frozen autoencoder; the saved folder runs in a stock `pipeline` of diffusers."""

    pipeline, no_parts = "", {}  # no_parts: what a pipeline wants to be told that it has not

    def prepare(self):
        unet = self.frozen.get("unet", self.bare_net)
        self.vae = self.frozen.get("vae") or self.frozen["vqvae"]
        self.scaling = 1.0
        if "vae" in self.frozen:
            self.scaling = self.vae.config.scaling_factor
            self.vae.enable_slicing()  # one image at once: features of a batch fill the memory
            self.vae.enable_tiling()   # only above the size it was trained at
        self.channels = unet.config.out_channels
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.multiple = self.factor * 2 ** (len(unet.config.block_out_channels) - 1)
        if "tokenizer" in self.frozen:
            texts = [self.settings["prompt"], ""]
            ids = self.frozen["tokenizer"](texts, padding="max_length", truncation=True,
                                           return_tensors="pt").input_ids.to(self.device)
            self.text = self.frozen["text_encoder"](ids)[0].detach()  # (2, tokens, width)

    @torch.no_grad()
    def encode(self, hq, lq):
        out = self.vae.encode(hq)
        z0 = out.latents if "latents" in out else out.latent_dist.mode()  # one target, no sample
        return self.scaling * z0

    def decode(self, z, lq):
        return self.vae.decode(z / self.scaling).sample.clamp(-1, 1)

    def forward(self, z_t, t, c):
        """Guidance around network(z_t, t, c, text); 1 means none and costs one pass, not two."""
        guidance = self.settings["guidance"]
        prompt, empty = self.text.to(z_t.device)[:, None].expand(-1, len(z_t), -1, -1)
        output = self.network(z_t, t, c, prompt)
        if guidance == 1:
            return output
        output_empty = self.network(z_t, t, c, empty)
        return output_empty + guidance * (output - output_empty)

    def save_parts(self, folder, net):
        import diffusers
        parts = {self.net_name: net, "scheduler": self.scheduler, **self.no_parts, **self.frozen}
        getattr(diffusers, self.pipeline)(**parts).save_pretrained(folder)


class LDMSR(LatentRestorer):
    """Latent diffusion for x4 super-resolution: z beside lq / 4, no text."""

    family, pipeline = "ldm-sr", "LDMSuperResolutionPipeline"

    def condition(self, lq, generator=None):
        return shrink(lq, self.factor)

    def forward(self, z_t, t, c):
        return self.net(torch.cat([z_t, c], dim=1), t).sample


class SDControlNet(LatentRestorer):
    """Stable Diffusion with lq through a ControlNet, the paper's kind."""

    family, pipeline = "sd-controlnet", "StableDiffusionControlNetPipeline"
    settings = {"prompt": "", "guidance": 1.0}
    no_parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    net_name = "controlnet"

    def network(self, z_t, t, c, text):
        image = (c + 1) / 2  # a ControlNet sees [0, 1]
        down, middle = self.net(z_t, t, text, controlnet_cond=image, return_dict=False)
        return self.frozen["unet"](z_t, t, text, down_block_additional_residuals=down,
                                   mid_block_additional_residual=middle).sample


class SDUpscaler(LatentRestorer):
    """Stable Diffusion x4 upscaler: z beside lq / 4 with noise of a known level."""

    family, pipeline = "sd-x4-upscaler", "StableDiffusionUpscalePipeline"
    settings = {"prompt": "", "guidance": 1.0, "noise_level": 20}

    def condition(self, lq, generator=None):
        small = shrink(lq, self.factor)
        noise = torch.randn(small.shape, generator=generator).to(lq)
        levels = self.frozen["low_res_scheduler"].alphas_cumprod
        alpha_bar = levels[self.settings["noise_level"]].item()
        return alpha_bar ** 0.5 * small + (1 - alpha_bar) ** 0.5 * noise

    def network(self, z_t, t, c, text):
        level = torch.full_like(t, self.settings["noise_level"])
        return self.net(torch.cat([z_t, c], dim=1), t, text, class_labels=level).sample


# ---- loading ----

FAMILIES = {family.family: family for family in (PixelRestorer, LDMSR, SDControlNet, SDUpscaler)}
HUB = {"ldm-sr": "CompVis/ldm-super-resolution-4x-openimages",
       "sd-x4-upscaler": "stabilityai/stable-diffusion-x4-upscaler",
       "sd-controlnet": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
PIPELINES = {FAMILIES[name].pipeline: name for name in HUB}
PIPELINES["StableDiffusionPipeline"] = "sd-controlnet"
FILES = ["*.json", "*.txt", "*/model.safetensors", "*/diffusion_pytorch_model.safetensors"]


def read_json(path, default):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def load_part(kind, source, **where):
    """A component from a folder or hub id. Networks: float32, from safetensors, complete."""
    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(source, **where)
    network, info = kind.from_pretrained(source, use_safetensors=True, torch_dtype=torch.float32,
                                         output_loading_info=True, **where)
    if info["missing_keys"]:  # the libraries put random numbers there
        raise OSError(f"the weights of {kind.__name__} lack {sorted(info['missing_keys'])[0]}")
    return network


def load_parts(folder):
    """The components that a folder of diffusers names: name -> component; samplers become DDIM."""
    from diffusers import ControlNetModel, DDIMScheduler
    pixel = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    index = read_json(folder / "model_index.json", pixel)
    parts = {}
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] in ("diffusers", "transformers"):
            kind = getattr(importlib.import_module(entry[0]), entry[1])
            parts[name] = load_part(kind, folder, subfolder=name)
    if index.get("_class_name") == "StableDiffusionPipeline":
        parts["controlnet"] = seeded(ControlNetModel.from_unet, parts["unet"])
    config = parts["scheduler"].config
    clip = config.get("clip_sample", False)  # others never clip, but DDIM's default is to
    return parts | {"scheduler": DDIMScheduler.from_config(config, clip_sample=clip)}


def shipped(task):
    """The folder in weights/ whose restorer learned `task`, or its kind (denoise25: denoise)."""
    folders = {}
    for file in sorted((Path(__file__).parent / "weights").glob("*/restorer.json")):
        learned = read_json(file, {})["defaults"]["task"]
        folders |= dict.fromkeys(learned.split("+"), file.parent)
    for name in (task, task.rstrip("0123456789")):
        if name in folders:
            return folders[name]
    raise UserError(f"--task {task}: no restorer in weights/ learned it; make one with "
                    f"python sft.py --task {task}, and name its folder by --model")


def load(name, task="sr", device="cpu", dtype="float32", controlnet=""):
    """A restorer, ready to sample and to train.

    name: "" (the shipped one for `task`), pixel (random weights), another of FAMILIES (its weights
    in HUB), a hub id, or a folder that sft.py, rl.py or diffusers has saved. dtype: of DTYPES.
    controlnet: folder or hub id of a trained one, in the place of a copy of the UNet.
    """
    import diffusers
    import transformers
    from huggingface_hub import snapshot_download
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    for logger in ("diffusers.models.modeling_utils", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # what matters is raised as well
    if name == "pixel":
        restorer = PixelRestorer.create()
        restorer.defaults["task"] = task
        return restorer.to(device, DTYPES[dtype])
    source = HUB.get(name) or name or shipped(task)
    try:
        if not Path(source).is_dir():
            source = snapshot_download(source, allow_patterns=FILES, ignore_patterns="safety*")
        kept = read_json(Path(source) / "restorer.json", {})
        index = read_json(Path(source) / "model_index.json", {})
        family = kept.pop("family", None) or PIPELINES.get(index.get("_class_name"))
        if family not in FAMILIES or (controlnet and family != "sd-controlnet"):
            raise OSError(f"it is {family}; expected one of {', '.join(FAMILIES)}, with "
                          "--controlnet only sd-controlnet")
        defaults = kept.pop("defaults", {})
        net = {"controlnet": load_part(diffusers.ControlNetModel, controlnet)} if controlnet else {}
        restorer = FAMILIES[family].from_folder(Path(source), defaults, kept, **net)
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # of four libraries
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--model {source}: cannot be loaded ({reason}); give a complete folder "
                        "that sft.py, rl.py or diffusers saved, or a hub id with network") from None
    return restorer.to(device, DTYPES[dtype])


@dataclass
class Config:
    """Prints what a restorer is, or makes one from published weights."""
    model: str = option("", "shipped for --task if empty; family, hub id or folder")
    task: str = option("sr", "task of the shipped restorer")
    controlnet: str = option("", "sd-controlnet: a trained ControlNet; empty: made of the UNet")
    prompt: str = option("", "Stable Diffusion: text prompt; empty: as saved, a blank: none")
    guidance: float = option(0.0, "Stable Diffusion: 1: no guidance; 0: as saved", least=0)
    noise_level: int = option(-1, "sd-x4-upscaler: noise of lq, to 350; -1: as saved", least=-1)
    out: str = option("", "folder to write the restorer to; empty: only print what it is")


def main():
    cfg = parse(Config)
    if cfg.out and Path(cfg.out).exists():
        raise UserError(f"--out {cfg.out}: is there already; choose another folder")
    restorer = load(cfg.model, cfg.task, controlnet=cfg.controlnet)
    options = ("prompt", "guidance", "noise_level")
    given = {name: value for name, value in vars(cfg).items()
             if name in options and value != getattr(Config, name)}
    if not given.keys() <= restorer.settings.keys() or cfg.noise_level > 350:
        raise UserError(f"{given}: {restorer.family} has {restorer.settings}, noise_level to 350")
    restorer.settings |= given
    restorer.prepare()
    print(f"{restorer.family}: {restorer.defaults}, {restorer.settings}")
    for name, network in {"trains": restorer.net, **restorer.networks}.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        print(f"{name}: {count / 1e6:.2f} million parameters")
    if cfg.out:
        restorer.save(cfg.out)
        print(f"wrote {cfg.out}")


if __name__ == "__main__":
    run_main(main)
