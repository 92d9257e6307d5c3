"""Texts of the root are pages, the README the front one; figures and pictures go with them; so are notebooks with their
outputs; examples are code; formulas are MathML, which browsers show without a script."""

import html
import json
import re
from pathlib import Path

from griffe import Extension
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ROOTED = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files, config):
    for target, source in ROOTED.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "benchmarks" / "results").iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        content = "\n\n".join(part for cell in cells for part in parts(cell))
        content = content.replace("\n", f"\n\n{links(path.name, config.repo_url)}\n", 1)  # below its title
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def links(notebook, repository):
    """To the notebook itself and, where the project has an address on GitHub, to it in Colab, which opens no others."""
    found = f"[Download this notebook]({notebook})"
    _, _, place = (repository or "").rstrip("/").partition("github.com/")
    if place:
        found += f" · [Open it in Colab](https://colab.research.google.com/github/{place}/blob/main/notebooks/{notebook})"
    return found


def parts(cell):
    """A cell of a notebook and its outputs, as Markdown."""
    source = "".join(cell["source"])
    yield source.replace(".ipynb)", ".md)") if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![output](data:image/png;base64,{''.join(data['image/png'].split())})"
        elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
            yield f"```text\n{text}\n```"


def on_page_markdown(markdown, page, config, files):
    """Links that hold in the repository become links that hold in the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)*benchmarks/results/", f"]({up}results/", markdown)
    if page.file.src_uri in ROOTED:
        markdown = re.sub(r"\]\((?:docs/)?decisions/\)", "](decisions/0001-solver.md)", markdown)
        markdown = markdown.replace("](docs/", "](")
        for target, source in ROOTED.items():
            markdown = markdown.replace(f"]({source})", f"]({target})")
    return markdown


def on_page_content(content, page, config, files):
    """Formulas, which arithmatex has found, as MathML."""
    made = lambda found, display: convert(html.unescape(found[1]), display=display)  # noqa: E731
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: made(m, "inline"), content, flags=re.S)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', lambda m: made(m, "block"), content, flags=re.S)


class Examples(Extension):
    """Examples of docstrings, `>>> ...` up to an empty line, are code: to Markdown they are quotes within quotes."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = re.sub(r"^(>>> .*(?:\n.+)*)", r"```pycon\n\1\n```", obj.docstring.value, flags=re.M)
