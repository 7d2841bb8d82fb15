"""The terminal: every report fits 80 columns, steers nothing, answers first what people ask first, and shows true numbers."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pairs import lora, write
from screen import columns, steers
from sweep import examples
from workspace import Workspace

from extensions_built_in.zit_merge import merge
from extensions_built_in.zit_merge.analysis.attribute import attribute
from extensions_built_in.zit_merge.analysis.compare import compare
from extensions_built_in.zit_merge.analysis.describe import describe
from extensions_built_in.zit_merge.analysis.measure import measure
from extensions_built_in.zit_merge.config.job import load_job
from extensions_built_in.zit_merge.config.presets import find_preset
from extensions_built_in.zit_merge.config.schema import Checkpoints, Lora, Save, Step
from extensions_built_in.zit_merge.demo import run_demo
from extensions_built_in.zit_merge.files.paths import USUAL_PREFIX
from extensions_built_in.zit_merge.formats.reader import load_lora
from extensions_built_in.zit_merge.formats.spec import Layout, LoraSpec
from extensions_built_in.zit_merge.formats.verdict import Measured, Verdict, judged
from extensions_built_in.zit_merge.merging.made import Done
from extensions_built_in.zit_merge.merging.runner import run_plans
from extensions_built_in.zit_merge.model.zimage import COMPONENTS, MODULES
from extensions_built_in.zit_merge.planning.job import plan_job
from extensions_built_in.zit_merge.planning.step import step_plan
from extensions_built_in.zit_merge.planning.types import Input, StepPlan
from extensions_built_in.zit_merge.progress import SILENT
from extensions_built_in.zit_merge.report.text.attribution import attribution_text
from extensions_built_in.zit_merge.report.text.catalogue import methods_text, presets_text
from extensions_built_in.zit_merge.report.text.compare import comparison_text
from extensions_built_in.zit_merge.report.text.describe import description_text
from extensions_built_in.zit_merge.report.text.plan import plan_text
from extensions_built_in.zit_merge.report.text.result import done_text
from extensions_built_in.zit_merge.report.text.table import norm_table, value_table
from extensions_built_in.zit_merge.wording import aligned, beside, copyable, ranges, size_text, squeezed, wrapped

CPU = torch.device("cpu")
HERE = Path(__file__)
LAYERS = [m for m in MODULES if m.startswith("layers.")]
HOSTILE = [
    "a b  c.safetensors",
    "n" * 240 + ".safetensors",
    "word " * 45 + ".safetensors",
    "\u05e9\u05dc\u05d5\u05dd\u202egpj.safetensors",  # right to left, and what turns the line around
    "\U0001f600\U0001f408\u200d\u2b1b.safetensors",
    "\u4e2d\u6587\u6a21\u578b.safetensors",
    "\x1b[2Jred\x07\t.safetensors",
    "{} {0} %s.safetensors",
    "-" * 200,
]


def screen(text: str, *paths: Path | str) -> str:
    """The text, once it is known to fit: only one of these paths, alone on its line, may be longer than 80 letters."""
    alone = {"".join(map(escaped, str(path))) for path in paths}
    for line in text.split("\n"):
        assert columns(line) <= 80 or line.strip() in alone, line
        assert not any(map(steers, line)), repr(line)
        assert line == line.rstrip(), repr(line)
    return text


def escaped(letter: str) -> str:
    """As it may stand on a line."""
    if not steers(letter) and letter != "\xad":
        return letter
    return f"\\x{ord(letter):02x}" if letter < "\x80" else letter.encode("ascii", "backslashreplace").decode()


def flat(text: str) -> str:
    """Without line breaks and columns."""
    return " ".join(text.split())


def in_order(text: str, *parts: str) -> bool:
    """Whether each part stands behind the one before it."""
    at = 0
    for part in parts:
        assert part in text[at:], (part, text)
        at = text.index(part, at) + len(part)
    return True


# --- plans and verdicts of any kind --------------------------------------------------------------------------------------------

LABELS = st.one_of(st.sampled_from(["me.safetensors", "soft", *HOSTILE]), st.text(min_size=1, max_size=300))
NUMBERS = st.one_of(st.sampled_from([0.9, 1.0, -0.25, 0.0, 1 / 3, 1e-5, 12345.678]), st.floats(-1e300, 1e300))
PRESENT = st.sampled_from([LAYERS, list(MODULES), LAYERS[:1], LAYERS[8:17], ["context_refiner.1.attention.to_v"]])


@st.composite
def inputs(draw: st.DrawFn) -> Input:
    """A LoRA that is there, to be trained, or still on the hub."""
    ratio, modules = draw(NUMBERS), draw(PRESENT)
    factors = draw(st.lists(NUMBERS, min_size=1, max_size=3))
    table = dict.fromkeys(MODULES, 1.0) | {m: factors[i // 9 % len(factors)] for i, m in enumerate(draw(PRESENT))}
    rank, kinds = draw(st.sampled_from([1, 32, 3840])), draw(st.sampled_from([["LoRA"], ["LoKr"], ["LoRA", "full difference"]]))
    dtype = draw(st.sampled_from(["bf16", "fp16", "fp32"]))
    known = LoraSpec(dict.fromkeys(modules, rank) if draw(st.integers(0, 9)) else {}, {}, dtype, kinds)
    spec = Lora(lora="x", ratio=ratio, preset=draw(st.sampled_from([None, None, "late_20_29"])))
    if spec.preset:
        spec.keep_preset(find_preset(spec.preset, Path()))
    return Input(spec, draw(LABELS), known, table, Path("x.safetensors"))


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    """A step of one to forty LoRAs."""
    some = draw(st.lists(inputs(), min_size=1, max_size=draw(st.sampled_from([1, 2, 11, 40]))))
    written = sorted({m for i in some for m in i.known.ranks}, key=list(MODULES).index) or LAYERS[:1]
    keep = draw(st.booleans())
    step = Step(
        name=draw(st.sampled_from(["a", "s" * 200, "\u4e2d\u6587", "v1.2-b"])),
        loras=[i.spec for i in some],
        method=draw(st.sampled_from(["sum", "average", "ties"])),
        checkpoints=draw(st.sampled_from([None, None, None, Checkpoints(last=2)])),
        rank=draw(st.sampled_from(["exact", 4, {"energy": 0.9}, {"size_mb": 3.0}])),
        keep=keep,
        copy_to=f"/{draw(st.sampled_from([n for n in HOSTILE if chr(7) not in n]))}/x" if keep and draw(st.booleans()) else None,
        save=Save(uniform=draw(st.booleans()), format=draw(st.sampled_from(["ai-toolkit", "comfyui"]))),
    )
    ranks = {m: 1 + n % draw(st.sampled_from([1, 7])) for n, m in enumerate(written)}
    return StepPlan(
        job="cat",
        spec=step,
        inputs=tuple(some),
        shapes={m: MODULES[m].shape() for m in written},
        ranks=ranks,
        stacked={m: r + draw(st.sampled_from([0, 0, 3])) for m, r in list(ranks.items())[:3]},
        dtype_name="bf16",
        path=Path("/deep folder" * draw(st.sampled_from([1, 20]))) / draw(st.sampled_from(HOSTILE)).replace("/", "_"),
        bytes=draw(st.sampled_from([0, 1234, 123_456_789_012])),
        warnings=tuple(draw(st.lists(LABELS.map(lambda name: f"{name}: is odd"), max_size=3))),
        is_open=draw(st.booleans()),
        loc="process[0].steps[0]",
        prefix=USUAL_PREFIX,
        layout=Layout(),
        recipe={},
        draft={},
        planner=step_plan,
    )


@st.composite
def done_steps(draw: st.DrawFn) -> Done:
    """A step that was made, with any verdict."""
    plan = draw(plans())
    count = len(plan.inputs)
    asked = draw(st.lists(st.one_of(st.none(), NUMBERS.filter(bool)), min_size=count, max_size=count))
    got = [None if a is None else draw(NUMBERS) for a in asked]
    told = [n for n, a in enumerate(asked) if a is not None]
    alike = [told[:2]] if len(told) > 1 and draw(st.booleans()) else []
    error = draw(st.sampled_from([0.0, 1e-9, 0.002, 0.4, 1.0]))
    shares = {m: error * (1 + n % 3) / 3 for n, m in enumerate(draw(st.sampled_from([plan.shapes, []])))}
    modules = {m: Measured((0,), torch.ones(1), None, 1.0, share) for m, share in shares.items()}
    found = Verdict(error, 1 - error**2, tuple(asked), tuple(got), bool(plan.cut), alike, modules)
    energy, most = draw(st.sampled_from([(None, None), (0.9, None), (0.9, 24)]))
    verdict = judged(found, energy=energy, most=most, averaged=bool(plan.spec.checkpoints))
    return Done(plan, HERE, draw(st.integers(0, 9)) > 0, verdict)


@examples(150)
@given(plan=plans())
def test_any_plan_fits_and_answers_in_order(plan):
    text = screen(plan_text(plan), plan.path, *[target.parent for target in plan.targets[1:]])
    assert in_order(text, "step ", " ratio ", "\n  strength", "\n  writes " if plan.spec.keep else "\n  makes ")
    rows = text.split("\n\n")[0]
    ratios = [float(found) for found in re.findall(r"  ratio +(\S+)  +\S", rows)]
    assert ratios == [float(f"{i.spec.ratio:g}") for i in plan.inputs]
    assert len(re.findall(r"(?m)^  note:( |$)", text)) == len(plan.warnings)
    assert plan.warnings == () or text.index("  note:") > text.index("\n  writes " if plan.spec.keep else "\n  makes ")


@examples(150)
@given(done=done_steps())
def test_any_report_fits_and_answers_in_order(done):
    plan, text = done.plan, done_text(done)
    screen(text, done.path, *[target.parent for target in plan.targets[1:]])
    if not done.made:
        assert re.fullmatch(r"kept .+ \(made before by the same recipe\), (right|off|off by .*|empty): .+", flat(text))
        return
    came_out = "\n  wrote " if plan.spec.keep else "\n  made for later steps "
    assert re.search(rf" is {done.verdict.status}(: | by )", flat(text.split("\n\n")[0]))
    assert in_order(text, " is ", "\n  went in ", came_out, *["\n  copied to\n"] * bool(plan.spec.copy_to))
    rows = text.split("\n  went in ")[1].split("\n\n")[0]
    rows = re.split(r"\n  [?-]:", rows)[0].split("\n")[1:]
    assert len(rows) == (len(plan.inputs) if len(plan.inputs) <= 10 else 11)


def test_these_tests_can_fail():
    for wrong in ("x" * 81, "\u4e2d" * 41, "\u202ejpg", "end ", "a\tb", "\x1b[2J", "  /long/path" + "x" * 80 + " (3 modules)"):
        with pytest.raises(AssertionError):
            screen(wrong, "/long/path" + "x" * 80)
    screen("  /long/path" + "x" * 80, "/long/path" + "x" * 80)


# --- real steps, their numbers -------------------------------------------------------------------------------------------------


def planned(path: Path) -> list[StepPlan]:
    (section,) = plan_job(load_job(path))
    return section.plans


def run_all(path: Path) -> list[Done]:
    return list(run_plans(planned(path), CPU))


def table_after(lines: Sequence[str], title: str) -> dict[str, list[str]]:
    """Rows of the table below a line: layer -> cells."""
    at = lines.index(title) + 1
    assert lines[at].split() == ["layer", "adaLN", *COMPONENTS[1:]]
    rows = {}
    for line in lines[at + 1 :]:
        if not line.strip() or not re.match(r"\d|noise|context", line.strip()):
            break
        layer, *cells = line.split()
        rows[layer] = cells
    return rows


def cell(rows: Mapping[str, list[str]], layer: int, component: str) -> str:
    for name, cells in rows.items():
        first, _, last = name.partition("-")
        if first.isdecimal() and int(first) <= layer <= int(last or first):
            return cells[COMPONENTS.index(component)]
    raise AssertionError(f"layer {layer} has no row")


def test_the_strengths_shown_are_those_of_the_plan(work: Workspace, loras):
    weights = {"blocks": {"to_q": -1.25, "w2": 0.8}, "layers": {"0-9": [0.1, 1.0], "12": 0}, "overrides": {"3.to_v": 2}}
    (plan,) = planned(work.job({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 0.9} | weights]}))
    rows = table_after(screen(plan_text(plan), plan.path).split("\n"), "  strength")
    for module in (m for m in MODULES.values() if m.section == "layers"):
        assert float(cell(rows, module.index, module.component)) == pytest.approx(plan.inputs[0].strengths[module.name], rel=6e-3)


def test_loras_of_one_table_share_it_and_equal_strengths_need_none(work: Workspace):
    faded = {"ratio": 0.5, "layers": {"0-9": 0.5}}
    weights = [{"ratio": 0.9}, faded, {"ratio": 0.4}, faded, {"ratio": 0.9, "layers": {"0-29": 0.5}}, {"ratio": 0.9}, faded]
    entries = [{"lora": work.lora(f"{n}.safetensors", seed=n).name} | w for n, w in enumerate(weights)]
    (plan,) = planned(work.job({"name": "a", "loras": entries}))
    text = plan_text(plan)
    assert "  strength of LoRAs 1, 3 and 6: everywhere its ratio\n" in text
    assert "  strength of LoRAs 2, 4 and 7\n    layer " in text
    assert "  strength of LoRA 5 (4.safetensors): everywhere 0.45\n" in text
    assert text.count("layer ") == 1
    (plan,) = planned(work.job({"name": "a", "loras": [entries[0], entries[5]]}))
    assert "  strength of LoRAs 1 and 2: everywhere 0.9\n" in plan_text(plan)
    (plan,) = planned(work.job({"name": "a", "loras": entries[:1]}))
    assert plan_text(plan).startswith("step a: 1 LoRA\n  0.safetensors  ratio 0.9  240 modules, rank 2, bf16\n\n")
    assert "\n  strength: everywhere 0.9\n" in plan_text(plan)


def test_a_step_of_forty_loras_is_short(work: Workspace):
    content = work.lora("0.safetensors").read_bytes()
    for n in range(40):
        (work.folder / f"{n}.safetensors").write_bytes(content)
    entries = [{"lora": f"{n}.safetensors", "ratio": 0.01 * n} for n in range(40)]
    (plan,) = planned(work.job({"name": "a", "loras": entries}))
    lines = screen(plan_text(plan), plan.path).split("\n")
    assert len(lines) <= 40 + 12 and "  strength of LoRAs 1-40: everywhere its ratio" in lines
    assert len({line.index("ratio") for line in lines[1:41]}) == 1, "the ratios are below each other"
    assert len({line.index(".") for line in (row.split("ratio ")[1] for row in lines[2:41])}) == 1, "and so are their points"


def test_what_went_in_and_what_came_out_are_the_verdict_and_the_file(work: Workspace, loras):
    (work.folder / "copies").mkdir()
    entries = [{"lora": "me.safetensors", "ratio": 0.9}, {"lora": "style.safetensors", "ratio": 0.6}]
    step = {"name": "both", "rank": {"energy": 0.99}, "save": {"uniform": False}, "copy_to": "copies", "loras": entries}
    (done,) = run_all(work.job(step))
    text, verdict = screen(done_text(done), done.path), done.verdict
    for n, name in enumerate(("me", "style")):
        asked, got = re.search(rf"(?m)^  {n + 1}  {name}\.safetensors +(\S+) +(\S+)$", text).groups()
        assert (float(asked), float(got)) == (pytest.approx(verdict.asked[n], rel=6e-3), pytest.approx(verdict.got[n], rel=6e-3))
    written = load_lora(done.path)
    low, high = min(written.ranks.values()), max(written.ranks.values())
    size = size_text(done.path.stat().st_size)
    came_out = f"\n  wrote {len(written)} modules, rank {low}-{high}, bf16, {size}\n"
    assert f"{came_out}    {done.path}\n  copied to\n    copies\n" in text
    worst = max(verdict.errors, key=verdict.errors.get)
    kept, least = re.search(r"(\S+) % of the energy kept, least in (\S+): (\S+) %", flat(text)).group(1, 3)
    assert worst in text and float(kept) == pytest.approx(100 * verdict.kept, abs=0.06)
    assert float(least) == pytest.approx(100 * (1 - verdict.errors[worst] ** 2), abs=0.06)
    lines = text.split("\n")
    kept_rows, rank_rows = table_after(lines, "  energy kept, in percent"), table_after(lines, "  rank")
    for module in (MODULES[m] for m in written):
        share = 100 * (1 - verdict.errors[module.name] ** 2)
        assert float(cell(kept_rows, module.index, module.component)) == pytest.approx(share, abs=0.11)
        assert int(cell(rank_rows, module.index, module.component)) == written.ranks[module.name]


def test_of_many_the_strongest_are_shown(work: Workspace):
    entries = [{"lora": work.lora(f"{n}.safetensors", seed=n).name, "ratio": (-1) ** n * (n + 1) / 10} for n in range(13)]
    (done,) = run_all(work.job({"name": "a", "loras": entries}))
    rows = re.findall(r"(?m)^ +\d+  (\d+)\.safetensors +(\S+) +(\S+)$", done_text(done))
    assert [int(name) for name, *_ in rows] == list(range(12, 2, -1))
    for name, asked, got in rows:
        ratio = (-1) ** int(name) * (int(name) + 1) / 10
        assert float(asked) == pytest.approx(ratio) and float(got) == pytest.approx(ratio, rel=6e-3)
    assert "\n  and 3 more, none with a larger ratio\n" in done_text(done)


def reported(work: Workspace, *entries: Mapping[str, Any], **keys: Any) -> str:
    """The report of a step, in one line."""
    (done,) = run_all(work.job({"name": "a", "loras": list(entries)} | keys))
    return flat(screen(done_text(done), done.path))


def test_the_first_word_is_the_verdict(work: Workspace, loras):
    me, style = ({"lora": f"{name}.safetensors", "ratio": ratio} for name, ratio in (("me", 1.0), ("style", 0.05)))
    assert reported(work, me, style).startswith("a is right: as asked, rounding to bf16 changed ")
    in_fp32 = reported(work, me, style, save={"dtype": "fp32"})
    assert in_fp32.startswith("a is right: as asked, rounding to fp32 changed under 0.1 %")
    assert reported(work, me, style, rank=4).startswith("a is right: as asked, as far as rank 4 holds it")
    assert reported(work, me, style, rank=1).startswith("a is off: style is mostly cut away, a larger rank keeps it")
    assert reported(work, me | {"ratio": 0}).startswith("a is empty: nothing was asked for, zeros were written")


def test_inputs_that_cancel_or_are_alike(work: Workspace, loras):
    def nearly(tensors: dict[str, torch.Tensor]) -> None:
        noise = torch.Generator().manual_seed(0)
        tensors.update({k: v.float() * (1 + 1e-4 * torch.randn(v.shape, generator=noise)) for k, v in tensors.items()})

    work.lora("near.safetensors", change=nearly)
    text = reported(work, {"lora": "me.safetensors", "ratio": 1.0}, {"lora": "near.safetensors", "ratio": -1.0})
    assert re.match(r"a is off by \S+ %: the inputs nearly cancel, bf16 can't hold what is left; save it as fp32 went in", text)
    assert " asked got 1 me.safetensors 1 ? 2 near.safetensors -1 ? ?: me and near are too alike to be told apart wrote " in text


def test_a_method_whose_strengths_are_not_asked_for(work: Workspace, loras):
    entries = [{"lora": path.name, "ratio": 1.0} for path in loras]
    (done,) = run_all(work.job({"name": "a", "method": "ties", "params": {"density": 0.5}, "loras": entries}))
    text = done_text(done)
    assert "step a: 2 LoRAs, method ties (density 0.5)\n" in plan_text(done.plan)
    assert "holds about\n" in text and " asked " not in text and " got" not in text
    for n, name in enumerate(("me", "style")):
        (held,) = re.search(rf"(?m)^  {n + 1}  {name}\.safetensors +(\S+)$", text).groups()
        assert float(held) == pytest.approx(done.verdict.got[n], rel=6e-3)


def test_a_kept_step_takes_one_sentence_and_a_step_in_between_is_no_file(work: Workspace, loras):
    steps = [
        {"name": "pre", "keep": False, "loras": [{"lora": "me.safetensors", "ratio": 0.5}]},
        {"name": "n" * 150, "loras": [{"lora": "pre", "ratio": 1.0}]},
    ]
    job = work.job(*steps)
    first, second = run_all(job)
    assert "\n  makes 240 modules, rank 2, bf16, " in plan_text(first.plan) and str(first.path) not in plan_text(first.plan)
    assert "for later steps only (keep: false)" in flat(plan_text(first.plan))
    assert "\n  made for later steps 240 modules, rank 2, bf16, " in done_text(first) and str(work.out) not in done_text(first)
    (again,) = run_all(job)
    kept = r"kept merged_cat_n+\.\.\.n+ \(made before by the same recipe\), right: as asked, rounding to bf16 changed 0 %"
    assert re.fullmatch(kept, flat(screen(done_text(again)))) and done_text(second).startswith("nnn")


def test_the_demo_fits(tmp_path):
    said: list[str] = []
    run_demo(tmp_path, said.append, SILENT)
    text = screen("\n".join(said), tmp_path / "demo_merged.safetensors", tmp_path / "demo_page.html")
    assert in_order(text, "step demo_merged: 2 LoRAs", "  writes 240 modules", "demo_merged is right: ", "  wrote 240 modules")
    assert text.endswith(f"  right: rounding to fp32 explains up to 1e-06\n\nreport:\n    {tmp_path / 'demo_page.html'}")


# --- inspect -------------------------------------------------------------------------------------------------------------------


def one_layer(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if not re.search(r"layers\.(0|17)\.", key)]:
        del tensors[key]


NAMES = ["me.safetensors", "\u05e9\u05dc\u05d5\u05dd\u202egpj.safetensors", "\U0001f600.safetensors", "n" * 240 + ".safetensors"]


@pytest.mark.parametrize("count", [2, 5, 12])
def test_files_of_any_name_compared_and_attributed(work: Workspace, count):
    names = [NAMES[n] if n < len(NAMES) else f"{'word ' * 40}{n}.safetensors" for n in range(count)]
    loras = [load_lora(work.lora(name, seed=n % 7, change=one_layer)) for n, name in enumerate(names)]
    found = compare(measure(loras))
    screen(comparison_text(found))
    renamed = [replace(lora, path=Path(HOSTILE[n % len(HOSTILE)] * 3)) for n, lora in enumerate(loras)]
    found = replace(found, measured=replace(found.measured, loras=renamed))
    assert in_order(screen(comparison_text(found)), "LoRA 1 ", "plain sum ", "advice ", "layer ")
    assert in_order(screen(attribution_text(attribute(loras[0], loras[1:]))), "file ", "source 1 ", "verdict ")


@pytest.mark.parametrize("name", HOSTILE)
def test_one_file_of_any_name(work: Workspace, loras, name):
    found = replace(describe(measure([load_lora(loras[0])])), file=name * 2)
    assert in_order(screen(description_text(found)), "file ", "made by ", "modules ", "rank ", "norm ", "norm of the change")


def test_a_merged_file_says_first_what_went_in_and_whether_it_is_right(work: Workspace, loras):
    entries = [{"lora": "me.safetensors", "ratio": 0.9}, {"lora": "style.safetensors", "ratio": -0.6}]
    out = run_all(work.job({"name": "a", "loras": entries}))[0].path
    found = describe(measure([load_lora(out)]))
    got = found.check["got"]
    assert got == pytest.approx([0.9, -0.6], rel=1e-3)
    head = flat(screen(description_text(found)).split("format ")[0])
    assert head.split(", by its metadata ")[1] == (
        "merged from 0.9 of me.safetensors and -0.6 of style.safetensors "
        f"check asked 0.9, -0.6, got {got[0]:g}, {got[1]:g} of them; rounding changed 0.2 %"
    )
    many = {"steps": [{"loras": [{"lora": HOSTILE[n % len(HOSTILE)], "ratio": n} for n in range(50)]}]}
    assert "and 45 more" in flat(screen(description_text(replace(found, recipe=many))))
    odd = [3, [7], [{"loras": "x"}], [{"loras": [1, {"lora": 2, "ratio": "x"}]}]]
    for recipe in ({}, *({"steps": steps} for steps in odd)):
        assert "merged from" not in screen(description_text(replace(found, recipe=recipe)))
    cut = found.check | {"error": 0.5, "kept": 0.75, "asked": [1e-30] * 200, "got": [None] * 200, "cut": True}
    assert "; 75 % of the energy kept" in flat(screen(description_text(replace(found, check=cut))))


def test_the_lists_fit():
    screen(methods_text())
    screen(presets_text())


# --- words and columns ---------------------------------------------------------------------------------------------------------


@examples(100)
@given(values=st.lists(NUMBERS, min_size=1, max_size=40))
def test_a_table_fits_with_any_numbers_and_shows_them(values):
    table = {m: values[n % len(values)] for n, m in enumerate(LAYERS)}
    lines = screen("\n".join(norm_table(table))).split("\n")
    for row in lines[1:31]:
        layer, *cells = row.split()
        assert len(cells) == 8, row
        for component, text in zip(COMPONENTS, cells, strict=True):
            (module,) = (m for m in MODULES.values() if (m.section, m.index, m.component) == ("layers", int(layer), component))
            assert float(text) == pytest.approx(table[module.name], rel=0.51, abs=1e-99)


def test_numbers_of_a_column_have_their_points_below_each_other():
    texts = ["0.315", "0.45", "9", "-", "1e-05", "-0.9", "12.3", "preset"]
    lines = aligned(texts)
    assert [line.strip() for line in lines] == texts and len(set(map(len, lines))) == 1
    assert len({line.index(".") for line in lines if "." in line}) == 1
    assert aligned(["0.45", "9", "-"]) == ["0.45", "9   ", "-   "]
    table = {m: [0.5, 0.125][n // 8 % 2] for n, m in enumerate(LAYERS)}
    assert len({line.index(".") for line in value_table(table)[1:]}) == 1


@examples(100)
@given(text=LABELS, most=st.integers(10, 60))
def test_a_name_is_squeezed_into_its_place(text, most):
    short = squeezed(text, most)
    assert columns(short) <= most and not any(map(steers, short))
    assert squeezed("my_character_v1_000002500.safetensors", 30) == "my_character_v1_000002500"
    assert squeezed("x" * most, most) == "x" * most and squeezed("abcdefghijkl", 11) == "abcd...ijkl"


PARTS = st.lists(st.text("xyz ", min_size=1, max_size=25).map(str.strip).filter(bool), min_size=1)


@examples(100)
@given(left=st.text("ab ", max_size=50), parts=PARTS)
def test_parts_beside_something_are_not_broken(left, parts):
    lines = beside(left, parts)
    assert lines[0].startswith(left) and all(len(line) <= 80 for line in lines)
    assert "".join(line[len(left) :] + " " for line in lines).strip() == ", ".join(parts)
    assert beside("x" * 70, ["LoKr of rank 8"]) == ["x" * 70 + "LoKr of", " " * 70 + "rank 8"]


@examples(100)
@given(text=LABELS, indent=st.integers(0, 8))
@example(text="0" * 71 + " " + "1" * 79 + " 2", indent=0)  # a broken word fills a line to the last letter
def test_a_sentence_is_wrapped(text, indent):
    lines = wrapped(f"note: {text}", indent)
    screen("\n".join(lines))
    assert lines[0].startswith(" " * indent + "note:") and all(line.startswith(" " * (indent + 2)) for line in lines[1:])


def test_numbers_in_a_row_and_paths():
    assert [ranges(x) for x in ([4], [1, 2], [1, 3], [1, 2, 3, 7, 9, 10])] == ["4", "1 and 2", "1 and 3", "1-3, 7, 9 and 10"]
    assert copyable("/a b  c/C:\\x") == "/a b  c/C:\\x" and copyable("/\u4e2d\n\x1b") == "/\u4e2d\\x0a\\x1b"


def test_a_report_of_a_step_with_a_long_path(work: Workspace, loras):
    deep = work.folder / "/".join(["a folder"] * 20) / "\u4e2d\u6587"
    deep.mkdir(parents=True)
    step = {"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1.0}], "copy_to": str(deep)}
    (done,) = run_all(work.job(step, output_dir=str(deep / "out")))
    for text in (plan_text(done.plan), done_text(done)):
        lines = screen(text, done.path, deep).split("\n")
        assert f"    {copyable(done.path)}" in lines and f"    {copyable(deep)}" in lines


def first_line(tmp_path, loras, **how) -> str:
    """The first line of the report of a merge of small LoRAs."""
    plan = merge(loras, **{"shapes": "free", "device": "cpu"} | how).plan(tmp_path / "judged.safetensors")
    (done,) = run_plans([plan], torch.device("cpu"))
    return " ".join(done_text(done).split("\n\n")[0].split())


def test_what_cancels_out_is_empty_and_not_right(tmp_path):
    path = write(tmp_path / "a.safetensors", lora())
    assert first_line(tmp_path, [(path, 1.0), (path, -1.0)]) == "judged is empty: the inputs cancel out, zeros were written"
    assert first_line(tmp_path, [(path, 0.0)]) == "judged is empty: nothing was asked for, zeros were written"


@pytest.mark.parametrize("sign", [1, -1])
def test_an_input_that_drowns_is_off_whichever_way_its_noise_points(tmp_path, sign):
    """Beside one that is ten million times as strong bfloat16 holds nothing of it, and what is measured of it is chance."""
    big = write(tmp_path / "big.safetensors", lora(seed=1, up=50.0))
    tiny = write(tmp_path / "tiny.safetensors", lora(seed=2, up=5e-6 * sign))
    assert re.search(
        r"is off: tiny (is mostly lost|came out stronger than asked), ", first_line(tmp_path, [(big, 1.0), (tiny, 1.0)])
    )


def test_a_rule_for_the_energy_that_max_did_not_let_be_met_is_said(tmp_path):
    loras = [(write(tmp_path / f"{n}.safetensors", lora(12, n)), 1.0) for n in range(3)]
    said = first_line(tmp_path, loras, rank={"energy": 0.99, "max": 24})
    assert re.search(r"is right: as far as max 24 allows, \d\d(\.\d)? % of the energy where 99 % was asked for", said)


def test_a_kept_step_is_judged_by_what_its_check_had_found(tmp_path):
    loras = [(write(tmp_path / f"{n}.safetensors", lora(8, n)), ratio) for n, ratio in enumerate((1.0, 0.2))]
    plan = merge(loras, rank=4, shapes="free", device="cpu").plan(tmp_path / "judged.safetensors")
    first, second = (next(iter(run_plans([plan], torch.device("cpu")))) for _ in range(2))
    word = done_text(first).split(": ")[0].rsplit(" ", 1)[1]
    assert (first.made, second.made) == (True, False)
    assert f"(made before by the same recipe), {word}: " in " ".join(done_text(second).split())
    assert flat(description_text(describe(measure([load_lora(plan.path)])))).count("of the energy kept") == 1


def test_of_many_inputs_the_one_that_is_off_is_shown(tmp_path):
    loras = [(write(tmp_path / f"{n}.safetensors", lora(1, n)), 1.0) for n in range(12)]
    weak = write(tmp_path / "weak.safetensors", lora(1, 99))
    plan = merge([*loras, (weak, 0.01)], rank=6, shapes="free", device="cpu").plan(tmp_path / "many.safetensors")
    (done,) = run_plans([plan], torch.device("cpu"))
    text = done_text(done)
    assert "weak" in text.split("\n\n")[0] and "  weak" in text.split("\n\n")[1]


def test_names_in_other_scripts_are_cut_between_letters(monkeypatch):
    for most in range(12, 60):
        shown = squeezed("日本語の長い名前" * 10 + ".safetensors", most)
        assert columns(shown) <= most and re.fullmatch(r"[^.\\]+\.\.\.[^.\\]+", shown)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    for most in range(12, 60):
        shown = squeezed("日本語の長い名前" * 10 + ".safetensors", most)
        assert len(shown) <= most and re.fullmatch(r"(\\u[0-9a-f]{4})*\.\.\.(\\u[0-9a-f]{4})*", shown)
