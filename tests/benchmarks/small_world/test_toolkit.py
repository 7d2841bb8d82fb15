"""The small world as a Z-Image pipeline, in diffusers and in the real AI-Toolkit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.benchmarks.small_world import ai_toolkit, loras, model, pipeline, train, world
from tests.benchmarks.small_world.__main__ import main

pytest.importorskip("transformers", reason="transformers is not installed")
SIZE = model.Size(24, 2, 1)
SMALLER = ["--width", "24", "--layers", "2", "--refiners", "1"]
CAPTIONS = ["two zib northwest southeast gleb left", "vosk", ""]
LATENTS = 2e-6  # largest error of the VAE's latents, which reach from about -4 to 4


@pytest.fixture(scope="module")
def transformer():
    """Untrained, but for random weights where an untrained one has zeros."""
    made = model.transformer(SIZE, 0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(transformer, tmp_path_factory) -> Path:
    """The pipeline, written."""
    found = tmp_path_factory.mktemp("pipeline")
    pipeline.export(transformer, found)
    return found


@pytest.fixture(scope="module")
def read(folder):
    """The pipeline, read by diffusers."""
    from diffusers import ZImagePipeline

    found = ZImagePipeline.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    return found


def lora(transformer, rank: int, seed: int) -> loras.Factors:
    """Of random factors that change the model well above rounding."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(linear.out_features, rank, generator=random) * 0.1,
            torch.randn(rank, linear.in_features, generator=random) * 0.1,
        )
        for name, linear in loras.targets(transformer).items()
    }


def given() -> dict:
    """What a model is asked."""
    random = torch.Generator().manual_seed(2)
    noisy = torch.randn(len(CAPTIONS), 3, 16, 16, generator=random)
    return {
        "noisy": noisy,
        "sigma": torch.tensor([0.875, 0.5, 0.125]),
        "features": model.caption_features(CAPTIONS, SIZE.caption),
    }


def velocity(transformer, *worn: loras.Factors) -> torch.Tensor:
    """Of our own model with LoRAs, for `given`."""
    with torch.no_grad(), loras.worn(transformer, *((factors, 1.0) for factors in worn)):
        return model.velocity(transformer, *given().values())


@torch.no_grad()
def test_the_vae_is_the_worlds_linear_map(read):
    pictures = world.draw(60, 11, tuple(world.SUBJECTS), tuple(world.STYLES)).pixels
    large = torch.from_numpy(pipeline.enlarged(pictures)).permute(0, 3, 1, 2) * 2 - 1
    wanted, vae = model.latents(pictures), read.vae
    found = vae.encode(large).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    assert ((found.mean - shift) * scale - wanted).abs().max() <= LATENTS
    assert found.std.max() <= 1e-6
    assert (vae.decode(wanted / scale + shift).sample - large).abs().max() <= 1e-6


def test_captions_are_the_worlds_vectors(read):
    found, _ = read.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    for one, wanted in zip(found, model.caption_features(CAPTIONS, SIZE.caption), strict=True):
        assert torch.equal(one, wanted)
    every = pipeline.WORDS
    found, _ = read.encode_prompt(" ".join(every), do_classifier_free_guidance=False)
    assert torch.equal(found[0], model.caption_features([" ".join(every)], SIZE.caption)[0])


def test_a_word_of_no_picture_is_refused(read):
    with pytest.raises(Exception, match="UNK"):
        read.encode_prompt("two elephant", do_classifier_free_guidance=False)


def test_sampling_is_ours(read, transformer):
    wanted = model.sample(transformer, model.caption_features(CAPTIONS[:1], SIZE.caption), 5, 4)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    asked = {"height": 128, "width": 128, "num_inference_steps": 4, "guidance_scale": 0.0}
    found = read(CAPTIONS[0], latents=noise.clone(), output_type="latent", **asked).images
    assert torch.allclose(found, wanted, atol=1e-4)
    picture = read(CAPTIONS[0], latents=noise.clone(), output_type="np", **asked).images
    assert np.abs(picture[:, ::8, ::8] - model.pixels(wanted)).max() <= 1e-4


def test_diffusers_wears_a_lora_as_we_do(read, transformer, tmp_path: Path):
    pytest.importorskip("peft", reason="peft is not installed")
    factors = lora(transformer, 4, 3)
    loras.save(tmp_path / "lora.safetensors", factors)
    read.load_lora_weights(tmp_path / "lora.safetensors")
    try:
        with torch.no_grad():
            found = model.velocity(read.transformer, *given().values())
    finally:
        read.unload_lora_weights()
    assert torch.allclose(found, velocity(transformer, factors), atol=1e-5)
    assert not torch.allclose(found, velocity(transformer), atol=1e-2)


# --- in AI-Toolkit -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _there(request) -> None:
    if lacking := ai_toolkit.missing():
        pytest.skip(lacking)


@pytest.fixture(scope="module")
def trained(_there, folder, tmp_path_factory) -> tuple[loras.Recipe, Path, Path, list[float]]:
    """A LoRA of four steps: its recipe, its file, the toolkit's folder, the losses."""
    where = tmp_path_factory.mktemp("trained")
    recipe = loras.Recipe("zib", 4, 7, 4, pictures=4, batch=2)
    losses = ai_toolkit.train_lora(recipe, folder, where / "lora.safetensors", where / "work")
    return recipe, where / "lora.safetensors", where / "work", losses


def worn_in_toolkit(folder: Path, path: Path, where: Path, *adapter: Path) -> torch.Tensor:
    """The prediction for `given` by the toolkit's own network."""
    torch.save(given(), where / "given.pt")
    script = Path(__file__).with_name("wear_in_toolkit.py")
    words = [script, folder, path, where / "given.pt", where / "out.pt", *adapter]
    ai_toolkit.run([str(word) for word in words], where, where / "log.txt")
    return torch.load(where / "out.pt")


@pytest.mark.toolkit
def test_the_toolkit_trains_on_our_latents_and_features(trained):
    recipe, _, work, losses = trained
    assert len(losses) == recipe.steps - 1
    assert np.isfinite(losses).all()
    pictures = recipe.draw()
    for n, caption in enumerate(pictures.captions):
        (latents,) = (work / "pictures" / "_latent_cache").glob(f"{n:02}_*")
        (features,) = (work / "pictures" / "_t_e_cache").glob(f"{n:02}_*")
        small = np.asarray(Image.open(work / "pictures" / f"{n:02}.png"))[None, ::8, ::8] / np.float32(255)
        assert np.abs(small - pictures.pixels[n]).max() <= 0.5 / 255 + 1e-6
        assert (load_file(latents)["latent"] - model.latents(small)[0]).abs().max() <= LATENTS
        assert torch.equal(load_file(features)["text_embed_0"], model.caption_features([caption], SIZE.caption)[0])


@pytest.mark.toolkit
def test_its_lora_does_in_our_model_what_it_does_there(trained, folder, transformer, tmp_path: Path):
    _, path, _, _ = trained
    factors = loras.load(path)
    assert set(factors) == set(loras.targets(transformer))
    assert all(up.abs().max() > 1e-3 for up, _ in factors.values()), "they start at zero"
    found = worn_in_toolkit(folder, path, tmp_path)
    assert torch.allclose(found, velocity(transformer, factors), atol=1e-5)
    assert not torch.allclose(found, velocity(transformer), atol=1e-3)


@pytest.mark.toolkit
def test_the_command_with_a_training_adapter(_there, tmp_path: Path):
    where = ["--folder", str(tmp_path), *SMALLER]
    steps = ["--save-every", "1", "--judge-every", "9", "--count", "2", "--steps", "1"]
    main(["base", *where, *steps])
    main(["distill", *where, *steps])
    main(["toolkit-loras", *where, "--what", "gleb", "--seeds", "3", "--rank", "2", "--steps", "2", "--adapter"])
    (path,) = tmp_path.glob("*/turbo*/step1/gleb_r2_s3_n2_adapter_toolkit.safetensors")
    (adapter,) = tmp_path.glob("*/turbo*/step1/training_adapter*.safetensors")
    assert "Merging in assistant LoRA" in path.with_suffix(".log").read_text(encoding="utf-8")
    main(["export", "turbo", *where, "--out", str(tmp_path / "pipeline")])
    settings = train.Settings(SIZE)
    student = train.turbo(train.base(settings, tmp_path), settings, train.Distillation()).average
    # an untrained adapter is too weak to be seen
    strong = lora(student, 16, 4)
    loras.save(adapter, strong)
    found = worn_in_toolkit(tmp_path / "pipeline", path, tmp_path, adapter)
    assert torch.allclose(found, velocity(student, loras.load(path), strong), atol=1e-5)
    assert not torch.allclose(found, velocity(student, loras.load(path)), atol=1e-2)
