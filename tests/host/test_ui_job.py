"""The example for the web UI, put through the UI's own function that every edit, clone and import goes through."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from extensions_built_in.zit_merge.config.parse import parse_section

EXAMPLE = Path(__file__).parents[2] / "config" / "examples" / "ui_merge_job.yaml"


def test_it_has_what_the_uis_pages_read():
    """page.tsx reads datasets, jobConfig.ts asks what is in model, SampleImages.tsx counts sample.samples."""
    process = yaml.safe_load(EXAMPLE.read_text())["config"]["process"][0]
    assert isinstance(process["model"], dict) and process["datasets"] == []
    assert len(process["sample"]["samples"]) >= 3, "the gallery has three columns at least"
    assert process["train"]["steps"] == 1, "jobs.ts: a completed job starts again if steps > step, and we leave step at 0"
    assert {"sqlite_db_path", "training_folder", "device", "performance_log_every"} <= set(process)


@pytest.mark.toolkit
@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed here")
@pytest.mark.parametrize("mac", [False, True])
def test_the_uis_own_migration_leaves_a_section_that_we_accept(toolkit, mac):
    source = (toolkit / "ui" / "src" / "app" / "jobs" / "new" / "jobConfig.ts").read_text()
    function = source[source.index("export const migrateJobConfig") :].replace("export ", "")
    plain = re.sub(r": JobConfig| as boolean", "", function).replace("=> {", "=> {", 1)
    config = yaml.safe_load(EXAMPLE.read_text())
    script = f"const isMac = () => {json.dumps(mac)};\n{plain}\n"
    script += f"console.log(JSON.stringify(migrateJobConfig({json.dumps(config)})));"
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    migrated = json.loads(done.stdout)["config"]["process"][0]
    section = parse_section(migrated, first=True)
    assert section.device == ("mps" if mac else "auto")
    assert [s.model_dump() for s in section.steps] == [
        s.model_dump() for s in parse_section(config["config"]["process"][0], first=True).steps
    ]
