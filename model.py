"""Diffusion restorers behind one small interface, so that the same loop trains any of them.

A restorer is a diffusion model over a latent z of hq, given lq:
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
 1. pixel: z is the residual, at about unit variance (z = hq was 4 dB worse); no attention, so
    that any size works; v-prediction (Salimans and Ho 2022), squared-cosine schedule (Nichol and
    Dhariwal 2021), "trailing" steps (Lin et al. 2024, arXiv 2305.08891).
 2. lq has the size of hq. `shrink` samples at block centres, which undoes bicubic enlargement.
 3. Weights are float32; `dtype` is that of the arithmetic. Guidance is inside `predict`, so that
    rollout and update cannot differ.
 4. LoRA (Hu et al. 2021, arXiv 2106.09685): W x + B A x at every linear and convolution layer.

    python rl.py --model weights/sr                     # laptop: what is shipped
    python -c 'import model; model.load("sd-controlnet", controlnet="ID").save("my-restorer")'
"""

import copy
import importlib
import json
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from utils import UserError, atomic, one_line, write_json

# Norms and time embeddings learn no filters; the layers a ControlNet adds to a UNet start at zero.
PARTS = {"all": ("",), "modulation": ("norm", "time_emb", "controlnet_"), "lora": (".lora_",)}
ADAPTER = "pytorch_lora_weights.safetensors"


def shrink(lq, factor):
    """(B, 3, H, W) -> (B, 3, H / factor, W / factor), sampled at the centres of the blocks."""
    return F.interpolate(lq, scale_factor=1 / factor, mode="bilinear", align_corners=False)


def seeded(make, *args, **config):
    """make(...) with fixed random weights: diffusers draws them from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **config)


def read_json(path):
    """A JSON file, {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def load_part(kind, source):
    """A component from a folder or hub id. Networks: float32, from safetensors, complete."""
    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(source)
    half, full = (Path(source, f"diffusion_pytorch_model{x}.safetensors") for x in (".fp16", ""))
    variant = "fp16" if half.exists() and not full.exists() else None  # as CompVis's ldm-sr comes
    network, info = kind.from_pretrained(source, use_safetensors=True, torch_dtype=torch.float32,
                                         output_loading_info=True, variant=variant)
    if info["missing_keys"]:  # the libraries put random numbers there
        raise OSError(f"the weights of {kind.__name__} lack {sorted(info['missing_keys'])[0]}")
    return network


def gathered(x):
    """A tensor, or dicts of them, whole, where FSDP gave each process a part; all must call it."""
    if isinstance(x, dict):
        return {key: gathered(value) for key, value in x.items()}
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def in_parts(x, like):
    """A whole tensor x in parts, as FSDP has divided the parameter `like`, if it has."""
    if not hasattr(like, "placements") or x.shape != like.shape:
        return x
    return torch.distributed.tensor.distribute_tensor(x, like.device_mesh, like.placements)


class Restorer:
    """What all share. One of your own inherits it, around any nn.Module, and joins FAMILIES.

    It must offer family, its name; forward(z_t, t, condition) -> output, which calls self.net;
    encode(hq, lq) -> z0 (B, C, h, w); decode(z, lq) -> (B, 3, H, W) in [-1, 1]; if net is no model
    of diffusers, save_parts and from_folder; where these do not fit, condition, channels (of z),
    factor (pixels per latent pixel), multiple (of the sides of lq), settings (in restorer.json).
    """
    family, net_name, settings = "", "unet", {}
    channels, factor, multiple = 3, 1, 1

    def __init__(self, net, scheduler, frozen=None, settings=None, defaults=None):
        """scheduler: diffusers' DDIMScheduler. defaults: task, steps, eta, size of its training."""
        self.net = self.bare_net = net.eval()  # a trainer may wrap net; bare_net stays. No dropout.
        self.scheduler, self.frozen = scheduler, frozen or {}
        self.settings = self.settings | (settings or {})
        self.defaults = {"task": "sr", "steps": 20, "eta": 1.0, "size": 0} | (defaults or {})
        self.networks = [x for x in self.frozen.values() if isinstance(x, torch.nn.Module)]
        for network in self.networks:
            network.requires_grad_(False).eval()
        self.train_only("all")
        self.to("cpu")

    def settle(self, steps, eta):
        """(steps, eta) to sample with; steps 0 and eta -1 stand for those of its training."""
        if steps > 1000:
            raise UserError(f"--steps {steps}: must be at most 1000")
        return (steps or self.defaults["steps"], self.defaults["eta"] if eta < 0 else eta)

    def latent_shape(self, lq):
        """(B, C, h, w) of z for lq (B, 3, H, W)."""
        return len(lq), self.channels, lq.shape[2] // self.factor, lq.shape[3] // self.factor

    def check_size(self, size):
        if size % self.multiple:
            raise UserError(f"--size {size}: must be a multiple of {self.multiple}")

    def condition(self, lq, generator=None):
        """What the network sees of lq, made once per restoration; a CPU generator for noise.

        rl.py calls it with lq on the CPU: a network of its own would be moved there, or made part
        of `forward`.
        """
        return lq

    def predict(self, z_t, t, condition):
        """The network's output (B, C, h, w) float32 for z_t (B, C, h, w) at times t (B,) int."""
        with torch.autocast(z_t.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.forward(z_t, t.to(z_t.device), condition).float()

    def train_only(self, part):
        """part: all, modulation, lora (PARTS), or words in names of parameters, between commas."""
        if "lora" in part.split(",") and not self.adapter():
            self.add_adapter()
        parameters = dict(self.bare_net.named_parameters())
        self.trainable = {}
        for word in part.split(","):
            keys = PARTS.get(word, [word])
            found = {name: p for name, p in parameters.items() if any(key in name for key in keys)}
            if not word or not found:
                raise UserError(f"--trainable {part}: '{word}' fits no parameter; give all, lora, "
                                f"modulation, or words as in {next(iter(parameters))}")
            self.trainable |= found
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self.trainable)

    def add_adapter(self, rank=16):
        """Gives net a LoRA adapter, A with `rank` rows; B is zero: the output stays the same."""
        with one_line("LoRA", "pip install peft"):
            import peft
        layers = torch.nn.Linear, torch.nn.Conv2d
        names = [name for name, part in self.bare_net.named_modules() if isinstance(part, layers)]
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        seeded(peft.inject_adapter_in_model, config, self.bare_net)

    def adapter(self):
        """The LoRA adapter: parameters under their names in diffusers' files; {} without one."""
        return {f"{self.net_name}.{name.replace('.default', '')}": parameter
                for name, parameter in self.bare_net.named_parameters() if ".lora_" in name}

    def weights(self):
        """The parameters that train, a list."""
        return list(self.trainable.values())

    def state_dict(self):
        """name -> tensor of the parameters that train: what a checkpoint needs."""
        return gathered({name: parameter.detach() for name, parameter in self.trainable.items()})

    def load_state_dict(self, state):
        for name, parameter in self.trainable.items():
            parameter.data.copy_(in_parts(state[name], parameter))

    def frozen_copy(self):
        """The same, frozen, with its own copy of what trains; the rest is shared.

        Call it before net is wrapped, and train no more parameters afterwards."""
        shared = [p for p in self.bare_net.parameters() if not p.requires_grad]
        shared += self.frozen.values()
        other = copy.deepcopy(self, {id(x): x for x in shared})
        other.bare_net.requires_grad_(False)
        return other

    def to(self, device, dtype=torch.float32):
        """dtype: of the networks' arithmetic; float32 on a CPU for which bfloat16 is slow."""
        slow = "AVX512" not in torch.backends.cpu.get_cpu_capability()
        if torch.device(device).type == "cpu" and slow:
            dtype = torch.float32
        for network in (self.net, *self.networks):
            network.to(device)
        self.device, self.dtype = torch.device(device), dtype
        return self

    @classmethod
    def from_folder(cls, folder, defaults, settings):
        """folder: a Path in diffusers' format, without model_index.json for pixel."""
        from diffusers import ControlNetModel, DDIMScheduler
        pixel = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
        index = read_json(folder / "model_index.json") or pixel
        parts = {}
        for name, entry in index.items():
            known = isinstance(entry, list) and entry[0] in ("diffusers", "transformers")
            if known and name != "feature_extractor":  # of the safety checker
                kind = getattr(importlib.import_module(entry[0]), entry[1])
                parts[name] = load_part(kind, folder / name)
        if index.get("_class_name") == "StableDiffusionPipeline":
            parts["controlnet"] = seeded(ControlNetModel.from_unet, parts["unet"])
        config = parts["scheduler"].config
        clip = config.get("clip_sample", False)  # other samplers never clip; DDIM's default is to
        parts["scheduler"] = DDIMScheduler.from_config(config, clip_sample=clip, thresholding=False)
        return cls(parts.pop(cls.net_name), parts.pop("scheduler"), parts, settings, defaults)

    def save(self, folder):
        """Writes a folder for `load`, whole or not at all; only another restorer is replaced."""
        folder = Path(folder)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "restorer.json").exists():
            raise UserError(f"{folder}: holds something else; choose another folder")
        with atomic(folder) as temporary:
            temporary.mkdir()
            net, adapter = self.bare_net, self.adapter()
            if adapter:  # beside the network without it
                from diffusers.utils.peft_utils import recurse_remove_peft_layers
                save_file({name: x.detach() for name, x in adapter.items()}, temporary / ADAPTER)
                net = recurse_remove_peft_layers(copy.deepcopy(net))
            self.save_parts(temporary, net)
            kept = {"family": self.family, **self.settings, "defaults": self.defaults}
            write_json(temporary / "restorer.json", kept)

    def save_parts(self, folder, net):
        net.save_pretrained(folder / self.net_name)
        self.scheduler.save_pretrained(folder / "scheduler")


class PixelRestorer(Restorer):
    """Residual diffusion in pixel space: z (B, 3, H, W) = scale (hq - lq)."""
    family, settings = "pixel", {"residual_scale": 5.0, "unshuffle": 2}
    multiple = 8  # the network unshuffles by 2 and halves twice

    @classmethod
    def create(cls, channels=(48, 64, 96), groups=8):
        """Random weights. channels: of the three resolutions; groups: of their normalizations."""
        from diffusers import DDIMScheduler, UNet2DModel
        net = seeded(UNet2DModel, in_channels=24, out_channels=12, block_out_channels=channels,
                     layers_per_block=1, norm_num_groups=groups, add_attention=False,
                     down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3)
        scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing",
                                  prediction_type="v_prediction", clip_sample=False)
        return cls(net, scheduler, defaults={"steps": 8, "eta": 0.5})

    def encode(self, hq, lq):
        return self.settings["residual_scale"] * (hq - lq)

    def decode(self, z, lq):
        return (lq + z / self.settings["residual_scale"]).clamp(-1, 1)

    def forward(self, z_t, t, c):
        x = F.pixel_unshuffle(torch.cat([z_t, c], dim=1), self.settings["unshuffle"])
        return F.pixel_shuffle(self.net(x, t).sample, self.settings["unshuffle"])


class LatentRestorer(Restorer):
    """On top of a frozen autoencoder; the saved folder runs in a stock `pipeline` of diffusers."""
    no_parts, scaling = {}, 1.0  # no_parts: what a pipeline wants to be told that it has not
    settings = {"gradient_checkpointing": False}  # true: less memory, longer updates

    def __init__(self, *parts, **options):
        super().__init__(*parts, **options)
        unet = self.frozen.get("unet", self.bare_net)
        if self.settings.get("gradient_checkpointing"):
            self.bare_net.enable_gradient_checkpointing()
            unet.enable_gradient_checkpointing()
        self.vae = self.frozen.get("vae") or self.frozen["vqvae"]
        if "vae" in self.frozen:
            self.scaling = self.vae.config.scaling_factor
            self.vae.enable_tiling()  # only above the size it was trained at
        self.channels = unet.config.out_channels
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        trained = self.factor * (unet.config.sample_size or 0)
        self.defaults["size"] = self.defaults["size"] or trained
        self.multiple = self.factor * 2 ** (len(unet.config.block_out_channels) - 1)
        if "tokenizer" in self.frozen:
            ids = self.frozen["tokenizer"]([self.settings["prompt"], ""], padding="max_length",
                                           truncation=True, return_tensors="pt").input_ids
            self.text = self.frozen["text_encoder"](ids)[0].detach()  # (2, tokens, width)

    @torch.no_grad()
    def encode(self, hq, lq):
        parts = [self.vae.encode(x) for x in hq.split(1)]  # features of a batch fill the memory
        z0 = [x.latents if "latents" in x else x.latent_dist.mode() for x in parts]  # no sample
        return self.scaling * torch.cat(z0)

    def decode(self, z, lq):
        parts = [self.vae.decode(x).sample for x in (z / self.scaling).split(1)]
        return torch.cat(parts).clamp(-1, 1)

    def forward(self, z_t, t, c):
        """Guidance around network(z_t, t, c, text); 1 means none and costs one pass, not two."""
        guidance = self.settings["guidance"]
        self.text = self.text.to(z_t.device)  # once
        prompt, empty = self.text[:, None].expand(-1, len(z_t), -1, -1)
        output = self.network(z_t, t, c, prompt)
        if guidance != 1:
            output_empty = self.network(z_t, t, c, empty)
            output = output_empty + guidance * (output - output_empty)
        return output

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
    settings = LatentRestorer.settings | {"prompt": "", "guidance": 1.0}
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
    settings = SDControlNet.settings | {"noise_level": 20}

    def condition(self, lq, generator=None):
        small = shrink(lq, self.factor)
        noise = torch.randn(small.shape, generator=generator).to(lq)
        level = torch.full((len(lq),), self.settings["noise_level"])
        return self.frozen["low_res_scheduler"].add_noise(small, noise, level)

    def network(self, z_t, t, c, text):
        level = torch.full_like(t, self.settings["noise_level"])
        return self.net(torch.cat([z_t, c], dim=1), t, text, class_labels=level).sample


FAMILIES = {family.family: family for family in (PixelRestorer, LDMSR, SDControlNet, SDUpscaler)}
HUB = {"ldm-sr": "CompVis/ldm-super-resolution-4x-openimages",
       "sd-x4-upscaler": "stabilityai/stable-diffusion-x4-upscaler",
       "sd-controlnet": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
PIPELINES = {FAMILIES[name].pipeline: name for name in HUB}
PIPELINES["StableDiffusionPipeline"] = "sd-controlnet"
FILES = ["*.json", "*.txt", ADAPTER, "*/model.safetensors", "*/diffusion_pytorch_model.safetensors"]
HALF = "*/diffusion_pytorch_model.fp16.safetensors"  # where there is nothing else


def shipped(task):
    """The folder in weights/ whose restorer learned `task`, or its kind (denoise25: denoise)."""
    files = sorted((Path(__file__).parent / "weights").glob("*/restorer.json"))
    for name in (task, task.rstrip("0123456789")):
        for file in files:
            if name in read_json(file)["defaults"]["task"].split("+"):
                return file.parent
    raise UserError(f"--task {task}: no restorer in weights/ learned it; make one with "
                    f"python sft.py --task {task}, and name its folder by --model")


def load(name, task="sr", device="cpu", dtype="float32", controlnet=""):
    """A restorer, ready to sample and to train; UserError if its folder is not complete.

    name: "" (the shipped one for `task`), pixel or any family with `create` (random weights), one
    of HUB, a hub id, or a folder that sft.py, rl.py or diffusers has saved. dtype: float32 or
    bfloat16. controlnet: folder or hub id of a trained one, in the place of a copy of the UNet; or
    a file NAME.safetensors of its weights alone, as DP2O-SR's C-SD2 (SD 2 base) comes.
    """
    import diffusers
    from huggingface_hub import snapshot_download
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)  # what matters is raised as well
    logging.getLogger("bitsandbytes").setLevel("ERROR")  # comes with pyiqa; nothing here calls it
    if hasattr(FAMILIES.get(name), "create"):
        return FAMILIES[name].create().to(device, getattr(torch, dtype))
    source = HUB.get(name) or name or shipped(task)
    remedy = "give a complete folder of sft.py, rl.py or diffusers, or a hub id and a network"
    with one_line(f"--model {source}", remedy):
        if not Path(source).is_dir():
            home = snapshot_download(source, allow_patterns=FILES, ignore_patterns="safety*")
            if not list(Path(home).glob("*/*.safetensors")):
                home = snapshot_download(source, allow_patterns=[*FILES, HALF])
            source = home
        settings = read_json(Path(source) / "restorer.json")
        index = read_json(Path(source) / "model_index.json")
        family = settings.pop("family", None) or PIPELINES.get(index.get("_class_name"))
        if family not in FAMILIES:
            hint = f"; its model is {source}/model" if (Path(source) / "model").is_dir() else ""
            raise OSError("no restorer.json or model_index.json of a known restorer" + hint)
        defaults = settings.pop("defaults", {})
        restorer = FAMILIES[family].from_folder(Path(source), defaults, settings)
        if controlnet.endswith(".safetensors"):
            restorer.net.load_state_dict(load_file(controlnet))
        elif controlnet:
            trained = load_part(diffusers.ControlNetModel, controlnet)
            restorer.net.load_state_dict(trained.state_dict())
        if (Path(source) / ADAPTER).exists():
            saved = load_file(Path(source) / ADAPTER)
            restorer.add_adapter(next(len(x) for name, x in saved.items() if ".lora_A." in name))
            for name, parameter in restorer.adapter().items():
                parameter.data.copy_(saved[name])
            restorer.train_only("all")
    return restorer.to(device, getattr(torch, dtype))
