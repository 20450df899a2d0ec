"""Which layers of known blocks belong together.

A block is known by the class whose ``forward`` it runs, because a subclass with a forward of its own may compute
anything. Names are relative to the block.
"""

from torch import nn

from ..groups import Group

GATED = Group(("gate_proj", "up_proj"), "down_proj")
FC = Group(("fc1",), "fc2")
TO_4H = Group(("dense_h_to_4h",), "dense_4h_to_h")
BERT = Group(("intermediate.dense",), "output.dense")

TRANSFORMERS: dict[Group, str] = {
    GATED: "LlamaMLP MistralMLP MinistralMLP Qwen2MLP Qwen3MLP GemmaMLP Gemma2MLP Gemma3MLP Gemma3nTextMLP CohereMLP "
    "Cohere2MLP OlmoMLP Olmo2MLP Olmo3MLP StableLmMLP SmolLM3MLP Exaone4MLP Dinov2SwiGLUFFN",
    FC: "PhiMLP OPTDecoderLayer ViTMLP DeiTMLP Dinov2MLP CLIPMLP SiglipMLP Siglip2MLP SwinMLP WhisperEncoderLayer "
    "WhisperDecoderLayer BartEncoderLayer BartDecoderLayer MBartEncoderLayer MBartDecoderLayer MarianEncoderLayer "
    "MarianDecoderLayer NemotronMLP",
    Group(("gate_up_proj",), "down_proj", parts=2): "Phi3MLP GlmMLP Glm4MLP",
    Group(("Wi",), "Wo", parts=2): "ModernBertMLP",
    Group(("c_fc",), "c_proj"): "GPT2MLP GPTNeoMLP GPTBigCodeMLP Starcoder2MLP",
    Group(("fc_in",), "fc_out"): "GPTJMLP CodeGenMLP",
    TO_4H: "GPTNeoXMLP BloomMLP FalconMLP",
    Group(("up_proj",), "down_proj"): "MptMLP",
    BERT: "BertLayer RobertaLayer XLMRobertaLayer CamembertLayer ElectraLayer DebertaV2Layer",
    Group(("lin1",), "lin2"): "FFN",
    Group(("ffn",), "ffn_output"): "AlbertLayer",
    Group(("wi",), "wo"): "T5DenseActDense MT5DenseActDense",
    Group(("wi_0", "wi_1"), "wo"): "T5DenseGatedActDense MT5DenseGatedActDense UMT5DenseGatedActDense",
    Group(("intermediate_dense",), "output_dense"): "Wav2Vec2FeedForward HubertFeedForward WavLMFeedForward",
    Group(("pwconv1",), "pwconv2"): "ConvNextLayer",
}
TIMM: dict[Group, str] = {
    FC._replace(between=("norm",)): "Mlp",
    FC._replace(between=("norm",), parts=2): "GluMlp",
    Group(("fc1_g", "fc1_x"), "fc2", between=("norm",)): "SwiGLU",
}
TORCH: dict[Group, str] = {
    Group(("linear1",), "linear2"): "TransformerEncoderLayer TransformerDecoderLayer",
}
KNOWN: dict[tuple[str, str], Group] = {
    (package, name): group
    for package, table in (("transformers", TRANSFORMERS), ("timm", TIMM), ("torch", TORCH))
    for group, names in table.items()
    for name in names.split()
}
"""By package and class."""


def known(block: nn.Module) -> Group | None:
    """The group of a known block, names relative to it."""
    if "forward" in vars(block):
        return None
    kind = next(kind for kind in type(block).__mro__ if "forward" in vars(kind))
    return KNOWN.get((kind.__module__.partition(".")[0], kind.__name__))
