"""The page's style sheet: light and dark, phone and desktop, no external resources."""

STYLE = """
:root{color-scheme:light dark;--bg:#ffffff;--card:#f7f8fa;--ink:#1b1f24;--soft:#59636e;--rule:#d9dee4;--edge:#1a7f37;
--ok:#1a7f37;--bad:#c11f2d;--wait:#8a6100;--s0:#0064c8;--s1:#c2410c;--s2:#0b7d5d;--s3:#8b3fb8;--s4:#8a6100;
--s5:#4b5563;--s6:#c2185b;--s7:#00727f;
--p0:#0064c8;--p1:#8b3fb8;--p2:#c2410c;--p3:#0b7d5d;--p4:#9a6b00;--p5:#a3adb8;--q5:#1b1f24;--q:#ffffff;
--heat:194,65,12;--h0:#e3f1e6;--h1:#eef3d8;--h2:#fdf0c8;--h3:#fbd3a6;--h4:#f5a48c}
@media(prefers-color-scheme:dark){:root{--bg:#0f1318;--card:#171c23;--ink:#e6eaef;--soft:#9aa5b1;--rule:#2c343e;
--edge:#56d364;--ok:#56d364;--bad:#ff7b72;--wait:#e3b341;--s0:#58a6ff;--s1:#ff9a52;--s2:#3fcf9f;
--s3:#d2a8ff;--s4:#e3b341;--s5:#b1bac4;--s6:#ff7ab2;--s7:#4dd0e1;
--p0:#58a6ff;--p1:#d2a8ff;--p2:#ff9a52;--p3:#3fcf9f;--p4:#e3b341;--p5:#6e7a87;
--q5:#0f1318;--q:#0f1318;--heat:255,154,82;--h0:#123524;
--h1:#2c3a14;--h2:#4a3b0a;--h3:#64330f;--h4:#7d2320}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:20px 16px 48px;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
h1{font-size:1.6rem;line-height:1.2;margin:.2em 0 .1em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2em 0 .6em;padding-bottom:.2em;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:0}h4{font-size:.9rem;margin:0 0 .4em}
p{margin:.5em 0;max-width:76ch}.lead,.note,small,figcaption,.unit{color:var(--soft)}
.lead{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
.side{display:flex;flex-wrap:wrap;gap:8px 56px}caption{text-align:left;font-weight:600;padding:.3em 0}
th,td{padding:.35em .8em .35em 0;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
tr:first-child>th{vertical-align:bottom}
td{white-space:nowrap}tr>th:first-child{font-weight:600}
.scroll{overflow-x:auto;max-width:100%;margin:.4em 0}
.numeric td,.numeric th:not(:first-child){text-align:right}.numeric th:first-child{white-space:nowrap}
.numeric .note td{text-align:left}
:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
.part{margin:1.6em 0 .4em;font-size:1.05rem}h4{margin-top:1.2em}
.heat{border-collapse:separate;border-spacing:4px;font-size:1rem}
.heat th{border:0;padding:.4em .6em;text-align:center;vertical-align:middle}
.heat td{border:3px solid transparent;border-radius:8px;
padding:.5em .9em;min-width:8.5em;text-align:center}.heat td b,.heat td small{display:block}
.heat td b{white-space:nowrap}.heat tr:first-child td{min-width:0;padding:0}
.heat small{font-size:.78rem}
.heat td.none{color:var(--soft);border:1px dashed var(--rule);white-space:normal;max-width:18em}
.heat td.same,.heatkey i.same{border:3px solid var(--ink)}
.h0{background:var(--h0)}.h1{background:var(--h1)}.h2{background:var(--h2)}.h3{background:var(--h3)}
.h4{background:var(--h4)}
.heat .h0 small,.heat .h1 small,.heat .h2 small,.heat .h3 small,.heat .h4 small{color:var(--ink)}
.heatkey{font-size:.82rem;color:var(--soft)}.heatkey i{width:22px;height:14px;border-radius:4px;flex:none;
border:1px solid var(--rule)}
.cards{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,270px),1fr));margin:.8em 0}
.card{padding:12px 14px;background:var(--card);border:1px solid var(--rule);border-left:5px solid var(--soft);
border-radius:10px;overflow-wrap:anywhere}.card ul{margin:.4em 0;padding-left:1.2em}.card p{font-size:.88rem}
.passed-card{border-left-color:var(--ok)}.failed-card{border-left-color:var(--bad)}
.incomplete-card{border-left-color:var(--wait)}.card h3{font-size:1.1rem;display:flex;gap:.6em}
.copy{padding:12px 14px;background:var(--card);border:1px solid var(--rule);border-radius:8px;white-space:pre;
overflow-x:auto;user-select:all}
.verdict{font-size:1rem}.verdict td:not(.passed,.failed,.incomplete),.verdict th:not(:first-child){text-align:right}
.verdict th:nth-child(3),.verdict th:nth-child(5),
.verdict .passed,.verdict .failed,.verdict .incomplete{text-align:left!important}
.verdict th,.verdict td{padding-right:1.4em;white-space:nowrap}
.passed,.status-equal{color:var(--ok);font-weight:600}.failed,.status-differs{color:var(--bad);font-weight:600}
.incomplete{color:var(--wait);font-weight:600}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.3em 1.6em;margin:0 0 .8em;padding:0}
.legend li{display:flex;align-items:center;gap:.5em;overflow-wrap:anywhere}.swatch{width:34px;height:12px;flex:none}
.grid-of{display:grid;gap:16px;margin:.8em 0;grid-template-columns:repeat(auto-fill,minmax(min(100%,370px),1fr))}
figure{margin:0;padding:14px 14px 10px;background:var(--card);border:1px solid var(--rule);border-radius:10px;
display:flex;flex-direction:column;min-width:0}
figure .legend{font-size:.85rem;margin:.4em 0 0}
figure.wide{grid-column:1/-1}
.unit{font-size:.85rem;margin:0 0 .5em}
figcaption{font-size:.85rem;line-height:1.4;margin-top:.4em}
details{margin-top:auto;padding-top:.5em;font-size:.82rem;overflow-x:auto}summary{cursor:pointer;color:var(--soft)}
details table{font-size:.78rem;margin-top:.4em}details td,details th{padding:.2em .7em .2em 0}
.chart{position:relative;min-height:1px;touch-action:pan-y pinch-zoom;user-select:none;-webkit-user-select:none}
.chart svg{width:100%;height:auto;display:block;overflow:visible}
.cursor{position:absolute;top:0;bottom:0;pointer-events:none;border-left:1px dashed var(--soft);
background:color-mix(in srgb,var(--s0) 15%,transparent)}figure{overflow:clip}
.tip{position:fixed;z-index:9;pointer-events:none;padding:.35em .7em;background:var(--bg);border:1px solid var(--soft);
border-radius:6px;font-size:.82rem;font-variant-numeric:tabular-nums;max-width:min(92vw,44em);overflow-wrap:anywhere}
.tip [class^=s]{color:var(--c);font-weight:600}
.legend [role=button]{cursor:pointer;padding:.1em .3em;border-radius:6px}
.legend [role=button]:hover{background:var(--card)}
.legend [aria-pressed=false]{opacity:.45;text-decoration:line-through}
.zoom{display:flex;flex-wrap:wrap;align-items:center;gap:.3em .5em;font-size:.88rem;margin:0 0 .8em}
.zoom input{width:6.5em}.zoom input,.zoom button{font:inherit;color:inherit;background:var(--card);padding:.15em .5em;
border:1px solid var(--rule);border-radius:6px}.zoom button{cursor:pointer}
.contract td{white-space:normal;min-width:4em;max-width:32ch;overflow-wrap:anywhere}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linecap:round}.m{fill:var(--c);stroke:var(--card);stroke-width:1}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}.s5{--c:var(--s5)}
.s6{--c:var(--s6)}.s7{--c:var(--s7)}
.s1 .line{stroke-dasharray:7 3.5}.s2 .line{stroke-dasharray:2 4}.s3 .line{stroke-dasharray:9 3 2 3}
.s4 .line{stroke-dasharray:14 4}.s5 .line{stroke-dasharray:5 3 1 3 1 3}
.s6 .line{stroke-dasharray:12 3 3 3 3 3}.s7 .line{stroke-dasharray:4 4}
.sample{margin:0 0 14px;padding:10px 14px;background:var(--card);border:1px solid var(--rule);
border-left:4px solid var(--c);border-radius:6px}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;
font:13.5px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.prompt{color:var(--soft)}code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.t1{background:rgba(var(--heat),.12)}.t2{background:rgba(var(--heat),.28)}.t3{background:rgba(var(--heat),.5)}
.t4{background:rgba(var(--heat),.8)}
.notice{padding:.6em 1em;border-left:4px solid var(--wait);background:var(--card);border-radius:6px}
@media(max-width:600px){
body{padding:14px 12px 40px}h1{font-size:1.3rem}.verdict{font-size:.88rem}.verdict th{white-space:normal}
.verdict th,.verdict td{padding-right:.8em}.heat td{padding:.4em .2em;min-width:5em;white-space:normal}
.heat th{padding:.3em .3em .3em 0}figure{padding:12px 10px 8px}}
@media print{.grid-of{grid-template-columns:1fr 1fr}
figure,.sample{break-inside:avoid}details,.zoom,.tip,.cursor{display:none}}
"""
