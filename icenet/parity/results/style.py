"""The style sheet of the page, and its script."""

from __future__ import annotations

SCRIPT = (
    "addEventListener('beforeprint',()=>document.querySelectorAll('details:not(.values)').forEach(d=>d.open=true))"
)

STYLE = """
:root{--text:#1c2126;--muted:#5b6670;--back:#fff;--panel:#f4f6f8;--line:#d5dbe1;
--ok:#1a7f4b;--bad:#c0312b;--warn:#96680a;
--s0:#c2410c;--s1:#2563a8;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--text:#e5e9ed;--muted:#9aa5af;--back:#14181c;--panel:#1e242a;--line:#38424c;
--ok:#4cc38a;--bad:#ff7a70;--warn:#e0ae45;--s0:#fb923c;--s1:#6cb2ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:1rem}
header{border-left:.5rem solid;padding:.25rem 1rem;background:var(--panel);border-radius:.25rem}
header.ok{border-color:var(--ok)}header.bad{border-color:var(--bad)}
h1{font-size:1.2rem;margin:.2rem 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:1.5rem 0 .5rem}summary h2{display:inline-block;margin:1rem 0 0}
summary{cursor:pointer}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em;overflow-wrap:anywhere}
pre{background:var(--panel);padding:.75rem;overflow-x:auto;border-radius:.25rem;white-space:pre-wrap}
small{color:var(--muted)}
.ok>.mark,.ok .mark{color:var(--ok)}.bad>.mark,.bad .mark{color:var(--bad)}.warn>.mark,.warn .mark{color:var(--warn)}
.none>.mark,.none .mark{color:var(--muted)}
.mark{font-weight:700;display:inline-block;min-width:1.2em}
.culprit{border:1px solid var(--bad);border-radius:.25rem;padding:0 1rem .5rem;margin:1rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:.5rem 0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.stages{list-style:none;padding:0;margin:0}
.stages li{display:flex;gap:.25rem;padding:.3rem 0;border-top:1px solid var(--line)}
.tree,.tree ul{list-style:none;padding-left:1.1rem;margin:0}.tree{padding-left:0}
.tree ul{border-left:1px solid var(--line);margin-left:.35rem}
.tree li{padding:.1rem 0}.tree summary{list-style-position:outside;margin-left:1rem}.tree li>.module{margin-left:1rem}
.module.bad code{color:var(--bad);font-weight:700}
.ratio{display:inline-block;position:relative;width:6rem;background:var(--panel);border-radius:.2rem;
margin-left:.5rem;padding:0 .3rem;font-size:.8em;vertical-align:middle}
.ratio .bar{position:absolute;inset:0 auto 0 0;background:var(--line);border-radius:.2rem}
.bad .ratio .bar{background:var(--bad);opacity:.5}.ratio span:last-child{position:relative}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;width:100%}th,td{text-align:left;padding:.2rem .5rem;
border-top:1px solid var(--line);vertical-align:top}thead th{border-top:0;color:var(--muted);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.85rem;color:var(--muted)}
.key{display:inline-block;width:1.4em;height:.5em;margin-right:.4em;border-radius:.2em}
.key.s0{background:var(--s0)}.key.s1{background:var(--s1)}.key.s2{background:var(--muted)}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--muted);font-size:12px}svg .grid{stroke:var(--line);fill:none}
polyline{fill:none;stroke-width:2}polyline.s0{stroke:var(--s0)}polyline.s1{stroke:var(--s1);stroke-dasharray:6 3}
polyline.s2{stroke:var(--muted);stroke-dasharray:2 3}
circle.s0,rect.s0{fill:var(--s0)}circle.s1,rect.s1{fill:var(--s1)}circle.s2{fill:var(--muted)}
svg path.begins{stroke:var(--bad);stroke-dasharray:3 3}svg text.begins{fill:var(--bad);font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:1rem}figure{margin:0;max-width:25rem}
figcaption{font-size:.85rem;overflow-wrap:anywhere}
@media (max-width:40rem){svg.chart text{font-size:20px}td code{overflow-wrap:normal}}
@media print{body{font-size:11px}main{max-width:none;padding:0}.wide{overflow:visible}td code{overflow-wrap:normal}
section,figure,tr{break-inside:avoid}section:has(table),section:has(.tree){break-inside:auto}
details:not(.values)::details-content{content-visibility:visible;display:block}}
"""
