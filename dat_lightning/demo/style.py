"""The report's style sheet: the one of all pages, the colours of the stages, and the galleries."""

from dat_lightning.pages.style import BASE

CSS = (
    BASE
    + """
:root { --stage1: #c2701c; --stage2: #1f5fae; }
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
tbody td.real { color: var(--muted); }
@media (max-width: 860px) { .pair { grid-template-columns: 1fr; } }
"""
)
