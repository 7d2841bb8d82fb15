"""`check` looks at the training before our section: errors stop, advice is printed."""

import sys

import pytest

LORA = {"steps": [{"name": "a", "loras": [{"lora": "trained", "ratio": 1.0}]}]}


def merging(**keys):
    return {"type": "zit_merge", "shapes": "free", **LORA, **keys}


def training(work, network=None, model=None, datasets=None, sample=None, **train):
    good = {
        "steps": 3000,
        "batch_size": 1,
        "cache_text_embeddings": True,
        "do_differential_guidance": True,
        "differential_guidance_scale": 3,
        "optimizer": "adamw8bit",
    }
    return work.training(
        train=good | train,
        model=model or {"arch": "zimage:turbo", "name_or_path": "x"},
        datasets=datasets or [{"folder_path": "images", "cache_latents_to_disk": True, "resolution": [1024]}],
        sample=sample or {"samples": [{"prompt": "one"}]},
        **({"network": network} if network else {}),
    )


def check(work, process, **keys):
    return work.zit("check", work.config(process, merging(**keys)))


def advice(work, process, **keys):
    text = check(work, process, **keys).ok()
    assert text.rstrip().endswith("no errors")
    return " ".join(text.partition("advice: ")[2].split()) if "advice: " in text else ""


def test_the_blogs_settings_need_no_advice(work):
    assert advice(work, training(work)) == ""


SCHEDULERS = [
    ({"lr_scheduler": "step"}, "can't make step"),
    ({"lr_scheduler": "polynomial"}, "can't make polynomial"),
    ({"lr_scheduler": "cosin"}, "can't make cosin"),
    ({"lr_scheduler": "cosine", "lr_scheduler_params": {"max_iterations": 5}}, "can't make cosine"),
    ({"lr_scheduler": "constant", "lr_scheduler_params": {"max_iterations": 5}}, "max_iterations: 5"),
    ({"lr_scheduler": "linear", "lr_scheduler_params": {"eta_min": 0}}, "can't make linear"),
    ({"lr_scheduler": "constant_with_warmup", "lr_scheduler_params": {"max_iterations": 5}}, "can't make constant_with_warmup"),
    ({"lr_scheduler": "constant_with_warmup", "lr_scheduler_params": {"warmup": 5}}, "can't make constant_with_warmup"),
    ({"lr_scheduler": "cosine_with_restarts"}, "never restarts"),
    ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_params": {"T_0": 5}}, "never restarts"),
]


@pytest.mark.parametrize(("train", "says"), SCHEDULERS)
def test_schedulers_that_crash_or_do_not_do_what_they_say(work, train, says):
    message = check(work, training(work, **train)).refused()
    assert message.startswith("process[0].train.lr_scheduler: ") and says in message


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"lr_scheduler": "constant"},
        {"lr_scheduler": "cosine"},
        {"lr_scheduler": "cosine", "lr_scheduler_params": {"eta_min": 1e-6}},
        {"lr_scheduler": "linear", "lr_scheduler_params": {"start_factor": 1.0, "end_factor": 0.0}},
        {"lr_scheduler": "constant_with_warmup", "lr_scheduler_params": {"num_warmup_steps": 100}},
    ],
)
def test_schedulers_that_work(work, train):
    assert advice(work, training(work, **train)) == ""


@pytest.mark.parametrize(
    ("name", "params"),
    [("cosine", {"total_iters": 500}), ("cosine", {"T_max": 500}), ("linear", {"total_iters": 500, "start_factor": 1.0})],
)
def test_lengths_that_the_toolkit_overwrites(work, name, params):
    message = check(work, training(work, lr_scheduler=name, lr_scheduler_params=params)).refused()
    assert "replaces 500 by the number of steps, 3000" in message
    whole = {key: 3000 if value == 500 else value for key, value in params.items()}
    assert advice(work, training(work, lr_scheduler=name, lr_scheduler_params=whole)) == ""


def test_sections_share_the_fixes_and_the_advice_of_their_training(work):
    process = training(work, lr_scheduler="cosine_with_restarts", lr_scheduler_params={"T_0": 5}, cache_text_embeddings=False)
    second = merging() | {"steps": [{"name": "b", "loras": [{"lora": "trained", "ratio": 0.5}]}]}
    text = work.zit("check", work.config(process, merging(train_fixes=["cosine_with_restarts"]), second)).ok()
    assert text.count("advice: ") == 1


@pytest.mark.parametrize(
    "odd",
    [
        {"datasets": [5]},
        {"datasets": 5},
        {"sample": {"samples": 5}},
        {"datasets": [{"folder_path": "x" * 400, "cache_latents": 1}]},
    ],
)
def test_advice_on_odd_values_stops_nothing(work, odd):
    process = training(work) | odd
    assert check(work, process).ok().rstrip().endswith("no errors")


@pytest.mark.parametrize("params", [{"total_iters": 500}, {"T_0": 500, "T_mult": 2}, {"total_iters": 500, "max_iterations": 9}])
def test_restarts_with_the_fix(work, params):
    process = training(work, lr_scheduler="cosine_with_restarts", lr_scheduler_params=params)
    assert advice(work, process, train_fixes=["cosine_with_restarts"]) == ""


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"lr_scheduler": "cosine_with_restarts"}, "give the steps until the first restart"),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_params": {"T_0": 5, "total_iters": 6}}, "once: total_iters: 500"),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_params": {"T_0": 2.5}}, "whole number of steps"),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_params": {"T_0": 5, "num_cycles": 2}}, "num_cycles"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler is cosine: set it to cosine_with_restarts"),
    ],
)
def test_a_fix_with_nothing_to_fix(work, train, says):
    assert says in check(work, training(work, **train), train_fixes=["cosine_with_restarts"]).refused()


@pytest.mark.parametrize(("fixing", "place"), [((0,), 1), ((1,), 2), ((0, 1), 1)])
def test_a_fix_is_named_with_the_section_that_asks_for_it(work, fixing, place):
    process = training(work, lr_scheduler="cosine")
    sections = [merging(), merging(steps=[{"name": "b", "loras": [{"lora": "trained", "ratio": 0.5}]}])]
    for i in fixing:
        sections[i]["train_fixes"] = ["cosine_with_restarts"]
    message = work.zit("check", work.config(process, *sections)).refused()
    assert message.startswith(f"process[{place}].train_fixes: process[0].train.lr_scheduler is cosine")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (None, "process[0].type: is missing: AI-Toolkit starts no job with a process without one"),
        (["diffusion_trainer"], "process[0].type: is missing"),
        ("diffusion_trainr", "process[0].type: AI-Toolkit has no process diffusion_trainr (did you mean diffusion_trainer?)"),
        ("Diffusion_Trainer", "process[0].type: AI-Toolkit has no process Diffusion_Trainer (did you mean diffusion_trainer?)"),
    ],
)
def test_a_process_of_no_type_or_of_a_wrong_one(work, kind, says):
    assert says in check(work, training(work) | {"type": kind}).refused()


def test_our_own_type_misspelled_or_missing(work):
    for kind, says in (
        ("zit_merg", "config.process: there is no process of type zit_merge: correct zit_merg"),
        ("x", "zit_merge: append one"),
    ):
        config = work.config(training(work), merging() | {"type": kind})
        assert says in work.zit("run", config).refused()
    assert (
        "process[1].type: is missing: write type: zit_merge" in work.zit("check", work.config(training(work), {**LORA})).refused()
    )
    two = work.config(training(work), merging(), "zit_merge")
    assert "process[2]: must be a mapping with a type, not 'zit_merge'" in work.zit("check", two).refused()


def test_an_extension_of_the_users_own_is_no_error(work, toolkit):
    own = training(work, optimizer="adamw") | {"type": "my_trainer"}
    assert check(work, own).ok()
    types = "def get_all_extensions_process_dict():\n    return {'my_trainer': 0, 'zit_merge': 0}\n"
    toolkit(extension=types, optimizer="def get_optimizer(params, name, lr, given):\n    pass\n")
    assert check(work, own).ok()
    assert "AI-Toolkit has no process their_trainer" in check(work, own | {"type": "their_trainer"}).refused()


TOOLKIT = {
    "__init__": "",
    "scheduler": """
print("a greeting")
def get_lr_scheduler(name, optimizer, **parameters):
    print("Trying to use it")
    if parameters.keys() - {"total_iters"}:
        raise TypeError("it takes no parameters")
""",
    "optimizer": """
def get_optimizer(params, name, lr, given):
    print("Using it")
    if name != "automagic9":
        raise ImportError(f"No module named {name!r}")
""",
    "util/get_model": """
from types import SimpleNamespace
def get_all_models():
    print("Failed to import an extension")
    return [SimpleNamespace(arch="zimage"), SimpleNamespace(arch="zimage_next")]
""",
}


@pytest.fixture
def toolkit(work, monkeypatch):
    """Puts a small toolkit into the working directory: toolkit(module=source, ...) replaces its modules."""

    def put(**changed):
        for name, source in (TOOLKIT | changed).items():
            work.write(source, f"toolkit/{name}.py")
        work.write("", "oyaml.py")  # its packages are here too

    (work.folder / "toolkit" / "util").mkdir(parents=True)
    monkeypatch.syspath_prepend(work.folder)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "toolkit"}
    yield put
    for name in [name for name in sys.modules if name.partition(".")[0] == "toolkit"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_a_toolkit_at_hand_is_asked(work, toolkit):
    toolkit()
    ours = {"optimizer": "automagic9", "model": {"arch": "zimage_next:turbo"}, "lr_scheduler": "anything"}
    text = check(work, training(work, **ours)).ok()
    assert not any(word in text for word in ("a greeting", "Trying to use it", "Using it", "Failed to import"))
    says = {
        "needs a package that is not installed (No module named 'lion')": ours | {"optimizer": "lion"},
        "can't make constant with the parameters power: 2": ours
        | {"lr_scheduler": "constant", "lr_scheduler_params": {"power": 2}},
        "zimage_l2p is not Z-Image": ours | {"model": {"arch": "zimage_l2p"}},
    }
    for message, changes in says.items():
        assert message in check(work, training(work, **changes)).refused()


@pytest.mark.parametrize("where", ["__init__", "all", "get_all_models"])
@pytest.mark.parametrize("error", ["RuntimeError('no CUDA')", "ModuleNotFoundError('torchvision')", "NameError('x')"])
def test_a_toolkit_that_breaks_is_done_without(work, toolkit, where, error):
    crash = f"print('half way')\nraise {error}\n"
    if where == "get_all_models":
        toolkit(**{"util/get_model": f"def get_all_models():\n    raise {error}\n", "scheduler": crash, "optimizer": crash})
    else:
        toolkit(**dict.fromkeys(TOOLKIT if where == "all" else [where], crash))
    arch = {"arch": "zimage_l2p"}
    assert advice(work, training(work, optimizer="lion", model=arch)) == ""
    assert "can't make step" in check(work, training(work, lr_scheduler="step", model=arch)).refused()
    assert "knows no sgd" in check(work, training(work, optimizer="sgd")).refused()


def test_a_toolkit_is_left_alone_where_there_is_no_training(work, toolkit, loras):
    toolkit(**dict.fromkeys(TOOLKIT, "raise SystemExit('imported')"))
    alone = work.section({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1}]})
    work.zit("check", work.config(alone)).ok()
    work.zit("run", work.config(alone)).ok()


def test_a_fix_without_a_training_and_one_that_is_none(work, loras):
    alone = work.section({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1}]}, train_fixes=["cosine_with_restarts"])
    assert "train_fixes: there is no training before this section" in work.zit("check", work.config(alone)).refused()
    assert "no such fix: 'cosine'" in check(work, training(work), train_fixes=["cosine"]).refused()


@pytest.mark.parametrize("name", ["adamw8bits", "sgd", "AdEMAMix8"])
def test_an_unknown_optimizer(work, name):
    message = check(work, training(work, optimizer=name)).refused()
    assert message.startswith(f"process[0].train.optimizer: AI-Toolkit knows no {name.lower()}")


@pytest.mark.parametrize("name", ["adamw", "AdamW8bit", "prodigy", "automagic3", "lion", "adafactor"])
def test_known_optimizers(work, name):
    assert advice(work, training(work, optimizer=name, lr=1.0)) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"arch": "flux"}}, "model.arch: flux is not Z-Image"),
        ({"model": {"arch": "zimages"}}, "is not Z-Image"),
        ({"merge_network_on_save": True}, "merge_network_on_save: saves whole models"),
        ({"network": {"type": "dora", "linear": 4}}, "DoRA"),
    ],
)
def test_trainings_that_leave_no_lora_to_merge(work, changes, says):
    assert says in check(work, training(work, **changes)).refused()


@pytest.mark.parametrize("arch", ["zimage", "zimage:turbo", "zimage:deturbo"])
def test_the_archs_of_zimage(work, arch):
    assert advice(work, training(work, model={"arch": arch})) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cache_text_embeddings": False}, "cache_text_embeddings: true"),
        ({"datasets": [{"folder_path": "images", "resolution": [1024]}]}, "cache_latents_to_disk: true"),
        ({"datasets": [{"cache_latents": True, "resolution": [512, 1024]}]}, "several resolutions"),
        ({"do_differential_guidance": False}, "differential_guidance_scale: 3"),
        ({"differential_guidance_scale": 2}, "differential_guidance_scale: 3"),
        ({"sample": {"samples": [{"prompt": "a"}, {"prompt": "b"}]}}, "2 sample prompts"),
        ({"network": {"type": "lora", "linear": 4, "linear_alpha": 2}}, "linear_alpha 2 is ignored"),
        ({"lr_scheduler": "linear"}, "rises from a third"),
        ({"steps": 500, "lr_scheduler": "constant_with_warmup"}, "the warm-up takes 1000 of 500 steps"),
        ({"optimizer": "prodigy", "lr": 1e-4}, "write lr: 1.0"),
    ],
)
def test_advice_is_printed_and_stops_nothing(work, changes, says):
    text = advice(work, training(work, **changes))
    assert says in text and text.startswith("process[0]: ")


def test_few_steps_for_a_large_dataset(work):
    images = work.folder / "images"
    images.mkdir()
    for i in range(7):
        (images / f"{i}.jpg").touch()
    data = [{"folder_path": str(images), "cache_latents_to_disk": True, "num_repeats": 2}]
    assert "10 steps see 10 images, the datasets hold 14" in advice(work, training(work, datasets=data, steps=10))
    assert advice(work, training(work, datasets=data, steps=7, batch_size=2)) == ""
    assert advice(work, training(work, datasets=data, steps=14)) == ""


def test_files_that_the_next_start_would_resume_from(work):
    folder = work.folder / "output" / "cat"
    folder.mkdir(parents=True)
    for name in ("cat.safetensors", "cat_000000250.safetensors", "cat_LoRA_x.pt", "merged_cat_a.png"):
        work.lora(f"output/cat/{name}")
    for name in ("cat_merged.safetensors", "cat_old.safetensors"):
        work.lora(f"output/cat/{name}")
    text = advice(work, training(work))
    assert "cat_old.safetensors would be taken for a checkpoint and resumed from" in text
    assert (
        "cat_merged.safetensors is named as what AI-Toolkit's MERGE button writes, which applies each strength twice; it would "
        "be taken for a checkpoint and resumed from: move it away"
    ) in text
    assert text.count("be taken") == 2


@pytest.fixture
def saves(work):
    """The folder of a training that was interrupted, with its checkpoints of the steps 250 and 500."""
    for i, name in enumerate(("cat_000000250.safetensors", "cat_000000500.safetensors")):
        _age(work.lora(f"output/cat/{name}"), i)
    return work.folder / "output" / "cat"


def _age(path, order):
    """Makes a file the newest; the time that counts is that of its last change of any kind, which can't be set."""
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before and order:
        path.touch()


@pytest.mark.parametrize("how", ["truncated", "empty", "a folder"])
def test_a_checkpoint_that_the_training_would_resume_from_and_fail(work, saves, how):
    path = saves / "cat_000000500.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.mkdir() if how == "a folder" else path.write_bytes(content[: len(content) // 2] if how == "truncated" else b"")
    message = check(work, training(work)).refused()
    assert message.startswith(f"process[0]: {path}: ")
    assert ("it is a folder" if how == "a folder" else "is not a whole .safetensors file") in message
    assert message.endswith(", and the training would resume from it and fail: move it away")
    path.rename(work.folder / "away")
    assert "no errors" in check(work, training(work)).ok()


def test_an_older_checkpoint_and_files_that_no_job_resumes_from_may_be_broken(work, saves):
    assert "no errors" in check(work, training(work)).ok()
    for name in ("cat_000000250.safetensors", "cat_LoRA_1.safetensors", "other.safetensors", "merged_cat.safetensors"):
        (saves / name).write_bytes(b"broken")
    _age(saves / "cat_000000500.safetensors", 1)
    assert "no errors" in check(work, training(work)).ok()
    assert "no errors" in check(work, training(work) | {"name": "elsewhere"}).ok()


def test_a_broken_lora_that_the_training_would_start_from(work):
    path = work.lora("start.safetensors")
    network = {"type": "lora", "linear": 2, "linear_alpha": 2, "pretrained_lora_path": str(path)}
    assert "no errors" in check(work, training(work, network=network)).ok()
    path.write_bytes(path.read_bytes()[:-1])
    message = check(work, training(work, network=network)).refused()
    assert message.startswith(f"process[0].network.pretrained_lora_path: {path}: is not a whole .safetensors file")
    assert message.endswith(", and the training would start from it and fail: copy it again")
    work.lora("output/cat/cat_000000250.safetensors")
    assert "no errors" in check(work, training(work, network=network)).ok()  # it resumes
