"""Tiny random models, one per architecture family, for tests without a network.

Row i of `inputs(model, batch)` is the same for every batch size, and no output mixes rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 64
LENGTH = 7


@dataclass(frozen=True)
class Case:
    """One tiny model: how to build it, call it, read its main output, and whether it generates text."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int], dict]
    output: Callable[[Any], Tensor]
    generates: bool = False


# Roles of a family's table that another configuration than the tiny one is needed to see.
OTHER_CONFIGURATION: dict[str, tuple[str, ...]] = {
    "gpt2": (  # GPT2Config(add_cross_attention=True)
        "cross_attention",
        "cross_attention.query",
        "cross_attention.kv",
        "cross_attention.output",
        "cross_attention_norm",
    ),
}


def case(name: str) -> Case:
    """The case called `name`; an unknown name lists the known ones."""
    for each in FAMILIES:
        if each.name == name:
            return each
    raise KeyError(f"no case {name!r}; there are {', '.join(each.name for each in FAMILIES)}")


# -- building


def _alive(make: Callable[[], nn.Module]) -> nn.Module:
    """The model, seeded, with noise on every parameter, so that no zero, one or tiny weight leaves a path dead."""
    random_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.set_rng_state(random_state)
    return model


def _hf(class_: str, config: str, **settings: Any) -> nn.Module:
    model = getattr(transformers, class_)(getattr(transformers, config)(**settings))
    if model.can_generate():  # a chosen length, not a random end of text
        model.generation_config.eos_token_id = None
        model.generation_config.forced_eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def _diffusers(class_: str, **settings: Any) -> nn.Module:
    return getattr(diffusers, class_)(**settings)


# -- inputs


def _rows(batch: int, draw: Callable[[torch.Generator], Tensor], stream: int = 0) -> Tensor:
    return torch.stack([draw(torch.Generator().manual_seed(1000 * stream + row)) for row in range(batch)])


def _ids(batch: int, length: int = LENGTH, stream: int = 0) -> Tensor:
    return _rows(batch, lambda g: torch.randint(3, VOCABULARY, (length,), generator=g), stream)


def _noise(batch: int, *shape: int, stream: int = 0) -> Tensor:
    return _rows(batch, lambda g: torch.randn(*shape, generator=g), stream)


def _text(model: nn.Module, batch: int) -> dict:
    ids = _ids(batch)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _text_to_text(model: nn.Module, batch: int) -> dict:
    return {**_text(model, batch), "decoder_input_ids": _ids(batch, 5, stream=1)}


def _image(model: nn.Module, batch: int) -> dict:
    return {"pixel_values": _noise(batch, 3, 16, 16)}


def _image_and_text(model: nn.Module, batch: int) -> dict:
    return {**_text(model, batch), **_image(model, batch)}


def _image_and_points(model: nn.Module, batch: int) -> dict:
    points = _rows(batch, lambda g: 32 * torch.rand(1, 2, 2, generator=g), stream=1)
    return {"pixel_values": _noise(batch, 3, 32, 32), "input_points": points}


def _speech(model: nn.Module, batch: int) -> dict:
    return {"input_features": _noise(batch, 8, 32), "decoder_input_ids": _ids(batch, 5)}


def _denoise(*shape: int) -> Callable[[nn.Module, int], dict]:
    def inputs(model: nn.Module, batch: int) -> dict:
        steps = torch.arange(batch) * 50 + 10
        text = _noise(batch, 5, 16, stream=1)
        return {"sample": _noise(batch, *shape), "timestep": steps, "encoder_hidden_states": text}

    return inputs


def _denoise_video(model: nn.Module, batch: int) -> dict:
    inputs = _denoise(4, 3, 8, 8)(model, batch)
    return {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].repeat_interleave(3, dim=0)}


def _denoise_sdxl(model: nn.Module, batch: int) -> dict:
    extra = {"text_embeds": _noise(batch, 16, stream=2), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * batch)}
    return {**_denoise(4, 8, 8)(model, batch), "added_cond_kwargs": extra}


def _denoise_sd3(model: nn.Module, batch: int) -> dict:
    inputs = _denoise(4, 8, 8)(model, batch)
    return {"hidden_states": inputs.pop("sample"), **inputs, "pooled_projections": _noise(batch, 16, stream=2)}


def _denoise_flux(model: nn.Module, batch: int) -> dict:
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {
        **_denoise_sd3(model, batch),
        "hidden_states": _noise(batch, 16, 4),
        "timestep": torch.linspace(0.9, 0.1, 9)[:batch],
        "guidance": torch.full((batch,), 3.5),
        "img_ids": grid,
        "txt_ids": torch.zeros(5, 3),
    }


# -- the table


def _logits(output: Any) -> Tensor:
    return output.logits


def _sample(output: Any) -> Tensor:
    return output.sample


def _masks(output: Any) -> Tensor:
    return output.pred_masks


def _embeddings(output: Any) -> Tensor:
    """CLIP's two embeddings side by side: its logits compare every image with every text, which mixes rows."""
    return torch.cat([output.image_embeds, output.text_embeds], dim=-1)


def _case(name: str, make: Callable, inputs: Callable, output: Callable = _logits, **settings: Any) -> Case:
    generates = settings.pop("generates", False)
    return Case(name, partial(_alive, partial(make, **settings)), inputs, output, generates)


def _encoder(name: str, model: str, **settings: Any) -> Case:
    return _case(name, _hf, _text, class_=f"{model}ForMaskedLM", config=f"{model}Config", **settings)


def _causal(name: str, model: str, class_: str = "{}ForCausalLM", config: str = "{}Config", **settings: Any) -> Case:
    return _case(name, _hf, _text, class_=class_.format(model), config=config.format(model), **settings, generates=True)


def _settings(*bases: dict, **own: Any) -> dict:
    return {key: value for each in (*bases, own) for key, value in each.items()}


# fmt: off
_IDS = _settings(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_WIDTH = _settings(hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
_VIT = _settings(_WIDTH, intermediate_size=24, image_size=16, patch_size=8)
_BERT = _settings(_IDS, _WIDTH, intermediate_size=24, max_position_embeddings=32,
                  hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_DISTILBERT = _settings(vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_layers=2, n_heads=4,
                        max_position_embeddings=32, dropout=0.0, attention_dropout=0.0)
_GPT = _settings(_IDS, n_embd=16, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_GPT_NEO = _settings(_IDS, hidden_size=16, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
                     window_size=4, max_position_embeddings=32,
                     embed_dropout=0.0, resid_dropout=0.0, attention_dropout=0.0)
_OPT = _settings(_IDS, _WIDTH, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.0)
_BLOOM = _settings(_IDS, hidden_size=16, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0)
_LLAMA = _settings(_IDS, _WIDTH, intermediate_size=24, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
                   attention_dropout=0.0, tie_word_embeddings=False)
_MISTRAL = _settings(_LLAMA, sliding_window=4)
_GEMMA = _settings(_LLAMA, tie_word_embeddings=True)
_GEMMA2 = _settings(_GEMMA, query_pre_attn_scalar=4, sliding_window=4,
                    layer_types=["sliding_attention", "full_attention"])
_T5 = _settings(_IDS, class_="T5ForConditionalGeneration", config="T5Config", d_model=16, d_kv=4, d_ff=24, num_layers=2,
                num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
_BART_SIZES = _settings(_IDS, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, decoder_start_token_id=1,
                        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
_BART = _settings(_BART_SIZES, class_="BartForConditionalGeneration", config="BartConfig", max_position_embeddings=32)
_WHISPER = _settings(_BART_SIZES, class_="WhisperForConditionalGeneration", config="WhisperConfig",
                     num_mel_bins=8, max_source_positions=16, max_target_positions=32)
_CLIP = _settings(class_="CLIPModel", config="CLIPConfig", projection_dim=16, vision_config=_VIT,
                  text_config=_settings(_IDS, _WIDTH, intermediate_size=24, max_position_embeddings=16))
_SAM = _settings(
    class_="SamModel", config="SamConfig",
    vision_config=_settings(_WIDTH, output_channels=16, image_size=32, patch_size=8, window_size=2, mlp_dim=24,
                            global_attn_indexes=[1], num_pos_feats=8),
    prompt_encoder_config=_settings(hidden_size=16, image_size=32, patch_size=8, mask_input_channels=4),
    mask_decoder_config=_settings(hidden_size=16, mlp_dim=24, num_attention_heads=4, iou_head_hidden_dim=16),
)
_UNET_SIZES = _settings(sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4,
                        cross_attention_dim=16)
_SD15 = _settings(_UNET_SIZES, class_="UNet2DConditionModel", attention_head_dim=4,
                  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
_SD21 = _settings(_SD15, use_linear_projection=True, attention_head_dim=[2, 4])
_SDXL = _settings(_SD21, transformer_layers_per_block=[1, 2],
                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                  up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                  addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=40)
_MOTION = _settings(_UNET_SIZES, class_="UNetMotionModel", num_attention_heads=4, motion_num_attention_heads=4,
                    motion_max_seq_length=8, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
                    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"))
_SD3 = _settings(class_="SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, out_channels=4,
                 num_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=16,
                 caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
                 dual_attention_layers=(0,), qk_norm="rms_norm")
_FLUX = _settings(class_="FluxTransformer2DModel", in_channels=4, num_layers=2, num_single_layers=2,
                  attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
                  axes_dims_rope=(4, 4, 8), guidance_embeds=True)
# fmt: on

FAMILIES: list[Case] = [
    _encoder("bert", "Bert", **_BERT),
    _encoder("roberta", "Roberta", **_BERT),
    _encoder("distilbert", "DistilBert", **_DISTILBERT),
    _causal("gpt2", "GPT2", "{}LMHeadModel", **_GPT),
    _causal("gptj", "GPTJ", **_GPT, rotary_dim=2),
    _causal("gpt_neo", "GPTNeo", **_GPT_NEO),
    _causal("opt", "OPT", **_OPT),
    _causal("bloom", "Bloom", **_BLOOM),
    _causal("llama", "Llama", **_LLAMA),
    _causal("mistral", "Mistral", **_MISTRAL),
    _causal("qwen2", "Qwen2", **_LLAMA),
    _causal("qwen3", "Qwen3", **_LLAMA),
    _causal("gemma", "Gemma", **_GEMMA),
    _causal("gemma2", "Gemma2", **_GEMMA2),
    _causal("gemma3", "Gemma3", config="{}TextConfig", **_GEMMA2),
    _case("t5", _hf, _text_to_text, **_T5, generates=True),
    _case("bart", _hf, _text_to_text, **_BART, generates=True),
    _case("vit", _hf, _image, class_="ViTForImageClassification", config="ViTConfig", **_VIT, num_labels=5),
    _case("clip", _hf, _image_and_text, _embeddings, **_CLIP),
    _case("sam", _hf, _image_and_points, _masks, **_SAM),
    _case("whisper", _hf, _speech, **_WHISPER),
    _case("sd15", _diffusers, _denoise(4, 8, 8), _sample, **_SD15),
    _case("sd21", _diffusers, _denoise(4, 8, 8), _sample, **_SD21),
    _case("sdxl", _diffusers, _denoise_sdxl, _sample, **_SDXL),
    _case("unet_motion", _diffusers, _denoise_video, _sample, **_MOTION),
    _case("sd3", _diffusers, _denoise_sd3, _sample, **_SD3),
    _case("flux", _diffusers, _denoise_flux, _sample, **_FLUX),
]
