"""Lists, shows, compares and diffs runs.

    python -m lsiq.report                                    all runs below runs/, or with --runs DIR another folder
    python -m lsiq.report list --where method=lsi --sort excess/bundled@512
    python -m lsiq.report show RUN                           Markdown to paste into an issue
    python -m lsiq.report compare RUN_A RUN_B ...            settings and metrics side by side, with intervals
    python -m lsiq.report diff RUN_A RUN_B                   the same, and which blocks and linears got worse
    python -m lsiq.report --html RUN ... | STUDY             one HTML page about runs or a study, which needs no network

RUN is a run's id, a part of it that no other run has, its folder or its record file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from lsiq.errors import InputError, LsiqError
from lsiq.report.runs import list_table, notes, read_runs
from lsiq.report.summary import summary
from lsiq.results.find import find_run
from lsiq.track.panels import Table, cell_text, markdown, right_aligned


def main() -> None:
    words = sys.argv[1:]
    if "--html" in words:
        words = ["html", *(word for word in words if word != "--html")]
    lists = not words or (words[0].startswith("-") and words[0] not in ("-h", "--help"))
    args = _parser().parse_args(["list", *words] if lists else words)
    try:
        if args.command == "html":
            _write_page(args)
        elif args.command == "show":
            sys.stdout.write(summary(find_run(args.runs, args.run)[0]))
        else:
            _show(_tables(args), args.markdown)
        sys.stdout.flush()
    except LsiqError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tables(args: argparse.Namespace) -> Iterable[Table | str]:
    if args.command == "list":
        records = read_runs(args.runs, args.where)
        return [list_table(records, args.metric, args.sort), *notes(records)]
    from lsiq.report.differences import side_by_side, what_got_worse

    _check_level(args.level)
    if len(args.run) < 2:
        raise InputError(f"compare {args.run[0]}: give two runs or more; show tells of one")
    runs = [find_run(args.runs, run) for run in args.run]
    tables = side_by_side(runs, args.level, args.all)
    return tables if args.command == "compare" else [*tables, *what_got_worse(runs[0], runs[1], args.most)]


def _write_page(args: argparse.Namespace) -> None:
    from lsiq.report.page.write import write_page

    _check_level(args.level)
    print(write_page(args.runs, args.run, args.out, args.level))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"--level={level}: a share between 0 and 1 is expected, such as 0.95")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsiq.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of runs (default: runs)")
    tables = argparse.ArgumentParser(add_help=False, parents=[every])
    tables.add_argument("--markdown", action="store_true", help="print Markdown instead of tables for a terminal")
    commands = parser.add_subparsers(dest="command", metavar="list | show | compare | diff | html", required=True)
    listing = commands.add_parser("list", parents=[tables], help="all runs, one a line")
    listing.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only runs that agree")
    listing.add_argument("--metric", action="append", default=[], metavar="KEY", help="a metric to show")
    listing.add_argument("--sort", metavar="KEY", help="a metric to sort by, lowest first")
    commands.add_parser("show", parents=[every], help="one run as Markdown").add_argument("run")
    compared = argparse.ArgumentParser(add_help=False, parents=[tables])
    compared.add_argument("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    compared.add_argument("--all", action="store_true", help="all metrics of the records")
    comparing = commands.add_parser("compare", parents=[compared], help="settings and metrics side by side")
    comparing.add_argument("run", nargs="+", help="two or more runs; intervals are against the first")
    page = commands.add_parser("html", parents=[every], help="one page about runs or a study; the same as --html")
    page.add_argument("run", nargs="*", help="runs, folders of runs, studies, files of compact records; all by default")
    page.add_argument("--out", type=Path, help="the file (default: report.html, of one run in its folder)")
    page.add_argument("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    differing = commands.add_parser("diff", parents=[compared], help="two runs, and what got worse")
    differing.add_argument("run", nargs=2)
    differing.add_argument("--most", type=int, default=10, help="blocks and linears to name (default: 10)")
    return parser


def _show(tables: Iterable[Table | str], as_markdown: bool) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    # Piped tables are not cut: whoever reads them has a width of their own.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
    for table in tables:
        if isinstance(table, str):
            console.print(table + "\n", soft_wrap=True, markup=False)
        elif as_markdown:
            sys.stdout.write(f"**{table.name}**\n\n{markdown(table)}\n\n")
        else:
            rich_table = RichTable(title=table.name, title_justify="left")
            for column, right in zip(table.columns, right_aligned(table), strict=True):
                rich_table.add_column(column, justify="right" if right else "left", no_wrap=True)
            for row in table.rows:
                rich_table.add_row(*(cell_text(cell) for cell in row))
            console.print(rich_table)


if __name__ == "__main__":
    main()
