"""Style sheets of pages: one that all share, and what pages that follow the reader's light or dark scheme add."""

BASE = """
:root {
  --paper: #fff; --ink: #0f172a; --text: #334155; --muted: #64748b; --line: #e2e8f0; --soft: #f8fafc;
  --code: #f1f5f9; --alarm: #b91c1c; --alarm-paper: #fef2f2; --alarm-ink: #7f1d1d;
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--text);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Helvetica, Arial, sans-serif;
}
main { max-width: 1112px; margin: 0 auto; padding: 56px 24px 72px; }
h1 { margin: 0 0 12px; color: var(--ink); font-size: 36px; line-height: 1.15; letter-spacing: -0.02em; }
h2 { margin: 64px 0 8px; color: var(--ink); font-size: 22px; letter-spacing: -0.01em; }
p { max-width: 76ch; margin: 8px 0; }
.lead { font-size: 18px; }
.kicker { margin: 0 0 8px; color: var(--muted); font-size: 13px; font-weight: 600; letter-spacing: 0.06em;
  text-transform: uppercase; }
.note { max-width: none; margin: 24px 0 0; padding: 12px 16px; border-left: 4px solid var(--alarm);
  background: var(--alarm-paper); color: var(--alarm-ink); }
figure { margin: 24px 0 0; }
figcaption { max-width: 92ch; margin-top: 12px; color: var(--muted); font-size: 14px; line-height: 1.5; }
.plot { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { width: 100%; margin-top: 24px; border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: baseline; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
td:first-child small { display: block; color: var(--muted); font-size: 13px; line-height: 1.4; }
thead th { border-bottom: 2px solid var(--ink); white-space: nowrap; }
tbody td { color: var(--ink); }
ul { max-width: 80ch; margin: 12px 0; padding-left: 20px; }
li { margin: 6px 0; }
code { padding: 2px 5px; border-radius: 4px; background: var(--code); font: 0.88em/1.5 ui-monospace, Menlo, Consolas,
  "Liberation Mono", monospace; }
pre { overflow-x: auto; margin: 12px 0; padding: 14px 16px; border-radius: 8px; background: var(--soft);
  border: 1px solid var(--line); color: var(--ink); font: 13px/1.7 ui-monospace, Menlo, Consolas, "Liberation Mono",
  monospace; }
footer { margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--muted); font-size: 13px; }
@media (max-width: 860px) {
  main { padding: 32px 16px 48px; }
  h1 { font-size: 28px; }
}
@media print { main { max-width: none; padding: 0; } figure, table { break-inside: avoid; } }
"""

REPORT = """
:root { color-scheme: light dark; --best: #166534; --best-paper: #dcfce7; }
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f172a; --ink: #f1f5f9; --text: #cbd5e1; --muted: #94a3b8; --line: #334155; --soft: #1e293b;
    --code: #1e293b; --alarm: #f87171; --alarm-paper: #3b1a20; --alarm-ink: #fecaca;
    --best: #bbf7d0; --best-paper: #14532d;
  }
}
h1, td, code { overflow-wrap: anywhere; }
.figures td.name { min-width: 12em; }
.figures td { text-align: left; }
.figures td.value, .figures th.value { text-align: right; white-space: nowrap; }
.figures td.value { font-weight: 600; }
.figures td.samples { color: var(--muted); font-weight: 400; }
.figures td.value small { display: block; color: var(--muted); font-size: 12px; font-weight: 400; }
.figures td.protocol { color: var(--text); font-size: 14px; line-height: 1.5; }
.figures th { text-align: left; }
.figures tr.source th { padding-top: 24px; color: var(--muted); font-size: 13px; }
details { margin-top: 4px; color: var(--muted); font-size: 13px; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: minmax(7em, max-content) minmax(0, 1fr); gap: 4px 16px; margin: 8px 0;
  font-size: 14px; line-height: 1.5; }
details dl { font-size: 13px; }
dt { color: var(--muted); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 8px 32px; }
.broad { grid-column: 1 / -1; max-width: 960px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 8px 32px;
  align-items: start; }
.picture { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); }
.picture.small { width: 100%; max-width: 640px; image-rendering: pixelated; }
.runs th, .runs td { white-space: nowrap; }
.runs td:first-child { white-space: normal; min-width: 8em; }
.runs th small { display: block; color: var(--muted); font-weight: 400; }
.runs .best { margin: -2px -6px; }
.best { border-radius: 4px; padding: 2px 6px; background: var(--best-paper); color: var(--best);
  font-weight: 700; }
sup { color: var(--alarm); font-weight: 700; }
.narrow { max-width: 720px; }
@media (max-width: 600px) {
  .figures thead { display: none; }
  .figures, .figures tbody, .figures tr, .figures td, .figures th { display: block; width: 100%; }
  .figures td, .figures td.value { padding: 2px 0; border: 0; text-align: left; }
  .figures td:first-child { padding-top: 10px; font-weight: 600; }
  .figures tr { border-bottom: 1px solid var(--line); padding-bottom: 8px; }
  .figures tr.source { border: 0; padding: 0; }
  .figures td.samples::after { content: " images"; }
}
"""
