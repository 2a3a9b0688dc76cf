"""What the parts of a host model are for: one table per architecture family.

A *role* names a purpose (`self_attention.query`, `feed_forward.down`); a *family* says where in its models that purpose
is served. Methods speak of roles only, so supporting one more architecture means writing one more table::

    rows = {"layer": "blocks.*", **part("self_attention", "blocks.*.attn", query="wq", value="wv", output="wo")}
    register_family(Family(("my_model",), rows))

A role is written where it is true and left out where it is not: BERT has no module that is the whole feed-forward
sub-layer, T5 and BLOOM have no module that receives positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anyadapter.core.errors import near

Patterns = str | tuple[str, ...]

ROLES: dict[str, str] = {
    # transformer layers
    "layer": "one transformer layer (of every stack: encoder, decoder, tower)",
    "self_attention": "the module whose forward computes heads from its own query, key and value",
    "self_attention.query": "projection to queries",
    "self_attention.key": "projection to keys",
    "self_attention.value": "projection to values",
    "self_attention.qkv": "one projection to queries, keys and values together",
    "self_attention.output": "projection of the joined heads back to the model width",
    "self_attention.output_block": "BERT-style projection + dropout + LayerNorm(residual) after attention",
    "cross_attention": "the module that attends from its own sequence to another one",
    "cross_attention.query": "projection to queries",
    "cross_attention.key": "projection of the other sequence to keys",
    "cross_attention.value": "projection of the other sequence to values",
    "cross_attention.kv": "one projection of the other sequence to keys and values together",
    "cross_attention.output": "projection of the joined heads back to the model width",
    "feed_forward": "the module that is the feed-forward sub-layer",
    "feed_forward.gate": "projection whose activation gates `feed_forward.up`",
    "feed_forward.up": "projection to the inner width (gate and value together in GEGLU)",
    "feed_forward.down": "projection from the inner width back to the model width",
    "feed_forward.output_block": "BERT-style projection + dropout + LayerNorm(residual) after the inner layer",
    "attention_norm": "normalisation of the self-attention sub-layer, before or after it",
    "cross_attention_norm": "normalisation of the cross-attention sub-layer, before or after it",
    "feed_forward_norm": "normalisation of the feed-forward sub-layer, before or after it",
    "final_norm": "normalisation after the last layer of a stack",
    # ends of a model
    "text_embedding": "table from token ids to embeddings, as called in the forward pass",
    "position": "the module call that turns integer position ids into embeddings or rotations",
    "patch_embedding": "image or latent to a sequence of tokens",
    "neck": "what turns the last features of a vision encoder into the embedding others read",
    "head": "last features to the scores or embeddings the model returns",
    # joint (image and text) attention of SD3 and Flux
    "joint_attention": "the module that attends over image and text tokens together",
    "joint_attention.query": "image tokens to queries",
    "joint_attention.key": "image tokens to keys",
    "joint_attention.value": "image tokens to values",
    "joint_attention.output": "heads of the image tokens to the model width",
    "joint_attention.text_query": "text tokens to queries",
    "joint_attention.text_key": "text tokens to keys",
    "joint_attention.text_value": "text tokens to values",
    "joint_attention.text_output": "heads of the text tokens to the model width",
    "text_feed_forward": "the feed-forward sub-layer of the text stream",
    "text_feed_forward.up": "projection of the text stream to the inner width",
    "text_feed_forward.down": "projection of the text stream back to the model width",
    # U-Nets
    "down_block": "one resolution of the encoder of a U-Net",
    "mid_block": "the lowest resolution of a U-Net",
    "up_block": "one resolution of the decoder of a U-Net; its call receives the skip features",
    "resnet": "a residual convolution block, conditioned on time",
    "spatial_transformer": "transformer layers over the pixels of one feature map, with projections in and out",
    "downsampler": "halves the resolution at the end of a down block",
    "upsampler": "doubles the resolution at the end of an up block",
    "time_embedding": "features of the timestep to the vector that conditions every block",
    "input_convolution": "first convolution(s), from pixels, latents or spectrogram",
    "output_convolution": "last convolution, to the prediction",
    "motion_module": "transformer layers over the frames of one pixel (AnimateDiff)",
    "motion_attention": "attention over frames inside a motion module",
    "motion_attention.query": "projection to queries",
    "motion_attention.key": "projection to keys",
    "motion_attention.value": "projection to values",
    "motion_attention.output": "projection of the joined heads back to the model width",
}


@dataclass(frozen=True)
class Family:
    """What the parts of one architecture family are for.

    Attributes:
        names: transformers `config.model_type` values, or diffusers class names (`"UNet2DConditionModel"`).
        roles: role -> pattern or patterns. A pattern is a dotted path matched at the END of a module's path, so it
            holds with and without a head around the model; `*` stands for exactly one path component.
    """

    names: tuple[str, ...]
    roles: Mapping[str, Patterns]

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not self.names:
            raise ValueError(f"names must be a non-empty tuple of model types or class names, got {self.names!r}")
        for role in self.roles:
            if role not in ROLES:
                raise ValueError(
                    f"unknown role {role!r} in the family {self.names[0]!r}. {near(role, ROLES)} "
                    f"To add a role, describe it first: ROLES[{role!r}] = 'what it is for'"
                )


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make `family` known under each of its names. A name that is already taken raises ValueError, and adds nothing."""
    taken = sorted(set(family.names) & set(_FAMILIES))
    if taken:
        raise ValueError(f"a family is already registered for {', '.join(map(repr, taken))}")
    _FAMILIES.update(dict.fromkeys(family.names, family))


def family_of(model: Any) -> Family | None:
    """The family of `model`, by `config.model_type`, else by the name of its class or of a base class."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    names = [model_type, *(cls.__name__ for cls in type(model).__mro__)]
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), None)


def part(role: str, paths: Patterns, **children: Patterns) -> dict[str, tuple[str, ...]]:
    """Rows for `role` at `paths` and, for each child, for `role.child` at every `path.child_path`."""
    table = {role: _tuple(paths)}
    for child, ends in children.items():
        table[f"{role}.{child}"] = tuple(f"{path}.{end}" for path in _tuple(paths) for end in _tuple(ends))
    return table


def _tuple(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


# -- text encoders

_BERT: Mapping[str, Patterns] = {
    "layer": "layer.*",
    **part("self_attention", "layer.*.attention.self", query="query", key="key", value="value"),
    "self_attention.output": "layer.*.attention.output.dense",
    "self_attention.output_block": "layer.*.attention.output",
    "feed_forward.up": "layer.*.intermediate.dense",
    "feed_forward.down": "layer.*.output.dense",
    "feed_forward.output_block": "layer.*.output",
    "attention_norm": "layer.*.attention.output.LayerNorm",
    "feed_forward_norm": "layer.*.output.LayerNorm",
    "text_embedding": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "head": ("cls.predictions", "cls.seq_relationship", "lm_head", "classifier", "qa_outputs"),
}

_DISTILBERT: Mapping[str, Patterns] = {
    "layer": "layer.*",
    **part("self_attention", "layer.*.attention", query="q_lin", key="k_lin", value="v_lin", output="out_lin"),
    **part("feed_forward", "layer.*.ffn", up="lin1", down="lin2"),
    "attention_norm": "layer.*.sa_layer_norm",
    "feed_forward_norm": "layer.*.output_layer_norm",
    "text_embedding": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "head": ("vocab_projector", "classifier", "qa_outputs"),
}

# -- causal language models

_PROJ = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}

_GPT: Mapping[str, Patterns] = {
    "layer": "h.*",
    "attention_norm": "h.*.ln_1",
    "final_norm": "ln_f",
    "text_embedding": "wte",
    "head": ("lm_head", "score", "classifier", "qa_outputs"),
}

_GPT2: Mapping[str, Patterns] = {
    **_GPT,
    **part("self_attention", "h.*.attn", qkv="c_attn", output="c_proj"),  # qkv: the thirds of the output
    **part("cross_attention", "h.*.crossattention", query="q_attn", kv="c_attn", output="c_proj"),
    **part("feed_forward", "h.*.mlp", up="c_fc", down="c_proj"),
    "cross_attention_norm": "h.*.ln_cross_attn",
    "feed_forward_norm": "h.*.ln_2",
    "position": "wpe",
}

_GPTJ: Mapping[str, Patterns] = {  # ln_1 feeds attention and feed-forward, which run in parallel
    **_GPT,
    **part("self_attention", "h.*.attn", **_PROJ, output="out_proj"),
    **part("feed_forward", "h.*.mlp", up="fc_in", down="fc_out"),
    "position": "h.*.attn",
}

_GPT_NEO: Mapping[str, Patterns] = {
    **_GPT,
    **part("self_attention", "h.*.attn.attention", **_PROJ, output="out_proj"),
    **part("feed_forward", "h.*.mlp", up="c_fc", down="c_proj"),
    "feed_forward_norm": "h.*.ln_2",
    "position": "wpe",
}

_BLOOM: Mapping[str, Patterns] = {  # self_attention and feed_forward are given the residual and return the sum
    **_GPT,
    **part("self_attention", "h.*.self_attention", qkv="query_key_value", output="dense"),  # qkv: q, k, v per head
    **part("feed_forward", "h.*.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    "attention_norm": "h.*.input_layernorm",
    "feed_forward_norm": "h.*.post_attention_layernorm",
    "text_embedding": "word_embeddings",
}

_LLAMA: Mapping[str, Patterns] = {
    "layer": "layers.*",
    **part("self_attention", "layers.*.self_attn", **_PROJ, output="o_proj"),
    **part("feed_forward", "layers.*.mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    "attention_norm": "layers.*.input_layernorm",
    "feed_forward_norm": "layers.*.post_attention_layernorm",
    "final_norm": "norm",
    "text_embedding": "embed_tokens",
    "position": "rotary_emb",
    "head": _GPT["head"],
}

_GEMMA2: Mapping[str, Patterns] = {  # its two post_* norms follow a sub-layer, before the residual is added
    **_LLAMA,
    "feed_forward_norm": "layers.*.pre_feedforward_layernorm",
}

# -- layers as in BART: OPT is its decoder alone

_BART_LAYER: Mapping[str, Patterns] = {
    "layer": "layers.*",
    **part("self_attention", "layers.*.self_attn", **_PROJ, output="out_proj"),
    "feed_forward.up": "layers.*.fc1",
    "feed_forward.down": "layers.*.fc2",
    "attention_norm": "layers.*.self_attn_layer_norm",
    "feed_forward_norm": "layers.*.final_layer_norm",
    "text_embedding": "embed_tokens",
}

_OPT: Mapping[str, Patterns] = {
    **_BART_LAYER,
    "final_norm": "decoder.final_layer_norm",
    "position": "embed_positions",
    "head": _GPT["head"],
}

_BART: Mapping[str, Patterns] = {
    **_BART_LAYER,
    **part("cross_attention", "layers.*.encoder_attn", **_PROJ, output="out_proj"),
    "cross_attention_norm": "layers.*.encoder_attn_layer_norm",
    "position": "decoder.embed_positions",  # the encoder's is given features, for their length only
    "head": ("lm_head", "classification_head", "qa_outputs"),
}

_WHISPER: Mapping[str, Patterns] = {
    **_BART,
    "final_norm": ("encoder.layer_norm", "decoder.layer_norm"),
    "position": "embed_positions",
    "input_convolution": ("encoder.conv1", "encoder.conv2"),
    "head": ("proj_out", "classifier"),
}

_T5: Mapping[str, Patterns] = {
    "layer": "block.*",
    **part("self_attention", "block.*.layer.0.SelfAttention", query="q", key="k", value="v", output="o"),
    **part("cross_attention", "block.*.layer.1.EncDecAttention", query="q", key="k", value="v", output="o"),
    **part("feed_forward", "block.*.layer.*.DenseReluDense", gate="wi_0", up=("wi", "wi_1"), down="wo"),
    "attention_norm": "block.*.layer.0.layer_norm",
    "cross_attention_norm": "decoder.block.*.layer.1.layer_norm",
    "feed_forward_norm": ("encoder.block.*.layer.1.layer_norm", "decoder.block.*.layer.2.layer_norm"),
    "final_norm": "final_layer_norm",
    "text_embedding": "embed_tokens",
    "head": ("lm_head", "classification_head", "classifier", "qa_outputs"),
}

# -- vision

_VIT: Mapping[str, Patterns] = {
    "layer": "layers.*",
    **part("self_attention", "layers.*.attention", **_PROJ, output="o_proj"),
    **part("feed_forward", "layers.*.mlp", up="fc1", down="fc2"),
    "attention_norm": "layers.*.layernorm_before",
    "feed_forward_norm": "layers.*.layernorm_after",
    "final_norm": "layernorm",
    "patch_embedding": "embeddings.patch_embeddings",
    "head": "classifier",
}

_TIMM_VIT: Mapping[str, Patterns] = {
    "layer": "blocks.*",
    **part("self_attention", "blocks.*.attn", qkv="qkv", output="proj"),  # qkv: the thirds of the output
    **part("feed_forward", "blocks.*.mlp", up="fc1", down="fc2"),
    "attention_norm": "blocks.*.norm1",
    "feed_forward_norm": "blocks.*.norm2",
    "final_norm": "norm",
    "patch_embedding": "patch_embed",
    "head": "head",
}

_CLIP: Mapping[str, Patterns] = {
    "layer": "layers.*",
    **part("self_attention", "layers.*.self_attn", **_PROJ, output="out_proj"),
    **part("feed_forward", "layers.*.mlp", up="fc1", down="fc2"),
    "attention_norm": "layers.*.layer_norm1",
    "feed_forward_norm": "layers.*.layer_norm2",
    "final_norm": ("final_layer_norm", "post_layernorm"),
    "text_embedding": "embeddings.token_embedding",
    "position": "embeddings.position_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "head": ("text_projection", "visual_projection", "classifier"),
}

_TWO_WAY = ("layers.*.cross_attn_token_to_image", "layers.*.cross_attn_image_to_token", "final_attn_token_to_image")

_SAM: Mapping[str, Patterns] = {  # the image encoder is pre-norm with fused qkv, the mask decoder post-norm
    "layer": ("vision_encoder.layers.*", "transformer.layers.*"),
    **part("self_attention", "transformer.layers.*.self_attn", **_PROJ),
    "self_attention": ("vision_encoder.layers.*.attn", "transformer.layers.*.self_attn"),
    "self_attention.qkv": "layers.*.attn.qkv",  # the thirds of the output
    "self_attention.output": ("layers.*.attn.proj", "layers.*.self_attn.out_proj"),
    **part("cross_attention", _TWO_WAY, **_PROJ, output="out_proj"),
    **part("feed_forward", "layers.*.mlp", up="lin1", down="lin2"),
    "attention_norm": "layers.*.layer_norm1",
    "cross_attention_norm": ("transformer.layers.*.layer_norm2", "transformer.layers.*.layer_norm4"),
    "feed_forward_norm": ("vision_encoder.layers.*.layer_norm2", "transformer.layers.*.layer_norm3"),
    "final_norm": "layer_norm_final_attn",
    "patch_embedding": "patch_embed",
    "neck": "vision_encoder.neck",
    "head": ("output_hypernetworks_mlps.*", "iou_prediction_head"),
}

# -- diffusers

_TO = {"query": "to_q", "key": "to_k", "value": "to_v"}
_TO_OUT = {**_TO, "output": "to_out.0"}
_NET = {"up": "net.0.proj", "down": "net.2"}
_PIXELS = "attentions.*.transformer_blocks.*"
_FRAMES = "motion_modules.*.transformer_blocks.*"

_UNET: Mapping[str, Patterns] = {
    "layer": _PIXELS,
    **part("self_attention", f"{_PIXELS}.attn1", **_TO_OUT),
    **part("cross_attention", f"{_PIXELS}.attn2", **_TO_OUT),
    **part("feed_forward", f"{_PIXELS}.ff", **_NET),
    "attention_norm": f"{_PIXELS}.norm1",
    "cross_attention_norm": f"{_PIXELS}.norm2",
    "feed_forward_norm": f"{_PIXELS}.norm3",
    "final_norm": "conv_norm_out",
    "down_block": "down_blocks.*",
    "mid_block": "mid_block",
    "up_block": "up_blocks.*",
    "resnet": "resnets.*",
    "spatial_transformer": "attentions.*",
    "downsampler": "downsamplers.*",
    "upsampler": "upsamplers.*",
    "time_embedding": "time_embedding",
    "input_convolution": "conv_in",
    "output_convolution": "conv_out",
}

_UNET_MOTION: Mapping[str, Patterns] = {
    **_UNET,
    "motion_module": "motion_modules.*",
    **part("motion_attention", (f"{_FRAMES}.attn1", f"{_FRAMES}.attn2"), **_TO_OUT),
}

_TEXT_TO = {"text_query": "add_q_proj", "text_key": "add_k_proj", "text_value": "add_v_proj"}
_DOUBLE = "transformer_blocks.*"  # image and text, each with its own weights, meet in one attention
_SINGLE = "single_transformer_blocks.*"  # image and text in one sequence; attention and feed-forward in parallel

_JOINT: Mapping[str, Patterns] = {
    **part("joint_attention", f"{_DOUBLE}.attn", **_TO_OUT, **_TEXT_TO, text_output="to_add_out"),
    **part("text_feed_forward", f"{_DOUBLE}.ff_context", **_NET),
    "feed_forward_norm": f"{_DOUBLE}.norm2",
    "final_norm": "norm_out",
    "time_embedding": "time_text_embed",
}

_SD3: Mapping[str, Patterns] = {
    **_JOINT,
    "layer": _DOUBLE,
    **part("self_attention", f"{_DOUBLE}.attn2", **_TO_OUT),  # of the image, in SD3.5
    **part("feed_forward", f"{_DOUBLE}.ff", **_NET),
    "attention_norm": f"{_DOUBLE}.norm1",
    "patch_embedding": "pos_embed",
    "head": "proj_out",
}

_FLUX: Mapping[str, Patterns] = {
    **_JOINT,
    "layer": (_DOUBLE, _SINGLE),
    **part("self_attention", f"{_SINGLE}.attn", **_TO),
    "feed_forward": f"{_DOUBLE}.ff",
    "feed_forward.up": (f"{_DOUBLE}.ff.net.0.proj", f"{_SINGLE}.proj_mlp"),
    "feed_forward.down": (f"{_DOUBLE}.ff.net.2", f"{_SINGLE}.proj_out"),  # proj_out: of heads and inner features
    "attention_norm": (f"{_DOUBLE}.norm1", f"{_SINGLE}.norm"),
    "patch_embedding": "x_embedder",
}

# -- whose tables they are

for _names, _roles in {
    ("bert", "roberta", "camembert", "xlm-roberta"): _BERT,
    ("distilbert",): _DISTILBERT,
    ("gpt2",): _GPT2,
    ("gptj",): _GPTJ,
    ("gpt_neo",): _GPT_NEO,
    ("bloom",): _BLOOM,
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3"): _LLAMA,
    ("gemma2", "gemma3_text"): _GEMMA2,
    ("opt",): _OPT,
    ("bart",): _BART,
    ("whisper",): _WHISPER,
    ("t5", "mt5"): _T5,
    ("vit",): _VIT,
    ("VisionTransformer",): _TIMM_VIT,
    ("clip", "clip_text_model", "clip_vision_model"): _CLIP,
    ("sam", "sam_vision_model"): _SAM,
    ("UNet2DConditionModel",): _UNET,
    ("UNetMotionModel",): _UNET_MOTION,
    ("SD3Transformer2DModel",): _SD3,
    ("FluxTransformer2DModel",): _FLUX,
}.items():
    register_family(Family(_names, _roles))
