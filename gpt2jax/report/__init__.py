"""Reports of a comparison: HTML, Markdown, plots."""
