"""The command `effreason completion SHELL`: prints a script that completes commands and options."""

import contextlib
import importlib
import io
import re
from collections.abc import Sequence

from effreason.cli import main
from effreason.cli.arguments import Parser

SHELLS = ("bash", "zsh", "fish")
BASH = """_effreason() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    case ${{COMP_WORDS[1]}} in
{cases}
        *) words="{commands}" ;;
    esac
    [ "$COMP_CWORD" -eq 1 ] && words="{commands}"
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _effreason effreason"""


def run(argv: Sequence[str], prog: str) -> None:
    """Prints the script. Raises: UserError; SystemExit(0) after --help."""
    parser = Parser(prog, "Print a script that completes commands and options. bash: add "
                    'eval "$(effreason completion bash)" to ~/.bashrc; zsh: the same with zsh, to '
                    "~/.zshrc; fish: effreason completion fish > "
                    "~/.config/fish/completions/effreason.fish")
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    shell = parser.parse_args(argv).shell
    options = {command: options_of(command) for command in main.COMMANDS}
    if shell == "fish":
        print(_fish(options))
        return
    cases = "\n".join(f'        {command}) words="{" ".join(names)}" ;;'
                      for command, names in options.items())
    if shell == "zsh":
        print("autoload -U +X compinit && compinit; autoload -U +X bashcompinit && bashcompinit")
    print(BASH.format(cases=cases, commands=" ".join([*main.COMMANDS, "--help", "--version"])))


def options_of(command: str) -> list[str]:
    """Returns the options that the help of a command names."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(f"effreason.cli.{command}").run(["--help"], command)
    return list(dict.fromkeys(re.findall(r"^ +(?:-\w, )?(--[a-z][\w.-]*)", text.getvalue(), re.M)))


def _fish(options: dict[str, list[str]]) -> str:
    lines = [f"complete -c effreason -n __fish_use_subcommand -f -a '{' '.join(options)}'"]
    lines += [f"complete -c effreason -n '__fish_seen_subcommand_from {command}' -l {name[2:]}"
              for command, names in options.items() for name in names]
    return "\n".join(lines)
