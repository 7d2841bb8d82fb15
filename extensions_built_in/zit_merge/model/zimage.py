"""Z-Image's anatomy as data: its linear layers, their shapes, and the names by which people speak of them.

Source of every number, unless said otherwise: diffusers `transformer_z_image.py` with the config of Tongyi-MAI/Z-Image-Turbo
(dim 3840, n_layers 30, n_refiner_layers 2, n_heads = n_kv_heads = 30, cap_feat_dim 2560, in_channels 16).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

N_LAYERS = 30  # config.json: n_layers
N_REFINERS = 2  # config.json: n_refiner_layers

# The sizes that the shapes below are spelled in. A pruned variant or a small test model has others, but the same ones throughout.
REAL_SIZES: Mapping[str, int] = {
    "dim": 3840,  # config.json: dim
    "ffn": 10240,  # FeedForward: int(dim / 3 * 8)
    "adaln": 256,  # ADALN_EMBED_DIM; min(dim, 256)
    "caption": 2560,  # config.json: cap_feat_dim
    "patch": 64,  # patch_size 2 x 2 x in_channels 16
    "t_hidden": 1024,  # t_embedder: mid_size
    "t_frequency": 256,  # TimestepEmbedder.frequency_embedding_size
}

# component -> (path inside a block, (out, in)); `4dim` is four times dim: scale and gate, for attention and for feed-forward.
_BLOCK: Mapping[str, tuple[str, tuple[str, str]]] = {
    "adaLN_modulation": ("adaLN_modulation.0", ("4dim", "adaln")),
    "to_q": ("attention.to_q", ("dim", "dim")),
    "to_k": ("attention.to_k", ("dim", "dim")),
    "to_v": ("attention.to_v", ("dim", "dim")),
    "to_out": ("attention.to_out.0", ("dim", "dim")),
    "w1": ("feed_forward.w1", ("ffn", "dim")),
    "w2": ("feed_forward.w2", ("dim", "ffn")),
    "w3": ("feed_forward.w3", ("ffn", "dim")),
}
COMPONENTS: tuple[str, ...] = tuple(_BLOCK)
CONTEXT_COMPONENTS: tuple[str, ...] = COMPONENTS[
    1:
]  # the context refiner is not modulated (ZImageTransformerBlock: modulation=False)

# short name -> (diffusers name, (out, in)); the short names are those of the original checkpoint and ComfyUI.
_OTHER: Mapping[str, tuple[str, tuple[str, str]]] = {
    "x_embedder": ("all_x_embedder.2-1", ("dim", "patch")),
    "final_layer.linear": ("all_final_layer.2-1.linear", ("patch", "dim")),
    "final_layer.adaLN_modulation": ("all_final_layer.2-1.adaLN_modulation.1", ("dim", "adaln")),
    "t_embedder.mlp.0": ("t_embedder.mlp.0", ("t_hidden", "t_frequency")),
    "t_embedder.mlp.2": ("t_embedder.mlp.2", ("adaln", "t_hidden")),
    "cap_embedder": ("cap_embedder.1", ("dim", "caption")),
}
OTHER: tuple[str, ...] = tuple(_OTHER)

ALIASES: Mapping[str, str] = {"adaLN": "adaLN_modulation"}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out"),
    "feed_forward": ("w1", "w2", "w3"),
    "qk": ("to_q", "to_k"),
    "vo": ("to_v", "to_out"),
}
# What the community believes the components do (second table of the blog behind modify_zlora.py). Nobody has measured it.
EFFECTS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("adaLN_modulation", "to_q", "to_k"),
    "composition": ("to_q", "to_k"),
    "subject": ("to_v", "w1", "w2", "w3"),
    "detail": ("w1", "w2", "w3"),
    "background": ("to_q", "to_k", "to_out"),
    "color_light": ("adaLN_modulation", "to_v"),
}
SECTIONS: Mapping[str, int] = {"layers": N_LAYERS, "noise_refiner": N_REFINERS, "context_refiner": N_REFINERS}
REFINERS: tuple[str, ...] = ("noise_refiner", "context_refiner")


@dataclass(frozen=True)
class Module:
    """One linear layer of Z-Image.

    Attributes:
        name: Its path in diffusers, which is the canonical name here: `layers.0.attention.to_q`.
        section: `layers`, `noise_refiner`, `context_refiner` or `other`.
        index: Which block of the section; 0 in `other`.
        component: One of COMPONENTS; in `other` one of OTHER.
        dims: (out, in) in the names of REAL_SIZES.
    """

    name: str
    section: str
    index: int
    component: str
    dims: tuple[str, str]

    @property
    def has_bias(self) -> bool:
        """Whether it adds one: the blocks' attention and feed-forward do not."""
        return self.section == "other" or self.component == "adaLN_modulation"

    def shape(self, sizes: Mapping[str, int] = REAL_SIZES) -> tuple[int, int]:
        """(out, in) of the weight for a model of these sizes."""
        return _size(self.dims[0], sizes), _size(self.dims[1], sizes)


def _size(dim: str, sizes: Mapping[str, int]) -> int:
    return 4 * sizes["dim"] if dim == "4dim" else sizes[dim]


def _modules() -> Iterator[Module]:
    for name, (path, dims) in _OTHER.items():
        yield Module(path, "other", 0, name, dims)
    for section in ("noise_refiner", "context_refiner", "layers"):
        for index in range(SECTIONS[section]):
            for component in section_components(section):
                path, dims = _BLOCK[component]
                yield Module(f"{section}.{index}.{path}", section, index, component, dims)


def section_components(section: str) -> tuple[str, ...]:
    """The components that a block of this section has."""
    return {"other": OTHER, "context_refiner": CONTEXT_COMPONENTS}.get(section, COMPONENTS)


MODULES: Mapping[str, Module] = {m.name: m for m in _modules()}  # the 276 nn.Linear


@cache
def at(section: str, index: int, component: str) -> Module:
    """The module at this place of the model.

    Args:
        section: `layers`, `noise_refiner`, `context_refiner` or `other`.
        index: From 0.
        component: Its name there.
    """
    return next(m for m in MODULES.values() if (m.section, m.index, m.component) == (section, index, component))


def canonical_component(name: str) -> str:
    """`name` without its alias: adaLN -> adaLN_modulation."""
    return ALIASES.get(name, name)


def infer_sizes(shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The sizes of the model that these modules belong to.

    Args:
        shapes: module name -> (out, in) as found in a file.

    Returns:
        The sizes that can be told, in the names of REAL_SIZES.

    Raises:
        ValueError: Two modules need different values of one size; the message names both.
    """
    found: dict[str, tuple[int, str]] = {}
    for name, shape in shapes.items():
        for dim, size in zip(MODULES[name].dims, shape, strict=True):
            if dim == "4dim":
                if size % 4:
                    raise ValueError(f"{name} has {size} rows, which is not four times a width")
                dim, size = "dim", size // 4
            known, where = found.setdefault(dim, (size, name))
            if known != size:
                raise ValueError(f"{where} needs {dim} = {known}, {name} needs {dim} = {size}")
    return {dim: size for dim, (size, _) in found.items()}
