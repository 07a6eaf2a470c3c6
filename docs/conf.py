"""How Sphinx makes a site of these documents: `scripts/docs`."""

project = "Elastic"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "Elastic"
myst_heading_anchors = 3
suppress_warnings = ["toc.not_included"]  # decisions are listed in decisions/README.md
