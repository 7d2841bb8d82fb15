"""SIGKILL at any moment: the output is the old file or the new one, inputs are as they were, the next run leaves no litter."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

from world import OUTPUTS, Campaign, Process, config, contents, lora, strangers, zit_merge


class Kills(Campaign):
    """Two configs of one job are run in turn and killed; each output must be the whole file of one of the two."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.inputs = {lora(folder / f"{name}.safetensors", seed): b"" for seed, name in enumerate("ab")}
        self.inputs = {path: path.read_bytes() for path in self.inputs}
        self.configs = [config(folder / f"{ratio}.yaml", ratio, copy_to="copies") for ratio in (0.9, 0.7)]
        (folder / "copies").mkdir()
        self.whole: dict[str, set[bytes]] = {name: set() for name in OUTPUTS}
        for path in self.configs:
            started = time.monotonic()
            assert not (ended := self._run(path)).code, ended.err
            self.lasts = time.monotonic() - started
            for name, content in self._found().items():
                self.whole[name.removeprefix("copies/")].add(content)

    def _run(self, path: Path):
        return zit_merge(self.folder, "run", str(path), "--quiet")

    def _found(self) -> dict[str, bytes]:
        copies = {f"copies/{name}": content for name, content in contents(self.folder / "copies").items()}
        out = {name: content for name, content in contents(self.folder / "out").items() if name.endswith(".safetensors")}
        return out | {name: content for name, content in copies.items() if name.endswith(".safetensors")}

    def case(self, random: Random) -> tuple[str, str]:
        """One run, killed somewhere between its first line and a little after its last."""
        process = Process(("run", str(random.choice(self.configs)), "--quiet"), self.folder)
        time.sleep(random.uniform(0, 1.1 * self.lasts))
        process.kill()
        ended = process.end()
        return ended.how, "" if ended.code in (0, -9) and not self._torn() else f"exit {ended.code}, {self._torn()}\n{ended.err}"

    def _torn(self) -> list[str]:
        """Files that are not whole, or gone, and inputs that are not what they were."""
        found = self._found()
        torn = [name for name, content in found.items() if content not in self.whole[name.removeprefix("copies/")]]
        lost = [name for name in OUTPUTS if name not in found]
        return torn + lost + [path.name for path, content in self.inputs.items() if path.read_bytes() != content]

    def at_end(self) -> str:
        """After one run that is left alone, nothing but the outputs is there."""
        ended = self._run(self.configs[0])
        pages = [name for name in contents(self.folder / "out") if name.endswith((".html", ".yaml"))]
        litter = strangers(self.folder / "out", [*OUTPUTS, *pages]) + strangers(self.folder / "copies", OUTPUTS)
        return ended.broken() or (f"litter: {', '.join(litter)}" if litter else "")
