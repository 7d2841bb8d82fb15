"""The pictures that are not in the store yet, and what renders them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from ..progress import Progress
from .image_store import ImageStore
from .plan import Picture, PictureRecords, PreviewPlan
from .rendering import Load
from .variants import AdapterVariant, ReadDeltas


def missing_pictures(pictures: Sequence[Picture], records: PictureRecords, store: ImageStore) -> list[Picture]:
    """The pictures that are not in the store, one for each digest.

    Args:
        pictures: In order.
        records: Their names.
        store: Where they would be.
    """
    first: dict[str, Picture] = {}
    for picture in pictures:
        first.setdefault(records.digests[picture], picture)
    return [picture for digest, picture in first.items() if not store.has(digest)]


def rendered_pictures(
    preview: PreviewPlan,
    mine: Sequence[Picture],
    store: ImageStore,
    records: PictureRecords,
    read: ReadDeltas,
    load: Load,
    progress: Progress,
) -> Iterator[Picture]:
    """Renders pictures; each is stored before the next one begins. The model is loaded once, if there is anything to render.

    Args:
        preview: What they belong to.
        mine: Those to render, in order.
        store: Where they go.
        records: Their names.
        read: Reads inputs and steps.
        load: Loads the model.
        progress: Shows how far it is, and may stop it.

    Yields:
        Each picture when it is stored.

    Raises:
        ZitMergeError: A picture can't be rendered, or written.
    """
    if not mine:
        return
    current: AdapterVariant | None = None
    with ExitStack() as stack:
        renderer = None
        for picture in progress.track(mine, "pictures", "picture", describe=lambda p: p.variant.label):
            renderer = renderer or stack.enter_context(load(preview.settings))
            if picture.variant is not current:
                renderer.set_adapter(picture.variant.deltas(read))
                current = picture.variant
            image = renderer.render(picture.spec)
            store.save(records.digests[picture], image, records.pictures[picture])
            yield picture
