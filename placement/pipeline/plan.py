"""A Plan that has stages, and the train step that it describes.

The plan's mesh has a ``stage`` axis; ``plan.program`` says how :func:`build_program` makes the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cost_model.estimate import Estimate
from graphs.errors import MeshwrightError
from graphs.zoo.config import ModelConfig

_NOTHING = Estimate(
    step_time_s=0.0,
    compute_time_s=0.0,
    exposed_comm_time_s=0.0,
    comm_time_s=0.0,
    peak_memory_bytes=0.0,
    energy_j=None,
    table_cost_s=0.0,
    compute_by_class_s={},
    collectives={},
    comm_by_purpose_s={},
    memory_by_class_bytes={},
)


def build_program(config: ModelConfig, program: Mapping[str, Any]):
    """(train_step, abstract arguments, donate_argnums) of a pipelined plan's program."""
    from placement.pipeline.step import build_pipelined_step

    options = dict(program)
    options["activation_spec"] = [
        tuple(e) if isinstance(e, list) else e for e in options.get("activation_spec", ())
    ]
    return build_pipelined_step(config, **options)


def pipelined_plan(
    config: ModelConfig,
    *,
    cluster: str,
    mesh_shape: Mapping[str, int],
    global_batch: int,
    microbatches: int,
    estimate: Estimate | None = None,
    schedule: str = "1f1b",
    chunks: int = 1,
    layers: tuple[int, ...] | None = None,
    zero_stage: int = 1,
    seq_len: int | None = None,
    objective: str = "time",
    lower_bound_s: float = 0.0,
    **options: Any,
):
    """A Plan of given degrees.

    Args:
      mesh_shape: sizes of ``stage``, ``data``, ``expert``, ``context`` and ``model``.
      estimate: what the step is predicted to take (`placement.jobs`); zeros where not given.
      zero_stage: 1 shards optimizer state over data, 0 does not.
      options: as `placement.pipeline.step.build_pipelined_step`.

    Raises:
      MeshwrightError: what the model, the cluster or the numbers do not allow.
    """
    import jax

    from cost_model.cluster import parse_cluster
    from cost_model.layout import layout_for
    from graphs.trace import trace
    from placement.pipeline.shardings import activation_spec, argument_specs
    from placement.pipeline.stages import pipelined_segment
    from placement.plan import LeafSpec, Plan

    if "stage" not in mesh_shape:
        raise MeshwrightError(
            f"mesh {dict(mesh_shape)} has no axis 'stage'; add it, or use placement.optimize for "
            "a plan without stages"
        )
    if config.n_experts and mesh_shape.get("context", 1) > 1:
        raise MeshwrightError(
            "experts gather tokens of whole sequences, so that a pipelined model with experts cannot "
            f"have context={mesh_shape['context']}; use context 1"
        )
    seq_len = config.seq_len if seq_len is None else seq_len
    spec = activation_spec(mesh_shape, seq_len, has_experts=config.n_experts > 0)
    program = {
        "mesh_shape": dict(mesh_shape),
        "global_batch": global_batch,
        "seq_len": seq_len,
        "microbatches": microbatches,
        "schedule": schedule,
        "chunks": chunks,
        "layers": None if layers is None else list(layers),
        "activation_spec": [list(e) if isinstance(e, tuple) else e for e in spec],
        "zero_stage": zero_stage,
        **options,
    }
    step, args, donated = build_program(config, program)
    layout = layout_for(parse_cluster(cluster), dict(mesh_shape))
    specs = argument_specs(args, mesh_shape, pipelined_segment(config).name, zero_stage)
    graph = trace(step, *args, donate_argnums=donated)
    inputs = tuple(
        LeafSpec(name=name, shape=graph.tensors[t].shape, dtype=graph.tensors[t].dtype, spec=spec)
        for t, name, spec in zip(graph.inputs, graph.input_names, specs, strict=True)
    )
    shapes = jax.eval_shape(step, *args)
    n_state = len(jax.tree.leaves(args[:2]))
    out_leaves = jax.tree_util.tree_leaves_with_path(shapes)
    outputs = tuple(
        LeafSpec(
            name=jax.tree_util.keystr(path),
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            spec=inputs[i].spec if i < n_state else tuple(() for _ in leaf.shape),
        )
        for i, (path, leaf) in enumerate(out_leaves)
    )
    return Plan(
        cluster=parse_cluster(cluster).notation,
        mesh_shape=dict(mesh_shape),
        placement=layout.placement,
        optimizer="pipeline",
        objective=objective,
        inputs=inputs,
        outputs=outputs,
        results={},
        operands={},
        donate_argnums=donated,
        fingerprint=graph.fingerprint,
        estimate=estimate or _NOTHING,
        lower_bound_s=lower_bound_s,
        table_bound_s=0.0,
        evaluations=0,
        planning_time_s=0.0,
        status="feasible",
        program=program,
        trees=(jax.tree.structure(tuple(args)), jax.tree.structure(shapes)),
    )
