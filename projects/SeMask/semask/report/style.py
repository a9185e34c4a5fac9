"""How the evaluation report looks, on a screen of any width and on paper."""

STYLE = """
:root { color-scheme: light; --ink: #1d2430; --faint: #5b6675; --rule: #d5dbe3; --blue: #2b6cb0; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    "DejaVu Sans", sans-serif; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
main { max-width: 1240px; margin: 0 auto; padding: 40px 28px 72px; }
header p { margin: 0; color: var(--faint); font-size: 13px; letter-spacing: .06em;
  text-transform: uppercase; }
h1 { margin: 2px 0 18px; font-size: 30px; line-height: 1.2; font-weight: 650;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 21px; font-weight: 650; }
h3 { margin: 30px 0 10px; font-size: 17px; font-weight: 650; }
h4 { margin: 0 0 10px; font-size: 15px; font-weight: 650; overflow-wrap: anywhere; }
h4 .scores { margin-left: 10px; color: var(--faint); font-weight: 400; }
section { margin-top: 44px; padding-top: 26px; border-top: 1px solid var(--rule); }
.note { margin: 0 0 18px; max-width: 78ch; color: var(--faint); }
.facts { display: flex; flex-wrap: wrap; gap: 8px 34px; margin: 0 0 26px; }
.facts dt { color: var(--faint); font-size: 12.5px; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); }
.tile { padding: 14px 18px; border: 1px solid var(--rule); border-radius: 10px;
  background: #f8fafc; }
.tile .name { font-weight: 600; }
.tile .value { font-size: 29px; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tile small { font-size: 15px; font-weight: 400; color: var(--faint); }
.tile .note { margin: 0; font-size: 13px; }
.columns { display: grid; gap: 14px 44px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.stack div + div { max-width: 760px; margin-top: 26px; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: 14px; }
th, td { padding: 4px 0 4px 14px; text-align: right; font-weight: 400; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--faint); font-size: 12.5px; border-bottom: 1px solid var(--rule); }
tbody tr { border-bottom: 1px solid #edf0f4; }
tbody th { max-width: 190px; overflow: hidden; text-overflow: ellipsis; }
.index { display: inline-block; width: 2.4em; color: var(--faint); }
.track { width: 45%; min-width: 90px; }
.track div { position: relative; height: 14px; background: #edf0f4; border-radius: 2px; }
.track b { position: absolute; inset: 0 auto 0 0; background: var(--blue); border-radius: 2px; }
.track i { position: absolute; top: -3px; bottom: -3px; width: 1.5px; background: var(--ink); }
.pairs td { white-space: normal; }
.pairs th:nth-child(2), .pairs td:nth-child(2) { text-align: left; }
.pairs + .note { margin-top: 10px; font-size: 13px; }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 7px; border-radius: 2px;
  box-shadow: inset 0 0 0 1px rgb(0 0 0 / 18%); }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.key { margin-top: 10px; }
article { margin: 0 0 26px; padding: 16px 18px; border: 1px solid var(--rule);
  border-radius: 10px; }
.pictures, .priors { display: grid; gap: 10px; }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(46%, 230px), 1fr)); }
.priors { margin-top: 12px; grid-template-columns: repeat(auto-fit, minmax(min(30%, 170px), 1fr)); }
figure { margin: 0; }
figcaption { margin-bottom: 3px; color: var(--faint); font-size: 13px; }
img { display: block; width: 100%; border-radius: 4px; background: #edf0f4; }
.map { image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 12px 0 0; font-size: 13px; }
@media (max-width: 600px) {
  main { padding: 22px 14px 40px; }
  .track { min-width: 50px; }
  th, td { padding-left: 9px; }
}
@media print {
  main { max-width: none; padding: 0; }
  section { margin-top: 22px; padding-top: 14px; }
  .pictures { grid-template-columns: repeat(4, 1fr); }
  .priors { grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); }
  article, figure, tr, .tile, svg { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
}
"""
