"""Problems as arrays: what the policy sees of each, and what its recorded candidates were worth.

    python -m placement.learned.dataset split=train

Tracing a program takes most of the time of a look at it, so observations and candidate features are
kept under the cache folder, one ``.npz`` file per problem, for as long as the code that makes them
stays the same. Training batches are padded to common sizes with masks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphs.errors import MeshwrightError
from placement.compile_cache import cache_dir, write_atomically
from placement.learned.candidates import Candidates, candidates_of
from placement.learned.features import Observation, observe
from placement.learned.problems import VERSION, PlanningProblem, load_split, load_splits

_MAKERS = ("program", "wires", "closed_form", "features", "candidates")
_SEEN = ("nodes", "relations", "classes", "classes_of_nodes", "nodes_of_classes", "regions",
         "region_of_nodes", "nodes_of_regions", "overall")  # fmt: skip
_FOUND = ("axes", "pairs", "of", "rows", "estimate", "pressure")
_MANY_NODES = 256
"""Above this all problems are padded alike: there are few, and each shape is compiled once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays:
    """Arrays of an Observation and its Candidates, as the network reads them, padded or not.

    In a batch every field has a leading axis B.
    """

    nodes: Any
    relations: Any
    classes: Any
    classes_of_nodes: Any
    nodes_of_classes: Any
    regions: Any
    region_of_nodes: Any
    nodes_of_regions: Any
    overall: Any
    axes: Any
    pairs: Any
    of: Any
    rows: Any
    estimate: Any
    pressure: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masks:
    """Ones where something is, zeros where it is padding."""

    nodes: Any
    """[N]."""
    classes: Any
    """[C]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One problem with its recorded candidates."""

    name: str
    arrays: Arrays
    """Of all candidates of the problem."""
    ideal_s: float
    index: np.ndarray
    """[K] recorded candidates."""
    step_time_s: np.ndarray
    """[K]."""
    memory_ratio: np.ndarray
    """[K] bytes over the limit."""
    fits: np.ndarray
    """[K] bool."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """B problems padded to common sizes, with their recorded candidates only."""

    arrays: Arrays
    masks: Masks
    log_time: Any
    """[B, K] log of step time over the ideal one; 0 where padding."""
    memory: Any
    """[B, K] log of bytes over the limit."""
    fits: Any
    """[B, K] 1 where the memory limit is kept."""
    recorded: Any
    """[B, K] 1 where a candidate is, 0 where padding."""


def features_version() -> str:
    """Hash of the modules that make observations."""
    text = hashlib.sha256()
    for name in _MAKERS:
        path = importlib.import_module(f"placement.learned.{name}").__file__
        text.update(pathlib.Path(str(path)).read_bytes())
    return text.hexdigest()[:12]


def arrays_of(seen: Observation, found: Candidates) -> Arrays:
    """The arrays of both."""
    return Arrays(**{k: getattr(seen, k) for k in _SEEN}, **{k: getattr(found, k) for k in _FOUND})


def observed(problem: PlanningProblem, *, base: Any = None) -> tuple[Arrays, float, float]:
    """(arrays of all candidates, ideal seconds, memory limit), from the cache where possible."""
    path = cache_dir("learned", VERSION, f"observed-{features_version()}") / f"{problem.name}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            data = {k: file[k] for k in file.files}
        ideal, limit = float(data.pop("ideal_s")), float(data.pop("limit_bytes"))
        return Arrays(**data), ideal, limit
    from placement.learned.instance import Instance

    instance = base or Instance(problem)
    seen = observe(instance.base, instance.cluster)
    arrays = arrays_of(seen, candidates_of(seen, instance.outers))
    buffer = io.BytesIO()
    data: dict[str, Any] = {k: np.asarray(v) for k, v in dataclasses.asdict(arrays).items()}
    np.savez_compressed(
        buffer,
        ideal_s=np.array(seen.ideal_s),
        limit_bytes=np.array(instance.limit_bytes),
        **data,
    )
    write_atomically(path, buffer.getvalue())
    return arrays, seen.ideal_s, instance.limit_bytes


def load_examples(split: str, *, visited: bool = True) -> list[Example]:
    """Examples of a split, as far as outcomes are recorded, with what policies visited or not."""
    from placement.learned import collect, outcomes

    found = []
    for problem in load_split(split):
        if not outcomes.path_of(problem).exists():
            continue
        arrays, ideal, limit_bytes = observed(problem)
        recorded = outcomes.load(problem)
        known = {k: getattr(recorded, k) for k in collect.FIELDS}
        more = collect.load(problem) if visited else {}
        if more:
            fresh = ~np.isin(more["index"], known["index"])
            known = {k: np.concatenate([known[k], more[k][fresh]]) for k in collect.FIELDS}
        found.append(
            Example(
                name=problem.name,
                arrays=arrays,
                ideal_s=ideal,
                index=known["index"],
                step_time_s=known["step_time_s"],
                memory_ratio=known["memory_bytes"] / limit_bytes,
                fits=known["fits"],
            )
        )
    if not found:
        raise MeshwrightError(
            f"no outcomes of split {split!r} are recorded; run "
            f"python -m placement.learned.outcomes split={split}"
        )
    return found


def batches(examples: Sequence[Example], size: int) -> list[Batch]:
    """Batches of problems of similar size, each padded to multiples of a few sizes.

    The last batch of a size is filled up with problems whose candidates count as padding.
    """
    groups: dict[int, list[Example]] = {}
    for e in examples:
        nodes = _up(len(e.arrays.nodes), 64)
        groups.setdefault(min(nodes, _MANY_NODES + 1), []).append(e)
    width = _up(max(len(e.index) for e in examples), 8)
    regions = _up(max(len(e.arrays.regions) for e in examples), 4)
    axes = _up(max(len(np.unique(e.arrays.of[e.index])) for e in examples), 8)
    places = max(e.arrays.of.shape[1] for e in examples)
    made = []
    for _, group in sorted(groups.items()):
        nodes = _up(max(len(e.arrays.nodes) for e in group), 64)
        classes = _up(max(len(e.arrays.classes) for e in group), 8)
        sizes = dict(N=nodes, C=classes, R=regions, U=axes, K=width, A=places)
        padded = [_padded(e, sizes) for e in group]
        empty = dict(padded[0], recorded=np.zeros_like(padded[0]["recorded"]))
        padded += [empty] * (-len(padded) % size)
        for k in range(0, len(padded), size):
            made.append(_stack(padded[k : k + size]))
    return made


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _padded(e: Example, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    a = e.arrays
    used, inverse = np.unique(a.of[e.index], return_inverse=True)
    of = inverse.reshape(a.of[e.index].shape)
    if used[0] < 0:
        used, of = used[1:], of - 1
    rows = {
        "nodes": (a.nodes, "N."),
        "relations": (np.asarray(a.relations), ".NN"),
        "classes": (a.classes, "C."),
        "classes_of_nodes": (a.classes_of_nodes, "NC"),
        "nodes_of_classes": (a.nodes_of_classes, "CN"),
        "regions": (a.regions, "R."),
        "region_of_nodes": (a.region_of_nodes, "NR"),
        "nodes_of_regions": (a.nodes_of_regions, "RN"),
        "overall": (a.overall, "."),
        "axes": (a.axes[used], "U."),
        "pairs": (a.pairs[:, used], "CU."),
        "of": (of.astype(np.int32), "KA"),
        "rows": (a.rows[e.index], "K."),
        "estimate": (a.estimate[e.index], "K"),
        "pressure": (a.pressure[e.index], "K"),
        "node_mask": (np.ones(len(a.nodes), np.float32), "N"),
        "class_mask": (np.ones(len(a.classes), np.float32), "C"),
        "log_time": (np.log(e.step_time_s / e.ideal_s).astype(np.float32), "K"),
        "memory": (np.log(np.maximum(e.memory_ratio, 1e-6)).astype(np.float32), "K"),
        "fits": (e.fits.astype(np.float32), "K"),
        "recorded": (np.ones(len(e.index), np.float32), "K"),
    }
    found = {}
    for name, (x, letters) in rows.items():
        pad = [(0, sizes[s] - n) if s in sizes else (0, 0) for s, n in zip(letters, x.shape)]
        found[name] = np.pad(x, pad, constant_values=-1 if name == "of" else 0)
    return found


def _stack(rows: list[dict[str, np.ndarray]]) -> Batch:
    joined = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    masks = Masks(nodes=joined.pop("node_mask"), classes=joined.pop("class_mask"))
    rest = {k: joined.pop(k) for k in ("log_time", "memory", "fits", "recorded")}
    return Batch(arrays=Arrays(**joined), masks=masks, **rest)


def main(argv: list[str]) -> int:
    """Observe the problems of the splits named."""
    problems = load_splits(argv)
    for n, problem in enumerate(problems):
        arrays, ideal, _ = observed(problem)
        print(
            f"{n + 1}/{len(problems)} {problem.name}: {len(arrays.nodes)} nodes, "
            f"{len(arrays.rows)} candidates, ideal {ideal:.3g} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
