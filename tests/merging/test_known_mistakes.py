"""The silent mistakes of other merge tools, each beside our answer to the same question.

Every case writes the wrong arithmetic down in a few lines, from its description, and applies it as a client would read the
result. The test shows that on these LoRAs it is off by more than WRONG, so that the data could tell, and that our file is off
by rounding only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from oracles.dense import best_error, product, read_deltas, relative, weighted_sum
from pairs import BLOCK, DIM, Lora, Pair, deltas, later_save, lora, rotated, write
from safetensors.torch import load_file, save_file

from extensions_built_in.zit_merge import ZitMergeError, load_lora, merge

WRONG = 0.05
RIGHT = 1e-6


def ours(folder, loras, ratios, **how):
    """What our file holds, read without our reader."""
    paths = [write(folder / f"{i}.safetensors", one) for i, one in enumerate(loras)]
    settled = merge(list(zip(paths, ratios, strict=True)), **{"shapes": "free", "dtype": "fp32", "device": "cpu"} | how)
    return read_deltas(settled.save(folder / "out.safetensors"))


def weighed(loras, ratios, delta=lambda pair: pair.delta):
    """sum_i ratio_i * delta of every module, for some idea of what a pair's delta is."""
    return weighted_sum([({m: delta(p) for m, p in one.items()}, s) for one, s in zip(loras, ratios, strict=True)])


def errors(found, wanted):
    return torch.tensor([relative(found[m], wanted[m]) for m in wanted])


def worst(found, wanted):
    """The largest error of a module; NaN if there is one (Python's max would pass over it)."""
    return float(errors(found, wanted).max())


def least(found, wanted):
    """The smallest error of a module."""
    return float(errors(found, wanted).min())


def padded(pair, rank):
    """Zeros appended to both factors, alpha untouched."""
    more = rank - pair.rank
    return Pair(torch.nn.functional.pad(pair.up, (0, more)), torch.nn.functional.pad(pair.down, (0, 0, 0, more)), pair.alpha)


def add_factors(loras, on_up, on_down, alpha):
    """A to A and B to B, zero-padded to the largest rank: what all the factor-wise tools have in common.

    Args:
        loras: The inputs.
        on_up: The factor on the up of each LoRA.
        on_down: The factor on the down of each LoRA.
        alpha: The alphas of one module -> that of the result.
    """
    merged = {}
    for module in loras[0]:
        rank = max(one[module].rank for one in loras)
        pairs = [padded(one[module], rank) for one in loras]
        up = sum(s * p.up for s, p in zip(on_up, pairs, strict=True))
        down = sum(s * p.down for s, p in zip(on_down, pairs, strict=True))
        alphas = [p.alpha for p in pairs]
        merged[module] = Pair(up, down, None if alphas[0] is None else alpha(alphas)).delta
    return merged


# --- AI-Toolkit's own merge_loras.py: the strength multiplies A, B and alpha, and equal keys are added -------------------------


def host(loras, strengths):
    return add_factors(loras, strengths, strengths, lambda alphas: sum(s * a for s, a in zip(strengths, alphas, strict=True)))


@pytest.mark.parametrize(
    ("loras", "strengths", "error"),
    [
        ([lora()], [0.5], 0.5),  # half of the half that was wanted
        ([lora(alpha=8)], [0.5], 0.75),  # a quarter of it
        ([lora(), lora(seed=1)], [0.5, 0.5], 0.70),  # what its dialog proposes for two
        ([lora(), lora(seed=1)], [1, 1], 1.0),  # nothing but cross terms is wrong here
        ([lora(), lora(seed=1), lora(seed=2)], [1 / 3] * 3, 0.81),  # and for three
        ([lora(8), lora(4, seed=1)], [1, 1], 0.81),  # ranks that differ are padded with zeros
        ([lora(8, alpha=8), lora(4, seed=1, alpha=4)], [1, 1], 1.32),  # and their alphas are added: 12 over rank 8
        ([lora(), lora(seed=1)], [1, -1], 1.72),  # minus times minus: the second LoRA's sign is lost
    ],
    ids=["one", "one, alpha", "half each", "both", "third each", "two ranks", "two ranks, alphas", "minus"],
)
def test_strength_multiplied_into_a_b_and_alpha(tmp_path, loras, strengths, error):
    wanted = weighed(loras, strengths)
    found = host(loras, strengths)
    # the errors that were measured with that script on larger LoRAs: these lines are what it does
    assert sum(relative(found[m], wanted[m]) for m in wanted) / len(wanted) == pytest.approx(error, rel=0.15)
    assert least(found, wanted) > WRONG
    assert worst(ours(tmp_path, loras, strengths), wanted) < RIGHT


def test_the_second_loras_sign_is_lost_there_and_kept_here(tmp_path):
    loras = [lora(), lora(seed=1)]
    second = deltas(loras[1])

    def share(found):  # of the second LoRA in the result
        return {m: float((found[m] * d).sum() / d.square().sum()) for m, d in second.items()}

    assert all(s > 0.5 for s in share(host(loras, [1, -1])).values())
    # the first LoRA has a random part along the second, the same on both sides
    chance = share(deltas(loras[0]))
    found = share(ours(tmp_path, loras, [1, -1]))
    assert all(s == pytest.approx(chance[m] - 1, abs=1e-5) for m, s in found.items())


# --- the others ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """A wrong merge.

    Attributes:
        name: What is wrong.
        who: Where it was found.
        wrong: (loras, ratios) -> module -> delta.
        loras: On which the mistake shows.
        ratios: On which the mistake shows.
    """

    name: str
    who: str
    wrong: Callable[[Sequence[Lora], Sequence[float]], dict[str, torch.Tensor]]
    loras: Sequence[Lora]
    ratios: Sequence[float]


def kohya_sum(loras, ratios):
    """A to A and B to B, each times sqrt(alpha / base alpha) and the ratio, without its sign on up."""
    merged = {}
    for module, base in loras[0].items():
        roots = [(one[module].alpha / base.alpha) ** 0.5 for one in loras]
        up = sum(abs(s) * r * one[module].up for s, r, one in zip(ratios, roots, loras, strict=True))
        down = sum(s * r * one[module].down for s, r, one in zip(ratios, roots, loras, strict=True))
        merged[module] = Pair(up, down, base.alpha).delta
    return merged


def kohya_concat(loras, ratios):
    """The ranks add up, the first LoRA's alpha stays: alpha / rank falls."""
    merged = {}
    for module, base in loras[0].items():
        up = torch.cat([s * one[module].up for s, one in zip(ratios, loras, strict=True)], 1)
        merged[module] = Pair(up, torch.cat([one[module].down for one in loras]), base.alpha).delta
    return merged


def clamp_quantile(loras, ratios):
    """A dense SVD of enough rank, then U S and V' cut at the 0.99 quantile of their entries."""
    merged = {}
    for module, delta in weighed(loras, ratios).items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        rank = sum(one[module].rank for one in loras)
        up, down = (u * s)[:, :rank], vh[:rank]
        high = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.99)
        merged[module] = up.clamp(-high, high) @ down.clamp(-high, high)
    return merged


def clamp_factors(loras, ratios):
    """Factors cut at +-1."""
    return weighed(loras, ratios, lambda p: product(p.up.clamp(-1, 1), p.down.clamp(-1, 1)) * p.scale)


def average_factors(loras, ratios):
    """The mean of the As and of the Bs: right for two saves of one run, not for one LoRA in two gauges."""
    return add_factors(loras, ratios, ratios, lambda alphas: alphas[0])


def ratio_on_both(loras, ratios):
    """The ratio on up and on down."""
    return weighed(loras, [s * s for s in ratios])


def root_on_the_delta(loras, ratios):
    """The square root that two factors would need, on the one delta."""
    return weighed(loras, [s**0.5 for s in ratios])


def root_of_a_negative(loras, ratios):
    """sqrt|w| on up and on down: the sign is gone."""
    return ratio_on_both(loras, [abs(s) ** 0.5 for s in ratios])


def nan_root_of_a_negative(loras, ratios):
    """A fractional power of the weight itself."""
    return ratio_on_both(loras, [float(torch.tensor(s) ** 0.5) for s in ratios])


def linear_on_factors(loras, ratios):
    """sqrt of the weights and of the scales on A and on B, then A to A and B to B: cross terms."""
    roots = [(s * next(iter(one.values())).scale) ** 0.5 for s, one in zip(ratios, loras, strict=True)]
    bare = [{m: Pair(p.up, p.down) for m, p in one.items()} for one in loras]
    return add_factors(bare, roots, roots, None)


def alpha_ignored(loras, ratios):
    """Scale 1, whatever alpha says."""
    return weighed(loras, ratios, lambda p: product(p.up, p.down))


def alpha_averaged(loras, ratios):
    """Exact stacking, but one mean alpha over the new rank."""
    merged = {}
    for module in loras[0]:
        pairs = [one[module] for one in loras]
        up = torch.cat([s * p.up for s, p in zip(ratios, pairs, strict=True)], 1)
        merged[module] = Pair(up, torch.cat([p.down for p in pairs]), sum(p.alpha for p in pairs) / len(pairs)).delta
    return merged


def alpha_of_the_first(loras, ratios):
    """Every LoRA at the first one's scale."""
    first = next(iter(loras[0].values())).scale
    return weighed(loras, ratios, lambda p: product(p.up, p.down) * first)


def alpha_is_the_new_rank(loras, ratios):
    """alpha written as the rank, as it should be, without alpha / rank having gone into the factors."""
    return alpha_ignored(loras, ratios)


def scale_twice(loras, ratios):
    """alpha / rank in the delta, and again when it is taken apart."""
    return weighed(loras, ratios, lambda p: p.delta * p.scale)


def ranks_padded_and_added(loras, ratios):
    """Zero components until the ranks agree, then A to A and B to B."""
    return add_factors(loras, ratios, [1.0] * len(loras), lambda alphas: alphas[0])


def qkv_keyed_as_one(loras, ratios):
    """to_q, to_k and to_v under one key, as if three LoRAs wanted to change it: each gets the mean of the three."""
    found = weighed(loras, ratios)
    qkv = [m for m in found if m.endswith((".to_q", ".to_k", ".to_v"))]
    mean = sum(found[m] for m in qkv) / 3
    return {m: mean if m in qkv else d for m, d in found.items()}


def bf16_arithmetic(loras, ratios):
    """Products and sums in bfloat16."""
    merged = {}
    for module in loras[0]:
        total = 0
        for s, one in zip(ratios, loras, strict=True):
            p = one[module]
            total = total + (p.up.bfloat16() @ p.down.bfloat16()) * torch.tensor(s * p.scale).bfloat16()
        merged[module] = total.double()
    return merged


def missing_modules_at_full_strength(loras, ratios):
    """What only one LoRA has is copied, its weight forgotten."""
    merged = weighed(loras, ratios)
    for module in merged:
        having = [one for one in loras if module in one]
        if len(having) == 1:
            merged[module] = having[0][module].delta
    return merged


def missing_modules_renormalised(loras, ratios):
    """Weights made to add up to 1 over the LoRAs that have the module."""
    merged = weighed(loras, ratios)
    for module in merged:
        merged[module] = merged[module] / sum(s for s, one in zip(ratios, loras, strict=True) if module in one)
    return merged


def bf16(one):
    return {m: Pair(p.up.bfloat16(), p.down.bfloat16(), p.alpha) for m, p in one.items()}


ONE, TWO = lora(8, 0, alpha=8), lora(4, 1, alpha=4)
BARE, BARE_TWO = lora(8, 0), lora(8, 1)
LOW, HIGH = lora(8, 0, alpha=1), lora(8, 1, alpha=16)
ATTENTION_ONLY = {m: p for m, p in lora(8, 1).items() if "attention" in m}

MISTAKES = [
    Mistake("sum of factors with sqrt(alpha)", "kohya sd-scripts", kohya_sum, [LOW, HIGH], [0.6, 0.6]),
    Mistake("sum of factors, one LoRA: ratio squared", "kohya sd-scripts", kohya_sum, [LOW], [0.5]),
    Mistake("sum of factors, negative ratio", "kohya sd-scripts", kohya_sum, [LOW, HIGH], [1.0, -1.0]),
    Mistake("concat keeps the first alpha", "kohya sd-scripts --concat", kohya_concat, [ONE, TWO], [1.0, 1.0]),
    Mistake("concat keeps the first alpha, .6", "kohya sd-scripts --concat", kohya_concat, [ONE, ONE], [0.6, 0.6]),
    Mistake("clamped at the .99 quantile", "kohya sd-scripts, supermerger", clamp_quantile, [BARE, BARE_TWO], [1.0, 1.0]),
    Mistake("factors clamped", "LoraStudio, Z-Fuse", clamp_factors, [lora(up=2.0, down=0.0025)], [1.0]),
    Mistake(
        "one LoRA averaged with itself in another gauge", "all factor sums", average_factors, [BARE, rotated(BARE)], [0.5, 0.5]
    ),
    Mistake("two LoRAs averaged by factors", "all factor sums", average_factors, [BARE, BARE_TWO], [0.5, 0.5]),
    Mistake("ratio on both factors", "supermerger", ratio_on_both, [ONE, TWO], [0.5, 0.5]),
    Mistake("root of the ratio on the delta", "supermerger, same to Strength", root_on_the_delta, [ONE, TWO], [0.5, 0.5]),
    Mistake("sqrt|w| loses the sign", "PEFT linear", root_of_a_negative, [ONE, TWO], [1.0, -0.5]),
    Mistake("root of a negative weight", "resize_lora", nan_root_of_a_negative, [ONE, TWO], [1.0, -0.5]),
    Mistake("weights and scales by their roots on A and B", "PEFT linear", linear_on_factors, [LOW, HIGH], [0.7, 0.3]),
    Mistake("alpha ignored", "SSR-Merge, Core Space", alpha_ignored, [LOW, HIGH], [0.5, 0.5]),
    Mistake("alpha written as the rank, not folded in", "LoraStudio", alpha_is_the_new_rank, [LOW], [1.0]),
    Mistake("alpha averaged", "GraftingRayman, Flux-Lora-Block-Merger", alpha_averaged, [LOW, HIGH], [1.0, 1.0]),
    Mistake("alpha of the first LoRA", "Power-Merger", alpha_of_the_first, [LOW, HIGH], [1.0, 1.0]),
    Mistake("scale applied twice", "PEFT svd before #3111, LyCORIS", scale_twice, [LOW, HIGH], [0.5, 0.5]),
    Mistake(
        "ranks padded and added",
        "EasyLoRAMerger, Flux-Lora-Block-Merger",
        ranks_padded_and_added,
        [lora(8), lora(4, 1)],
        [1.0, 1.0],
    ),
    Mistake("q, k and v keyed as one", "Z-Fuse", qkv_keyed_as_one, [BARE, BARE_TWO], [0.5, 0.5]),
    Mistake("bfloat16 arithmetic", "Z-Fuse", bf16_arithmetic, [bf16(later_save(BARE, 0.03)), bf16(BARE)], [1.0, -1.0]),
    Mistake(
        "missing modules at full strength",
        "not seen, but near",
        missing_modules_at_full_strength,
        [BARE, ATTENTION_ONLY],
        [0.5, 0.5],
    ),
    Mistake(
        "missing modules renormalised", "not seen, but near", missing_modules_renormalised, [BARE, ATTENTION_ONLY], [0.5, 0.5]
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.name for m in MISTAKES])
def test_mistake(tmp_path, mistake):
    wanted = weighed(mistake.loras, mistake.ratios)
    wrong = mistake.wrong(mistake.loras, mistake.ratios)
    assert not worst(wrong, wanted) < WRONG  # `not <`: a NaN is wrong too
    assert worst(ours(tmp_path, mistake.loras, mistake.ratios), wanted) < RIGHT


def test_truncation_after_factor_sums_hides_nothing(tmp_path):
    # The same question at a fixed rank: even the best rank-8 answer has an error, so being wrong must be told from being cut.
    loras, ratios = [BARE, BARE_TWO], [0.5, 0.5]
    wanted = weighed(loras, ratios)
    wrong, found = average_factors(loras, ratios), ours(tmp_path, loras, ratios, rank=8)
    for module, delta in wanted.items():
        best = best_error(delta, 8)
        assert float((wrong[module] - delta).norm()) > best + WRONG * float(delta.norm())
        assert float((found[module] - delta).norm()) < best + RIGHT * float(delta.norm())


# --- keys ----------------------------------------------------------------------------------------------------------------------


def test_two_trainers_names_of_one_module_are_unified(tmp_path):
    """Keyed by their text, the two pass side by side, and a client that knows one naming loads one LoRA."""
    ours_named = write(tmp_path / "a.safetensors", BARE)
    flat = write(tmp_path / "b.safetensors", BARE_TWO, lambda m: "lora_unet_" + m.replace(".", "_"))
    wanted = weighed([BARE, BARE_TWO], [0.5, 0.5])
    keywise = {f"diffusion_model.{m}": 0.5 * p.delta for m, p in BARE.items()}
    keywise |= {"lora_unet_" + m.replace(".", "_"): 0.5 * p.delta for m, p in BARE_TWO.items()}
    seen = {m: keywise[f"diffusion_model.{m}"] for m in wanted}
    assert least(seen, wanted) > WRONG
    settled = merge([(ours_named, 0.5), (flat, 0.5)], shapes="free", dtype="fp32")
    assert worst(read_deltas(settled.save(tmp_path / "out.safetensors")), wanted) < RIGHT


def test_no_key_falls_back_to_the_nearest_substring(tmp_path):
    """layers.1 is a part of the text layers.10: a substring match would hand one layer's change to another."""
    first, tenth = ({f"layers.{i}.{path}": shape for path, shape in BLOCK.items()} for i in (1, 10))
    one, two = lora(8, 0, modules=first), lora(8, 1, modules=tenth)
    wanted = weighed([one, two], [1.0, 1.0])

    def lookup(module):  # the mistake: the first key that begins like it
        return next(p for m, p in two.items() if m.startswith(module.split(".attention")[0].split(".feed")[0].split(".adaLN")[0]))

    wrong = {m: one[m].delta + lookup(m).delta for m in one if "to_q" in m}
    assert min(relative(wrong[m], wanted[m]) for m in wrong) > WRONG
    found = ours(tmp_path, [one, two], [1.0, 1.0])
    assert worst(found, wanted) < RIGHT


def test_half_matched_keys_are_refused_not_halved(tmp_path):
    """A file of which half of the keys are known would load at half strength: the user would call it a weak LoRA."""
    path = write(
        tmp_path / "half.safetensors", BARE, lambda m: f"diffusion_model.{m}" if "attention" in m else f"diffusion_model.x.{m}"
    )
    half = {m: p.delta if "attention" in m else torch.zeros_like(p.delta) for m, p in BARE.items()}
    assert worst(half, deltas(BARE)) > WRONG
    with pytest.raises(ZitMergeError, match="x.layers.0.adaLN_modulation.0"):
        merge([(path, 1.0)], shapes="free").save(tmp_path / "out.safetensors")


def test_the_rank_of_a_fused_qkv_is_not_taken_for_three_blocks(tmp_path):
    """Converters write block-diagonal factors, trainers do not: thirds of the rank are q, k and v only for the former."""
    random = torch.Generator().manual_seed(0)
    up, down = torch.randn(3 * DIM, 6, generator=random), torch.randn(6, DIM, generator=random)
    stem = "diffusion_model.layers.0.attention.qkv"
    save_file({f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}, tmp_path / "fused.safetensors")
    rows = [slice(i * DIM, (i + 1) * DIM) for i in range(3)]
    names = [f"layers.0.attention.to_{c}" for c in "qkv"]
    wanted = {n: product(up[r], down) for n, r in zip(names, rows, strict=True)}
    blocks = {
        n: product(up[r, 2 * i : 2 * i + 2], down[2 * i : 2 * i + 2]) for i, (n, r) in enumerate(zip(names, rows, strict=True))
    }
    assert least(blocks, wanted) > WRONG
    out = merge([(tmp_path / "fused.safetensors", 1.0)], shapes="free", dtype="fp32").save(tmp_path / "out.safetensors")
    assert worst(read_deltas(out), wanted) < RIGHT
    assert len(load_lora(out)) == 3


def test_an_alpha_of_301_survives(tmp_path):
    """bfloat16 has no 301: an alpha stored in the factors' dtype would weaken every module by a third of a percent."""
    rank = 301
    one = lora(rank, modules={"layers.0.attention.to_out.0": (320, 320)})  # a smaller one would have a smaller rank
    assert float(torch.tensor(float(rank)).bfloat16()) != rank
    path = write(tmp_path / "in.safetensors", one)
    out = merge([(path, 1.0)], shapes="free", dtype="bf16").save(tmp_path / "out.safetensors")
    stored = load_lora(out)
    assert {c.alpha for changes in stored.changes.values() for c in changes} == {301.0}
    assert {float(t) for k, t in load_file(out).items() if k.endswith(".alpha")} == {301.0}
    assert stored.rank == 301
