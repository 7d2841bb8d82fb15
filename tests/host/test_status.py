"""What the UI's job row says from start to end, on the real toolkit and a real database; and who gets the memory back."""

import re
import sqlite3
import threading
import time
from dataclasses import replace

import pytest
import torch
from host.job import job, training
from host.test_job import write
from host.ui import Launched, make_database, row
from oracles import producers

pytestmark = pytest.mark.toolkit

STEPS = 3  # of the training


@pytest.fixture(scope="session")
def broken(place, style):
    """A LoRA with a NaN beside the good one."""
    tensors = {k: t.clone() for k, t in style.tensors.items()}
    tensors["lora_unet_layers_20_attention_to_q.lora_down.weight"][0, 0] = float("nan")
    producers.save(replace(style, tensors=tensors), place / "broken.safetensors")
    return "broken.safetensors"


@pytest.fixture
def database(tmp_path):
    return make_database(tmp_path / "aitk_db.db")


def merging(folder, *names, lora="style.safetensors", **keys):
    loras = [{"lora": str(folder / lora) if lora.endswith("rs") else lora, "ratio": 0.5}]
    return {"type": "zit_merge", "shapes": "free", "steps": [{"name": n, "loras": loras} for n in names]} | keys


def trains(folder, name, database, **changes):
    return training(folder, name, sqlite_db_path=str(database), **changes)


def alone(folder, database, *names, **keys):
    """A merge-only job's section as the UI writes it."""
    host = {"sqlite_db_path": str(database), "training_folder": str(folder / "output"), "device": "cuda"}
    return merging(folder, *names, **keys) | host


def parts(folder):
    return list(folder.rglob("*.part"))


def test_the_row_says_running_until_the_last_merge_is_done(toolkit, place, database):
    sections = [merging(place, "soft", lora="trained"), merging(place, "more", "last")]
    config = write(place, "sa", job("sa", trains(place, "sa", database), *sections))
    ran = Launched(toolkit, config, database)
    assert ran.code == 0, ran.log[-3000:]
    assert ran.statuses == ["running", "completed"], ran.seen
    infos = ran.infos
    assert infos[-1] == "Training completed, 3 merged"
    after = next(i for i, info in enumerate(infos) if "erging LoRAs" in info)
    assert "Training completed" not in infos[:after]
    assert any(i.startswith("Merging soft: ") and i.endswith("/240") for i in infos[after:])
    assert any(i.startswith("Merging last: ") for i in infos[after:])
    assert row(database)["step"] == STEPS, "the training's own count stays"
    names = {p.name for p in (place / "output" / "sa").glob("merged_*")}
    assert names == {f"merged_sa_{n}.safetensors" for n in ("soft", "more", "last")}


def test_an_exception_in_the_merge_is_shown_with_its_sentence(toolkit, place, broken, database):
    config = write(place, "sb", job("sb", trains(place, "sb", database), merging(place, "bad", lora=broken)))
    ran = Launched(toolkit, config, database)
    assert ran.code != 0
    assert ran.statuses == ["running", "error"], ran.seen
    assert ran.infos[-1].startswith("bad: broken.safetensors: ") and "NaN" in ran.infos[-1], "the UI's columns cut the end"
    assert ran.infos[-1].endswith("/broken.safetensors)")
    assert row(database)["step"] == STEPS
    assert not parts(place / "output" / "sb")


def test_sigint_stops_after_training_without_a_trace(toolkit, place, database):
    section = merging(place, *(f"s{i}" for i in range(60)), lora="trained")
    config = write(place, "sc", job("sc", trains(place, "sc", database), section))
    ran = Launched(toolkit, config, database, when=("Merging s", Launched.interrupt))
    assert ran.code == 0, (ran.seen[-3:], ran.log[-3000:])
    assert ran.seen[-1] == ("stopped", "Job stopped"), ran.seen[-3:]
    assert "completed" not in ran.statuses
    written = list((place / "output" / "sc").glob("merged_*"))
    assert len(written) < 60 and not parts(place / "output" / "sc")


def test_a_queue_that_stops_gets_the_job_back(toolkit, place, database):
    section = merging(place, *(f"s{i}" for i in range(60)), lora="trained")
    config = write(place, "sd", job("sd", trains(place, "sd", database), section))
    ran = Launched(toolkit, config, database, when=("Merging s", lambda r: r.set(return_to_queue=1)))
    assert ran.seen[-1][0] == "queued" and ran.code == 0, ran.seen[-3:]
    assert not parts(place / "output")


def test_a_merge_only_job_fills_the_row(toolkit, place, style, database):
    config = write(place, "se", job("se", alone(place, database, "a", "b")))
    ran = Launched(toolkit, config, database)
    assert ran.code == 0, ran.log[-3000:]
    assert ran.statuses == ["running", "completed"]
    last = row(database)
    counted = 2 * len(style.deltas)
    assert (0, 0) in ran.counts and (counted, counted) in ran.counts
    assert (last["step"], last["total_steps"]) == (0, 0), "no bar is drawn, and the Start button is there again"
    assert last["speed_string"].endswith(" modules/s") and last["info"] == "2 merged"
    again = Launched(toolkit, config, database)
    assert again.code == 0 and again.infos[-1] == "2 up to date"
    assert set(again.counts) == {(0, 0)}, "nothing was merged"


def test_a_result_that_is_off_is_named_in_the_rows_last_words(place, style, run_python, database):
    """A rank that holds the strong LoRA only, in a job as its section alone makes it."""
    shapes = {module: tuple(delta.shape) for module, delta in style.deltas.items()}
    producers.save(producers.PRODUCERS["musubi"].make(shapes, 3, 7, torch.bfloat16), place / "weak.safetensors")
    section = alone(place, database, "right", "soft")
    section["steps"][1] |= {"rank": 3}
    section["steps"][1]["loras"] = [*section["steps"][1]["loras"], {"lora": str(place / "weak.safetensors"), "ratio": 0.01}]
    done = run_python("run.py", write(place, "su", job("su", section)), AITK_JOB_ID="j1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "soft is off: weak is mostly cut away, a larger rank keeps it" in done.stdout
    told = row(database)
    assert (told["status"], told["info"]) == ("completed", "2 merged, soft is off: see the Plugin tab")


@pytest.mark.parametrize(
    "act, status, code",
    [
        (Launched.interrupt, "stopped", 0),
        (lambda r: r.set(stop=1), "stopped", 0),
        (lambda r: r.set(return_to_queue=1), "queued", 0),
    ],
)
def test_a_merge_only_job_can_be_stopped(toolkit, place, database, act, status, code):
    config = write(place, "sf", job("sf", alone(place, database, *(f"s{i}" for i in range(60)))))
    ran = Launched(toolkit, config, database, when=("Merging s", act))
    assert ran.seen[-1][0] == status and ran.code == code, (ran.seen[-3:], ran.log[-2000:])
    assert not parts(place / "output")


def test_a_wrong_config_shows_as_error(toolkit, place, database, tmp_path):
    for name, processes in {
        "sg": (trains(place, "sg", database), merging(place, "x", lora="nowhere.safetensors")),
        "sh": (alone(place, database, "x", lora="nowhere.safetensors"),),
    }.items():
        db = make_database(tmp_path / f"{name}.db")
        for process in processes:
            if "sqlite_db_path" in process:
                process["sqlite_db_path"] = str(db)
        ran = Launched(toolkit, write(place, name, job(name, *processes)), db)
        assert ran.code != 0
        assert ran.seen[-1][0] == "error" and ran.infos[-1].startswith("x: nowhere.safetensors is not there"), ran.seen
        assert re.search(r" \(process\[[01]\]\.steps\[0\]\.loras\[0\]\.lora, /.*/nowhere\.safetensors\)$", ran.infos[-1]), (
            "the place comes last"
        )


def test_a_locked_database_is_waited_for(toolkit, place, database):
    held = threading.Event()

    def hold(ran):
        db = sqlite3.connect(database, isolation_level=None)
        db.execute("BEGIN IMMEDIATE")
        held.set()
        time.sleep(3)
        db.execute("COMMIT")
        db.close()

    config = write(place, "si", job("si", alone(place, database, *(f"s{i}" for i in range(20)))))
    ran = Launched(toolkit, config, database, when=("Merging s", hold))
    assert held.is_set()
    assert ran.code == 0 and ran.statuses[-1] == "completed", ran.log[-2000:]


def spoil_table(path):
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE Job RENAME TO Jobs")
    db.close()


def spoil_id(path):
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM Job")
    db.close()


def spoil_writing(path):
    """A write version that sqlite does not know makes a database read-only for everybody, root too (sqlite.org/fileformat)."""
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA journal_mode=DELETE")
    db.close()
    data = bytearray(path.read_bytes())
    data[18] = 9
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil, says",
    [(spoil_table, "no such table: Job"), (spoil_id, "has no job j1"), (spoil_writing, "readonly database")],
)
def test_a_database_that_can_not_be_used_costs_no_merge(toolkit, place, database, run_python, spoil, says):
    spoil(database)
    config = write(place, "sj", job("sj", alone(place, database, "a")))
    done = run_python("run.py", config, AITK_JOB_ID="j1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if "the UI's database" in line]
    assert len(lines) == 1 and says in lines[0] and "the merge goes on" in lines[0]


def test_a_missing_database_is_no_error(toolkit, place, tmp_path, run_python):
    config = write(place, "sk", job("sk", alone(place, tmp_path / "none.db", "a")))
    done = run_python("run.py", config, AITK_JOB_ID="j1")
    assert done.returncode == 0 and "the UI's database" not in done.stdout
    assert not (tmp_path / "none.db").exists()


INTERRUPTED = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from extensions_built_in.zit_merge.planning import job
job.plan_section = lambda *_, **__: signal.raise_signal(signal.SIGINT)
sys.argv = ["run.py", sys.argv[1]]
runpy.run_path("run.py", run_name="__main__")
"""


@pytest.mark.parametrize("after", ["nothing", "a training"])
def test_a_stop_while_the_config_is_checked_shows_as_stopped(place, database, run_python, after):
    """Before anything runs: the toolkit has no job yet whose on_error it could call."""
    if after == "nothing":
        processes = (alone(place, database, "a"),)
    else:
        processes = (trains(place, "sn", database), merging(place, "a", lora="trained"))
    done = run_python("-c", INTERRUPTED, write(place, "sn", job("sn", *processes)), AITK_JOB_ID="j1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (row(database)["status"], row(database)["info"]) == ("stopped", "Job stopped")
    assert "Running  " not in done.stdout


def test_a_training_after_our_section_has_the_last_word(toolkit, place, database):
    config = write(place, "sm", job("sm", alone(place, database, "a"), trains(place, "sm", database)))
    ran = Launched(toolkit, config, database)
    assert ran.code == 0, ran.log[-3000:]
    assert ran.statuses == ["running", "completed"], ran.seen
    infos = ran.infos
    assert infos.index("Merging LoRAs") < infos.index("Loading model") < infos.index("Training")
    assert infos[-1] == "Training completed"
    assert (row(database)["step"], row(database)["total_steps"]) == (STEPS, STEPS)
    assert {"sm.safetensors", "merged_sm_a.safetensors"} <= {p.name for p in (place / "output" / "sm").iterdir()}


def test_an_error_in_a_training_after_our_section_is_shown(toolkit, place, database):
    bad = trains(place, "so", database)
    bad["datasets"] = [dict(bad["datasets"][0], folder_path=str(place / "nowhere"))]
    ran = Launched(toolkit, write(place, "so", job("so", alone(place, database, "a"), bad)), database)
    assert ran.code != 0
    assert ran.statuses == ["running", "error"], ran.seen
    assert "Error running on_error" not in ran.log
    assert (row(database)["step"], row(database)["total_steps"]) == (0, STEPS)


@pytest.mark.parametrize(
    "act, end, code",
    [(Launched.interrupt, ("stopped", "Job stopped"), 0), (lambda r: r.set(return_to_queue=1), ("queued", "Job queued"), 1)],
)
def test_a_training_after_our_section_can_be_stopped(toolkit, place, database, act, end, code):
    long = trains(place, "sp", database)
    long["train"] = dict(long["train"], steps=400)
    ran = Launched(toolkit, write(place, "sp", job("sp", alone(place, database, "a"), long)), database, when=("Training", act))
    assert (ran.seen[-1], ran.code) == (end, code), (ran.seen[-3:], ran.log[-3000:])
    assert row(database)["step"] < row(database)["total_steps"] == 400


@pytest.mark.parametrize("act, status", [(Launched.interrupt, "stopped"), (lambda r: r.set(return_to_queue=1), "queued")])
def test_a_stop_before_the_training_stays_what_it_is(toolkit, place, database, act, status):
    section = alone(place, database, *(f"s{i}" for i in range(60)))
    ran = Launched(
        toolkit, write(place, "sq", job("sq", section, trains(place, "sq", database))), database, when=("Merging s", act)
    )
    assert ran.seen[-1][0] == status, (ran.seen[-3:], ran.log[-2000:])
    assert (row(database)["step"], row(database)["total_steps"]) == (0, STEPS)


def test_an_error_after_a_training_between_two_sections_is_shown(toolkit, place, broken, database):
    sections = alone(place, database, "a"), trains(place, "sr", database), merging(place, "bad", lora=broken)
    ran = Launched(toolkit, write(place, "sr", job("sr", *sections)), database)
    assert ran.code != 0
    assert ran.statuses == ["running", "error"], ran.seen
    assert ran.infos[-1].startswith("bad: broken.safetensors: ") and "NaN" in ran.infos[-1], "the UI's columns cut the end"
    assert ran.infos[-1].endswith("/broken.safetensors)")
    assert row(database)["step"] == STEPS


LIVE = """
import gc, sys
sys.argv = ["run.py", sys.argv[1]]
import torch
from toolkit.job import get_job

job = get_job(sys.argv[1], None)
merge = job.process[1]
run = merge._merge
def count():
    gc.collect()
    names = {"ZImageTransformer2DModel", "Qwen3ForCausalLM", "AutoencoderKL", "LoRASpecialNetwork"}
    return sorted({type(o).__name__ for o in gc.get_objects() if isinstance(o, torch.nn.Module)} & names)
def counted():
    print("LIVE before", count())
    run()
    print("LIVE after", count())
merge._merge = counted
job.run()
"""


def test_the_trainers_models_are_released(place, run_python, database):
    config = write(place, "sl", job("sl", trains(place, "sl", database), merging(place, "soft", lora="trained")))
    done = run_python("-c", LIVE, config)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    live = {line.split(maxsplit=2)[1]: line.split(maxsplit=2)[2] for line in done.stdout.splitlines() if line.startswith("LIVE")}
    assert live["before"] == str(["AutoencoderKL", "LoRASpecialNetwork", "Qwen3ForCausalLM", "ZImageTransformer2DModel"])
    assert live["after"] == "[]"
