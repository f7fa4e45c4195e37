"""`run.cache_features`: a frozen encoder's features of fixed views in the place of pictures."""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from lavis_lite.common import dist
from lavis_lite.common.config import Config
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.logging import get_logger
from lavis_lite.common.sizes import show_bytes
from lavis_lite.datasets.bad_rows import ReadCounter
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.builders import make_builder
from lavis_lite.datasets.feature_store import FeatureStore, StoredViews
from lavis_lite.datasets.image_text import ImageTextDataset, has_picture_files
from lavis_lite.datasets.pictures import Pictures
from lavis_lite.image_features import ImageFeatures
from lavis_lite.runners.feature_build import Build, Encoder, fill
from lavis_lite.runners.feature_keys import Chosen, find_store
from lavis_lite.runners.feature_space import agree
from lavis_lite.runners.feature_times import changed_shards, note_times

logger = get_logger(__name__)

# How far features of one picture may be from those stored, relative to their size: other hardware rounds otherwise.
TOLERANCE = 0.05

Datasets = Mapping[str, Mapping[str, Any]]


def check_storable(cfg: Config) -> None:
    """Raise ConfigError where features can't be stored, as far as a configuration tells; reads no data."""
    check_encoder(cfg)
    for name, section in cfg.datasets.items():
        builder = make_builder(name, section)
        split = cfg.run.train_split
        is_read = split in getattr(builder, "splits", (split,))
        if is_read and hasattr(builder, "has_picture_files") and not builder.has_picture_files(split):
            raise ConfigError(
                f"run.cache_features: dataset '{name}' has no picture files whose features could be stored (clips and "
                "streams have none); leave it out, or set run.cache_features=false"
            )


def check_encoder(cfg: Config) -> None:
    """Raise ConfigError for a model whose features can't be stored: no image encoder, or one that is trained."""
    section = cfg.model.get("vision_encoder")
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"run.cache_features: model '{cfg.model['arch']}' has no image encoder (model.vision_encoder) whose "
            "features could be stored; set run.cache_features=false"
        )
    if not section.get("freeze", True):
        raise ConfigError(
            "run.cache_features: the image encoder is trained (model.vision_encoder.freeze=false), so its features "
            "change at every step; set model.vision_encoder.freeze=true or run.cache_features=false"
        )


def with_features(cfg: Config, datasets: Datasets, encoder: Encoder) -> dict[str, dict[str, Any]]:
    """The datasets, those that training reads (and with features.evaluation the validation splits) with features in
    the place of pictures; what is not stored yet is encoded now, by all ranks.

    Raises ConfigError for datasets without pictures of their own and for disk space that nobody agreed to, DataError
    when the disk has not that much left or too many pictures can't be read, OSError when the disk is full.
    """
    changed = {name: dict(splits) for name, splits in datasets.items()}
    for one, store in prepare(cfg, datasets, encoder):
        rows = one.pictures.dataset
        changed[one.name][one.split] = rows.with_features(StoredViews(one.pictures, store))
    return changed


def prepare(cfg: Config, datasets: Datasets, encoder: Encoder) -> list[tuple[Chosen, FeatureStore]]:
    """Every split whose features the run stores, with its store, complete now; raises as `with_features`."""
    chosen, seed = _chosen(cfg, datasets), cfg.run.features.seed
    own: list[tuple[FeatureStore, list[str]]] = []
    found: list[tuple[FeatureStore, list[int]]] = []
    with ExitStack() as locks:
        with dist.waiting_for_all():
            if dist.is_main():
                own = [find_store(cfg, one, encoder, locks) for one in chosen]
                found = [
                    (store, _missing(store, times, one, encoder, seed=seed))
                    for one, (store, times) in zip(chosen, own, strict=True)
                ]
                agree(cfg.run.features, found)
        found = dist.broadcast_object(found)
        unread: list[dict[int, list[int]]] = []
        with dist.waiting_for_all():  # one may have a file more than others
            for one, (store, missing) in zip(chosen, found, strict=True):
                mine = missing[dist.rank() :: dist.world_size()]
                counter = ReadCounter(cfg.run.max_bad_fraction, what="no features are stored")
                build = Build(one.label, one.pictures, store, seed)
                unread.append(
                    fill(build, mine, encoder, num_workers=cfg.run.num_workers, counter=counter)
                    if mine
                    else {}
                )
        of_ranks = dist.gather_objects(unread)
        if dist.is_main():
            for (store, times), *parts in zip(own, *of_ranks, strict=True):
                note_times(store, dict(ChainMap(*parts)), times)
    for one, (store, _) in zip(chosen, found, strict=True):
        _check_complete(store)
        logger.info("features of %s: %s, %s in %s", one.label, store, show_bytes(store.size()), store.folder)
    return [(one, store) for one, (store, _) in zip(chosen, found, strict=True)]


def _chosen(cfg: Config, datasets: Datasets) -> list[Chosen]:
    """The splits whose features are stored, in an order that all runs share: they lock them one after the other."""
    run = cfg.run
    splits = {run.train_split, *(run.valid_splits if run.features.evaluation else ())}
    names = sorted((name, split) for name, own in datasets.items() for split in splits & own.keys())
    chosen = []
    for name, split in names:
        rows = datasets[name][split]
        if not has_picture_files(rows) or type(rows).load is not ImageTextDataset.load:
            raise ConfigError(
                f"run.cache_features: dataset '{name}' ({type(rows).__name__}) has no picture files whose features "
                "could be stored; leave it out, or set run.cache_features=false"
            )
        views = run.features.views if split == run.train_split else 1
        chosen.append(Chosen(name, split, Pictures(rows), views))
    return chosen


def _missing(
    store: FeatureStore, times: Sequence[str], one: Chosen, encoder: Encoder, *, seed: int
) -> list[int]:
    """The files of a store that are missing or no longer of these pictures; all, where the encoder disagrees."""
    every = range(len(store.states))
    missing = store.missing()
    there = sorted(set(every) - set(missing))
    missing = sorted([*missing, *changed_shards(store, one.pictures, there, times)])
    stale = [shard for shard in missing if store.path(shard).exists()]
    if stale:
        logger.info(
            "features in %s: %d of %d files are of other or changed pictures, or of some that can be read now, and are "
            "built again",
            *(store.folder, len(stale), len(every)),
        )
    present = sorted(set(every) - set(missing))
    for shard in {*present[:1], *present[-1:]}:
        difference = _difference(store, one.pictures, encoder, shard, seed)
        if difference > TOLERANCE:
            logger.warning(
                "features in %s are built again: the encoder now makes others of the same picture (relative "
                "difference %.2g), so its code or the transform's has changed",
                *(store.folder, difference),
            )
            # At once: of a build that is killed half way the next run must not take the old half for new.
            for old in present:
                store.path(old).unlink()
            return list(every)
    return missing


def _difference(store: FeatureStore, pictures: Pictures, encoder: Encoder, shard: int, seed: int) -> float:
    """How far the features that the encoder now makes of a file's first picture that can be read are from those stored,
    relative to their size: what no key tells, such as a change in an encoder's code, shows here."""
    opened = copy.copy(store)  # the store itself keeps no file open that may be replaced
    for number in store.numbers(shard):
        stored = opened.read(number, 0)
        if isinstance(stored, str):
            continue
        try:
            view = pictures.views(number, count=1, seed=seed)
        except UnreadableSample:  # for now; its features are stored
            continue
        now = ImageFeatures.rounded(encoder(view)[0], store.layout.precision).float()
        before = stored.float()
        return float((now - before).norm() / before.norm().clamp(min=1e-12))
    return 0.0


def _check_complete(store: FeatureStore) -> None:
    missing = store.missing()
    if missing:
        raise DataError(
            f"stored features: {store.path(missing[0])} is not there on rank {dist.rank()}; "
            "run.features.folder must be on a disk that all machines of the run share"
        )
