"""Builds AI-Toolkit's web UI for the tests marked `web_ui`. Run it once, and again for a newer AI-Toolkit:

    python tests/web_ui/set_up.py AI_TOOLKIT_CLONE [--python PYTHON]

The clone is only read: its tracked files are copied to $AI_TOOLKIT_WEB_UI, by default ~/.cache/zit_merge/web_ui. PYTHON shall
run the UI's jobs: it needs AI-Toolkit's packages (a CPU build of torch is enough). By default it is that of the clone's own
environment, else the one that runs this. Needed besides: Node 20 with npm and its registry; where a prebuilt sqlite cannot be
fetched, a C++ compiler and Node's headers. Afterwards: `pytest -m web_ui tests/web_ui`.

The UI's pages, routes, worker and queue stay what they are. Replaced is what it would fetch from elsewhere:

* Prisma's database engine, a program from binaries.prisma.sh, by Prisma's own engine in JavaScript over better-sqlite3: changes
  in four files.
* the web font from fonts.googleapis.com, by a font of the computer, through a variable that Next.js has for tests.
* the editor from cdn.jsdelivr.net, by the npm package that comes with the UI: the tests answer (browser.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HOME = Path(os.environ.get("AI_TOOLKIT_WEB_UI") or Path.home() / ".cache" / "zit_merge" / "web_ui")
READY = "ready.txt"  # written last

PRISMA = "6.19.0"  # the UI's lock file has 6.3.1, which knows no engine without a download; package.json allows both
PACKAGES = (f"prisma@{PRISMA}", f"@prisma/client@{PRISMA}", f"@prisma/adapter-better-sqlite3@{PRISMA}", "better-sqlite3@^11.9")
# No engine is downloaded.
SCHEMA = ('provider = "prisma-client-js"', 'provider = "prisma-client-js"\n  engineType = "client"')
# The engine in JavaScript wants to be told its database; dates are stored as the other engine does.
CLIENT = (
    "new PrismaClient()",
    "new PrismaClient({ adapter: new PrismaBetterSQLite3("
    "{ url: path.resolve('..', 'aitk_db.db') }, { timestampFormat: 'unixepoch-ms' }) })",
)
# Next.js may not put the library, which is no JavaScript, into its bundles.
BUNDLES = ("serverExternalPackages: [", "serverExternalPackages: ['better-sqlite3', '@prisma/adapter-better-sqlite3', ")
IMPORTS = "import path from 'path';\nimport { PrismaBetterSQLite3 } from '@prisma/adapter-better-sqlite3';\n"
WORKS = (
    "const { PrismaBetterSQLite3 } = require('@prisma/adapter-better-sqlite3');"
    "new PrismaBetterSQLite3({ url: ':memory:' }).connect().then(() => require('sqlite3'))"
)
FONT = "@font-face { font-family: 'Inter'; font-style: normal; font-weight: 100 900; src: local('Arial'); }"


def run(*words: str, cwd: Path, **variables: str) -> None:
    """Runs a command; if it fails, so does the set-up."""
    print("+", *words, flush=True)
    subprocess.run(words, cwd=cwd, env=os.environ | variables, check=True)


def copy_tracked(clone: Path, target: Path) -> None:
    """Copies what git knows of; files that a sparse checkout left out are not missed."""
    listed = subprocess.run(["git", "-C", str(clone), "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (clone / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(clone / name, target / name)


def change(path: Path, old: str, new: str, before: str = "") -> None:
    """Replaces a text that has to be there."""
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        sys.exit(f"{path}: expected {old!r} once: this AI-Toolkit is newer than this script")
    path.write_text(before + text.replace(old, new), encoding="utf-8")


def native(module: Path) -> None:
    """Makes a package's library for this Node: a prebuilt one, or from its source."""
    fetched = subprocess.run(["npx", "--no-install", "prebuild-install"], cwd=module, capture_output=True, check=False)
    if fetched.returncode:
        prefix = Path(shutil.which("node") or "node").resolve().parents[1]
        headers = [f"--nodedir={prefix}"] if (prefix / "include" / "node" / "node.h").is_file() else []
        run("npx", "--no-install", "node-gyp", "rebuild", "--release", *headers, cwd=module)


def build(ui: Path) -> None:
    """Installs, patches and builds the UI as its own scripts do."""
    quiet = ("--ignore-scripts", "--no-audit", "--no-fund")
    run("npm", "ci", *quiet, cwd=ui)
    run("npm", "install", "--no-save", *quiet, *PACKAGES, cwd=ui)
    native(ui / "node_modules" / "better-sqlite3")
    native(ui / "node_modules" / "sqlite3")
    run("node", "-e", WORKS, cwd=ui)
    change(ui / "prisma" / "schema.prisma", *SCHEMA)
    change(ui / "cron" / "prisma.ts", *CLIENT, before=IMPORTS)
    change(ui / "src" / "server" / "prisma.ts", *CLIENT, before=IMPORTS)
    change(ui / "next.config.ts", *BUNDLES)
    # the command only asks whether the program is there
    run("npx", "--no-install", "prisma", "generate", cwd=ui, PRISMA_SCHEMA_ENGINE_BINARY=shutil.which("true") or sys.executable)
    fonts = ui / "fonts.js"
    fonts.write_text(f'module.exports = new Proxy({{}}, {{ get: () => "{FONT}" }});\n', encoding="utf-8")
    run("npm", "run", "build", cwd=ui, NEXT_TELEMETRY_DISABLED="1", NEXT_FONT_GOOGLE_MOCKED_RESPONSES=str(fonts))


def job_python(clone: Path, given: str | None) -> Path:
    """The Python for the jobs."""
    own = [clone / name / "bin" / "python" for name in (".venv", "venv")]
    python = Path(given) if given else next((p for p in own if p.is_file()), Path(sys.executable))
    names = ("torch", "diffusers", "oyaml", "optimum")
    asked = f"import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, {names})))"
    tried = subprocess.run([str(python), "-c", asked], check=False)
    if tried.returncode:
        sys.exit(f"{python}: lacks AI-Toolkit's packages: choose another with --python")
    return python.absolute()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a checkout of AI-Toolkit")
    parser.add_argument("--python", help="runs the UI's jobs")
    given = parser.parse_args()
    if not (given.clone / "ui" / "package.json").is_file():
        sys.exit(f"{given.clone}: is no AI-Toolkit with a ui folder")
    python = job_python(given.clone, given.python)
    if HOME.exists() and any(HOME.iterdir()):
        if not (HOME / "ui").is_dir():
            sys.exit(f"{HOME}: is not empty and was not made by this script")
        shutil.rmtree(HOME)
    HOME.mkdir(parents=True, exist_ok=True)
    copy_tracked(given.clone, HOME)
    build(HOME / "ui")
    (HOME / READY).write_text(f"{python}\n", encoding="utf-8")
    print(f"{HOME} is ready: pytest -m web_ui tests/web_ui")


if __name__ == "__main__":
    main()
