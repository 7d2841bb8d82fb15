"""Where a section runs, and where the files are that it names."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..algebra.ema import gamma_of, profile
from ..config.job import Job
from ..config.schema import PICKLES, TRAINED, Checkpoints, Lora, Section, Step
from ..errors import ZitMergeError, nearest
from ..files import hub
from ..formats.reader import tensor_hash
from .training import Training, training_before

SIGMA_REL = 0.1  # of a checkpoints step that says nothing: the paper's wider example, about the last third of the training

# The first that no glob of the toolkit matches is taken; single letters get past patterns such as [!a]*.
PREFIXES = ("merged_", "zit_merge_", *(f"{c}_merged_" for c in "abcdefghijklmnopqrstuvwxyz0123456789"))


@dataclass(frozen=True)
class RunContext:
    """Where a section runs.

    Attributes:
        job: The job's name.
        place: Of the section.
        output_dir: Where files go.
        training: The training before us, if any.
        folders: Where relative LoRA paths start, in order.
        lora_folders: `--loras`: where inputs are looked for by name and hash.
        prefix: What output names begin with.
        file: The one output, where it was named (`merge -o`).
        may_download: Whether sources on the Hugging Face hub may be fetched; else only the local cache is looked at.
        home: Whose folder is the job's own, where AI-Toolkit's UI looks; None where the command line names another one.
    """

    job: str
    place: str
    output_dir: Path
    training: Training | None = None
    folders: Sequence[Path] = (Path(),)
    lora_folders: Sequence[Path] = ()
    prefix: str = "merged_"
    file: Path | None = None
    may_download: bool = False
    home: Training | None = None

    def output(self, step: Step) -> Path:
        """The file that a step writes."""
        job = re.sub(r"[/\\]", "_", self.job)
        return self.file or self.output_dir / (step.file or f"{self.prefix}{job}_{step.name}.safetensors")

    def at(self, key: str) -> str:
        """The full place of a key of the section."""
        return f"{self.place}.{key}" if self.place else key


def make_context(
    job: Job,
    index: int,
    section: Section,
    *,
    output_dir: str | None = None,
    lora_folders: Sequence[Path] = (),
    may_download: bool = False,
) -> RunContext:
    """Finds the training before a section, the folder for its output, and names that the toolkit will leave alone.

    Args:
        job: The whole config.
        index: Which process the section is.
        section: The section.
        output_dir: Overrides the section's.
        lora_folders: Where inputs are looked for by hash.
        may_download: Whether sources on the hub may be fetched.
    """
    training = training_before(job.name, job.processes, index)
    # A job of ours alone has a folder of its own too, where a training of that name may come to look for checkpoints.
    own = Training(job.place(index), job.name, {"training_folder": section.training_folder, "name": section.name})
    homes = [t for t in (training, own if section.training_folder else None) if t]
    chosen = output_dir or section.output_dir or (homes[0].folder if homes else None)
    if chosen is None:
        where = job.place(index)
        raise ZitMergeError(
            f"{where + '.' if where else ''}output_dir: is missing, and there is no training before this section whose folder "
            "could be used: give output_dir (or --output-dir on the command line)"
        )
    for place in lora_folders:
        if not place.is_dir():
            raise ZitMergeError(f"--loras {place}: is not a folder: mend the path")
    folder = user_path(chosen, f"{job.place(index)}.output_dir".lstrip("."))
    home = homes[0] if homes and not output_dir else None
    site = RunContext(
        job.name, job.place(index), folder, training, (job.folder, Path()), lora_folders, may_download=may_download, home=home
    )
    for prefix in PREFIXES:
        named = replace(site, prefix=prefix)
        if not any(home.claims(named.output(s)) for home in homes for s in section.steps):
            return named
    raise ZitMergeError(
        f"{site.at('output_dir')}: AI-Toolkit would take any file in {folder} for a checkpoint of the job {job.name!r}: "
        "set another output_dir, or give the job a name without wildcards"
    )


def user_path(text: str | Path, place: str) -> Path:
    """A path as people write it, ~ included.

    Raises:
        ZitMergeError: The system can't have a file of that name.
    """
    try:
        str(text).encode()  # a name that is no Unicode has no place in a recipe
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise ZitMergeError(f"{place}: {str(text)[:80]!r} is no path that this system can have ({reason}): mend it") from e
    return path


def checkpoint_loras(asked: Checkpoints, site: RunContext, place: str, before_training: bool) -> list[Lora]:
    """The checkpoints of an average as LoRAs whose ratios sum to 1, by training step, the oldest first.

    Args:
        asked: Which ones and how to weigh them.
        site: Where the section runs.
        place: Of `checkpoints`.
        before_training: Those that the training will leave, as its config says; else those that are there.

    Raises:
        ZitMergeError: There are fewer than asked for.
    """
    training = site.training
    if training is None:
        raise ZitMergeError(f"{place}: needs a training process before this section in the job, whose saves can be averaged")
    steps = training.kept() if before_training else training.saved()
    if training.steps not in steps:
        there = ", ".join(training.files()) or "no .safetensors file"
        raise ZitMergeError(f"{place}: {training.file()} is not there, the folder holds {there}: finish the training first")
    count = asked.last or (len(asked.weights) if asked.weights else len(steps))
    if count > len(steps):
        reason = training.how_kept() if before_training else f"{training.folder} holds those of {', '.join(map(str, steps))}"
        there = "will be" if before_training else "are"
        raise ZitMergeError(
            f"{place}: {count} checkpoints are asked for, {len(steps)} {there} there ({reason}; the last one is the final file): "
            f"set last: {len(steps)}, or let the training keep more"
        )
    steps = steps[-count:]
    if asked.weights:
        shares = [w / sum(asked.weights) for w in asked.weights]
    else:
        shares = profile(steps, gamma_of(asked.sigma_rel or SIGMA_REL) if asked.gamma is None else asked.gamma)
    answers = {"alpha": asked.alpha, "qkv": asked.qkv, "drop": asked.drop}
    return [Lora(lora=f"{TRAINED}@{step}", ratio=share, **answers) for step, share in zip(steps, shares, strict=True)]


def trained_step(source: str) -> int | None:
    return int(source.partition("@")[2]) if "@" in source else None


def resolve(spec: Lora, site: RunContext, place: str, section: Section, before_training: bool) -> Path | None:
    """The file of a source; None for a training still to come, and for a file on the hub that may not be fetched now."""
    source = spec.lora
    if re.fullmatch(rf"{TRAINED}(@\d+)?", source) and not spec.sha256:
        return _resolve_trained(source, site, place, before_training)
    if source.startswith(hub.HUB_PREFIX):
        return _resolve_hub(spec, site, place)
    if source.lower().endswith(PICKLES):
        raise ZitMergeError(
            f"{place}: {source} is a pickled checkpoint; pickles can run code when they are opened, so only .safetensors is read"
        )
    if not source.lower().endswith(".safetensors"):
        names = (TRAINED, *(s.name for s in section.steps))
        raise ZitMergeError(
            f"{place}: {source} is neither {TRAINED}, nor an earlier step{nearest(source, names)}, nor a .safetensors file, nor "
            "hf:user/repo/file.safetensors"
        )
    wanted = user_path(source, place)
    candidates = list(dict.fromkeys(user_path(folder / wanted, place) for folder in site.folders))
    candidates += [folder / wanted.name for folder in site.lora_folders]
    if spec.sha256:
        return _resolve_hash(spec.sha256, wanted.name, candidates, site, place)
    for path in candidates:
        if path.exists():
            return path
    looked = ", ".join(str(p.parent) for p in candidates)
    raise ZitMergeError(f"{place}: {source} is not there (looked in {looked}): give the path of the file")


def _resolve_trained(source: str, site: RunContext, place: str, before_training: bool) -> Path | None:
    if site.training is None:
        raise ZitMergeError(
            f"{place}: {source} needs a training process before this section in the job: give the path of a LoRA file"
        )
    step = trained_step(source)
    if before_training:
        if step is not None:
            site.training.check_step(step, place)
        return None
    path = site.training.file(step)
    if not path.exists():
        there = ", ".join(site.training.files()) or "no .safetensors file"
        raise ZitMergeError(f"{place}: {path} is not there, the folder holds {there}: finish the training, or name one of these")
    return path


def _resolve_hub(spec: Lora, site: RunContext, place: str) -> Path | None:
    """A file of the hub; one that a recipe names by its hash may also lie in a folder of --loras."""
    file = hub.parse(spec.lora, place)
    if spec.sha256 and site.lora_folders:
        with contextlib.suppress(ZitMergeError):
            return _resolve_hash(spec.sha256, file.name, [folder / file.name for folder in site.lora_folders], site, place)
    path = hub.download(file, place) if site.may_download else hub.cached(file)
    if path and spec.sha256 and tensor_hash(path) != spec.sha256:
        raise ZitMergeError(
            f"{place}: {spec.lora} does not hold the tensors of the recipe (sha256 {spec.sha256[:12]}...): find the file that it "
            "was made from and name its folder with --loras"
        )
    return path


def _resolve_hash(sha256: str, name: str, candidates: Sequence[Path], site: RunContext, place: str) -> Path:
    for path in _hash_candidates(name, candidates, site):
        with contextlib.suppress(ZitMergeError):  # what else lies in the folder may be broken
            if tensor_hash(path) == sha256:
                return path
    raise ZitMergeError(
        f"{place}: no file with the tensors of {name} (sha256 {sha256[:12]}...) is at hand: name its folder with --loras"
    )


def _hash_candidates(name: str, candidates: Sequence[Path], site: RunContext) -> Iterator[Path]:
    """Files by that name first, then every other .safetensors of the --loras folders."""
    named = [p for p in candidates if p.is_file()]
    everything = [
        p for folder in site.lora_folders for p in sorted(Path(folder).rglob("*.safetensors")) if p.is_file() and p not in named
    ]
    yield from named
    yield from sorted(everything, key=lambda p: p.name != name)


def check_writable(folder: Path, place: str) -> Path:
    """The nearest folder that exists; raises unless files can be made in it."""
    parent = folder.absolute()
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ZitMergeError(f"{place}: {parent} is not a folder: give another one")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ZitMergeError(f"{place}: {parent} can't be written to: change its permissions or give another folder")
    return parent
