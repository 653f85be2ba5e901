"""Liger's kernels in nine families: which layers become Liger's, and that the model computes what it did.

Replacing layers changes a whole process, so it happens in others. Where there is no GPU the kernels themselves are
replaced too, by their formulas in torch: then every weight and constant that Liger hands to them is still checked.
"""

import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_builders.records import InputError
from mpo.liger import Patch, apply_liger_kernels, plan_patches

# No two families of a group share their text layers, so none finds the other's work already done.
GROUPS = (
    ("internvl", "llava", "qwen2_vl", "gemma3"),
    ("llava_onevision", "idefics3", "qwen2_5_vl", "qwen3_vl"),
    ("smolvlm",),
)
KNOWN = {"internvl", "llava", "llama", "qwen2", "qwen2_vl", "qwen2_vl_text", "qwen3"}
WITHOUT_OWN = "no function for "
FAILING_OWN = "fails: cannot import name"

# The tiny models have two layers of text, with two norms and one MLP each and a norm at the end, and two of vision.
TEXT = {"LigerRMSNorm": 5, "LigerSwiGLUMLP": 2}
EXPECTED = {
    "internvl": ("layer_norm, rms_norm, rope, swiglu", TEXT | {"LigerLayerNorm": 4}, None),
    "llava": ("rms_norm, rope, swiglu", TEXT, None),
    "smolvlm": ("layer_norm, rms_norm, rope, swiglu", TEXT | {"LigerLayerNorm": 5}, None),
    "gemma3": (
        "geglu, layer_norm, rms_norm, rope",
        {"LigerRMSNorm": 14, "LigerGEGLUMLP": 2, "LigerLayerNorm": 5},  # also around each MLP, on queries and on keys
        None,
    ),
    "llava_onevision": ("rms_norm, rope, swiglu", TEXT, WITHOUT_OWN + "llava_onevision"),
    "idefics3": ("rms_norm, rope, swiglu", TEXT, WITHOUT_OWN + "idefics3"),
    "qwen2_vl": ("rms_norm, swiglu", TEXT, FAILING_OWN),
    "qwen2_5_vl": ("rms_norm, swiglu", TEXT, FAILING_OWN),
    "qwen3_vl": ("rms_norm, swiglu", TEXT | {"LigerRMSNorm": 9}, FAILING_OWN),  # also on queries and on keys
}


def compute_in_torch() -> None:
    """Puts the formulas of Liger's kernels in place of the kernels."""
    from liger_kernel.transformers import geglu, layer_norm, rms_norm, rope, swiglu
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def normed(x: Tensor, weight: Tensor, eps: float, offset: float, *rest: Any) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * (weight + offset)

    def kernel(function: Callable[..., Tensor]) -> SimpleNamespace:
        return SimpleNamespace(apply=function)

    rms_norm.LigerRMSNormFunction = kernel(normed)
    swiglu.LigerSiLUMulFunction = kernel(lambda gate, up, *multipliers: F.silu(gate) * up)
    geglu.LigerGELUMulFunction = kernel(lambda gate, up: F.gelu(gate, approximate="tanh") * up)
    layer_norm._functional_layer_norm = lambda x, weight, bias, eps, **rest: F.layer_norm(
        x, x.shape[-1:], weight, bias, eps
    )
    rope.dispatch = lambda name, q, k, cos, sin, *rest: apply_rotary_pos_emb(q, k, cos, sin)


def inputs_of(processor: Any) -> dict[str, Tensor]:
    import tiny_models

    content = [{"type": "image"}, {"type": "text", "text": "What colour is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[tiny_models.picture(0)], text=[text], return_tensors="pt")


def patch_families(names: Iterable[str], device: str) -> dict[str, dict[str, Any]]:
    """What happened to each family; to be called in a process of its own."""
    import liger_kernel.utils
    import tiny_models

    if device == "cpu":
        compute_in_torch()
        liger_kernel.utils.infer_device = lambda: "cuda"
    built = {name: tiny_models.FAMILIES[name]() for name in names}
    return {name: patch_family(processor, model.to(device).eval()) for name, (processor, model) in built.items()}


@torch.no_grad()
def patch_family(processor: Any, model: Any) -> dict[str, Any]:
    inputs = inputs_of(processor).to(model.device)
    before = model(**inputs).logits
    line = apply_liger_kernels(model)
    ours = [layer.forward for layer in model.modules() if layer.forward.__module__.startswith("liger_kernel.")]
    return {
        "line": line,
        "layers": dict(Counter(forward.__qualname__.partition(".")[0] for forward in ours)),
        "difference": (model(**inputs).logits - before).abs().max().item(),
        "heads": {model.forward.__module__, F.cross_entropy.__module__},
    }


@pytest.fixture(scope="module")
def patched() -> dict[str, dict[str, Any]]:
    """All families, patched in a process for each group."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        reports = processes.map(patch_families, GROUPS, ["cpu"] * len(GROUPS))
        return {name: report for group in reports for name, report in group.items()}


@pytest.mark.parametrize("family", EXPECTED)
def test_the_layers_that_liger_knows_become_ligers(family: str, patched: dict[str, dict[str, Any]]) -> None:
    kernels, layers, reason = EXPECTED[family]
    line = patched[family]["line"]
    assert patched[family]["layers"] == layers
    assert line.startswith(f"Liger kernels: {kernels} on ")
    assert ("text backbone only" in line) == (reason is not None)
    assert (reason or "") in line


@pytest.mark.parametrize("family", EXPECTED)
def test_the_model_computes_what_it_did(family: str, patched: dict[str, dict[str, Any]]) -> None:
    assert patched[family]["difference"] < 1e-5


@pytest.mark.parametrize("family", EXPECTED)
def test_the_loss_stays_trls_and_transformers(family: str, patched: dict[str, dict[str, Any]]) -> None:
    home = f"transformers.models.{family}.modeling_{family}"
    assert patched[family]["heads"] == {home, "torch.nn.functional"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels are written in Triton and need a GPU")
@pytest.mark.parametrize("group", GROUPS)
def test_on_a_gpu_the_kernels_give_what_torch_gives(group: tuple[str, ...]) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as processes:
        reports = processes.submit(patch_families, group, "cuda").result()
    assert [name for name in group if reports[name]["difference"] > 1e-3] == []


@pytest.mark.parametrize(
    ("model_type", "text_type", "patches"),
    [
        ("internvl", "qwen2", [Patch("internvl"), Patch("qwen2", text_only=True)]),
        ("idefics3", "llama", [Patch("llama", text_only=True)]),
        ("qwen2_vl", "qwen2_vl_text", [Patch("qwen2_vl"), Patch("qwen2", text_only=True, rope=False)]),
        ("qwen3_vl", "qwen3_vl_text", [Patch("qwen3", text_only=True, rope=False)]),
        ("llama", "llama", [Patch("llama")]),
        ("opt", "opt", []),
    ],
)
def test_the_text_backbone_is_tried_after_the_whole_model(
    model_type: str, text_type: str, patches: list[Patch]
) -> None:
    assert plan_patches(model_type, text_type, KNOWN) == patches


def test_a_family_that_liger_does_not_know_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    monkeypatch.setattr("liger_kernel.utils.infer_device", lambda: "cuda")
    model = OPTForCausalLM(
        OPTConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8)
    )
    line = apply_liger_kernels(model)
    assert line.startswith("Liger kernels: none on OPTForCausalLM (liger-kernel ")
    assert line.endswith(": no function for opt)")


def test_a_machine_without_a_gpu_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liger_kernel.utils.infer_device", lambda: "cpu")
    with pytest.raises(InputError, match="needs a GPU.*Leave it out here"):
        apply_liger_kernels(torch.nn.Module())


def test_without_liger_it_answers_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(InputError, match="pip install liger-kernel"):
        apply_liger_kernels(torch.nn.Module())
