"""The report's style sheet."""

CSS = """
:root {
  --ink: #0f172a; --text: #334155; --muted: #64748b; --line: #e2e8f0; --soft: #f8fafc;
  --stage1: #c2701c; --stage2: #1f5fae;
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: #fff; color: var(--text);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Helvetica, Arial, sans-serif;
}
main { max-width: 1112px; margin: 0 auto; padding: 56px 24px 72px; }
h1 { margin: 0 0 12px; color: var(--ink); font-size: 36px; line-height: 1.15; letter-spacing: -0.02em; }
h2 { margin: 64px 0 8px; color: var(--ink); font-size: 22px; letter-spacing: -0.01em; }
p { max-width: 76ch; margin: 8px 0; }
.lead { font-size: 18px; }
.kicker { margin: 0 0 8px; color: var(--muted); font-size: 13px; font-weight: 600; letter-spacing: 0.06em;
  text-transform: uppercase; }
.note { max-width: none; margin: 24px 0 0; padding: 12px 16px; border-left: 4px solid #b91c1c; background: #fef2f2;
  color: #7f1d1d; }
figure { margin: 24px 0 0; }
figcaption { max-width: 92ch; margin-top: 12px; color: var(--muted); font-size: 14px; line-height: 1.5; }
.plot { display: block; width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 32px; align-items: start; }
.pair h3 { display: flex; justify-content: space-between; align-items: baseline; gap: 12px; margin: 0 0 8px;
  font-size: 15px; }
.pair h3 small { color: var(--muted); font-size: 13px; font-weight: 400; }
.stage1 { color: var(--stage1); }
.stage2 { color: var(--stage2); }
.pixels { display: block; width: 100%; height: auto; image-rendering: pixelated; }
.strip { margin-top: 20px; }
.strip h3 { margin: 0 0 8px; color: var(--muted); font-size: 15px; }
.digits { display: grid; grid-template-columns: repeat(10, 1fr); color: var(--muted); font-size: 13px; line-height: 1.8;
  text-align: center; }
.tiles { display: grid; gap: 3px; color: var(--muted); font-size: 13px; line-height: 1; text-align: center; }
.tiles > span { align-self: center; padding: 3px 0; }
.tiles > .best { color: var(--ink); font-weight: 700; }
.tile { border-bottom: 3px solid transparent; }
.tile.read { border-bottom-color: #4ade80; }
.tile.original img { outline: 2px solid #f59e0b; outline-offset: -1px; }
.mark { display: inline-block; width: 20px; height: 3px; margin: 0 4px 4px 0; vertical-align: middle;
  background: #4ade80; }
.mark.frame { width: 12px; height: 12px; margin-bottom: 2px; background: none; border: 2px solid #f59e0b; }
.wide { overflow-x: auto; }
table { width: 100%; margin-top: 24px; border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: baseline; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
td:first-child small { display: block; color: var(--muted); font-size: 13px; line-height: 1.4; }
thead th { border-bottom: 2px solid var(--ink); white-space: nowrap; }
tbody td { color: var(--ink); }
tbody td.real { color: var(--muted); }
ul { max-width: 80ch; margin: 12px 0; padding-left: 20px; }
li { margin: 6px 0; }
code { padding: 2px 5px; border-radius: 4px; background: #f1f5f9; font: 0.88em/1.5 ui-monospace, Menlo, Consolas,
  "Liberation Mono", monospace; }
pre { overflow-x: auto; margin: 12px 0; padding: 14px 16px; border-radius: 8px; background: var(--soft);
  border: 1px solid var(--line); color: var(--ink); font: 13px/1.7 ui-monospace, Menlo, Consolas, "Liberation Mono",
  monospace; }
footer { margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--muted); font-size: 13px; }
@media (max-width: 860px) {
  main { padding: 32px 16px 48px; }
  h1 { font-size: 28px; }
  .pair { grid-template-columns: 1fr; }
}
@media print { main { max-width: none; padding: 0; } figure, table { break-inside: avoid; } }
"""
