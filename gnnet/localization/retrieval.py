"""Ways to find the references that a query is compared with: one class each, which `conf/localizer/retrieval/` names.

To add one, write a class with `name`, `network` and `find`, and a file beside `conf/localizer/retrieval/pairs.yaml`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gnnet.data.queries import nearest_by_pose
from gnnet.files import locked, new_file
from gnnet.geometry.pose import Pose
from gnnet.localization.global_descriptors import gem, nearest_references
from gnnet.localization.map import Map
from gnnet.localization.query import Query
from gnnet.sampling import evenly
from gnnet.scenes.formats.poses import read_pairs_file
from gnnet.scenes.formats.positions import read_positions
from gnnet.scenes.names import by_known_name, match_names

_TRAIN = 64  # descriptors for each cluster that its centre is fitted on, at most
_AT_ONCE = 1 << 16  # descriptors read together
_SAME_CAMERA = 0.01  # share by which focal lengths and centre of one camera may differ


class Retrieval(Protocol):
    """Finds the references of a map that a query is compared with.

    `name` is what reports call it; `network` gives the map's global descriptors, images (B, 3, H, W) to (B, D),
    None if they are the GeM of the localizer's own network.
    """

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> nn.Module | None: ...

    def find(self, query: Query, map: Map, count: int) -> Tensor:
        """Rows (K,) of at most `count` references, the best first, never `query.itself`; none if it finds none."""
        ...


class PositionPrior:
    """Which references stand near where a query is known to be, by GPS or odometry.

    Args:
        file: lines `name x y z` by the queries' names, in the map's world; a pose file gives its camera centres.
        radius: in the map's unit, of the references that are searched.

    Raises:
        FileNotFoundError, ValueError: if the file is missing or broken, or the radius is not above 0.
    """

    def __init__(self, file: str | Path, radius: float) -> None:
        if not radius > 0:
            raise ValueError(f"the radius around a position is {radius}; expected a length above 0")
        self.file, self.positions, self.radius = str(file), read_positions(file, on_bad="skip"), radius

    def of(self, queries: Iterable[str]) -> PositionPrior:
        """The same positions by the names of queries, which the file may write otherwise.

        Raises:
            ValueError: if the file names none of the queries.
        """
        matched = copy(self)
        matched.positions = by_known_name(self.positions, queries, source=self.file, what="queries")
        return matched

    def near(self, query: Query, map: Map) -> Tensor:
        """(R,) which references lie within the radius; all for a query without a position."""
        position = self.positions.get(query.name)
        if position is None:
            return torch.ones(len(map.names), dtype=torch.bool)
        return (map.poses.center() - position).norm(dim=-1) <= self.radius


@dataclass(frozen=True, eq=False)
class DescriptorRetrieval:
    """The references whose global descriptors are most similar to the query's.

    Args:
        same_camera: search only references whose camera has the query's focal lengths and centre (to 1 %).
            None: if the map's scene says so, and there are any (a phone's image is searched in all of a car's).
        same_place: search only references of the query's place, if that is known. None: if the map's scene says so.
        network: images (B, 3, H, W) to global descriptors (B, D), as `gnnet.models.netvlad.load_netvlad` gives;
            None takes the GeM of the localizer's own network, see `gem`.
        prior: search only references near where the query is known to be; None searches all.
    """

    same_camera: bool | None = None
    same_place: bool | None = None
    network: nn.Module | None = None
    prior: PositionPrior | None = None

    @property
    def name(self) -> str:
        name = "global descriptor" if self.network is None else type(self.network).__name__
        return name if self.prior is None else f"{name} within {self.prior.radius:g} of a position"

    def of(self, queries: Iterable[str], references: Iterable[str]) -> DescriptorRetrieval:
        """The same retrieval with the prior by the names of queries, see `PositionPrior.of`."""
        return self if self.prior is None else replace(self, prior=self.prior.of(queries))

    def find(self, query: Query, map: Map, count: int) -> Tensor:
        if self.network is None:
            descriptor = gem(query.pyramid)
        else:
            descriptor = self.network(query.image[None].to(query.pyramid.maps[0].device))
        whitened = map.whitening.apply(descriptor[0].float().cpu())
        return self._nearest(whitened, map, count, self._allowed(query, map))

    def _nearest(self, descriptor: Tensor, map: Map, count: int, allowed: Tensor) -> Tensor:
        return nearest_references(descriptor, map.global_descriptors, count, allowed=allowed)[0]

    def _allowed(self, query: Query, map: Map) -> Tensor:
        """(R,) references other than the query itself, of its place, camera and surroundings as far as asked for."""
        allowed = torch.ones(len(map.names), dtype=torch.bool)
        if query.itself in map.rows:
            allowed[map.rows[query.itself]] = False
        if self.prior is not None:
            allowed &= self.prior.near(query, map)
        within = map.retrieve_within
        if ("place" in within if self.same_place is None else self.same_place) and query.place in map.places:
            allowed &= torch.tensor([place == query.place for place in map.places])
        if self.same_camera or (self.same_camera is None and "camera" in within):
            own, others = query.full_camera.parameters[:4], map.cameras.parameters[:, :4]
            alike = allowed & ((others - own).abs() <= _SAME_CAMERA * own.abs()).all(-1)
            allowed = alike if self.same_camera or alike.any() else allowed
        return allowed


@dataclass(frozen=True, eq=False)
class IndexedRetrieval(DescriptorRetrieval):
    """The same by an inverted file (faiss), which compares a query with a part of a large map: it may miss a reference.

    The index is made with the first query on a map, and kept beside it. Among a few references none is missed.

    Args:
        probes: clusters of references that are searched, of 4 √R; more miss fewer.
        few: number of references up to which all are compared with, as without an index.
    """

    probes: int = 64
    few: int = 20_000

    @property
    def name(self) -> str:
        return f"{super().name}, indexed"

    def _nearest(self, descriptor: Tensor, map: Map, count: int, allowed: Tensor) -> Tensor:
        rows = allowed.nonzero().squeeze(1)
        if len(rows) > self.few:
            faiss, index = _inverted_file(map)
            selector = faiss.IDSelectorBitmap(np.packbits(allowed.numpy(), bitorder="little"))
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=self.probes)
            found = torch.from_numpy(index.search(descriptor[None].numpy(), count, params=parameters)[1][0])
            rows = found[found >= 0].sort().values
        return rows[nearest_references(descriptor, map.global_descriptors[rows.numpy()], count)[0]]


@lru_cache(maxsize=2)
def _inverted_file(map: Map) -> tuple[Any, Any]:
    """The package faiss, and the index of a map's global descriptors, which is made if it is not beside the map.

    Raises:
        ValueError: if faiss is not installed.
    """
    try:
        import faiss  # an optional package
    except ImportError as error:
        raise ValueError("retrieval by an index needs faiss: pip install 'gnnet[index]'") from error
    made_of = hashlib.sha256(json.dumps(map.about, sort_keys=True).encode()).hexdigest()[:12]
    path = map.path.with_name(f"{map.path.name}.{made_of}.faiss")
    with locked(path.with_name(f".{path.name}.lock")):  # of several processes one makes it
        if not path.exists():
            known = np.flatnonzero(np.isfinite(map.global_descriptors[:, 0]))  # but those that were left out
            width, clusters = map.global_descriptors.shape[1], max(1, round(4 * len(known) ** 0.5))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, clusters, faiss.METRIC_INNER_PRODUCT)
            index.train(map.global_descriptors[known[evenly(len(known), _TRAIN * clusters)]])
            for start in range(0, len(known), _AT_ONCE):
                part = known[start : start + _AT_ONCE]
                index.add_with_ids(map.global_descriptors[part], part)
            with new_file(path) as partial:
                faiss.write_index(index, str(partial))
    return faiss, faiss.read_index(str(path), faiss.IO_FLAG_MMAP)


class PairsRetrieval:
    """The references that a file lists for each query.

    Args:
        file: hloc's pairs file: a line `query reference` for each pair, the nearest reference first.

    Raises:
        FileNotFoundError, ValueError: if the file is missing or broken.
    """

    name = "pairs file"
    network = None

    def __init__(self, file: str | Path) -> None:
        self.file, self.pairs = str(file), read_pairs_file(file, on_bad="skip")

    def of(self, queries: Iterable[str], references: Iterable[str]) -> PairsRetrieval:
        """The same pairs by the names of queries and references, which the file may write otherwise.

        Raises:
            ValueError: if the file names none of the queries, or none of the references.
        """
        listed = {name: name for names in self.pairs.values() for name in names}
        known = by_known_name(listed, references, source=self.file, what="map's references")
        reference = {given: name for name, given in known.items()}
        pairs = by_known_name(self.pairs, queries, source=self.file, what="queries")
        matched = copy(self)
        matched.pairs = {q: tuple(reference[name] for name in names if name in reference) for q, names in pairs.items()}
        return matched

    def find(self, query: Query, map: Map, count: int) -> Tensor:
        return rows_of(self.pairs.get(query.name, ()), query, map, count)


class OracleRetrieval:
    """The references nearest to the query's true pose: what is lost with others is retrieval's share of the error."""

    name = "true pose (oracle)"
    network = None

    def find(self, query: Query, map: Map, count: int) -> Tensor:
        return _near(query.truth, query, map, count)


class InitialPoseRetrieval:
    """The references nearest to the initial pose that the caller gives."""

    name = "initial pose"
    network = None

    def find(self, query: Query, map: Map, count: int) -> Tensor:
        return _near(query.initial, query, map, count)


def rows_of(names: Iterable[str], query: Query, map: Map, count: int) -> Tensor:
    """Rows of the first `count` references of these names, each once; names that the map lacks are passed over.

    Names match as `match_names` says.
    """
    names = list(dict.fromkeys(names))
    if not map.rows.keys() >= set(names):
        reference = {given: known for known, given in match_names(names, map.names).given.items()}
        names = [reference[name] for name in names if name in reference]
    rows = [map.rows[name] for name in names if name != query.itself]
    return torch.tensor(rows[:count], dtype=torch.int64)


def _near(pose: Pose | None, query: Query, map: Map, count: int) -> Tensor:
    """Rows of the references nearest to a pose; none without a pose."""
    if pose is None:
        return torch.zeros(0, dtype=torch.int64)
    rows = nearest_by_pose(pose, map.poses, count + 1, per_radian=map.depth)
    return rows[rows != map.rows.get(query.itself or "", -1)][:count]
