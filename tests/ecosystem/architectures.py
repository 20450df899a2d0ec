"""Tiny models of random weights, and what a forward of each takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import transformers as hf
from torch import Tensor, nn

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
DECODER = {
    **TEXT,
    "intermediate_size": 32,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16}


@dataclass(frozen=True)
class Architecture:
    """A model that people have.

    Attributes:
        id: Its name.
        make: Builds it.
        inputs: Keyword arguments of a forward, or one argument.
        pairs: How many groups of layers ``find_pairs`` finds; none where the model is not expanded.
        why_not: What is said where it is not.
        generates: Whether it has ``generate``.
    """

    id: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    pairs: int = 2
    why_not: str = ""
    generates: bool = False


def ids(length: int = 7) -> Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(0))


def text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def both() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(5)}


def pixels(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def decoder(name: str, model: type, config: type, pairs: int = 2, why_not: str = "", **options: Any) -> Architecture:
    return Architecture(name, lambda: model(config(**{**DECODER, **options})), text, pairs, why_not, generates=True)


def t5(act: str) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, feed_forward_proj=act, decoder_start_token_id=0))


def whisper() -> nn.Module:
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(vocab_size=64, max_source_positions=8, max_target_positions=32, **sizes, **tokens)
    return hf.WhisperForConditionalGeneration(config)


def clip() -> nn.Module:
    written = {**TEXT, "intermediate_size": 32, "projection_dim": 16, "eos_token_id": 2, "bos_token_id": 1}
    seen = {**IMAGE, "patch_size": 8, "projection_dim": 16}
    return hf.CLIPModel(hf.CLIPConfig(text_config=written, vision_config=seen, projection_dim=16))


class PlainEncoder(nn.Module):
    """``nn.TransformerEncoder`` with a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


NO_GQA = {"num_key_value_heads": 2}
ARCHITECTURES = (
    decoder("LLaMA", hf.LlamaForCausalLM, hf.LlamaConfig, tie_word_embeddings=False),
    decoder("Mistral", hf.MistralForCausalLM, hf.MistralConfig),
    decoder("Qwen2", hf.Qwen2ForCausalLM, hf.Qwen2Config, tie_word_embeddings=True),
    decoder("Qwen3", hf.Qwen3ForCausalLM, hf.Qwen3Config, head_dim=8),
    decoder("Gemma 2", hf.Gemma2ForCausalLM, hf.Gemma2Config, head_dim=8),
    decoder("Gemma 3", hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, head_dim=8),
    decoder("Phi", hf.PhiForCausalLM, hf.PhiConfig, **NO_GQA),
    decoder("Phi-3", hf.Phi3ForCausalLM, hf.Phi3Config),
    decoder("GPT-2", hf.GPT2LMHeadModel, hf.GPT2Config),
    decoder("GPT-NeoX", hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig),
    decoder("OPT", hf.OPTForCausalLM, hf.OPTConfig, ffn_dim=32, word_embed_proj_dim=16),
    decoder("BLOOM", hf.BloomForCausalLM, hf.BloomConfig, n_layer=2, n_head=2),
    Architecture("BERT", lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, intermediate_size=32)), text),
    Architecture("RoBERTa", lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT, intermediate_size=32)), text),
    Architecture(
        "ModernBERT",
        lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**{**DECODER, "cls_token_id": 1, "sep_token_id": 2})),
        text,
    ),
    Architecture(
        "ViT",
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE, patch_size=8)),
        lambda: {"pixel_values": pixels()},
    ),
    Architecture("CLIP", clip, lambda: {"input_ids": ids(), "pixel_values": pixels()}, pairs=4),
    Architecture(
        "Whisper",
        whisper,
        lambda: {"input_features": torch.ones(2, 8, 16), "decoder_input_ids": ids(4)},
        4,
        generates=True,
    ),
    Architecture("T5", lambda: t5("relu"), both, 4, generates=True),
    Architecture("T5, gated", lambda: t5("gated-gelu"), both, 4, generates=True),
    Architecture(
        "timm ViT",
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2
        ),
        pixels,
    ),
    Architecture(
        "timm MLP-Mixer", lambda: timm.models.MlpMixer(img_size=16, patch_size=8, num_blocks=2, embed_dim=16), pixels, 4
    ),
    Architecture("torchvision ViT", lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32), pixels),
    Architecture(
        "torchvision MobileNetV3", lambda: torchvision.models.mobilenet_v3_small(num_classes=5), lambda: pixels(32), 1
    ),
    Architecture("nn.TransformerEncoder", PlainEncoder, lambda: torch.randn(2, 5, 16)),
    decoder("Falcon", hf.FalconForCausalLM, hf.FalconConfig, 0, "forward of its own"),
    decoder("Mixtral", hf.MixtralForCausalLM, hf.MixtralConfig, 0, "as of experts", num_local_experts=2),
)
