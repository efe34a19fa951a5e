"""The style sheet of report.html: light, or dark where the reader's system asks for it."""

from __future__ import annotations

STYLE = """\
:root {
  --page: #f6f7f8; --card: #ffffff; --text: #24292f; --muted: #57606a; --line: #e1e4e8;
  --accent: #1f5f99;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1216; --card: #171b21; --text: #dfe3e8; --muted: #9aa4b0; --line: #2b323b;
    --accent: #6aaee6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0 0 4px; font-size: 26px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 18px; }
.summary { margin: 0; color: var(--muted); }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 16px;
  margin: 28px 0 20px;
}
.tiles div, figure, .scroll, details, .facts {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
}
.tiles div { padding: 16px 18px; display: flex; flex-direction: column; }
.tiles strong {
  font-size: 30px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums;
}
.tiles div:first-child strong { color: var(--accent); }
.label, .change, figcaption { color: var(--muted); font-size: 13px; }
.facts {
  display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0 0 28px;
  padding: 14px 18px;
}
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.plots {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 16px;
}
figure { margin: 0; padding: 10px 12px 14px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { padding: 4px 6px 0; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th { text-align: left; color: var(--muted); font-weight: 600; }
th, td { padding: 10px 14px; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
pre {
  margin: 0; font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
details { margin-top: 40px; padding: 14px 18px; }
details summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: 12px; }
"""
