"""Reports: from one or several run directories to one HTML page, or to plain text.

    runs = [load_run("runs/digits-bf16"), load_run("runs/digits-fp32")]
    write_html(runs, "report.html")
    print(render_text(runs))

A report reads files and takes plain data; it knows nothing of the training loop that wrote them. Drawing needs the
`report` extra (matplotlib, jinja2); plain text does not.
"""

from floatline.report.load import RunData, is_run_directory, load_run
from floatline.report.page import render_html, write_html
from floatline.report.text import render_text

__all__ = ["RunData", "is_run_directory", "load_run", "render_html", "render_text", "write_html"]
