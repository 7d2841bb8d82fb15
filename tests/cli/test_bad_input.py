"""What bad input gets: one sentence with the place and the remedy, exit 1, no output, no traceback."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from workspace import Workspace

from extensions_built_in.zit_merge.cli.merge import _advice
from extensions_built_in.zit_merge.files import atomic

ME = {"lora": "me.safetensors", "ratio": 1.0}
STEP = {"name": "a", "loras": [ME]}
Q = "diffusion_model.layers.0.attention.to_q"


def refused(work: Workspace, *words: object) -> str:
    """The one sentence, after a look for anything that was left."""
    message = work.zit(*words).refused()
    assert work.files() == []
    assert not [p for p in work.folder.rglob("*") if p.name.endswith(".part")]
    return message


def refused_lora(work: Workspace, lora: str = "me.safetensors", **step: object) -> str:
    """The sentence for a LoRA that `run`, `inspect` and a dry run all look at."""
    return refused(work, "run", work.job({"name": "a", "loras": [{"lora": lora, "ratio": 1.0}]} | step))


def test_an_unknown_key_with_the_nearest_right_one(work, loras):
    message = refused(work, "run", work.job({"name": "a", "loras": [ME | {"override": {"3.to_q": 1.0}}]}))
    assert message.startswith("process[0].steps[0].loras[0].override: unknown key (did you mean overrides?)")


def test_a_missing_ratio(work, loras):
    message = refused(work, "run", work.job({"name": "a", "loras": [{"lora": "me.safetensors"}]}))
    assert message.startswith("process[0].steps[0].loras[0].ratio: is missing") and "ratio: 1.0" in message


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999", "'1'"])
@pytest.mark.parametrize("where", ["ratio: {}", "ratio: 1, blocks: {{to_q: {}}}", "ratio: 1, layers: {{0-9: [1.0, {}]}}"])
def test_nan_infinity_and_text_in_settings(work, loras, value, where):
    lora = "{lora: me.safetensors, " + where.format(value) + "}"
    text = f"""\
job: extension
config:
  name: cat
  process: [{{type: zit_merge, shapes: free, output_dir: out, steps: [{{name: a, loras: [{lora}]}}]}}]
"""
    message = refused(work, "run", work.write(text))
    assert message.startswith("process[0].steps[0].loras[0].") and "number" in message


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_nan_and_infinity_in_json(work, loras, value):
    section = json.dumps(work.section(STEP)).replace('"ratio": 1.0', f'"ratio": {value}')
    config = work.write(f'{{"job": "extension", "config": {{"name": "cat", "process": [{section}]}}}}', "config.json")
    assert refused(work, "run", config).startswith("process[0].steps[0].loras[0].ratio: must be a finite number")


@pytest.mark.parametrize("used", ["b", "a", "B"])
def test_a_step_that_uses_a_later_step_or_itself(work, loras, used):
    steps = [{"name": "a", "loras": [{"lora": used, "ratio": 1.0}]}, {"name": "b", "loras": [ME]}]
    message = refused(work, "run", work.job(*steps))
    assert message.startswith("process[0].steps[0].loras[0].lora: ")
    assert ("only the steps before it" in message) == (used != "B")


def test_a_step_that_is_none_gets_the_nearest_name(work, loras):
    steps = [{"name": "soft", "loras": [ME]}, {"name": "b", "loras": [{"lora": "sofft", "ratio": 1.0}]}]
    assert "did you mean soft?" in refused(work, "run", work.job(*steps))


@pytest.mark.parametrize("names", [("a", "a"), ("a", "A")])
def test_two_steps_of_one_name(work, loras, names):
    message = refused(work, "run", work.job(*({"name": n, "loras": [ME]} for n in names)))
    assert message.startswith("process[0].steps[1].name: ")


def test_a_file_that_is_not_there(work):
    message = refused_lora(work, "gone.safetensors")
    assert message.startswith("process[0].steps[0].loras[0].lora: gone.safetensors is not there (looked in ")


def test_a_folder(work):
    (work.folder / "me.safetensors").mkdir()
    assert "is a folder" in refused_lora(work)


def test_a_link_that_leads_nowhere(work):
    try:
        (work.folder / "me.safetensors").symlink_to(work.folder / "gone")
    except OSError:
        pytest.skip("no right to make links")
    assert "me.safetensors" in refused_lora(work)


def test_a_file_that_may_not_be_read(work, loras):
    loras[0].chmod(0)
    if os.access(loras[0], os.R_OK):
        pytest.skip("this user may read everything")
    assert "can't be read (Permission denied)" in refused_lora(work)


def test_a_folder_that_may_not_be_entered(work):
    path = work.lora("locked/me.safetensors")
    path.parent.chmod(0)
    try:
        if os.access(path, os.R_OK):
            pytest.skip("this user may enter every folder")
        assert "locked" in refused_lora(work, "locked/me.safetensors")
    finally:
        path.parent.chmod(0o755)


def damaged(content: bytes, how: str) -> bytes:
    header = int.from_bytes(content[:8], "little")
    return {
        "empty": b"",
        "seven bytes": content[:7],
        "length only": content[:8],
        "half the header": content[: 8 + header // 2],
        "header only": content[: 8 + header],
        "half the data": content[: (8 + header + len(content)) // 2],
        "one byte short": content[:-1],
        "bytes behind": content + b"more",
        "huge header": (2**62).to_bytes(8, "little") + content[8:],
        "text": b"<!DOCTYPE html><html><body>404: not found</body></html>",
        "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "zeros": bytes(len(content)),
        "header is no JSON": content[:8] + b"\xff" * header + content[8 + header :],
    }[how]


DAMAGES = [
    *("empty", "seven bytes", "length only", "half the header", "header only", "half the data", "one byte short"),
    *("bytes behind", "huge header", "text", "git lfs pointer", "zeros", "header is no JSON"),
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_file_that_is_not_whole(work, loras, how):
    loras[0].write_bytes(damaged(loras[0].read_bytes(), how))
    message = refused_lora(work)
    assert "me.safetensors: is not a whole .safetensors file" in message and "again" in message
    assert "is not a whole .safetensors file" in work.zit("inspect", loras[0]).refused()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_found_before_the_training(work, loras, how):
    loras[0].write_bytes(damaged(loras[0].read_bytes(), how))
    both = [{"lora": "trained", "ratio": 1.0}, ME]
    message = refused(work, "check", work.config(work.training(), work.section({"name": "a", "loras": both})))
    assert "me.safetensors" in message


@pytest.mark.parametrize("name", ["me.pt", "me.ckpt", "me.pth", "me.bin", "ME.PT"])
def test_a_pickled_file_by_its_name(work, name):
    torch.save({"a": torch.zeros(1)}, work.folder / name)
    message = refused_lora(work, name)
    assert message.startswith("process[0].steps[0].loras[0].lora: ") and "pickle" in message and "can run code" in message


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle", "plain zip"])
def test_a_pickled_file_under_a_safetensors_name(work, how):
    path = work.folder / "me.safetensors"
    if how == "plain pickle":
        path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    elif how == "plain zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x", "y")
    else:
        torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=how == "zip")
    message = refused_lora(work)
    assert "pickle" in message and "can run code" in message


def test_a_whole_file_whose_header_has_the_length_of_a_pickles_first_bytes(work, loras):
    """0x280 is a fine length for a header, and its bytes are those with which a pickle begins."""
    content = loras[0].read_bytes()
    length = int.from_bytes(content[:8], "little")
    padded = length + (0x280 - length) % 0x10000
    header = content[8 : 8 + length].ljust(padded)
    loras[0].write_bytes(padded.to_bytes(8, "little") + header + content[8 + length :])
    assert loras[0].read_bytes()[:2] == b"\x80\x02"
    work.zit("inspect", loras[0]).ok()


@pytest.mark.parametrize("name", ["me", "me.txt", "me.safetensors.bak", "", ".", "trained@", "trained@abc", "trained@-1"])
def test_a_source_that_is_nothing_we_know(work, loras, name):
    message = refused_lora(work, name)
    assert message.startswith("process[0].steps[0].loras[0].lora: ") and ".safetensors" in message


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "~nobody_of_this_name/me.safetensors", "a\0b.safetensors"])
def test_a_path_that_the_system_refuses(work, name):
    assert refused_lora(work, name).startswith("process[0].steps[0].loras[0].lora: ")


def write(work: Workspace, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    save_file(tensors, work.folder / "me.safetensors", metadata)


def pair(name: str, rank: int = 2, out: int = 8, into: int = 8) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(rank, into), f"{name}.lora_B.weight": torch.ones(out, rank)}


def different(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: 2 * tensor for key, tensor in tensors.items()}


def lokr_of_two_ranks() -> dict[str, torch.Tensor]:
    ranks = {"w1": 1, "w2": 2}
    return {f"{Q}.lokr_{w}_{ab}": torch.ones((4, r) if ab == "a" else (r, 4)) for w, r in ranks.items() for ab in "ab"}


def loha(**sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    shapes = {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 8)} | sizes
    return {f"{Q}.hada_{part}": torch.ones(shape) for part, shape in shapes.items()}


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.double_blocks.0.img_attn.proj",  # Flux
        "lora_unet_down_blocks_0_attentions_0_proj_in",  # SDXL
        "transformer.transformer_blocks.0.attn.to_q",  # Qwen-Image
        "diffusion_model.blocks.0.self_attn.q",  # Wan
    ],
)
def test_a_lora_of_another_model_by_its_names(work, key):
    write(work, pair(key))
    message = refused_lora(work)
    assert "is no Z-Image LoRA" in message and key in message and "another model" in message


@pytest.mark.parametrize("shapes", ["strict", "free"])
def test_a_lora_of_another_model_by_its_shapes(work, shapes):
    """Lumina 2 has the same names; its width is 2304."""
    if shapes == "strict":
        write(work, pair(Q, out=2304, into=2304) | pair("diffusion_model.layers.0.attention.to_k", out=3840, into=3840))
    else:
        write(work, pair(Q, out=8, into=8) | pair("diffusion_model.layers.1.attention.to_q", out=12, into=12))
    message = refused_lora(work, shapes=shapes)
    assert message.startswith("process[0].steps[0]: ")
    assert ("2304 x 2304" in message and "3840 x 3840" in message) if shapes == "strict" else ("8" in message and "12" in message)


def test_two_loras_of_different_models(work):
    work.lora("me.safetensors")
    save_file(pair("diffusion_model.layers.3.attention.to_q", out=12, into=12), work.folder / "other.safetensors")
    config = work.job({"name": "a", "loras": [ME, {"lora": "other.safetensors", "ratio": 1.0}]})
    message = refused(work, "run", config)
    assert message.startswith("process[0].steps[0]: other.safetensors") and "12 x 12" in message and "8 x 8" in message


@pytest.mark.parametrize(
    ("more", "flags", "advice"),
    [
        (pair("diffusion_model.layers.0.attention.to_qq"), ["--allow-unmatched"], "set --allow-unmatched to merge the rest"),
        (
            {"diffusion_model.layers.0.attention_norm1.diff": torch.ones(8)},
            ["--drop", "norm"],
            "set --drop norm to merge the rest",
        ),
        ({Q + ".alpha": torch.tensor(float("nan"))}, ["--alpha", "none"], "or set --alpha none (alpha is the rank)"),
    ],
    ids=["unmatched", "norm", "alpha"],
)
def test_on_the_command_line_advice_names_flags_that_help(work, more, flags, advice):
    write(work, pair(Q) | more)
    words = ("merge", work.folder / "me.safetensors", "-o", work.folder / "out.safetensors", "--ratio", 1, "--shapes", "free")
    message = refused(work, *words)
    assert advice in message
    assert not re.search(r"\b[a-z_]+: (true|none|\[)", message), message
    work.zit(*words, *flags).ok()


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ("set rank: 64, save: {keep_lokr: true} to keep it", "set --rank 64, --keep-lokr to keep it"),
        ("set rank: {energy: 0.99, max: 64}, or confirm_size: true", "set --rank energy=0.99,max=64, or --confirm-size"),
        ("a whole number from 1, {energy: 0.99} or {size_mb: 150}", "a whole number from 1, energy=0.99 or size_mb=150"),
        ("set drop: [norm, bias] to merge", "set --drop norm bias to merge"),
        ("set base: to the model that", "set --base to the model that"),
        ("use method: sum, or other ratios", "use --method sum, or other ratios"),
        ("set save: {uniform: false}, or drop it", "set --uniform false, or drop it"),
        ("without method, rank, format or uniform: drop them", "without method, rank, format or uniform: drop them"),
        ("is no LoRA of low rank: ties works", "is no LoRA of low rank: ties works"),
        ("/a/rank: 5/x.safetensors and my base: sdxl/x.safetensors", "/a/rank: 5/x.safetensors and my base: sdxl/x.safetensors"),
        ("/loras/alpha: none.safetensors is not there", "/loras/alpha: none.safetensors is not there"),
        ("no base: the model", "no base: the model"),
    ],
)
def test_sentences_of_a_config_in_the_words_of_the_command_line(told, wanted):
    assert _advice(told) == wanted


def test_a_key_that_no_rule_explains(work):
    write(work, pair(Q) | pair("diffusion_model.layers.0.attention.to_qq"))
    message = refused_lora(work)
    assert "diffusion_model.layers.0.attention.to_qq.lora_A.weight" in message and "allow_unmatched: true" in message
    assert "did you mean diffusion_model.layers.0.attention.to_q.lora_A.weight?" in message


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "holds no tensors"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 8)}, "half of the pair is missing"),
        ({f"{Q}.alpha": torch.tensor(1.0)}, "stands alone, what it scales is missing"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(8, 3)}, "are not a pair"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 8, 1, 1), f"{Q}.lora_B.weight": torch.ones(8, 2, 1, 1)}, "are not a pair"),
        ({f"{Q}.lora_A.weight": torch.ones(0, 8), f"{Q}.lora_B.weight": torch.ones(8, 0)}, "are not a pair"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 8).int(), f"{Q}.lora_B.weight": torch.ones(8, 2).int()}, "floating point"),
        (pair(Q) | {f"{Q}.alpha": torch.tensor(float("nan"))}, "alpha"),
        (pair(Q) | {f"{Q}.alpha": torch.tensor(float("inf"))}, "alpha"),
        (pair(Q) | {f"{Q}.alpha": torch.ones(3)}, "alpha is one number"),
        (pair(Q) | {f"{Q}.alpha": torch.ones(0)}, "alpha is one number"),
        (pair(Q) | different(pair("transformer.layers.0.attention.to_q")), "twice and differently"),
        (pair(Q) | {k.replace("lora_A.", "lora_down."): v for k, v in pair(Q).items()}, "has two down"),
        (pair("diffusion_model.layers.0.attention.qkv", out=10), "split into q, k and v"),
        ({"text_encoder.x.lora_A.weight": torch.ones(2, 8)}, "nothing but the text encoder"),
        ({f"{Q}.lokr_w1": torch.ones(2, 2)}, "lokr_w1 has no w2_b factor beside it, half of the pair is missing"),
        ({f"{Q}.lokr_w1_a": torch.ones(2, 2), f"{Q}.lokr_w2": torch.ones(4, 4)}, "lokr_w1_a has no w1_b factor beside it"),
        ({f"{Q}.lokr_w1": torch.ones(2, 2, 1), f"{Q}.lokr_w2": torch.ones(4, 4)}, "a Kronecker factor"),
        (lokr_of_two_ranks(), "alpha / rank has no meaning"),
        ({f"{Q}.hada_w1_a": torch.ones(2, 2)}, "hada_w1_a has no w1_b factor beside it"),
        (loha(w2_b=(2, 9)), "is for a 8 x 8 matrix"),
        ({f"{Q}.diff": torch.ones(8, 8, 1)}, "the difference of a weight is a matrix"),
        ({f"{Q}.diff": torch.ones(8)}, "the difference of a weight is a matrix"),
        (pair(Q) | {f"{Q}.dora_scale": torch.ones(8, 1)}, "DoRA"),
    ],
    ids=[str(i) for i in range(24)],
)
def test_files_of_a_form_that_is_not_a_lora(work, tensors, says):
    write(work, tensors)
    assert says in refused_lora(work)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["A", "B"])
def test_nan_or_infinity_in_weights(work, value, part):
    key = f"diffusion_model.layers.29.feed_forward.w3.lora_{part}.weight"
    work.lora("me.safetensors", change=lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
    message = refused_lora(work)
    assert "me.safetensors" in message and key in message and "NaN or infinity" in message


def test_inspect_names_the_module_with_nan(work):
    work.lora("me.safetensors", change=lambda tensors: tensors[f"{Q}.lora_A.weight"].fill_(float("nan")))
    assert "layers.0.attention.to_q holds NaN or infinity" in " ".join(work.zit("inspect", "me.safetensors").ok().split())


@pytest.mark.parametrize(("dtype", "ratio"), [("fp16", 1.0), ("bf16", 1e30)])
def test_a_result_that_is_too_large_for_the_dtype(work, dtype, ratio):
    work.lora("me.safetensors", change=lambda tensors: tensors[f"{Q}.lora_B.weight"].fill_(1e30))
    config = work.job({"name": "a", "loras": [ME | {"ratio": ratio}], "save": {"dtype": dtype}})
    message = refused(work, "run", config)
    assert "layers.0.attention.to_q" in message and "too large" in message


def test_an_output_that_exists_and_is_not_ours(work, loras):
    work.out.mkdir()
    (work.out / "merged_cat_a.safetensors").write_text("mine")
    message = work.zit("run", work.job(STEP)).refused()
    assert message.startswith("process[0].steps[0]: ") and "was not written by this step" in message
    assert (work.out / "merged_cat_a.safetensors").read_text() == "mine" and len(work.files()) == 1


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be_made(work, loras, where):
    (work.folder / "file").write_text("mine")
    config = work.job(STEP, output_dir=str(work.folder / where))
    assert refused(work, "run", config).startswith("process[0].output_dir: ")


@pytest.mark.parametrize("key", ["output_dir", "copy_to"])
@pytest.mark.parametrize("folder", ["~nobody_of_this_name/x", "x" * 300])
def test_a_folder_name_that_the_system_refuses(work, loras, key, folder):
    config = work.job(STEP, output_dir=folder) if key == "output_dir" else work.job(STEP | {"copy_to": folder})
    assert key in refused(work, "check", config)


@pytest.mark.parametrize(("job", "step"), [("x" * 300, "a"), ("cat", "x" * 300), ("x" * 230, "a" * 10)])
def test_a_name_that_is_too_long_for_a_file_is_found_before_the_training(work, loras, job, step):
    section = work.section({"name": step, "loras": [ME]})
    message = refused(work, "check", work.config(work.training(), section, job=job))
    assert message.startswith("process[1].")


@pytest.mark.parametrize(
    "name", ["a\0b", "[" * 3000, "a/" + "b" * 256, "x" * 250], ids=["null byte", "3000", "in a folder", "250"]
)
@pytest.mark.parametrize("command", ["check", "run", "dry run"])
@pytest.mark.parametrize("where", ["job", "training_folder", "name_or_path", "recipe"])
def test_a_name_that_no_system_can_have_is_a_sentence_wherever_a_path_is_made_of_it(work, loras, where, name, command):
    training, checkpoints = work.training(), {"name": "b", "rank": 2, "checkpoints": {"last": 2}}
    if where in training:
        training[where] = name
    elif where == "name_or_path":
        training["model"] = {"name_or_path": name}
    config = work.config(training, work.section(STEP, checkpoints), job=name if where == "job" else "cat")
    if where == "recipe":
        made_by = {"type": "zit_merge", "made_by": "zit_merge 0.4.0", "job": name}
        steps = [{"name": "a", "file": f"{name}.safetensors", "shapes": "free", "loras": [ME]}]
        config = work.write(made_by | {"steps": steps}, "recipe.yaml")
    words = (config, "--dry-run") if command == "dry run" else (config,)
    ran = work.zit(command.replace("dry run", "run"), *words)
    could_be = where == "name_or_path" or (where == "training_folder" and len(name) == 250)
    assert ran.code == 1 or could_be
    assert "Traceback" not in ran.err and (ran.code == 0 or ran.err.startswith("zit_merge: "))


def test_no_space_on_the_disk(work, loras, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)  # where file systems that allocate late say it
    message = refused(work, "run", work.job(STEP))
    assert "merged_cat_a.safetensors: no space left on the disk" in message and "free some" in message


@pytest.mark.parametrize("device", ["cuda:99", "cuda:0", "mps"])
def test_a_device_that_is_not_there(work, loras, device, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    message = refused(work, "run", work.job(STEP, device=device))
    assert message.startswith(f"device: {device}: ") and "use auto or cpu" in message


SPOILERS: dict[str, Callable[[Workspace], None]] = {
    "NaN": lambda work: work.lora("bad.safetensors", change=lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan"))),
    "truncated": lambda work: (work.folder / "bad.safetensors").write_bytes(b"x" * 50),
    "missing": lambda work: None,
}


@pytest.mark.parametrize("kind", SPOILERS)
def test_a_bad_second_step_leaves_the_good_first_one_or_nothing(work, loras, kind):
    SPOILERS[kind](work)
    work.zit("run", work.job(STEP, {"name": "b", "loras": [{"lora": "bad.safetensors", "ratio": 1.0}]})).refused()
    assert work.files() == (["merged_cat_a.safetensors"] if kind == "NaN" else [])
