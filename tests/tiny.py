"""Tiny random models of the full-scale families, TINY[family]() -> restorer, made in moments."""

from model import FAMILIES, PixelRestorer, seeded

UNET = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "sample_size": 8}
PLAIN = UNET | {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
TEXTED = UNET | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                 "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                 "attention_head_dim": 4, "cross_attention_dim": 16}
OFFSET = {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
          "steps_offset": 1}


def pixel():
    restorer = PixelRestorer.create(channels=(8, 16, 16), groups=4)
    restorer.defaults["steps"] = 4
    return restorer


def autoencoder(kind, levels, **config):
    return seeded(kind, block_out_channels=(8,) * levels, layers_per_block=1, norm_num_groups=8,
                  down_block_types=("DownEncoderBlock2D",) * levels,
                  up_block_types=("UpDecoderBlock2D",) * levels, **config)


def text():
    """A CLIP text encoder and a tokenizer of letters: {"text_encoder", "tokenizer"}."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    letters = "abcdefghijklmnopqrstuvwxyz,."
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    config = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                            num_attention_heads=2, vocab_size=64, max_position_embeddings=8,
                            bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    return {"text_encoder": seeded(CLIPTextModel, config), "tokenizer": tokenizer}


def ldm_sr():
    from diffusers import DDIMScheduler, UNet2DModel, VQModel
    net = seeded(UNet2DModel, in_channels=6, out_channels=3, **PLAIN)
    vae = autoencoder(VQModel, 3, num_vq_embeddings=64)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    return FAMILIES["ldm-sr"](net, scheduler, {"vqvae": vae})


def sd_controlnet():
    from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
    unet = seeded(UNet2DConditionModel, **TEXTED)
    frozen = {"unet": unet, "vae": autoencoder(AutoencoderKL, 4, latent_channels=4), **text()}
    net = seeded(ControlNetModel.from_unet, unet)
    return FAMILIES["sd-controlnet"](net, DDIMScheduler(**OFFSET), frozen)


def sd_upscaler():
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    net = seeded(UNet2DConditionModel, in_channels=7, num_class_embeds=1000, **TEXTED)
    vae = autoencoder(AutoencoderKL, 3, latent_channels=4, scaling_factor=0.08333)
    low = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler = DDIMScheduler(prediction_type="v_prediction", **OFFSET)
    frozen = {"vae": vae, "low_res_scheduler": low, **text()}
    return FAMILIES["sd-x4-upscaler"](net, scheduler, frozen)


TINY = {"pixel": pixel, "ldm-sr": ldm_sr, "sd-controlnet": sd_controlnet,
        "sd-x4-upscaler": sd_upscaler}
