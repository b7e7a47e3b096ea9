"""A report as one HTML file that needs nothing else: style inside, images as data URIs."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from unified.demos.charts import chart_png
from unified.demos.report import Card, Report, Row, Section

#: images are shown this wide, in CSS pixels
SHOWN = 78

STYLE = """
:root { --ink: #1d2330; --soft: #667085; --line: #e6e8ee; --paper: #fff; --ground: #f5f6f9;
  --accent: #3b5bdb; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; letter-spacing: -.02em; margin: 0 0 6px; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 0 0 2px; }
p.about { color: var(--soft); margin: 0 0 18px; max-width: 74ch; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 14px;
  padding: 24px 26px; margin-top: 22px; }
table { width: 100%; border-collapse: collapse; }
th { text-align: left; font-size: 12px; font-weight: 600; color: var(--accent);
  text-transform: uppercase; letter-spacing: .05em; padding: 20px 12px 6px 0; }
tr:first-child th { padding-top: 0; }
td { padding: 8px 14px 8px 0; border-top: 1px solid var(--line); vertical-align: top; }
td.value { font-weight: 650; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.beside { font-variant-numeric: tabular-nums; }
td.beside, td.meaning { color: var(--soft); font-size: 14px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(166px, 1fr));
  gap: 18px 12px; }
figure { margin: 0; }
figure img { border: 1px solid var(--line); border-radius: 10px; background: #fff;
  image-rendering: auto; margin-right: 4px; }
figcaption { font-size: 12.5px; line-height: 1.35; padding-top: 5px; }
figcaption .under { display: block; color: var(--soft); }
.passage { grid-column: 1 / -1; border-left: 3px solid var(--line); padding-left: 14px; }
.passage .under { color: var(--accent); }
.charts img { width: 100%; }
"""


def html(report: Report) -> str:
    """The whole page."""
    sections = "".join(_section(section) for section in report.sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{escape(report.title)}</h1><p class="about">{escape(report.about)}</p>'
        f"</header>{_table(report.table)}{_charts(report)}{sections}</main></body></html>\n"
    )


def _table(table: dict[str, list[Row]]) -> str:
    lines = []
    for heading, rows in table.items():
        lines.append(f'<tr><th colspan="4">{escape(heading)}</th></tr>')
        lines += [
            f'<tr><td>{escape(r.name)}</td><td class="value">{escape(r.value)}</td>'
            f'<td class="beside">{escape(r.beside)}</td>'
            f'<td class="meaning">{escape(r.meaning)}</td></tr>'
            for r in rows
        ]
    return f"<section><table>{''.join(lines)}</table></section>"


def _charts(report: Report) -> str:
    if not report.charts:
        return ""
    picture = data_uri(chart_png(report.charts))
    return (
        '<section><h2>Training</h2><p class="about">Losses by step; dots are held-out examples.'
        f'</p><div class="charts"><img src="{picture}" alt="Loss curves of every stage"></div>'
        "</section>"
    )


def _section(section: Section) -> str:
    cards = "".join(_card(card) for card in section.cards)
    return (
        f'<section><h2>{escape(section.title)}</h2><p class="about">{escape(section.about)}</p>'
        f'<div class="cards">{cards}</div></section>'
    )


def _card(card: Card) -> str:
    text, under = escape(card.text), escape(card.under)
    if not card.images:
        return f'<div class="passage">{text} <span class="under">{under}</span></div>'
    images = "".join(
        f'<img src="{data_uri(_png(image))}" width="{SHOWN}" height="{SHOWN}" alt="{text}">'
        for image in card.images
    )
    return (
        f"<figure>{images}<figcaption>{text}"
        f'<span class="under">{under}</span></figcaption></figure>'
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
