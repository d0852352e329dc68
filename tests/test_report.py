"""The report: one page that needs nothing else, complete, safe, and fit for a phone."""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.errors import MeshwrightError
from placement import report
from placement.report import charts, tables, topology, words

GIB = 2**30


def make_data(layers: int = 2, **changes) -> report.ReportData:
    tensors = [
        report.TensorRow(
            name=f"params/layers/{i}/{name}",
            kind="parameter",
            shape=(4096, 4096),
            dtype="float32",
            spec="P('data', 'model')",
            bytes_total=64 * 2**20,
            bytes_per_device=2**18,
        )
        for i in range(layers)
        for name in ("query", "mlp_in")
    ]
    values = dict(
        title="Llama-3-8B on v5e:16x16",
        cluster="v5e:16x16",
        device="v5e",
        n_devices=256,
        objective="time",
        optimizer="search",
        status="feasible",
        step_time_s=1.5,
        compute_time_s=1.2,
        exposed_comm_time_s=0.3,
        peak_memory_bytes=11 * GIB,
        capacity_bytes=16 * GIB,
        planning_time_s=4.0,
        evaluations=1234,
        lower_bound_s=1.45,
        p10_s=1.4,
        p90_s=1.7,
        physical_axes=(
            report.PhysicalAxis(name="x", size=16, network="ICI", wraps=True),
            report.PhysicalAxis(name="y", size=16, network="ICI", wraps=True),
        ),
        mesh_axes=(
            report.MeshAxis(
                name="data",
                size=16,
                spans=(report.Span(physical_axis=1, size=16),),
                role="fully-sharded",
                why="The batch divides it.",
                next_best="32 costs 3 % more",
            ),
            report.MeshAxis(
                name="model", size=16, spans=(report.Span(physical_axis=0, size=16),), role="tensor"
            ),
        ),
        tensors=tuple(tensors),
        timeline=tuple(
            report.Event(lane=lane, name=kind, start_s=i * 0.1, end_s=i * 0.1 + 0.09, kind=kind)
            for i in range(10)
            for lane, kind in (("compute", "matmul"), ("ICI x", "all-gather"))
        ),
        memory=tuple(
            report.MemoryPoint(time_s=0.1 * i, live_bytes=(5 + i) * GIB) for i in range(7)
        ),
        memory_parts=(report.MemoryPart(name="parameters", at_peak_bytes=4 * GIB),),
        costs=(
            report.CostRow(name="matmul", kind="compute", time_s=1.2, exposed_time_s=1.2),
            report.CostRow(
                name="all-gather over data",
                kind="communication",
                time_s=0.5,
                exposed_time_s=0.3,
                n_calls=64,
                moved_bytes=GIB,
            ),
        ),
        baselines=(
            report.CandidateRow(
                name="fsdp",
                status="feasible",
                mesh="data 256",
                step_time_s=1.8,
                peak_memory_bytes=9 * GIB,
            ),
            report.CandidateRow(
                name="data_parallel",
                status="does not fit",
                mesh="data 256",
                step_time_s=None,
                peak_memory_bytes=120 * GIB,
            ),
        ),
        explanation="data: the batch.\nmodel: the heads.",
        warnings=("one parameter is not sharded",),
        versions={"meshwright": "0.1.0"},
    )
    return report.ReportData(**{**values, **changes})


class _Structure(html.parser.HTMLParser):
    """Collects addresses, and checks that every opened element of a kind is closed."""

    void = frozenset({"meta", "input", "rect", "line", "path", "th", "td", "tr", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.void:
            while self.open and self.open[-1] in ("li",) and tag != "li":
                self.open.pop()
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()


def test_page_is_well_formed_and_loads_nothing():
    page = report.render(make_data())
    structure = _Structure(page)
    assert structure.open == []
    assert structure.addresses == []
    assert not re.search(r"https?://|@import|url\(", page)


def test_page_shows_every_number_of_its_data():
    data = make_data()
    page = report.render(data)
    for row in data.baselines:
        assert row.name in page
    for axis in data.mesh_axes:
        assert axis.why in page and f"<code>{axis.name}</code>" in page
    for shown in (words.seconds(data.step_time_s), words.memory(data.peak_memory_bytes), "1,234"):
        assert shown in page
    assert data.warnings[0] in page
    assert "all-gather over data" in page


def test_text_from_a_plan_cannot_become_markup():
    nasty = '<script>alert("x")</script>'
    page = report.render(make_data(title=nasty, explanation=nasty, warnings=(nasty,)))
    assert nasty not in page
    assert page.count("<script>") == 1


def test_an_empty_plan_still_has_a_page():
    empty = report.ReportData(
        title="nothing",
        cluster="cpu:1",
        device="cpu",
        n_devices=1,
        objective="time",
        optimizer="search",
        status="no plan fits",
        step_time_s=0.0,
        compute_time_s=0.0,
        exposed_comm_time_s=0.0,
        peak_memory_bytes=0.0,
        capacity_bytes=0.0,
        planning_time_s=0.0,
        evaluations=0,
    )
    assert _Structure(report.render(empty)).open == []


@given(
    sizes=st.permutations([2, 4, 8]),
    order=st.permutations([0, 1, 2]),
)
def test_mesh_coordinates_number_the_devices_once(sizes, order):
    """Axes laid on whole physical axes, or on parts of one, give every device its own place."""
    split = report.MeshAxis(
        name="a",
        size=sizes[order[0]] // 2,
        spans=(report.Span(physical_axis=order[0], size=sizes[order[0]] // 2, stride=2),),
    )
    joined = report.MeshAxis(
        name="b",
        size=2 * sizes[order[1]] * sizes[order[2]],
        spans=(
            report.Span(physical_axis=order[2], size=sizes[order[2]]),
            report.Span(physical_axis=order[0], size=2),
            report.Span(physical_axis=order[1], size=sizes[order[1]]),
        ),
    )
    places = {
        (topology.coordinate(split, (x, y, z)), topology.coordinate(joined, (x, y, z)))
        for x in range(sizes[0])
        for y in range(sizes[1])
        for z in range(sizes[2])
    }
    assert places == {(i, j) for i in range(split.size) for j in range(joined.size)}


@given(st.lists(st.integers(1, 70_000), min_size=1, max_size=5))
def test_the_drawn_window_is_bounded(sizes):
    axes = tuple(
        report.PhysicalAxis(name=f"a{i}", size=n, network="ICI") for i, n in enumerate(sizes)
    )
    drawn = topology.window(axes)
    total = 1
    for n, axis in zip(drawn.sizes, axes):
        assert 1 <= n <= axis.size
        total *= n
    assert total <= 1536
    assert drawn.full == (drawn.sizes == tuple(sizes))


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 0.2), st.sampled_from("ab")),
        min_size=1,
        max_size=40,
    )
)
def test_joining_short_events_keeps_the_extent_and_the_count(raw):
    events = [
        report.Event(lane="l", name=kind, start_s=start, end_s=start + length, kind=kind)
        for start, length, kind in raw
    ]
    joined = charts.join_short(events, 0.05)
    assert min(e.start_s for e in joined) == min(e.start_s for e in events)
    assert max(e.end_s for e in joined) == max(e.end_s for e in events)
    more = sum(int(m[1]) for e in joined if (m := re.search(r" and (\d+) more$", e.name)))
    assert len(joined) + more == len(events)


def test_repeated_layers_fold_and_keep_their_bytes():
    data = make_data(layers=126)
    folded = tables.fold(data.tensors)
    assert len(folded) == 2
    assert sum(f.count for f in folded) == len(data.tensors)
    total = sum(f.count * f.row.bytes_per_device for f in folded)
    assert total == sum(t.bytes_per_device for t in data.tensors)


@given(st.floats(1e-9, 1e6), st.floats(1.01, 10))
def test_longer_times_never_read_shorter(value, factor):
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}

    def back(text: str) -> float:
        number, unit = text.split()
        return float(number.replace(",", "")) * units[unit]

    assert back(words.seconds(value)) == pytest.approx(value, rel=6e-3)
    assert back(words.seconds(value * factor)) >= back(words.seconds(value)) * 0.999


def test_write_is_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "report.html"
    report.write(make_data(), target)
    assert target.read_text().endswith("</html>")
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(MeshwrightError, match="cannot be written"):
        report.write(make_data(), tmp_path / "file" / "report.html")


CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser")) if p), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium to run this"
)


def _browse(folder, page: str, *, dark: bool = False, width: int = 360) -> dict:
    """Opens the page in a frame of a width; what a script in the outer page measures there."""
    assert CHROMIUM is not None
    source = folder / "wrapper.html"
    quoted = json.dumps(page).replace("</", "<\\/")
    source.write_text(
        "<!doctype html><body><script>"
        "const errors=[];const frame=document.createElement('iframe');"
        f"frame.style.cssText='width:{width}px;height:800px;border:0';"
        f"frame.srcdoc={quoted};"
        "frame.onload=()=>{const d=frame.contentDocument,w=frame.contentWindow;"
        "const zoom=d.getElementById('zoom');if(zoom){zoom.value=9;"
        "zoom.dispatchEvent(new w.Event('input'))}"
        "const find=d.getElementById('find');find.value='query';"
        "find.dispatchEvent(new w.Event('input'));"
        "const rows=[...d.querySelectorAll('#tensors tbody tr')];"
        "document.title=JSON.stringify({scroll:d.documentElement.scrollWidth,"
        "page:w.getComputedStyle(d.body).backgroundColor,"
        "lanes:d.getElementById('lanes')?.style.width,rows:rows.length,"
        "visible:rows.filter(r=>!r.hidden).map(r=>r.textContent),"
        "height:d.documentElement.scrollHeight})};"
        "document.body.append(frame);</script>",
        encoding="utf-8",
    )
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=3000",
        "--dump-dom",
        source.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stdout[:500]
    return json.loads(html.unescape(title[1]))


@needs_browser
def test_a_browser_opens_it_on_a_phone_without_console_errors(tmp_path):
    page = report.render(make_data(layers=40))
    seen = _browse(tmp_path, page)
    assert seen["scroll"] <= 360
    assert seen["lanes"] == "900%"
    assert seen["rows"] == 2 and len(seen["visible"]) == 1 and "query" in seen["visible"][0]


@needs_browser
def test_dark_mode_darkens_the_page(tmp_path):
    page = report.render(make_data())

    def brightness(colour: str) -> float:
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3]))

    light = _browse(tmp_path, page)["page"]
    dark = _browse(tmp_path, page, dark=True)["page"]
    assert brightness(dark) < 120 < 600 < brightness(light)


def test_a_page_of_thousands_of_tensors_renders_quickly():
    """An unrolled 126-layer model with moments: drawn in well under two seconds."""
    distinct = tuple(
        report.TensorRow(
            name=f"params/{name}_{i}x/kernel",
            kind="parameter",
            shape=(16384, 16384),
            dtype="float32",
            spec="P('data', 'model')",
            bytes_total=2**30,
            bytes_per_device=2**22,
        )
        for i in range(400)
        for name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    started = time.perf_counter()
    page = report.render(make_data(tensors=distinct))
    assert time.perf_counter() - started < 2.0
    assert len(page) < 3_000_000
