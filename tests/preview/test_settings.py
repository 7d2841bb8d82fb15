"""What pictures are made with: the specs of the training's samples, those of `preview`, and the model."""

from __future__ import annotations

import ast
import itertools
import json
import os
import random
import re
import types
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from oracles import sampling
from preview.helpers import MODEL, settled, step

from extensions_built_in.zit_merge.config.schema import Preview
from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.preview import samples
from extensions_built_in.zit_merge.preview.samples import settings_of, specs_of
from extensions_built_in.zit_merge.preview.settings import SEED, ImageSpec, RenderSettings

PLACE = "process[1].steps[0].preview"


def render_settings(work, *, section: dict | None = None, **training: Any) -> tuple[RenderSettings, Any]:
    """The settings of a section behind a training, and where it runs."""
    trained = work.training(**{"model": MODEL} | training)
    found, context = settled(work, trained, work.section(step(), **section or {}))
    return settings_of(found, context), context


def specs(work, sample: object = None, trigger: object = None, *, section: dict | None = None, **asked: Any) -> list[ImageSpec]:
    """The specs of a preview behind a training with these samples."""
    found, context = render_settings(work, section=section, sample=sample, trigger_word=trigger)
    return list(specs_of(Preview(**asked), found, context, PLACE))


def refused(work, *what: Any, **how: Any) -> str:
    """The sentence with which a preview is refused."""
    with pytest.raises(ZitMergeError) as caught:
        specs(work, *what, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the training's own samples ------------------------------------------------------------------------------------------------

CAT, DOG = {"prompt": "a [trigger] cat"}, {"prompt": "[name] and a dog [trigger]"}
SAMPLES = {
    "nothing but prompts": {"samples": [CAT, DOG]},
    "older prompts": {"prompts": ["a [trigger] cat", "a dog"]},
    "samples before prompts": {"prompts": ["a horse"], "samples": [CAT]},
    "settings for all": {"width": 512, "height": 768, "seed": 7, "guidance_scale": 4, "sample_steps": 20, "samples": [CAT, DOG]},
    "a seed that walks": {"seed": 7, "walk_seed": True, "samples": [CAT, DOG, CAT]},
    "a seed that stays": {"seed": 7, "samples": [CAT, DOG | {"seed": 3}, CAT, DOG]},
    "a walk around a seed": {"seed": 7, "walk_seed": True, "samples": [CAT, DOG | {"seed": 3}, CAT]},
    "own settings": {"samples": [CAT | {"width": 640, "height": 320, "guidance_scale": 2.5, "sample_steps": 4}, DOG]},
    "a negative for all": {"neg": "blurry", "samples": [CAT, DOG | {"neg": ""}, DOG | {"neg": "dark"}]},
    "no negative": {"neg": False, "samples": [CAT | {"neg": "dark"}, DOG]},
    "odd sizes": {"width": 1000, "height": 10, "samples": [CAT, CAT | {"width": 72, "height": 95}]},
    "numbers with a dot": {"width": 512.0, "seed": 7.0, "samples": [CAT]},
    "options": {"samples": [{"prompt": "a cat --w 512 --h 256 --d 5 --l 3.5 --s 12"}]},
    "options by their long names": {"samples": [{"prompt": "a cat --seed 5 --cfg 3 --steps 12 --n blurry, dark"}]},
    "options of other models": {"samples": [{"prompt": "a cat --m 0.5 --p2 x --n2 y --gr 0.1 --seed 4"}]},
    "words after dashes": {"samples": [{"prompt": "a cat -- on a mat --seed 4 --ar 16:9 on a chair"}]},
    "dashes that are none": {"samples": [{"prompt": "  a well-known cat - asleep  "}]},
    "nothing but options": {"samples": [{"prompt": "--seed 4"}]},
    "a sample's seed against its option": {"samples": [CAT | {"seed": 3}, {"prompt": "a dog --seed 9"}, CAT]},
    "the trigger in an option": {"samples": [{"prompt": "a cat --n [trigger]"}]},
    "an empty prompt": {"samples": [{"prompt": ""}]},
    "nulls": {"samples": [CAT | {"seed": None}]},
    "no samples": {"samples": []},
    "nothing": {},
}
TRIGGERS = [None, "ohwx", "", r"\1 [x"]


def ours(work, sample: dict, trigger: str | None) -> list[tuple]:
    """The specs of a training's samples, read from a config, as tuples; what occurs twice is there once."""
    if not sample.get("samples") and not sample.get("prompts"):
        assert "the job has no samples" in refused(work, sample, trigger)
        return []
    return [astuple(spec) for spec in specs(work, sample, trigger)]


def theirs(sample: dict, trigger: str | None, job: str = "cat") -> list[tuple]:
    """What the toolkit makes of them: it puts the job's name in before anything else."""
    filled = json.loads(json.dumps(sample).replace("[name]", job))
    return list(dict.fromkeys(sampling.samples(filled, trigger)))


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("name", SAMPLES)
def test_specs_are_those_of_the_trainings_samples(work, name, trigger):
    assert ours(work, SAMPLES[name], trigger) == theirs(SAMPLES[name], trigger)


def random_sample(seed: int) -> dict[str, Any]:
    """A `sample:` of whatever can stand there."""
    draw = random.Random(seed)
    words = ["a cat", "[trigger]", "[name]", "-", ""]
    options = ["--seed 8", "--w 300", "--h 99", "--n dark", "--cfg 2", "--steps 3", "--x y", "-- z", "--m 2", "--"]
    entry_keys = {"width": 200, "height": 333, "seed": 11, "guidance_scale": 3, "sample_steps": 5, "neg": "grey"}

    def some(table: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in table.items() if draw.random() < 0.3}

    def prompt() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 3)) + draw.choices(options, k=draw.randint(0, 3)))

    whole = some(entry_keys | {"walk_seed": True})
    if draw.random() < 0.2:
        return whole | {"prompts": [prompt() for _ in range(3)]}
    return whole | {"samples": [{"prompt": prompt()} | some(entry_keys) for _ in range(draw.randint(1, 4))]}


def test_specs_of_any_samples_are_the_trainings(work):
    for seed in range(150):
        sample, trigger = random_sample(seed), TRIGGERS[seed % len(TRIGGERS)]
        assert ours(work, sample, trigger) == theirs(sample, trigger), (seed, sample)


def toolkit_source() -> Path:
    root = Path(os.environ.get("AI_TOOLKIT_ROOT") or Path.home() / "ai-toolkit")
    if not (root / "run.py").is_file():
        pytest.skip("no AI-Toolkit at $AI_TOOLKIT_ROOT or ~/ai-toolkit")
    return root


def part_of(path: Path, *names: str) -> list[ast.stmt]:
    """Classes and functions of a source file, by name, wherever in it they stand."""
    found = {node.name: node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if hasattr(node, "name")}
    return [found[name] for name in names]


@pytest.fixture(scope="module")
def toolkit_samples():
    """The samples that the real toolkit's code makes of a `sample:`: its own lines, without the packages that it imports."""
    root = toolkit_source()
    nodes = [
        *part_of(root / "toolkit" / "config_modules.py", "SampleItem", "SampleConfig", "GenerateImageConfig"),
        *part_of(root / "toolkit" / "prompt_utils.py", "inject_trigger_into_prompt"),
        *part_of(root / "jobs" / "process" / "BaseSDTrainProcess.py", "sample"),
    ]
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ast.fix_missing_locations(ast.Module([future, *nodes], []))
    space: dict[str, Any] = {
        "os": os,
        "time": __import__("time"),
        "flush": lambda: None,
        "print_acc": lambda text: None,
        "ImgExt": str,
        "random": random,
    }
    space |= dict.fromkeys(("Union", "Optional", "List", "EmptyLogger", "PromptEmbeds", "CustomAdapter", "ClipVisionAdapter"), ())
    space["torch"] = types.SimpleNamespace(Tensor=object)
    exec(compile(module, "toolkit", "exec", dont_inherit=True), space)

    def made(sample: dict[str, Any], trigger: str | None) -> list[tuple]:
        caught: list[Any] = []
        model = types.SimpleNamespace(
            generate_images=lambda configs, **_: caught.extend(configs),
            inject_trigger_into_prompt=space["inject_trigger_into_prompt"],
        )
        config = space["SampleConfig"](**sample)
        config.sampler = "flowmatch"
        process = types.SimpleNamespace(
            **{"accelerator": types.SimpleNamespace(is_main_process=True), "save_root": "x", "sample_config": config},
            **{"first_sample_config": config, "trigger_word": trigger, "sd": model, "logger": None},
            **dict.fromkeys(("adapter_config", "embedding", "adapter", "ema"), None),
            post_process_generate_image_config_list=lambda configs: configs,
        )
        space["sample"](process, 3)
        return [
            (c.prompt, c.seed, int(c.width // 16 * 16), int(c.height // 16 * 16), c.num_inference_steps, c.guidance_scale)
            + (c.negative_prompt or "",)
            for c in caught
        ]

    return made


@pytest.mark.toolkit
def test_the_oracle_is_the_toolkits_own_code(toolkit_samples):
    cases = [*SAMPLES.values(), *map(random_sample, range(300))]
    for sample, trigger in itertools.product(cases, TRIGGERS):
        whole = sampling.TURBO | sample
        assert sampling.samples(sample, trigger) == toolkit_samples(whole, trigger), sample


@pytest.mark.toolkit
def test_every_option_of_the_toolkit_is_known():
    source = (toolkit_source() / "toolkit" / "config_modules.py").read_text("utf-8")
    assert set(re.findall(r"flag == '(\w+)'", source)) == {*samples._OPTIONS, *samples._UNUSED}


def test_what_a_sample_leaves_open_is_as_turbo_wants_it(work):
    assert specs(work, {"samples": [{"prompt": "a cat"}]}) == [ImageSpec("a cat", 42, 1024, 1024, 9, 1.0, "")]
    assert specs(work, prompts=["a cat"]) == [ImageSpec("a cat", 42, 1024, 1024, 9, 1.0, "")]


@pytest.mark.parametrize("sample", [{"seed": -1, "samples": [CAT, CAT | {"seed": -1}]}, {"samples": [{**CAT, "seed": -1}]}])
def test_a_random_seed_is_one_that_can_be_named(work, sample):
    assert {spec.seed for spec in specs(work, sample)} == {SEED}


@pytest.mark.parametrize(
    "sample", [{"samples": 5}, {"prompts": "a cat"}, {"samples": ["a cat", {"prompt": 5}, None]}, 5, "x", [CAT]]
)
def test_samples_of_another_form_are_none(work, sample):
    assert refused(work, sample).startswith(f"{PLACE}.prompts: is missing, and the job has no samples")


@pytest.mark.parametrize("value", ["wide", True, None, float("nan"), float("inf"), 10**400, [512]], ids=lambda v: repr(v)[:9])
@pytest.mark.parametrize("key", ["width", "height", "seed", "sample_steps", "guidance_scale"])
def test_what_is_no_number_in_samples_is_as_if_it_were_not_there(work, key, value):
    assert specs(work, {key: value, "samples": [CAT | {key: value}]}, "x") == specs(work, {"samples": [CAT]}, "x")


def test_equal_specs_are_one(work):
    assert len(specs(work, {"samples": [CAT, CAT, CAT | {"seed": 42}, CAT | {"guidance_scale": 1}, CAT | {"seed": 4}]})) == 2


def test_a_number_with_a_dot_is_the_same_number(work):
    one, other = (specs(work, dict.fromkeys(("seed", "width", "sample_steps"), n) | {"samples": [CAT]}) for n in (64, 64.0))
    assert json.dumps(one[0].record()) == json.dumps(other[0].record())
    assert json.dumps(specs(work, {"guidance_scale": 1, "samples": [CAT]})[0].record()) == json.dumps(
        specs(work, {"samples": [CAT]})[0].record()
    )


# --- what `preview` says instead -----------------------------------------------------------------------------------------------

SAMPLE = {"seed": 7, "width": 512, "neg": "dark", "samples": [CAT | {"height": 256}, {"prompt": "a dog --seed 9"}]}


@pytest.mark.parametrize(
    ("asked", "differs"),
    [
        ({"seed": 1}, {"seed": 1}),
        ({"size": 768}, {"width": 768, "height": 768}),
        ({"size": [320, 640]}, {"width": 320, "height": 640}),
        ({"steps": 3}, {"steps": 3}),
        ({"guidance": 4}, {"guidance": 4.0}),
        ({"guidance": 0.0}, {"guidance": 0.0}),
        ({"seed": 0}, {"seed": 0}),
    ],
    ids=str,
)
def test_a_setting_takes_the_place_of_the_samples_own(work, asked, differs):
    before, after = specs(work, SAMPLE), specs(work, SAMPLE, **asked)
    assert [spec.record() for spec in after] == [spec.record() | differs for spec in before]


def test_every_prompt_with_every_seed(work):
    found = specs(work, SAMPLE, seed=[1, 2])
    assert [(spec.prompt, spec.seed) for spec in found] == [(p, s) for p in ("a [trigger] cat", "a dog") for s in (1, 2)]
    found = specs(work, prompts=["a", "b"], seed=[1, 2, 1])
    assert [(spec.prompt, spec.seed) for spec in found] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_own_prompts_have_the_settings_of_the_first_sample(work):
    assert specs(work, SAMPLE, "ohwx", prompts=["a [trigger] fox", "a [name]"]) == [
        ImageSpec("a ohwx fox", 7, 512, 256, 9, 1.0, "dark"),
        ImageSpec("a ohwx", 7, 512, 256, 9, 1.0, "dark"),
    ]
    found = specs(work, {"width": 1000, "seed": 3, "guidance_scale": 2}, prompts=["a fox"])
    assert found == [ImageSpec("a fox", 3, 992, 1024, 9, 2.0)]


def test_an_option_of_a_prompt_is_nearer_than_a_setting_for_all(work):
    found = specs(work, prompts=["a cat --seed 5 --w 320 --steps 2", "a dog"], seed=[1, 2], size=640, steps=4)
    assert [(s.prompt, s.seed, s.width, s.height, s.steps) for s in found] == [
        ("a cat", 5, 320, 640, 2),
        *(("a dog", seed, 640, 640, 4) for seed in (1, 2)),
    ]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a cat -- on a mat", "a cat -- on a mat"),
        ("a cat --seed 4 --ar 16:9", "a cat --ar 16:9"),
        ("a cat --m 0.5 --p2 x --seed 4", "a cat"),
        ("--", "--"),
        ("a cat--dog", "a cat--dog"),
        ("a cat --W 5", "a cat --W 5"),
    ],
)
def test_words_of_own_prompts_that_are_no_option_stay(work, prompt, text):
    assert [spec.prompt for spec in specs(work, prompts=[prompt])] == [text]


@pytest.mark.parametrize(
    ("option", "named"),
    [("--seed x", "--seed"), ("--seed", "--seed"), ("--w 1.5", "--w"), ("--cfg high", "--cfg"), ("--steps 1e3", "--steps")],
)
def test_an_option_without_its_number(work, option, named):
    message = refused(work, prompts=["a cat", f"a dog {option}"])
    assert message.startswith(f"{PLACE}.prompts: {named} in the prompt 'a dog {option}' needs a number, not ")
    message = refused(work, {"samples": [{"prompt": f"a dog {option}"}]})
    assert message.startswith(f"process[0].sample: {named} in the prompt")
    message = refused(work, section={"sample": {"samples": [{"prompt": f"a dog {option}"}]}})
    assert message.startswith(f"process[1].sample: {named} in the prompt")


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        (
            {"size": 1000},
            "size: 1000 x 1000 pixels can't be rendered, a side is 64 to 4096 and a multiple of 16: write 992 for 1000",
        ),
        ({"size": [512, 300]}, "write 304 for 300"),
        ({"size": 48}, "write 64 for 48"),
        ({"size": 0}, "write 64 for 0"),
        ({"size": -512}, "write 64 for -512"),
        ({"size": [512, 4112]}, "write 4096 for 4112"),
        ({"prompts": ["a --w 100"]}, "write 96 for 100"),
        ({"prompts": ["a --steps 0"]}, "steps: 0 steps can't be rendered"),
        ({"prompts": ["a --steps 201"]}, "steps: 201 steps can't be rendered"),
        ({"prompts": ["a --cfg -1"]}, "guidance: -1 can't be rendered"),
        ({"prompts": ["a --cfg nan"]}, "guidance: nan can't be rendered"),
        ({"prompts": ["a --seed -1"]}, "seed: -1 is not a fixed seed"),
        ({"prompts": [f"a --seed {2**63}"]}, f"seed: {2**63} is not a fixed seed"),
    ],
    ids=str,
)
def test_specs_that_z_image_cant_have(work, asked, advice):
    message = refused(work, SAMPLE, **asked)
    assert message.startswith(f"{PLACE}.") and advice in message


def test_sizes_at_the_edge(work):
    assert [(s.width, s.height) for s in specs(work, prompts=["a"], size=[64, 4096])] == [(64, 4096)]


def test_samples_that_no_picture_can_be_made_of(work):
    assert "write 4096 for 4992" in refused(work, {"width": 5000, "samples": [CAT]})
    assert refused(work, {"sample_steps": 0, "samples": [CAT]}).startswith(f"{PLACE}.steps: 0 steps")
    assert specs(work, {"sample_steps": 0, "samples": [CAT]}, steps=4)[0].steps == 4


# --- files of prompts ----------------------------------------------------------------------------------------------------------

LINES = "a cat\r\n\r\n  a [trigger] dog --seed 4  \na köttbullar 猫\n\t\n"
CONTENTS = {
    "utf-8": LINES.encode(),
    "a mark": b"\xef\xbb\xbf" + LINES.encode(),
    "PowerShell": b"\xff\xfe" + LINES.encode("utf-16-le"),
    "no last newline": LINES.strip().encode(),
    "old Mac": LINES.replace("\r\n", "\n").replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_has_a_prompt_on_each_line(work, name):
    (work.folder / "prompts.txt").write_bytes(CONTENTS[name])
    found = specs(work, trigger="ohwx", prompts="prompts.txt")
    assert [(s.prompt, s.seed) for s in found] == [("a cat", 42), ("a ohwx dog", 4), ("a köttbullar 猫", 42)]


def test_files_are_looked_for_beside_the_config_then_in_the_working_directory(work, monkeypatch):
    cwd = work.folder / "work"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("HOME", str(cwd))
    (cwd / "p.txt").write_text("there")
    assert [s.prompt for s in specs(work, prompts="p.txt")] == ["there"]
    (work.folder / "p.txt").write_text("beside")
    assert [s.prompt for s in specs(work, prompts="p.txt")] == ["beside"]
    for named in (str(cwd / "p.txt"), "~/p.txt", "./work/p.txt"):
        assert [s.prompt for s in specs(work, prompts=named)] == ["there"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "p.txt does not exist (looked in "),
        (b"", "has no prompts"),
        (b" \r\n\n\t", "has no prompts"),
        (b"\xef\xbb\xbf", "has no prompts"),
        (b"\xff\xfe\x00", "can't be read as text"),
        (b"\x81\x8d", "can't be read as text"),
    ],
)
def test_a_file_without_prompts(work, content, says):
    if content is not None:
        (work.folder / "p.txt").write_bytes(content)
    message = refused(work, prompts="p.txt")
    assert message.startswith(f"{PLACE}.prompts: ") and says in message and "YAML" not in message


@pytest.mark.parametrize(
    "name", ["folder", "a photo of a cat", "~nobody-of-this-name/p.txt", "a\0b", "x" * 300, "/nowhere/p.txt"]
)
def test_paths_that_are_no_file(work, name):
    (work.folder / "folder").mkdir()
    assert refused(work, prompts=name).startswith(f"{PLACE}.prompts: ")


# --- the model -----------------------------------------------------------------------------------------------------------------


def model_folder(folder: Path, **files: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def model_refused(work, *, section: dict | None = None, **training: Any) -> str:
    with pytest.raises(ZitMergeError) as caught:
        render_settings(work, section=section, **training)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "model", [None, {}, {"arch": "zimage:turbo"}, {"name_or_path": "", "arch": "zimage"}, {"name_or_path": 5}, "x"]
)
def test_a_model_that_is_not_named(work, model):
    message = model_refused(work, model=model)
    assert message.startswith("process[0].model.name_or_path: is missing") and "Tongyi-MAI/Z-Image-Turbo" in message
    with pytest.raises(ZitMergeError, match=r"^process\[0\]\.model\.name_or_path: is missing"):
        settings_of(*settled(work, work.section(step(), model=model)))


@pytest.mark.parametrize("arch", ["flux", "qwen_image", "", None, 5, "sdxl:zimage"])
def test_another_arch(work, arch):
    assert model_refused(work, model=MODEL | {"arch": arch}).startswith("process[0].model.arch: ")


@pytest.mark.parametrize("arch", ["zimage", "zimage:turbo", "zimage:deturbo"])
def test_archs_of_z_image(work, arch):
    assert render_settings(work, model=MODEL | {"arch": arch})[0].model["arch"] == arch


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "/nowhere/model",
        "./nowhere",
        "nowhere/a/b",
        "a b/c",
        "~nobody-of-this-name/x",
        "model.safetensors",
        "a\0b",
        "x/" * 2,
    ],
)
def test_a_model_that_is_not_there(work, name):
    assert model_refused(work, model=MODEL | {"name_or_path": name}).startswith("process[0].model.name_or_path: ")


@pytest.mark.parametrize(
    "files",
    [
        {"model_index__json": {"_class_name": "FluxPipeline"}},
        {"config__json": {"_class_name": "FluxPipeline"}},
        {"model_index__json": "{broken", "config__json": {"_class_name": "FluxPipeline"}},
        {"model_index__json": [1], "config__json": {"_class_name": "FluxPipeline"}},
        {"model_index__json": {"_class_name": ["x"]}, "config__json": {"_class_name": "FluxPipeline"}},
    ],
    ids=str,
)
def test_a_folder_that_says_it_is_another_model(work, files):
    name = model_folder(work.folder / "flux", **files)
    message = model_refused(work, model=MODEL | {"name_or_path": name})
    assert message == f"process[0].model.name_or_path: {name} is a FluxPipeline, not Z-Image: give the folder of a Z-Image model"


def test_extras_that_no_system_can_have(work):
    for extras in ("~nobody-of-this-name/x", "x" * 300):
        message = model_refused(work, model=MODEL | {"extras_name_or_path": extras})
        assert message.startswith("process[0].model.extras_name_or_path: ")


def test_a_model_index_that_nobody_can_read(work):
    name = model_folder(work.folder / "zit", model_index__json="[" * 100_000)
    assert render_settings(work, model=MODEL | {"name_or_path": name})[0].name == "zit"


def test_a_transformer_that_says_it_is_another_model(work):
    model_folder(work.folder / "flux" / "transformer", config__json={"_class_name": "AnotherZImageTransformer2DModel"})
    assert "AnotherZImageTransformer2DModel" in model_refused(work, model=MODEL | {"name_or_path": str(work.folder / "flux")})


def test_models_that_are_taken(work):
    (work.folder / "one.safetensors").write_bytes(b"x")
    folder = model_folder(work.folder / "zit", model_index__json={"_class_name": "ZImagePipeline"})
    bare = model_folder(work.folder / "bare", config__json={"hidden_size": 3840})
    for name in ("Tongyi-MAI/Z-Image-Turbo", str(work.folder / "one.safetensors"), folder, bare, "zit", "./zit/"):
        assert render_settings(work, model=MODEL | {"name_or_path": name})[0].model["name_or_path"] == name


def test_models_have_names_without_the_folders_they_lie_in(work, monkeypatch):
    model_folder(work.folder / "zit")
    monkeypatch.setenv("HOME", str(work.folder))
    named = dict.fromkeys(("zit", "./zit/", "~/zit"), "zit") | {"Tongyi-MAI/Z-Image-Turbo": "Tongyi-MAI/Z-Image-Turbo"}
    for name, told in named.items():
        assert render_settings(work, model=MODEL | {"name_or_path": name})[0].name == told
    monkeypatch.chdir(work.folder / "zit")
    found, context = render_settings(work, model=MODEL | {"name_or_path": "."})
    assert found.name == "zit"


def test_settings_of_the_section_are_on_top_of_the_trainings(work):
    trained = MODEL | {"quantize": True, "low_vram": False}
    found, _ = render_settings(work, model=trained, train={"dtype": "bf16"}, section={"model": {"low_vram": True}})
    assert found.model == trained | {"low_vram": True} and found.loc == "process[0].model" and found.dtype == "bf16"
    found, _ = render_settings(work, model=trained, section={"model": {"name_or_path": "a/b", "arch": "zimage"}})
    assert found.model == {"name_or_path": "a/b", "arch": "zimage"} and found.loc == "process[1].model"


@pytest.mark.parametrize(
    ("training", "section", "dtype"),
    [
        ({"train": {"dtype": "bf16"}, "model": MODEL | {"dtype": "fp16"}}, {}, "bf16"),
        ({"train": {}, "model": MODEL | {"dtype": "fp16"}}, {}, "fp32"),
        ({"train": {"dtype": "fp16"}}, {"model": MODEL}, "fp16"),
        ({"train": {"dtype": "fp16"}}, {"model": MODEL | {"dtype": "fp32"}}, "fp32"),
        ({"train": {"dtype": "fp16"}}, {"model": MODEL, "train": {"dtype": "fp32"}}, "fp32"),
        ({}, {"model": MODEL}, "bf16"),
    ],
    ids=str,
)
def test_the_dtype_is_that_of_the_training(work, training, section, dtype):
    assert render_settings(work, section=section, **training)[0].dtype == dtype


def test_a_section_alone_has_all_of_its_own(work):
    own = {
        "model": MODEL,
        "sample": {"samples": [CAT], "seed": 3},
        "trigger_word": "ohwx",
        "device": "cpu",
        "train": {"dtype": "fp32"},
    }
    section, context = settled(work, work.section(step(), **own))
    found = settings_of(section, context)
    assert (found.dtype, found.trigger, found.loc, found.samples_loc, found.device) == (
        *("fp32", "ohwx", "process[0].model", "process[0].sample", "cpu"),
    )
    assert specs_of(Preview(), found, context, PLACE) == (ImageSpec("a ohwx cat", 3),)


def test_samples_and_trigger_of_the_section_come_first(work):
    section = {"sample": {"samples": [DOG]}, "trigger_word": "own"}
    found = specs(work, {"samples": [CAT]}, "trained", section=section)
    assert [spec.prompt for spec in found] == ["cat and a dog own"]
    found = specs(work, {"samples": [CAT]}, "trained", section={"sample": {"samples": []}, "trigger_word": ""})
    assert [spec.prompt for spec in found] == ["a trained cat"]


@pytest.mark.parametrize(
    ("trigger", "prompt"), [("ohwx", "a ohwx cat"), ("", "a  cat"), (None, "a [trigger] cat"), (5, "a 5 cat")]
)
def test_the_trigger_of_a_section_alone(work, trigger, prompt):
    section, context = settled(work, work.section(step(), model=MODEL, trigger_word=trigger))
    assert specs_of(Preview(prompts=["a [trigger] cat"]), settings_of(section, context), context, PLACE)[0].prompt == prompt


@pytest.mark.parametrize(
    ("sample", "row"),
    [
        ({"samples": [CAT] * 3}, 3),
        ({"samples": [CAT] * 2, "prompts": ["x"] * 5}, 5),
        ({"samples": [{"prompt": None}, CAT]}, 2),
        ({"samples": []}, 1),
        (None, 1),
        ({"samples": 5, "prompts": "abc"}, 1),
    ],
    ids=str,
)
def test_a_row_of_the_gallery_is_as_the_ui_counts_it(work, sample, row):
    own = {"sample": {"samples": [CAT] * 7}}
    assert render_settings(work, sample=sample, section=own)[0].row == row
    section, context = settled(work, work.section(step(), model=MODEL, sample=sample))
    assert settings_of(section, context).row == row


# --- what a picture follows from -----------------------------------------------------------------------------------------------


def model_record(work, *, dtype: str = "bf16", **settings: Any) -> str:
    return json.dumps(render_settings(work, train={"dtype": dtype}, model=MODEL | settings)[0].record(), sort_keys=True)


def test_what_of_a_model_changes_pictures(work):
    before = model_record(work)
    assert model_record(work, low_vram=True, assistant_lora_path="x", compile=True, dtype="bf16") == before
    for changed in ({"quantize": True}, {"qtype": "uint4"}, {"dtype": "fp32"}, {"arch": "zimage"}, {"name_or_path": "a/b"}):
        assert model_record(work, **changed) != before
    assert model_record(work, layer_offloading=True) != before, "offloaded layers are quantized in another way"


def test_a_model_is_its_files_wherever_they_lie(work):
    folder = work.folder / "a" / "zit"
    (folder / "transformer").mkdir(parents=True)
    weights = folder / "transformer" / "model.safetensors"
    weights.write_bytes(b"one")
    before = model_record(work, name_or_path=str(folder))
    assert "model.safetensors" in before and str(work.folder) not in before
    (work.folder / "b").mkdir()
    folder.rename(work.folder / "b" / "zit")
    moved = work.folder / "b" / "zit" / "transformer" / "model.safetensors"
    assert model_record(work, name_or_path="b/zit") == before
    stat = moved.stat()
    moved.write_bytes(b"two")
    assert model_record(work, name_or_path="b/zit") != before
    os.utime(moved, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert model_record(work, name_or_path="b/zit") == before
    moved.write_bytes(b"longer")
    os.utime(moved, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert model_record(work, name_or_path="b/zit") != before


def test_a_model_of_one_file(work):
    (work.folder / "zit.safetensors").write_bytes(b"one")
    (work.folder / "other.safetensors").write_bytes(b"x")
    record = json.loads(model_record(work, name_or_path="zit.safetensors"))
    assert [file[0] for file in record["files"]] == ["zit.safetensors"]
    assert re.fullmatch(r"zit\.safetensors", record["model"]["name_or_path"])


def test_the_folders_of_a_model_are_no_part_of_its_record_but_its_weights_are(tmp_path):
    for folder in ("one", "two"):
        for part in ("model", "extras"):
            (tmp_path / folder / part).mkdir(parents=True)
            (tmp_path / folder / part / "weights.safetensors").write_bytes(b"12")
            os.utime(tmp_path / folder / part / "weights.safetensors", (1, 1))

    def record(folder: str) -> dict:
        paths = {
            key: str(tmp_path / folder / part) for key, part in (("name_or_path", "model"), ("extras_name_or_path", "extras"))
        }
        return RenderSettings(paths | {"arch": "zimage"}, "bf16", {}, None, "model").record()

    before = record("one")
    assert before == record("two") and str(tmp_path) not in json.dumps(before)
    (tmp_path / "two" / "extras" / "weights.safetensors").write_bytes(b"123")
    assert before != record("two")
