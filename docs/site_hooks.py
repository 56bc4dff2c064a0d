"""What mkdocs.yml adds to docs/*.md: generated pages, and pages of the files that they link to.

The documents link to files of the repository, such as ../configs/tiny.yaml. A site has pages only,
so each of those files becomes one, and the links lead there.
"""

import ast
import contextlib
import io
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import effreason
from effreason.cli import main

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(?=[)#])")
TOP_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md",
             "README.md": "index.md"}
LANGUAGES = {".yaml": "yaml", ".py": "python", ".sh": "bash", ".sbatch": "bash",
             ".Dockerfile": "dockerfile", ".cff": "yaml"}
MODULES = ("effreason.rl.rewards", "effreason.rl.advantages", "effreason.types")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and a page for each file that a document links to."""
    pages = {"commands.md": commands(), "reference.md": reference()}
    pages |= {target: (ROOT / name).read_text(encoding="utf-8")
              for name, target in TOP_PAGES.items() if name != "README.md"}
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()} | pages
    for uri, text in texts.items():
        for link in LINK.findall(text):
            name = in_repository(link, uri)
            if site_page(name).startswith("source/") and (ROOT / name).exists():
                pages[site_page(name)] = source(name)

    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Makes the links of a page relative to the site."""
    def relative(match: re.Match[str]) -> str:
        target = site_page(in_repository(match[0], page.file.src_uri))
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(relative, markdown)


def in_repository(link: str, uri: str) -> str:
    """Returns the file that a link of a page means, from the top of the repository."""
    folder = "" if uri in ("changelog.md", "contributing.md") else "docs"
    return posixpath.normpath(posixpath.join(folder, posixpath.dirname(uri), link))


def site_page(name: str) -> str:
    """Returns the page, or the picture, of a file of the repository."""
    if name.startswith("docs/") and not name.endswith(".py"):
        return name.removeprefix("docs/")
    return TOP_PAGES.get(name, f"source/{name}.md")


def source(name: str) -> str:
    """Returns the page of a file; of a folder, what the docstrings say of its files."""
    if (ROOT / name).is_dir():
        modules = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
                   for path in sorted((ROOT / name).glob("*.py"))}
        return f"# {name}\n\n" + "".join(
            f"- `{module}`: {text.splitlines()[0]}\n" for module, text in modules.items() if text)
    text = (ROOT / name).read_text(encoding="utf-8").rstrip()
    fence = "`" * (3 if "```" not in text else 4)
    return f"# {name}\n\n{fence}{LANGUAGES.get(Path(name).suffix, 'text')}\n{text}\n{fence}\n"


def commands() -> str:
    """Returns the page with the help of each command, without the fields of the configuration."""
    text = "# Commands\n\n```text\n" + main.USAGE + "```\n"
    for command in main.COMMANDS:
        lines = help_of(command)
        if "model:" in lines:       # from there on it is configuration.md
            lines = [*lines[:lines.index("model:")],
                     "...and every field of the configuration: --section.field VALUE"]
        text += f"\n## {command}\n\n```text\n" + "\n".join(lines) + "\n```\n"
    return text


def help_of(command: str) -> list[str]:
    os.environ |= {"COLUMNS": "80", "NO_COLOR": "1"}
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main.main([command, "--help"])
    return output.getvalue().rstrip().splitlines()


def reference() -> str:
    """Returns the page of everything public, which mkdocstrings fills from the docstrings."""
    names = [f"effreason.{effreason._MODULES[name]}.{name}" for name in effreason.__all__]
    return "# Functions and classes\n\n" + "\n\n".join(f"::: {name}" for name in names) + "".join(
        f"\n\n::: {module}" for module in MODULES) + "\n"
