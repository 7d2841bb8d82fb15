"""The studio in real jobs, on the tiny Z-Image: it stays open behind the merges, measures, renders, keeps, and can be stopped."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import yaml
from host.job import job, training
from host.shim import SHIM
from host.test_job import write
from host.ui import Launched, make_database, row
from PIL import Image

from extensions_built_in.zit_merge.cli.main import main
from extensions_built_in.zit_merge.formats.reader import load_lora

pytestmark = pytest.mark.toolkit

STEP = {"name": "both", "loras": [{"lora": "trained", "ratio": 1.0}, {"lora": "style.safetensors", "ratio": 0.6}]}
SECTION = {"type": "zit_merge", "shapes": "free", "steps": [STEP], "studio": {"minutes": 10}}
SETTING = {"step": "both", "loras": [{"ratio": 0.7}, None], "method": "ties", "params": {"density": 0.5}, "rank": 4}
PORT = 8866


class Page:
    """The merge page as far as its studio can tell."""

    def __init__(self, html, port=PORT):
        self.facts = json.loads(re.search(r'id="facts">(.*?)</script>', html, re.DOTALL)[1])["studio"]
        self.port = port

    def ask(self, verb, **body):
        headers = {"Content-Type": "application/json", "X-Zit-Merge": self.facts["token"], "Origin": "null"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/{verb}", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            return json.load(e)

    def until(self, is_so):
        while not is_so(found := self.ask("state", seen=0)):
            time.sleep(0.1)
        return found

    def done(self, what):
        return self.until(lambda s: s[what] and s[what][-1]["status"] not in ("waiting", "running"))[what][-1]


@pytest.fixture(scope="module")
def used(toolkit, place, tmp_path_factory):
    """(folder, run, what was found) of a job whose studio was used and then stopped."""
    database, found = make_database(tmp_path_factory.mktemp("ui") / "aitk_db.db"), {}
    config = write(place, "st", job("st", training(place, "st", sqlite_db_path=str(database)), SECTION))
    folder = place / "output" / "st"

    def use(run):
        page = Page((folder / "plugin.html").read_text("utf-8"))
        found["open"] = row(database)
        found["facts"] = page.facts
        page.ask("measure", setting=SETTING)
        found["measure"] = page.until(lambda s: s["measure"]["status"] in ("done", "failed"))["measure"]
        page.ask("look", setting=SETTING)
        found["look"] = page.done("looks")
        found["picture"] = page.ask("picture", look=1, row=0, column=3, edge=512)
        page.ask("look", setting={**SETTING, "rank": 2})
        page.until(lambda s: s["looks"][-1]["status"] == "running")
        page.ask("cancel")
        found["cancelled"] = page.done("looks")
        page.ask("look", setting={**SETTING, "rank": 2})
        found["again"] = page.done("looks")
        page.ask("keep", setting=SETTING, name="mine")
        found["kept"] = page.done("kept")
        page.until(lambda s: s["task"] is None)
        while row(database)["info"] != found["open"]["info"]:
            time.sleep(0.1)
        found["still"] = row(database)
        run.set(stop=1)

    run = Launched(toolkit, config, database, when=("Studio open", use))
    return folder, config, run, found


def test_the_row_says_that_it_is_open_and_runs(used):
    _, _, run, found = used
    assert (found["open"]["status"], found["open"]["info"]) == ("running", "Studio open: see the Plugin tab"), run.log[-3000:]
    assert found["still"]["status"] == "running", "the queue must not start another job on this GPU"


def test_it_measures_renders_and_keeps(used):
    folder, _, run, found = used
    assert found["measure"]["status"] == "done" and found["measure"]["found"]["rank"] == "4", found
    assert (found["facts"]["no_pictures"], found["facts"]["prompts"]) == (None, ["a cat (seed 42)"])
    assert found["look"]["status"] == "done" and found["look"]["ready"] == [[True] * 4], found["look"]
    assert found["picture"]["image"].startswith("data:image/jpeg;base64,")
    assert found["cancelled"]["status"] in ("cancelled", "done") and found["again"]["status"] == "done"
    assert (found["kept"]["status"], found["kept"]["file"]) == ("done", "merged_st_mine.safetensors"), found["kept"]
    verdict = load_lora(folder / found["kept"]["file"]).verdict
    assert found["measure"]["found"]["got"] == pytest.approx(verdict.got, abs=1e-4), "four digits are written"
    assert run.log.count("Loading checkpoint shards") <= 2, "the model is loaded once"


def test_a_stop_ends_it_and_its_token(used):
    folder, _, run, _ = used
    assert (row(run.database)["status"], run.code) == ("stopped", 0), run.log[-3000:]
    page = (folder / "plugin.html").read_text("utf-8")
    assert '"studio":null' in page and "merged_st_mine.safetensors" in page
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", PORT), timeout=5)


def test_the_section_that_was_kept_makes_the_same_file(used, place, capsys):
    folder, _, _, found = used
    path, (kept,) = folder / found["kept"]["file"], yaml.safe_load((folder / "merged_st_studio.yaml").read_text("utf-8"))
    content = path.read_bytes()
    path.unlink()
    config = write(place, "st_again", job("st", training(place, "st"), kept))
    assert main(["run", str(config)]) == 0, capsys.readouterr().err
    assert path.read_bytes() == content


def test_a_cancelled_picture_leaves_the_next_one_as_it_would_be(used, toolkit, place, tmp_path_factory):
    """The pictures of the second look, rendered after a cancelled one, are those of a fresh model."""
    folder, _, _, _ = used
    before = _pictures(folder)
    for path in (folder / "merged_st_previews" / "pictures").iterdir():
        path.unlink()
    database = make_database(tmp_path_factory.mktemp("ui") / "aitk_db.db")
    again = {}

    def use(run):
        page = Page((folder / "plugin.html").read_text("utf-8"))
        page.ask("look", setting={**SETTING, "rank": 2})
        again["look"] = page.done("looks")
        page.ask("close")

    merge = job("st", {**SECTION, "training_folder": str(place / "output"), "sqlite_db_path": str(database), **_alone(place)})
    run = Launched(toolkit, write(place, "st_fresh", merge), database, when=("Studio open", use))
    assert run.code == 0 and again["look"]["status"] == "done", run.log[-3000:]
    assert row(database)["status"] == "completed"
    assert len(before) == 4 and _pictures(folder) == before


def _pictures(folder):
    """The pixels of the last look of a strip."""
    (row,) = json.loads((folder / "merged_st_previews" / "studio.json").read_text())["looks"][-1]["digests"]
    return [Image.open(folder / "merged_st_previews" / "pictures" / f"{digest}.png").convert("RGB").tobytes() for digest in row]


def _alone(place):
    """A section for a finished training, with what pictures need."""
    process = training(place, "st")
    loras = [
        {"lora": str(place / "output" / "st" / "st.safetensors"), "ratio": 1.0},
        {"lora": str(place / "style.safetensors"), "ratio": 0.6},
    ]
    return {"model": process["model"] | {"dtype": "bf16"}, "sample": process["sample"], "steps": [STEP | {"loras": loras}]}


def test_where_the_port_is_taken_the_merges_are_done(toolkit, place, tmp_path_factory):
    database = make_database(tmp_path_factory.mktemp("ui") / "aitk_db.db")
    merge = job("sp", {**SECTION, "training_folder": str(place / "output"), "sqlite_db_path": str(database), **_alone(place)})
    with socket.create_server(("127.0.0.1", PORT)):
        run = Launched(toolkit, write(place, "sp", merge), database)
    found = row(database)
    assert (run.code, found["status"]) == (0, "completed")
    assert found["info"].startswith("1 merged, no studio: port 8866 of the studio is taken by another program: stop that one")
    assert (place / "output" / "sp" / "merged_sp_both.safetensors").is_file()


def test_the_command_line_renders_in_the_toolkits_folder(toolkit, place, tmp_path):
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(toolkit), str(SHIM)]),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    words = ["studio", str(place / "style.safetensors"), "-o", str(tmp_path / "out"), "--model", str(place / "model"), "--prompt"]
    words += ["a cat", "--size", "64", "--steps", "2", "--port", "0"]
    command = [sys.executable, "-m", "extensions_built_in.zit_merge", *words]
    with subprocess.Popen(command, cwd=toolkit, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = next(line for line in process.stdout if "/open/" in line).strip()
            with urllib.request.urlopen(address, timeout=60) as answer:
                page = Page(answer.read().decode(), int(re.search(r":(\d+)/open/", address)[1]))
            page.ask("look", setting={**SETTING, "step": "merged", "loras": [None], "method": "sum", "params": {}})
            assert page.done("looks")["ready"] == [[True] * 3]
            page.ask("close")
            assert process.wait(60) == 0
        finally:
            process.kill()
