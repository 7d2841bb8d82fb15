"""Mutated files: what is accepted is read as the safetensors library reads it, all else is one sentence; nothing hangs or dies.

The cases run in this program's own functions, some hundred in a forked process, so that a process that dies is seen too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import struct
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pairs
import torch
import yaml
from oracles.dense import product, read_deltas
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from world import Campaign, Case, config

from extensions_built_in.zit_merge import load_lora, merge
from extensions_built_in.zit_merge.cli.main import main
from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.preview.image_store import ImageStore

_PATIENCE = 20  # seconds for one case
_EXAMPLES = Path(__file__).parents[2] / "config" / "examples"


class Mutants(Campaign):
    """Cases of one process each batch."""

    batch = 500

    def tried(self, numbers: range, random: Callable[[int], Random]) -> Iterator[Case]:
        """Each case; the process that runs them writes a line for every one that has ended."""
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 99
            with contextlib.suppress(BaseException):
                os.close(read)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                os.chdir(self.folder)
                with os.fdopen(write, "w") as lines:
                    for number in numbers:
                        print(json.dumps([number, *self._alone(random(number))]), file=lines, flush=True)
                code = 0
            os._exit(code)
        os.close(write)
        last = numbers.start - 1
        with os.fdopen(read) as lines:
            for line in lines:
                last, how, broken = json.loads(line)
                yield last, how, broken
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            yield last + 1, "died", f"the process ended with {code}"
            if last + 2 < numbers.stop:
                yield from self.tried(range(last + 2, numbers.stop), random)

    def _alone(self, random: Random) -> tuple[str, str]:
        """One case under a clock; what is raised but is no sentence breaks the promise."""

        def ring(*_: object) -> None:
            raise TimeoutError(f"still busy after {_PATIENCE} s")

        signal.signal(signal.SIGALRM, ring)
        signal.alarm(_PATIENCE)
        try:
            return self.case(random)
        except ZitMergeError as e:
            return "refused", "" if "\n" not in str(e) else f"a message of several lines: {e}"
        except BaseException:
            return "raised", traceback.format_exc()[-2000:]
        finally:
            signal.alarm(0)


def mutated_bytes(content: bytes, random: Random, first: int = 0) -> bytes:
    """Some bytes changed, removed, doubled or put in, from `first` on."""
    some = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        at = random.randrange(first, max(len(some), first + 1))
        kind = random.randrange(5)
        if kind == 0 and at < len(some):
            some[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            some[at : at + random.choice([1, 2, 4, 64])] = random.randbytes(random.choice([1, 2, 4, 64]))
        elif kind == 2:
            del some[at : at + random.choice([1, 2, 8, 1000])]
        elif kind == 3:
            some[at:at] = some[at : at + random.choice([1, 8, 100])]
        else:
            some[at:at] = random.randbytes(random.choice([1, 8]))
    return bytes(some)


_NUMBERS = (0, -1, 1, 2, 3, 7, 8, 2**31, 2**53, 2**63, 10**30, 1.5, float("nan"), True, None, "4", [], {})
_TEXTS = (
    "",
    "\0",
    "\x1b[2J",
    "\u202e",
    "角色",
    "a" * 5000,
    "[" * 3000,
    "../../x",
    "F32",
    "BF16",
    "F8_E4M3",
    "I8",
    "weight",
    "alpha",
)


def mutated_json(value: Any, random: Random) -> Any:
    """One value, key or entry somewhere inside changed."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        kind = random.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {(_mutated_text(k, random) if k == key else k): v for k, v in value.items()}
        if kind == 2:
            return value | {random.choice(_TEXTS): random.choice([value[key], *_NUMBERS])}
        return value | {key: mutated_json(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.8:
        at = random.randrange(len(value))
        return [*value[:at], *([] if random.random() < 0.1 else [mutated_json(value[at], random)]), *value[at + 1 :]]
    if isinstance(value, str) and random.random() < 0.7:
        return _mutated_text(value, random)
    if isinstance(value, int) and random.random() < 0.6:
        return value + random.choice([-8, -1, 1, 8, value])
    return random.choice([*_NUMBERS, *_TEXTS])


def _mutated_text(text: str, random: Random) -> str:
    at = random.randrange(len(text) + 1)
    words = ["module.", "_orig_mod.", ".default", "to_k", "lora_up", "lora_down", "lora_A", ".scale_weight", "0", "layers.1"]
    return text[:at] + random.choice([*_TEXTS, *words]) + text[at + random.choice([0, 0, 1, 4]) :]


class Files(Mutants):
    """A small LoRA in a mutated file, merged with another one."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.path, self.out = folder / "a.safetensors", folder / "out.safetensors"
        self.content = pairs.write(self.path, pairs.lora(2, 1, alpha=4)).read_bytes()
        self.other = pairs.lora(2, 2)
        pairs.write(folder / "b.safetensors", self.other)
        self.header = int.from_bytes(self.content[:8], "little")

    def mutated(self, random: Random) -> bytes:
        """The file's content."""
        raise NotImplementedError

    def case(self, random: Random) -> tuple[str, str]:
        """Read, merged, and compared with what the safetensors library reads."""
        self.path.write_bytes(self.mutated(random))
        self.out.unlink(missing_ok=True)
        how: dict[str, Any] = {"shapes": "free", "dtype": "fp32", "device": "cpu"}
        how |= {"allow_unmatched": True} if random.random() < 0.3 else {}
        alpha = random.choice([None, None, None, "none", 2])
        with load_sentences(self.out):
            lora = load_lora(self.path, alpha=alpha)
            merge([(lora, 1.0), (load_lora(self.path.with_name("b.safetensors")), 0.5)], **how).save(self.out)
        return "merged", self._wrong(alpha)

    def _wrong(self, alpha: str | int | None) -> str:
        """What the output has that the factors of the file don't give, or nothing."""
        try:
            stored = load_file(self.path)
        except (SafetensorError, ValueError, RuntimeError, KeyError) as e:
            return f"merged a file that safetensors refuses: {e}"
        wanted = {}
        for module in pairs.MODULES:
            stem = f"diffusion_model.{module}"
            up, down, scale = (stored.get(f"{stem}.{part}") for part in ("lora_B.weight", "lora_A.weight", "alpha"))
            if any(key.startswith(stem) and key.removeprefix(stem) not in _PARTS for key in stored) or up is None or down is None:
                return ""  # a key has another name now: what it means is up to the reader
            r = down.shape[0]
            factor = 1.0 if alpha == "none" else alpha / r if alpha else 1.0 if scale is None else float(scale) / r
            wanted[module] = product(up, down) * factor + self.other[module].delta * 0.5
        if set(stored) - {f"diffusion_model.{m}{part}" for m in pairs.MODULES for part in _PARTS}:
            return ""
        found = read_deltas(self.out)
        sizes = {m: float((found[m] - delta).norm() / (delta.norm() + 1e-30)) for m, delta in wanted.items()}
        off = {m: size for m, size in sizes.items() if not size < 1e-5}
        return f"another result: {off}" if off else ""


_PARTS = (".lora_A.weight", ".lora_B.weight", ".alpha")


@contextlib.contextmanager
def load_sentences(out: Path) -> Iterator[None]:
    """A refusal leaves no file."""
    try:
        yield
    except ZitMergeError:
        if left := [p.name for p in out.parent.glob(f"{out.name}*")]:
            raise AssertionError(f"refused, but left {left}") from None
        raise


_KEYS = (
    "lora_adapter_metadata",
    "ss_tag_frequency",
    "modelspec.title",
    "modelspec.trigger_phrase",
    "software",
    "zit_merge.check",
)


class Headers(Files):
    """The header, as text or as JSON."""

    def mutated(self, random: Random) -> bytes:
        """Another header before the same tensors."""
        header, body = self.content[8 : 8 + self.header], self.content[8 + self.header :]
        kind = random.random()
        if kind < 0.1:
            return random.choice([0, 1, 7, len(header) - 1, len(header) + 1, 10**8, 2**40, 2**63, 2**64 - 1]).to_bytes(
                8, "little"
            ) + (header + body)
        if kind < 0.3:
            header = mutated_bytes(header, random)
        elif kind < 0.5:
            metadata = {random.choice(_KEYS): mutated_json({"a": [1], "b": {"c": 2}}, random) for _ in range(2)}
            texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
            header = json.dumps(json.loads(header) | {"__metadata__": texts}).encode()
        else:
            table = json.loads(header) | {
                "__metadata__": {"ss_tag_frequency": '{"1_x": {"x": 1}}', "lora_adapter_metadata": "{}"}
            }
            for _ in range(random.choice([1, 1, 2, 3])):
                table = mutated_json(table, random)
            header = json.dumps(table, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
        return len(header).to_bytes(8, "little") + header + body


class Bodies(Files):
    """The tensors: bits, extremes, a part missing or too much."""

    def mutated(self, random: Random) -> bytes:
        """Other tensors behind the same header."""
        start = 8 + self.header
        if random.random() < 0.5:
            return mutated_bytes(self.content, random, start)
        some = bytearray(self.content)
        extremes = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-38, 1e-45, 1e25, 1e-25, 0.0, -0.0)
        for _ in range(random.choice([1, 2, 50])):
            at = random.randrange(start, len(some) - 4) // 4 * 4
            some[at : at + 4] = torch.tensor(random.choice(extremes)).numpy().tobytes()
        return bytes(some)


class Texts(Mutants):
    """A text for the command line, which must end with 0, 1 or 2 and write nothing."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        for seed, name in enumerate("ab"):
            pairs.write(folder / f"{name}.safetensors", pairs.lora(2, seed))
        os.environ.update({"OUT": str(folder), "COMFYUI": str(folder)})

    def ended(self, *words: str) -> tuple[int, str]:
        """(exit code, stdout) of a command that must not add a file."""
        before = set(os.listdir(self.folder))
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
        assert code in (0, 1, 2), f"exit {code}"
        assert set(os.listdir(self.folder)) == before, f"left {set(os.listdir(self.folder)) - before}"
        assert code == 0 or "zit_merge" in texts[1], f"exit {code} without a sentence: {texts[1]!r}"
        assert not set(texts[0] + texts[1]) & _CONTROLS, "a control character reached the terminal"
        return code, texts[0]


_CONTROLS = {chr(i) for i in (*range(32), *range(127, 160), 0x202E, 0x2066, 0x200F) if chr(i) not in "\n\t\r"}
_ENDS = {0: "accepted", 1: "refused", 2: "usage"}


class Configs(Texts):
    """Configs of ours and of the examples."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        own = config(folder / "own.yaml").read_text(encoding="utf-8")
        self.texts = [own, own, *(path.read_text(encoding="utf-8") for path in sorted(_EXAMPLES.glob("*.yaml")))]
        self.path = folder / "config.yaml"
        self.path.touch()

    def case(self, random: Random) -> tuple[str, str]:
        """A text with other bytes, lines or values, given to `check` and to `run --dry-run`."""
        text, kind = random.choice(self.texts), random.random()
        if kind < 0.4:
            table = yaml.safe_load(text)
            for _ in range(random.choice([1, 1, 2, 4])):
                table = mutated_json(table, random)
            content = yaml.safe_dump(table, sort_keys=False, allow_unicode=True).encode(errors="surrogatepass")
        elif kind < 0.7:
            lines = text.splitlines(keepends=True)
            for _ in range(random.choice([1, 2, 4])):
                at, other = random.randrange(len(lines)), random.choice(lines)
                lines[at : at + 1] = random.choice(
                    [[], [lines[at]] * 2, [other], ["\t" + lines[at]], [f"x: &a [{other.strip()}, *a]\n"]]
                )
                lines = lines or ["\n"]
            content = "".join(lines).encode()
        else:
            content = mutated_bytes(text.encode(), random)
        self.path.write_bytes(content)
        code, _ = self.ended("check", str(self.path))
        self.ended("run", str(self.path), "--dry-run", "--quiet")
        return _ENDS[code], ""


class Recipes(Texts):
    """Metadata of a merged file: what `inspect` and `recipe` make of them, and `run` of the recipe."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.path = folder / "merged.safetensors"
        with contextlib.redirect_stdout(io.StringIO()):
            words = ("merge", *(str(folder / f"{n}.safetensors") for n in "ab"), "--ratio", "1", "0.5", "--shapes", "free")
            assert main((*words, "-o", str(self.path), "--quiet")) == 0
        self.content = self.path.read_bytes()
        self.section = folder / "section.yaml"
        self.section.touch()

    def case(self, random: Random) -> tuple[str, str]:
        """A recipe or a check with something changed inside."""
        length = int.from_bytes(self.content[:8], "little")
        header = json.loads(self.content[8 : 8 + length])
        metadata = header["__metadata__"]
        for _ in range(random.choice([1, 1, 3])):
            key = random.choice(["zit_merge.recipe", "zit_merge.recipe", "zit_merge.recipe", *metadata])
            if random.random() < 0.2:
                metadata[key] = _mutated_text(metadata[key], random)
            else:
                try:
                    metadata[key] = json.dumps(mutated_json(json.loads(metadata[key]), random))
                except (ValueError, RecursionError):  # no JSON, or what an earlier round nested
                    metadata[key] = _mutated_text(metadata[key], random)
        text = json.dumps(header).encode()
        self.path.write_bytes(len(text).to_bytes(8, "little") + text + self.content[8 + length :])
        self.ended("inspect", str(self.path))
        self.ended("inspect", str(self.path), "--json")
        code, out = self.ended("recipe", str(self.path))
        if code == 0:
            self.section.write_text(out, encoding="utf-8")
            words = ("--loras", str(self.folder), "--output-dir", str(self.folder / "new"), "--dry-run", "--quiet")
            again, _ = self.ended("run", str(self.section), *words)
            return f"recipe {_ENDS[again]}", ""
        return "no recipe", ""


class Pictures(Mutants):
    """PNG files of the store: whole pictures are shown, all others rendered again."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.store = ImageStore(folder, None, 0, 1, "job")
        self.store.save("whole", Image.effect_noise((24, 16), 60).convert("RGB"), {"prompt": "a" * 50})
        self.content = self.store.path("whole").read_bytes()
        with Image.open(self.store.path("whole")) as picture:
            self.pixels = picture.convert("RGB").tobytes()

    def case(self, random: Random) -> tuple[str, str]:
        """A stored picture with other bytes: if the store has it, it can be loaded."""
        self.store.path("other").write_bytes(
            _mutated_png(self.content, random) if random.random() < 0.5 else mutated_bytes(self.content, random)
        )
        if not self.store.has("other"):
            return "broken, rendered again", ""
        self.store.load("other", 10)
        return "shown", "" if self.store.load("other").size[0] <= 10_000 else "a picture of an absurd size is shown"


def _mutated_png(content: bytes, random: Random) -> bytes:
    """One chunk changed with its checksum made right, so that the decoder meets it."""
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append([content[at + 4 : at + 8], content[at + 8 : at + 8 + length]])
        at += 12 + length
    one = random.choice(chunks)
    if one[0] == b"IHDR" and random.random() < 0.7:
        sizes = [random.choice([0, 1, 24, 2**14, 2**20, 2**31 - 1, 2**32 - 1]) for _ in range(2)]
        one[1] = struct.pack(">II", *sizes) + one[1][8:]
    elif random.random() < 0.8:
        one[1] = mutated_bytes(one[1] or b"\0", random)
    else:
        one[0] = random.choice([b"tEXt", b"zTXt", b"iTXt", b"PLTE", b"IDAT", b"acTL", b"fdAT", b"eXIf", b"iCCP"])
    if random.random() < 0.2:
        chunks.insert(random.randrange(len(chunks)), list(random.choice(chunks)))
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return content[:8] + b"".join(parts)
