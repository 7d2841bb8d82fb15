"""Inputs that change while they are read: the merge of the old file or of the new one, or a sentence; no mix, no signal."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

from world import Campaign, Process, lora, zit_merge

_WORDS = (
    "merge",
    "a.safetensors",
    "b.safetensors",
    "--ratio",
    "1",
    "0.5",
    "--shapes",
    "free",
    "--quiet",
    "-o",
    "out.safetensors",
)


class Changes(Campaign):
    """a.safetensors is replaced, truncated, rewritten, lengthened or removed while it is merged."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        lora(folder / "b.safetensors", 2)
        self.path, self.out = folder / "a.safetensors", folder / "out.safetensors"
        self.versions = [lora(self.path, seed).read_bytes() for seed in (0, 1)]
        self.whole = []
        for content in self.versions:
            self.path.write_bytes(content)
            started = time.monotonic()
            assert not (ended := zit_merge(folder, *_WORDS)).code, ended.err
            self.lasts = time.monotonic() - started
            self.whole.append(self.out.read_bytes())
            self.out.unlink()

    def case(self, random: Random) -> tuple[str, str]:
        """One change at one moment of a merge."""
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(self.versions[0])
        self.out.unlink(missing_ok=True)
        process = Process(_WORDS, self.folder)
        time.sleep(random.uniform(0, self.lasts))
        kind = random.choice(["replace", "truncate", "rewrite", "append", "remove", "poke", "link"])
        self._change(kind, random)
        ended = process.end()
        found = self.out.read_bytes() if self.out.exists() else None
        if ended.code == 0:
            wrong = "" if found in self.whole or found == self._again() else "merged a mix"
        else:
            wrong = "" if found is None else "refused, but a file is there"
        return f"{kind}: {ended.how}", ended.broken() or (wrong and f"{kind}: {wrong}\n{ended.err}")

    def _again(self) -> bytes:
        """The merge of the files as they are now: the change may have come before the first byte was read."""
        self.out.unlink()
        zit_merge(self.folder, *_WORDS)
        return self.out.read_bytes() if self.out.exists() else b""

    def _change(self, kind: str, random: Random) -> None:
        content = self.versions[1]
        if kind == "replace":
            other = self.folder / "other"
            other.write_bytes(content)
            os.replace(other, self.path)
        elif kind == "truncate":
            os.truncate(self.path, random.randrange(len(content)))
        elif kind == "remove":
            self.path.unlink()
        elif kind == "link":
            self.path.unlink()
            self.path.symlink_to("b.safetensors")
        else:
            with self.path.open("r+b" if kind != "append" else "ab") as file:
                if kind == "rewrite":
                    file.write(content)
                elif kind == "append":
                    file.write(b"\0" * random.randint(1, 4096))
                else:  # a float of the tensors
                    file.seek(random.randrange(len(content) // 2, len(content) - 4))
                    file.write(random.randbytes(4))
