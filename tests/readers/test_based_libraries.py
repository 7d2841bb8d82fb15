"""PEFT's and LyCORIS' own merged weights beside ours, on files that they saved themselves."""

from __future__ import annotations

import pytest
import torch
from oracles import based
from oracles.dense import product, relative
from safetensors.torch import load_file, save_file

from extensions_built_in.zit_merge import load_lora
from extensions_built_in.zit_merge.formats.reader import TensorReader

DIM, FFN = 24, 40
CLOSE = 1e-5  # they compute in float32, and take the difference of two weights


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(DIM, DIM, bias=False) for _ in range(3))


class FeedForward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = torch.nn.Linear(DIM, FFN, bias=False), torch.nn.Linear(FFN, DIM, bias=False)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()


class Tiny(torch.nn.Module):
    """Two layers under Z-Image's names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))


class Weights(dict):
    """A base model: module -> weight."""

    def weight(self, module):
        return self[module]


def weights(model: torch.nn.Module) -> Weights:
    return Weights({n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})


def check(path, base: Weights, merged: dict[str, torch.Tensor], tolerance=CLOSE) -> None:
    """The file's deltas are the library's merged weights less the base.

    Other layers, with changes of zero, are put in beside: a model of other sizes than Z-Image's tells by them how large it is.
    """
    beside = {"attention.to_k": (DIM, DIM), "feed_forward.w3": (FFN, DIM)}
    zeros = {f"layers.29.{name}.diff": torch.zeros(shape) for name, shape in beside.items()}
    save_file(load_file(path) | zeros, path)
    lora = load_lora(path)
    assert lora.questions == () and lora.unmatched == () and lora.needs_base
    assert set(lora) == set(merged) | {key.removesuffix(".diff") for key in zeros}
    with TensorReader(lora, base) as tensors:
        for module, weight in merged.items():
            delta = weight.double() - base[module].double()
            assert float(delta.norm()) > 0.05 * float(base[module].norm()), "it changes something"
            assert relative(product(*tensors.delta(module)[1]), delta) < tolerance, module


# --- PEFT ----------------------------------------------------------------------------------------------------------------------

TARGETS = ["to_q", "to_v", "w1", "w2"]


def peft_config(kind: str):
    peft = pytest.importorskip("peft")
    if kind.startswith("dora"):
        rank = {"r": 4, "lora_alpha": 6, "use_rslora": "rslora" in kind, "rank_pattern": {"w1": 2}}
        return peft.LoraConfig(**rank, use_dora=True, target_modules=TARGETS)
    if kind.startswith("oft"):
        more = {"use_cayley_neumann": "exact" not in kind, "coft": "coft" in kind, "block_share": "share" in kind}
        return peft.OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS, eps=0.4, **more)
    if kind.startswith("boft"):
        return peft.BOFTConfig(
            boft_block_size=2 if kind[-1] == "3" else 4,
            boft_n_butterfly_factor=int(kind[-1]),
            target_modules=["to_q", "to_v", "w2"],
        )
    return peft.IA3Config(target_modules=TARGETS, feedforward_modules=["w2"])


def stages(monkeypatch) -> None:
    """PEFT's own several stages, which it else has on a GPU with a compiler only."""
    layer = pytest.importorskip("peft.tuners.boft.layer")

    class Blocks:
        @staticmethod
        def apply(stages):
            return torch.stack([torch.block_diag(*stage) for stage in stages])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)


@pytest.mark.parametrize(
    "kind",
    ["dora", "dora rslora", "oft", "oft exact", "oft coft", "oft share", "oft coft share", "boft 1", "boft 2", "boft 3", "ia3"],
)
def test_what_peft_saves_and_merges(tmp_path, monkeypatch, kind):
    peft = pytest.importorskip("peft")
    if kind.startswith("boft"):
        stages(monkeypatch)
    base = Tiny()
    kept = weights(base)
    model = peft.get_peft_model(base, peft_config(kind))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(len(name))
            size = 0.05 if "oft_R" in name and "boft" not in name else 0.2
            parameter.data += torch.randn(parameter.shape, generator=generator) * size
    model.save_pretrained(tmp_path)
    merged = weights(model.merge_and_unload())
    check(tmp_path / "adapter_model.safetensors", kept, {m: w for m, w in merged.items() if not torch.equal(w, kept[m])})


@pytest.mark.parametrize("factor", [2, 3])
def test_the_oracle_of_pefts_butterfly_is_pefts(monkeypatch, factor):
    peft = pytest.importorskip("peft")
    stages(monkeypatch)
    base = Tiny()
    weight = base.layers[0].attention.to_q.weight.detach().clone()
    model = peft.get_peft_model(base, peft_config(f"boft {factor}"))
    layer = model.base_model.model.layers[0].attention.to_q
    layer.boft_R["default"].data.normal_(std=0.3)
    parts = {".boft_R": layer.boft_R["default"].detach().clone(), ".boft_s": layer.boft_s["default"].detach()}
    layer.merge()
    assert relative(based.boft_of_inputs(parts, weight), layer.base_layer.weight.detach().double()) < 1e-6


# --- LyCORIS -------------------------------------------------------------------------------------------------------------------


def lycoris_module(kind: str, linear: torch.nn.Linear):
    """A module of LyCORIS: of 4, or, as far as it has the algorithm, of 1.8."""
    algorithm, *more = kind.split()
    options = {"lora_dim": 4, "alpha": 6}
    if algorithm in ("locon", "loha", "lokr"):
        options |= {"weight_decompose": True, "wd_on_out": "columns" not in more}
        options |= (
            {"factor": 4, "decompose_both": True, "lora_dim": 2, "full_matrix": "whole" in more} if algorithm == "lokr" else {}
        )
    if algorithm in ("diag-oft", "boft"):
        options = {"lora_dim": 10, "rescaled": "rescaled" in more, "constraint": 0.01 if "constraint" in more else 0}
    if algorithm == "ia3":
        options = {"train_on_input": "input" in more}
    names = {"locon": "LoConModule", "loha": "LohaModule", "lokr": "LokrModule", "diag-oft": "DiagOFTModule"}
    names |= {"boft": "ButterflyOFTModule", "ia3": "IA3Module", "glora": "GLoRAModule"}
    file = pytest.importorskip(f"lycoris.modules.{algorithm.replace('-', '_')}")
    if options.get("weight_decompose") and not hasattr(file, "weight_decompose"):
        pytest.skip("this LyCORIS has no DoRA")
    return getattr(file, names[algorithm])("x", linear, 1.0, **options)


@pytest.mark.parametrize("name", ["attention.to_q", "feed_forward.w1", "feed_forward.w2"])
@pytest.mark.parametrize(
    "kind",
    [
        *(f"{algorithm} {axis}" for algorithm in ("locon", "loha", "lokr") for axis in ("rows", "columns")),
        *("lokr rows whole", "diag-oft", "diag-oft rescaled", "diag-oft constraint", "boft", "boft rescaled", "boft constraint"),
        *("ia3", "ia3 input", "glora"),
    ],
)
def test_what_a_lycoris_module_saves_and_does(tmp_path, kind, name):
    linear = Tiny().layers[0].get_submodule(name)
    weight = linear.weight.detach().clone()
    module = lycoris_module(kind, linear)
    for n, parameter in enumerate(module.parameters()):
        if parameter is not linear.weight:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)) * 0.3
    canonical = f"layers.0.{name}"
    stored = {f"lycoris_{canonical.replace('.', '_')}.{key}": t.detach().contiguous() for key, t in module.state_dict().items()}
    stored = {key: tensor.clone() for key, tensor in stored.items() if not key.endswith("dtype_tensor")}
    save_file(stored, tmp_path / "lora.safetensors")
    with torch.no_grad():
        module.apply_to()
        does = module(torch.eye(linear.in_features)).T  # its merged weights have alpha / rank twice for LoHa and LoKr
    check(tmp_path / "lora.safetensors", Weights({canonical: weight}), {canonical: does})
