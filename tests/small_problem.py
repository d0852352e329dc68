"""A planning problem that traces and solves in a moment."""

from placement.learned.problems import PlanningProblem


def small_problem(*, name: str, n_layers: int = 4, width: int = 512, **changes) -> PlanningProblem:
    """A dense decoder; its split is the name without the number."""
    facts = dict(
        name=name,
        split=name.rpartition("_")[0],
        family="dense",
        model=dict(
            name="small", n_layers=n_layers, d_model=width, n_heads=8, n_kv_heads=8,
            head_dim=width // 8, d_ff=4 * width, vocab_size=16 * width, attention="mha",
        ),
        cluster="v5e:4x4",
        global_batch=32,
        seq_len=512,
        scan=True,
        optimizer="adamw",
    )  # fmt: skip
    return PlanningProblem(**facts | changes)
