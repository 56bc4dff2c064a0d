"""The command `effreason report DIR`: writes the page of a run or a family, and its plots."""

from collections.abc import Sequence
from pathlib import Path

from effreason.cli.arguments import Parser
from effreason.runs.report import page


def run(argv: Sequence[str], prog: str) -> None:
    """Writes a report and prints its path. Raises: UserError, SystemExit(0) after --help."""
    parser = Parser(prog, "Write the report of a run or a family of runs: one HTML page that needs "
                    "no network, and its plots as PNG and SVG files.")
    parser.add_argument("directory", metavar="DIR", type=Path, help="a run or a family of runs")
    parser.add_argument(
        "--output", metavar="FILE.html", type=Path,
        help="write the page alone, to this file; default DIR/report.html, with the plots in "
        "DIR/plots")
    options = parser.parse_args(argv)

    print(page.write(options.directory, options.output))
