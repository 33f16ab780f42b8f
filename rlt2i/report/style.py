"""The page's only style sheet."""

from __future__ import annotations

from rlt2i.report.palette import FAILURE, NEUTRAL, SERIES, SERIES_DARK, SUCCESS, colour_stops

_DARK_SERIES = "\n".join(
    f"  .chart .s{i} {{ stroke: {dark}; }} .chart .f{i}, .fill{i} {{ fill: {dark}; background: {dark}; }}"
    for i, dark in enumerate(SERIES_DARK)
)
_SERIES = "\n".join(f".fill{i} {{ background: {colour}; }}" for i, colour in enumerate(SERIES))

STYLE = f"""
:root {{
  --paper: #fbfbfa; --card: #ffffff; --ink: #1d1d1f; --quiet: #5f5f66; --line: #e3e3e8; --grid: #e3e3e8;
  --mark: #ffefb5; --code: #f1f1f3; --warn: #fff4e2; --warn-line: #e0a43c;
  --success: {SUCCESS}; --failure: {FAILURE}; --neutral: {NEUTRAL};
}}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}}
main {{ max-width: 1100px; margin: 0 auto; padding: 3rem 1.5rem 4rem; }}
h1 {{ font-size: 2.1rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 .4rem; font-weight: 650; }}
h2 {{ font-size: 1.35rem; letter-spacing: -0.01em; margin: 0 0 .75rem; font-weight: 620; }}
h3 {{ font-size: 1rem; margin: 1.6rem 0 .5rem; font-weight: 620; }}
h3 small, h4 small {{ font-weight: 400; color: var(--quiet); margin-left: .5rem; font-size: .875rem; }}
h4 {{ font-size: .875rem; margin: 1rem 0 .5rem; font-weight: 600; }}
p {{ margin: 0 0 .9rem; max-width: 46rem; }}
section {{ margin-top: 3.5rem; }}
code, pre {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .86em; }}
code {{ background: var(--code); padding: .1em .35em; border-radius: 4px; overflow-wrap: anywhere; }}
pre {{
  background: var(--code); padding: 1rem 1.2rem; border-radius: 10px; overflow: auto; max-height: 30rem;
  line-height: 1.5; margin: 0;
}}
pre code {{ background: none; padding: 0; }}
mark {{ background: var(--mark); color: inherit; border-radius: 3px; padding: 0 .1em; }}
nav {{ display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: 1.6rem; font-size: .875rem; }}
nav a {{ color: var(--quiet); text-decoration: none; border-bottom: 1px solid var(--line); }}
nav a:hover, nav a:focus-visible {{ color: var(--ink); border-color: currentColor; }}
.eyebrow {{ color: var(--quiet); font-size: .875rem; margin-bottom: .35rem; }}
.result {{ font-size: 1.3rem; line-height: 1.4; max-width: 52rem; margin: 1.1rem 0 .4rem; }}
.quiet {{ color: var(--quiet); }}
.small {{ font-size: .875rem; }}
.missing, .warning {{
  background: var(--warn); border-left: 3px solid var(--warn-line); padding: .7rem 1rem;
    border-radius: 0 8px 8px 0;
  max-width: 52rem;
}}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: .8rem;
  margin: 1.6rem 0; }}
.tile, .card {{ background: var(--card); border: 1px solid var(--line); border-radius: 12px; }}
.tile {{ padding: .85rem 1rem; }}
.tile .value {{ font-size: 1.45rem; font-weight: 620; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }}
.tile .label {{ color: var(--quiet); font-size: .8125rem; }}
.card {{ padding: 1rem 1.1rem; margin-bottom: 1rem; }}
.card > :first-child {{ margin-top: 0; }}
.card > :last-child {{ margin-bottom: 0; }}
.card.half {{ max-width: 620px; }}
.nowrap {{ white-space: nowrap; }}
.parts {{ display: flex; flex-wrap: wrap; gap: .4rem .5rem; margin: 0; padding: 0; list-style: none; }}
.parts li {{
  border: 1px solid var(--line); background: var(--card); border-radius: 99px; padding: .15rem .75rem;
  font-size: .875rem;
}}
.parts span {{ color: var(--quiet); margin-right: .35rem; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem; }}
.charts .card {{ margin: 0; }}
.scroll-x {{ overflow-x: auto; }}
svg.chart {{ width: 100%; height: auto; display: block; }}
.wide svg.chart {{ min-width: 740px; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; }}
th, td {{ text-align: left; padding: .42rem .9rem .42rem 0; border-bottom: 1px solid var(--line);
  vertical-align: middle; }}
th {{ color: var(--quiet); font-weight: 500; font-size: .8125rem; white-space: nowrap; }}
th.number, td.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td:last-child, th:last-child {{ padding-right: 0; }}
.stack {{ display: flex; height: 14px; border-radius: 7px; overflow: hidden; gap: 2px;
  margin: .7rem 0 .6rem; }}
.stack span {{ display: block; min-width: 2px; }}
.key {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .875rem; margin: 0 0 1rem;
  padding: 0; list-style: none; }}
.key i, .key-table i {{ display: inline-block; width: .7em; height: .7em; border-radius: 3px;
  margin-right: .45em; }}
.bg-right {{ background: #9cc7a9; }} .bg-fixed {{ background: var(--success); }}
.bg-broken {{ background: var(--failure); }} .bg-wrong {{ background: #cfcfd4; }}
{_SERIES}
details {{ border-top: 1px solid var(--line); padding: .7rem 0 .9rem; }}
summary {{ cursor: pointer; font-weight: 600; }}
summary small {{ font-weight: 400; color: var(--quiet); margin-left: .5rem; font-size: .875rem; }}
.pairs {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(156px, 1fr)); gap: .9rem; }}
.pair {{ margin: 0; font-size: .8125rem; line-height: 1.35; break-inside: avoid; }}
.pair .images {{ display: grid; grid-template-columns: 1fr 1fr; gap: 9px; padding: 3px; }}
.pair figcaption {{ margin-top: .35rem; overflow-wrap: anywhere; }}
.pixels, .photo {{ display: block; width: 100%; height: auto; border-radius: 4px; }}
.pixels {{ image-rendering: pixelated; border-radius: 2px; }}
.framed {{ outline: 3px solid var(--neutral); border-radius: 2px; }}
.framed.pass {{ outline-color: var(--success); }}
.framed.fail {{ outline-color: var(--failure); outline-style: dashed; }}
.badge {{ font-weight: 600; white-space: nowrap; }}
.badge.fixed {{ color: var(--success); }} .badge.broken {{ color: var(--failure); }}
.badge.right, .badge.wrong {{ color: var(--quiet); font-weight: 400; }}
.scroll-x + .scroll-x {{ margin-top: 1.1rem; }}
.strip {{ display: grid; gap: 4px; padding: 3px; min-width: 620px; font-size: .75rem; align-items: center;
  }}
.strip .row-name {{ color: var(--quiet); line-height: 1.2; }}
.strip .column-name {{ color: var(--quiet); text-align: center; font-variant-numeric: tabular-nums;
  line-height: 1.25; }}
.ramp {{ max-width: 300px; margin: .2rem 0 1.6rem; font-size: .75rem; }}
.ramp .bar {{ height: 12px; border-radius: 3px;
  background: linear-gradient(to right, {", ".join(colour_stops())}); position: relative; }}
.ramp .bar i {{ position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); }}
.ramp .ticks {{ position: relative; height: 1.3em; }}
.ramp .ticks span {{ position: absolute; transform: translateX(-50%); white-space: nowrap; }}
.ramp .ticks span:first-child {{ transform: none; }}
footer {{ margin-top: 4rem; color: var(--quiet); font-size: .8125rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: #161618; --card: #1e1e21; --ink: #ececf0; --quiet: #a3a3ac; --line: #34343a; --grid: #34343a;
    --mark: #5c4a12; --code: #26262a; --warn: #33291a; --warn-line: #c98f2f; --success: #4fb573;
      --failure: #ef7a63;
  }}
  .chart text.ink {{ fill: var(--ink); }} .chart text.quiet {{ fill: var(--quiet); }}
  .chart .grid {{ stroke: var(--grid); }} .chart .axis {{ stroke: var(--quiet); }}
  .bg-right {{ background: #35573f; }} .bg-wrong {{ background: #4a4a50; }}
{_DARK_SERIES}
}}
@media print {{
  @page {{ margin: 14mm; }}
  body {{ font-size: 10.5pt; background: #fff; }}
  main {{ max-width: none; padding: 0; }}
  section {{ margin-top: 2rem; }}
  h2, h3, h4 {{ break-after: avoid; }}
  nav {{ display: none; }}
  .card, .tile, .strip, tr {{ break-inside: avoid; }}
  pre {{ max-height: none; white-space: pre-wrap; }}
  .stack span, .ramp .bar, .key i, .key-table i, mark {{ -webkit-print-color-adjust: exact;
    print-color-adjust: exact; }}
  .charts {{ grid-template-columns: repeat(2, 1fr); }}
  .scroll-x {{ overflow: visible; }}
  .wide svg.chart, .strip {{ min-width: 0; }}
  .strip {{ font-size: .6rem; }}
  .pairs {{ grid-template-columns: repeat(6, 1fr); gap: .5rem; }}
  .pair {{ font-size: .62rem; }}
  .tile .value {{ font-size: 1.15rem; }}
  summary {{ break-after: avoid; }}
}}
@media (max-width: 600px) {{
  main {{ padding: 1.6rem 1rem 3rem; }} h1 {{ font-size: 1.6rem; }} .result {{ font-size: 1.1rem; }}
}}
"""
