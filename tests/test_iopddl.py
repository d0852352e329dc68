"""The contest's instance format: reading, writing, malformed files, and the solve command."""

import dataclasses
import gzip
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cost_model import iopddl
from cost_model.problem import FORBIDDEN, Problem
from graphs.errors import MeshwrightError
from placement import solver
from placement.solver import contest, suite

DATA = Path(__file__).parent / "data" / "iopddl"


@pytest.fixture(scope="module", autouse=True)
def _compiled_loops():
    solver.prepare()


def example() -> dict:
    return json.loads((DATA / "example.json").read_text())


def direct_cost(document: dict, choice: tuple[int, ...]) -> float:
    """Cost by the contest's definition from the JSON itself; inf where usage passes the limit."""
    body = document["problem"]
    nodes, edges = body["nodes"], body["edges"]
    total = sum(row[s] for row, s in zip(nodes["costs"], choice))
    for ends, table in zip(edges["nodes"], edges["costs"]):
        at = 0
        for i in ends:
            at = at * len(nodes["costs"][i]) + choice[i]
        total += table[at]
    for t in {start for start, _ in nodes["intervals"]}:
        live = [i for i, (a, b) in enumerate(nodes["intervals"]) if a <= t < b]
        if sum(nodes["usages"][i][choice[i]] for i in live) > body["usage_limit"]:
            return float("inf")
    return total


def all_choices(document: dict):
    return itertools.product(*(range(len(r)) for r in document["problem"]["nodes"]["costs"]))


def with_edges(document: dict, extra: list[tuple[list[int], list[int]]]) -> dict:
    edges = document["problem"]["edges"]
    edges["nodes"] = edges["nodes"] + [ends for ends, _ in extra]
    edges["costs"] = edges["costs"] + [table for _, table in extra]
    return document


def documents() -> dict[str, dict]:
    one = ([2], [7, 0, 40])
    parallel = ([3, 1], [11, 2, 5, 3])
    three = ([1, 2, 3], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
    forbidding = ([1, 2, 3], [3, 10**18, 4, 1, 10**18, 9, 2, 6, 5, 10**18, 5, 8])
    return {
        "example": example(),
        "one node": with_edges(example(), [one]),
        "parallel": with_edges(example(), [parallel]),
        "three nodes": with_edges(example(), [three]),
        "forbidden": with_edges(example(), [forbidding, parallel, one]),
    }


@pytest.mark.parametrize("name", documents())
def test_optimum_equals_enumeration_of_the_file(name):
    document = documents()[name]
    best = min(direct_cost(document, x) for x in all_choices(document))
    problem = iopddl.parse(document, name=name)
    for solve in (solver.solve, solver.exact):
        found = solve(problem, time_limit_s=5.0)
        answer = tuple(found.assignment[: iopddl.n_listed_nodes(problem)].tolist())
        assert found.cost == best == direct_cost(document, answer)


def test_example_costs_agree_at_every_choice():
    document = example()
    problem = iopddl.parse(document, name="example")
    for x in all_choices(document):
        expected = direct_cost(document, x)
        assert problem.is_feasible(np.array(x)) == np.isfinite(expected)
        if np.isfinite(expected):
            assert problem.cost(np.array(x)) == expected


def same(a: Problem, b: Problem) -> None:
    for field in dataclasses.fields(Problem):
        if field.name != "name":
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_instances_survive_writing_and_reading(tmp_path, suffix):
    problem = iopddl.read(DATA / "G.json.gz")
    iopddl.write(problem, tmp_path / f"x{suffix}")
    same(problem, iopddl.read(tmp_path / f"x{suffix}"))
    assert [f.name for f in tmp_path.iterdir()] == [f"x{suffix}"]


def seconds_problem() -> Problem:
    """Costs in seconds, a node with two live ranges, one forbidden pair."""
    rng = np.random.default_rng(4)
    pair = rng.random(6) * 1e-3
    pair[2] = FORBIDDEN
    return Problem(
        name="seconds",
        strategy_offsets=np.array([0, 2, 5]),
        node_costs=rng.random(5) * 1e-3,
        edge_nodes=np.array([[0, 1]], dtype=np.int32),
        edge_offsets=np.array([0, 6]),
        edge_costs=pair,
        usage_nodes=np.array([0, 1, 1], dtype=np.int32),
        usage_intervals=np.array([[0, 3], [1, 2], [5, 9]]),
        usage_offsets=np.array([0, 2, 5, 8]),
        usages=np.array([3.0, 1.0, 2.0, 5.0, 1.0, 4.0, 6.0, 2.0]),
        usage_limit=7.0,
    )


def test_an_exported_problem_comes_back(tmp_path):
    problem = seconds_problem()
    iopddl.write(problem, tmp_path / "x.json")
    back = iopddl.read(tmp_path / "x.json")
    assert back.n_nodes == problem.n_nodes
    np.testing.assert_array_equal(back.usages, problem.usages)
    np.testing.assert_array_equal(back.usage_intervals, problem.usage_intervals)
    for x in itertools.product(range(2), range(3)):
        a, b = problem.cost(np.array(x)), back.cost(np.array(x))
        assert b == pytest.approx(a, rel=1e-9)
        assert problem.is_feasible(np.array(x)) == back.is_feasible(np.array(x))


def test_an_export_means_the_same_to_programs_that_ignore_the_extra_key():
    problem = seconds_problem()
    document = iopddl.document(problem)
    unit = document.pop("meshwright")["cost_unit"]
    best = min(direct_cost(document, x) for x in all_choices(document))
    feasible = [
        problem.cost(np.array(x))
        for x in itertools.product(range(2), range(3))
        if problem.is_feasible(np.array(x))
    ]
    assert best * unit == pytest.approx(min(feasible), rel=1e-9)
    costs = document["problem"]["nodes"]["costs"] + document["problem"]["edges"]["costs"]
    assert all(type(c) is int for row in costs for c in row)


def broken(change) -> str:
    document = example()
    change(document)
    return json.dumps(document)


def nodes(document: dict) -> dict:
    return document["problem"]["nodes"]


def edges(document: dict) -> dict:
    return document["problem"]["edges"]


MALFORMED = {
    "empty": "",
    "not json": "{]",
    "truncated": json.dumps(example())[:200],
    "a list": "[]",
    "no problem": "{}",
    "no nodes": broken(lambda d: nodes(d).update(costs=[], intervals=[], usages=[])),
    "no strategies": broken(lambda d: nodes(d)["costs"].__setitem__(0, [])),
    "negative cost": broken(lambda d: nodes(d)["costs"][1].__setitem__(0, -5)),
    "negative usage": broken(lambda d: nodes(d)["usages"][1].__setitem__(0, -5)),
    "negative edge": broken(lambda d: edges(d)["costs"][1].__setitem__(0, -5)),
    "overflow": broken(lambda d: nodes(d)["costs"][1].__setitem__(0, 10**40)),
    "text cost": broken(lambda d: nodes(d)["costs"][1].__setitem__(0, "x")),
    "nested cost": broken(lambda d: nodes(d)["costs"][1].__setitem__(0, [1])),
    "null cost": broken(lambda d: edges(d)["costs"][1].__setitem__(0, None)),
    "uneven usages": broken(lambda d: nodes(d)["usages"][1].append(3)),
    "fewer intervals": broken(lambda d: nodes(d)["intervals"].pop()),
    "backward interval": broken(lambda d: nodes(d)["intervals"].__setitem__(2, [9, 3])),
    "odd interval": broken(lambda d: nodes(d)["intervals"].__setitem__(2, [9])),
    "loop": broken(lambda d: edges(d)["nodes"].__setitem__(1, [2, 2])),
    "node out of range": broken(lambda d: edges(d)["nodes"].__setitem__(1, [0, 9])),
    "edge without nodes": broken(lambda d: edges(d)["nodes"].__setitem__(1, [])),
    "short edge": broken(lambda d: edges(d)["costs"][1].pop()),
    "fewer edges": broken(lambda d: edges(d)["costs"].pop()),
    "bad limit": broken(lambda d: d["problem"].update(usage_limit="much")),
    "negative limit": broken(lambda d: d["problem"].update(usage_limit=-1)),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_get_one_sentence(tmp_path, case):
    path = tmp_path / "bad.json"
    path.write_text(MALFORMED[case])
    with pytest.raises(MeshwrightError) as caught:
        iopddl.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert 20 < len(message) < 300


def test_a_truncated_gzip_file_gets_one_sentence(tmp_path):
    whole = (DATA / "G.json.gz").read_bytes()
    (tmp_path / "cut.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MeshwrightError, match="truncated"):
        iopddl.read(tmp_path / "cut.json.gz")


def test_directed_cycles_of_edges_are_solved():
    document = with_edges(example(), [([3, 0], [1, 2]), ([4, 0], [5])])
    best = min(direct_cost(document, x) for x in all_choices(document))
    assert solver.solve(iopddl.parse(document, name="cycle"), time_limit_s=5.0).cost == best


def test_a_limit_of_nothing_leaves_what_uses_nothing():
    document = example()
    document["problem"]["usage_limit"] = 0
    nodes(document)["usages"] = [[0], [9, 0], [0, 7, 0], [3, 0], [0]]
    best = min(direct_cost(document, x) for x in all_choices(document))
    found = solver.solve(iopddl.parse(document, name="zero"), time_limit_s=5.0, patient=True)
    assert found.feasible
    assert found.cost == best


def test_huge_allowed_costs_keep_their_order():
    document = example()
    nodes(document)["costs"][1] = [9 * 10**17, 8 * 10**17]
    found = solver.solve(iopddl.parse(document, name="huge"), time_limit_s=5.0)
    assert found.feasible
    assert found.assignment[1] == 1


def run_solve(path: Path, timeout_s: float) -> tuple[int, list[str]]:
    lines: list[str] = []
    now = time.monotonic()
    status = contest.solve_file(str(path), timeout_s=timeout_s, started=now, say=lines.append)
    return status, lines


def test_solve_prints_progress_and_a_checked_answer():
    status, lines = run_solve(DATA / "G.json.gz", 20.0)
    problem = iopddl.read(DATA / "G.json.gz")
    answer = np.array(json.loads(lines[-1]))
    assert status == 0
    assert problem.is_feasible(answer)
    assert problem.cost(answer) <= 1.01 * 217039
    assert any("bound" in line and "gap" in line for line in lines[:-1])


def test_an_infeasible_instance_prints_a_reason_and_an_empty_list(tmp_path):
    document = example()
    document["problem"]["usage_limit"] = 20
    path = tmp_path / "tight.json.gz"
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    status, lines = run_solve(path, 5.0)
    assert status != 0
    assert lines[-1] == "[]"
    assert "usage limit" in lines[-2]


def test_a_timeout_too_short_to_read_still_ends_in_a_list():
    command = [
        sys.executable,
        "-m",
        "placement.solver.contest",
        str(DATA / "G.json.gz"),
        "0.05",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines()[-1].startswith("[")


def test_the_suite_scores_a_folder(tmp_path, capsys):
    (tmp_path / "example.json").write_bytes((DATA / "example.json").read_bytes())
    (tmp_path / "reference.csv").write_text(
        "instance,timeout_s,contest_winner,contest_best,xla_production,lower_bound\n"
        "example,15,340,340,,300\n"
    )
    assert suite.evaluate(str(tmp_path), str(tmp_path / "out")) == 0
    best = min(direct_cost(example(), x) for x in all_choices(example()))
    result = json.loads((tmp_path / "out" / "iopddl.json").read_text())
    assert result["runs"][0]["cost"] == best
    assert result["mean_score"] == pytest.approx(340 / best)
    assert "mean contest score" in capsys.readouterr().out
