"""Previews, a sweep and an ablation in real jobs, on the tiny Z-Image: what is shown, where it lies, who may stop it."""

import base64
import json
import re
import shutil
import signal
import sys
from contextlib import contextmanager, nullcontext, suppress
from io import BytesIO
from types import SimpleNamespace

import numpy
import pytest
import yaml
from host.job import job, training
from host.test_job import write
from host.ui import Launched, make_database, row
from PIL import Image
from safetensors.torch import load_file, save_file

from extensions_built_in.zit_merge.host.render import _advice
from extensions_built_in.zit_merge.host.status import Status
from extensions_built_in.zit_merge.host.watch import JobProgress
from extensions_built_in.zit_merge.preview.settings import ImageSpec, RenderSettings
from extensions_built_in.zit_merge.progress import SILENT

pytestmark = pytest.mark.toolkit

SAMPLES = [{"prompt": "a [trigger] cat"}, {"prompt": "a dog --w 96"}]
SAMPLE = {
    "sampler": "flowmatch",
    "width": 64,
    "height": 64,
    "sample_steps": 2,
    "guidance_scale": 1,
    "seed": 42,
    "walk_seed": True,
}
PICTURES = 2 * 3 + 3 + 2 * 2  # previews; of the ablation three variants on a spec of its own, the base among them; the sweep


def section(**keys):
    steps = [
        {
            "name": "soft",
            "preview": True,
            "loras": [{"lora": "trained", "ratio": 0.9, "blocks": {"attention": 0.5}}],
            "ablate": {"by": "layers", "groups": 1, "prompts": ["a bird"], "preset": "whole"},
        },
        {
            "name": "both",
            "loras": [{"lora": "soft", "ratio": 1.0}, {"lora": "style.safetensors", "ratio": 0.6}],
            "sweep": {"loras[1].ratio": [0.5, 1.0]},
        },
    ]
    return {"type": "zit_merge", "shapes": "free", "steps": steps} | keys


@pytest.fixture(scope="module")
def shown(toolkit, place, tmp_path_factory):
    """(folder, config, run) of a job that trains, samples, merges and renders."""
    database = make_database(tmp_path_factory.mktemp("ui") / "aitk_db.db")
    sample = SAMPLE | {"format": "png", "samples": SAMPLES}
    process = training(place, "pa", sqlite_db_path=str(database), trigger_word="mycat", sample=sample)
    process["train"]["disable_sampling"] = False
    config = write(place, "pa", job("pa", process, section()))
    ran = Launched(toolkit, config, database)
    assert ran.code == 0, ran.log[-3000:]
    return place / "output" / "pa", config, ran


def facts(folder, name):
    return json.loads((folder / "merged_pa_previews" / f"{name}.json").read_text())


def pixels(path):
    return numpy.asarray(Image.open(path).convert("RGB")).astype(int)


def variant(folder, name, label):
    (found,) = [entry for entry in facts(folder, name)["looks"] if entry["label"] == label]
    return [pixels(folder / "merged_pa_previews" / picture) for picture in found["pictures"]]


def samples(folder, step):
    return sorted(p for p in (folder / "samples").glob(f"*__{step:09d}_*.png"))


def test_the_pictures_are_those_of_the_trainer(shown):
    """Prompts, trigger word, seeds, sizes, steps, model and LoRA: the trainer's own samples before and after its training."""
    folder, _, _ = shown
    before, after = [pixels(p) for p in samples(folder, 0)], [pixels(p) for p in samples(folder, 3)[:2]]
    base, trained, result = (variant(folder, "soft_preview", label) for label in ("base", "pa.safetensors", "soft"))
    for n, shape in enumerate([(64, 64, 3), (64, 96, 3)]):
        assert base[n].shape == shape
        assert (base[n] == before[n]).all()
        # the trainer adds its LoRA to the weights to sample, and rounds them to bf16
        apart = numpy.abs(trained[n] - after[n]).mean()
        assert apart < 0.5 * numpy.abs(base[n] - after[n]).mean(), apart
        assert not (result[n] == trained[n]).all() and not (result[n] == base[n]).all()


def test_the_gallery_gets_full_rows_in_names_that_the_viewer_splits(shown):
    folder, _, _ = shown
    ours = samples(folder, 3)[2:]
    assert len(ours) == 2 * 3 + 2 * 2
    for n, path in enumerate(ours):
        parts = [part for part in path.name.split(".")[0].split("_") if part]
        assert len(parts) == 3 and int(parts[1]) == 3 and int(parts[2]) == n % 2
        assert (folder / "samples" / ".thumbs" / f"{path.name}.jpg").is_file()
    for path, picture in zip(ours, variant(folder, "soft_preview", "base"), strict=False):
        assert (pixels(path)[:32] == picture[:32]).all(), "the base comes first"
        assert not (pixels(path)[-20:] == picture[-20:]).all(), "labelled"
    assert not list(folder.rglob("*.part"))


def test_the_ui_hears_of_every_picture(shown):
    _, _, ran = shown
    told = [info for info in ran.infos if info.startswith("Picture ")]
    first_told = dict.fromkeys(info.split(":")[0] for info in told)  # the first one again when its model is loaded
    assert list(first_told) == [f"Picture {n}/{PICTURES}" for n in range(1, PICTURES + 1)] and len(told) == PICTURES + 1
    assert ran.statuses == ["running", "completed"]
    assert ran.infos.index(told[0]) > max(n for n, info in enumerate(ran.infos) if info.startswith("Merging "))
    assert row(ran.database)["step"] == 3, "the training's own count stays"


def test_sheets_tables_preset_and_page(shown):
    folder, _, ran = shown
    ours = folder / "merged_pa_previews"
    for name in ("soft_preview", "soft_ablate", "soft_ablate_chart", "both_sweep"):
        assert min(Image.open(ours / f"{name}.png").size) > 300
    measured = facts(folder, "soft_ablate")["ablation"]
    (group,) = measured["groups"]
    assert group["name"] == "layers 0-29" and len(group["modules"]) == 240
    # without all of its layers the LoRA does nothing: the picture is the base's
    assert all(found["share"] == pytest.approx(1) for found in group["metrics"].values())
    assert (ours / "whole.yaml").is_file() and "whole.yaml" in ran.log
    page = (folder / "plugin.html").read_text()
    block = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    steps = {step["name"]: step for step in block["sections"][0]["steps"]}
    assert len(steps["soft"]["galleries"]) == 2 and len(steps["both"]["galleries"]) == 1
    assert steps["soft"]["details"], "the pictures stand beside what the merge left"
    shown_there = [p for step in steps.values() for gallery in step["galleries"] for p in gallery["pictures"]]
    assert len(shown_there) == PICTURES
    assert Image.open(BytesIO(base64.b64decode(shown_there[0]))).size == (64, 64)


def test_a_cell_of_the_sweep_is_the_file_that_its_section_makes(shown, run_python, place, tmp_path):
    """The section that --yaml prints, run: a file; its preview has the name of the cell's picture, and its pixels."""
    folder, config, _ = shown
    printed = run_python("-m", "extensions_built_in.zit_merge", "preview", config, "--yaml", "both:2")
    assert printed.returncode == 0, printed.stderr
    made = yaml.safe_load(printed.stdout)
    assert [step["name"] for step in made["steps"]] == ["soft", "both"]
    assert made["steps"][1]["loras"][1]["ratio"] == 1.0
    for step in made["steps"]:
        step.pop("sweep", None)
    made["steps"][1]["preview"] = {"compare": ["result"]}
    whole = yaml.safe_load(config.read_text())
    whole["config"]["process"][1] = made | {"output_dir": str(tmp_path / "out")}
    again = write(place, "pa_cell", whole)
    ran = run_python("-m", "extensions_built_in.zit_merge", "run", again)
    assert ran.returncode == 0, ran.stderr
    assert "by `preview`" in ran.stdout
    ran = run_python("-m", "extensions_built_in.zit_merge", "preview", again, timeout=300)
    assert ran.returncode == 0 and "0 pictures rendered, 2 of 2 reused" in ran.stdout, ran.stdout + ran.stderr
    (cell,) = [e for e in facts(folder, "both_sweep")["looks"] if e["label"].startswith("2:")]
    (result,) = facts(folder, "both_preview")["looks"]
    assert result["pictures"] == cell["pictures"]


def test_two_processes_render_the_same_and_nothing_twice(shown, run_python, tmp_path):
    """Under torchrun, which is what accelerate launch starts, in a folder without any file: results are computed there."""
    folder, config, _ = shown
    words = ["-m", "extensions_built_in.zit_merge", "preview", config, "--output-dir", tmp_path / "two"]
    ran = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words, ACCELERATE_USE_CPU="true")
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    counts = re.findall(r"^(\d+) pictures rendered, (\d+) of (\d+) reused$", ran.stdout, re.M)
    assert [sum(map(int, column)) for column in zip(*counts, strict=True)] == [PICTURES, 0, PICTURES]
    assert ran.stdout.count("soft: previews") == 2, "only the main process tells, the plan and the result"
    one, two = folder / "merged_pa_previews", tmp_path / "two" / "merged_pa_previews"
    names = sorted(p.name for p in (two / "pictures").iterdir())
    assert len(names) == PICTURES and not list((tmp_path / "two").rglob("*.part"))
    for name in names:
        assert (one / "pictures" / name).read_bytes() == (two / "pictures" / name).read_bytes()
    assert (one / "soft_ablate.json").read_bytes() == (two / "soft_ablate.json").read_bytes()
    assert not (tmp_path / "two" / "samples").exists(), "a folder that the command line names is no job's"
    assert not list((tmp_path / "two").glob("*.safetensors")), "no LoRA is written for pictures"


def test_it_resumes(shown, run_python):
    folder, config, _ = shown
    pictures = sorted((folder / "merged_pa_previews" / "pictures").iterdir())
    before, shown_before = [p.read_bytes() for p in pictures], sorted(p.name for p in (folder / "samples").glob("*.png"))
    pictures[0].unlink()
    pictures[1].write_bytes(before[1][: len(before[1]) // 2])
    ran = run_python("-m", "extensions_built_in.zit_merge", "preview", config)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert sum(map(int, re.findall(r"^(\d+) pictures? rendered", ran.stdout, re.M))) == 2
    assert [p.read_bytes() for p in pictures] == before
    assert sorted(p.name for p in (folder / "samples").glob("*.png")) == shown_before


def test_a_page_with_pictures_outlives_a_run_without(shown, run_python, place, tmp_path):
    folder, config, _ = shown
    whole = yaml.safe_load(config.read_text())
    shutil.copytree(place / "model", tmp_path / "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    whole["config"]["process"][0]["model"]["name_or_path"] = str(tmp_path / "broken")
    before = (folder / "plugin.html").read_bytes()
    ran = run_python("-m", "extensions_built_in.zit_merge", "preview", write(place, "pa_broken", whole))
    assert ran.returncode == 1 and "can't be used" in ran.stderr and "Traceback" not in ran.stderr, ran.stderr[-2000:]
    assert (folder / "plugin.html").read_bytes() == before and "report:" not in ran.stdout


def alone(place, database, **keys):
    """A merge-only job's section as the UI writes it, with a model."""
    host = {"sqlite_db_path": str(database), "training_folder": str(place / "output"), "device": "cuda"}
    model = {"name_or_path": str(place / "model"), "arch": "zimage:turbo"}
    loras = [{"lora": str(place / "style.safetensors"), "ratio": 0.5}]
    preview = {"prompts": [f"prompt {n}" for n in range(30)], "size": 64, "steps": 2}
    found = section(steps=[{"name": "soft", "loras": loras, "preview": preview}], model=model)
    return found | host | keys


@pytest.mark.parametrize(
    "act, end",
    [
        (Launched.interrupt, "stopped"),
        (lambda ran: ran.set(stop=1, status="stopping"), "stopped"),
        (lambda ran: ran.set(return_to_queue=1, status="stopping"), "queued"),
    ],
)
def test_a_stop_takes_effect_in_the_midst_of_a_picture(toolkit, place, tmp_path, act, end):
    database = make_database(tmp_path / "aitk_db.db")
    section = alone(place, database)
    section["steps"][0]["preview"] |= {"steps": 200, "size": 512}  # the first picture would take longer than all the rest
    config = write(place, "pb", job("pb", section))
    folder = place / "output" / "pb"
    shutil.rmtree(folder, ignore_errors=True)
    ran = Launched(toolkit, config, database, when=("Picture 1/", act))
    assert (ran.seen[-1][0], ran.code) == (end, 0), (ran.seen[-3:], ran.log[-3000:])
    assert not [status for status in ran.statuses[1:] if status == "running"], ran.seen[-5:]
    assert (folder / "merged_pb_soft.safetensors").is_file()
    assert not list(folder.rglob("*.png")) and not list(folder.rglob("*.part"))


def test_the_row_says_queued_when_everything_else_is_written(toolkit, place, tmp_path):
    """After a training too: from then on the queue may start the next job, and this one again."""
    database = make_database(tmp_path / "aitk_db.db")
    steps = [
        {"name": "soft", "loras": [{"lora": "trained", "ratio": 1.0}], "preview": {"prompts": ["a"], "steps": 200, "size": 512}}
    ]
    process = training(place, "pc", sqlite_db_path=str(database), sample=SAMPLE | {"samples": SAMPLES})
    config = write(place, "pc", job("pc", process, section(steps=steps)))
    ran = Launched(toolkit, config, database, when=("Picture 1/", lambda ran: ran.set(return_to_queue=1)))
    assert (ran.seen[-1], ran.code) == (("queued", "Job queued"), 0), (ran.seen[-3:], ran.log[-3000:])
    assert ran.log.rstrip().endswith("Job queued"), ran.log[-500:]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"preview": {"prompts": "nowhere.txt"}}, "nowhere.txt does not exist"),
        ({"model": {"name_or_path": "broken", "arch": "zimage:turbo"}}, "can't be used"),
    ],
)
def test_trouble_with_pictures_leaves_the_merge(toolkit, place, tmp_path, change, said):
    database = make_database(tmp_path / "aitk_db.db")
    change = json.loads(json.dumps(change).replace('"broken"', json.dumps(str(tmp_path / "broken"))))
    shutil.copytree(place / "model", tmp_path / "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    raw = alone(place, database)
    raw["steps"][0]["preview"] |= change.pop("preview", {})
    more = {"name": "more", "loras": raw["steps"][0]["loras"]}
    config = write(place, "pc", job("pc", raw | change, section(steps=[more], training_folder=str(place / "output"))))
    shutil.rmtree(place / "output" / "pc", ignore_errors=True)
    ran = Launched(toolkit, config, database)
    assert ran.code != 0 and ran.statuses == ["running", "error"]
    assert said in ran.infos[-1], ran.infos[-3:]
    for step in ("soft", "more"):
        assert (place / "output" / "pc" / f"merged_pc_{step}.safetensors").is_file(), "sections that follow merge too"
    before, _, after = ran.log.partition("Running  2 processes")
    assert ("NO PICTURES" in before) == ("nowhere" in said), "what can be known before is said before"
    assert "NO PICTURES" in after


OUT_OF_MEMORY = """
import gc, resource, sys, torch
from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.host.render import ToolkitRenderer
from extensions_built_in.zit_merge.preview.settings import ImageSpec, RenderSettings
model = {"name_or_path": "~/model", "arch": "zimage:turbo"}
with ToolkitRenderer(RenderSettings(model, "bf16", {}, None, "process[0].model", "cpu")) as renderer:
    small = ImageSpec("a cat", width=64, height=64, steps=1)
    renderer.render(small)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
    try:
        renderer.render(ImageSpec("a cat", width=1024, height=1024, steps=1))
    except ZitMergeError as e:
        told = str(e)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print("TOLD", told)
    renderer.render(small)
    print("GOES ON")
for path in sys.argv[1:]:
    try:
        ToolkitRenderer(RenderSettings(model | {"name_or_path": path}, "bf16", {}, None, "process[0].model", "cpu"))
    except ZitMergeError as e:
        print("BROKEN", e, torch.get_default_dtype())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), -1))
try:
    ToolkitRenderer(RenderSettings(model, "fp32", {}, None, "process[0].model", "cpu"))
except ZitMergeError as e:
    told = str(e)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print("NO ROOM", told)
kinds = ("ZImageTransformer2DModel", "Qwen3ForCausalLM", "AutoencoderKL", "ZImageModel")
print("ALIVE", [type(o).__name__ for o in gc.get_objects() if type(o).__name__ in kinds])
"""


@pytest.fixture
def broken_models(place, tmp_path):
    """Models that fail to load, each in an error of another library's own."""

    def copy(name):
        return shutil.copytree(place / "model", tmp_path / name)

    (weights,) = copy("cut short").joinpath("text_encoder").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    config = copy("of another width") / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"dim": 48', '"dim": 96'))
    (weights,) = copy("lacking a layer").joinpath("transformer").glob("*.safetensors")
    save_file({k: t for k, t in load_file(weights).items() if "layers.3." not in k}, weights, metadata={"format": "pt"})
    return sorted(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory that torch runs into is Linux's")
def test_trouble_with_the_model_is_a_sentence_and_memory_is_given_back(toolkit, place, run_python, broken_models):
    ran = run_python("-c", OUT_OF_MEMORY, *broken_models, HOME=str(place))
    (told,) = [line for line in ran.stdout.splitlines() if line.startswith("TOLD")] or [ran.stderr[-2000:]]
    assert "out of memory for 1024 x 1024 pixels" in told
    for cure in ("size: [512, 512]", "quantize: true", "low_vram: true"):
        assert cure in told
    assert "GOES ON" in ran.stdout
    assert "ALIVE []" in ran.stdout, "the model is let go of"
    broken = [line for line in ran.stdout.splitlines() if line.startswith("BROKEN")]
    assert len(broken) == 3, ran.stdout + ran.stderr[-2000:]
    for line, path in zip(broken, broken_models, strict=True):
        assert f"{path} can't be used (" in line
        assert line.endswith("torch.float32"), "diffusers leaves torch's dtype changed when it fails"
    assert "NO ROOM out of memory while the model was loaded: set quantize: true" in ran.stdout


def test_a_smaller_size_is_one_that_can_be_rendered():
    settings = RenderSettings({"name_or_path": "m", "quantize": True, "low_vram": True}, "bf16", {}, None, "process[0].model")
    assert _advice(settings, ImageSpec("a", width=1040, height=112)) == "set size: [512, 64] in preview"


class Told(Status):
    """A status that notes what it is told."""

    def __init__(self):
        self.infos = []

    def say(self, info):
        self.infos.append(info)


@pytest.mark.parametrize("loses", [False, True])
def test_a_stop_while_the_model_is_loaded(loses):
    """It acts in the midst of it; where a library swallows it, when the model is there, and lets go of it."""
    went_on, closed = [], []

    @contextmanager
    def model():
        try:
            yield SimpleNamespace()
        finally:
            closed.append(1)

    def load(settings):
        with suppress(KeyboardInterrupt) if loses else nullcontext():
            signal.raise_signal(signal.SIGINT)
            went_on.append(1)
        return model()

    status = Told()
    with pytest.raises(KeyboardInterrupt), JobProgress(status, SILENT) as progress, progress.loading(load)(None):
        went_on.append(2)
    assert not went_on and closed == [1] * loses
    assert status.infos == ["Loading the model for pictures"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # the handler is the one that was there


LAUNCHED = """
import os, torch
from torch.distributed import distributed_c10d
from extensions_built_in.zit_merge.host.distributed import AccelerateWorkers
workers = AccelerateWorkers()
mine = workers.mine(["a", "b"])
found = workers.gather(mine)
patience = distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
os.write(1, f"WORKERS {workers.is_main} {len(mine)} {found} {sorted(workers.heard)} {patience.days}\\n".encode())
"""


def test_three_processes_for_two_pictures(toolkit, run_python):
    words = ["--standalone", "--nproc_per_node", "3", "--no-python", sys.executable, "-c", LAUNCHED]
    ran = run_python("-m", "torch.distributed.run", *words, ACCELERATE_USE_CPU="true")
    told = sorted(line for line in ran.stdout.splitlines() if line.startswith("WORKERS"))
    whole = "['a', 'b'] ['a', 'b'] 1"  # and a day to wait for the others
    assert told == [f"WORKERS False 0 {whole}", f"WORKERS False 1 {whole}", f"WORKERS True 1 {whole}"], ran.stderr[-2000:]
