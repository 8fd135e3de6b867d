"""How the page looks: one style sheet for phones, desks and paper."""

from __future__ import annotations

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; color: #1d1d1f;
       background: #fff; max-width: 80rem; margin: 0 auto; padding: 2rem clamp(.9rem, 4vw, 2rem) 4rem; }
h1 { font-size: clamp(1.35rem, 4.5vw, 1.8rem); line-height: 1.25; font-weight: 650; margin: 0 0 .2rem;
     letter-spacing: -.01em; }
h2 { font-size: 1.15rem; font-weight: 650; margin: 2.4rem 0 .5rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.2rem 0 .4rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
.meta, figcaption { color: #55555b; font-size: .875rem; }
.meta { margin: 0; }
figure { margin: 1.6rem 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 1.5rem; }
.panels > img { width: 100%; max-width: 40rem; height: auto; display: block; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1.4rem; padding: 0; margin: .6rem 0;
          font-size: .875rem; }
.legend img { height: 1rem; vertical-align: -.2rem; margin-right: .45rem; }
figcaption { max-width: 52rem; }
.wide { overflow-x: auto; margin: .6rem 0 1.2rem; }
.wide:focus-visible, blockquote:focus-visible, summary:focus-visible { outline: 2px solid #0a5cad; outline-offset: 2px; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; }
thead th { vertical-align: bottom; border-bottom: 1.5px solid #1d1d1f; padding: .3rem .7rem .3rem 0; }
tbody th, td { border-bottom: 1px solid #e2e2e4; padding: .3rem .7rem .3rem 0; vertical-align: top; }
tbody th, .number { white-space: nowrap; }
th:first-child { position: sticky; left: 0; background: #fff; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
.settings { columns: 20rem; font-size: .8rem; padding: 0; list-style: none; }
code, pre { font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f7; padding: .6rem .8rem; border-radius: .4rem; }
blockquote { max-height: 20rem; overflow: auto; }
blockquote { margin: .5rem 0; padding: .5rem .8rem; background: #f5f5f7; border-radius: .4rem; white-space: pre-wrap;
             font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.sample { min-width: 0; }
.warn { font-weight: 650; }
@media print {
  @page { size: A4; margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .panels { grid-template-columns: 1fr 1fr; }
  figure, .wide, tr, blockquote, section > p { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .wide, blockquote { overflow: visible; max-height: none; }
  details::details-content { content-visibility: visible; block-size: auto; }  /* closed ones are printed too */
  table { font-size: 6.5pt; }
  th:first-child { position: static; white-space: normal; }
  thead th, tbody th, td { padding-right: .35rem; }
}
"""
