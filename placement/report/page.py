"""The page: its order, its style, and the few lines of script that magnify and filter.

Nothing is loaded from anywhere: the content security policy forbids every address.
"""

from __future__ import annotations

import os
import tempfile

from graphs.errors import MeshwrightError
from placement.report import charts, tables, topology
from placement.report.data import ReportData
from placement.report.words import escape, memory, quantity, seconds, share

_STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--ink:#1d1f23;--soft:#62666e;--line:#dddfe3;
--card:#fff;--accent:#2f6fde;--cell:#d9dce2;--bad:#c6362c;--good:#2c8a4b}
@media (prefers-color-scheme:dark){:root{--page:#15171a;--ink:#e7e9ec;--soft:#9ba1ab;
--line:#33373e;--card:#1d2024;--accent:#6ea0ff;--cell:#3a3f47;--bad:#ff7b70;--good:#6fce8d}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1100px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.2rem;margin:44px 0 10px}h3{margin:0 0 4px;font-size:1rem}
code{font:0.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
p{margin:6px 0}.note,i{color:var(--soft);font-size:.875rem;font-style:normal}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;
margin:20px 0 0;padding:0}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px}
.tile b{display:block;font-size:1.35rem;line-height:1.3}
.tile span{color:var(--soft);font-size:.8125rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(260px,100%),1fr));gap:12px;
margin-top:14px}.card{min-width:0}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;width:100%;font-size:.875rem;margin:6px 0}
th,td{text-align:left;padding:5px 10px 5px 0;border-bottom:1px solid var(--line);
vertical-align:top}
th{color:var(--soft);font-weight:500}.n{text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
tr.mine td{font-weight:600}.compare td:nth-child(3){width:30%;min-width:140px}
.track{position:relative;height:14px;margin-top:4px}
.track b{position:absolute;inset:0 auto 0 0;background:var(--cell);border-radius:3px}
.mine .track b{background:var(--accent)}
.track s{position:absolute;top:6px;height:2px;background:var(--ink);opacity:.7}
.track u{position:absolute;top:-4px;bottom:-4px;border-left:2px dotted var(--good)}
.bar{display:flex;height:22px;border-radius:5px;overflow:hidden;background:var(--cell);
margin:10px 0 6px}.bar b{display:block;height:100%}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;margin:6px 0;
font-size:.8125rem}.legend b{display:inline-block;width:10px;height:10px;border-radius:2px;
margin-right:5px}
.lane{margin:0 0 8px}.lane span{position:sticky;left:0;font-size:.8125rem;display:inline-block;
max-width:92vw}
.lane svg{display:block;width:100%;height:22px;background:var(--card);border-radius:3px}
.ticks{display:flex;justify-content:space-between;color:var(--soft);font-size:.75rem}
.wide{display:block;width:100%;height:220px;background:var(--card);border-radius:6px}
.area{fill:var(--accent);opacity:.55}.limit{stroke:var(--bad);stroke-width:2;
vector-effect:non-scaling-stroke}
.t{font-size:11px;fill:var(--soft)}
.zoom,.find{display:inline-flex;gap:8px;align-items:center;font-size:.875rem;color:var(--soft);
margin:10px 0}
input[type=search]{font:inherit;color:inherit;background:var(--card);padding:3px 8px;
border:1px solid var(--line);border-radius:6px;min-width:0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);padding:12px;
border:1px solid var(--line);border-radius:10px;font-size:.8125rem}
.warn{border-left:3px solid var(--bad);padding-left:10px}
.k0{background:#3f78d8;fill:#3f78d8}.k1{background:#dd8a2b;fill:#dd8a2b}
.k2{background:#3c9d6d;fill:#3c9d6d}.k3{background:#b3589a;fill:#b3589a}
.k4{background:#7a68c9;fill:#7a68c9}.k5{background:#c9a227;fill:#c9a227}
.k6{background:#2f9fb5;fill:#2f9fb5}.k7{background:#8a8f98;fill:#8a8f98}
"""

_SCRIPT = """
const zoom=document.getElementById('zoom'),lanes=document.getElementById('lanes');
if(zoom&&lanes)zoom.addEventListener('input',()=>{lanes.style.width=zoom.value*100+'%'});
const find=document.getElementById('find');
if(find)find.addEventListener('input',()=>{const word=find.value.toLowerCase();
for(const row of document.querySelectorAll('#tensors tbody tr'))
row.hidden=!row.textContent.toLowerCase().includes(word)});
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(data: ReportData) -> str:
    """The page as one string of HTML."""
    sections = [
        ("Mesh on the machine", topology.section(data)),
        ("Against the baselines", charts.comparison(data)),
        ("Where the time goes", _time_shares(data) + tables.costs(data)),
        ("The step by lane", charts.timeline(data.timeline)),
        ("Memory over the step", charts.memory_over_step(data)),
        ("Checked by the compiler", tables.checks(data) if data.checks else ""),
        ("Time against other objectives", tables.pareto(data) if data.pareto else ""),
        ("What was searched", _search(data)),
        ("Why it is so", f"<pre>{escape(data.explanation)}</pre>" if data.explanation else ""),
        ("Every tensor", tables.tensors(data)),
    ]
    body = "".join(f"<section><h2>{t}</h2>{inside}</section>" for t, inside in sections if inside)
    warnings = "".join(f"<p class=warn>{escape(w)}</p>" for w in data.warnings)
    versions = ", ".join(f"{escape(k)} {escape(v)}" for k, v in data.versions.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(data.title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(data.title)}</h1>"
        f"<p class=note>{data.n_devices:,} × {escape(data.device)} · objective "
        f"{escape(data.objective)} · optimizer {escape(data.optimizer)} · "
        f"{escape(data.status)}</p>{_tiles(data)}{warnings}{body}"
        f"<p class=note>{versions}</p></main><script>{_SCRIPT}</script></body></html>"
    )


def write(data: ReportData, path: str | os.PathLike[str]) -> None:
    """Writes the page, whole or not at all.

    Raises:
        MeshwrightError: the folder cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(render(data))
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise MeshwrightError(
            f"the report cannot be written to {str(path)!r} ({error.strerror}); "
            "give report= a path in a folder that can be written and has room"
        ) from error


def _tiles(data: ReportData) -> str:
    band = ""
    if data.p10_s is not None and data.p90_s is not None:
        band = f"step time ({seconds(data.p10_s)} to {seconds(data.p90_s)})"
    tiles = [
        (seconds(data.step_time_s), band or "step time"),
        (
            memory(data.peak_memory_bytes),
            f"peak of {memory(data.capacity_bytes)} "
            f"({share(data.peak_memory_bytes, data.capacity_bytes)})",
        ),
    ]
    rivals = [b for b in data.baselines if b.status == "feasible" and b.step_time_s]
    if rivals and data.step_time_s:
        best = min(rivals, key=lambda b: b.step_time_s or 0.0)
        factor = (best.step_time_s or 0.0) / data.step_time_s
        tiles.append((f"{factor:.2f} ×", f"as fast as the best baseline, {best.name}"))
    if data.lower_bound_s and data.step_time_s:
        gap = data.step_time_s / data.lower_bound_s - 1
        tiles.append((f"{100 * gap:.1f} %", "at most above the fastest possible"))
    if data.mfu is not None:
        tiles.append((f"{100 * data.mfu:.1f} %", "model flops utilisation"))
    if data.tokens_per_step and data.step_time_s:
        rate = data.tokens_per_step / data.step_time_s
        tiles.append((f"{rate:,.0f}", "tokens per second"))
    if data.energy_j is not None:
        tiles.append((quantity(data.energy_j, "J"), "energy of a step"))
    tiles.append((seconds(data.planning_time_s), f"to plan, {data.evaluations:,} plans scored"))
    inside = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(said)}</span></div>"
        for value, said in tiles
    )
    return f"<div class=tiles>{inside}</div>"


def _time_shares(data: ReportData) -> str:
    if not data.step_time_s:
        return ""
    rest = data.step_time_s - data.compute_time_s - data.exposed_comm_time_s
    parts = [
        ("compute", data.compute_time_s, seconds(data.compute_time_s)),
        ("exposed communication", data.exposed_comm_time_s, seconds(data.exposed_comm_time_s)),
    ]
    if rest > 1e-3 * data.step_time_s:
        parts.append(("waiting and overhead", rest, seconds(rest)))
    return charts.share_bar(parts, data.step_time_s)


def _search(data: ReportData) -> str:
    said = (
        f"<p>{data.evaluations:,} complete plans scored in {seconds(data.planning_time_s)} by "
        f"<code>{escape(data.optimizer)}</code>.</p>"
    )
    return said + (tables.searched(data.searched) if data.searched else "")
