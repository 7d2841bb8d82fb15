"""What a file leaves open (formats.md section 7): asked, never guessed, and answered by alpha, qkv and drop."""

import json
import re

import pytest
import torch
from oracles.dense import product, read_deltas, relative
from oracles.producers import PRODUCERS
from reading import FUSED, QKV, SHAPES, VECTORS, Q, check, clear, dense, normal, question, refusal, sentence, store, write

from extensions_built_in.zit_merge import ZitMergeError, load_lora, merge

STEM = f"diffusion_model.{Q}"
PAIR = {f"{STEM}.lora_A.weight": normal(4, 24), f"{STEM}.lora_B.weight": normal(24, 4, seed=1)}
BARE = product(PAIR[f"{STEM}.lora_B.weight"], PAIR[f"{STEM}.lora_A.weight"])
ATTENTION = [m for m in SHAPES if ".attention." in m]


def renamed(tensors, new, old="diffusion_model."):
    """The same tensors under another prefix."""
    return {key.replace(old, new, 1): tensor for key, tensor in tensors.items()}


def bare(made, down=".lora_A.weight", up=".lora_B.weight", prefix="transformer."):
    """Module -> up @ down: what a program does that knows of no alpha."""
    stems = [key.removesuffix(down) for key in made.tensors if key.endswith(down)]
    return {s.removeprefix(prefix): product(made.tensors[s + up], made.tensors[s + down]) for s in stems}


def config(**fields):
    """Metadata as diffusers writes them, of a PEFT config."""
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in fields.items()})}


def saved(folder, tensors=PAIR, sidecar=None, name="adapter_model"):
    """What peft's save_pretrained leaves: tensors and, beside them, the config."""
    folder.mkdir(parents=True, exist_ok=True)
    if sidecar is not None:
        (folder / "adapter_config.json").write_bytes(sidecar if isinstance(sidecar, bytes) else json.dumps(sidecar).encode())
    return store(folder, renamed(tensors, "base_model.model."), name)


# --- 1: alpha in the metadata --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [("diffusers-alpha", "0.125"), ("simpletuner-peft", "0.5"), ("diffusers-rslora", "1.5"), ("peft", "1.5")],
)
def test_alpha_outside_of_the_tensors_is_used_and_said_with_its_number(tmp_path, name, number):
    path, made = write(tmp_path, name)  # rank 4
    lora = clear(path)
    check(lora, made.deltas)
    (remark,) = lora.remarks
    assert ("adapter_config.json" if name == "peft" else "lora_adapter_metadata") in remark
    assert f"alpha / rank = {number} " in remark
    assert "ComfyUI" in remark
    assert "alpha: none" in remark
    assert "\n" not in remark


def test_scales_that_differ_from_module_to_module_are_said_with_their_range(tmp_path):
    path, made = write(tmp_path, "diffusers-patterns")
    lora = clear(path)
    check(lora, made.deltas)
    bares = bare(made)
    scales = [float(made.deltas[m].norm() / bares[m].norm()) for m in made.deltas]
    (remark,) = lora.remarks
    assert f"alpha / rank = {min(scales):g} to {max(scales):g} " in remark


def test_alpha_that_is_the_rank_is_no_news(tmp_path):
    path, made = write(tmp_path, "diffusers")
    lora = clear(path)
    check(lora, made.deltas)
    assert lora.remarks == ()


@pytest.mark.parametrize("name", ["diffusers-alpha", "simpletuner-peft", "diffusers-rslora", "diffusers-patterns", "peft"])
def test_the_answers_about_alpha_in_the_metadata(tmp_path, name):
    path, made = write(tmp_path, name)
    bares = bare(made, prefix="base_model.model." if name == "peft" else "transformer.")
    lora = clear(path, alpha="none")  # ComfyUI's reading
    check(lora, bares)
    assert lora.remarks == ()
    check(clear(path, alpha="metadata"), made.deltas)
    ranks = clear(path).ranks
    check(clear(path, alpha=3), {m: delta * 3 / ranks[m] for m, delta in bares.items()})
    assert "no alpha keys" in question(path, alpha="key")


def test_alpha_in_both_places_is_applied_once(tmp_path):
    path, made = write(tmp_path, "simpletuner-comfyui")
    assert "lora_adapter_metadata" in made.metadata
    assert any(key.endswith(".alpha") for key in made.tensors)
    for answer in (None, "key", "metadata"):
        check(clear(path, alpha=answer), made.deltas)
    assert clear(path).remarks == ()
    check(clear(path, alpha="none"), bare(made, prefix="diffusion_model."))


def test_where_both_places_differ_the_key_wins_until_asked_otherwise(tmp_path):
    path = store(tmp_path, PAIR | {f"{STEM}.alpha": torch.tensor(2.0)}, metadata=config(r=4, lora_alpha=1))
    for answer, scale in ((None, 0.5), ("key", 0.5), ("metadata", 0.25), ("none", 1.0), (8, 2.0), (-4.0, -1.0)):
        check(clear(path, alpha=answer), {Q: BARE * scale})


def test_a_key_in_one_module_leaves_the_metadata_to_the_others(tmp_path):
    path, made = write(tmp_path, "diffusers-alpha")  # 1/8 everywhere
    tensors = dict(made.tensors) | {f"transformer.{Q}.alpha": torch.tensor(3.0)}
    lora = clear(store(tmp_path, tensors, metadata=made.metadata))
    check(lora, made.deltas | {Q: bare(made)[Q] * 0.75})


PATTERNS = [
    {"to_q": 1, "layers.0.attention.to_q": 2},
    {"layers.0.attention.to_q": 2, "to_q": 1},
    {"^layers.0.attention.to_q": 2, "attention.to_out.0": 3},
    {"o_q": 9, "q": 8, ".to_q": 7},  # parts of a name are no names
    {"layers.*.to_k": 5, r"\d+.attention.to_v": 6},
    {"to_(q|k)": 5, "refiner.0.attention.to_v": 6, "noise_refiner.0.attention.to_v": 4},
    {"layers.1": 5, "attention": 3, "": 2},
    {r"layers\.0\.attention\.to_q$": 5},
    {"to_q|to_k": 3},
    {"layers.0": 1, ".*": 7},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
@pytest.mark.parametrize("where", ["metadata", "sidecar"])
def test_alpha_pattern_by_pefts_rule(tmp_path, patterns, where):
    # PEFT's own function says which pattern a module has; test_lokr_loha has whole adapters of PEFT
    other = pytest.importorskip("peft.utils.other")
    tensors, rank = {}, 4
    for i, module in enumerate(ATTENTION):
        tensors |= {
            f"transformer.{module}.lora_A.weight": normal(rank, 24, seed=2 * i),
            f"transformer.{module}.lora_B.weight": normal(24, rank, seed=2 * i + 1),
        }
    fields = {"r": rank, "lora_alpha": 0.5, "alpha_pattern": patterns}
    if where == "metadata":
        path = store(tmp_path, tensors, metadata=config(**fields))
    else:
        path = saved(tmp_path, renamed(tensors, "diffusion_model.", "transformer."), fields)
    wanted = {}
    for module in ATTENTION:
        alpha = patterns.get(other.get_pattern_key(patterns, module), 0.5)
        factors = (tensors[f"transformer.{module}.lora_{f}.weight"] for f in "BA")
        wanted[module] = product(*factors) * alpha / rank
    check(clear(path), wanted)


UNREADABLE = {
    "broken": "{broken",
    "a list": "[]",
    "null": "null",
    "deep": "[" * 100_000,
    "no alpha": json.dumps({"transformer.r": 4}),
    "text": json.dumps({"transformer.lora_alpha": "4"}),
    "true": json.dumps({"transformer.lora_alpha": True}),
    "NaN": '{"transformer.lora_alpha": NaN}',
    "infinite": '{"transformer.lora_alpha": 1e999}',
    "beyond floats": '{"transformer.lora_alpha": 1' + "0" * 400 + "}",
    "another component": json.dumps({"text_encoder.lora_alpha": 4}),
    "pattern of texts": json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"to_q": "2"}}),
    "pattern list": json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": ["to_q"]}),
    "no expression": json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"to_(q": 2}}),
    "two halves": json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"a)|(b": 2}}),
    "flags inside": json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"(?i)TO_Q": 2}}),
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_metadata_that_can_not_be_read_are_a_question(tmp_path, text):
    path = store(tmp_path, renamed(PAIR, "transformer."), metadata={"lora_adapter_metadata": text})
    asked = question(path)
    assert "lora_adapter_metadata" in asked
    assert asked.endswith("set alpha: none (alpha is the rank) or a number")
    assert question(path, alpha="metadata") == asked
    check(clear(path, alpha="none"), {Q: BARE})
    check(clear(path, alpha=2), {Q: BARE / 2})


def test_metadata_that_can_not_be_read_do_not_matter_where_every_key_is_there(tmp_path):
    tensors = PAIR | {f"{STEM}.alpha": torch.tensor(2.0)}
    check(clear(store(tmp_path, tensors, metadata={"lora_adapter_metadata": "{"})), {Q: BARE / 2})


def test_alpha_that_was_asked_for_where_there_is_none(tmp_path):
    path, made = write(tmp_path, "ai-toolkit")
    assert "no alpha keys" in question(path, alpha="key")
    asked = question(path, alpha="metadata")
    assert "no lora_adapter_metadata" in asked
    assert "no adapter_config.json" in asked
    check(clear(path, alpha="none"), made.deltas)
    check(clear(path, alpha=2.0), {m: delta / 2 for m, delta in made.deltas.items()})


# --- 2: PEFT's adapters, whose alpha stands beside the file --------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_an_adapters_config_with_a_byte_order_mark(tmp_path, encoding):
    path = saved(tmp_path, sidecar=json.dumps({"r": 4, "lora_alpha": 8}).encode(encoding))
    check(clear(path), {Q: BARE * 2})
    told = config(r=4, lora_alpha=8)["lora_adapter_metadata"]
    path = store(tmp_path, renamed(PAIR, "transformer."), "x", metadata={"lora_adapter_metadata": f"\ufeff{told}"})
    check(clear(path), {Q: BARE * 2})


# What may take longer than anybody waits, or has no bound that its form tells.
ENDLESS = [
    *("(a+)+$", "(a*)*b", "([a-z]+)*x", r"(\w+\s?)*y", "(a|a)*b", "(.*)*", "((a?)*)*"),
    *(".*.*.*.*x", "(a|aa)" * 30, "a?" * 40 + "a" * 40, "(.*a){20}", "((((a+)+)+)+)+", "a{0,9}" * 12),
    *("(" * 600 + "a" + ")" * 600, "a{99999999999999999999}", r"(?=.*a)b", r"(?<!a)b", r"(x)(?(1)a|b)", "(?:(?i:a))"),
]


@pytest.mark.parametrize("pattern", ENDLESS, ids=range(len(ENDLESS)))
def test_patterns_that_may_never_end_are_not_tried(tmp_path, pattern):
    path = store(tmp_path, renamed(PAIR, "transformer."), metadata=config(r=4, lora_alpha=2, alpha_pattern={pattern: 1}))
    (asked,) = load_lora(path).questions
    assert "alpha_pattern" in asked and "set alpha: none" in asked
    check(clear(path, alpha="none"), {Q: BARE})


def test_more_patterns_than_a_model_has_modules_are_not_tried(tmp_path):
    patterns = {f"layers.{n}.x": 1 for n in range(100_000)}
    assert "takes too long" in question(
        store(tmp_path, renamed(PAIR, "transformer."), metadata=config(r=4, lora_alpha=2, rank_pattern=patterns))
    )


USUAL = [
    *("to_q", "^to_q", r"layers\.0\.attention\.to_q", r"^layers\.0\.attention\.to_q$", r"layers\.(0|1)\.attention\.to_q"),
    r".*\.to_q",
    *(
        r".*attention.*",
        r"layers\.\d+\.attention\.to_[qkv]",
        r"(layers|noise_refiner)\.\d{1,2}\.attention\.(to_q|to_k)",
        "(?:to_q)",
    ),
    *(r"layers\.([0-9]|1[0-9])\.attention\.to_q", r"(.*\.)?attention\.to_q", r"layers\.0\.[a-z]+\.to_q", r".+\.0\..+"),
]


@pytest.mark.parametrize("pattern", USUAL)
def test_patterns_as_people_write_them(tmp_path, pattern):
    other = pytest.importorskip("peft.utils.other")
    path = store(tmp_path, renamed(PAIR, "transformer."), metadata=config(r=4, lora_alpha=2, alpha_pattern={pattern: 8}))
    is_found = other.get_pattern_key([pattern], Q) == pattern and pattern != Q
    check(clear(path), {Q: BARE * (2 if is_found or pattern == Q else 0.5)})
    wanted = re.match(rf"(.*\.)?({pattern})$", Q)
    assert is_found == bool(wanted)


@pytest.mark.parametrize("name", ["adapter_model", "my_style"])
def test_an_adapter_with_its_config_beside_it(tmp_path, name):
    path = saved(tmp_path, sidecar={"r": 4, "lora_alpha": 6}, name=name)
    lora = clear(path)
    check(lora, {Q: BARE * 1.5})
    assert "adapter_config.json" in lora.remarks[0]
    assert "1.5" in lora.remarks[0]


def test_an_adapter_without_its_config(tmp_path):
    path = saved(tmp_path)
    asked = question(path)
    assert "adapter_config.json" in asked
    assert "put it there, or set alpha: none (alpha is the rank) or a number" in asked
    assert "adapter_config.json" in question(path, alpha="metadata")
    check(clear(path, alpha="none"), {Q: BARE})
    check(clear(path, alpha=6), {Q: BARE * 1.5})


@pytest.mark.parametrize(
    "sidecar",
    [b"{", b"", b"[]", b"\xff\xfe{}", b'{"r": 4}', b'{"lora_alpha": null}', b'{"lora_alpha": 1' + b"0" * 400 + b"}"],
    ids=["cut", "empty", "list", "not utf-8", "no alpha", "null", "beyond floats"],
)
def test_an_adapter_with_a_broken_config(tmp_path, sidecar):
    path = saved(tmp_path, sidecar=sidecar)
    assert "adapter_config.json" in question(path)
    check(clear(path, alpha="none"), {Q: BARE})
    check(clear(path, alpha=6), {Q: BARE * 1.5})


def test_a_folder_that_is_called_like_the_config(tmp_path):
    (tmp_path / "adapter_config.json").mkdir()
    assert "adapter_config.json" in question(saved(tmp_path))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "lora_unet__", ""])
@pytest.mark.parametrize("sidecar", [b'{"r": 4, "lora_alpha": 6}', b"{broken"])
def test_a_config_that_lies_beside_another_trainers_file_is_not_its_own(tmp_path, prefix, sidecar):
    saved(tmp_path, sidecar=sidecar)
    path = store(tmp_path, renamed(PAIR, prefix), "style")
    lora = clear(path)
    check(lora, {Q: BARE})
    assert lora.remarks == ()
    assert lora.adapter is None


def test_bare_names_under_pefts_own_file_name_have_its_config(tmp_path):
    saved(tmp_path, sidecar={"r": 4, "lora_alpha": 6})
    check(clear(store(tmp_path, renamed(PAIR, ""), "adapter_model")), {Q: BARE * 1.5})


def test_an_alpha_key_of_an_adapter_needs_no_config(tmp_path):
    path = saved(tmp_path, PAIR | {f"{STEM}.alpha": torch.tensor(2.0)})
    check(clear(path), {Q: BARE / 2})
    saved(tmp_path, sidecar={"r": 4, "lora_alpha": 6})
    path = saved(tmp_path, PAIR | {f"{STEM}.alpha": torch.tensor(2.0)})
    check(clear(path), {Q: BARE / 2})
    check(clear(path, alpha="metadata"), {Q: BARE * 1.5})


def test_the_metadata_of_the_file_go_before_what_lies_beside_it(tmp_path):
    saved(tmp_path, sidecar={"lora_alpha": 6})
    path = store(tmp_path, renamed(PAIR, "base_model.model."), "adapter_model", config(r=4, lora_alpha=2))
    check(clear(path), {Q: BARE / 2})


# --- 3: changed twice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["anime-z", "anime-z-alpha-apart"])
def test_equal_duplicates_count_once_and_are_said(tmp_path, name, dtype):
    path, made = write(tmp_path, name, dtype)
    doubled = [m for m in made.deltas if ".attention." in m]
    for answer in (None, "split"):
        lora = clear(path, qkv=answer)
        check(lora, made.deltas)
        assert set(lora.ranks.values()) == {4}  # of the split pairs, not 12 of the fused ones
    (remark,) = clear(path).remarks
    assert re.search(rf"\b{len(doubled)} modules\b", remark)
    assert "once" in remark
    lora = clear(path, qkv="fused")
    check(lora, made.deltas)
    assert {lora.ranks[m] for m in QKV} == {12}
    check(clear(path, qkv="sum"), {m: delta * (2 if m in doubled else 1) for m, delta in made.deltas.items()})


@pytest.fixture
def twice(tmp_path):
    """A file with q as a pair, and another q within a fused qkv: its path, the deltas of the one and of the other."""
    down, up = normal(3, 24, seed=2), normal(72, 3, seed=3)
    path = store(tmp_path, PAIR | {f"{FUSED}.lora_A.weight": down, f"{FUSED}.lora_B.weight": up})
    return path, {Q: BARE}, dict(zip(QKV, product(up, down).chunk(3), strict=True))


def test_a_split_and_a_fused_change_that_differ_are_a_question(twice):
    path, split, fused = twice
    asked = question(path)
    assert Q in asked
    assert f"{STEM}.lora_A.weight" in asked
    assert f"{FUSED}.lora_A.weight" in asked
    assert asked.endswith("set qkv: split, fused or sum")
    check(clear(path, qkv="split"), fused | split)  # k and v stand there once
    check(clear(path, qkv="fused"), fused)
    check(clear(path, qkv="sum"), fused | {Q: fused[Q] + split[Q]})
    assert clear(path, qkv="sum").ranks == {QKV[0]: 7, QKV[1]: 3, QKV[2]: 3}


def test_several_modules_that_differ_are_one_question(tmp_path):
    fused = {f"{FUSED}.lora_A.weight": normal(3, 24, seed=2), f"{FUSED}.lora_B.weight": normal(72, 3, seed=3)}
    split = PAIR | renamed(PAIR, "diffusion_model.layers.0.attention.to_v", STEM)
    asked = question(store(tmp_path, split | fused))
    assert "and 1 more module" in asked


@pytest.mark.parametrize("size", [2e-3, -1.0])
def test_a_small_difference_is_a_difference(tmp_path, size):
    # 0.2 % of one row in float32: far more than rounding, far less than one would see
    fused = {f"{FUSED}.lora_A.weight": PAIR[f"{STEM}.lora_A.weight"], f"{FUSED}.lora_B.weight": normal(72, 4, seed=1)}
    up = fused[f"{FUSED}.lora_B.weight"][:24].clone()
    up[5] *= 1 + size
    tensors = fused | {f"{STEM}.lora_A.weight": PAIR[f"{STEM}.lora_A.weight"], f"{STEM}.lora_B.weight": up}
    assert "qkv" in question(store(tmp_path, tensors))


@pytest.mark.parametrize("form", ["lokr", "loha", "diff"])
def test_equal_changes_in_two_forms_count_once(tmp_path, form):
    # the fused one is a LoRA of full rank that says the same
    name = {"lokr": "ai-toolkit-lokr", "loha": "musubi-loha", "diff": "lycoris-full"}[form]
    made = PRODUCERS[name].make(dict.fromkeys(QKV, (24, 24)), 2, 0, torch.float32)
    fused = torch.cat([made.deltas[m] for m in QKV]).float()
    path = store(tmp_path, made.tensors | {f"{FUSED}.lora_B.weight": fused, f"{FUSED}.lora_A.weight": torch.eye(24)})
    for answer in (None, "split", "fused"):
        check(clear(path, qkv=answer), made.deltas, 1e-5)
    assert "3 modules" in clear(path).remarks[0]
    check(clear(path, qkv="sum"), {m: 2 * delta for m, delta in made.deltas.items()}, 1e-5)


def test_two_changes_of_nothing_are_equal(tmp_path):
    path = store(tmp_path, {f"{STEM}.diff": torch.zeros(24, 24), f"{FUSED}.diff": torch.zeros(72, 24)})
    lora = clear(path)
    assert "count once" in lora.remarks[0]
    assert not dense(lora, Q).any()


def test_one_module_under_two_prefixes_with_equal_changes_counts_once(tmp_path):
    lora = clear(store(tmp_path, PAIR | renamed(PAIR, "transformer.")))
    check(lora, {Q: BARE})
    assert "count once" in lora.remarks[0]


def test_one_module_under_two_prefixes_with_different_changes_is_a_question_that_can_be_answered(tmp_path):
    other = {key: tensor * 2 for key, tensor in renamed(PAIR, "transformer.").items()}
    path = store(tmp_path, PAIR | other)
    asked = question(path)
    assert f"{STEM}.lora_A.weight" in asked
    assert f"transformer.{Q}.lora_A.weight" in asked
    check(clear(path, qkv="sum"), {Q: 5 * BARE})
    for answer in re.findall(r"\b(split|fused|sum)\b", asked.rpartition(":")[2]):
        clear(path, qkv=answer)  # what the sentence advises has to help


TALL = {f"{STEM}.lora_A.weight": normal(3, 24), f"{STEM}.lora_B.weight": normal(32, 3)}
TALL_FUSED = {f"{FUSED}.lora_A.weight": normal(3, 24), f"{FUSED}.lora_B.weight": normal(96, 3)}


@pytest.mark.parametrize("order", [("diffusion_model.", "transformer."), ("transformer.", "diffusion_model.")])
@pytest.mark.parametrize("other", [TALL, TALL_FUSED], ids=["split", "fused"])
@pytest.mark.parametrize("answer", [None, "split", "fused", "sum"])
def test_two_changes_of_two_sizes_are_not_one_modules(tmp_path, order, other, answer):
    path = store(tmp_path, renamed(PAIR, order[0]) | renamed(other, order[1]))
    answers = {"qkv": answer} if answer else {}
    with pytest.raises(ZitMergeError) as error:
        merge([(path, {"ratio": 1.0} | answers)], shapes="free").save(tmp_path / "out.safetensors")
    assert Q in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sum_of_two_sizes_is_a_sentence_when_it_is_read(tmp_path):
    path = store(tmp_path, PAIR | {f"{FUSED}.lora_A.weight": normal(3, 24), f"{FUSED}.lora_B.weight": normal(96, 3)})
    with pytest.raises(ZitMergeError, match=Q):
        load_lora(path, qkv="sum")[Q]


# --- 7 and 8: alphas that can hardly be meant ----------------------------------------------------------------------------------


def test_an_alpha_of_zero_is_a_question(tmp_path):
    path, made = write(tmp_path, "musubi")
    key = f"lora_unet_{Q.replace('.', '_')}"
    path = store(tmp_path, made.tensors | {f"{key}.alpha": torch.tensor(0.0)}, "zero")
    asked = question(path)
    assert asked.startswith(f"{key}.alpha is 0")
    assert "more" not in asked
    assert "alpha: none (alpha is the rank)" in asked
    assert "alpha: key (no effect)" in asked
    lora = clear(path, alpha="key")
    assert not dense(lora, Q).any()
    rest = {m: delta for m, delta in made.deltas.items() if m != Q}
    assert all(relative(dense(lora, m), delta) < 1e-6 for m, delta in rest.items())
    # musubi's alpha is 1, the rank 4
    check(clear(path, alpha="none"), {m: 4 * delta for m, delta in made.deltas.items()})


def test_many_alphas_of_zero_are_one_question(tmp_path):
    _, made = write(tmp_path, "musubi")
    path = store(tmp_path, {k: torch.tensor(0.0) if k.endswith(".alpha") else t for k, t in made.tensors.items()}, "zeros")
    assert f"and {len(made.deltas) - 1} more is 0" in question(path)
    lora = clear(path, alpha="key")
    assert not any(dense(lora, module).any() for module in lora)


def test_the_one_alpha_of_a_fused_qkv_is_one_zero(tmp_path):
    tensors = {f"{FUSED}.lora_A.weight": normal(3, 24), f"{FUSED}.lora_B.weight": normal(72, 3)}
    assert "more" not in question(store(tmp_path, tensors | {f"{FUSED}.alpha": torch.tensor(0.0)}))


def test_zero_of_a_product_of_a_lokr_is_a_question_and_of_whole_factors_is_none(tmp_path):
    product_ = {f"{STEM}.lokr_w1": normal(4, 4), f"{STEM}.lokr_w2_a": normal(6, 2), f"{STEM}.lokr_w2_b": normal(2, 6)}
    whole = {f"{STEM}.lokr_w1": normal(4, 4), f"{STEM}.lokr_w2": normal(6, 6)}
    assert "is 0" in question(store(tmp_path, product_ | {f"{STEM}.alpha": torch.tensor(0.0)}))
    clear(store(tmp_path, whole | {f"{STEM}.alpha": torch.tensor(0.0)}))


@pytest.mark.parametrize("name", ["musubi", "musubi-lokr", "musubi-loha", "none-converter"])
def test_a_negative_alpha_keeps_its_sign_and_is_said(tmp_path, name):
    _, made = write(tmp_path, name)
    path = store(tmp_path, {k: -t if k.endswith(".alpha") else t for k, t in made.tensors.items()}, "negative")
    lora = clear(path)
    check(lora, {m: -delta for m, delta in made.deltas.items()})
    (remark,) = lora.remarks
    assert "negative" in remark
    assert f"{len(made.deltas)} modules" in remark


@pytest.mark.parametrize("alpha", [1e10, -1e10])
def test_a_huge_alpha_of_a_pair_counts(tmp_path, alpha):
    check(clear(store(tmp_path, PAIR | {f"{STEM}.alpha": torch.tensor(alpha)})), {Q: BARE * alpha / 4})


@pytest.mark.parametrize("alpha", [float("inf"), float("nan")])
def test_an_alpha_that_is_no_number_can_be_answered(tmp_path, alpha):
    path = store(tmp_path, PAIR | {f"{STEM}.alpha": torch.tensor(alpha)}, metadata=config(r=4, lora_alpha=2))
    for answers in ({}, {"alpha": "key"}):
        message = refusal(path, **answers)
        assert f"{STEM}.alpha is {alpha}" in message
        assert "set alpha: none (alpha is the rank) or a number" in message
    check(clear(path, alpha="none"), {Q: BARE})
    check(clear(path, alpha=2), {Q: BARE / 2})
    check(clear(path, alpha="metadata"), {Q: BARE / 2})


# --- 9: another model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_A.weight": (4, 2304), "lora_B.weight": (2304, 4)},
        {"lokr_w1": (48, 48), "lokr_w2": (48, 48)},
        {"hada_w1_a": (2304, 2), "hada_w1_b": (2, 2304), "hada_w2_a": (2304, 2), "hada_w2_b": (2, 2304)},
        {"diff": (2304, 2304)},
    ],
    ids=["lora", "lokr", "loha", "diff"],
)
@pytest.mark.parametrize("shapes", ["strict", "free"])
def test_another_models_shapes_are_refused_by_a_merge(tmp_path, tensors, shapes):
    # Lumina 2 has Z-Image's names at a width of 2304; free takes one consistent size, and 16 columns of adaLN are none beside it
    path = store(tmp_path, {f"{STEM}.{name}": torch.ones(shape) for name, shape in tensors.items()})
    beside, _ = write(tmp_path, "ai-toolkit")
    loras = [(path, 1.0)] if shapes == "strict" else [(beside, 1.0), (path, 1.0)]
    with pytest.raises(ZitMergeError) as error:
        merge(loras, shapes=shapes).plan(tmp_path / "out.safetensors")
    message = str(error.value)
    assert message.startswith("lora.safetensors changes ") and "\n" not in message
    for word in (Q, "2304 x 2304", "3840 x 3840" if shapes == "strict" else "24 x 24", "another model"):
        assert word in message


# --- vectors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_left_out_only_when_asked(tmp_path, name):
    path, made = write(tmp_path, name)
    kinds = VECTORS[name]
    lora = load_lora(path)
    assert len(lora.questions) == len(kinds)
    for kind, asked in zip(kinds, lora.questions, strict=True):
        key = asked.split()[0]
        assert made.tensors[key].ndim == 1
        assert f" a {kind}, " in asked
        assert asked.endswith(f"set drop: [{kind}] to merge the rest without it")
        assert "\n" not in asked
    assert lora.skipped == ()
    for kind in kinds:  # one of two answers leaves the other question
        left = load_lora(path, drop=[kind])
        assert len(left.questions) == len(kinds) - 1
        assert not any(f"drop: [{kind}]" in asked for asked in left.questions)
    lora = clear(path, drop=kinds)
    assert set(lora.skipped) == {key for key, tensor in made.tensors.items() if tensor.ndim == 1}
    check(lora, made.deltas)


def test_what_was_to_be_dropped_and_is_not_there_is_no_matter(tmp_path):
    path, made = write(tmp_path, "ai-toolkit")
    lora = clear(path, drop=["norm", "bias"])
    assert lora.skipped == ()
    check(lora, made.deltas)


def test_a_file_of_vectors_alone_says_so(tmp_path):
    path = store(tmp_path, {"diffusion_model.layers.0.attention_norm1.diff": normal(24)})
    for drop in ((), ("norm",)):
        message = refusal(path, drop=drop)
        assert "norm" in message
        assert "another model" not in message
        assert "text-encoder" not in message


def test_a_vector_of_no_known_module_is_not_dropped_in_silence(tmp_path):
    path = store(tmp_path, PAIR | {"diffusion_model.layers.0.shortcut.diff_b": normal(24)})
    assert load_lora(path, drop=["norm", "bias"]).unmatched == ("diffusion_model.layers.0.shortcut.diff_b",)


# --- through the public merge --------------------------------------------------------------------------------------------------

ZERO = {f"{STEM}.alpha": torch.tensor(0.0)}
OPEN = {
    "zero none": (lambda folder: store(folder, PAIR | ZERO), {"alpha": "none"}, {Q: BARE}),
    "zero key": (lambda folder: store(folder, PAIR | ZERO), {"alpha": "key"}, {Q: 0 * BARE}),
    "zero number": (lambda folder: store(folder, PAIR | ZERO), {"alpha": 2}, {Q: BARE / 2}),
    "peft none": (lambda folder: saved(folder / "peft"), {"alpha": "none"}, {Q: BARE}),
    "peft number": (lambda folder: saved(folder / "peft"), {"alpha": -6.0}, {Q: BARE * -1.5}),
    "metadata": (lambda folder: store(folder, PAIR, metadata={"lora_adapter_metadata": "{"}), {"alpha": "none"}, {Q: BARE}),
    "norm": (lambda folder: store(folder, PAIR | {"layers.0.ffn_norm1.w_norm": normal(24)}), {"drop": ["norm"]}, {Q: BARE}),
    "bias": (lambda folder: store(folder, PAIR | {f"{STEM}.diff_b": normal(24)}), {"drop": ["bias"]}, {Q: BARE}),
    "twice split": (lambda folder: store(folder, PAIR | {f"{FUSED}.diff": torch.eye(72, 24)}), {"qkv": "split"}, {Q: BARE}),
    "twice fused": (
        lambda folder: store(folder, PAIR | {f"{FUSED}.diff": torch.eye(72, 24)}),
        {"qkv": "fused"},
        {Q: torch.eye(24).double()},
    ),
    "twice sum": (
        lambda folder: store(folder, PAIR | {f"{FUSED}.diff": torch.eye(72, 24)}),
        {"qkv": "sum"},
        {Q: BARE + torch.eye(24).double()},
    ),
}


@pytest.mark.parametrize("case", OPEN)
@pytest.mark.parametrize("where", ["mapping", "load_lora", "both"])
def test_a_merge_refuses_the_question_and_takes_the_answer(tmp_path, case, where):
    make, answer, wanted = OPEN[case]
    path, out = make(tmp_path), tmp_path / "out.safetensors"
    how = {"shapes": "free", "dtype": "fp32"}
    with pytest.raises(ZitMergeError) as error:
        merge([(path, 0.5)], **how).save(out)
    message = sentence(error, "loras[0]")
    assert message.startswith(path.name)
    assert question(path) in message
    assert not out.exists()
    with pytest.raises(ZitMergeError):  # an open question at strength 0 is still one
        merge([(load_lora(path), 0.0)], **how).plan(out)
    wrong = {"alpha": 7} if "alpha" in answer else {}
    lora, weights = {
        "mapping": (path, {"ratio": 0.5, **answer}),
        "load_lora": (load_lora(path, **answer), 0.5),
        "both": (load_lora(path, **wrong), {"ratio": 0.5, **answer}),  # the mapping wins
    }[where]
    found = read_deltas(merge([(lora, weights)], **how).save(out))
    for module, delta in wanted.items():
        assert float((found[module] - 0.5 * delta).norm()) < 1e-6 * float(BARE.norm())


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ({"alpha": "nonne"}, "alpha"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": True}, "alpha"),
        ({"qkv": "both"}, "qkv"),
        ({"drop": ["norms"]}, "drop"),
        ({"drop": "norm"}, "drop"),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["mapping", "load_lora"])
def test_an_answer_that_is_none_is_refused(tmp_path, answer, key, where):
    path = store(tmp_path, PAIR)
    with pytest.raises(ZitMergeError) as error:
        if where == "mapping":
            merge([(path, {"ratio": 1.0, **answer})], shapes="free").plan(tmp_path / "out.safetensors")
        else:
            load_lora(path, **answer)
    assert key in str(error.value)
    assert "\n" not in str(error.value)


def test_what_was_decided_is_told_by_the_plan(tmp_path):
    path, _ = write(tmp_path, "diffusers-alpha")
    remark = load_lora(path).remarks[0]
    plan = merge([(path, 1.0)], shapes="free").plan(tmp_path / "out.safetensors")
    assert any(remark in warning for warning in plan.warnings)


# --- every sentence ------------------------------------------------------------------------------------------------------------

BROKEN = {
    "half": {f"{STEM}.lora_A.weight": (4, 24), "transformer.layers.1.attention.to_q.lora_B.weight": (24, 4)},
    "no pair": {f"{STEM}.lora_A.weight": (4, 24), f"{STEM}.lora_B.weight": (24, 3)},
    "alpha alone": {f"{STEM}.alpha": ()},
    "two alphas": {f"{STEM}.lora_A.weight": (4, 24), f"{STEM}.lora_B.weight": (24, 4), f"{STEM}.alpha": (2,)},
    "fused": {f"{FUSED}.lora_A.weight": (4, 24), f"{FUSED}.lora_B.weight": (40, 4)},
    "loha": {f"{STEM}.hada_{n}": s for n, s in (("w1_a", (24, 2)), ("w1_b", (2, 24)), ("w2_a", (24, 2)), ("w2_b", (2, 20)))},
    "lokr ranks": {f"{STEM}.lokr_{n}": s for n, s in (("w1_a", (4, 2)), ("w1_b", (2, 4)), ("w2_a", (6, 3)), ("w2_b", (3, 6)))},
    "lokr 3-D": {f"{STEM}.lokr_w1": (4, 4), f"{STEM}.lokr_w2": (6, 6, 1)},
    "diff 1-D": {f"{STEM}.diff": (24,)},
    "dora": {f"{STEM}.dora_scale": (24, 1)},
    "two names": {f"{STEM}.lora_A.weight": (4, 24), f"{STEM}.lora_A": (4, 24), f"{STEM}.lora_B": (24, 4)},
    "another model": {"double_blocks.0.lora_A.weight": (4, 24)},
    "nothing": {},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_every_refusal_says_what_to_do(tmp_path, broken):
    path = store(tmp_path, {key: torch.ones(shape) for key, shape in BROKEN[broken].items()})
    advice = re.split(r"[:,;] ", refusal(path))[1:]
    verbs = ("get", "set", "use", "put", "keep", "give", "train", "take", "merge", "it was trained for another model")
    assert any(part.startswith(verbs) for part in advice), advice


def test_an_integer_is_refused_with_what_to_do(tmp_path):
    path = store(tmp_path, PAIR | {f"{STEM}.lora_A.weight": torch.ones(4, 24, dtype=torch.int8)})
    assert re.search(r"[:,;] (get|use|convert|save) ", refusal(path))
