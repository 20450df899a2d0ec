"""Expanded models of transformers: ways to load them, to generate with them and to export them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES, DECODER, ids
from torch import Tensor, nn

import fpe
from fpe.layers import ExpandedLinear

POLICIES: list[dict[str, Any]] = [
    {},
    {"resparsify": "magnitude"},
    {"resparsify": "input"},
    {"structure": "block", "block": (4, 4), "resparsify": "partition"},
    {"structure": "2:4", "alpha": 2},
]


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**DECODER, **options})).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return model


def expanded(dense: nn.Module | None = None, **options: Any) -> Any:
    return fpe.expand(dense or llama(), generator=torch.Generator().manual_seed(0), **options).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


# Saving and loading


@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_every_kind_of_layer_comes_back(options: dict, tmp_path: Path) -> None:
    wide = expanded(**options)
    wide.save_pretrained(tmp_path)
    again, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(again), logits(wide))
    assert fpe.nonzeros(again) == fpe.nonzeros(wide)
    marks = [[t for n, t in m.named_buffers() if "fingerprint" in n] for m in (again, wide)]
    assert marks[0] and all(torch.equal(*pair) for pair in zip(*marks, strict=True))
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "twice")), logits(wide))


ON_CPU = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")


@pytest.mark.parametrize(
    "how",
    [
        {"low_cpu_mem_usage": True},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": dict.fromkeys(ON_CPU, "cpu") | {"model.layers.1": "disk"}},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sharded_checkpoints_load_in_any_way(how: dict, tied: bool, tmp_path: Path) -> None:
    wide = expanded(llama(tie_word_embeddings=tied))
    wide.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    if "disk" in str(how):
        how = {**how, "offload_folder": str(tmp_path / "offload")}
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    torch.testing.assert_close(logits(again), logits(wide), rtol=1e-5, atol=1e-5)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_another_dtype_and_the_model_without_its_head(tmp_path: Path) -> None:
    wide = expanded()
    wide.save_pretrained(tmp_path)
    half = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for name, value in wide.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.bfloat16() if value.is_floating_point() else value)
    torch.testing.assert_close(logits(half), logits(fpe.to_dense(half)))
    body = hf.AutoModel.from_pretrained(tmp_path)
    assert sum(isinstance(m, ExpandedLinear) for m in body.modules()) == 6
    with torch.no_grad():
        states = hf.AutoModelForCausalLM.from_pretrained(tmp_path).model(input_ids=ids()).last_hidden_state
        assert torch.equal(body(input_ids=ids()).last_hidden_state, states)


def test_a_loaded_model_trains_on(tmp_path: Path) -> None:
    expanded().save_pretrained(tmp_path)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model(input_ids=ids(), labels=ids()).loss
    before.backward()
    optimizer.step()
    assert model(input_ids=ids(), labels=ids()).loss < before
    for layer in model.modules():
        if isinstance(layer, ExpandedLinear):
            assert torch.equal(layer.weight != 0, layer.kept())


def test_a_dense_twin_comes_back_wide(tmp_path: Path) -> None:
    twin = fpe.to_dense(expanded())
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(twin))


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    from fpe.models.hugging_face import ExpansionConfig

    llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"fpe\.expand"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=ExpansionConfig())
    expanded(llama(num_hidden_layers=3)).save_pretrained(tmp_path / "deep")
    config = hf.AutoConfig.from_pretrained(tmp_path / "deep")
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"9 expanded layers.*places for 6"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "deep", config=config)


def test_the_dense_model_is_left_as_it_is() -> None:
    dense = llama()
    assert hasattr(expanded(dense).config, "quantization_config")
    assert not hasattr(dense.config, "quantization_config")


# Generating

DECODERS = [a for a in ARCHITECTURES if a.generates and a.pairs]


@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_generated_tokens_are_the_dense_twins(options: dict) -> None:
    wide = expanded(**options)
    twin = fpe.to_dense(wide)
    for how in ({}, {"num_beams": 4}, {"cache_implementation": "static", "disable_compile": True}):
        tokens = [m.generate(ids(), max_new_tokens=8, do_sample=False, **how) for m in (wide, twin)]
        assert torch.equal(*tokens)


def test_a_compiled_forward_generates_the_same() -> None:
    wide = expanded()
    tokens = fpe.to_dense(wide).generate(ids(), max_new_tokens=4, do_sample=False, disable_compile=True)
    wide.forward = torch.compile(wide.forward, backend="aot_eager", fullgraph=True)
    compiled = wide.generate(ids(), max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(compiled, tokens)


# Exporting


class Logits(nn.Module):
    """What is exported: tokens in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def test_torch_export_keeps_the_operations() -> None:
    wide = expanded()
    program = torch.export.export(Logits(wide), (ids(),))
    operations = {str(node.target) for node in program.graph.nodes if "fpe." in str(node.target)}
    assert "fpe.split_matmul.default" in operations
    torch.testing.assert_close(program.module()(ids()), logits(wide))


def test_aot_inductor_compiles_an_expanded_block(tmp_path: Path) -> None:
    block = expanded().model.layers[0].mlp
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(block, (x,)), package_path=str(tmp_path / "block.pt2")
    )
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), block(x))


# What the documents show


def test_the_documents_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/models.md").read_text()
    code = text.split("```text\n")[1].split("```")[0]
    llama().save_pretrained(tmp_path / "dense")
    names: dict[str, Any] = {"name": tmp_path / "dense", "folder": tmp_path / "wide"}
    exec(code, names)
    assert sum(isinstance(m, ExpandedLinear) for m in names["wide"].modules()) == 6


def test_in_the_checkouts_root_transformers_imports() -> None:
    root = Path(__file__).resolve().parents[2]
    code = "import sys; sys.modules['torchvision'] = None; import fpe\n"  # it may be built for another PyTorch
    code += "from transformers import LlamaConfig, LlamaForCausalLM; print(LlamaConfig().hidden_size)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "4096", done.stderr
