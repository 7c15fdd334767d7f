"""Diffusion restorers behind one small interface, so that the same loop trains any of them.

A restorer maps a low-quality image to a distribution over restored images by a diffusion model over a latent z:
  encode(hq, lq) -> z0            the clean latent that stands for hq, (B, C, H / factor, W / factor)
  decode(z, lq) -> image          back to (B, 3, H, W) in [-1, 1]
  condition(lq, generator) -> c   what the network sees of lq (B, 3, H, W) in [-1, 1]: lq itself, or made from it once
  predict(z_t, t, c) -> out       the network's output: epsilon, sample (z0) or v, as `scheduler` says, float32
  scheduler                       diffusers' DDIMScheduler: alphas_cumprod, prediction type, spacing, last step
  net, weights()                  the module that trains and the parameters of it that do, see train_only(part)
  defaults                        {"task", "steps", "eta"} the restorer was trained with
  multiple, factor                sides of lq must be multiples of `multiple`; pixels per latent pixel
  save(folder), load(name)        diffusers' folder format, safetensors

family          z                           network, and how it sees lq                           what trains
pixel           scale (hq - lq)             UNet2DModel([z, lq]), both pixel-unshuffled           net
ldm-sr          VQ latent, factor 4         UNet2DModel([z, lq / 4])                              UNet
sd-controlnet   VAE latent, factor 8        Stable Diffusion's UNet, lq through a ControlNet      ControlNet
sd-x4-upscaler  VAE latent, factor 4        UNet([z, noised lq / 4], noise level as a class)      UNet
dit             VAE latent of any factor    DiT([z, VAE latent of lq])                            DiT
("lq / 4" is lq shrunk by 4.) Their layouts are those of the checkpoints in FAMILIES; sources there.

Chosen here:
 1. pixel: the latent is the residual, scaled to about unit variance, because lq already holds the low frequencies.
    Measured in a trial: predicting hq itself is 4 dB worse after the same training time. pixel_unshuffle by 2 quarters
    the cost of every convolution; no attention, so that any image size works. v-prediction, squared-cosine schedule
    (Salimans and Ho 2022, Nichol and Dhariwal 2021), "trailing" steps (Lin et al. 2024, arXiv 2305.08891).
 2. lq always has the size of hq. A restorer that wants it smaller takes the mean of the central 2 x 2 of each 4 x 4
    pixels, which undoes bicubic enlargement almost exactly (tests/test_model.py measures it).
 3. The network that trains is float32, also under bf16 autocast (`dtype`); frozen modules are held in `dtype` itself.
    `frozen_copy` copies only what trains and shares the rest: that is what the KL reference costs.
 4. Classifier-free guidance is inside `predict`, so that rollout and update cannot differ. Prompts are encoded once.

    python model.py                                           # laptop: prints what the shipped restorer is
    python model.py --model sd-controlnet --controlnet lllyasviel/control_v11f1e_sd15_tile --out my-restorer
    python model.py --model sd-controlnet --random --bench --size 512 --device cuda --dtype bfloat16
"""

import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PIXEL_UNET = dict(block_out_channels=(48, 64, 96), layers_per_block=1, norm_num_groups=8, add_attention=False)
PIXEL_SCHEDULER = dict(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                       timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)


def shrink(lq, factor):
    """(B, 3, H, W) -> (B, 3, H / factor, W / factor), sampled at the centres of factor x factor blocks."""
    return F.interpolate(lq, scale_factor=1 / factor, mode="bilinear", align_corners=False, antialias=False)


class Restorer:
    """What all families share. net trains; `frozen` (name -> module or tokenizer) never does."""

    parts = {"net": ("unet", "UNet2DModel")}  # component -> (subfolder, class of diffusers or transformers)
    pipeline = None                           # stock pipeline of diffusers that the saved folder runs in
    settings = {}                             # options kept in restorer.json, with their defaults
    factor, multiple = 1, 1

    def __init__(self, net, scheduler, frozen=None, settings=None, defaults=None):
        self.net, self.scheduler, self.frozen = net, scheduler, frozen or {}
        self.settings = type(self).settings | (settings or {})
        self.defaults = {"task": "sr", "steps": 20, "eta": 1.0} | (defaults or {})
        self.dtype, self.checkpointing = torch.float32, False
        for module in self.frozen.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        net.eval()
        self.train_only("all")
        self.prepare()

    def prepare(self):
        """Hook for what a family computes once, from its components."""

    # ---- weights ----

    def train_only(self, part):
        """Freezes all but a part: "all", or "modulation": normalizations and time embeddings, which scale and shift
        features at each noise level but learn no new filters, and what a ControlNet has on top of a UNet: layers for lq
        and for its output that are zero at first and let nothing through. Biases of convolutions would add little, and
        on a CPU the gradient of one costs as much as that of its filters."""
        parts = ("norm", "time_emb", "controlnet_")
        for name, p in self.net.named_parameters():
            p.requires_grad_(part == "all" or any(word in name for word in parts))
        self.names = [name for name, p in self.net.named_parameters() if p.requires_grad]

    def weights(self):
        """The parameters that train, or in a frozen copy those that may differ from the original's; a list."""
        parameters = dict(self.net.named_parameters())
        return [parameters[name] for name in self.names]

    def state_dict(self):
        """name -> tensor of `weights`, what a checkpoint needs; load_state_dict copies such values in."""
        return dict(zip(self.names, (p.detach() for p in self.weights())))

    def load_state_dict(self, state):
        for name, p in zip(self.names, self.weights()):
            p.data.copy_(state[name])

    def frozen_copy(self):
        """The same restorer with its own copy of the weights that train, and sharing all others. It does not train."""
        other = copy.copy(self)
        shared = {id(p): p for p in self.net.parameters() if not p.requires_grad}
        other.net = copy.deepcopy(self.net, shared).requires_grad_(False)
        return other

    def to(self, device, dtype=torch.float32):
        """dtype: of the network's arithmetic (autocast) and of frozen modules; the network itself stays float32."""
        self.net.to(device)
        for name, module in self.frozen.items():
            if isinstance(module, torch.nn.Module) and name != "text_encoder":  # that one has done its work
                torch.nn.Module.to(module, device, self.kept_in(name, dtype))
        self.dtype = dtype
        return self

    @classmethod
    def kept_in(cls, name, dtype):
        """The dtype of a component's weights: Stable Diffusion's VAE overflows in float16, the codes of a VQ model are
        looked up in float32, and the network trains in it."""
        exact = name == "net" or "VQ" in cls.parts[name][1] or (name == "vae" and dtype == torch.float16)
        return torch.float32 if exact else dtype

    @property
    def device(self):
        return next(self.net.parameters()).device

    def checkpoint_gradients(self):
        """Trades time for memory: activations inside the networks are computed again in the backward pass."""
        self.checkpointing = True
        for module in (self.net, *self.frozen.values()):  # the VAE too: the fidelity's gradient goes through it
            if getattr(module, "_supports_gradient_checkpointing", False):
                module.enable_gradient_checkpointing()

    # ---- the interface ----

    @property
    def channels(self):
        return self.net.config.out_channels

    def latent_shape(self, lq):
        """(B, C, h, w) of z for lq (B, 3, H, W)."""
        return (len(lq), self.channels, lq.shape[-2] // self.factor, lq.shape[-1] // self.factor)

    def condition(self, lq, generator=None):
        return lq

    def predict(self, z_t, t, c):
        """z_t (B, C, h, w), t (B,) integer timesteps, c from `condition` -> (B, C, h, w) float32."""
        with torch.autocast(z_t.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.forward(z_t, t, c).float()

    # ---- files ----

    @classmethod
    def load_parts(cls, source, names, dtype, options):
        """Components from a folder or hub id in diffusers' format; net in float32, frozen ones in dtype."""
        import diffusers
        import transformers
        parts = {}
        for name in names:
            subfolder, kind = cls.parts[name]
            library = diffusers if hasattr(diffusers, kind) else transformers
            where = {"subfolder": subfolder, **options}
            if name == "tokenizer" or "scheduler" in name:
                parts[name] = getattr(library, kind).from_pretrained(source, **where)
            else:
                parts[name] = load_weights(getattr(library, kind), source, cls.kept_in(name, dtype), **where)
        return parts

    @classmethod
    def from_folder(cls, source, defaults=None, settings=None, dtype=torch.float32, options=None):
        """source: a folder or hub id in diffusers' format. options: revision, for a hub id."""
        parts = cls.load_parts(source, cls.parts, dtype, options or {})
        return cls(parts.pop("net"), load_scheduler(source, options or {}), parts, settings, defaults)

    def save(self, folder, dtype=torch.float32):
        """Writes diffusers' folder and restorer.json. dtype: of the stored weights that train; float16 halves them."""
        import diffusers

        from utils import write_json
        folder = Path(folder)
        net = self.net if dtype == torch.float32 else torch.nn.Module.to(copy.deepcopy(self.net), dtype)
        parts = {self.parts["net"][0]: net, **{self.parts[name][0]: part for name, part in self.frozen.items()}}
        if self.pipeline:
            getattr(diffusers, self.pipeline)(**parts, scheduler=self.scheduler, **self.pipeline_options()
                                              ).save_pretrained(folder, safe_serialization=True)
        else:
            for name, part in parts.items():
                part.save_pretrained(folder / name, safe_serialization=True)
            self.scheduler.save_pretrained(folder / "scheduler")
        write_json(folder / "restorer.json", {"family": self.family, **self.settings, "defaults": self.defaults})

    def pipeline_options(self):
        return {}


def load_weights(kind, source, dtype, **where):
    """A network of diffusers or transformers from safetensors, or from those of half precision where a checkpoint has
    no others; what lies there only as a pickle is refused. Missing weights are an error, never random numbers."""
    import diffusers
    own = issubclass(kind, diffusers.ModelMixin)
    typed = {"use_safetensors": True, "output_loading_info": True, "torch_dtype" if own else "dtype": dtype}
    try:
        model, info = kind.from_pretrained(source, **typed, **where)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        try:
            model, info = kind.from_pretrained(source, variant="fp16", **typed, **where)
        except (OSError, ValueError):
            raise OSError(f"no .safetensors for {kind.__name__}; look for a --revision that has them, or convert the "
                          "weights, where you trust them, with from_pretrained(..., use_safetensors=False) and "
                          "save_pretrained") from None
    if info["missing_keys"]:
        raise OSError(f"{where.get('subfolder') or kind.__name__}: its weights lack {sorted(info['missing_keys'])[0]}")
    return model


def load_scheduler(source, options):
    """The DDIM scheduler of a checkpoint: betas, offset, prediction type, spacing, last step are the checkpoint's own,
    whatever sampler it names (Stable Diffusion 1.5 names PNDM)."""
    from diffusers import DDIMScheduler

    from sample import clip_of
    config = DDIMScheduler.load_config(source, subfolder="scheduler", **options)
    if config.get("_class_name") not in ("DDIMScheduler", "DDPMScheduler"):
        config.setdefault("clip_sample", False)  # other samplers never clip, DDIM's default is to
    scheduler = DDIMScheduler.from_config(config)
    clip_of(scheduler)  # raises ValueError for a kind of clipping that no policy can have
    return scheduler


class PixelRestorer(Restorer):
    """Residual diffusion in pixel space. z (B, 3, H, W) = scale (hq - lq)."""

    family, settings = "pixel", {"residual_scale": 5.0, "unshuffle": 2}

    def prepare(self):
        self.multiple = self.settings["unshuffle"] * 2 ** (len(self.net.config.block_out_channels) - 1)

    @classmethod
    def create(cls, seed=0, defaults=None, unshuffle=2, residual_scale=5.0, **unet):
        """Random weights. unet: changes to PIXEL_UNET, e.g. block_out_channels, from the finest resolution on."""
        from diffusers import DDIMScheduler, UNet2DModel
        channels = 3 * unshuffle ** 2
        config = PIXEL_UNET | unet
        levels = len(config["block_out_channels"])
        config |= {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}
        net = seeded(seed, UNet2DModel, in_channels=2 * channels, out_channels=channels, **config)
        return cls(net, DDIMScheduler(**PIXEL_SCHEDULER),
                   settings={"unshuffle": unshuffle, "residual_scale": residual_scale},
                   defaults={"steps": 5} | (defaults or {}))

    channels = 3

    def encode(self, hq, lq):
        return self.settings["residual_scale"] * (hq - lq)

    def decode(self, z, lq):
        return (lq + z / self.settings["residual_scale"]).clamp(-1, 1)

    def forward(self, z_t, t, c):
        x = F.pixel_unshuffle(torch.cat([z_t, c], dim=1), self.settings["unshuffle"])  # (B, 6 u^2, H / u, W / u)
        return F.pixel_shuffle(self.net(x, t).sample, self.settings["unshuffle"])


class LatentRestorer(Restorer):
    """What the families on top of a frozen autoencoder (`vae`) share: latents scaled by its scaling_factor."""

    scaled = True

    def prepare(self):
        vae = self.frozen["vae"]
        if hasattr(vae, "use_tiling"):  # VQModel has none
            vae.enable_tiling()  # only images above the size it was trained at are cut
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.scaling = vae.config.scaling_factor if self.scaled else 1.0
        net = self.net.config
        self.multiple = self.factor * (2 ** (len(net.block_out_channels) - 1) if hasattr(net, "block_out_channels")
                                       else net.patch_size)
        if "text_encoder" in self.frozen:
            self.embed_prompt()

    def encode(self, hq, lq=None):
        vae = self.frozen["vae"]
        with torch.no_grad():  # image by image, as in decode
            outs = [vae.encode(image) for image in hq.to(vae.dtype).split(1)]
        # the mode, not a sample: the target of a pair is one latent
        z0 = torch.cat([out.latents if hasattr(out, "latents") else out.latent_dist.mode() for out in outs])
        return z0.float() * self.scaling

    def decode(self, z, lq=None):
        vae = self.frozen["vae"]  # image by image: a batch of decoded features is what memory runs out on
        parts = [vae.decode(part).sample.float() for part in (z / self.scaling).to(vae.dtype).split(1)]
        return torch.cat(parts).clamp(-1, 1)

    @torch.no_grad()
    def embed_prompt(self):
        """Encodes the prompt and, for guidance, the empty one: (2, tokens, width), on the text encoder's device."""
        tokenizer, encoder = self.frozen["tokenizer"], self.frozen["text_encoder"]
        ids = tokenizer([self.settings["prompt"], ""], padding="max_length", truncation=True,
                        max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
        self.text = encoder(ids.to(encoder.device))[0].float()

    def guided(self, z_t, t, c, network):
        """network(z_t, t, c, text) with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598):
        out = out_empty + guidance (out_prompt - out_empty); guidance 1 costs one pass, any other two."""
        guidance, count = self.settings["guidance"], len(z_t)
        text = self.text.to(z_t.device, torch.float32)
        if guidance == 1:
            return network(z_t, t, c, text[:1].expand(count, -1, -1))
        out = network(z_t.repeat(2, 1, 1, 1), t.repeat(2), c.repeat(2, 1, 1, 1), text.repeat_interleave(count, 0))
        prompted, empty = out.chunk(2)
        return empty + guidance * (prompted - empty)


class LDMSR(LatentRestorer):
    """Latent diffusion for x4 super-resolution (Rombach et al. 2022, arXiv 2112.10752): z beside lq / 4, no text."""

    family, pipeline, scaled = "ldm-sr", "LDMSuperResolutionPipeline", False
    parts = {"net": ("unet", "UNet2DModel"), "vae": ("vqvae", "VQModel")}

    @classmethod
    def create(cls, seed=0, unet=None, vae=None):
        from diffusers import DDIMScheduler, UNet2DModel, VQModel
        down, up = ("DownBlock2D",) * 3 + ("AttnDownBlock2D",), ("AttnUpBlock2D",) + ("UpBlock2D",) * 3
        net = seeded(seed, UNet2DModel, **(dict(
            in_channels=6, out_channels=3, block_out_channels=(160, 320, 320, 640), layers_per_block=2,
            down_block_types=down, up_block_types=up, attention_head_dim=32) | (unet or {})))
        vq = seeded(seed + 1, VQModel, **(dict(
            block_out_channels=(128, 256, 512), layers_per_block=2, num_vq_embeddings=8192,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3) | (vae or {})))
        return cls(net, DDIMScheduler(beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear",
                                      clip_sample=False), {"vae": vq})

    def condition(self, lq, generator=None):
        return shrink(lq, self.factor)

    def forward(self, z_t, t, c):
        return self.net(torch.cat([z_t, c], dim=1), t).sample


class SDControlNet(LatentRestorer):
    """Stable Diffusion with lq through a ControlNet (Zhang et al. 2023, arXiv 2302.05543), the paper's kind."""

    family, pipeline = "sd-controlnet", "StableDiffusionControlNetPipeline"
    settings = {"prompt": "", "guidance": 1.0}
    parts = {"net": ("controlnet", "ControlNetModel"), "unet": ("unet", "UNet2DConditionModel"),
             "vae": ("vae", "AutoencoderKL"), "text_encoder": ("text_encoder", "CLIPTextModel"),
             "tokenizer": ("tokenizer", "CLIPTokenizer")}

    @classmethod
    def create(cls, seed=0, unet=None, vae=None, text=None):
        from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
        net = seeded(seed, UNet2DConditionModel, **(dict(cross_attention_dim=768) | (unet or {})))
        parts = {"net": seeded(seed + 1, ControlNetModel.from_unet, net), "unet": net,
                 "vae": random_vae(seed + 2, **(vae or {})), **random_text(seed + 3, **(text or {}))}
        return cls(parts.pop("net"), DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                                   clip_sample=False, set_alpha_to_one=False, steps_offset=1), parts)

    @property
    def channels(self):
        return self.frozen["unet"].config.out_channels

    def forward(self, z_t, t, c):
        def network(z, t, c, text):
            down, middle = self.net(z, t, text, controlnet_cond=(c + 1) / 2, return_dict=False)
            return self.frozen["unet"](z, t, text, down_block_additional_residuals=down,
                                       mid_block_additional_residual=middle).sample
        return self.guided(z_t, t, c, network)

    def pipeline_options(self):
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class SDUpscaler(LatentRestorer):
    """Stable Diffusion x4 upscaler: z beside lq / 4 with noise of a known level, which is also the class label."""

    family, pipeline = "sd-x4-upscaler", "StableDiffusionUpscalePipeline"
    settings = {"prompt": "", "guidance": 1.0, "noise_level": 20}
    parts = {"net": ("unet", "UNet2DConditionModel"), "vae": ("vae", "AutoencoderKL"),
             "text_encoder": ("text_encoder", "CLIPTextModel"), "tokenizer": ("tokenizer", "CLIPTokenizer"),
             "low_res_scheduler": ("low_res_scheduler", "DDPMScheduler")}

    @classmethod
    def create(cls, seed=0, unet=None, vae=None, text=None):
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
        net = seeded(seed, UNet2DConditionModel, **(dict(
            in_channels=7, block_out_channels=(256, 512, 512, 1024), cross_attention_dim=1024, num_class_embeds=1000,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",), attention_head_dim=8,
            only_cross_attention=(True, True, True, False), use_linear_projection=True) | (unet or {})))
        parts = {"net": net, "vae": random_vae(seed + 2, **(dict(
            block_out_channels=(128, 256, 512), scaling_factor=0.08333) | (vae or {}))),
            **random_text(seed + 3, **(dict(hidden_size=1024, num_attention_heads=16, intermediate_size=4096,
                                            num_hidden_layers=23) | (text or {}))),
            "low_res_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2")}
        return cls(parts.pop("net"), DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear",
                                                   prediction_type="v_prediction", clip_sample=False,
                                                   set_alpha_to_one=False, steps_offset=1), parts)

    def condition(self, lq, generator=None):
        """lq / 4 noised to `noise_level`; the noise is drawn once per restoration. generator: see sample.normal."""
        from sample import normal
        small = shrink(lq, self.factor)
        level = torch.full((len(lq),), self.settings["noise_level"])
        alphas = self.frozen["low_res_scheduler"].alphas_cumprod[level].view(-1, 1, 1, 1).to(lq)
        return alphas.sqrt() * small + (1 - alphas).sqrt() * normal(small.shape, generator, lq.device)

    def forward(self, z_t, t, c):
        def network(z, t, c, text):
            level = torch.full((len(z),), self.settings["noise_level"], device=z.device)
            return self.net(torch.cat([z, c], dim=1), t, text, class_labels=level).sample
        return self.guided(z_t, t, c, network)


class DiTRestorer(LatentRestorer):
    """A diffusion transformer (Peebles and Xie 2023, arXiv 2212.09748) that sees the VAE latent of lq beside z."""

    family = "dit"
    parts = {"net": ("transformer", "DiTTransformer2DModel"), "vae": ("vae", "AutoencoderKL")}

    @classmethod
    def create(cls, seed=0, transformer=None, vae=None):
        from diffusers import DDIMScheduler, DiTTransformer2DModel
        vae = random_vae(seed + 1, **(vae or {}))
        channels = vae.config.latent_channels
        net = seeded(seed, DiTTransformer2DModel, **(dict(
            in_channels=2 * channels, out_channels=channels, num_embeds_ada_norm=1) | (transformer or {})))
        return cls(net, DDIMScheduler(clip_sample=False, set_alpha_to_one=False), {"vae": vae})

    def condition(self, lq, generator=None):
        return self.encode(lq)

    def forward(self, z_t, t, c):
        label = torch.zeros_like(t)  # one class, and no dropout of it, because net is never in training mode
        return self.net(torch.cat([z_t, c], dim=1), t, class_labels=label).sample


# ---- random weights at the published shapes, or smaller by overrides ----

def seeded(seed, make, *args, **config):
    """make(...) with random weights from `seed`: diffusers and transformers initialize from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args, **config)


def random_vae(seed, **config):
    from diffusers import AutoencoderKL
    config = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                  sample_size=512) | config
    count = len(config["block_out_channels"])
    return seeded(seed, AutoencoderKL, down_block_types=("DownEncoderBlock2D",) * count,
                  up_block_types=("UpDecoderBlock2D",) * count, **config)


def random_text(seed, **config):
    """A CLIP text encoder and a tokenizer of letters, {"text_encoder", "tokenizer"}."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    letters = "abcdefghijklmnopqrstuvwxyz,."
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    config = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12) | config
    encoder = seeded(seed, CLIPTextModel, CLIPTextConfig(**config, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[],
                              model_max_length=config.get("max_position_embeddings", 77))
    return {"text_encoder": encoder, "tokenizer": tokenizer}


# ---- loading ----

FAMILIES = {family.family: family for family in (PixelRestorer, LDMSR, SDControlNet, SDUpscaler, DiTRestorer)}
HUB = {"ldm-sr": "CompVis/ldm-super-resolution-4x-openimages",
       "sd-x4-upscaler": "stabilityai/stable-diffusion-x4-upscaler",
       "sd-controlnet": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
PIPELINES = {"LDMSuperResolutionPipeline": "ldm-sr", "StableDiffusionPipeline": "sd-controlnet",
             "StableDiffusionControlNetPipeline": "sd-controlnet", "StableDiffusionUpscalePipeline": "sd-x4-upscaler"}


def read_index(source, name, revision, needed=True):
    """The JSON file `name` of a folder or hub id as a dict, {} if there is none. needed: without network it must lie in
    the hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from utils import UserError
    if Path(source).is_dir():
        return json.loads((Path(source) / name).read_text()) if (Path(source) / name).is_file() else {}
    try:
        return json.loads(Path(hf_hub_download(source, name, revision=revision)).read_text())
    except LocalEntryNotFoundError:
        if not needed:  # without network, a cached checkpoint of diffusers' own has no such file
            return {}
        raise UserError(f"--model {source}: not in the local cache, and no network; give a folder, or fetch it on a "
                        "machine with network") from None
    except EntryNotFoundError:
        return {}


def split_revision(source, revision=None):
    """"ID@REVISION" -> (ID, REVISION); a folder, or an id without one: (source, revision)."""
    if "@" in source and not Path(source).exists():
        source, _, revision = source.partition("@")
    return source, revision


def shipped(task):
    """The folder in weights/ of the restorer that learned a task (sr3), alone or with the fewest others (sr2+sr3), else
    its kind (sr), else any (mixed)."""
    from data import split_task
    from utils import UserError
    learned = [(json.loads(file.read_text())["defaults"]["task"].split("+"), str(file.parent))
               for file in (Path(__file__).parent / "weights").glob("*/restorer.json")]
    folders = {name: folder for names, folder in sorted(learned, key=lambda x: -len(x[0]))
               for name in (*names, "+".join(names))}
    for name in (task, split_task(task)[0], "mixed"):
        if name in folders:
            return folders[name]
    raise UserError(f"--task {task}: no restorer in weights/; make one with: python sft.py --task {task}, and name its "
                    "folder by --model")


def load(name, device="cpu", dtype="float32", task="sr", revision=None, controlnet=None, **settings):
    """A restorer, in evaluation mode (no dropout), ready to sample and to train.

    name: "" for the one in weights/ that serves `task`; a key of FAMILIES (pixel, dit: random weights; others: the
    checkpoint in HUB); a hub id, or ID@REVISION; or a folder that sft.py, rl.py or diffusers has saved. controlnet: hub
    id or folder of a trained ControlNet; without one, and none in the folder, it starts as a copy of the UNet.
    settings: of the family.
    Raises UserError that says what is wrong and what to do.
    """
    from utils import UserError, quiet
    quiet()
    import diffusers.utils.logging
    import transformers.utils.logging

    from reward import reason
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # "Loading weights" for each part
    for teller in ("diffusers.models.modeling_utils", "huggingface_hub.utils._http"):  # what they log, they also raise
        logging.getLogger(teller).setLevel(logging.CRITICAL)
    name, revision = split_revision(name, revision)
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; choose one of {', '.join(DTYPES)}")
    source = HUB.get(name, name) or shipped(task)
    try:
        if name in ("pixel", "dit"):
            restorer = FAMILIES[name].create()
            restorer.defaults["task"] = task
        else:
            restorer = open_source(source, revision, controlnet, DTYPES[dtype], settings)
        return restorer.to(device, DTYPES[dtype])
    except UserError:
        raise
    except Exception as error:  # of diffusers, transformers, safetensors, the hub, the device: many kinds
        remedy = ("give a complete folder that sft.py, rl.py or diffusers has saved, or a hub id on a machine with "
                  "network")
        raise UserError(f"--model {source}: {reason(error, device, remedy)}") from None


def open_source(source, revision, controlnet, dtype, settings):
    """A restorer from a folder or hub id; its family from restorer.json, or from the pipeline that diffusers names."""
    from utils import UserError
    kept = read_index(source, "restorer.json", revision, needed=False)
    index = read_index(source, "model_index.json", revision, needed=not kept)
    options = {"revision": revision} if revision else {}
    kind = kept.pop("family", None) or PIPELINES.get(index.get("_class_name"))
    if kind not in FAMILIES:
        found = index.get("_class_name") or ("no model_index.json" if not kept else f"family {kind}")
        raise UserError(f"--model {source}: no restorer ({found}); give one of {', '.join(FAMILIES)}, or a folder or "
                        f"hub id of {', '.join(PIPELINES)}")
    family = FAMILIES[kind]
    unknown = set(settings) - set(family.settings)
    if unknown:
        raise UserError(f"--{sorted(unknown)[0].replace('_', '-')}: {kind} has no such option")
    defaults = kept.pop("defaults", None)
    if kind != "sd-controlnet" or ("controlnet" in index and not controlnet):
        return family.from_folder(source, defaults, kept | settings, dtype, options)
    from diffusers import ControlNetModel
    parts = family.load_parts(source, [name for name in family.parts if name != "net"], dtype, options)
    if not controlnet:
        net = seeded(0, ControlNetModel.from_unet, parts["unet"]).float()
    else:
        controlnet, revision = split_revision(controlnet)
        net = load_weights(ControlNetModel, controlnet, torch.float32, **({"revision": revision} if revision else {}))
    return family(net, load_scheduler(source, options), parts, kept | settings, defaults)


@dataclass
class Config:
    # what
    model: Annotated[str, "shipped one of --task if empty; a family's name, a hub id, or a folder"] = ""
    task: Annotated[str, "task of the shipped restorer"] = "sr"
    revision: Annotated[str, "branch, tag or commit of a hub id"] = ""
    random: Annotated[bool, "random weights at the family's published shapes, nothing is downloaded"] = False
    # options that the saved restorer keeps
    controlnet: Annotated[str, "sd-controlnet: trained ControlNet, as --model; empty: a copy of the UNet"] = ""
    prompt: Annotated[str, "Stable Diffusion: text prompt; empty: as saved, a blank: none"] = ""
    guidance: Annotated[float, "Stable Diffusion: classifier-free guidance, 1: none; 0: as saved, else 1"] = 0.0
    noise_level: Annotated[int, "sd-x4-upscaler: noise of its input, 0 to 350; -1: as saved, else 20"] = -1
    out: Annotated[str, "folder to write the restorer to; empty: only print what it is"] = ""
    # measuring
    bench: Annotated[bool, "measure seconds of a rollout step and of an update, and its peak memory"] = False
    size: Annotated[int, "side of the restored image in pixels"] = 512
    batch: Annotated[int, "images at once"] = 1
    gradient_checkpointing: Annotated[bool, "compute activations again instead of keeping them"] = False
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[str, "float32, bfloat16 or float16: arithmetic, and weights of frozen parts"] = "float32"


def memory(restorer):
    """Bytes that RL needs before any activation, by arithmetic: {name: bytes}. Trained weights are float32, with a
    gradient, two moments of Adam, the gradient of the fidelity and its average (seven copies instead of two with rl.py
    --estimator reward), the running average of the weights and the frozen reference; below float32, autocast keeps
    copies of two bytes. Frozen parts are held once."""
    trained = sum(p.numel() for p in restorer.weights()) * 4
    rest = sum(p.numel() for p in restorer.net.parameters()) * 4 - trained
    frozen = sum(p.numel() * p.element_size() for name, module in restorer.frozen.items()
                 if isinstance(module, torch.nn.Module) and name != "text_encoder" for p in module.parameters())
    return {"trained weights": trained, "gradients": trained, "Adam": 2 * trained, "fidelity": 2 * trained,
            "average": trained, "reference": trained, "frozen": rest + frozen,
            "autocast": 0 if restorer.dtype == torch.float32 else trained // 2}


def bench(restorer, size, batch):
    """Seconds on random images, the median of five after a warm-up, and peak memory in GiB (NaN without CUDA).

    Measured are a step of a rollout, decoding, and one update as rl.py makes it: forward and backward of one step, the
    gradient of the fidelity through a chain of 5 steps and the decoder, and the optimizer's step."""
    import time
    from statistics import median
    from types import SimpleNamespace

    from rl import ConstrainedAdamW, chain_gradient, lost_fidelity

    def timed(call):
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            call()
            if restorer.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return median(seconds[1:])
    cuda = restorer.device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    lq = (torch.rand(batch, 3, size, size, generator=generator) * 2 - 1).to(restorer.device)
    c = restorer.condition(lq, generator)
    z = torch.randn(restorer.latent_shape(lq), generator=generator).to(restorer.device)
    t = torch.full((batch,), 500, device=restorer.device)
    optimizer = ConstrainedAdamW(restorer.weights(), lr=1e-6)
    _reference, _average = restorer.frozen_copy(), restorer.frozen_copy()  # only their memory counts
    cfg = SimpleNamespace(steps=5, eta=1.0, micro_batch=5, gradient_checkpointing=restorer.checkpointing)

    def update():
        noise = [torch.Generator().manual_seed(i) for i in range(batch)]
        optimizer.set_constraint(chain_gradient(
            restorer, lq, lambda images, part: lost_fidelity(images, lq[part].flip(3), "policy"), cfg, noise), [0.1])
        restorer.predict(z, t, c).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    no_grad = torch.no_grad()
    result = {"rollout step, s": timed(lambda: no_grad(restorer.predict)(z, t, c)),
              "decode, s": timed(lambda: no_grad(restorer.decode)(z, lq))}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    result["update, s"] = timed(update)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    return result | {"peak memory of the update, GiB": peak}


def main():
    from utils import UserError, parse, pick_device
    cfg = parse(Config, description="Prints, makes or measures a restorer.")
    device = pick_device(cfg.device)
    if not -1 <= cfg.noise_level <= 350:
        raise UserError(f"--noise-level {cfg.noise_level}: must be from 0 to 350, what the upscaler was trained with")
    given = {"prompt": cfg.prompt, "guidance": cfg.guidance, "noise_level": cfg.noise_level}
    changed = {key: value for key, value in given.items() if value != getattr(Config, key)}
    if cfg.random:
        if cfg.model not in FAMILIES:
            raise UserError(f"--random --model {cfg.model}: choose one of {', '.join(FAMILIES)}")
        real = cfg.bench or cfg.out  # else the shapes are enough
        with torch.device("cpu" if real else "meta"):
            restorer = FAMILIES[cfg.model].create()
        restorer.to(device if cfg.bench else "cpu" if real else "meta", DTYPES[cfg.dtype])
        if changed or cfg.controlnet or cfg.revision:
            raise UserError("--random: takes none of --prompt, --guidance, --noise-level, --controlnet and --revision; "
                            "save it with --out and load that folder with them")
    else:
        restorer = load(cfg.model, device, cfg.dtype, cfg.task, cfg.revision or None, cfg.controlnet or None, **changed)
    if cfg.gradient_checkpointing:
        restorer.checkpoint_gradients()
    count = {"trains": sum(p.numel() for p in restorer.weights())} | {name: sum(p.numel() for p in m.parameters())
             for name, m in restorer.frozen.items() if isinstance(m, torch.nn.Module)}
    print(f"{restorer.family}: {restorer.scheduler.config.prediction_type}, sides a multiple of {restorer.multiple}, "
          f"trained as {restorer.defaults}\nmillions of parameters: "
          + "   ".join(f"{name} {value / 1e6:.2f}" for name, value in count.items()))
    parts = memory(restorer)
    print("GiB in RL without activations (computed): " + "   ".join(
        f"{name} {value / 2**30:.2f}" for name, value in parts.items()) + f"   sum {sum(parts.values()) / 2**30:.2f}")
    if cfg.bench:
        if cfg.size % restorer.multiple:
            raise UserError(f"--size {cfg.size}: must be a multiple of {restorer.multiple}")
        print("measured: " + "   ".join(f"{k} {v:.3f}" for k, v in bench(restorer, cfg.size, cfg.batch).items()))
    if cfg.out:
        restorer.save(cfg.out)
        print(f"wrote {cfg.out}")


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
