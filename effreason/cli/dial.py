"""The command `effreason dial`: finds the alpha of a trained dial that saves what is wanted.

Options and the run's configuration are checked before jax is imported.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from effreason.cli.arguments import Parser, bounded, check_held_out, check_target, run_config
from effreason.runtime.errors import UserError

_share = bounded("number in (0, 1)", float, lambda x: 0 < x < 1)
_drop = bounded("number >= 0", float, lambda x: 0 <= x <= 100)


def run(argv: Sequence[str], prog: str) -> None:
    """Searches and exports. Raises: UserError, Interrupted, SystemExit(0) after --help."""
    parser = Parser(prog, "Find the smallest alpha of a run with a dial whose responses are short "
                    "enough and as accurate as wanted, on the run's first evaluation set, and "
                    "write the model there. Evaluations that the run has are read, others are "
                    "added to it; the same command continues a search that was stopped.")
    parser.add_argument("run", metavar="RUN", help="the directory of a run with a dial")
    parser.add_argument("--target-tokens", metavar="X", type=_share, required=True,
                        help="mean tokens, at most this share of those at alpha 0")
    parser.add_argument("--max-accuracy-drop", metavar="X", type=_drop, default=1.0,
                        help="lose at most this much accuracy, in percentage points below alpha 0; "
                        "default 1")
    parser.add_argument("--confident", action="store_true", help="both must hold at the ends of "
                        "the 95%% intervals; otherwise the means decide")
    parser.add_argument("--output", metavar="DIR", type=Path,
                        help="a new directory for the model; default RUN/model-alphaA")
    parser.add_argument("--json", action="store_true", help="print one object, nothing else: "
                        "alpha, model, and all points with their intervals")
    options = parser.parse_args(argv)
    directory = Path(options.run)
    config = run_config(directory)
    if not config.reward.dial:
        raise UserError(f"{directory}: must be a run with a dial, trained with reward.alphas; this "
                        f"one was trained with alpha {config.reward.alpha:g} alone")
    if not config.evaluation.problems:
        raise UserError(f"{directory}: has no evaluation set to search on, its "
                        "evaluation.problems is 0")
    if options.output is not None:
        check_target(options.output)
        if not options.output.absolute().parent.is_dir():
            raise UserError(f"--output: {options.output.parent} is not a directory")
    check_held_out(config)

    from rich.console import Console  # a tenth of a second, and jax below a whole one

    from effreason.runs import dial_search

    target = dial_search.Target(tokens=options.target_tokens, confident=options.confident,
                                accuracy_drop=options.max_accuracy_drop)
    found = dial_search.search(directory, target, options.output, Console(stderr=options.json))
    if options.json:
        print(json.dumps(found))
    if found["alpha"] is None:
        raise UserError(f"no alpha of {directory} has {target.words()}; the nearest is alpha "
                        f"{found['nearest']:g}: {dial_search.words(found, found['nearest'])}")
    if not options.json:
        print(f"alpha {found['alpha']:g}: {dial_search.words(found, found['alpha'])}\n"
              f"{dial_search.caution(found)}the model: {found['model']}")
