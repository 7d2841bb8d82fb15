"""Several processes that write one output at once: the file is always whole, and whoever has to wait says so."""

from __future__ import annotations

from pathlib import Path
from random import Random

from world import OUTPUTS, Campaign, Process, config, contents, lora, strangers, zit_merge


class Races(Campaign):
    """Two to five runs of two configs of one job."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        for seed, name in enumerate("ab"):
            lora(folder / f"{name}.safetensors", seed)
        self.configs = [config(folder / f"{ratio}.yaml", ratio) for ratio in (0.9, 0.7)]
        self.whole: dict[str, set[bytes]] = {name: set() for name in OUTPUTS}
        for path in self.configs:
            assert not (ended := zit_merge(folder, "run", str(path), "--quiet")).code, ended.err
            for name in OUTPUTS:
                self.whole[name].add((folder / "out" / name).read_bytes())

    def case(self, random: Random) -> tuple[str, str]:
        """Some runs, started together."""
        words = [("run", str(random.choice(self.configs)), "--quiet") for _ in range(random.randint(2, 5))]
        ended = [process.end() for process in [Process(some, self.folder) for some in words]]
        found = contents(self.folder / "out")
        wrong = [e.broken() for e in ended if e.broken()]
        wrong += [name for name in OUTPUTS if found.get(name) not in self.whole[name]]
        return f"{sum(e.code == 0 for e in ended)} of {len(ended)} done", "\n".join(wrong)

    def at_end(self) -> str:
        """After one run that is left alone, nothing but the outputs is there."""
        ended = zit_merge(self.folder, "run", str(self.configs[0]), "--quiet")
        pages = [name for name in contents(self.folder / "out") if name.endswith((".html", ".yaml"))]
        litter = strangers(self.folder / "out", [*OUTPUTS, *pages])
        return ended.broken() or (f"litter: {', '.join(litter)}" if litter else "")
