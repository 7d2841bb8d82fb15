"""Renders in the real AI-Toolkit, with our renderer and with the toolkit's own LoRA network, into one .npz of pictures.

usage: render_in_toolkit.py MODEL OUT.npz LORA LORA_OF_A_HIGHER_RANK [quantize]
"""

import sys
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file
from toolkit.config_modules import GenerateImageConfig, NetworkConfig
from toolkit.lora_special import LoRASpecialNetwork

from extensions_built_in.zit_merge.algebra.delta import Kron
from extensions_built_in.zit_merge.algebra.factors import Factors
from extensions_built_in.zit_merge.formats.reader import TensorReader, load_lora
from extensions_built_in.zit_merge.host.render import ToolkitRenderer
from extensions_built_in.zit_merge.preview.settings import ImageSpec, RenderSettings

model, out, *loras, _ = [*sys.argv[1:5], ""]
settings = {"name_or_path": model, "arch": "zimage:turbo", "quantize": "quantize" in sys.argv, "qtype": "float8"}
spec = ImageSpec("a photo of a cat", seed=3, width=64, height=64, steps=2)


def deltas(path, strength=1.0):
    lora = load_lora(path)
    with TensorReader(lora) as reader:
        for module in lora:
            scale, delta = reader.delta(module)
            yield module, delta.times(scale * strength)


def kron(shape):
    """A LoKr of whole factors."""
    generator = torch.Generator().manual_seed(sum(shape))
    left, right = (torch.randn(n, m, generator=generator) * 0.1 for n, m in ((4, 4), (shape[0] // 4, shape[1] // 4)))
    return Kron(Factors(left, torch.eye(left.shape[1])), Factors(right, torch.eye(right.shape[1])))


def plain(weight):
    """A copy of the numbers of a weight, quantized or not."""
    return (weight.dequantize() if "Quantized" in type(weight.data).__name__ else weight).detach().clone()


pictures = {}
with ToolkitRenderer(RenderSettings(settings, "bf16", {}, None, "process[0].model", "cpu")) as renderer:
    transformer = renderer._model.unet
    before = {name: plain(p) for name, p in transformer.named_parameters()}

    def render(name, changes, spec=spec):
        renderer.set_adapter(changes)
        pictures[name] = numpy.asarray(renderer.render(spec))

    render("base", ())
    for name, path in zip("AB", loras, strict=True):
        render(name, deltas(path))
    render("A again", deltas(loras[0]))
    render("A at 0", deltas(loras[0], 0.0))
    render("A at 0.5", deltas(loras[0], 0.5))
    render("another seed", (), ImageSpec("a photo of a cat", seed=4, width=64, height=64, steps=2))
    render("wide", (), ImageSpec("a photo of a cat", seed=3, width=96, height=64, steps=2))
    render("options are text", (), ImageSpec("a photo of a cat --w 512", seed=3, width=64, height=64, steps=2))
    shapes = {m: d.shape for m, d in deltas(loras[0])}
    krons = {m: kron(shape) for m, shape in shapes.items() if not (shape[0] % 4 or shape[1] % 4)}
    render("LoKr", krons.items())
    render("LoKr multiplied out", ((m, d.expand()) for m, d in krons.items()))
    render("base again", ())
    pictures["untouched"] = numpy.array([torch.equal(before[n], plain(p)) for n, p in transformer.named_parameters()])

    # The toolkit's own network on the same model, which it patches for good.
    sd, networks = renderer._model, []  # which it refers to weakly
    for name, path in zip("AB", loras, strict=True):
        rank = max(v.shape[0] for k, v in load_file(path).items() if k.endswith("lora_A.weight"))
        network = LoRASpecialNetwork(
            text_encoder=sd.text_encoder,
            unet=sd.get_model_to_train(),
            lora_dim=rank,
            alpha=rank,
            multiplier=1.0,
            train_unet=True,
            train_text_encoder=False,
            network_config=NetworkConfig(type="lora", linear=rank, linear_alpha=rank, transformer_only=False),
            network_type="lora",
            transformer_only=False,
            is_transformer=sd.is_transformer,
            target_lin_modules=sd.target_lora_modules,
            base_model=sd,
        )
        networks.append(network)
        network.force_to(torch.device("cpu"), dtype=torch.float32)
        sd.network = network
        network._update_torch_multiplier()
        network.apply_to(sd.text_encoder, sd.unet, False, True)
        network.can_merge_in = False
        network.eval()
        assert network.load_weights(str(path)) is None
        asked = GenerateImageConfig(
            prompt=spec.prompt,
            width=64,
            height=64,
            seed=spec.seed,
            guidance_scale=1,
            num_inference_steps=2,
            output_path=f"{Path(out).parent}/{name}[count].png",
        )
        sd.generate_images([asked], sampler="flowmatch")
        pictures[f"{name} of the toolkit"] = numpy.asarray(Image.open(asked.get_image_path(0)))
        network.is_active = False
        network.multiplier = 0.0
numpy.savez(out, **pictures)
