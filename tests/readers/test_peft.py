"""PEFT's own exact merge, `cat`, beside ours on the same factors."""

import pytest
import torch
from oracles.dense import read_deltas, relative
from safetensors.torch import load_file, save_file

from extensions_built_in.zit_merge import merge

peft = pytest.importorskip("peft")

DIM, FFN = 12, 20


class FeedForward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = torch.nn.Linear(DIM, FFN, bias=False)
        self.w2 = torch.nn.Linear(FFN, DIM, bias=False)
        self.w3 = torch.nn.Linear(DIM, FFN, bias=False)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(DIM, DIM, bias=False) for _ in range(3))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()


class Tiny(torch.nn.Module):
    """Two layers under Z-Image's names."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))


def adapter(rank, alpha):
    targets = ["to_q", "to_k", "to_v", "w1", "w2", "w3"]
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)


def modules(model):
    """Module name -> PEFT's LoRA layer."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}


def write(path, layers, name, alpha):
    """The adapter as a trainer that stores alpha writes it."""
    tensors = {}
    for module, layer in layers.items():
        tensors[f"diffusion_model.{module}.lora_A.weight"] = layer.lora_A[name].weight.detach().clone()
        tensors[f"diffusion_model.{module}.lora_B.weight"] = layer.lora_B[name].weight.detach().clone()
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("weights", [(0.6, 0.5), (1.0, 1.0), (0.9, -0.4)])
def test_the_exact_merge_is_pefts_cat(tmp_path, weights):
    torch.manual_seed(0)
    model = peft.get_peft_model(Tiny(), adapter(4, 8), adapter_name="one")
    model.add_adapter("two", adapter(3, 1))
    layers = modules(model)
    assert len(layers) == 12
    paths = [write(tmp_path / f"{n}.safetensors", layers, n, alpha) for n, alpha in (("one", 8), ("two", 1))]
    model.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type="cat")
    wanted = {name: layer.get_delta_weight("both").detach().double() for name, layer in layers.items()}
    out = merge(list(zip(paths, weights, strict=True)), shapes="free", dtype="fp32", device="cpu").save(
        tmp_path / "out.safetensors"
    )
    found = read_deltas(out)
    assert found.keys() == wanted.keys()
    for module, delta in wanted.items():
        assert relative(found[module], delta) < 1e-6, module


def test_the_file_gives_peft_the_same_change(tmp_path):
    """Loaded into PEFT's layers with the rank and alpha that the file names, the merged file does what the two adapters did."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Tiny(), adapter(4, 8), adapter_name="one")
    model.add_adapter("two", adapter(3, 1))
    layers = modules(model)
    paths = [write(tmp_path / f"{n}.safetensors", layers, n, alpha) for n, alpha in (("one", 8), ("two", 1))]
    wanted = {m: 0.6 * x.get_delta_weight("one") - 0.4 * x.get_delta_weight("two") for m, x in layers.items()}
    tensors = load_file(
        merge([(paths[0], 0.6), (paths[1], -0.4)], shapes="free", dtype="fp32").save(tmp_path / "out.safetensors")
    )
    rank, alpha = 7, float(tensors["diffusion_model.layers.0.attention.to_k.alpha"])
    model.add_adapter("merged", adapter(rank, alpha))
    state = {f"base_model.model.{k.removeprefix('diffusion_model.')}": t for k, t in tensors.items() if not k.endswith(".alpha")}
    loaded = peft.set_peft_model_state_dict(model, state, adapter_name="merged")
    assert loaded.unexpected_keys == []
    for module, layer in layers.items():
        assert relative(layer.get_delta_weight("merged").detach(), wanted[module].detach().double()) < 1e-6, module
