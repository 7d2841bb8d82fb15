"""Disks of every size: a merge is written whole, or refused with a sentence about the space; what was there stays."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from random import Random

from world import OUTPUTS, Campaign, config, contents, lora, strangers, zit_merge


class Disks(Campaign):
    """The outputs go to a file system in memory that is mounted for each case."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        for seed, name in enumerate("ab"):
            lora(folder / f"{name}.safetensors", seed)
        self.old, self.new = (config(folder / f"{ratio}.yaml", ratio) for ratio in (0.9, 0.7))
        self.out = folder / "out"
        assert not (ended := zit_merge(folder, "run", str(self.old), "--quiet")).code, ended.err
        self.before = {name: (self.out / name).read_bytes() for name in OUTPUTS}
        assert not (ended := zit_merge(folder, "run", str(self.new), "--quiet")).code, ended.err
        self.after = {name: (self.out / name).read_bytes() for name in OUTPUTS}
        self.room = sum(map(len, contents(self.out).values()))
        shutil.rmtree(self.out)
        self.out.mkdir()
        if not self._mount(1 << 20):
            self.impossible = "no file system can be mounted here"
        else:
            self._unmount()

    def _mount(self, size: int) -> bool:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.out], capture_output=True)
        return done.returncode == 0

    def _unmount(self) -> None:
        subprocess.run(["umount", self.out], check=True)

    def case(self, random: Random) -> tuple[str, str]:
        """A merge onto a disk that has room for nothing, a part, or everything; sometimes with an older file on it."""
        assert self._mount(random.randint(4096, 3 * self.room))
        try:
            is_old = random.random() < 0.6
            for name, content in self.before.items() if is_old else ():
                try:
                    (self.out / name).write_bytes(content)
                except OSError:  # too small for the old file: then there is none
                    (self.out / name).unlink()
            held = contents(self.out)
            checked = zit_merge(self.folder, "check", str(self.new))
            ended = zit_merge(self.folder, "run", str(self.new), "--quiet")
            return self._judged(held, checked.code, ended)
        finally:
            self._unmount()

    def _judged(self, held: dict[str, bytes], checked: int, ended) -> tuple[str, str]:
        found = contents(self.out)
        wrong = [n for n in OUTPUTS if found.get(n) not in (held.get(n), self.after[n])]
        if ended.code == 0:
            wrong += [n for n in OUTPUTS if found.get(n) != self.after[n]]
            how = "done" if checked == 0 else "done though check refused"
        else:
            how = "refused by check too" if checked else "refused by the run alone"
        pages = [name for name in found if name.endswith((".html", ".yaml"))]
        wrong += [f"litter {n}" for n in strangers(self.out, [*OUTPUTS, *pages])]
        if ended.code == 1 and "no space left" not in ended.err and " free: " not in ended.err:
            wrong.append("another sentence than that of the space")
        return how, ended.broken() or (f"{how}: {', '.join(wrong)}\n{ended.err}" if wrong else "")
