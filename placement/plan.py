"""The Plan: what was decided, what it is predicted to cost, and how to use it.

A plan is plain data (:meth:`Plan.save` writes JSON with a schema version, :meth:`Plan.load` reads it
without JAX). Argument and result structures are JAX tree definitions, which JSON cannot hold: a
loaded plan gets them back from ``plan.bind(train_step, *args)``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost_model.cluster import parse_cluster
from cost_model.estimate import Estimate
from cost_model.layout import Factor, MeshLayout
from graphs.errors import InfeasibleError, MeshwrightError
from graphs.mesh import LogicalMesh

if TYPE_CHECKING:
    import jax

SCHEMA_VERSION = 1

_WRITTEN_APART = frozenset(
    ("trees", "assignment", "estimate", "results", "operands", "copies", "inputs", "outputs")
)
"""Fields of a plan that its file holds in another form, or not."""

SpecEntries = tuple[tuple[str, ...], ...]
"""For each dimension the mesh axis names that shard it, major to minor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """Sharding of one flat argument or result."""

    name: str
    """Path in the pytree, e.g. ``[0]['layers']['wq']``."""
    shape: tuple[int, ...]
    dtype: str
    spec: SpecEntries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Mesh, shardings and constraints of one train step on one cluster."""

    cluster: str
    """Cluster notation."""
    mesh_shape: dict[str, int]
    """Axis name -> size, slowest first."""
    placement: tuple[tuple[Factor, ...], ...]
    """Physical factors of each mesh axis."""
    optimizer: str
    """What proposed it."""
    objective: str
    inputs: tuple[LeafSpec, ...]
    outputs: tuple[LeafSpec, ...]
    results: dict[int, SpecEntries]
    """Tensor number -> constraint on the value."""
    operands: dict[tuple[int, int], SpecEntries]
    """(op number, tensor number) -> constraint on the copy that the op reads."""
    donate_argnums: tuple[int, ...]
    fingerprint: str
    """Of the traced program; a plan is refused for another program."""
    estimate: Estimate
    lower_bound_s: float
    """No plan in the searched space takes less simulated time; 0 where it was not searched whole, inf
    where it is proven that none fits."""
    table_bound_s: float
    """Lower bound of the additive score on the chosen mesh."""
    evaluations: int
    planning_time_s: float
    status: str
    """``feasible``, ``time_limit`` (best found so far) or why it is not."""
    warnings: tuple[str, ...] = ()
    alternatives: tuple[dict[str, Any], ...] = ()
    """What else was considered: mesh shape, optimizer, simulated seconds, memory, fits."""
    reasons: tuple[str, ...] = ()
    """Sentences for :meth:`explain`."""
    timeline: tuple[tuple[str, str, str, float, float], ...] = ()
    """The simulated step: (lane, name, kind, start_s, end_s)."""
    memory_over_time: tuple[tuple[float, float], ...] = ()
    """(time_s, live bytes of a device from then on)."""
    program: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How the train step is built (``optimize_model``): remat, microbatches, batch; else empty."""
    copies: dict[tuple[int, int], SpecEntries] = dataclasses.field(default_factory=dict)
    """(op number, tensor number) -> the sharding of a copy that several operations share, where an
    operand is made from one that is sharded as neither it nor the value is."""
    checkpoint_policy: str = ""
    """What the step's ``checkpoint_policy`` argument is given (:mod:`placement.checkpointing`); empty
    where it has none."""
    trees: Any = dataclasses.field(default=None, compare=False, repr=False)
    """(argument tree, result tree) definitions; None after loading until :meth:`bind`."""
    assignment: Any = dataclasses.field(default=None, compare=False, repr=False)
    """[nodes] (class that each mesh axis shards, class that partial sums are scattered along) of the
    problem that was solved; not saved."""

    # -- meshes and shardings -------------------------------------------------

    def layout(self) -> MeshLayout:
        """The logical mesh laid on the cluster."""
        return MeshLayout(
            mesh=LogicalMesh.from_shape(self.mesh_shape),
            cluster=parse_cluster(self.cluster),
            placement=self.placement,
        )

    def mesh(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """The mesh over real devices (default ``jax.devices()``) or a compile-only topology's.

        Raises MeshwrightError if the number of devices is not the plan's.
        """
        import jax

        from cost_model.layout import make_mesh

        found = list(jax.devices() if devices is None else devices)
        layout = self.layout()
        if len(found) != layout.mesh.n_devices:
            raise MeshwrightError(
                f"the plan is for {layout.mesh.n_devices} devices ({self.cluster}) and "
                f"{len(found)} were given; pass that many, or plan for the devices at hand"
            )
        return make_mesh(layout, found)

    @property
    def in_specs(self) -> tuple:
        """PartitionSpecs with the structure of the arguments."""
        return self._tree(0, [_partition_spec(leaf.spec) for leaf in self.inputs])

    @property
    def out_specs(self) -> Any:
        """PartitionSpecs with the structure of the result."""
        return self._tree(1, [_partition_spec(leaf.spec) for leaf in self.outputs])

    def in_shardings(self, mesh: jax.sharding.Mesh) -> tuple:
        """NamedShardings with the structure of the arguments, for ``jax.jit``."""
        return self._tree(0, [_sharding(mesh, leaf.spec) for leaf in self.inputs])

    def out_shardings(self, mesh: jax.sharding.Mesh) -> Any:
        """NamedShardings with the structure of the result, for ``jax.jit``."""
        return self._tree(1, [_sharding(mesh, leaf.spec) for leaf in self.outputs])

    def _tree(self, which: int, leaves: list) -> Any:
        import jax

        if self.trees is None:
            raise MeshwrightError(
                "a loaded plan does not know the argument structure; call "
                "plan = plan.bind(train_step, *args) first"
            )
        return jax.tree.unflatten(self.trees[which], leaves)

    def bind(self, fn: Callable, *args: Any) -> Plan:
        """This plan with the structures of ``fn`` and its arguments.

        Raises MeshwrightError, naming the difference, if the program or its arguments differ.
        """
        import jax

        from graphs.trace import trace
        from placement.checkpointing import with_policy

        fn = with_policy(fn, self.checkpoint_policy)
        donated = tuple(n for n in self.donate_argnums if n < len(args))
        graph = trace(fn, *args, donate_argnums=donated)
        self.check_inputs(graph)
        if graph.fingerprint != self.fingerprint:
            raise MeshwrightError(
                f"the plan was made for another program (fingerprint {self.fingerprint}, this one "
                f"is {graph.fingerprint}) though its arguments agree; plan again"
            )
        shapes = jax.eval_shape(fn, *args)
        return dataclasses.replace(
            self, trees=(jax.tree.structure(tuple(args)), jax.tree.structure(shapes))
        )

    def check_inputs(self, graph) -> None:
        """Refuse a graph whose arguments differ from the plan's, naming the first difference."""
        if len(graph.inputs) != len(self.inputs):
            raise MeshwrightError(
                f"the plan has {len(self.inputs)} argument arrays and the function is called with "
                f"{len(graph.inputs)}; pass the arguments that were planned or plan again"
            )
        for leaf, t, name in zip(self.inputs, graph.inputs, graph.input_names):
            tensor = graph.tensors[t]
            if (leaf.name, leaf.shape, leaf.dtype) != (name, tensor.shape, tensor.dtype):
                raise MeshwrightError(
                    f"argument {name} is {tensor.dtype}{list(tensor.shape)} but the plan was made "
                    f"with {leaf.name} {leaf.dtype}{list(leaf.shape)}; plan again for it"
                )

    def apply(self, fn: Callable, mesh: Any = None) -> Callable:
        """``fn`` with the plan's activation constraints inserted, inside loops too.

        ``mesh`` (default: the plan's abstract mesh) is what the constraints refer to.
        """
        from graphs.trace import graph_of_jaxpr
        from placement.apply import Constraints, apply
        from placement.checkpointing import with_policy

        fn = with_policy(fn, self.checkpoint_policy)
        names = {leaf.name: None for leaf in self.inputs}

        def check(closed) -> None:
            graph = graph_of_jaxpr(closed, tuple(names), None, None)
            self.check_inputs(graph)
            if graph.fingerprint != self.fingerprint:
                raise MeshwrightError(
                    "the plan was made for another program (the traced operations differ); "
                    "plan again for this function"
                )

        constraints = Constraints(
            results={t: _entries(s) for t, s in self.results.items()},
            operands={k: _entries(s) for k, s in self.operands.items()},
            copies={k: _entries(s) for k, s in self.copies.items()},
        )
        return apply(fn, constraints, mesh if mesh is not None else self.abstract_mesh(), check)

    def abstract_mesh(self):
        """The mesh without devices."""
        import jax

        return jax.sharding.AbstractMesh(tuple(self.mesh_shape.values()), tuple(self.mesh_shape))

    # -- reading it -----------------------------------------------------------

    def explain(self) -> str:
        """Why each axis is where it is, and what the next best choice would cost."""
        return "\n".join(self.reasons)

    def report(self, path: str | os.PathLike) -> Path:
        """Write one self-contained HTML page."""
        from placement.report import write_report

        return write_report(self, path)

    def raise_if_infeasible(self) -> None:
        if self.status not in ("feasible", "time_limit"):
            raise InfeasibleError(self.status)

    # -- files ----------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> Path:
        """Write the plan as JSON, whole or not at all. MeshwrightError where it cannot be."""
        path = Path(path)
        data = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in _WRITTEN_APART
        }
        data["lower_bound_s"] = self.lower_bound_s if math.isfinite(self.lower_bound_s) else None
        data["placement"] = [[dataclasses.asdict(x) for x in axis] for axis in self.placement]
        data["estimate"] = self.estimate.to_dict()
        data["inputs"] = [dataclasses.asdict(x) for x in self.inputs]
        data["outputs"] = [dataclasses.asdict(x) for x in self.outputs]
        data["results"] = [[t, s] for t, s in sorted(self.results.items())]
        for key in ("operands", "copies"):
            data[key] = [[o, t, s] for (o, t), s in sorted(getattr(self, key).items())]
        text = json.dumps({"schema_version": SCHEMA_VERSION, "kind": "meshwright plan", **data})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise MeshwrightError(
                f"the plan cannot be written to {str(path)!r} ({error.strerror}); give a path in a "
                "folder that can be written and has room"
            ) from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read a plan. Raises MeshwrightError for a missing, truncated or newer file."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MeshwrightError(
                f"there is no plan file {path}; write one with plan.save"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise MeshwrightError(
                f"plan file {path} is not complete JSON ({error}); it was cut short or damaged, "
                "plan again"
            ) from None
        if not isinstance(data, dict) or data.get("kind") != "meshwright plan":
            raise MeshwrightError(
                f"file {path} is not a Meshwright plan; pass one made by plan.save"
            )
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise MeshwrightError(
                f"plan file {path} has schema version {version!r} and this Meshwright reads "
                f"{SCHEMA_VERSION}; use the Meshwright that wrote it or plan again"
            )
        try:
            return cls._from_data(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, MeshwrightError):
                raise
            raise MeshwrightError(
                f"plan file {path} lacks or garbles a field ({error}); plan again"
            ) from error

    @classmethod
    def _from_data(cls, data: dict[str, Any]) -> Plan:
        def spec(entries) -> SpecEntries:
            return tuple(tuple(str(a) for a in dim) for dim in entries)

        def leaf(x) -> LeafSpec:
            return LeafSpec(
                name=x["name"], shape=tuple(x["shape"]), dtype=x["dtype"], spec=spec(x["spec"])
            )

        names = {f.name for f in dataclasses.fields(cls)} - {"trees", "assignment"}
        fields = {k: v for k, v in data.items() if k in names}
        fields["placement"] = tuple(tuple(Factor(**f) for f in axis) for axis in data["placement"])
        if fields["lower_bound_s"] is None:
            fields["lower_bound_s"] = math.inf
        fields["estimate"] = Estimate.from_dict(data["estimate"])
        fields["inputs"] = tuple(leaf(x) for x in data["inputs"])
        fields["outputs"] = tuple(leaf(x) for x in data["outputs"])
        fields["results"] = {int(t): spec(s) for t, s in data["results"]}
        for key in ("operands", "copies"):
            given = data[key] if key == "operands" else data.get(key, ())  # older files have none
            fields[key] = {(int(o), int(t)): spec(s) for o, t, s in given}
        for key in ("donate_argnums", "warnings", "alternatives", "reasons"):
            fields[key] = tuple(data[key])
        for key in ("timeline", "memory_over_time"):
            fields[key] = tuple(tuple(x) for x in fields.get(key, ()))
        plan = cls(**fields)
        plan.layout()
        return plan


def _entries(spec: SpecEntries) -> tuple:
    return tuple(None if not dim else dim[0] if len(dim) == 1 else tuple(dim) for dim in spec)


def _partition_spec(spec: SpecEntries):
    from jax.sharding import PartitionSpec

    entries = list(_entries(spec))
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _sharding(mesh, spec: SpecEntries):
    from jax.sharding import NamedSharding

    return NamedSharding(mesh, _partition_spec(spec))
